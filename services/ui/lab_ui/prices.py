"""The proxy's price table: its rows, and what an answer cost. Knows the body of GET /v1/prices. Does not draw."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_SNAPSHOT = re.compile(r"-\d{4}-\d\d-\d\d$")  # a dated version has the price of its model


@dataclass(frozen=True)
class Price:
    """US dollars of a million tokens. `cached`: of prompt tokens from the upstream's own cache; None: as all others."""

    input: float
    output: float
    cached: float | None = None

    def cost(self, prompt: float, completion: float, cached: float = 0) -> float:
        """Dollars; `cached` of the `prompt` tokens came from the upstream's cache."""
        cheap = min(cached, prompt) if self.cached is not None else 0
        return ((prompt - cheap) * self.input + cheap * (self.cached or 0) + completion * self.output) / 1e6


def price_of(body: Mapping[str, Any], model: str) -> Price | None:
    """The price of a model by its name; None where the table has none or several upstreams have different ones."""
    found = set()
    for _, models in _upstreams(body):
        entry = models.get(model) or models.get(_SNAPSHOT.sub("", model))
        if isinstance(entry, Mapping):
            numbers = [entry.get(name) for name in ("input", "output", "cached")]
            if all(isinstance(each, int | float) for each in numbers[:2]):
                found.add(Price(numbers[0], numbers[1], numbers[2] if isinstance(numbers[2], int | float) else None))  # type: ignore[arg-type] # numbers, checked above
    return found.pop() if len(found) == 1 else None


def rows(body: Mapping[str, Any]) -> list[tuple[str, str, str, str, str, str]]:
    """Rows of the proxy's price table: model, input, cached, output, source, day of the last check."""
    found = []
    for upstream, models in _upstreams(body):
        for name, each in models.items():
            if isinstance(each, Mapping):
                shown = [f"{each[key]:g}" if isinstance(each.get(key), int | float) else "–"
                         for key in ("input", "cached", "output")]  # fmt: skip
                shown_name = f"{upstream.get('upstream', '')}: *" if name == "*" else str(name)
                source = (str(upstream.get("source") or ""), str(upstream.get("checked") or ""))
                found.append((shown_name, *shown, *source))
    return found  # type: ignore[return-value] # six columns


def _upstreams(body: Mapping[str, Any]) -> list[tuple[Mapping[str, Any], Mapping[str, Any]]]:
    """Each upstream with its models."""
    listed = body.get("upstreams")
    return [
        (each, each["models"])
        for each in (listed if isinstance(listed, list) else [])
        if isinstance(each, Mapping) and isinstance(each.get("models"), Mapping)
    ]
