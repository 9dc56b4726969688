"""Starts, watches and stops the lab's processes through supervisord: one for each checkout, with files in `.state/`.

Knows programs, process ids and supervisord's XML-RPC; knows nothing of what the programs do. supervisord restarts
services that die; this module starts and stops supervisord itself and leaves no process behind.
"""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import json
import os
import re
import shlex
import socket
import subprocess
import sys
import tempfile
import time
import xmlrpc.client
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
from supervisor.xmlrpc import SupervisorTransport  # type: ignore[import-untyped]

from lab.services import Service, probe
from lab.terminal import Exit, LabError, Progress

MARK = "LAB_STATE"  # variable in the environment of every process of a lab: its state folder
SOCKET_PATH_LIMIT = 90  # bytes; AF_UNIX takes 104 on macOS, 108 on Linux, and supervisord binds at the path + ".<pid>"
ANSWER_SECONDS = 5.0  # timeout of one call of supervisord
DEATHS_ALLOWED = 3  # deaths of one service during the start at which the start fails
GIVEN_UP = frozenset({"FATAL", "EXITED", "STOPPED", "UNKNOWN"})  # states from which supervisord does not restart


@dataclass(frozen=True)
class State:
    """State of one program, as supervisord reports it. `since`: Unix time of its start, 0 if it does not run."""

    name: str
    state: str
    pid: int
    since: int


class NotRunningError(Exception):
    """supervisord does not run, or is shutting down."""


class Lab:
    """The processes of one checkout, running or not."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.state = root / ".state"
        self.logs = self.state / "logs"
        self.findings = self.state / "doctor.json"
        self.mine = False  # whether this object started the lab
        self.was_ready = False
        self._supervisord: subprocess.Popen[bytes] | None = None
        self._log_starts: dict[str, int] = {}  # service -> byte offset in its log at which this start's lines begin

    # -- state

    def running(self) -> bool:
        try:
            self.states()
        except NotRunningError:
            return False
        return True

    def states(self) -> dict[str, State]:
        """Service name -> its state, in the order of the start. Raises NotRunningError."""
        reported = {
            process["name"]: State(process["name"], process["statename"], process["pid"],
                                   process["start"] if process["pid"] else 0)
            for process in self._ask("getAllProcessInfo")
        }  # fmt: skip
        return {service.name: reported[service.name] for service in self.started() if service.name in reported}

    def given_up(self) -> list[str]:
        """Names of the services that are down and that supervisord does not restart. Raises NotRunningError."""
        return [state.name for state in self.states().values() if state.state in GIVEN_UP]

    def orphans(self) -> list[int]:
        """Ids of the lab's processes whose supervisord was killed."""
        return [] if self.running() else [process.pid for process in self._processes() if _alive(process)]

    def started(self) -> list[Service]:
        """The services of the last start, with the addresses of that start, whatever the environment says now.

        Rows that another version of the lab wrote in another format are left out; stop() finds their processes by MARK.
        """
        try:
            rows = list(json.loads((self.state / "lab.json").read_text()))
        except (OSError, ValueError, TypeError):
            return []
        known = []
        for row in rows:
            with contextlib.suppress(TypeError, KeyError):
                known.append(Service(**row | {"argv": tuple(row["argv"])}))
        return known

    def tail(self, name: str, lines: int = 20) -> str:
        """The last lines of a service's log. If this object started the service: only lines since that start."""
        since = self._log_starts.get(name, 0)
        try:
            with (self.logs / f"{name}.log").open("rb") as log:
                size = log.seek(0, os.SEEK_END)  # smaller than `since` after a rotation of the file
                log.seek(max(since if since <= size else 0, size - 65536))
                text = log.read().decode(errors="replace")
        except OSError:
            return ""
        return "\n".join(text.splitlines()[-lines:])

    # -- starting

    def start(self, services: Sequence[Service], environ: Mapping[str, str]) -> None:
        """Start supervisord, which starts the services; returns once it answers. Raises LabError."""
        self.sweep()
        self.logs.mkdir(parents=True, exist_ok=True)
        self.state.chmod(0o700)
        config = self.state / "supervisord.conf"
        config.write_text(self._config(services))
        config.chmod(0o600)
        self._log_starts = {service.name: _size(self.logs / f"{service.name}.log") for service in services}
        (self.state / "lab.json").write_text(json.dumps([asdict(service) for service in services], indent=1))
        argv = [sys.executable, "-m", "supervisor.supervisord", "-c", str(config)]
        self.mine = True
        with (self.logs / "supervisord.err").open("wb") as errors:
            # In a session of its own: Ctrl-C reaches only this process, which then stops supervisord in order.
            process = self._supervisord = subprocess.Popen(
                argv,
                stdin=subprocess.DEVNULL,
                stdout=errors,
                stderr=errors,
                env=dict(environ) | {MARK: str(self.state)},
                start_new_session=True,
                cwd=self.state,  # the configuration's paths are relative: supervisord expands a % in them
            )
        deadline = time.monotonic() + 15
        while not self.running():
            if process.poll() is not None or time.monotonic() > deadline:
                # Its output is not shown: for a wrong configuration it contains the whole environment with all keys.
                raise LabError(Exit.SERVICE, f"supervisord did not start; see {self.logs}/supervisord.err and .log")
            time.sleep(0.05)

    def start_again(self, names: Sequence[str]) -> None:
        """Start services that supervisord no longer restarts, with the settings of the lab's start. Raises
        NotRunningError."""
        self._log_starts = {name: _size(self.logs / f"{name}.log") for name in ("supervisord", *names)}
        for name in names:
            self._ask("startProcess", name, False)  # False: return before the process counts as started

    def wait(self, services: Sequence[Service], timeout: float) -> None:
        """Return when all services are ready. timeout: seconds. Raises LabError, with the end of the log, if one dies
        repeatedly or the time is over."""
        progress = Progress()
        pending = list(services)
        while pending:
            try:
                states = self.states()
            except NotRunningError:
                raise LabError(Exit.SERVICE, "the lab was stopped while it started") from None
            for service in services:
                deaths = self.deaths(service.name)
                hopeless = deaths and "exit status 2;" in deaths[-1]  # a wrong setting: no retry makes it right
                if hopeless or len(deaths) >= DEATHS_ALLOWED or states[service.name].state == "FATAL":
                    code = Exit.WRONG_SETTING if hopeless else Exit.SERVICE
                    raise LabError(code, self._failure_report(service.name, deaths))
            doing = []
            for service in list(pending):
                ready, reply = probe(service)
                if ready and states[service.name].pid:
                    pending.remove(service)
                    progress.line(f"    {progress.seconds():4.0f} s  {service.name} is ready at {service.url}")
                else:
                    doing.append(f"{service.name} ({reply or 'starting'})")
            if not pending:
                self.was_ready = True
                return
            if progress.seconds() > timeout:
                last = pending[0].name
                raise LabError(Exit.SERVICE, f"not ready after {timeout:.0f} s: {', '.join(doing)}; the end of "
                              f"{self.logs / last}.log:\n{self.tail(last)}")  # fmt: skip
            progress.tick(f"waiting for {', '.join(doing)}")
            time.sleep(0.5)

    def deaths(self, name: str) -> list[str]:
        """Reason of each death of the service (`exit status 1; not expected`), since supervisord started or since
        start_again()."""
        log = self.tail("supervisord", 10_000)
        last_start = log.rfind("supervisord started with pid")
        return re.findall(rf"exited: {re.escape(name)} \((.*)\)$", log[max(last_start, 0) :], re.MULTILINE)

    # -- stopping

    def stop(self) -> int:
        """Stop all programs, each with its children, within their stop timeouts. Returns the number of processes that
        were ended."""
        ours = self._processes()
        supervisors = [process for process in ours if "supervisor.supervisord" in _command(process)]
        # Running answers get time to end; before all services are ready there are none.
        started = self.started()
        ready = bool(supervisors) and all(probe(service, 1)[0] for service in started)
        bound = 15 + sum(service.stop_seconds for service in started) if ready else 10
        for process in supervisors:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.terminate()  # supervisord stops its programs in order, also before its socket exists
        self._wait(supervisors, bound)
        return len({process.pid for process in ours} | set(self.sweep(ours)))

    def sweep(self, known: Sequence[psutil.Process] = ()) -> list[int]:
        """End the processes that outlived their supervisord: SIGTERM, after 5 s SIGKILL. Returns their ids."""
        left = list({process.pid: process for process in [*known, *self._processes()] if _alive(process)}.values())
        for process in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.terminate()
        stubborn = self._wait(left, 5)
        for process in stubborn:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self._wait(stubborn, 5)
        return [process.pid for process in left]

    def kill(self) -> None:
        """Kill all processes of the lab at once."""
        for process in self._processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()

    def _wait(self, processes: Sequence[psutil.Process], timeout: float) -> list[psutil.Process]:
        """Wait until all have ended. Returns those that still run after `timeout` seconds."""
        deadline = time.monotonic() + timeout
        left = list(processes)
        while left and time.monotonic() < deadline:
            if self._supervisord:
                self._supervisord.poll()  # a child of this process stays a zombie until it is polled
            left = [process for process in left if _alive(process)]
            time.sleep(0.05)
        return left

    def _processes(self) -> list[psutil.Process]:
        """All processes of this lab: those with the mark in their environment, and their descendants, because a
        process can overwrite its environment."""
        found: dict[int, psutil.Process] = {}
        for process in psutil.process_iter():
            try:
                if process.environ().get(MARK) == str(self.state):
                    found[process.pid] = process
                    found |= {child.pid: child for child in process.children(recursive=True)}
            except psutil.Error:
                continue
        for ancestor in [psutil.Process(), *psutil.Process().parents()]:
            found.pop(ancestor.pid, None)
        return list(found.values())

    # -- supervisord

    @property
    def socket(self) -> Path:
        """Path of supervisord's socket: in the state folder, or, if that path is too long for a socket, in a private
        folder below the temporary folder. Raises LabError."""
        path = self.state / "supervisord.sock"
        if len(os.fsencode(path)) <= SOCKET_PATH_LIMIT:
            return path
        key = hashlib.sha256(os.fsencode(self.state)).hexdigest()[:12]
        folder = Path(tempfile.gettempdir()) / f"llm-lab-{os.getuid()}-{key}"
        folder.mkdir(mode=0o700, exist_ok=True)
        if folder.is_symlink() or folder.stat().st_uid != os.getuid() or folder.stat().st_mode & 0o077:
            raise LabError(Exit.ENVIRONMENT, f"{folder} belongs to another user; set TMPDIR to a folder of your own")
        return folder / "supervisord.sock"

    def _config(self, services: Sequence[Service]) -> str:
        here = Path(__file__).parent
        program = (here / "program.conf").read_text()
        parts = [(here / "supervisord.conf").read_text().format(uid=os.getuid(), socket=_text(self.socket))]
        parts += [
            program.format(
                name=service.name,
                command=_text(shlex.join(service.argv)),
                priority=number,
                stop_seconds=service.stop_seconds,
            )
            for number, service in enumerate(services, 1)
        ]
        return "".join(parts)

    def _ask(self, method: str, *arguments: object) -> Any:
        """One XML-RPC call of supervisord. Raises NotRunningError."""
        transport = SupervisorTransport(serverurl=f"unix://{self.socket}")
        server = xmlrpc.client.ServerProxy("http://lab", transport=transport)
        before = socket.getdefaulttimeout()
        socket.setdefaulttimeout(ANSWER_SECONDS)  # the transport sets none
        try:
            return getattr(server.supervisor, method)(*arguments)
        except (OSError, http.client.HTTPException) as error:
            raise NotRunningError from error
        except xmlrpc.client.Fault as fault:
            if fault.faultString.startswith("SHUTDOWN_STATE"):
                raise NotRunningError from fault
            raise
        finally:
            socket.setdefaulttimeout(before)
            transport.close()

    def _failure_report(self, name: str, deaths: Sequence[str]) -> str:
        times = f"{len(deaths)} times, last by " if len(deaths) > 1 else "by "
        how = times + re.sub(r"; (not )?expected$", "", deaths[-1]) if deaths else "and does not start"
        return f"{name} died {how}; the end of {self.logs / name}.log:\n{self.tail(name)}"


def _text(value: object) -> str:
    return str(value).replace("%", "%%")  # supervisord expands %(name)s


def _alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _command(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def _size(file: Path) -> int:
    return file.stat().st_size if file.exists() else 0
