"""What the cache tells of itself, how it is emptied, and what it keeps beside the freshest answer.

D1, D3 and K1's secret with two proxy processes on one redis; K7, S3 and D2 over HTTP.
"""

from __future__ import annotations

import json
import os
import signal
import stat
import threading
import time
import zlib
from collections.abc import Iterator
from typing import Any

import httpx2
import pytest
import redis
from fixtures_keys import ADMIN_KEY, Holder, School
from fixtures_proxy import CHAT_MODEL, Bench, bench_on, eventually, key_of, new, redis_url, second, state
from lab_proxy.cache.entry import Entry
from lab_proxy.cache.store import Cache


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    """A bench for this file. No answer is cut off by a timeout: the shipped ones are long."""
    with bench_on(tmp_path_factory.mktemp("bench"), short_timeouts=False) as started:
        yield started


@pytest.fixture(scope="module")
def twin(running: Bench, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    """A second proxy with the same secret and the same redis."""
    secret = next(running.proxy.log.parent.glob("cache-secret"))
    with second(running, tmp_path_factory.mktemp("twin"), cache_secret_file=str(secret)) as other:
        yield other


@pytest.fixture(scope="module")
def routed(running: Bench, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    """A second proxy with another secret and a route for each way to keep answers. Tests ask for `bench` too, which
    resets what stands behind both."""
    folder = tmp_path_factory.mktemp("routed")
    routes = folder / "routes.yaml"
    routes.write_text(
        "upstreams: {model: {kind: model}, openai: {kind: openai}}\n"
        "routes:\n"
        "  - {upstream: openai, match: [gpt-samples], store_sampled: true, samples: 3}\n"
        "  - {upstream: openai, match: [gpt-revalidated], ttl_seconds: 500, stale_while_revalidate_seconds: 600}\n"
        "  - {upstream: openai, match: [gpt-replaced], ttl_seconds: 500, stale_if_error_seconds: 600}\n"
        "  - {upstream: openai, match: ['gpt-*'], ttl_seconds: 500}\n"
    )
    with second(running, folder, routes_file=str(routes), upstream_retries="0") as other:
        yield other


def explain(bench: Bench, **said: Any) -> httpx2.Response:
    return bench.http.post("/cache/explain", json=said)


def flush(bench: Bench, **said: Any) -> httpx2.Response:
    return bench.http.post("/cache/flush", json=said)


# ---- K1


def test_cache_k1_the_secret_is_made_once(bench: Bench, twin: Bench, routed: Bench) -> None:
    """The first process makes it, 0600; one that starts later with the same file has the same keys; another secret is
    another key."""
    text = new()
    found = [state(asked.chat(text, model="gpt-samples")) for asked in (bench, twin, routed)]
    assert found == ["miss stored", "hit", "miss stored"]
    secrets = list(bench.proxy.log.parent.glob("cache-secret*"))
    assert [path.name for path in secrets] == ["cache-secret"]
    assert stat.S_IMODE(secrets[0].stat().st_mode) == 0o600
    assert len(secrets[0].read_bytes()) == 64


# ---- K7


def test_cache_k7_explain_says_key_state_and_why(bench: Bench) -> None:
    """The key under which an answer lies, whether it does, and why it could not; nobody is asked for it."""
    body = {"model": "gpt-mock", "messages": [{"role": "user", "content": new()}], "temperature": 0}
    before = explain(bench, request=body).json()
    assert (before["state"], before["cacheable"], before["why"]) == ("miss", True, None)
    assert bench.calls()["total"] == 0
    bench.post("chat/completions", body)
    hit = bench.post("chat/completions", body)
    after = bench.http.post("/cache/explain", json=body | {"user": "me"}).json()  # a bare chat body
    assert after["key"] == before["key"] == key_of(hit)
    assert after["state"] == "hit"
    assert after["canonical"] == before["canonical"]
    assert "gpt-mock" in after["canonical"]
    sampled = explain(bench, request=body | {"temperature": 1}).json()
    assert (sampled["state"], sampled["cacheable"], sampled["why"]) == ("miss", False, "sampled")
    assert bench.calls()["total"] == 1


def test_cache_k7_explain_says_in_what_requests_differ(bench: Bench) -> None:
    """The paths in which two requests differ, and none for what does not count; a key stands for its request."""
    text = new()
    one = {"model": "gpt-mock", "messages": [{"role": "user", "content": text}], "temperature": 0}
    two = one | {"messages": [{"role": "user", "content": text + " "}], "seed": 1, "user": "me"}
    assert explain(bench, request=one, against=two).json()["differs"] == ["messages[0].content", "seed"]
    assert explain(bench, request=one, against=one | {"temperature": 0.0, "stream": True}).json()["differs"] == []
    longer = one | {"messages": [*two["messages"], *two["messages"]]}
    assert explain(bench, request=two, against=longer).json()["differs"] == ["messages[1]", "seed"]
    other = explain(bench, request=one, against=one | {"model": CHAT_MODEL}).json()["differs"]
    assert {"upstream", "model", "revision"} <= set(other)
    bench.post("chat/completions", one)
    key = key_of(bench.post("chat/completions", one))
    assert explain(bench, request=two, against=key).json()["differs"] == ["messages[0].content", "seed"]
    assert explain(bench, request=one, against=key).json()["differs"] == []
    unknown = explain(bench, request=one, against="0" * 64)
    assert (unknown.status_code, unknown.json()["error"]["code"]) == (404, "cache_key_not_found")


def test_cache_k7_explain_embeddings(bench: Bench) -> None:
    """One key for each different input."""
    words = [new(), new()]
    body = {"model": bench_model(bench), "input": words}
    assert explain(bench, endpoint="/v1/embeddings", request=body).json()["state"] == "miss"
    bench.embed(words)
    said = explain(bench, endpoint="/v1/embeddings", request=body).json()
    assert said["state"] == "hit"
    assert len(said["key"]) == 2
    one = explain(bench, endpoint="/v1/embeddings", request=body | {"input": words[1]}).json()
    assert one["key"] == said["key"][1]
    assert one["state"] == "hit"
    against = explain(bench, endpoint="/v1/embeddings", request=body | {"input": words[0]}, against=one["key"])
    assert against.json()["differs"] == ["input"]


def bench_model(bench: Bench) -> str:
    listed = bench.http.get("/v1/models").json()["data"]
    return str(next(each["id"] for each in listed if each.get("kind") == "embedding"))


@pytest.mark.parametrize(
    "said",
    [
        {},
        {"request": 1},
        {"request": {"model": "gpt-mock"}, "endpoint": "/v1/nothing"},
        {"request": {"model": "gpt-mock"}, "more": 1},
        {"request": {"model": "gpt-mock"}, "against": 1},
        {"request": {}},
    ],
)
def test_cache_k7_explain_refuses_by_name(bench: Bench, said: dict[str, Any]) -> None:
    answer = explain(bench, **said)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"]


# ---- S3


def test_cache_s3_n_samples_are_filled_then_served_at_random(bench: Bench, routed: Bench) -> None:
    """The first three misses fill three samples; a hit is one of them, and in the end each was."""
    text = new()

    def ask(temperature: int = 1) -> httpx2.Response:
        return routed.chat(text, model="gpt-samples", temperature=temperature)

    assert [state(ask()) for _ in range(3)] == ["miss stored"] * 3
    assert bench.calls()["total"] == 3
    with redis.Redis(port=bench.redis.port) as client:
        key = key_of(ask())
        kept = {slot: client.get(f"lab:entry:{key}{slot}") for slot in ("", ":1", ":2")}
        assert all(kept.values())
        for slot, raw in kept.items():
            assert isinstance(raw, bytes)
            head, form, _ = raw.split(b"\n", 2)
            body = b'{"choices":[{"index":0,"message":{"content":"%s"}}]}' % (slot or "0").encode()
            client.set(f"lab:entry:{key}{slot}", repacked(head, form, body))
    routed.catch_up()
    # Three thirds miss one of three in 40 draws once in 3.7 million runs.
    got = {ask().json()["choices"][0]["message"]["content"] for _ in range(40)}
    assert got == {"0", ":1", ":2"}
    assert bench.calls()["total"] == 3
    assert state(ask(temperature=0)) == "miss stored"  # not sampled: one answer is enough
    assert state(ask(temperature=0)) == "hit"


def repacked(head: bytes, form: bytes, body: bytes) -> bytes:
    """An entry with another answer."""
    said = json.loads(head) | {"crc": zlib.crc32(form + b"\n" + body)}
    return json.dumps(said).encode() + b"\n" + form + b"\n" + body


# ---- D1, D3


def test_cache_d1_a_copy_is_given_out_without_redis(bench: Bench) -> None:
    """Hits of the same bytes cost redis nothing."""
    text = new()
    bench.chat(text)
    bench.chat(text)
    with redis.Redis(port=bench.redis.port) as client:
        before = client.info("commandstats").get("cmdstat_get", {}).get("calls", 0)
        for _ in range(20):
            assert state(bench.chat(text)) == "hit"
        assert client.info("commandstats").get("cmdstat_get", {}).get("calls", 0) - before < 5


async def test_cache_d1_what_is_prepared_from_a_copy_counts(bench: Bench) -> None:
    """Against PROXY_CACHE_NEAR_BYTES: a copy that outgrows it is dropped, and what was prepared with it."""
    cache = Cache(redis_url(bench.redis), b"s" * 32, timeout=60, max_entry_bytes=1000, near_bytes=10_000)
    await cache.start()
    try:
        now, name = time.time(), new()
        assert await cache.write({name: Entry(b"{}", 100, now)}) is None
        copy = cache.get_local(name, "", now)
        assert copy is not None
        cache.resize(name, copy, 1_000)
        assert cache.get_local(name, "", now) is copy
        cache.resize(name, copy, 9_000)
        assert cache.get_local(name, "", now) is None
    finally:
        await cache.stop()


async def test_cache_d1_a_copy_does_not_outlive_the_ttl(bench: Bench) -> None:
    """Asked without redis: a copy is given out until its TTL is over, and with a grace until that is over too."""
    cache = Cache(redis_url(bench.redis), b"s" * 32, timeout=60, max_entry_bytes=1000, near_bytes=1_000_000)
    await cache.start()
    try:
        now, names = time.time(), [new(), new()]
        assert await cache.write({names[0]: Entry(b"{}", 100, now), names[1]: Entry(b"{}", 100, now, grace=50)}) is None
        for name, last in zip(names, (100, 150), strict=True):
            assert cache.get_local(name, "", now + last - 0.1) is not None
            assert cache.get_local(name, "", now + last) is None
    finally:
        await cache.stop()


@pytest.mark.parametrize("how", ["deleted", "replaced"])
def test_cache_d1_a_deleted_or_replaced_entry_reaches_every_process(bench: Bench, twin: Bench, how: str) -> None:
    """Whoever deletes or replaces it: each process drops its copy as soon as redis tells of it."""
    text = new()
    bench.chat(text)
    old = bench.chat(text)
    assert state(old) == state(twin.chat(text)) == state(twin.chat(text)) == "hit"
    if how == "deleted":
        with redis.Redis(port=bench.redis.port) as client:
            client.delete(f"lab:entry:{key_of(old)}")
        for each in (bench, twin):
            each.catch_up()
            assert explain_state(each, text) == "miss"
    else:
        bench.age(key_of(old), 1000)
        twin.catch_up()
        for each in (bench, twin):
            assert int(each.chat(text).headers["age"]) >= 1000
        assert state(bench.chat(text, headers={"cache-control": "no-cache"})) == "request stored"
        twin.catch_up()
        for each in (bench, twin):
            assert int(each.chat(text).headers["age"]) < 1000


def explain_state(bench: Bench, text: str) -> str:
    body = {"model": "gpt-mock", "messages": [{"role": "user", "content": text}], "temperature": 0}
    return str(explain(bench, request=body).json()["state"])


def test_cache_d3_flush_reaches_every_process(bench: Bench, twin: Bench) -> None:
    """By tenant or by model: here at once, in the other process soon; nothing else is lost."""
    text = new()
    for model in ("gpt-mock", "gpt-other"):
        bench.chat(text, model=model)
        assert state(twin.chat(text, model=model)) == "hit"
        assert state(twin.chat(text, model=model)) == "hit"
    assert flush(bench, model="gpt-other").json() == {"flushed": {"tenant": "local", "model": "gpt-other"}}
    assert explain_state(bench, text) == "hit"
    eventually(lambda: only_cached(twin, text, "gpt-other") == 504)
    assert only_cached(bench, text, "gpt-other") == 504
    assert only_cached(twin, text, "gpt-mock") == 200
    assert flush(bench).status_code == 200
    assert only_cached(bench, text, "gpt-mock") == 504
    eventually(lambda: only_cached(twin, text, "gpt-mock") == 504)
    assert state(twin.chat(text)) == "miss stored"
    assert state(bench.chat(text)) == "hit"


def only_cached(bench: Bench, text: str, model: str) -> int:
    return bench.chat(text, model=model, headers={"cache-control": "only-if-cached"}).status_code


def test_cache_d3_without_the_admin_key_only_the_own_tenant(bench: Bench) -> None:
    for said in ({"all": True}, {"tenant": "somebody"}):
        answer = flush(bench, **said)
        assert (answer.status_code, answer.json()["error"]["code"]) == (403, "flush_not_allowed")
    assert flush(bench, everything=True).status_code == 400


@pytest.mark.parametrize("stream", [False, True])
def test_cache_d3_a_write_under_way_does_not_come_back(bench: Bench, stream: bool) -> None:
    """The answer of a request that began before the flush is not given out after it."""
    text, answers = new(), []
    bench.control(bench.paid, **{"held" if stream else "closed": True})  # the answer waits, in its middle or before it
    asking = threading.Thread(target=lambda: answers.append(bench.chat(text, stream=stream)))
    asking.start()
    eventually(lambda: bench.calls()["total"] == 1)
    assert flush(bench).status_code == 200
    bench.control(bench.paid, closed=False, held=False)
    asking.join()
    assert [answer.status_code for answer in answers] == [200]
    assert only_cached(bench, text, "gpt-mock") == 504


def test_cache_d1_cut_off_while_a_flush_happens(bench: Bench, twin: Bench) -> None:
    """A process whose line to redis was stopped meanwhile gives out nothing of before: not cut off, not after."""
    text = new()
    twin.chat(text)
    assert state(twin.chat(text)) == "hit"
    with redis.Redis(port=bench.redis.port) as client:
        os.kill(twin.proxy.popen.pid, signal.SIGSTOP)  # it hears nothing
        client.hset("lab:epoch", "", new())
        client.client_kill_filter(_type="normal", skipme=True)  # nor will it
        os.kill(twin.proxy.popen.pid, signal.SIGCONT)
        assert state(twin.chat(text)) != "hit"
    for each in (twin, bench):
        eventually(lambda each=each: state(each.chat(text)) == "hit", what="redis is found again")


def test_cache_d3_flush_says_when_redis_does_not_take_it(bench: Bench) -> None:
    """No flush is lost in silence."""
    with redis.Redis(port=bench.redis.port) as client:
        try:
            client.config_set("maxmemory-policy", "noeviction")
            client.config_set("maxmemory", "1")
            answer = flush(bench)
        finally:
            client.config_set("maxmemory", "0")
            client.config_set("maxmemory-policy", "volatile-lru")
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "cache_unavailable")
    assert flush(bench).status_code == 200


# ---- with virtual keys


@pytest.fixture(scope="module")
def school(running: Bench, tmp_path_factory: pytest.TempPathFactory) -> Iterator[School]:
    """One proxy that asks for keys, before the redis and the upstreams of the others."""
    folder = tmp_path_factory.mktemp("school")
    with second(running, folder, admin_key=ADMIN_KEY) as keyed, redis.Redis(port=running.redis.port) as db:
        yield School(keyed, keyed, running.redis, folder, db)


def asked_at(holder: Holder, page: str, **said: Any) -> httpx2.Response:
    return holder.bench.http.post(f"/cache/{page}", json=said, headers=holder.headers)


def test_cache_d3_a_key_flushes_its_tenant_the_admin_any(school: School) -> None:
    """One's own, never another's; the admin one tenant's, or all."""
    ann, bob, text = school.key(), school.key(), new()
    for holder in (ann, bob):
        assert [state(holder.chat(text)) for _ in range(3)] == ["miss stored", "hit", "hit"]
    tenant = asked_at(ann, "flush").json()["flushed"]["tenant"]
    assert state(ann.chat(text)) == "miss stored"
    assert state(bob.chat(text)) == "hit"
    for said in ({"tenant": "local"}, {"all": True}):
        assert asked_at(bob, "flush", **said).status_code == 403
    assert school.one.http.post("/cache/flush", json={"all": True}).status_code == 401
    admin = {"authorization": f"Bearer {ADMIN_KEY}"}
    assert school.one.http.post("/cache/flush", json={}, headers=admin).status_code == 400
    assert school.one.http.post("/cache/flush", json={"tenant": tenant}, headers=admin).status_code == 200
    assert state(ann.chat(text)) == "miss stored"
    assert state(bob.chat(text)) == "hit"
    assert school.one.http.post("/cache/flush", json={"all": True}, headers=admin).status_code == 200
    assert [state(holder.chat(text)) for holder in (ann, bob)] == ["miss stored", "miss stored"]


def test_cache_k7_explain_knows_no_other_tenant(school: School) -> None:
    """The same request has another key for another tenant, and a tenant's key is unknown to the others."""
    ann, bob, text = school.key(), school.key(), new()
    body = {"model": "gpt-mock", "messages": [{"role": "user", "content": text}], "temperature": 0}
    ann.chat(text)
    mine = asked_at(ann, "explain", request=body).json()
    other = asked_at(bob, "explain", request=body).json()
    assert (mine["state"], other["state"]) == ("hit", "miss")
    assert mine["key"] != other["key"]
    assert asked_at(ann, "explain", request=body, against=mine["key"]).json()["differs"] == []
    assert asked_at(bob, "explain", request=body, against=mine["key"]).status_code == 404
    limited = school.key(models=["gpt-other"])
    assert asked_at(limited, "explain", request=body).status_code == 403


def test_cache_t2_limits_count_before_a_local_copy(school: School) -> None:
    """A process's own copy is given out by the verdict of redis only: the third request of two a minute is refused."""
    ann, text = school.key(rpm=2), new()
    assert [ann.chat(text).status_code for _ in range(3)] == [200, 200, 429]
    bob = school.key(models=["gpt-mock"])
    assert [state(bob.chat(text)) for _ in range(3)] == ["miss stored", "hit", "hit"]
    assert school.admin("PATCH", f"keys/{bob.id}", json={"models": ["gpt-other"]}).status_code == 200
    eventually(lambda: bob.chat(text).status_code == 403)
    assert school.admin("DELETE", f"keys/{bob.id}").status_code < 300
    eventually(lambda: bob.chat(text).status_code == 401)


# ---- D2


def test_cache_d2_stale_while_revalidate(bench: Bench, routed: Bench) -> None:
    """After the TTL the old answer at once, and says so; a new one is fetched once, behind it."""
    text = new()

    def ask(**headers: str) -> httpx2.Response:
        return routed.chat(text, model="gpt-revalidated", headers=headers)

    ask()
    hit = ask()
    assert state(hit) == "hit"
    routed.age(key_of(hit), 550)
    bench.control(bench.paid, closed=True)  # the upstream answers nobody for now
    for _ in range(3):
        stale = ask()
        assert (state(stale), stale.json()["choices"]) == ("hit", hit.json()["choices"])
        assert ttl_of(stale) <= -50
    eventually(lambda: bench.calls()["total"] == 2)
    assert state(ask()) == "hit"
    assert bench.calls()["total"] == 2, "one refresh for all who ask meanwhile"
    bench.control(bench.paid, closed=False)
    eventually(lambda: ttl_of(ask()) > 0, what="the answer is fresh again")
    routed.age(key_of(hit), 550)
    assert state(ask(**{"cache-control": "max-age=0"})) == "miss stored"


def ttl_of(hit: httpx2.Response) -> int:
    return int(hit.headers["cache-status"].partition("ttl=")[2].partition(";")[0])


def test_cache_d2_stale_if_error(bench: Bench, routed: Bench) -> None:
    """Where the upstream fails the old answer stands in and names the status; without the setting the error stands."""
    answers = []
    for model in ("gpt-replaced", "gpt-mock"):
        text = new()
        routed.chat(text, model=model)
        routed.age(key_of(routed.chat(text, model=model)), 550)
        bench.control(bench.paid, script=[503])
        answers.append(routed.chat(text, model=model))
    assert [answer.status_code for answer in answers] == [200, 503]
    assert answers[0].headers["cache-status"].startswith("llm-lab; fwd=stale; fwd-status=503")
    bench.control(bench.paid, script=[503])
    assert routed.chat(new(), model="gpt-replaced").status_code == 503
