"""Runs of the load as real processes, for the tests."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from processes import eventually, python

NOT_TRUSTED = 5  # exit code
LONG = 3600  # seconds of a run that ends when its workload is used up, or when the test has seen enough


@dataclass
class Run:
    code: int
    output: str
    folder: Path

    @property
    def summary(self) -> dict[str, Any]:
        return dict(json.loads((self.folder / "summary.json").read_text()))

    @property
    def records(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.folder / "records.jsonl").read_text().splitlines()]

    def rows(self, name: str) -> list[dict[str, str]]:
        with (self.folder / name).open(newline="") as file:
            return list(csv.DictReader(file))


def begin(what: str, host: str, folder: Path, **settings: object) -> subprocess.Popen[str]:
    own = {name: value for name, value in os.environ.items() if not name.startswith(("LOAD_", "LOCUST_"))}
    wanted = {f"LOAD_{name.upper()}": str(value) for name, value in settings.items()}
    return subprocess.Popen(
        python("lab_load", what), env=own | {"LOAD_HOST": host, "LOAD_RUNS_DIR": str(folder)} | wanted,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, text=True,
    )  # fmt: skip


def finish(popen: subprocess.Popen[str], folder: Path, enough: Callable[[], bool] | None = None) -> Run:
    """The whole run; with `enough` it is told to end, as Docker does, as soon as that is true."""
    try:
        if enough:
            eventually(lambda: enough() or popen.poll() is not None, what="enough of a run")
            popen.send_signal(signal.SIGTERM)
        output, _ = popen.communicate(timeout=60)
    finally:
        popen.kill()
    return Run(popen.returncode, output, next(folder.glob("*-*"), folder))


def load(what: str, host: str, folder: Path, **settings: object) -> Run:
    return finish(begin(what, host, folder, **settings), folder)


def load_until(enough: Callable[[], bool], what: str, host: str, folder: Path, **settings: object) -> Run:
    return finish(begin(what, host, folder, seconds=LONG, **settings), folder, enough)
