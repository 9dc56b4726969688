"""What was used and what it cost, by day, key, owner and model: whole numbers in redis that nothing evicts.

Charges are summed here and booked in one script, off the request's path. A batch that redis may or may not have
booked is sent again under its own number, which redis books once; what redis refuses goes to the spool.
"""

from __future__ import annotations

import asyncio
import contextlib
import csv
import io
import logging
import secrets
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any, Literal

import orjson
import redis.asyncio as redis

from ..keys.authentication import Identity
from ..redis.link import FAULTS
from . import money
from .disk_queue import DiskQueue, DiskQueueFull, LedgerBatch
from .prices import Prices

log = logging.getLogger("lab_proxy.ledger")

WRITERS = "lab:ledger:writers"  # hash: writer -> the number of its last booked batch
DAYS = "lab:ledger:keys:"  # + day: set of the keys with a row on it
ROWS = "lab:ledger:day:"  # + day:key: hash, [owner, upstream, model, metric] -> number
SUMS = "lab:ledger:sum:"  # + key: hash, `total` and `day:…` -> pico-dollars, which the limits read
NOBODY = "-"  # stands for the key where none is asked for
FLUSH_SECONDS = 0.05
OUTAGE_SECONDS = 0.25  # between batches while redis is down: each is an fsync
FLUSH_TIMEOUT = 2.0
REPLAY_AT_ONCE = 200  # spooled batches in one turn
MOST_DAYS = 366

METRICS = (
    "requests",
    "upstream_calls", "prompt_tokens", "cached_prompt_tokens", "completion_tokens", "cost", "unpriced_calls",
    "estimated_calls",
    "hits", "hit_prompt_tokens", "hit_completion_tokens",
    "collapsed", "collapsed_prompt_tokens", "collapsed_completion_tokens",
)  # fmt: skip
"""Columns of a row. `prompt_tokens` to `estimated_calls` are of real calls; `cost` is pico-dollars. `hits` and
`collapsed` cost nothing: their tokens were saved."""
_AT = {name: place for place, name in enumerate(METRICS)}
_COST, _CALLS, _UNPRICED = _AT["cost"], _AT["upstream_calls"], _AT["unpriced_calls"]

# ARGV: writer, number, then triples: a hash, its field and what to add, or a set, its member and nothing.
# Booked before the sums, and every sum by pcall: one wrong type in redis must not lose or double the others.
SCRIPT = """
if tonumber(ARGV[2]) <= tonumber(redis.call('HGET', KEYS[1], ARGV[1]) or '0') then return -1 end
redis.call('HSET', KEYS[1], ARGV[1], ARGV[2])
local lost = 0
for i = 3, #ARGV, 3 do
  local done
  if ARGV[i + 2] == '' then done = redis.pcall('SADD', ARGV[i], ARGV[i + 1])
  else done = redis.pcall('HINCRBY', ARGV[i], ARGV[i + 1], ARGV[i + 2]) end
  if type(done) == 'table' and done.err then lost = lost + 1 end
end
return lost
"""


@dataclass(slots=True)
class Charge:
    """One real upstream call, one hit, or one collapsed follower.

    `cached`: prompt tokens that the upstream had in a cache of its own. `estimated`: the upstream did not tell.
    `half`: half price, as for batches. `request`: false for a further charge of the same request. `day`: in UTC,
    today where it is left out.
    """

    identity: Identity
    upstream: str
    model: str
    source: Literal["upstream", "hit", "collapsed"]
    prompt: int = 0
    completion: int = 0
    cached: int = 0
    estimated: bool = False
    half: bool = False
    request: bool = True
    day: str = ""
    cost: int | None = field(init=False, default=None)  # pico-dollars, once it is recorded and where there is a price


class NoLedger:
    """What stands in for a ledger where none is kept."""

    async def start(self) -> None: ...

    async def stop(self) -> None: ...

    def record(self, charge: Charge) -> None: ...

    def correct(self, charge: Charge, prompt: int, completion: int, cached: int) -> None: ...

    def unflushed_cost(self, key_id: str) -> int:
        return 0


class Ledger:
    """`record` never waits and never fails."""

    def __init__(
        self,
        client: redis.Redis,
        prices: Prices,
        *,
        folder: Path,
        max_bytes: int,
        on_error: Callable[[str], None] = lambda _: None,
    ) -> None:
        """`folder`: where the spool lies, at most `max_bytes` of it for each worker."""
        self._redis = client
        self._prices = prices
        self._folder, self._max_bytes = folder, max_bytes
        self._on_error = on_error
        self._writer = secrets.token_hex(8)
        self._number = 0
        self._rows: dict[tuple[str, str, str, str, str], list[int]] = {}
        self._costs: dict[str, int] = {}  # key -> pico-dollars that redis does not know of
        self._spool = DiskQueue(folder, self._writer, max_bytes)
        self._orphans: list[DiskQueue] = []
        self._queue: list[LedgerBatch] = []
        self._warned = self._full = False
        self._some = asyncio.Event()
        self._turn = asyncio.Lock()
        self._task: asyncio.Task[None] | None = None
        self._day = (0, "")

    async def start(self) -> None:
        try:
            self._orphans = await asyncio.to_thread(lambda: list(DiskQueue.orphans(self._folder, self._max_bytes)))
        except OSError as error:
            log.warning("ledger: %s cannot be read: %s", self._folder, error)
        if self._orphans:
            self._some.set()
        self._task = asyncio.get_running_loop().create_task(self._run(), name="ledger")

    async def stop(self) -> None:
        """Book what is left, in redis or in the spool."""
        if self._task:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        async with self._turn:
            await self._flush()
            if self._rows or self._queue:
                log.error("ledger: charges are lost: neither redis nor the spool takes them")
            if self._spool.empty:
                with contextlib.suppress(*FAULTS):
                    async with asyncio.timeout(FLUSH_TIMEOUT):
                        await self._redis.hdel(WRITERS, self._writer)  # its numbers never come again
            for spool in [self._spool, *self._orphans]:
                spool.close(remove=spool.empty)

    def record(self, charge: Charge) -> None:
        """Count it. What the upstream's call costs is decided now, by the prices of now."""
        who = charge.identity
        charge.day = charge.day or self._today()
        row = self._row(charge)
        row[0] += charge.request
        if charge.source != "upstream":
            at = _AT["hits"] if charge.source == "hit" else _AT["collapsed"]
            row[at] += charge.request
            row[at + 1] += charge.prompt
            row[at + 2] += charge.completion
            return
        row[_CALLS] += 1
        row[_CALLS + 1] += charge.prompt
        row[_CALLS + 2] += charge.cached
        row[_CALLS + 3] += charge.completion
        row[_AT["estimated_calls"]] += charge.estimated
        cost = self._prices.cost(
            charge.upstream, charge.model, charge.prompt, charge.completion, cached=charge.cached, half=charge.half
        )
        charge.cost = cost
        if cost is None:
            row[_UNPRICED] += 1
        elif cost:
            row[_COST] += cost
            key = who.key_id or NOBODY
            self._costs[key] = self._costs.get(key, 0) + cost

    def correct(self, charge: Charge, prompt: int, completion: int, cached: int) -> None:
        """What was recorded as an estimate was really this: its row of its day is put right."""
        row = self._row(charge)
        row[_CALLS + 1] += prompt - charge.prompt
        row[_CALLS + 2] += cached - charge.cached
        row[_CALLS + 3] += completion - charge.completion
        row[_AT["estimated_calls"]] -= charge.estimated
        cost = self._prices.cost(charge.upstream, charge.model, prompt, completion, cached=cached, half=charge.half)
        if cost is not None and charge.cost is not None:  # else its price came or went meanwhile
            row[_COST] += cost - charge.cost
            key = charge.identity.key_id or NOBODY
            self._costs[key] = self._costs.get(key, 0) + cost - charge.cost

    def _row(self, charge: Charge) -> list[int]:
        who = charge.identity
        where = (charge.day, who.key_id or NOBODY, who.owner, charge.upstream, charge.model)
        row = self._rows.get(where)
        if row is None:
            row = self._rows[where] = [0] * len(METRICS)
            self._some.set()
        return row

    def unflushed_cost(self, key_id: str) -> int:
        """Pico-dollars of this key that only this process knows of."""
        return self._costs.get(key_id, 0)

    async def flush(self) -> None:
        """Book now what was recorded until now, so that who reads next finds it."""
        async with self._turn:
            await self._flush()

    # ---- reading

    async def usage(
        self, first: date, last: date, *, key_id: str | None = None, owner: str | None = None, model: str | None = None
    ) -> list[dict[str, Any]]:
        """The rows of redis. Raises link.FAULTS."""
        return await usage(self._redis, first, last, key_id=key_id, owner=owner, model=model)

    async def spent(self, key_id: str) -> tuple[int, int]:
        """Pico-dollars today and in all, as redis has them. Raises link.FAULTS."""
        day, total = await self._redis.hmget(SUMS + key_id, [f"day:{self._today()}", "total"])
        return int(day or 0), int(total or 0)

    # ---- writing

    def _today(self) -> str:
        """The day in UTC."""
        number = int(time.time() // 86400)
        if number != self._day[0]:
            self._day = (number, day_of(number * 86400))
        return self._day[1]

    async def _run(self) -> None:
        while True:
            await self._some.wait()
            await asyncio.sleep(FLUSH_SECONDS)
            self._some.clear()
            async with self._turn:
                await self._flush()
            if self._waiting():
                self._some.set()
                await asyncio.sleep(OUTAGE_SECONDS)

    def _waiting(self) -> bool:
        return (
            bool(self._rows or self._queue) or not self._spool.empty or any(not spool.empty for spool in self._orphans)
        )

    async def _flush(self) -> None:
        # 1. What was recorded becomes a batch, unless one waits that neither redis nor the disk takes.
        if self._rows and not self._queue:
            self._number += 1
            self._queue.append(LedgerBatch(self._writer, self._number, [(*at, row) for at, row in self._rows.items()]))
            self._rows = {}
        # 2. What has waited longest comes first: batches of one writer are booked in their order.
        back = await self._replay()
        # 3. Into the spool what redis did not take, or not surely: it keeps its number.
        for batch in list(self._queue):
            if back and self._spool.empty and await self._book(batch):
                self._forget(batch)
            elif not await self._spooled(batch):
                return
            self._queue.remove(batch)

    async def _spooled(self, batch: LedgerBatch) -> bool:
        try:
            await asyncio.to_thread(self._spool.append, batch)
        except (OSError, DiskQueueFull) as error:
            if not self._full:
                log.error("ledger: the spool in %s takes no more (%s): charges wait in memory", self._folder, error)  # noqa: TRY400
            self._full = True
            return False
        if not self._warned:
            log.warning("ledger: redis does not take it: the spool in %s keeps it until then", self._folder)
        self._warned, self._full = True, False
        return True

    def _forget(self, batch: LedgerBatch) -> None:
        """Redis knows these costs now."""
        for row in batch.rows:
            if cost := row[5][_COST]:
                left = self._costs.get(row[1], 0) - cost
                if left:  # less than nothing: an estimate was too high, and redis does not know yet
                    self._costs[row[1]] = left
                else:
                    self._costs.pop(row[1], None)

    async def _replay(self) -> bool:
        """Book what is spooled, some of it. False when redis does not take it."""
        for spool in [*self._orphans, self._spool]:
            for _ in range(REPLAY_AT_ONCE):
                if spool.empty:
                    break
                batch, end = await asyncio.to_thread(spool.first)
                if batch is not None:
                    if not await self._book(batch):
                        return False
                    if spool is self._spool:
                        self._forget(batch)
                await asyncio.to_thread(spool.acknowledge, end)
            if spool.empty and spool is not self._spool:
                self._orphans.remove(spool)
                spool.close(remove=True)
                log.warning("ledger: booked what an earlier run had spooled")
        if self._warned and self._spool.empty:
            self._warned = False
            log.warning("ledger: booked what was spooled")
        return True

    async def _book(self, batch: LedgerBatch) -> bool:
        """False when redis did not book it, or may not have."""
        args: list[Any] = [batch.writer, batch.number]
        for day, key, owner, upstream, model, metrics in batch.rows:
            args += [DAYS + day, key, ""]
            name = f"{ROWS}{day}:{key}"
            for metric, value in zip(METRICS, metrics, strict=False):
                if value:
                    args += [name, orjson.dumps([owner, upstream, model, metric]), value]
            if metrics[_COST]:
                for field in (f"day:{day}", "total"):
                    args += [SUMS + key, field, metrics[_COST]]
        try:
            async with asyncio.timeout(FLUSH_TIMEOUT):
                lost = await self._redis.eval(SCRIPT, 1, WRITERS, *args)
        except FAULTS:
            self._on_error("ledger")
            return False
        if lost > 0:
            log.error("ledger: %d sums of a batch are lost: something else lies at their names in redis", lost)
        return True


def day_of(seconds: float) -> str:
    """The day in UTC of a unix time."""
    return datetime.fromtimestamp(seconds, UTC).date().isoformat()


async def usage(
    client: redis.Redis,
    first: date,
    last: date,
    *,
    key_id: str | None = None,
    owner: str | None = None,
    model: str | None = None,
) -> list[dict[str, Any]]:
    """Rows from `first` to `last`, both included, sorted. Raises link.FAULTS."""
    days = [(first + timedelta(days=n)).isoformat() for n in range((last - first).days + 1)]
    keys: list[tuple[str, str]] = [(day, key_id) for day in days] if key_id is not None else []
    if key_id is None:
        pipe = client.pipeline(transaction=False)
        for day in days:
            pipe.smembers(DAYS + day)
        sets = await pipe.execute()
        keys = [(day, each.decode()) for day, found in zip(days, sets, strict=True) for each in sorted(found)]
    rows: list[dict[str, Any]] = []
    for at in range(0, len(keys), 256):
        pipe = client.pipeline(transaction=False)
        for day, key in keys[at : at + 256]:
            pipe.hgetall(f"{ROWS}{day}:{key}")
        for (day, key), fields in zip(keys[at : at + 256], await pipe.execute(), strict=True):
            rows += _rows(day, key, fields)
    return [
        row for row in rows if (owner is None or row["owner"] == owner) and (model is None or row["model"] == model)
    ]


def _rows(day: str, key: str, fields: Mapping[bytes, bytes]) -> list[dict[str, Any]]:
    found: dict[tuple[str, str, str], dict[str, int]] = {}
    for name, value in fields.items():
        owner, upstream, model, metric = orjson.loads(name)
        found.setdefault((owner, upstream, model), {})[metric] = int(value)
    return [
        {"day": day, "key_id": None if key == NOBODY else key, "owner": owner, "upstream": upstream, "model": model}
        | _figures({metric: told.get(metric, 0) for metric in METRICS})
        for (owner, upstream, model), told in sorted(found.items())
    ]


def _figures(told: Mapping[str, int]) -> dict[str, Any]:
    """A row's figures as the pages show them. `cost_usd` is null where no call had a price, which is not 0."""
    cost = told["cost"]
    known = cost or not told["unpriced_calls"] or told["unpriced_calls"] < told["upstream_calls"]
    return {
        **{metric: told[metric] for metric in METRICS if metric != "cost"},
        "tokens_served": sum(told[name] for name in METRICS if name.endswith(("prompt_tokens", "completion_tokens")))
        - told["cached_prompt_tokens"],
        "cost_usd": float(money.to_usd(cost)) if known else None,
        "cost_picodollars": cost if known else None,
        "unpriced": told["unpriced_calls"] > 0,
    }


def total(rows: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """The sum of rows of `usage`."""
    sums = dict.fromkeys(METRICS, 0)
    for row in rows:
        for metric in METRICS:
            sums[metric] += row["cost_picodollars"] or 0 if metric == "cost" else row[metric]
    return _figures(sums)


def as_csv(rows: list[dict[str, Any]]) -> str:
    """Rows of `usage` for a spreadsheet, which must not take a name for a formula."""
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
