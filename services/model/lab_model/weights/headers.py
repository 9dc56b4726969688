"""Headers of weight files, read without the weights: GGUF (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md)
and safetensors (https://github.com/huggingface/safetensors#format).

Knows the file formats. Knows nothing of architectures or tokenizers. Imports no torch.
"""

from __future__ import annotations

import contextlib
import json
import math
import mmap
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
MOST_HEADER = 100_000_000  # bytes of a safetensors header, as its own library allows


class GGUFError(Exception):
    """The file is not GGUF, or has something that is not supported."""


class SafetensorsError(Exception):
    """The file is not safetensors, or is cut short."""


@contextlib.contextmanager
def naming_file(path: Path) -> Iterator[None]:
    """Turn exceptions caused by wrong numbers, names and types of a damaged file into a GGUFError with its path."""
    try:
        yield
    except (struct.error, ValueError, LookupError, ArithmeticError, TypeError, RecursionError) as error:
        raise GGUFError(f"{path} is cut short or damaged: {error}") from None
    except NotImplementedError as error:  # of a tensor's kind
        raise GGUFError(f"{path}: {error}") from None


@dataclass(frozen=True)
class TensorHeader:
    """One tensor of a GGUF file. offset: of its first byte in the file; rows of `row_bytes` bytes."""

    kind: GGMLQuantizationType
    shape: tuple[int, ...]  # torch's order
    offset: int
    rows: int
    row_bytes: int


class GGUFHeader:
    """metadata: the file's keys and values. tensors: by the file's names. Raises GGUFError or OSError."""

    def __init__(self, path: Path) -> None:
        self.path, self._at = path, 0
        with path.open("rb") as opened, naming_file(path):
            self.map = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_COPY)
            self._read(path)

    def _read(self, path: Path) -> None:
        if self.map[:4] != b"GGUF":
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
        self.tensors: dict[str, TensorHeader] = {}
        for name, shape, kind, offset in entries:
            block, size = GGML_QUANT_SIZES[kind]
            width, rows = shape[-1] // block * size, math.prod(shape[:-1])
            if start + offset + rows * width > len(self.map):
                raise GGUFError(f"{path} is cut short: its tensor {name} ends after the file's end")
            self.tensors[name] = TensorHeader(kind, shape, start + offset, rows, width)

    def _number(self, code: str) -> Any:
        value = struct.unpack_from("<" + code, self.map, self._at)[0]
        self._at += struct.calcsize(code)
        return value

    def _string(self) -> str:
        size = self._number("Q")
        self._at += size
        return self.map[self._at - size : self._at].decode("utf-8")

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._string()
        if kind != _ARRAY:
            return self._number(_NUMBERS[kind])
        of, count = self._number("I"), self._number("Q")
        if of in _NUMBERS:
            code = f"<{count}{_NUMBERS[of]}"
            values = list(struct.unpack_from(code, self.map, self._at))
            self._at += struct.calcsize(code)
            return values
        return [self._value(of) for _ in range(count)]


def safetensors_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Shape of each tensor of a safetensors file. Raises SafetensorsError, also where its data are cut short."""
    try:
        with path.open("rb") as file:
            size = struct.unpack("<Q", file.read(8))[0]
            if size > MOST_HEADER:
                raise ValueError("its header is too long")
            header = json.loads(file.read(size))
            end = os.fstat(file.fileno()).st_size - 8 - size
        tensors = {name: fields for name, fields in header.items() if name != "__metadata__"}
        needed = max((fields["data_offsets"][1] for fields in tensors.values()), default=0)
        shapes = {name: tuple(fields["shape"]) for name, fields in tensors.items()}
    except (struct.error, ValueError, LookupError, TypeError, AttributeError) as error:
        raise SafetensorsError(f"{path} is cut short or damaged: {error}") from None
    if needed > end:
        raise SafetensorsError(f"{path} is cut short: it has {end} bytes of tensors, but its header needs {needed}")
    return shapes
