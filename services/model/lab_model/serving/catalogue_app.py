"""Ray Serve: one application per model under /m/<id>, and the catalogue at /.

`build_app` makes the application of one catalogue entry; `python -m lab_model` runs all of them on this machine, and a
Serve config file can name it as `import_path: lab_model.serve:build_app`.
"""

from __future__ import annotations

import asyncio
import logging
import math
import platform
import re
import time
from collections.abc import AsyncGenerator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import aiohttp
import orjson
import prometheus_client
from prometheus_client import CollectorRegistry, multiprocess
from ray import serve
from ray.serve.schema import ApplicationStatusOverview
from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.types import ASGIApp

from .. import __version__, errors
from ..api.http import usage
from ..models.catalogue import Kind
from ..settings import AppArgs, CatalogueArgs

log = logging.getLogger(__name__)

# So long a model may be too busy to tell of itself before it counts as gone.
SILENT_SECONDS = 10.0
# A request that waits behind a full queue of long answers takes minutes; nothing may wait for ever.
FORWARD_TIMEOUT = aiohttp.ClientTimeout(total=None, sock_connect=5, sock_read=900)
MOST_IDS = 256  # of one question for what requests used
# Headers of a model's answer that the catalogue hands on; the request id is its own already.
HANDED_ON = ("content-type", "retry-after", "x-model-revision", "cache-control", "x-accel-buffering")


def reason(status: ApplicationStatusOverview) -> str:
    """Why an application does not run, in one line: its deployment's exception without the trace."""
    lines = [line for deployment in status.deployments.values() for line in deployment.message.splitlines()]
    errors = [line.strip() for line in lines if re.match(r"\s*[\w.]*(Error|Exception)\b.*: ", line)]
    return (errors or [status.message.strip()])[-1].rpartition("CatalogueError: ")[2][:500]


def endpoints(kind: Kind) -> tuple[str, ...]:
    """Where a request's `model` may name one of this kind."""
    return ("/v1/embeddings",) if kind == "embedding" else ("/v1/chat/completions", "/v1/completions")


def environment(metrics_dir: Path) -> dict[str, dict[str, str]]:
    """Ray's runtime environment of our replicas: prometheus_client shares values between processes through a folder."""
    return {"env_vars": {"PROMETHEUS_MULTIPROC_DIR": str(metrics_dir)}}


def build_app(args: AppArgs) -> serve.Application:
    """The Serve application of one catalogue entry: ingress and engine in one process, no second hop."""
    app: serve.Application = Model.options(  # type: ignore[attr-defined]
        name=args.entry.id,
        num_replicas=args.entry.replicas,
        # Serve's own limit (5 by default, then a 503) lies above the engine's, whose queue and 429 are the truth.
        max_ongoing_requests=2 * (args.max_running + args.max_queued) + 64,
        # Weights that cannot be loaded now cannot be loaded in two seconds either.
        max_constructor_retry_count=1,
        graceful_shutdown_wait_loop_s=0.2,
        graceful_shutdown_timeout_s=args.drain_timeout_seconds,
        # No CPUs reserved: a laptop with one core must still hold every actor.
        ray_actor_options={"num_cpus": 0, "num_gpus": args.gpus, "runtime_env": environment(args.metrics_dir)},
    ).bind(args)
    return app


@serve.deployment
@serve.ingress()
class Model:
    """One replica of one model."""

    def __init__(self, args: AppArgs) -> None:
        # torch and transformers stay out of the processes that only route.
        from ..api.http.service import TALLY  # noqa: PLC0415
        from ..models import loading  # noqa: PLC0415

        TALLY.open(args.metrics_dir)
        self._app, self._info, self._alive = loading.load(args)

    def __serve_build_asgi_app__(self) -> ASGIApp:
        return self._app

    def info(self) -> dict[str, Any]:
        """id, kind, revision, context, device and sizes of the loaded model."""
        return self._info

    def check_health(self) -> None:
        """Ray Serve replaces the replica when this raises."""
        if not self._alive():
            raise RuntimeError("the engine's loop has ended")


def build_catalogue(args: CatalogueArgs) -> serve.Application:
    """The application at /: which models there are, and the way to them by the body's `model`."""
    app: serve.Application = Catalogue.options(  # type: ignore[attr-defined]
        max_ongoing_requests=4096,
        ray_actor_options={"num_cpus": 0, "runtime_env": environment(args.metrics_dir)},
        graceful_shutdown_wait_loop_s=0.2,
        graceful_shutdown_timeout_s=args.drain_timeout_seconds,
    ).bind(args)
    return app


@serve.deployment(name="catalogue")
@serve.ingress()
class Catalogue:
    def __init__(self, args: CatalogueArgs) -> None:
        from ..api.http.service import start_logging  # noqa: PLC0415

        start_logging(args.log_format, args.log_pipe)
        self._entries = {entry.id: entry for entry in args.entries}
        self._address, self._limit, self._hosts = args.address, args.max_body_bytes, args.allowed_hosts
        self._folder = args.metrics_dir
        self._started = int(time.time())
        self._session: aiohttp.ClientSession | None = None
        self._heard: dict[str, tuple[dict[str, Any], float]] = {}  # what each last told of itself, and when
        self._survey: tuple[float, dict[str, dict[str, Any]]] = (0.0, {})
        self._versions = {
            "lab_model": __version__,
            "python": platform.python_version(),
            **{name: version(name) for name in ("ray", "torch", "transformers")},
        }

    def __serve_build_asgi_app__(self) -> ASGIApp:
        from ..api.http.service import Endpoint, Service  # noqa: PLC0415

        posts = dict.fromkeys((*endpoints("chat"), *endpoints("embedding")), self.forward)
        gets: dict[str, Endpoint] = {
            "/health": self.health,
            "/ready": self.ready,
            "/metrics": self.metrics,
            "/v1/models": self.models,
            "/tally": self.tally,
        }
        gets |= {f"/v1/models/{id_}": self.model for id_ in self._entries}
        return Service(posts, gets, hosts=self._hosts)

    async def survey(self) -> dict[str, dict[str, Any]]:
        """Each model's state (`ready`, `loading`, `failed`) and, when ready, its info. At most one look a second."""
        looked, found = self._survey
        if time.monotonic() - looked < 1 and found:
            return found
        applications = (await asyncio.to_thread(serve.status)).applications
        found = {}
        for id_, entry in self._entries.items():
            status = applications.get(id_)
            state = {"RUNNING": "ready", "DEPLOY_FAILED": "failed", "UNHEALTHY": "failed"}.get(
                str(status.status.value) if status else "", "loading"
            )
            found[id_] = {"id": id_, "kind": entry.kind, "state": state}
            if state == "ready":
                known, heard = self._heard.get(id_, ({}, -math.inf))
                try:
                    handle = await asyncio.to_thread(serve.get_app_handle, id_)  # it asks Serve's controller
                    known = await asyncio.wait_for(handle.info.remote(), 2)
                    self._heard[id_] = known, time.monotonic()
                    found[id_] |= known
                except TimeoutError:
                    # On a full machine it may be busy: only after some such looks it is taken for gone.
                    silent = time.monotonic() - heard > SILENT_SECONDS
                    found[id_] |= {"state": "loading", "detail": "not answering"} if silent else known
                except Exception as error:  # a replica that just died: Serve brings the next one
                    found[id_] |= {"state": "loading", "detail": f"not answering: {type(error).__name__}"}
            elif status and (why := reason(status)):
                found[id_]["detail"] = why
        self._survey = time.monotonic(), found
        return found

    async def health(self, _: HttpRequest) -> Response:
        return _json({"status": "ok"})

    async def ready(self, _: HttpRequest) -> Response:
        models = list((await self.survey()).values())
        states = {model["state"] for model in models}
        status = "failed" if "failed" in states else "loading" if "loading" in states else "ready"
        devices = sorted({model["device"] for model in models if "device" in model})
        said = {"status": status, "device": ", ".join(devices) or None, "models": models, "versions": self._versions}
        return _json(said, 200 if status == "ready" else 503)

    async def models(self, _: HttpRequest) -> Response:
        ready = [self._listed(model) for model in (await self.survey()).values() if model["state"] == "ready"]
        return _json({"object": "list", "data": ready})

    async def model(self, http: HttpRequest) -> Response:
        found = (await self.survey())[http.url.path.rpartition("/")[2]]
        self._check_ready(found)
        return _json(self._listed(found))

    async def metrics(self, _: HttpRequest) -> Response:
        """Prometheus text, summed over this machine's replicas: each writes its values to files of one folder."""
        registry = CollectorRegistry()
        multiprocess.MultiProcessCollector(registry)  # type: ignore[no-untyped-call]
        text = await asyncio.to_thread(prometheus_client.generate_latest, registry)
        return Response(text, media_type=prometheus_client.CONTENT_TYPE_LATEST)

    async def tally(self, http: HttpRequest) -> Response:
        """What each `id` of the query really used, whichever replica it ran on, where it has ended not long ago."""
        ids = http.query_params.getlist("id")[:MOST_IDS]
        found = await asyncio.to_thread(usage.find, self._folder, ids)
        return _json({id_: used._asdict() for id_, used in found.items()})

    async def forward(self, http: HttpRequest) -> Response:
        """Hand the request to the model that its body names, and its answer back as it comes."""
        from ..api.http.service import EventStream, read_json, sse, until_gone  # noqa: PLC0415

        body = await read_json(http, self._limit)
        name = body.get("model") if isinstance(body, dict) else None
        if not isinstance(name, str) or not name:
            raise errors.BadRequestError(
                "Missing required parameter: 'model'.", param="model", code="missing_required_parameter"
            )
        found = (await self.survey()).get(name)
        if found is None:
            raise errors.NotFoundError(
                f"The model '{name}' does not exist. There is: {', '.join(self._entries)}.",
                param="model",
                code="model_not_found",
            )
        self._check_ready(found)
        path = http.url.path
        if path not in endpoints(found["kind"]):
            raise errors.BadRequestError(f"{name} is of kind {found['kind']}: {path} does not take it.", param="model")
        record = http.scope["record"]
        if self._session is None:
            self._session = aiohttp.ClientSession(timeout=FORWARD_TIMEOUT, connector=aiohttp.TCPConnector(limit=0))
        headers = {"content-type": "application/json", "x-request-id": record.request_id}
        if (timeout := http.headers.get("x-request-timeout-ms")) is not None:
            headers["x-request-timeout-ms"] = timeout
        try:
            data = orjson.dumps(body)
        except orjson.JSONEncodeError:  # it reads 1,024 levels, and writes 254
            raise errors.BadRequestError("The body is nested too deeply.", code="invalid_value") from None
        ask = self._session.post(f"{self._address}/m/{name}{path}", data=data, headers=headers)
        try:
            answer = await until_gone(http.receive, ask)
        except aiohttp.ClientError as error:
            raise errors.UnavailableError(f"{name} does not answer: {error}.") from None
        record.outcome = "forwarded"  # its own line is the model's

        async def parts() -> AsyncGenerator[bytes]:
            try:
                async for part in answer.content.iter_any():
                    yield part
            except aiohttp.ClientError as error:
                record.outcome = "error"
                log.warning("%s broke its answer off: %s", name, type(error).__name__)
                if answer.content_type != "text/event-stream":
                    raise
                yield sse(errors.UnavailableError(f"{name} broke its answer off; it starts again by itself.").body())
            finally:
                answer.close()

        response = EventStream(parts(), answer.status)
        response.init_headers({key: answer.headers[key] for key in HANDED_ON if key in answer.headers})
        return response

    def _listed(self, model: dict[str, Any]) -> dict[str, Any]:
        facts = {key: model[key] for key in ("kind", "revision", "context")}
        return {"id": model["id"], "object": "model", "created": self._started, "owned_by": "llm-lab", **facts}

    def _check_ready(self, model: dict[str, Any]) -> None:
        if model["state"] != "ready":
            detail = f" ({model['detail']})" if "detail" in model else ""
            raise errors.UnavailableError(
                f"{model['id']} is {model['state']}{detail}; GET /ready tells when it answers."
            )


def _json(body: Any, status: int = 200) -> Response:
    return Response(orjson.dumps(body), status, media_type="application/json")
