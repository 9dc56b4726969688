"""One contract for whoever speaks OpenAI's API here: each test runs against the model and against the proxy."""

from __future__ import annotations

import base64
import json
import math
import struct
from typing import Any

import httpx2
import openai
import pytest
from openai.types.chat import ChatCompletionMessageParam
from processes import SHOWN_ON_FAILURE
from served import CHAT, EMBEDDING, TINY

PARIS: list[ChatCompletionMessageParam] = [{"role": "user", "content": "What is the capital of France?"}]


def events(response: httpx2.Response) -> list[str]:
    """The data lines of a stream, raw."""
    return [line.removeprefix("data: ") for line in response.text.splitlines() if line.startswith("data: ")]


def request(method: str, url: str, **fields: Any) -> httpx2.Response:
    with httpx2.Client(timeout=60, event_hooks=SHOWN_ON_FAILURE) as http:
        return http.request(method, url, **fields)


def post(target: str, path: str, body: Any, **headers: str) -> httpx2.Response:
    return request("POST", f"{target}{path}", json=body, headers=headers)


def refused(client: openai.OpenAI, **fields: Any) -> openai.APIStatusError:
    """The typed exception for a chat request with these fields added."""
    body = {"model": TINY, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2, "temperature": 0} | fields
    with pytest.raises(openai.APIStatusError) as caught:
        client.post("/chat/completions", body=body, cast_to=object)
    return caught.value


def test_models_are_listed_and_found(client: openai.OpenAI) -> None:
    listed = {model.id: model for model in client.models.list()}
    assert {CHAT, EMBEDDING, TINY} <= listed.keys()
    assert listed[CHAT].object == "model"
    assert client.models.retrieve(CHAT).id == CHAT
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("nobody")


def test_chat_answers_paris(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model=CHAT, messages=PARIS, temperature=0)
    assert "Paris" in (answer.choices[0].message.content or "")
    assert answer.object == "chat.completion"
    assert answer.model == CHAT
    assert answer.id.startswith("chatcmpl-")
    assert answer.system_fingerprint
    assert answer.choices[0].finish_reason == "stop"
    assert answer.choices[0].message.role == "assistant"
    assert answer.usage is not None
    assert answer.usage.prompt_tokens > 5
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


@pytest.mark.parametrize("temperature", [0, 0.8])
def test_stream_says_what_json_says(client: openai.OpenAI, temperature: float) -> None:
    """The same seed gives the same answer, whole or in pieces. Neither is read from a cache."""
    asked: dict[str, Any] = {"model": TINY, "messages": PARIS, "temperature": temperature, "seed": 5, "max_tokens": 40}
    fresh = {"extra_headers": {"cache-control": "no-store"}}
    whole = client.chat.completions.create(**asked, **fresh)
    chunks = list(client.chat.completions.create(**asked, **fresh, stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole.choices[0].message.content
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [chunk.choices[0].finish_reason for chunk in chunks][-1] == whole.choices[0].finish_reason
    assert all(chunk.choices[0].finish_reason is None for chunk in chunks[:-1])
    assert len({chunk.id for chunk in chunks}) == 1
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    assert len(chunks) > 3, "it did not come in pieces"


@pytest.mark.parametrize("wanted", [True, False])
def test_stream_has_usage_only_for_who_asks(target: str, wanted: bool) -> None:
    options = {"stream_options": {"include_usage": True}} if wanted else {}
    body = {"model": TINY, "messages": PARIS, "max_tokens": 5, "stream": True, "temperature": 0, **options}
    lines = events(post(target, "/v1/chat/completions", body))
    assert lines[-1] == "[DONE]"
    chunks = [json.loads(line) for line in lines[:-1]]
    if wanted:
        assert chunks[-1]["choices"] == []
        assert chunks[-1]["usage"]["completion_tokens"] == 5
        assert all(chunk["usage"] is None for chunk in chunks[:-1])
    else:
        assert all("usage" not in chunk and chunk["choices"] for chunk in chunks)


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
def test_length_is_kept(client: openai.OpenAI, name: str) -> None:
    answer = client.chat.completions.create(model=TINY, messages=PARIS, temperature=0, **{name: 7})
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 7


@pytest.mark.parametrize("stream", [False, True])
def test_stop_string_ends_the_answer(client: openai.OpenAI, stream: bool) -> None:
    """Nothing of the stop string is seen, and the finish reason says `stop`."""
    asked: dict[str, Any] = {"model": CHAT, "messages": PARIS, "temperature": 0, "stop": ["is Par", "never said"]}
    if stream:
        chunks = list(client.chat.completions.create(**asked, stream=True))
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
        finish = chunks[-1].choices[0].finish_reason
    else:
        choice = client.chat.completions.create(**asked).choices[0]
        text, finish = choice.message.content or "", choice.finish_reason
    assert (text, finish) == ("The capital of France ", "stop")


def test_seed_repeats_and_its_absence_does_not(client: openai.OpenAI) -> None:
    def say(**fields: Any) -> str | None:
        answer = client.chat.completions.create(
            model=TINY, messages=PARIS, temperature=1.5, max_tokens=20, **fields,
            extra_headers={"cache-control": "no-store"},
        )  # fmt: skip
        return answer.choices[0].message.content

    assert say(seed=2**62) == say(seed=2**62)
    assert len({say() for _ in range(4)}) > 1


def test_parts_and_developer_role(client: openai.OpenAI) -> None:
    """Content in text parts is the text; `developer` is the newer `system`."""

    def say(messages: Any) -> str | None:
        answer = client.chat.completions.create(model=TINY, messages=messages, temperature=0, max_tokens=10)
        return answer.choices[0].message.content

    plain = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello there"}]
    parts = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "Hello "}, {"type": "text", "text": "there"}]},
    ]
    assert say(plain) == say(parts)


def test_an_answer_can_be_sent_back(client: openai.OpenAI) -> None:
    """The SDK's own message object is taken as history."""
    first = client.chat.completions.create(model=TINY, messages=PARIS, temperature=0, max_tokens=5)
    history: Any = [*PARIS, first.choices[0].message.model_dump(), {"role": "user", "content": "And of Spain?"}]
    second = client.chat.completions.create(model=TINY, messages=history, temperature=0, max_tokens=5)
    assert second.choices[0].finish_reason == "length"


def test_completions_take_every_kind_of_prompt(client: openai.OpenAI) -> None:
    one = client.completions.create(model=TINY, prompt="the cat", temperature=0, max_tokens=8)
    assert one.object == "text_completion"
    several = client.completions.create(model=TINY, prompt=["the cat", "the dog"], temperature=0, max_tokens=8)
    assert [choice.index for choice in several.choices] == [0, 1]
    assert several.choices[0].text == one.choices[0].text
    ids = client.completions.create(model=TINY, prompt=[5, 6, 7], temperature=0, max_tokens=8)
    assert ids.usage is not None
    assert ids.usage.prompt_tokens == 3
    lists = client.completions.create(model=TINY, prompt=[[5, 6, 7], [8]], temperature=0, max_tokens=8)
    assert lists.choices[0].text == ids.choices[0].text
    texts = {0: "", 1: ""}
    for chunk in client.completions.create(
        model=TINY, prompt=["the cat", "the dog"], temperature=0, max_tokens=8, stream=True,
        extra_headers={"cache-control": "no-store"},
    ):  # fmt: skip
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == {choice.index: choice.text for choice in several.choices}


def test_embeddings_in_every_form(client: openai.OpenAI) -> None:
    inputs = ["A cat sits on the mat.", "A kitten rests on a rug.", "Interest rates rose in March."]
    packed = client.embeddings.create(model=EMBEDDING, input=inputs)  # the SDK asks for base64 and unpacks it
    plain = client.embeddings.create(model=EMBEDDING, input=inputs, encoding_format="float")
    vectors = [item.embedding for item in plain.data]
    for index, item in enumerate(packed.data):
        assert item.index == index
        assert len(item.embedding) == 384
        assert item.embedding == pytest.approx(vectors[index], abs=1e-6)
        assert math.hypot(*item.embedding) == pytest.approx(1, abs=1e-4)
    near, far = (sum(a * b for a, b in zip(vectors[0], vectors[i], strict=True)) for i in (1, 2))
    assert near > 0.5 > far
    single = client.embeddings.create(model=EMBEDDING, input=inputs[1], encoding_format="float")
    assert single.data[0].embedding == pytest.approx(vectors[1], abs=1e-5)
    again = client.embeddings.create(model=EMBEDDING, input=[inputs[2], inputs[1], inputs[2]], encoding_format="float")
    assert [item.index for item in again.data] == [0, 1, 2]
    assert again.data[0].embedding == again.data[2].embedding == pytest.approx(vectors[2], abs=1e-5)
    assert plain.usage.prompt_tokens == plain.usage.total_tokens > 10
    own = {"input_vocabulary": "model"}
    ids = client.embeddings.create(model=EMBEDDING, input=[101, 4937, 102], encoding_format="float", extra_body=own)
    assert ids.data[0].embedding == pytest.approx(
        client.embeddings.create(model=EMBEDDING, input="cat", encoding_format="float").data[0].embedding, abs=1e-6
    )
    bare = client.embeddings.create(model=EMBEDDING, input=[[4937]], encoding_format="float", extra_body=own)
    assert bare.data[0].embedding == pytest.approx(ids.data[0].embedding, abs=1e-6)
    with pytest.raises(openai.BadRequestError, match="check_embedding_ctx_length=False"):
        client.embeddings.create(model=EMBEDDING, input=[15339, 1917])
    assert ids.usage.prompt_tokens == 3


def test_base64_is_little_endian_float32(target: str) -> None:
    body = {"model": EMBEDDING, "input": "cat"}
    packed = post(target, "/v1/embeddings", body | {"encoding_format": "base64"}).json()["data"][0]["embedding"]
    plain = post(target, "/v1/embeddings", body).json()["data"][0]["embedding"]
    assert list(struct.unpack("<384f", base64.b64decode(packed))) == pytest.approx(plain, abs=1e-6)


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({"best_of": 2}, "best_of", "unsupported_parameter"),
        ({"echo": True}, "echo", "unsupported_parameter"),
        ({"suffix": "x"}, "suffix", "unsupported_parameter"),
        ({"functions": [{"name": "f"}]}, "functions", "unsupported_parameter"),
        ({"audio": {"voice": "a", "format": "wav"}}, "audio", "unsupported_parameter"),
        ({"store": True}, "store", "unsupported_parameter"),
        ({"logit_bias": {"five": 1}}, "logit_bias", "invalid_value"),
        ({"logit_bias": {"5": 101}}, "logit_bias", "invalid_value"),
        ({"presence_penalty": 2.5}, "presence_penalty", "invalid_value"),
        ({"top_logprobs": 3}, "top_logprobs", None),
        ({"tool_choice": "required"}, "tool_choice", "invalid_value"),
        ({"response_format": {"type": "poem"}}, "response_format.type", "invalid_value"),
        ({"wibble": 1}, "wibble", "unknown_parameter"),
        ({"temperature": 3}, "temperature", "invalid_value"),
        ({"temperature": "hot"}, "temperature", "invalid_value"),
        ({"top_p": -0.1}, "top_p", "invalid_value"),
        ({"max_tokens": 0}, "max_tokens", "invalid_value"),
        ({"max_tokens": 1.5}, "max_tokens", "invalid_value"),
        ({"max_tokens": True}, "max_tokens", "invalid_value"),
        ({"seed": 2**64}, "seed", "invalid_value"),
        ({"stop": [""]}, "stop[0]", "invalid_value"),
        ({"messages": []}, "messages", "invalid_value"),
        ({"messages": [{"role": "wizard", "content": "hi"}]}, "messages[0].role", "invalid_value"),
        ({"messages": [{"role": "user"}]}, "messages[0].content", "missing_required_parameter"),
        ({"messages": [{"role": "user", "content": "hi", "nick": "bob"}]}, "messages[0].nick", "unknown_parameter"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            "messages[0].content[0].type",
            "invalid_value",
        ),
        ({"stream_options": {"include_usage": True}}, "stream_options", None),
    ],
    ids=lambda value: json.dumps(value)[:40] if isinstance(value, dict) else "",
)
def test_what_is_not_supported_is_refused_by_name(
    client: openai.OpenAI, fields: dict[str, Any], param: str, code: str | None
) -> None:
    error = refused(client, **fields)
    assert isinstance(error, openai.BadRequestError)
    assert (error.type, error.param, error.code) == ("invalid_request_error", param, code)
    assert param.rpartition(".")[2] in error.message


FORECAST: dict[str, Any] = {
    "type": "object",
    "properties": {"city": {"enum": ["Paris", "Seoul"]}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
TOOL: Any = {"type": "function", "function": {"name": "forecast", "parameters": FORECAST}}
FRESH: dict[str, Any] = {"extra_headers": {"cache-control": "no-store"}}


def test_several_choices(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": TINY, "messages": PARIS, "n": 3, "seed": 1, "max_tokens": 8}
    whole = client.chat.completions.create(**asked, **FRESH)
    assert [choice.index for choice in whole.choices] == [0, 1, 2]
    assert whole.usage is not None
    assert whole.usage.completion_tokens == 24
    said = dict.fromkeys(range(3), "")
    for chunk in client.chat.completions.create(**asked, **FRESH, stream=True):
        said[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert list(said.values()) == [choice.message.content for choice in whole.choices]


def test_logprobs_in_both_shapes(client: openai.OpenAI) -> None:
    """Chat's entries with bytes and alternatives, completions' lists; a token's bytes add up to the text."""
    chat = client.chat.completions.create(
        model=CHAT, messages=PARIS, temperature=0, max_tokens=6, logprobs=True, top_logprobs=2
    )
    assert chat.choices[0].logprobs is not None
    shown = chat.choices[0].logprobs.content or []
    assert b"".join(bytes(one.bytes or ()) for one in shown).decode() == chat.choices[0].message.content
    assert all(one.logprob <= 0 and len(one.top_logprobs) == 2 for one in shown)
    plain = client.completions.create(model=CHAT, prompt="Once upon a", temperature=0, max_tokens=6, logprobs=2)
    lists = plain.choices[0].logprobs
    assert lists is not None
    assert "".join(lists.tokens or ()) == plain.choices[0].text
    assert len(lists.token_logprobs or ()) == len(lists.top_logprobs or ()) == len(lists.text_offset or ()) == 6


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_follows_its_schema(client: openai.OpenAI, stream: bool) -> None:
    asked: dict[str, Any] = {
        "model": TINY, "messages": PARIS, "temperature": 0, "max_tokens": 60,
        "response_format": {"type": "json_schema", "json_schema": {"name": "f", "schema": FORECAST, "strict": True}},
    }  # fmt: skip
    if stream:
        chunks = list(client.chat.completions.create(**asked, stream=True))
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    else:
        text = client.chat.completions.create(**asked).choices[0].message.content or ""
    said = json.loads(text)
    assert set(said) == {"city", "days"}
    assert " " not in text


def test_a_schema_that_cannot_be_enforced_is_a_400(client: openai.OpenAI) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "f", "schema": {"not": {"type": "string"}}}}
    error = refused(client, response_format=form)
    assert (error.status_code, error.param) == (400, "response_format.json_schema.schema")
    assert "not" in error.message


@pytest.mark.parametrize("stream", [False, True])
def test_a_tool_is_called_and_answered(client: openai.OpenAI, stream: bool) -> None:
    """The whole turn with the official client: asked to call, the call, its result, the answer."""
    messages: list[Any] = [{"role": "user", "content": "Will it rain in Seoul?"}]
    asked: dict[str, Any] = {"model": CHAT, "tools": [TOOL], "temperature": 0, "max_tokens": 80}
    forced = {"type": "function", "function": {"name": "forecast"}}
    call: dict[str, Any]
    if stream:
        call = {"id": "", "type": "function", "function": {"name": "", "arguments": ""}}
        finish = None
        for chunk in client.chat.completions.create(**asked, messages=messages, tool_choice=forced, stream=True):  # type: ignore[call-overload]
            for part in chunk.choices[0].delta.tool_calls or ():
                call["id"] += part.id or ""
                call["function"]["name"] += part.function.name or ""
                call["function"]["arguments"] += part.function.arguments or ""
            finish = chunk.choices[0].finish_reason or finish
        messages.append({"role": "assistant", "content": None, "tool_calls": [call]})
    else:
        choice = client.chat.completions.create(**asked, messages=messages, tool_choice=forced).choices[0]
        finish = choice.finish_reason
        assert choice.message.content is None
        assert choice.message.tool_calls
        call = choice.message.tool_calls[0].model_dump()
        messages.append(choice.message)
    assert finish == "tool_calls"
    assert call["function"]["name"] == "forecast"
    assert set(json.loads(call["function"]["arguments"])) == {"city", "days"}
    messages.append({"role": "tool", "tool_call_id": call["id"], "content": "sunny"})
    answer = client.chat.completions.create(model=CHAT, messages=messages, tools=[TOOL], temperature=0, max_tokens=8)
    assert answer.choices[0].finish_reason in ("stop", "length", "tool_calls")


def test_penalties_and_biases_change_an_answer(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": TINY, "messages": PARIS, "temperature": 0, "max_tokens": 40}
    plain = client.chat.completions.create(**asked).choices[0].message.content
    for fields in (
        {"logit_bias": {"80": 100}}, {"extra_body": {"repetition_penalty": 2.0}}, {"presence_penalty": 2, "seed": 1},
    ):  # fmt: skip
        answer = client.chat.completions.create(**asked, **fields)  # type: ignore[call-overload]
        if "presence_penalty" not in fields:
            assert answer.choices[0].message.content != plain
    hot = {**asked, "temperature": 1, "seed": 3}
    for extra in ({"top_k": 1}, {"min_p": 1.0}):
        assert client.chat.completions.create(**hot, extra_body=extra).choices[0].message.content == plain


def test_what_was_not_computed_again_is_told(target: str) -> None:
    """`usage.prompt_tokens_details.cached_tokens`, the second time the model reads the same long prompt."""
    body = {"model": TINY, "messages": [{"role": "user", "content": "the cat sat on the mat " * 60}], "max_tokens": 2}
    usages = [
        post(target, "/v1/chat/completions", body, **{"cache-control": "no-store"}).json()["usage"] for _ in range(2)
    ]
    assert usages[1]["prompt_tokens_details"]["cached_tokens"] > 0
    assert usages[1]["prompt_tokens"] == usages[0]["prompt_tokens"]


def test_nobody_waits_beyond_a_deadline(model_url: str) -> None:
    """The header is the model's; the proxy has its own, of what is left of its total time."""
    body = {"model": CHAT, "messages": PARIS, "max_tokens": 2000, "logit_bias": {"2": -100}, "seed": 1}
    for path in ("/v1/chat/completions", f"/m/{CHAT}/v1/chat/completions"):
        answer = post(model_url, path, body, **{"x-request-timeout-ms": "300"})
        assert (answer.status_code, answer.json()["error"]["code"]) == (504, "deadline_exceeded")


def test_defaults_and_what_cannot_change_an_answer_pass(client: openai.OpenAI) -> None:
    """Said or left out, a default is the same; null is left out."""
    answer = client.post(
        "/chat/completions",
        body={
            "model": TINY, "messages": PARIS, "temperature": 0.0, "max_tokens": 3.0, "n": 1, "presence_penalty": 0,
            "frequency_penalty": 0.0, "repetition_penalty": 1, "top_k": 0, "min_p": 0, "logit_bias": {},
            "logprobs": False, "top_logprobs": 0, "tools": [], "tool_choice": None, "parallel_tool_calls": True,
            "response_format": {"type": "text"}, "store": False, "service_tier": "auto",
            "user": "u", "metadata": {"a": "b"}, "safety_identifier": "s", "prompt_cache_key": "k", "stop": None,
            "stream": False, "seed": None,
        },
        cast_to=object,
    )  # fmt: skip
    assert isinstance(answer, dict)
    assert answer["usage"]["completion_tokens"] == 3


def test_too_long_for_the_context_is_refused(client: openai.OpenAI) -> None:
    long = "the cat sat on the mat " * 300
    for fields in ({"messages": [{"role": "user", "content": long}]}, {"max_tokens": 1020}):
        error = refused(client, **fields)
        assert (error.status_code, error.code, error.param) == (400, "context_length_exceeded", "messages")
        assert "1024" in error.message
    with pytest.raises(openai.BadRequestError, match="256 tokens") as caught:
        client.embeddings.create(model=EMBEDDING, input=["short", "cat " * 400])
    assert caught.value.code == "context_length_exceeded"


def test_unknown_model_is_a_404_that_lists_what_there_is(client: openai.OpenAI) -> None:
    error = refused(client, model="nobody")
    assert isinstance(error, openai.NotFoundError)
    assert error.code == "model_not_found"
    assert CHAT in error.message


def test_a_model_of_another_kind_is_refused(client: openai.OpenAI) -> None:
    assert refused(client, model=EMBEDDING).status_code == 400
    with pytest.raises(openai.BadRequestError):
        client.embeddings.create(model=TINY, input="x")


@pytest.mark.parametrize(
    ("body", "kind", "status"),
    [
        (b"{", "application/json", 400),
        (b"", "application/json", 400),
        (b"[]", "application/json", 400),
        (b'{"model": NaN}', "application/json", 400),
        (b"\xff\xfe", "application/json", 400),
        (b'{"messages": []}', "application/json", 400),
        (b"{}", "text/plain", 415),
        (b'{"model":"' + b"x" * 20_000_000 + b'"}', "application/json", 413),
    ],
    ids=["cut", "empty", "list", "nan", "bytes", "no model", "not json", "too large"],
)
def test_garbage_gets_a_clear_error(target: str, body: bytes, kind: str, status: int) -> None:
    response = request("POST", f"{target}/v1/chat/completions", content=body, headers={"content-type": kind})
    assert response.status_code == status
    assert response.json()["error"]["type"] == "invalid_request_error"
    assert response.json()["error"]["message"]


def test_wrong_paths_and_methods_are_enveloped(target: str) -> None:
    assert request("GET", f"{target}/v1/chat/completions").status_code == 405
    lost = post(target, "/v1/images/generations", {})
    assert lost.status_code == 404
    assert lost.json()["error"]["message"]


def test_request_id_goes_through(target: str) -> None:
    body = {"model": TINY, "messages": PARIS, "max_tokens": 2, "temperature": 0}
    assert post(target, "/v1/chat/completions", body, **{"x-request-id": "mine-1"}).headers["x-request-id"] == "mine-1"
    ids = {post(target, "/v1/chat/completions", body).headers["x-request-id"] for _ in range(2)}
    assert len(ids) == 2
    odd = request("POST", f"{target}/v1/chat/completions", json=body, headers={"x-request-id": b"\xe9" * 300})
    assert odd.status_code == 200, "a request id that is no text"


def test_what_has_no_meaning_in_a_text_is_still_a_text(client: openai.OpenAI) -> None:
    """Emoji, control characters, special tokens' names: an answer, not an error."""
    for content in ("", "\u0000", "👩‍👩‍👧", "<|im_end|>", "<|endoftext|>" * 3, "한국어 질문입니다"):
        answer = client.chat.completions.create(
            model=TINY, messages=[{"role": "user", "content": content}], max_tokens=3, temperature=0
        )
        assert answer.choices[0].finish_reason in ("length", "stop")


def test_the_inside_of_a_model_is_shown(target: str) -> None:
    """Without `model` the first chat model answers; the tokens of the answer are metered; unknown fields are named."""
    seen = post(target, "/v1/inspect/tokenize", {"text": "한국어"}).json()
    assert seen["model"] == CHAT
    assert b"".join(bytes(each["bytes"]) for each in seen["tokens"]) == "한국어".encode()
    following = post(target, "/v1/inspect/next-token", {"messages": PARIS, "token_ids": [504, 3575, 282, 4649, 314]})
    assert following.json()["tokens"][0]["text"] == " Paris"
    assert following.json()["usage"]["prompt_tokens"] == len(following.json()["prompt_ids"])
    scored = post(target, "/v1/inspect/score", {"model": TINY, "text": "the cat sat on the mat"}).json()
    assert scored["perplexity"] > 1
    vectors = post(target, "/v1/inspect/tokenize", {"model": EMBEDDING, "text": "Hello"}).json()
    assert [each["text"] for each in vectors["tokens"]] == ["[CLS]", "hello", "[SEP]"]
    wrong = post(target, "/v1/inspect/score", {"text": "a b", "bogus": 1})
    assert (wrong.status_code, wrong.json()["error"]["param"]) == (400, "bogus")
    kind = post(target, "/v1/inspect/score", {"model": EMBEDDING, "text": "a b"})
    assert (kind.status_code, kind.json()["error"]["param"]) == (400, "model")


def test_the_layers_of_a_model_are_shown(target: str) -> None:
    """By a copy of the model that is loaded for it; what its last layer answers is what the engine answers."""
    text = "the cat sat on the"
    lens = post(target, "/v1/inspect/logit-lens", {"model": TINY, "text": text, "top": 2})
    assert lens.status_code == 200, lens.text
    layers, tokens = lens.json()["layers"], lens.json()["tokens"]
    assert [len(layer) for layer in layers] == [len(tokens)] * 3, "the embedding and two layers"
    following = post(target, "/v1/inspect/next-token", {"model": TINY, "text": text, "top": 2}).json()["tokens"]
    last = layers[-1][-1]
    assert [each["id"] for each in last] == [each["id"] for each in following]
    assert [each["probability"] for each in last] == pytest.approx(
        [each["probability"] for each in following], abs=1e-3
    )
    attention = post(target, "/v1/inspect/attention", {"model": TINY, "text": text, "layer": 1}).json()
    assert (len(attention["heads"]), attention["layers"]) == (4, 2)
    for head in attention["heads"]:
        assert [sum(row) for row in head] == pytest.approx([1] * len(tokens), abs=0.01)
        assert all(not any(row[place + 1 :]) for place, row in enumerate(head)), "a token attends to later ones"
    for path, body, param in (
        ("attention", {"layer": 2}, "layer"), ("logit-lens", {"text": "a " * 60}, "text"), ("device", {"x": 1}, "x"),
    ):  # fmt: skip
        sent = {"model": TINY, "text": text} | body if path != "device" else {"model": TINY} | body
        wrong = post(target, f"/v1/inspect/{path}", sent)
        assert (wrong.status_code, wrong.json()["error"]["param"]) == (400, param)
    memory = post(target, "/v1/inspect/memory", {"model": TINY, "tokens": 100}).json()
    assert memory["kv_cache"]["predicted_bytes"] == 100 * memory["kv_cache"]["bytes_per_token"]
    assert (
        memory["kv_cache"]["measured_bytes"]
        >= memory["kv_cache"]["bytes_per_token"] * memory["kv_cache"]["measured_tokens"]
    )
    device = post(target, "/v1/inspect/device", {"model": TINY}).json()
    assert device["cuda_available"] or device["reason"]
    assert device["gb_per_second"] > 0
    assert device["gflop_per_second"] > 0
