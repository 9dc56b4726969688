"""Every page in both languages, with everything up and with each part down; and links with nonsense in them."""

from __future__ import annotations

import contextlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import parse_qs, unquote

import fixtures_ui
import pytest
from fixtures_ui import APP, CHAT, PARIS, QUESTION, StandIn, ask, click, shown, strips
from lab_ui import history, texts
from lab_ui.pages import PAGES
from processes import free_port
from streamlit.testing.v1 import AppTest

DOCS = Path(__file__).parents[2] / "docs"
LANGUAGES = list(texts.LANGUAGES)
# What is down -> the text that every page with a model on it shows then; None: the page is as usual.
STATES: dict[str, str | None] = {
    "up": None, "proxy-down": "faults.proxy_down.what", "redis-down": None, "model-down": None, "model-loading": None,
    "refusing": "faults.key_needed.what", "garbage": "faults.not_the_proxy.what",
}  # fmt: skip


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize("state", STATES)
def test_every_page_in_every_state(app: Callable[..., AppTest], proxy: StandIn, state: str, language: str) -> None:
    """No exception, its title, and the cause in the reader's language; one session walks over all pages."""
    words = texts.load(language)
    gone = state == "proxy-down"
    if not gone:
        proxy.mode = state  # type: ignore[assignment] # a Mode
    page = app(language, url=f"http://127.0.0.1:{free_port()}" if gone else None, page=PAGES[0].file)
    for each in PAGES:
        page.switch_page(each.file).run()
        assert not page.exception, each.name
        assert words("faults.unexpected.what") not in shown(page), each.name
        assert page.title[0].value == words(f"{each.name}.title")
        cause = STATES[state]
        if cause and each.name not in {"start", "status"}:
            assert words(cause) in shown(page), each.name
        if each.name in {"start", "status"} and state.startswith(("redis", "model")):
            part = "loading" if state == "model-loading" else state.removesuffix("-down")
            assert words(f"status.do.{part}") in shown(page)


NONSENSE = {
    "lang": "xx", "view": "'; drop", "q": "x" * 5000, "times": "NaN", "at_once": "1e9", "change": "",
    "temperature": "-1", "top_p": "two", "top_k": "3.5", "model": "<script>", "columns": "99", "price": "inf",
    "max_tokens": "0",
    "ko": "\x00",
}  # fmt: skip


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_link_with_nonsense_opens_the_page_as_without(app: Callable[..., AppTest], page: Any) -> None:
    app()
    opened = AppTest.from_file(APP, default_timeout=60)
    for name, value in NONSENSE.items():
        opened.query_params[name] = value
    opened.switch_page(page.file).run()
    assert not opened.exception
    assert texts.load("en")("faults.unexpected.what") not in shown(opened)
    assert opened.title[0].value == texts.load("en")(f"{page.name}.title")


LINKS = sorted(
    {
        link
        for name in ("tour.md", "tour.ko.md")
        for link in re.findall(r"\(http://127\.0\.0\.1:8501/([^)]+)\)", (DOCS / name).read_text(encoding="utf-8"))
    }
)


@pytest.mark.parametrize("link", LINKS)
def test_a_link_of_the_tour_opens_its_page_in_the_promised_state(app: Callable[..., AppTest], link: str) -> None:
    """Each parameter is read: none is dropped as nonsense or as the default, and the page is in its language."""
    path, _, query = link.partition("?")
    given = {name: values[0] for name, values in parse_qs(query, strict_parsing=bool(query)).items()}
    app("en")
    opened = AppTest.from_file(APP, default_timeout=60)
    for name, value in given.items():
        opened.query_params[name] = value
    opened.switch_page(f"app_pages/{path}.py").run()
    assert not opened.exception
    assert opened.title[0].value == texts.load(given.get("lang", "en"))(f"{path}.title")
    assert opened.query_params == given


# ---- what the reader entered

# Page, settings of it before, kind of the widget, beginning of its key, what is entered.
KEPT: list[tuple[str, dict[str, Any], str, str, Any]] = [
    ("chat", {}, "text_area", "chat.system", "Be brief."),
    ("tokens", {}, "text_area", "tokens.ko", "가나다"),
    ("tokens", {}, "number_input", "tokens.price", 4.0),
    ("next_token", {}, "text_area", "next.q", "Once upon a"),
    ("next_token", {"next.view": "steps"}, "slider", "next.top_k", 7),
    ("tasks", {}, "text_area", "text-", "Seoul is"),
    ("tasks", {"tasks.lesson": "sentiment"}, "text_area", "batch-en", "Fine."),
    ("tasks", {"tasks.lesson": "question"}, "text_area", "context-en", "Busan is a port."),
    ("tasks", {"tasks.lesson": "question"}, "text_input", "question-en", "What is Busan?"),
    ("tools", {}, "text_input", "tools.q", "Rain in Busan?"),
    ("tools", {}, "text_area", "schema-weather", '{"name": "f", "parameters": {}}'),
    ("cache", {}, "text_input", "cache.q", "What is Korea?"),
    ("cache", {"cache.view": "why"}, "text_area", "first-", '{"model": "a"}'),
    ("cache", {"cache.view": "why"}, "text_area", "second-", '{"model": "b"}'),
    ("cache", {"cache.view": "repeat"}, "slider", "cache.times", 20),
    ("limits", {"limits.view": "savings"}, "number_input", "limits.large_in", 3.0),
]


def widget(page: AppTest, kind: str, key: str) -> Any:
    return next(each for each in page.get(kind) if str(each.key).startswith(key))


@pytest.mark.parametrize("entered", KEPT, ids=lambda each: each[3])
def test_what_was_entered_is_there_after_another_page(app: Callable[..., AppTest], entered: Any) -> None:
    """Also where the URL is without parameters, as after a click on a page of the navigation; and what the page's URL
    holds is there after a reload, which begins a new session."""
    name, before, kind, key, value = entered
    page = app(page=f"app_pages/{name}.py")
    for control, code in before.items():
        page.segmented_control(key=control).set_value(code).run()
    widget(page, kind, key).set_value(value).run()
    assert not page.exception
    url = dict(page.query_params)
    page.query_params.clear()
    page.switch_page("app_pages/status.py").run()
    page.query_params.clear()
    page.switch_page(f"app_pages/{name}.py").run()
    assert widget(page, kind, key).value == value
    assert page.query_params == url
    if "." in key:  # a parameter of the link
        again = AppTest.from_file(APP, default_timeout=60)
        again.query_params.update(url)
        again.switch_page(f"app_pages/{name}.py").run()
        assert widget(again, kind, key).value == value


LONG = ("가나다라 abc. " * 10_000).strip()  # 110,000 characters


@pytest.mark.parametrize("name", sorted({name for name, *_ in KEPT}))
def test_a_field_takes_a_text_of_100_000_characters(app: Callable[..., AppTest], name: str) -> None:
    """Whatever its limit is, which the browser keeps: no page fails, and none puts the text into its URL."""
    page = app(page=f"app_pages/{name}.py")
    for of, before, kind, key, _ in KEPT:
        if of != name or not kind.startswith("text"):
            continue
        for control, code in before.items():
            page.segmented_control(key=control).set_value(code).run()
        widget(page, kind, key).set_value(LONG).run()
        assert not page.exception, key
        assert texts.load("en")("faults.unexpected.what") not in shown(page), key
        assert sum(map(len, page.query_params.values())) < 5000


def test_a_question_of_100_000_characters_is_sent_whole_and_refused_by_name(
    app: Callable[..., AppTest], proxy: StandIn
) -> None:
    """It stays in the conversation and in what the browser stores; the next question is asked without it."""
    words = texts.load("en")
    proxy.mode = "too-long"
    page = app()
    assert page.chat_input[0].proto.max_chars > len(LONG)
    page = ask(page, LONG)
    assert words("faults.too_long.what") in shown(page)
    assert proxy.requests[0]["messages"][-1]["content"] == LONG
    turns = page.session_state.turns
    loaded = history.load(json.loads(json.dumps(history.dump("id", turns, 1))), lambda _: None)
    assert loaded is not None
    assert loaded[1][0].question == turns[0].question == LONG
    proxy.mode = "up"
    assert PARIS in shown(ask(page))
    assert [message["content"] for message in proxy.requests[-1]["messages"]] == [QUESTION]


TRICK = "<img src=x onerror=alert(1)>![x](http://h/x.png) $a$ :red[b] [l](javascript:alert(1))"


def test_names_with_html_and_markdown_are_shown_as_they_are(
    app: Callable[..., AppTest], proxy: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of models and of files: no page loads an image, draws a formula or has an element of the name's own."""
    card = CHAT | {"id": TRICK, "state": "loading", "detail": TRICK, "licence": TRICK, "languages": [TRICK],
                   "progress": {"what": TRICK, "percent": 5}}  # fmt: skip
    status = fixtures_ui.status("up")
    status["model"] |= {"models": [card, CHAT | {"id": TRICK, "state": "failed", "detail": TRICK}],
                        "adding": {"name": TRICK, "state": "failed", "detail": TRICK}}  # fmt: skip
    monkeypatch.setattr(fixtures_ui, "status", lambda _: status)
    monkeypatch.setattr(fixtures_ui, "CHAT", CHAT | {"id": TRICK})
    monkeypatch.setattr(LoadService, "names", [TRICK, "../current?x=1"])
    with load_service() as url:
        page = app("en", page=PAGES[0].file, load_url=url)
        for each in PAGES:
            page.switch_page(each.file).run()
            if each.name == "chat":
                page = ask(page)
            assert not page.exception, each.name
            outside = re.sub(r"`[^`]*`", "", shown(page))  # a code span shows what it holds
            assert not re.search(r"(?<!\\)(?:\$a|!\[x|:red\[b)", outside), each.name
            assert "<img" not in strips(page), each.name
    asked = [path for _, path, _ in LoadService.asked]
    assert any(path.startswith("/runs/..%2Fcurrent%3Fx") for path in asked)


def test_a_cancelled_edit_leaves_no_text_behind(app: Callable[..., AppTest]) -> None:
    """An edit under way is kept over another page; a cancelled one does not come back in the next edit."""
    words = texts.load("en")
    page = ask(app())
    page.button(key="edit-0").click().run()
    page.text_area(key="edit-text-0").set_value("half a thought").run()
    page.switch_page("app_pages/status.py").run()
    page.switch_page("app_pages/chat.py").run()
    assert page.text_area(key="edit-text-0").value == "half a thought"
    click(page, words("chat.edit_cancel"))
    page.button(key="edit-0").click().run()
    assert page.text_area(key="edit-text-0").value == QUESTION


# ---- load test


class LoadService(BaseHTTPRequestHandler):
    """The load service's API with one finished run twice and a running one."""

    asked: ClassVar[list[tuple[str, str, Any]]] = []
    names: ClassVar[list[str]] = ["throughput-2", "throughput-1"]
    key: ClassVar[str | None] = None  # without it every path is a 401

    def log_message(self, *_: object) -> None:
        pass

    def answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("content-length") or 0))
        self.asked.append((self.command, self.path, json.loads(body) if body else None))
        refused = self.key is not None and self.headers.get("authorization") != f"Bearer {self.key}"
        line = {"answers": 12, "failed": 1, "tokens_per_second": 80, "ttft_p50": 0.2, "hit_ratio": None, "queue": 3,
                "replicas": {"0a1b2c3d": 9, "4e5f6a7b": 3}}  # fmt: skip
        figures = {
            "workload": {"sha256": "ab"}, "requests_per_second": 3, "output_tokens_per_second": 40.5,
            "metrics": {"ttft_seconds": {"p50": 0.25}, "end_to_end_seconds": {"p50": 1.5}},
        }  # fmt: skip
        run = {"trusted": True, "sums": {"holds": True}, "results": {"throughput": figures}}
        pages: dict[str, Any] = {
            "/runs": {"runs": [{"name": name} for name in self.names]},
            "/runs/current": {"state": "running", "code": None, "progress": [line | {"seconds": n} for n in (1, 2)]},
        }
        page = pages.get(self.path, run | {"name": unquote(self.path.removeprefix("/runs/"))})
        found = json.dumps({"error": {"message": "no key", "code": None}} if refused else page).encode()
        self.send_response(401 if refused else 200)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(found)))
        self.end_headers()
        self.wfile.write(found)

    do_GET = do_POST = answer  # noqa: N815 http.server's names


@contextlib.contextmanager
def load_service() -> Iterator[str]:
    """Its address, until the block ends."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), LoadService)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()


def test_the_load_services_key_is_asked_for_once(app: Callable[..., AppTest], monkeypatch: pytest.MonkeyPatch) -> None:
    """It stays when its field is no longer drawn, and over other pages; so do the fields of the form."""
    monkeypatch.setattr(LoadService, "key", "sk-load")
    with load_service() as url:
        page = app("en", page="app_pages/load.py", load_url=url)
        assert texts.load("en")("load.locked.what") in shown(page)
        page.text_input(key="load_key").set_value("sk-load").run()
        page.number_input(key="load.users").set_value(12).run()
        page.switch_page("app_pages/status.py").run()
        page.switch_page("app_pages/load.py").run()
        assert not page.exception
        assert page.number_input(key="load.users").value == 12
        assert page.query_params == {"users": "12"}


def test_the_load_page_starts_shows_and_compares_tests(app: Callable[..., AppTest]) -> None:
    with load_service() as url:
        page = app("en", page="app_pages/load.py", load_url=url)
        assert not page.exception
        assert "Running test" in shown(page)
        assert [box.label for box in page.selectbox] == ["Workload", "Compare A", "with B"]
        assert page.selectbox[1].options == ["throughput-2", "throughput-1"]
        tables = " ".join(each.proto.body for each in page.get("html"))
        assert "the counts agree" in tables
        charts = [str(each.proto) for each in page.get("vega_lite_chart")]
        assert len(charts) == 4
        assert "4e5f6a7b" in charts[-1], "a line for each replica of the model"
        assert "+0.0%" in tables, "both runs beside each other"
        next(button for button in page.button if button.label == "Start").click().run()
        assert not page.exception
    assert ("POST", "/runs", {"workload": "throughput", "users": 8, "seconds": 20}) in LoadService.asked
