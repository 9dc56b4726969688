"""What the pages compute: links, stored conversations, exports, surprise, guesses, bursts, savings, calls of tools."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import openai
import pytest
from lab_ui import (
    cache,
    chat,
    exports,
    history,
    limits,
    links,
    load,
    next_token,
    pages,
    prices,
    start,
    surprise,
    tasks,
    texts,
    tokens,
    tools,
)
from lab_ui import wire as wire_module
from lab_ui.answer import Alternative, Answer, Fault, Token
from lab_ui.proxy import Reply, kind
from lab_ui.session import valid_key
from lab_ui.settings import Settings
from lab_ui.status import Report

from lab.doctor import Finding, write_findings
from lab.terminal import Exit

EN = texts.load("en")


def answer(text: str, **fields: Any) -> Answer:
    """An answer after its end."""
    made = Answer(
        {"model": "m", "messages": [{"role": "user", "content": "q"}]}, None, text=text, state="done", **fields
    )
    made.end()
    return made


def turn(*columns: list[str], question: str = "q") -> chat.Turn:
    return chat.Turn(question, [[answer(text) for text in siblings] for siblings in columns])


# ---- links

LINK = links.Link("p", {"n": links.Number(1.0, 0.0, 2.0), "k": links.Number(3, 1, 9), "c": links.Choice(("a", "b")),
                        "t": links.Text("x", 5)})  # fmt: skip


@pytest.mark.parametrize(
    ("query", "state"),
    [
        ({}, {"p.n": 1.0, "p.k": 3, "p.c": "a", "p.t": "x"}),
        ({"n": "0.5", "k": "9", "c": "b", "t": "한글"}, {"p.n": 0.5, "p.k": 9, "p.c": "b", "p.t": "한글"}),
        ({"n": "2.5", "k": "1.5", "c": "z", "t": "longer"}, {"p.n": 1.0, "p.k": 3, "p.c": "a", "p.t": "x"}),
        ({"n": "nan", "k": "", "c": "", "t": ""}, {"p.n": 1.0, "p.k": 3, "p.c": "a", "p.t": ""}),
    ],
)
def test_a_link_is_read_or_its_defaults_stand(query: dict[str, str], state: dict[str, Any]) -> None:
    found: dict[str, Any] = {}
    LINK.read(query, found)
    assert found == state


def test_a_link_holds_what_differs_from_the_defaults() -> None:
    query = {"n": "0.1", "lang": "ko"}
    LINK.write(query, {"p.n": 1.0, "p.k": 4, "p.c": "b", "p.t": "too long"})
    assert query == {"lang": "ko", "k": "4", "c": "b"}
    state: dict[str, Any] = {"p.k": 5}
    LINK.read(query, state)
    assert state["p.k"] == 5  # what the reader has set stays


# ---- conversations


def test_siblings_are_kept_and_the_last_is_shown() -> None:
    one = turn(["a"], ["b"])
    one.add(0, answer("c"))
    assert [one.answer(0).text, one.answer(1).text] == ["c", "b"]  # type: ignore[union-attr]
    one.move(0, -1)
    one.move(0, -1)
    assert one.answer(0).text == "a"  # type: ignore[union-attr]
    assert one.answer(2) is None


def test_each_column_sends_its_own_answers() -> None:
    sampling = {"model": "m", "system": "", "temperature": 0.0, "top_p": 1.0, "max_tokens": 8}
    for column, text in enumerate(("a", "b", "a")):  # a column that came later goes on from the first
        sent = chat.request([turn(["a"], ["b"])], "next", sampling, column)["messages"]
        assert [each["content"] for each in sent] == ["q", text, "next"]


def test_a_stored_conversation_comes_back() -> None:
    turns = [turn(["a", "b"], ["c"]), turn(["d"])]
    turns[0].move(0, -1)
    loaded = history.load(json.loads(json.dumps(history.dump("id", turns, 2))), lambda _: None)
    assert loaded is not None
    id_, found, columns = loaded
    assert (id_, columns) == ("id", 2)
    assert [[[a.text for a in s] for s in t.answers] for t in found] == [[["a", "b"], ["c"]], [["d"]]]
    assert found[0].shown == [0, 0]
    assert all(not a.running for t in found for a in t.every)
    # An answer that still runs in this ui is found again, and goes on.
    live = answer("more")
    again = history.load(history.dump("id", turns, 1), lambda id_: live if id_ == turns[1].answers[0][0].id else None)
    assert again is not None
    assert again[1][1].answers[0][0] is live


@pytest.mark.parametrize(
    "stored",
    [None, 1, [], {}, {"id": 1, "turns": []}, {"id": "a", "turns": "x"}, {"id": "a", "turns": [1, {"question": 2}]},
     {"id": "a", "turns": [{"question": "q", "answers": [[1]], "shown": ["x"]}]}],
)  # fmt: skip
def test_what_is_no_conversation_is_left_out(stored: Any) -> None:
    assert history.load(stored, lambda _: None) is None


def test_a_stored_answer_may_have_any_shape() -> None:
    odd = {"text": 1, "state": "streaming", "started": "x", "request": [], "fault": 7, "id": None}
    loaded = history.load({"id": "a", "columns": 9, "turns": [{"question": "q", "answers": [[odd]], "shown": [5]}]},
                          lambda _: None)  # fmt: skip
    assert loaded is not None
    assert (loaded[2], loaded[1][0].answers[0][0].state) == (1, "stopped")


def test_exports_hold_the_answers_shown() -> None:
    turns = [turn(["a", "b"], ["c"])]
    lines = [json.loads(line) for line in exports.jsonl(turns).splitlines()]
    assert [line["messages"][-1] for line in lines] == [
        {"role": "assistant", "content": "b"}, {"role": "assistant", "content": "c"}
    ]  # fmt: skip
    assert "> q" in exports.markdown(turns, "t")
    notebook = json.loads(exports.notebook(turns, "t", "http://h"))
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert [cell["outputs"][0]["text"] for cell in cells] == [["b\n"], ["c\n"]]
    for cell in cells:
        compile("".join(cell["source"]), "cell", "exec")


def test_a_stored_conversation_has_its_title_its_fault_and_a_bound() -> None:
    """The fault of an answer that was broken off is one that can be repeated."""
    lost = answer("half")
    lost.state, lost.fault = "failed", Fault("timeout")
    dumped = history.dump("id", [chat.Turn("why " * 30, [[lost]])], 1)
    assert dumped["title"] == ("why " * 30)[:80]
    loaded = history.load(dumped, lambda _: None)
    assert loaded is not None
    assert loaded[1][0].answers[0][0].fault == Fault("interrupted")
    many = history.load(history.dump("id", [turn(["a"] * 30, question=str(n)) for n in range(250)], 1), lambda _: None)
    assert many is not None
    assert [each.question for each in many[1]] == [str(n) for n in range(50, 250)], "the newest"
    assert len(many[1][0].answers[0]) == history.MAX_SIBLINGS


# ---- tokens

HANGUL = "한".encode()
SPLIT = [Token("\ufffd", -1.0, HANGUL[:2]), Token("\ufffd", -1.0, HANGUL[2:])]


def test_a_syllable_that_is_cut_over_tokens_is_shown_as_bytes() -> None:
    shown = surprise.view(SPLIT)
    assert [each["text"] for each in shown] == ["ed 95", "9c"]
    assert all(each["raw"] for each in shown)
    assert surprise.text_of(SPLIT) == "한"
    assert surprise.mean_bits(SPLIT) == pytest.approx(1.4427, abs=1e-4)


def test_an_alternative_takes_the_tokens_place() -> None:
    token = Token(" Paris", -0.1, b" Paris", (Alternative(" Paris", -0.1, b" Paris"), Alternative(" Rome", -3.0, b"")))
    other = surprise.chosen(token, 1)
    assert (other.text, other.logprob, other.top) == (" Rome", -3.0, token.top)
    body = chat.continuation({"model": "m", "temperature": 0, "max_tokens": 8}, [1, 2], [3])
    assert (body["prompt"], body["max_tokens"]) == ([1, 2, 3], 7)


def test_what_a_tokenizer_gives_is_read_as_data() -> None:
    body = {
        "tokens": [
            {"id": 1, "text": None, "bytes": [237, 149]},
            {"id": "x"},
            7,
            {"id": 2, "text": " a", "bytes": [300]},
        ]
    }
    found = tokens.cut("m", "한 a", body)
    assert [piece.label for piece in found.pieces] == ["ed 95", "␣a"]
    assert (found.split, found.bytes, found.characters) == (1, 5, 3)
    assert wire_module.pieces({"tokens": "no list"}) == []
    assert tokens.ratio(found, tokens.cut("m", "", {})) is None


@pytest.mark.parametrize(
    ("guess", "rank"),
    [("Paris", 1), ("paris!", 1), ("the", 2), ("Lond", None), ("London", 3), ("", None), ("Berlin", None)],
)
def test_a_guess_is_found_among_the_candidates(guess: str, rank: int | None) -> None:
    found = next_token.candidates(
        {"tokens": [{"id": n, "text": text, "bytes": []} for n, text in enumerate((" Paris", " the", " Londo", " B"))]}
    )
    assert next_token.rank_of(guess, found) == rank


# ---- cache


def test_changes_of_a_request_say_whether_they_change_the_key() -> None:
    """Each one changes the request, and none by accident more than it says."""
    body = cache.chat_body("m", "Hi")
    for change in cache.CHANGES:
        other = cache.changed(body, change, "alias")
        assert json.dumps(other) != json.dumps(body)
        assert body == cache.chat_body("m", "Hi")


def test_each_part_of_cache_status_is_explained() -> None:
    parts = cache.header_parts('llm-lab; hit; ttl=41; key="a;b"', EN)
    assert [name for name, _ in parts] == ["llm-lab", "hit", "ttl=41", 'key="a;b"']
    assert all(meaning for _, meaning in parts)
    assert "41" in parts[2][1]
    assert cache.header_parts("llm-lab; fwd=bypass; detail=sampled", EN)[1][1] == EN("cache.part.fwd_bypass")


def test_values_are_found_at_paths() -> None:
    body = {"messages": [{"content": "é"}], "n": 1}
    assert [cache.at(body, path) for path in ("messages[0].content", "n", "messages[3].x", "none")] == [
        '"é"',
        "1",
        "–",
        "–",
    ]


def test_phases_of_another_shape_are_left_out() -> None:
    phases = cache.reported_phases({"phases": [{"name": "redis", "start_ms": 1, "ms": 2.5}, {"name": 1}, "x"]})
    assert [(each.name, each.begin, each.end) for each in phases] == [("redis", 1.0, 3.5)]


def test_many_calls_are_summed_by_the_caches_state() -> None:
    def reply(status: str, seconds: float) -> Reply:
        return Reply({}, {"cache-status": status}, seconds)

    calls = cache.Calls(
        [reply("llm-lab; fwd=miss; stored", 1.0), reply("llm-lab; hit; ttl=1", 0.01), Fault("busy", 429)]
    )
    assert dict(calls.states) == {"miss": 1, "hit": 1, "busy": 1}
    assert calls.figures(EN)[EN("cache.faster")] == "100×"
    assert [state for _, _, state, _ in calls.dots(EN)] == ["cache miss", "cache hit"]


# ---- limits


def test_a_client_waits_as_long_as_it_is_told_and_gives_up() -> None:
    waits: list[float] = []
    refused = Fault("limited", 429, retry_after="3")
    answers = iter([refused, refused, Reply({}, {}, 0.1)])
    tries = limits.burst(1, lambda: next(answers), waits.append)
    assert [each.outcome for each in tries] == ["limited", "limited", "ok"]
    assert waits == [3.0, 3.0]
    waits.clear()
    assert len(limits.burst(1, lambda: Fault("limited", 429), waits.append)) == limits.MAX_TRIES
    assert waits == [1.0, 2.0, 4.0]
    assert len(limits.burst(1, lambda: Fault("limited", 429, retry_after="3600"), waits.append)) == 1
    assert len(limits.burst(1, lambda: Fault("model_down", 503, retry_after="1"), waits.append)) == 1


def test_gauges_come_from_the_headers_and_the_budget() -> None:
    headers = {"x-ratelimit-limit-requests": "6", "x-ratelimit-remaining-requests": "2",
               "x-ratelimit-limit-tokens": "many", "x-ratelimit-remaining-tokens": "1"}  # fmt: skip
    assert [(each.name, each.share) for each in limits.gauges(headers)] == [("requests", 2 / 6)]
    usage = {"budget_usd": {"per_day": {"limit": 2.0, "left": 0.5}, "total": {"limit": None}, "x": 1}}
    assert [(each.name, each.share) for each in limits.budgets(usage)] == [("per_day", 0.25)]


def test_each_measure_saves_what_it_says() -> None:
    asked = [limits.Asked(easy=True, hit=False, prompt=100, completion=10, shorter_prompt=40),
             limits.Asked(easy=True, hit=True, prompt=100, completion=10, shorter_prompt=40)]  # fmt: skip
    found = dict(limits.savings(asked, prices.Price(1.0, 2.0), prices.Price(0.5, 1.0)))
    assert found == pytest.approx(
        {"nothing": 0.24, "shorter": 0.12, "batch": 0.12, "routing": 0.12, "cache": 0.12, "all": 0.015}
    )


TABLE = {
    "upstreams": [
        {"upstream": "openai", "source": "https://h", "checked": "2026-11-01",
         "models": {"gpt-a": {"input": 2.0, "cached": 1.0, "output": 8.0}, "gpt-b": {"input": 1.0, "output": 1.0}}},
        {"upstream": "other", "models": {"gpt-b": {"input": 9.0, "output": 9.0}, "*": {"input": 0.0, "output": 0.0}}},
        {"upstream": "odd", "models": {"gpt-c": {"input": "x"}}}, 7,
    ]
}  # fmt: skip


def test_a_price_is_found_by_the_models_name() -> None:
    """A dated version has its model's; two upstreams with different ones have none; every row is listed."""
    price = prices.Price(2.0, 8.0, 1.0)
    assert prices.price_of(TABLE, "gpt-a") == prices.price_of(TABLE, "gpt-a-2026-01-31") == price
    assert [prices.price_of(TABLE, name) for name in ("gpt-b", "gpt-c", "gpt-d", "*x")] == [None] * 4
    assert price.cost(1000, 100, cached=400) == pytest.approx((600 * 2 + 400 * 1 + 100 * 8) / 1e6)
    assert prices.Price(2.0, 8.0).cost(1000, 100, cached=400) == pytest.approx(0.0028)
    assert prices.rows(TABLE)[0] == ("gpt-a", "2", "1", "8", "https://h", "2026-11-01")
    assert [row[0] for row in prices.rows(TABLE)] == ["gpt-a", "gpt-b", "gpt-b", "other: *", "gpt-c"]
    assert prices.rows({"upstreams": "x"}) == []


@pytest.mark.parametrize(
    ("model", "cache", "usage", "text"),
    [
        ({"local": True, "alias_of": None}, "miss", (10, 5), EN("figures.free")),
        ({"local": False, "alias_of": None}, "hit", (1000, 100), "$0"),
        ({"local": False, "alias_of": None}, "miss", (1000, 100), "$0.0028"),
        ({"local": False, "alias_of": "gpt-a-2026-01-31"}, "bypass", (1000, 100), "$0.0028"),
        ({"local": False, "alias_of": "unknown"}, "miss", (1000, 100), EN("figures.no_price")),
        (None, None, (None, None), ""),
    ],
)
def test_an_answers_cost_is_that_of_its_own_upstream_call(
    model: Any, cache: str | None, usage: tuple[int | None, int | None], text: str
) -> None:
    made = answer("x", cache=cache, prompt_tokens=usage[0], completion_tokens=usage[1])
    made.request = {"model": "gpt-a"}
    assert chat.cost_text(made, model, lambda: TABLE, EN) == text


# ---- tools and tasks


@pytest.mark.parametrize(("text", "value"), [("17 * 23", 391), ("-(2+3)/2", -2.5), ("1e3", 1000)])
def test_the_calculator_computes(text: str, value: float) -> None:
    assert tools.calculate(text) == value


@pytest.mark.parametrize("text", ["__import__('os')", "9**9**9", "a", "1/0", "", "(" * 300, "1 if 1 else 2"])
def test_the_calculator_does_nothing_else(text: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        tools.calculate(text)


def test_a_call_and_its_result_become_the_second_request() -> None:
    first = tools.request("m", "q", tools.EXAMPLES["weather"].schema, "required")
    message = {
        "content": None,
        "tool_calls": [{"id": "c", "function": {"name": "get_weather", "arguments": '{"city": "Seoul"}'}}],
    }
    call = tools.call_of(message)
    assert call == tools.Call("c", "get_weather", '{"city": "Seoul"}', {"city": "Seoul"})
    second = tools.with_result(first, message, call, "rain")
    assert [each["role"] for each in second["messages"]] == ["user", "assistant", "tool"]
    assert (second["tool_choice"], first["messages"][-1]["role"]) == ("none", "user")
    assert tools.EXAMPLES["weather"].run(call.arguments or {}) == "12 °C, light rain"
    cut = {"tool_calls": [{"id": "c", "function": {"name": "f", "arguments": '{"city": '}}]}
    assert tools.call_of(cut) == tools.Call("c", "f", '{"city": ', None)
    for odd in ({}, {"tool_calls": None}, {"tool_calls": [{}]}):
        assert tools.call_of(odd) is None


def test_accuracy_counts_right_labels() -> None:
    body = {"results": [[{"label": "POSITIVE", "score": 0.9}], [{"label": "positive", "score": 0.9}], [], "x"]}
    assert tasks.accuracy(tasks.labels(body), [True, False, True, True]) == (1, 2)
    assert tasks.answer({"results": [{"answer": "Busan", "score": 0.5}]}) == ("Busan", 0.5)
    assert tasks.answer({}) == ("", 0.0)
    assert [len(each) for each in tasks.SENTENCES.values()] == [12, 12]


def test_the_exceptions_shown_are_those_of_todays_packages() -> None:
    with pytest.raises(Exception, match=r".") as removed:
        openai.ChatCompletion.create(model="gpt-3.5-turbo", messages=[])  # type: ignore[attr-defined]
    shown = tasks.LESSONS["chat"].error
    assert shown.removeprefix("APIRemovedInV1: ") in " ".join(str(removed.value).split())
    from transformers import pipeline

    with pytest.raises(KeyError) as gone:
        pipeline("question-answering")
    assert tasks.LESSONS["question"].error.removeprefix("KeyError: ") in gone.value.args[0]
    for lesson in tasks.LESSONS.values():
        compile(lesson.code, "then", "exec")
        compile(lesson.now, "now", "exec")


# ---- models on the status page


def test_each_state_of_a_model_has_its_word_and_its_button() -> None:
    card = {"id": "m", "kind": "chat", "load": "demand", "licence": "MIT", "languages": ["en"], "disk_bytes": 2**20}
    loading = card | {"state": "loading", "progress": {"what": "reads weights", "percent": 40}}
    states = [loading, card | {"state": "ready"}, card | {"state": "unloaded"}, card | {"state": "failed"},
              card | {"state": "absent"}, {"id": "old", "state": "ready"}]  # fmt: skip
    adding = {"name": "korean", "state": "loading", "progress": {"what": "downloads", "percent": None}}
    report = Report({"model": {"models": states, "adding": adding}}, Settings(), EN)
    assert [(each.state, each.action) for each in report.models] == [
        ("loading", ""),
        ("up", "unload"),
        ("unloaded", "load"),
        ("down", "load"),
        ("absent", ""),
        ("up", ""),
    ]
    assert (report.models[0].step, report.models[0].share) == ("reads weights", 0.4)
    assert "1.0 MiB" in report.models[0].facts
    assert report.adding is not None
    assert (report.adding.id, report.adding.step, report.adding.share) == ("korean", "downloads", None)
    done = Report({"model": {"adding": adding | {"state": "done"}}}, Settings(), EN).adding
    assert done is not None
    assert done.state == "up"


def test_replicas_and_queue_are_shown_as_far_as_they_are_known() -> None:
    entries = [
        {"id": "m", "state": "ready", "replicas": 2, "running": 1, "waiting": 1300},
        {"id": "n", "replicas": "x"},
    ]
    models = Report({"model": {"models": entries}}, Settings(), EN).models
    assert [each.queue for each in models] == ["replicas: 2 · running: 1 · in the queue: 1,300", ""]


# ---- the doctor's findings


def test_the_doctors_findings_are_read_and_anything_else_says_where_to_run_it(tmp_path: Path) -> None:
    path = tmp_path / "doctor.json"
    found = [Finding(Exit.DISK, "0.5 GiB are free at /tmp", "logs need $1", "free ![x](http://h) some", stops=False)]
    assert start.doctors_findings(None, EN) == start.doctors_findings(path, EN) == ([], EN("start.doctor.run"))
    write_findings(path, found)
    shown, line = start.doctors_findings(path, EN)
    assert shown == ["**0.5 GiB are free at /tmp**: logs need \\$1; free !\\[x](http://h) some."]
    assert line.startswith(EN("start.doctor.looked", time="")[:20])
    write_findings(path, [])
    shown, line = start.doctors_findings(path, EN)
    assert (shown, "found nothing" in line) == ([], True)
    for odd in ("", "[]", '{"at": "x", "findings": []}', '{"at": 1, "findings": [1]}', '{"at": 1e99, "findings": []}'):
        path.write_text(odd)
        assert start.doctors_findings(path, EN) == ([], EN("start.doctor.run"))


# ---- faults and keys


@pytest.mark.parametrize(
    ("status", "code", "key", "wanted"),
    [(401, "invalid_api_key", None, "key_needed"), (401, "invalid_api_key", "sk-x", "key_invalid"),
     (403, "model_not_allowed", "sk-x", "model_not_allowed"), (403, "other", "sk-x", "refused"),
     (421, "host_not_allowed", None, "wrong_host"), (429, "rate_limit_exceeded", "sk-x", "limited"),
     (429, "insufficient_quota", "sk-x", "budget"), (429, "queue_full", None, "busy"),
     (503, "draining", None, "draining"), (503, "keys_unavailable", "sk-x", "keys_unavailable"),
     (503, "upstream_unavailable", None, "model_down"), (504, "upstream_timeout", None, "timeout"),
     (400, "context_length_exceeded", None, "too_long"), (400, None, None, "rejected"),
     (500, None, None, "upstream_error")],
)  # fmt: skip
def test_each_refusal_has_its_cause(status: int, code: str | None, key: str | None, wanted: str) -> None:
    assert kind(status, code, key) == wanted
    for language in texts.LANGUAGES:
        words = texts.load(language)
        assert f"faults.{wanted}.what" in words
        assert f"faults.{wanted}.do" in words


@pytest.mark.parametrize(
    ("key", "valid"),
    [("sk-lab-1", True), ("", False), ("a b", False), ("a\nb", False), ("키", False), ("x" * 513, False)],
)
def test_a_key_is_a_token(key: str, valid: bool) -> None:
    assert valid_key(key) == valid


def test_every_page_has_its_texts() -> None:
    for language in texts.LANGUAGES:
        words = texts.load(language)
        for page in pages.PAGES:
            assert f"nav.{page.name}" in words
            assert f"{page.name}.title" in words
            assert page.name == "start" or f"start.page.{page.name}" in words


def test_korean_is_offered_where_a_model_has_none() -> None:
    assert chat.speaks_korean({"languages": None})
    assert chat.speaks_korean({"languages": ["en", "ko"]})
    assert not chat.speaks_korean({"languages": ["en"]})


def test_completions_tokens_are_read_as_well() -> None:
    from lab_ui.proxy import _tokens

    old = SimpleNamespace(tokens=[" a"], token_logprobs=[-0.5], top_logprobs=[{" a": -0.5, " b": -1.5}])
    (token,) = _tokens(old)
    assert (token.text, token.logprob, [each.text for each in token.top]) == (" a", -0.5, [" a", " b"])
    assert _tokens(None) == []


# ---- the load page


def test_finished_runs_are_read_and_those_of_several_workloads_left_out() -> None:
    metrics = {"ttft_seconds": {"p50": 0.2}, "end_to_end_seconds": {"count": 0}}
    figures = {"workload": {"sha256": "ab"}, "requests_per_second": 3, "output_tokens_per_second": 40.5,
               "metrics": metrics, "hit_ratio": {"measured": 0.5}}  # fmt: skip
    summary = {"name": "caching-1", "trusted": True, "sums": {"holds": True}, "results": {"caching": figures}}
    run = load.read_finished(summary)
    assert run == load.Finished("caching-1", "caching", "ab", True, True, 3, 40.5, 0.2, None, 0.5)
    assert load.read_finished(summary | {"results": {"caching": figures, "throughput": figures}}) is None
    assert load.read_finished({"name": "of another version"}) is None
    assert load.ratio(2, 3) == 0.5
    assert load.ratio(None, 3) is None


def test_a_series_has_the_moments_that_have_a_value() -> None:
    progress = [{"seconds": 1, "queue": None}, {"seconds": 2, "queue": 3}, {"queue": 4}]
    assert load.series(progress, "queue") == [(2, 3)]
