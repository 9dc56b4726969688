"""The main process of the service: starts Ray, the front and the applications, watches them, and ends them.

Knows processes, ports and signals. Knows nothing of how a model is loaded. Imports Ray inside functions: its
environment has to be prepared first.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import shutil
import signal
import socket
import sys
import threading
import time
from pathlib import Path

from ..models.catalogue import AppArgs, Entry
from ..models.kinds import KINDS
from ..settings import Settings
from .front import FrontError, HaproxyFront, Route
from .ray_internals import replica_ports, start_ray, stop_monitors

CATALOGUE = "catalogue"  # the application at /
WRONG_SETTING = 2
FAILED = 1


def run(
    settings: Settings, entries: list[Entry], folder: Path, ended: threading.Event, haproxy: str | None = None
) -> int:
    """Serve `entries` until `ended` is set; the process's exit code. folder: for Ray's session and the front's
    files."""
    import ray  # noqa: PLC0415
    from ray import serve  # noqa: PLC0415
    from ray.serve.config import HTTPOptions  # noqa: PLC0415
    from ray.serve.schema import LoggingConfig  # noqa: PLC0415

    from .catalogue_app import CatalogueArgs, build_catalogue  # noqa: PLC0415
    from .replica import build_app  # noqa: PLC0415

    # 1. Ray.
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    started = time.monotonic()
    say(f"starting Ray for {', '.join(entry.id for entry in entries)}")
    start_ray(folder)
    stop_on_signals(ended)  # again: Ray has installed handlers of its own
    front = None
    try:
        stop_monitors()
        gpus = ray.cluster_resources().get("GPU", 0)  # type: ignore[no-untyped-call]
        if settings.device == "cuda" and not gpus:
            say("MODEL_DEVICE is cuda, but no CUDA device is visible here; fix the driver or set MODEL_DEVICE=cpu")
            return WRONG_SETTING
        # 2. HTTP: the front, or Serve's own HTTP process in its place.
        host, port = settings.host, settings.port
        if haproxy:
            host, port = "127.0.0.1", free_port()
            routes = {entry.id: Route(f"/m/{entry.id}", entry.replicas, KINDS[entry.kind].paths) for entry in entries}
            front = HaproxyFront(
                haproxy,
                folder,
                host=settings.host,
                port=settings.port,
                serve_port=port,
                routes={CATALOGUE: Route("/")} | routes,
            )
            front.start()
        quiet = LoggingConfig(log_level="WARNING", enable_access_log=False)
        serve.start(
            proxy_location="HeadOnly",
            http_options=HTTPOptions(host=host, port=port, keep_alive_timeout_s=75),
            logging_config=quiet,
        )
        # 3. The applications. The catalogue first: it answers that the models are still loading.
        own = "127.0.0.1" if settings.host in ("0.0.0.0", "::") else settings.host  # noqa: S104
        metrics = folder / "metrics"
        shutil.rmtree(metrics, ignore_errors=True)  # counters of an earlier start
        metrics.mkdir()
        form = settings.log_format if settings.log_format != "auto" else "text" if sys.stderr.isatty() else "json"
        shared = settings.model_dump(include=AppArgs.model_fields.keys() | CatalogueArgs.model_fields.keys())
        shared |= {"log_format": form, "log_pipe": relay_log(folder / "log"), "metrics_dir": metrics}
        catalogue = build_catalogue(CatalogueArgs(entries=entries, address=f"http://{own}:{settings.port}", **shared))
        serve.run_many([serve.RunTarget(catalogue, CATALOGUE, "/", quiet)])
        on_gpu = {entry.id for entry in entries if gpus and (entry.device or settings.device) != "cpu"}
        replicas = sum(entry.replicas for entry in entries if entry.id in on_gpu)
        serve.run_many(
            [
                serve.RunTarget(
                    build_app(
                        AppArgs(entry=entry, gpus=min(1, gpus / replicas) if entry.id in on_gpu else 0, **shared)
                    ),
                    entry.id,
                    f"/m/{entry.id}",
                    quiet,
                )
                for entry in entries
            ],
            wait_for_ingress_deployment_creation=False,
            wait_for_applications_running=False,
        )
        return watch(settings, entries, started, ended, front)
    except FrontError as error:
        say(str(error))
        return FAILED
    finally:
        stop(front)


def watch(
    settings: Settings, entries: list[Entry], started: float, ended: threading.Event, front: HaproxyFront | None
) -> int:
    """Report each model that becomes ready, then wait for `ended`. A model that cannot be loaded, or a dead Ray, ends
    the service. started: as `time.monotonic()`. The exit code."""
    from ray import serve  # noqa: PLC0415

    from .catalogue_app import reason  # noqa: PLC0415

    loading = {entry.id for entry in entries}
    while not ended.wait(0.5 if loading else 5):
        try:
            applications = serve.status().applications
            ports = replica_ports() if front else {}
        except Exception as error:
            say(f"Ray does not answer any more: {error}")
            return FAILED
        if front:
            try:
                front.set_replicas(ports)
            except FrontError as error:
                say(str(error))
                return FAILED
        for name in sorted(loading):
            seconds = time.monotonic() - started
            status = applications[name]
            if status.status == "RUNNING":
                loading.discard(name)
                address = "" if loading else f", at http://{settings.host}:{settings.port}"
                say(f"{name} ready after {seconds:.0f} s{address}")
            elif status.status == "DEPLOY_FAILED":
                say(f"{name} cannot be loaded: {reason(status)}")
                return FAILED
            elif seconds > settings.start_timeout_seconds:
                say(
                    f"{name} was not loaded within {settings.start_timeout_seconds:.0f} s (MODEL_START_TIMEOUT_SECONDS)"
                )
                return FAILED
    return 0


def stop(front: HaproxyFront | None) -> None:
    """Let running answers end, then end Ray. While a model is still loading there are none: Ray ends at once."""
    import ray  # noqa: PLC0415
    from ray import serve  # noqa: PLC0415

    if front:
        front.drain()
    # Ray reports the intended end of the controller as a failed task, in red.
    silence = io.StringIO()
    out = sys.stderr
    with contextlib.redirect_stderr(silence), contextlib.redirect_stdout(silence), contextlib.suppress(Exception):
        loading = any(status.status == "DEPLOYING" for status in serve.status().applications.values())
        print(f"model: stopping{'' if loading else ', running answers may end'}", file=out, flush=True)
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
    """Make this named pipe, and copy the lines that replicas write to it to stderr until the process ends."""
    pipe.unlink(missing_ok=True)  # of an earlier start in a folder that is kept
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
