"""GGUF files, read in place: metadata and tensors.

Knows the file format (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md). Knows nothing of architectures or
tokenizers.
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

_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9


class GGUFError(Exception):
    """The file is not GGUF, or holds something that is not supported."""


@contextlib.contextmanager
def naming_file(path: Path) -> Iterator[None]:
    """Turn the exceptions that a damaged file's numbers, names and types cause into a GGUFError with its path."""
    try:
        yield
    except (struct.error, ValueError, LookupError, ArithmeticError, TypeError, RecursionError) as error:
        raise GGUFError(f"{path} is cut short or damaged: {error}") from None
    except NotImplementedError as error:  # of a tensor's kind
        raise GGUFError(f"{path}: {error}") from None


@dataclass(frozen=True)
class Tensor:
    """One tensor as stored in the file. raw: (rows, bytes of a row), uint8."""

    kind: GGMLQuantizationType
    shape: tuple[int, ...]  # torch's order
    raw: np.ndarray[Any, np.dtype[np.uint8]]

    def dense(self) -> torch.Tensor:
        """A float32 copy of its values; a view would keep the whole file in memory."""
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
        """The same with 8-bit levels, 0 to 255: the blocks of a Q8_0 tensor, any other rounded to float16 scales."""
        rows, columns = self.shape
        if self.kind is GGMLQuantizationType.Q8_0:
            blocks = torch.from_numpy(self.raw.reshape(rows, columns // 32, 34).copy())
            scale, whole = blocks[..., :2].view(torch.float16)[..., 0].float(), blocks[..., 2:].view(torch.int8).short()
        else:
            values = self.dense().reshape(rows, columns // 32, 32)
            scale = (values.abs().amax(-1) / 127).half().float()
            whole = (values / scale.clamp(min=1e-12)[..., None]).round_().clamp_(-128, 127).short()
        return (whole + 128).to(torch.uint8).reshape(rows, columns), scale.contiguous(), scale * -128


class GGUFFile:
    """metadata: the file's keys and values. tensors: by the file's names. Raises GGUFError or OSError."""

    def __init__(self, path: Path) -> None:
        self.path, self._at = path, 0
        with path.open("rb") as opened, naming_file(path):
            self._map = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_COPY)
            self._read(path)

    def _read(self, path: Path) -> None:
        if self._map[:4] != b"GGUF":
            raise GGUFError(f"{path} is not a GGUF file")
        self._at = 4
        version, count, pairs = self._number("I"), self._number("Q"), self._number("Q")
        if version not in (2, 3):
            raise GGUFError(f"{path} is of GGUF version {version}; 2 and 3 are supported")
        self.metadata: dict[str, Any] = {self._string(): self._value(self._number("I")) for _ in range(pairs)}
        entries = []
        for _ in range(count):
            name = self._string()
            shape = tuple(self._number("Q") for _ in range(self._number("I")))[::-1]
            entries.append((name, shape, GGMLQuantizationType(self._number("I")), self._number("Q")))
        grain = self.metadata.get("general.alignment", 32)
        start = -(-self._at // grain) * grain
        self.tensors: dict[str, Tensor] = {}
        for name, shape, kind, offset in entries:
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
