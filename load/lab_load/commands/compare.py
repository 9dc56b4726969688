"""`load-compare`: two runs, or groups of runs with commas between them."""

from __future__ import annotations

import sys
from pathlib import Path

from ..reports.compare import FIELDS, differences
from ..settings import Settings


def main(settings: Settings, arguments: list[str]) -> int:
    """`arguments`: group A, group B. Raises ValueError."""
    if len(arguments) != 2:
        raise ValueError("compare needs two runs or groups of runs: make load-compare A=RUN,RUN,RUN B=RUN,RUN,RUN")
    a, b = ([_folder(settings, name) for name in group.split(",") if name] for group in arguments)
    if not a or not b:
        raise ValueError("compare needs at least one run on each side")
    for each in differences(a, b):
        milliseconds = [1000 * value for value in (each.a, each.b, each.median, each.low, each.high)]
        sys.stdout.write("{:<11} A {:.1f} ms, B {:.1f} ms; B − A {:+.2f} ms (95 % {:+.2f} to {:+.2f}), {} pairs: {}\n".format(
            FIELDS[each.field], *milliseconds, each.pairs, each.verdict))  # fmt: skip
    return 0


def _folder(settings: Settings, name: str) -> Path:
    return Path(name) if Path(name).is_dir() else settings.runs_dir / name
