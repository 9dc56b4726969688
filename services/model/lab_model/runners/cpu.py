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

import contextlib
import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..engine.kv_pages import PAGE_TOKENS
from ..engine.scheduler import Span
from ..weights import llama
from ..weights.gguf import File, Tensor

log = logging.getLogger(__name__)

SOURCE = Path(__file__).with_name("kernels.c")
FLAGS = ["-O3", "-std=gnu11", "-ffp-contract=off", "-shared", "-fPIC"]
# What a processor must have, the best first. By Linux's names; a compiler's are the same without the underscore.
VARIANTS = {
    "avx512": ("avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_vnni", "avx2", "fma", "f16c"),
    "avxvnni": ("avx2", "fma", "f16c", "avx_vnni"),  # Intel's laptops from the 12th generation on
    "avx2": ("avx2", "fma", "f16c"),
}
# Unlike CPUID it leaves out what the system does not let programs use.
PROCESSOR = Path("/proc/cpuinfo")
COMPILE_SECONDS = 120

# As in kernels.c.
BLOCK, LANES, TILE = 32, 16, 32
MOST_GROUP, MOST_HEAD = 8, 256
PEAK = 4
# Rows of one call, for whose activations there is room. 64 to 256 were equally fast.
MOST_ROWS = 256


class NativeError(Exception):
    """No kernels here. The message says why, and what to do."""


class Matrix(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), ("out", ctypes.c_int32), ("in", ctypes.c_int32), ("bits", ctypes.c_int32)]


class Layer(ctypes.Structure):
    _fields_ = [
        ("norm", ctypes.c_void_p),
        ("qkv", Matrix),
        ("output", Matrix),
        ("mlp_norm", ctypes.c_void_p),
        ("gate_up", Matrix),
        ("down", Matrix),
    ]


class Model(ctypes.Structure):
    _fields_ = [
        *[(name, ctypes.c_int32) for name in ("layers", "heads", "kv_heads", "head_dim", "threads")],
        ("epsilon", ctypes.c_float),
        ("layer", ctypes.POINTER(Layer)),
        ("table", Matrix),
        ("head", Matrix),
        *[(name, ctypes.c_void_p) for name in ("norm", "turns", "pool")],
        ("pages", ctypes.c_int64),
        *[(name, ctypes.c_void_p) for name in ("parallel", "team")],
    ]


class Step(ctypes.Structure):
    _fields_ = [
        *[(name, ctypes.c_int32) for name in ("rows", "wanted", "columns")],
        *[(name, ctypes.c_void_p) for name in ("ids", "positions", "owners", "pages", "last", "logits")],
        *[(name, ctypes.c_void_p) for name in ("x", "qkv", "values", "digits", "units", "peaks", "counts", "jobs")],
    ]


# ---- the library


@functools.cache
def library() -> Any:
    """The best kernels for this processor, from where the last start left them. Raises NativeError."""
    faults = []
    for variant in _runnable():
        try:
            return _loaded(_compiled(variant))
        except NativeError as error:
            faults.append(error)  # a compiler that does not know this variant's flags may know the next one's
    raise faults[0]


def _runnable() -> list[str]:
    """The variants that this processor has, the best first, at least one: none is loaded before. Raises NativeError."""
    if not _x86():
        raise NativeError("they are for x86-64 processors")
    wanted = os.environ.get("LAB_KERNELS")
    if wanted and wanted not in VARIANTS:
        raise NativeError(f"LAB_KERNELS is none of {', '.join(VARIANTS)}")
    try:
        lines = PROCESSOR.read_text().splitlines()
    except OSError as error:
        raise NativeError(f"what the processor has cannot be read: {error}") from None
    cores = [set(line.partition(":")[2].split()) for line in lines if line.startswith("flags")]
    has = set.intersection(*cores) if cores else set()
    variants = [variant for variant in VARIANTS if not wanted or variant == wanted]
    if found := [variant for variant in variants if has.issuperset(VARIANTS[variant])]:
        return found
    raise NativeError(f"this processor has no {', '.join(need for need in VARIANTS[variants[-1]] if need not in has)}")


def _x86() -> bool:
    return platform.machine().lower() in {"x86_64", "amd64"}


def _loaded(path: Path) -> Any:
    try:
        found = ctypes.CDLL(str(path))
    except OSError as error:
        raise NativeError(f"the compiled kernels cannot be loaded: {error}") from None
    found.lab_step.argtypes = [ctypes.POINTER(Model), ctypes.POINTER(Step)]
    found.lab_step.restype = None
    found.lab_phases.argtypes = [ctypes.POINTER(Model)]
    return found


@functools.cache
def reason() -> str | None:
    """Why there are no kernels here; None where there are."""
    try:
        library()
        _openmp()
    except NativeError as error:
        return str(error)
    return None


def _compiler() -> str | None:
    names = (os.environ.get("CC"), "cc", "gcc", "clang")
    return next((found for name in names if name and (found := shutil.which(name))), None)


def _compiled(variant: str, known: Path | None = None) -> Path:
    """Beside Python's own compiled files where that is possible, else in a folder of this process. known: a folder that
    keeps what was compiled."""
    flags = [*FLAGS, *[f"-m{need.replace('_', '')}" for need in VARIANTS[variant]]]
    source = b"".join(path.read_bytes() for path in sorted(SOURCE.parent.glob("*.[ch]")))
    name = f"kernels-{hashlib.sha256(source + ' '.join(flags).encode()).hexdigest()[:16]}.so"
    kept = SOURCE.parent / "__pycache__" / name
    if kept.exists():
        return kept
    if known and (known / name).exists():
        kept.parent.mkdir(exist_ok=True)
        return Path(shutil.copy(known / name, kept))
    compiler = _compiler()
    if compiler is None:
        raise NativeError("there is no C compiler (on Debian and Ubuntu: apt-get install gcc libc6-dev)")
    if not os.access(kept.parent if kept.parent.exists() else SOURCE.parent, os.W_OK):
        kept = Path(tempfile.mkdtemp(prefix="lab-kernels-")) / name
    kept.parent.mkdir(exist_ok=True)
    # Replicas start together: each writes its own and the last one stays.
    written = kept.with_name(f".{name}.{os.getpid()}")
    try:
        done = subprocess.run(  # noqa: S603
            [compiler, *flags, "-o", str(written), str(SOURCE), "-lm"],
            capture_output=True,
            text=True,
            timeout=COMPILE_SECONDS,
            check=False,
        )
        if done.returncode:
            said = (done.stderr.strip().splitlines() or ["nothing"])[0]
            raise NativeError(f"{compiler} does not compile the kernels: {said}")
        if known:
            _keep(written, known / name)
        written.replace(kept)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NativeError(f"{compiler} does not compile the kernels: {error}") from None
    finally:
        with contextlib.suppress(OSError):
            written.unlink()
    return kept


def _keep(written: Path, place: Path) -> None:
    """Whole or not at all: a later build takes what lies there. Where that fails, it compiles again."""
    try:
        shutil.copyfile(written, place.with_name(written.name)).replace(place)
    except OSError as error:
        log.warning("compiled kernels cannot be kept for the next build: %s", error)


def _openmp() -> tuple[int, int]:
    """Addresses of GOMP_parallel and omp_get_num_threads in the runtime that torch uses: one pool of threads, not two
    that take each other's cores. Raises NativeError."""
    try:
        torch_ = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
        found = [ctypes.cast(torch_[name], ctypes.c_void_p).value for name in ("GOMP_parallel", "omp_get_num_threads")]
    except (AttributeError, OSError):
        raise NativeError("this build of torch has another OpenMP runtime than GNU's") from None
    return found[0] or 0, found[1] or 0


# ---- weights


@dataclass(frozen=True)
class Packed:
    """A weight as kernels.c reads it. data: (tiles, blocks, 2, bytes), uint8."""

    data: torch.Tensor
    out: int
    columns: int
    bits: int

    def matrix(self) -> Matrix:
        return Matrix(self.data.data_ptr(), self.out, self.columns, self.bits)


def packed(*tensors: Tensor) -> Packed:
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
    return Packed(data, out + more, columns, bits)


def reads(file: File) -> bool:
    """These kernels know this file's shapes, and this machine the kernels."""
    if not _fits(file):
        return False
    if why := reason():
        log.warning("the model runs in torch's own operators, several times slower than in our kernels: %s", why)
    return why is None


def _fits(file: File) -> bool:
    if not llama.reads(file):
        return False
    said = llama.facts(file)
    dim = said["head_dim"]
    inputs = [tensor.shape[1] for tensor in file.tensors.values() if len(tensor.shape) == 2]
    group = said["attention.head_count"] // said["kv_heads"]
    return group <= MOST_GROUP and dim % BLOCK == 0 and dim <= MOST_HEAD and not any(size % BLOCK for size in inputs)


class Native:
    """The engine's runner of a GGUF file. Raises NativeError, GGUFError."""

    exact = True
    kind = "int4+int8"

    def __init__(self, file: File, threads: int) -> None:
        self._library = library()
        said, tensors = llama.facts(file), file.tensors
        heads, kv_heads, dim, width = (
            said[name] for name in ("attention.head_count", "kv_heads", "head_dim", "embedding_length")
        )
        self.context: int = said["context_length"]
        self._held: list[Any] = []  # what the structures point to
        self.bytes = 0

        def matrix(*names: str) -> Matrix:
            made = packed(*[tensors[f"{name}.weight"] for name in names])
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

    def every(self, ids: Sequence[int], pages: Sequence[int]) -> torch.Tensor:
        return self._forward(ids, range(len(ids)), [0] * len(ids), [pages], range(len(ids)))

    def decode(self, ids: Sequence[int], positions: Sequence[int], pages: Sequence[Sequence[int]]) -> torch.Tensor:
        return self._forward(ids, positions, range(len(ids)), pages, range(len(ids)))

    def wipe(self, pages: Sequence[int]) -> None:
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


def main(known: str | None = None) -> int:
    """Compile all variants and say which one this machine takes; 1 if there is a compiler and it compiles none. known:
    a folder that keeps them for the next build."""
    try:
        runnable = _runnable()
    except NativeError as error:
        _say(f"this machine takes none: {error}")
        runnable = []
    made, taken = 0, False
    with ThreadPoolExecutor() as pool:  # each in a process of its own, on a core of its own
        compiling = {variant: pool.submit(_compiled, variant, Path(known) if known else None) for variant in VARIANTS}
    for variant, done in compiling.items():
        try:
            path = done.result()
            made += 1
            mine = variant in runnable and not taken and bool(_loaded(path))
            taken |= mine
            _say(f"{variant}: {path}{', which this machine takes' if mine else ''}")
        except NativeError as error:
            _say(f"{variant}: {error}")
    return int(_x86() and not made and _compiler() is not None)


def _say(line: str) -> None:
    print(line, flush=True)  # noqa: T201


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
