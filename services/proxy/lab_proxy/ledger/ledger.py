"""The ledger: usage and cost by day, key, owner and model, as integers in redis that are never evicted.

Charges are summed in memory and booked by one script, off the request path. A batch that redis may have booked is sent
again under its number, which redis books only once. Batches that redis does not accept go to the disk queue.
"""

import asyncio
import contextlib
import logging
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any, Literal

import orjson

from ..redis.client import Client, OnError, Script
from ..redis.connection import RedisError
from ..tasks import end, supervise
from .disk_queue import DiskQueue, DiskQueueFull, LedgerBatch
from .prices import Prices
from .usage import DAYS, METRICS, ROWS, UsagePage, usage_page

log = logging.getLogger("lab_proxy.ledger")

WRITERS = "lab:ledger:writers"  # hash: writer -> number of its last booked batch
SUMS = "lab:ledger:sum:"  # + key: hash, `total` and `day:…` -> pico-dollars, which the limits read
UPSTREAM_SUMS = "lab:ledger:upstream:"  # + day:upstream: hash, `total` and each key -> pico-dollars, for its cap
FLUSH_SECONDS = 0.05
OUTAGE_SECONDS = 0.25  # between batches while redis is down: each one is an fsync
FLUSH_TIMEOUT = 1.0
REPLAY_AT_ONCE = 200  # queued batches in one turn

_AT = {name: place for place, name in enumerate(METRICS)}
_COST, _CALLS, _UNPRICED = _AT["cost"], _AT["upstream_calls"], _AT["unpriced_calls"]

# ARGV: writer, number, then triples: a hash, its field and what to add, or a set, its member and nothing.
# The number is set before the sums, and each sum is a pcall: a wrong type in redis must not lose or double the others.
SCRIPT = Script("""
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
""")


@dataclass(slots=True)
class Charge:
    """One upstream call, one hit, or one follower of a shared answer. `key_id` is NOBODY where no key is required.

    `cached`: prompt tokens from the upstream's own cache. `estimated`: the upstream reported no usage. `batch_price`:
    half price, as for batches. `request`: False for a further charge of the same request. `day`: UTC; default today.
    """

    key_id: str
    owner: str
    upstream: str
    model: str
    source: Literal["upstream", "hit", "collapsed"]
    prompt: int = 0
    completion: int = 0
    cached: int = 0
    estimated: bool = False
    batch_price: bool = False
    request: bool = True
    day: str = ""
    cost: int | None = field(init=False, default=None)  # pico-dollars; set by `record` if there is a price


class Ledger:
    """Counts charges and books them in redis. A part. `record` never waits and never fails."""

    def __init__(
        self,
        client: Client,
        prices: Prices,
        *,
        folder: Path,
        max_bytes: int,
        on_error: OnError = lambda _: None,
        on_cost: Callable[[str, str, int], None] = lambda _, __, ___: None,
    ) -> None:
        """`folder`: of the disk queue, which holds at most `max_bytes`. `on_cost`: upstream, model, pico-dollars."""
        self._redis = client
        self._prices = prices
        self._folder, self._max_bytes = folder, max_bytes
        self._on_error, self._on_cost = on_error, on_cost
        self._writer = secrets.token_hex(8)
        self._number = 0
        self._rows: dict[tuple[str, str, str, str, str], list[int]] = {}
        self._costs: dict[str, int] = {}  # key, or `upstream:…` -> pico-dollars that redis does not have yet
        self._disk_queue = DiskQueue(folder, self._writer, max_bytes)
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
        self._task = supervise("ledger", self._run)

    async def stop(self) -> None:
        """Book the rest, in redis or in the disk queue."""
        await end(self._task)
        async with self._turn:
            await self._flush()
            if self._rows or self._queue:
                log.error("ledger: charges are lost: neither redis nor the disk queue accepts them")
            if self._disk_queue.empty:
                with contextlib.suppress(RedisError):
                    await self._redis.execute("HDEL", WRITERS, self._writer)  # this writer never comes back
            for queue in [self._disk_queue, *self._orphans]:
                queue.close(remove=queue.empty)

    def record(self, charge: Charge) -> None:
        """Count a charge. The cost of an upstream call is fixed now, by the current prices."""
        charge.day = charge.day or self.today()
        charge.cost = self._cost(charge) if charge.source == "upstream" else None
        self._count(charge, 1)
        if charge.cost:
            self._on_cost(charge.upstream, charge.model, charge.cost)

    def correct(self, charge: Charge, prompt: int, completion: int, cached: int) -> None:
        """Replace an estimated charge by the real numbers, in the row of its day."""
        self._count(charge, -1)
        charge.prompt, charge.completion, charge.cached, charge.estimated = prompt, completion, cached, False
        cost = self._cost(charge)
        if cost is not None and charge.cost is not None:  # otherwise its price was added or removed meanwhile
            charge.cost = cost
        self._count(charge, 1)

    def _cost(self, charge: Charge) -> int | None:
        tokens = charge.prompt, charge.completion
        return self._prices.cost(charge.upstream, charge.model, *tokens, cached=charge.cached, half=charge.batch_price)

    def _count(self, charge: Charge, times: int) -> None:
        """Add the charge to its row; -1 times: take it out."""
        row = self._row(charge)
        row[0] += times * charge.request
        if charge.source != "upstream":
            at = _AT["hits"] if charge.source == "hit" else _AT["collapsed"]
            added = [charge.request, charge.prompt, charge.completion]
        else:
            at, added = _CALLS, [1, charge.prompt, charge.cached, charge.completion]
            row[_AT["estimated_calls"]] += times * charge.estimated
            row[_UNPRICED] += times * (charge.cost is None)
            if charge.cost:
                row[_COST] += times * charge.cost
                for name in (charge.key_id, f"upstream:{charge.upstream}"):
                    self._costs[name] = self._costs.get(name, 0) + times * charge.cost
        for place, number in enumerate(added, at):
            row[place] += times * number

    def _row(self, charge: Charge) -> list[int]:
        where = (charge.day, charge.key_id, charge.owner, charge.upstream, charge.model)
        row = self._rows.get(where)
        if row is None:
            row = self._rows[where] = [0] * len(METRICS)
            self._some.set()
        return row

    def unflushed_cost(self, key_id: str) -> int:
        """Pico-dollars of this key, or of all calls of `upstream:…`, that redis does not have yet."""
        return self._costs.get(key_id, 0)

    async def flush(self) -> None:
        """Book all recorded charges now, so that the next read includes them."""
        async with self._turn:
            await self._flush()

    # ---- reading

    async def usage(
        self, first: date, last: date, *, limit: int, after: str | None = None, **filters: str | None
    ) -> UsagePage:
        """See `usage.usage_page`."""
        return await usage_page(self._redis, first, last, limit=limit, after=after, **filters)

    async def spent(self, key_id: str) -> tuple[int, int]:
        """Pico-dollars today and in total, as booked in redis. Raises RedisError."""
        day, total = await self._redis.execute("HMGET", SUMS + key_id, f"day:{self.today()}", "total")
        return int(day or 0), int(total or 0)

    # ---- writing

    def today(self) -> str:
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
        on_disk = any(not queue.empty for queue in (self._disk_queue, *self._orphans))
        return on_disk or bool(self._rows or self._queue)

    async def _flush(self) -> None:
        # 1. Recorded charges become a batch, unless an earlier batch waits that neither redis nor the disk accepts.
        if self._rows and not self._queue:
            self._number += 1
            self._queue.append(LedgerBatch(self._writer, self._number, [(*at, row) for at, row in self._rows.items()]))
            self._rows = {}
        # 2. Queued batches come first: batches of one writer are booked in order.
        back = await self._replay()
        # 3. Batches that redis did not accept, or may not have, go to the disk queue under their number.
        for batch in list(self._queue):
            if back and self._disk_queue.empty and await self._book(batch):
                self._forget(batch)
            elif not await self._enqueue(batch):
                return
            self._queue.remove(batch)

    async def _enqueue(self, batch: LedgerBatch) -> bool:
        try:
            await asyncio.to_thread(self._disk_queue.append, batch)
        except (OSError, DiskQueueFull) as error:
            if not self._full:
                log.error("ledger: the disk queue in %s is full (%s): charges wait in memory", self._folder, error)  # noqa: TRY400
            self._full = True
            return False
        if not self._warned:
            log.warning("ledger: redis does not accept charges: the disk queue in %s keeps them", self._folder)
        self._warned, self._full = True, False
        return True

    def _forget(self, batch: LedgerBatch) -> None:
        """Redis has these costs now."""
        for row in batch.rows:
            for name in (row[1], f"upstream:{row[3]}") if row[5][_COST] else ():
                left = self._costs.get(name, 0) - row[5][_COST]
                if left:  # negative: an estimate was too high, and redis does not have the correction yet
                    self._costs[name] = left
                else:
                    self._costs.pop(name, None)

    async def _replay(self) -> bool:
        """Book some of the queued batches. False if redis does not accept them."""
        for queue in [*self._orphans, self._disk_queue]:
            for _ in range(REPLAY_AT_ONCE):
                if queue.empty:
                    break
                batch, end = await asyncio.to_thread(queue.first)
                if batch is not None:
                    if not await self._book(batch):
                        return False
                    if queue is self._disk_queue:
                        self._forget(batch)
                await asyncio.to_thread(queue.acknowledge, end)
            if queue.empty and queue is not self._disk_queue:
                self._orphans.remove(queue)
                queue.close(remove=True)
                log.warning("ledger: booked the disk queue of an earlier run")
        if self._warned and self._disk_queue.empty:
            self._warned = False
            log.warning("ledger: booked the disk queue")
        return True

    async def _book(self, batch: LedgerBatch) -> bool:
        """False if redis did not book it, or may not have."""
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
                for field in ("total", key):
                    args += [f"{UPSTREAM_SUMS}{day}:{upstream}", field, metrics[_COST]]
        try:
            lost = await self._redis.execute(*SCRIPT([WRITERS], *args), within=FLUSH_TIMEOUT)
        except RedisError:
            self._on_error("ledger")
            return False
        if lost > 0:
            log.error("ledger: %d sums of a batch are lost: their names in redis hold other types", lost)
        return True


def day_of(seconds: float) -> str:
    """The day in UTC of a unix time."""
    return datetime.fromtimestamp(seconds, UTC).date().isoformat()
