"""A GGUF file's Llama in C, on CPUs with AVX2: `kernels.c` compiled, its weights packed, the engine's runner.

The same file runs in torch's own operators where there is no compiler or no such processor (weights.py, llama.py). What
C is for: torch has no kernel that multiplies a few rows by 4-bit blocks in integers, and between its kernels a step
made 1,200 small operators; here a step is one call. Rows never depend on each other, so the runner is exact.

There is one library for each kind of processor, and all give the same bits. A start compiles the best one that its
processor has. `python -m lab_model.runners.cpu` compiles all of them, for an image that runs on other machines than the
one
that builds it. LAB_KERNELS=avx2 (or another of VARIANTS) takes that one and no other: for tests and measurements.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..engine.kv_pages import PAGE_TOKENS
from ..engine.runner import Span
from ..weights import llama
from ..weights.gguf import GGUFFile, Tensor
from .kernels import Layer, Matrix, Model, Step, _openmp, library, main, why_unavailable

log = logging.getLogger(__name__)


# As in kernels.c.
BLOCK, LANES, TILE = 32, 16, 32
MOST_GROUP, MOST_HEAD = 8, 256
PEAK = 4
# Rows of one call, for whose activations there is room. 64 to 256 were equally fast.
MOST_ROWS = 256


# ---- the library


# ---- weights


@dataclass(frozen=True)
class PackedMatrix:
    """A weight as kernels.c reads it. data: (tiles, blocks, 2, bytes), uint8."""

    data: torch.Tensor
    out: int
    columns: int
    bits: int

    def matrix(self) -> Matrix:
        return Matrix(self.data.data_ptr(), self.out, self.columns, self.bits)


def pack(*tensors: Tensor) -> PackedMatrix:
    """One matrix of the tensors' rows one after the other: of 4 bits if all of them are, else of 8. Rows are filled up
    with zeros to whole tiles."""
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
    """These kernels know this file's shapes, and this machine the kernels."""
    if not _fits(file):
        return False
    if why := why_unavailable():
        log.warning("the model runs in torch's own operators, several times slower than in our kernels: %s", why)
    return why is None


def _fits(file: GGUFFile) -> bool:
    if not llama.can_read(file):
        return False
    said = llama.hyperparameters(file)
    dim = said["head_dim"]
    inputs = [tensor.shape[1] for tensor in file.tensors.values() if len(tensor.shape) == 2]
    group = said["attention.head_count"] // said["kv_heads"]
    return group <= MOST_GROUP and dim % BLOCK == 0 and dim <= MOST_HEAD and not any(size % BLOCK for size in inputs)


class CpuRunner:
    """The engine's runner of a GGUF file. Raises NativeError, GGUFError."""

    batch_invariant = True
    kind = "int4+int8"

    def __init__(self, file: GGUFFile, threads: int) -> None:
        self._library = library()
        said, tensors = llama.hyperparameters(file), file.tensors
        heads, kv_heads, dim, width = (
            said[name] for name in ("attention.head_count", "kv_heads", "head_dim", "embedding_length")
        )
        self.context: int = said["context_length"]
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

        layers = [layer(f"blk.{index}") for index in range(said["block_count"])]
        table = matrix("token_embd")
        self._rotations = llama.rotations(said)
        parallel, team = _openmp()
        self._model = Model(
            layers=len(layers),
            heads=heads,
            kv_heads=kv_heads,
            head_dim=dim,
            threads=threads,
            epsilon=said["attention.layer_norm_rms_epsilon"],
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
        rows = min(self.context, pages * PAGE_TOKENS)  # a file may say millions
        angles = torch.arange(rows).float()[:, None] * self._rotations
        self._turns = torch.stack([angles.cos(), angles.sin()], -1).contiguous()
        m.turns = self._turns.data_ptr()
        self._pool = torch.zeros(m.layers, pages, m.kv_heads * 2 * PAGE_TOKENS * m.head_dim, dtype=torch.float16)
        m.pool, m.pages = self._pool.data_ptr(), pages

    def prefill(self, ids: Sequence[int], spans: Sequence[Span]) -> torch.Tensor:
        positions = [place for span in spans for place in range(span.start, span.stop)]
        owners = [owner for owner, span in enumerate(spans) for _ in range(span.start, span.stop)]
        ends, at = [], -1
        for span in spans:
            at += span.stop - span.start
            ends.append(at)
        return self._forward(ids, positions, owners, [span.pages for span in spans], ends)

    def all_logits(self, ids: Sequence[int], pages: Sequence[int]) -> torch.Tensor:
        return self._forward(ids, range(len(ids)), [0] * len(ids), [pages], range(len(ids)))

    def decode(self, ids: Sequence[int], positions: Sequence[int], pages: Sequence[Sequence[int]]) -> torch.Tensor:
        return self._forward(ids, positions, range(len(ids)), pages, range(len(ids)))

    def zero_pages(self, pages: Sequence[int]) -> None:
        """Nothing: a row's attention reads its own tokens alone."""

    def _forward(
        self,
        ids: Sequence[int],
        positions: Sequence[int],
        owners: Sequence[int],
        pages: Sequence[Sequence[int]],
        asked: Sequence[int],
    ) -> torch.Tensor:
        """Logits of the rows `asked`, ascending, as (asked, vocab). owners: each row's line of `pages`."""
        # C reads where these point, whatever they are.
        if not (min(ids) >= 0 and max(ids) < self.vocab and max(positions) < len(self._turns)):
            raise IndexError("a token id or a position is outside the model's table")
        columns = max(len(row) for row in pages)
        table = torch.tensor([[*row, *[0] * (columns - len(row))] for row in pages], dtype=torch.int32)
        logits = torch.empty(len(asked), self._model.head.out)
        done = 0
        for first in range(0, len(ids), MOST_ROWS):
            part = slice(first, first + MOST_ROWS)
            last = [row - first for row in asked[done:] if row < part.stop] if done < len(asked) else []
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


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
