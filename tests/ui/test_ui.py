"""The ui: both pages in both languages with everything up and down, what it sends and never loads, its start."""

from __future__ import annotations

import importlib.metadata
import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import ANY, Mock

import pytest
from fixtures_ui import ALIAS, APP, CHAT, PARIS, QUESTION, StandIn, ask, click, shown, status, strips
from lab_ui import answer as module
from lab_ui import chat, formats, snippets, texts
from lab_ui.__main__ import main
from lab_ui.answer import ABANDONED_AFTER, Answer, Fault
from lab_ui.pages import PAGES
from lab_ui.proxy import Proxy, cache_state
from lab_ui.settings import Settings
from lab_ui.status import Report
from lab_ui.untrusted import plain, quote
from processes import eventually, free_port, process, python
from streamlit.testing.v1 import AppTest

LANGUAGES = list(texts.LANGUAGES)
STATUS = "app_pages/status.py"


@pytest.fixture
def proxy_client(proxy: StandIn) -> Iterator[Proxy]:
    made = Proxy(Settings(proxy_url=proxy.url))
    yield made
    made.close()


@pytest.fixture
def never_abandoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """What ends an answer is the stop, and not that nobody looks."""
    monkeypatch.setattr(module, "ABANDONED_AFTER", 3600)


# ---- words ----------------------------------------------------------------------------------------------------------


def test_both_languages_have_the_same_keys_and_placeholders() -> None:
    assert texts.load("en").placeholders == texts.load("ko").placeholders


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_text_can_be_shown(language: str) -> None:
    """Not empty, no stray `$`, and nothing left of the placeholders."""
    words = texts.load(language)
    for key, names in words.placeholders.items():
        text = words(key, **dict.fromkeys(names, "7"))
        assert text.strip(), key
        assert "$" not in text, key


def test_an_unknown_key_and_a_missing_value_are_errors() -> None:
    words = texts.load("en")
    with pytest.raises(KeyError, match=r"chat\.nothing"):
        words("chat.nothing")
    with pytest.raises(KeyError, match="seconds"):
        words("chat.writing")


def test_a_dollar_sign_can_be_written() -> None:
    assert texts.Texts("en", {"price": "$$$price"})("price", price="0.50") == "$0.50"


def test_every_text_is_used() -> None:
    """A key that no page names is dead. Parts of some keys come from data: kinds of faults, services, cache states."""
    code = "".join(path.read_text() for path in APP.parent.rglob("*.py"))
    named = set(re.findall(r"""["']([a-z_.]+)["']""", code))
    built = tuple(re.findall(r"""f["']([a-z_.]+[._]){""", code))
    for key in texts.load("en").placeholders:
        assert key in named or key.startswith(built), key


def test_numbers_as_texts_show_them() -> None:
    assert (formats.number(1234.56), formats.number(1234.56, 1)) == ("1,235", "1,234.6")
    assert (formats.short(5.0), formats.short(2.5), formats.percent(0.625)) == ("5", "2.5", "62%")


@pytest.mark.parametrize(
    ("asked", "setting", "browser", "chosen"),
    [(None, "auto", "ko-KR", "ko"), (None, "auto", "ko", "ko"), (None, "auto", "en-US", "en"),
     (None, "auto", "kok-IN", "en"), (None, "auto", "de-DE", "en"), (None, "auto", None, "en"),
     ("", "ko", "en-US", "ko"), ("", "en", "ko-KR", "en"), ("ko", "en", "en-US", "ko"), ("en", "ko", "ko-KR", "en"),
     ("xx", "auto", "ko-KR", "ko"), ("xx", "auto", "en-US", "en"), ("한국어", "auto", "en-US", "en")],
)  # fmt: skip
def test_the_language_is_the_readers_then_the_settings_then_the_browsers(
    asked: str | None, setting: str, browser: str | None, chosen: str
) -> None:
    assert texts.choose(asked, setting, browser) == chosen


@pytest.mark.usefixtures("proxy")
@pytest.mark.parametrize(
    ("asked", "browser", "shown_in"), [("ko", "en-US", "ko"), ("en", "ko-KR", "en"), ("xx", "ko-KR", "ko")]
)
def test_the_urls_language_is_shown_and_stays_on_other_pages(
    app: Callable[..., AppTest], asked: str, browser: str, shown_in: str
) -> None:
    """?lang=ko is a code; with an unknown one the browser's language is shown."""
    app("auto")
    page = AppTest.from_file(APP, default_timeout=60)
    page.query_params["lang"] = asked
    page.context = {"locale": browser}
    assert texts.load(shown_in)("start.intro") in shown(page.run())
    assert texts.load(shown_in)("status.all_up") in shown(page.switch_page(STATUS).run())
    assert page.query_params == {"lang": asked}


def test_the_switch_writes_the_code_into_the_url(app: Callable[..., AppTest]) -> None:
    page = app()
    assert page.query_params == {}
    page.sidebar.segmented_control[0].set_value("ko").run()
    assert texts.load("ko")("chat.intro") in shown(page)
    assert page.query_params == {"lang": "ko"}
    page.sidebar.segmented_control[0].set_value("en").run()
    assert texts.load("en")("chat.intro") in shown(page)
    assert page.query_params == {"lang": "en"}


# ---- pages ----------------------------------------------------------------------------------------------------------


def test_every_page_is_in_the_navigation() -> None:
    files = {f"app_pages/{path.name}" for path in APP.parent.glob("app_pages/*.py") if path.name != "__init__.py"}
    assert files == {page.file for page in PAGES}
    assert len({page.url_path for page in PAGES}) == len(PAGES)


def test_no_module_hides_another_package() -> None:
    """Streamlit puts the folder of app.py in front of all others in which Python looks for a module."""
    ours = {path.stem for path in [*APP.parent.glob("*.py"), *APP.parent.glob("*/")]} - {"__init__", "__main__"}
    assert not ours & {*sys.stdlib_module_names, *importlib.metadata.packages_distributions()}


# ---- chat -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("language", LANGUAGES)
def test_a_question_is_answered_with_its_figures(app: Callable[..., AppTest], proxy: StandIn, language: str) -> None:
    words = texts.load(language)
    page = app(language)
    assert not page.exception
    assert words("chat.honest") in shown(page)
    page = ask(page)
    assert PARIS in shown(page)
    assert proxy.requests[0] | {"stream": 0, "stream_options": 0} == {
        "model": CHAT["id"], "messages": [{"role": "user", "content": QUESTION}],
        "temperature": 0.0, "top_p": 1.0, "max_tokens": 512, "stream": 0, "stream_options": 0,
        "logprobs": True, "top_logprobs": 5,
    }  # fmt: skip
    strip = strips(page)
    assert "TTFT" in strip
    assert words("cache_state.miss") in strip
    assert f"{words('figures.tokens')} <b>37 + 6</b>" in strip
    assert page.session_state.turns[0].answer(0).request_id in strip
    # The same in a new conversation is a hit.
    click(page, words("chat.new"))
    assert words("cache_state.hit") in strips(ask(page))
    assert proxy.requests[0] == proxy.requests[1]


def test_an_example_is_one_click(app: Callable[..., AppTest], proxy: StandIn) -> None:
    page = app()
    click(page, QUESTION)
    assert PARIS in shown(page)


def test_the_conversation_and_the_settings_are_sent(app: Callable[..., AppTest], proxy: StandIn) -> None:
    page = ask(app())
    page.sidebar.text_area[0].set_value("Be brief.")
    page.sidebar.slider[0].set_value(0.7)
    page.sidebar.slider[1].set_value(0.9)
    page.sidebar.number_input[0].set_value(64)
    page.sidebar.selectbox[0].set_value(ALIAS["id"])
    ask(page, "And of Italy?")
    sent = proxy.requests[1]
    assert [message["role"] for message in sent["messages"]] == ["system", "user", "assistant", "user"]
    assert sent["messages"][2]["content"] == PARIS
    assert (sent["temperature"], sent["top_p"], sent["max_tokens"], sent["model"]) == (0.7, 0.9, 64, ALIAS["id"])


def test_only_chat_models_can_be_chosen_and_an_alias_says_so(app: Callable[..., AppTest]) -> None:
    page = app()
    assert page.sidebar.selectbox[0].options == [CHAT["id"], f"{ALIAS['id']} → {CHAT['id']}"]
    assert page.sidebar.number_input[0].max == CHAT["context"]
    upstream = {"data": [{"id": "gpt-x", "object": "model"}]}
    assert list(chat.chat_models(upstream)) == ["gpt-x"]
    assert chat.chat_models({"data": [{"id": "a", "kind": "classifier"}, "nonsense", {}]}) == {}


def answer(text: str = "", **fields: Any) -> Answer:
    """An answer as it is after its end."""
    return Answer({}, Mock(), request_id="id`7`", text=text, **fields)


def test_turns_without_a_text_are_not_sent() -> None:
    sampling = {"model": "m", "system": " ", "temperature": 0.0, "top_p": 1.0, "max_tokens": 8}
    turns = [chat.Turn("first", [[answer("one")]]), chat.Turn("lost", [[answer()]])]
    sent = [(message["role"], message["content"]) for message in chat.request(turns, "next", sampling)["messages"]]
    assert sent == [("user", "first"), ("assistant", "one"), ("user", "next")]


def test_figures_show_what_is_known() -> None:
    words = texts.load("en")
    assert chat.figures(answer(), words) == {"request": "id`7`"}
    known = answer("x", started=1.0, first=2.5, last=3.5, prompt_tokens=5, completion_tokens=2001, cache="hit")
    assert chat.figures(known, words) == {
        "TTFT": "1,500 ms", "tokens/s": "2,000.0", "tokens in + out": "5 + 2001", "cache hit": "", "request": "id`7`",
    }  # fmt: skip
    assert "new answer" in chat.figures(answer(cache="vary-miss"), words)


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize(
    ("mode", "kind"),
    [("model-down", "model_down"), ("model-loading", "model_loading"), ("error", "upstream_error"), ("busy", "busy"),
     ("too-long", "too_long"), ("interrupted", "interrupted"), ("broken-off", "interrupted")],
)  # fmt: skip
def test_a_fault_stands_in_the_answers_place(
    app: Callable[..., AppTest], proxy: StandIn, language: str, mode: Any, kind: str
) -> None:
    words = texts.load(language)
    proxy.mode = mode
    page = ask(app(language))
    assert words(f"faults.{kind}.what") in shown(page)
    seconds = {"busy": "7", "model-loading": "9"}.get(mode, "5")
    assert words(f"faults.{kind}.do", seconds=seconds) in shown(page)
    assert page.session_state.turns[0].answer(0).request_id in shown(page) + strips(page)
    if kind == "interrupted":
        assert "The capital of" in shown(page)
    # Well again: one click asks again.
    proxy.mode = "up"
    click(page, words("faults.again"))
    assert PARIS in shown(page)
    assert len(page.session_state.turns) == 1


@pytest.mark.parametrize("language", LANGUAGES)
def test_without_a_proxy_the_chat_says_what_to_do(app: Callable[..., AppTest], language: str) -> None:
    page = app(language, f"http://127.0.0.1:{free_port()}")
    assert not page.exception
    assert texts.load(language)("faults.proxy_down.do") in shown(page)
    assert page.chat_input[0].disabled


def test_a_proxy_that_hangs_does_not_hang_the_pages(app: Callable[..., AppTest], proxy: StandIn) -> None:
    """It would hang for ever."""
    proxy.mode = "hung"
    page = app(status_timeout_seconds="0.2")
    assert texts.load("en")("faults.timeout.what") in shown(page)
    assert texts.load("en")("faults.timeout.what") in shown(page.switch_page(STATUS).run())


def test_something_else_on_the_proxys_port_is_named(app: Callable[..., AppTest], proxy: StandIn) -> None:
    assert texts.load("en")("faults.not_the_proxy.what") in shown(app(url=proxy.url + "/elsewhere"))


# ---- keys -----------------------------------------------------------------------------------------------------------


def test_a_key_goes_with_every_call(proxy_client: Proxy, proxy: StandIn) -> None:
    for key, sent in (("sk-of-a-reader", "Bearer sk-of-a-reader"), (None, None)):
        proxy.keys.clear()
        proxy_client.models(key)
        proxy_client.status(key)
        assert proxy_client.ask(request(), key).wait(60)
        authorization = sent or "Bearer local"  # the OpenAI client always sends one
        assert proxy.keys == [("/v1/models", sent), ("/status", sent), ("/v1/chat/completions", authorization)]


def test_the_pages_pass_the_sessions_key(app: Callable[..., AppTest], proxy: StandIn) -> None:
    page = ask(app(api_key="sk-of-a-reader"))
    assert "sk-of-a-reader" not in shown(page)
    page.switch_page(STATUS).run()
    assert {path for path, _ in proxy.keys} == {"/v1/models", "/status", "/v1/chat/completions"}
    assert {key for _, key in proxy.keys} == {"Bearer sk-of-a-reader"}


def test_a_proxy_that_wants_a_key_is_not_taken_for_another_program(
    app: Callable[..., AppTest], proxy_client: Proxy, proxy: StandIn
) -> None:
    proxy.mode = "refusing"
    refused = Fault("key_needed", 401, "no key", code="invalid_api_key", request_id=ANY)
    assert proxy_client.models() == refused
    assert proxy_client.status() == refused
    assert texts.load("en")("faults.key_needed.what") in shown(app())


# ---- stop -----------------------------------------------------------------------------------------------------------


def request(**changes: Any) -> dict[str, Any]:
    return {"model": CHAT["id"], "messages": [{"role": "user", "content": QUESTION}], "max_tokens": 8} | changes


@pytest.mark.usefixtures("never_abandoned")
@pytest.mark.parametrize("mode", ["silent", "endless"])
def test_stop_closes_the_connection(proxy_client: Proxy, proxy: StandIn, mode: Any) -> None:
    """Of an answer without an end, before the first token as well as after it; what came stays."""
    proxy.mode = mode
    answer = proxy_client.ask(request())
    eventually(lambda: proxy.requests if mode == "silent" else answer.text)
    answer.stop()
    eventually(lambda: not answer.running)
    eventually(lambda: proxy.left)
    assert answer.state == "stopped"
    assert bool(answer.text) == (mode == "endless")


@pytest.mark.usefixtures("never_abandoned")
def test_the_phase_of_a_waiting_answer_is_the_one_that_the_proxy_reports(proxy_client: Proxy, proxy: StandIn) -> None:
    """Queue, then prefill; asked by the answer's own request id and with the reader's key."""
    proxy.mode = "silent"
    answer = proxy_client.ask(request(), "sk-reader")
    try:
        eventually(lambda: answer.phase == "queue")
        proxy.phases = ["guards", "queue", "prefill"]
        eventually(lambda: answer.phase == "prefill")
    finally:
        answer.stop()
    assert (f"/v1/requests/{answer.request_id}/timing", "Bearer sk-reader") in proxy.keys
    assert [texts.load("en")(chat.PHASES[phase], seconds="1").count("**") for phase in chat.PHASES] == [2, 2, 2]


@pytest.mark.usefixtures("never_abandoned")
def test_stop_comes_in_time_however_early(proxy_client: Proxy, proxy: StandIn) -> None:
    proxy.mode = "silent"
    for _ in range(20):
        answer = proxy_client.ask(request())
        answer.stop()
        eventually(lambda answer=answer: not answer.running)
        assert answer.state == "stopped"
    proxy.reset()  # none of the connections stays


def test_an_answer_nobody_looks_at_is_left(
    proxy_client: Proxy, proxy: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A closed or reloaded tab: its script ends, and with it the looks. By a clock that the test sets."""
    monkeypatch.setattr(module, "ABANDONED_AFTER", 0.05)  # the answer looks at the clock as often
    clock = SimpleNamespace(now=module.time.monotonic())
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: clock.now))
    proxy.mode = "endless"
    answer = proxy_client.ask(request())
    for _ in range(10):  # looked at, it goes on, though five times the bound goes by
        assert not answer.wait(0)
        have = len(answer.text)
        eventually(lambda have=have: len(answer.text) > have + 20)
        clock.now += 0.025
    clock.now += 0.05
    eventually(lambda: proxy.left)
    eventually(lambda: not answer.running)
    assert answer.state == "stopped"
    assert ABANDONED_AFTER == 3


@pytest.mark.usefixtures("never_abandoned")
def test_another_question_stops_the_running_answer(app: Callable[..., AppTest], proxy: StandIn) -> None:
    page = app()
    proxy.mode = "endless"
    running = Proxy(Settings(proxy_url=proxy.url))
    try:
        live = running.ask(request())
        eventually(lambda: live.text)
        page.session_state.turns = [chat.Turn("before", [[live]])]
        proxy.mode = "up"
        page = ask(page)
        eventually(lambda: proxy.left)
        assert live.state == "stopped"
        assert texts.load("en")("chat.stopped") in shown(page)
        assert live.text in shown(page)
        assert PARIS in shown(page)
    finally:
        running.close()


def test_a_growing_answer_is_drawn_at_most_ten_times_a_second(
    app: Callable[..., AppTest], proxy: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And a very long one, whose drawing takes longer, more seldom."""
    waits: list[float] = []
    wait = Answer.wait

    def recorded(answer: Answer, seconds: float) -> bool:
        waits.append(seconds)
        if seconds > 1 or len(waits) > 1000:
            answer.stop()
        return wait(answer, 0.02)

    monkeypatch.setattr(Answer, "wait", recorded)
    proxy.mode, proxy.words = "endless", ["a long word " * 10_000, *["word"] * 5000]
    ask(app())
    assert min(waits) >= 0.1
    assert waits[-1] > 1


# ---- code -----------------------------------------------------------------------------------------------------------

NASTY = "It's \"5 $HOME `id` \\n\\\\ ''' \"\"\" {x} %s 한국어 😀\n\ttab \u2028 !x #"


def test_the_shown_code_sends_exactly_this_request(app: Callable[..., AppTest], proxy: StandIn, tmp_path: Path) -> None:
    """Both are run as they are shown, with a question full of quotes."""
    page = app()
    page.sidebar.text_area[0].set_value(NASTY)
    page = ask(page, NASTY)
    page.session_state["code-0-0"] = True  # opened
    code, command, script, chain = (block.value for block in page.run().code)
    compile(chain, "shown", "exec")
    assert json.dumps(NASTY, ensure_ascii=False) in script
    assert f'base_url="{proxy.url}/v1"' in code
    (tmp_path / "ask.py").write_text(code, encoding="utf-8")
    ran = subprocess.run([sys.executable, tmp_path / "ask.py"], capture_output=True, text=True, timeout=60, check=True)
    assert ran.stdout.strip() == PARIS
    ran = subprocess.run(["sh", "-c", command], capture_output=True, text=True, timeout=60, check=True)
    assert "[DONE]" in ran.stdout
    from_page, from_python, from_curl = proxy.requests
    del from_page["stream_options"]  # only the page shows the usage
    assert from_page == from_python == from_curl


def test_code_is_right_for_any_json() -> None:
    body = request(messages=[{"role": "user", "content": NASTY}], stop=["'", '"'], user="\x00\x7f")
    assert json.loads(snippets.curl(body, "http://h").split("--data-binary '")[1][:-2].replace("'\"'\"'", "'")) == (
        body | {"stream": True}
    )
    compile(snippets.python(body, "http://h"), "shown", "exec")


# ---- untrusted text -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("written", "harmless"),
    [
        ("![x](http://h/x.png)", "!\\[x](http://h/x.png)"),
        ("\\![x](y)", "\\![x](y)"),
        ("a [link](http://h) stays", "a [link](http://h) stays"),
        ("$5 and $6", "\\$5 and \\$6"),
        ("\\$5", "\\$5"),
        (":red[x] at 10:30", "\\:red[x] at 10:30"),
        ("`$x ![y](z)` $", "`$x ![y](z)` \\$"),
        ("``a ` $`` $", "``a ` $`` \\$"),
        ("`open ![x](y)", "`open !\\[x](y)"),
        ("```sh\necho $HOME ![x](y)\n```\n$", "```sh\necho $HOME ![x](y)\n```\n\\$"),
        ("- ```\n\n![x](y)", "- ```  \n\n!\\[x](y)"),
        ("1. a\n   ```\n![x](y)", "1. a  \n   ```  \n!\\[x](y)"),
        ("a\nb\n\nc\n", "a  \nb  \n\nc"),
        ("```\nx\n  ```\n![x](y)", "```\nx\n  ```\n!\\[x](y)"),
        ("~~~\n```\n![x](y)\n~~~\n![x](y)", "~~~\n```\n![x](y)\n~~~\n!\\[x](y)"),
    ],
)
def test_untrusted_markdown_loads_nothing(written: str, harmless: str) -> None:
    assert plain(written) == harmless


def test_no_line_of_a_text_leaves_its_quote() -> None:
    assert quote("a\n\n# b\n```\n![x](y)\n```") == "> a  \n> \n> # b  \n> ```\n> ![x](y)\n> ```"


def test_a_fault_of_the_proxy_loads_nothing(app: Callable[..., AppTest], proxy: StandIn) -> None:
    proxy.mode = "error"
    assert "![x](http" not in shown(ask(app()))


@pytest.mark.parametrize(
    ("header", "state"),
    [(None, None), ('llm-lab; hit; ttl=41; key="a;b, fwd=miss"', "hit"), ("llm-lab; fwd=miss; stored", "miss"),
     ("llm-lab; fwd=miss; collapsed", "collapsed"), ("llm-lab; fwd=bypass; detail=sampled", "bypass"),
     ("llm-lab; fwd=request", "request"), ("llm-lab; fwd=stale; fwd-status=503", "stale")],
)  # fmt: skip
def test_cache_status_in_one_word(header: str | None, state: str | None) -> None:
    assert cache_state(header) == state


# ---- status ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("language", LANGUAGES)
def test_status_shows_every_service(app: Callable[..., AppTest], language: str) -> None:
    words = texts.load(language)
    page = app(language, page=STATUS)
    assert not page.exception
    text = shown(page)
    assert words("status.all_up") in text
    for fact in (
        "ui",
        "proxy",
        "redis",
        "model",
        "8.0.3",
        "1.5 MiB",
        "cpu",
        CHAT["id"],
        "8,192",
        "c0ffee5eedc0",
        "2.13.0",
    ):
        assert fact in text, fact
    assert all(f"<b>{figure}</b>" in strips(page) for figure in ("5", "3", "62%"))


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize(
    ("mode", "key"),
    [("redis-down", "status.do.redis"), ("model-down", "status.do.model"), ("model-loading", "status.do.loading")],
)
def test_status_says_what_is_down_and_what_to_do(
    app: Callable[..., AppTest], proxy: StandIn, language: str, mode: Any, key: str
) -> None:
    proxy.mode = mode
    page = app(language, page=STATUS)
    assert not page.exception
    assert texts.load(language)("status.some_down") in shown(page)
    assert texts.load(language)(key) in shown(page)


@pytest.mark.parametrize("language", LANGUAGES)
def test_status_without_a_proxy(app: Callable[..., AppTest], language: str) -> None:
    page = app(language, f"http://127.0.0.1:{free_port()}", STATUS)
    words = texts.load(language)
    assert not page.exception
    assert words("status.do.proxy") in shown(page)
    assert shown(page).count(words("status.through_proxy")) == 2


def test_a_models_buttons_ask_the_service_and_say_what_came_of_it(
    app: Callable[..., AppTest], proxy: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The page is drawn after the call, with the model's new state; a refusal stands at its model, or at the form."""
    words = texts.load("en")
    ready = status("up")
    ready["model"]["models"] = [{**CHAT, "state": "ready", "load": "demand"}]
    monkeypatch.setattr("fixtures_ui.status", lambda mode: ready)
    page = app(page=STATUS)
    proxy.keys.clear()
    click(page, words("status.action.unload"))
    assert [path for path, _ in proxy.keys] == ["/admin/models/unload", "/status"]
    assert proxy.requests == [{"model": CHAT["id"]}]
    assert page.toast[0].value == words("status.begun.unload", name=f"`{CHAT['id']}`")
    page.text_input(key="added").set_value(" korean ")
    click(page, words("status.add.button"))
    assert proxy.requests[1:] == [{"model": "korean"}]
    proxy.mode = "model-down"
    click(page, words("status.action.unload"))
    assert words("faults.model_down.what") in shown(page)
    proxy.mode = "up"
    click(page, words("status.action.unload"))
    assert words("faults.model_down.what") not in shown(page)


@pytest.mark.parametrize(
    "body", [{}, {"proxy": 1, "model": {"state": "up", "models": [{}]}, "cache": {"enabled": False}}]
)
def test_status_bears_with_any_answer(
    app: Callable[..., AppTest], monkeypatch: pytest.MonkeyPatch, body: dict[str, Any]
) -> None:
    monkeypatch.setattr("fixtures_ui.status", lambda mode: body)
    assert not app(page=STATUS).exception


@pytest.mark.parametrize("kind", ["proxy_down", "not_the_proxy"])
def test_without_a_report_only_ui_and_proxy_are_known(kind: str) -> None:
    report = Report(Fault(kind), Settings(), words := texts.load("en"))
    states = {service.name: service.state for service in report.services}
    assert states == {"ui": "up", "proxy": "down", "redis": "unknown", "model": "unknown"}
    assert (report.models, report.cache, report.versions) == ([], None, "")
    advice = report.services[1].advice(words)
    assert advice[-1] == words("status.do.proxy")
    assert advice[:-1] == ([] if kind == "proxy_down" else [words("faults.not_the_proxy.what")])


# ---- start ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value"), [("UI_PORT", "http"), ("UI_PROXY_URL", "localhost:8080"), ("UI_LANGUAGE", "de")]
)
def test_a_wrong_setting_stops_the_start_with_its_name(
    name: str, value: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(name, value)
    assert main() == 2
    said = capsys.readouterr().err
    assert said.startswith(f"{name}: ")
    assert len(said.splitlines()) == 1


def test_an_open_ui_must_be_meant(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever reaches the ui spends the proxy's key: beyond loopback only where a setting says so."""
    monkeypatch.setenv("UI_HOST", "0.0.0.0")
    ran = subprocess.run(python("lab_ui"), capture_output=True, text=True, timeout=60, check=False)
    assert ran.returncode == 2
    assert ran.stderr.startswith("UI_HOST=0.0.0.0 ")
    assert "UI_ALLOW_ANONYMOUS=true" in ran.stderr
    assert len(ran.stderr.splitlines()) == 1
    monkeypatch.setenv("UI_ALLOW_ANONYMOUS", "true")
    assert Settings().host == "0.0.0.0"


def test_the_server_is_guarded_and_needs_no_home(tmp_path: Path) -> None:
    """Healthy, with a policy against foreign content; it ends when asked to, and wrote nothing to the home folder."""
    import urllib.request

    home = tmp_path / "home"
    home.mkdir()
    port = free_port()
    env = {"UI_PORT": str(port), "HOME": str(home)}
    with process("ui", python("lab_ui"), port=port, log_dir=tmp_path, env=env, ready="/_stcore/health") as ui:
        with urllib.request.urlopen(ui.url, timeout=60) as response:
            policy = response.headers["content-security-policy"]
        assert "img-src 'self' data: blob:" in policy
        assert "http:" not in policy
        ui.popen.terminate()
        eventually(lambda: ui.popen.poll() is not None, what="the ui ends when asked to")
    assert not list(home.iterdir())
