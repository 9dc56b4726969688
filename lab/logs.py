"""Follows several log files with `tail -F`, also when they are rotated; each line starts with its service's name."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

from lab.install import lines_of


@contextlib.contextmanager
def follow(folder: Path, names: Sequence[str], lines: int = 0) -> Iterator[Iterator[str]]:
    """Yield an iterator of the lines of `FOLDER/<name>.log`: the last `lines` of each file, then new ones, and "" for
    each second without output."""
    paths = {str(folder / f"{name}.log"): name for name in names}
    argv = ["tail", "-n", str(lines), "-F", *paths]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as tail:
        try:
            yield _named(lines_of(tail), paths)
        finally:
            tail.terminate()


def _named(lines: Iterator[str], paths: dict[str, str]) -> Iterator[str]:
    """Prefix each line with its service's name, known from the `==> PATH <==` lines that `tail` prints for several
    files."""
    if len(paths) == 1:
        yield from lines
        return
    width = max(map(len, paths.values()), default=0)
    current = next(iter(paths.values()), "")
    for line in lines:
        if line.startswith("==> ") and line[4:-4] in paths:
            current = paths[line[4:-4]]
        else:
            yield f"{current:{width}} | {line}" if line else ""
