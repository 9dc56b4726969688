"""Reading the ledger: rows by day, key, owner and model, their total, and CSV. Knows redis and money; no requests."""

import csv
import io
from collections.abc import Iterable, Mapping
from contextlib import suppress
from datetime import date, timedelta
from typing import Any

import orjson

from ..redis.client import Client
from . import money

DAYS = "lab:ledger:keys:"  # + day: set of the keys with a row on it
ROWS = "lab:ledger:day:"  # + day:key: hash, [owner, upstream, model, metric] -> number
NOBODY = "-"  # key id of charges where no key is required
MAX_DAYS = 366

METRICS = (
    "requests",
    "upstream_calls", "prompt_tokens", "cached_prompt_tokens", "completion_tokens", "cost", "unpriced_calls",
    "estimated_calls",
    "hits", "hit_prompt_tokens", "hit_completion_tokens",
    "collapsed", "collapsed_prompt_tokens", "collapsed_completion_tokens",
)  # fmt: skip
"""Columns of a row. `prompt_tokens` to `estimated_calls` are of upstream calls; `cost` is pico-dollars. `hits` and
`collapsed` cost nothing: their tokens were saved."""


async def usage(
    client: Client, first: date, last: date, *, key_id: str | None = None, **equal: str | None
) -> list[dict[str, Any]]:
    """Rows from `first` to `last`, both included, sorted. `equal`: owner and model; None: any. Raises RedisError."""
    days = [(first + timedelta(days=n)).isoformat() for n in range((last - first).days + 1)]
    keys: list[tuple[str, str]] = [(day, key_id) for day in days] if key_id is not None else []
    if key_id is None:
        sets = await client.execute_all([("SMEMBERS", DAYS + day) for day in days])
        keys = [(day, each.decode()) for day, found in zip(days, sets, strict=True) for each in sorted(found)]
    rows: list[dict[str, Any]] = []
    for at in range(0, len(keys), 256):
        part = keys[at : at + 256]
        found = await client.execute_all([("HGETALL", f"{ROWS}{day}:{key}") for day, key in part])
        for (day, key), fields in zip(part, found, strict=True):
            rows += _rows(day, key, fields)
    return [row for row in rows if all(value in {None, row[name]} for name, value in equal.items())]


def _rows(day: str, key: str, fields: Mapping[bytes, bytes]) -> list[dict[str, Any]]:
    found: dict[tuple[str, str, str], dict[str, int]] = {}
    for name, value in fields.items():
        with suppress(ValueError, TypeError):  # a field that is not the ledger's
            owner, upstream, model, metric = orjson.loads(name)
            found.setdefault((owner, upstream, model), {})[metric] = int(value)
    return [
        {"day": day, "key_id": None if key == NOBODY else key, "owner": owner, "upstream": upstream, "model": model}
        | _figures({metric: sums.get(metric, 0) for metric in METRICS})
        for (owner, upstream, model), sums in sorted(found.items())
    ]


def _figures(sums: Mapping[str, int]) -> dict[str, Any]:
    """A row's numbers as the pages show them. `cost_usd` is null, not 0, if no call had a price."""
    cost = sums["cost"]
    known = cost or not sums["unpriced_calls"] or sums["unpriced_calls"] < sums["upstream_calls"]
    return {
        **{metric: sums[metric] for metric in METRICS if metric != "cost"},
        "tokens_served": sum(sums[name] for name in METRICS if name.endswith(("prompt_tokens", "completion_tokens")))
        - sums["cached_prompt_tokens"],
        "cost_usd": float(money.to_usd(cost)) if known else None,
        "cost_picodollars": cost if known else None,
        "unpriced": sums["unpriced_calls"] > 0,
    }


def total(rows: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    sums = dict.fromkeys(METRICS, 0)
    for row in rows:
        for metric in METRICS:
            sums[metric] += row["cost_picodollars"] or 0 if metric == "cost" else row[metric]
    return _figures(sums)


def as_csv(rows: list[dict[str, Any]]) -> str:
    """Rows of `usage` as CSV. Names that a spreadsheet would read as a formula are quoted."""
    columns = ["day", "key_id", "owner", "upstream", "model", *_figures(dict.fromkeys(METRICS, 0))]
    out = io.StringIO()
    writer = csv.DictWriter(out, columns)
    writer.writeheader()
    for row in rows:
        plain = {name: f"'{value}" if str(value)[:1] in "=+-@" and isinstance(value, str) else value
                 for name, value in row.items()}  # fmt: skip
        writer.writerow(
            plain | {"cost_usd": "" if row["cost_picodollars"] is None else money.shown(row["cost_picodollars"])}
        )
    return out.getvalue()
