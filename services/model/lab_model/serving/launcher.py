"""The main process of the service: starts Ray, the front and the applications, watches them, and ends them.

Knows processes, ports and signals. Does not load models. Imports Ray inside functions, because Ray's environment must
be prepared first.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import select
import shutil
import signal
import socket
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import CatalogueError
from ..models.catalogue import AppArgs, load_catalogue
from ..models.kinds import KINDS
from ..settings import Settings
from .front import FrontError, HaproxyFront, Route
from .ray_internals import downloads_forbidden, replica_ports, start_ray, stop_monitors

CATALOGUE = "catalogue"  # the application at /
LOOK_SECONDS, IDLE_SECONDS = 0.5, 5.0  # between checks of the models: while one loads, and otherwise
PROGRESS_SECONDS = 5.0  # between two log lines about one load
CATALOGUE_SECONDS = 10.0  # timeout of an answer of the catalogue's application
WRONG_SETTING = 2
FAILED = 1


def run(settings: Settings, folder: Path, ended: threading.Event, haproxy: str | None = None) -> int:
    """Serve the catalogue until `ended` is set. Returns the exit code. folder: for the files of Ray's session and of
    the front."""
    import ray  # noqa: PLC0415
    from ray import serve  # noqa: PLC0415
    from ray.serve.config import HTTPOptions  # noqa: PLC0415

    from .applications import QUIET  # noqa: PLC0415
    from .catalogue_app import CatalogueArgs, build_catalogue  # noqa: PLC0415
    from .lifecycle import LifecycleArgs  # noqa: PLC0415

    # 1. Ray.
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    say("starting Ray")
    start_ray(folder)
    stop_on_signals(ended)  # again: Ray has installed handlers of its own
    front = None
    try:
        stop_monitors()
        gpus = ray.cluster_resources().get("GPU", 0)  # type: ignore[no-untyped-call]
        if settings.device == "cuda" and not gpus:
            say("MODEL_DEVICE is cuda, but no CUDA device was found; fix the driver or set MODEL_DEVICE=cpu")
            return WRONG_SETTING
        # 2. HTTP: the front, or else Serve's own HTTP process.
        host, port = settings.host, settings.port
        if haproxy:
            host, port = "127.0.0.1", free_port()
            front = HaproxyFront(haproxy, folder, host=settings.host, port=settings.port, serve_port=port)
            front.set_routes(routes(settings))
        serve.start(
            proxy_location="HeadOnly",
            http_options=HTTPOptions(host=host, port=port, keep_alive_timeout_s=75),
            logging_config=QUIET,
        )
        # 3. The catalogue's application, which loads the models.
        own = "127.0.0.1" if settings.host in ("0.0.0.0", "::") else settings.host  # noqa: S104
        metrics = folder / "metrics"
        shutil.rmtree(metrics, ignore_errors=True)  # counters of an earlier start
        metrics.mkdir()
        changes = Wakeups(folder / "wake")
        form = settings.log_format if settings.log_format != "auto" else "text" if sys.stderr.isatty() else "json"
        shared = settings.model_dump(include=AppArgs.model_fields.keys() | CatalogueArgs.model_fields.keys())
        shared |= {"log_format": form, "log_pipe": relay_log(folder / "log"), "metrics_dir": metrics}
        lifecycle = LifecycleArgs(
            catalogue_file=settings.catalogue_file,
            folder=settings.folder,
            shared={name: value for name, value in shared.items() if name in AppArgs.model_fields and name != "folder"},
            gpus=gpus,
            memory_bytes=settings.memory_bytes,
            start_timeout_seconds=settings.start_timeout_seconds,
            service=os.getpid(),
            wake=changes.pipe,
            offline=downloads_forbidden(),
        )
        catalogue = build_catalogue(
            CatalogueArgs(lifecycle=lifecycle, address=f"http://{own}:{settings.port}", **shared)
        )
        serve.run_many([serve.RunTarget(catalogue, CATALOGUE, "/", QUIET)])
        return watch(settings, ended, front, changes)
    except FrontError as error:
        say(str(error))
        return FAILED
    finally:
        stop(front)


def routes(settings: Settings) -> dict[str, Route]:
    """The route of each application. Raises CatalogueError."""
    entries = load_catalogue(settings.catalogue_file, settings.folder)
    return {CATALOGUE: Route("/")} | {
        entry.id: Route(f"/m/{entry.id}", entry.most_replicas, KINDS[entry.kind].paths) for entry in entries
    }


def watch(settings: Settings, ended: threading.Event, front: HaproxyFront | None, changes: Wakeups) -> int:
    """Log changes of each model's state, and give the front its replicas, until `ended` is set. A dead Ray, a dead
    front, or a start in which no model can be loaded ends the service. Returns the exit code."""
    from ray import serve  # noqa: PLC0415

    states = StateLines(settings)
    busy = True
    while not ended.is_set():
        try:
            handle = serve.get_app_handle(CATALOGUE)
            report = handle.report.remote().result(timeout_s=CATALOGUE_SECONDS)
            ports = replica_ports() if front else {}
        except TimeoutError:
            continue  # the application restarts, or waits for a core
        except Exception as error:
            try:
                serve.status()
            except Exception:
                say(f"Ray does not answer any more: {error}")
                return FAILED
            ended.wait(LOOK_SECONDS)
            continue
        if front:
            try:
                with contextlib.suppress(CatalogueError):  # the list of added models is damaged: keep the old one
                    front.set_routes(routes(settings))
                front.set_replicas(ports)
            except FrontError as error:
                say(str(error))
                return FAILED
        models = report["models"]
        states.print(models)
        busy = report["starting"] or any(model["state"] == "loading" for model in models.values())
        if not busy and not any(model["state"] in ("ready", "unloaded") for model in models.values()):
            say("no model can be served")
            return FAILED
        changes.wait(LOOK_SECONDS if busy else IDLE_SECONDS, ended)
    return 0


class StateLines:
    """Prints lines about models: progress while one loads, and each change of state."""

    def __init__(self, settings: Settings) -> None:
        self._address = f"http://{settings.host}:{settings.port}"
        self._states: dict[str, str] = {}
        self._printed: dict[str, float] = {}  # when a line of progress was last printed

    def print(self, models: Mapping[str, Mapping[str, Any]]) -> None:
        """models: as Lifecycle.report gives them."""
        for name, model in models.items():
            state, now = model["state"], time.monotonic()
            changed = self._states.get(name, "unloaded") != state
            self._states[name] = state
            detail = f": {model['detail']}" if "detail" in model else ""
            if state == "loading":
                if changed or now - self._printed.get(name, 0.0) >= PROGRESS_SECONDS:
                    step = model["progress"]
                    percent = "" if step["percent"] is None else f" {step['percent']} %"
                    say(f"{name} is loading: {step['what']}{percent}, {step['seconds']:.0f} s")
                    self._printed[name] = now
            elif changed and state == "ready":
                loading = any(each["state"] == "loading" for each in models.values())
                say(f"{name} ready after {model['seconds']:.0f} s{'' if loading else f', at {self._address}'}")
            elif changed and state == "failed":
                say(f"{name} cannot be loaded{detail}")
            elif changed:
                say(f"{name} is {state}{detail}")


class Wakeups:
    """A named pipe by which another process can end a wait."""

    def __init__(self, pipe: Path) -> None:
        pipe.unlink(missing_ok=True)
        os.mkfifo(pipe, 0o600)
        self.pipe = pipe
        # Open for writing too, so that reading does not fail while no other process has it open.
        self._file = os.open(pipe, os.O_RDWR | os.O_NONBLOCK)

    def wait(self, seconds: float, ended: threading.Event) -> None:
        """Return when something was written, after `seconds`, or soon after `ended` is set."""
        until = time.monotonic() + seconds
        while not ended.is_set() and (left := until - time.monotonic()) > 0:
            if select.select([self._file], [], [], min(left, 0.5))[0]:
                with contextlib.suppress(BlockingIOError):
                    os.read(self._file, 4096)
                return


def stop(front: HaproxyFront | None) -> None:
    """Let running answers finish, then end Ray. While a model is still loading there are none, so Ray ends at once."""
    import ray  # noqa: PLC0415
    from ray import serve  # noqa: PLC0415

    if front:
        front.drain()
    # Ray would report the intended end of the controller as a failed task.
    silence = io.StringIO()
    out = sys.stderr
    with contextlib.redirect_stderr(silence), contextlib.redirect_stdout(silence), contextlib.suppress(Exception):
        applications = serve.status().applications
        loading = not any(status.status == "RUNNING" for name, status in applications.items() if name != CATALOGUE)
        print(f"model: stopping{'' if loading else ' after running answers'}", file=out, flush=True)
        if not loading:
            serve.shutdown()  # type: ignore[no-untyped-call]
        ray.shutdown()
    if front:
        front.stop()
    say("stopped")


def stop_on_signals(ended: threading.Event) -> None:
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: ended.set())


def relay_log(pipe: Path) -> Path:
    """Create this named pipe, and copy the lines that replicas write to it to stderr until the process ends."""
    pipe.unlink(missing_ok=True)  # from an earlier start in the same folder
    os.mkfifo(pipe, 0o600)
    # Open for writing too: the pipe does not end when the last replica closes it.
    lines = os.fdopen(os.open(pipe, os.O_RDWR), "rb")
    output = sys.stderr

    def copy() -> None:
        for line in lines:
            output.write(line.decode(errors="replace"))
            output.flush()

    threading.Thread(target=copy, name="log", daemon=True).start()
    return pipe


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def say(line: str) -> None:
    print(f"model: {line}", file=sys.stderr, flush=True)  # noqa: T201
