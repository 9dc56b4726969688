"""The C kernels: compiles them, loads the variant for this processor, defines the structures that they read.

There is one library for each kind of processor, and all give bit-identical results. A start compiles the best variant
that its processor supports. `python -m lab_model.runners.kernels` compiles all variants, for an image that runs on
other machines than the one that builds it. LAB_KERNELS=avx2 (or another key of VARIANTS) selects one variant, for tests
and measurements.
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
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

log = logging.getLogger(__name__)

SOURCE = Path(__file__).with_name("kernels.c")
FLAGS = ["-O3", "-std=gnu11", "-ffp-contract=off", "-shared", "-fPIC"]
# Instruction sets that each variant needs, the best variant first. Linux's names; a compiler's lack the underscore.
VARIANTS = {
    "avx512": ("avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_vnni", "avx2", "fma", "f16c"),
    "avxvnni": ("avx2", "fma", "f16c", "avx_vnni"),  # Intel's laptops from the 12th generation on
    "avx2": ("avx2", "fma", "f16c"),
}
# Unlike CPUID it omits what the system does not allow programs to use.
PROCESSOR = Path("/proc/cpuinfo")
COMPILE_SECONDS = 120


class KernelError(Exception):
    """The kernels cannot be used on this machine. The message has the reason and a remedy."""


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


@functools.cache
def library() -> Any:
    """The best variant for this processor, compiled unless an earlier start has done it. Raises KernelError."""
    faults = []
    for variant in _runnable():
        try:
            return _loaded(_compiled(variant))
        except KernelError as error:
            faults.append(error)  # the compiler may support the flags of the next variant
    raise faults[0]


def _runnable() -> list[str]:
    """The variants that this processor supports, the best first, at least one. Raises KernelError."""
    if not _x86():
        raise KernelError("the kernels are for x86-64 processors")
    wanted = os.environ.get("LAB_KERNELS")
    if wanted and wanted not in VARIANTS:
        raise KernelError(f"LAB_KERNELS must be one of {', '.join(VARIANTS)}")
    try:
        lines = PROCESSOR.read_text().splitlines()
    except OSError as error:
        raise KernelError(f"the processor's flags cannot be read: {error}") from None
    cores = [set(line.partition(":")[2].split()) for line in lines if line.startswith("flags")]
    has = set.intersection(*cores) if cores else set()
    variants = [variant for variant in VARIANTS if not wanted or variant == wanted]
    if found := [variant for variant in variants if has.issuperset(VARIANTS[variant])]:
        return found
    raise KernelError(f"this processor has no {', '.join(need for need in VARIANTS[variants[-1]] if need not in has)}")


def _x86() -> bool:
    return platform.machine().lower() in {"x86_64", "amd64"}


def _loaded(path: Path) -> Any:
    try:
        found = ctypes.CDLL(str(path))
    except OSError as error:
        raise KernelError(f"the compiled kernels cannot be loaded: {error}") from None
    found.lab_step.argtypes = [ctypes.POINTER(Model), ctypes.POINTER(Step)]
    found.lab_step.restype = None
    found.lab_phases.argtypes = [ctypes.POINTER(Model)]
    return found


@functools.cache
def why_unavailable() -> str | None:
    """Reason why the kernels cannot be used on this machine; None if they can."""
    try:
        library()
        openmp()
    except KernelError as error:
        return str(error)
    return None


def _compiler() -> str | None:
    names = (os.environ.get("CC"), "cc", "gcc", "clang")
    return next((found for name in names if name and (found := shutil.which(name))), None)


def _compiled(variant: str, known: Path | None = None) -> Path:
    """The compiled library: in __pycache__ if that is writable, else in a temporary folder. known: a folder with
    libraries of earlier builds; they are used, and new ones are added."""
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
        raise KernelError("there is no C compiler (on Debian and Ubuntu: apt-get install gcc libc6-dev)")
    if not os.access(kept.parent if kept.parent.exists() else SOURCE.parent, os.W_OK):
        kept = Path(tempfile.mkdtemp(prefix="lab-kernels-")) / name
    kept.parent.mkdir(exist_ok=True)
    # Replicas start at the same time: each writes its own file, and the last rename wins.
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
            message = (done.stderr.strip().splitlines() or ["nothing"])[0]
            raise KernelError(f"{compiler} does not compile the kernels: {message}")
        if known:
            _keep(written, known / name)
        written.replace(kept)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise KernelError(f"{compiler} does not compile the kernels: {error}") from None
    finally:
        with contextlib.suppress(OSError):
            written.unlink()
    return kept


def _keep(written: Path, place: Path) -> None:
    """Copy a library atomically for later builds. If that fails, a later build compiles again."""
    try:
        shutil.copyfile(written, place.with_name(written.name)).replace(place)
    except OSError as error:
        log.warning("compiled kernels cannot be kept for the next build: %s", error)


def openmp() -> tuple[int, int]:
    """Addresses of GOMP_parallel and omp_get_num_threads in torch's OpenMP runtime: two pools of threads would compete
    for the cores. Raises KernelError."""
    try:
        torch_ = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
        found = [ctypes.cast(torch_[name], ctypes.c_void_p).value for name in ("GOMP_parallel", "omp_get_num_threads")]
    except (AttributeError, OSError):
        raise KernelError("this build of torch does not use GNU's OpenMP runtime") from None
    return found[0] or 0, found[1] or 0


def main(known: str | None = None) -> int:
    """Compile all variants and print which one this machine uses. Exit code 1 if a compiler compiles none. known: as
    for `_compiled`."""
    try:
        runnable = _runnable()
    except KernelError as error:
        _say(f"this machine can use none: {error}")
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
            _say(f"{variant}: {path}{', used on this machine' if mine else ''}")
        except KernelError as error:
            _say(f"{variant}: {error}")
    return int(_x86() and not made and _compiler() is not None)


def _say(line: str) -> None:
    print(line, flush=True)  # noqa: T201


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
