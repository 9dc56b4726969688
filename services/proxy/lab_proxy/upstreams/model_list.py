"""The model service's ids, kinds and revisions, as it tells them: read in the background, corrected by every answer."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

from ..errors import ProxyError, UpstreamDown
from .client import UpstreamPool

log = logging.getLogger("lab_proxy.local")


class ModelList:
    """The model service's entries by id, read in the background: a redeploy is known within the poll's interval."""

    def __init__(self, upstreams: UpstreamPool, interval: float) -> None:
        self._upstreams = upstreams
        self._interval = interval
        self._task: asyncio.Task[None] | None = None
        self.entries: dict[str, dict[str, Any]] = {}  # replaced as a whole, so that others may hold on to it
        self.generation = 0  # grows when the entries differ: what was decided by others is decided anew

    async def start(self) -> None:
        await self._read()
        self._task = asyncio.get_running_loop().create_task(self._watch(), name="local-models")

    async def stop(self) -> None:
        if self._task:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    def observe_revision(self, model: str, revision: str | None) -> None:
        """An answer carried this revision: the next request is keyed on it."""
        entry = self.entries.get(model)
        if entry is not None and revision and entry.get("revision") != revision:
            self.entries = {**self.entries, model: {**entry, "revision": revision}}
            self.generation += 1

    async def ready(self) -> dict[str, Any]:
        """`state` (up, loading, down) with the service's own report, or with what to do."""
        try:
            status, said = await self._upstreams.model_service.get_json("/ready", 2.0)
        except ProxyError as error:
            return {"state": "down", "detail": error.message}
        if not isinstance(said, dict):
            return {"state": "down", "detail": f"/ready answered {status} with something unknown"}
        state = "up" if status == 200 else "loading" if said.get("status") == "loading" else "down"
        if any(each["state"] == "ready" and each["id"] not in self.entries for each in said.get("models", ())):
            await self._read()  # whoever hears that it is up may ask at once
        return {"state": state, **said}

    async def refresh(self, model: str) -> None:
        """Read the ids now. Raises UpstreamDown where the service has `model` but does not serve it yet."""
        await self._read()
        if model in self.entries:
            return
        for each in (await self.ready()).get("models", ()):
            if each.get("id") == model and each.get("state") != "ready":
                raise UpstreamDown(
                    f"`{model}` is {each.get('state')}: /status tells when it is up, `make logs` why it is not.",
                    param="model",
                    headers={"retry-after": "2"},
                )

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(self._interval if self.entries else min(0.3, self._interval))
            await self._read()

    async def _read(self) -> None:
        try:
            status, said = await self._upstreams.model_service.get_json("/v1/models", 1.0)
            entries = {entry["id"]: entry for entry in said["data"]} if status == 200 else self.entries
            if entries != self.entries:
                self.entries = entries
                self.generation += 1
        except (ProxyError, KeyError, TypeError) as error:
            log.debug("the model service's ids are not to be had: %s", error)
