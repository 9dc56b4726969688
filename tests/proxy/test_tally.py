"""A1 end to end: what breaks off is booked as what the model computed, by a real model service and a real proxy."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import re
import signal
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2
import pytest
import redis
import tiny
from fixtures_keys import ADMIN_KEY, School, limits_of, school_on
from fixtures_proxy import CHAT_MODEL, new, proxy, redis_url
from inprocess import END, InProcess
from lab_model.api.app import create_app
from lab_model.api.embeddings import EncoderClient
from lab_model.api.generator import EngineWork
from lab_model.api.http import record as http_record
from lab_model.api.http.usage import SLOTS, TokenUsage, UsageRing, find
from lab_model.encoders.queue import EncoderQueue
from lab_model.engine.request import Request
from lab_model.models.kinds import KINDS
from lab_model.text.tokenizer import ModelTokenizer
from lab_proxy.errors import UpstreamDown
from lab_proxy.ledger import reconciliation as asking
from processes import SHOWN_ON_FAILURE, Process, eventually, eventually_async, redis_server
from prometheus_client import REGISTRY
from served import PAIR, TINY

MODELS = (TINY, PAIR)
ENDLESS = 15_000  # tokens of an answer that no test waits for
PRICES = """
upstreams:
  model:
    source: the tests
    checked: 2026-11-23
    every: {input: 3, cached: 1, output: 7}
"""


@dataclass
class Counted:
    """The model service, and before it a proxy that asks for keys, with a ledger of its own."""

    model: Process
    proxy: Process
    redis: Process
    prices: Path
    http: httpx2.Client = field(repr=False)
    before: dict[str, dict[str, int]] = field(default_factory=dict)  # what earlier tests used

    def counters(self) -> dict[str, dict[str, int]]:
        """Tokens by model and kind, as the model service counted them, over all replicas."""
        text = httpx2.get(f"{self.model.url}/metrics", timeout=60).text
        found: dict[str, dict[str, int]] = {}
        pattern = r'^vllm:(prompt|generation)_tokens_total\{engine="0",model_name="([\w-]+)"\} (\S+)'
        for counter, name, value in re.findall(pattern, text, re.M):
            kind = {"prompt": "prompt", "generation": "completion"}[counter]
            if name in MODELS:
                earlier = self.before.get(name, {}).get(kind, 0)
                found.setdefault(name, {})[kind] = int(float(value)) - earlier
        return found

    def rows(self, **query: str) -> list[dict[str, Any]]:
        headers = {"authorization": f"Bearer {ADMIN_KEY}"}
        rows: list[dict[str, Any]] = self.http.get("/admin/usage", params=query, headers=headers).json()["rows"]
        return rows

    def ledger(self) -> dict[str, dict[str, int]]:
        found: dict[str, dict[str, int]] = {}
        for row in self.rows():
            told = found.setdefault(row["model"], {"prompt": 0, "completion": 0})
            for kind in told:
                told[kind] += row[f"{kind}_tokens"]
        return {name: told for name, told in found.items() if any(told.values())}

    def flagged(self) -> int:
        return sum(row["estimated_calls"] for row in self.rows())

    def reconciled(self, outcome: str) -> int:
        page = self.http.get("/metrics", headers={"authorization": f"Bearer {ADMIN_KEY}"}).text
        found = re.search(rf'lab_proxy_reconciled_total{{outcome="{outcome}"}} (\S+)', page)
        return int(float(found.group(1))) if found else 0

    def key(self, **terms: Any) -> dict[str, Any]:
        headers = {"authorization": f"Bearer {ADMIN_KEY}"}
        made: dict[str, Any] = self.http.post("/admin/keys", json={"owner": new()} | terms, headers=headers).json()
        return made

    def agree(self) -> None:
        """The ledger and the model's counters are the same, and nothing is an estimate."""

        def same() -> bool:
            counted = {name: told for name, told in self.counters().items() if any(told.values())}
            return self.flagged() == 0 and self.ledger() == counted

        try:
            eventually(same)
        except AssertionError:
            raise AssertionError((self.flagged(), self.ledger(), self.counters())) from None


@pytest.fixture(scope="module")
def lab(model_process: Process, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Counted]:
    folder = tmp_path_factory.mktemp("tally")
    prices = folder / "prices.yaml"
    prices.write_text(PRICES)
    with (
        redis_server(folder) as server,
        proxy(
            folder, redis=redis_url(server), model=model_process.url, admin_key=ADMIN_KEY, prices_file=str(prices)
        ) as front,
        httpx2.Client(base_url=front.url, timeout=60, event_hooks=SHOWN_ON_FAILURE) as http,
    ):
        eventually(lambda: http.get("/ready").status_code == 200)
        made = Counted(model_process, front, server, prices, http)
        made.before = made.counters()
        yield made


async def test_cache_a1_what_broke_off_is_reconciled_to_what_was_generated(lab: Counted) -> None:
    """Streams and JSON that are abandoned at random places, in the queue too, answers that are whole, deadlines of the
    model and prompts that the prefix cache knows, on one replica and on two: the ledger equals the model's own
    counters, and no entry is an estimate."""
    chance = random.Random(7)
    long = "the cat sat on the mat and the dog ate the hat " * 20
    keys = [lab.key()["key"] for _ in range(3)]

    async def ask(http: httpx2.AsyncClient, number: int) -> None:
        stream, whole = chance.random() < 0.6, chance.random() < 0.3
        body = {
            "model": MODELS[number % 2],
            "messages": [{"role": "user", "content": f"{long if chance.random() < 0.5 else ''} {new()}"}],
            "max_tokens": 12 if whole else 500,
            "n": 1 + 2 * (number % 5 == 0),
            "stream": stream,
        }
        pieces = chance.randrange(1, 20)
        # Most streams are read to a random piece. Of the others many are left while they wait in the queue.
        patience = 60.0 if whole or (stream and chance.random() < 0.8) else chance.random()
        await asyncio.sleep(chance.random())
        headers = {"authorization": f"Bearer {keys[number % len(keys)]}"}
        try:
            async with asyncio.timeout(patience):
                async with http.stream("POST", "/v1/chat/completions", json=body, headers=headers) as answer:
                    async for _ in answer.aiter_raw():
                        pieces -= 1
                        if not pieces and not whole:
                            break
        except TimeoutError:
            pass

    limits = httpx2.Limits(max_connections=None)
    async with httpx2.AsyncClient(base_url=lab.proxy.url, timeout=60, limits=limits) as http:
        await asyncio.gather(*(ask(http, number) for number in range(150)))
    await asyncio.to_thread(lab.agree)
    assert lab.reconciled("exact") > 30, "hardly anything broke off"
    # By key and model: each key's own sum of money is what its tokens cost, to the last pico-dollar.
    for row in lab.rows():
        cheap = row["cached_prompt_tokens"]
        paid = (row["prompt_tokens"] - cheap) * 3 + cheap + row["completion_tokens"] * 7
        assert row["cost_picodollars"] == paid * 10**6
    assert {row["model"] for row in lab.rows()} == set(MODELS)
    assert sum(row["cached_prompt_tokens"] for row in lab.rows()) > 0


def body_of(model: str = MODELS[0], tokens: int = 900, **more: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": new()}]
    sampling = {"max_tokens": tokens, "temperature": 0, "logit_bias": {"0": -100}}  # 0 ends an answer: none ends early
    return {"model": model, "messages": messages, "stream": True} | sampling | more


async def test_cache_a1_a_flight_that_goes_on_for_a_follower_is_billed_once_and_exactly(lab: Counted) -> None:
    """The client whose request leads leaves; another one hears the answer to its end: one call, no estimate, and the
    leader's tokens a minute are what the call used in the end."""
    tpm = 1_000
    key = lab.key(tpm=tpm)
    bucket = limits_of(key["id"])
    headers, body = {"authorization": f"Bearer {key['key']}"}, body_of(tokens=300)
    async with httpx2.AsyncClient(base_url=lab.proxy.url, timeout=60) as http:

        async def follow() -> str:
            async with http.stream("POST", "/v1/chat/completions", json=body, headers=headers) as answer:
                assert "collapsed" in answer.headers["cache-status"]
                follows.set()
                return (await answer.aread()).decode()

        follows = asyncio.Event()
        async with http.stream("POST", "/v1/chat/completions", json=body, headers=headers) as answer:
            pieces = answer.aiter_raw()
            await anext(pieces)
            follower = asyncio.create_task(follow())
            await follows.wait()
        assert (await follower).rstrip().endswith("[DONE]")
        await asyncio.to_thread(lab.agree)
    (row,) = lab.rows(key_id=key["id"])
    assert (row["upstream_calls"], row["collapsed"], row["estimated_calls"]) == (1, 1, 0)
    assert row["completion_tokens"] == row["collapsed_completion_tokens"] > 250
    # The bucket as limits.lua keeps it: what was used since it was full, in microseconds of its refilling.
    with contextlib.closing(redis.Redis(port=lab.redis.port)) as db:
        full, used = (float(value) for value in db.hmget(bucket, "full", "t"))
    assert (used - full) * tpm / 60e6 == pytest.approx(row["prompt_tokens"] + row["completion_tokens"], abs=0.1)


async def test_cache_a1_a_proxy_that_ends_reconciles_what_it_cuts_off(lab: Counted, tmp_path: Path) -> None:
    """SIGTERM in the middle of streams: before it is gone it has asked what they used."""
    with proxy(
        tmp_path, redis=redis_url(lab.redis), model=lab.model.url, admin_key=ADMIN_KEY, drain_timeout_seconds="0",
        prices_file=str(lab.prices),
    ) as ending:  # fmt: skip
        key = lab.key()
        async with httpx2.AsyncClient(base_url=ending.url, timeout=60) as http:

            async def ask() -> str:
                headers = {"authorization": f"Bearer {key['key']}"}
                body = body_of(PAIR, ENDLESS)
                async with http.stream("POST", "/v1/chat/completions", json=body, headers=headers) as answer:
                    pieces = answer.aiter_raw()
                    said = [await anext(pieces)]
                    running.release()
                    with contextlib.suppress(httpx2.HTTPError):
                        said += [piece async for piece in pieces]
                    return b"".join(said).decode()

            running = asyncio.Semaphore(0)
            asked = [asyncio.create_task(ask()) for _ in range(3)]
            for _ in asked:
                await running.acquire()
            ending.popen.send_signal(signal.SIGTERM)
            assert not [said for said in await asyncio.gather(*asked) if "[DONE]" in said]
        await asyncio.to_thread(ending.popen.wait, 60)
    (row,) = lab.rows(key_id=key["id"])
    assert (row["upstream_calls"], row["estimated_calls"]) == (3, 0)
    await asyncio.to_thread(lab.agree)


# ---- the proxy alone


class Model:
    """/tally as a script: what it says to one question after the other, the last for ever."""

    def __init__(self, *said: Any) -> None:
        self.said = list(said)
        self.asked: list[set[str]] = []

    async def get(self, path: str, _: float) -> tuple[int, Any]:
        self.asked.append({each.removeprefix("id=") for each in path.partition("?")[2].split("&")})
        said = self.said.pop(0) if len(self.said) > 1 else self.said[0]
        if isinstance(said, Exception):
            raise said
        return 200, said


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(asking, "FIRST_SECONDS", 0.005)
    monkeypatch.setattr(asking, "LONGEST_SECONDS", 0.02)
    monkeypatch.setattr(asking, "STOP_SECONDS", 0.3)


@pytest.mark.usefixtures("quick")
async def test_cache_a1_a_model_that_is_down_is_asked_again() -> None:
    """Not there, of another version, not done yet: asked again until it tells, and told once."""
    used = {"prompt": 3, "completion": 4, "cached": 1}
    model = Model(UpstreamDown("no"), {}, [], {"a": {"prompt": "x"}}, {"a": used | {"cached": None}}, {"a": used})
    heard: asyncio.Queue[Any] = asyncio.Queue()
    ends: list[str] = []
    tally = asking.Reconciliation(model.get, ends.append)
    await tally.start()
    try:
        tally.enqueue("a", heard.put_nowait)
        assert await asyncio.wait_for(heard.get(), 60) == (3, 4, 1)
    finally:
        await tally.stop()
    assert (ends, heard.qsize(), len(model.asked)) == (["exact"], 0, 6)


@pytest.mark.usefixtures("quick")
async def test_cache_a1_what_the_model_does_not_tell_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """After a while; what is open is bounded; when the proxy ends it is asked for the last time."""
    monkeypatch.setattr(asking, "PATIENCE_SECONDS", 0.1)
    ends: asyncio.Queue[str] = asyncio.Queue()
    tally = asking.Reconciliation(Model({}).get, ends.put_nowait)
    await tally.start()
    tally.enqueue("a", lambda _: pytest.fail("nobody knows"))
    assert await asyncio.wait_for(ends.get(), 60) == "unknown"
    monkeypatch.setattr(asking, "PATIENCE_SECONDS", 60)
    for number in range(asking.MOST_OPEN + 1):
        tally.enqueue(f"{number}", lambda _: None)
    assert ends.get_nowait() == "unknown"
    assert ends.empty()
    await tally.stop()
    last = asking.Reconciliation(Model({}, {"a": {"prompt": 1, "completion": 1, "cached": 0}}).get)
    heard: list[Any] = []
    last.enqueue("a", heard.append)
    await last.stop()
    assert heard == [(1, 1, 0)]


@pytest.fixture(scope="module")
def school(tmp_path_factory: pytest.TempPathFactory) -> Iterator[School]:
    with school_on(tmp_path_factory.mktemp("school")) as made:
        yield made


def test_cache_a1_an_upstream_that_tells_nothing_stays_estimated_and_flagged(school: School) -> None:
    """Its chunks are counted. One that sends the usage so far with every chunk is taken at its word."""
    holder = school.key()
    school.one.control(school.one.paid, held=True)  # each stream stops after its first event

    def leave(model: str) -> None:
        body = {"model": model, "messages": [{"role": "user", "content": new()}], "stream": True}
        with holder.bench.http.stream("POST", "/v1/chat/completions", json=body, headers=holder.headers) as answer:
            next(answer.iter_raw())

    def rows() -> dict[str, dict[str, Any]]:
        return {row["model"]: row for row in holder.usage()["rows"]}

    leave("gpt-mock-slow")
    leave("gpt-mock-counting")
    eventually(lambda: len(rows()) == 2)
    school.one.forget()
    assert rows()["gpt-mock-slow"]["estimated_calls"] == 1
    counted = rows()["gpt-mock-counting"]
    assert [counted[name] for name in ("estimated_calls", "prompt_tokens", "completion_tokens")] == [0, 2, 1]


async def test_cache_a1_json_that_is_abandoned_costs_what_the_model_tells(school: School) -> None:
    """It gave no answer that could be counted: booked when the model tells, for the ledger and for TPM."""
    school.one.forget()
    school.one.control(used={"prompt": 10, "completion": 3000, "cached": 4}, closed=True)
    holder = school.key(tpm=3200)
    body = {"model": CHAT_MODEL, "messages": [{"role": "user", "content": new()}], "max_tokens": 10}
    async with httpx2.AsyncClient(base_url=school.one.proxy.url, timeout=60) as http:
        asked = asyncio.create_task(http.post("/v1/chat/completions", headers=holder.headers, json=body))
        await eventually_async(lambda: school.one.calls(school.one.model)["total"] == 1, what="the model is asked")
        asked.cancel()
        await asyncio.gather(asked, return_exceptions=True)
    await eventually_async(lambda: holder.usage()["rows"], what="the call is booked")
    (row,) = holder.usage()["rows"]
    names = ("upstream_calls", "prompt_tokens", "cached_prompt_tokens", "completion_tokens", "estimated_calls")
    assert [row[name] for name in names] == [1, 10, 4, 3000, 0]
    school.one.control(closed=False)
    left = holder.chat(max_tokens=10).headers["x-ratelimit-remaining-tokens"]
    assert int(left) < 1500


# ---- the model alone


@pytest.fixture
async def small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> AsyncIterator[InProcess]:
    ring = UsageRing()
    ring.open(tmp_path)
    monkeypatch.setattr(http_record, "USAGE", ring)
    made = InProcess(max_running=1, max_queued=1)
    yield made
    await made.close()


async def leave(app: InProcess, call_id: str, after: Callable[[], bool], **fields: Any) -> None:
    """Ask as Ray Serve does, and disconnect when `after` is true."""
    body = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 900} | fields
    asked = False

    async def receive() -> dict[str, Any]:
        nonlocal asked
        if not asked:
            asked = True
            return {"type": "http.request", "body": json.dumps(body).encode(), "more_body": False}
        await eventually_async(after)
        return {"type": "http.disconnect"}

    async def send(_: Any) -> None: ...

    scope = {
        "type": "http", "method": "POST", "path": "/v1/chat/completions", "query_string": b"", "root_path": "",
        "headers": [(b"content-type", b"application/json"), (b"host", b"localhost"), (b"x-call-id", call_id.encode())],
    }  # fmt: skip
    await app.app(scope, receive, send)


async def told(folder: Path, id_: str) -> TokenUsage:
    await eventually_async(lambda: id_ in find(folder, [id_]), what=f"{id_} is told")
    return find(folder, [id_])[id_]


async def test_cache_a1_what_is_told_is_what_the_engine_computed(small: InProcess, tmp_path: Path) -> None:
    """Abandoned while it runs: every token that the engine made, the counters alike. While it waits: nothing. Whole,
    by its own request id: its usage. Refused: nothing."""

    def counted() -> tuple[float, float]:
        prompt, completion = (
            REGISTRY.get_sample_value(f"vllm:{counter}_tokens_total", {"model_name": TINY, "engine": "0"}) or 0
            for counter in ("prompt", "generation")
        )
        return prompt, completion

    before, made = counted(), small.engine.stats().generated_tokens
    sound, inside, goes_on = small.model.forward, threading.Event(), threading.Event()

    def held(**arguments: Any) -> Any:
        """A step that is under way while the client leaves: what it makes is generated, too."""
        if small.engine.stats().generated_tokens > made + 20:
            inside.set()
            goes_on.wait(60)
        return sound(**arguments)

    small.model.forward = held
    # Its end token is forbidden: an answer that ended by chance would not run any more.
    runs = asyncio.create_task(leave(small, "runs", inside.is_set, logit_bias={str(END): -100}))
    await eventually_async(lambda: small.engine.stats().running)
    await leave(small, "waits", lambda: small.engine.stats().waiting == 1)
    await runs
    assert "runs" not in find(tmp_path, ["runs"]), "told before it was over"
    goes_on.set()
    used = await told(tmp_path, "runs")
    assert used.completion == small.engine.stats().generated_tokens - made > 20
    assert await told(tmp_path, "waits") == (0, 0, 0)
    assert counted() == (before[0] + used.prompt, before[1] + used.completion)
    answer = await small.ask(headers={"x-request-id": "whole"}, max_tokens=5)
    usage = answer.json()["usage"]
    assert await told(tmp_path, "whole") == (usage["prompt_tokens"], usage["completion_tokens"], 0)
    assert used.prompt == usage["prompt_tokens"]
    before, refused = counted(), asyncio.Event()
    ends = {str(END): -100}
    busy = [asyncio.create_task(leave(small, f"busy{n}", refused.is_set, logit_bias=ends)) for n in range(2)]
    await eventually_async(lambda: small.engine.stats().running + small.engine.stats().waiting == 2)
    assert (await small.ask(headers={"x-request-id": "refused"})).status_code == 429
    assert await told(tmp_path, "refused") == (0, 0, 0)
    assert counted() == before, "a refusal counts nothing"
    refused.set()
    await asyncio.gather(*busy)


async def test_cache_a1_stop_strings_and_deadlines_are_told_as_they_are_counted(
    small: InProcess, tmp_path: Path
) -> None:
    """An answer that a stop string ended is told as its usage, without the engine's lead; one that a deadline ended as
    computed, its prompt as far as it was prefilled."""
    whole = (await small.ask(max_tokens=60)).json()["choices"][0]["message"]["content"]
    stop = whole[len(whole) // 2 :][:3]
    usage = (await small.ask(headers={"x-request-id": "stopped"}, max_tokens=60, stop=stop)).json()["usage"]
    assert (await told(tmp_path, "stopped")).completion == usage["completion_tokens"] < 60
    await eventually_async(lambda: not small.engine.stats().running)
    made = small.engine.stats().generated_tokens
    headers = {"x-request-id": "late", "x-request-timeout-ms": "200"}
    late = await small.ask(headers=headers, max_tokens=900, n=2, logit_bias={str(END): -100})
    assert late.status_code == 504
    used = await told(tmp_path, "late")
    assert used.completion == small.engine.stats().generated_tokens - made > 0
    assert used.prompt == usage["prompt_tokens"]


async def test_cache_a1_choices_that_ended_count_as_their_callers_saw_them() -> None:
    """Two choices of one prompt, abandoned: the prompt counts once and as far as it came, the choice that had ended
    without the engine's lead, the other one with every token."""
    requests = [Request([1, 2, 3, 4], 9), Request([1, 2, 3, 4], 9)]
    work = EngineWork(requests, 2)
    assert work.used() == (0, 0, 0)
    requests[0].prefilled, requests[0].prefix_hit_tokens, requests[1].prefilled = 2, 1, 0
    assert work.used() == (2, 0, 1)
    requests[0].prefilled = 6  # sent back, and prefilled once more with its answer so far
    requests[0].tokens += [7, 7, 7]
    requests[1].tokens += [8, 8]
    work.counted[0] = 1
    assert work.used() == (4, 3, 1)


LONG = [5] * 600  # two of them do not fit into one forward


async def test_cache_a1_embeddings_that_are_abandoned_count_what_was_computed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The inputs whose vectors were made before it was heard that nobody waits; of a request in the queue none."""
    ring = UsageRing()
    ring.open(tmp_path)
    monkeypatch.setattr(http_record, "USAGE", ring)

    class Half:
        """Its first forward ends when all clients have left."""

        context, dimensions, name = 1024, 2, "half"

        def forward(self, rows: Sequence[Sequence[int]]) -> list[list[float]]:
            begun.set()
            assert go.wait(60)
            return [[1.0, 0.0] for _ in rows]

    go = threading.Event()
    begun = threading.Event()
    text = ModelTokenizer.of(tiny.tokenizer())
    queue = EncoderQueue(Half(), 4)
    encoder = EncoderClient("e", "r", text, queue)
    app = create_app(encoder, KINDS["embedding"].paths, max_body_bytes=10_000)
    async with httpx2.AsyncClient(transport=httpx2.ASGITransport(app), base_url="http://localhost") as client:
        asked = [
            asyncio.create_task(
                client.post(
                    "/v1/embeddings",
                    json={"model": "e", "input": [LONG, LONG], "input_vocabulary": "model"},
                    headers={"x-call-id": name},
                )
            )
            for name in ("runs", "waits")
        ]
        assert await asyncio.to_thread(begun.wait, 60)
        for task in reversed(asked):
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        go.set()
    assert await told(tmp_path, "runs") == (len(LONG), 0, 0)
    assert await told(tmp_path, "waits") == (0, 0, 0)


def test_the_ring_is_bounded_and_forgets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two processes' rings in one folder; the oldest make room; what is old is not told; no folder, no fault."""
    one, two = UsageRing(), UsageRing()
    one.open(tmp_path)
    two.open(tmp_path)
    for number in range(SLOTS + 1):
        one.put(f"{number}", TokenUsage(number, 1, 0))
    two.put("elsewhere", TokenUsage(7, 8, 9))
    ids = ["0", "1", f"{SLOTS}", "elsewhere", "nobody"]
    assert find(tmp_path, ids) == {"1": (1, 1, 0), f"{SLOTS}": (SLOTS, 1, 0), "elsewhere": (7, 8, 9)}
    two.put("1", TokenUsage(2, 2, 2))
    assert find(tmp_path, ["1"]) == {"1": (2, 2, 2)}, "the latest"
    assert sum(path.stat().st_size for path in tmp_path.glob("*.tally")) == 2 * SLOTS * 40
    monkeypatch.setattr("lab_model.api.http.usage.KEPT_SECONDS", -1.0)
    assert find(tmp_path, ids) == {}
    nowhere = UsageRing()
    nowhere.open(tmp_path / "none")
    nowhere.put("a", TokenUsage(1, 1, 1))
