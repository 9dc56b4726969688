"""A GGUF file read in place: what it says of itself, its tensors, its tokenizer.

Knows the file format (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md); not what runs the weights.
transformers reads the same file in 15 s, most of it in Python over 98,000 strings; this takes a fraction of a second.
"""

from __future__ import annotations

import contextlib
import mmap
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, dequantize
from tokenizers import AddedToken, Regex, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE

_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_CONTROL, _USER = 3, 4  # token types: control tokens are special, user-defined ones only whole


class GGUFError(Exception):
    """The file is no GGUF, or holds something that is not supported here."""


@contextlib.contextmanager
def named(path: Path) -> Iterator[None]:
    """Whoever works with what a file says meets numbers, names and types that it makes up: GGUFError with its path."""
    try:
        yield
    except (struct.error, ValueError, LookupError, ArithmeticError, TypeError, RecursionError) as error:
        raise GGUFError(f"{path} is cut short or damaged: {error}") from None
    except NotImplementedError as error:  # of a tensor's kind
        raise GGUFError(f"{path}: {error}") from None


@dataclass(frozen=True)
class Tensor:
    """One tensor as it lies in the file. raw: (rows, bytes of a row), uint8."""

    kind: GGMLQuantizationType
    shape: tuple[int, ...]  # torch's order
    raw: np.ndarray[Any, np.dtype[np.uint8]]

    def dense(self) -> torch.Tensor:
        """Its values, float32, in memory of their own: a view would keep the whole file in memory."""
        values = dequantize(self.raw, self.kind)
        return torch.from_numpy(np.array(values, dtype=np.float32)).reshape(self.shape)

    @property
    def four_bits(self) -> bool:
        return self.kind in {GGMLQuantizationType.Q4_0, GGMLQuantizationType.Q4_1}

    def blocks(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None:
        """The 4-bit blocks of a Q4_1 or Q4_0 tensor, else None.

        levels: (rows, columns) 0 to 15, uint8; scale and minimum: (rows, columns / 32), float32;
        value = level * scale + minimum.
        """
        if not self.four_bits:
            return None
        rows, columns = self.shape
        size = GGML_QUANT_SIZES[self.kind][1]
        blocks = self.raw.reshape(rows, columns // 32, size)
        packed = torch.from_numpy(blocks[..., size - 16 :].copy())
        halves = torch.from_numpy(blocks[..., : size - 16].copy()).view(torch.float16).float()
        scale = halves[..., 0]
        minimum = halves[..., 1] if self.kind is GGMLQuantizationType.Q4_1 else scale * -8
        # The low halves of the 16 bytes are the block's first 16 values.
        levels = torch.cat([packed & 15, packed >> 4], -1).reshape(rows, columns)
        return levels, scale.contiguous(), minimum.contiguous()

    def octets(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The same with 8-bit levels, 0 to 255: of a Q8_0 tensor its own blocks, else rounded to float16 scales."""
        rows, columns = self.shape
        if self.kind is GGMLQuantizationType.Q8_0:
            blocks = torch.from_numpy(self.raw.reshape(rows, columns // 32, 34).copy())
            scale, whole = blocks[..., :2].view(torch.float16)[..., 0].float(), blocks[..., 2:].view(torch.int8).short()
        else:
            values = self.dense().reshape(rows, columns // 32, 32)
            scale = (values.abs().amax(-1) / 127).half().float()
            whole = (values / scale.clamp(min=1e-12)[..., None]).round_().clamp_(-128, 127).short()
        return (whole + 128).to(torch.uint8).reshape(rows, columns), scale.contiguous(), scale * -128


class File:
    """metadata: the file's own keys and values; tensors: by the file's own names. Raises GGUFError or OSError."""

    def __init__(self, path: Path) -> None:
        self.path, self._at = path, 0
        with path.open("rb") as opened, named(path):
            self._map = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_COPY)
            self._read(path)

    def _read(self, path: Path) -> None:
        if self._map[:4] != b"GGUF":
            raise GGUFError(f"{path} is not a GGUF file")
        self._at = 4
        version, count, pairs = self._number("I"), self._number("Q"), self._number("Q")
        if version not in (2, 3):
            raise GGUFError(f"{path} is of GGUF version {version}; 2 and 3 are read here")
        self.metadata: dict[str, Any] = {self._string(): self._value(self._number("I")) for _ in range(pairs)}
        placed = []
        for _ in range(count):
            name = self._string()
            shape = tuple(self._number("Q") for _ in range(self._number("I")))[::-1]
            placed.append((name, shape, GGMLQuantizationType(self._number("I")), self._number("Q")))
        grain = self.metadata.get("general.alignment", 32)
        start = -(-self._at // grain) * grain
        self.tensors: dict[str, Tensor] = {}
        for name, shape, kind, offset in placed:
            block, size = GGML_QUANT_SIZES[kind]
            width = shape[-1] // block * size
            rows = int(np.prod(shape[:-1], dtype=np.int64))
            raw = np.frombuffer(self._map, np.uint8, rows * width, start + offset).reshape(rows, width)
            self.tensors[name] = Tensor(kind, shape, raw)

    def _number(self, code: str) -> Any:
        value = struct.unpack_from("<" + code, self._map, self._at)[0]
        self._at += struct.calcsize(code)
        return value

    def _string(self) -> str:
        size = self._number("Q")
        self._at += size
        return self._map[self._at - size : self._at].decode("utf-8")

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._string()
        if kind != _ARRAY:
            return self._number(_NUMBERS[kind])
        of, count = self._number("I"), self._number("Q")
        if of in _NUMBERS:
            code = f"<{count}{_NUMBERS[of]}"
            values = list(struct.unpack_from(code, self._map, self._at))
            self._at += struct.calcsize(code)
            return values
        return [self._value(of) for _ in range(count)]


# How each family cuts text before the merges, by `tokenizer.ggml.pre`; where llama.cpp has a pattern, it is the same.
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_PATTERNS = {"qwen2": _WORDS % r"\p{N}", "llama-bpe": _WORDS % r"\p{N}{1,3}"}


def tokenizer(file: File) -> Tokenizer | None:
    """The file's byte-level BPE tokenizer; None for a kind that is left to transformers. Raises GGUFError."""
    try:
        return _tokenizer(file)
    except Exception as error:  # tokenizers raises nothing more exact
        raise GGUFError(f"{file.path}: its tokenizer is damaged: {error}") from None


def _tokenizer(file: File) -> Tokenizer | None:
    said = {name.removeprefix("tokenizer.ggml."): value for name, value in file.metadata.items()}
    if said.get("model") != "gpt2":
        return None
    pre = said.get("pre")
    cut: list[Any]
    if pre in {"smollm", "gpt-2"}:
        cut = [pre_tokenizers.Digits(individual_digits=True)] if pre == "smollm" else []
        cut += [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)]
    elif pre in _PATTERNS:
        cut = [
            pre_tokenizers.Split(Regex(_PATTERNS[pre]), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    else:
        return None
    tokens: list[str] = said["tokens"]
    made = Tokenizer(
        BPE(
            vocab={token: place for place, token in enumerate(tokens)},
            merges=[(left, right) for left, _, right in (pair.partition(" ") for pair in said["merges"])],
        )
    )
    made.pre_tokenizer = pre_tokenizers.Sequence(cut)
    made.decoder = decoders.ByteLevel()
    kinds = said.get("token_type", [])
    made.add_special_tokens([AddedToken(tokens[i], special=True) for i, kind in enumerate(kinds) if kind == _CONTROL])
    made.add_tokens([AddedToken(tokens[i], special=False) for i, kind in enumerate(kinds) if kind == _USER])
    return made
