"""`load-compare`: compares two runs, or two groups of runs separated by commas."""

from __future__ import annotations

import sys
from pathlib import Path

from ..reports.compare import FIELDS, differences
from ..settings import Settings


def main(settings: Settings, arguments: list[str]) -> int:
    """`arguments`: group A, group B. Raises ValueError for wrong arguments or runs that cannot be compared."""
    if len(arguments) != 2:
        raise ValueError("compare needs two runs or groups of runs: make load-compare A=RUN,RUN,RUN B=RUN,RUN,RUN")
    left, right = ([_folder(settings, name) for name in group.split(",") if name] for group in arguments)
    if not left or not right:
        raise ValueError("compare needs at least one run on each side")
    for each in differences(left, right):
        a_ms, b_ms, median, low, high = (1000 * value for value in (each.a, each.b, each.median, each.low, each.high))
        sys.stdout.write(
            f"{FIELDS[each.field]:<11} A {a_ms:.1f} ms, B {b_ms:.1f} ms; B − A {median:+.2f} ms (95 % {low:+.2f} "
            f"to {high:+.2f}), {each.pairs} pairs: {each.verdict}\n"
        )
    return 0


def _folder(settings: Settings, name: str) -> Path:
    return Path(name) if Path(name).is_dir() else settings.runs_dir / name
