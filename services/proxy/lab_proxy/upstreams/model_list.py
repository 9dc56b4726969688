"""The model list: ids, kinds, states and revisions of the model service, polled, and updated by every answer."""

import asyncio
import logging
import time
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from ..errors import ProxyError, UpstreamDown
from ..tasks import end, supervise
from .failover import UpstreamPool
from .routes import usable

log = logging.getLogger("lab_proxy.models")

ROUTING = ("kind", "revision", "context", "state")  # fields of an entry on which a plan depends
LIST_SECONDS = 1.0  # timeout for the list of models; the next one is for a remote server
ELSEWHERE_LIST_SECONDS, ELSEWHERE_POLL_SECONDS, ELSEWHERE_RETRY_SECONDS = 10.0, 60.0, 5.0
MAX_REFRESHES = 3  # between two polls, because callers may invent any number of names
OPENAPI_SECONDS = 5.0  # timeout for its OpenAPI document
OPERATE_SECONDS = 10.0  # timeout for the model service's answer to an operator


class ModelList:
    """The model service's models by id, polled: a redeploy is noticed within the interval. A part."""

    def __init__(self, upstreams: UpstreamPool, interval: float) -> None:
        self._upstreams = upstreams
        self._interval = interval
        self._task: asyncio.Task[None] | None = None
        self.entries: dict[str, dict[str, Any]] = {}  # replaced as a whole, so that its identity is its version
        self._known_since: dict[str, float] = {}  # model -> time.time() at which its current revision was first seen
        self._refreshes = 0  # since the last poll
        self._described: dict[str, Any] | None = None  # the service's OpenAPI document, since the last poll
        self._reported: list[dict[str, Any]] = []  # models by the last refresh, those that are still loading too
        self.generation = 0  # grows when the entries change: cached plans become invalid

    async def start(self) -> None:
        await self._read()
        self._task = supervise("local-models", self._poll)

    async def stop(self) -> None:
        await end(self._task)

    def observe_revision(self, model: str, revision: str | None, began: float) -> None:
        """An answer came from this revision: the next request's key contains it, unless the call began (time.time())
        before the current revision was known, and so may be a late answer of an older one."""
        entry = self.entries.get(model)
        late = began < self._known_since.get(model, 0.0)
        if entry is not None and revision and entry.get("revision") != revision and not late:
            self._known_since[model] = time.time()
            self.entries = {**self.entries, model: {**entry, "revision": revision}}
            self.generation += 1

    async def ready(self) -> dict[str, Any]:
        """`state` (up, loading, down) with the service's own report, or with advice."""
        try:
            if not self._upstreams.model_config.native:  # it has no /ready: its list of models tells as much
                if self._elsewhere and self.entries:
                    status = 200  # it was read within a minute, and a page that is asked often must not ask it as often
                else:
                    status, _ = await self._upstreams.ask_model("/v1/models", self._list_seconds)
                models = [{"id": model, "state": "ready"} for model in self.entries]
                if status == 200:
                    return {"state": "up", "models": models}
                return {"state": "down", "models": models, "detail": f"/v1/models answered {status}"}
            status, answer = await self._upstreams.ask_model("/ready", 2.0)
        except ProxyError as error:
            return {"state": "down", "detail": error.message}
        if not isinstance(answer, dict):
            return {"state": "down", "detail": f"/ready answered {status} without the model service's report"}
        state = "up" if status == 200 else "loading" if answer.get("status") == "loading" else "down"
        listed = answer.get("models")
        answer["models"] = [each for each in listed if _is_listed(each)] if isinstance(listed, list) else []
        known = {name: entry.get("state", "ready") for name, entry in self.entries.items()}
        if any(each.get("state") == "ready" != known.get(each["id"]) for each in answer["models"]):
            await self._read()  # a caller that sees it ready may send requests at once
        return {"state": state, **answer}

    async def refresh(self, model: str) -> None:
        """Read the list now, unless it was read a few times since the last poll. Raises UpstreamDown, with the reason,
        if the service has `model` but cannot serve it."""
        if self._refreshes < MAX_REFRESHES:
            self._refreshes += 1
            await self._read()
            if model in self.entries and usable(self.entries[model]):
                return
            self._reported = (await self.ready()).get("models", [])
        for each in self._reported:
            if each.get("id") == model and each.get("state") != "ready":
                detail = f" ({each['detail']})" if each.get("detail") else ""
                why = f"`{model}` is {each.get('state')}{detail}: /status shows its state, `make logs` the cause."
                raise UpstreamDown(why, param="model", headers={"retry-after": "2"})

    async def operate(self, action: str, model: str) -> tuple[int, Any]:
        """Let the model service `load`, `unload` or `add` a model. Returns status and body of its answer. Raises
        UpstreamDown, UpstreamTimeout or UpstreamBroken."""
        answer = await self._upstreams.ask_model(f"/models/{action}", OPERATE_SECONDS, {"model": model})
        await self._read()
        return answer

    async def openapi(self) -> dict[str, Any]:
        """The model service's OpenAPI document, read once between two polls; empty if there is none."""
        if self._described is None:
            found: Any = None
            with suppress(ProxyError):
                if self._upstreams.model_config.native:
                    _, found = await self._upstreams.ask_model("/openapi.json", OPENAPI_SECONDS)
            self._described = found if isinstance(found, dict) and isinstance(found.get("paths"), dict) else {}
        return self._described

    @property
    def _elsewhere(self) -> bool:
        """Whether the models are those of a remote server, which should not be polled every second."""
        config = self._upstreams.model_config
        return not config.native and config.key is not None

    @property
    def _list_seconds(self) -> float:
        return ELSEWHERE_LIST_SECONDS if self._elsewhere else LIST_SECONDS

    async def _poll(self) -> None:
        while True:
            if self._elsewhere:
                await asyncio.sleep(ELSEWHERE_POLL_SECONDS if self.entries else ELSEWHERE_RETRY_SECONDS)
            else:
                await asyncio.sleep(self._interval if self.entries else min(0.3, self._interval))
            self._refreshes, self._described = 0, None
            await self._read()

    async def _read(self) -> None:
        asked = time.time()
        try:
            status, answer = await self._upstreams.ask_model("/v1/models", self._list_seconds)
            if status != 200 and self._elsewhere:
                hint = ": check PROXY_OPENAI_API_KEY" if status in (401, 403) else ""
                log.warning("the upstream's list of models cannot be read: it answered %s%s", status, hint)
            entries = self.entries
            if status == 200:
                entries = {entry["id"]: entry for entry in answer["data"] if _is_listed(entry)}
                known = {name: self._known_since[name] for name in entries if name in self._known_since}
                for name, entry in entries.items():
                    if (before := self.entries.get(name)) and before.get("revision") != entry.get("revision"):
                        if known.get(name, 0.0) > asked:  # an answer came while the list was under way
                            entries[name] = entry | {"revision": before.get("revision")}
                        else:
                            known[name] = time.time()
                self._known_since = known
            if entries != self.entries:
                changed = _routing(entries) != _routing(self.entries)
                self.entries = entries
                self.generation += changed
        except (ProxyError, KeyError, TypeError) as error:
            log.debug("the model list cannot be read: %s", error)


def _is_listed(entry: Any) -> bool:
    """An object with an id, whose fields that are read are texts."""
    texts = [entry.get(field) for field in ("id", "kind", "revision", "state")] if isinstance(entry, dict) else [None]
    return bool(texts[0]) and all(isinstance(text, str | None) for text in texts)


def _routing(entries: Mapping[str, Mapping[str, Any]]) -> dict[str, list[Any]]:
    return {name: [entry.get(field) for field in ROUTING] for name, entry in entries.items()}
