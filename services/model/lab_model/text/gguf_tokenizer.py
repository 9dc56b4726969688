"""The byte-level BPE tokenizer of a GGUF file, from the file's metadata.

Knows the metadata's keys. Knows nothing of files.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE

_CONTROL, _USER = 3, 4  # token types: control tokens are special, user-defined ones are only kept whole

# How each family splits text before the merges, by `tokenizer.ggml.pre`; the same patterns as llama.cpp's.
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_PATTERNS = {"qwen2": _WORDS % r"\p{N}", "llama-bpe": _WORDS % r"\p{N}{1,3}"}


def build_tokenizer(metadata: Mapping[str, Any]) -> Tokenizer | None:
    """The tokenizer; None for other kinds than byte-level BPE and for unknown patterns. Raises what the tokenizers
    library raises, or LookupError, where the metadata are damaged."""
    values = {name.removeprefix("tokenizer.ggml."): value for name, value in metadata.items()}
    if values.get("model") != "gpt2":
        return None
    pre = values.get("pre")
    split: list[Any]
    if pre in {"smollm", "gpt-2"}:
        split = [pre_tokenizers.Digits(individual_digits=True)] if pre == "smollm" else []
        split += [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)]
    elif pre in _PATTERNS:
        split = [
            pre_tokenizers.Split(Regex(_PATTERNS[pre]), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    else:
        return None
    tokens: list[str] = values["tokens"]
    tokenizer = Tokenizer(
        BPE(
            vocab={token: place for place, token in enumerate(tokens)},
            merges=[(left, right) for left, _, right in (pair.partition(" ") for pair in values["merges"])],
        )
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(split)
    tokenizer.decoder = decoders.ByteLevel()
    types = values.get("token_type", [])
    special = [AddedToken(tokens[i], special=True) for i, type_ in enumerate(types) if type_ == _CONTROL]
    tokenizer.add_special_tokens(special)
    tokenizer.add_tokens([AddedToken(tokens[i], special=False) for i, type_ in enumerate(types) if type_ == _USER])
    return tokenizer
