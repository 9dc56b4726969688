"""The weights of a Gemma 3 in a GGUF file, as a transformers model.

transformers reads such a file three times in Python, which takes 20 s. Knows the names of tensors in both. Knows
nothing of how a forward uses them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

from .gguf import GGUFFile, Tensor

# Names in the file -> in transformers. Its norms multiply by 1 + weight, and the file holds that sum.
PARTS = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_norm": "input_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
ROWS = 8192  # unpacked at once: a table of 262,144 rows would take 700 MB as float32
# Every sixth layer attends to all tokens; in the others the rotary base differs (https://arxiv.org/abs/2503.19786).
PERIOD, LOCAL_BASE = 6, 10_000.0


def can_read(file: GGUFFile) -> bool:
    """Whether the file holds exactly the tensors of a Gemma 3 whose text model needs no scaled positions."""
    values = file.metadata
    if values.get("general.architecture") != "gemma3":
        return False
    count = values.get("gemma3.block_count")
    if not isinstance(count, int) or not 0 < count <= len(file.tensors):
        return False
    names = {f"blk.{index}.{part}.weight" for index in range(count) for part in PARTS}
    scaling = [name for name in values if name.startswith("gemma3.rope.scaling")]
    return set(file.tensors) == names | {"token_embd.weight", "output_norm.weight"} and not scaling


def load(file: GGUFFile, dtype: torch.dtype, on_layer: Callable[[float], None] = lambda _: None) -> Any:
    """A Gemma3ForCausalLM of a file for which `can_read` holds. on_layer: called with the share of layers read."""
    values = {name.removeprefix("gemma3."): value for name, value in file.metadata.items()}
    count = values["block_count"]
    base = values.get("rope.freq_base", 1_000_000.0)
    config = Gemma3TextConfig(
        vocab_size=file.tensors["token_embd.weight"].shape[0],
        hidden_size=values["embedding_length"],
        intermediate_size=values["feed_forward_length"],
        num_hidden_layers=count,
        num_attention_heads=values["attention.head_count"],
        num_key_value_heads=values.get("attention.head_count_kv", values["attention.head_count"]),
        head_dim=values["attention.key_length"],
        query_pre_attn_scalar=values["attention.key_length"],
        max_position_embeddings=values["context_length"],
        rms_norm_eps=values["attention.layer_norm_rms_epsilon"],
        sliding_window=values["attention.sliding_window"],
        layer_types=["sliding_attention" if (i + 1) % PERIOD else "full_attention" for i in range(count)],
        rope_parameters={
            "full_attention": {"rope_type": "default", "rope_theta": base},
            "sliding_attention": {
                "rope_type": "default",
                "rope_theta": values.get("rope.local.freq_base", LOCAL_BASE),
            },
        },
        bos_token_id=values.get("tokenizer.ggml.bos_token_id"),
        eos_token_id=values.get("tokenizer.ggml.eos_token_id"),
        pad_token_id=values.get("tokenizer.ggml.padding_token_id"),
    )
    table = dense(file.tensors["token_embd.weight"], dtype)
    state = {"model.embed_tokens.weight": table, "lm_head.weight": table}
    state["model.norm.weight"] = (file.tensors["output_norm.weight"].dense() - 1).to(dtype)
    for index in range(count):
        on_layer(index / count)
        for part, name in PARTS.items():
            tensor = file.tensors[f"blk.{index}.{part}.weight"]
            values_of = (tensor.dense() - 1).to(dtype) if part.endswith("norm") else dense(tensor, dtype)
            state[f"model.layers.{index}.{name}.weight"] = values_of
    return Gemma3ForCausalLM.from_pretrained(None, config=config, state_dict=state, dtype=dtype)


def dense(tensor: Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The tensor's values, (rows, columns), unpacked in blocks of ROWS rows."""
    rows, columns = tensor.shape
    found = torch.empty(rows, columns, dtype=dtype)
    for start in range(0, rows, ROWS):
        part = Tensor(tensor.kind, (min(ROWS, rows - start), columns), tensor.raw[start : start + ROWS])
        found[start : start + ROWS] = part.dense()
    return found
