"""A conversation by the official client through the proxy equals one without it.

Deep equality of the accumulated objects, live and from the cache, in both wire modes.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import openai
import pytest
from fixtures_proxy import Bench, bench_on, new
from openai.lib.streaming.chat import ChatCompletionStreamState
from served import EMBEDDING, TINY

LIVE = {"cache-control": "no-store"}
TOOLS: list[Any] = [
    {"type": "function", "function": {
        "name": name, "description": f"the {name}", "parameters": {
            "type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"],
        },
    }} for name in ("weather", "time")
]  # fmt: skip
FORMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "short": {"max_tokens": 3},
    "stopped": {"stop": ["done"]},
    "several": {"n": 3},
    "logprobs": {"logprobs": True, "top_logprobs": 2},
    "several with logprobs": {"n": 2, "logprobs": True},
    "tools": {"tools": TOOLS},
    "no tool": {"tools": TOOLS, "tool_choice": "none"},
    "counted": {"stream_options": {"include_usage": True}},
}
MODES = ("reasoning", "refusal", "crlf", "tools", "empty", "filter", "cut", "pretty")  # of the mock's answers

Ask = Callable[[openai.OpenAI, dict[str, Any], dict[str, str]], Any]


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    with bench_on(tmp_path_factory.mktemp("sdk"), short_timeouts=False) as started:
        yield started


def sdk(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0, timeout=60)


@pytest.fixture
def direct(bench: Bench) -> Iterator[openai.OpenAI]:
    with sdk(bench.paid.url) as made:
        yield made


@pytest.fixture
def proxied(bench: Bench) -> Iterator[openai.OpenAI]:
    with sdk(bench.proxy.url) as made:
        yield made


# ---- what is compared


def told(answer: Any) -> Any:
    """All of an object but what is new with every answer: its id and time."""
    return without(answer.model_dump(warnings=False))


def without(dumped: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in dumped.items() if name not in {"id", "created", "_request_id"}}


def whole(client: openai.OpenAI, body: dict[str, Any], headers: dict[str, str]) -> Any:
    asked = {name: value for name, value in body.items() if name != "stream_options"}
    return told(client.chat.completions.create(**asked, extra_headers=headers))


def streamed(client: openai.OpenAI, body: dict[str, Any], headers: dict[str, str]) -> Any:
    """What the SDK makes of a stream: the accumulated object, and the last usage that any chunk told."""
    state = ChatCompletionStreamState(input_tools=body.get("tools", openai.omit))
    identities, usage = set(), None
    for chunk in client.chat.completions.create(**body, stream=True, extra_headers=headers):
        state.handle_chunk(chunk)
        identities.add((chunk.id, chunk.created))
        usage = chunk.usage or usage
    assert len(identities) == 1, "one stream, one id"
    made = told(state.current_completion_snapshot)
    return made | {"usage": usage and usage.model_dump()}


def outcome(ask: Ask, client: openai.OpenAI, body: dict[str, Any], headers: dict[str, str]) -> Any:
    """The object, or the SDK's exception as what it says: refusals are equal too."""
    try:
        return ask(client, copy.deepcopy(body), headers)
    except openai.APIStatusError as error:
        return type(error).__name__, error.status_code, error.body


def question(**more: Any) -> dict[str, Any]:
    return {"model": "gpt-mock", "messages": [{"role": "user", "content": new()}], "temperature": 0} | more


# ---- against the mock


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_answer_equals_the_upstreams(
    bench: Bench, direct: openai.OpenAI, proxied: openai.OpenAI, form: str
) -> None:
    """Live; stored from JSON and replayed as either; stored from a stream and replayed as either."""
    for first, second in ((whole, streamed), (streamed, whole)):
        body = question(**FORMS[form])
        true = {ask: ask(direct, body, {}) for ask in (whole, streamed)}
        for ask in (whole, streamed):
            assert ask(proxied, body, LIVE) == true[ask], f"live, {ask.__name__}"
        bench.forget()
        assert first(proxied, body, {}) == true[first], f"miss, {first.__name__}"
        assert first(proxied, body, {}) == true[first], f"hit, {first.__name__}"
        assert second(proxied, body, {}) == true[second], f"hit, {second.__name__} of what was {first.__name__}"
        assert bench.calls()["total"] == 1


@pytest.mark.parametrize("mode", MODES)
def test_every_kind_of_answer_equals_the_upstreams(direct: openai.OpenAI, proxied: openai.OpenAI, mode: str) -> None:
    """Reasoning, refusals, cut answers, CRLF between events: what the client sees does not know of the proxy."""
    body = question(model=f"gpt-mock-{mode}")
    for ask in (whole, streamed):
        true = ask(direct, body, {})
        for _ in range(2):
            assert ask(proxied, body, {}) == true, ask.__name__


@pytest.mark.parametrize("ask", [whole, streamed])
def test_a_conversation_with_tools_equals_one_without_the_proxy(
    bench: Bench, direct: openai.OpenAI, proxied: openai.OpenAI, ask: Ask
) -> None:
    """Three turns, each built on the objects of the one before; the second time all of it comes from the cache."""
    opening = new()
    true = list(conversation(direct, ask, opening))
    assert list(conversation(proxied, ask, opening)) == true
    bench.forget()
    assert list(conversation(proxied, ask, opening)) == true
    assert bench.calls()["total"] == 0


def conversation(client: openai.OpenAI, ask: Ask, opening: str) -> Iterator[Any]:
    messages: list[Any] = [{"role": "user", "content": opening}]
    first = ask(client, question(messages=messages, tools=TOOLS), {})
    yield first
    said = first["choices"][0]["message"]
    calls = said["tool_calls"]
    assert [call["function"]["name"] for call in calls] == ["weather", "time"]
    messages.append({"role": "assistant", "tool_calls": [
        {"id": call["id"], "type": "function", "function": {
            "name": call["function"]["name"], "arguments": call["function"]["arguments"]}} for call in calls
    ]})  # fmt: skip
    messages += [{"role": "tool", "tool_call_id": call["id"], "content": '{"is": "fine"}'} for call in calls]
    second = ask(client, question(messages=messages, tools=TOOLS, tool_choice="none"), {})
    yield second
    messages += [
        {"role": "assistant", "content": second["choices"][0]["message"]["content"]},
        {"role": "user", "content": "And in other words?"},
    ]
    yield ask(client, question(messages=messages, n=2, logprobs=True), {})


def test_text_and_vectors_equal_the_upstreams(direct: openai.OpenAI, proxied: openai.OpenAI) -> None:
    text: dict[str, Any] = {"model": "gpt-mock", "prompt": new(), "temperature": 0, "max_tokens": 4, "logprobs": 1}
    true = told(direct.completions.create(**text))
    chunks = [told(chunk) for chunk in direct.completions.create(**text, stream=True)]
    for _ in range(2):
        assert told(proxied.completions.create(**text)) == true
    live = proxied.completions.create(**text, stream=True, extra_headers=LIVE)
    assert [told(chunk) for chunk in live] == chunks
    texts = [new(), new()]
    for encoding in ("float", "base64", None):
        vectors: dict[str, Any] = {"model": "text-embedding-mock", "input": [*texts, texts[0]]}
        vectors |= {"encoding_format": encoding} if encoding else {}
        expected = told(direct.embeddings.create(**vectors))
        for _ in range(2):
            assert told(proxied.embeddings.create(**vectors)) == expected


@pytest.mark.parametrize("mode", ["429", "403", "500", "error-event", "no-done", "reset", "html"])
def test_what_goes_wrong_is_an_exception_of_the_sdk_too(proxied: openai.OpenAI, mode: str) -> None:
    """Never half an answer taken for a whole one."""
    body = question(model=f"gpt-mock-{mode}")
    with pytest.raises(openai.APIError):
        streamed(proxied, body, {})
    if mode in {"429", "403", "500", "html"}:
        with pytest.raises(openai.APIStatusError) as told_so:
            whole(proxied, body, {})
        assert told_so.value.status_code == {"429": 429, "403": 403, "500": 500, "html": 502}[mode]


# ---- against the model service


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_the_models_answer_is_equal_through_the_proxy(model_url: str, proxy_url: str, form: str) -> None:
    """Deeply equal, or refused in the same words where the model does not do it."""
    body = question(model=TINY, seed=5, **{"max_tokens": 12, **FORMS[form]})
    with sdk(model_url) as direct, sdk(proxy_url) as proxied:
        for ask in (whole, streamed):
            true = outcome(ask, direct, body, {})
            for headers in (LIVE, {}, {}):
                assert same(outcome(ask, proxied, body, headers), true), (ask.__name__, headers)


def test_the_models_vectors_are_equal_through_the_proxy(model_url: str, proxy_url: str) -> None:
    asked: dict[str, Any] = {"model": EMBEDDING, "input": [new(), new()], "encoding_format": "float"}
    with sdk(model_url) as direct, sdk(proxy_url) as proxied:
        true = told(direct.embeddings.create(**asked))
        for _ in range(2):
            assert same(told(proxied.embeddings.create(**asked)), true)


def same(one: Any, other: Any) -> bool:
    """Deeply equal, but for the last bits of a float, which depend on who else is in the model's batch, and for what
    the model's own prefix cache had."""
    if isinstance(one, dict) and isinstance(other, dict):
        names = (set(one) | set(other)) - {"cached_tokens"}
        return all(same(one.get(name), other.get(name)) for name in names)
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
        return len(one) == len(other) and all(same(a, b) for a, b in zip(one, other, strict=True))
    if isinstance(one, float) and isinstance(other, float):
        return one == pytest.approx(other, abs=1e-3)
    return bool(one == other)


def test_the_raw_answer_says_where_it_came_from(bench: Bench) -> None:
    """The SDK's raw responses show the cache's word, and each answer an id of its own."""
    body = question()
    with sdk(bench.proxy.url) as client:
        raws = [client.chat.completions.with_raw_response.create(**body) for _ in range(2)]
        states = [raw.headers["cache-status"].split("; ")[1] for raw in raws]
        assert states == ["fwd=miss", "hit"]
        assert len({raw.parse().id for raw in raws}) == 2
        assert len({raw.headers["x-request-id"] for raw in raws}) == 2
