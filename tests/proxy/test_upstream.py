"""The proxy towards its upstreams: who is asked, again, instead, or not at all; what may pass; the Responses API."""

from __future__ import annotations

import asyncio
import itertools
import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import httpx2
import openai
import pytest
import yaml
from fixtures_proxy import (
    CHAT_MODEL,
    EMBEDDING_MODEL,
    SHORT_TIMEOUTS,
    UPSTREAM_KEY,
    Bench,
    bench_on,
    events,
    eventually,
    new,
    second,
    state,
)
from lab_proxy.settings import Settings
from lab_proxy.upstreams.breaker import LEAST_CALLS, PROBE_SECONDS, WINDOW_SECONDS, CircuitBreaker
from lab_proxy.upstreams.model_list import MAX_REFRESHES, ModelList
from lab_proxy.upstreams.routes import AutoRow, Routes
from processes import Process, free_port

PACKAGED = Path(__file__).parents[2] / "services/proxy/lab_proxy/upstreams/routes.yaml"


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    """A bench with the shipped timeouts."""
    with bench_on(tmp_path_factory.mktemp("bench"), short_timeouts=False) as started:
        yield started


@pytest.fixture
def bench(running: Bench) -> Bench:
    return settled(running)


def settled(bench: Bench) -> Bench:
    """After good calls, twice as many as a test fails: or the failures of one would open the breaker for the next."""
    bench.forget()
    for _ in range(10):
        bench.chat(headers={"cache-control": "no-store"})
    bench.forget()
    return bench


@pytest.fixture(scope="module")
def once(running: Bench, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    """A proxy that makes no call again, with further upstreams: one for a test to break, as each has a breaker of its
    own; one that is not there; one that answers embeddings where OpenAI does not."""
    folder = tmp_path_factory.mktemp("once")
    table = yaml.safe_load(PACKAGED.read_text())
    there = {"kind": "openai", "keyless": True}
    table["upstreams"] |= {
        "broken": there | {"base_url": f"{running.paid.url}/v1"},
        "nowhere": there | {"base_url": f"http://127.0.0.1:{free_port()}/v1"},
        "spare": there | {"base_url": f"{running.model.url}/v1"},
    }
    spare = [{"upstream": "spare", "model": "text-embedding-x"}]
    table["routes"].insert(1, {"upstream": "openai", "match": ["text-embedding-x"], "fallbacks": spare})
    table["routes"] += [{"upstream": "broken", "match": ["broken-*"]}, {"upstream": "nowhere", "match": ["nowhere-*"]}]
    with second(running, folder, routes_file=str(routes_file(folder, **table)), upstream_retries="0") as started:
        yield started


@pytest.fixture(scope="module")
def falling_back(running: Bench, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    """A proxy whose OpenAI route falls back to the model service. A further upstream does too, for a test to break."""
    folder = tmp_path_factory.mktemp("falling-back")
    table = yaml.safe_load(PACKAGED.read_text())
    fallbacks = [{"upstream": "model", "model": name} for name in ("not-there", EMBEDDING_MODEL, CHAT_MODEL)]
    there = {"kind": "openai", "keyless": True, "base_url": f"{running.paid.url}/v1"}
    table["upstreams"]["broken"] = there
    table["routes"].append({"upstream": "broken", "match": ["broken-*"], "fallbacks": fallbacks})
    table["routes"][1]["fallbacks"] = fallbacks
    with second(running, folder, routes_file=str(routes_file(folder, **table)), upstream_retries="1") as started:
        yield started


@pytest.fixture
def standing_in(falling_back: Bench) -> Bench:
    return settled(falling_back)


@pytest.fixture(scope="module")
def hurried(running: Bench, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    """A proxy with short timeouts."""
    with second(running, tmp_path_factory.mktemp("hurried"), **SHORT_TIMEOUTS) as started:
        yield started


def script(bench: Bench, *turns: int | str, of: Process | None = None, **sent: str) -> None:
    """What becomes of the next calls of the paid upstream, or of another."""
    headers = {name.replace("_", "-"): value for name, value in sent.items()}
    bench.control(of or bench.paid, script=list(turns), sent=headers)


def code(answer: httpx2.Response) -> Any:
    return answer.json()["error"]["code"]


TOKENS = "lab_proxy_tokens_total{", 'source="upstream"'


def number(bench: Bench, start: str, within: str = "") -> float:
    """The sum of the samples on /metrics whose line begins with `start` and has `within`."""
    lines = bench.http.get("/metrics").text.splitlines()
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(start) and within in line)


def routes_file(folder: Path, **changes: Any) -> Path:
    """The packaged routes with other parts."""
    table = yaml.safe_load(PACKAGED.read_text()) | changes
    path = folder / "routes.yaml"
    path.write_text(yaml.safe_dump(table))
    return path


# ---- retries


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("turn", [502, 503, 504, "drop"])
def test_retries_before_the_first_byte(bench: Bench, turn: int | str, stream: bool) -> None:
    """A connection that breaks and 502, 503, 504 are asked again, twice at most, with growing pauses."""
    script(bench, turn, turn)
    answer = bench.chat(stream=stream)
    assert answer.status_code == 200
    if stream:
        assert events(answer)[-1] == "[DONE]"
    told = bench.calls()
    assert told["total"] == 3
    first, then = (after - before for before, after in itertools.pairwise(told["at"]))
    assert first > 0.04  # clock: at least 0.05 s is the promise, less what a timer ends early; slow machines add to it
    assert then > 0.09  # clock: as above, of 0.1 s


def test_retries_are_bounded(bench: Bench, once: Bench) -> None:
    """After the last try the caller hears what the upstream said; PROXY_UPSTREAM_RETRIES=0 switches them off."""
    script(bench, 503, 503, 503, 503)
    answer = bench.chat()
    assert (answer.status_code, answer.json()["error"]["message"]) == (503, "status 503")
    assert bench.calls()["total"] == 3
    bench.forget()
    script(bench, 503)
    assert once.chat().status_code == 503
    assert bench.calls()["total"] == 1


@pytest.mark.parametrize("status", [400, 404, 408, 409, 422, 429, 500, 501])
def test_what_may_have_been_worked_on_is_not_asked_again(bench: Bench, status: int) -> None:
    """Never on a 4xx, and not on a 500: it was at work when it fell."""
    script(bench, status)
    assert bench.chat().status_code == status
    assert bench.calls()["total"] == 1


def test_an_upstream_may_say_itself_whether_to_ask_again(bench: Bench) -> None:
    """`x-should-retry`: true makes a 500 one to repeat, false a 503 one to leave."""
    script(bench, 500, x_should_retry="true")
    assert bench.chat().status_code == 200
    script(bench, 503, x_should_retry="false")
    assert bench.chat().status_code == 503


def test_a_short_retry_after_is_waited_for_a_long_one_passed_on(bench: Bench) -> None:
    """Up to 2 s; the total of this proxy would leave time for more."""
    script(bench, 503, retry_after="0.3")
    assert bench.chat().status_code == 200
    first, then = bench.calls()["at"]
    assert then - first > 0.29  # clock: the pause is the promise, and a slow machine only makes it longer
    for long in ("3", "Wed, 21 Oct 2099 07:28:00 GMT"):
        bench.forget()
        script(bench, 503, retry_after=long)
        answer = bench.chat()
        assert (answer.status_code, answer.headers["retry-after"]) == (503, long)
        assert bench.calls()["total"] == 1


def test_no_cool_down_after_a_429(bench: Bench) -> None:
    """A limit concerns the one request: the next goes out at once."""
    for _ in range(30):
        assert bench.chat(model="gpt-mock-429").headers["retry-after"] == "7"
    assert bench.chat().status_code == 200
    assert bench.calls()["total"] == 31


def test_after_the_first_byte_or_a_silence_nobody_is_asked_again(bench: Bench, hurried: Bench) -> None:
    """Answers that break off, fall silent or never begin, side by side: each is an error after one call."""
    modes = [("reset", False), ("reset", True), ("stall", True), ("hang", True)]
    with ThreadPoolExecutor() as callers:
        asked = [callers.submit(hurried.chat, model=f"gpt-mock-{mode}", stream=stream) for mode, stream in modes]
    answers = [each.result() for each in asked]
    assert [answer.status_code for answer in answers] == [502, 200, 200, 504]
    assert all("error" in events(answer)[-1] for answer in answers[1:3])
    assert bench.calls()["total"] == 4


def test_retries_end_with_the_total_time(bench: Bench, hurried: Bench) -> None:
    """The total is 1.6 s: a pause that would end after it is not made, and the caller hears why."""
    script(bench, 503, 503, retry_after="2")
    answer = hurried.chat()
    assert (answer.status_code, answer.json()["error"]["message"]) == (503, "status 503")
    assert bench.calls()["total"] == 1


def test_no_connection(once: Bench) -> None:
    refused = once.chat(model="nowhere-mock")
    assert refused.status_code == 503
    assert code(refused) == "upstream_unavailable"


def test_every_real_call_is_counted(bench: Bench) -> None:
    """A retry is a call of its own: in the metrics as for the ledger."""

    def calls() -> float:
        return number(bench, "lab_proxy_upstream_calls_total{", 'upstream="openai"')

    before = calls()
    script(bench, 503, "drop")
    bench.chat()
    assert bench.calls()["total"] == 3
    eventually(lambda: calls() - before == 3)
    page = bench.http.get("/metrics").text
    assert 'lab_proxy_upstream_calls_total{outcome="failed",upstream="openai"}' in page
    assert 'lab_proxy_upstream_retries_total{upstream="openai"}' in page


# ---- the time that is left


def test_the_model_service_hears_how_much_time_is_left(bench: Bench, hurried: Bench) -> None:
    """`x-request-timeout-ms`: what remains of the total, less with each call; a paid upstream is not told."""

    def heard() -> int:
        return int(bench.calls(bench.model)["last"]["headers"]["x-request-timeout-ms"])

    hurried.chat(model=CHAT_MODEL)
    assert 0 < heard() <= 1600  # its PROXY_TOTAL_TIMEOUT_SECONDS
    bench.chat(model=CHAT_MODEL)
    assert 1600 < heard() <= 600_000  # the shipped one
    script(bench, 503, of=bench.model, retry_after="0.3")
    bench.chat(model=CHAT_MODEL)
    assert bench.calls(bench.model)["total"] == 4
    assert 1600 < heard() <= 600_000 - 290
    bench.chat()
    assert "x-request-timeout-ms" not in bench.calls()["last"]["headers"]


# ---- breaker


def test_breaker_opens_at_half_of_twenty_and_probes() -> None:
    """At 50 % of 20 calls in 10 s; one call in 5 s goes through while it is open; a success closes it."""
    now = [1000.0]
    opened: list[float] = []
    breaker = CircuitBreaker(lambda: opened.append(now[0]), clock=lambda: now[0])

    def call(good: bool) -> None:
        began = breaker.began()
        (breaker.succeeded if good else breaker.failed)(began)

    for place in range(LEAST_CALLS - 1):
        call(place % 2 == 1)
    assert not breaker.is_open  # 10 of 19 failed, but they are too few
    call(good=True)
    assert not breaker.is_open  # the last of the 20 was none that tells against it
    call(good=False)
    assert breaker.is_open
    assert opened == [1000.0]
    assert breaker.wait() == PROBE_SECONDS
    now[0] += PROBE_SECONDS
    assert breaker.wait() == 0.0
    assert breaker.wait() > 0  # one at a time
    call(good=False)
    assert breaker.is_open
    now[0] += PROBE_SECONDS
    assert breaker.wait() == 0.0
    call(good=True)
    assert not breaker.is_open
    assert breaker.wait() == 0.0
    for _ in range(LEAST_CALLS - 1):
        call(good=False)
    assert not breaker.is_open  # counted afresh
    now[0] += WINDOW_SECONDS
    call(good=False)
    assert not breaker.is_open  # those of before are out of the window


def test_breaker_hears_no_old_stories() -> None:
    """A call from before it opened neither closes it nor counts after."""
    breaker = CircuitBreaker()
    old = breaker.began()
    for _ in range(LEAST_CALLS):
        breaker.failed(breaker.began())
    assert breaker.is_open
    breaker.succeeded(old)
    assert breaker.is_open


def is_open(answer: httpx2.Response) -> bool:
    return answer.status_code == 503 and bool(code(answer) == "upstream_circuit_open")


@pytest.fixture(scope="module")
def broken(once: Bench) -> Bench:
    """A proxy whose upstream `broken` has failed until its breaker opened."""
    script(once, *[503] * 1000)
    assert once.chat(model="broken-mock").json()["error"]["message"] == "status 503"
    eventually(lambda: is_open(once.chat(model="broken-mock")))
    return once


def test_an_open_breaker_answers_without_a_call(bench: Bench, broken: Bench) -> None:
    """503 with Retry-After, code upstream_circuit_open, and no call; /status and /metrics say so; other upstreams go
    on."""
    script(bench, *[503] * 1000)
    counts: list[int] = []

    def refused() -> bool:
        counts[:] = [bench.calls()["total"]]
        answer = broken.chat(model="broken-mock")
        counts.append(bench.calls()["total"])
        return is_open(answer) and 1 <= int(answer.headers["retry-after"]) <= 5

    eventually(refused)  # at the first look, unless it is the turn of the one call in 5 s
    assert counts[0] == counts[1]
    status = broken.http.get("/status").json()["proxy"]["upstreams"]
    assert {"name": "broken", "configured": True, "open": ["broken"]} in status
    assert 'lab_proxy_breaker_open{upstream="broken"} 1.0' in broken.http.get("/metrics").text
    bench.forget()
    assert broken.chat(model=CHAT_MODEL).status_code == broken.chat().status_code == 200


def test_refusals_do_not_open_the_breaker(bench: Bench) -> None:
    """What tells against the request tells nothing of the upstream: 4xx, limits, a refused key."""
    for mode in ("429", "401", "403"):
        for _ in range(10):
            bench.chat(model=f"gpt-mock-{mode}")
    assert bench.chat().status_code == 200


# ---- fallbacks


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("turn", [500, 503, 429, "drop"])
def test_a_fallback_answers_and_says_so(standing_in: Bench, turn: int | str, stream: bool) -> None:
    """The header names who answered, the answer its model; its own name is in the request that it got."""
    line = 'lab_proxy_fallbacks_total{answered="model",upstream="openai"}'
    before = number(standing_in, line)
    script(standing_in, turn, turn)
    answer = standing_in.chat(stream=stream)
    assert answer.status_code == 200
    assert answer.headers["x-model-fallback"] == f"model/{CHAT_MODEL}"
    said = events(answer)[0] if stream else answer.json()
    assert said["model"] == CHAT_MODEL
    assert standing_in.calls(standing_in.model)["last"]["body"]["model"] == CHAT_MODEL
    assert number(standing_in, line) == before + 1


@pytest.mark.parametrize("stream", [False, True])
def test_a_fallbacks_answer_is_stored_under_its_own_name(standing_in: Bench, stream: bool) -> None:
    """Never under the first choice's key: when that is back it is asked; who asks for the other finds the answer."""
    text = new()
    script(standing_in, 500)
    assert "x-model-fallback" in standing_in.chat(text, stream=stream).headers
    back = standing_in.chat(text)
    assert state(back) == "miss stored"
    assert back.json()["model"] == "gpt-mock"
    assert "x-model-fallback" not in back.headers
    assert state(standing_in.chat(text, model=CHAT_MODEL)) == "hit"
    assert state(standing_in.chat(text)) == "hit"


def test_refusals_are_the_callers_own(standing_in: Bench) -> None:
    """What another upstream would refuse as well, and a key that the operator must mend: nobody stands in."""
    for mode, status in (("403", 403), ("401", 502)):
        answer = standing_in.chat(model=f"gpt-mock-{mode}")
        assert answer.status_code == status
    assert standing_in.calls(standing_in.model)["total"] == 0


def test_when_all_fail_the_first_is_heard(standing_in: Bench) -> None:
    script(standing_in, 502, 502)
    script(standing_in, 503, 503, of=standing_in.model)
    answer = standing_in.chat()
    assert (answer.status_code, answer.json()["error"]["message"]) == (502, "status 502")
    assert "x-model-fallback" not in answer.headers


def test_vectors_of_another_model_are_no_fallback(standing_in: Bench) -> None:
    script(standing_in, 500)
    assert standing_in.embed(new(), model="text-embedding-3-small").status_code == 500
    assert standing_in.calls(standing_in.model)["total"] == 0


def test_vectors_of_the_same_model_elsewhere(bench: Bench, once: Bench) -> None:
    """They are kept under who made them, and never mixed with the other's."""
    old = new()
    assert once.embed(old, model="text-embedding-x").status_code == 200
    script(bench, 500)
    both = once.embed([old, new()], model="text-embedding-x")
    assert both.headers["x-model-fallback"] == "spare/text-embedding-x"
    assert once.calls(bench.model)["last"]["body"]["input"] == _inputs(both)
    assert _inputs(both)[0] == old
    assert state(once.embed(_inputs(both)[1], model="text-embedding-x")) == "miss stored"


def _inputs(answer: httpx2.Response) -> list[str]:
    return list(json.loads(answer.request.content)["input"])


def test_an_open_breaker_falls_back_without_a_call(standing_in: Bench) -> None:
    script(standing_in, *[503] * 1000)

    def calls_of_one() -> int:
        before = standing_in.calls()["total"]
        answer = standing_in.chat(model="broken-mock")
        assert answer.headers["x-model-fallback"] == f"model/{CHAT_MODEL}"
        return int(standing_in.calls()["total"] - before)

    assert calls_of_one() == 2  # closed: the call and its retry
    eventually(lambda: calls_of_one() == 0)


# ---- auto


@pytest.mark.parametrize(
    ("body", "size"),
    [
        ({}, "small"),
        ({"messages": [{"role": "user", "content": "x" * 4001}]}, "large; why=prompt"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "x" * 4001}]}]}, "large; why=prompt"),
        ({"messages": [{"role": "user", "content": "x"}] * 13}, "large; why=messages"),
        ({"max_completion_tokens": 2000}, "large; why=max_tokens"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "large; why=tools"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}], "tool_choice": "none"}, "small"),
        ({"response_format": {"type": "json_object"}}, "large; why=response_format"),
        ({"response_format": {"type": "text"}}, "small"),
    ],
)
def test_auto_says_which_and_why(bench: Bench, body: dict[str, Any], size: str) -> None:
    """`auto` goes by the thresholds of the routes file; the answer's model is the one that answered."""
    answer = bench.chat(model="auto", **body)
    assert answer.status_code == 200
    assert answer.headers["x-model-auto"] == size
    assert answer.headers["x-model-alias"] == "auto"
    assert answer.json()["model"] == (CHAT_MODEL if size == "small" else "gpt-4o-mini")


def test_auto_is_cached_under_the_model_that_it_stands_for(bench: Bench) -> None:
    text = new()
    assert state(bench.chat(text, model="auto")) == "miss stored"
    again = bench.chat(text, model="auto")
    assert state(again) == "hit"
    assert again.headers["x-model-auto"] == "small"
    assert state(bench.chat(text, model=CHAT_MODEL)) == "hit"
    assert bench.embed("x", model="auto").status_code == 400


def test_auto_takes_any_body() -> None:
    """A heuristic never fails on what the upstream would refuse."""
    row = AutoRow(small="a", large="b", prompt_characters=5, messages=1, max_tokens=3, large_for=["images", "tools"])
    for body in (
        {"messages": 3},
        {"messages": [None, 3, {"content": {"a": 1}}, {"content": [[], None, 3]}]},
        {"max_tokens": "many", "tools": 3, "response_format": "json"},
        {"prompt": [1, 2], "input": {"x": []}},
    ):
        assert row.size(body).startswith(("small", "large"))
    image = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:"}}]}]
    assert row.size({"messages": image}) == "large; why=images"


# ---- headers


def test_only_named_headers_pass_either_way(bench: Bench) -> None:
    """Towards the upstream: the proxy's own and the request id. Towards the caller: limits, ids and times; no cookie,
    no owner of a key, nothing of the server, nothing hop-by-hop."""
    sent = {
        "authorization": "Bearer sk-mine", "cookie": "a=b", "x-api-key": "k", "x-forwarded-for": "10.0.0.1",
        "te": "trailers", "referer": "http://x/", "openai-organization": "acme", "user-agent": "secret-agent/1",
        "accept-language": "ko", "x-request-id": "mine.1", "proxy-authorization": "Basic eA==", "traceparent": "00-1",
    }  # fmt: skip
    answer = bench.chat(headers=sent)
    got = bench.calls()["last"]["headers"]
    assert set(got) <= {"host", "accept", "accept-encoding", "user-agent", "content-type", "content-length",
                        "authorization", "x-request-id"}  # fmt: skip
    assert got["authorization"] == f"Bearer {UPSTREAM_KEY}"
    assert "secret-agent" not in got["user-agent"]
    assert set(answer.headers) <= {"date", "content-type", "content-length", "x-request-id", "cache-status",
                                   "openai-processing-ms"}  # fmt: skip


def test_headers_of_an_error_are_as_clean(bench: Bench) -> None:
    kept = {"x-ratelimit-remaining-tokens": "5", "openai-version": "1"}
    lost = {"set-cookie": "s=2", "server": "nginx", "openai-organization": "acme", "OpenAI-Project": "p"}
    script(bench, 400, **kept, **lost)
    answer = bench.chat()
    assert answer.status_code == 400
    assert {name: answer.headers[name] for name in kept} == kept
    assert not {name.lower() for name in lost} & set(answer.headers)


# ---- responses


@pytest.fixture
def sdk(bench: Bench) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{bench.proxy.url}/v1", api_key="x", max_retries=0) as made:
        yield made


def test_responses_pass_through_as_json(bench: Bench, sdk: openai.OpenAI) -> None:
    """Untouched, never cached, its tokens counted."""
    before = number(bench, *TOKENS)
    for _ in range(2):
        raw = sdk.responses.with_raw_response.create(model="gpt-mock", input="hello there", temperature=0)
        assert raw.headers["cache-status"] == "llm-lab; fwd=bypass; detail=endpoint"
        assert raw.parse().output_text == "You said: hello there"
    assert bench.calls()["calls"] == {"responses": 2}
    eventually(lambda: number(bench, *TOKENS) - before == 2 * (2 + 4))


def test_responses_pass_through_as_a_stream(bench: Bench, sdk: openai.OpenAI) -> None:
    """Byte for byte, and the same to the SDK as without the proxy; the tokens are counted from its last event."""
    before = number(bench, *TOKENS)
    with openai.OpenAI(base_url=f"{bench.paid.url}/v1", api_key="x", max_retries=0) as direct:
        told = [
            [event.to_dict() for event in each.responses.create(model="gpt-mock", input="hi you", stream=True)]
            for each in (sdk, direct)
        ]
    for event in (*told[0], *told[1]):
        event.get("response", {}).pop("id", None)
    assert told[0] == told[1]
    assert told[0][-1]["type"] == "response.completed"
    eventually(lambda: number(bench, *TOKENS) - before == 2 + 4)


def test_half_a_stream_of_responses_is_an_error(bench: Bench, sdk: openai.OpenAI) -> None:
    with pytest.raises(openai.APIError, match="broke off its answer"):
        list(sdk.responses.create(model="gpt-mock-reset", input="x", stream=True))


def test_responses_are_refused_by_name_elsewhere(bench: Bench, once: Bench) -> None:
    """The model service has no such API, nor has an upstream of which the routes file does not say so; background
    answers and kept ones are not handed out."""
    local = bench.post("responses", {"model": CHAT_MODEL, "input": "x"})
    assert (local.status_code, local.json()["error"]["param"]) == (400, "model")
    assert "Responses API" in local.json()["error"]["message"]
    assert once.post("responses", {"model": "nowhere-mock", "input": "x"}).status_code == 400
    later = bench.post("responses", {"model": "gpt-mock", "input": "x", "background": True})
    assert (later.status_code, later.json()["error"]["param"]) == (400, "background")
    assert bench.http.get("/v1/responses/resp_1").status_code == 404
    assert bench.calls()["total"] == bench.calls(bench.model)["total"] == 0


# ---- the routes file


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"upstreams": {"x": {"kind": "openai"}}}, "exactly one upstream must be of the kind `model`"),
        ({"routes": [{"upstream": "model", "fallbacks": [{"upstream": "y", "model": "m"}]}]}, "'y'"),
        ({"routes": [{"upstream": "model", "samples": 0}]}, "samples"),
        ({"routes": [{"upstream": "model", "stale_if_error_seconds": -1}]}, "stale_if_error_seconds"),
        ({"auto": {"small": "a", "large": "b", "large_for": ["moods"]}}, "large_for"),
        ({"rules": []}, "rules"),
        ({"upstreams": {"model": {"kind": "model", "rpm": 0}}}, "upstreams.model.rpm"),
        ({"upstreams": {"model": {"kind": "model", "tpm": True}}}, "upstreams.model.tpm"),
        ({"upstreams": {"model": {"kind": "model", "usd_per_day": "1.2.3"}}}, "upstreams.model.usd_per_day"),
    ],
)
def test_a_wrong_routes_file_says_where(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=r"^PROXY_ROUTES_FILE is wrong at .*") as caught:
        Routes(Settings(routes_file=routes_file(tmp_path, **change)))
    assert said in str(caught.value)


def test_a_routes_terms_reach_its_targets(tmp_path: Path) -> None:
    """Samples and stale times are the route's, of its fallbacks too."""
    terms = {"samples": 3, "stale_while_revalidate_seconds": 60, "stale_if_error_seconds": 600, "ttl_seconds": 5}
    spare = {"fallbacks": [{"upstream": "openai", "model": "gpt-x"}]}
    file = routes_file(tmp_path, routes=[{"upstream": "model", **terms, **spare}])
    routes = Routes(Settings(routes_file=file, openai_api_key="k"))  # type: ignore[arg-type]  # pydantic makes it secret
    target = routes.resolve("m", {"m": {"revision": "r"}})
    for each in (target, *target.fallbacks):
        assert (each.samples, each.stale_while_revalidate, each.stale_if_error, each.ttl) == (3, 60, 600, 5)
    assert [(each.upstream, each.model) for each in target.fallbacks] == [("openai", "gpt-x")]


# ---- the end: here the breaker of a test above has been open for a while


def test_an_upstream_that_answers_again_is_used_again(bench: Bench, broken: Bench) -> None:
    """One call in 5 s goes through an open breaker; the first that succeeds closes it."""
    eventually(lambda: broken.chat(model="broken-mock").status_code == 200)
    assert broken.chat(model="broken-mock").status_code == 200
    assert 'lab_proxy_breaker_open{upstream="broken"} 0.0' in broken.http.get("/metrics").text


def test_unknown_models_do_not_make_a_call_each() -> None:
    """Between two polls a few unknown names make the proxy read the list again, whatever callers invent."""

    class Pool:
        model_config = SimpleNamespace(native=True)
        asked: ClassVar[list[str]] = []

        async def ask_model(self, path: str, limit: float) -> tuple[int, Any]:
            self.asked.append(path)
            return 200, {"data": []} if path == "/v1/models" else {"status": "ready", "models": []}

    async def ask() -> None:
        models = ModelList(Pool(), 60)  # type: ignore[arg-type]
        for number in range(100):
            await models.refresh(f"nobody-{number}")

    asyncio.run(ask())
    assert Pool.asked.count("/v1/models") == MAX_REFRESHES
    assert Pool.asked.count("/ready") == MAX_REFRESHES


@pytest.mark.parametrize(
    ("status", "body", "text"),
    [
        (422, {"error": "Input validation error: `inputs` must have less than 9 tokens"}, "less than 9 tokens"),
        (400, {"message": "temperature is too high"}, "temperature is too high"),
        (422, {"detail": [{"loc": ["body", "n"], "msg": "not a number"}]}, "not a number"),
    ],
)
def test_another_apis_4xx_of_the_callers_fault_is_passed_on(bench: Bench, status: int, body: Any, text: str) -> None:
    """TGI, Ollama and FastAPI have error bodies of their own: the caller gets the status and the reason."""
    bench.control(bench.paid, script=[{"status": status, "body": body}])
    answer = bench.chat()
    assert (answer.status_code, answer.json()["error"]["type"]) == (status, "invalid_request_error")
    assert text in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("path", "answer"),
    [
        *[("chat/completions", {"choices": choices}) for choices in (None, 5, [1])],
        *[("stream", {"choices": [{"index": 0, **choice}]}) for choice in ({}, {"message": None}, {"message": 5})],
        *[
            ("embeddings", {"data": [{"index": 0, "embedding": vector}]})
            for vector in (None, 5, [], ["a"], [True], {"a": 1})
        ],
    ],
)
def test_an_answer_of_wrong_types_is_a_502_and_not_stored(bench: Bench, path: str, answer: dict[str, Any]) -> None:
    bench.control(bench.paid, script=[{"status": 200, "body": answer}])
    chat = {"model": "gpt-mock", "messages": [{"role": "user", "content": new()}], "temperature": 0}
    body = {"model": "text-embedding-mock", "input": new()} if path == "embeddings" else chat
    refused = bench.post(
        path.replace("stream", "chat/completions"), body | ({"stream": True} if path == "stream" else {})
    )
    assert (refused.status_code, refused.json()["error"]["code"]) == (502, "upstream_error")
    assert state(bench.post(path.replace("stream", "chat/completions"), body)) == "miss stored"


def test_a_list_of_models_of_another_shape_changes_nothing(bench: Bench) -> None:
    """Entries that are no models are left out; the others are served, and /status and /ready answer."""
    wrong = {"a": {"id": 5}, "b": {"id": "b", "state": []}, "c": {"id": "c", "revision": 7}, "d": {"id": None}}
    bench.control(others=wrong | {"fine": {"state": "ready", "revision": "r1"}})
    eventually(lambda: "fine" in [each["id"] for each in bench.http.get("/v1/models").json()["data"]])
    assert bench.chat(model="nobody-knows").status_code == 404
    assert [bench.http.get(path).status_code for path in ("/status", "/ready")] == [200, 200]
    assert bench.chat(model="fine").status_code == 200


def test_cache_k5_a_late_answer_of_an_old_revision_moves_no_key_back() -> None:
    """A call that began before the new revision was known says nothing new, nor does a list asked for before it."""

    async def ask() -> list[str]:
        models, seen = ModelList(Pool(), 60), []  # type: ignore[arg-type]

        def now() -> None:
            seen.append(models.entries["m"]["revision"])

        Pool.revision = "r1"
        await models._read()
        began = time.time()
        models.observe_revision("m", "r2", began)
        now()
        models.observe_revision("m", "r1", began - 1)  # late
        now()
        Pool.on_list = lambda: models.observe_revision("m", "r3", time.time())
        Pool.revision = "r2"
        await models._read()
        now()
        return seen

    class Pool:
        model_config = SimpleNamespace(native=True)
        revision = "r1"
        on_list: Any = staticmethod(lambda: None)

        async def ask_model(self, path: str, limit: float) -> tuple[int, Any]:
            answer = {"data": [{"id": "m", "revision": Pool.revision}]}
            Pool.on_list()
            return 200, answer

    assert asyncio.run(ask()) == ["r2", "r2", "r3"]


def test_a_name_of_a_model_has_a_limit(bench: Bench) -> None:
    """Names are kept with plans and epochs, whatever callers invent: a longer one is refused by its field."""
    assert bench.chat(model="gpt-mock-" + "x" * 247).status_code == 200
    answer = bench.chat(model="gpt-mock-" + "x" * 248)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "model")
