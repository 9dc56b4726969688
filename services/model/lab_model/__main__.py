"""Run the model service on this machine: `python -m lab_model`."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import random
import secrets
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from .errors import CatalogueError
from .models.catalogue import Entry, load_catalogue, locate
from .serving.front import Front, FrontError, Route, binary
from .settings import AppArgs, CatalogueArgs, Settings

ABSENT = Path(__file__).with_name("absent")  # packages that our processes shall not find
CATALOGUE = "catalogue"  # the application at /
LOOK_SECONDS = 30  # for Serve's controller, which a full machine may keep from its core for a while
WRONG_SETTING = 2
FAILED = 1


def main() -> int:
    try:
        settings = Settings()
        entries = load_catalogue(settings.catalogue_file)
        for entry in entries:
            locate(entry, fetch=True)
        with contextlib.closing(socket.socket()) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((settings.host, settings.port))
    except ValidationError as error:
        for fault in error.errors():
            say(f"MODEL_{'_'.join(str(part) for part in fault['loc']).upper()}: {fault['msg']}")
        return WRONG_SETTING
    except CatalogueError as error:
        say(str(error))
        return WRONG_SETTING
    except OSError as error:
        say(f"cannot listen on {settings.host}:{settings.port} (MODEL_HOST, MODEL_PORT): {error.strerror}")
        return FAILED
    ended = threading.Event()
    stop_on_signals(ended)
    # Sockets lie in Ray's folder and their paths may not exceed 107 bytes: never deep inside a repository.
    folder = settings.ray_dir or Path(tempfile.mkdtemp(prefix="lab-ray-"))
    haproxy = binary()
    if haproxy is None:
        say("no HAProxy here, ray[serve] brings it on Linux: Serve's own HTTP process answers, less fast")
    prepare_environment(direct=haproxy is not None)
    try:
        return run(settings, entries, folder, ended, haproxy)
    finally:
        for _ in range(20 if settings.ray_dir is None else 0):  # Ray's last processes may still write for a moment
            shutil.rmtree(folder, ignore_errors=True)
            if not folder.exists():
                break
            time.sleep(0.1)


def prepare_environment(*, direct: bool) -> None:
    """What Ray, transformers and the replicas read from the environment; the raylet's children inherit it.

    direct: replicas speak HTTP themselves, behind a `Front`.
    """
    if direct:
        # A range of its own: where a replica has died, none of another service on this machine shall appear.
        lowest = random.randrange(20_000, 31_000, 50)  # noqa: S311
        os.environ |= {
            "RAY_SERVE_ENABLE_DIRECT_INGRESS": "1",
            "RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT": str(lowest),
            "RAY_SERVE_DIRECT_INGRESS_MAX_HTTP_PORT": str(lowest + 1000),
            # The front takes no new request before the replicas are told to end. And to this Serve adds 5 s for the
            # least that running answers get, whatever MODEL_DRAIN_TIMEOUT_SECONDS says.
            "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "-5",
        }
    os.environ |= {
        "RAY_USAGE_STATS_ENABLED": "0",
        # Whoever can reach Ray's ports could run code in it (CVE-2023-48022): a token that only our processes have.
        # Its ports listen on loopback only: the switch has its name from the systems where that is the default.
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ABSENT), os.environ.get("PYTHONPATH")])),
        # With nothing to do Ray took a tenth of a core: to look ten times a second for what has changed, and to count
        # what nobody reads.
        "RAY_SERVE_CONTROL_LOOP_INTERVAL_S": "0.5",
        "RAY_SERVE_METRICS_EXPORT_INTERVAL_MS": "10000",
        "RAY_raylet_report_resources_period_milliseconds": "1000",
        "RAY_enable_metrics_collection": "false",
        "RAY_task_events_report_interval_ms": "0",
        # Ray makes its workers nice (15): every other process took the cores from the model as often as it woke.
        "RAY_worker_niceness": "0",
        # An answer's parts changed threads on their way out, for code that blocks its event loop. Ours does not.
        "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
        # Ray's own logs stay in its folder, and small.
        "RAY_ROTATION_MAX_BYTES": "2000000",
        "RAY_ROTATION_BACKUP_COUNT": "1",
        "TOKENIZERS_PARALLELISM": "false",
        # torch's threads wait for each other by spinning, 300,000 turns unless told: for milliseconds, in which whoever
        # they wait for may not get a core. On two cores with busy neighbours a token took 100 to 1,400 ms, with fewer
        # turns 50 to 150 ms, and on an idle machine as long as before. No turns at all doubled it there. `ACTIVE` lets
        # them spin at all when a process has more of them than cores, as with two models' threads: otherwise a token
        # takes twice as long.
        "GOMP_SPINCOUNT": os.environ.get("GOMP_SPINCOUNT", "10000"),
        "OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", "ACTIVE"),
        # What had to be fetched has been.
        "HF_HUB_OFFLINE": "1",
    }


def run(
    settings: Settings, entries: list[Entry], folder: Path, ended: threading.Event, haproxy: str | None = None
) -> int:
    # Only now, with the environment prepared.
    import ray  # noqa: PLC0415
    from ray import serve  # noqa: PLC0415
    from ray.serve.config import HTTPOptions  # noqa: PLC0415
    from ray.serve.schema import LoggingConfig  # noqa: PLC0415

    from .serving.catalogue_app import build_app, build_catalogue, endpoints  # noqa: PLC0415

    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    started = time.monotonic()
    say(f"starting Ray for {', '.join(entry.id for entry in entries)}")
    ray.init(
        address="local",
        namespace="lab",
        include_dashboard=False,
        _temp_dir=str(folder),
        # Answers go through HTTP, not through the object store: its minimum is enough.
        object_store_memory=80 * 1024 * 1024,
        logging_level=logging.ERROR,
        log_to_driver=False,
    )
    stop_on_signals(ended)  # again: ray.init puts a handler of its own in their place
    front = None
    try:
        # One copies the workers' output to us, the other asks for more machines: nobody here wants either, and idle
        # they took an eighth of what Ray takes.
        node: Any = ray._private.worker._global_node
        node.kill_log_monitor(check_alive=False)
        node.kill_monitor(check_alive=False)
        gpus = ray.cluster_resources().get("GPU", 0)  # type: ignore[no-untyped-call]
        if settings.device == "cuda" and not gpus:
            say("MODEL_DEVICE is cuda, but no CUDA device is visible here; fix the driver or set MODEL_DEVICE=cpu")
            return WRONG_SETTING
        copies = sum(entry.replicas for entry in entries if (entry.device or settings.device) != "cpu")
        quiet = LoggingConfig(log_level="WARNING", enable_access_log=False)
        # Where there is no front, Serve's own HTTP process has its place.
        host, port = settings.host, settings.port
        if haproxy:
            host, port = "127.0.0.1", free_port()
            front = Front(
                haproxy,
                folder,
                host=settings.host,
                port=settings.port,
                serve_port=port,
                routes={CATALOGUE: Route("/")}
                | {entry.id: Route(f"/m/{entry.id}", entry.replicas, endpoints(entry.kind)) for entry in entries},
            )
            front.start()
        serve.start(
            proxy_location="HeadOnly",
            http_options=HTTPOptions(host=host, port=port, keep_alive_timeout_s=75),
            logging_config=quiet,
        )
        own = "127.0.0.1" if settings.host in ("0.0.0.0", "::") else settings.host  # noqa: S104
        metrics = folder / "metrics"
        shutil.rmtree(metrics, ignore_errors=True)  # counters of an earlier start
        metrics.mkdir()
        form = settings.log_format if settings.log_format != "auto" else "text" if sys.stderr.isatty() else "json"
        shared = settings.model_dump(include=AppArgs.model_fields.keys() | CatalogueArgs.model_fields.keys())
        shared |= {"log_format": form, "log_pipe": relay_log(folder / "log"), "metrics_dir": metrics}
        catalogue = build_catalogue(CatalogueArgs(entries=entries, address=f"http://{own}:{settings.port}", **shared))
        # The catalogue first: it tells who asks that the models are still loading.
        serve.run_many([serve.RunTarget(catalogue, CATALOGUE, "/", quiet)])
        serve.run_many(
            [
                serve.RunTarget(
                    build_app(
                        AppArgs(
                            entry=entry,
                            **shared,
                            gpus=min(1, gpus / copies) if gpus and (entry.device or settings.device) != "cpu" else 0,
                        )
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


def stop(front: Front | None) -> None:
    """Let running answers end, then end Ray. A model that is still loading has none, and would not hear of it."""
    import ray  # noqa: PLC0415
    from ray import serve  # noqa: PLC0415

    if front:
        front.drain()
    # Ray reports the controller's intended end as a failed task, in red.
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
    """Copy the lines that replicas write into this named pipe to stderr, as long as the process lives."""
    pipe.unlink(missing_ok=True)  # of an earlier start in a folder that is kept
    os.mkfifo(pipe, 0o600)
    # Open for writing too: the pipe does not end when the last replica leaves.
    lines = os.fdopen(os.open(pipe, os.O_RDWR), "rb")

    output = sys.stderr

    def copy() -> None:
        for line in lines:
            output.write(line.decode(errors="replace"))
            output.flush()

    threading.Thread(target=copy, name="log", daemon=True).start()
    return pipe


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port


def replica_ports() -> dict[str, list[int]]:
    """Where Serve's replicas speak HTTP, by application; of one without replicas the port of Serve's HTTP process.

    What Serve tells its own HAProxy. Its dashboard has the same as HTTP, and does not run here.
    """
    import ray  # noqa: PLC0415
    from ray.serve.context import _get_global_client  # noqa: PLC0415

    client: Any = _get_global_client()
    groups = ray.get(client._controller.get_target_groups.remote(), timeout=LOOK_SECONDS)
    return {group.app_name: [target.port for target in group.targets] for group in groups}


def watch(settings: Settings, entries: list[Entry], started: float, ended: threading.Event, front: Front | None) -> int:
    """Say what loads, then stay until a signal. A model that cannot load, or a dead Ray, ends the service."""
    from ray import serve  # noqa: PLC0415

    from .serving.catalogue_app import reason  # noqa: PLC0415

    waiting = {entry.id for entry in entries}
    while not ended.wait(0.5 if waiting else 5):
        try:
            applications = serve.status().applications
            ports = replica_ports() if front else {}
        except Exception as error:
            say(f"Ray does not answer any more: {error}")
            return FAILED
        if front:
            try:
                front.aim(ports)
            except FrontError as error:
                say(str(error))
                return FAILED
        for name in sorted(waiting):
            seconds = time.monotonic() - started
            status = applications[name]
            if status.status == "RUNNING":
                waiting.discard(name)
                say(
                    f"{name} ready after {seconds:.0f} s"
                    + ("" if waiting else f", at http://{settings.host}:{settings.port}")
                )
            elif status.status == "DEPLOY_FAILED":
                say(f"{name} cannot be loaded: {reason(status)}")
                return FAILED
            elif seconds > settings.start_timeout_seconds:
                say(
                    f"{name} was not loaded within {settings.start_timeout_seconds:.0f} s (MODEL_START_TIMEOUT_SECONDS)"
                )
                return FAILED
    return 0


def say(line: str) -> None:
    print(f"model: {line}", file=sys.stderr, flush=True)  # noqa: T201


if __name__ == "__main__":
    sys.exit(main())
