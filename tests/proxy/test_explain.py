"""What the cache tells of itself, how it is emptied, and what it keeps beside the freshest answer.

D1 and D3 with two proxy processes on one redis; K7, S3 and D2 over HTTP.
"""

from __future__ import annotations

import json
import os
import signal
import threading
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
import redis
from fixtures_keys import ADMIN_KEY, Holder, School, school_on
from fixtures_proxy import CHAT_MODEL, Bench, eventually, new, redis_url, second, state
from processes import redis_server


@pytest.fixture(scope="module")
def twin(running: Bench, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    """A second proxy with the same secret and the same redis."""
    secret = next(running.proxy.log.parent.glob("cache-secret"))
    with second(running, tmp_path_factory.mktemp("twin"), cache_secret_file=str(secret)) as other:
        yield other


def explain(bench: Bench, **said: Any) -> httpx2.Response:
    return bench.http.post("/cache/explain", json=said)


def flush(bench: Bench, **said: Any) -> httpx2.Response:
    return bench.http.post("/cache/flush", json=said)


def key_of(answer: httpx2.Response) -> str:
    return answer.headers["cache-status"].partition('key="')[2].rstrip('"')


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


def sampling(tmp_path: Path, **terms: Any) -> str:
    """A routes file whose one route stores samples on these terms."""
    routes = tmp_path / "routes.yaml"
    said = ", ".join(f"{name}: {value}" for name, value in terms.items())
    routes.write_text(
        "upstreams: {model: {kind: model}, openai: {kind: openai}}\n"
        f"routes:\n  - {{upstream: openai, match: ['gpt-*'], {said}}}\n"
    )
    return str(routes)


def test_cache_s3_n_samples_are_filled_then_served_at_random(bench: Bench, tmp_path: Path) -> None:
    """The first three misses fill three samples; a hit is one of them, and in the end each was."""
    terms = sampling(tmp_path, store_sampled="true", samples=3)
    with second(bench, tmp_path, routes_file=terms) as other:
        text = new()
        assert [state(other.chat(text, temperature=1)) for _ in range(3)] == ["miss stored"] * 3
        assert bench.calls()["total"] == 3
        with redis.Redis(port=bench.redis.port) as client:
            key = key_of(other.chat(text, temperature=1))
            kept = {slot: client.get(f"lab:entry:{key}{slot}") for slot in ("", ":1", ":2")}
            assert all(kept.values())
            for slot, raw in kept.items():
                assert isinstance(raw, bytes)
                head, form, _ = raw.split(b"\n", 2)
                body = b'{"choices":[{"index":0,"message":{"content":"%s"}}]}' % (slot or "0").encode()
                client.set(f"lab:entry:{key}{slot}", repacked(head, form, body))
        time.sleep(0.2)
        got = {other.chat(text, temperature=1).json()["choices"][0]["message"]["content"] for _ in range(40)}
        assert got == {"0", ":1", ":2"}
        assert bench.calls()["total"] == 3
        assert state(other.chat(text, temperature=0)) == "miss stored"  # not sampled: one answer is enough
        assert state(other.chat(text, temperature=0)) == "hit"


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


def test_cache_d1_a_copy_does_not_outlive_the_ttl(bench: Bench, tmp_path: Path) -> None:
    with second(bench, tmp_path, cache_ttl_seconds="1") as other:
        text = new()
        other.chat(text)
        assert state(other.chat(text)) == "hit"
        time.sleep(1.1)
        assert state(other.chat(text)) == "miss stored"


@pytest.mark.parametrize("how", ["deleted", "replaced"])
def test_cache_d1_a_deleted_or_replaced_entry_reaches_every_worker(bench: Bench, twin: Bench, how: str) -> None:
    """Whoever deletes or replaces it: each worker's copy is gone within 1 s."""
    text = new()
    bench.chat(text)
    old = bench.chat(text)
    assert state(old) == state(twin.chat(text)) == state(twin.chat(text)) == "hit"
    if how == "deleted":
        with redis.Redis(port=bench.redis.port) as client:
            client.delete(f"lab:entry:{key_of(old)}")
        eventually(lambda: explain_state(twin, text) == "miss", 1)
    else:
        time.sleep(1.1)
        assert state(bench.chat(text, headers={"cache-control": "no-cache"})) == "request stored"
        eventually(lambda: twin.chat(text).headers["age"] == "0", 1)


def explain_state(bench: Bench, text: str) -> str:
    body = {"model": "gpt-mock", "messages": [{"role": "user", "content": text}], "temperature": 0}
    return str(explain(bench, request=body).json()["state"])


def test_cache_d3_flush_reaches_every_worker(bench: Bench, twin: Bench) -> None:
    """By tenant or by model: here at once, in the other process within 1 s; nothing else is lost."""
    text = new()
    for model in ("gpt-mock", "gpt-other"):
        bench.chat(text, model=model)
        assert state(twin.chat(text, model=model)) == "hit"
        assert state(twin.chat(text, model=model)) == "hit"
    assert flush(bench, model="gpt-other").json() == {"flushed": {"tenant": "local", "model": "gpt-other"}}
    assert explain_state(bench, text) == "hit"
    eventually(lambda: only_cached(twin, text, "gpt-other") == 504, 1)
    assert only_cached(bench, text, "gpt-other") == 504
    assert only_cached(twin, text, "gpt-mock") == 200
    assert flush(bench).status_code == 200
    assert only_cached(bench, text, "gpt-mock") == 504
    eventually(lambda: only_cached(twin, text, "gpt-mock") == 504, 1)
    assert state(twin.chat(text)) == "miss stored"
    assert state(bench.chat(text)) == "hit"


def only_cached(bench: Bench, text: str, model: str) -> int:
    return bench.chat(text, model=model, headers={"cache-control": "only-if-cached"}).status_code


def test_cache_d3_without_the_admin_key_only_the_own_tenant(bench: Bench) -> None:
    for said in ({"all": True}, {"tenant": "somebody"}):
        answer = flush(bench, **said)
        assert (answer.status_code, answer.json()["error"]["code"]) == (403, "flush_not_allowed")
    assert flush(bench, everything=True).status_code == 400


def test_cache_d3_a_write_under_way_does_not_come_back(bench: Bench) -> None:
    """The answer of a request that began before the flush is not given out after it."""
    text = new()
    asking = threading.Thread(target=lambda: bench.chat(text, model="gpt-mock-slow", stream=True))
    asking.start()
    eventually(lambda: bench.calls()["total"] == 1, 10)
    assert flush(bench).status_code == 200
    asking.join()
    assert only_cached(bench, text, "gpt-mock-slow") == 504


def test_cache_d1_cut_off_while_a_flush_happens(bench: Bench, tmp_path: Path) -> None:
    """A worker whose line to redis was stopped meanwhile gives out nothing of before: not cut off, not after."""
    with redis_server(tmp_path) as server, second(bench, tmp_path, redis=redis_url(server)) as other:
        text = new()
        other.chat(text)
        assert state(other.chat(text)) == "hit"
        with redis.Redis(port=server.port) as client:
            os.kill(other.proxy.popen.pid, signal.SIGSTOP)  # it hears nothing
            client.hset("lab:epoch", "", "another")
            client.client_kill_filter(_type="normal", skipme=True)  # nor will it
            os.kill(other.proxy.popen.pid, signal.SIGCONT)
            assert state(other.chat(text)) != "hit"
        eventually(lambda: state(other.chat(text)) == "hit", 5)


def test_cache_d3_flush_says_when_redis_does_not_take_it(bench: Bench, tmp_path: Path) -> None:
    """No flush is lost in silence."""
    with redis_server(tmp_path) as server, second(bench, tmp_path, redis=redis_url(server)) as other:
        with redis.Redis(port=server.port) as client:
            client.config_set("maxmemory-policy", "noeviction")
            client.config_set("maxmemory", "1")
            answer = flush(other)
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "cache_unavailable")


# ---- with virtual keys


@pytest.fixture(scope="module")
def school(tmp_path_factory: pytest.TempPathFactory) -> Iterator[School]:
    with school_on(tmp_path_factory.mktemp("school")) as started:
        yield started


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
    assert school.two.http.post("/cache/flush", json={}, headers=admin).status_code == 400
    assert school.two.http.post("/cache/flush", json={"tenant": tenant}, headers=admin).status_code == 200
    eventually(lambda: state(ann.chat(text, headers={"cache-control": "max-age=9"})) == "miss stored", 1)
    assert state(bob.chat(text)) == "hit"
    assert school.two.http.post("/cache/flush", json={"all": True}, headers=admin).status_code == 200
    eventually(lambda: state(bob.chat(text)) == "miss stored", 1)


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


def test_cache_t2_limits_count_before_a_copy_in_the_worker(school: School) -> None:
    """A worker's own copy is given out by the verdict of redis only: the third request of two a minute is refused."""
    ann, text = school.key(rpm=2), new()
    assert [ann.chat(text).status_code for _ in range(3)] == [200, 200, 429]
    bob = school.key(models=["gpt-mock"])
    assert [state(bob.chat(text)) for _ in range(3)] == ["miss stored", "hit", "hit"]
    assert school.admin("PATCH", f"keys/{bob.id}", json={"models": ["gpt-other"]}).status_code == 200
    eventually(lambda: bob.chat(text).status_code == 403, 1)
    assert school.admin("DELETE", f"keys/{bob.id}").status_code < 300
    eventually(lambda: bob.chat(text).status_code == 401, 1)


# ---- D2


def test_cache_d2_stale_while_revalidate(bench: Bench, tmp_path: Path) -> None:
    """After the TTL the old answer at once, and says so; a new one is fetched once, behind it."""
    terms = sampling(tmp_path, ttl_seconds=1, stale_while_revalidate_seconds=60)
    with second(bench, tmp_path, routes_file=terms) as other:
        text = new()
        other.chat(text)
        assert state(other.chat(text)) == "hit"
        time.sleep(1.3)
        stale = other.chat(text)
        assert state(stale) == "hit"
        assert int(stale.headers["cache-status"].partition("ttl=")[2].partition(";")[0]) <= 0
        eventually(lambda: bench.calls()["total"] == 2, 10)
        eventually(lambda: "ttl=1;" in other.chat(text).headers["cache-status"], 2)
        time.sleep(1.3)
        assert state(other.chat(text, headers={"cache-control": "max-age=0"})) == "miss stored"


def test_cache_d2_stale_if_error(bench: Bench, tmp_path: Path) -> None:
    """Where the upstream fails the old answer stands in and names the status; without the setting the error stands."""
    terms = sampling(tmp_path, ttl_seconds=1, stale_if_error_seconds=60)
    with second(bench, tmp_path, routes_file=terms, upstream_retries="0") as other:
        text = new()
        other.chat(text)
        time.sleep(1.2)
        bench.control(bench.paid, script=[503] * 4)
        answer = other.chat(text)
        assert answer.status_code == 200
        assert answer.headers["cache-status"].startswith("llm-lab; fwd=stale; fwd-status=503")
        bench.control(bench.paid, script=[503] * 4)
        assert other.chat(new()).status_code == 503


# ---- X


def test_cache_x1_something_else_listens(bench: Bench, tmp_path: Path) -> None:
    """A port where something other than redis answers: no request fails."""
    with second(bench, tmp_path, redis=f"redis://127.0.0.1:{bench.paid.port}/0") as other:
        assert state(other.chat()) == "bypass redis"
