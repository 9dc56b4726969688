"""Limits of a key: atomic over two proxies, without a second burst, and refused requests burn nothing."""

from __future__ import annotations

import asyncio
import collections
import concurrent.futures
import math
import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx2
import openai
import pytest
from fixtures_keys import Holder, School, school_on
from fixtures_proxy import eventually, new, redis_url, state
from lab_proxy.cache.entry import CHAT, EMBEDDINGS
from lab_proxy.keys import limits
from lab_proxy.keys.authentication import Identity
from lab_proxy.ledger.ledger import NoLedger
from lab_proxy.ledger.prices import Prices
from lab_proxy.redis.link import connect

HEADERS = ("limit", "remaining", "reset")


@pytest.fixture(scope="module")
def school(tmp_path_factory: pytest.TempPathFactory) -> Iterator[School]:
    with school_on(tmp_path_factory.mktemp("school"), idle_timeout_seconds="5") as started:
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


# ---- requests a minute


def test_rpm_counts_over_both_proxies_exactly(school: School) -> None:
    """40 at once to two proxies with RPM 15: 15 are answered, no upstream call more is made."""
    school.one.forget()
    statuses = at_once(both(school, school.key(rpm=15), 40))
    assert sorted(set(statuses)) == [200, 429]
    assert statuses.count(200) == 15
    assert school.one.calls()["total"] == 15


def test_there_is_no_second_burst_at_the_edge_of_a_minute(school: School) -> None:
    """RPM 120, all spent: whatever the clock says, the next second brings 2, not 120."""
    holder = school.key(rpm=120)
    began = time.monotonic()
    assert collections.Counter(at_once(both(school, holder, 120))) == {200: 120}
    spent = time.monotonic()
    time.sleep(1)
    more = at_once(both(school, holder, 40)).count(200)
    allowed = math.floor((time.monotonic() - began) * 2) + 1
    assert more <= allowed
    assert more >= math.floor(1 * 2) - 1
    assert spent - began < 30


def test_a_refused_request_burns_nothing(school: School) -> None:
    """After RPM 6 is spent, a hundred refusals do not move the time at which the next one is let in."""
    holder = school.key(rpm=6)
    for _ in range(6):
        assert holder.chat().status_code == 200
    first = holder.chat()
    began = time.monotonic()
    for _ in range(50):
        assert holder.chat().status_code == 429
    last = holder.chat()
    told = [float(each.headers["retry-after-ms"]) / 1000 for each in (first, last)]
    assert told[0] - told[1] == pytest.approx(time.monotonic() - began, abs=0.5)
    assert last.headers["x-ratelimit-remaining-requests"] == "0"


def test_429_says_the_true_time_and_openais_words(school: School) -> None:
    """Retry-After is when the next one fits, and it does. The SDK raises its RateLimitError."""
    holder = school.key(rpm=20)
    assert at_once(both(school, holder, 20)).count(200) == 20
    refused = holder.chat()
    error = refused.json()["error"]
    assert (error["code"], error["type"], error["param"]) == ("rate_limit_exceeded", "requests", None)
    assert "Limit 20" in error["message"]
    wait = float(refused.headers["retry-after-ms"]) / 1000
    assert 0 < wait <= 3.01
    assert int(refused.headers["retry-after"]) == math.ceil(wait)
    time.sleep(wait)
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
    assert limits.duration(microseconds) == shown


# ---- tokens a minute


def test_tpm_reserves_an_estimate_and_corrects_it(school: School) -> None:
    """While the answer is made, prompt / 4 + max_tokens are taken; after it, what the upstream counted."""
    holder = school.key(tpm=60_000)
    answer = holder.chat("a few words", max_tokens=5000)
    left = int(answer.headers["x-ratelimit-remaining-tokens"])
    assert 54_000 < left < 55_000
    used = answer.json()["usage"]["total_tokens"]
    eventually(lambda: remaining(holder, "tokens", max_tokens=1) > 59_000, 2)
    assert used < 100


def test_tpm_at_once_over_both_proxies(school: School) -> None:
    """Reservations of 1,000 tokens against TPM 10,500: ten run together, not one more, whichever proxy they meet."""
    holder = school.key(tpm=10_500)
    statuses = at_once(both(school, holder, 30, model="gpt-mock-slow", max_tokens=1000, stream=True))
    assert 9 <= statuses.count(200) <= 11


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
        prompt, answer = limits.estimate(CHAT, {"max_tokens": said, "n": said}, 400, None)
        assert prompt == 100
        assert answer >= 0
    assert limits.estimate(CHAT, {"max_tokens": 10, "n": 3}, 400, None) == (100, 30)
    assert limits.estimate(EMBEDDINGS, {"max_tokens": 10}, 400, 50) == (100, 0)
    image = {"messages": [{"content": [{"image_url": {"url": "data:image/png;base64," + "A" * 10**6}}]}]}
    assert limits.estimate(CHAT, image, 10**6, None)[0] < 2000


def test_r5_a_hit_counts_for_rpm_and_its_tokens_are_given_back(school: School) -> None:
    """Twenty hits with 1,000 tokens reserved each, TPM 3,000: none is refused for tokens, each counts as a request."""
    rpm = 100
    holder, text = school.key(tpm=3000, rpm=rpm), new()
    began = time.monotonic()
    assert state(holder.chat(text, max_tokens=1000)) == "miss stored"
    for n in range(20):
        answer = (school.at_two(holder) if n % 2 else holder).chat(text, max_tokens=1000)
        assert answer.status_code == 200, answer.text
        assert state(answer) == "hit"
    left = remaining(holder)
    assert left <= rpm - 22 + (time.monotonic() - began) * rpm / 60


async def test_giving_back_is_no_second_burst(school: School) -> None:
    """A reservation that the bucket has refilled from is not given back once more when its answer ends late."""
    client = connect(redis_url(school.redis))
    made = limits.Limits(client, Prices(), NoLedger(), when_down="closed", timeout=5)
    who = Identity(tenant="late", owner="late", key_id=f"key_{new()[-8:]}", tpm=60_000)  # 1,000 a second

    async def reserved(tokens: int) -> tuple[limits.Admission, int]:
        admission = made.admission(who, CHAT, "gpt-mock", {"max_tokens": tokens - 1}, 4, "openai")
        assert admission is not None
        await made.ask(admission)
        return admission, int(admission.headers["x-ratelimit-remaining-tokens"])

    late, _ = await reserved(1000)
    await asyncio.sleep(1.1)  # the bucket is full again while that answer goes on
    soon, left = await reserved(50_000)
    assert left == 10_000
    late.settle(10)
    _, left = await reserved(10)
    assert left < 10_900
    soon.settle(10)  # nothing was full since: it comes back
    _, left = await reserved(10)
    assert left > 59_000
    await client.aclose()


# ---- requests at once


def slow(holder: Holder, ended: list[int]) -> threading.Thread:
    def ask() -> None:
        ended.append(holder.chat(model="gpt-mock-slow", stream=True).status_code)

    thread = threading.Thread(target=ask)
    thread.start()
    return thread


def test_concurrency_is_counted_over_both_proxies(school: School) -> None:
    """Three streams run at two proxies: the fourth is refused, and let in when one has ended."""
    holder, ended = school.key(concurrency=3), []
    school.one.forget()
    school.one.control(school.one.paid, held=True)
    threads = [slow(each, ended) for each in (holder, school.at_two(holder), holder)]
    eventually(lambda: school.one.calls()["total"] == 3, 5)
    refused = school.at_two(holder).chat()
    school.one.control(school.one.paid, held=False)
    assert code(refused) == (429, "rate_limit_exceeded")
    assert "concurrent" in refused.json()["error"]["message"]
    for thread in threads:
        thread.join()
    assert ended == [200, 200, 200]
    eventually(lambda: holder.chat().status_code == 200, 1)


def test_one_after_the_other_never_meets_its_own_slot(school: School) -> None:
    """Concurrency 1, fifty requests in a row on one connection: hits and misses, none refused."""
    holder, text = school.key(concurrency=1), new()
    for n in range(50):
        answer = holder.chat(text if n % 2 else None)
        assert answer.status_code == 200, f"{n}: {answer.text}"


def test_a_caller_who_leaves_frees_the_slot(school: School) -> None:
    """A stream that its caller breaks off ends the slot within a second."""
    holder = school.key(concurrency=1)
    body = {"model": "gpt-mock-endless", "messages": [{"role": "user", "content": new()}], "stream": True}
    with holder.bench.http.stream("POST", "/v1/chat/completions", json=body, headers=holder.headers) as answer:
        pieces = answer.iter_bytes()  # a name for it: forgotten, it would close the answer
        next(pieces)
        assert holder.chat().status_code == 429
    eventually(lambda: holder.chat().status_code == 200, 1.5)


def test_slots_of_a_killed_proxy_come_back(tmp_path: Any) -> None:
    """SIGKILL with two streams running: their slots are free after the time that a slot lives without a word."""
    with school_on(tmp_path) as school:
        holder, ended = school.key(concurrency=2), []
        for _ in range(2):
            threading.Thread(target=_ignoring_faults, args=(slow, holder, ended), daemon=True).start()
        eventually(lambda: school.one.calls()["total"] == 2, 5)
        two = school.at_two(holder)
        assert two.chat().status_code == 429
        os.kill(school.one.proxy.popen.pid, signal.SIGKILL)
        killed = time.monotonic()
        time.sleep(1)
        assert two.chat().status_code == 429  # nobody can know yet
        eventually(lambda: two.chat().status_code == 200, limits.SLOT_SECONDS + 3)
        assert time.monotonic() - killed > 3


def _ignoring_faults(_: Any, holder: Holder, ended: list[int]) -> None:
    try:
        ended.append(holder.chat(model="gpt-mock-endless", stream=True).status_code)
    except httpx2.HTTPError:
        ended.append(0)


def test_a_slot_is_renewed_as_long_as_its_answer_takes(school: School) -> None:
    """A stream longer than a slot's life without a word keeps its slot."""
    holder = school.key(concurrency=1)
    body = {"model": "gpt-mock-endless", "messages": [{"role": "user", "content": new()}], "stream": True}
    with holder.bench.http.stream("POST", "/v1/chat/completions", json=body, headers=holder.headers) as answer:
        began = time.monotonic()
        pieces = answer.iter_bytes()
        for _ in pieces:
            if time.monotonic() - began > limits.SLOT_SECONDS + 2:
                break
        assert holder.chat().status_code == 429


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
        time.sleep(0.3)
    assert state(school.key(owner).chat(text, model="gpt-dear")) == "hit"


def test_a_budget_of_a_day_says_when_it_begins_anew(school: School) -> None:
    """Retry-After is the time to midnight UTC. Hits and free models cost nothing of it."""
    holder, text = school.key(budget_per_day_usd="0.5"), new()
    for _ in range(30):
        assert holder.chat(text).status_code == 200
    assert holder.usage()["budget_usd"]["per_day"]["left"] > 0.49
    assert holder.chat(model="gpt-dear").status_code == 200
    refused = holder.chat()
    assert code(refused) == (429, "insufficient_quota")
    assert abs(int(refused.headers["retry-after"]) - (86400 - time.time() % 86400)) < 3


def test_requests_at_once_do_not_run_through_a_budget(school: School) -> None:
    """What runs is reserved: of 20 dear requests at once one spends the budget, not twenty."""
    holder = school.key(budget_total_usd="1")
    statuses = at_once(both(school, holder, 20, model="gpt-dear", max_tokens=100))
    assert statuses.count(200) <= 2
    assert statuses.count(429) >= 18


# ---- redis is not well


@pytest.mark.parametrize("policy", ["open", "closed"])
def test_x1_limits_fail_as_configured_and_say_so(tmp_path: Any, policy: str) -> None:
    """Redis killed: open lets through, closed refuses with a 503; header, error and log say which."""
    with school_on(tmp_path, limits_when_redis_is_down=policy) as school:
        holder = school.key(rpm=2, concurrency=2)
        free = school.key()
        assert holder.chat().status_code == free.chat().status_code == 200
        school.redis.popen.kill()
        time.sleep(0.3)
        for _ in range(5):
            answer = holder.chat()
            assert answer.headers["x-lab-limits"] == policy
            if policy == "open":
                assert answer.status_code == 200
            else:
                assert code(answer) == (503, "limits_unavailable")
                assert answer.headers["retry-after"] == "2"
            assert free.chat().status_code == 200  # a key without limits never asks redis
        log = school.one.proxy.log.read_text()
        assert ("let through unlimited" if policy == "open" else "are refused") in log


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
    holder = school.key(rpm=5)
    assert remaining(holder) == 4
    school.db.script_flush()
    assert remaining(holder) == 3
    assert remaining(school.at_two(holder)) == 2
