"""Single flight: of identical requests under way at once one asks the upstream, in this process and across processes.

A flight is one answer on its way: parts (bytes), then an ending. It belongs to nobody's request: a task of its own asks
the upstream, everybody who wants the answer has a seat, and when the last seat is empty the task is cancelled. Knows
neither HTTP nor what the parts mean, nor what may be shared: who boards a name has decided that.

Across processes: redis holds a lease for each name, taken by a command that rides along with the cache's read, so that
a lone miss costs no round trip of its own. Who finds it taken writes to the leading process's channel (redis pub/sub)
and gets the flight from its first part on, then each part as it comes. The parts rest in the leader's memory alone: a
follower that was cut off asks again from where it was, and nothing is lost or twice. Redis away: each process alone.
"""

from __future__ import annotations

import asyncio
import re
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import orjson

from ..errors import ProxyError, SlowReader, UpstreamRefused
from ..redis.connection import Address, Command, CommandError, Connection
from .entry import Entry

LEASE, CHANNEL = "lab:flight:", "lab:flight:to:"
LEASE_SECONDS = 2.5  # what a killed leader costs its followers
BEAT_SECONDS = 0.4  # between two signs of life, of leaders (lease, ping) as of followers (join)
SILENCE_SECONDS = 1.2  # three beats: a leader without lease and without a word is dead
DEAF_SECONDS = 5.0  # a leader with a lease and without a word, a listener without a beat
PATIENCE_SECONDS = 10.0  # for redis to come back, of a follower that gave out a part of its answer already
GRACE_SECONDS = 0.2  # with nobody on board: another process may be about to ask
TIMEOUT_SECONDS = 0.5  # of one round trip to redis: nobody's answer waits for it but a follower's
MESSAGE_BYTES = 256 * 1024

# KEYS: the lease, then what was looked for. ARGV: my token, milliseconds, a token that is known to be dead.
# '' where all that was looked for is there by now; else the token of who leads, mine where it was free.
_TAKE = """
if #KEYS > 1 and redis.call('EXISTS', unpack(KEYS, 2)) == #KEYS - 1 then return '' end
local held = redis.call('GET', KEYS[1])
if held and held ~= ARGV[3] then return held end
redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
return ARGV[1]
"""
_RENEW = """
local held = redis.call('GET', KEYS[1])
if held and held ~= ARGV[1] then return 0 end
redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
return 1
"""
_RELEASE = "if redis.call('GET', KEYS[1]) == ARGV[1] then redis.call('DEL', KEYS[1]) end return 1"

_TOKEN = re.compile(rb"[0-9a-f]{16}\.[0-9]{1,18}")  # process and number


class FlightLost(Exception):  # noqa: N818 - says what happened
    """The flight is over and nobody knows how it would have ended: who gave out nothing of it may board again."""


@dataclass(slots=True)
class FlightResult:
    """How a flight ended: `outcome` is what became of the answer in the cache, `error` why there is none."""

    outcome: str | None = None
    error: Exception | None = None

    def wire(self) -> dict[str, Any]:
        error = self.error
        if error is None:
            return {"outcome": self.outcome}
        if not isinstance(error, ProxyError):
            error = ProxyError("A fault in the proxy that asked: its log tells more.", code="proxy_fault")
        said = {"status": error.status, "code": error.code or error.type, "headers": error.headers}
        return {"error": said | {"body": error.body().decode()}}

    @classmethod
    def read(cls, said: dict[str, Any]) -> FlightResult:
        if (error := said.get("error")) is None:
            return cls(said.get("outcome"))
        made = UpstreamRefused(int(error["status"]), error["body"].encode(), error["headers"])
        made.code = error["code"]
        return cls(error=made)


@dataclass(slots=True)
class _Listener:
    """Another process that follows a flight of this one. `sent`: parts it was given; the ending counts as one more."""

    sent: int
    last_heard: float  # monotonic: when it last gave a sign of life
    last_told: float = 0.0  # monotonic: when it last was given one


class Lease:
    """The question who leads, as a command that rides along with another round trip to redis (an `Ask`)."""

    def __init__(self, flight: Flight, looked_for: Sequence[str], displaced: str = "") -> None:
        """`looked_for`: redis names; where all of them exist nobody needs to lead. `displaced`: a dead leader."""
        self._keys = (LEASE + flight.name, *looked_for)
        self._arguments = (flight.token, int(LEASE_SECONDS * 1000), displaced)
        self.holder: str | None = None  # None: it could not be asked

    def command(self, whole: bool = False) -> Command:
        """Always `whole`: the script is short, and redis knows it by its text."""
        return ("EVAL", _TAKE, len(self._keys), *self._keys, *self._arguments)

    def on_reply(self, reply: Any) -> None:
        known = isinstance(reply, bytes) and (not reply or _TOKEN.fullmatch(reply))
        self.holder = reply.decode() if known else None  # garbage at the name: nobody leads

    def on_failure(self) -> None:
        self.holder = None


class Flight:
    """One answer on its way. Written by its task alone, read by every seat, each at its own pace."""

    def __init__(self, flights: SingleFlight, name: str, token: str) -> None:
        self.name = name  # empty: nobody can board it
        self.token = token
        self.head: dict[str, Any] | None = None  # what there is to know before the first part
        self.entries: list[Entry] | None = None  # what the first on board found in the cache
        self.result: FlightResult | None = None
        self.abandoned = False
        self.lookup_names: Sequence[str] = ()
        self.holds_lease = False  # redis says that this process leads
        self.remote = False  # another process leads
        self.started = False  # past the look into the cache: somebody asks the upstream
        self.subscribers: set[Subscriber] = set()
        self.remote_subscribers: dict[str, _Listener] = {}
        self.last_heard = 0.0  # monotonic; a follower's: when its leader last said something
        self.renewed = 0.0
        self.resync = True  # a follower's: the leader must send from `count` on
        self.unknown_to_leader = False  # a follower's: the leader does not know the flight
        self.count = 0  # parts so far
        self.task: asyncio.Task[None] | None = None
        self._flights = flights
        self._parts: list[bytes] = []  # from `_base` on
        self._part_ends: list[int] = []  # bytes up to the end of each of them
        self._dropped_parts = self._dropped_bytes = 0  # parts that are forgotten, and their bytes
        self._bytes = 0
        self._changed = asyncio.Event()

    @property
    def done(self) -> bool:
        return self.abandoned or self.result is not None or self.entries is not None

    @property
    def has_head(self) -> bool:
        return self.head is not None

    @property
    def shared(self) -> bool:
        """Whether more than one wants the answer."""
        return len(self.subscribers) + len(self.remote_subscribers) > 1

    # ---- the writer's side

    def begin(self, head: dict[str, Any]) -> None:
        """An answer comes. `head` is JSON."""
        self.head = head
        self.notify()

    async def append(self, part: bytes) -> None:
        """One more part. Waits while even the fastest reader is behind by more than the limit."""
        limit = self._flights.limit
        self._append(part)
        while self._bytes - self._fastest() > limit and (self.subscribers or self.remote_subscribers):
            await self._changed.wait()

    def append_remote(self, part: bytes) -> None:
        """One more part of a flight that another process leads: it waits for nobody, so the slow ones fall behind."""
        self._append(part)

    def end(self, outcome: str | None = None, error: Exception | None = None) -> None:
        if not self.done:
            self.result = FlightResult(outcome, error)
            self._flights.ended(self)
            self.notify()

    def resolve_from_cache(self, found: list[Entry]) -> None:
        """The answer was in the cache: everybody on board is served from there."""
        self.entries = found
        self._flights.ended(self)
        self.notify()

    def abandon(self) -> None:
        if not self.done:
            self.abandoned = True
            self._flights.ended(self)
            self.notify()

    def _append(self, part: bytes) -> None:
        self._bytes += len(part)
        self._parts.append(part)
        self._part_ends.append(self._bytes)
        self.count += 1
        if self._bytes > self._flights.limit:
            self._flights.close(self)
            self._forget()
        self.notify()

    def _readers(self) -> list[int]:
        return [seat.taken for seat in self.subscribers] + [each.sent for each in self.remote_subscribers.values()]

    def _fastest(self) -> int:
        """Bytes that the fastest reader has taken."""
        at = min(max(self._readers(), default=0), self.count) - self._dropped_parts
        return self._part_ends[at - 1] if at > 0 else self._dropped_bytes

    def _forget(self) -> None:
        """Drop what everybody has taken, and what is further back than the limit: who is there has fallen behind."""
        readers = self._readers()
        slowest, fastest = min(readers, default=0), max(readers, default=0)
        drop = 0
        while drop < len(self._parts) - 1:
            far = self._bytes - self._part_ends[drop] > self._flights.limit
            if not (
                self._dropped_parts + drop < slowest or (far and (self.remote or self._dropped_parts + drop < fastest))
            ):
                break
            drop += 1
        if drop:
            self._dropped_bytes = self._part_ends[drop - 1]
            self._dropped_parts += drop
            del self._parts[:drop]
            del self._part_ends[:drop]

    # ---- the readers' side

    def parts_after(self, taken: int) -> list[bytes]:
        """The parts after the first `taken`. Raises TooSlow where some of them are forgotten."""
        if taken < self._dropped_parts:
            raise SlowReader("The answer was read too slowly, and others did not wait: ask again.")
        return self._parts[taken - self._dropped_parts :]

    async def wait_change(self, within: float | None = None) -> None:
        """Returns when something has happened, or after `within` seconds."""
        if within is None:
            await self._changed.wait()
        else:
            with suppress(TimeoutError):
                async with asyncio.timeout(within):
                    await self._changed.wait()

    def notify(self) -> None:
        self._changed.set()  # wakes who waits now
        self._changed.clear()
        if self.remote_subscribers:
            self._flights.dirty(self)

    def on_taken(self) -> None:
        """A seat has taken parts: a writer that waits for room may go on."""
        if self._bytes > self._flights.limit:
            self._changed.set()
            self._changed.clear()


class Subscriber:
    """One request's place in a flight; leave it by the end of the `with` block."""

    def __init__(self, flights: SingleFlight, flight: Flight, first: bool) -> None:
        self.flight = flight
        self.first = first  # it decides what becomes of the flight: land, depart, or leave
        self.taken = 0
        self._flights = flights

    def __enter__(self) -> Subscriber:
        self.flight.subscribers.add(self)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.flight.subscribers.discard(self)
        self._flights.left(self)

    @property
    def outcome(self) -> str | None:
        """What became of the answer, when all of it was taken."""
        return self.flight.result.outcome if self.flight.result else None

    def lease(self, looked_for: Sequence[str], *, anyway: bool = False) -> Lease | None:
        """The question who leads, to be sent along with the read of `looked_for`; None: nobody else can be asked.

        `anyway`: lead also where all of them exist, because they may not be what is wanted.
        """
        self.flight.lookup_names = looked_for
        if not self.flight.name or not self._flights.connected:
            return None
        return Lease(self.flight, () if anyway else looked_for)

    def start(self, lease: Lease | None, fetch: Callable[[Flight], Awaitable[None]]) -> None:
        """Nothing was found: follow who leads, else lead. `fetch` asks the upstream: it begins, puts and ends."""
        self._flights.start_flight(self.flight, lease.holder if lease else None, fetch)

    async def cached_entries(self) -> list[Entry] | None:
        """What the first on board finds in the cache. Raises FlightLost where it left without a look."""
        while not (self.flight.done or self.flight.started):
            await self.flight.wait_change()
        if self.flight.abandoned and not self.flight.started:
            raise FlightLost
        return self.flight.entries

    async def head(self) -> dict[str, Any]:
        """What there is to know before the first part. Raises the flight's error, or FlightLost."""
        while self.flight.head is None:
            if self.flight.done:
                self._raise()
            await self.flight.wait_change()
        return self.flight.head

    async def parts(self) -> AsyncIterator[list[bytes]]:
        """All parts from the first on, as they come. Raises the flight's error, FlightLost, or TooSlow."""
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


class SingleFlight:
    """The flights of this process, and its line to the others. A part of the server's life."""

    def __init__(
        self,
        url: str | None,
        *,
        limit: int,
        drain: float = 0,
        on_error: Callable[[str], None] = lambda _: None,
    ) -> None:
        """`url`: of redis; None: flights within this process only. `limit`: bytes that a flight keeps; a longer one
        takes nobody on board any more. `drain`: seconds that `stop` lets other processes hear the end of what they
        follow. Raises ValueError for a URL with options that are not known."""
        self.limit = limit
        self._address = Address(url) if url else None
        self._connection: Connection | None = None  # subscribed to this process's channel
        self._process_id = secrets.token_hex(8)
        self._number = 0
        self._joinable: dict[str, Flight] = {}  # that can be boarded
        self._leading: dict[str, Flight] = {}  # by token: that others may ask for
        self._following: dict[str, Flight] = {}  # by the leader's token
        self._dirty: set[Flight] = set()
        self._queue: list[Command] = []
        self._wake = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        self._drain = drain
        self._on_error = on_error

    @property
    def connected(self) -> bool:
        """Whether other processes can be heard and asked."""
        return self._connection is not None

    async def start(self) -> None:
        if self._address:
            await self._connect(self._address)
            self._task(self._speak())
            self._task(self._tick(self._address))

    async def stop(self) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(self._drain):
                while heard := [flight for flight in self._leading.values() if flight.remote_subscribers]:
                    await heard[0].wait_change(0.1)
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._connection:
            self._connection.close()

    def _task(self, work: Any) -> asyncio.Task[None]:
        task: asyncio.Task[None] = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    # ---- boarding

    def join(self, name: str) -> Subscriber:
        """A seat in the flight of this name, in a new one where there is none; `first` says which. No name: alone."""
        flight = self._joinable.get(name) if name else None
        if flight is not None:
            return Subscriber(self, flight, first=False)
        self._number += 1
        flight = Flight(self, name, f"{self._process_id}.{self._number}")
        if name:
            self._joinable[name] = self._leading[flight.token] = flight
        return Subscriber(self, flight, first=True)

    def aloft(self, name: str) -> Subscriber | None:
        """A seat in a flight of this name that is past its look into the cache; None: there is none."""
        flight = self._joinable.get(name)
        return Subscriber(self, flight, first=False) if flight is not None and flight.started else None

    def start_flight(self, flight: Flight, holder: str | None, fetch: Callable[[Flight], Awaitable[None]]) -> None:
        flight.started = True
        if holder == "":  # it was stored while we looked
            return flight.abandon()
        flight.task = self._task(self._fly(flight, holder, fetch))
        return flight.notify()

    def left(self, seat: Subscriber) -> None:
        """A seat is empty. The last one ends the flight, unless another process listens or is about to."""
        flight = seat.flight
        if not flight.started:
            if seat.first:
                flight.abandon()  # before it was known what becomes of it: another one looks
        elif not flight.done and not flight.subscribers and not flight.remote_subscribers:
            if flight.holds_lease:
                asyncio.get_running_loop().call_later(GRACE_SECONDS, self._abandon, flight)
            else:
                self._abandon(flight)

    def _abandon(self, flight: Flight) -> None:
        if flight.task and not (flight.done or flight.subscribers or flight.remote_subscribers):
            flight.task.cancel()
            flight.abandon()

    def close(self, flight: Flight) -> None:
        """Nobody can board any more: who asks for the same opens another flight."""
        if self._joinable.get(flight.name) is flight:
            del self._joinable[flight.name]
            if flight.holds_lease:
                flight.holds_lease = False
                self._send("EVAL", _RELEASE, 1, LEASE + flight.name, flight.token)

    def ended(self, flight: Flight) -> None:
        stored = flight.result is not None and flight.result.outcome == "stored"
        if stored:
            flight.holds_lease = False  # runs out by itself: who looks finds the entry first, and spared a round trip
        self.close(flight)
        if flight.abandoned or flight.entries is not None:
            for process in flight.remote_subscribers:
                self._publish(process, {"k": "gone", "f": flight.token})
            flight.remote_subscribers.clear()
        if not flight.remote_subscribers:
            self._leading.pop(flight.token, None)

    # ---- a flight's task

    async def _fly(self, flight: Flight, holder: str | None, fetch: Callable[[Flight], Awaitable[None]]) -> None:
        try:
            # 1. While another one leads: follow. Then the lease is whose question comes first.
            while holder is not None and holder != flight.token:
                if not holder.startswith(f"{self._process_id}."):  # else a flight of ours that is over
                    if not await self._follow(flight, holder):
                        holder = None  # redis is away, and nothing was given out: on alone
                        break
                    if flight.done:
                        return
                lease = Lease(flight, flight.lookup_names, displaced=holder)
                replies = await self._ask(lease.command())
                lease.on_reply(replies[0] if replies else None)
                holder = lease.holder
                if holder == "":
                    break  # its answer is in the cache
            # 2. Lead, where there is something to fetch.
            if holder != "":
                flight.holds_lease = holder == flight.token
                flight.renewed = time.monotonic()
                await fetch(flight)
            flight.abandon()  # unless it ended, as it should
        except asyncio.CancelledError:
            flight.abandon()
            raise
        except Exception as error:  # each seat raises it in its own request
            flight.end(error=error)

    async def _follow(self, flight: Flight, leader: str) -> bool:
        """Follow until the flight is over or its leader dead (True), or redis away before anything came (False)."""
        self._following[leader] = flight
        flight.remote = True
        flight.last_heard, flight.unknown_to_leader, flight.resync = time.monotonic(), False, True
        process = leader.partition(".")[0]
        try:
            while True:
                said = {"k": "join", "f": leader, "p": self._process_id, "n": flight.count, "again": flight.resync}
                flight.resync = False
                beat = ("PUBLISH", CHANNEL + process, _message(said))
                replies = await self._ask(("GET", LEASE + flight.name), beat)
                asked = time.monotonic()
                while (
                    not (flight.done or flight.unknown_to_leader or flight.resync)
                    and time.monotonic() < asked + BEAT_SECONDS
                ):
                    await flight.wait_change(asked + BEAT_SECONDS - time.monotonic())
                silent = time.monotonic() - flight.last_heard
                if flight.done:
                    return True
                if replies is None and not flight.has_head:
                    return False
                dead = flight.unknown_to_leader or silent > (PATIENCE_SECONDS if replies is None else DEAF_SECONDS)
                if replies is not None and replies[0] != leader.encode() and silent > SILENCE_SECONDS:
                    dead = True
                if dead:
                    if flight.has_head:  # what was given out is another answer's beginning
                        flight.abandon()
                    return True
        finally:
            self._following.pop(leader, None)
            flight.remote = False
            self._publish(process, {"k": "leave", "f": leader, "p": self._process_id})

    # ---- the line to the others

    async def _ask(self, *commands: Command) -> list[Any] | None:
        """The replies of one round trip, an error as None; None where redis does not answer."""
        if self._connection is None:
            return None
        try:
            batch = await self._connection.execute(commands)
        except (TimeoutError, ConnectionError):
            self._on_error("flight")
            return None
        return [None if isinstance(reply, CommandError) else reply for reply in batch.replies]

    def _send(self, *command: Any) -> None:
        """One command whose reply nobody needs."""
        if self._connection is not None:
            self._queue.append(command)
            self._wake.set()

    def _publish(self, process: str, said: dict[str, Any]) -> None:
        self._send("PUBLISH", CHANNEL + process, _message(said))

    def dirty(self, flight: Flight) -> None:
        self._dirty.add(flight)
        self._wake.set()

    async def _speak(self) -> None:
        """Send what there is to send, all in one round trip, then what has come meanwhile."""
        while True:
            await self._wake.wait()
            self._wake.clear()
            commands, self._queue = self._queue, []
            now = time.monotonic()
            sent: list[tuple[Flight, str, _Listener, int]] = []
            flights, self._dirty = self._dirty, set()
            for flight in flights:
                for process, listener in flight.remote_subscribers.items():
                    news = self._news(flight, listener)
                    if not news and now - listener.last_told > BEAT_SECONDS / 2:
                        said = {"k": "ping", "f": flight.token, "n": min(listener.sent, flight.count)}
                        news = [(_message(said), listener.sent)]
                    for message, upto in news:
                        commands.append(("PUBLISH", CHANNEL + process, message))
                        sent.append((flight, process, listener, upto))
            if not commands:
                continue
            replies = await self._ask(*commands)
            if replies is None:
                self._dirty |= flights  # the next tick tries again, from where it was
                continue
            receivers = replies[len(commands) - len(sent) :]
            for (flight, process, listener, upto), heard_by in zip(sent, receivers, strict=True):
                listener.last_told = now
                if not heard_by and flight.remote_subscribers.get(process) is listener:
                    self._gone(flight, process)
                elif listener.sent < upto:
                    listener.sent = upto

    def _news(self, flight: Flight, listener: _Listener) -> list[tuple[bytes, int]]:
        """Messages with what this listener does not have yet, and how far each of them brings it."""
        made: list[tuple[bytes, int]] = []
        at = listener.sent
        if flight.head is None and flight.result is None:
            return made
        try:
            parts = flight.parts_after(at) if at <= flight.count else []
        except SlowReader:
            parts = [b""] * (self.limit + 1)
        if any(len(part) > self.limit for part in parts):
            return [(_message({"k": "gone", "f": flight.token}), at)]
        first = at == 0 and flight.head is not None
        while parts or first:
            first = False
            size = count = 0
            while count < len(parts) and (not count or size + len(parts[count]) <= MESSAGE_BYTES):
                size += len(parts[count])
                count += 1
            said = {"k": "parts", "f": flight.token, "n": at, "z": [len(part) for part in parts[:count]]}
            said |= {"h": flight.head} if at == 0 else {}
            made.append((_message(said, parts[:count]), at + count))
            at += count
            parts = parts[count:]
        if flight.result is not None and at == flight.count:
            said = {"k": "end", "f": flight.token, "n": at, "e": flight.result.wire()}
            made.append((_message(said), at + 1))
        return made

    def _gone(self, flight: Flight, process: str) -> None:
        """Another process does not listen any more."""
        if flight.remote_subscribers.pop(process, None) is None:
            return
        if flight.done:
            if not flight.remote_subscribers:
                self._leading.pop(flight.token, None)
        elif not flight.subscribers and not flight.remote_subscribers:
            asyncio.get_running_loop().call_later(GRACE_SECONDS, self._abandon, flight)

    async def _tick(self, address: Address) -> None:
        """Signs of life: leases are renewed, listeners hear that the leader lives, silent ones are forgotten; and a
        lost connection is made anew."""
        while True:
            await asyncio.sleep(BEAT_SECONDS)
            if self._connection is None:
                await self._connect(address)
            now = time.monotonic()
            for flight in list(self._leading.values()):
                if flight.holds_lease and now - flight.renewed > 2 * BEAT_SECONDS:
                    flight.renewed = now
                    self._send("EVAL", _RENEW, 1, LEASE + flight.name, flight.token, int(LEASE_SECONDS * 1000))
                for process, listener in list(flight.remote_subscribers.items()):
                    if now - listener.last_heard > DEAF_SECONDS:
                        self._gone(flight, process)
                if flight.remote_subscribers:
                    self.dirty(flight)
            if self._queue or self._dirty:
                self._wake.set()

    async def _connect(self, address: Address) -> None:
        try:
            async with asyncio.timeout(TIMEOUT_SECONDS):
                wire = await address.connect(lambda: Connection(TIMEOUT_SECONDS, self._pushed, self._lost))
                wire.send(("SUBSCRIBE", CHANNEL + self._process_id))
                await wire.execute([("PING",)])
        except (OSError, TimeoutError, CommandError):
            self._on_error("flight")
            return
        self._connection = wire
        for flight in self._following.values():  # what was said meanwhile was missed
            flight.resync = True
            flight.notify()

    def _lost(self, _: str) -> None:
        self._connection = None

    def _pushed(self, message: list[Any]) -> None:
        if message[0] == b"message":
            with suppress(ValueError, KeyError, TypeError, AttributeError):  # garbage is nobody's message
                self._heard(message[2])

    def _heard(self, data: bytes) -> None:
        head, _, rest = data.partition(b"\n")
        said = orjson.loads(head)
        kind, token = said["k"], said["f"]
        if kind in {"join", "leave"}:
            return self._asked(kind, token, said)
        flight = self._following.get(token)
        if flight is None:
            return None
        flight.last_heard = time.monotonic()
        if kind == "gone":
            flight.unknown_to_leader = True
        elif said["n"] > flight.count:
            flight.resync = True
        elif kind == "end":
            flight.result = FlightResult.read(said["e"])
            self.ended(flight)
        elif kind == "parts":
            if flight.head is None:
                flight.head = said["h"]
            at, known = 0, flight.count - said["n"]  # the first ones, where it was sent again
            for place, size in enumerate(said["z"]):
                if place >= known:
                    flight.append_remote(rest[at : at + size])
                at += size
        flight.notify()
        return None

    def _asked(self, kind: str, token: str, said: dict[str, Any]) -> None:
        flight, process = self._leading.get(token), said["p"]
        if flight is None:
            if kind == "join":
                self._publish(process, {"k": "gone", "f": token})
            return
        if kind == "leave":
            self._gone(flight, process)
            return
        listener = flight.remote_subscribers.get(process)
        if listener is None or said["again"]:
            listener = flight.remote_subscribers[process] = _Listener(min(int(said["n"]), flight.count), 0.0)
        listener.last_heard = time.monotonic()
        self.dirty(flight)


def _message(said: dict[str, Any], parts: Sequence[bytes] = ()) -> bytes:
    return b"".join((orjson.dumps(said), b"\n", *parts))
