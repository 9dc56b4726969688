"""The model list: ids, kinds and revisions of the model service, polled, and updated by every answer."""

import asyncio
import logging
from typing import Any

from ..errors import ProxyError, UpstreamDown
from ..tasks import end
from .failover import UpstreamPool

log = logging.getLogger("lab_proxy.models")


class ModelList:
    """The model service's models by id, polled: a redeploy is noticed within the interval. A part."""

    def __init__(self, upstreams: UpstreamPool, interval: float) -> None:
        self._upstreams = upstreams
        self._interval = interval
        self._task: asyncio.Task[None] | None = None
        self.entries: dict[str, dict[str, Any]] = {}  # replaced as a whole, so that its identity is its version
        self.generation = 0  # grows when the entries change: cached plans become invalid

    async def start(self) -> None:
        await self._read()
        self._task = asyncio.create_task(self._poll(), name="local-models")

    async def stop(self) -> None:
        await end(self._task)

    def observe_revision(self, model: str, revision: str | None) -> None:
        """An answer came from this revision: the next request's key contains it."""
        entry = self.entries.get(model)
        if entry is not None and revision and entry.get("revision") != revision:
            self.entries = {**self.entries, model: {**entry, "revision": revision}}
            self.generation += 1

    async def ready(self) -> dict[str, Any]:
        """`state` (up, loading, down) with the service's own report, or with advice."""
        try:
            if not self._upstreams.model_config.native:  # it has no /ready: its list of models tells as much
                status, _ = await self._upstreams.ask_model("/v1/models", 2.0)
                models = [{"id": model, "state": "ready"} for model in self.entries]
                return {"state": "up" if status == 200 else "down", "models": models}
            status, answer = await self._upstreams.ask_model("/ready", 2.0)
        except ProxyError as error:
            return {"state": "down", "detail": error.message}
        if not isinstance(answer, dict):
            return {"state": "down", "detail": f"/ready answered {status} with something unknown"}
        state = "up" if status == 200 else "loading" if answer.get("status") == "loading" else "down"
        if any(each["state"] == "ready" and each["id"] not in self.entries for each in answer.get("models", ())):
            await self._read()  # a caller that sees it ready may send requests at once
        return {"state": state, **answer}

    async def refresh(self, model: str) -> None:
        """Read the list now. Raises UpstreamDown if the service has `model` but does not serve it yet."""
        await self._read()
        if model in self.entries:
            return
        for each in (await self.ready()).get("models", ()):
            if each.get("id") == model and each.get("state") != "ready":
                why = f"`{model}` is {each.get('state')}: /status tells when it is up, `make logs` why it is not."
                raise UpstreamDown(why, param="model", headers={"retry-after": "2"})

    async def _poll(self) -> None:
        while True:
            await asyncio.sleep(self._interval if self.entries else min(0.3, self._interval))
            await self._read()

    async def _read(self) -> None:
        try:
            status, answer = await self._upstreams.ask_model("/v1/models", 1.0)
            entries = {entry["id"]: entry for entry in answer["data"]} if status == 200 else self.entries
            if entries != self.entries:
                self.entries = entries
                self.generation += 1
        except (ProxyError, KeyError, TypeError) as error:
            log.debug("the model list cannot be read: %s", error)
