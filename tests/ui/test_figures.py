"""Figures and rows behind the charts, tables and files of the pages, value by value."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from lab_ui import (
    cache,
    charts,
    chat,
    exports,
    formats,
    layers,
    limits,
    links,
    next_token,
    snippets,
    start,
    surprise,
    tasks,
    texts,
    tokens,
    wire,
)
from lab_ui.answer import Alternative, Answer, Token
from lab_ui.proxy import Reply
from lab_ui.settings import Settings
from lab_ui.status import Report

EN = texts.load("en")


def answer(text: str, request: dict[str, Any], **fields: Any) -> Answer:
    """An answer after its end."""
    made = Answer(request, None, text=text, state="done", **fields)
    made.end()
    return made


# ---- surprise

QUARTER = Token(
    " a", math.log(1 / 4), b" a", (Alternative(" b", math.log(1 / 2), b" b"), Alternative(" a", math.log(1 / 4), b" a"))
)


def test_a_tokens_colour_is_its_surprise_in_bits() -> None:
    common, rare = surprise.view([QUARTER, Token("x", -100.0)])
    assert (common["bits"], common["share"]) == (2.0, 2 / surprise.FULL)
    assert common["p"] == pytest.approx(1 / 4)
    assert [(each["text"], each["p"], each["chosen"]) for each in common["top"]] == [
        (" b", pytest.approx(1 / 2), False), (" a", pytest.approx(1 / 4), True)
    ]  # fmt: skip
    assert rare["share"] == 1.0


def test_mean_surprise_and_perplexity_belong_together() -> None:
    """2 bits and 4 bits are 3 in the mean, and as much as a choice among 8."""
    text = [QUARTER, Token("x", math.log(1 / 16))]
    assert surprise.mean_bits(text) == pytest.approx(3)
    assert surprise.perplexity(text) == pytest.approx(8)
    assert surprise.mean_bits([]) is surprise.perplexity([]) is None
    assert surprise.chosen(QUARTER, 0) == Token(" b", math.log(1 / 2), b" b", QUARTER.top)


# ---- tokens as the model service gives them

ENTRIES = [{"id": 5, "text": "a\n", "bytes": [97, 10]}, {"id": 6, "text": None, "bytes": [237]},
           {"id": 7, "text": None, "bytes": [149]}, {"id": 8, "text": "", "bytes": []},
           {"id": 9, "text": "b", "bytes": [98]}]  # fmt: skip


def test_a_cut_counts_tokens_bytes_and_parts_of_characters() -> None:
    found = tokens.cut("m", "가a", {"tokens": ENTRIES})
    assert (found.count, found.characters, found.bytes, found.split) == (5, 2, 4, 2)
    assert [each.label for each in found.pieces] == ["a↵", "ed", "95", "∅", "b"]
    assert tokens.ratio(found, tokens.cut("m", "", {"tokens": ENTRIES[:2]})) == 2.5


def test_tokenizers_are_those_of_models_in_memory_and_openais() -> None:
    listing = {"data": [{"id": "m", "kind": "chat"}, {"id": "alias", "kind": "chat", "alias_of": "m"},
                        {"id": "n", "kind": "chat", "state": "unloaded"}, {"id": "gpt-x"}, 7]}  # fmt: skip
    assert tokens.tokenizers(listing) == ["m", *wire.TOKENIZERS]
    assert tokens.body("m", "x") == {"text": "x", "add_special_tokens": False, "model": "m"}
    assert tokens.body("o200k_base", "x")["tokenizer"] == "o200k_base"


def test_numbers_that_are_none_have_their_default() -> None:
    assert [wire.number(entry, "a", 1.5) for entry in ({"a": math.nan}, {"a": "2"}, {})] == [1.5] * 3
    assert wire.number({"a": 2}, "a") == 2.0


def test_steps_come_with_the_ids_of_their_alternatives() -> None:
    step = {"id": 5, "text": "a", "bytes": [97], "logprob": -0.5,
            "alternatives": [{"id": 5, "text": "a"}, {"id": "x"}, {"id": 9, "text": None}]}  # fmt: skip
    ((token, ids),) = wire.scored({"steps": [step, {"id": None}]}, "steps")
    assert (token.text, token.logprob, token.data, ids) == ("a", -0.5, b"a", [5, 9])
    assert [each.text for each in token.top] == ["a", "\ufffd"]


# ---- files

REQUEST = {"model": "m", "messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "one\ntwo"}]}
TURN = chat.Turn("one\ntwo", [
    [answer("b", REQUEST, prompt_tokens=3, completion_tokens=4, cache="miss", finish_reason="stop", request_id="r-1")],
    [answer("c", {"model": "n", "prompt": [1, 2]})],
])  # fmt: skip


def test_markdown_quotes_every_line_and_names_each_column() -> None:
    written = exports.markdown([TURN], "one\n# two")
    assert written.startswith("# one # two\n")
    assert "> one\n> two\n" in written
    assert ["**A: m**" in written, "**B: n**" in written] == [True, True]
    assert "**m**" in exports.markdown([chat.Turn("q", TURN.answers[:1])], "t")


def test_jsonl_has_the_figures_beside_the_messages() -> None:
    first, second = (json.loads(line) for line in exports.jsonl([TURN]).splitlines())
    assert first["metadata"] == {
        "model": "m", "finish_reason": "stop", "cache": "miss", "prompt_tokens": 3, "completion_tokens": 4,
        "ttft_seconds": None, "request_id": "r-1",
    }  # fmt: skip
    assert [each["role"] for each in first["messages"]] == ["system", "user", "assistant"]
    assert second["messages"] == [{"role": "assistant", "content": "c"}]


def test_a_notebook_has_a_cell_for_each_question_that_can_be_asked_again() -> None:
    cells = json.loads(exports.notebook([TURN, TURN], "a\nb", "http://h"))["cells"]
    assert [cell["cell_type"] for cell in cells] == ["markdown", "code", "code"]  # none for a continued answer
    assert len({cell["id"] for cell in cells}) == 3
    assert "".join(cells[0]["source"]).startswith("# a b\n")


def test_langchains_roles_are_its_own() -> None:
    messages = [*REQUEST["messages"], {"role": "assistant", "content": "x"}, {"role": "tool", "content": "y"}]
    code = snippets.langchain({"model": "m", "messages": messages, "temperature": 0}, "http://h")
    for line in ('("system", "s")', '("human", "one\\ntwo")', '("ai", "x")', '{"role": "tool", "content": "y"}'):
        assert f"    {line}," in code
    assert "    temperature=0," in code


# ---- next token, layers


def test_the_score_counts_first_and_five_apart() -> None:
    score = next_token.Score()
    for rank in (1, 5, 6, None):
        score.count(rank)
    assert (score.rounds, score.first, score.five) == (4, 1, 2)


def test_a_candidate_has_three_probabilities() -> None:
    entry = {"id": 1, "text": " a", "bytes": [32, 97], "probability": 0.5, "after_temperature": 0.6,
             "after_filters": 0.7, "cut_by": "top_p"}  # fmt: skip
    (found,) = next_token.candidates({"tokens": [entry, {"id": "x"}]})
    assert (found.probability, found.heated, found.final, found.cut_by) == (0.5, 0.6, 0.7, "top_p")
    assert next_token.text_after("See", [found.piece, wire.Piece(2, "b", b"")]) == "See ab"


A, B = wire.Piece(1, "a", b"a"), wire.Piece(2, "b", b"b")


def test_a_lens_has_a_cell_for_each_layer_and_place_and_pins_one_token() -> None:
    def entry(piece: wire.Piece, share: float) -> dict[str, Any]:
        return {"id": piece.id, "text": piece.text, "bytes": [*piece.data], "probability": share}

    body = {"tokens": [entry(A, 0), entry(B, 0)],
            "layers": [[[entry(A, 0.6), entry(B, 0.1)], [entry(B, 0.9)]], [[entry(B, 0.8)], []], "x"]}  # fmt: skip
    text, found = layers.lens(body)
    assert layers.cells(text, found) == [("1 a", "0", 0.6, "a"), ("2 b", "0", 0.9, "b"), ("1 a", "1", 0.8, "b")]
    assert layers.pinned(found, 0, B) == [("0", 0.1, "10.0% (a)"), ("1", 0.8, "80.0% (b)"), ("2", 0.0, "0.0% (–)")]


def test_attention_is_the_mean_over_heads_and_looks_back_alone() -> None:
    _, heads, count = layers.attention({"layers": 3, "heads": [[[1.0, 0.0], [0.25, 0.75]], [[1.0, 0.0], [0.75, 0.25]]]})
    assert (layers.mean(heads), count) == ([[1.0, 0.0], [0.5, 0.5]], 3)
    assert layers.attended([A, B], layers.mean(heads)) == [
        ("1 a", "1 a", 1.0, "100.0%"), ("1 a", "2 b", 0.5, "50.0%"), ("2 b", "2 b", 0.5, "50.0%")
    ]  # fmt: skip
    assert layers.mean([]) == []


# ---- cache, limits, tasks


def test_a_change_is_no_more_than_it_says() -> None:
    body = cache.chat_body("m", "Hi")
    assert cache.changed(body, "space")["messages"][0]["content"] == "Hi "
    assert cache.changed(body, "default") == body | {"n": 1, "presence_penalty": 0}
    assert cache.changed(body, "model", "alias") == body | {"model": "alias"}
    assert cache.changed(body, "model") == body
    assert list(cache.changed(body, "order")) == [*reversed(body)]


def test_phases_that_the_page_measured_begin_with_its_request() -> None:
    made = answer("x", {}, started=10.0, first=10.5, last=11.0)
    made.ended = 11.25
    assert [(each.name, each.begin, each.length) for each in cache.measured_phases(made)] == [
        ("to_first", 0, 500), ("decode", 500, 500), ("end", 1000, 250)
    ]  # fmt: skip
    assert cache.measured_phases(answer("", {})) == []


def test_a_field_of_json_is_an_object_or_nothing() -> None:
    assert cache.parse_body('{"a": 1}') == {"a": 1}
    assert [cache.parse_body(text) for text in ("[1]", "1", "", "{", "[" * 100_000)] == [None] * 5
    dots = cache.Calls([Reply({}, {"cache-status": "llm-lab; hit"}, 0.5)]).dots(EN)
    assert dots == [(1, 500.0, "cache hit", "500 ms")]


def test_a_gauge_knows_when_it_is_full_again() -> None:
    headers = {f"x-ratelimit-{what}-requests": value for what, value in
               (("limit", "4"), ("remaining", "1"), ("reset", "15s"))}  # fmt: skip
    assert limits.gauges(headers) == [limits.Gauge("requests", 4.0, 1.0, "15s")]
    assert limits.Gauge("requests", 0.0, 1.0, "").share == 0.0


def test_the_batch_editor_takes_so_many_lines() -> None:
    assert tasks.lines(" a \n\nb") == ["a", "b"]
    assert len(tasks.lines("a\n" * 500)) == tasks.MAX_LINES


def test_a_number_in_a_link_is_short() -> None:
    link = links.Link("p", {"n": links.Number(1.0, 0.0, 2.0)})
    query: dict[str, str] = {}
    link.write(query, {"p.n": 0.25})
    assert query == {"n": "0.25"}


# ---- charts and numbers


def test_a_chart_has_its_rows_as_a_table() -> None:
    waterfall = charts.spans([("redis", 1.0, 3.5, "2.5 ms")], words="w", label="Phase", value="ms")
    assert (waterfall.alt, list(waterfall.head), list(waterfall.rows)) == ("w", ["Phase", "ms"], [("redis", "2.5 ms")])
    drawn = waterfall.altair.to_dict()
    assert (drawn["encoding"]["x"]["field"], drawn["encoding"]["x2"]["field"]) == ("begin", "end")
    whole = charts.bars([("a", 0.5, "50%")], words="w", label="l", value="v", domain=1.0)
    assert whole.altair.to_dict()["encoding"]["x"]["scale"] == {"domain": [0, 1.0]}
    assert list(whole.rows) == [("a", "50%")]
    pair = charts.pairs([("a", "s", 1.0, "1"), ("a", "t", 2.0, "2")], words="w", label="l", series="s", value="v")
    assert list(pair.rows) == [("a", "s", "1"), ("a", "t", "2")]


@pytest.mark.parametrize(
    ("shown", "text"),
    [(formats.milliseconds(0.00042), "0.42"), (formats.milliseconds(0.0081), "8.1"),
     (formats.milliseconds(1.234), "1,234"), (formats.dollars(0), "0"), (formats.dollars(0.00012), "0.00012"),
     (formats.dollars(0.15), "0.15"),
     (formats.dollars(1234), "1,234.00"), (formats.dollars(0.00000012), "0.00000012"),
     (formats.size(512), "512 B"), (formats.size(1.5 * 2**20), "1.5 MiB"), (formats.size(2**31), "2.0 GiB")],
)  # fmt: skip
def test_numbers_have_the_digits_that_say_something(shown: str, text: str) -> None:
    assert shown == text


def test_findings_name_a_failed_model_and_a_cache_that_is_off() -> None:
    up = {"state": "up"}
    failed = {"id": "m", "state": "failed", "detail": "d"}
    model = up | {"models": [failed, {"id": "n", "state": "ready"}]}
    body = {"proxy": {"version": "1"}, "redis": up, "model": model, "cache": {"enabled": False}}
    assert start.findings(Report(body, Settings(), EN), EN) == [
        f"**`m`**: {EN('status.down')} `d`", EN("status.cache_off")
    ]  # fmt: skip
