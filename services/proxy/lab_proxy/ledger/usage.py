"""Reading the ledger: rows by day, key, owner and model, their total, and CSV. Knows redis and money; no requests."""

import csv
import io
from base64 import urlsafe_b64decode, urlsafe_b64encode
from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import date, timedelta
from typing import Any

import orjson

from ..redis.client import Client
from . import money

DAYS = "lab:ledger:keys:"  # + day: set of the keys with a row on it
ROWS = "lab:ledger:day:"  # + day:key: hash, [owner, upstream, model, metric] -> number
NOBODY = "-"  # key id of charges where no key is required
MAX_DAYS = 366
AT_ONCE = 64  # keys of a day that are read in one round trip and held in memory

METRICS = (
    "requests",
    "upstream_calls", "prompt_tokens", "cached_prompt_tokens", "completion_tokens", "cost", "unpriced_calls",
    "estimated_calls",
    "hits", "hit_prompt_tokens", "hit_completion_tokens",
    "collapsed", "collapsed_prompt_tokens", "collapsed_completion_tokens",
)  # fmt: skip
"""Columns of a row. `prompt_tokens` to `estimated_calls` are of upstream calls; `cost` is pico-dollars. `hits` and
`collapsed` cost nothing: their tokens were saved."""


@dataclass(frozen=True, slots=True)
class UsagePage:
    """One page of rows, and the sums of all rows."""

    total: dict[str, Any]
    rows: list[dict[str, Any]]
    has_more: bool  # there are rows after the last one


async def parts(
    client: Client, first: date, last: date, *, key_id: str | None = None, **equal: str | None
) -> AsyncIterator[list[dict[str, Any]]]:
    """The rows of the days `first` to `last`, both included, in sorted batches. `equal`: owner and model; None: any.
    Raises RedisError."""
    days = [(first + timedelta(days=n)).isoformat() for n in range((last - first).days + 1)]
    keys: list[tuple[str, str]] = [(day, key_id) for day in days] if key_id is not None else []
    for day in days if key_id is None else ["all"]:
        if key_id is None:
            keys = [(day, each.decode()) for each in sorted(await client.execute("SMEMBERS", DAYS + day))]
        for at in range(0, len(keys), AT_ONCE):
            some = keys[at : at + AT_ONCE]
            found = await client.execute_all([("HGETALL", f"{ROWS}{day}:{key}") for day, key in some])
            rows = [row for where, fields in zip(some, found, strict=True) for row in _rows(*where, fields)]
            yield [row for row in rows if all(value in {None, row[name]} for name, value in equal.items())]


async def usage(client: Client, first: date, last: date, **filters: str | None) -> list[dict[str, Any]]:
    """All rows, see `parts`."""
    return [row async for rows in parts(client, first, last, **filters) for row in rows]


async def usage_page(
    client: Client, first: date, last: date, *, limit: int, after: str | None = None, **filters: str | None
) -> UsagePage:
    """At most `limit` rows after the row with the id `after`, and the sums of all rows. Holds only the rows of the page
    in memory. Raises ValueError for a malformed `after`, and RedisError."""
    sums, kept, has_more = dict.fromkeys(METRICS, 0), list[dict[str, Any]](), False
    start = () if after is None else _place_of(after)
    async for rows in parts(client, first, last, **filters):
        _add(sums, rows)
        fresh = [row for row in rows if _place(row) > start]
        has_more = has_more or len(kept) + len(fresh) > limit
        kept += fresh[: limit - len(kept)]
    return UsagePage(_figures(sums), kept, has_more)


def _place(row: Mapping[str, Any]) -> tuple[str, ...]:
    """The sort key of a row."""
    return (row["day"], row["key_id"] or NOBODY, row["owner"], row["upstream"], row["model"])


def row_id(row: Mapping[str, Any]) -> str:
    """The id of a row for `after`. It does not change when rows before it are added."""
    return urlsafe_b64encode(orjson.dumps(_place(row))).decode().rstrip("=")


def _place_of(given: str) -> tuple[str, ...]:
    place = orjson.loads(urlsafe_b64decode(given.encode("ascii") + b"=" * (-len(given) % 4)))
    if not isinstance(place, list) or len(place) != 5 or not all(isinstance(part, str) for part in place):
        raise ValueError("not an id of a row")
    return tuple(place)


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
    _add(sums, rows)
    return _figures(sums)


def _add(sums: dict[str, int], rows: Iterable[Mapping[str, Any]]) -> None:
    for row in rows:
        for metric in METRICS:
            sums[metric] += row["cost_picodollars"] or 0 if metric == "cost" else row[metric]


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
