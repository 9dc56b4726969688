"""Follows log files as `tail -F` does: several at once, over rotations, each line with its service's name."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path


class Follower:
    """New lines of `FOLDER/<name>.log`, from the last `lines` of each on (`lines=0`: from the end)."""

    def __init__(self, folder: Path, names: Sequence[str], lines: int = 0) -> None:
        self._folder = folder
        self._width = max((len(name) for name in names), default=0)
        self._positions = {name: self._start(self._path(name), lines) for name in names}  # (inode, byte)

    def new(self) -> Iterator[str]:
        """The lines written since the last call; a last line without an end waits for it."""
        for name, (inode, position) in self._positions.items():
            try:
                with self._path(name).open("rb") as log:
                    now = os.fstat(log.fileno())
                    rotated = now.st_ino != inode or now.st_size < position
                    log.seek(0 if rotated else position)
                    text = log.read(1 << 20)
            except OSError:
                continue  # between a rotation and the next line there is no file
            whole = text[: text.rfind(b"\n") + 1]
            self._positions[name] = now.st_ino, (0 if rotated else position) + len(whole)
            for line in whole.decode(errors="replace").splitlines():
                yield f"{name:{self._width}} | {line}" if len(self._positions) > 1 else line

    def _path(self, name: str) -> Path:
        return self._folder / f"{name}.log"

    @staticmethod
    def _start(path: Path, lines: int) -> tuple[int, int]:
        try:
            with path.open("rb") as log:
                now = os.fstat(log.fileno())
                begin = log.seek(max(0, now.st_size - 65536))
                text = log.read()
        except OSError:
            return 0, 0
        keep = b"".join(text.splitlines(keepends=True)[-lines:]) if lines else b""
        return now.st_ino, begin + len(text) - len(keep)
