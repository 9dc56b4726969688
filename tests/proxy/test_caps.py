"""Caps of upstreams, which all keys share: counted for all processes, for upstream calls only, and fairly between keys.

As in test_limits.py, no test waits for a bucket to refill: the times that redis keeps of a cap are set back.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx2
import pytest
from fixtures_keys import PRICES, Holder, School, limits_of, school_on, slots_of
from fixtures_proxy import new, redis_client, state
from lab_proxy.endpoints import CHAT
from lab_proxy.keys import limits
from lab_proxy.keys.identity import LOCAL
from lab_proxy.ledger.ledger import UPSTREAM_SUMS, Ledger
from lab_proxy.ledger.prices import Prices
from lab_proxy.upstreams.routes import Cap, UpstreamConfig
from processes import GENEROUS_SECONDS, eventually, free_port
from test_limits import Cancelled, at_once, code
from test_upstream import routes_file

# One mock upstream under several names, each with a cap of its own.
CAPS: dict[str, dict[str, Any]] = {
    "few": {"rpm": 6},
    "true": {"rpm": 1},
    "fair": {"rpm": 4},
    "spare": {"rpm": 1},
    "every": {"rpm": 4, "responses": True},
    "words": {"tpm": 1000},
    "shared-words": {"tpm": 1000},
    "purse": {"usd_per_day": 0.5},
    "shared-purse": {"usd_per_day": 100},
}
MICRO = 1_000_000


@pytest.fixture(scope="module")
def school(tmp_path_factory: pytest.TempPathFactory) -> Iterator[School]:
    folder = tmp_path_factory.mktemp("school")
    dear = "    source: the tests\n    checked: 2026-11-23\n    every: {input: 100000, output: 100000}\n"
    (folder / "prices.yaml").write_text(PRICES + "".join(f"  {name}:\n{dear}" for name in ("purse", "shared-purse")))
    port = free_port()
    at = {"kind": "openai", "base_url": f"http://127.0.0.1:{port}/v1", "keyless": True}
    upstreams: dict[str, dict[str, Any]] = {"model": {"kind": "model"}, "openai": {"kind": "openai"}}
    routes: list[dict[str, Any]] = [{"upstream": name, "match": [f"{name}-mock"]} for name in CAPS]
    routes[[*CAPS].index("spare")]["fallbacks"] = [{"upstream": "openai", "model": "gpt-mock"}]
    file = routes_file(
        folder,
        upstreams=upstreams | {name: at | cap for name, cap in CAPS.items()},
        routes=[{"upstream": "model"}, *routes, {"upstream": "openai", "match": ["gpt-*"]}],
        aliases=[],
        auto=None,
    )
    with school_on(folder, paid_port=port, routes_file=str(file)) as started:
        yield started


def ask(holder: Holder, upstream: str, **more: Any) -> httpx2.Response:
    return holder.chat(model=f"{upstream}-mock", **more)


def cap_of(upstream: str) -> str:
    """The name in redis of what limits.lua keeps of a cap."""
    return limits_of(f"upstream:{upstream}")


def pass_time(school: School, upstream: str, seconds: float) -> None:
    """Make redis see the cap as it would `seconds` later."""
    name, micros = f"upstream:{upstream}", round(seconds * MICRO)
    school.pass_time(name, seconds)
    for field in school.db.hkeys(f"{cap_of(upstream)}:shares"):
        if field.endswith(b":at"):
            school.db.hincrbyfloat(f"{cap_of(upstream)}:shares", field, -micros)
    for key in school.db.zrange(f"{cap_of(upstream)}:active", 0, -1):
        school.db.zincrby(f"{cap_of(upstream)}:active", -micros, key)


def leave(school: School, upstream: str, microseconds: int) -> None:
    """Make so much of a cap's minute of requests free, from now on."""
    school.db.hset(cap_of(upstream), "r", school.redis_time() + 60 * MICRO - microseconds)


def test_a_cap_is_of_all_keys_and_both_proxies_and_hits_do_not_count(school: School) -> None:
    """RPM 6 and 30 keys at once at two proxies: 6 calls of the upstream. What is cached is still answered."""
    kept, text = school.key(), new()
    assert ask(kept, "few", text=text).status_code == 200
    school.one.forget()
    keys, began = [school.key() for _ in range(30)], school.redis_time()
    asks = [lambda n=n, key=key: ask(school.at_two(key) if n % 2 else key, "few") for n, key in enumerate(keys)]
    answered = at_once(asks).count(200)
    assert 5 <= answered <= 6 + school.refilled(began, 6)
    assert school.one.calls()["total"] == answered
    for _ in range(10):
        assert state(ask(kept, "few", text=text)) == "hit"
    assert school.one.calls()["total"] == answered


def test_a_refused_call_does_not_count_and_hears_the_true_time(school: School) -> None:
    """Retry-After is when the next call fits, however often a key is refused before; and it does."""
    one, other = school.key(rpm=100), school.key()
    assert ask(one, "true").status_code == 200
    before = school.db.hget(cap_of("true"), "r")
    for each in (one, school.at_two(other)) * 3:
        refused = ask(each, "true")
        assert code(refused) == (429, "rate_limit_exceeded")
        assert "`true`" in refused.json()["error"]["message"]
    assert school.db.hget(cap_of("true"), "r") == before
    assert int(refused.headers["retry-after-ms"]) <= int(refused.headers["retry-after"]) * 1000 <= 60_000
    left = (float(before or 0) - school.redis_time()) / 1000  # until the cap is full: later than the answer
    assert int(refused.headers["retry-after-ms"]) >= left
    assert refused.headers.get("x-ratelimit-remaining-requests") is None
    pass_time(school, "true", int(refused.headers["retry-after"]))
    assert ask(other, "true").status_code == 200
    assert int(ask(one, "true").headers["x-ratelimit-limit-requests"]) == 100  # those of the key itself


def test_a_key_beyond_its_share_leaves_the_rest_to_others(school: School) -> None:
    """A key has taken the whole cap. Of what is refilled, the first goes to a key that asks for less than its share."""
    greedy, modest = school.key(), school.key()
    assert [ask(greedy, "fair").status_code for _ in range(4)] == [200] * 4
    assert ask(modest, "fair").status_code == 429  # and from here on there are two
    leave(school, "fair", 15 * MICRO + 1000)  # one call; the kept quarter is one call too
    refused = ask(greedy, "fair")
    assert code(refused) == (429, "rate_limit_exceeded")
    assert "This key has used its share" in refused.json()["error"]["message"]
    assert 1 <= int(refused.headers["retry-after"]) <= 15  # by then two calls are free, if nobody else takes them
    assert ask(modest, "fair").status_code == 200
    leave(school, "fair", 30 * MICRO + 1000)
    assert ask(greedy, "fair").status_code == 200  # there is more than the kept quarter
    # A minute later nobody is active, and one key alone may take everything again.
    pass_time(school, "fair", 61)
    assert [ask(greedy, "fair").status_code for _ in range(4)] == [200] * 4


def test_beyond_the_cap_the_fallback_answers(school: School) -> None:
    """A route's fallback is used as for an upstream that itself answers 429."""
    holder = school.key()
    assert "x-model-fallback" not in ask(holder, "spare").headers
    answer = ask(holder, "spare")
    assert (answer.status_code, answer.headers["x-model-fallback"]) == (200, "openai/gpt-mock")


def test_calls_of_every_endpoint_count(school: School) -> None:
    """Answers, streams, vectors and Responses: each counts once, and is refused beyond the cap."""
    holder = school.key()

    def embed() -> httpx2.Response:
        return holder.bench.embed(new(), headers=holder.headers, model="every-mock")

    def respond() -> httpx2.Response:
        body = {"model": "every-mock", "input": new()}
        return holder.bench.http.post("/v1/responses", json=body, headers=holder.headers)

    asks = [lambda: ask(holder, "every"), lambda: ask(holder, "every", stream=True), embed, respond]
    assert [each().status_code for each in asks] == [200] * 4
    for each in asks:
        leave(school, "every", 0)
        assert code(each()) == (429, "rate_limit_exceeded")


def test_tokens_are_reserved_and_then_counted_as_used(school: School) -> None:
    """TPM 1000: two requests that may use 600 each are answered, because the first used few; one of 2000 never is."""
    holder = school.key()
    assert ask(holder, "words", max_tokens=600).status_code == 200
    eventually(lambda: school.db.zcard(slots_of("upstream:words")) == 0, what="the end of the call")
    assert ask(holder, "words", max_tokens=600).status_code == 200
    refused = ask(holder, "words", max_tokens=2000)
    assert code(refused) == (429, "rate_limit_exceeded")
    assert refused.json()["error"]["type"] == "tokens"
    assert "retry-after" not in refused.headers
    # The tokens that are in use are those that the upstream reported, of the key too.
    eventually(lambda: school.db.zcard(slots_of("upstream:words")) == 0, what="the end of the call")
    use = school.db.hget(f"{cap_of('words')}:shares", f"{holder.id}:t")
    assert float(use or 0) < 0.3 * 60 * MICRO


def test_tokens_are_shared_too(school: School) -> None:
    """A key that may use 700 of 1000 tokens while another is active is refused a second time, the other is not."""
    greedy, modest = school.key(), school.key()
    assert ask(modest, "shared-words", max_tokens=5).status_code == 200
    eventually(lambda: school.db.zcard(slots_of("upstream:shared-words")) == 0, what="the end of the call")
    name = cap_of("shared-words")
    school.db.zadd(f"{name}:active", {greedy.id: school.redis_time()})
    school.db.hset(f"{name}:shares", mapping={f"{greedy.id}:t": 55 * MICRO, f"{greedy.id}:at": school.redis_time()})
    school.db.hset(name, "t", school.redis_time() + 40 * MICRO)  # a third is free
    refused = ask(greedy, "shared-words", max_tokens=200)
    assert code(refused) == (429, "rate_limit_exceeded")
    assert "This key has used its share" in refused.json()["error"]["message"]
    assert ask(modest, "shared-words", max_tokens=200).status_code == 200


def test_a_days_money_is_of_all_keys(school: School) -> None:
    """What one key spends counts for the others, over both proxies; beyond it 429 until midnight UTC."""
    one, other = school.key(), school.key()
    assert ask(one, "purse").status_code == 200
    spent = f"{UPSTREAM_SUMS}{datetime.now(UTC).date().isoformat()}:purse"
    eventually(lambda: int(school.db.hget(spent, "total") or 0), what="the cost in the ledger")
    assert school.db.hget(spent, one.id) == school.db.hget(spent, "total")
    refused = ask(school.at_two(other), "purse")
    assert code(refused) == (429, "insufficient_quota")
    assert "0.5 USD per day" in refused.json()["error"]["message"]
    assert 0 < int(refused.headers["retry-after"]) <= 86400


def test_the_last_quarter_of_a_days_money_is_for_keys_within_their_share(school: School) -> None:
    """Of 100 USD 80 are spent, by one key: it is refused, a key that spent 2 is not."""
    greedy, modest = school.key(), school.key()
    spent = f"{UPSTREAM_SUMS}{datetime.now(UTC).date().isoformat()}:shared-purse"
    usd = {"total": 82, greedy.id: 80, modest.id: 2}
    school.db.hset(spent, mapping={name: amount * 10**12 for name, amount in usd.items()})
    refused = ask(greedy, "shared-purse")
    assert code(refused) == (429, "insufficient_quota")
    assert "its share" in refused.json()["error"]["message"]
    assert ask(modest, "shared-purse").status_code == 200


async def test_whenever_a_caller_leaves_what_a_call_may_cost_is_released(school: School, tmp_path: Path) -> None:
    """Cancelled at each turn of the event loop, from the claim to the end: nothing stays held."""
    cap = Cap(rpm=10**6, tpm=10**6, day=10**12)
    upstream = UpstreamConfig("left", "openai", "http://x", None, configured=True, stream_usage=True, cap=cap)
    async with redis_client(school.redis) as client:
        ledger = Ledger(client, Prices(), folder=tmp_path, max_bytes=0)
        made = limits.Limits(client, Prices(), ledger, when_down="open", timeout=GENEROUS_SECONDS)

        async def call() -> None:
            claim = await made.claim_call(LOCAL, upstream, CHAT, "gpt-4o-mini", {"max_tokens": 9}, 40)
            assert claim is not None
            try:
                await asyncio.sleep(0)
            finally:
                claim.count(7)
                claim.count(7)

        turns, over = 0, False
        while not over:
            cancelled = Cancelled(call(), turns)
            await cancelled.run()
            turns, over = turns + 1, cancelled.over
        assert turns > 3
        await made._send_finished()
        assert await client.execute("ZCARD", slots_of("upstream:left")) == 0
        assert await client.execute("HGET", cap_of("left"), "held") == b"0"
        assert made.running == {}
