"""The Ray Serve application at /: the models' states, metrics and usage, and forwarding by the body's `model`.

For callers of the service itself; the front and the proxy send a model's requests to its own application.
Knows Ray Serve and HTTP. Knows nothing of how a model is loaded or answers.
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
from typing import Any, Literal

import aiohttp
import orjson
import prometheus_client
from prometheus_client import CollectorRegistry, multiprocess
from pydantic import BaseModel
from ray import serve
from ray.serve.schema import ApplicationStatusOverview
from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.types import ASGIApp

from .. import __version__
from ..api.http import usage
from ..api.http.logs import start_logging
from ..api.http.service import Endpoint, EventStream, HttpService, read_json, sse, until_disconnect
from ..errors import BadRequestError, NotFoundError, UnavailableError
from ..models.catalogue import Entry
from ..models.kinds import KINDS, PATHS
from .ray_internals import AsgiDeployment, replica_environment

log = logging.getLogger(__name__)

# A busy model may leave questions for its info unanswered for so long before it counts as not answering.
SILENT_SECONDS = 10.0
# Minutes for a request that waits behind a full queue of long answers, but bounded.
FORWARD_TIMEOUT = aiohttp.ClientTimeout(total=None, sock_connect=5, sock_read=900)
MOST_IDS = 256  # in one request for usage
# Headers of a model's answer that are forwarded. The request id is there already.
FORWARDED = ("content-type", "retry-after", "x-model-revision", "cache-control", "x-accel-buffering")


class CatalogueArgs(BaseModel):
    """What the catalogue's application is built from. address: of the service, http://127.0.0.1:8000."""

    entries: list[Entry]
    address: str
    allowed_hosts: tuple[str, ...] = ()
    max_body_bytes: int = 8 * 1024 * 1024
    drain_timeout_seconds: float = 30
    log_format: Literal["json", "text"] = "json"
    log_pipe: Path
    metrics_dir: Path


def reason(status: ApplicationStatusOverview) -> str:
    """Why an application does not run, in one line: its deployment's exception without the trace."""
    lines = [line for deployment in status.deployments.values() for line in deployment.message.splitlines()]
    raised = [line.strip() for line in lines if re.match(r"\s*[\w.]*(Error|Exception)\b.*: ", line)]
    return (raised or [status.message.strip()])[-1].rpartition("CatalogueError: ")[2][:500]


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
    """Its one replica."""

    def __init__(self, args: CatalogueArgs) -> None:
        start_logging(args.log_format, args.log_pipe)
        self._entries = {entry.id: entry for entry in args.entries}
        self._address, self._limit, self._hosts = args.address, args.max_body_bytes, args.allowed_hosts
        self._folder = args.metrics_dir
        self._started = int(time.time())
        self._session: aiohttp.ClientSession | None = None
        self._infos: dict[str, tuple[dict[str, Any], float]] = {}  # each model's last info, and when it came
        self._states: tuple[float, dict[str, dict[str, Any]]] = (0.0, {})
        self._versions = {
            "lab_model": __version__,
            "python": platform.python_version(),
            **{name: version(name) for name in ("ray", "torch", "transformers")},
        }

    def asgi_app(self) -> ASGIApp:
        posts = dict.fromkeys(PATHS, self.forward)
        gets: dict[str, Endpoint] = {
            "/health": self.health,
            "/ready": self.ready,
            "/metrics": self.metrics,
            "/v1/models": self.models,
            "/tally": self.usage_of,
        }
        gets |= {f"/v1/models/{id_}": self.model for id_ in self._entries}
        return HttpService(posts, gets, hosts=self._hosts)

    async def states(self) -> dict[str, dict[str, Any]]:
        """Each model's state (`ready`, `loading`, `failed`) and, when ready, its info. Asked at most once a second."""
        asked, found = self._states
        if time.monotonic() - asked < 1 and found:
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
                info, received = self._infos.get(id_, ({}, -math.inf))
                try:
                    handle = await asyncio.to_thread(serve.get_app_handle, id_)  # it asks Serve's controller
                    info = await asyncio.wait_for(handle.info.remote(), 2)
                    self._infos[id_] = info, time.monotonic()
                    found[id_] |= info
                except TimeoutError:
                    # It may be busy: it counts as not answering only after several timeouts.
                    silent = time.monotonic() - received > SILENT_SECONDS
                    found[id_] |= {"state": "loading", "detail": "not answering"} if silent else info
                except Exception as error:  # a replica that has just died: Serve starts the next one
                    found[id_] |= {"state": "loading", "detail": f"not answering: {type(error).__name__}"}
            elif status and (why := reason(status)):
                found[id_]["detail"] = why
        self._states = time.monotonic(), found
        return found

    async def health(self, _: HttpRequest) -> Response:
        return _json({"status": "ok"})

    async def ready(self, _: HttpRequest) -> Response:
        models = list((await self.states()).values())
        states = {model["state"] for model in models}
        status = "failed" if "failed" in states else "loading" if "loading" in states else "ready"
        devices = sorted({model["device"] for model in models if "device" in model})
        body = {"status": status, "device": ", ".join(devices) or None, "models": models, "versions": self._versions}
        return _json(body, 200 if status == "ready" else 503)

    async def models(self, _: HttpRequest) -> Response:
        ready = [self._listed(model) for model in (await self.states()).values() if model["state"] == "ready"]
        return _json({"object": "list", "data": ready})

    async def model(self, http: HttpRequest) -> Response:
        found = (await self.states())[http.url.path.rpartition("/")[2]]
        self._check_ready(found)
        return _json(self._listed(found))

    async def metrics(self, _: HttpRequest) -> Response:
        """Prometheus text, summed over this machine's replicas: each writes its values to files of one folder."""
        registry = CollectorRegistry()
        multiprocess.MultiProcessCollector(registry)  # type: ignore[no-untyped-call]
        text = await asyncio.to_thread(prometheus_client.generate_latest, registry)
        return Response(text, media_type=prometheus_client.CONTENT_TYPE_LATEST)

    async def usage_of(self, http: HttpRequest) -> Response:
        """Tokens used by each `id` of the query, whichever replica it ran on, if it ended recently."""
        ids = http.query_params.getlist("id")[:MOST_IDS]
        found = await asyncio.to_thread(usage.find, self._folder, ids)
        return _json({id_: used._asdict() for id_, used in found.items()})

    async def forward(self, http: HttpRequest) -> Response:
        """Forward the request to the model that its body names, and stream the answer back."""
        body = await read_json(http, self._limit)
        name = body.get("model") if isinstance(body, dict) else None
        if not isinstance(name, str) or not name:
            raise BadRequestError(
                "Missing required parameter: 'model'.", param="model", code="missing_required_parameter"
            )
        found = (await self.states()).get(name)
        if found is None:
            raise NotFoundError(
                f"The model '{name}' does not exist. There is: {', '.join(self._entries)}.",
                param="model",
                code="model_not_found",
            )
        self._check_ready(found)
        path = http.url.path
        if path not in KINDS[self._entries[name].kind].paths:
            raise BadRequestError(f"{name} is of kind {found['kind']}: {path} does not take it.", param="model")
        record = http.scope["record"]
        if self._session is None:
            self._session = aiohttp.ClientSession(timeout=FORWARD_TIMEOUT, connector=aiohttp.TCPConnector(limit=0))
        headers = {"content-type": "application/json", "x-request-id": record.request_id}
        if (timeout := http.headers.get("x-request-timeout-ms")) is not None:
            headers["x-request-timeout-ms"] = timeout
        try:
            data = orjson.dumps(body)
        except orjson.JSONEncodeError:  # orjson reads 1,024 levels and writes 254
            raise BadRequestError("The body is nested too deeply.", code="invalid_value") from None
        pending = self._session.post(f"{self._address}/m/{name}{path}", data=data, headers=headers)
        try:
            answer = await until_disconnect(http.receive, pending)
        except aiohttp.ClientError as error:
            raise UnavailableError(f"{name} does not answer: {error}.") from None
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
                yield sse(UnavailableError(f"{name} broke its answer off; it starts again by itself.").body())
            finally:
                answer.close()

        response = EventStream(parts(), answer.status)
        response.init_headers({key: answer.headers[key] for key in FORWARDED if key in answer.headers})
        return response

    def _listed(self, model: dict[str, Any]) -> dict[str, Any]:
        facts = {key: model[key] for key in ("kind", "revision", "context")}
        return {"id": model["id"], "object": "model", "created": self._started, "owned_by": "llm-lab", **facts}

    def _check_ready(self, model: dict[str, Any]) -> None:
        if model["state"] != "ready":
            detail = f" ({model['detail']})" if "detail" in model else ""
            raise UnavailableError(f"{model['id']} is {model['state']}{detail}; GET /ready tells when it answers.")


def _json(body: Any, status: int = 200) -> Response:
    return Response(orjson.dumps(body), status, media_type="application/json")
