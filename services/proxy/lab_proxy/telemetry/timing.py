"""Phases of the last requests, by id, for a few minutes. Knows records; no prompts, answers or keys."""

import time
from collections import OrderedDict
from typing import Any

from .record import RequestRecord

KEPT = 2000  # requests
KEPT_SECONDS = 300.0


class Timings:
    """The last requests of this process. A caller sees only those of its own tenant."""

    def __init__(self) -> None:
        self._kept: OrderedDict[tuple[str, str], tuple[float, RequestRecord, int, float]] = OrderedDict()

    def add(self, request_id: str, record: RequestRecord, status: int, seconds: float) -> None:
        """`seconds`: from the request's start to its end."""
        if len(self._kept) >= KEPT:
            self._kept.popitem(last=False)
        # Few requests are looked up, so the phases are computed only then.
        self._kept[record.tenant, request_id] = time.monotonic(), record, status, seconds

    def find(self, tenant: str, request_id: str) -> dict[str, Any] | None:
        """The timing of a request of this tenant that ended within the last 5 minutes."""
        found = self._kept.get((tenant, request_id))
        if found is None or time.monotonic() - found[0] > KEPT_SECONDS:
            return None
        return phases(*found[1:])


def phases(record: RequestRecord, status: int, seconds: float) -> dict[str, Any]:
    """The phases that the request went through, in their order, without gaps. Times in milliseconds since its start.

    `first_token` lasts until the first byte of the answer: the upstream's queue and prompt; `decode` until the end.
    For a hit, `send` is the remaining time.
    """
    started = record.began_at
    end = started + seconds
    marks = [("guards", record.read_at), ("plan", record.planned_at), ("redis", record.looked_up_at)]
    called = bool(record.calls)
    if record.ttft is not None and called:
        marks += [("first_token", started + record.ttft), ("decode", end)]
    else:
        marks.append(("upstream" if called else "send", end))
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


def _ms(seconds: float) -> float:
    return round(seconds * 1000, 3)
