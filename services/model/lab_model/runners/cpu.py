"""The forward of a quantized Llama on CPUs with AVX2, by the C kernels: packs the weights of a GGUF file and runs
steps.

torch has no kernel that multiplies a few rows by 4-bit blocks in integers, and its forward is 1,200 small operators a
step; here a step is one call. Rows never depend on each other, so the runner is batch invariant. Without a compiler or
such a processor the same file runs in torch (`llama`). Knows the layout that the kernels read. Knows nothing of
requests or of compiling.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..engine.kv_pages import PAGE_TOKENS
from ..engine.runner import Span
from ..weights import llama
from ..weights.gguf import GGUFFile, Tensor
from . import kernels
from .kernels import Layer, Matrix, Model, Step
from .pool import pool_zeros

log = logging.getLogger(__name__)


# As in kernels.c.
BLOCK, LANES, TILE = 32, 16, 32
MOST_GROUP, MOST_HEAD = 8, 256
PEAK = 4
# Rows of one call, for which activations have memory. 64 to 256 rows were equally fast.
MOST_ROWS = 256


@dataclass(frozen=True)
class PackedMatrix:
    """A matrix as kernels.c reads it. data: (tiles, blocks, 2, bytes), uint8."""

    data: torch.Tensor
    out: int
    columns: int
    bits: int

    def matrix(self) -> Matrix:
        return Matrix(self.data.data_ptr(), self.out, self.columns, self.bits)


def pack(*tensors: Tensor) -> PackedMatrix:
    """One matrix of the rows of all tensors: 4 bits if all tensors have 4, else 8. Zero rows complete the last tile."""
    blocks = [tensor.blocks() for tensor in tensors]
    bits = 4
    if None in blocks:
        bits, blocks = 8, [tensor.octets() for tensor in tensors]
    levels, scale, minimum = (torch.cat(part) for part in zip(*blocks, strict=True))
    out, columns = levels.shape
    more = -out % TILE
    levels, scale, minimum = (torch.nn.functional.pad(part, (0, 0, 0, more)) for part in (levels, scale, minimum))
    faces, count = (out + more) // LANES, columns // BLOCK
    groups = levels.view(faces, LANES, count, 8, 4).permute(0, 2, 3, 1, 4).reshape(faces, count, 8, LANES * 4)
    if bits == 4:
        groups = groups[:, :, :4] | groups[:, :, 4:] << 4
    facts = [part.view(faces, LANES, count).transpose(1, 2).half().contiguous() for part in (scale, minimum)]
    data = torch.cat([groups.flatten(2), *[part.view(torch.uint8) for part in facts]], -1)
    data = data.view(faces // 2, 2, count, -1).transpose(1, 2).contiguous()
    return PackedMatrix(data, out + more, columns, bits)


def can_run(file: GGUFFile) -> bool:
    """Whether the kernels support this file's shapes and run on this machine. If not on this machine, logs the
    reason."""
    if not _fits(file):
        return False
    if why := kernels.why_unavailable():
        log.warning("the model runs in torch's operators, several times slower than in the C kernels: %s", why)
    return why is None


def _fits(file: GGUFFile) -> bool:
    if not llama.can_read(file):
        return False
    values = llama.hyperparameters(file)
    dim = values["head_dim"]
    inputs = [tensor.shape[1] for tensor in file.tensors.values() if len(tensor.shape) == 2]
    group = values["attention.head_count"] // values["kv_heads"]
    return group <= MOST_GROUP and dim % BLOCK == 0 and dim <= MOST_HEAD and not any(size % BLOCK for size in inputs)


class CpuRunner:
    """The runner of a GGUF file. on_layer: called with the share of layers that are packed.

    Raises KernelError, GGUFError."""

    batch_invariant = True
    kind = "int4+int8"

    def __init__(self, file: GGUFFile, threads: int, on_layer: Callable[[float], None] = lambda _: None) -> None:
        self._library = kernels.library()
        values, tensors = llama.hyperparameters(file), file.tensors
        heads, kv_heads, dim, width = (
            values[name] for name in ("attention.head_count", "kv_heads", "head_dim", "embedding_length")
        )
        self.context: int = values["context_length"]
        self._held: list[Any] = []  # what the structures point to
        self.bytes = 0

        def matrix(*names: str) -> Matrix:
            made = pack(*[tensors[f"{name}.weight"] for name in names])
            self._held.append(made)
            self.bytes += made.data.nbytes
            return made.matrix()

        def floats(values: torch.Tensor) -> int:
            self._held.append(values := values.float().contiguous())
            return values.data_ptr()

        def layer(at: str) -> Layer:
            return Layer(
                norm=floats(tensors[f"{at}.attn_norm.weight"].dense()),
                qkv=matrix(f"{at}.attn_q", f"{at}.attn_k", f"{at}.attn_v"),
                output=matrix(f"{at}.attn_output"),
                mlp_norm=floats(tensors[f"{at}.ffn_norm.weight"].dense()),
                gate_up=matrix(f"{at}.ffn_gate", f"{at}.ffn_up"),
                down=matrix(f"{at}.ffn_down"),
            )

        layers = []
        for index in range(values["block_count"]):
            layers.append(layer(f"blk.{index}"))
            on_layer((index + 1) / values["block_count"])
        table = matrix("token_embd")
        self._rotations = llama.rotations(values)
        parallel, team = kernels.openmp()
        self._model = Model(
            layers=len(layers),
            heads=heads,
            kv_heads=kv_heads,
            head_dim=dim,
            threads=threads,
            epsilon=values["attention.layer_norm_rms_epsilon"],
            layer=(Layer * len(layers))(*layers),
            table=table,
            head=matrix("output") if "output.weight" in tensors else table,
            norm=floats(tensors["output_norm.weight"].dense()),
            parallel=parallel,
            team=team,
        )
        self.vocab: int = tensors["output.weight" if "output.weight" in tensors else "token_embd.weight"].shape[0]
        widest = max(width, heads * dim, tensors["blk.0.ffn_down.weight"].shape[1])
        # One step's rows between its layers.
        self._scratch = {
            "x": torch.empty(MOST_ROWS, width),
            "qkv": torch.empty(MOST_ROWS, (heads + 2 * kv_heads) * dim),
            "values": torch.empty(MOST_ROWS, widest),
            "digits": torch.empty(MOST_ROWS, widest, dtype=torch.int8),
            "units": torch.empty(MOST_ROWS, widest // BLOCK, 2),
            "peaks": torch.empty(MOST_ROWS, widest // PEAK**2, 2),
            "counts": torch.empty(MOST_ROWS, dtype=torch.int32),
            "jobs": torch.empty(self._library.lab_phases(self._model), dtype=torch.int32),
        }

    @property
    def token_bytes(self) -> int:
        """Keys and values of one token."""
        m = self._model
        return int(m.layers * 2 * m.kv_heads * m.head_dim * 2)

    def allocate(self, pages: int) -> None:
        m = self._model
        rows = min(self.context, pages * PAGE_TOKENS)  # a file may name a context of millions
        angles = torch.arange(rows).float()[:, None] * self._rotations
        self._turns = torch.stack([angles.cos(), angles.sin()], -1).contiguous()
        m.turns = self._turns.data_ptr()
        shape = (m.layers, pages, m.kv_heads * 2 * PAGE_TOKENS * m.head_dim)
        self._pool = pool_zeros(shape, torch.float16, torch.device("cpu"))
        m.pool, m.pages = self._pool.data_ptr(), pages

    @property
    def pool_bytes(self) -> int:
        """Size of the pool of pages."""
        return self._pool.nbytes

    def prefill(self, ids: Sequence[int], spans: Sequence[Span]) -> torch.Tensor:
        positions = [place for span in spans for place in range(span.start, span.stop)]
        owners = [owner for owner, span in enumerate(spans) for _ in range(span.start, span.stop)]
        ends, at = [], -1
        for span in spans:
            at += span.stop - span.start
            ends.append(at)
        return self._forward(ids, positions, owners, [span.pages for span in spans], ends)

    def all_logits(self, ids: Sequence[int], pages: Sequence[int], start: int = 0) -> torch.Tensor:
        return self._forward(ids, range(start, start + len(ids)), [0] * len(ids), [pages], range(len(ids)))

    def decode(self, ids: Sequence[int], positions: Sequence[int], pages: Sequence[Sequence[int]]) -> torch.Tensor:
        return self._forward(ids, positions, range(len(ids)), pages, range(len(ids)))

    def zero_pages(self, pages: Sequence[int]) -> None:
        """Does nothing: attention reads only the row's own tokens."""

    def _forward(
        self,
        ids: Sequence[int],
        positions: Sequence[int],
        owners: Sequence[int],
        pages: Sequence[Sequence[int]],
        wanted: Sequence[int],
    ) -> torch.Tensor:
        """Logits of the rows `wanted`, ascending, as (wanted, vocab). owners: each row's line of `pages`."""
        # The C code does not check them.
        if not (min(ids) >= 0 and max(ids) < self.vocab and max(positions) < len(self._turns)):
            raise IndexError("a token id or a position is outside the model's table")
        columns = max(len(row) for row in pages)
        table = torch.tensor([[*row, *[0] * (columns - len(row))] for row in pages], dtype=torch.int32)
        logits = torch.empty(len(wanted), self._model.head.out)
        done = 0
        for first in range(0, len(ids), MOST_ROWS):
            part = slice(first, first + MOST_ROWS)
            last = [row - first for row in wanted[done:] if row < part.stop] if done < len(wanted) else []
            given = {
                "ids": torch.tensor(ids[part], dtype=torch.int64),
                "positions": torch.tensor(positions[part], dtype=torch.int32),
                "owners": torch.tensor(owners[part], dtype=torch.int32),
                "pages": table,
                "last": torch.tensor(last, dtype=torch.int32),
                "logits": logits[done:],
            }
            self._scratch["jobs"].zero_()
            pointers = {name: tensor.data_ptr() for name, tensor in (self._scratch | given).items()}
            step = Step(rows=len(given["ids"]), wanted=len(last), columns=columns, **pointers)
            self._library.lab_step(self._model, step)
            done += len(last)
        return logits[:, : self.vocab]
