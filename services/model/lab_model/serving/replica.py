"""The Ray Serve application of one model: HTTP ingress and engine in one process, without a second hop.

`python -m lab_model` runs one for each catalogue entry. A Serve config file can name it as
`import_path: lab_model.serving.replica:build_app`. Knows Ray Serve. Knows nothing of how a model is loaded or answers.
"""

from __future__ import annotations

import tempfile
import uuid
from pathlib import Path
from typing import Any

import prometheus_client
from ray import serve
from starlette.types import ASGIApp, Receive, Scope, Send

from ..api.http import timing, usage
from ..api.http.usage import TokenUsage
from ..models.catalogue import AppArgs, Replicas
from ..models.kinds import KINDS
from .inspector import bind_inspector
from .ray_internals import AsgiDeployment, replica_environment


def build_app(args: AppArgs | dict[str, Any]) -> serve.Application:
    """The Serve application of one catalogue entry. args: AppArgs, or their fields from a Serve config file."""
    args = AppArgs.model_validate(args)
    replicas = args.entry.replicas
    count: dict[str, Any] = {"num_replicas": replicas}
    if isinstance(replicas, Replicas):
        bounds = {"min_replicas": replicas.min, "max_replicas": replicas.max}
        count = {"autoscaling_config": bounds | {"target_ongoing_requests": replicas.target}}
    app: serve.Application = ModelReplica.options(  # type: ignore[attr-defined]
        name=args.entry.id,
        **count,
        # Serve's own limit (5 by default, then a 503) is above the engine's, whose queue and 429 decide.
        max_ongoing_requests=2 * (args.max_running + args.max_queued) + 64,
        # Weights that cannot be loaded now cannot be loaded two seconds later either.
        max_constructor_retry_count=1,
        graceful_shutdown_wait_loop_s=0.2,
        graceful_shutdown_timeout_s=args.drain_timeout_seconds,
        # On one machine no CPUs are reserved, so that all actors fit on a laptop with one core.
        ray_actor_options={
            "num_cpus": args.cpus,
            "num_gpus": args.gpus,
            "runtime_env": replica_environment(args.metrics_dir),
        },
    ).bind(args, bind_inspector(args) if KINDS[args.entry.kind].loader == "causal" else None)
    return app


@serve.deployment
@serve.ingress()
class ModelReplica(AsgiDeployment):
    """One replica of one model."""

    def __init__(self, args: AppArgs, inspector: Any = None) -> None:
        """inspector: a handle to the model's second copy, see `inspector`."""
        # Serve pickles this class by value, with copies of the globals that it uses: rings and traces have to be
        # those of this process. And the processes that only route import this module and must not import torch.
        from ..api.http.record import TIMINGS, TRACES, USAGE  # noqa: PLC0415
        from ..models.loading import load  # noqa: PLC0415
        from .activity import ObservedApp  # noqa: PLC0415
        from .copies import check_room  # noqa: PLC0415

        self._id = uuid.uuid4().hex
        self._folder = args.metrics_dir or Path(tempfile.mkdtemp(prefix="lab-replica-"))
        USAGE.open(self._folder)
        TIMINGS.open(self._folder)
        TRACES.open(args.otlp_endpoint)
        app, self._info, self._is_alive = load(args)
        observed = ObservedApp(app, self._folder, args.entry.id)

        async def inside(method: str, **arguments: Any) -> Any:
            check_room(self._folder, args.entry.id, args.copy_bytes)
            return await inspector.call.remote(method, arguments)

        async def with_inspector(scope: Scope, receive: Receive, send: Send) -> None:
            await observed({**scope, "inside": inside} if inspector is not None else scope, receive, send)

        self._app = with_inspector

    def asgi_app(self) -> ASGIApp:
        return self._app

    def info(self) -> dict[str, Any]:
        """id, kind, revision, context, device and sizes of the loaded model."""
        return self._info

    def metrics(self) -> tuple[str, str]:
        """The replica's id, and its own metrics as Prometheus text: for `cluster_app`."""
        return self._id, prometheus_client.generate_latest().decode()

    def usage_of(self, ids: list[str]) -> dict[str, TokenUsage]:
        """Tokens used by those of `ids` that ended here within the last minutes."""
        return usage.find(self._folder, ids)

    def timing_of(self, id_: str) -> dict[str, Any] | None:
        """Phases of a request here, see `timing.find`."""
        return timing.find(self._folder, id_)

    def check_health(self) -> None:
        """Ray Serve replaces the replica when this raises."""
        if not self._is_alive():
            raise RuntimeError("the model no longer computes")
