"""Tool calls: how a model hears of functions, how its calls are found, and that nothing of their marks is seen."""

from __future__ import annotations

import itertools
import json
import re
import threading
from collections.abc import AsyncIterator
from typing import Any

import jsonschema
import pytest
import tiny
import torch
from counts import cases
from hypothesis import given, settings
from hypothesis import strategies as st
from inprocess import END, InProcess, says
from lab_model.text.grammar import ANY_OBJECT, GrammarError, Grammars, TokenGrammar, answer_source
from lab_model.text.tokenizer import ModelTokenizer
from lab_model.text.tool_calls import CallParser, CallPart, ForcedToolCallParser, TextSpan, ToolCallParser, render_tools
from tiny import one_thread  # noqa: F401 - of all tests here

ARGUMENTS: dict[str, Any] = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 6}, "days": {"type": "integer", "minimum": 0, "maximum": 9}},
    "required": ["city", "days"],
    "additionalProperties": False,
}


def tool(name: str, **fields: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "description": "d", "parameters": ARGUMENTS, **fields}}


TEXT = ModelTokenizer.of(tiny.tokenizer())
TOOLS = [tool("weather"), tool("news")]
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "서울", "days": 1}}\n</tool_call>'
HERMES = (
    "{% if tools %}<|im_start|>system\n<tool_call>{{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}"
    "{% for c in m.tool_calls %}<tool_call>{{ c.function | tojson }}</tool_call>{% endfor %}<|im_end|>\n{% endfor %}"
)


@pytest.fixture
async def app() -> AsyncIterator[InProcess]:
    made = InProcess(context=4096)
    yield made
    await made.close()


def heard(calls: CallParser, pieces: list[str], *, cut_off: bool = False) -> tuple[str, list[tuple[str, str]]]:
    """The words and the (name, arguments) of calls in a text that comes in pieces."""
    parts: list[TextSpan | CallPart] = []
    for piece in pieces:
        parts += calls.push(piece)
    parts += calls.push("", last=True, cut=cut_off)
    found: list[list[str]] = []
    for part in parts:
        if isinstance(part, CallPart):
            if part.name:
                assert (part.call, part.id is not None) == (len(found), True)
                found.append([part.name, ""])
            assert part.call == len(found) - 1
            found[-1][1] += part.arguments
    return "".join(part.text for part in parts if isinstance(part, TextSpan)), [(name, said) for name, said in found]


def cut(text: str, places: list[int]) -> list[str]:
    borders = sorted({0, len(text), *(place % (len(text) + 1) for place in places)})
    return [text[a:b] for a, b in itertools.pairwise(borders)]


@pytest.mark.parametrize(
    ("text", "said", "names"),
    [
        ("no call", "no call", []),
        (CALL, "", ["weather"]),
        (f"Let me see.\n{CALL}", "Let me see.", ["weather"]),
        (f"{CALL}\n{CALL}\n", "", ["weather", "weather"]),
        (f"{CALL}\nThere.", "\nThere.", ["weather"]),
        (CALL.removesuffix("</tool_call>"), "", ["weather"]),
        ('<tool_call>[{"name": "news", "arguments": {}}, {"name": "weather", "arguments": {}}]</tool_call>', "",
         ["news", "weather"]),
        ("a < b <tool", "a < b <tool", []),
        (f"{CALL[:20]} and then", f"{CALL[:20]} and then", []),
        ('<tool_call>{"name": "nobody", "arguments": {}}</tool_call>', None, []),
        ('<tool_call>{"name": "news", "arguments": [1]}</tool_call>', None, []),
        ('<tool_call>{"name": "news", "arguments": {"a": NaN}}</tool_call>', None, []),
        ('<tool_call>{"name": "news", "arguments": {"a": "\\ud800"}}</tool_call>', None, []),
        ('<tool_call>{"name": ["news"], "arguments": {}}</tool_call>', None, []),
        ("<tool_call>" + "[" * 5000 + "</tool_call>", None, []),
        (f"<tool_call>oops</tool_call> but {CALL}", "<tool_call>oops</tool_call> but", ["weather"]),
        (f"<tool_call> {CALL}", "<tool_call>", ["weather"]),
        (" \n ", " \n ", []),
    ],
)  # fmt: skip
@settings(max_examples=cases(10, 30), deadline=None)
@given(places=st.lists(st.integers(0, 500), max_size=12))
def test_calls_are_found_however_the_text_comes(
    text: str, said: str | None, names: list[str], places: list[int]
) -> None:
    """A whole call of a known function is a call; a broken one stays the text it is."""
    words, found = heard(ToolCallParser(["weather", "news"]), cut(text, places))
    assert words == (text if said is None else said)
    assert [name for name, _ in found] == names
    for _, arguments in found:
        assert isinstance(json.loads(arguments), dict)


@settings(max_examples=cases(50, 100), deadline=None)
@given(st.lists(st.integers(0, 500), max_size=12), st.integers(0, 200))
def test_forced_calls_stream_their_arguments(places: list[int], length: int) -> None:
    """Cut anywhere, what there is of the arguments is there, and nothing of the marks."""
    arguments = '{"a":"}\\n</tool_call>","b":1}'
    text = f'<tool_call>\n{{"name":"f","arguments":{arguments}}}\n</tool_call>'
    both = f"{text}\n{text}"
    assert heard(ForcedToolCallParser(), cut(both, places)) == ("", [("f", arguments)] * 2)
    words, found = heard(ForcedToolCallParser(), cut(both[:length], places))
    assert words == ""
    for name, part in found:
        assert name == "f"
        assert arguments.startswith(part)


@settings(max_examples=cases(50, 100), deadline=None)
@given(st.lists(st.integers(0, 500), max_size=12), st.integers(0, 200))
def test_a_limit_shows_no_part_of_a_mark(places: list[int], length: int) -> None:
    """Free calls too, and a list of them: what is shown of the cut text begins what is shown of the whole one."""
    listed = '<tool_call>[{"name": "news", "arguments": {"a": [1]}}, {"name": "weather", "arguments": {}}]</tool_call>'
    for text in (f"I look.\n{CALL}\n{CALL} a < b", f"I look. {listed}"):
        words, found = heard(ToolCallParser(["weather", "news"]), [text])
        shown, begun = heard(ToolCallParser(["weather", "news"]), cut(text[:length], places), cut_off=True)
        assert words.startswith(shown.rstrip())
        assert [name for name, _ in begun] == [name for name, _ in found][: len(begun)]
        for (_, whole), (_, part) in zip(found, begun, strict=False):
            assert whole.startswith(part)
            assert part


def test_a_place_is_kept_for_what_is_said() -> None:
    calls = ToolCallParser(["weather"])
    parts = calls.push(f"one {CALL} two", last=True)
    assert [part for part in parts if isinstance(part, TextSpan)] == [("one", 0), (" two", len(f"one {CALL}"))]


@pytest.mark.parametrize("stream", [False, True])
async def test_a_call_is_a_call_in_both_modes(app: InProcess, monkeypatch: pytest.MonkeyPatch, stream: bool) -> None:
    says(monkeypatch, app, f"I look.\n{CALL}\n{CALL.replace('weather', 'news')}")
    if not stream:
        answer = await app.ask(tools=TOOLS, max_tokens=400)
        choice = answer.json()["choices"][0]
        message = choice["message"]
        assert "tool_call>" not in answer.text
        assert message["content"] == "I look."
        calls = message["tool_calls"]
    else:
        chunks = await app.chunks(tools=TOOLS, max_tokens=400)
        assert "tool_call>" not in json.dumps(chunks)
        choice = chunks[-1]["choices"][0]
        deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
        assert "".join(delta.get("content", "") for delta in deltas) == "I look."
        calls = []
        for part in [part for delta in deltas for part in delta.get("tool_calls", ())]:
            if part["index"] == len(calls):
                assert part["type"] == "function"
                calls.append({"id": part["id"], "type": "function", "function": dict(part["function"])})
            else:
                assert set(part) == {"index", "function"}
                calls[part["index"]]["function"]["arguments"] += part["function"]["arguments"]
    assert choice["finish_reason"] == "tool_calls"
    assert [call["function"]["name"] for call in calls] == ["weather", "news"]
    assert {json.loads(call["function"]["arguments"])["city"] for call in calls} == {"서울"}
    assert len({call["id"] for call in calls}) == 2
    assert all(re.fullmatch(r"call_[0-9a-f]+", call["id"]) for call in calls)


async def test_an_answer_of_calls_alone_has_no_content(app: InProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    says(monkeypatch, app, CALL)
    assert (await app.choice(tools=TOOLS, max_tokens=200))["message"]["content"] is None


async def told(app: InProcess, *, stream: bool, **fields: Any) -> tuple[str, list[str], str]:
    """Content, the arguments of each call, and finish_reason; nothing else of the answer may hold a mark."""
    if not stream:
        choice = await app.choice(tools=TOOLS, **fields)
        assert "tool_call>" not in json.dumps(choice)
        calls = [call["function"]["arguments"] for call in choice["message"].get("tool_calls", ())]
        return choice["message"]["content"] or "", calls, choice["finish_reason"]
    chunks = await app.chunks(tools=TOOLS, **fields)
    assert "tool_call>" not in json.dumps(chunks)
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    calls = []
    for part in [part for delta in deltas for part in delta.get("tool_calls", ())]:
        calls += [""] * (part["index"] + 1 - len(calls))
        calls[part["index"]] += part["function"]["arguments"]
    return "".join(delta.get("content", "") for delta in deltas), calls, chunks[-1]["choices"][0]["finish_reason"]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("forced", [False, True])
async def test_a_limit_inside_a_call_shows_a_beginning_of_its_arguments(
    app: InProcess, monkeypatch: pytest.MonkeyPatch, stream: bool, forced: bool
) -> None:
    """Wherever `max_tokens` falls: nothing of the marks, in content, arguments and logprobs."""
    call = CALL.replace('", "', '","').replace('": ', '":') if forced else CALL
    says(monkeypatch, app, call)
    asked = {"tool_choice": "required"} if forced else {}
    content, (whole,), finish = await told(app, stream=stream, max_tokens=400, **asked)
    assert (content, finish) == ("", "tool_calls")
    most = len(app.generator.text.encode(call))
    for limit in range(1, most, cases(6, 1)):
        content, calls, finish = await told(app, stream=stream, max_tokens=limit, logprobs=not stream, **asked)
        assert (content, finish) == ("", "length") or (calls == [whole] and finish == "tool_calls")
        assert all(whole.startswith(part) for part in calls)


@pytest.mark.parametrize("stream", [False, True])
async def test_stop_strings_act_on_content_alone(app: InProcess, monkeypatch: pytest.MonkeyPatch, stream: bool) -> None:
    """Not on marks, names or arguments; and what follows a stop in the content is not shown, calls neither."""
    says(monkeypatch, app, f"I look.\n{CALL}")
    stops = ["tool", "weather", "}", "\n</", "days"]
    content, (arguments,), finish = await told(app, stream=stream, max_tokens=400, stop=stops, logprobs=not stream)
    assert (content, json.loads(arguments), finish) == ("I look.", {"city": "서울", "days": 1}, "tool_calls")
    assert await told(app, stream=stream, max_tokens=400, stop="ok", logprobs=not stream) == ("I lo", [], "stop")
    # Held back as the beginning of a stop string until the end.
    content, calls, finish = await told(app, stream=stream, max_tokens=400, stop="look.!")
    assert (content, len(calls), finish) == ("I look.", 1, "tool_calls")


async def test_only_one_call_where_only_one_is_wanted(app: InProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    """The answer ends there: the engine does not go on."""
    says(monkeypatch, app, f"{CALL}\n{CALL} and much more")
    answer = await app.ask(tools=TOOLS, parallel_tool_calls=False, max_tokens=400)
    choice = answer.json()["choices"][0]
    assert (len(choice["message"]["tool_calls"]), choice["finish_reason"]) == (1, "tool_calls")
    assert answer.json()["usage"]["completion_tokens"] <= len(app.generator.text.encode(CALL)) * 3


async def test_without_tools_the_marks_are_text(app: InProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    says(monkeypatch, app, CALL)
    for fields in ({}, {"tools": TOOLS, "tool_choice": "none"}):
        assert (await app.choice(**fields, max_tokens=200))["message"]["content"] == CALL


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "news"}}], ids=str)
@pytest.mark.parametrize("seed", range(cases(1, 3)))
async def test_who_must_call_calls(app: InProcess, choice: Any, seed: int) -> None:
    """Random weights know no calls: the grammar makes them, whole and after the schema, in both modes alike."""
    asked = {"tools": TOOLS, "tool_choice": choice, "temperature": 1, "seed": seed, "max_tokens": 900}
    found = await app.choice(**asked)
    calls = found["message"]["tool_calls"]
    assert (found["finish_reason"], found["message"]["content"]) == ("tool_calls", None)
    for call in calls:
        jsonschema.validate(json.loads(call["function"]["arguments"]), ARGUMENTS)
    assert {call["function"]["name"] for call in calls} <= ({"weather", "news"} if choice == "required" else {"news"})
    assert len(calls) == 1 or choice == "required"
    chunks = await app.chunks(**asked)
    assert "tool_call>" not in json.dumps(chunks)
    fragments = [part for c in chunks for part in c["choices"][0]["delta"].get("tool_calls", ())]
    assert "".join(part["function"]["arguments"] for part in fragments) == "".join(
        call["function"]["arguments"] for call in calls
    )
    assert len(fragments) > 2 * len(calls), "arguments did not come as they were written"
    assert chunks[-1]["choices"][0]["finish_reason"] == "tool_calls"


@pytest.mark.parametrize("mode", ["required", "auto"])
async def test_only_allowed_tools_are_called(app: InProcess, monkeypatch: pytest.MonkeyPatch, mode: str) -> None:
    allowed = {"mode": mode, "tools": [{"type": "function", "function": {"name": "news"}}]}
    asked = {"tools": TOOLS, "tool_choice": {"type": "allowed_tools", "allowed_tools": allowed}}
    if mode == "auto":
        says(monkeypatch, app, f"{CALL}\n{CALL.replace('weather', 'news')}")
    found = await app.choice(**asked, temperature=1, seed=1, max_tokens=900)
    assert {call["function"]["name"] for call in found["message"]["tool_calls"]} == {"news"}
    assert found["finish_reason"] == "tool_calls"


async def test_required_with_one_call_at_most(app: InProcess) -> None:
    asked = {"tools": TOOLS, "tool_choice": "required", "parallel_tool_calls": False, "temperature": 1}
    for seed in range(4):
        found = await app.choice(**asked, seed=seed, max_tokens=900)
        assert len(found["message"]["tool_calls"]) == 1


async def test_a_function_without_parameters_takes_none(app: InProcess) -> None:
    bare = [{"type": "function", "function": {"name": "stop"}}]
    found = await app.choice(tools=bare, tool_choice="required", parallel_tool_calls=False, max_tokens=900)
    assert found["message"]["tool_calls"][0]["function"]["arguments"] == "{}"


def takes(made: TokenGrammar, text: str) -> bool:
    """Whether this grammar lets the text be said, and end there."""
    row = torch.zeros(tiny.VOCABULARY // 32, dtype=torch.int32)
    try:
        for token in [*TEXT.encode(text), END]:
            made.fill(row)
            if not row[token // 32] >> token % 32 & 1:
                return False
            made.accept(token)
    except GrammarError:
        return False
    return True


@pytest.mark.parametrize(
    ("text", "taken"),
    [
        ("no call", True),
        ("a < b <tool_ x", True),
        ('hm <tool_call>\n{"name":"weather","arguments":{"city":"Bonn","days":1}}\n</tool_call> ok', True),
        ('<tool_call>\n{"name":"news","arguments":{"any":"thing"}}\n</tool_call>', True),
        ('<tool_call>\n{"name":"weather","arguments":{"any":"thing"}}\n</tool_call>', False),
        ('<tool_call>\n{"name":"nobody","arguments":{}}\n</tool_call>', False),
        ("<tool_call> oops", False),
    ],
)
async def test_a_strict_function_is_called_by_its_schema(app: InProcess, text: str, taken: bool) -> None:
    """In a free answer too: from the mark on, nothing but a whole call of a known function can be said."""
    assert (
        takes(app.generator.grammars.make(answer_source(None, {"weather": ARGUMENTS, "news": ANY_OBJECT})), text)
        is taken
    )


async def test_strict_binds_a_free_answer(app: InProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    sources: list[str] = []
    make = Grammars.make
    monkeypatch.setattr(Grammars, "make", lambda self, source: (sources.append(source), make(self, source))[1])
    for strict in (False, True):
        assert (await app.ask(tools=[tool("weather", strict=strict)], max_tokens=3)).status_code == 200
    assert len(sources) == 1
    assert "weather" in sources[0]


async def test_an_answer_of_a_form_may_call_instead(app: InProcess) -> None:
    """response_format binds what is said; a call is still possible, and nothing else."""
    source = answer_source({"const": 1}, {"weather": ANY_OBJECT})
    call = '<tool_call>\n{"name":"weather","arguments":{}}\n</tool_call>'
    for text, taken in (("1", True), (call, True), ("2", False), (f"1{call}", False), ("<tool_call>", False)):
        assert takes(app.generator.grammars.make(source), text) is taken
    asked = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"const": 1}}}
    # A bias away from the mark: otherwise it is a matter of chance.
    found = await app.choice(
        tools=TOOLS, response_format=asked, logit_bias={str(t): -100 for t in TEXT.encode("<")}, max_tokens=60
    )
    assert found["message"] == {"role": "assistant", "content": "1", "refusal": None}


async def test_logprobs_are_of_what_is_said(app: InProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens of a call are shown nowhere: nothing of the marks leaks."""
    says(monkeypatch, app, f"I look. {CALL}")
    answer = await app.ask(tools=TOOLS, logprobs=True, max_tokens=400)
    choice = answer.json()["choices"][0]
    shown = b"".join(bytes(one["bytes"]) for one in choice["logprobs"]["content"])
    assert shown.decode() in ("I look.", "I look. ")
    assert "tool_call>" not in answer.text


CALLED = {
    "role": "assistant", "content": None,
    "tool_calls": [{"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"days": 1}'}}],
}  # fmt: skip
RESULT = {"role": "tool", "tool_call_id": "call_1", "content": "sunny"}


async def test_calls_and_results_are_taken_back(app: InProcess) -> None:
    hello = {"role": "user", "content": "hi"}
    answer = await app.ask(messages=[hello, CALLED, RESULT], tools=TOOLS, max_tokens=3)
    assert answer.status_code == 200, answer.text
    assert (await app.ask(messages=[hello, CALLED, RESULT], max_tokens=3)).status_code == 200


def test_a_template_that_knows_no_tools_is_told_in_words() -> None:
    """Hermes' form: definitions in the system message, calls and results as text, results one message."""
    said = render_tools(
        [
            {"role": "system", "content": "Be kind."},
            {"role": "user", "content": "hi"},
            {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "weather", "arguments": {}}}]},
            {"role": "tool", "content": "sunny"},
            {"role": "tool", "content": "windy"},
            {"role": "assistant", "content": "Nice."},
        ],
        TOOLS,
    )
    assert [message["role"] for message in said] == ["system", "user", "assistant", "user", "assistant"]
    assert said[0]["content"].startswith("Be kind.\n\n# Tools")
    assert all(json.dumps(one, ensure_ascii=False) in said[0]["content"] for one in TOOLS)
    assert said[2]["content"] == '<tool_call>\n{"name": "weather", "arguments": {}}\n</tool_call>'
    assert said[3]["content"].count("<tool_response>") == 2
    assert render_tools([{"role": "user", "content": "hi"}], []) == [{"role": "user", "content": "hi"}]


async def test_a_template_that_knows_tools_gets_them() -> None:
    """As objects: the template writes arguments as JSON itself."""
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = HERMES
    text = ModelTokenizer.of(tokenizer)
    assert text.takes_tools
    assert not ModelTokenizer.of(tiny.tokenizer()).takes_tools
    app = InProcess(text=text, context=4096)
    seen: list[str] = []
    encode = text.encode
    text.encode = lambda prompt, **k: (seen.append(prompt), encode(prompt, **k))[1]  # type: ignore[method-assign]
    try:
        answer = await app.ask(messages=[{"role": "user", "content": "hi"}, CALLED, RESULT], tools=TOOLS, max_tokens=2)
        assert answer.status_code == 200, answer.text
        assert '<tool_call>{"name": "weather", "arguments": {"days": 1}}</tool_call>' in seen[0]
        assert seen[0].startswith("<|im_start|>system\n<tool_call>[")
        assert "<|im_start|>tool\nsunny" in seen[0]
    finally:
        await app.close()


@pytest.mark.parametrize("size", [10, 30_000])
async def test_long_arguments_do_not_hold_up_others(size: int) -> None:
    """They are tokenized beside the event loop, like any long text; what is short is not worth the way."""
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = HERMES
    text, threads = ModelTokenizer.of(tokenizer), list[int]()
    app = InProcess(text=text, context=4096)
    chat = text.chat
    text.chat = lambda *given: (threads.append(threading.get_ident()), chat(*given))[1]  # type: ignore[method-assign]
    called = {**CALLED, "tool_calls": [{**CALLED["tool_calls"][0], "function": {"name": "f", "arguments": "x" * size}}]}
    try:
        answer = await app.ask(messages=[{"role": "user", "content": "hi"}, called, RESULT], max_tokens=2)
        assert answer.status_code == (200 if size < 4096 else 400)
        assert (threads == [threading.get_ident()]) == (size < 4096)
    finally:
        await app.close()


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "x"}}}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": "sometimes"}, "tool_choice"),
        (
            {
                "tools": TOOLS,
                "tool_choice": {
                    "type": "allowed_tools",
                    "allowed_tools": {"mode": "auto", "tools": [{"type": "function", "function": {"name": "x"}}]},
                },
            },
            "tool_choice",
        ),
        ({"tools": [tool("a b")]}, "tools[0].function.name"),
        ({"tools": [tool("a"), tool("a")]}, "tools[1].function.name"),
        ({"tools": [{"type": "retrieval"}]}, "tools[0].type"),
        ({"tools": [tool("a", parameters={"type": "string"})]}, "tools[0].function.parameters.type"),
        ({"tools": [tool("a", colour="red")]}, "tools[0].function.colour"),
        ({"tools": [tool(f"f{i}") for i in range(129)]}, "tools"),
        (
            {"tools": [tool("a"), tool("b", parameters={"not": {}})], "tool_choice": "required"},
            "tools[1].function.parameters",
        ),
        ({"tools": [tool("b", parameters={"not": {}}, strict=True)]}, "tools[0].function.parameters"),
        ({"messages": [RESULT]}, "messages[0].tool_call_id"),
        ({"messages": [CALLED, {"role": "tool", "content": "x"}]}, "messages[1].tool_call_id"),
        ({"messages": [{"role": "user", "content": "x", "tool_call_id": "y"}]}, "messages[0].tool_call_id"),
        ({"messages": [{**CALLED, "role": "user"}]}, "messages[0].tool_calls"),
        ({"messages": [{"role": "assistant", "content": None}]}, "messages[0].content"),
        ({"functions": [{"name": "f"}]}, "functions"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
async def test_what_is_wrong_with_tools_is_refused_by_name(app: InProcess, fields: dict[str, Any], param: str) -> None:
    answer = await app.ask(**fields)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param), answer.text


async def test_what_is_not_enforced_need_not_be_enforceable(app: InProcess) -> None:
    """A free call's schema is only shown to the model."""
    assert (await app.ask(tools=[tool("b", parameters={"not": {}})], max_tokens=2)).status_code == 200
