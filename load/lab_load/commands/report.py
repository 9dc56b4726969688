"""`load-report`: writes report.html and summary.md of a finished run again, by default of the last run."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from ..reports import html, summary
from ..settings import Settings


def main(settings: Settings, arguments: list[str]) -> int:
    """`arguments`: a run's name or folder. Raises ValueError if there is no such run."""
    finished = sorted(settings.runs_dir.glob("*/summary.json"), key=lambda path: path.stat().st_mtime)
    if not arguments and not finished:
        raise ValueError(f"{settings.runs_dir} contains no finished run")
    name = Path(arguments[0]) if arguments else finished[-1].parent
    folder = name if name.is_dir() else settings.runs_dir / name
    try:
        result = json.loads((folder / "summary.json").read_text("utf-8"))
    except (OSError, ValueError):
        raise ValueError(f"{folder} is not the folder of a finished run") from None
    (folder / "report.html").write_text(html.page(result, folder), encoding="utf-8")
    (folder / "summary.md").write_text(summary.markdown(result), encoding="utf-8")
    sys.stdout.write(f"{summary.page(result)}\n\n  {folder}/: report.html, summary.md\n")
    return 0
