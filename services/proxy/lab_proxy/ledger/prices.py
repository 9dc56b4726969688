"""Prices of upstream calls: one YAML file of prices per million tokens, each with its source and date.

Knows upstreams, model names and token counts. Does not know keys or owners.
"""

from __future__ import annotations

import re
from datetime import date
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, model_validator

from ..reload import read_yaml
from . import money

_SNAPSHOT = re.compile(r"-\d{4}-\d\d-\d\d$")


def _per_token(value: object) -> object:
    """USD per million tokens as integer pico-dollars per token."""
    return money.from_usd(money.parse_usd(value)) // 10**6


Price = Annotated[int, BeforeValidator(_per_token)]


class Tariff(BaseModel, extra="forbid"):
    """Pico-dollars per token."""

    input: Price
    output: Price
    cached: Price | None = None

    def cost(self, prompt: int, cached: int, completion: int) -> int:
        """Pico-dollars; `cached` of the `prompt` tokens came from the upstream's own cache."""
        cheap = min(cached, prompt)
        again = self.input if self.cached is None else self.cached
        return (prompt - cheap) * self.input + cheap * again + completion * self.output

    def in_usd(self) -> dict[str, float | None]:
        """USD per million tokens."""
        prices = {"input": self.input, "cached": self.cached, "output": self.output}
        return {name: None if each is None else each / 1e6 for name, each in prices.items()}


class ModelRow(Tariff):
    above: int | None = None
    long: Tariff | None = None
    source: str | None = None
    checked: date | None = None

    @model_validator(mode="after")
    def _both(self) -> ModelRow:
        if (self.above is None) != (self.long is None):
            raise ValueError("`above` and `long` must be given together")
        return self


class UpstreamRow(BaseModel, extra="forbid"):
    source: str
    checked: date
    every: Tariff | None = None
    models: dict[str, ModelRow] = {}


class Table(BaseModel, extra="forbid"):
    upstreams: dict[str, UpstreamRow]


class Prices:
    """The prices file. `reload` keeps the old table if the new one is faulty."""

    def __init__(self, path: Path | None = None) -> None:
        self._path = path
        self._table = read_yaml(Table, path, "ledger/prices.yaml", "PROXY_PRICES_FILE")

    def files(self) -> list[Path]:
        return [self._path] if self._path else []

    def reload(self) -> None:
        """Raises ValueError with one line that says what is wrong."""
        self._table = read_yaml(Table, self._path, "ledger/prices.yaml", "PROXY_PRICES_FILE")

    def listed(self) -> list[dict[str, Any]]:
        """The table in USD per million tokens: each upstream with its source, day of the last check, and models."""
        return [
            {
                "upstream": name,
                "source": row.source,
                "checked": row.checked.isoformat(),
                "models": {model: each.in_usd() for model, each in row.models.items()}
                | ({"*": row.every.in_usd()} if row.every else {}),
            }
            for name, row in self._table.upstreams.items()
        ]

    def cost(
        self, upstream: str, model: str, prompt: int, completion: int, *, cached: int = 0, half: bool = False
    ) -> int | None:
        """Pico-dollars, or None without a price. `half`: half price, rounded up."""
        there = self._table.upstreams.get(upstream)
        if there is None:
            return None
        row = there.models.get(model) or there.models.get(_SNAPSHOT.sub("", model))
        long = row.long if row and row.above is not None and prompt > row.above else None
        tariff = long or row or there.every
        if tariff is None:
            return None
        whole = tariff.cost(prompt, cached, completion)
        return -(-whole // 2) if half else whole
