"""A model's weights as llama.Weights: from a GGUF file, or from a transformers model.

Knows the names that files and transformers give to tensors; knows nothing of how they are run.
"""

from __future__ import annotations

from typing import Any

import torch

from .gguf import File
from .linear import Linear, Norm
from .llama import Layer, Weights

# Families whose decoder is Llama's: `Weights` says all that tells them apart.
FAMILIES = {"LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"}


# Ways to stretch the rotations that are one table for all lengths; the others change it while a text grows.
ROTATIONS = {"default", "linear", "llama3", "yarn"}

# What each layer of a Llama's GGUF file has, and what else is in it. One with other tensors is another model.
PARTS = {"attn_norm", "attn_q", "attn_k", "attn_v", "attn_output", "ffn_norm", "ffn_gate", "ffn_up", "ffn_down"}
OTHERS = {"token_embd.weight", "output_norm.weight", "output.weight"}


def reads(file: File) -> bool:
    """`from_file` knows all that this file holds."""
    said = facts(file)
    if file.metadata.get("general.architecture") != "llama" or said.get("rope.scaling.type", "none") != "none":
        return False
    layers = {f"blk.{index}.{part}.weight" for index in range(said["block_count"]) for part in PARTS}
    dim = said["head_dim"]
    return (
        layers <= file.tensors.keys() <= layers | OTHERS
        and said.get("rope.dimension_count", dim) == dim == said.get("attention.value_length", dim)
        and said["attention.head_count"] % said["kv_heads"] == 0
    )


def facts(file: File) -> dict[str, Any]:
    """The file's metadata about a Llama, with `kv_heads` and `head_dim`, which it may leave out, and `rotations`,
    (head_dim / 2,) inverse frequencies."""
    said = {name.removeprefix("llama."): value for name, value in file.metadata.items()}
    heads = said.get("attention.head_count", 1)
    kv_heads = said.get("attention.head_count_kv", heads)
    dim = said.get("attention.key_length", said.get("embedding_length", 0) // heads)
    speeds = said.get("rope.freq_base", 10000.0) ** -(torch.arange(0, dim, 2).float() / dim)
    return said | {"kv_heads": kv_heads, "head_dim": dim, "rotations": speeds}


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


def from_file(file: File, dtype: torch.dtype, device: torch.device) -> Weights:
    """Weights of a GGUF file that `reads` knows, unpacked."""
    said, tensors = facts(file), file.tensors

    def dense(*names: str) -> torch.Tensor:
        return torch.cat([tensors[f"{name}.weight"].dense() for name in names]).to(device, dtype)

    def norm(name: str) -> Norm:
        return Norm(dense(name), said["attention.layer_norm_rms_epsilon"])

    layers = [
        Layer(
            qkv=Linear(dense(f"{at}.attn_q", f"{at}.attn_k", f"{at}.attn_v"), norm=norm(f"{at}.attn_norm")),
            query_norm=None,
            key_norm=None,
            output=Linear(dense(f"{at}.attn_output")),
            gate_up=Linear(dense(f"{at}.ffn_gate", f"{at}.ffn_up"), norm=norm(f"{at}.ffn_norm")),
            down=Linear(dense(f"{at}.ffn_down")),
        )
        for at in (f"blk.{index}" for index in range(said["block_count"]))
    ]
    table = dense("token_embd")
    return Weights(
        dtype=dtype,
        heads=said["attention.head_count"],
        kv_heads=said["kv_heads"],
        head_dim=said["head_dim"],
        context=said["context_length"],
        rotations=said["rotations"],
        rotation_scale=1.0,
        embedding=table,
        layers=layers,
        head=Linear(dense("output") if "output.weight" in tensors else table, norm=norm("output_norm")),
    )


def from_model(model: Any) -> Weights:
    """Weights of a transformers model of these families, in its own type, on its device."""
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
    return Weights(
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
