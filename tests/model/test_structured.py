"""Structured answers: what the schema says, compact, ending when it is complete; no schema hurts another request."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
from collections.abc import AsyncIterator
from typing import Any

import jsonschema
import pytest
import tiny
import torch
from inprocess import END, InProcess, events
from lab_model.text import grammar
from lab_model.text.grammar import GrammarError, Grammars, TokenGrammar, answer_source
from lab_model.text.tokenizer import ModelTokenizer
from processes import eventually_async
from tiny import one_thread  # noqa: F401 - of all tests here

TEXT = ModelTokenizer.of(tiny.tokenizer())
PERSON: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["red", "green"]}, "maxItems": 2},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}


def form(schema: dict[str, Any], **fields: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema, **fields}}


def many(count: int) -> dict[str, Any]:
    """Alternatives that an Earley parser must all keep in mind."""
    one = {"type": "object", "properties": {f"p{j}": {"type": "string"} for j in range(50)}}
    return {"anyOf": [{**one, "title": str(i)} for i in range(count)]}


@pytest.fixture
async def app() -> AsyncIterator[InProcess]:
    made = InProcess()
    yield made
    await made.close()


@pytest.mark.parametrize("seed", range(4))
async def test_an_answer_follows_its_schema_and_ends(app: InProcess, seed: int) -> None:
    """Random weights know no JSON: what comes out is the grammar's doing. Compact, so that it ends."""
    found = await app.choice(response_format=form(PERSON, strict=True), temperature=1, seed=seed, max_tokens=300)
    said = json.loads(found["message"]["content"])
    jsonschema.validate(said, PERSON)
    assert found["finish_reason"] == "stop"
    assert found["message"]["content"].startswith('{"name":"')


async def test_json_object_is_an_object(app: InProcess) -> None:
    """Whatever the model would rather say; a schema may leave nothing to say."""
    # A bias that makes it come to an end: random weights would go on for ever.
    ends = {str(TEXT.encode(end)[0]): 60 for end in '"}'}
    found = await app.choice(response_format={"type": "json_object"}, logit_bias=ends, max_tokens=900)
    assert found["finish_reason"] == "stop"
    assert isinstance(json.loads(found["message"]["content"]), dict)
    empty = form({"type": "object", "additionalProperties": False})
    assert (await app.choice(response_format=empty))["message"]["content"] == "{}"


async def test_a_stream_is_the_same_structure(app: InProcess) -> None:
    asked = {"response_format": form(PERSON), "temperature": 1, "seed": 7, "max_tokens": 300}
    whole = await app.choice(**asked)
    chunks = await app.chunks(**asked)
    assert "".join(c["choices"][0]["delta"].get("content", "") for c in chunks) == whole["message"]["content"]


async def test_each_of_n_choices_has_a_grammar_of_its_own(app: InProcess) -> None:
    answer = await app.ask(response_format=form(PERSON), n=3, temperature=1, seed=3, max_tokens=300)
    said = [choice["message"]["content"] for choice in answer.json()["choices"]]
    for one in said:
        jsonschema.validate(json.loads(one), PERSON)
    assert len(set(said)) == 3


@pytest.mark.parametrize("bias", [100, -100])
async def test_a_bias_on_everything_does_not_break_the_grammar(app: InProcess, bias: int) -> None:
    everything = {str(token): bias for token in range(app.generator.text.vocab_size)}
    found = await app.choice(response_format=form(PERSON), logit_bias=everything, max_tokens=300)
    jsonschema.validate(json.loads(found["message"]["content"]), PERSON)


@pytest.mark.parametrize(
    ("schema", "named"),
    [
        ({"type": "object", "unevaluatedProperties": False}, "unevaluatedProperties"),
        ({"properties": {"a": {"not": {"type": "string"}}}}, "not"),
        ({"type": "array", "contains": {"type": "string"}}, "contains"),
        ({"if": {}, "then": {}}, "then"),
        ({"type": "wizard"}, "wizard"),
        ({"$ref": "#/nowhere"}, "nowhere"),
        ({"type": "string", "pattern": "(?=x)y"}, "look-around"),
        ({"type": "string", "format": "frob"}, "frob"),
        ({"type": "integer", "minimum": 5, "maximum": 3}, "greater than maximum"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
async def test_what_cannot_be_enforced_is_refused_by_name(app: InProcess, schema: dict[str, Any], named: str) -> None:
    answer = await app.ask(response_format=form(schema))
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (400, "response_format.json_schema.schema")
    assert named in error["message"]
    assert "llguidance" not in error["message"], "our grammar's source is none of the caller's business"


@pytest.mark.parametrize(
    ("given", "param"),
    [
        ({"type": "json_schema"}, "response_format.json_schema"),
        ({"type": "json_object", "json_schema": {"name": "x", "schema": {}}}, "response_format.json_schema"),
        ({"type": "poem"}, "response_format.type"),
        ({"type": "json_schema", "json_schema": {"schema": {}}}, "response_format.json_schema.name"),
        ({"type": "json_schema", "json_schema": {"name": "x"}}, "response_format.json_schema.schema"),
        ({"type": "json_schema", "json_schema": {"name": "x", "schema": True}}, "response_format.json_schema.schema"),
    ],
    ids=str,
)
async def test_a_wrong_form_is_refused_by_name(app: InProcess, given: Any, param: str) -> None:
    answer = await app.ask(response_format=given)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(depth):
        schema = {"type": "object", "properties": {"a": schema}, "required": ["a"], "additionalProperties": False}
    return schema


@pytest.mark.parametrize(
    "schema",
    [
        many(100),
        nested(120),
        nested(400),
        {"enum": [f"value number {i}" for i in range(10_000)]},
        {"type": "object", "properties": {"x": many(20)}, "required": ["x"], "additionalProperties": False},
        {"allOf": [{"anyOf": [{"properties": {f"a{i}{j}": {}}} for j in range(10)]} for i in range(10)]},
        {"type": "string", "pattern": "(((a{1,100}){1,100}){1,100}){1,100}b"},
    ],
    ids=["many", "deep", "deeper", "large", "later", "product", "pattern"],
)
async def test_a_schema_that_explodes_hurts_nobody(app: InProcess, schema: dict[str, Any]) -> None:
    """A 400 (or, where the limits bear it, an answer), and the neighbours' answers are what they are alone."""
    texts = [f"the cat {i}" for i in range(7)]

    async def neighbour(text: str) -> str:
        found = await app.choice(messages=[{"role": "user", "content": text}], max_tokens=40, temperature=1, seed=5)
        return str(found["message"]["content"])

    alone = [await neighbour(text) for text in texts]
    beside = asyncio.gather(*map(neighbour, texts))
    answer = await app.ask(response_format=form(schema), max_tokens=60)
    assert await beside == alone
    assert answer.status_code in (200, 400), answer.text
    if answer.status_code == 400:
        assert answer.json()["error"]["message"]
    assert app.engine.stats().faults == 0


async def test_what_explodes_only_later_is_the_callers_fault_too(app: InProcess) -> None:
    later = {"type": "object", "properties": {"x": many(20)}, "required": ["x"], "additionalProperties": False}
    answer = await app.ask(response_format=form(later), max_tokens=60)
    assert (answer.status_code, answer.json()["error"]["type"]) == (400, "invalid_request_error")


async def test_nobody_waits_for_a_compilation(app: InProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    """It runs beside the event loop: others are answered meanwhile; and more than a few at once are a 429."""
    begun, go = threading.Event(), threading.Event()
    make = Grammars.make

    def slowly(self: Grammars, source: str) -> TokenGrammar:
        begun.set()
        go.wait()
        return make(self, source)

    monkeypatch.setattr(Grammars, "make", slowly)
    waiting = [asyncio.create_task(app.ask(response_format=form(PERSON), max_tokens=2)) for _ in range(16)]
    try:
        await eventually_async(begun.is_set, what="a compilation begins")
        assert (await app.ask(max_tokens=2)).status_code == 200
        refused = await app.ask(response_format=form(PERSON))
        assert (refused.status_code, refused.headers["retry-after"]) == (429, "1")
    finally:
        go.set()
    assert {answer.status_code for answer in await asyncio.gather(*waiting)} == {200}


async def test_a_compilation_has_a_bound(app: InProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    go = threading.Event()
    monkeypatch.setattr("lab_model.api.generator.COMPILE_SECONDS", 0.1)
    monkeypatch.setattr(Grammars, "make", lambda *_: go.wait())
    try:
        answer = await app.ask(response_format=form(PERSON))
    finally:
        go.set()
    assert (answer.status_code, "0.1 s" in answer.json()["error"]["message"]) == (400, True)


# The grammars alone


@pytest.fixture(scope="module")
def grammars() -> Grammars:
    return Grammars(TEXT.tokenizer, [END])


def row() -> torch.Tensor:
    return torch.zeros(tiny.VOCABULARY // 32, dtype=torch.int32)


def allowed(made: TokenGrammar) -> set[int]:
    mask = row()
    assert made.fill(mask)
    return {token for token in range(tiny.VOCABULARY) if mask[token // 32] >> token % 32 & 1}


def test_a_schema_is_compiled_once(grammars: Grammars, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []
    matcher = grammar.LLMatcher
    monkeypatch.setattr(grammar, "LLMatcher", lambda *a, **k: (made.append(a[1]), matcher(*a, **k))[1])
    source = answer_source({"type": "object", "title": "once"})
    first, second = grammars.make(source), grammars.make(source)
    assert len(made) == 1
    first.accept(TEXT.encode("{")[0])
    assert allowed(second) != allowed(first), "they share their state"
    for number in range(grammar.MOST_CACHED):
        grammars.make(answer_source({"const": number}))
    grammars.make(source)
    assert made.count(source) == 2, "the cache has no bound"


def test_only_the_end_is_allowed_when_it_is_complete(grammars: Grammars) -> None:
    """And ids beyond the tokenizer's are never allowed, though the model has logits for them."""
    made = grammars.make(answer_source({"const": "ab"}))
    for token in TEXT.encode('"ab"'):
        assert token in allowed(made)
        assert max(allowed(made)) < TEXT.vocab_size
        made.accept(token)
    assert allowed(made) == {END}
    made.accept(END)


def test_a_wrong_token_is_a_fault_of_this_grammar_alone(grammars: Grammars) -> None:
    made, other = (grammars.make(answer_source({"const": 1})) for _ in range(2))
    with pytest.raises(GrammarError):
        made.accept(TEXT.encode("x")[0])
    assert made.fault
    assert TEXT.encode("1")[0] in allowed(other)


def test_a_schema_cannot_loosen_the_options(grammars: Grammars) -> None:
    """llguidance reads options from the schema: ours stand, so nothing is ignored and no white space is written."""
    with pytest.raises(GrammarError, match="not"):
        grammars.make(answer_source({"not": {}, "x-guidance": {"lenient": True}}))
    spaced = grammars.make(answer_source({"type": "object", "x-guidance": {"whitespace_flexible": True}}))
    spaced.accept(TEXT.encode("{")[0])
    assert TEXT.encode(" ")[0] not in allowed(spaced)


def test_a_model_without_an_end_token_has_no_structure() -> None:
    with pytest.raises(GrammarError, match="ends an answer"):
        Grammars(TEXT.tokenizer, []).make(answer_source({"type": "object"}))


@pytest.mark.parametrize(("count", "within"), [(2, True), (5, False), (30, False)])
def test_the_limits_bound_a_step(grammars: Grammars, count: int, within: bool) -> None:
    """Alternatives beyond our limits end with an error. llguidance's own limits allow five of them."""
    made = grammars.make(answer_source({"type": "object", "properties": {"x": many(count)}, "required": ["x"]}))
    with contextlib.nullcontext() if within else pytest.raises(GrammarError, match="items"):
        for token in TEXT.encode('{"x":{"p1":"a"'):
            assert token in allowed(made)
            made.accept(token)
    assert (made.fault is None) == within


def test_a_schema_has_a_largest_size() -> None:
    with pytest.raises(GrammarError, match=f"larger than {grammar.MOST_SCHEMA_BYTES} bytes"):
        answer_source(many(100))


async def test_a_structured_stream_has_logprobs_of_the_raw_distribution(app: InProcess) -> None:
    answer = await app.ask(response_format=form({"const": "a"}), logprobs=True, top_logprobs=1, stream=True)
    shown = [one for chunk in events(answer) for one in (chunk["choices"][0]["logprobs"] or {"content": []})["content"]]
    assert "".join(one["token"] for one in shown) == '"a"'
    assert shown[0]["top_logprobs"][0]["logprob"] >= shown[0]["logprob"], "the model wanted something else"
