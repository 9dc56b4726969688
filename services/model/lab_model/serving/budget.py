"""The memory of all models together: what is free, how much a model gets, and which one is unloaded first.

Knows sizes, states and running requests. Loads and unloads nothing. Imports no torch.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import psutil

from ..host import memory_left
from ..models.catalogue import Entry
from ..models.sizes import LEAST_KV_TOKENS, PROCESS_BYTES, Size
from .activity import processes, read_activity
from .copies import is_running
from .states import Model, State

# All models together may take this share of the memory that is free at the start, unless MODEL_MEMORY_BYTES is set.
FREE_SHARE = 0.9


class Room(NamedTuple):
    """granted: bytes that the model may take, None if none now. In that case `unload` is the model to unload first, or
    `state` and `detail` are the new state of the asking model. With neither, it waits for a model that is ending."""

    granted: int | None = None
    unload: Model | None = None
    state: State | None = None
    detail: str = ""


class Budget:
    """models: all models of the catalogue. folder: holds the replicas' activity. total: bytes for all models together.
    kv_tokens: MODEL_KV_TOKENS. gpus: number of GPUs of Ray. device: for entries that name none."""

    def __init__(
        self, models: Mapping[str, Model], folder: Path, *, total: int, kv_tokens: int, gpus: float, device: str | None
    ) -> None:
        self._models, self._folder = models, folder
        self._total, self._wanted_tokens = total, kv_tokens
        self._gpus, self._device = gpus, device

    @property
    def free(self) -> int:
        """Bytes of the budget that neither a model nor a second copy takes."""
        deployed = {id_: each for id_, each in self._models.items() if each.deployed}
        copies = [each.size.copy for id_, each in deployed.items() if each.size and is_running(self._folder, id_)]
        return self._total - sum(each.granted for each in deployed.values()) - sum(copies)

    async def room_for(self, model: Model, size: Size) -> Room:
        replicas = model.entry.most_replicas
        least, most = size.least * replicas, size.memory(self._wanted_tokens) * replicas
        if self.on_gpu(model.entry):
            least = most = PROCESS_BYTES * replicas
        # 1. Never, or at once.
        if least > self._total:
            why = (
                f"it needs at least {least >> 20} MiB of memory, but all models together may take only "
                f"{self._total >> 20} MiB (MODEL_MEMORY_BYTES)"
            )
            return Room(state="failed", detail=why)
        free = self.free
        if free >= min(most, self._total) or (free >= least and not model.asked):
            return Room(min(most, free))
        if not model.asked:
            return Room(state="unloaded", detail="no memory was left at the start; the first request loads it")
        # 2. Unload the least recently used model that has no running request.
        if any(each.draining for each in self._models.values()):
            return Room()
        idle = []
        for each in self._models.values():
            if each.state == "ready" and each is not model:
                activity = await asyncio.to_thread(read_activity, self._folder, each.entry.id)
                if not activity.running:
                    idle.append((max(activity.last, time.time() - each.age), each))
        if idle:
            return Room(unload=min(idle, key=lambda pair: pair[0])[1])
        # 3. With fewer tokens of KV cache than wanted, or later.
        if free >= least:
            return Room(min(most, free))
        return Room(state="loading", detail="waits for memory; the other models are busy")

    def predicted(self, model: Model) -> int | None:
        """Bytes of memory of one replica, None if its size is not known."""
        return model.size.memory(self._tokens(model.size, model.granted or None)) if model.size else None

    def kv_tokens(self, model: Model, size: Size) -> int:
        """Tokens of a model's KV cache: MODEL_KV_TOKENS, or fewer if only fewer fit into the granted memory."""
        each = None if self.on_gpu(model.entry) else model.granted // model.entry.most_replicas
        return self._tokens(size, each)

    def _tokens(self, size: Size, granted: int | None) -> int:
        if not size.token or granted is None:
            return self._wanted_tokens
        fitting = (granted - size.memory(0)) // size.token
        return max(LEAST_KV_TOKENS, min(self._wanted_tokens, fitting))

    def gpu_share(self, entry: Entry) -> float:
        """The share of a GPU for one replica; 0 on a CPU."""
        replicas = sum(each.entry.most_replicas for each in self._models.values() if self.on_gpu(each.entry))
        return gpu_share(self._gpus, replicas) if self.on_gpu(entry) else 0

    def on_gpu(self, entry: Entry) -> bool:
        return bool(self._gpus) and (entry.device or self._device) not in ("cpu", "mps")


def memory_budget(memory_bytes: int, service: int) -> int:
    """Bytes for all models: `memory_bytes` minus the memory of Ray's own processes, or FREE_SHARE of the free memory if
    it is 0. service: id of the main process."""
    if not memory_bytes:
        return int(memory_left() * FREE_SHARE)
    own = 0
    with contextlib.suppress(psutil.Error):
        parent = psutil.Process(service)
        own = sum(memory_of([each.pid for each in (parent, *parent.children(recursive=True))]))
    return max(0, memory_bytes - own)


def measured(folder: Path, model: str) -> int | None:
    """Bytes of memory of a model's replicas, shared pages in proportion; None if the system does not report it."""
    return sum(memory_of(processes(folder, model))) or None


def memory_of(pids: list[int]) -> list[int]:
    """Bytes of memory of each of these processes; without those that cannot be read."""
    found = []
    for pid in pids:
        with contextlib.suppress(psutil.Error):
            reported = psutil.Process(pid).memory_full_info()
            found.append(int(getattr(reported, "pss", reported.uss)))
    return found


def gpu_share(gpus: float, replicas: int) -> float:
    """The share of a GPU for each of `replicas`, so that all fit and none is split over two GPUs."""
    if not gpus or not replicas:
        return 0
    # Ray rounds to ten thousandths, so round down here: seven times 0.1429 would be more than one GPU.
    return math.floor(10_000 / math.ceil(replicas / gpus)) / 10_000
