"""Single flight (F1 to F4, X1): of identical requests under way at once one goes upstream, in one process and across.

First the flights themselves, two "processes" on a real redis; then two real proxy processes before a mock that counts.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import signal
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import pytest
import redis.asyncio as aioredis
from fixtures_proxy import HURRIED_MS, PATIENT_MS, UPSTREAM_KEY, mock, new, proxy, redis_url
from lab_proxy.cache.entry import Entry
from lab_proxy.cache.flight import CHANNEL, LEASE, LEASE_SECONDS, Flight, FlightLost, SingleFlight, Subscriber
from lab_proxy.errors import SlowReader, UpstreamDown, UpstreamRefused
from openai.lib.streaming.chat import ChatCompletionStreamState
from openai.types.chat import ChatCompletionChunk
from processes import Process, redis_server
from prometheus_client.parser import text_string_to_metric_families
from test_cache import plain

TLS = ssl.create_default_context()  # made once: a client of its own takes 20 ms to make one
LIMIT = 10_000  # bytes that a flight keeps, in the tests of flights alone
Fetch = Callable[[Flight], Awaitable[None]]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    with redis_server(tmp_path_factory.mktemp("redis")) as started:
        yield started


@contextlib.asynccontextmanager
async def flights(server: Process | None) -> AsyncIterator[SingleFlight]:
    made = SingleFlight(redis_url(server) if server else None, limit=LIMIT)
    await made.start()
    assert made.connected == bool(server)
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

    async def fetch(self, flight: Flight) -> None:
        self.calls += 1
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


async def take_off(seat: Subscriber, server: Process | None, fetch: Fetch) -> None:
    """What the exchange does on a miss: the lease's question in one round trip, then off."""
    if seat.first:
        lease = seat.lease(())
        if lease and server:
            async with aioredis.Redis.from_url(redis_url(server)) as client:
                lease.on_reply(await client.execute_command(*lease.command()))
        seat.start(lease, fetch)
    else:
        await seat.cached_entries()


async def hear(
    flights: SingleFlight, name: str, server: Process | None, fetch: Fetch, *, pace: float = 0
) -> list[bytes]:
    with flights.join(name) as seat:
        await take_off(seat, server, fetch)
        await seat.head()
        said = []
        async for parts in seat.parts():
            said += parts
            await asyncio.sleep(pace)
        return said


async def until(true: Callable[[], Any], within: float = 5) -> None:
    async with asyncio.timeout(within):
        while not true():  # noqa: ASYNC110 - what it waits for is no event here
            await asyncio.sleep(0.01)


def heard_by_others(flights: SingleFlight) -> bool:
    return any(flight.remote_subscribers for flight in flights._leading.values())


# ---- flights alone


async def test_flight_f1_one_of_many_asks(server: Process, two: tuple[SingleFlight, SingleFlight]) -> None:
    """Of 40 in two processes one asks; who comes late gets the prefix at once, then each part as it comes."""
    up, name = Upstream(), new()
    early = [asyncio.create_task(hear(each, name, server, up.fetch)) for each in two for _ in range(20)]
    up.say(b"a", b"b")
    await until(lambda: up.calls)
    await asyncio.sleep(0.1)
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
    with two[0].join(name) as first:
        with two[0].join(name) as second:
            waiting = asyncio.create_task(second.cached_entries())
            await asyncio.sleep(0)
            first.__exit__(None, None, None)
            with pytest.raises(FlightLost):
                await waiting
        with two[0].join(name) as third:
            assert third.first


async def test_flight_f2_goes_on_while_another_process_listens(
    server: Process, two: tuple[SingleFlight, SingleFlight]
) -> None:
    """The leader's client leaves: the follower gets the rest. Both have left: the upstream is let go."""
    up, name = Upstream(), new()
    leader = asyncio.create_task(hear(two[0], name, server, up.fetch))
    up.say(b"a")
    await until(lambda: up.calls)
    for end in ("stay", "leave"):
        follower = asyncio.create_task(hear(two[1], name, server, up.fetch))
        await until(lambda: heard_by_others(two[0]))
        leader.cancel()
        await asyncio.sleep(0.5)
        assert not up.cancelled
        if end == "stay":
            up.say(b"b", None)
            assert await follower == [b"a", b"b"]
            await until(lambda: not two[0]._leading)
            name = new()
            leader = asyncio.create_task(hear(two[0], name, server, up.fetch))
            up.say(b"a")
            await until(lambda: up.calls == 2)
        else:
            follower.cancel()
            await until(lambda: up.cancelled == 1, within=1)
    assert not two[0]._leading
    assert not two[1]._leading


@pytest.mark.parametrize("where", ["here", "there"])
async def test_flight_f3_errors_are_everybodys(
    server: Process, two: tuple[SingleFlight, SingleFlight], where: str
) -> None:
    """A failed flight gives its error to who follows: status, envelope and Retry-After, across processes too."""
    up, name = Upstream(), new()
    first = asyncio.create_task(hear(two[0], name, server, up.fetch))
    await until(lambda: up.calls)
    second = asyncio.create_task(hear(two[where == "there"], name, server, up.fetch))
    await asyncio.sleep(0.2)
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
    server: Process, two: tuple[SingleFlight, SingleFlight]
) -> None:
    """A lease of a process that is no more: its followers wait for it to run out, then exactly one of them leads."""
    up, name = Upstream(), new()
    async with aioredis.Redis.from_url(redis_url(server)) as client:
        await client.set(LEASE + name, "0123456789abcdef.1", px=int(LEASE_SECONDS * 1000))
    tasks = [asyncio.create_task(hear(each, name, server, up.fetch)) for each in two for _ in range(5)]
    await asyncio.sleep(1)
    assert up.calls == 0
    await until(lambda: up.calls, within=3)
    await asyncio.sleep(0.5)
    up.say(b"a", None)
    async with asyncio.timeout(3):
        assert await asyncio.gather(*tasks) == [[b"a"]] * 10
    assert up.calls == 1


async def test_flight_f3_a_living_leader_keeps_its_lease(
    server: Process, two: tuple[SingleFlight, SingleFlight]
) -> None:
    """A flight that takes longer than its lease, with nobody following yet, is still the one to follow."""
    up, name = Upstream(), new()
    leader = asyncio.create_task(hear(two[0], name, server, up.fetch))
    await asyncio.sleep(LEASE_SECONDS + 1)
    follower = asyncio.create_task(hear(two[1], name, server, up.fetch))
    await until(lambda: heard_by_others(two[0]))
    up.say(b"a", None)
    assert await leader == await follower == [b"a"]
    assert up.calls == 1


async def test_flight_f3_a_forgotten_lease_costs_nothing(
    server: Process, two: tuple[SingleFlight, SingleFlight]
) -> None:
    """A lease whose flight is over (its answer was not stored, or its client left while redis was asked) holds nobody
    up: the leading process says that it does not know it."""
    for leader in two:
        up, name = Upstream(), new()
        async with aioredis.Redis.from_url(redis_url(server)) as client:
            await client.set(LEASE + name, f"{leader._process_id}.99999", px=60_000)
        up.say(b"a", None)
        async with asyncio.timeout(1):
            assert await hear(two[0], name, server, up.fetch) == [b"a"]
        assert up.calls == 1


async def test_flight_f4_without_a_name_nobody_joins() -> None:
    """A flight without a name is its own request's alone, and ends with it."""
    async with flights(None) as alone:
        ups = [Upstream(), Upstream()]
        tasks = [asyncio.create_task(hear(alone, "", None, up.fetch)) for up in ups]
        await until(lambda: all(up.calls == 1 for up in ups))
        tasks[0].cancel()
        await until(lambda: ups[0].cancelled, within=0.1)
        ups[1].say(b"b", None)
        assert await tasks[1] == [b"b"]


async def test_flight_a_slow_reader_does_not_hold_others_up(
    server: Process, two: tuple[SingleFlight, SingleFlight]
) -> None:
    """Within the limit everybody gets all, at its own pace; beyond it nobody boards any more, the fastest reader's pace
    is the upstream's, and who is further behind than the limit is told so."""
    up, name = Upstream(), new()
    slow = asyncio.create_task(hear(two[0], name, server, up.fetch, pace=0.3))
    await until(lambda: up.calls)
    quick = asyncio.create_task(hear(two[1], name, server, up.fetch))
    await until(lambda: heard_by_others(two[0]))
    up.say(*[b"%1000d" % n for n in range(9)], None)
    assert len(await quick) == 9
    assert await slow == await quick

    up, name = Upstream(), new()
    with two[0].join(name) as slow_seat, two[0].join(name) as quick_seat:
        await take_off(slow_seat, server, up.fetch)
        up.say(b"first")
        lagging, leading = slow_seat.parts(), quick_seat.parts()
        assert await anext(lagging) == await anext(leading) == [b"first"]
        up.say(*[b"%1000d" % n for n in range(100)], None)
        await asyncio.sleep(0.1)
        assert 9 <= up.parts.qsize() - 80 <= 12  # it waits for the fastest, ten or so parts ahead
        got = [part async for parts in leading for part in parts]
        assert len(got) == 100
        with pytest.raises(SlowReader):
            await anext(lagging)
        with two[0].join(name) as other:
            assert other.first


async def test_flight_x1_cut_off_and_back_nothing_is_lost_or_twice(
    server: Process, two: tuple[SingleFlight, SingleFlight]
) -> None:
    """The subscriptions are cut again and again in the middle of a flight: the follower has every part once."""
    up, name = Upstream(), new()
    leader = asyncio.create_task(hear(two[0], name, server, up.fetch))
    await until(lambda: up.calls)
    follower = asyncio.create_task(hear(two[1], name, server, up.fetch))
    async with aioredis.Redis.from_url(redis_url(server)) as client:
        for n in range(60):
            up.say(b"%d" % n)
            await asyncio.sleep(0.02)
            if n % 20 == 10:
                await client.execute_command("CLIENT", "KILL", "TYPE", "pubsub")
    up.say(None)
    assert await follower == [b"%d" % n for n in range(60)]
    assert await leader == [b"%d" % n for n in range(60)]
    assert up.calls == 1


async def test_flight_x1_garbage_is_nobodys_message(server: Process, two: tuple[SingleFlight, SingleFlight]) -> None:
    """Garbage in the channel, at the lease's name, or a list there: no flight across processes, no fault."""
    async with aioredis.Redis.from_url(redis_url(server)) as client:
        for junk in (
            b"",
            b"\xff\n",
            b"[]",
            b'{"k":"join"}',
            b'{"k":"parts","f":"x"}',
            b'{"k":"join","f":1,"p":2,"n":[]}',
        ):
            await client.publish(CHANNEL + two[0]._process_id, junk)
        for spoil in (lambda name: client.set(name, b"\xff garbage"), lambda name: client.rpush(name, "a")):
            up, name = Upstream(), new()
            await spoil(LEASE + name)
            up.say(b"a", None)
            with two[0].join(name) as seat:
                lease = seat.lease(())
                assert lease
                try:
                    lease.on_reply(await client.execute_command(*lease.command()))
                except aioredis.ResponseError:
                    lease.on_failure()
                seat.start(lease, up.fetch)
                assert [part async for parts in seat.parts() for part in parts] == [b"a"]
        up, name = Upstream(), new()
        leader = asyncio.create_task(hear(two[0], name, server, up.fetch))
        await until(lambda: up.calls)
        follower = asyncio.create_task(hear(two[1], name, server, up.fetch))
        await until(lambda: heard_by_others(two[0]))
        up.say(b"a", None)
        assert await leader == await follower == [b"a"]


@pytest.mark.parametrize("fault", ["paused", "killed"])
async def test_flight_x1_redis_gone_each_process_goes_on_alone(tmp_path: Path, fault: str) -> None:
    """Redis paused or killed while a follower waits: it asks itself; a follower in mid-stream gets the rest when redis
    is back."""
    with redis_server(tmp_path) as server:
        async with flights(server) as one, flights(server) as other:
            up, waiting, running = Upstream(), new(), new()
            calls = [asyncio.create_task(hear(each, waiting, server, up.fetch)) for each in (one, one, other, other)]
            await until(lambda: up.calls == 1)
            stream = Upstream()
            told = [asyncio.create_task(hear(each, running, server, stream.fetch)) for each in (one, other)]
            stream.say(b"a")
            await until(
                lambda: all(seat.taken for f in other._following.values() for seat in f.subscribers if f.has_head)
            )
            await asyncio.sleep(0.2)
            if fault == "paused":
                os.kill(server.popen.pid, signal.SIGSTOP)
            else:
                server.popen.kill()
            await until(lambda: up.calls == 2, within=3)
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
                async with asyncio.timeout(5):
                    assert await asyncio.gather(*told) == [[b"a", b"b", b"c"]] * 2
                assert stream.calls == 1
                await until(lambda: one.connected and other.connected)


# ---- two proxy processes


@dataclass
class Pair:
    """Proxies on one redis before one paid upstream."""

    urls: tuple[str, ...]
    processes: tuple[Process, ...]
    paid: Process
    redis: Process | None = None

    def calls(self) -> dict[str, Any]:
        answer: dict[str, Any] = httpx2.get(f"{self.paid.url}/calls").json()
        return answer

    def upstream(self, **values: Any) -> None:
        httpx2.post(f"{self.paid.url}/control", json=values)


@contextlib.contextmanager
def pair_on(folder: Path, redis_timeout_ms: str = PATIENT_MS, **settings: str) -> Iterator[Pair]:
    """`settings`: of the second proxy."""
    with contextlib.ExitStack() as stack:
        paid, model = stack.enter_context(mock(folder)), stack.enter_context(mock(folder))
        server = stack.enter_context(redis_server(folder))
        at = {"redis": redis_url(server), "model": model.url, "paid": paid.url, "redis_timeout_ms": redis_timeout_ms}
        one = stack.enter_context(proxy(folder, **at))
        other = stack.enter_context(proxy(folder, **at, **settings))
        yield Pair((one.url, other.url), (one, other), paid, server)


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    with pair_on(tmp_path_factory.mktemp("pair")) as started:
        yield started


@pytest.fixture
def pair(running: Pair) -> Pair:
    httpx2.post(f"{running.paid.url}/reset")
    return running


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
        if not self.headers["content-type"].startswith("text/event-stream"):
            return plain(self.json)
        adder: ChatCompletionStreamState[None] = ChatCompletionStreamState()
        assert self.events[-1] == "[DONE]"
        for chunk in self.events[:-1]:
            adder.handle_chunk(ChatCompletionChunk.model_validate(chunk))
        return plain(adder.current_completion_snapshot.model_dump())

    def identity(self) -> str:
        said = self.events[0] if self.headers["content-type"].startswith("text/event-stream") else self.json
        return str(said["id"])


def asking(text: str, mode: str = "", **more: Any) -> dict[str, Any]:
    model = "gpt-mock" + (f"-{mode}" if mode else "")
    return {"model": model, "messages": [{"role": "user", "content": text}], "temperature": 0} | more


async def ask(url: str, body: dict[str, Any], **headers: str) -> Answer:
    sent = {name.replace("_", "-"): value for name, value in headers.items()}
    path = "embeddings" if "input" in body else "completions" if "prompt" in body else "chat/completions"
    async with httpx2.AsyncClient(timeout=30, verify=TLS) as http:
        answer = await http.post(f"{url}/v1/{path}", json=body, headers=sent)
        return Answer(answer.status_code, answer.headers, answer.text)


async def start(url: str, body: dict[str, Any]) -> asyncio.Task[Answer]:
    return asyncio.create_task(ask(url, body))


async def on_board(pair: Pair, requests: int, calls: int) -> None:
    """So many requests are being answered, and so many calls are upstream."""

    def look() -> bool:
        pages = [httpx2.get(f"{url}/metrics").text for url in pair.urls]
        there = sum(float(re.findall(r"^lab_proxy_in_flight (\S+)", page, re.MULTILINE)[0]) for page in pages)
        return there == requests and pair.calls()["total"] >= calls

    async with asyncio.timeout(15):
        while not await asyncio.to_thread(look):  # noqa: ASYNC110 - as above
            await asyncio.sleep(0.05)
    await asyncio.sleep(0.3)  # from the proxy's door to the seat


async def at_once(pair: Pair, *asked: Coroutine[Any, Any, Answer], calls: int = 1) -> list[Answer]:
    """The answers of requests that are all there before the upstream answers any."""
    pair.upstream(closed=True)
    tasks = [asyncio.create_task(each) for each in asked]
    await on_board(pair, len(tasks), calls)
    pair.upstream(closed=False)
    return await asyncio.gather(*tasks)


async def upstream_has(pair: Pair, calls: int, within: float = 10) -> None:
    await until(lambda: pair.calls()["total"] >= calls, within)


@pytest.mark.parametrize("stream", [False, True])
async def test_flight_f1_a_hundred_misses_one_call(pair: Pair, stream: bool) -> None:
    """A hundred identical misses at once over two processes are one upstream call, for JSON and for streams; all get
    the same answer, each with an id of its own."""
    body = asking(new(), stream=stream)
    answers = await at_once(pair, *(ask(pair.urls[n % 2], body) for n in range(100)))
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
    answers = await at_once(
        pair, *(ask(pair.urls[n % 2], body) for body in bodies for n in range(3)), calls=len(bodies)
    )
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
    answers = await at_once(
        pair, *(ask(pair.urls[n % 2], body) for body in bodies for n in range(6)), calls=len(bodies)
    )
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


async def test_flight_f1_late_followers_get_the_prefix_and_then_live_chunks(pair: Pair) -> None:
    """Who comes in the middle of a stream, in either process, has what was said at once and the rest as it comes."""
    body = asking(new(), "slow", stream=True)
    leader = asyncio.create_task(ask(pair.urls[0], body))
    await upstream_has(pair, 1)
    await asyncio.sleep(0.5)
    seen: list[list[bool]] = []

    async def follow(url: str) -> Answer:
        chat = f"{url}/v1/chat/completions"
        async with httpx2.AsyncClient(timeout=30, verify=TLS) as http, http.stream("POST", chat, json=body) as answer:
            lines, early = [], []
            async for line in answer.aiter_lines():
                lines.append(line)
                if line.startswith("data: "):
                    early.append(not leader.done())
            seen.append(early)
            return Answer(answer.status_code, answer.headers, "\n".join(lines))

    answers = await asyncio.gather(*map(follow, pair.urls))
    assert pair.calls()["total"] == 1
    for answer, early in zip(answers, seen, strict=True):
        assert answer.state == "fwd=miss; collapsed"
        assert answer.added_up() == (await leader).added_up()
        assert sum(early) >= 8  # most of it came while the leader was still reading


async def test_flight_r2_usage_is_for_who_asked(pair: Pair) -> None:
    """One flight, and include_usage for each caller as it asked, whoever leads."""
    body = asking(new(), stream=True)
    wants = body | {"stream_options": {"include_usage": True}}
    answers = await at_once(pair, *(ask(pair.urls[n % 2], wants if n < 4 else body) for n in range(8)))
    assert pair.calls()["total"] == 1
    for answer in answers[:4]:
        assert answer.events[-2]["choices"] == []
        assert answer.events[-2]["usage"]["total_tokens"]
        assert all(chunk["usage"] is None for chunk in answer.events[:-2])
    for answer in answers[4:]:
        assert not any("usage" in chunk for chunk in answer.events[:-1])


async def leave(task: asyncio.Task[Answer]) -> None:
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


@pytest.mark.parametrize("follower", [0, 1])
@pytest.mark.parametrize("stream", [False, True])
async def test_flight_f2_the_leader_may_leave(pair: Pair, stream: bool, follower: int) -> None:
    """The leader's client leaves: who follows, here or in the other process, has all of the answer; it is stored."""
    pair.upstream(closed=not stream, held=stream)
    body = asking(new(), "slow", stream=stream)
    leader = await start(pair.urls[0], body)
    await upstream_has(pair, 1)
    following = await start(pair.urls[follower], body)
    await on_board(pair, 2, 1)
    await leave(leader)
    await asyncio.sleep(0.6)  # longer than a flight waits that nobody is on
    pair.upstream(closed=False, held=False)
    answer = await following
    assert answer.status == 200
    assert answer.state == "fwd=miss; collapsed"
    assert answer.added_up()["choices"][0]["finish_reason"] == "stop"
    assert (pair.calls()["total"], pair.calls()["left"]) == (1, 0)
    assert (await ask(pair.urls[1], body)).state.startswith("hit")


async def test_flight_f2_when_nobody_listens_the_upstream_is_let_go(pair: Pair) -> None:
    """Leader and followers, in both processes, leave: the upstream sees it within a second, and not before."""
    body = asking(new(), "endless", stream=True)
    tasks = [await start(pair.urls[0], body)]
    await upstream_has(pair, 1)
    tasks += [await start(url, body) for url in (*pair.urls, *pair.urls)]
    await asyncio.sleep(0.5)
    for task in tasks[:-1]:
        await leave(task)
    await asyncio.sleep(1)
    assert pair.calls()["left"] == 0
    await leave(tasks[-1])
    await until(lambda: pair.calls()["left"] == 1, within=1)
    assert pair.calls()["total"] == 1


async def test_flight_f2_alone_too(pair: Pair) -> None:
    """A lone caller of a cacheable answer, and of one that is not, leaves: the upstream sees it within a second."""
    for count, more in enumerate(({"stream": True}, {"stream": True, "temperature": 1}), start=1):
        task = await start(pair.urls[0], asking(new(), "endless", **more))
        await upstream_has(pair, count)
        await asyncio.sleep(0.2)
        await leave(task)
        await until(lambda count=count: pair.calls()["left"] == count, within=1)


@pytest.mark.parametrize("begun", [False, True])
async def test_flight_f3_a_killed_leader(tmp_path: Path, begun: bool) -> None:
    """The leading process is killed. Before its first byte: exactly one follower takes over, and all are answered.
    After it: who has sent some of it ends with an error event and without [DONE], never with another answer's tail."""
    with pair_on(tmp_path) as pair:
        pair.upstream(closed=not begun, held=begun)
        body = asking(new(), "slow", stream=True)
        leader = await start(pair.urls[0], body)
        await upstream_has(pair, 1)
        followers = [await start(pair.urls[1], body) for _ in range(5)]
        await on_board(pair, 6, 1)
        pair.processes[0].popen.kill()
        with pytest.raises(httpx2.TransportError):
            await leader
        await asyncio.to_thread(pair.upstream, closed=False, held=False)
        answers = await asyncio.gather(*followers)
        if begun:
            assert pair.calls()["total"] == 1
            for answer in answers:
                assert answer.status == 200
                assert answer.events[-1]["error"]["code"] == "upstream_error"
        else:
            await upstream_has(pair, 2)
            assert pair.calls()["total"] == 2
            assert len({answer.identity() for answer in answers}) == 5
            assert [answer.added_up() for answer in answers] == [answers[0].added_up()] * 5
        again = await ask(pair.urls[1], body)
        assert again.state.startswith("fwd=miss" if begun else "hit")


async def test_flight_f3_a_failed_flight_is_tried_once_more(pair: Pair) -> None:
    """The upstream fails for twenty in two processes: one more call between them, and all hear the error."""
    body = asking(new(), "500")
    answers = await at_once(pair, *(ask(pair.urls[n % 2], body) for n in range(20)))
    assert [answer.status for answer in answers] == [500] * 20
    assert {answer.json["error"]["type"] for answer in answers} == {"server_error"}
    assert pair.calls()["total"] == 2


async def test_flight_f3_a_refusal_is_everybodys(pair: Pair) -> None:
    """A 429 is told to all, with its Retry-After, and nobody asks again."""
    body = asking(new(), "429")
    answers = await at_once(pair, *(ask(pair.urls[n % 2], body) for n in range(10)))
    assert [(answer.status, answer.headers["retry-after"]) for answer in answers] == [(429, "7")] * 10
    assert pair.calls()["total"] == 1


@pytest.mark.parametrize("mode", ["error-event", "reset", "no-done", "junk"])
async def test_flight_s2_a_broken_stream_is_whole_for_nobody(pair: Pair, mode: str) -> None:
    """A stream that breaks in its middle ends with an error event for leader and followers, and is not stored."""
    body = asking(new(), mode, stream=True)
    answers = await at_once(pair, *(ask(pair.urls[n % 2], body) for n in range(4)))
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
    answers = await at_once(pair, *asked, *others, calls=len(asked) + len(others))
    assert pair.calls()["total"] == len(answers)
    assert not any("collapsed" in answer.state for answer in answers)


async def test_flight_f4_other_modes_and_ages_fly_apart(pair: Pair) -> None:
    """One flight for each wire mode; `max-age` does not follow who may have an older answer."""
    body = asking(new())
    asked = [ask(pair.urls[0], body), ask(pair.urls[1], body | {"stream": True}), ask(pair.urls[1], body)]
    aged = [ask(url, body, cache_control="max-age=5") for url in pair.urls]
    answers = await at_once(pair, *asked, *aged, calls=3)
    assert pair.calls()["total"] == 3
    assert ["collapsed" in answer.state for answer in answers].count(True) == 2


async def test_flight_f4_a_followers_own_deadline_holds(tmp_path: Path) -> None:
    """A follower whose time is up is told so; the flight goes on for the others."""
    with pair_on(tmp_path, total_timeout_seconds="1") as pair:
        pair.upstream(closed=True)
        body = asking(new())
        leader = await start(pair.urls[0], body)
        await upstream_has(pair, 1)
        follower = await ask(pair.urls[1], body)
        pair.upstream(closed=False)
        assert (follower.status, follower.json["error"]["code"]) == (504, "upstream_timeout")
        assert (await leader).status == 200
        assert (pair.calls()["total"], pair.calls()["left"]) == (1, 0)


@pytest.mark.parametrize("fault", ["paused", "killed"])
async def test_flight_x1_redis_goes_during_a_flight(tmp_path: Path, fault: str) -> None:
    """Redis is paused or killed while both processes wait for one answer: each goes on, and nobody gets an error; in
    one process all still share one call."""
    with pair_on(tmp_path, HURRIED_MS) as pair:
        redis = pair.redis
        assert redis
        pair.upstream(closed=True)
        body = asking(new())
        leader = await start(pair.urls[0], body)
        await upstream_has(pair, 1)
        others = [await start(url, body) for url in (*pair.urls, *pair.urls)]
        await on_board(pair, 5, 1)
        if fault == "paused":
            os.kill(redis.popen.pid, signal.SIGSTOP)
        else:
            redis.popen.kill()
        try:
            await upstream_has(pair, 2)  # the other process, for itself
            pair.upstream(closed=False)
            answers = await asyncio.gather(leader, *others)
            late = await at_once(pair, *(ask(pair.urls[0], asking("later")) for _ in range(5)), calls=3)
        finally:
            if fault == "paused":
                os.kill(redis.popen.pid, signal.SIGCONT)
        assert [answer.status for answer in (*answers, *late)] == [200] * 10
        assert pair.calls()["total"] == 3


async def test_flight_x1_without_redis_one_process_still_collapses(tmp_path: Path) -> None:
    """No redis at all: of twenty at once in one process one asks."""
    with mock(tmp_path) as paid, proxy(tmp_path, redis="redis://127.0.0.1:1/0", model=paid.url, paid=paid.url) as one:
        alone = Pair((one.url,), (one,), paid)
        body = asking(new())
        answers = await at_once(alone, *(ask(one.url, body) for _ in range(20)))
        assert [answer.status for answer in answers] == [200] * 20
        assert httpx2.get(f"{paid.url}/calls").json()["calls"] == {"chat/completions": 1}


async def test_flight_a_slow_reader_holds_nobody_up(pair: Pair) -> None:
    """A follower that does not read does not keep the others from their answer, nor loses its own."""
    body = asking(new(), "slow", stream=True)
    leader = await start(pair.urls[0], body)
    await upstream_has(pair, 1)
    chat = f"{pair.urls[0]}/v1/chat/completions"
    async with httpx2.AsyncClient(timeout=30, verify=TLS) as http, http.stream("POST", chat, json=body) as slow:
        quick = await asyncio.gather(ask(pair.urls[0], body), ask(pair.urls[1], body))
        told = (await leader).added_up()
        text = (await slow.aread()).decode()
        assert Answer(slow.status_code, slow.headers, text).added_up() == told
    assert [answer.added_up() for answer in quick] == [told, told]
    assert pair.calls()["total"] == 1


async def test_flight_a1_followers_are_counted_apart(pair: Pair) -> None:
    """Tokens of followers are counted as collapsed, those of the one real call as the upstream's: the sum is what was
    served."""

    def tokens() -> dict[str, float]:
        found: dict[str, float] = {}
        for url in pair.urls:
            for family in text_string_to_metric_families(httpx2.get(f"{url}/metrics").text):
                for sample in family.samples:
                    if sample.name == "lab_proxy_tokens_total" and sample.labels["kind"] == "completion":
                        source = sample.labels["source"]
                        found[source] = found.get(source, 0) + sample.value
        return found

    for stream in (False, True):
        before, body = tokens(), asking(new(), stream=stream)
        body |= {"stream_options": {"include_usage": True}} if stream else {}
        answers = await at_once(pair, *(ask(pair.urls[n % 2], body) for n in range(8)))
        each = answers[0].added_up()["usage"]["completion_tokens"]
        await until(lambda: sum(tokens().values()) - sum(before.values()) == 8 * each)  # noqa: B023
        grown = {name: value - before.get(name, 0) for name, value in tokens().items()}
        assert grown["upstream"] == each
        assert grown["collapsed"] == 7 * each
