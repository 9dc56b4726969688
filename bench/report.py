"""The report of a run of measurements: rows with their targets, a table, a file in runs/."""

from __future__ import annotations

import json
import os
import platform
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).parents[1]


class BenchError(Exception):
    """There are no figures. The message has the reason and a remedy."""


@dataclass
class Row:
    """One figure. `passed`: None without a target, or if it was not measured (`note` has the reason)."""

    section: str
    name: str
    value: float | None
    unit: str = ""
    target: str = ""
    passed: bool | None = None
    note: str = ""


def machine() -> dict[str, Any]:
    model = platform.processor()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        named = [line.partition(":")[2].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        model = named[0] if named else model
    return {
        "processor": model,
        "cores": os.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "system": platform.platform(),
        "python": platform.python_version(),
    }


def page(title: str, reported: dict[str, Any], rows: Sequence[Row]) -> str:
    """The table for the terminal and for docs/benchmarks.md."""
    head = ", ".join(f"{name}: {value}" for name, value in reported.items())
    lines = [f"{title}: {head}", "", f"{'':52} {'figure':>10} {'':6} {'target':21}      beside it"]
    section = ""
    for row in rows:
        if row.section != section:
            section = row.section
            lines.append(section)
        word = {True: "pass", False: "FAIL", None: ""}[row.passed]
        value = "–" if row.value is None else f"{row.value:,.{0 if abs(row.value) >= 100 else 2}f}"
        lines.append(f"  {row.name:50} {value:>10} {row.unit:6} {row.target:21} {word:4} {row.note}".rstrip())
    return "\n".join(lines)


def save(name: str, run: dict[str, Any], rows: Sequence[Row]) -> Path:
    """Write everything to a new file in runs/. Returns its path relative to the repository's root."""
    folder = ROOT / "runs"
    folder.mkdir(exist_ok=True)
    path = folder / time.strftime(f"{name}-%Y%m%d-%H%M%S.json")
    path.write_text(json.dumps(run | {"figures": [asdict(row) for row in rows]}, indent=1))
    return path.relative_to(ROOT)


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)  # noqa: T201 - progress
