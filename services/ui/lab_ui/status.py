"""The state of every service, from the proxy's GET /status. Without a proxy, redis and model are unknown.

Knows the format of that body and tolerates others. Knows nothing of HTTP and does not draw; app_pages/status.py does.
"""

from __future__ import annotations

import datetime as dt
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from typing import Any, Literal

from . import __version__
from .answer import Fault
from .formats import number, percent, size
from .settings import Settings
from .texts import Texts
from .untrusted import plain, span

State = Literal["up", "down", "loading", "unknown", "unloaded", "absent"]
# State of a model, as the model service reports it -> state as the page shows it.
MODEL_STATES: Mapping[str, State] = {
    "ready": "up", "loading": "loading", "unloaded": "unloaded", "absent": "absent", "failed": "down",
    "done": "up",
}  # fmt: skip
STREAMLIT = metadata.version("streamlit")  # read once: it is in a file
MAX_DETAIL = 300  # characters


@dataclass(frozen=True)
class Service:
    """`facts`: key of a text below `status.facts` -> Markdown. `detail`: the proxy's message about a failure."""

    name: str
    state: State
    facts: Mapping[str, str]
    detail: str = ""
    fault: Fault | None = None

    def advice(self, texts: Texts) -> list[str]:
        """Meaning of the state and what to do, in Markdown; empty if the service is up."""
        lines = [texts("status.through_proxy")] if self.state == "unknown" else []
        if self.fault and self.fault.kind != "proxy_down":
            lines.append(texts(f"faults.{self.fault.kind}.what"))
        if self.state == "down":
            lines.append(texts(f"status.do.{self.name}"))
        if self.state == "loading":
            lines.append(texts("status.do.loading"))
        return lines


@dataclass(frozen=True)
class Model:
    """A model of the model service. `line`: kind, context length and revision. `facts`: size, languages and licence.

    `step`: current step of its loading; `share`: progress from 0 to 1. `action`: `load` or `unload`, empty if neither.
    `queue`: its replicas of Ray Serve, running and waiting requests.
    """

    id: str
    state: State
    line: str
    detail: str = ""
    facts: str = ""
    step: str = ""
    share: float | None = None
    action: str = ""
    queue: str = ""

    @property
    def name(self) -> str:
        """The id as Markdown."""
        return span(self.id)


class Report:
    """One body of GET /status, or the Fault of the request."""

    def __init__(self, seen: Mapping[str, Any] | Fault, settings: Settings, texts: Texts) -> None:
        self._seen: Mapping[str, Any] = {} if isinstance(seen, Fault) else seen
        self._fault = seen if isinstance(seen, Fault) else None
        self._settings = settings
        self._texts = texts

    @property
    def fault(self) -> Fault | None:
        return self._fault

    @property
    def services(self) -> list[Service]:
        """In the order in which a request meets them."""
        settings, proxy, redis, model = self._settings, self._part("proxy"), self._part("redis"), self._part("model")
        ui = {"version": span(__version__), "address": span(f"{settings.host}:{settings.port}")}
        model_facts = {"version": self._part("model", "versions").get("lab_model"), "device": model.get("device")}
        return [
            Service("ui", "up", ui),
            Service("proxy", "up" if self._seen else "down", self._proxy_facts(proxy), fault=self._fault),
            Service("redis", self._state(redis), _redis_facts(redis), _detail(redis)),
            Service("model", self._state(model), _spans(model_facts)),
        ]

    @property
    def models(self) -> list[Model]:
        entries = self._part("model").get("models") or []
        return [_model(entry, self._texts) for entry in entries if isinstance(entry, Mapping)]

    @property
    def adding(self) -> Model | None:
        """The model that is being downloaded and added, or that could not be added."""
        adding = self._part("model", "adding")
        return _model({"id": adding.get("name"), **adding}, self._texts) if adding else None

    @property
    def cache(self) -> dict[str, str] | None:
        """Key of a text below `status` -> figure; empty if the cache is off, None if the proxy reports none."""
        cache = self._part("cache")
        if not cache:
            return None
        if not cache.get("enabled", True):
            return {}
        hits, misses = int(cache.get("hits") or 0), int(cache.get("misses") or 0)
        ratio = percent(hits / (hits + misses)) if hits + misses else "–"
        figures = {"hits": number(hits), "misses": number(misses), "ratio": ratio}
        if isinstance(cache.get("entries"), int):
            figures["entries"] = number(cache["entries"])
        return figures

    @property
    def versions(self) -> str:
        """Versions of all parts, in Markdown; empty without an answer of the proxy."""
        if not self._seen:
            return ""
        proxy, of_model = self._part("proxy"), self._part("model", "versions")
        known: dict[str, Any] = {
            "lab_ui": __version__, "streamlit": STREAMLIT, "ui python": platform.python_version(),
            "lab_proxy": proxy.get("version"), "proxy python": proxy.get("python"),
            "redis": self._part("redis").get("version"),
        }  # fmt: skip
        known |= {"model python" if name == "python" else str(name): value for name, value in of_model.items()}
        return " · ".join(f"{plain(name)} {span(value)}" for name, value in known.items() if value)

    def _part(self, *names: str) -> Mapping[str, Any]:
        part: Any = self._seen
        for name in names:
            part = part.get(name)
            if not isinstance(part, Mapping):
                return {}
        return part  # type: ignore[no-any-return] # a Mapping, checked above

    def _state(self, part: Mapping[str, Any]) -> State:
        state = part.get("state")
        if not self._seen:
            return "unknown"
        return "up" if state == "up" else "loading" if state == "loading" else "down"

    def _proxy_facts(self, proxy: Mapping[str, Any]) -> dict[str, str]:
        started = proxy.get("started")
        since = None
        if isinstance(started, int | float):
            since = dt.datetime.fromtimestamp(started, dt.UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
        facts = _spans({"version": proxy.get("version"), "address": self._settings.proxy_url, "since": since})
        upstreams = [
            self._texts(
                "status.facts.configured" if upstream.get("configured") else "status.facts.not_configured",
                name=span(upstream.get("name")),
            )
            for upstream in proxy.get("upstreams") or []
            if isinstance(upstream, Mapping)
        ]
        return facts | ({"upstreams": ", ".join(upstreams)} if upstreams else {})


def _redis_facts(redis: Mapping[str, Any]) -> dict[str, str]:
    used, latency = redis.get("used_memory_bytes"), redis.get("latency_ms")
    return _spans(
        {
            "server": redis.get("server"),
            "version": redis.get("version"),
            "memory": f"{number(used / 2**20, 1)} MiB" if isinstance(used, int | float) else None,
            "latency": f"{number(latency, 1)} ms" if isinstance(latency, int | float) else None,
        }
    )


def _model(entry: Mapping[str, Any], texts: Texts) -> Model:
    kind, context = str(entry.get("kind", "")), entry.get("context")
    line = texts(
        "status.model_line",
        kind=texts(f"status.kinds.{kind}") if f"status.kinds.{kind}" in texts else span(kind),
        context=number(context) if isinstance(context, int) else "?",
        revision=span(str(entry.get("revision") or "?")[:12]),
    )
    shown = MODEL_STATES.get(str(entry.get("state")), "down")
    step, share = "", None
    progress = entry.get("progress")
    if shown == "loading" and isinstance(progress, Mapping):
        step = str(progress.get("what") or "")[:MAX_DETAIL]
        percent_ = progress.get("percent")
        share = max(0.0, min(1.0, percent_ / 100)) if isinstance(percent_, int | float) else None
    action = {"up": "unload", "unloaded": "load", "down": "load"}.get(shown, "") if "load" in entry else ""
    facts, queue = _facts(entry, texts), _queue(entry, texts)
    return Model(str(entry.get("id")), shown, line, _detail(entry), facts, step, share, action, queue)


def _facts(entry: Mapping[str, Any], texts: Texts) -> str:
    """Parameters, bytes on disk and in memory, languages and licence, as far as they are known. Markdown."""
    found = []
    if isinstance(count := entry.get("parameters"), int | float):
        found.append(texts("status.card.parameters", count=number(count / 1e6)))
    found += [
        texts(f"status.card.{name}", size=size(value))
        for name in ("disk_bytes", "memory_bytes")
        if isinstance(value := entry.get(name), int | float)
    ]
    if isinstance(languages := entry.get("languages"), list):
        found.append(", ".join(span(each) for each in languages[:8]))
    if isinstance(licence := entry.get("licence"), str):
        found.append(span(licence[:60]))
    return " · ".join(found)


def _queue(entry: Mapping[str, Any], texts: Texts) -> str:
    """`2 replicas · 1 running · 0 waiting`, as far as the service reports them."""
    counts = {name: entry.get(name) for name in ("replicas", "running", "waiting")}
    return " · ".join(
        texts(f"status.queue.{name}", count=number(count)) for name, count in counts.items() if isinstance(count, int)
    )


def _detail(part: Mapping[str, Any]) -> str:
    return str(part.get("detail") or "")[:MAX_DETAIL]


def _spans(facts: Mapping[str, Any]) -> dict[str, str]:
    return {name: span(value) for name, value in facts.items() if value}
