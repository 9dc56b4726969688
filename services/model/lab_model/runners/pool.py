"""Memory for keys and values. Knows torch's tensors; knows nothing of pages or models."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch

ALIGNMENT = 64  # bytes, as torch's own tensors have: the C kernels read whole cache lines


def pool_zeros(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Zeros of this shape. On a CPU the system gives their memory where it is first written; `torch.zeros` would write
    all of it at the start."""
    if device.type != "cpu":
        return torch.zeros(*shape, dtype=dtype, device=device)
    size = math.prod(shape) * dtype.itemsize
    raw = torch.from_numpy(np.zeros(size + ALIGNMENT, np.uint8))
    start = -raw.data_ptr() % ALIGNMENT
    return raw[start : start + size].view(dtype).view(*shape)
