"""Single flight (F1 to F4, X1): of identical requests under way at once one goes upstream, in one process and across.

First the flights themselves, two "processes" on a real redis; then two real proxy processes before a mock that counts.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import os
import re
import signal
import ssl
import weakref
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import httpx2
import pytest
import redis.asyncio as aioredis
from fixtures_proxy import HURRIED_MS, UPSTREAM_KEY, control_client, mock, new, proxy, redis_client, redis_url
from lab_proxy.cache import flight_channel
from lab_proxy.cache.entry import Entry
from lab_proxy.cache.flight import LEASE, LEASE_SECONDS, PIECE_BYTES, Flight, FlightLost, Subscriber
from lab_proxy.cache.flight_channel import BEAT_SECONDS, CHANNEL, WINDOW_BYTES
from lab_proxy.cache.single_flight import SPARE_BYTES, SingleFlight
from lab_proxy.errors import SlowReader, UpstreamDown, UpstreamRefused
from lab_proxy.redis import client as redis_module
from lab_proxy.redis.connection import RedisError
from openai.lib.streaming.chat import ChatCompletionStreamState
from openai.types.chat import ChatCompletionChunk
from processes import (
    ANSWERS,
    GENEROUS_SECONDS,
    Process,
    eventually,
    eventually_async,
    free_port,
    redis_server,
)
from prometheus_client.parser import text_string_to_metric_families
from redis import Redis

TLS = ssl.create_default_context()  # made once: a client of its own takes 20 ms to make one
LIMIT = 10_000  # bytes that a flight keeps, in the tests of flights alone
NEVER = 3600.0  # seconds: longer than any test runs
Fetch = Callable[[Flight], Awaitable[None]]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    with redis_server(tmp_path_factory.mktemp("redis")) as started:
        yield started


@contextlib.asynccontextmanager
async def flights(server: Process | None) -> AsyncIterator[SingleFlight]:
    made = SingleFlight(redis_url(server) if server else None, limit=LIMIT)
    await made.start()
    assert made.channel.connected == bool(server)
    try:
        yield made
    finally:
        await made.stop()


@pytest.fixture
async def two(server: Process) -> AsyncIterator[tuple[SingleFlight, SingleFlight]]:
    async with flights(server) as one, flights(server) as other:
        yield one, other


class Upstream:
    """What a flight asks: counts, and gives parts when it is told to."""

    def __init__(self) -> None:
        self.calls = self.cancelled = 0
        self.parts: asyncio.Queue[bytes | Exception | None] = asyncio.Queue()
        self.flight: Flight | None = None  # that asked last

    async def fetch(self, flight: Flight) -> None:
        self.calls += 1
        self.flight = flight
        try:
            while True:
                part = await self.parts.get()
                if isinstance(part, Exception):
                    raise part
                if flight.head is None:
                    flight.begin({"by": self.calls})
                if part is None:
                    return flight.end("stored")
                await flight.append(part)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise

    def say(self, *parts: bytes | Exception | None) -> None:
        for part in parts:
            self.parts.put_nowait(part)

    def followed(self) -> bool:
        """Whether another process follows the flight."""
        return self.flight is not None and bool(self.flight.remote_subscribers)


async def take_off(seat: Subscriber, server: Process | None, fetch: Fetch) -> None:
    """What the exchange does on a miss: the lease's question in one round trip, then off."""
    if seat.first:
        lease = seat.lease(())
        if lease and server:
            async with redis_client(server) as client:
                lease.on_reply(await client.execute(*lease.command()))
        seat.start(lease, fetch)
    else:
        await seat.cached_entries()


async def hear(
    flights: SingleFlight, name: str, server: Process | None, fetch: Fetch,
    *, heard: list[bytes] | None = None, gate: asyncio.Event | None = None,
) -> list[bytes]:  # fmt: skip
    """All parts. `heard` has them as they come; after each of its reads it waits for `gate`."""
    said: list[bytes] = [] if heard is None else heard
    with flights.join(name) as seat:
        await take_off(seat, server, fetch)
        await seat.head()
        async for parts in seat.parts():
            said += parts
            if gate:
                await gate.wait()
    return said


async def leave(task: asyncio.Task[Any]) -> None:
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def another_is_let_go(flights: SingleFlight, server: Process) -> None:
    """One more flight of this process, left by its only listener, is over: so is each one that was left before."""
    up = Upstream()
    task = asyncio.create_task(hear(flights, new(), server, up.fetch))
    await eventually_async(lambda: up.calls)
    await leave(task)
    await eventually_async(lambda: up.cancelled)


# ---- flights alone


async def test_flight_f1_one_of_many_asks(server: Process, two: tuple[SingleFlight, SingleFlight]) -> None:
    """Of 40 in two processes one asks; who comes late gets the prefix at once, then each part as it comes."""
    up, name = Upstream(), new()
    heard: list[list[bytes]] = [[] for _ in range(40)]
    early = [asyncio.create_task(hear(two[n % 2], name, server, up.fetch, heard=said)) for n, said in enumerate(heard)]
    up.say(b"a", b"b")
    await eventually_async(lambda: heard == [[b"a", b"b"]] * 40)
    with two[1].join(name) as late:
        assert not late.first
        await take_off(late, server, up.fetch)
        stream = late.parts()
        assert await anext(stream) == [b"a", b"b"]
        up.say(b"c")
        assert await anext(stream) == [b"c"]
        up.say(None)
        with pytest.raises(StopAsyncIteration):
            await anext(stream)
        assert late.flight.result is not None
        assert late.flight.result.outcome == "stored"
    assert await asyncio.gather(*early) == [[b"a", b"b", b"c"]] * 40
    assert up.calls == 1


async def test_flight_f1_what_the_first_finds_is_everybodys(two: tuple[SingleFlight, SingleFlight]) -> None:
    """In one process one looks into the cache; who waits gets the entry too, or looks itself where the first left."""
    name, found = new(), [Entry(b"{}", 10, 0.0)]
    with two[0].join(name) as first, two[0].join(name) as second:
        assert (first.first, second.first) == (True, False)
        first.flight.resolve_from_cache(found)
        assert await second.cached_entries() is found
    with contextlib.ExitStack() as leaving:
        first = leaving.enter_context(two[0].join(name))
        with two[0].join(name) as second:
            waiting = asyncio.create_task(second.cached_entries())
            await asyncio.sleep(0)
            assert first.first
            leaving.close()
            with pytest.raises(FlightLost):
                await waiting
        with two[0].join(name) as third:
            assert third.first


@pytest.mark.parametrize("follower", ["stays", "leaves"])
async def test_flight_f2_goes_on_while_another_process_listens(
    server: Process, two: tuple[SingleFlight, SingleFlight], follower: str
) -> None:
    """The leader's client leaves: the follower gets the rest. Both have left: the upstream is let go."""
    up, name = Upstream(), new()
    leader = asyncio.create_task(hear(two[0], name, server, up.fetch))
    up.say(b"a")
    await eventually_async(lambda: up.calls)
    following = asyncio.create_task(hear(two[1], name, server, up.fetch))
    await eventually_async(up.followed)
    await leave(leader)
    await another_is_let_go(two[0], server)
    assert not up.cancelled
    if follower == "stays":
        up.say(b"b", None)
        assert await following == [b"a", b"b"]
    else:
        await leave(following)
        await eventually_async(lambda: up.cancelled)
    assert up.calls == 1


@pytest.mark.parametrize("ending", ["whole", "failed", "left"])
async def test_flight_f2_nothing_is_kept_of_a_flight_that_is_over(
    server: Process, two: tuple[SingleFlight, SingleFlight], ending: str
) -> None:
    """Its parts may be large: however a flight ends, both processes drop it, at the latest with the next one."""

    async def aloft() -> tuple[Upstream, list[asyncio.Task[list[bytes]]], list[weakref.ref[Flight]]]:
        up, name = Upstream(), new()
        tasks = [asyncio.create_task(hear(two[0], name, server, up.fetch))]
        await eventually_async(lambda: up.calls)
        tasks += [asyncio.create_task(hear(two[1], name, server, up.fetch))]
        await eventually_async(up.followed)
        with two[0].join(name) as leads, two[1].join(name) as follows:
            assert (leads.first, follows.first) == (False, False)
            return up, tasks, [weakref.ref(leads.flight), weakref.ref(follows.flight)]

    up, tasks, kept = await aloft()
    up.say(b"a")
    if ending != "left":
        up.say(UpstreamDown("nobody there") if ending == "failed" else None)
        await asyncio.wait(tasks)
    for task in tasks:
        await leave(task)
    del up, tasks, task

    def gone() -> bool:
        gc.collect()  # an exception and its frames hold each other
        return not any(each() for each in kept)

    _, others, _ = await aloft()
    await eventually_async(gone, what="both processes have dropped the flight")
    for each in others:
        await leave(each)


@pytest.mark.parametrize("where", ["here", "there"])
async def test_flight_f3_errors_are_everybodys(
    server: Process, two: tuple[SingleFlight, SingleFlight], where: str
) -> None:
    """A failed flight gives its error to who follows: status, envelope and Retry-After, across processes too."""
    up, name = Upstream(), new()
    first = asyncio.create_task(hear(two[0], name, server, up.fetch))
    await eventually_async(lambda: up.calls)
    second = asyncio.create_task(hear(two[where == "there"], name, server, up.fetch))
    await eventually_async(lambda: up.flight and up.flight.shared)
    up.say(UpstreamDown("nobody there", headers={"retry-after": "2"}))
    with pytest.raises(UpstreamDown):
        await first
    with pytest.raises(UpstreamRefused if where == "there" else UpstreamDown) as caught:
        await second
    assert caught.value.status == 503
    assert caught.value.code == "upstream_unavailable"
    assert caught.value.headers == {"retry-after": "2"}
    assert b"nobody there" in caught.value.body()
    assert up.calls == 1


async def test_flight_f3_one_takes_over_from_a_dead_lease(
    server: Process, two: tuple[SingleFlight, SingleFlight], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A lease of a process that is no more: its followers wait for it to run out, then exactly one of them leads."""
    monkeypatch.setattr(flight_channel, "BEAT_SECONDS", 0.05)
    monkeypatch.setattr(flight_channel, "SILENCE_SECONDS", 0.15)
    monkeypatch.setattr(flight_channel, "DEAF_SECONDS", NEVER)
    up, name, dead = Upstream(), new(), "0123456789abcdef"
    async with (
        asyncio.timeout(GENEROUS_SECONDS), aioredis.Redis.from_url(redis_url(server)) as client,
        client.pubsub(ignore_subscribe_messages=True) as channel,
    ):  # fmt: skip
        await channel.subscribe(CHANNEL + dead)
        await client.set(LEASE + name, f"{dead}.1")
        tasks = [asyncio.create_task(hear(each, name, server, up.fetch)) for each in two for _ in range(5)]
        # While it is held, its silence alone is no reason: each process has asked for more than SILENCE_SECONDS.
        beats: Counter[str] = Counter()
        while len(beats) < 2 or min(beats.values()) < 10:
            if message := await channel.get_message(timeout=GENEROUS_SECONDS):
                beats[json.loads(message["data"])["p"]] += 1
        assert up.calls == 0
        await client.delete(LEASE + name)
        await eventually_async(up.followed)
        up.say(b"a", None)
        assert await asyncio.gather(*tasks) == [[b"a"]] * 10
    assert up.calls == 1


async def test_flight_f3_a_living_leader_keeps_its_lease(
    server: Process, two: tuple[SingleFlight, SingleFlight], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A flight that takes longer than its lease, with nobody following yet, is still the one to follow: its leader
    gives the lease new life again and again."""
    assert 3 * BEAT_SECONDS < LEASE_SECONDS, "a lease is renewed after two beats or three"
    monkeypatch.setattr(flight_channel, "BEAT_SECONDS", 0.05)
    up, name = Upstream(), new()
    leader = asyncio.create_task(hear(two[0], name, server, up.fetch))
    await eventually_async(lambda: up.calls)
    async with aioredis.Redis.from_url(redis_url(server)) as client:

        async def runs_out() -> bool:
            return await client.pttl(LEASE + name) > 0

        for _ in range(3):
            assert await client.persist(LEASE + name)
            await eventually_async(runs_out, what="the lease is renewed")
    follower = asyncio.create_task(hear(two[1], name, server, up.fetch))
    await eventually_async(up.followed)
    up.say(b"a", None)
    assert await leader == await follower == [b"a"]
    assert up.calls == 1


async def test_flight_f3_a_forgotten_lease_costs_nothing(
    server: Process, two: tuple[SingleFlight, SingleFlight], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A lease whose flight is over (its answer was not stored, or its client left while redis was asked) holds nobody
    up, though it never runs out: the leading process says that it does not know it."""
    monkeypatch.setattr(flight_channel, "DEAF_SECONDS", NEVER)
    for leader in two:
        up, name = Upstream(), new()
        process = leader.join("").flight.token.partition(".")[0]
        async with aioredis.Redis.from_url(redis_url(server)) as client:
            await client.set(LEASE + name, f"{process}.99999")
        up.say(b"a", None)
        async with asyncio.timeout(GENEROUS_SECONDS):
            assert await hear(two[0], name, server, up.fetch) == [b"a"]
        assert up.calls == 1


async def test_flight_f4_without_a_name_nobody_joins(monkeypatch: pytest.MonkeyPatch) -> None:
    """A flight without a name is its own request's alone, and ends with it: nobody else could want it."""
    monkeypatch.setattr(flight_channel, "GRACE_SECONDS", NEVER)
    async with flights(None) as alone:
        ups = [Upstream(), Upstream()]
        tasks = [asyncio.create_task(hear(alone, "", None, up.fetch)) for up in ups]
        await eventually_async(lambda: all(up.calls == 1 for up in ups))
        await leave(tasks[0])
        await eventually_async(lambda: ups[0].cancelled)
        ups[1].say(b"b", None)
        assert await tasks[1] == [b"b"]


async def test_flight_a_slow_reader_does_not_hold_others_up(
    server: Process, two: tuple[SingleFlight, SingleFlight]
) -> None:
    """Within the limit everybody gets all, at its own pace; beyond it, where nothing is spare, nobody boards any more,
    the fastest reader's pace is the upstream's, and who is further behind than the limit is told so."""
    two[0]._spare.left = 0
    up, name, gate = Upstream(), new(), asyncio.Event()
    slow = asyncio.create_task(hear(two[0], name, server, up.fetch, gate=gate))
    await eventually_async(lambda: up.calls)
    quick = asyncio.create_task(hear(two[1], name, server, up.fetch))
    await eventually_async(up.followed)
    up.say(*[b"%1000d" % n for n in range(9)], None)
    assert len(await quick) == 9
    assert not slow.done()
    gate.set()
    assert await slow == await quick

    up, name = Upstream(), new()
    with two[0].join(name) as slow_seat, two[0].join(name) as quick_seat:
        await take_off(slow_seat, server, up.fetch)
        up.say(b"first")
        lagging, leading = slow_seat.parts(), quick_seat.parts()
        assert await anext(lagging) == await anext(leading) == [b"first"]
        up.say(*[b"%1000d" % n for n in range(100)], None)
        for _ in range(100):  # turns of the loop, in which it might ask for more
            await asyncio.sleep(0)
        assert 9 <= up.parts.qsize() - 80 <= 12  # it waits for the fastest, ten or so parts ahead
        got = [part async for parts in leading for part in parts]
        assert len(got) == 100
        with pytest.raises(SlowReader):
            await anext(lagging)
        with two[0].join(name) as other:
            assert other.first


async def test_flight_f1_a_long_stream_is_joined_late(server: Process, two: tuple[SingleFlight, SingleFlight]) -> None:
    """Beyond a flight's own limit its parts are kept from what all flights share: who comes late, in either process,
    has all of them. What was taken is given back with the flight."""
    up, name, parts = Upstream(), new(), [b"%1000d" % n for n in range(50)]
    heard: list[bytes] = []
    leader = asyncio.create_task(hear(two[0], name, server, up.fetch, heard=heard))
    up.say(*parts)
    await eventually_async(lambda: heard == parts)
    assert two[0]._spare.left == SPARE_BYTES - (50 * 1000 - LIMIT)
    late: list[list[bytes]] = [[], []]
    followers = [
        asyncio.create_task(hear(each, name, server, up.fetch, heard=said))
        for each, said in zip(two, late, strict=True)
    ]
    await eventually_async(lambda: late == [parts, parts])
    up.say(b"last", None)
    assert await asyncio.gather(leader, *followers) == [[*parts, b"last"]] * 3
    assert up.calls == 1
    del leader, followers, up

    def given_back() -> bool:
        gc.collect()
        return [each._spare.left for each in two] == [SPARE_BYTES] * 2

    up, name = Upstream(), new()  # the last flight is kept until the next one
    leader = asyncio.create_task(hear(two[0], name, server, up.fetch))
    await eventually_async(lambda: up.calls)
    follower = asyncio.create_task(hear(two[1], name, server, up.fetch))
    await eventually_async(up.followed)
    up.say(b"a", None)
    assert await leader == await follower == [b"a"]
    await eventually_async(given_back, what="what the flight has taken is spare again")


async def test_flight_f1_a_large_answer_crosses_window_by_window(
    server: Process, two: tuple[SingleFlight, SingleFlight], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Redis never has more of it than a window: the leader goes on when the follower has confirmed what it got. In a
    process all requests share one copy."""
    monkeypatch.setattr(flight_channel, "DEAF_SECONDS", NEVER)
    answer, name, gate = os.urandom(5 * WINDOW_BYTES), new(), asyncio.Event()
    calls, sent = 0, 0

    async def fetch(flight: Flight) -> None:
        nonlocal calls
        calls += 1
        await gate.wait()
        flight.begin({"streams": False})
        flight.add_whole(answer)
        flight.end("size")

    async def whole(flights: SingleFlight) -> bytes:
        with flights.join(name) as seat:
            await take_off(seat, server, fetch)
            return await seat.whole()

    def count(fields: dict[str, Any], parts: Any = ()) -> bytes:
        nonlocal sent
        sent += sum(map(len, parts))
        return message(fields, parts)

    message = flight_channel._message
    monkeypatch.setattr(flight_channel, "_message", count)
    leader = asyncio.create_task(whole(two[0]))
    await eventually_async(lambda: calls)
    leading = next(iter(two[0].channel.leading.values()))
    followers = [asyncio.create_task(whole(two[1])) for _ in range(2)]
    await eventually_async(lambda: leading.remote_subscribers)
    # The follower confirms nothing for the time being.
    talks, execute = asyncio.Event(), two[1].channel.execute

    async def silent(*commands: Any) -> Any:
        await talks.wait()
        return await execute(*commands)

    monkeypatch.setattr(two[1].channel, "execute", silent)
    gate.set()
    following = next(iter(two[1].channel.following.values()))
    await eventually_async(lambda: following._bytes >= WINDOW_BYTES)
    for _ in range(3):  # times in which it might send more
        two[0].channel.mark_dirty(leading)
        await asyncio.sleep(BEAT_SECONDS / 4)
    assert WINDOW_BYTES <= sent < WINDOW_BYTES + PIECE_BYTES
    talks.set()
    assert await leader is answer
    one, other = await asyncio.gather(*followers)
    assert one == answer
    assert one is other
    assert (calls, sent) == (1, len(answer))


async def test_flight_f1_a_lease_for_any_number_of_entries(
    server: Process, two: tuple[SingleFlight, SingleFlight]
) -> None:
    """Where all of 200 entries exist by now nobody leads; where one is missing somebody does."""
    names = [f"lab:entry:{new()}" for _ in range(200)]
    async with redis_client(server) as client:
        for there, leads in ((names[:-1], True), (names, False)):
            await client.execute("MSET", *(word for name in there for word in (name, "x")))
            with two[0].join(new()) as seat:
                lease = seat.lease(names)
                assert lease
                lease.on_reply(await client.execute(*lease.command()))
                assert lease.holder == (seat.flight.token if leads else "")


async def test_flight_x1_cut_off_and_back_nothing_is_lost_or_twice(
    server: Process, two: tuple[SingleFlight, SingleFlight], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The connections are cut again and again in the middle of a flight, at its end too: the follower has every part
    once."""
    monkeypatch.setattr(flight_channel, "BEAT_SECONDS", 0.05)
    monkeypatch.setattr(flight_channel, "PATIENCE_SECONDS", NEVER)
    monkeypatch.setattr(redis_module, "PROBE_SECONDS", (0.05,))
    up, name = Upstream(), new()
    heard: list[bytes] = []
    leader = asyncio.create_task(hear(two[0], name, server, up.fetch))
    await eventually_async(lambda: up.calls)
    follower = asyncio.create_task(hear(two[1], name, server, up.fetch, heard=heard))
    await eventually_async(up.followed)
    said: list[bytes] = []

    def say() -> None:
        said.extend(parts := [b"%d" % n for n in range(len(said), len(said) + 10)])
        up.say(*parts)

    async with aioredis.Redis.from_url(redis_url(server)) as client:
        for turn in range(3):
            say()
            await eventually_async(lambda: heard == said)
            say()
            assert await client.execute_command("CLIENT", "KILL", "TYPE", "pubsub") == 2
            say()
            if turn < 2:
                await eventually_async(lambda: heard == said)
                await eventually_async(lambda: two[0].channel.connected and two[1].channel.connected)
        up.say(None)
    assert await follower == said
    assert await leader == said
    assert up.calls == 1


async def test_flight_x1_garbage_is_nobodys_message(server: Process, two: tuple[SingleFlight, SingleFlight]) -> None:
    """Garbage in the channel, at the lease's name, or a list there: no flight across processes, no fault."""
    process = two[0].join("").flight.token.partition(".")[0]
    async with aioredis.Redis.from_url(redis_url(server)) as client, redis_client(server) as ours:
        for junk in (
            b"",
            b"\xff\n",
            b"[]",
            b'{"k":"join"}',
            b'{"k":"parts","f":"x"}',
            b'{"k":"join","f":1,"p":2,"n":[]}',
        ):
            assert await client.publish(CHANNEL + process, junk) == 1
        for spoil in (lambda name: client.set(name, b"\xff garbage"), lambda name: client.rpush(name, "a")):
            up, name = Upstream(), new()
            await spoil(LEASE + name)
            up.say(b"a", None)
            with two[0].join(name) as seat:
                lease = seat.lease(())
                assert lease
                try:
                    lease.on_reply(await ours.execute(*lease.command()))
                except RedisError:
                    lease.on_failure()
                seat.start(lease, up.fetch)
                assert [part async for parts in seat.parts() for part in parts] == [b"a"]
        up, name = Upstream(), new()
        leader = asyncio.create_task(hear(two[0], name, server, up.fetch))
        await eventually_async(lambda: up.calls)
        follower = asyncio.create_task(hear(two[1], name, server, up.fetch))
        await eventually_async(up.followed)
        up.say(b"a", None)
        assert await leader == await follower == [b"a"]


@pytest.mark.parametrize("fault", ["paused", "killed"])
async def test_flight_x1_redis_gone_each_process_goes_on_alone(
    tmp_path: Path, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Redis paused or killed while a follower waits: it asks itself; a follower in mid-stream gets the rest when redis
    is back."""
    monkeypatch.setattr(flight_channel, "PATIENCE_SECONDS", NEVER)
    with redis_server(tmp_path) as server:
        async with flights(server) as one, flights(server) as other:
            up, waiting, running = Upstream(), new(), new()
            calls = [asyncio.create_task(hear(each, waiting, server, up.fetch)) for each in (one, one, other, other)]
            await eventually_async(up.followed)
            assert up.calls == 1
            stream = Upstream()
            heard: tuple[list[bytes], list[bytes]] = ([], [])
            told = [
                asyncio.create_task(hear(each, running, server, stream.fetch, heard=said))
                for each, said in zip((one, other), heard, strict=True)
            ]
            stream.say(b"a")
            await eventually_async(lambda: heard == ([b"a"], [b"a"]))
            if fault == "paused":
                os.kill(server.popen.pid, signal.SIGSTOP)
            else:
                server.popen.kill()
            await eventually_async(lambda: up.calls == 2)
            up.say(b"x", None, b"x", None)
            stream.say(b"b")
            assert await asyncio.gather(*calls) == [[b"x"]] * 4
            stream.say(b"c", None)
            if fault == "paused":
                os.kill(server.popen.pid, signal.SIGCONT)
                again = contextlib.nullcontext(server)
            else:
                server.popen.wait()
                again = redis_server(tmp_path, port=server.port)
            with again:
                async with asyncio.timeout(GENEROUS_SECONDS):
                    assert await asyncio.gather(*told) == [[b"a", b"b", b"c"]] * 2
                assert stream.calls == 1
                await eventually_async(lambda: one.channel.connected and other.channel.connected)


# ---- two proxy processes


class Channels:
    """Which flights are followed across processes: what their leaders say in redis's channels."""

    def __init__(self, port: int) -> None:
        self._client = Redis(port=port)
        self._channel = self._client.pubsub()
        self._channel.psubscribe(CHANNEL + "*")
        self._followed: set[tuple[str, bytes]] = set()  # flight, and the channel of who follows it
        self._before: set[tuple[str, bytes]] = set()

    def followed(self) -> int:
        """How many flights are followed, each once for each process that follows; since `forget`."""
        while (message := self._channel.get_message(timeout=0)) is not None:
            if message["type"] == "pmessage":
                said = json.loads(message["data"].partition(b"\n")[0])
                if said["k"] in {"ping", "parts", "end"}:
                    self._followed.add((said["f"], message["channel"]))
        return len(self._followed - self._before)

    def heard_by(self, processes: int) -> bool:
        """Whether so many proxies listen."""
        return len(self._client.pubsub_channels(CHANNEL + "*")) == processes

    def forget(self) -> None:
        self.followed()
        self._before = set(self._followed)

    def close(self) -> None:
        self._channel.close()
        self._client.close()


@dataclass
class Pair:
    """Proxies on one redis before one paid upstream."""

    urls: tuple[str, ...]
    paid: Process
    folder: Path
    redis: Process | None = None
    channels: Channels | None = field(default=None, repr=False)

    def calls(self) -> dict[str, Any]:
        answer: dict[str, Any] = control_client().get(f"{self.paid.url}/calls").json()
        return answer

    def upstream(self, **values: Any) -> None:
        control_client().post(f"{self.paid.url}/control", json=values)

    def gauge(self, name: str) -> list[float]:
        """Of each proxy."""
        pages = [control_client().get(f"{url}/metrics").text for url in self.urls]
        return [float(re.findall(rf"^lab_proxy_{name} (\S+)", page, re.MULTILINE)[0]) for page in pages]


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    folder = tmp_path_factory.mktemp("pair")
    with contextlib.ExitStack() as stack:
        paid, store = stack.enter_context(mock(folder)), stack.enter_context(redis_server(folder))
        at = {"redis": redis_url(store), "model": paid.url, "paid": paid.url}
        urls = tuple(stack.enter_context(proxy(folder, **at)).url for _ in range(2))
        channels = stack.enter_context(contextlib.closing(Channels(store.port)))
        yield Pair(urls, paid, folder, store, channels)


@pytest.fixture
def pair(running: Pair) -> Pair:
    """Both proxies hear each other: one that lost redis for a moment has it back. The upstream has let go of what an
    earlier test left, which it would count in this one."""
    assert running.channels
    eventually(lambda: running.channels and running.channels.heard_by(2))
    eventually(lambda: running.calls()["under_way"] == 0, what="earlier answers are over")
    control_client().post(f"{running.paid.url}/reset")
    running.channels.forget()
    return running


@contextlib.contextmanager
def one_more(pair: Pair, **settings: str) -> Iterator[Process]:
    """A further proxy beside the pair's, with settings of its own."""
    assert pair.redis
    secret = {"cache_secret_file": str(pair.folder / "cache-secret")}
    at = {"redis": redis_url(pair.redis), "model": pair.paid.url, "paid": pair.paid.url}
    with proxy(pair.folder, **at, **secret, **settings) as started:
        yield started


@dataclass
class Answer:
    status: int
    headers: httpx2.Headers
    text: str

    @property
    def state(self) -> str:
        return self.headers["cache-status"].partition("; key=")[0].removeprefix("llm-lab; ")

    @property
    def json(self) -> dict[str, Any]:
        said: dict[str, Any] = json.loads(self.text)
        return said

    @property
    def events(self) -> list[Any]:
        data = [line[6:] for line in self.text.splitlines() if line.startswith("data: ")]
        return [text if text == "[DONE]" else json.loads(text) for text in data]

    def added_up(self) -> dict[str, Any]:
        """What the openai client makes of it, without what every answer has of its own."""
        made = self.json if not self.streams else self._snapshot()
        return {name: value for name, value in made.items() if name not in {"id", "created"}}

    def _snapshot(self) -> dict[str, Any]:
        adder: ChatCompletionStreamState[None] = ChatCompletionStreamState()
        assert self.events[-1] == "[DONE]"
        for chunk in self.events[:-1]:
            adder.handle_chunk(ChatCompletionChunk.model_validate(chunk))
        return adder.current_completion_snapshot.model_dump()

    @property
    def streams(self) -> bool:
        return self.headers["content-type"].startswith("text/event-stream")

    def identity(self) -> str:
        return str((self.events[0] if self.streams else self.json)["id"])


def asking(text: str, mode: str = "", **more: Any) -> dict[str, Any]:
    model = "gpt-mock" + (f"-{mode}" if mode else "")
    return {"model": model, "messages": [{"role": "user", "content": text}], "temperature": 0} | more


async def shown(answer: httpx2.Response) -> None:
    ANSWERS.append(answer)


def client() -> httpx2.AsyncClient:
    return httpx2.AsyncClient(timeout=GENEROUS_SECONDS, verify=TLS, event_hooks={"response": [shown]})


async def ask(url: str, body: dict[str, Any], **headers: str) -> Answer:
    sent = {name.replace("_", "-"): value for name, value in headers.items()}
    path = "embeddings" if "input" in body else "completions" if "prompt" in body else "chat/completions"
    async with client() as http:
        answer = await http.post(f"{url}/v1/{path}", json=body, headers=sent)
        return Answer(answer.status_code, answer.headers, answer.text)


async def start(url: str, body: dict[str, Any]) -> asyncio.Task[Answer]:
    return asyncio.create_task(ask(url, body))


@dataclass
class Listening:
    """A caller that reads a stream event by event, and no further than it is asked to."""

    answer: httpx2.Response
    lines: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._rest = self.answer.aiter_lines()

    async def event(self) -> Any:
        async with asyncio.timeout(GENEROUS_SECONDS):
            async for line in self._rest:
                self.lines.append(line)
                if line.startswith("data: "):
                    return json.loads(line[6:])
        raise AssertionError("the stream is over")

    async def rest(self) -> Answer:
        async with asyncio.timeout(GENEROUS_SECONDS):
            self.lines += [line async for line in self._rest]
        return Answer(self.answer.status_code, self.answer.headers, "\n".join(self.lines))


@contextlib.asynccontextmanager
async def listening(url: str, body: dict[str, Any]) -> AsyncIterator[Listening]:
    async with client() as http, http.stream("POST", f"{url}/v1/chat/completions", json=body) as answer:
        caller = Listening(answer)
        async with contextlib.aclosing(caller._rest):
            yield caller


async def on_board(pair: Pair, requests: int, calls: int, followed: int = 0) -> None:
    """So many requests are being answered, so many calls are upstream, and so many flights are followed across.

    In the process that asked, who is being answered has a seat; in the other one, once its flight is followed.
    """
    seen: tuple[float, int, int] = (0, 0, 0)

    def look() -> bool:
        nonlocal seen
        seen = (
            sum(pair.gauge("in_flight")), pair.calls()["total"], pair.channels.followed() if pair.channels else followed
        )  # fmt: skip
        return seen[0] == requests and seen[1] >= calls and seen[2] >= followed

    try:
        await eventually_async(lambda: asyncio.to_thread(look), what="requests, calls and followed flights")
    except AssertionError as late:
        raise AssertionError(f"{late}: {(requests, calls, followed)}; they are {seen}") from None


async def at_once(pair: Pair, *asked: Coroutine[Any, Any, Answer], calls: int = 1, followed: int) -> list[Answer]:
    """The answers of requests that are all there before the upstream answers any."""
    pair.upstream(closed=True)
    tasks = [asyncio.create_task(each) for each in asked]
    await on_board(pair, len(tasks), calls, followed)
    pair.upstream(closed=False)
    return await asyncio.gather(*tasks)


async def upstream_has(pair: Pair, calls: int) -> None:
    await eventually_async(
        lambda: asyncio.to_thread(lambda: pair.calls()["total"] >= calls), what=f"{calls} calls upstream"
    )


async def upstream_saw_leave(pair: Pair, left: int) -> None:
    await eventually_async(
        lambda: asyncio.to_thread(lambda: pair.calls()["left"] == left), what=f"{left} of its callers have left"
    )


@pytest.mark.parametrize("stream", [False, True])
async def test_flight_f1_a_hundred_misses_one_call(pair: Pair, stream: bool) -> None:
    """A hundred identical misses at once over two processes are one upstream call, for JSON and for streams; all get
    the same answer, each with an id of its own."""
    body = asking(new(), stream=stream)
    answers = await at_once(pair, *(ask(pair.urls[n % 2], body) for n in range(100)), followed=1)
    assert pair.calls()["total"] == 1
    assert [answer.state for answer in answers].count("fwd=miss; collapsed") == 99
    assert len({answer.identity() for answer in answers}) == 100
    first = answers[0].added_up()
    assert all(answer.added_up() == first for answer in answers)
    assert (await ask(pair.urls[0], body)).state.startswith("hit")


@pytest.mark.parametrize("stream", [False, True])
async def test_flight_f1_followers_get_all_of_the_answer(pair: Pair, stream: bool) -> None:
    """What a follower adds up equals the leader's, deeply: choices, tool calls, logprobs, reasoning, refusal, usage."""
    wants = {"stream_options": {"include_usage": True}} if stream else {}
    kinds = [{"n": 2}, {"mode": "tools"}, {"logprobs": True}, *({"mode": m} for m in ("reasoning", "refusal", "crlf"))]
    bodies = [asking(new(), stream=stream, **kind, **wants) for kind in kinds]
    asked = [ask(pair.urls[n % 2], body) for body in bodies for n in range(3)]
    answers = await at_once(pair, *asked, calls=len(bodies), followed=len(bodies))
    assert pair.calls()["total"] == len(bodies)
    assert [answer.state for answer in answers].count("fwd=miss; collapsed") == 2 * len(bodies)
    for place in range(0, len(answers), 3):
        told = answers[place].added_up()
        assert told["choices"]
        assert told["usage"]["total_tokens"]
        assert [answer.added_up() for answer in answers[place : place + 3]] == [told] * 3
    assert len({answer.identity() for answer in answers}) == len(answers)


async def test_flight_f1_texts_and_vectors_too(pair: Pair) -> None:
    """Text completions and embeddings, single and many inputs: one call each, whatever process asks."""
    text = {"model": "gpt-mock", "prompt": new(), "temperature": 0, "logprobs": 1}
    bodies = [text, text | {"stream": True}]
    bodies += [{"model": "text-embedding-mock", "input": given} for given in (new(), [new(), new(), "a", "a"])]
    asked = [ask(pair.urls[n % 2], body) for body in bodies for n in range(6)]
    answers = await at_once(pair, *asked, calls=len(bodies), followed=len(bodies))
    assert pair.calls()["total"] == len(bodies)
    for place in range(0, len(answers), 6):
        group = answers[place : place + 6]
        assert {answer.status for answer in group} == {200}
        assert [answer.state for answer in group].count("fwd=miss; collapsed") == 5
    for group in (answers[12:18], answers[18:]):
        assert [answer.json for answer in group] == [group[0].json] * 6
        assert group[0].json["usage"]["prompt_tokens"]
    said = ["".join(chunk["choices"][0]["text"] for chunk in a.events[:-1] if chunk["choices"]) for a in answers[6:12]]
    assert said == [answers[0].json["choices"][0]["text"]] * 6
    assert len({answer.json["id"] for answer in answers[:6]}) == 6
    more = await ask(pair.urls[0], {"model": "text-embedding-mock", "input": [new(), "a"]})
    assert more.state == "fwd=partial; stored"


async def test_flight_f1_answers_of_any_size(pair: Pair) -> None:
    """An answer of 3 MB, one of 200 vectors, and a stream that is beyond its first megabyte when others come: one call
    each, whatever process asks. The large ones are not stored: another request asks again."""
    bodies = [asking(new() + " long" * 600_000), {"model": "text-embedding-mock", "input": [new() for _ in range(200)]}]
    asked = [ask(pair.urls[n % 2], body) for body in bodies for n in range(4)]
    answers = await at_once(pair, *asked, calls=2, followed=2)
    assert pair.calls()["total"] == 2
    for group in (answers[:4], answers[4:]):
        assert [answer.status for answer in group] == [200] * 4
        assert [answer.state for answer in group].count("fwd=miss; collapsed") == 3
    assert len(answers[0].text) > 3_000_000
    assert [answer.added_up() for answer in answers[:4]] == [answers[0].added_up()] * 4
    assert len({answer.identity() for answer in answers[:4]}) == 4
    assert [answer.json for answer in answers[4:]] == [answers[4].json] * 4

    words = [f"{n}-" + "x" * 50_000 for n in range(40)]
    body = asking(new() + " ".join(words), stream=True)
    pair.upstream(held=True, held_at=35)
    async with listening(pair.urls[0], body) as leader:
        for _ in range(35):
            await leader.event()
        late = [await start(pair.urls[n % 2], body) for n in range(4)]
        await on_board(pair, 5, 3, followed=3)
        pair.upstream(held=False)
        first, others = (await leader.rest()).added_up(), await asyncio.gather(*late)
    assert [answer.added_up() for answer in others] == [first] * 4
    assert pair.calls()["total"] == 3


async def test_flight_f1_late_followers_get_the_prefix_and_then_live_chunks(pair: Pair) -> None:
    """Who comes in the middle of a stream, in either process, has what was said at once and the rest as it comes."""
    # 1. The upstream has said one event and waits: a follower has it all the same, and later all of the answer.
    pair.upstream(held=True)
    body = asking(new(), stream=True)
    async with listening(pair.urls[0], body) as leader:
        first = await leader.event()
        async with listening(pair.urls[0], body) as here, listening(pair.urls[1], body) as there:
            for follower in (here, there):
                assert (await follower.event())["choices"] == first["choices"]
            pair.upstream(held=False)
            whole = (await leader.rest()).added_up()
            for follower in (here, there):
                answer = await follower.rest()
                assert answer.state == "fwd=miss; collapsed"
                assert answer.added_up() == whole
    assert pair.calls()["total"] == 1
    # 2. The upstream's stream has no end: what a follower hears of it comes while it runs.
    body = asking(new(), "endless", stream=True)
    async with listening(pair.urls[0], body) as leader:
        await leader.event()
        async with listening(pair.urls[0], body) as here, listening(pair.urls[1], body) as there:
            for caller in (leader, here, there):
                for _ in range(4):
                    assert (await caller.event())["choices"]
    assert pair.calls()["total"] == 2


async def test_flight_r2_usage_is_for_who_asked(pair: Pair) -> None:
    """One flight, and include_usage for each caller as it asked, whoever leads."""
    body = asking(new(), stream=True)
    wants = body | {"stream_options": {"include_usage": True}}
    answers = await at_once(pair, *(ask(pair.urls[n % 2], wants if n < 4 else body) for n in range(8)), followed=1)
    assert pair.calls()["total"] == 1
    for answer in answers[:4]:
        assert answer.events[-2]["choices"] == []
        assert answer.events[-2]["usage"]["total_tokens"]
        assert all(chunk["usage"] is None for chunk in answer.events[:-2])
    for answer in answers[4:]:
        assert not any("usage" in chunk for chunk in answer.events[:-1])


async def another_call_is_let_go(pair: Pair, left: int) -> None:
    """One more flight of the first process, left by its only caller, is over: so is each one that was left before.

    `left`: how many callers the upstream has seen leave by then.
    """
    requests, calls = sum(pair.gauge("in_flight")), pair.calls()["total"]
    task = await start(pair.urls[0], asking(new(), "endless", stream=True))
    await on_board(pair, requests + 1, calls + 1)
    await leave(task)
    await upstream_saw_leave(pair, left)


@pytest.mark.parametrize("follower", [0, 1])
@pytest.mark.parametrize("stream", [False, True])
async def test_flight_f2_the_leader_may_leave(pair: Pair, stream: bool, follower: int) -> None:
    """The leader's client leaves: who follows, here or in the other process, has all of the answer; it is stored."""
    pair.upstream(closed=not stream, held=stream)
    body = asking(new(), stream=stream)
    leader = await start(pair.urls[0], body)
    await upstream_has(pair, 1)
    following = await start(pair.urls[follower], body)
    await on_board(pair, 2, 1, followed=follower)
    await leave(leader)
    await on_board(pair, 1, 1)
    await another_call_is_let_go(pair, left=1)
    pair.upstream(closed=False, held=False)
    answer = await following
    assert answer.status == 200
    assert answer.state == "fwd=miss; collapsed"
    assert answer.added_up()["choices"][0]["finish_reason"] == "stop"
    assert (pair.calls()["total"], pair.calls()["left"]) == (2, 1)
    assert (await ask(pair.urls[1], body)).state.startswith("hit")


async def test_flight_f2_when_nobody_listens_the_upstream_is_let_go(pair: Pair) -> None:
    """Leader and followers, in both processes, leave: then the upstream, whose stream has no end, sees it, and not
    before."""
    body = asking(new(), "endless", stream=True)
    tasks = [await start(pair.urls[0], body)]
    await upstream_has(pair, 1)
    tasks += [await start(url, body) for url in (*pair.urls, *pair.urls)]
    await on_board(pair, 5, 1, followed=1)
    for task in tasks[:-1]:
        await leave(task)
    await on_board(pair, 1, 1)
    await another_call_is_let_go(pair, left=1)
    await leave(tasks[-1])
    await upstream_saw_leave(pair, 2)
    assert pair.calls()["total"] == 2


async def test_flight_f2_alone_too(pair: Pair) -> None:
    """A lone caller of a cacheable answer, and of one that is not, leaves: the upstream sees it."""
    for count, more in enumerate(({"stream": True}, {"stream": True, "temperature": 1}), start=1):
        task = await start(pair.urls[0], asking(new(), "endless", **more))
        await upstream_has(pair, count)
        await leave(task)
        await upstream_saw_leave(pair, count)


async def test_flight_f3_a_killed_leader(pair: Pair) -> None:
    """The leading process is killed. Before its first byte: exactly one follower takes over, and all are answered.
    After it: who has sent some of it ends with an error event and without [DONE], never with another answer's tail."""
    with one_more(pair) as leading:
        both = replace(pair, urls=(leading.url, pair.urls[1]))
        bodies = [asking(new(), stream=True), asking(new(), stream=True)]
        leaders, followers = [], []
        for calls, (gate, body) in enumerate(zip(("held", "closed"), bodies, strict=True), start=1):
            pair.upstream(**{gate: True})
            leaders.append(await start(leading.url, body))
            await upstream_has(pair, calls)
            followers.append([await start(pair.urls[1], body) for _ in range(5)])
            await on_board(both, 6 * calls, calls, followed=calls)
            # The first one has begun, for its followers too.
            if gate == "held":
                async with listening(pair.urls[1], body) as one:
                    await one.event()
        leading.popen.kill()
        for leader in leaders:
            with pytest.raises(httpx2.TransportError):
                await leader
        pair.upstream(closed=False, held=False)
        begun, others = [await asyncio.gather(*group) for group in followers]
    for answer in begun:
        assert answer.status == 200
        assert answer.events[-1]["error"]["code"] == "upstream_error"
    assert len({answer.identity() for answer in others}) == 5
    assert [answer.added_up() for answer in others] == [others[0].added_up()] * 5
    assert pair.calls()["total"] == 3
    assert (await ask(pair.urls[1], bodies[0])).state.startswith("fwd=miss")
    assert (await ask(pair.urls[1], bodies[1])).state.startswith("hit")


async def test_flight_f3_a_failed_flight_is_tried_once_more(pair: Pair) -> None:
    """The upstream fails for twenty in two processes: one more call between them, and all hear the error."""
    body = asking(new(), "500")
    answers = await at_once(pair, *(ask(pair.urls[n % 2], body) for n in range(20)), followed=1)
    assert [answer.status for answer in answers] == [500] * 20
    assert {answer.json["error"]["type"] for answer in answers} == {"server_error"}
    assert pair.calls()["total"] == 2


async def test_flight_f3_a_refusal_is_everybodys(pair: Pair) -> None:
    """A 429 is told to all, with its Retry-After, and nobody asks again."""
    body = asking(new(), "429")
    answers = await at_once(pair, *(ask(pair.urls[n % 2], body) for n in range(10)), followed=1)
    assert [(answer.status, answer.headers["retry-after"]) for answer in answers] == [(429, "7")] * 10
    assert pair.calls()["total"] == 1


@pytest.mark.parametrize("mode", ["error-event", "reset", "no-done", "junk"])
async def test_flight_s2_a_broken_stream_is_whole_for_nobody(pair: Pair, mode: str) -> None:
    """A stream that breaks in its middle ends with an error event for leader and followers, and is not stored."""
    body = asking(new(), mode, stream=True)
    answers = await at_once(pair, *(ask(pair.urls[n % 2], body) for n in range(4)), followed=1)
    for answer in answers:
        assert answer.status == 200
        assert answer.events[-1]["error"]["message"]
        assert UPSTREAM_KEY not in answer.text
    assert pair.calls()["total"] == 1
    await ask(pair.urls[0], body)
    assert pair.calls()["total"] == 2


@pytest.mark.parametrize(
    ("headers", "more"),
    [({"cache_control": "no-cache"}, {}), ({"cache_control": "no-store"}, {}), ({}, {"temperature": 1})],
    ids=["no-cache", "no-store", "sampled"],
)
async def test_flight_f4_what_is_not_for_all_is_never_joined(
    pair: Pair, headers: dict[str, str], more: dict[str, Any]
) -> None:
    """`no-cache`, `no-store` and an uncacheable request ask the upstream each for itself, and lead nobody."""
    body = asking(new(), **more)
    others = [ask(pair.urls[0], body)] if not more else []
    asked = [ask(url, body, **headers) for url in (*pair.urls, *pair.urls)]
    answers = await at_once(pair, *asked, *others, calls=len(asked) + len(others), followed=0)
    assert pair.calls()["total"] == len(answers)
    assert not any("collapsed" in answer.state for answer in answers)


async def test_flight_f4_other_modes_and_ages_fly_apart(pair: Pair) -> None:
    """One flight for each wire mode; `max-age` does not follow who may have an older answer."""
    body = asking(new())
    asked = [ask(pair.urls[0], body), ask(pair.urls[1], body | {"stream": True}), ask(pair.urls[1], body)]
    aged = [ask(url, body, cache_control="max-age=5") for url in pair.urls]
    answers = await at_once(pair, *asked, *aged, calls=3, followed=2)
    assert pair.calls()["total"] == 3
    assert ["collapsed" in answer.state for answer in answers].count(True) == 2


async def test_flight_f4_a_followers_own_deadline_holds(pair: Pair) -> None:
    """A follower whose time is up is told so; the flight goes on for the others."""
    with one_more(pair, total_timeout_seconds="0.3") as hurried:
        pair.upstream(closed=True)
        body = asking(new())
        leader = await start(pair.urls[0], body)
        await upstream_has(pair, 1)
        follower = await ask(hurried.url, body)
        assert (follower.status, follower.json["error"]["code"]) == (504, "upstream_timeout")
        pair.upstream(closed=False)
        assert (await leader).status == 200
        assert (pair.calls()["total"], pair.calls()["left"]) == (1, 0)


@pytest.fixture(scope="module")
def bereft(running: Pair, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Pair, int]]:
    """Two proxies with redis's shipped timeout, and the port where a test may start a redis for them."""
    port, folder = free_port(), tmp_path_factory.mktemp("bereft")
    at = {"redis": f"redis://127.0.0.1:{port}/0", "model": running.paid.url, "paid": running.paid.url}
    with contextlib.ExitStack() as stack:
        started = [stack.enter_context(proxy(folder, **at, redis_timeout_ms=HURRIED_MS)) for _ in range(2)]
        urls = tuple(each.url for each in started)
        yield replace(running, urls=urls, folder=folder, redis=None, channels=None), port


async def test_flight_x1_without_redis_one_process_still_collapses(bereft: tuple[Pair, int], pair: Pair) -> None:
    """No redis at all: of twenty at once in one process one asks."""
    alone, _ = bereft
    body = asking(new())
    answers = await at_once(alone, *(ask(alone.urls[0], body) for _ in range(20)), followed=0)
    assert [answer.status for answer in answers] == [200] * 20
    assert alone.calls()["calls"] == {"chat/completions": 1}


@pytest.mark.parametrize("fault", ["paused", "killed"])
async def test_flight_x1_redis_goes_during_a_flight(
    tmp_path: Path, bereft: tuple[Pair, int], pair: Pair, fault: str
) -> None:
    """Redis is paused or killed while both processes wait for one answer: each goes on, and nobody gets an error; in
    one process all still share one call."""
    lonely, port = bereft
    with redis_server(tmp_path, port=port) as store, contextlib.closing(Channels(port)) as channels:
        together = replace(lonely, channels=channels)
        await eventually_async(lambda: channels.heard_by(2) and together.gauge("redis_up") == [1, 1])
        pair.upstream(closed=True)
        body = asking(new())
        leader = await start(together.urls[0], body)
        await upstream_has(pair, 1)
        others = [await start(url, body) for url in (*together.urls, *together.urls)]
        await on_board(together, 5, 1, followed=1)
        if fault == "paused":
            os.kill(store.popen.pid, signal.SIGSTOP)
        else:
            store.popen.kill()
        try:
            await upstream_has(pair, 2)  # the other process, for itself
            pair.upstream(closed=False)
            answers = await asyncio.gather(leader, *others)
            late = await at_once(lonely, *(ask(lonely.urls[0], asking("later")) for _ in range(5)), calls=3, followed=0)
        finally:
            if fault == "paused":
                os.kill(store.popen.pid, signal.SIGCONT)
        assert [answer.status for answer in (*answers, *late)] == [200] * 10
        assert pair.calls()["total"] == 3


async def test_flight_a_slow_reader_holds_nobody_up(pair: Pair) -> None:
    """A follower that does not read does not keep the others from their answer, nor loses its own."""
    pair.upstream(held=True)
    body = asking(new(), stream=True)
    leader = await start(pair.urls[0], body)
    await upstream_has(pair, 1)
    async with listening(pair.urls[0], body) as slow:
        others = [await start(url, body) for url in pair.urls]
        await on_board(pair, 4, 1, followed=1)
        pair.upstream(held=False)
        quick = await asyncio.gather(*others)
        told = (await leader).added_up()
        assert (await slow.rest()).added_up() == told
    assert [answer.added_up() for answer in quick] == [told, told]
    assert pair.calls()["total"] == 1


async def test_flight_a1_followers_are_counted_apart(pair: Pair) -> None:
    """Tokens of followers are counted as collapsed, those of the one real call as the upstream's: the sum is what was
    served."""

    def tokens() -> dict[str, float]:
        found: dict[str, float] = {}
        for url in pair.urls:
            page = control_client().get(f"{url}/metrics").text
            lines = [line for line in page.splitlines(keepends=True) if "lab_proxy_tokens" in line]
            for family in text_string_to_metric_families("".join(lines)):
                for sample in family.samples:
                    if sample.name == "lab_proxy_tokens_total" and sample.labels["kind"] == "completion":
                        source = sample.labels["source"]
                        found[source] = found.get(source, 0) + sample.value
        return found

    for stream in (False, True):
        before, body = tokens(), asking(new(), stream=stream)
        body |= {"stream_options": {"include_usage": True}} if stream else {}
        answers = await at_once(pair, *(ask(pair.urls[n % 2], body) for n in range(8)), followed=1)
        each = answers[0].added_up()["usage"]["completion_tokens"]
        await eventually_async(lambda: sum(tokens().values()) - sum(before.values()) == 8 * each)  # noqa: B023
        grown = {name: value - before.get(name, 0) for name, value in tokens().items()}
        assert grown["upstream"] == each
        assert grown["collapsed"] == 7 * each
