"""A model's weights as llama.Weights: from a GGUF file's own blocks, or from a transformers model.

Knows the names that files and transformers give to tensors; knows nothing of how they are run.
"""

from __future__ import annotations

from typing import Any

import torch

from .gguf import File
from .linear import FEW_ROWS, Dense, Norm, Quantized, Table, quantized_works, turning
from .llama import Layer, Weights

# Families whose decoder is Llama's: `Weights` says all that tells them apart.
FAMILIES = {"LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"}


# Ways to stretch the rotations that are one table for all lengths; the others change it while a text grows.
ROTATIONS = {"default", "linear", "llama3", "yarn"}


def reads(file: File) -> bool:
    """`from_file` knows this file's architecture, and this processor its kernels."""
    known = file.metadata.get("general.architecture") == "llama" and "rope_freqs.weight" not in file.tensors
    return known and quantized_works()


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

    epsilon = said["attention.layer_norm_rms_epsilon"]
    turn = turning(width)

    def joined(at: str, *names: str, norm: str | None = None, **more: Any) -> Quantized:
        found = [tensors[f"{at}.{name}.weight"] for name in names]
        blocks = [tensor.blocks() for tensor in found]
        packed = None if None in blocks else [torch.cat(part) for part in zip(*blocks, strict=True)]
        before = None if norm is None else Norm(tensors[f"{at}.{norm}.weight"].dense(), epsilon)
        return Quantized(torch.cat([tensor.dense() for tensor in found]), packed, norm=before, **more)

    layers = [
        Layer(
            qkv=joined(at, "attn_q", "attn_k", "attn_v", norm="attn_norm", turned=turn),
            query_norm=None,
            key_norm=None,
            output=joined(at, "attn_output", turns=turn),
            gate_up=joined(at, "ffn_gate", "ffn_up", norm="ffn_norm", turned=turn),
            # Its rows are products of two, and nothing turns them: some are thirty times the others.
            down=joined(at, "ffn_down", turns=turn, digits=2),
        )
        for at in (f"blk.{index}" for index in range(said["block_count"]))
    ]
    blocks = [tensor for name, tensor in tensors.items() if name.startswith("blk.") and len(tensor.shape) == 2]
    table = tensors["token_embd.weight"].dense()
    head = tensors["output.weight"].dense() if "output.weight" in tensors else table
    return Weights(
        dtype=torch.float32,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        context=said["context_length"],
        rotations=said.get("rope.freq_base", 10000.0) ** -(torch.arange(0, head_dim, 2).float() / head_dim),
        rotation_scale=1.0,
        few=FEW_ROWS if all(tensor.four_bits for tensor in blocks) else 0,
        embedding=Table(table, turn),
        layers=layers,
        head=Quantized(head, norm=Norm(tensors["output_norm.weight"].dense(), epsilon), turned=turn),
    )


def from_model(model: Any) -> Weights:
    """Dense weights of a transformers model of these families, in its own type, on its device."""
    config, inner = model.config, model.model
    rotary = inner.rotary_emb
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    pairs = torch.arange(head_dim).view(2, -1).t().flatten().to(model.device)

    def norm(module: Any) -> Norm:
        return Norm(module.weight, config.rms_norm_eps)

    def head_norm(module: Any) -> Norm | None:
        return None if module is None else Norm(module.weight[pairs], config.rms_norm_eps)

    def paired(rows: torch.Tensor | None) -> torch.Tensor | None:
        """transformers lays a head's two halves one after the other; here they lie pair by pair, as in GGUF."""
        return None if rows is None else rows.view(-1, head_dim, *rows.shape[1:])[:, pairs].flatten(0, 1)

    def qkv(attention: Any, before: Norm) -> Dense:
        parts = [(attention.q_proj, paired), (attention.k_proj, paired), (attention.v_proj, lambda rows: rows)]
        bias = None
        if attention.q_proj.bias is not None:
            bias = torch.cat([order(part.bias) for part, order in parts])
        return Dense(torch.cat([order(part.weight) for part, order in parts]), bias, before)

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
    return Weights(
        dtype=model.dtype,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=head_dim,
        context=config.max_position_embeddings,
        rotations=rotary.inv_freq,
        rotation_scale=rotary.attention_scaling,
        few=0,
        embedding=inner.embed_tokens.weight,
        layers=layers,
        head=_dense(model.lm_head, before=norm(inner.norm)),
    )


def _dense(*parts: Any, before: Norm | None = None) -> Dense:
    weight = torch.cat([part.weight for part in parts]) if len(parts) > 1 else parts[0].weight
    biases = [part.bias for part in parts]
    return Dense(weight, None if biases[0] is None else torch.cat(biases), before)
