"""Limits of a key: atomic over two proxies, without a second burst, and refused requests do not count.

Buckets refill by redis's clock. No test waits for that: the times that redis keeps of a key are set back
(School.pass_time), and where a burst takes a while, what came back meanwhile by redis's clock is allowed for.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import math
import os
import re
import signal
import threading
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest
from fixtures_keys import Holder, School, limits_of, school_on, slots_of
from fixtures_proxy import new, redis_client, state
from lab_proxy.endpoints import CHAT, EMBEDDINGS
from lab_proxy.errors import LimitReached
from lab_proxy.keys import estimate, limits, refusal
from lab_proxy.keys.identity import Identity
from lab_proxy.ledger.ledger import Ledger
from lab_proxy.ledger.prices import Prices
from processes import GENEROUS_SECONDS, eventually, eventually_async, redis_server

HEADERS = ("limit", "remaining", "reset")


@pytest.fixture(scope="module")
def school(tmp_path_factory: pytest.TempPathFactory) -> Iterator[School]:
    with school_on(tmp_path_factory.mktemp("school")) as started:
        yield started


def code(answer: httpx2.Response) -> tuple[int, str]:
    return answer.status_code, answer.json()["error"]["code"]


def at_once(asks: list[Callable[[], httpx2.Response]]) -> list[int]:
    """Their statuses, asked by as many threads."""
    with concurrent.futures.ThreadPoolExecutor(len(asks)) as pool:
        return [each.result().status_code for each in [pool.submit(ask) for ask in asks]]


def both(school: School, holder: Holder, count: int, **more: Any) -> list[Callable[[], httpx2.Response]]:
    """`count` requests, every other one to the second proxy."""
    return [lambda n=n: (school.at_two(holder) if n % 2 else holder).chat(**more) for n in range(count)]


def remaining(holder: Holder, what: str = "requests", **more: Any) -> int:
    return int(holder.chat(**more).headers[f"x-ratelimit-remaining-{what}"])


def test_what_no_model_answers_counts_as_a_request(school: School) -> None:
    """An explained request and one for an unknown model: each counts against RPM, and is refused beyond it."""
    body = {"model": "gpt-mock", "messages": [{"role": "user", "content": "x"}]}

    def explain(holder: Holder) -> httpx2.Response:
        return holder.bench.http.post("/cache/explain", json=body, headers=holder.headers)

    def ask(holder: Holder) -> httpx2.Response:
        return holder.chat(model="nobody-knows")

    for each, served in ((explain, 200), (ask, 404)):
        holder = school.key(rpm=2)
        assert [each(holder).status_code for _ in range(3)] == [served, served, 429]


def nothing_runs(school: School, holder: Holder) -> bool:
    """Redis knows of every request of this key that it is over."""
    return school.db.zcard(slots_of(holder.id)) == 0


# ---- requests a minute


def test_rpm_counts_over_both_proxies_exactly(school: School) -> None:
    """40 at once to two proxies with RPM 6: 6 are answered, no upstream call more is made."""
    school.one.forget()
    holder, began = school.key(rpm=6), school.redis_time()
    statuses = at_once(both(school, holder, 40))
    assert set(statuses) == {200, 429}
    assert 6 <= statuses.count(200) <= 6 + school.refilled(began, 6)  # one in 10 s comes back
    assert school.one.calls()["total"] == statuses.count(200)


def test_there_is_no_second_burst_at_the_edge_of_a_minute(school: School) -> None:
    """RPM 12, all spent: whatever the clock says, the next ten seconds bring 2, not 12."""
    holder, began = school.key(rpm=12), school.redis_time()
    assert set(at_once(both(school, holder, 12))) == {200}
    until_full = seconds_of(holder.chat().headers["x-ratelimit-reset-requests"])
    assert until_full > 59 - school.refilled(began, 60)
    school.pass_time(holder.id, 10)
    more = at_once(both(school, holder, 20)).count(200)
    assert 2 <= more <= 2 + school.refilled(began, 12)


def seconds_of(shown: str) -> float:
    """Of OpenAI's form: `1m26.4s` is 86.4."""
    units = {"h": 3600, "m": 60, "s": 1, "ms": 0.001}
    return sum(float(number) * units[unit] for number, unit in re.findall(r"([\d.]+)(h|ms|m|s)", shown))


def test_refused_requests_do_not_count(school: School) -> None:
    """After RPM 1 is spent, twenty refusals change nothing in redis and do not move the time of the next admission."""
    holder = school.key(rpm=1, tpm=100_000, concurrency=5)
    assert holder.chat().status_code == 200
    eventually(lambda: nothing_runs(school, holder), what="the end of the request")
    before, waits = school.db.dump(limits_of(holder.id)), []
    for each in (holder, school.at_two(holder)) * 10:
        refused = each.chat()
        assert refused.status_code == 429
        assert refused.headers["x-ratelimit-remaining-requests"] == "0"
        waits.append(int(refused.headers["retry-after-ms"]))
    assert waits == sorted(waits, reverse=True)
    assert school.db.dump(limits_of(holder.id)) == before
    assert nothing_runs(school, holder)


def test_429_says_the_true_time_and_openais_words(school: School) -> None:
    """Retry-After is when the next one fits, and it does. The SDK raises its RateLimitError."""
    holder = school.key(rpm=2)
    assert at_once(both(school, holder, 2)) == [200, 200]
    refused = holder.chat()
    error = refused.json()["error"]
    assert (error["code"], error["type"], error["param"]) == ("rate_limit_exceeded", "requests", None)
    assert "Limit 2" in error["message"]
    wait = float(refused.headers["retry-after-ms"]) / 1000
    assert 0 < wait <= 30
    assert int(refused.headers["retry-after"]) == math.ceil(wait)
    school.pass_time(holder.id, wait / 2)
    again = holder.chat()
    assert again.status_code == 429
    assert float(again.headers["retry-after-ms"]) / 1000 <= wait / 2 + 0.001
    school.pass_time(holder.id, float(again.headers["retry-after-ms"]) / 1000)
    assert holder.chat().status_code == 200
    with (
        openai.OpenAI(base_url=f"{school.one.proxy.url}/v1", api_key=holder.key, max_retries=0) as client,
        pytest.raises(openai.RateLimitError) as raised,
    ):
        client.chat.completions.create(model="gpt-mock", messages=[{"role": "user", "content": new()}])
    assert raised.value.code == "rate_limit_exceeded"


def test_x_ratelimit_headers_are_openais(school: School) -> None:
    """Six headers in OpenAI's form on answers, hits and refusals; none of another's key, none without a limit."""
    holder = school.key(rpm=60, tpm=6000)
    answer = holder.chat(max_tokens=10)
    for what in ("requests", "tokens"):
        for which in HEADERS:
            assert f"x-ratelimit-{which}-{what}" in answer.headers
        assert re.fullmatch(r"(\d+h)?(\d+m)?[\d.]+m?s", answer.headers[f"x-ratelimit-reset-{what}"])
    assert answer.headers["x-ratelimit-limit-requests"] == "60"
    assert answer.headers["x-ratelimit-remaining-requests"] == "59"
    assert answer.headers["x-ratelimit-limit-tokens"] == "6000"
    assert not [name for name in school.key().chat().headers if name.startswith("x-ratelimit")]
    assert not [name for name in school.key(tpm=10**6).chat().headers if name.endswith("-requests")]


@pytest.mark.parametrize(
    ("microseconds", "shown"),
    [(0, "0s"), (1, "1ms"), (120_000, "120ms"), (999_001, "1s"), (7_660_000, "7.66s"), (60_000_000, "1m0s"),
     (360_000_000, "6m0s"), (86_400_000, "1m26.4s"), (3_723_000_000, "1h2m3s")],
)  # fmt: skip
def test_durations_are_written_as_openai_does(microseconds: int, shown: str) -> None:
    """As in OpenAI's documentation: 1s, 6m0s."""
    assert refusal.duration(microseconds) == shown


# ---- tokens a minute


def test_tpm_reserves_an_estimate_and_corrects_it(school: School) -> None:
    """While the answer is made, prompt / 4 + max_tokens are taken; after it, what the upstream counted."""
    holder = school.key(tpm=6000)
    answer = holder.chat("a few words", max_tokens=5000)
    left = int(answer.headers["x-ratelimit-remaining-tokens"])
    assert 900 < left < 1000
    assert answer.json()["usage"]["total_tokens"] < 100
    eventually(lambda: nothing_runs(school, holder), what="the end of the request")
    assert remaining(holder, "tokens", max_tokens=1) > 5800


def test_tpm_at_once_over_both_proxies(school: School) -> None:
    """TPM for ten reservations of 1,000 tokens and a bit: ten run together, not one more, whichever proxy they meet."""
    one = 100_000 - remaining(school.key(tpm=100_000), "tokens", max_tokens=1000)
    assert 1000 < one < 1100
    tpm = one * 10 + one // 2
    holder, began = school.key(tpm=tpm), school.redis_time()
    school.one.forget()
    school.one.control(school.one.paid, closed=True)
    with concurrent.futures.ThreadPoolExecutor(30) as pool:
        asks = [pool.submit(ask) for ask in both(school, holder, 30, max_tokens=1000)]
        try:
            eventually(
                lambda: school.one.calls()["total"] + sum(each.done() for each in asks) == 30,
                what="each is refused or at the upstream",
            )
        finally:
            school.one.control(school.one.paid, closed=False)
    statuses = [each.result().status_code for each in asks]
    assert set(statuses) == {200, 429}
    assert 10 <= statuses.count(200) <= 10 + (one // 2 + school.refilled(began, tpm)) // one


def test_a_request_that_never_fits_is_told_so(school: School) -> None:
    """No Retry-After: waiting does not help. A length that nobody asked for is no reason."""
    holder = school.key(tpm=100)
    refused = holder.chat(max_tokens=200)
    assert code(refused) == (429, "rate_limit_exceeded")
    assert refused.json()["error"]["type"] == "tokens"
    assert "retry-after" not in refused.headers
    assert "Requested" in refused.json()["error"]["message"]
    assert holder.chat("hi").status_code == 200
    assert code(holder.chat("word " * 500)) == (429, "rate_limit_exceeded")


def test_numbers_that_are_none_reserve_nothing_negative() -> None:
    """A caller cannot earn tokens by max_tokens below 0, by n, or by types."""
    for said in (-5, 0, True, "7", 1.5, None, [], 10**30):
        prompt, answer = estimate.estimate(CHAT, {"max_tokens": said, "n": said}, 400, None)
        assert prompt == 100
        assert answer >= 0
    assert estimate.estimate(CHAT, {"max_tokens": 10, "n": 3}, 400, None) == (100, 30)
    assert estimate.estimate(EMBEDDINGS, {"max_tokens": 10}, 400, 50) == (100, 0)
    image = {"messages": [{"content": [{"image_url": {"url": "data:image/png;base64," + "A" * 10**6}}]}]}
    assert estimate.estimate(CHAT, image, 10**6, None)[0] < 2000


def test_r5_a_hit_counts_for_rpm_and_its_tokens_are_given_back(school: School) -> None:
    """Twenty hits with 1,000 tokens reserved each, TPM 3,000: none is refused for tokens, each counts as a request."""
    rpm = 24
    holder, text = school.key(tpm=3000, rpm=rpm), new()
    began = school.redis_time()
    assert state(holder.chat(text, max_tokens=1000)) == "miss stored"
    for n in range(20):
        answer = (school.at_two(holder) if n % 2 else holder).chat(text, max_tokens=1000)
        assert answer.status_code == 200, answer.text
        assert state(answer) == "hit"
    left = remaining(holder)
    assert rpm - 22 <= left <= rpm - 22 + school.refilled(began, rpm)


async def test_giving_back_is_no_second_burst(school: School) -> None:
    """A reservation that the bucket has refilled from is not given back once more when its answer ends late."""
    async with redis_client(school.redis) as client:
        made = limits.Limits(
            client, Prices(), Ledger(client, Prices(), folder=Path("."), max_bytes=0), when_down="closed", timeout=60
        )
        who = Identity(tenant="late", owner="late", key_id=f"key_{new()[-8:]}", tpm=6000)  # 100 a second

        async def reserved(tokens: int) -> tuple[limits.Admission, int]:
            admission = await made.admission(who, CHAT, "gpt-mock", {"max_tokens": tokens - 1}, 4, "openai")
            assert admission is not None
            await made.check(admission)
            return admission, int(admission.headers["x-ratelimit-remaining-tokens"])

        late, _ = await reserved(3000)
        school.pass_time(who.key_id or "", 31)  # the bucket is full again while that answer goes on, its slot renewed
        school.keep_slots(who.key_id or "")
        began = school.redis_time()
        soon, left = await reserved(5000)
        assert left == 1000
        late.settle(10)
        _, left = await reserved(10)
        assert 990 <= left <= 990 + school.refilled(began, 6000) + 1
        soon.settle(10)  # nothing was full since: it comes back
        _, left = await reserved(10)
        assert left >= 990 - 10 + 4990


# ---- requests at once


def streams(holder: Holder, ended: list[int]) -> threading.Thread:
    def ask() -> None:
        ended.append(holder.chat(stream=True).status_code)

    thread = threading.Thread(target=ask)
    thread.start()
    return thread


def test_concurrency_is_counted_over_both_proxies(school: School) -> None:
    """Three streams run at two proxies: the fourth is refused, and let in when one has ended."""
    holder, ended = school.key(concurrency=3), []
    school.one.forget()
    school.one.control(school.one.paid, held=True)
    threads = [streams(each, ended) for each in (holder, school.at_two(holder), holder)]
    eventually(lambda: school.one.calls()["total"] == 3, what="three calls")
    refused = school.at_two(holder).chat()
    school.keep_slots(holder.id)
    school.one.control(school.one.paid, held=False)
    assert code(refused) == (429, "rate_limit_exceeded")
    assert "concurrent" in refused.json()["error"]["message"]
    for thread in threads:
        thread.join()
    assert ended == [200, 200, 200]
    eventually(lambda: holder.chat().status_code == 200, what="a free slot")


def test_one_after_the_other_never_meets_its_own_slot(school: School) -> None:
    """Concurrency 1, fifty requests in a row on one connection: hits and misses, none refused."""
    holder, text = school.key(concurrency=1), new()
    for n in range(50):
        answer = holder.chat(text if n % 2 else None)
        assert answer.status_code == 200, f"{n}: {answer.text}"


def test_a_caller_who_leaves_frees_the_slot(school: School) -> None:
    """A stream that its caller breaks off ends the slot, although the upstream's answer has no end."""
    holder = school.key(concurrency=1)
    body = {"model": "gpt-mock-endless", "messages": [{"role": "user", "content": new()}], "stream": True}
    with holder.bench.http.stream("POST", "/v1/chat/completions", json=body, headers=holder.headers) as answer:
        pieces = answer.iter_bytes()  # a name for it: forgotten, it would close the answer
        next(pieces)
        assert holder.chat().status_code == 429
        school.keep_slots(holder.id)
    eventually(lambda: holder.chat().status_code == 200, what="a free slot")


def test_slots_of_a_killed_proxy_come_back(school: School, tmp_path: Path) -> None:
    """SIGKILL with two streams running: their slots are free after the time that a slot lives without a renewal."""
    holder, ended = school.key(concurrency=2), []
    school.one.forget()
    with school.another(tmp_path) as killed:
        threads = [
            threading.Thread(target=_ignoring_faults, args=(Holder(killed, holder.key), ended), daemon=True)
            for _ in range(2)
        ]
        for thread in threads:
            thread.start()
        eventually(lambda: school.one.calls()["total"] == 2, what="two calls")
        assert holder.chat().status_code == 429
        os.kill(killed.proxy.popen.pid, signal.SIGKILL)
        killed.proxy.popen.wait()
        for thread in threads:
            thread.join()
    left = [score - school.redis_time() for _, score in school.db.zrange(slots_of(holder.id), 0, -1, withscores=True)]
    assert len(left) == 2
    assert max(left) <= limits.SLOT_SECONDS * 1e6
    assert holder.chat().status_code == 429  # nobody can know yet
    school.pass_time(holder.id, limits.SLOT_SECONDS)
    assert holder.chat().status_code == 200


def _ignoring_faults(holder: Holder, ended: list[int]) -> None:
    try:
        ended.append(holder.chat(model="gpt-mock-endless", stream=True).status_code)
    except httpx2.HTTPError:
        ended.append(0)


async def test_a_slot_is_renewed_as_long_as_its_answer_takes(school: School, monkeypatch: pytest.MonkeyPatch) -> None:
    """An answer that takes longer than a slot's life without a renewal keeps its slot."""
    assert limits.RENEW_SECONDS * 2 < limits.SLOT_SECONDS
    monkeypatch.setattr(limits, "RENEW_SECONDS", 0.05)
    async with redis_client(school.redis) as client:
        made = limits.Limits(
            client, Prices(), Ledger(client, Prices(), folder=Path("."), max_bytes=0), when_down="closed", timeout=60
        )
        await made.start()
        who = Identity(tenant="long", owner="long", key_id=f"key_{new()[-8:]}", concurrency=1)

        async def asked() -> limits.Admission:
            admission = await made.admission(who, CHAT, "gpt-mock", {}, 4, "openai")
            assert admission is not None
            await made.check(admission)
            return admission

        running, slots = await asked(), slots_of(who.key_id or "")
        for _ in range(3):  # nearly three lives of a slot
            school.pass_time(who.key_id or "", limits.SLOT_SECONDS - 1)
            await eventually_async(
                lambda: school.db.zscore(slots, running.member) > school.redis_time() + (limits.SLOT_SECONDS - 2) * 1e6,
                what="the renewal of a slot",
            )
            with pytest.raises(LimitReached):
                await asked()
        running.settle(0)
        await eventually_async(lambda: school.db.zcard(slots) == 0, what="the end of a slot")
        (await asked()).settle(0)
        await made.stop()


# ---- budgets


def test_t2_a_spent_budget_answers_429_also_where_the_answer_is_cached(school: School) -> None:
    """insufficient_quota at once, at both proxies, for a miss and for a hit; another key of the owner goes on."""
    owner, text = new(), new()
    holder = school.key(owner, budget_total_usd="0.001")
    assert holder.chat(text, model="gpt-dear").status_code == 200
    for each in (holder, school.at_two(holder)):
        for said in (text, None):
            refused = each.chat(said, model="gpt-dear")
            assert code(refused) == (429, "insufficient_quota")
            assert refused.json()["error"]["type"] == "insufficient_quota"
        holder.usage()  # books what the first proxy has not booked yet
    assert state(school.key(owner).chat(text, model="gpt-dear")) == "hit"


def test_a_budget_of_a_day_says_when_it_begins_anew(school: School) -> None:
    """Retry-After is the time to midnight UTC. Hits and free models cost nothing of it."""
    holder, text = school.key(budget_per_day_usd="0.5"), new()
    for _ in range(30):
        assert holder.chat(text).status_code == 200
    assert holder.usage()["budget_usd"]["per_day"]["left"] > 0.49
    assert holder.chat(model="gpt-dear").status_code == 200
    before = school.redis_time() // 1_000_000
    refused = holder.chat()
    after = school.redis_time() // 1_000_000
    assert code(refused) == (429, "insufficient_quota")
    assert int(refused.headers["retry-after"]) in {86_400 - second % 86_400 for second in range(before, after + 1)}


def test_requests_at_once_do_not_run_through_a_budget(school: School) -> None:
    """What runs is reserved: of 20 dear requests at once one spends the budget, not twenty."""
    holder = school.key(budget_total_usd="1")
    statuses = at_once(both(school, holder, 20, model="gpt-dear", max_tokens=100))
    assert statuses.count(200) <= 2
    assert statuses.count(429) >= 18


# ---- redis is not well


def test_x1_limits_fail_as_configured_and_say_so(school: School, tmp_path: Path) -> None:
    """Redis killed: `open` lets through, `closed` refuses with a 503; header, error and log say which."""
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(redis_server(tmp_path))
        started = {
            policy: stack.enter_context(school.another(tmp_path, server, limits_when_redis_is_down=policy))
            for policy in ("open", "closed")
        }
        keys = [
            school.admin("POST", "keys", at=started["open"], json={"owner": new()} | terms).json()["key"]
            for terms in ({"rpm": 2, "concurrency": 2}, {})
        ]
        callers = {policy: [Holder(bench, key) for key in keys] for policy, bench in started.items()}
        for holder, free in callers.values():
            assert holder.chat().status_code == free.chat().status_code == 200
        server.popen.kill()
        server.popen.wait()
        for policy, (holder, free) in callers.items():
            for _ in range(5):
                answer = holder.chat()
                assert answer.headers["x-lab-limits"] == policy
                if policy == "open":
                    assert answer.status_code == 200
                else:
                    assert code(answer) == (503, "limits_unavailable")
                    assert answer.headers["retry-after"] == "2"
                assert free.chat().status_code == 200  # a key without limits never asks redis
            said = "admitted without limits" if policy == "open" else "are refused"
            log = started[policy].proxy.log
            eventually(lambda log=log, said=said: said in log.read_text(), what=f"{said!r} in the log")


def test_garbage_at_a_limits_name_fails_no_request(school: School) -> None:
    """A wrong type where a key's counters lie: as without redis, until it is gone."""
    holder = school.key(rpm=5)
    assert holder.chat().status_code == 200
    name = f"lab:limit:{{{holder.id}}}"
    school.db.delete(name)
    school.db.set(name, "garbage")
    answer = holder.chat()
    assert (answer.status_code, answer.headers["x-lab-limits"]) == (200, "open")
    school.db.delete(name)
    assert holder.chat().headers["x-ratelimit-limit-requests"] == "5"


def test_a_forgotten_script_is_sent_again(school: School) -> None:
    """SCRIPT FLUSH, as a restart of redis does: the next request is counted like every other."""
    holder = school.key(rpm=3)
    assert remaining(holder) == 2
    school.db.script_flush()
    assert remaining(holder) == 1
    assert remaining(school.at_two(holder)) == 0


class Cancelled:
    """Runs a coroutine and cancels it at its n-th wait; `over`: it ended before that."""

    def __init__(self, work: Coroutine[Any, Any, None], turns: int) -> None:
        self._task = asyncio.ensure_future(work)
        self._turns, self.over = turns, False

    async def run(self) -> None:
        for _ in range(self._turns):
            if self._task.done():
                break
            await asyncio.sleep(0)
        self.over = self._task.done()
        self._task.cancel()
        await asyncio.wait({self._task})


async def test_whenever_a_caller_leaves_each_slot_is_released_once(school: School, tmp_path: Path) -> None:
    """Cancelled at each turn of the event loop, from the claim to the end: no slot, hold or earlier end is lost."""
    who = Identity("t", "t", new(), rpm=10**6, tpm=10**6, concurrency=1000, budget_total=10**12)
    async with redis_client(school.redis) as client:
        ledger = Ledger(client, Prices(), folder=tmp_path, max_bytes=0)
        made = limits.Limits(client, Prices(), ledger, when_down="open", timeout=GENEROUS_SECONDS)

        async def request() -> None:
            claim = await made.admission(who, CHAT, "gpt-4o-mini", {"max_tokens": 9}, 40, "openai")
            assert claim is not None
            try:
                await made.check(claim)
                await asyncio.sleep(0)
            finally:
                claim.settle(7)
                claim.settle(7)

        turns, over = 0, False
        while not over:
            await request()  # its end rides along with the next check
            cancelled = Cancelled(request(), turns)
            await cancelled.run()
            turns, over = turns + 1, cancelled.over
        assert turns > 3
        await made._send_finished()
        name = f"{limits.PREFIX}{{{who.key_id}}}"
        assert await client.execute("ZCARD", f"{name}:slots") == 0
        assert await client.execute("HGET", name, "held") == b"0"
        assert made.running == {}


async def test_a_slot_whose_release_is_on_its_way_is_free(school: School, tmp_path: Path) -> None:
    """The release and the next request go to redis by two connections: the request does not meet its own slot."""
    who = Identity("t", "t", new(), concurrency=1)
    async with redis_client(school.redis) as client:
        made = limits.Limits(client, Prices(), Ledger(client, Prices(), folder=tmp_path, max_bytes=0), when_down="open")
        first = await made.admission(who, CHAT, "gpt-4o-mini", {}, 40, "openai")
        assert first is not None
        await made.check(first)
        first.settle(0)
        slow, arrives = asyncio.Event(), made._redis.execute_all

        async def late(*commands: Any) -> Any:
            await slow.wait()
            return await arrives(*commands)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(made._redis, "execute_all", late)
            sending = asyncio.create_task(made._send_finished())
            await asyncio.sleep(0)
            patch.undo()
            second = await made.admission(who, CHAT, "gpt-4o-mini", {}, 40, "openai")
            assert second is not None
            await made.check(second)  # raises LimitReached
            slow.set()
            assert await sending
        second.settle(0)
        await made._send_finished()
        assert await client.execute("ZCARD", f"{limits.PREFIX}{{{who.key_id}}}:slots") == 0


async def test_a_cancelled_hit_loses_no_end_of_another_request(school: School, tmp_path: Path) -> None:
    """An end that rides along with a command is sent again if nobody waits for the reply."""
    who = Identity("t", "t", new(), rpm=10**6, concurrency=1000)
    async with redis_client(school.redis) as client:
        made = limits.Limits(client, Prices(), Ledger(client, Prices(), folder=tmp_path, max_bytes=0), when_down="open")
        claim = await made.admission(who, CHAT, "gpt-4o-mini", {}, 40, "openai")
        assert claim is not None
        await made.check(claim)
        claim.settle(0)
        hit = await made.admission(who, CHAT, "gpt-4o-mini", {}, 40, "openai", at_once=True)
        assert hit is not None
        hit.command()  # and then its caller is gone
        hit.settle(0)
        await made._send_finished()
        assert await client.execute("ZCARD", f"{limits.PREFIX}{{{who.key_id}}}:slots") == 0
