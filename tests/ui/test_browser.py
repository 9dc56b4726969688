"""What a person sees: a real browser before the real lab, and before a stand-in that is slow or malicious."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from fixtures_ui import StandIn, stand_in
from lab_ui import texts
from playwright.sync_api import Browser, Error, Page, expect, sync_playwright
from processes import free_port, process, python

if TYPE_CHECKING:
    from conftest import Lab

QUESTION = "What is the capital of France?"
HOW_TO_INSTALL = "no browser: `apt-get install chromium`, or `.venv/bin/playwright install --with-deps chromium`"
ANSWER_MS = 60_000  # the real model on busy cores
en, ko = texts.load("en"), texts.load("ko")


@pytest.fixture(scope="module")  # not longer: Playwright keeps an event loop running in this thread
def browser() -> Iterator[Browser]:
    """A Chromium on PATH, else Playwright's own."""
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    with sync_playwright() as playwright:
        try:
            started = playwright.chromium.launch(
                executable_path=found, args=["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
            )
        except Error as error:
            pytest.fail(f"{HOW_TO_INSTALL}\n{error}")
        yield started
        started.close()


@pytest.fixture
def visit(browser: Browser) -> Iterator[Callable[..., Page]]:
    """Opens a page in a context of its own."""
    contexts = []

    def open_page(url: str, **context: Any) -> Page:
        contexts.append(
            browser.new_context(**{"locale": "en-US", "viewport": {"width": 1280, "height": 900}} | context)
        )
        page = contexts[-1].new_page()
        page.set_default_timeout(20_000)
        expect.set_options(timeout=20_000)
        page.goto(url)
        return page

    yield open_page
    for context in contexts:
        context.close()


@pytest.fixture
def proxy() -> Iterator[StandIn]:
    with stand_in() as server:
        yield server


@pytest.fixture
def ui_url(proxy: StandIn, tmp_path: Path) -> Iterator[str]:
    """A ui before the stand-in."""
    port = free_port()
    env = {"UI_PORT": str(port), "UI_PROXY_URL": proxy.url}
    with process("ui", python("lab_ui"), port=port, log_dir=tmp_path, env=env, ready="/_stcore/health") as started:
        yield started.url


def ask(page: Page, question: str = QUESTION) -> None:
    field = page.get_by_test_id("stChatInputTextArea")
    field.fill(question)
    field.press("Enter")


def button(page: Page, name: str) -> Any:
    return page.get_by_role("button", name=name)


def until(condition: Callable[[], Any], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    return bool(condition())


# ---- the real lab ---------------------------------------------------------------------------------------------------


@pytest.mark.timeout(400)
def test_ask_see_it_stream_ask_again_see_the_hit(lab: Lab, visit: Callable[..., Page]) -> None:
    """The whole way: browser, ui, proxy, redis, Ray Serve, and back."""
    page = visit(lab.ui_url)
    # 1. A long answer first: it is seen growing, stopped, and what came stays.
    button(page, "Write a short poem about the sea.").click()
    answer = page.get_by_test_id("stChatMessage").last
    stop = button(page, en("chat.stop"))
    stop.wait_for()
    expect(answer).to_contain_text("Writing", timeout=ANSWER_MS)
    before = answer.inner_text()
    assert until(lambda: len(answer.inner_text()) > len(before), 30)
    stop.click()
    expect(answer).to_contain_text(en("chat.stopped"))
    expect(answer).to_contain_text(en("code.title"))
    expect(stop).to_have_count(0)  # the page is drawn piece by piece
    kept = answer.inner_text()
    assert len(kept) > len(en("chat.stopped")) + 20
    time.sleep(0.5)
    assert answer.inner_text() == kept

    # 2. The question of the course, in a new conversation.
    button(page, en("chat.new")).click()
    button(page, QUESTION).click()
    expect(page.get_by_test_id("stChatMessage")).to_have_count(2)
    expect(answer).to_contain_text("TTFT", timeout=ANSWER_MS)
    expect(answer).to_contain_text("Paris")
    expect(answer).to_contain_text(en("cache.miss"))

    # 3. The same again comes out of redis.
    button(page, en("chat.new")).click()
    ask(page)
    expect(answer).to_contain_text(en("cache.hit"), timeout=ANSWER_MS)
    expect(answer).to_contain_text("Paris")

    # 4. The status page knows all of it.
    page.get_by_role("link", name=en("nav.status")).click()
    expect(page.get_by_text(en("status.all_up"))).to_be_visible()
    expect(page.get_by_text("smollm2-135m-instruct").first).to_be_visible()


def test_a_lab_that_is_still_starting_is_shown_as_soon_as_it_is_ready(
    ui_url: str, proxy: StandIn, visit: Callable[..., Page]
) -> None:
    proxy.mode = "hung"
    page = visit(ui_url)
    page.get_by_text(en("faults.timeout.what")).wait_for()
    proxy.mode = "up"
    button(page, QUESTION).wait_for()


# ---- languages ------------------------------------------------------------------------------------------------------


def test_the_browsers_language_comes_first_and_the_switch_changes_it(ui_url: str, visit: Callable[..., Page]) -> None:
    page = visit(ui_url, locale="ko-KR")
    expect(page.get_by_text(ko("chat.intro"))).to_be_visible()
    page.get_by_text("English").click()
    expect(page.get_by_text(en("chat.intro"))).to_be_visible()
    page.get_by_role("link", name=en("nav.status")).click()
    expect(page.get_by_text(en("status.all_up"))).to_be_visible()
    page.reload()  # the choice stays
    expect(page.get_by_text(en("status.all_up"))).to_be_visible()
    page = visit(ui_url, locale="en-US")
    page.get_by_text("한국어").click()
    expect(page.get_by_text(ko("chat.intro"))).to_be_visible()


# ---- leaving in the middle ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["silent", "slow"])
def test_stop_reaches_the_proxy_within_500_ms(
    ui_url: str, proxy: StandIn, visit: Callable[..., Page], mode: Any
) -> None:
    """By the keyboard alone, before the first token and after it. The best of three."""
    proxy.mode, proxy.words = mode, ["word"] * 2000

    def seconds() -> float:
        proxy.requests.clear()
        proxy.left.clear()
        page = visit(ui_url)
        button(page, QUESTION).focus()
        page.keyboard.press("Enter")
        button(page, en("chat.stop")).wait_for()
        assert until(lambda: proxy.requests, 20)
        if mode == "slow":
            page.get_by_text("word word").wait_for()
        pressed = time.monotonic()
        page.keyboard.press("Escape")
        assert until(lambda: proxy.left, 20)
        expect(page.get_by_text(en("chat.stopped"))).to_be_visible()
        expect(page.get_by_text("word word")).to_have_count(1 if mode == "slow" else 0)
        expect(button(page, en("chat.stop"))).to_have_count(0)
        return proxy.left[0] - pressed

    assert min(seconds() for _ in range(3)) < 0.5


@pytest.mark.parametrize("how", ["reload", "close", "status page"])
def test_leaving_the_page_leaves_no_request_running(
    ui_url: str, proxy: StandIn, visit: Callable[..., Page], how: str
) -> None:
    proxy.mode, proxy.words = "slow", ["word"] * 2000
    page = visit(ui_url)
    ask(page)
    page.get_by_text("word word").wait_for()
    if how == "reload":
        page.reload()
    elif how == "close":
        page.close()
    else:
        page.get_by_role("link", name=en("nav.status")).click()
    assert until(lambda: proxy.left, 8)


def test_another_question_takes_the_place_of_the_running_one(
    ui_url: str, proxy: StandIn, visit: Callable[..., Page]
) -> None:
    proxy.mode, proxy.words = "slow", ["word"] * 2000
    page = visit(ui_url)
    ask(page)
    page.get_by_text("word word").wait_for()
    proxy.mode, proxy.words = "up", ["Paris."]
    ask(page)
    expect(page.get_by_text("Paris.", exact=True)).to_be_visible()
    expect(page.get_by_text(en("chat.stopped"))).to_be_visible()
    assert until(lambda: proxy.left, 1)


# ---- untrusted answers ----------------------------------------------------------------------------------------------


def test_an_answer_cannot_make_the_browser_load_anything(
    ui_url: str, proxy: StandIn, visit: Callable[..., Page]
) -> None:
    """Neither through our escaping nor past it: the server's policy stops what Markdown would load."""
    image = f"![secret]({proxy.url}/leak.png)"
    tricks = f"{image} <img src='{proxy.url}/leak.png'> [![x]({proxy.url}/leak.png)]({proxy.url}) ![x][r]"
    proxy.words = (
        f"{tricks}\n\n```\n<pre>\n```\n\n    {image}\n\n1. a\n   ```\n{image}\n\n[r]: {proxy.url}/leak.png".split(" ")
    )
    page = visit(ui_url)
    ask(page)
    page.get_by_text("TTFT").wait_for()
    # The policy itself, without our escaping.
    page.evaluate("url => { document.body.append(Object.assign(new Image(), {src: url})) }", f"{proxy.url}/leak.png")
    time.sleep(1)
    assert proxy.fetched == []
    assert page.locator("[data-testid=stChatMessage] img").count() == 0


def test_no_page_loads_anything_from_elsewhere(ui_url: str, visit: Callable[..., Page], browser: Browser) -> None:
    context = browser.new_context(locale="ko-KR")
    page = context.new_page()
    foreign: list[str] = []
    own = ("data:", "blob:", ui_url)
    page.on("request", lambda request: None if request.url.startswith(own) else foreign.append(request.url))
    page.goto(ui_url)
    page.get_by_text(ko("chat.intro")).wait_for()
    ask(page)
    page.get_by_text("TTFT").wait_for()
    page.get_by_text(ko("code.title")).click()
    page.get_by_role("link", name=ko("nav.status")).click()
    page.get_by_text(ko("status.all_up")).wait_for()
    context.close()
    assert foreign == []


# ---- narrow, long ---------------------------------------------------------------------------------------------------


def test_nothing_is_cut_on_a_phone(ui_url: str, visit: Callable[..., Page]) -> None:
    page = visit(ui_url, viewport={"width": 390, "height": 844}, locale="ko-KR")
    ask(page)
    page.get_by_text("TTFT").wait_for()
    page.get_by_text(ko("code.title")).click()
    page.get_by_text("from openai import").wait_for()
    wide = "document.querySelector('.stMain').scrollWidth"
    assert page.evaluate(wide) <= 390
    page.goto(f"{ui_url}/status")
    page.get_by_text(ko("status.all_up")).wait_for()
    assert page.evaluate(wide) <= 390


def test_a_very_long_answer_stays_responsive(ui_url: str, proxy: StandIn, visit: Callable[..., Page]) -> None:
    """8,000 words at the speed of a cache hit, and the switch of the language reacts at once after it."""
    proxy.words = [f"word{number}" for number in range(8000)]
    page = visit(ui_url)
    ask(page)
    page.get_by_text("TTFT").wait_for()
    started = time.monotonic()
    page.get_by_text("한국어").click()
    page.get_by_text(ko("chat.new")).wait_for()
    assert time.monotonic() - started < 3
