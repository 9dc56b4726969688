"""One flight: carries the answer of one upstream call to all identical concurrent requests.

A flight is a sequence of parts (bytes) and a result. No single request owns it: a separate task fetches the answer,
each request is a subscriber, and the task is cancelled when the last subscriber leaves. Knows no HTTP, does not know
what the parts mean or which requests may share an answer.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..errors import ProxyError, SlowReader, UpstreamRefused
from ..redis.client import Script
from ..redis.connection import Command
from .entry import Entry

LEASE = "lab:flight:"
LEASE_SECONDS = 2.5  # a lease's lifetime; after it, followers of a killed leader continue
PIECE_BYTES = 256 * 1024  # a whole answer is split into pieces of this size, which fit into messages between processes

# KEYS: the lease, then the names of the entries. ARGV: own token, milliseconds, token of a dead leader.
# '' if all entries exist by now; otherwise the leader's token, which is the own one if the lease was free.
_ACQUIRE = Script("""
local missing = #KEYS == 1
for at = 2, #KEYS, 64 do
  local last = math.min(at + 63, #KEYS)
  if redis.call('EXISTS', unpack(KEYS, at, last)) <= last - at then missing = true break end
end
if not missing then return '' end
local held = redis.call('GET', KEYS[1])
if held and held ~= ARGV[3] then return held end
redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
return ARGV[1]
""")

_TOKEN = re.compile(rb"[0-9a-f]{16}\.[0-9]{1,18}")  # process and number


class FlightLost(Exception):  # noqa: N818 - as in errors
    """The flight ended without a result. A request that has sent nothing of it may join another flight."""


@dataclass(slots=True)
class FlightResult:
    """How a flight ended: `outcome` says whether the answer was stored, `error` why there is none."""

    outcome: str | None = None
    error: Exception | None = None

    def wire(self) -> dict[str, Any]:
        error = self.error
        if error is None:
            return {"outcome": self.outcome}
        if not isinstance(error, ProxyError):
            error = ProxyError("The leading proxy process has a fault: see its log.", code="proxy_fault")
        fields = {"status": error.status, "code": error.code or error.type, "headers": error.headers}
        return {"error": fields | {"body": error.body().decode()}}

    @classmethod
    def read(cls, fields: dict[str, Any]) -> FlightResult:
        if (error := fields.get("error")) is None:
            return cls(fields.get("outcome"))
        made = UpstreamRefused(int(error["status"]), error["body"].encode(), error["headers"])
        made.code = error["code"]
        return cls(error=made)


@dataclass(slots=True)
class RemoteSubscriber:
    """Another process that follows a flight of this one. `sent`: parts sent to it; the result counts as one more.
    `received`: parts that it has confirmed."""

    sent: int
    received: int
    last_received: float  # monotonic: its last sign of life
    last_sent: float = 0.0  # monotonic: the last message to it


@dataclass(slots=True)
class Lease:
    """The command that elects the leader of a flight across processes; a PipelinedCommand."""

    flight: Flight
    entry_names: Sequence[str]  # redis names; if all of them exist, no leader is needed
    displaced: str = ""  # a dead leader's token
    holder: str | None = None  # token of the leader; "": the entries exist; None: redis did not answer

    def command(self) -> Command:
        keys = (LEASE + self.flight.name, *self.entry_names)
        return _ACQUIRE(keys, self.flight.token, int(LEASE_SECONDS * 1000), self.displaced)

    def on_reply(self, reply: Any) -> None:
        valid = isinstance(reply, bytes) and (not reply or _TOKEN.fullmatch(reply))
        self.holder = reply.decode() if valid else None  # garbage under this name: there is no leader

    def on_failure(self) -> None:
        self.holder = None


OnFlight = Callable[["Flight"], None]


@dataclass(slots=True)
class Spare:
    """Bytes that all flights of one process together may keep in addition to their own limits."""

    left: int


@dataclass(eq=False)
class Flight:
    """One answer while it arrives. Its task writes it; each subscriber reads it at its own pace."""

    name: str  # empty if no request may join
    token: str
    limit: int  # bytes kept for subscribers, besides what it takes from `spare`
    spare: Spare
    on_end: OnFlight
    on_overflow: OnFlight  # called when no more may be kept
    on_change: OnFlight  # called for each change while another process follows
    head: dict[str, Any] | None = None  # what precedes the first part
    entries: list[Entry] | None = None  # what the first subscriber found in the cache
    result: FlightResult | None = None
    abandoned: bool = False
    lookup_names: Sequence[str] = ()
    holds_lease: bool = False  # this process leads, according to redis
    remote: bool = False  # another process leads
    started: bool = False  # past the cache lookup: the upstream is being called
    subscribers: set[Subscriber] = field(default_factory=set)
    remote_subscribers: dict[str, RemoteSubscriber] = field(default_factory=dict)  # process -> its state
    last_received: float = 0.0  # monotonic; of a follower: the leader's last message
    renewed: float = 0.0  # monotonic: last renewal of the lease
    resync: bool = True  # of a follower: the leader must send again, from `count` on
    unknown_to_leader: bool = False  # of a follower
    unconfirmed: int = 0  # of a follower: bytes received since its last confirmation to the leader
    derived: dict[str, Any] = field(
        default_factory=dict
    )  # results that the first subscriber computes from the answer for all others
    count: int = 0  # parts so far
    task: asyncio.Task[None] | None = None
    _parts: list[bytes | memoryview] = field(default_factory=list)  # from `_dropped_parts` on
    _part_ends: list[int] = field(default_factory=list)  # bytes up to the end of each of them
    _dropped_parts: int = 0
    _dropped_bytes: int = 0
    _bytes: int = 0
    _borrowed: int = 0  # bytes of `spare`
    _whole: bytes | None = None
    _changed: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def done(self) -> bool:
        return self.abandoned or self.result is not None or self.entries is not None

    @property
    def shared(self) -> bool:
        """More than one subscriber wants the answer."""
        return len(self.subscribers) + len(self.remote_subscribers) > 1

    @property
    def _keeps_all(self) -> bool:
        """Whether all parts are kept: a whole answer is in memory anyway, and its subscribers need all of it."""
        return self.head is not None and self.head.get("streams") is False

    def __del__(self) -> None:
        self.spare.left += self._borrowed

    # ---- for the writer

    def begin(self, head: dict[str, Any]) -> None:
        """The answer begins. `head` is JSON."""
        self.head = head
        self.notify()

    async def append(self, part: bytes) -> None:
        """Add a part. Waits while even the fastest reader is more than the limit behind."""
        self.add(part)
        while self._bytes - self._fastest() > self.limit and (self.subscribers or self.remote_subscribers):
            await self._changed.wait()

    def add_whole(self, answer: bytes) -> None:
        """Add all of an answer that is not streamed."""
        self._whole = answer
        view = memoryview(answer)
        for at in range(0, len(answer), PIECE_BYTES):
            self.add(view[at : at + PIECE_BYTES])

    def add(self, part: bytes | memoryview) -> None:
        """Add a part without waiting, as for a flight that another process leads: slow readers fall behind."""
        self._bytes += len(part)
        self._parts.append(part)
        self._part_ends.append(self._bytes)
        self.count += 1
        if self._bytes > self.limit and not self._may_keep():
            self.on_overflow(self)
            self._drop()
        self.notify()

    def _may_keep(self) -> bool:
        """Whether all parts so far may be kept, so that a new subscriber can still get them."""
        if self._keeps_all:
            return True
        more = self._bytes - self._dropped_bytes - self.limit - self._borrowed
        if self._dropped_parts or more > self.spare.left:
            return False
        self._borrowed += max(0, more)
        self.spare.left -= max(0, more)
        return True

    def end(self, outcome: str | None = None, error: Exception | None = None) -> None:
        if not self.done:
            self.result = FlightResult(outcome, error)
            self._finish()

    def resolve_from_cache(self, found: list[Entry]) -> None:
        """The answer was in the cache: all subscribers are served from there."""
        self.entries = found
        self._finish()

    def abandon(self) -> None:
        if not self.done:
            self.abandoned = True
            self._finish()

    def _finish(self) -> None:
        self.on_end(self)
        self.notify()

    def _positions(self) -> list[int]:
        return [each.taken for each in self.subscribers] + [each.sent for each in self.remote_subscribers.values()]

    def _fastest(self) -> int:
        """Bytes that the fastest reader has taken."""
        return self._end_of(max(self._positions(), default=0))

    def _end_of(self, parts: int) -> int:
        """Bytes up to the end of the first `parts` parts."""
        at = min(parts, self.count) - self._dropped_parts
        return self._part_ends[at - 1] if at > 0 else self._dropped_bytes

    def _drop(self) -> None:
        """Drop parts that all readers have taken, or that are further back than the limit."""
        positions = self._positions()
        slowest, fastest = min(positions, default=0), max(positions, default=0)
        drop = 0
        for at, end in enumerate(self._part_ends[:-1], self._dropped_parts):
            far = self._bytes - end > self.limit
            if not (at < slowest or (far and (self.remote or at < fastest))):
                break
            drop += 1
        if drop:
            self._dropped_bytes = self._part_ends[drop - 1]
            self._dropped_parts += drop
            del self._parts[:drop]
            del self._part_ends[:drop]
            unused = self._borrowed - max(0, self._bytes - self._dropped_bytes - self.limit)
            if unused > 0:
                self._borrowed -= unused
                self.spare.left += unused

    # ---- for readers

    @property
    def whole(self) -> bytes:
        """The answer of a flight that has ended, one object for all subscribers."""
        if self._whole is None:
            self._whole = b"".join(self._parts)
            self._parts.clear()  # subscribers that still count them read the whole answer here
        return self._whole

    def size_of(self, begin: int, end: int) -> int:
        """Bytes of the parts from `begin` to `end`, without dropped parts."""
        return self._end_of(end) - self._end_of(begin)

    def parts_after(self, taken: int) -> list[Any]:
        """The parts after the first `taken`. Raises SlowReader if some of them were dropped."""
        if taken < self._dropped_parts:
            raise SlowReader("The client read the shared answer too slowly: retry.")
        return self._parts[taken - self._dropped_parts :]

    async def wait_change(self) -> None:
        await self._changed.wait()

    def notify(self) -> None:
        self._changed.set()  # wakes all that wait now
        self._changed.clear()
        if self.remote_subscribers:
            self.on_change(self)

    def on_taken(self) -> None:
        """A subscriber has taken parts: a writer that waits may go on."""
        if self._bytes > self.limit:
            self._changed.set()
            self._changed.clear()


@dataclass(slots=True, eq=False)
class Subscriber:
    """One request's subscription to a flight. It leaves at the end of the `with` block."""

    flight: Flight
    first: bool  # it decides how the flight goes on: resolve_from_cache, start, or leave
    can_lease: bool
    on_start: Callable[[Flight, str | None, Callable[[Flight], Awaitable[None]]], None]
    on_leave: Callable[[Subscriber], None]
    taken: int = 0

    def __enter__(self) -> Subscriber:
        self.flight.subscribers.add(self)
        return self

    def __exit__(self, *_: object) -> None:
        self.flight.subscribers.discard(self)
        self.on_leave(self)

    @property
    def outcome(self) -> str | None:
        """Whether the answer was stored, once all of it was taken."""
        return self.flight.result.outcome if self.flight.result else None

    def lease(self, entry_names: Sequence[str], *, anyway: bool = False) -> Lease | None:
        """The leader election, to be sent with the read of `entry_names`; None if no other process can be reached.
        `anyway`: lead even if all entries exist, because they may not satisfy this request."""
        self.flight.lookup_names = entry_names
        if not self.flight.name or not self.can_lease:
            return None
        return Lease(self.flight, () if anyway else entry_names)

    def start(self, lease: Lease | None, fetch: Callable[[Flight], Awaitable[None]]) -> None:
        """The cache had no entry: follow the leader, or lead. `fetch` calls the upstream: begin, append, end."""
        self.on_start(self.flight, lease.holder if lease else None, fetch)

    async def cached_entries(self) -> list[Entry] | None:
        """What the first subscriber found in the cache. Raises FlightLost if it left before its lookup."""
        while not (self.flight.done or self.flight.started):
            await self.flight.wait_change()
        if self.flight.abandoned and not self.flight.started:
            raise FlightLost
        return self.flight.entries

    async def head(self) -> dict[str, Any]:
        """What precedes the first part. Raises the flight's error, or FlightLost."""
        while self.flight.head is None:
            if self.flight.done:
                self._raise()
            await self.flight.wait_change()
        return self.flight.head

    async def whole(self) -> bytes:
        """The answer of a flight that is not streamed. Raises the same as `parts`."""
        async for _ in self.parts():
            pass
        return self.flight.whole

    async def parts(self) -> AsyncIterator[list[bytes]]:
        """All parts from the first on, as they arrive. Raises the flight's error, FlightLost, or SlowReader."""
        flight = self.flight
        while True:
            if fresh := flight.parts_after(self.taken):
                self.taken += len(fresh)
                yield fresh
                flight.on_taken()
            elif flight.done:
                break
            else:
                await flight.wait_change()
        self._raise()

    def _raise(self) -> None:
        if self.flight.abandoned:
            raise FlightLost
        if self.flight.result and self.flight.result.error:
            raise self.flight.result.error.with_traceback(None)
