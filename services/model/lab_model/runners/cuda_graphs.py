"""Decode steps recorded as CUDA graphs, one for each shape: a step is one launch instead of a thousand.

Rows and pages of a step are rounded up to powers of two; the additional rows decode as padding, on page 0. Without CUDA
the same step runs unrecorded, so that tests on the CPU cover this code. Knows shapes. Knows nothing of weights.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..engine.kv_pages import PAGE_TOKENS

# (ids, positions, write, read, lengths) -> logits; read: (rows, blocks), all others (rows,)
Step = Callable[..., torch.Tensor]


class CudaGraphs:
    """`step` by shape. Device memory of the graphs is shared: only one runs at a time."""

    def __init__(self, step: Step, device: torch.device) -> None:
        self._step, self._device = step, device
        self._recorded: dict[tuple[int, int], RecordedStep] = {}
        self._memory = torch.cuda.graph_pool_handle() if device.type == "cuda" else None

    def decode(self, ids: Sequence[int], positions: Sequence[int], pages: Sequence[Sequence[int]]) -> torch.Tensor:
        """As LlamaRunner.decode. The logits are overwritten by the next step of the same shape."""
        rows = next_power_of_two(len(ids))
        blocks = next_power_of_two(max(positions) // PAGE_TOKENS + 1)
        if (rows, blocks) not in self._recorded:
            self._recorded[rows, blocks] = RecordedStep(self._step, rows, blocks, self._device, self._memory)
        return self._recorded[rows, blocks].run(ids, positions, pages)


class RecordedStep:
    """The inputs of one shape, in pinned host memory, and its graph."""

    def __init__(self, step: Step, rows: int, blocks: int, device: torch.device, memory: Any) -> None:
        self._step, self._rows, self._blocks = step, rows, blocks
        # Columns: id, position, place to write, length, then the pages to read.
        self._host = torch.zeros(rows, 4 + blocks, dtype=torch.long, pin_memory=device.type == "cuda")
        self._host[:, 3] = 1  # a row that attends to nothing may become NaN, and padding's writes are read, masked
        self._given = self._host.to(device)
        self._graph: torch.cuda.CUDAGraph | None = None
        if device.type == "cuda":
            # Once outside the graph: libraries choose kernels and allocate memory, which is not allowed while
            # recording.
            side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                self._run()
            torch.cuda.current_stream().wait_stream(side)
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph, pool=memory):
                self._logits = self._run()

    def run(self, ids: Sequence[int], positions: Sequence[int], pages: Sequence[Sequence[int]]) -> torch.Tensor:
        table = [
            [token, p, row[p // PAGE_TOKENS] * PAGE_TOKENS + p % PAGE_TOKENS, p + 1, *row[: self._blocks]]
            for token, p, row in zip(ids, positions, pages, strict=True)
        ]
        width = 4 + self._blocks
        self._host[: len(table)] = torch.tensor([row + [0] * (width - len(row)) for row in table])
        # Padding: token 0 at place 0 of page 0, which attends to itself.
        self._host[len(table) :] = torch.tensor([0, 0, 0, 1] + [0] * self._blocks)
        self._given.copy_(self._host, non_blocking=True)
        if self._graph is None:
            self._logits = self._run()
        else:
            self._graph.replay()
        return self._logits[: len(table)]

    def _run(self) -> torch.Tensor:
        ids, positions, write, lengths = self._given[:, :4].unbind(1)
        return self._step(ids, positions, write, self._given[:, 4:], lengths)


def next_power_of_two(count: int) -> int:
    """The next power of two."""
    return 1 << (count - 1).bit_length()
