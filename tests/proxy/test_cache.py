"""The response cache's promises, against a real proxy process, a real redis and upstreams that do as they are told.

K1 to K4's forms are in test_canonical.py; here is what they mean over HTTP.
"""

from __future__ import annotations

import asyncio
import os
import re
import signal
import socketserver
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hiredis
import httpx2
import openai
import pytest
import redis
from fixtures_proxy import CHAT_MODEL, EMBEDDING_MODEL, Bench, bench_on, events, eventually, key_of, new, second, state
from lab_proxy.cache import entry
from lab_proxy.cache.key import CONTRACT
from lab_proxy.cache.store import BATCH, Cache
from openai.lib.streaming.chat import ChatCompletionStreamState
from processes import Process, eventually_async, free_port, redis_server

FRESH = {"id", "created"}


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    """A bench for this file. No answer is cut off by a timeout: the shipped ones are long."""
    with bench_on(tmp_path_factory.mktemp("bench"), short_timeouts=False) as started:
        yield started


@pytest.fixture(scope="module")
def tuned(running: Bench, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    """A second proxy with another secret: TTLs by route, a limit on size, a short idle timeout, and a poll so slow that
    it learns of a model's revision by answers alone. Tests ask for `bench` too, which resets what stands behind both.
    """
    folder = tmp_path_factory.mktemp("tuned")
    routes = folder / "routes.yaml"
    routes.write_text(
        "upstreams: {model: {kind: model}, openai: {kind: openai}}\n"
        "routes:\n"
        "  - {upstream: openai, match: [gpt-mock], ttl_seconds: 500, store_sampled: true}\n"
        "  - {upstream: openai, match: ['gpt-*']}\n"
        "  - {upstream: model, match: ['*']}\n"
    )
    settings = {
        "routes_file": str(routes),
        "cache_ttl_seconds": "77",
        "cache_max_entry_bytes": "900",
        "idle_timeout_seconds": "0.3",
        "model_poll_seconds": "60",
    }
    with second(running, folder, **settings) as other:
        yield other


def is_cached(bench: Bench, text: str, **more: Any) -> bool:
    """Whether the answer to `Bench.chat(text)` lies in the cache. Asks no upstream."""
    body = {"model": "gpt-mock", "messages": [{"role": "user", "content": text}], "temperature": 0} | more
    found = bench.http.post("/cache/explain", json=body).json()["state"]
    assert found in {"hit", "miss"}, found
    return bool(found == "hit")


def added_up(answer: httpx2.Response) -> dict[str, Any]:
    """What the openai client makes of a chat stream, without what every answer has of its own."""
    adder: ChatCompletionStreamState[None] = ChatCompletionStreamState()
    got = events(answer)
    assert got[-1] == "[DONE]"
    for chunk in got[:-1]:
        adder.handle_chunk(openai.types.chat.ChatCompletionChunk.model_validate(chunk))
    return plain(adder.current_completion_snapshot.model_dump())


def plain(answer: dict[str, Any]) -> dict[str, Any]:
    """An answer as data: without id and created, without nulls and the parsed copies that the client adds."""

    def bare(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: bare(v) for k, v in value.items() if v is not None and k not in {"parsed", "parsed_arguments"}}
        return [bare(item) for item in value] if isinstance(value, list) else value

    kept = bare({k: v for k, v in answer.items() if k not in FRESH})
    for choice in kept["choices"]:
        for call in choice.get("message", {}).get("tool_calls", []):
            call.pop("index", None)
    return kept


# ---- K: what makes two requests the same


def test_cache_k1_spelling_does_not_matter(bench: Bench) -> None:
    """Key order, white space, escapes and number spelling hit the same entry; a trailing space does not."""
    text = new()

    def ask(raw: str) -> str:
        sent = raw.replace("TEXT", text).encode()
        return state(
            bench.http.post("/v1/chat/completions", content=sent, headers={"content-type": "application/json"})
        )

    ask('{"model": "gpt-mock", "temperature": 0, "seed": 7, "messages": [{"role": "user", "content": "TEXT é"}]}')
    again = '{"messages":[{"content":"TEXT \\u00e9","role":"user"}],"seed":7e0,\n"temperature":0.0,"model":"gpt-mock"}'
    assert ask(again) == "hit"
    assert ask(again.replace("\\u00e9", "\\u00e9 ")) == "miss stored"
    assert ask(again.replace("7e0", "9007199254740992")) == "miss stored"
    assert ask(again.replace("7e0", "9007199254740993")) == "miss stored"
    assert bench.calls()["total"] == 4


def test_cache_k2_unknown_fields_are_in_the_key(bench: Bench) -> None:
    """A field nobody knows reaches the upstream and makes another request; `user` and the like do not."""
    text = new()
    assert state(bench.chat(text)) == "miss stored"
    assert state(bench.chat(text, a_new_field=1)) == "miss stored"
    assert bench.calls()["last"]["body"]["a_new_field"] == 1
    same: dict[str, Any] = {"prompt_cache_retention": "24h"}
    same |= {"user": "me", "metadata": {"a": "b"}, "safety_identifier": "x", "prompt_cache_key": "y", "store": False}
    for name, value in same.items():
        assert state(bench.chat(text, **{name: value})) == "hit", name
    assert state(bench.chat(text, stream=True)) == "hit"


def test_cache_k3_defaults_are_left_out_where_they_are_known(bench: Bench) -> None:
    """The model service's defaults are documented: setting them is the same request. Another upstream's are not."""
    text, default = new(), {"n": 1, "top_p": 1.0, "presence_penalty": 0, "logprobs": False, "seed": None}
    assert state(bench.chat(text, model=CHAT_MODEL)) == "miss stored"
    assert state(bench.chat(text, model=CHAT_MODEL, **default)) == "hit"
    assert state(bench.chat(text, model=CHAT_MODEL, top_p=0.9)) == "miss stored"
    assert state(bench.chat(text)) == "miss stored"
    assert state(bench.chat(text, seed=None)) == "hit"
    assert state(bench.chat(text, top_p=1)) == "miss stored"


def test_cache_k4_ambiguous_bodies_are_refused_before_anything_is_asked(bench: Bench) -> None:
    for raw in (
        b'{"model":"gpt-mock","model":"gpt-mock"}',
        b'{"x":NaN}',
        b'{"x":"\\ud800"}',
        b"\xff",
        b"[]",
        b"[" * 9999,
    ):
        answer = bench.http.post("/v1/chat/completions", content=raw, headers={"content-type": "application/json"})
        assert answer.status_code == 400, raw
        assert answer.json()["error"]["type"] == "invalid_request_error"
    assert bench.chat("x" * 100_001).status_code == 413
    assert bench.calls()["total"] == 0


def test_cache_k5_a_redeploy_is_a_miss(bench: Bench) -> None:
    """Another revision behind the same name is another request, known by the poll before anybody asks."""
    text = new()
    assert state(bench.chat(text, model=CHAT_MODEL)) == "miss stored"
    assert state(bench.chat(text, model=CHAT_MODEL)) == "hit"
    bench.control(revision="r2")
    eventually(lambda: not is_cached(bench, text, model=CHAT_MODEL), what="the poll tells of r2")
    answer = bench.chat(text, model=CHAT_MODEL)
    assert (state(answer), answer.headers["x-model-revision"]) == ("miss stored", "r2")
    bench.control(revision="r1")
    bench.chat(model=CHAT_MODEL)  # its answer tells of r1
    hit = bench.chat(text, model=CHAT_MODEL)
    assert (state(hit), hit.json()["system_fingerprint"]) == ("hit", "r1")


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_names_the_replica_that_computed_it_and_a_hit_none(bench: Bench, stream: bool) -> None:
    text = new()
    miss, hit = (bench.chat(text, model=CHAT_MODEL, stream=stream) for _ in range(2))
    assert (state(miss), miss.headers["x-model-replica"]) == ("miss" if stream else "miss stored", "0a1b2c3d")
    assert (state(hit), hit.headers.get("x-model-replica")) == ("hit", None)


def test_cache_k5_stored_under_the_revision_of_the_answer(bench: Bench, tuned: Bench) -> None:
    """A redeploy between the key and the answer: the answer is stored under what made it, and the proxy has learned."""
    text = new()
    tuned.chat(model=CHAT_MODEL)  # its answer tells of r1
    bench.control(revision="r7")
    assert state(tuned.chat(text, model=CHAT_MODEL)) == "miss stored"
    answer = tuned.chat(text, model=CHAT_MODEL)
    assert (state(answer), answer.json()["system_fingerprint"]) == ("hit", "r7")
    bench.control(revision="r1")
    tuned.chat(model=CHAT_MODEL)
    assert state(tuned.chat(text, model=CHAT_MODEL)) == "miss stored"


def test_cache_k5_vectors_of_two_revisions_are_never_mixed(bench: Bench, tuned: Bench) -> None:
    """One input is cached under r1, the other answered by r5: all are asked for again."""
    one, two = new(), new()
    tuned.embed([new()])  # its answer tells of r1
    tuned.embed([one])
    bench.control(revision="r5")
    before = bench.calls(bench.model)["calls"]["embeddings"]
    answer = tuned.embed([one, two])
    assert [row["embedding"][2] for row in answer.json()["data"]] == [5.0, 5.0]
    assert bench.calls(bench.model)["calls"]["embeddings"] == before + 2


# ---- S: what is stored


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("mode", ["empty", "filter", "cut", "bad-args"])
def test_cache_s1_only_whole_answers(bench: Bench, mode: str, stream: bool) -> None:
    """An empty, filtered or cut-off answer and a broken tool call are passed on and asked for again."""
    text = new()
    for _ in range(2):
        answer = bench.chat(text, model=f"gpt-mock-{mode}", stream=stream)
        assert answer.status_code == 200
        assert "stored" not in answer.headers["cache-status"]
    assert bench.calls()["total"] == 2


@pytest.mark.parametrize("mode", ["html", "500", "429", "array", "html-500"])
def test_cache_s1_errors_are_not_stored(bench: Bench, mode: str) -> None:
    text = new()
    for _ in range(2):
        assert bench.chat(text, model=f"gpt-mock-{mode}").status_code >= 400
    assert bench.calls()["total"] == 2


def test_cache_s1_length_is_whole_where_the_caller_set_it(bench: Bench) -> None:
    text = new()
    answer = bench.chat(text, max_tokens=2)
    assert answer.json()["choices"][0]["finish_reason"] == "length"
    assert state(bench.chat(text, max_tokens=2)) == "hit"
    assert state(bench.chat(text, max_tokens=3)) == "miss stored"


def test_cache_s1_completions_and_tool_calls(bench: Bench) -> None:
    body = {"model": "gpt-mock", "prompt": new(), "temperature": 0}
    assert state(bench.post("completions", body)) == "miss stored"
    assert state(bench.post("completions", body)) == "hit"
    text = new()
    assert state(bench.chat(text, model="gpt-mock-tools")) == "miss stored"
    assert state(bench.chat(text, model="gpt-mock-tools")) == "hit"


def test_cache_s1_embeddings_per_input(bench: Bench) -> None:
    """Only inputs that are not cached go upstream, each once; order and duplicates stay, the usage is the sum."""
    a, b, c = (f"{new()} {extra}" for extra in ("", "two", "two three"))
    first = bench.embed([a, b]).json()
    mixed = bench.embed([c, a, b, c, a])
    assert state(mixed) == "partial stored"
    assert bench.calls(bench.model)["last"]["body"]["input"] == [c]
    vectors = [row["embedding"] for row in mixed.json()["data"]]
    assert vectors[1:3] == [row["embedding"] for row in first["data"]]
    assert (vectors[0], vectors[1]) == (vectors[3], vectors[4])
    assert [row["index"] for row in mixed.json()["data"]] == [0, 1, 2, 3, 4]
    hit = bench.embed([c, a, b, c, a])
    assert state(hit) == "hit"
    assert hit.json() == mixed.json()
    usage = hit.json()["usage"]
    assert usage["prompt_tokens"] == usage["total_tokens"] == sum(usage["per_input_tokens"])
    assert usage["per_input_tokens"] == [len(text.split()) + 1 for text in (c, a, b, c, a)]
    assert state(bench.embed(c)) == "hit"
    assert bench.calls(bench.model)["calls"]["embeddings"] == 2


def test_cache_s1_embeddings_of_token_ids_and_encodings(bench: Bench) -> None:
    ids = [int(new()[-4:], 16), 2, 3]
    whole = bench.embed(ids).json()
    assert len(whole["data"]) == 1
    assert state(bench.embed([ids, [4]])) == "partial stored"
    assert bench.calls(bench.model)["last"]["body"]["input"] == [[4]]
    packed = bench.embed(ids, encoding_format="base64")
    assert state(packed) == "miss stored"
    assert isinstance(packed.json()["data"][0]["embedding"], str)
    assert state(bench.embed(ids, encoding_format="base64")) == "hit"
    assert bench.embed(ids, encoding_format="float").json() == whole


def test_cache_s1_usage_without_counts_per_input(bench: Bench) -> None:
    """An upstream that tells only the sum: it is split by length so that the same batch sums to it exactly."""
    batch = [new(), f"{new()} and a longer one", "x"]
    first = bench.embed(batch, model="text-embedding-mock").json()
    again = bench.embed(batch, model="text-embedding-mock")
    assert state(again) == "hit"
    assert again.json()["usage"] == first["usage"]
    for total in (0, 1, 7, 100):
        for weights in ([1], [1, 1, 1], [5, 0, 3], [0, 0]):
            split = entry.shares(total, weights)
            assert sum(split) == total
            assert all(
                abs(part - total * w / (sum(weights) or 1)) < 1
                for part, w in zip(split, weights, strict=True)
                if sum(weights)
            )


@pytest.mark.parametrize("mode", ["reset", "no-done", "error-event", "unfinished", "stall", "junk"])
def test_cache_s2_a_broken_stream_is_not_stored(bench: Bench, tuned: Bench, mode: str) -> None:
    """Nothing is stored, and the caller gets an error event and no [DONE] (an upstream's own [DONE] apart)."""
    text = new()
    asked = tuned if mode == "stall" else bench  # the idle timeout ends it
    for _ in range(2):
        got = events(asked.chat(text, model=f"gpt-mock-{mode}", stream=True))
        assert (got[-1] == "[DONE]") == (mode == "unfinished")
        if mode != "unfinished":
            assert got[-1]["error"]["message"]
            assert not any(
                choice.get("finish_reason") for chunk in got[:-1] if mode != "no-done" for choice in chunk["choices"]
            )
    assert bench.calls()["total"] == 2


def test_cache_s2_a_caller_who_leaves_stores_nothing(bench: Bench) -> None:
    """And the upstream's work ends, though its stream has no end of its own."""
    body = {"model": "gpt-mock-endless", "messages": [{"role": "user", "content": new()}], "temperature": 0}
    with bench.http.stream("POST", "/v1/chat/completions", json=body | {"stream": True}) as answer:
        next(answer.iter_lines())
    eventually(lambda: bench.calls()["left"] == 1, what="the upstream sees the caller leave")
    assert not is_cached(bench, body["messages"][0]["content"], model="gpt-mock-endless")


def test_cache_s3_sampled_answers_are_kept_only_when_asked(bench: Bench) -> None:
    """Temperature above 0, also by default, and no seed: neither stored nor read, unless the caller says so."""
    text = new()
    assert state(bench.chat(text, temperature=0.7)) == "bypass sampled"
    assert state(bench.chat(text, temperature=None)) == "bypass sampled"
    assert state(bench.chat(text, temperature=None, model=CHAT_MODEL)) == "bypass sampled"
    assert state(bench.chat(text, temperature=0.7, headers={"cache-control": "max-age=100"})) == "bypass sampled"
    assert state(bench.chat(text, temperature=0.7, seed=1)) == "miss stored"
    assert state(bench.chat(text, temperature=0.7, seed=1)) == "hit"
    asked = {"x-cache-sampled": "true"}
    assert state(bench.chat(text, temperature=0.7, headers=asked)) == "miss stored"
    assert state(bench.chat(text, temperature=0.7, headers=asked)) == "hit"
    assert state(bench.chat(text, temperature=0.7)) == "bypass sampled"


def test_cache_s4_what_must_not_be_stored(bench: Bench) -> None:
    text = new()
    for field, detail in (
        ({"store": True}, "store"),
        ({"previous_response_id": "resp_1"}, "previous-response"),
        ({"background": True}, "background"),
    ):
        for _ in range(2):
            assert state(bench.chat(text, **field)) == f"bypass {detail}"
    assert bench.calls()["total"] == 6


def test_cache_s5_request_control(bench: Bench) -> None:
    """no-store, no-cache, max-age and only-if-cached, as HTTP means them."""
    text = new()

    def ask(control: str, **more: Any) -> httpx2.Response:
        return bench.chat(text, headers={"cache-control": control}, **more)

    assert state(ask("no-store")) == "bypass no-store"
    missed = ask("only-if-cached")
    assert (missed.status_code, missed.json()["error"]["code"]) == (504, "not_cached")
    assert bench.calls()["total"] == 1
    assert state(ask("no-cache")) == "request stored"
    assert state(ask("")) == "hit"
    assert state(ask("only-if-cached")) == "hit"
    assert state(ask("no-store")) == "bypass no-store"
    hit = ask("max-age=100")
    assert state(hit) == "hit"
    bench.age(key_of(hit), 2000)
    assert int(ask("max-age=9000").headers["age"]) >= 2000
    assert state(ask("max-age=1000")) == "request stored"
    assert int(ask("", stream=True).headers["age"]) < 1000
    assert state(ask("max-age=nonsense, foo=bar")) == "hit"
    assert bench.calls()["total"] == 4
    given = new()
    bench.embed([given])
    assert bench.embed([given, new()], headers={"cache-control": "only-if-cached"}).status_code == 504
    assert state(bench.embed([given], headers={"cache-control": "no-cache"})) == "request stored"


# ---- R: what comes back


SHAPES: list[dict[str, Any]] = [
    {},
    {"n": 3},
    {"logprobs": True},
    {"model": "gpt-mock-tools", "n": 2},
    {"model": "gpt-mock-reasoning"},
    {"model": "gpt-mock-refusal"},
    {"model": "gpt-mock-crlf"},
    {"max_tokens": 2},
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("first", ["json", "stream"])
def test_cache_r1_one_entry_serves_both_wire_modes(bench: Bench, shape: dict[str, Any], first: str) -> None:
    """Whoever stored it: the JSON, and what the openai client adds up from the replay, equal the original, deeply."""
    text = new()
    counted = {"stream": True, "stream_options": {"include_usage": True}}
    original = bench.chat(text, **shape, headers={"cache-control": "no-store"}).json()
    made = bench.chat(text, **shape, **(counted if first == "stream" else {}))
    assert bench.calls()["total"] == 2
    if first == "stream":
        assert added_up(made) == plain(original) | {"object": "chat.completion"}
    asked_json, asked_stream = bench.chat(text, **shape), bench.chat(text, **shape, **counted)
    assert (state(asked_json), state(asked_stream)) == ("hit", "hit")
    assert plain(asked_json.json()) == plain(original)
    assert added_up(asked_stream) == plain(original)
    assert bench.calls()["total"] == 2


@pytest.mark.parametrize("first", ["json", "stream"])
@pytest.mark.parametrize("logprobs", [None, 1])
def test_cache_r1_text_completions_too(bench: Bench, first: str, logprobs: int | None) -> None:
    body = {"model": "gpt-mock", "prompt": new(), "temperature": 0, "n": 2, "logprobs": logprobs}
    original = bench.post("completions", body, cache_control="no-store").json()
    bench.post("completions", body | {"stream": first == "stream"})
    hit, streamed = bench.post("completions", body), bench.post("completions", body | {"stream": True})
    assert (state(hit), state(streamed)) == ("hit", "hit")
    assert plain(hit.json()) == plain(original)
    texts = ["", ""]
    for chunk in events(streamed)[:-1]:
        for choice in chunk["choices"]:
            texts[choice["index"]] += choice["text"]
    assert texts == [choice["text"] for choice in original["choices"]]


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("first", ["json", "stream"])
def test_cache_r2_usage_only_for_who_asked(bench: Bench, cached: bool, first: str) -> None:
    """The final chunk with the usage and `usage: null` before it, live and replayed; none of it for who did not ask."""
    text = new()
    if cached:
        bench.chat(text, stream=first == "stream")
    asked = events(bench.chat(text, stream=True, stream_options={"include_usage": True}))
    assert asked[-2]["choices"] == []
    assert asked[-2]["usage"]["total_tokens"] > 0
    assert all(chunk["usage"] is None for chunk in asked[:-2])
    text = text if cached else new()
    answer = bench.chat(text, stream=True)
    assert (state(answer) == "hit") == cached
    assert '"usage"' not in answer.text
    assert all(chunk["choices"] for chunk in events(answer)[:-1])
    if not cached:
        assert bench.calls()["last"]["body"]["stream_options"] == {"include_usage": True}


def test_cache_r3_a_hit_is_a_fresh_answer(bench: Bench) -> None:
    """Its own id, created and request id; no cookie and no header of then."""
    text = new()
    first = bench.chat(text)
    one, two = bench.chat(text), bench.chat(text)
    ids = {answer.json()["id"] for answer in (first, one, two)}
    assert len(ids) == 3
    assert len({answer.headers["x-request-id"] for answer in (first, one, two)}) == 3
    assert one.json()["created"] > first.json()["created"]  # the mock's are of 1000 s ago
    assert "openai-processing-ms" in first.headers
    assert "openai-processing-ms" not in one.headers
    assert "set-cookie" not in first.headers
    streamed = {chunk["id"] for chunk in events(bench.chat(text, stream=True))[:-1]}
    assert len(streamed) == 1
    assert not streamed & ids


def test_cache_r4_cache_status(bench: Bench) -> None:
    """`Cache-Status` and `Age` say what happened, and the key of a hit."""
    text = new()
    assert bench.chat(text).headers["cache-status"] == "llm-lab; fwd=miss; stored"
    hit = bench.chat(text)
    name, verdict, ttl, key = hit.headers["cache-status"].split("; ")
    assert (name, verdict) == ("llm-lab", "hit")
    assert int(ttl.removeprefix("ttl=")) + int(hit.headers["age"]) == 86_400
    assert len(key) == len('key=""') + 64
    assert bench.chat(new(), stream=True).headers["cache-status"] == "llm-lab; fwd=miss"
    assert bench.chat(new(), temperature=1).headers["cache-status"] == "llm-lab; fwd=bypass; detail=sampled"
    assert bench.chat(new(), model="gpt-mock-cut").headers["cache-status"] == "llm-lab; fwd=miss; detail=finish-reason"


def test_cache_r5_unknown_stream_options_are_the_upstreams_affair(bench: Bench) -> None:
    """An entry must not hide that the upstream refuses them: neither read nor stored, and they arrive as they came."""
    text = new()
    bench.chat(text)
    odd: list[dict[str, Any]] = [{"bogus": 1}, {"include_usage": True, "bogus": 1}, {"include_usage": 0}]
    for options in odd:
        answer = bench.chat(text, stream=True, stream_options=options)
        assert state(answer) == "bypass stream-options"
        assert bench.calls()["last"]["body"]["stream_options"].items() >= options.items()
    assert bench.calls()["total"] == 4
    assert state(bench.chat(text, stream=True, stream_options={"include_usage": False})) == "hit"


# ---- D: freshness; the rest is about other settings, so other processes


def test_cache_d_ttl_per_route(bench: Bench, tuned: Bench, raw: redis.Redis) -> None:
    """An entry's time is its route's, here and in redis; S3 and S4 by setting: a route that keeps samples, a limit on
    size."""
    text = new()
    assert state(tuned.chat(text, temperature=0.5)) == "miss stored"
    hit = tuned.chat(text, temperature=0.5)
    assert state(hit) == "hit"
    assert ttl_of(hit) + int(hit.headers["age"]) == 500
    assert 0 < raw.ttl(f"lab:entry:{key_of(hit)}") <= 500
    tuned.age(key_of(hit), 400)
    hit = tuned.chat(text, temperature=0.5)
    assert (state(hit), ttl_of(hit) <= 100) == ("hit", True)
    tuned.age(key_of(hit), 100)
    assert state(tuned.chat(text, temperature=0.5)) == "miss stored"
    tuned.chat(text, model="gpt-mock-reasoning")
    hit = tuned.chat(text, model="gpt-mock-reasoning")
    assert ttl_of(hit) + int(hit.headers["age"]) == 77
    long = "long " * 300
    assert state(tuned.chat(long)) == "miss size"
    assert state(tuned.chat(long)) == "miss size"


def ttl_of(hit: httpx2.Response) -> int:
    return int(hit.headers["cache-status"].partition("ttl=")[2].partition(";")[0])


# ---- X: redis is not well


@dataclass
class Unsteady:
    """A proxy, and the port of the redis that it is told of."""

    proxy: Bench
    port: int
    folder: Path

    @contextmanager
    def redis(self) -> Iterator[Process]:
        """A redis at that port, found by the proxy."""
        text = new()
        with redis_server(self.folder, port=self.port) as server:
            eventually(lambda: state(self.proxy.chat(text)) == "hit", what="redis is found")
            yield server

    def asked(self) -> list[str]:
        """How often redis was asked to read and to write."""
        page = self.proxy.http.get("/metrics").text
        return re.findall(r'^lab_proxy_redis_seconds_count\{operation="(?:read|write)"\} .*$', page, re.M)


@pytest.fixture(scope="module")
def unsteady(running: Bench, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Unsteady]:
    """Nothing listens at its redis's port but what a test starts there."""
    folder, port = tmp_path_factory.mktemp("unsteady"), free_port()
    with second(running, folder, redis=f"redis://127.0.0.1:{port}/0", redis_timeout_ms="300") as other:
        yield Unsteady(other, port, folder)


def test_cache_x1_redis_absent_at_start_then_there(unsteady: Unsteady) -> None:
    """Without redis requests are answered, and nothing is asked of it; once it is there answers are cached."""
    other, text = unsteady.proxy, new()
    before = unsteady.asked()  # nothing, unless another test came first
    answer = other.chat()
    assert (answer.status_code, state(answer)) == (200, "bypass redis")
    assert unsteady.asked() == before
    assert other.http.get("/ready").json()["status"] == "degraded"
    assert other.http.get("/status").json()["redis"]["state"] == "down"
    with unsteady.redis():
        eventually(lambda: state(other.chat(text)) == "hit")
    eventually(lambda: state(other.chat(text)) == "bypass redis", what="the proxy sees that redis is gone")
    assert state(other.embed([new()])) == "bypass redis"
    with unsteady.redis():
        eventually(lambda: state(other.chat(text)) == "hit")


def test_cache_x1_something_else_listens(unsteady: Unsteady) -> None:
    """A port where something other than redis answers: no request fails, and the proxy goes on looking for redis."""
    looks: list[bytes] = []

    class Web(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            said = self.request.recv(1000)
            if b"TRACKING" in said:  # the cache's connection
                looks.append(said)
            self.request.sendall(b"HTTP/1.1 400 Bad Request\r\nconnection: close\r\n\r\n")

    class Server(socketserver.ThreadingTCPServer):
        allow_reuse_address = True

    with Server(("127.0.0.1", unsteady.port), Web) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        try:
            for times in (1, 2):
                eventually(lambda times=times: len(looks) >= times, what="the proxy looks for redis")
                answer = unsteady.proxy.chat()
                assert (answer.status_code, state(answer)) == (200, "bypass redis")
        finally:
            server.shutdown()


def test_cache_x1_redis_paused(unsteady: Unsteady) -> None:
    """SIGSTOP: requests are answered though redis never does, and after the first none of them asks it. It is found
    again when it goes on."""
    other, text = unsteady.proxy, new()
    with unsteady.redis() as server:
        eventually(lambda: state(other.chat(text)) == "hit")
        os.kill(server.popen.pid, signal.SIGSTOP)
        try:
            answer = other.chat()
            assert (answer.status_code, state(answer)) == (200, "bypass redis")
            so_far = unsteady.asked()
            assert len(so_far) == 2, so_far
            # Nor is the proxy's own copy given out: redis could not tell it of a change.
            for again in (text, new(), new()):
                answer = other.chat(again)
                assert (answer.status_code, state(answer)) == (200, "bypass redis")
            assert unsteady.asked() == so_far, "redis is asked again"
        finally:
            os.kill(server.popen.pid, signal.SIGCONT)
        eventually(lambda: state(other.chat(text)) == "hit", what="redis is found again")


class SlowRedis:
    """Takes 20 ms for each MGET and SET but the first; knows no key. `served` counts them. `silent`: no answers."""

    def __init__(self) -> None:
        self.port = 0
        self.served = 0
        self.silent = False

    async def __aenter__(self) -> SlowRedis:
        self._serving: list[asyncio.Task[None]] = []
        self._server = await asyncio.start_server(
            lambda *streams: self._serving.append(asyncio.create_task(self._serve(*streams))), "127.0.0.1", 0
        )
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        for task in self._serving:
            task.cancel()
        await asyncio.gather(*self._serving, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        parser = hiredis.Reader()
        try:
            while data := await reader.read(65536):
                parser.feed(data)
                while command := parser.gets():
                    name = command[0]
                    if self.silent:
                        continue
                    if name in {b"MGET", b"SET"}:
                        await asyncio.sleep(0.02 if self.served else 0)
                        self.served += 1
                    none = b"*%d\r\n" % (len(command) - 1) + b"$-1\r\n" * (len(command) - 1)
                    writer.write(none if name == b"MGET" else b"%0\r\n" if name == b"HGETALL" else b"+OK\r\n")
        finally:
            writer.close()
            await asyncio.gather(writer.wait_closed(), return_exceptions=True)


@pytest.mark.parametrize("operation", ["read", "write"])
async def test_cache_x1_many_keys_have_one_deadline(operation: str) -> None:
    """Of all batches of a read or a write together; a redis that answered some of them is not taken for dead.

    Proxy and redis share one event loop: when the machine stands still, both do.
    """
    async with SlowRedis() as slow:
        names = [str(number) for number in range(20 * BATCH)]
        cache = Cache(f"redis://127.0.0.1:{slow.port}", b"s" * 32, timeout=0.2, max_entry_bytes=1000)
        await cache.start()
        try:
            if operation == "read":
                assert await cache.read(names) is None
            else:
                assert await cache.write({name: entry.Entry(b"{}", 9, time.time()) for name in names}) == "redis"
            # One at once, then 20 ms go ten times into 200 ms and 5 ms of grace.
            assert 1 <= slow.served <= 11
            assert cache.up
        finally:
            await cache.stop()


async def test_cache_d1_a_copy_counts_only_while_redis_answers() -> None:
    """A silent redis could not tell of a change: the copy is given out no longer, though the wait for redis goes on."""
    async with SlowRedis() as slow:
        cache = Cache(f"redis://127.0.0.1:{slow.port}", b"s" * 32, timeout=60, max_entry_bytes=1000, near_bytes=10_000)
        await cache.start()
        try:
            now = time.time()
            assert await cache.write({"key": entry.Entry(b"{}", 9, now)}) is None
            await eventually_async(lambda: cache.get_local("key", "", now) is not None)
            slow.silent = True
            await eventually_async(lambda: cache.get_local("key", "", now) is None)
            assert cache.up
        finally:
            await cache.stop()


@pytest.fixture
def raw(bench: Bench) -> Iterator[redis.Redis]:
    with redis.Redis(port=bench.redis.port) as client:
        yield client


def test_cache_x1_garbage_at_a_key(bench: Bench, raw: redis.Redis) -> None:
    """Another type, bytes that are no entry, half an entry, another version: a miss that heals it."""
    text = new()
    bench.chat(text)
    key = f"lab:entry:{key_of(bench.chat(text))}"
    good = raw.get(key)
    assert isinstance(good, bytes)
    damaged: list[Any] = [
        b"garbage",
        b"",
        b"{}\n{}",
        good[:-5],
        good.replace(b'"v":%d' % CONTRACT, b'"v":99'),
        b"\n" + good,
        b"[]\n[]",
    ]
    for value in damaged:
        raw.set(key, value)
        bench.catch_up()
        assert state(bench.chat(text)) == "miss stored", value
        assert state(bench.chat(text)) == "hit"
    raw.delete(key)
    raw.rpush(key, "a list")
    bench.catch_up()
    assert state(bench.chat(text)) == "miss stored"
    assert state(bench.chat(text)) == "hit"


def test_cache_x1_redis_full_or_read_only(bench: Bench, raw: redis.Redis) -> None:
    """What redis refuses to store is not stored; what is there is still read."""
    text = new()
    bench.chat(text)
    bench.age(key_of(bench.chat(text)), 0)  # the proxy has no copy of its own any more
    try:
        raw.config_set("maxmemory-policy", "noeviction")
        raw.config_set("maxmemory", "1")
        assert state(bench.chat(new())) == "miss redis"
        assert state(bench.chat(text)) == "hit"
        raw.config_set("maxmemory", "0")
        raw.replicaof("127.0.0.1", free_port())
        assert state(bench.chat(new())) == "miss redis"
        assert state(bench.chat(text)) == "hit"
    finally:
        raw.config_set("maxmemory", "0")
        raw.replicaof("NO", "ONE")
        raw.config_set("maxmemory-policy", "volatile-lru")
    assert state(bench.chat(new())) == "miss stored"


def test_cache_switched_off(bench: Bench, tmp_path: Path) -> None:
    with second(bench, tmp_path, cache_enabled="false") as other:
        assert state(other.chat()) == "bypass disabled"
        assert other.http.get("/status").json()["cache"]["enabled"] is False
        assert not (tmp_path / "cache-secret").exists()


def test_cache_s1_tasks_per_input(bench: Bench) -> None:
    """As with embeddings: only results that are not cached are fetched; parameters and task are part of the key."""
    a, b, c = (new() for _ in range(3))
    assert state(bench.post("tasks/sentiment-analysis", {"inputs": [a, b]})) == "miss stored"
    mixed = bench.post("tasks/sentiment-analysis", {"inputs": [c, a, b, a]})
    assert state(mixed) == "partial stored"
    assert bench.calls(bench.model)["last"]["body"] == {"inputs": [c], "model": EMBEDDING_MODEL}
    assert [each["seen"] for each in mixed.json()["results"]] == [c, a, b, a]
    assert (mixed.json()["model"], mixed.json()["method"]) == (EMBEDDING_MODEL, "mock")
    hit = bench.post("tasks/sentiment-analysis", {"inputs": [c, a, b, a], "model": EMBEDDING_MODEL})
    assert state(hit) == "hit"
    assert hit.json() == mixed.json()
    assert hit.json()["usage"]["per_input_tokens"] == [len(each) for each in (c, a, b, a)]
    assert state(bench.post("tasks/sentiment-analysis", {"inputs": a})) == "hit"
    labels = {"candidate_labels": ["x"]}
    assert state(bench.post("tasks/zero-shot-classification", {"inputs": a, "parameters": labels})) == "miss stored"
    asked = {"question": new(), "context": a}
    assert state(bench.post("tasks/question-answering", {"inputs": asked})) == "miss stored"
    assert state(bench.post("tasks/question-answering", {"inputs": [dict(reversed(asked.items()))]})) == "hit"
    hot = {"inputs": a, "parameters": {"temperature": 1}}
    assert state(bench.post("tasks/text-generation", hot)) == "bypass sampled"
    seeded = {"inputs": a, "parameters": {"temperature": 1, "seed": 1}}
    assert state(bench.post("tasks/text-generation", seeded)) == "miss stored"
    many = bench.post("tasks/sentiment-analysis", {"inputs": ["a"] * 10_000})
    assert (many.status_code, many.json()["error"]["param"]) == (400, "inputs")
    shown = bench.post("inspect/score", {"text": a})
    assert state(shown) == "bypass endpoint"
    assert shown.json()["model"] == CHAT_MODEL


def test_cache_x1_a_binary_field_among_the_epochs_stops_no_flush(bench: Bench, raw: redis.Redis) -> None:
    """What another process flushes is noticed although a field of the epochs is no text."""
    text = new()
    bench.chat(text)
    assert state(bench.chat(text)) == "hit"
    raw.hset("lab:epoch", mapping={b"\xff": b"\xfe", b"": b"another"})
    eventually(lambda: state(bench.chat(text, headers={"cache-control": "max-age=1000"})) == "miss stored")
    raw.hdel("lab:epoch", b"\xff")
