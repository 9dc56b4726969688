"""The table of sums: compares the client's counts with those of proxy, model and ledger for the same run.

The client's counts are the reference. A request whose outcome the client cannot know (timeout, broken stream, abandoned
stream) may or may not be in the other counts, so it widens the allowed range; without such requests all sums must be
equal.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from .counters import Counters, Counts
from .record import Record

SOURCES = {
    "hit": "cache",
    "stale": "cache",
    "collapsed": "collapsed",
}  # cache state -> the proxy's label `source`; others: upstream
# Prompt tokens of the chat template before the question, which all prompts share. SmolLM2 has 27.
TEMPLATE_TOKENS = 48


@dataclass(frozen=True)
class Expected:
    """Promises of the workload. `hits`: share of answers without an upstream call, and its standard deviation."""

    cold: bool = False
    once: bool = False
    fetches: int | None = None  # number of upstream calls that the questions need
    hits: tuple[float, float] | None = None


@dataclass(frozen=True)
class Sum:
    """One row. `values`: side -> number, None if that side has no such count. Values from `low` to `high` are right."""

    name: str
    values: dict[str, float | None]
    low: float
    high: float
    detail: str = ""

    @property
    def known(self) -> bool:
        return any(value is not None for side, value in self.values.items() if side != "client")

    @property
    def holds(self) -> bool:
        others = [value for side, value in self.values.items() if side != "client" and value is not None]
        return all(self.low <= value <= self.high for value in others)

    def as_dict(self) -> dict[str, Any]:
        high = None if math.isinf(self.high) else self.high  # JSON has no infinity
        return {"name": self.name, "values": self.values, "low": self.low, "high": high, "known": self.known,
                "holds": self.holds, "detail": self.detail}  # fmt: skip


@dataclass
class Table:
    rows: list[Sum] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)  # counts that could not be compared, with the reason

    @property
    def holds(self) -> bool:
        return all(row.holds for row in self.rows)

    def add(self, name: str, client: float, spread: float = 0, **others: float | None) -> None:
        """Add a row. The others may count up to `spread` more than the client."""
        self.rows.append(Sum(name, {"client": client, **others}, client, client + spread))


def compare(records: Sequence[Record], unfinished: int, counted: Counters, expected: Expected) -> Table:
    """The table of a run. `unfinished`: requests cut off at its end. `counted`: difference of two readings."""
    table = Table(notes=[f"not compared: {why}" for why in dict.fromkeys(counted.missing)])
    proxy, model, ledger = counted.proxy, counted.model, counted.ledger
    fine = [each for each in records if not each.error and not each.abandoned and 200 <= each.status < 300]
    reached = [each for each in records if each.status]
    # 1. Requests. One without a response possibly did not reach the proxy.
    unknown = len(records) - len(reached) + unfinished
    vague = len(records) - len(fine) + unfinished
    refused = sum(400 <= each.status < 500 for each in records)
    table.add("requests", len(reached), unknown, proxy=_get(proxy, "requests"))
    if ledger is not None:
        table.add("requests charged", len(fine), vague, ledger=ledger["requests"])
    # 2. By cache state.
    states = Counter(each.state for each in reached)
    named = {name.partition(".")[2] for name in proxy or () if name.startswith("requests.")}
    for state in sorted(set(states) | named):
        of_ledger = {"hit": "hits", "collapsed": "collapsed"}.get(state)  # its hits include stale ones
        # An error has no Cache-Status, so the client cannot know the state under which the proxy counts it.
        low, high = (0, states["none"]) if state == "none" else (states[state], states[state] + states["none"])
        values = {"client": float(states[state]), "proxy": _get(proxy, f"requests.{state}")}
        table.rows.append(Sum(f"requests: {state}", values, low, high + unknown))
        if of_ledger and ledger is not None:
            count = sum(SOURCES.get(each.state) == SOURCES[state] for each in fine)
            table.add(f"charged: {state}", count, vague, ledger=ledger[of_ledger])
    # 3. Calls of the model. The proxy counts each attempt, including retries.
    forwarded = sum(each.state not in {"hit", "stale", "collapsed", "none"} for each in reached)
    calls = _get(proxy, "upstream_calls")
    spread = unknown + states["none"] + states["stale"] + (_get(proxy, "retries") or 0)
    table.add("calls of the model", forwarded, spread, proxy=calls, model=_get(model, "requests"))
    # 4. Tokens, by their source.
    for kind in ("prompt", "completion"):
        sums: Counter[str] = Counter()
        for each in fine:
            sums[SOURCES.get(each.state, "upstream")] += getattr(each, f"{kind}_tokens")
        for source in ("upstream", "cache", "collapsed"):
            name = {"upstream": "", "cache": "hit_", "collapsed": "collapsed_"}[source] + f"{kind}_tokens"
            sides = {"proxy": _get(proxy, f"{kind}_tokens.{source}"), "ledger": _get(ledger, name)}
            if source == "upstream":
                sides["model"] = _get(model, f"{kind}_tokens")
            if sums[source] or any(sides.values()):
                table.add(f"{kind} tokens: {source}", sums[source], math.inf if vague - refused > 0 else 0, **sides)
    # 5. No request may still run.
    table.add("in flight at the end", 0, proxy=counted.in_flight, model=counted.running)
    # 6. What the workload promises.
    _promises(table, fine, len(records) - len(fine), expected)
    for name in counted.fell:
        table.rows.append(Sum(f"fell: {name}", {"client": 0, "server": -1}, 0, 0, "a counter was reset"))
    return table


def _promises(table: Table, fine: Sequence[Record], failed: int, expected: Expected) -> None:
    states = Counter(each.state for each in fine)
    served = states["hit"] + states["collapsed"]
    if expected.cold:
        table.add("answers from the cache (a cold run)", 0, answers=served)
        cached = max((each.cached_tokens for each in fine), default=0)
        table.rows.append(Sum("prefix-cache tokens of one prompt (a cold run)", {"client": 0, "answers": cached}, 0,
                              TEMPLATE_TOKENS, "the chat template is shared"))  # fmt: skip
    if expected.once and expected.fetches is not None:
        fetched = sum(each.state not in {"hit", "collapsed"} for each in fine)
        # If a single-flight leader fails, its question is fetched again.
        table.add("fetched once each", expected.fetches, failed, answers=fetched)
    if expected.hits is not None and fine:
        mean, deviation = expected.hits
        reach = 3 * deviation
        values: dict[str, float | None] = {"client": mean, "answers": served / len(fine)}
        table.rows.append(Sum("hit ratio, collapsed ones included", values, max(mean - reach, 0), min(mean + reach, 1),
                              "expected ± 3 standard deviations"))  # fmt: skip


def _get(counts: Counts | None, name: str) -> float | None:
    return None if counts is None else counts.get(name, 0.0)
