"""GGUF files, read in place: metadata and tensors.

Knows the tensors' kinds; `headers` knows the file format. Knows nothing of architectures or tokenizers.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, dequantize

from .headers import GGUFHeader, naming_file


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
        header = GGUFHeader(path)
        self.path, self.metadata = path, header.metadata
        self.tensors: dict[str, Tensor] = {}
        with naming_file(path):
            for name, of in header.tensors.items():
                raw = np.frombuffer(header.map, np.uint8, of.rows * of.row_bytes, of.offset)
                self.tensors[name] = Tensor(of.kind, of.shape, raw.reshape(of.rows, of.row_bytes))
