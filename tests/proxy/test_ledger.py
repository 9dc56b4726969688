"""The ledger: every real call once, exactly, whatever redis does; and who may read it."""

from __future__ import annotations

import concurrent.futures
import contextlib
import csv
import io
import json
import os
import random
import signal
import threading
from collections.abc import Iterator
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import httpx2
import pytest
import redis.asyncio
from fixtures_keys import ADMIN_KEY, PRICES, Holder, School, changed, school_on
from fixtures_proxy import Bench, new, proxy, redis_client, redis_url, state
from lab_proxy.keys.identity import LOCAL, Identity
from lab_proxy.ledger import ledger, money
from lab_proxy.ledger import usage as ledger_usage
from lab_proxy.ledger.disk_queue import DiskQueue, LedgerBatch
from lab_proxy.ledger.ledger import Charge, Ledger
from lab_proxy.ledger.prices import Prices
from lab_proxy.ledger.usage import METRICS
from lab_proxy.redis.client import Client
from lab_proxy.redis.connection import RedisError
from processes import SHOWN_ON_FAILURE, Process, eventually, eventually_async, free_port, redis_server


@pytest.fixture(scope="module")
def school(tmp_path_factory: pytest.TempPathFactory) -> Iterator[School]:
    with school_on(tmp_path_factory.mktemp("school")) as started:
        yield started


def everybody(school: School, **query: str) -> dict[str, Any]:
    """/admin/usage after both proxies have booked: a proxy books what it has before it answers."""
    school.admin("GET", "usage", at=school.two)
    said: dict[str, Any] = school.admin("GET", "usage", params=query).json()
    return said


def leave_early(holder: Holder, model: str) -> None:
    body = {"model": model, "messages": [{"role": "user", "content": new()}], "stream": True}
    with holder.bench.http.stream("POST", "/v1/chat/completions", json=body, headers=holder.headers) as answer:
        pieces = answer.iter_bytes()
        for _ in range(3):
            next(pieces)


# ---- A1


def test_a1_after_a_load_run_the_ledger_is_the_upstreams_own_count(school: School) -> None:
    """Hits, misses, collapsed, embeddings, streams and ones broken off by their callers, over two proxies: for whole
    answers the ledger equals the upstream's counters exactly, and served = upstream + cache + collapsed."""
    holders = [school.key(f"student {n} {new()[-8:]}") for n in range(3)]
    texts = [new() for _ in range(8)]
    chance = random.Random(5)
    served = {"prompt": 0, "completion": 0}
    lock = threading.Lock()
    school.one.forget()

    def ask(n: int) -> None:
        holder = holders[n % 3]
        at = school.at_two(holder) if chance.random() < 0.5 else holder
        text = texts[n % len(texts)] if n % 4 else new()
        if n % 11 == 0:
            return leave_early(at, "gpt-mock-endless")
        if n % 7 == 0:
            answer = at.bench.embed([text, "the same", "the same"], headers=at.headers)
        else:
            answer = at.chat(text, stream=n % 3 == 0, stream_options={"include_usage": True} if n % 3 == 0 else None)
        assert answer.status_code == 200, answer.text
        lines = [line[6:] for line in answer.text.splitlines() if line.startswith("data: {")]
        usage = json.loads(lines[-1] if lines else answer.text)["usage"]
        with lock:
            served["prompt"] += usage["prompt_tokens"]
            served["completion"] += usage.get("completion_tokens", 0)
        return None

    with concurrent.futures.ThreadPoolExecutor(12) as pool:
        list(pool.map(ask, range(220)))
    left = 20  # n % 11 == 0

    def rows_of_holders() -> list[dict[str, Any]]:
        ids = {holder.id for holder in holders}
        return [row for row in everybody(school)["rows"] if row["key_id"] in ids]

    eventually(lambda: school.one.calls()["left"] == left, what="the upstream saw each caller leave")
    eventually(lambda: sum(row["requests"] for row in rows_of_holders()) >= 220, what="the charges of 220 requests")
    rows = rows_of_holders()
    total = ledger_usage.total(rows)
    broken = [row for row in rows if row["estimated_calls"]]
    whole = [row for row in rows if not row["estimated_calls"]]
    counted = [school.one.calls(each)["tokens"] for each in (school.one.paid, school.one.model)]
    # 1. Whole answers: exactly.
    for name in ("prompt_tokens", "completion_tokens"):
        assert sum(row[name] for row in whole) == sum(each[name] for each in counted), name
    # 2. Broken-off streams: flagged, and at least what their callers saw.
    assert sum(row["estimated_calls"] for row in broken) == left
    assert all(row["model"] == "gpt-mock-endless" and row["completion_tokens"] >= 2 for row in broken)
    # 3. Real calls, and what was served.
    calls = school.one.calls()["total"] + school.one.calls(school.one.model)["total"]
    assert total["upstream_calls"] == calls
    assert total["requests"] == 220
    for kind in ("prompt", "completion"):
        booked = sum(row[f"{part}{kind}_tokens"] for row in whole for part in ("", "hit_", "collapsed_"))
        assert booked == served[kind], kind
    assert total["hits"] > 20
    # 4. The money, exactly.
    for row in rows:
        if row["upstream"] == "openai":
            paid = row["prompt_tokens"] * 3 * 10**6 + row["completion_tokens"] * 7 * 10**6
            assert row["cost_picodollars"] == paid
        else:
            assert (row["cost_usd"], row["unpriced"]) == (0, False)
    # 5. A key's own page is its part of it; the operator's total is the sum of all rows.
    for holder in holders:
        own = holder.usage()
        mine = [row for row in rows if row["key_id"] == holder.id]
        assert own["rows"] == mine
        assert own["budget_usd"]["total"]["spent"] == pytest.approx(sum(row["cost_usd"] for row in mine))
    report = everybody(school)
    for name in ("requests", "upstream_calls", "prompt_tokens", "completion_tokens", "hits"):
        assert report["total"][name] == sum(row[name] for row in report["rows"]), name


def test_a1_redis_killed_in_the_middle_of_a_load_run_loses_nothing(school: School, tmp_path: Path) -> None:
    """What redis does not take waits on disk, also over the proxy's own end, and is booked once."""
    school.one.forget()
    admin = {"authorization": f"Bearer {ADMIN_KEY}"}

    def usage(bench: Bench) -> dict[str, int]:
        said: dict[str, int] = bench.http.get("/admin/usage", headers=admin).json()["total"]
        return said

    def on_disk() -> int:
        """Calls that wait in the files of the ledger."""
        lines = [line for path in tmp_path.glob("ledger-*.jsonl") for line in path.read_text().splitlines()]
        at = METRICS.index("upstream_calls")
        return sum(row[5][at] for line in lines for row in json.loads(line)["rows"])

    # 1. Redis keeps its data over the kill, as with an append-only file.
    with redis_server(tmp_path, "--appendonly", "yes", "--appendfsync", "always") as server:
        port = server.port
        with school.another(tmp_path, server) as first:
            key = first.http.post("/admin/keys", json={"owner": new()}, headers=admin).json()["key"]
            holder = Holder(first, key)
            for _ in range(20):
                assert holder.chat().status_code == 200
            assert usage(first)["upstream_calls"] == 20
            for _ in range(5):
                assert holder.chat().status_code == 200
            server.popen.kill()
            server.popen.wait()
            for _ in range(20):
                assert holder.chat().status_code == 200
            assert first.http.get("/admin/usage", headers=admin).status_code == 503  # after all is put on the disk
            assert 20 <= on_disk() <= 25
            first.proxy.popen.kill()  # not asked to end: what is on disk is all there is
            first.proxy.popen.wait()
    # 2. Another process books what the first one left, beside its own.
    with (
        redis_server(tmp_path, "--appendonly", "yes", port=port) as server,
        school.another(tmp_path, server) as second,
    ):
        for _ in range(5):
            assert Holder(second, key).chat().status_code == 200
        eventually(lambda: not on_disk(), what="the disk's calls are booked")
        total, calls = usage(second), school.one.calls()
        assert total["upstream_calls"] == calls["total"] == 50
        assert total["completion_tokens"] == calls["tokens"]["completion_tokens"]


def test_sigterm_books_what_is_left(school: School, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A proxy that is told to end right after an answer has booked it, however long it gathers charges otherwise."""
    changed(monkeypatch, "ledger.ledger.FLUSH_SECONDS = 3600")
    holder = school.key()
    with school.another(tmp_path) as ending:
        assert Holder(ending, holder.key).chat().status_code == 200
        ending.proxy.popen.send_signal(signal.SIGTERM)
        ending.proxy.popen.wait(60)
    assert holder.usage()["total"]["upstream_calls"] == 1


# ---- the parts alone, with a real redis


PRICED = Identity(tenant="kim", owner="kim", key_id="key_0a")


def charge(**more: Any) -> Charge:
    told = {"key_id": PRICED.key_id or "", "owner": PRICED.owner,
            "upstream": "openai", "model": "gpt-mock", "source": "upstream", "prompt": 10,
            "completion": 5}  # fmt: skip
    return Charge(**(told | more))


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Process]:
    with redis_server(tmp_path) as started:
        yield started


@contextlib.asynccontextmanager
async def book(server: Process, folder: Path, *, max_bytes: int = 10**6) -> Any:
    """A ledger with a client of its own. `flush` returns when redis has taken all, or the disk what redis did not."""
    (folder / "prices.yaml").write_text(PRICES)
    async with redis_client(server) as client:
        made = Ledger(client, Prices(folder / "prices.yaml"), folder=folder / "spool", max_bytes=max_bytes)
        await made.start()
        yield made
        await made.stop()


@pytest.fixture
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """A redis that is paused for the test is not waited for long."""
    monkeypatch.setattr(ledger, "FLUSH_TIMEOUT", 0.2)


async def all_booked(made: Ledger) -> None:
    """Redis is back: wait until nothing is left in memory and on the disk."""

    async def done() -> bool:
        await made.flush()
        return not made.unflushed_cost(PRICED.key_id or "")

    await eventually_async(done, what="all is booked")


async def calls_booked(made: Ledger) -> int:
    today = datetime.now(UTC).date()
    return int((await made.usage(today, today, limit=1)).total["upstream_calls"])


@pytest.mark.usefixtures("hurried")
async def test_cache_a1_a_correction_puts_its_own_row_right(server: Process, tmp_path: Path) -> None:
    """More or less than was estimated, also on a day that is over and while redis is down: tokens, money by day, in
    all and not booked yet, and the flag; the rows of others stay."""
    async with book(server, tmp_path) as made:
        day = datetime(2026, 11, 20, tzinfo=UTC).date()
        made.record(charge())
        high = charge(prompt=1000, completion=900, estimated=True, day=day.isoformat())
        low = charge(prompt=1, completion=1, estimated=True)
        made.record(high)
        made.record(low)
        await all_booked(made)
        os.kill(server.popen.pid, signal.SIGSTOP)
        made.record(charge())
        await made.flush()  # to the disk: redis hears of it before it hears of less
        made.correct(high, 10, 5, 4)
        made.correct(low, 20, 30, 0)
        paid = (6 * 3 + 5 * 7) * 10**6 + 4 * 300_000
        change = paid - (1000 * 3 + 900 * 7) * 10**6 + (19 * 3 + 29 * 7) * 10**6
        await made.flush()
        assert [each for each in (tmp_path / "spool").glob("*") if each.stat().st_size], "it waits on the disk"
        assert made.unflushed_cost(PRICED.key_id or "") == change + 65 * 10**6 < 0
        os.kill(server.popen.pid, signal.SIGCONT)
        await all_booked(made)
        (row,) = (await made.usage(day, day, limit=2)).rows
        names = ("requests", "upstream_calls", "estimated_calls", "prompt_tokens", "cached_prompt_tokens",
                 "completion_tokens", "cost_picodollars")  # fmt: skip
        assert [row[name] for name in names] == [1, 1, 0, 10, 4, 5, paid]
        today = datetime.now(UTC).date()
        (row,) = (await made.usage(today, today, limit=2)).rows
        assert [row[name] for name in names] == [3, 3, 0, 40, 0, 40, 400 * 10**6]
        assert await made.spent(PRICED.key_id or "") == (400 * 10**6, 400 * 10**6 + paid)


async def test_an_unsure_batch_is_booked_once(server: Process, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Redis books a batch whose answer is lost: sent again, also by the next process, it does not count twice."""
    async with book(server, tmp_path) as made:
        made.record(charge())
        await made.flush()
        real = Client.execute

        async def lost(*args: Any, **more: Any) -> Any:
            await real(*args, **more)
            raise RedisError("no answer in time")

        with monkeypatch.context() as patch:
            patch.setattr(Client, "execute", lost)
            for _ in range(3):
                made.record(charge())
                await made.flush()
            patch.undo()
            assert await calls_booked(made) == 2  # the first of the three was booked, and redis said nothing
            spooled = list((tmp_path / "spool").glob("ledger-*.jsonl"))
            assert spooled
            kept = spooled[0].read_bytes()
        assert len(kept.splitlines()) == 3
        await made.flush()
        assert await calls_booked(made) == 4
        assert spooled[0].stat().st_size == 0
    # The next start finds the same file, as after a kill between booking and emptying it.
    client = redis.asyncio.Redis(port=server.port)
    writer, number = spooled[0].stem.removeprefix("ledger-"), 4
    await client.hset(ledger.WRITERS, writer, number)
    await client.aclose()
    spooled[0].write_bytes(kept)
    async with book(server, tmp_path) as made:
        await made.flush()
        assert await calls_booked(made) == 4
        assert not list((tmp_path / "spool").glob("ledger-*.jsonl"))


@pytest.mark.parametrize("fault", ["full", "read-only", "paused"])
@pytest.mark.usefixtures("hurried")
async def test_what_redis_refuses_is_spooled_and_booked_in_order(server: Process, tmp_path: Path, fault: str) -> None:
    """A full, a read-only and a paused redis: nothing lost, nothing twice, and no call waits for it."""
    async with book(server, tmp_path) as made, redis.asyncio.Redis(port=server.port) as client:
        made.record(charge())
        await all_booked(made)
        if fault == "full":
            await client.config_set("maxmemory", "1")
        elif fault == "read-only":
            await client.execute_command("REPLICAOF", "127.0.0.1", str(free_port()))
        else:
            os.kill(server.popen.pid, signal.SIGSTOP)
        for _ in range(1000):
            made.record(charge())  # of a paused redis that never answers
        await eventually_async(
            lambda: any(each.stat().st_size for each in (tmp_path / "spool").glob("*")), what="charges on the disk"
        )
        assert made.unflushed_cost(PRICED.key_id or "") == 1000 * (10 * 3 + 5 * 7) * 10**6
        if fault == "full":
            await client.config_set("maxmemory", "0")
        elif fault == "read-only":
            await client.execute_command("REPLICAOF", "NO", "ONE")
        else:
            os.kill(server.popen.pid, signal.SIGCONT)
        await eventually_async(
            lambda: not made.unflushed_cost(PRICED.key_id or ""), what="all is booked, without a call"
        )
        assert await calls_booked(made) == 1001
        assert (await made.spent(PRICED.key_id or ""))[1] == 1001 * 65 * 10**6


@pytest.mark.usefixtures("hurried")
async def test_a_full_spool_keeps_the_sums_in_memory(server: Process, tmp_path: Path) -> None:
    """Neither redis nor the disk takes them: they wait, summed, and are booked when redis is back."""
    async with book(server, tmp_path, max_bytes=10) as made:
        os.kill(server.popen.pid, signal.SIGSTOP)
        for _ in range(50):
            made.record(charge())
        await made.flush()
        for _ in range(50):
            made.record(charge())
        os.kill(server.popen.pid, signal.SIGCONT)
        await all_booked(made)
        assert await calls_booked(made) == 100


async def test_a_torn_line_of_the_spool_costs_only_itself(server: Process, tmp_path: Path) -> None:
    """A line that a crash cut in two is passed over; those before it are booked."""
    spool = DiskQueue(tmp_path / "spool", "0123456789abcdef", 10**6)
    row = ("2026-11-23", "key_0a", "kim", "openai", "gpt-mock", [1] * len(METRICS))
    spool.append(LedgerBatch(spool.writer, 1, [row]))
    spool.append(LedgerBatch(spool.writer, 2, [row]))
    spool.close(remove=False)
    path = next((tmp_path / "spool").glob("*.jsonl"))
    path.write_bytes(path.read_bytes()[:-20])
    async with book(server, tmp_path) as made:
        await made.flush()
        day = datetime(2026, 11, 23, tzinfo=UTC).date()
        assert (await made.usage(day, day, limit=1)).total["requests"] == 1
    assert not path.exists()


async def test_a_wrong_type_in_redis_loses_no_other_sum(server: Process, tmp_path: Path) -> None:
    """Garbage at one key's name: that sum is lost and said to be, all others are booked once."""
    async with book(server, tmp_path) as made, redis.asyncio.Redis(port=server.port) as client:
        await client.set(f"{ledger.SUMS}key_0a", "garbage")
        made.record(charge())
        made.record(charge(key_id=LOCAL.key_id or "-", owner=LOCAL.owner))
        await made.flush()
        assert await calls_booked(made) == 2


async def test_nothing_of_the_ledger_is_ever_evicted(server: Process, tmp_path: Path) -> None:
    """No name of keys and ledger has a TTL, so that volatile-lru takes cached answers alone."""
    async with book(server, tmp_path) as made, redis.asyncio.Redis(port=server.port) as client:
        made.record(charge())
        await made.flush()
        names = [name async for name in client.scan_iter("lab:*")]
        assert len(names) >= 4
        assert [await client.ttl(name) for name in names] == [-1] * len(names)


# ---- prices and money


def test_money_is_exact() -> None:
    """A hundred thousand cached tokens at 0.075 USD a million are 0.0075 USD, to the last digit."""
    prices = Prices()
    assert prices.cost("openai", "gpt-4o-mini", 1, 0, cached=1) == 75_000
    assert money.shown(prices.cost("openai", "gpt-4o-mini", 100_000, 0, cached=100_000) or 0) == "0.0075"
    assert money.shown(10**18 + 1) == "1000000.000000000001"
    assert money.from_usd(Decimal("0.000001")) == 10**6
    for wrong in ("0.0000001", "-1", "NaN"):
        with pytest.raises(ValueError, match="not an amount"):
            money.from_usd(Decimal(wrong))


def test_prices_know_snapshots_long_prompts_local_models_and_what_they_do_not_know() -> None:
    """A dated snapshot costs what its model does; long prompts cost more; local ones 0; an unknown one is no price."""
    prices = Prices()
    assert (
        prices.cost("openai", "gpt-4o-mini-2024-07-18", 1, 1) == prices.cost("openai", "gpt-4o-mini", 1, 1) == 750_000
    )
    assert prices.cost("openai", "gpt-5.5", 272_000, 0) == 272_000 * 5_000_000
    assert prices.cost("openai", "gpt-5.5", 272_001, 0) == 272_001 * 10_000_000
    assert prices.cost("model", "smollm2-135m-instruct", 5, 5) == 0
    assert prices.cost("openai", "gpt-nobody-knows", 5, 5) is None
    assert prices.cost("elsewhere", "gpt-4o-mini", 5, 5) is None
    assert prices.cost("openai", "gpt-4o-mini", 1, 0, half=True) == 75_000


def test_a_wrong_prices_file_is_refused_and_keeps_the_old_one(tmp_path: Path) -> None:
    """A line that says where; the table of before stays."""
    path = tmp_path / "prices.yaml"
    path.write_text(PRICES)
    prices = Prices(path)
    for wrong in ("upstreams: {openai: {source: x, checked: 2026-11-23, models: {a: {input: -1, output: 0}}}}",
                  "upstreams: {openai: {source: x, checked: 2026-11-23, models: {a: {input: 0.0000001, output: 0}}}}",
                  "upstreams: {openai: {models: {}}}", "- nothing", ": : :"):  # fmt: skip
        path.write_text(wrong)
        with pytest.raises(ValueError, match="PROXY_PRICES_FILE"):
            prices.reload()
        assert prices.cost("openai", "gpt-mock", 1, 0) == 3_000_000
    assert prices.files() == [path]


def test_a_model_without_a_price_is_flagged_not_0(school: School) -> None:
    """`unpriced` and a cost of null, on the page and in the CSV; a row of both kinds keeps what is known."""
    holder = school.key()
    assert holder.chat(model="gpt-nobody-knows").status_code == 200
    (row,) = holder.usage()["rows"]
    assert (row["unpriced"], row["cost_usd"], row["cost_picodollars"]) == (True, None, None)
    assert holder.chat().status_code == 200
    total = holder.usage()["total"]
    assert total["unpriced"]
    assert total["cost_usd"] > 0


# ---- who may read it


def test_a_key_reads_its_own_usage_and_nobody_elses(school: School) -> None:
    """No filter leads to another key; the day, the model and the form may be chosen."""
    mine, other = school.key(), school.key()
    assert mine.chat().status_code == other.chat().status_code == 200
    assert [row["key_id"] for row in mine.usage()["rows"]] == [mine.id]
    for query in (f"key_id={other.id}", "owner=x", "sql=1", "from=yesterday", "format=xml", "from=2020-01-01"):
        assert mine.get(f"/usage?{query}").status_code == 400, query
    assert mine.get("/usage?to=2020-01-31").json()["rows"] == []
    assert mine.get("/usage?model=gpt-mock").json()["total"]["upstream_calls"] == 1
    assert mine.get("/usage?model=gpt-other").json()["total"]["upstream_calls"] == 0
    found = everybody(school, key_id=other.id)["rows"]
    assert [row["key_id"] for row in found] == [other.id]
    assert everybody(school, owner=found[0]["owner"])["total"]["upstream_calls"] == 1


def test_usage_as_csv(school: School) -> None:
    """Columns of the JSON, money in plain digits, and no name that a spreadsheet takes for a formula."""
    holder = school.key()
    holder.chat()
    answer = school.admin("GET", "usage", params={"format": "csv", "key_id": holder.id})
    assert answer.headers["content-type"].startswith("text/csv")
    (row,) = csv.DictReader(io.StringIO(answer.text))
    told = holder.usage()["rows"][0]
    assert (row["model"], int(row["prompt_tokens"])) == ("gpt-mock", told["prompt_tokens"])
    assert Decimal(row["cost_usd"]) == Decimal(told["cost_picodollars"]) / 10**12
    risky = {"day": "2026-11-23", "key_id": None, "owner": "kim", "upstream": "u", "model": "=cmd()"}
    shown = ledger_usage.as_csv([risky | ledger_usage.total([])])
    assert ",'=cmd()," in shown


def test_usage_is_read_by_pages(school: School) -> None:
    """Each row once, in order, with the sums of all on every page; CSV alike, and never cut off without a word."""
    holder = school.key()
    days = [f"2021-03-{day:02}" for day in range(1, 29)]
    models = [f"m{number:03}" for number in range(400)]
    for day in days:
        row = {json.dumps(["kim", "u", model, "requests"], separators=(",", ":")): 1 for model in models}
        school.db.hset(f"{ledger_usage.ROWS}{day}:{holder.id}", mapping=row)
        school.db.sadd(ledger_usage.DAYS + day, holder.id)
    where, count = "from=2021-03-01&to=2021-03-31", len(days) * len(models)
    seen: list[dict[str, Any]] = []
    more = ""
    while True:
        page = holder.get(f"/usage?{where}&limit=5000{more}").json()
        assert page["total"]["requests"] == count
        seen += page["rows"]
        if not page["has_more"]:
            break
        assert len(page["rows"]) == 5000
        more = f"&after={page['last_id']}"
    assert [(row["day"], row["model"]) for row in seen] == [(day, model) for day in days for model in models]
    first = holder.get(f"/usage?{where}").json()
    assert (len(first["rows"]), first["has_more"]) == (1000, True)
    # A row that comes in before the cursor moves nothing.
    name = json.dumps(["kim", "u", "a-first", "requests"], separators=(",", ":"))
    school.db.hset(f"{ledger_usage.ROWS}2021-03-01:{holder.id}", name, 1)
    assert holder.get(f"/usage?{where}&limit=1&after={first['last_id']}").json()["rows"] == [seen[1000]]
    everyone = school.admin("GET", "usage", params={"from": days[0], "to": days[-1], "limit": 2}).json()
    assert [row["model"] for row in everyone["rows"]] == ["a-first", "m000"]
    cut = holder.get(f"/usage?{where}&format=csv")
    assert (cut.status_code, cut.json()["error"]["param"]) == (400, "limit")
    table = holder.get(f"/usage?{where}&format=csv&limit=3")
    assert len(list(csv.DictReader(io.StringIO(table.text)))) == 3
    assert (table.headers["x-has-more"], bool(table.headers["x-last-id"])) == ("true", True)
    for wrong, param in (("limit=0", "limit"), ("limit=10001", "limit"), ("after=x", "after"), ("after=W10", "after")):
        answer = holder.get(f"/usage?{where}&{wrong}")
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, param), wrong


def test_without_keys_usage_is_everybodys(school: School, tmp_path: Path) -> None:
    """A lab on loopback: /usage tells what was used; the operator's pages are off."""
    url = redis_url(school.redis)
    with (
        proxy(tmp_path, redis=url, model=school.one.model.url, paid=school.one.paid.url) as started,
        httpx2.Client(base_url=started.url, timeout=60, event_hooks=SHOWN_ON_FAILURE) as http,
    ):
        bench = Bench(started, school.one.paid, school.one.model, school.redis, http)
        text = new()
        assert bench.chat(text).status_code == 200
        assert state(bench.chat(text)) == "hit"
        said = http.get("/usage").json()
        assert (said["owner"], said["key_id"]) == ("local", None)
        assert (said["total"]["upstream_calls"], said["total"]["hits"]) == (1, 1)
        answer = http.get("/admin/usage", headers={"authorization": "Bearer any"})
        assert answer.status_code == 404
        assert "PROXY_ADMIN_KEY_FILE" in answer.json()["error"]["message"]
