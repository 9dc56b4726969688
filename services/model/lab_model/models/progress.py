"""Progress of a load or a download, reported to other processes of this machine through a small file.

Knows files. Knows nothing of what is loaded. Imports no torch.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

LEAST_SECONDS = 0.2  # between two reports of the same step
Report = Callable[[str, float | None], None]  # (step, share of it that is done)


class Step(NamedTuple):
    """what: `weights`, `tokenizer`, … percent: 0 to 100, None if it is not known."""

    what: str
    percent: int | None = None


class Progress:
    """Writes the file. Without one it does nothing."""

    def __init__(self, file: Path | None = None) -> None:
        self._file = file
        self._last, self._next = Step(""), 0.0

    def report(self, what: str, share: float | None = None) -> None:
        """Report the current step. share: the part of it that is done, 0 to 1."""
        step = Step(what, None if share is None else max(0, min(100, int(share * 100))))
        now = time.monotonic()
        if self._file is None or step == self._last or (step.what == self._last.what and now < self._next):
            return
        self._last, self._next = step, now + LEAST_SECONDS
        part = self._file.with_name(f"{self._file.name}.{os.getpid()}")
        with contextlib.suppress(OSError):  # a full disk must not end a load
            part.write_text(json.dumps(step))
            part.replace(self._file)


def read_progress(file: Path) -> Step | None:
    """The last report; None without one."""
    try:
        what, percent = json.loads(file.read_text())
    except (OSError, ValueError):
        return None
    return Step(str(what), percent if isinstance(percent, int) else None)
