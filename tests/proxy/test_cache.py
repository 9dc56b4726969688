"""The response cache's promises, against a real proxy process, a real redis and upstreams that do as they are told.

K1 to K4's forms are in test_canonical.py; here is what they mean over HTTP.
"""

from __future__ import annotations

import asyncio
import os
import re
import signal
import stat
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hiredis
import httpx2
import openai
import pytest
import redis
from fixtures_proxy import CHAT_MODEL, HURRIED_MS, Bench, events, eventually, new, redis_url, second, state
from lab_proxy.cache import entry
from lab_proxy.cache.store import BATCH, Cache
from lab_proxy.canonical import CONTRACT
from openai.lib.streaming.chat import ChatCompletionStreamState
from processes import free_port, redis_server

FRESH = {"id", "created"}


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
    """Another revision behind the same name is another request, known within the poll's interval."""
    text = new()
    assert state(bench.chat(text, model=CHAT_MODEL)) == "miss stored"
    assert state(bench.chat(text, model=CHAT_MODEL)) == "hit"
    bench.control(revision="r2")
    time.sleep(1)
    answer = bench.chat(text, model=CHAT_MODEL)
    assert (state(answer), answer.headers["x-model-revision"]) == ("miss stored", "r2")
    bench.control(revision="r1")
    time.sleep(1)
    assert state(bench.chat(text, model=CHAT_MODEL)) == "hit"


def test_cache_k5_stored_under_the_revision_of_the_answer(bench: Bench) -> None:
    """A redeploy between the key and the answer: the answer is stored under what made it, and the proxy has learned."""
    text = new()
    bench.control(revision="r7")
    assert state(bench.chat(text, model=CHAT_MODEL)) == "miss stored"
    answer = bench.chat(text, model=CHAT_MODEL)
    assert (state(answer), answer.json()["system_fingerprint"]) == ("hit", "r7")
    time.sleep(1)
    assert state(bench.chat(text, model=CHAT_MODEL)) == "hit"
    bench.control(revision="r1")
    time.sleep(1)
    assert state(bench.chat(text, model=CHAT_MODEL)) == "miss stored"


def test_cache_k5_vectors_of_two_revisions_are_never_mixed(bench: Bench) -> None:
    one, two = new(), new()
    bench.embed([one])
    bench.control(revision="r5")
    answer = bench.embed([one, two])
    assert [row["embedding"][2] for row in answer.json()["data"]] == [5.0, 5.0]


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
    ids = [time.monotonic_ns() % 100_000, 2, 3]
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
def test_cache_s2_a_broken_stream_is_not_stored(bench: Bench, mode: str) -> None:
    """Nothing is stored, and the caller gets an error event and no [DONE] (an upstream's own [DONE] apart)."""
    text = new()
    for _ in range(2):
        got = events(bench.chat(text, model=f"gpt-mock-{mode}", stream=True))
        assert (got[-1] == "[DONE]") == (mode == "unfinished")
        if mode != "unfinished":
            assert got[-1]["error"]["message"]
            assert not any(
                choice.get("finish_reason") for chunk in got[:-1] if mode != "no-done" for choice in chunk["choices"]
            )
    assert bench.calls()["total"] == 2


def test_cache_s2_a_caller_who_leaves_stores_nothing(bench: Bench) -> None:
    """And the upstream's work ends within 500 ms, the best of three."""

    def seconds(text: str) -> float:
        bench.forget()
        messages = [{"role": "user", "content": text}]
        body = {"model": "gpt-mock-slow", "messages": messages, "temperature": 0, "stream": True}
        with bench.http.stream("POST", "/v1/chat/completions", json=body) as answer:
            next(answer.iter_lines())
        left = eventually(lambda: bench.calls()["left"] == 1, 5)
        assert state(bench.chat(text, model="gpt-mock-slow", max_tokens=1)) == "miss stored"
        return left

    assert min(seconds(new()) for _ in range(3)) < 0.5


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
    assert state(ask("max-age=100")) == "hit"
    time.sleep(1.2)
    assert state(ask("max-age=0")) == "request stored"
    assert ask("", stream=True).headers["age"] == "0"
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
    assert abs(one.json()["created"] - time.time()) < 5
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
    assert 86_390 <= int(ttl.removeprefix("ttl=")) <= 86_400
    assert len(key) == len('key=""') + 64
    assert hit.headers["age"] == "0"
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


def test_cache_d_ttl_per_route(bench: Bench, tmp_path: Path) -> None:
    """An entry's time is its route's; S3 and S4 by setting: a route that keeps samples, a limit on size."""
    routes = tmp_path / "routes.yaml"
    routes.write_text(
        "upstreams: {model: {kind: model}, openai: {kind: openai}}\n"
        "routes:\n"
        "  - {upstream: openai, match: [gpt-mock], ttl_seconds: 1, store_sampled: true}\n"
        "  - {upstream: openai, match: ['gpt-*']}\n"
    )
    limits = {"routes_file": str(routes), "cache_ttl_seconds": "77", "cache_max_entry_bytes": "900"}
    with second(bench, tmp_path, **limits) as other:
        text = new()
        assert state(other.chat(text, temperature=0.5)) == "miss stored"
        hit = other.chat(text, temperature=0.5)
        assert state(hit) == "hit"
        assert "ttl=1;" in hit.headers["cache-status"]
        time.sleep(1.1)
        assert state(other.chat(text, temperature=0.5)) == "miss stored"
        other.chat(text, model="gpt-mock-reasoning")
        assert "ttl=77;" in other.chat(text, model="gpt-mock-reasoning").headers["cache-status"]
        long = "long " * 300
        assert state(other.chat(long)) == "miss size"
        assert state(other.chat(long)) == "miss size"


def test_cache_k1_the_secret_is_made_once(bench: Bench, tmp_path: Path) -> None:
    """0600, the same after a restart; another secret is another key."""
    text = new()
    for expected in ("miss stored", "hit"):
        with second(bench, tmp_path) as other:
            assert state(other.chat(text)) == expected
    secret = tmp_path / "cache-secret"
    assert stat.S_IMODE(secret.stat().st_mode) == 0o600
    assert len(secret.read_bytes()) == 64
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith("cache-secret")] == ["cache-secret"]


# ---- X: redis is not well


def timed(ask: Any) -> tuple[httpx2.Response, float]:
    started = time.perf_counter()
    answer = ask()
    assert answer.status_code == 200, answer.text
    return answer, time.perf_counter() - started


def test_cache_x1_redis_absent_at_start_then_there(bench: Bench, tmp_path: Path) -> None:
    port = free_port()
    with second(bench, tmp_path, redis=f"redis://127.0.0.1:{port}/0") as other:
        answer, seconds = timed(other.chat)
        assert state(answer) == "bypass redis"
        assert seconds < 0.5
        assert other.http.get("/ready").json()["status"] == "degraded"
        assert other.http.get("/status").json()["redis"]["state"] == "down"
        with redis_server(tmp_path, port=port):
            text = new()
            eventually(lambda: state(other.chat(text)) == "hit", 5)
        eventually(lambda: state(other.chat(text)) == "bypass redis", 2)
        assert state(other.embed([new()])) == "bypass redis"
        with redis_server(tmp_path, port=port):
            eventually(lambda: state(other.chat(text)) == "hit", 5)


def test_cache_x1_redis_paused(bench: Bench, tmp_path: Path) -> None:
    """SIGSTOP: the first request is later by at most 100 ms, the next by nothing; back within 5 s."""
    settings = {"redis_timeout_ms": HURRIED_MS}
    with redis_server(tmp_path) as server, second(bench, tmp_path, redis_url(server), **settings) as other:
        text = new()
        other.chat(text)
        usual = min(timed(other.chat)[1] for _ in range(5))

        def asked() -> list[str]:
            page = other.http.get("/metrics").text
            return re.findall(r'^lab_proxy_redis_seconds_count\{operation="(?:read|write)"\} .*$', page, re.M)

        firsts, later = [], []
        for _ in range(3):  # the machine may stand still in one of them; the wait for redis is in each
            eventually(lambda: state(other.chat(text)) == "hit", 5)
            os.kill(server.popen.pid, signal.SIGSTOP)
            try:
                answer, first = timed(other.chat)
                assert state(answer) == "bypass redis"
                firsts.append(first)
                so_far = asked()
                assert len(so_far) == 2
                later.append(sorted(timed(other.chat)[1] for _ in range(7))[3])
                assert asked() == so_far, "redis is asked again"
            finally:
                os.kill(server.popen.pid, signal.SIGCONT)
        assert min(firsts) < usual + 0.1
        assert min(later) < usual + 0.02
        eventually(lambda: state(other.chat(text)) == "hit", 5)


class SlowRedis:
    """Takes 40 ms for each MGET and for each SET after the greeting; knows no key. `served` counts them."""

    def __init__(self) -> None:
        self.port = 0
        self.served = 0

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
                    if name in {b"MGET", b"SET"}:
                        await asyncio.sleep(0.04)
                        self.served += 1
                    none = b"*%d\r\n" % (len(command) - 1) + b"$-1\r\n" * (len(command) - 1)
                    writer.write(none if name == b"MGET" else b"%0\r\n" if name == b"HGETALL" else b"+OK\r\n")
        finally:
            writer.close()
            await asyncio.gather(writer.wait_closed(), return_exceptions=True)


@pytest.mark.parametrize("operation", ["read", "write"])
async def test_cache_x1_many_keys_have_one_deadline(operation: str) -> None:
    """Of all batches of a read or a write together; a redis that answered some of them is not taken for dead."""
    async with SlowRedis() as slow:
        names = [str(number) for number in range(20 * BATCH)]
        cache = Cache(f"redis://127.0.0.1:{slow.port}", b"s" * 32, timeout=0.4, max_entry_bytes=1000)
        await cache.start()
        try:
            if operation == "read":
                assert await cache.read(names) is None
            else:
                assert await cache.write({name: entry.Entry(b"{}", 9, time.time()) for name in names}) == "redis"
            # Counted and not timed, since a machine may stand still: into 400 ms and 5 ms of grace 40 ms go ten times.
            assert 1 <= slow.served <= 11
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
    key = "lab:entry:" + bench.chat(text).headers["cache-status"].partition('key="')[2].rstrip('"')
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
        assert state(bench.chat(text)) == "miss stored", value
        assert state(bench.chat(text)) == "hit"
    raw.delete(key)
    raw.rpush(key, "a list")
    assert state(bench.chat(text)) == "miss stored"
    assert state(bench.chat(text)) == "hit"


def test_cache_x1_redis_full_or_read_only(bench: Bench, tmp_path: Path) -> None:
    """What redis refuses to store is not stored; what is there is still read."""
    with redis_server(tmp_path) as server, second(bench, tmp_path, redis=redis_url(server)) as other:
        text = new()
        other.chat(text)
        with redis.Redis(port=server.port) as client:
            client.config_set("maxmemory-policy", "noeviction")
            client.config_set("maxmemory", "1")
            assert state(other.chat(new())) == "miss redis"
            assert state(other.chat(text)) == "hit"
            client.config_set("maxmemory", "0")
            client.replicaof("127.0.0.1", free_port())
            assert state(other.chat(new())) == "miss redis"
            client.replicaof("NO", "ONE")
        assert state(other.chat(new())) == "miss stored"


def test_cache_switched_off(bench: Bench, tmp_path: Path) -> None:
    with second(bench, tmp_path, cache_enabled="false") as other:
        assert state(other.chat()) == "bypass disabled"
        assert other.http.get("/status").json()["cache"]["enabled"] is False
        assert not (tmp_path / "cache-secret").exists()
