"""Memory of models' second copies (`inspector`): the free memory, and the running copies.

A request to a model's replica starts the copy, not `lifecycle`; both exchange their state through files in a folder of
this machine. Knows files and process ids. Knows nothing of Ray or of what a copy computes.
"""

from __future__ import annotations

import os
from pathlib import Path

import psutil

from ..errors import UnavailableError

FREE = "free-bytes"


def write_free(folder: Path, free: int) -> None:
    """Write how many bytes of the models' memory are free, for the replicas."""
    draft = folder / f"{FREE}.new"
    draft.write_text(str(free))
    draft.replace(folder / FREE)


def read_free(folder: Path) -> int | None:
    """Free bytes; None if the memory has no bound, as in a cluster, where Ray chooses the node."""
    try:
        return int((folder / FREE).read_text())
    except FileNotFoundError:
        return None


def check_room(folder: Path, model: str, needed: int) -> None:
    """Raises UnavailableError if no copy of the model runs and its `needed` bytes are not free."""
    free = read_free(folder)
    if free is not None and needed > free and not is_running(folder, model):
        raise UnavailableError(
            f"This endpoint needs a second copy of {model} with {needed >> 20} MiB of memory, but only {free >> 20} "
            "MiB of the memory of all models (MODEL_MEMORY_BYTES) are free: unload another model, or wait until one is "
            "idle."
        )


def announce(folder: Path, model: str) -> None:
    """Called in the process of a copy: it counts until it ends."""
    (folder / f"{model}.{os.getpid()}.copy").touch()


def is_running(folder: Path, model: str) -> bool:
    """Whether a copy of the model is in memory."""
    found = False
    for path in folder.glob(f"{model}.*.copy"):
        pid = path.name.removeprefix(f"{model}.").removesuffix(".copy")
        if not pid.isdigit():  # of a model whose id begins like this one's
            continue
        if psutil.pid_exists(int(pid)):
            found = True
        else:
            path.unlink(missing_ok=True)
    return found
