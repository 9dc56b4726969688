"""Device, dtype and KV cache size of a model; returns freed memory to the system.

Knows torch's devices and this process's limits. Knows nothing of what a model computes.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

from ..engine.kv_pages import PAGE_TOKENS
from ..errors import CatalogueError
from ..host import memory_left
from .sizes import LEAST_KV_TOKENS

log = logging.getLogger(__name__)
T = TypeVar("T")

# Share of the memory left after the weights that the KV cache may take; the rest is for activations and other growth.
KV_SHARE = 0.7


def detach(work: Callable[[], T]) -> T:
    """Run `work` in a thread of its own and wait for it.

    Every thread that computes keeps OpenMP threads as long as it exists. If there are more of them than cores, they
    sleep instead of spinning at the end of each operator, and a decode step takes twice as long.
    """
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(work).result()


def release_memory() -> None:
    """Return freed memory to the system: glibc would keep it, 160 MB for the embedded model."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # no glibc
        ctypes.CDLL(None).malloc_trim(0)


def kv_token_budget(name: str, wanted: int, token_bytes: int, device: torch.device) -> int:
    """Tokens of KV cache: `wanted`, or as many as memory allows. Raises CatalogueError if that is too few."""
    left = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else memory_left()
    tokens = min(wanted, int(left * KV_SHARE) // token_bytes // PAGE_TOKENS * PAGE_TOKENS)
    if tokens < min(wanted, LEAST_KV_TOKENS):
        raise CatalogueError(
            f"{name}: {left >> 20} MiB of memory are left, too little for {LEAST_KV_TOKENS} tokens of KV cache "
            f"({token_bytes} bytes each): raise the memory limit, or serve a smaller model"
        )
    if tokens < wanted:
        log.warning("%s: memory leaves room for %s of %s tokens of KV cache", name, tokens, wanted)
    return tokens


def pick_device(wanted: str) -> torch.device:
    """The device for `auto`, `cpu`, `cuda` or `mps`. Raises CatalogueError rather than fall back from a GPU."""
    if wanted == "cuda" and not torch.cuda.is_available():
        raise CatalogueError("MODEL_DEVICE is cuda, but torch finds no CUDA device")
    if wanted == "mps":
        if not torch.backends.mps.is_available():
            raise CatalogueError("the device is mps, but torch finds no Apple GPU")
        return torch.device("mps")
    return torch.device("cuda" if wanted != "cpu" and torch.cuda.is_available() else "cpu")


def pick_dtype(wanted: str) -> torch.dtype:
    """The dtype of a catalogue entry; `auto` is bfloat16."""
    dtype: torch.dtype = torch.bfloat16 if wanted == "auto" else getattr(torch, wanted)
    return dtype
