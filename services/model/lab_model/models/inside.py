"""A second copy of a causal LM in transformers, which gives hidden states and attention weights.

Knows token ids and numbers. Knows nothing of text, HTTP or the engine.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.utils.quantization_config import GgufConfig

from ..host import cores
from .catalogue import AppArgs
from .memory import pick_device
from .sources import resolve_source

NORMS = ("norm", "ln_f", "final_layer_norm", "final_layernorm")  # names of the last norm in transformers' models


class Inside:
    """One model, in float32, so that a lens does not show the rounding of a smaller dtype."""

    def __init__(self, args: AppArgs) -> None:
        """Raises OSError or CatalogueError."""
        torch.set_num_threads(args.threads or cores())
        source = resolve_source(args.entry, args.folder)
        arguments: dict[str, Any] = {**source.arguments(), "dtype": torch.float32, "attn_implementation": "eager"}
        if source.gguf_file:
            arguments["quantization_config"] = GgufConfig(gguf_file=source.gguf_file, dequantize=True)
        model: Any = AutoModelForCausalLM.from_pretrained(source.folder, **arguments)
        # No GPU is reserved for the copy: it takes one that it sees, and else the CPU.
        wanted = args.entry.device or args.device
        self._model = model.to(pick_device("auto" if wanted == "cuda" else wanted)).eval()
        self._norm: Any = next(
            (getattr(model.base_model, name) for name in NORMS if hasattr(model.base_model, name)), torch.nn.Identity()
        )

    @torch.inference_mode()
    def logit_lens(self, ids: list[int], top: int) -> list[list[list[tuple[int, float]]]]:
        """The next tokens that each layer gives if it is read as the last one: its hidden states go through the model's
        last norm and head (nostalgebraist 2020). (id, probability) of the `top` most likely, by layer and token; layer
        0 is the embedding.
        """
        output = self._forward(ids, output_hidden_states=True)
        layers = []
        for place, hidden in enumerate(output.hidden_states):
            last = place == len(output.hidden_states) - 1  # transformers has applied the norm to it
            chances = self._model.lm_head(hidden[0] if last else self._norm(hidden[0])).softmax(-1)  # (tokens, vocab)
            best, tokens = chances.topk(top)
            layers.append([
                list(zip(row, values, strict=True)) for row, values in zip(tokens.tolist(), best.tolist(), strict=True)
            ])  # fmt: skip
        return layers

    @torch.inference_mode()
    def attention(self, ids: list[int], layer: int) -> tuple[int, list[list[list[float]]]]:
        """The number of layers, and the attention weights of one of them: by head, from each token to each, 4 digits.
        Raises IndexError for a layer that the model does not have."""
        found = self._forward(ids, output_attentions=True).attentions
        if not 0 <= layer < len(found):
            raise IndexError(f"the model has layers 0 to {len(found) - 1}")
        weights: list[list[list[float]]] = found[layer][0].double().round(decimals=4).tolist()
        return len(found), weights

    def _forward(self, ids: list[int], **wanted: bool) -> Any:
        return self._model(input_ids=torch.tensor([ids], device=self._model.device), use_cache=False, **wanted)
