"""The device check of the lecture, and the speed at which this device copies and multiplies.

Knows torch's devices. Knows nothing of models.
"""

from __future__ import annotations

import time
from typing import Any

import torch

COPIED_BYTES = 64 << 20  # more than the caches of most processors hold
SIDE = 768  # of the multiplied matrices
REPEATS = 3  # the best one counts, because other programs may run at the same time


def check_device() -> dict[str, Any]:
    """The devices that torch finds, and the reason if there is no CUDA device."""
    found: dict[str, Any] = {"cuda_available": torch.cuda.is_available(), "torch": torch.__version__}
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        found |= {"name": properties.name, "memory_bytes": properties.total_memory, "reason": None}
    elif torch.version.cuda is None:
        found["reason"] = "this torch is the build for CPUs"
    else:
        found["reason"] = "torch finds no CUDA device: no NVIDIA GPU, no driver, or this service may not use it"
    return found


def measure(device: torch.device, threads: int) -> dict[str, Any]:
    """GB/s of a copy (bytes read and written) and GFLOP/s of a float32 matrix product. Takes about a tenth of a second
    on two cores. threads: for torch, because a new thread would have torch's default."""
    torch.set_num_threads(threads)
    source = torch.ones(COPIED_BYTES // 4, device=device)
    target = torch.empty_like(source)
    matrix = torch.ones(SIDE, SIDE, device=device)

    def best(work: Any) -> float:
        times = []
        for _ in range(REPEATS + 1):  # the first one warms up
            started = time.perf_counter()
            work()
            if device.type == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - started)
        return min(times[1:])

    with torch.inference_mode():
        copied, product = best(lambda: target.copy_(source)), best(lambda: matrix @ matrix)
    return {"gb_per_second": 2 * COPIED_BYTES / copied / 1e9, "gflop_per_second": 2 * SIDE**3 / product / 1e9}
