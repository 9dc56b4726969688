"""One run as a process: start it with settings, wait for it, read its summary."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..settings import Settings


@dataclass(frozen=True)
class Run:
    code: int
    output: str
    summary: dict[str, Any] | None  # None if nothing ran
    folder: Path | None


class RunError(Exception):
    """A run without figures. `code`: its exit code, never 0. The message is the last line of what it printed."""

    def __init__(self, done: Run) -> None:
        lines = [line.strip() for line in done.output.splitlines() if line.strip()]
        super().__init__(lines[-1].removeprefix("load: ") if lines else f"a run ended with code {done.code}")
        self.code = done.code or 1


def environment(settings: Settings, changed: Mapping[str, Any]) -> dict[str, str]:
    """This process's environment with other settings. `changed`: names without LOAD_; None removes a setting."""
    environ = dict(os.environ)
    for name, value in {"host": settings.host, "runs_dir": settings.runs_dir, **changed}.items():
        environ[f"LOAD_{name.upper()}"] = "" if value is None else str(value)
    return environ


def start(workload: str, settings: Settings, **changed: Any) -> subprocess.Popen[str]:
    return subprocess.Popen(  # noqa: S603 our own program
        [sys.executable, "-m", "lab_load", workload], env=environment(settings, changed), text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
    )  # fmt: skip


def finish(popen: subprocess.Popen[str]) -> Run:
    """Wait for the end of a run. Needs no timeout, because a run's own settings bound it."""
    output, _ = popen.communicate()
    folder = next((Path(line.strip().split(": report.html")[0]) for line in output.splitlines()
                   if ": report.html" in line), None)  # fmt: skip
    summary = json.loads((folder / "summary.json").read_text("utf-8")) if folder else None
    return Run(popen.returncode, output, summary, folder)


def run(workload: str, settings: Settings, **changed: Any) -> Run:
    return finish(start(workload, settings, **changed))


def result(done: Run) -> dict[str, Any]:
    """The figures of a run of one workload. Raises RunError if it has none."""
    if done.summary is None or not done.summary["results"]:
        raise RunError(done)
    found: dict[str, Any] = next(iter(done.summary["results"].values()))
    return found
