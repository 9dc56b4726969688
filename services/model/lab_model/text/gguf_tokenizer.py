"""The tokenizer of a GGUF file, byte-level BPE or SentencePiece, from the file's metadata.

Knows the metadata's keys. Knows nothing of files.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE

_NORMAL, _CONTROL, _USER = 1, 3, 4  # token types: control tokens are special, user-defined ones are only kept whole

# `tokenizer.ggml.pre` -> pattern that splits text before the merges; the same patterns as in llama.cpp.
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_PATTERNS = {"qwen2": _WORDS % r"\p{N}", "llama-bpe": _WORDS % r"\p{N}{1,3}"}


def build_tokenizer(metadata: Mapping[str, Any]) -> Tokenizer | None:
    """The tokenizer; None for other kinds and for unknown patterns. Raises what the tokenizers library raises, or
    LookupError, where the metadata are damaged."""
    values = {name.removeprefix("tokenizer.ggml."): value for name, value in metadata.items()}
    if values.get("model") == "llama" and "scores" in values:
        return _with_begin(_sentencepiece(values), values, default=True)
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
            # Llama 3: a word that is a token becomes that token without merges.
            ignore_merges=pre == "llama-bpe",
        )
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(split)
    tokenizer.decoder = decoders.ByteLevel()
    _add_special(tokenizer, values)
    return _with_begin(tokenizer, values, default=pre == "llama-bpe")


def _sentencepiece(values: Mapping[str, Any]) -> Tokenizer:
    """BPE over scores: the merges are derived from the pieces, in the order of their scores, the best first."""
    tokens: list[str] = values["tokens"]
    places = {token: place for place, token in enumerate(tokens)}
    types = values.get("token_type") or [1] * len(tokens)
    merges: list[tuple[float, int, int, int, int, str, str]] = []
    for place, (token, score) in enumerate(zip(tokens, values["scores"], strict=True)):
        if types[place] != _NORMAL:
            continue
        for at in range(1, len(token)):
            left, right = token[:at], token[at:]
            first, second = places.get(left), places.get(right)
            if first is not None and second is not None and _NORMAL == types[first] == types[second]:
                merges.append((-score, -len(left), -len(right), place, first, left, right))
    merges.sort()
    unknown = tokens[values.get("unknown_token_id", 0)]
    pairs = [(left, right) for *_, left, right in merges]
    tokenizer = Tokenizer(BPE(vocab=places, merges=pairs, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    prefix = values.get("add_space_prefix", True)
    tokenizer.normalizer = normalizers.Sequence(
        [*([normalizers.Prepend("▁")] if prefix else []), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            *([decoders.Strip(" ", left=1)] if prefix else []),
        ]
    )
    _add_special(tokenizer, values)
    return tokenizer


def _with_begin(tokenizer: Tokenizer, values: Mapping[str, Any], *, default: bool) -> Tokenizer:
    """The tokenizer with a token at the beginning of each text, if the file requests it. default: for files that do not
    say."""
    id_ = values.get("bos_token_id")
    if values.get("add_bos_token", default) and isinstance(id_, int):
        begin = values["tokens"][id_]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{begin} $A", pair=f"{begin} $A {begin} $B", special_tokens=[(begin, id_)]
        )
    return tokenizer


def _add_special(tokenizer: Tokenizer, values: Mapping[str, Any]) -> None:
    tokens = values["tokens"]
    types = values.get("token_type", [])
    special = [AddedToken(tokens[i], special=True) for i, type_ in enumerate(types) if type_ == _CONTROL]
    tokenizer.add_special_tokens(special)
    tokenizer.add_tokens([AddedToken(tokens[i], special=False) for i, type_ in enumerate(types) if type_ == _USER])
