"""The Ray Serve application at /: the models' states, metrics and usage; loading, unloading and adding models; and
forwarding by the body's `model`, which waits for a model that is not in memory.

The front sends a model's requests to its own application while that is in memory. Knows Ray Serve and HTTP. Knows
nothing of how a model is loaded or answers.
"""

from __future__ import annotations

import asyncio
import logging
import math
import platform
import time
from collections.abc import AsyncGenerator
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import aiohttp
import orjson
import prometheus_client
from prometheus_client import CollectorRegistry, multiprocess
from pydantic import BaseModel
from ray import serve
from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.types import ASGIApp

from .. import __version__
from ..api.http import timing, usage
from ..api.http.deadline import deadline_of
from ..api.http.logs import start_logging
from ..api.http.service import Endpoint, EventStream, HttpService, read_json, sse, until_disconnect
from ..api.openapi import document
from ..errors import BadRequestError, NotFoundError, UnavailableError, deadline_exceeded
from ..models.kinds import KINDS, PATHS, Kind, default_model
from .activity import processes, read_queues
from .applications import Applications
from .lifecycle import Lifecycle, LifecycleArgs
from .ray_internals import AsgiDeployment, replica_environment

log = logging.getLogger(__name__)

# Timeout of a request that waits behind a full queue of long answers: minutes.
FORWARD_TIMEOUT = aiohttp.ClientTimeout(total=None, sock_connect=5, sock_read=900)
# Header of a forwarded request, so that it is never forwarded again.
FORWARDED_ONCE = "x-lab-forwarded"
# The front learns of a new replica within a fraction of a second.
FRONT_ATTEMPTS, FRONT_SECONDS = 50, 0.1
MISSING = ("absent", "start")  # state and load of a model whose files should be here
UNLISTED = {"pid", "progress", "max_running", "max_queued", "weights_bytes", "kv_bytes", "kv_tokens"}
LONGEST_NAME = 300  # characters
MOST_IDS = 256  # in one request for usage
TRACE = ("traceparent", "tracestate")  # W3C Trace Context: the model's process continues the caller's trace
# Headers of a model's answer that are forwarded. The request id is there already.
FORWARDED = (
    "content-type", "retry-after", "x-should-retry", "x-model-revision", "x-model-replica", "cache-control",
    "x-accel-buffering",
)  # fmt: skip


class CatalogueArgs(BaseModel):
    """Arguments of the catalogue's application. address: of the service, such as http://127.0.0.1:8000."""

    address: str
    lifecycle: LifecycleArgs
    load_wait_seconds: float = 60
    allowed_hosts: tuple[str, ...] = ()
    max_body_bytes: int = 8 * 1024 * 1024
    drain_timeout_seconds: float = 30
    log_format: Literal["json", "text"] = "json"
    log_pipe: Path
    metrics_dir: Path


def build_catalogue(args: CatalogueArgs) -> serve.Application:
    """The Serve application at /."""
    app: serve.Application = CatalogueApp.options(  # type: ignore[attr-defined]
        max_ongoing_requests=4096,
        ray_actor_options={"num_cpus": 0, "runtime_env": replica_environment(args.metrics_dir)},
        graceful_shutdown_wait_loop_s=0.2,
        graceful_shutdown_timeout_s=args.drain_timeout_seconds,
    ).bind(args)
    return app


@serve.deployment(name="catalogue")
@serve.ingress()
class CatalogueApp(AsgiDeployment):
    """The application's only replica."""

    def __init__(self, args: CatalogueArgs) -> None:
        start_logging(args.log_format, args.log_pipe)
        self._address, self._limit = args.address, args.max_body_bytes
        self._folder = args.metrics_dir
        self._wait_seconds = args.load_wait_seconds
        self._started = int(time.time())
        self._session: aiohttp.ClientSession | None = None
        self._versions = {
            "lab_model": __version__,
            "python": platform.python_version(),
            **{name: version(name) for name in ("ray", "torch", "transformers")},
        }
        self._service = HttpService({}, hosts=args.allowed_hosts)
        self._lifecycle = Lifecycle(args.lifecycle, Applications(), self._set_endpoints)

    def asgi_app(self) -> ASGIApp:
        return self._service

    def _set_endpoints(self, ids: dict[str, Kind]) -> None:
        """The paths, for these models of the catalogue."""
        posts: dict[str, Endpoint] = dict.fromkeys(PATHS, self.forward)
        posts |= {"/models/load": self.load, "/models/unload": self.unload, "/models/add": self.add}
        gets: dict[str, Endpoint] = {
            "/health": self.health,
            "/ready": self.ready,
            "/metrics": self.metrics,
            "/v1/models": self.models,
            "/openapi.json": self.openapi,
            "/tally": self.usage_of,
            timing.PREFIX: self.timing,
        }
        for id_, kind in ids.items():
            gets[f"/v1/models/{id_}"] = self.model
            # The model's own address while it is not in memory.
            posts |= {f"/m/{id_}{path}": self.forward_to(id_) for path in KINDS[kind].paths}
        self._service.set_endpoints(posts, gets)

    def report(self) -> dict[str, Any]:
        """For the main process: each model's state, and whether those of the start are still loading."""
        return {"models": self._lifecycle.report(), "starting": self._lifecycle.starting}

    async def health(self, _: HttpRequest) -> Response:
        return _json({"status": "ok"})

    async def ready(self, _: HttpRequest) -> Response:
        """200 when the models of the start have been loaded or have failed, and at least one answers or can be loaded.
        A model that failed makes the service `degraded`; the others still answer."""
        lifecycle = self._lifecycle
        await lifecycle.refresh()
        models = list(lifecycle.report().values())
        queues = await asyncio.to_thread(read_queues, self._folder)
        for model in models:
            if model["state"] == "ready":
                count = len(processes(self._folder, model["id"]))
                model |= {"replicas": count, **queues.get(model["id"], {})}
        states = {model["state"] for model in models}
        usable = states & {"ready", "unloaded"}
        failed = [each for each in models if each["state"] == "failed" or (each["state"], each["load"]) == MISSING]
        if lifecycle.starting or ("loading" in states and not usable):
            status = "loading"
        elif not usable:
            status = "failed"
        else:
            status = "degraded" if failed or lifecycle.trouble else "ready"
        devices = sorted({model["device"] for model in models if "device" in model and model["state"] == "ready"})
        body = {"status": status, "device": ", ".join(devices) or None, "models": models, "versions": self._versions}
        body |= {"adding": lifecycle.downloads.report()} if lifecycle.downloads.adding else {}
        body |= {"detail": lifecycle.trouble} if lifecycle.trouble else {}
        return _json(body, 200 if status in ("ready", "degraded") else 503)

    async def models(self, _: HttpRequest) -> Response:
        """All models of the catalogue, whatever their state."""
        await self._lifecycle.refresh()
        return _json({"object": "list", "data": [self._listed(each) for each in self._lifecycle.report().values()]})

    async def model(self, http: HttpRequest) -> Response:
        return _json(self._listed(self._lifecycle.report()[http.url.path.rpartition("/")[2]]))

    async def openapi(self, _: HttpRequest) -> Response:
        return _json(await asyncio.to_thread(document, __version__))

    # ---- for the operator: reachable only inside the lab; the proxy requires the admin key

    async def load(self, http: HttpRequest) -> Response:
        """POST {"model"}: load it, and unload others if there is too little memory. 202: loading has begun."""
        id_ = await self._named(http)
        self._lifecycle.load(id_)
        return _json(self._lifecycle.report()[id_], 202)

    async def unload(self, http: HttpRequest) -> Response:
        """POST {"model"}: end it when its running answers have ended."""
        id_ = await self._named(http)
        await self._lifecycle.unload(id_)
        return _json(self._lifecycle.report()[id_], 202)

    async def add(self, http: HttpRequest) -> Response:
        """POST {"model"}: fetch a model of a hub or of known.yaml and add it to the catalogue. 202: it has begun."""
        name = _string(await read_json(http, self._limit), "model")
        if len(name) > LONGEST_NAME or name.startswith(("file:", "/", ".", "~", "-")) or ".." in name:
            raise BadRequestError("'model' must be a short name, or <owner>/<name> on a hub.", param="model")
        # Over HTTP owner/name always means a hub's model, never a folder in the working directory.
        self._lifecycle.add(f"hub:{name}" if "/" in name and not name.startswith("hub:") else name)
        return _json(self._lifecycle.downloads.report(), 202)

    async def _named(self, http: HttpRequest) -> str:
        name = _string(await read_json(http, self._limit), "model")
        self._check_known(name)
        return name

    def _check_known(self, name: str) -> None:
        if name not in self._lifecycle.models:
            raise NotFoundError(
                f"The model '{name[:200]}' does not exist. Models: {', '.join(self._lifecycle.models)}.",
                param="model",
                code="model_not_found",
            )

    async def metrics(self, _: HttpRequest) -> Response:
        """Prometheus text, summed over this machine's replicas: each writes its values to files of one folder."""
        await asyncio.to_thread(usage.forget_dead, self._folder)
        registry = CollectorRegistry()
        multiprocess.MultiProcessCollector(registry)  # type: ignore[no-untyped-call]
        text = await asyncio.to_thread(prometheus_client.generate_latest, registry)
        return Response(text, media_type=prometheus_client.CONTENT_TYPE_LATEST)

    async def usage_of(self, http: HttpRequest) -> Response:
        """Tokens used by each `id` of the query, whichever replica it ran on, if it ended recently."""
        ids = http.query_params.getlist("id")[:MOST_IDS]
        found = await asyncio.to_thread(usage.find, self._folder, ids)
        return _json({id_: used._asdict() for id_, used in found.items()})

    async def timing(self, http: HttpRequest) -> Response:
        """GET /v1/requests/<call id>/timing: the phases of a request to an engine, also of one that runs now."""
        id_ = timing.id_of(http.url.path)
        found = await asyncio.to_thread(timing.find, self._folder, id_)
        if found is None:
            raise NotFoundError(f"No request '{id_[:200]}' was here in the last minutes.", code="not_found")
        return _json(found)

    async def forward(self, http: HttpRequest) -> Response:
        """Forward the request to the model that its body names, and stream the answer back."""
        body = await read_json(http, self._limit)
        if not isinstance(body, dict):
            raise BadRequestError("The body must be a JSON object.", code="invalid_json")
        if body.get("model") is None:
            kinds = {id_: model.entry.kind for id_, model in self._lifecycle.models.items()}
            body["model"] = default_model(http.url.path, kinds)
        name = _string(body, "model")
        self._check_known(name)
        return await self._forward(http, body, name, http.url.path)

    def forward_to(self, id_: str) -> Endpoint:
        async def forward(http: HttpRequest) -> Response:
            if FORWARDED_ONCE in http.headers:  # the front does not know the model's replica yet
                raise UnavailableError(f"{id_} is not reachable yet.")
            return await self._forward(http, await read_json(http, self._limit), id_, http.url.path[len(f"/m/{id_}") :])

        return forward

    async def _forward(self, http: HttpRequest, body: Any, name: str, path: str) -> Response:
        kind = self._lifecycle.models[name].entry.kind
        if path not in KINDS[kind].paths:
            raise BadRequestError(f"{name} is of kind {kind}, which {path} does not accept.", param="model")
        # 1. The model, in memory.
        caller = deadline_of(http) or math.inf
        longest = time.monotonic() + self._wait_seconds
        ready = self._lifecycle.ensure_ready(name, min(longest, caller))
        try:
            await until_disconnect(http.receive, ready)
        except UnavailableError:
            # The clock is not compared with the deadline, because a timer may fire slightly early.
            if caller <= longest and self._lifecycle.models[name].state in ("loading", "unloaded"):
                raise deadline_exceeded() from None
            raise
        # 2. The request, again while the front does not know the model's replica.
        record = http.scope["record"]
        if self._session is None:
            self._session = aiohttp.ClientSession(timeout=FORWARD_TIMEOUT, connector=aiohttp.TCPConnector(limit=0))
        headers = {"content-type": "application/json", "x-request-id": record.request_id, FORWARDED_ONCE: "1"}
        headers["x-call-id"] = record.call_id  # the id by which its usage is queried
        headers |= {name: http.headers[name] for name in TRACE if name in http.headers}
        if caller < math.inf:
            headers["x-request-timeout-ms"] = str(max(1, int((caller - time.monotonic()) * 1000)))
        try:
            data = orjson.dumps(body)
        except orjson.JSONEncodeError:  # orjson reads 1,024 levels and writes 254
            raise BadRequestError("The body is nested too deeply.", code="invalid_value") from None
        for attempt in range(FRONT_ATTEMPTS):
            pending = self._session.post(f"{self._address}/m/{name}{path}", data=data, headers=headers)
            try:
                answer = await until_disconnect(http.receive, pending)
            except aiohttp.ClientError as error:
                raise UnavailableError(f"{name} does not answer: {error}.") from None
            if answer.status not in (404, 503) or "x-model-revision" in answer.headers or attempt == FRONT_ATTEMPTS - 1:
                break
            answer.close()
            await asyncio.sleep(FRONT_SECONDS)
        record.outcome = "forwarded"  # the model's process writes the log line

        async def parts() -> AsyncGenerator[bytes]:
            try:
                async for part in answer.content.iter_any():
                    yield part
            except aiohttp.ClientError as error:
                record.outcome = "error"
                log.warning("%s interrupted its answer: %s", name, type(error).__name__)
                if answer.content_type != "text/event-stream":
                    raise
                yield sse(UnavailableError(f"{name} broke off its answer; it is restarted automatically.").body())
            finally:
                answer.close()

        response = EventStream(parts(), answer.status)
        response.init_headers({key: answer.headers[key] for key in FORWARDED if key in answer.headers})
        return response

    def _listed(self, model: dict[str, Any]) -> dict[str, Any]:
        """The model as OpenAI lists it, with its card, without fields that change all the time."""
        card = {name: value for name, value in model.items() if name not in UNLISTED and value is not None}
        facts = {"revision": model.get("revision"), "context": model.get("context")}
        return {"object": "model", "created": self._started, "owned_by": "llm-lab", **facts, **card}


def _string(body: Any, name: str) -> str:
    value = body.get(name) if isinstance(body, dict) else None
    if not isinstance(value, str) or not value:
        raise BadRequestError(f"Missing required parameter: '{name}'.", param=name, code="missing_required_parameter")
    return value


def _json(body: Any, status: int = 200) -> Response:
    return Response(orjson.dumps(body), status, media_type="application/json")
