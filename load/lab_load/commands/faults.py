"""`load-faults`: makes one service at a time fail under load, counts failures and measures the recovery.

| fault | must hold |
|---|---|
| redis paused (SIGSTOP) for 5 s | no request fails; after redis continues, the ledger has every charge |
| the proxy restarted (SIGTERM) | requests fail only until it serves again |
| a model replica killed (SIGKILL) | the model serves again; failures are counted |

Arguments: NAME=PID of `redis`, `proxy` and `model`; `make load-faults` takes them from the running lab. A service
without a PID is left out. The supervisor (make lab, compose, Kubernetes) restarts what was ended.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from ..settings import Settings
from . import runs

PAUSE_SECONDS = 5.0
BEFORE_SECONDS = 8.0
SECONDS = 40
REPLICA = "ray::"  # process title of Ray Serve's replicas


@dataclass(frozen=True)
class Outcome:
    """`recovery`: seconds from the first failed start to the success after the last failure; 0 without failures."""

    fault: str
    answers: int
    failed: int
    errors: dict[str, int]
    recovery: float
    recovered: bool
    ledger_holds: bool | None  # None: the ledger could not be read

    @property
    def holds(self) -> bool:
        clean = not self.failed if self.fault == "redis paused" else self.recovered
        return clean and self.ledger_holds is not False


def recovery(records: list[dict[str, Any]]) -> tuple[float, bool]:
    """Seconds without service, and whether the service recovered. `records`: of one run, in the order of their
    starts."""
    failed = [each["started"] for each in records if each["error"]]
    if not failed:
        return 0.0, bool(records)
    back = [each["ended"] for each in records if not each["error"] and each["started"] > failed[-1]]
    return (min(back) - failed[0], True) if back else (records[-1]["ended"] - failed[0], False)


def inject(fault: str, pid: int) -> None:
    if fault == "redis paused":
        os.kill(pid, signal.SIGSTOP)
        try:
            time.sleep(PAUSE_SECONDS)
        finally:
            os.kill(pid, signal.SIGCONT)
    elif fault == "proxy restarted":
        os.kill(pid, signal.SIGTERM)
    else:
        os.kill(pid, signal.SIGKILL)


def replica_of(pid: int) -> int | None:
    """Process id of a replica that computes answers, a descendant of the model service; None if there is none."""
    children = psutil.Process(pid).children(recursive=True)
    found = [
        child.pid
        for child in children
        if "replica" in (title := " ".join(child.cmdline()).lower()) and title.startswith(REPLICA)
    ]
    return found[0] if found else None


def outcome(fault: str, done: runs.Run) -> Outcome:
    """The outcome of a run with a fault. Raises ValueError if the run has no result."""
    figures = runs.result(done)
    assert done.folder is not None  # noqa: S101 result() looked
    assert done.summary is not None  # noqa: S101
    lines = (done.folder / "records.jsonl").read_text("utf-8").splitlines()
    seconds, recovered = recovery([json.loads(line) for line in lines])
    charged = [row for row in done.summary["sums"]["rows"] if row["values"].get("ledger") is not None]
    return Outcome(
        fault,
        figures["answers"],
        figures["failed"],
        figures["errors"],
        seconds,
        recovered,
        all(row["holds"] for row in charged) if charged else None,
    )


def main(settings: Settings, arguments: list[str]) -> int:
    """`arguments`: NAME=PID. Returns 1 if a promise of the table above is broken. Raises ValueError for others."""
    pids: dict[str, int] = {}
    for argument in arguments:
        name, _, pid = argument.partition("=")
        if name not in {"redis", "proxy", "model"} or not pid.isdecimal():
            raise ValueError(f"{argument}: faults takes redis=PID, proxy=PID, model=PID")
        pids[name] = int(pid)
    if not pids:
        raise ValueError("faults needs the process of a service: redis=PID, proxy=PID, model=PID")
    if "model" in pids:
        replica = replica_of(pids.pop("model"))
        if replica is not None:
            pids["model"] = replica
        else:
            sys.stdout.write("model: no process of a replica was found; skipped\n")
    faults = {"redis": "redis paused", "proxy": "proxy restarted", "model": "replica killed"}
    found = []
    for name, fault in faults.items():
        if name not in pids:
            continue
        popen = runs.start(
            "caching",
            settings,
            seconds=min(settings.seconds, SECONDS) if name == "redis" else SECONDS,
            requests=100_000,
        )
        time.sleep(BEFORE_SECONDS)
        inject(fault, pids[name])
        each = outcome(fault, runs.finish(popen))
        found.append(each)
        ledger = {True: "the ledger has every charge", False: "THE LEDGER LACKS CHARGES", None: "ledger not read"}
        sys.stdout.write(
            f"{fault}: {each.answers} answers, {each.failed} failed {json.dumps(each.errors)}, without service "
            f"for {each.recovery:.1f} s, {'back' if each.recovered else 'NOT BACK'}, "
            f"{ledger[each.ledger_holds]}: {'ok' if each.holds else 'NOT OK'}\n"
        )
        sys.stdout.flush()
    Path(settings.runs_dir / "faults.json").write_text(json.dumps([vars(each) for each in found], indent=1), "utf-8")
    return 0 if found and all(each.holds for each in found) else 1
