"""Phases of the running and the last requests, by id, for a few minutes. Knows records; no prompts, answers or keys."""

import time
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

from .record import RequestRecord, UpstreamCall

KEPT = 2000  # requests
KEPT_SECONDS = 300.0
OF_UPSTREAM = {"first_token", "decode", "upstream"}  # phases that the model service reports in more detail


class Timings:
    """The running and the last requests of this process. A caller sees only those of its own tenant."""

    def __init__(self) -> None:
        self._running: dict[tuple[str, str], RequestRecord] = {}
        self._kept: OrderedDict[tuple[str, str], tuple[float, RequestRecord, int, float]] = OrderedDict()

    def begin(self, request_id: str, record: RequestRecord) -> None:
        """A request whose answer is not a copy in this process: it may run for a while."""
        self._running[record.tenant, request_id] = record

    def end(self, request_id: str, record: RequestRecord, status: int, seconds: float) -> None:
        """`seconds`: from the request's start to its end."""
        key = record.tenant, request_id
        self._running.pop(key, None)
        if len(self._kept) >= KEPT:
            self._kept.popitem(last=False)
        # Few requests are looked up, so the phases are computed only then.
        self._kept[key] = time.monotonic(), record, status, seconds

    def find(self, tenant: str, request_id: str) -> tuple[dict[str, Any], UpstreamCall | None] | None:
        """The timing of a request of this tenant that runs or ended within the last 5 minutes, and its last call."""
        record = self._running.get((tenant, request_id))
        if record is not None:
            return phases(record, None, time.perf_counter() - record.began_at), record.call
        found = self._kept.get((tenant, request_id))
        if found is None or time.monotonic() - found[0] > KEPT_SECONDS:
            return None
        return phases(*found[1:]), found[1].call


def phases(record: RequestRecord, status: int | None, seconds: float) -> dict[str, Any]:
    """The phases that the request went through, in their order, without gaps. Times in milliseconds since its start.

    `first_token` lasts until the first byte of the answer: the upstream's queue and prompt; `decode` until the end.
    For a hit, `send` is the remaining time. Without `status` the request runs, and its last phase lasts until now.
    """
    started = record.began_at
    end = started + seconds
    marks = [("guards", record.read_at), ("plan", record.planned_at), ("redis", record.looked_up_at)]
    called = bool(record.calls) or record.call is not None
    if called and record.ttft is not None:
        marks += [("first_token", started + record.ttft), ("decode", end)]
    elif called:
        marks.append(("upstream", end))
    elif status is not None:
        marks.append(("send", end))
    found, before = [], started
    for name, at in marks:
        if at:
            at = min(max(at, before), end)  # noqa: PLW2901 - phases do not overlap
            found.append({"name": name, "start_ms": _ms(before - started), "ms": _ms(at - before)})
            before = at
    return {
        "status": status,
        "cache": record.cache,
        "model": record.model,
        "total_ms": _ms(seconds),
        "ttft_ms": None if record.ttft is None else _ms(record.ttft),
        "upstream_calls": len(record.calls),
        "phases": found,
    }


def with_model(timing: Mapping[str, Any], reported: Any) -> dict[str, Any]:
    """The timing with the model service's own phases in place of the upstream's: `prepare`, `queue`, `prefill`,
    `decode`. Unchanged if `reported` has another shape.

    `network` before them is what they leave of the time until the first token, of JSON that of the whole call. A
    stream's `decode` is the proxy's own: it lasts until the caller has the last token.
    """
    listed = reported.get("phases") if isinstance(reported, dict) else None
    parts = [part for each in listed if (part := _part(each))] if isinstance(listed, list) else []
    before = [each for each in timing["phases"] if each["name"] not in OF_UPSTREAM]
    upstream = [each for each in timing["phases"] if each["name"] in OF_UPSTREAM]
    if not upstream or not parts or len(parts) < len(listed or ()):
        return dict(timing)
    replaced, *kept = upstream
    if kept:
        parts = [part for part in parts if part[0] != "decode"]
    at, left = replaced["start_ms"], replaced["ms"]
    found = []
    for name, length in [("network", max(0.0, left - sum(length for _, length in parts))), *parts]:
        length = min(length, left)  # noqa: PLW2901 - clocks of two processes: phases do not pass their call's end
        found.append({"name": name, "start_ms": round(at, 3), "ms": round(length, 3)})
        at, left = at + length, left - length
    return dict(timing) | {"phases": [*before, *found, *kept]}


def _part(phase: Any) -> tuple[str, float] | None:
    if not isinstance(phase, dict):
        return None
    name, length = phase.get("name"), phase.get("ms")
    return (name, length) if isinstance(name, str) and isinstance(length, int | float) and length >= 0 else None


def _ms(seconds: float) -> float:
    return round(seconds * 1000, 3)
