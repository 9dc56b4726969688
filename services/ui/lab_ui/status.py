"""The status page: every service, as the proxy sees it, drawn anew every few seconds.

Knows the shape of the proxy's GET /status and nothing of how it is made. With the proxy gone it says so, and that
model and redis can only be asked through it.
"""

from __future__ import annotations

import datetime as dt
import platform
from collections.abc import Mapping
from typing import Any, Literal

import streamlit as st

from . import __version__
from .answers import Fault, look
from .chat import plain
from .settings import Settings
from .texts import Texts

State = Literal["up", "down", "loading", "unknown"]
COLOURS: dict[State, Literal["green", "red", "orange", "gray"]] = {
    "up": "green",
    "down": "red",
    "loading": "orange",
    "unknown": "gray",
}
ICONS = {"up": "check_circle", "down": "error", "loading": "hourglass_top", "unknown": "help"}


def page(settings: Settings, words: Texts) -> None:
    st.title(words("status.title"), anchor=False)
    st.caption(words("status.intro", seconds=settings.refresh_seconds))
    st.fragment(_live, run_every=settings.refresh_seconds)(settings, words)


def _live(settings: Settings, words: Texts) -> None:
    """One look at the lab."""
    seen = look(settings, "/status")
    report: Mapping[str, Any] = {} if isinstance(seen, Fault) else seen
    proxy, redis, model, cache = (_part(report, name) for name in ("proxy", "redis", "model", "cache"))
    states: dict[str, State] = {"ui": "up", "proxy": "up" if report else "down"}
    states |= {name: _state(part) if report else "unknown" for name, part in (("redis", redis), ("model", model))}

    if all(state == "up" for state in states.values()):
        st.success(words("status.all_up"), icon=":material/check_circle:")
    else:
        st.warning(words("status.some_down"), icon=":material/error:")

    # In the order of a request.
    versions = _part(model, "versions")
    _service("ui", states, words, {"version": __version__, "address": f"{settings.host}:{settings.port}"})
    _service("proxy", states, words, _proxy_facts(settings, proxy, words), seen if isinstance(seen, Fault) else None)
    _service("redis", states, words, _redis_facts(redis))
    _service("model", states, words, {"version": versions.get("lab_model"), "device": model.get("device")})

    if model.get("models"):
        st.subheader(words("status.models"), anchor=False)
        for entry in model["models"]:
            _model(entry, words)
    if cache:
        st.subheader(words("status.cache"), anchor=False)
        _cache(cache, words)
    if versions or report:
        st.subheader(words("status.versions"), anchor=False)
        here = {"lab_ui": __version__, "streamlit": st.__version__, "ui python": platform.python_version()}
        there = {"lab_proxy": proxy.get("version"), "proxy python": proxy.get("python"), "redis": redis.get("version")}
        of_model = {"model python" if name == "python" else str(name): value for name, value in versions.items()}
        known = {name: value for name, value in (here | there | of_model).items() if value}
        st.caption(" · ".join(f"{plain(name)} {_span(value)}" for name, value in known.items()))


def _service(
    name: str, states: Mapping[str, State], words: Texts, facts: Mapping[str, Any], fault: Fault | None = None
) -> None:
    """One card: name, state, what it is for, what is known, and when it is not well what to do."""
    state = states[name]
    with st.container(border=True, gap="xsmall"):
        with st.container(horizontal=True, vertical_alignment="center"):
            st.markdown(f"**{name}**", width="content")
            st.badge(words(f"status.{state}"), icon=f":material/{ICONS[state]}:", color=COLOURS[state])
        st.caption(words(f"status.{name}"))
        known = [
            f"{words(f'status.facts.{fact}')} {value if fact == 'upstreams' else _span(value)}"
            for fact, value in facts.items()
            if value and fact != "detail"
        ]
        if known and state != "unknown":
            st.markdown(f":small[{' · '.join(known)}]")
        if state == "unknown":
            st.markdown(words("status.through_proxy"))
        if facts.get("detail") and state != "up":
            st.caption(_span(str(facts["detail"])[:300]))
        if fault and fault.kind != "proxy_down":
            st.markdown(words(f"faults.{fault.kind}.what"))
        if state == "down":
            st.markdown(words(f"status.do.{name}"))
        if state == "loading":
            st.markdown(words("status.do.loading"))


def _proxy_facts(settings: Settings, proxy: Mapping[str, Any], words: Texts) -> dict[str, Any]:
    started = proxy.get("started")
    since = ""
    if isinstance(started, int | float):
        since = dt.datetime.fromtimestamp(started, dt.UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    upstreams = [
        words("status.facts.configured" if upstream.get("configured") else "status.facts.not_configured",
              name=_span(upstream.get("name")))
        for upstream in proxy.get("upstreams") or [] if isinstance(upstream, Mapping)
    ]  # fmt: skip
    address = settings.proxy_url
    return {"version": proxy.get("version"), "address": address, "since": since, "upstreams": ", ".join(upstreams)}


def _redis_facts(redis: Mapping[str, Any]) -> dict[str, Any]:
    used, latency = redis.get("used_memory_bytes"), redis.get("latency_ms")
    return {
        "server": redis.get("server"),
        "version": redis.get("version"),
        "memory": f"{used / 2**20:,.1f} MiB" if isinstance(used, int | float) else None,
        "latency": f"{latency:,.1f} ms" if isinstance(latency, int | float) else None,
        "detail": redis.get("detail"),
    }


def _model(entry: Mapping[str, Any], words: Texts) -> None:
    kind = str(entry.get("kind", ""))
    state = str(entry.get("state", "unknown"))
    shown: State = "up" if state == "ready" else "loading" if state == "loading" else "down"
    with st.container(border=True, gap="xsmall"):
        with st.container(horizontal=True, vertical_alignment="center"):
            st.markdown(_span(entry.get("id")), width="content")
            st.badge(words(f"status.{shown}"), icon=f":material/{ICONS[shown]}:", color=COLOURS[shown])
        st.caption(
            words(
                "status.model_line",
                kind=words(f"status.kinds.{kind}") if f"status.kinds.{kind}" in words else _span(kind),
                context=f"{entry['context']:,}" if isinstance(entry.get("context"), int) else "?",
                revision=_span(str(entry.get("revision") or "?")[:12]),
            )
        )
        if entry.get("detail") and shown != "up":
            st.caption(_span(str(entry["detail"])[:300]))


def _cache(cache: Mapping[str, Any], words: Texts) -> None:
    if not cache.get("enabled", True):
        st.caption(words("status.cache_off"))
        return
    hits, misses = int(cache.get("hits") or 0), int(cache.get("misses") or 0)
    with st.container(horizontal=True):
        st.metric(words("status.hits"), f"{hits:,}")
        st.metric(words("status.misses"), f"{misses:,}")
        st.metric(words("status.ratio"), f"{hits / (hits + misses):.0%}" if hits + misses else "–")
        if isinstance(cache.get("entries"), int):
            st.metric(words("status.entries"), f"{cache['entries']:,}")


def _part(report: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    part = report.get(name)
    return part if isinstance(part, Mapping) else {}


def _state(part: Mapping[str, Any]) -> State:
    state = part.get("state")
    return "up" if state == "up" else "loading" if state == "loading" else "down"


def _span(value: object) -> str:
    """Untrusted text as a Markdown code span."""
    return "`" + str(value).replace("`", "'").replace("\n", " ") + "`"
