"""Tiny seeded models: real architectures, random weights, a real tokenizer. What they say makes no sense."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
VOCABULARY = 512
CONTEXT = 1024


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """For the modules that import it: tiny models are no quicker on two threads, and other workers need the cores."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def config(architecture: str) -> Any:
    """A two-layer configuration of `llama`, `qwen2`, `qwen3` or `gpt2`."""
    import transformers

    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    ends: dict[str, Any] = {"bos_token_id": 0, "eos_token_id": 0, "vocab_size": VOCABULARY}
    if architecture == "llama":
        return transformers.LlamaConfig(**shape, **ends, num_key_value_heads=2, max_position_embeddings=CONTEXT)
    if architecture == "qwen2":
        return transformers.Qwen2Config(**shape, **ends, num_key_value_heads=2, max_position_embeddings=CONTEXT)
    if architecture == "qwen3":
        return transformers.Qwen3Config(
            **shape, **ends, num_key_value_heads=2, head_dim=16, max_position_embeddings=CONTEXT
        )
    return transformers.GPT2Config(**ends, n_embd=64, n_layer=2, n_head=4, n_positions=CONTEXT)


def model(architecture: str = "llama", seed: int = 0) -> Any:
    """Random weights in float32, the same for the same seed."""
    import torch
    import transformers

    torch.manual_seed(seed)
    made = transformers.AutoModelForCausalLM.from_config(config(architecture)).float().eval()
    # Fresh weights are so small that every token is as likely as the next; stretched, greedy paths are stable.
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.ndim > 1:
                parameter.mul_(3)
            else:
                # Biases of 0 and norms of 1 would not be missed.
                parameter.add_(torch.randn(parameter.shape) * 0.3)
    return made


def tokenizer() -> Any:
    """Byte-level BPE of 512 tokens, trained on the spot: every text can be written, and random ids are odd bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(["the cat sat on the mat and the dog ate the hat " * 4, "안녕하세요 세계"], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<|endoftext|>", bos_token="<|endoftext|>")
    fast.chat_template = TEMPLATE
    return fast


def write(folder: Path, architecture: str = "llama", seed: int = 0) -> Path:
    """A Hugging Face folder that `from_pretrained` reads."""
    model(architecture, seed).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def lengthen(folder: Path, context: int = 16_000) -> Path:
    """Let the Llama in this folder answer at such length: rotary positions know no end."""
    config = folder / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"max_position_embeddings": context}))
    return folder
