"""A request that is cancelled at any of its awaits gives everything back, exactly once: slot, reserved tokens, held
cost, its place in a flight, the count of requests in flight; and the ledger has at most one record of it.

The whole application runs in this process, before a real redis and a mock upstream. A request is repeated, each time
cancelled one suspension later, of its own task or of its flight's, until it ends by itself.
"""

from __future__ import annotations

import asyncio
import contextvars
import json
import time
import types
from collections.abc import AsyncIterator, Callable, Coroutine, Generator
from dataclasses import dataclass
from typing import Any

import pytest
from fixtures_inside import TPM, Caller, Inside, inside_fixture, outside_fixture  # noqa: F401 - fixtures
from fixtures_proxy import EMBEDDING_MODEL, control_client, new
from lab_proxy.batches.worker import BufferedResponse
from lab_proxy.cache import flight_channel
from lab_proxy.keys.limits import PREFIX
from lab_proxy.requests.context import RequestContext
from processes import GENEROUS_SECONDS, eventually_async

MOST = 200  # suspensions of a request: more would be an endless one


class Cut:
    """Cancels `victim` at the suspension number `at` of the tasks in its context."""

    def __init__(self, at: int, *, late: bool) -> None:
        """`late`: not before what is waited for is there, but before the task goes on with it."""
        self.at, self.late, self.count = at, late, 0
        self.victim: asyncio.Task[Any] | None = None

    def suspended(self, waits: Any) -> None:
        self.count += 1
        if self.count != self.at or self.victim is None:
            return
        if self.late and asyncio.isfuture(waits):
            waits.add_done_callback(lambda _: self.victim and self.victim.cancel())
        else:
            asyncio.get_running_loop().call_soon(self.victim.cancel)


watched: contextvars.ContextVar[Cut | None] = contextvars.ContextVar("watched", default=None)


@types.coroutine
def _counted(work: Coroutine[Any, Any, Any], cut: Cut) -> Generator[Any, Any, Any]:
    error: BaseException | None = None
    while True:
        try:
            waits = work.send(None) if error is None else work.throw(error)
        except StopIteration as done:
            return done.value
        cut.suspended(waits)
        error = None
        try:
            yield waits
        except BaseException as raised:  # it is thrown into the task's own code
            error = raised


def factory(loop: asyncio.AbstractEventLoop, work: Any, **more: Any) -> asyncio.Task[Any]:
    """Tasks of a watched request are counted: its own and its flight's, which is made in the same context."""
    cut = watched.get()
    if cut is None:
        return asyncio.Task(work, loop=loop, **more)

    async def run() -> Any:
        return await _counted(work, cut)

    task = asyncio.Task(run(), loop=loop, **more)
    task.add_done_callback(lambda _: work.close())  # one that is cancelled before its first step never awaits it
    return task


@pytest.fixture
async def counted(inside: Inside, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Inside]:
    """Tasks that a watched request makes are counted from here on."""
    monkeypatch.setattr(flight_channel, "GRACE_SECONDS", 0.001)  # nobody follows from another process
    loop = asyncio.get_running_loop()
    loop.set_task_factory(factory)
    yield inside
    loop.set_task_factory(None)


async def cut_off(
    work: Callable[[], Coroutine[Any, Any, None]], cut: Cut, at_last: Callable[[], object] | None = None
) -> bool:
    """Run `work`, cancelled by `cut`. Whether it was. Work that does not end is cancelled when `at_last` is true."""
    token = watched.set(cut)
    try:
        cut.victim = asyncio.create_task(work())
    finally:
        watched.reset(token)
    try:
        if at_last is not None:
            victim = cut.victim
            await eventually_async(lambda: victim.done() or at_last())
            if not victim.done():
                victim.cancel()
                await asyncio.wait({victim})
                return cut.count >= cut.at
        async with asyncio.timeout(GENEROUS_SECONDS):
            await asyncio.wait({cut.victim})
    finally:
        victim, cut.victim = cut.victim, None
    if victim.cancelled():
        return True
    victim.result()
    return cut.count >= cut.at


@dataclass
class Before:
    """What is booked for a key, and redis's clock, before a request. `requests`: records that may come."""

    booked: dict[str, Any]
    clock: int
    requests: int


async def before(proxy: Inside, key_id: str, requests: int) -> Before:
    """The bucket of tokens is full from here on."""
    await proxy.parts["Limits"]._send_finished()
    await proxy.redis("DEL", f"{PREFIX}{{{key_id}}}")
    return Before(await proxy.booked(key_id), await proxy.clock(), requests)


async def nothing_is_left(proxy: Inside, key_id: str, then: Before) -> None:
    flights, limits = proxy.parts["SingleFlight"], proxy.parts["Limits"]
    await eventually_async(
        lambda: (
            not (flights._tasks or flights._joinable or flights.channel.leading or limits.running)
            and proxy.traffic.in_flight == 0
        ),
        what="the flight, its place and the request in flight are given back",
    )
    await limits._send_finished()
    name = f"{PREFIX}{{{key_id}}}"
    assert await proxy.redis("ZCARD", f"{name}:slots") == 0, "a slot is left"
    held, at = await proxy.redis("HMGET", name, "held", "t")
    assert int(held or 0) == 0, "cost is held"
    booked = await proxy.booked(key_id)
    assert booked["requests"] - then.booked["requests"] <= then.requests, "one request, several records"
    tokens = sum(booked[kind] - then.booked[kind] for kind in ("prompt_tokens", "completion_tokens"))
    step, now = 60_000_000 / TPM, await proxy.clock()
    if at is not None:  # the bucket was full: what is missing in it now was used
        assert (float(at) - now) / step - 1 <= tokens <= (float(at) - then.clock) / step + 1, "reserved or lost tokens"


CHAT, EMBEDDINGS = "/v1/chat/completions", "/v1/embeddings"


def chat(text: str, **more: Any) -> dict[str, Any]:
    asked = {"model": "gpt-mock", "messages": [{"role": "user", "content": text}], "temperature": 0, "max_tokens": 20}
    return asked | more


async def asked_before(proxy: Inside, kind: str, secret: str) -> tuple[str, dict[str, Any]]:
    """Path and body of the request to cancel, once what it needs is there."""
    text = new()
    if kind in {"hit", "stored hit"}:
        assert (await proxy.ask(CHAT, chat(text), secret)).status == 200
        if kind == "stored hit":
            proxy.parts["Cache"]._local.clear()
    if kind == "partial":
        assert (await proxy.ask(EMBEDDINGS, {"model": "text-embedding-mock", "input": text}, secret)).status == 200
        return EMBEDDINGS, {"model": "text-embedding-mock", "input": [text, new(), new()]}
    if kind == "vectors":
        return EMBEDDINGS, {"model": EMBEDDING_MODEL, "input": text}
    return CHAT, chat(text, stream=kind == "stream")


async def batch_line(proxy: Inside, body: dict[str, Any], secret: str) -> None:
    who = await proxy.parts["Authenticator"].authenticate({"authorization": f"Bearer {secret}"})
    request = RequestContext(
        who, CHAT, json.dumps(body).encode(), body, "r", started=time.perf_counter(), batch_price=True
    )
    await proxy.app._executor.answer(request, BufferedResponse())


def upstream(proxy: Inside) -> dict[str, Any]:
    """What the upstream has been asked so far."""
    told: dict[str, Any] = control_client().get(f"{proxy.paid.url}/calls").json()
    return told


async def cut_at(proxy: Inside, kind: str, secret: str, key_id: str, cut: Cut) -> bool:
    """One request, cancelled by `cut`. Whether it was."""
    path, body = await asked_before(proxy, kind, secret)
    shared = kind in {"follower", "leader"}
    then = await before(proxy, key_id, requests=1 + shared)
    caller = Caller(path, body, secret)

    async def ask() -> None:
        if kind == "batch line":
            await batch_line(proxy, body, secret)
        else:
            await proxy.app(caller.scope, caller.receive, caller.send)

    if kind == "no answer":
        control_client().post(f"{proxy.paid.url}/reset")
        control_client().post(f"{proxy.paid.url}/control", json={"closed": True})
        was_cut = await cut_off(ask, cut, lambda: upstream(proxy)["total"])
        await eventually_async(lambda: upstream(proxy)["under_way"] == 0, what="the upstream is let go")
    elif not shared:
        was_cut = await cut_off(ask, cut)
    else:
        control_client().post(f"{proxy.paid.url}/control", json={"closed": True})
        other = asyncio.create_task(_after(proxy, body, secret, turns=3 if kind == "leader" else 0))
        if kind == "follower":
            joinable = proxy.parts["SingleFlight"]._joinable
            await eventually_async(lambda: any(each.started for each in joinable.values()))
        opening = asyncio.create_task(_open(proxy))
        was_cut = await cut_off(ask, cut)
        await opening
        answer = await other
        assert (answer.status, answer.ended) == (200, True), "who shares the answer gets all of it"
    await nothing_is_left(proxy, key_id, then)
    return was_cut


async def _after(proxy: Inside, body: dict[str, Any], secret: str, turns: int) -> Caller:
    """A request that comes so many turns of the loop later."""
    for _ in range(turns):
        await asyncio.sleep(0)
    return await proxy.ask(CHAT, body, secret)


async def _open(proxy: Inside) -> None:
    """The upstream answers, some turns later."""
    await asyncio.to_thread(control_client().post, f"{proxy.paid.url}/control", json={"closed": False})


KINDS = ["hit", "stored hit", "miss", "stream", "follower", "leader", "partial", "vectors", "batch line", "no answer"]


@pytest.mark.parametrize("late", [False, True], ids=["at the await", "as it is answered"])
@pytest.mark.parametrize("kind", KINDS)
async def test_a_request_cancelled_at_any_await_gives_everything_back(counted: Inside, kind: str, late: bool) -> None:
    key_id, secret = await counted.key()
    cut_short = 0
    while await cut_at(counted, kind, secret, key_id, Cut(cut_short + 1, late=late)):
        cut_short += 1
        assert cut_short < MOST
    assert cut_short >= (1 if kind == "hit" else 3)
    await eventually_async(lambda: upstream(counted)["under_way"] == 0, what="the upstream is let go")
