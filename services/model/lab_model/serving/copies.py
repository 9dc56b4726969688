"""Memory of models' second copies (`inspector`): what is free for one, and which run.

A copy is started by a request to its model's replica, not by `lifecycle`: both tell each other through files in a
folder of this machine. Knows files and process ids. Knows nothing of Ray or of what a copy computes.
"""

from __future__ import annotations

import os
from pathlib import Path

import psutil

from ..errors import UnavailableError

FREE = "free-bytes"


def write_free(folder: Path, free: int) -> None:
    """Tell replicas how many bytes of the models' memory are free."""
    draft = folder / f"{FREE}.new"
    draft.write_text(str(free))
    draft.replace(folder / FREE)


def read_free(folder: Path) -> int | None:
    """None where nothing bounds the memory, as in a cluster, whose nodes Ray chooses."""
    try:
        return int((folder / FREE).read_text())
    except FileNotFoundError:
        return None


def check_room(folder: Path, model: str, needed: int) -> None:
    """Raises UnavailableError where a copy of the model does not run and its `needed` bytes are not free."""
    free = read_free(folder)
    if free is not None and needed > free and not is_running(folder, model):
        raise UnavailableError(
            f"The copy of {model} whose layers could be shown needs {needed >> 20} MiB of memory, and {free >> 20} MiB "
            "are left of what all models together may take (MODEL_MEMORY_BYTES): unload another model, or wait until "
            "one is idle."
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
