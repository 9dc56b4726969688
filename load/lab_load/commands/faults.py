"""`load-faults`: makes one service at a time fail under load, counts failures and measures the recovery.

| fault | must hold |
|---|---|
| redis paused for 5 s (SIGSTOP, `docker pause`) | no request fails; the ledger has every charge afterwards |
| the proxy restarted (SIGTERM, `docker restart`) | requests fail only until it serves again |
| a replica of the model killed (SIGKILL) | the model serves again; failures are counted |

Arguments: `redis`, `proxy` and `model`, each =PID or =container:ID; `make load-faults` takes them from the running lab.
A service that is not named is left out. The supervisor (make lab, Docker) restarts what was ended.
"""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from typing import Any, Protocol

import psutil

from ..generator.target import examine
from ..settings import Settings
from . import runs

PAUSE_SECONDS = 5.0
BEFORE_SECONDS = 8.0
LEAST_SECONDS = 20
FAULTS = {  # service -> fault, seconds of its run (a new replica first loads its weights)
    "redis": ("redis paused", 30), "proxy": ("proxy restarted", 40), "model": ("replica killed", 60),
}  # fmt: skip


class Service(Protocol):
    """One running service, and the faults that can be caused in it."""

    def pause(self, seconds: float) -> None: ...

    def restart(self) -> None: ...

    def replica(self, model: str) -> int | None:
        """Process id of one of the model's replicas, None if there is none."""

    def kill(self, pid: int) -> None: ...


@dataclass(frozen=True)
class Process:
    """A service that runs as a process on this machine (`make lab`)."""

    pid: int

    def pause(self, seconds: float) -> None:
        os.kill(self.pid, signal.SIGSTOP)
        try:
            time.sleep(seconds)
        finally:
            os.kill(self.pid, signal.SIGCONT)

    def restart(self) -> None:
        os.kill(self.pid, signal.SIGTERM)

    def replica(self, model: str) -> int | None:
        for child in psutil.Process(self.pid).children(recursive=True):
            if is_replica(" ".join(child.cmdline()), model):
                return child.pid
        return None

    def kill(self, pid: int) -> None:
        os.kill(pid, signal.SIGKILL)


# Prints id and title of each process, because a container has no `ps`.
PROCESSES = """
import pathlib
for file in pathlib.Path("/proc").glob("[0-9]*/cmdline"):
    try:
        print(file.parent.name, file.read_bytes().replace(bytes(1), b" ").decode("utf-8", "replace"))
    except OSError:
        pass
"""
KILL = "import os, sys; os.kill(int(sys.argv[1]), 9)"


@dataclass(frozen=True)
class Container:
    """A service that runs in a Docker container (`make up`)."""

    id: str

    def pause(self, seconds: float) -> None:
        self._docker("pause", self.id)
        try:
            time.sleep(seconds)
        finally:
            self._docker("unpause", self.id)

    def restart(self) -> None:
        self._docker("restart", self.id)

    def replica(self, model: str) -> int | None:
        for line in self._docker("exec", self.id, "python", "-c", PROCESSES).splitlines():
            pid, _, title = line.partition(" ")
            if is_replica(title, model):
                return int(pid)
        return None

    def kill(self, pid: int) -> None:
        self._docker("exec", self.id, "python", "-c", KILL, str(pid))

    def _docker(self, *arguments: str) -> str:
        """Run a docker command. Raises ValueError with Docker's error message."""
        try:
            done = subprocess.run(["docker", *arguments], capture_output=True, text=True, check=False)  # noqa: S603, S607
        except OSError as error:
            raise ValueError(f"docker cannot be run: {error.strerror}") from None
        if done.returncode:
            raise ValueError(f"docker {arguments[0]}: {done.stderr.strip()[-300:]}")
        return done.stdout


def is_replica(title: str, model: str) -> bool:
    """Whether a process title is that of a replica: Ray Serve sets `ray::ServeReplica:<application>:<deployment>`."""
    return title.startswith("ray::") and f"ServeReplica:{model}" in title


def service_of(argument: str) -> tuple[str, Service]:
    """Parse NAME=PID or NAME=container:ID into the name and the service. Raises ValueError."""
    name, _, place = argument.partition("=")
    kind, _, found = place.rpartition(":")
    if name in FAULTS and kind == "container" and found:
        return name, Container(found)
    if name in FAULTS and place.isdecimal():
        return name, Process(int(place))
    raise ValueError(f"{argument}: faults takes {', '.join(FAULTS)}, each =PID or =container:ID")


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


def ledger_holds(row: dict[str, Any]) -> bool:
    """Whether the ledger agrees with the client. Other sides do not count: a restarted proxy's counters begin at 0."""
    high = math.inf if row["high"] is None else row["high"]
    return bool(row["low"] <= row["values"]["ledger"] <= high)


def outcome(fault: str, done: runs.Run) -> Outcome:
    """The outcome of a run with a fault. Raises RunError if the run has no result."""
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
        all(map(ledger_holds, charged)) if charged else None,
    )


def main(settings: Settings, arguments: list[str]) -> int:
    """Returns 1 if a promise of the table above is broken. Raises ValueError, TargetError, RunError."""
    services = dict(service_of(argument) for argument in arguments)
    if not services:
        raise ValueError("no lab is running here: make start or make up; or name its processes: "
                         "python -m lab_load faults redis=PID proxy=PID model=PID")  # fmt: skip
    chosen = settings.seconds if "seconds" in settings.model_fields_set else None
    if chosen is not None and chosen < LEAST_SECONDS:
        raise ValueError(f"LOAD_SECONDS={chosen}: a run with a fault takes at least {LEAST_SECONDS} s")
    model = examine(settings).model or ""
    found = []
    for name, (fault, seconds) in FAULTS.items():
        if name not in services:
            continue
        service, replica = services[name], None
        if name == "model" and (replica := service.replica(model)) is None:
            _say(f"{fault}: no process of a replica of {model} was found; left out")
            continue
        _say(f"{fault}: {chosen or seconds} s of load, the fault after {BEFORE_SECONDS:.0f} s")
        popen = runs.start("caching", settings, seconds=chosen or seconds, requests=100_000)
        time.sleep(BEFORE_SECONDS)
        if popen.poll() is None:
            if name == "redis":
                service.pause(PAUSE_SECONDS)
            elif replica is None:
                service.restart()
            else:
                service.kill(replica)
        each = outcome(fault, runs.finish(popen))
        found.append(each)
        ledger = {True: "the ledger has every charge", False: "THE LEDGER LACKS CHARGES", None: "ledger not read"}
        kinds = ", ".join(f"{count} × {kind}" for kind, count in each.errors.items())
        _say(
            f"    {each.answers} answers, {each.failed} failed{f' ({kinds})' if kinds else ''}; without service for "
            f"{each.recovery:.1f} s, {'back' if each.recovered else 'NOT BACK'}; {ledger[each.ledger_holds]}: "
            f"{'ok' if each.holds else 'NOT OK'}"
        )
    file = settings.runs_dir / "faults.json"
    file.write_text(json.dumps([vars(each) for each in found], indent=1) + "\n", "utf-8")
    _say(f"  {file}")
    return 0 if found and all(each.holds for each in found) else 1


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()
