"""The weights of a Llama: from a GGUF file, or from a transformers model.

Knows the names of tensors in both. Knows nothing of how a forward uses them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from .gguf import GGUFFile
from .linear import Linear, Norm

# Families whose decoder is Llama's: `LlamaWeights` expresses all differences.
FAMILIES = {"LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"}
# Kinds of rotary scaling with one table for all lengths; other kinds change it while a text grows.
ROTATIONS = {"default", "linear", "llama3", "yarn"}

# Metadata that a Llama's GGUF file must have as integers; some other families have lists there.
SIZES = ("block_count", "context_length", "embedding_length", "feed_forward_length", "attention.head_count")


@dataclass
class Layer:
    """qkv, gate_up: with the norm before them. The rotary pairs of a head are interleaved."""

    qkv: Linear
    query_norm: Norm | None  # Qwen3: over each head
    key_norm: Norm | None
    output: Linear
    gate_up: Linear
    down: Linear


@dataclass
class LlamaWeights:
    """dtype: of the rows between the layers. rotations: (head_dim / 2,) inverse frequencies. head: with its norm."""

    dtype: torch.dtype
    heads: int
    kv_heads: int
    head_dim: int
    context: int
    rotations: torch.Tensor
    rotation_scale: float
    embedding: torch.Tensor
    layers: list[Layer]
    head: Linear

    @property
    def bytes(self) -> int:
        linears = [part for layer in self.layers for part in (layer.qkv, layer.output, layer.gate_up, layer.down)]
        head = 0 if self.head.weight.data_ptr() == self.embedding.data_ptr() else self.head.bytes  # one for both
        return sum(part.bytes for part in linears) + head + self.embedding.nbytes


def can_read(file: GGUFFile) -> bool:
    """Whether `from_file` can read this file: it has exactly the tensors of a Llama, in their shapes."""
    values, tensors = hyperparameters(file), file.tensors
    factor = values.get("rope.scaling.factor", values.get("rope.scale_linear", 1))
    scaling = values.get("rope.scaling.type", "none" if factor in (0, 1) else "linear")
    if file.metadata.get("general.architecture") != "llama" or scaling != "none":
        return False
    if not all(isinstance(size := values.get(name), int) and size > 0 for name in (*SIZES, "kv_heads", "head_dim")):
        return False
    if values["block_count"] > len(tensors):
        return False
    width, inner, heads, kv_heads, dim = (
        values[name]
        for name in ("embedding_length", "feed_forward_length", "attention.head_count", "kv_heads", "head_dim")
    )
    layer = {
        "attn_norm": (width,),
        "attn_q": (heads * dim, width),
        "attn_k": (kv_heads * dim, width),
        "attn_v": (kv_heads * dim, width),
        "attn_output": (width, heads * dim),
        "ffn_norm": (width,),
        "ffn_gate": (inner, width),
        "ffn_up": (inner, width),
        "ffn_down": (width, inner),
    }
    shapes = {f"blk.{i}.{part}.weight": shape for i in range(values["block_count"]) for part, shape in layer.items()}
    table = (len(values.get("tokenizer.ggml.tokens", ())), width)
    shapes |= {"token_embd.weight": table, "output_norm.weight": (width,)}
    if "output.weight" in tensors:
        shapes["output.weight"] = table
    return (
        {name: tensor.shape for name, tensor in tensors.items()} == shapes
        and values.get("rope.dimension_count", dim) == dim == values.get("attention.value_length", dim)
        and dim % 2 == heads % kv_heads == 0
        and "attention.layer_norm_rms_epsilon" in values
    )


def hyperparameters(file: GGUFFile) -> dict[str, Any]:
    """The file's metadata of a Llama, with `kv_heads` and `head_dim`, which a file may omit."""
    values = {name.removeprefix("llama."): value for name, value in file.metadata.items()}
    heads, width = values.get("attention.head_count"), values.get("embedding_length")
    values["kv_heads"] = values.get("attention.head_count_kv", heads)
    dim = width // heads if isinstance(heads, int) and isinstance(width, int) and heads else 0
    values["head_dim"] = values.get("attention.key_length", dim)
    return values


def rotations(values: dict[str, Any]) -> torch.Tensor:
    """Inverse frequencies, (head_dim / 2,)."""
    dim = values["head_dim"]
    speeds: torch.Tensor = values.get("rope.freq_base", 10000.0) ** -(torch.arange(0, dim, 2).float() / dim)
    return speeds


def supports(model: Any) -> bool:
    """Whether `from_model` can read this model: a supported family without features that Llama does not have."""
    config = model.config
    rope = getattr(config, "rope_parameters", None) or {}
    window = getattr(config, "sliding_window", None) or config.max_position_embeddings
    return (
        type(model).__name__ in FAMILIES
        and rope.get("rope_type", "default") in ROTATIONS
        and config.hidden_act == "silu"
        and window >= config.max_position_embeddings
    )


def from_file(
    file: GGUFFile,
    dtype: torch.dtype,
    device: torch.device,
    on_layer: Callable[[float], None] = lambda _: None,
) -> LlamaWeights:
    """Unpacked weights of a GGUF file for which `can_read` holds. on_layer: called with the share of layers read."""
    values, tensors = hyperparameters(file), file.tensors

    def dense(*names: str) -> torch.Tensor:
        return torch.cat([tensors[f"{name}.weight"].dense() for name in names]).to(device, dtype)

    def norm(name: str) -> Norm:
        return Norm(dense(name), values["attention.layer_norm_rms_epsilon"])

    def layer(index: int) -> Layer:
        at = f"blk.{index}"
        on_layer(index / values["block_count"])
        return Layer(
            qkv=Linear(dense(f"{at}.attn_q", f"{at}.attn_k", f"{at}.attn_v"), norm=norm(f"{at}.attn_norm")),
            query_norm=None,
            key_norm=None,
            output=Linear(dense(f"{at}.attn_output")),
            gate_up=Linear(dense(f"{at}.ffn_gate", f"{at}.ffn_up"), norm=norm(f"{at}.ffn_norm")),
            down=Linear(dense(f"{at}.ffn_down")),
        )

    layers = [layer(index) for index in range(values["block_count"])]
    table = dense("token_embd")
    return LlamaWeights(
        dtype=dtype,
        heads=values["attention.head_count"],
        kv_heads=values["kv_heads"],
        head_dim=values["head_dim"],
        context=values["context_length"],
        rotations=rotations(values),
        rotation_scale=1.0,
        embedding=table,
        layers=layers,
        head=Linear(dense("output") if "output.weight" in tensors else table, norm=norm("output_norm")),
    )


def from_model(model: Any) -> LlamaWeights:
    """Weights of a transformers model for which `supports` holds, in its dtype, on its device."""
    config, inner = model.config, model.model
    rotary = inner.rotary_emb
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    pairs = torch.arange(head_dim).view(2, -1).t().flatten().to(model.device)

    def norm(module: Any) -> Norm:
        return Norm(module.weight, config.rms_norm_eps)

    def head_norm(module: Any) -> Norm | None:
        return None if module is None else Norm(module.weight[pairs], config.rms_norm_eps)

    def paired(rows: torch.Tensor | None) -> torch.Tensor | None:
        """transformers stores the two halves of a head one after the other; here they are interleaved, as in GGUF."""
        return None if rows is None else rows.view(-1, head_dim, *rows.shape[1:])[:, pairs].flatten(0, 1)

    def qkv(attention: Any, before: Norm) -> Linear:
        parts = [(attention.q_proj, paired), (attention.k_proj, paired), (attention.v_proj, lambda rows: rows)]
        bias = None
        if attention.q_proj.bias is not None:
            bias = torch.cat([order(part.bias) for part, order in parts])
        return Linear(torch.cat([order(part.weight) for part, order in parts]), bias, before)

    layers = [
        Layer(
            qkv=qkv(block.self_attn, norm(block.input_layernorm)),
            query_norm=head_norm(getattr(block.self_attn, "q_norm", None)),
            key_norm=head_norm(getattr(block.self_attn, "k_norm", None)),
            output=_dense(block.self_attn.o_proj),
            gate_up=_dense(block.mlp.gate_proj, block.mlp.up_proj, before=norm(block.post_attention_layernorm)),
            down=_dense(block.mlp.down_proj),
        )
        for block in inner.layers
    ]
    return LlamaWeights(
        dtype=model.dtype,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=head_dim,
        context=config.max_position_embeddings,
        rotations=rotary.inv_freq,
        rotation_scale=rotary.attention_scaling,
        embedding=inner.embed_tokens.weight,
        layers=layers,
        head=_dense(model.lm_head, before=norm(inner.norm)),
    )


def _dense(*parts: Any, before: Norm | None = None) -> Linear:
    weight = torch.cat([part.weight for part in parts]) if len(parts) > 1 else parts[0].weight
    biases = [part.bias for part in parts]
    return Linear(weight, None if biases[0] is None else torch.cat(biases), before)
