"""Linear layers with the norm before them, in the weights' dtype, on any device: rows in, rows out.

Knows tensors. Knows nothing of attention, requests or files.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn.functional import linear, rms_norm


@dataclass(frozen=True)
class Norm:
    """Root mean square normalization (https://arxiv.org/abs/1910.07467) of a row. weight: (width,)."""

    weight: torch.Tensor
    epsilon: float

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return rms_norm(x, self.weight.shape, self.weight, self.epsilon)


@dataclass(frozen=True)
class Linear:
    """weight: (out, in). Called with (rows, in), it gives (rows, out)."""

    weight: torch.Tensor
    bias: torch.Tensor | None = None
    norm: Norm | None = None

    @property
    def bytes(self) -> int:
        return self.weight.nbytes

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return linear(x if self.norm is None else self.norm(x), self.weight, self.bias)
