"""Everything that depends on Ray's private interfaces and on variables that only its source documents.

Checked against Ray `CHECKED_RAY`; with another minor version tests/model/test_ray_internals.py fails and lists what to
check. Knows Ray. Knows nothing of models. Imports Ray inside functions, because Ray reads its variables at import.
"""

from __future__ import annotations

import logging
import os
import random
import secrets
import time
from pathlib import Path
from typing import Any, cast

from starlette.middleware import Middleware
from starlette.types import ASGIApp, Receive, Scope, Send

CHECKED_RAY = "2.60"
ABSENT = Path(__file__).parents[1] / "absent"  # stand-ins for packages that the service's processes must not import
OFFLINE = "LAB_HF_HUB_OFFLINE"  # value of HF_HUB_OFFLINE before `prepare_environment`
CONNECT_SECONDS = 120  # for Ray to start on this machine
CONTROLLER_SECONDS = 30  # timeout of an answer of Serve's controller, which may have to wait for a core


# Headers that Serve decodes as UTF-8; if they are not UTF-8, it answers a plain 500.
DECODED_HEADERS = {b"x-request-id", b"x-session-id", b"serve-multiplexed-model-id"}


class Utf8Headers:
    """ASGI middleware in front of Serve's own: drops those of DECODED_HEADERS that are not UTF-8."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "lifespan":
            headers = [(name, value) for name, value in scope["headers"] if _is_read(name, value)]
            scope = {**scope, "headers": headers}
        await self._app(scope, receive, send)


def _is_read(name: bytes, value: bytes) -> bool:
    if name.lower().replace(b"_", b"-") not in DECODED_HEADERS:
        return True
    try:
        value.decode()
    except UnicodeDecodeError:
        return False
    return True


def http_middlewares() -> list[Middleware]:
    """Serve calls this in each process that speaks HTTP; prepare_environment registers it."""
    return [Middleware(Utf8Headers)]


class AsgiDeployment:
    """Base of a deployment whose ASGI application is built in the replica's process.

    `@serve.ingress()` without an application calls `__serve_build_asgi_app__` once the constructor has returned.
    """

    def asgi_app(self) -> ASGIApp:
        raise NotImplementedError

    def __serve_build_asgi_app__(self) -> ASGIApp:
        return self.asgi_app()


def prepare_environment(*, direct: bool) -> None:
    """Set what Ray, transformers and the replicas read from the environment; the raylet's children inherit it.

    direct: replicas speak HTTP themselves, behind a `HaproxyFront`.
    """
    if direct:
        # A random range, so that the port of a dead replica does not belong to another service on this machine.
        lowest = random.randrange(20_000, 31_000, 50)  # noqa: S311
        os.environ |= {
            "RAY_SERVE_ENABLE_DIRECT_INGRESS": "1",
            "RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT": str(lowest),
            "RAY_SERVE_DIRECT_INGRESS_MAX_HTTP_PORT": str(lowest + 1000),
            # The front stops accepting requests before the replicas are told to end. Serve adds 5 s to this as the
            # least time for running answers, whatever MODEL_DRAIN_TIMEOUT_SECONDS is.
            "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "-5",
        }
    os.environ |= {
        "RAY_USAGE_STATS_ENABLED": "0",
        # Anyone who can reach Ray's ports could run code in it (CVE-2023-48022): a token that only this service's
        # processes have. The ports listen on loopback only: the switch is named after the systems where that is the
        # default.
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ABSENT), os.environ.get("PYTHONPATH")])),
        # An idle Ray took a tenth of a core: it polls for changes ten times a second and collects metrics that are not
        # read here.
        "RAY_SERVE_CONTROL_LOOP_INTERVAL_S": "0.5",
        "RAY_SERVE_METRICS_EXPORT_INTERVAL_MS": "10000",
        "RAY_raylet_report_resources_period_milliseconds": "1000",
        "RAY_enable_metrics_collection": "false",
        "RAY_task_events_report_interval_ms": "0",
        # Ray's workers run at nice 15 by default, so any other process took the model's cores.
        "RAY_worker_niceness": "0",
        # By default an answer's parts move between threads, for user code that blocks the event loop. This code does
        # not block it.
        "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
        "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": f"{__name__}:http_middlewares",
        # Ray's own logs stay in its folder, and small.
        "RAY_ROTATION_MAX_BYTES": "2000000",
        "RAY_ROTATION_BACKUP_COUNT": "1",
        "TOKENIZERS_PARALLELISM": "false",
        # torch's threads wait for each other by spinning, by default 300,000 turns: milliseconds in which the thread
        # that they wait for may not get a core. On two cores with busy neighbours a token took 100 to 1,400 ms, with
        # fewer turns 50 to 150 ms, and on an idle machine as long as before; without any turns it took twice as long
        # there. ACTIVE lets them spin even when a process has more of them than cores, as with the threads of two
        # models; otherwise a token takes twice as long.
        "GOMP_SPINCOUNT": os.environ.get("GOMP_SPINCOUNT", "10000"),
        "OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", "ACTIVE"),
        # A replica downloads nothing; `lifecycle` does that in a separate process.
        "HF_HUB_OFFLINE": "1",
        OFFLINE: os.environ.get("HF_HUB_OFFLINE", ""),
    }


def downloads_forbidden() -> bool:
    """Whether the environment forbade downloads from a hub, before `prepare_environment`."""
    return os.environ.get(OFFLINE, "").upper() in {"1", "ON", "YES", "TRUE"}


def start_ray(folder: Path) -> None:
    """Start a local Ray with its session in `folder`."""
    import ray  # noqa: PLC0415

    ray.init(
        address="local",
        namespace="lab",
        include_dashboard=False,
        _temp_dir=str(folder),
        # Answers go through HTTP, not through the object store, so its minimum is enough.
        object_store_memory=80 * 1024 * 1024,
        logging_level=logging.ERROR,
        log_to_driver=False,
    )


def stop_monitors() -> None:
    """End two of Ray's processes: one copies the workers' output to the driver, the other requests more machines. The
    service uses neither, and they took an eighth of the CPU time of an idle Ray."""
    import ray  # noqa: PLC0415

    node: Any = ray._private.worker._global_node
    node.kill_log_monitor(check_alive=False)
    node.kill_monitor(check_alive=False)


def replica_ports() -> dict[str, list[int]]:
    """Ports on which Serve's replicas speak HTTP, by application; without replicas the port of Serve's HTTP process.

    Serve gives the same to its own HAProxy. Ray's dashboard has it over HTTP, but does not run here.
    """
    import ray  # noqa: PLC0415
    from ray.serve.context import _get_global_client  # noqa: PLC0415

    client: Any = _get_global_client()
    groups = ray.get(client._controller.get_target_groups.remote(), timeout=CONTROLLER_SECONDS)
    return {group.app_name: [target.port for target in group.targets] for group in groups}


def begin_delete(application: str) -> None:
    """Tell Serve to end an application; do not wait for its end."""
    from ray import serve  # noqa: PLC0415

    serve.delete(application, _blocking=False)


def connect() -> None:
    """Make this process a driver of the cluster whose node this machine is; wait for Ray to start. Raises
    ConnectionError after CONNECT_SECONDS."""
    import ray  # noqa: PLC0415

    until = time.monotonic() + CONNECT_SECONDS
    while True:
        try:
            ray.init(address="auto", namespace="serve", logging_level=logging.ERROR, log_to_driver=False)
        except ConnectionError:
            if time.monotonic() > until:
                raise
            time.sleep(0.5)
        else:
            return


def deploy(config: dict[str, Any]) -> None:
    """Give Serve a config (ServeDeploySchema), as `serve deploy` does by way of Ray's dashboard, which need not run.
    Applications that it does not name are deleted, those that it does not change go on."""
    from ray import serve  # noqa: PLC0415
    from ray.serve.config import HTTPOptions  # noqa: PLC0415
    from ray.serve.context import _get_global_client  # noqa: PLC0415
    from ray.serve.schema import ServeDeploySchema  # noqa: PLC0415

    schema = ServeDeploySchema.model_validate(config)
    serve.start(proxy_location=config["proxy_location"], http_options=HTTPOptions(**config["http_options"]))
    client: Any = _get_global_client()
    client.deploy_apps(schema)


def replica_environment(metrics_dir: Path | None) -> dict[str, dict[str, str]]:
    """Ray's runtime environment of replicas: prometheus_client shares values between processes through a folder."""
    return {"env_vars": {"PROMETHEUS_MULTIPROC_DIR": str(metrics_dir)}} if metrics_dir else {}


def living_nodes() -> dict[str, str]:
    """Id -> IP address of each living node of the cluster at RAY_ADDRESS. Raises an exception of Ray's."""
    nodes = _gcs().get_all_node_info(timeout=CONTROLLER_SECONDS)
    return {id_.hex(): node.node_manager_address for id_, node in nodes.items() if node.state == 0}


def drain_node(node: str, seconds: float) -> None:
    """Drain the node with this id within `seconds`, as `ray drain-node` does: Ray places no more work on it, and Serve
    moves its replicas to other nodes. The node ends when it is empty. Raises RuntimeError if Ray refuses."""
    from ray.core.generated import autoscaler_pb2  # noqa: PLC0415

    reason = cast("Any", autoscaler_pb2).DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
    until = int((time.time() + seconds) * 1000)
    accepted, why = _gcs().drain_node(node, reason, "the pod is being ended", until)
    if not accepted:
        raise RuntimeError(f"Ray refuses to drain {node}: {why}")


def _gcs() -> Any:
    import ray._raylet  # noqa: PLC0415

    return cast("Any", ray._raylet).GcsClient(address=os.environ.get("RAY_ADDRESS", ""))
