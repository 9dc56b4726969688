"""Flights across processes: messages between leaders and followers by redis pub/sub, and the renewal of leases.

Each process has a channel. A follower joins by a message to the leader's channel and then gets the flight from its
first part on. Parts exist only in the leader's memory; a follower that missed some requests them again, so that no part
is lost or repeated, and it confirms what it has received, so that redis never holds more than a window of parts. Knows
flights by token; does not know which requests share one, or what starts and ends them.
"""

import asyncio
import secrets
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import orjson

from ..errors import SlowReader
from ..redis.client import Client, OnError, Script
from ..redis.connection import Command, CommandError, RedisError
from ..tasks import end, supervise
from .flight import LEASE, LEASE_SECONDS, Flight, FlightResult, OnFlight, RemoteSubscriber

CHANNEL = "lab:flight:to:"
BEAT_SECONDS = 0.4  # between signs of life, of leaders (lease, ping) and of followers (join)
SILENCE_SECONDS = 1.2  # three beats: a leader without lease and without a message is dead
DEAF_SECONDS = 5.0  # a leader with lease but without a message, or a follower without a beat, is dead
PATIENCE_SECONDS = 10.0  # longest wait for redis of a follower that has already sent a part of the answer
GRACE_SECONDS = 0.2  # a flight without subscribers continues for this time: another process may be about to join
TIMEOUT_SECONDS = 0.5  # timeout of one round trip to redis; only followers wait for it
MESSAGE_BYTES = 256 * 1024
WINDOW_BYTES = 1024 * 1024  # sent but not confirmed; redis closes a connection that lags by 8 MB for a minute, or 32 MB

_RENEW = Script("""
local held = redis.call('GET', KEYS[1])
if held and held ~= ARGV[1] then return 0 end
redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
return 1
""")
_RELEASE = Script("if redis.call('GET', KEYS[1]) == ARGV[1] then redis.call('DEL', KEYS[1]) end return 1")


class FlightChannel:
    """The channel of this process. Without a URL there are no other processes."""

    def __init__(self, url: str | None, *, on_error: OnError, on_end: OnFlight, on_deserted: OnFlight) -> None:
        """`on_end` is called when a leader reports the result of a followed flight, `on_deserted` when a flight of this
        process may have lost its last subscriber."""
        self._on_error, self._on_end, self._on_deserted = on_error, on_end, on_deserted
        self.process_id = secrets.token_hex(8)
        self.leading: dict[str, Flight] = {}  # token -> flight that other processes may join
        self.following: dict[str, Flight] = {}  # the leader's token -> flight
        self._redis: Client | None = None
        if url:
            self._redis = Client(
                url, timeout=TIMEOUT_SECONDS, channel=CHANNEL + self.process_id,
                on_push=self._on_push, on_up=self._on_up, on_down=lambda _: on_error("flight"),
            )  # fmt: skip
        self._dirty: set[Flight] = set()
        self._queue: list[Command] = []
        self._wake = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []

    @property
    def connected(self) -> bool:
        """Other processes can be reached."""
        return self._redis is not None and self._redis.up

    async def start(self) -> None:
        if self._redis:
            await self._redis.start()
            self._tasks = [supervise("flights", self._send_forever), supervise("flights-beat", self._beat)]

    async def stop(self) -> None:
        await end(*self._tasks)
        if self._redis:
            await self._redis.stop()

    # ---- for single flight

    async def follow(self, flight: Flight, leader: str) -> bool:
        """Follow until the flight is done or its leader dead (True), or redis fails before the first part (False)."""
        self.following[leader] = flight
        flight.remote = True
        flight.last_received, flight.unknown_to_leader, flight.resync = time.monotonic(), False, True
        process = leader.partition(".")[0]
        try:
            while True:
                fields = {"k": "join", "f": leader, "p": self.process_id, "n": flight.count, "again": flight.resync}
                flight.resync, flight.unconfirmed = False, 0
                beat = ("PUBLISH", CHANNEL + process, _message(fields))
                replies = await self.execute(("GET", LEASE + flight.name), beat)
                with suppress(TimeoutError):
                    async with asyncio.timeout(BEAT_SECONDS):
                        while not (flight.done or flight.unknown_to_leader or flight.resync):
                            if flight.unconfirmed >= WINDOW_BYTES // 2:
                                break
                            await flight.wait_change()
                silent = time.monotonic() - flight.last_received
                if flight.done:
                    return True
                if replies is None and not flight.head:
                    return False
                patience = PATIENCE_SECONDS if replies is None else DEAF_SECONDS
                if replies is not None and replies[0] != leader.encode():
                    patience = SILENCE_SECONDS
                if flight.unknown_to_leader or silent > patience:
                    if flight.head:  # subscribers have sent the beginning of this answer: another one cannot go on
                        flight.abandon()
                    return True
        finally:
            self.following.pop(leader, None)
            flight.remote = False
            self._publish(process, {"k": "leave", "f": leader, "p": self.process_id})

    async def execute(self, *commands: Command) -> list[Any] | None:
        """The replies of one round trip, errors as None; None if redis does not answer."""
        if self._redis is None or not self._redis.up:
            return None
        try:
            pipeline = await self._redis.pipeline(commands)
        except RedisError:
            self._on_error("flight")
            return None
        return [None if isinstance(reply, CommandError) else reply for reply in pipeline.replies]

    def release(self, flight: Flight) -> None:
        flight.holds_lease = False
        self._send(_RELEASE([LEASE + flight.name], flight.token))

    def disown(self, flight: Flight) -> None:
        """Tell all followers that there is no such flight."""
        for process in flight.remote_subscribers:
            self._publish(process, {"k": "gone", "f": flight.token})
        flight.remote_subscribers.clear()

    def wait_for_followers(self, flight: Flight) -> None:
        """The flight has no subscriber: check it again after the time that another process needs to join."""
        asyncio.get_running_loop().call_later(GRACE_SECONDS, self._on_deserted, flight)

    def mark_dirty(self, flight: Flight) -> None:
        """The flight has something to send to its followers."""
        self._dirty.add(flight)
        self._wake.set()

    # ---- sending

    def _send(self, command: Command) -> None:
        """Queue a command whose reply is ignored."""
        if self.connected:
            self._queue.append(command)
            self._wake.set()

    def _publish(self, process: str, fields: dict[str, Any]) -> None:
        self._send(("PUBLISH", CHANNEL + process, _message(fields)))

    async def _send_forever(self) -> None:
        """Send all queued commands in one round trip, then those queued meanwhile, and so on."""
        while True:
            await self._wake.wait()
            self._wake.clear()
            commands, self._queue = self._queue, []
            now = time.monotonic()
            sent: list[tuple[Flight, str, RemoteSubscriber, int]] = []
            flights, self._dirty = self._dirty, set()
            for flight in flights:
                for process, follower in flight.remote_subscribers.items():
                    news = self._news(flight, follower)
                    if not news and now - follower.last_sent > BEAT_SECONDS / 2:
                        fields = {"k": "ping", "f": flight.token, "n": min(follower.sent, flight.count)}
                        news = [(_message(fields), follower.sent)]
                    for message, upto in news:
                        commands.append(("PUBLISH", CHANNEL + process, message))
                        sent.append((flight, process, follower, upto))
            if not commands:
                continue
            replies = await self.execute(*commands)
            if replies is None:
                self._dirty |= flights  # the next beat tries again, from the same position
                continue
            receivers = replies[len(commands) - len(sent) :]
            for (flight, process, follower, upto), received_by in zip(sent, receivers, strict=True):
                follower.last_sent = now
                if not received_by and flight.remote_subscribers.get(process) is follower:
                    self._remove(flight, process)
                elif follower.sent < upto:
                    follower.sent = upto

    def _news(self, flight: Flight, follower: RemoteSubscriber) -> list[tuple[bytes, int]]:
        """Messages with what this follower does not have yet, and the position after each of them."""
        at = follower.sent
        if flight.head is None and flight.result is None:
            return []
        try:
            parts = flight.parts_after(at) if at <= flight.count else []
        except SlowReader:
            return [(_message({"k": "gone", "f": flight.token}), at)]
        # 1. Parts within the window, several in a message; the head goes with the first.
        groups: list[list[bytes]] = [[]] if at == 0 and flight.head is not None else []
        room = WINDOW_BYTES - flight.size_of(follower.received, at)
        for part in parts:
            if room <= 0:
                break
            room -= len(part)
            if not groups or (groups[-1] and sum(map(len, groups[-1])) + len(part) > MESSAGE_BYTES):
                groups.append([])
            groups[-1].append(part)
        made: list[tuple[bytes, int]] = []
        for group in groups:
            fields = {"k": "parts", "f": flight.token, "n": at, "z": [len(part) for part in group]}
            fields |= {"h": flight.head} if at == 0 else {}
            at += len(group)
            made.append((_message(fields, group), at))
        # 2. The result.
        if flight.result is not None and at == flight.count:
            fields = {"k": "end", "f": flight.token, "n": at, "e": flight.result.wire()}
            made.append((_message(fields), at + 1))
        return made

    def _remove(self, flight: Flight, process: str) -> None:
        if flight.remote_subscribers.pop(process, None) is None:
            return
        if flight.done:
            if not flight.remote_subscribers:
                self.leading.pop(flight.token, None)
        elif not flight.subscribers and not flight.remote_subscribers:
            self.wait_for_followers(flight)

    async def _beat(self) -> None:
        """Renew leases, ping followers, remove silent ones."""
        while True:
            await asyncio.sleep(BEAT_SECONDS)
            now = time.monotonic()
            for flight in list(self.leading.values()):
                if flight.holds_lease and now - flight.renewed > 2 * BEAT_SECONDS:
                    flight.renewed = now
                    self._send(_RENEW([LEASE + flight.name], flight.token, int(LEASE_SECONDS * 1000)))
                for process, follower in list(flight.remote_subscribers.items()):
                    if now - follower.last_received > DEAF_SECONDS:
                        self._remove(flight, process)
                if flight.remote_subscribers:
                    self.mark_dirty(flight)
            if self._queue or self._dirty:
                self._wake.set()

    # ---- receiving

    def _on_up(self, *_: Any) -> None:
        for flight in self.following.values():  # messages may have been missed
            flight.resync = True
            flight.notify()

    def _on_push(self, message: list[Any]) -> None:
        if message[0] == b"message":
            with suppress(ValueError, KeyError, TypeError, AttributeError):  # a malformed message is ignored
                self._on_message(message[2])

    def _on_message(self, data: bytes) -> None:
        head, _, rest = data.partition(b"\n")
        fields = orjson.loads(head)
        kind, token = fields["k"], fields["f"]
        if kind in {"join", "leave"}:
            self._on_follower(kind, token, fields)
        flight = self.following.get(token)
        if flight is None:
            return
        flight.last_received = time.monotonic()
        if kind == "gone":
            flight.unknown_to_leader = True
        elif fields["n"] > flight.count:
            flight.resync = True
        elif kind == "end":
            flight.result = FlightResult.read(fields["e"])
            self._on_end(flight)
        elif kind == "parts":
            if flight.head is None:
                flight.head = fields["h"]
            at, known = 0, flight.count - fields["n"]  # known: parts at the beginning that were sent again
            flight.unconfirmed += len(rest)
            for place, size in enumerate(fields["z"]):
                if place >= known:
                    flight.add(rest[at : at + size])
                at += size
        flight.notify()

    def _on_follower(self, kind: str, token: str, fields: dict[str, Any]) -> None:
        flight, process = self.leading.get(token), fields["p"]
        if flight is None:
            if kind == "join":
                self._publish(process, {"k": "gone", "f": token})
            return
        if kind == "leave":
            self._remove(flight, process)
            return
        follower = flight.remote_subscribers.get(process)
        if follower is None or fields["again"]:
            position = min(int(fields["n"]), flight.count)
            follower = flight.remote_subscribers[process] = RemoteSubscriber(position, position, 0.0)
        follower.received = max(follower.received, min(int(fields["n"]), flight.count))
        follower.last_received = time.monotonic()
        self.mark_dirty(flight)


def _message(fields: dict[str, Any], parts: Sequence[bytes] = ()) -> bytes:
    return b"".join((orjson.dumps(fields), b"\n", *parts))
