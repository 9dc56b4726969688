"""The Ray Serve application at / of a cluster: the models' states, metrics and usage, asked of each replica.

A Serve config file names it as `import_path: lab_model.serving.cluster_app:build_cluster_app`. It shares no folder with
the replicas, which may run on any node. Requests for a model go to /m/<model>/v1/…, where the proxy sends them.
Knows Ray Serve and HTTP. Knows nothing of how a model is loaded or answers.
"""

from __future__ import annotations

import asyncio
import math
import platform
import time
from importlib.metadata import version
from typing import Any, Literal

import orjson
import prometheus_client
from pydantic import BaseModel
from ray import serve
from ray.serve.handle import DeploymentHandle
from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.types import ASGIApp

from .. import __version__
from ..api.http import timing
from ..api.http.logs import start_logging
from ..api.http.service import HttpService
from ..errors import NotFoundError, UnavailableError
from ..models.catalogue import Entry
from ..models.kinds import PATHS
from .metrics_sum import MetricsSum
from .ray_internals import AsgiDeployment

ANSWER_SECONDS = 5.0  # timeout for the answers of all replicas of a model
SILENT_SECONDS = 30.0  # busy replicas may not answer for this time before their model counts as not answering
BUSY_SECONDS = 0.5  # less than the second after which a proxy gives up
STATES = {"RUNNING": "ready", "DEPLOY_FAILED": "failed", "UNHEALTHY": "failed"}  # Serve's state -> ours; else `loading`
MOST_IDS = 256  # in one request for usage


class ClusterArgs(BaseModel):
    """Arguments of this application. cpus: reserved for it; without any, Ray could place it on the head node."""

    entries: list[Entry]
    cpus: float = 0.1
    allowed_hosts: tuple[str, ...] = ()
    log_format: Literal["json", "text"] = "json"


def build_cluster_app(args: ClusterArgs | dict[str, Any]) -> serve.Application:
    """The Serve application at /. args: ClusterArgs, or their fields from a Serve config file."""
    args = ClusterArgs.model_validate(args)
    app: serve.Application = ClusterApp.options(  # type: ignore[attr-defined]
        max_ongoing_requests=256, ray_actor_options={"num_cpus": args.cpus}
    ).bind(args)
    return app


@serve.deployment(name="catalogue")
@serve.ingress()
class ClusterApp(AsgiDeployment):
    """The application's only replica."""

    def __init__(self, args: ClusterArgs) -> None:
        start_logging(args.log_format, None)
        self._entries = {entry.id: entry for entry in args.entries}
        self._hosts = args.allowed_hosts
        self._started = int(time.time())
        self._infos: dict[str, tuple[dict[str, Any], float]] = {}  # each model's last info, and when it came
        self._states: tuple[float, dict[str, dict[str, Any]]] = (0.0, {})
        self._look: asyncio.Task[None] | None = None
        self._handles: dict[str, DeploymentHandle[Any]] = {}
        self._sum = MetricsSum()
        self._versions = {
            "lab_model": __version__,
            "python": platform.python_version(),
            **{name: version(name) for name in ("ray", "torch", "transformers")},
        }

    def asgi_app(self) -> ASGIApp:
        gets = {
            "/health": self.health,
            "/ready": self.ready,
            "/metrics": self.metrics,
            "/v1/models": self.models,
            "/tally": self.usage_of,
            timing.PREFIX: self.timing,
        }
        return HttpService(dict.fromkeys(PATHS, self.refuse), gets, hosts=self._hosts)

    async def states(self) -> dict[str, dict[str, Any]]:
        """Each model's state (`ready`, `loading`, `failed`) and, when ready, its info. Asked at most once a second; the
        last ones while busy replicas let that wait."""
        asked, found = self._states
        if time.monotonic() - asked < 1 and found:
            return found
        if self._look is None or self._look.done():
            self._look = asyncio.create_task(self._ask_all())  # it goes on when the caller leaves
        await asyncio.wait({self._look}, timeout=BUSY_SECONDS if found else None)
        if self._look.done():
            self._look.result()  # raises what it raised
        return self._states[1]

    async def _ask_all(self) -> None:
        applications = (await asyncio.to_thread(serve.status)).applications
        found = {}
        for id_, entry in self._entries.items():
            status = applications.get(id_)
            word = STATES.get(str(status.status.value) if status else "", "loading")
            if status and (infos := await self._ask(id_, "info")):
                self._infos[id_] = infos[0] | {"replicas": len(infos)}, time.monotonic()
            info, received = self._infos.get(id_, ({}, -math.inf))
            found[id_] = {"id": id_, "kind": entry.kind}
            # Replicas answer also while others are replaced, or cannot be started.
            if status and time.monotonic() - received < SILENT_SECONDS:
                found[id_] |= {"state": "ready"} | info
            else:
                found[id_]["state"] = "loading" if word == "ready" else word
            if word == "ready" != found[id_]["state"]:
                found[id_]["detail"] = "not answering"
            elif word != "ready" and status and status.message:
                found[id_]["detail"] = status.message.strip().splitlines()[-1][:500]
        self._states = time.monotonic(), found

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
        models = list((await self.states()).values())
        if any(model["state"] == "loading" for model in models) and time.time() - self._started < SILENT_SECONDS:
            # This process has just replaced another, perhaps: the proxies keep the list that they have.
            raise UnavailableError("Not every model has answered yet.")
        common = {"object": "model", "created": self._started, "owned_by": "llm-lab"}
        ready = [model for model in models if model["state"] == "ready"]
        data = [
            {"id": model["id"], **common, **{key: model[key] for key in ("kind", "revision", "context")}}
            for model in ready
        ]
        return _json({"object": "list", "data": data})

    async def metrics(self, _: HttpRequest) -> Response:
        """Prometheus text, summed over the replicas on all nodes."""
        pages = await asyncio.gather(*(self._ask(id_, "metrics") for id_ in self._entries))
        self._sum.update(dict(page for of_model in pages for page in of_model))
        return Response(self._sum.text(), media_type=prometheus_client.CONTENT_TYPE_LATEST)

    async def usage_of(self, http: HttpRequest) -> Response:
        """Tokens used by each `id` of the query, on whichever node it ran, if it ended recently."""
        ids = http.query_params.getlist("id")[:MOST_IDS]
        answers = await asyncio.gather(*(self._ask(id_, "usage_of", ids) for id_ in self._entries))
        found = {id_: used for of_model in answers for rings in of_model for id_, used in rings.items()}
        return _json({id_: used._asdict() for id_, used in found.items()})

    async def timing(self, http: HttpRequest) -> Response:
        """GET /v1/requests/<call id>/timing: the phases of a request to an engine, also of one that runs now."""
        id_ = timing.id_of(http.url.path)
        answers = await asyncio.gather(*(self._ask(each, "timing_of", id_) for each in self._entries))
        found = next((each for of_model in answers for each in of_model if each is not None), None)
        if found is None:
            raise NotFoundError(f"No request '{id_[:200]}' was here in the last minutes.", code="not_found")
        return _json(found)

    async def refuse(self, http: HttpRequest) -> Response:
        path = http.url.path
        raise NotFoundError(
            f"In a cluster a model's requests go to its own path, /m/<model>{path}. Use the proxy, which does that.",
            code="not_found",
        )

    async def _ask(self, id_: str, method: str, *args: Any) -> list[Any]:
        """The answers of a model's replicas, without those that fail; none when one is too busy to answer in time."""
        try:
            handle = self._handles.get(id_)
            if handle is None:
                handle = self._handles[id_] = await asyncio.to_thread(serve.get_app_handle, id_)
            response = handle.broadcast(method, *args)
            answers = await response.results_async(timeout_s=ANSWER_SECONDS, return_exceptions=True)
        except Exception:  # the application is being deployed, or a replica has just ended
            self._handles.pop(id_, None)
            return []
        return [answer for answer in answers if not isinstance(answer, BaseException)]


def _json(body: Any, status: int = 200) -> Response:
    return Response(orjson.dumps(body), status, media_type="application/json")
