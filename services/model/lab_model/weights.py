"""A model's weights as llama.Weights: from a GGUF file's own blocks, or from a transformers model.

Knows the names that files and transformers give to tensors; knows nothing of how they are run.
"""

from __future__ import annotations

from typing import Any

import torch

from .gguf import File, Tensor
from .llama import Dense, Layer, Quantized, Weights

# Families whose decoder is Llama's: `Weights` says all that tells them apart.
FAMILIES = {"LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"}


# Ways to stretch the rotations that are one table for all lengths; the others change it while a text grows.
ROTATIONS = {"default", "linear", "llama3", "yarn"}


def reads(file: File) -> bool:
    """`from_file` knows this file's architecture."""
    return bool(file.metadata.get("general.architecture") == "llama" and "rope_freqs.weight" not in file.tensors)


def fits(model: Any) -> bool:
    """`from_model` knows this model: its family, and nothing in its configuration that Llama does not have."""
    config = model.config
    rope = getattr(config, "rope_parameters", None) or {}
    window = getattr(config, "sliding_window", None) or config.max_position_embeddings
    return (
        type(model).__name__ in FAMILIES
        and rope.get("rope_type", "default") in ROTATIONS
        and config.hidden_act == "silu"
        and window >= config.max_position_embeddings
    )


def from_file(file: File) -> Weights:
    """Quantized weights of a GGUF file of the llama architecture. (CPU)"""
    said = {name.removeprefix("llama."): value for name, value in file.metadata.items()}
    heads = said["attention.head_count"]
    kv_heads = said.get("attention.head_count_kv", heads)
    width = said["embedding_length"]
    head_dim = said.get("attention.key_length", width // heads)
    tensors = file.tensors

    def joined(prefix: str, *names: str) -> Quantized:
        found = [tensors[f"{prefix}.{name}.weight"] for name in names]
        return quantized([(t, _order(n, heads, kv_heads, head_dim)) for t, n in zip(found, names, strict=True)])

    def vector(name: str) -> torch.Tensor:
        return tensors[name].dense()

    layers = []
    for index in range(said["block_count"]):
        at = f"blk.{index}"
        layers.append(
            Layer(
                attention_norm=vector(f"{at}.attn_norm.weight"),
                qkv=joined(at, "attn_q", "attn_k", "attn_v"),
                query_norm=None,
                key_norm=None,
                output=joined(at, "attn_output"),
                mlp_norm=vector(f"{at}.ffn_norm.weight"),
                gate_up=joined(at, "ffn_gate", "ffn_up"),
                down=joined(at, "ffn_down"),
            )
        )
    table = quantized([(tensors["token_embd.weight"], None)])
    rotations = said.get("rope.freq_base", 10000.0) ** -(torch.arange(0, head_dim, 2).float() / head_dim)
    return Weights(
        dtype=torch.float32,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        epsilon=said["attention.layer_norm_rms_epsilon"],
        context=said["context_length"],
        rotations=rotations,
        rotation_scale=1.0,
        embedding=table,
        layers=layers,
        norm=vector("output_norm.weight"),
        head=quantized([(tensors["output.weight"], None)]) if "output.weight" in tensors else table,
    )


def _order(name: str, heads: int, kv_heads: int, head_dim: int) -> torch.Tensor | None:
    """GGUF stores a head's pairs side by side; here, as in transformers, its two halves lie one after the other."""
    count = {"attn_q": heads, "attn_k": kv_heads}.get(name)
    if count is None:
        return None
    return torch.arange(count * head_dim).view(count, head_dim // 2, 2).transpose(1, 2).reshape(-1)


def quantized(parts: list[tuple[Tensor, torch.Tensor | None]]) -> Quantized:
    """Tensors, with the order of their rows, as one linear layer."""
    dense, blocks = [], []
    for tensor, order in parts:
        values, found = tensor.dense(), tensor.blocks()
        dense.append(values if order is None else values[order])
        if found is not None:
            blocks.append(found if order is None else tuple(part[order] for part in found))
    packed = [torch.cat(part) for part in zip(*blocks, strict=True)] if len(blocks) == len(parts) else None
    return Quantized(torch.cat(dense), packed)


def from_model(model: Any) -> Weights:
    """Dense weights of a transformers model of these families, in its own type, on its device."""
    config, inner = model.config, model.model
    rotary = inner.rotary_emb
    layers = []
    for block in inner.layers:
        attention, mlp = block.self_attn, block.mlp
        layers.append(
            Layer(
                attention_norm=block.input_layernorm.weight,
                qkv=_dense(attention.q_proj, attention.k_proj, attention.v_proj),
                query_norm=getattr(getattr(attention, "q_norm", None), "weight", None),
                key_norm=getattr(getattr(attention, "k_norm", None), "weight", None),
                output=_dense(attention.o_proj),
                mlp_norm=block.post_attention_layernorm.weight,
                gate_up=_dense(mlp.gate_proj, mlp.up_proj),
                down=_dense(mlp.down_proj),
            )
        )
    return Weights(
        dtype=model.dtype,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        epsilon=config.rms_norm_eps,
        context=config.max_position_embeddings,
        rotations=rotary.inv_freq,
        rotation_scale=rotary.attention_scaling,
        embedding=inner.embed_tokens.weight,
        layers=layers,
        norm=inner.norm.weight,
        head=_dense(model.lm_head),
    )


def _dense(*parts: Any) -> Dense:
    weight = torch.cat([part.weight for part in parts]) if len(parts) > 1 else parts[0].weight
    biases = [part.bias for part in parts]
    return Dense(weight, None if biases[0] is None else torch.cat(biases))
