"""Every page in both languages, with everything up and with each part down; and links with nonsense in them."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import parse_qs

import pytest
from fixtures_ui import APP, StandIn, shown
from lab_ui import texts
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


# ---- load test


class LoadService(BaseHTTPRequestHandler):
    """The load service's API with one finished run twice and a running one."""

    asked: ClassVar[list[tuple[str, str, Any]]] = []

    def log_message(self, *_: object) -> None:
        pass

    def answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("content-length") or 0))
        self.asked.append((self.command, self.path, json.loads(body) if body else None))
        line = {"answers": 12, "failed": 1, "tokens_per_second": 80, "ttft_p50": 0.2, "hit_ratio": None, "queue": 3,
                "replicas": {"0a1b2c3d": 9, "4e5f6a7b": 3}}  # fmt: skip
        figures = {
            "workload": {"sha256": "ab"}, "requests_per_second": 3, "output_tokens_per_second": 40.5,
            "metrics": {"ttft_seconds": {"p50": 0.25}, "end_to_end_seconds": {"p50": 1.5}},
        }  # fmt: skip
        run = {"trusted": True, "sums": {"holds": True}, "results": {"throughput": figures}}
        pages: dict[str, Any] = {
            "/runs": {"runs": [{"name": "throughput-2"}, {"name": "throughput-1"}]},
            "/runs/current": {"state": "running", "code": None, "progress": [line | {"seconds": n} for n in (1, 2)]},
        }
        found = json.dumps(pages.get(self.path, run | {"name": self.path.rpartition("/")[2]})).encode()
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(found)))
        self.end_headers()
        self.wfile.write(found)

    do_GET = do_POST = answer  # noqa: N815 http.server's names


def test_the_load_page_starts_shows_and_compares_tests(app: Callable[..., AppTest]) -> None:
    server = ThreadingHTTPServer(("127.0.0.1", 0), LoadService)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    try:
        page = app("en", page="app_pages/load.py", load_url=f"http://127.0.0.1:{server.server_address[1]}")
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
    finally:
        server.shutdown()
        server.server_close()
    assert ("POST", "/runs", {"workload": "throughput", "users": 8, "seconds": 20}) in LoadService.asked
