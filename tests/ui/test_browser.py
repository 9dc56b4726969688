"""What a person sees: a real browser before the real lab, and before a stand-in that is slow or malicious."""

from __future__ import annotations

import contextlib
import re
import shutil
import subprocess
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx2
import pytest
from fixtures_ui import StandIn, stand_in
from lab_ui import texts
from lab_ui.pages import PAGES
from playwright.sync_api import Browser, Error, Page, expect, sync_playwright
from processes import eventually, free_port, process, python

if TYPE_CHECKING:
    from conftest import Lab

QUESTION = "What is the capital of France?"
HOW_TO_INSTALL = "no browser: `apt-get install chromium`, or `.venv/bin/playwright install --with-deps chromium`"
WAIT_MS = 60_000  # so that a test ends; the real model on busy cores needs the room
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
        page.set_default_timeout(WAIT_MS)
        expect.set_options(timeout=WAIT_MS)
        page.goto(url)
        return page

    yield open_page
    for context in contexts:
        context.close()


@pytest.fixture(scope="module")
def shared() -> Iterator[StandIn]:
    with stand_in() as server:
        yield server


@pytest.fixture(scope="module")
def shared_ui(shared: StandIn, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A ui before the stand-in."""
    with ui(shared, tmp_path_factory.mktemp("ui")) as url:
        yield url


@contextlib.contextmanager
def ui(proxy: StandIn, folder: Path, **settings: str) -> Iterator[str]:
    """`settings`: further UI_ variables, without the prefix and in lower case."""
    port = free_port()
    env = {"UI_PORT": str(port), "UI_PROXY_URL": proxy.url}
    env |= {f"UI_{name.upper()}": value for name, value in settings.items()}
    with process("ui", python("lab_ui"), port=port, log_dir=folder, env=env, ready="/_stcore/health") as started:
        yield started.url


@pytest.fixture
def proxy(shared: StandIn) -> Iterator[StandIn]:
    yield shared
    shared.closing.set()  # what a failed test left
    shared.reset()
    shared.closing.clear()


@pytest.fixture
def ui_url(shared_ui: str, proxy: StandIn) -> str:
    """The shared ui, and the stand-in as it was at its start."""
    return shared_ui


def ask(page: Page, question: str = QUESTION) -> None:
    field = page.get_by_test_id("stChatInputTextArea")
    field.fill(question)
    field.press("Enter")


def button(page: Page, name: str) -> Any:
    return page.get_by_role("button", name=name)


# ---- the real lab ---------------------------------------------------------------------------------------------------


def test_ask_see_it_stream_ask_again_see_the_hit(lab: Lab, visit: Callable[..., Page]) -> None:
    """The whole way: browser, ui, proxy, redis, Ray Serve, and back."""
    page = visit(f"{lab.ui_url}/chat")
    # 1. A long answer first: it is seen growing, and stopped.
    button(page, "Write a short poem about the sea.").click()
    answer = page.get_by_test_id("stChatMessage").last
    stop = button(page, en("chat.stop"))
    stop.wait_for()
    expect(answer).to_contain_text("the model writes")
    before = answer.inner_text()
    eventually(lambda: len(answer.inner_text()) > len(before), what="the answer grows")
    stop.click()
    expect(answer).to_contain_text(en("chat.stopped"))
    expect(answer).to_contain_text(en("code.title"))
    expect(stop).to_have_count(0)  # the page is drawn piece by piece
    assert len(answer.inner_text()) > len(en("chat.stopped")) + 20

    # 2. The question of the course, in a new conversation.
    button(page, en("chat.new")).click()
    button(page, QUESTION).click()
    expect(page.get_by_test_id("stChatMessage")).to_have_count(2)
    expect(answer).to_contain_text("TTFT")
    expect(answer).to_contain_text("Paris")
    expect(answer).to_contain_text(en("cache_state.miss"))

    # 3. The same again comes out of redis.
    button(page, en("chat.new")).click()
    ask(page)
    expect(answer).to_contain_text(en("cache_state.hit"))
    expect(answer).to_contain_text("Paris")

    # 4. The status page knows all of it.
    page.get_by_role("link", name=en("nav.status")).click()
    expect(page.get_by_text(en("status.all_up"))).to_be_visible()
    expect(page.get_by_text("smollm2-135m-instruct").first).to_be_visible()


def test_every_page_measures_something_of_the_real_lab(lab: Lab, visit: Callable[..., Page]) -> None:
    """Tokens, probabilities, steps, a task, a tool's call, a miss and a hit, one call for many, a cost."""
    page = visit(f"{lab.ui_url}/tokens")
    page.get_by_text("o200k_base").first.wait_for()
    page.get_by_text(en("tokens.ratio")).wait_for()

    page.goto(f"{lab.ui_url}/next_token")
    page.get_by_label(en("next_token.your_guess")).fill("Paris")
    button(page, en("next_token.look")).click()
    page.get_by_text("is the most likely token").wait_for()
    page.goto(f"{lab.ui_url}/next_token?view=steps")
    button(page, en("next_token.generate")).click()
    page.locator("button.token").first.wait_for()

    page.goto(f"{lab.ui_url}/tasks?lesson=sentiment")
    button(page, en("tasks.button")).click()
    page.get_by_text("POSITIVE").first.wait_for()

    page.goto(f"{lab.ui_url}/tools")
    button(page, en("tools.ask")).click()
    page.get_by_text("get_weather(").wait_for()

    page.goto(f"{lab.ui_url}/cache?q=What+is+an+X-ray%3F")
    for state in ("cache.part.fwd_miss", "cache.part.hit"):
        button(page, en("cache.send")).click()
        page.get_by_text(en(state)).wait_for()
    page.get_by_text(en("cache.measured_by_proxy")).wait_for()
    page.goto(f"{lab.ui_url}/cache?view=stampede&at_once=5")
    button(page, en("cache.stampede.button", times="5")).click()
    page.get_by_text(en("cache.stampede.result", calls="5", upstream="1")).wait_for()

    page.goto(f"{lab.ui_url}/limits?view=prices")
    page.get_by_text("gpt-4o-mini").wait_for()


def test_a_lab_that_is_still_starting_is_shown_as_soon_as_it_is_ready(
    proxy: StandIn, visit: Callable[..., Page], tmp_path: Path
) -> None:
    """Nobody has to press a button: the page looks again by itself."""
    proxy.mode = "hung"
    with ui(proxy, tmp_path, status_timeout_seconds="0.2", refresh_seconds="1") as url:
        page = visit(f"{url}/chat")
        page.get_by_text(en("faults.timeout.what")).wait_for()
        proxy.mode = "up"
        button(page, QUESTION).wait_for()


# ---- languages ------------------------------------------------------------------------------------------------------


def test_the_browsers_language_comes_first_and_the_switch_changes_it(ui_url: str, visit: Callable[..., Page]) -> None:
    page = visit(f"{ui_url}/chat", locale="ko-KR")
    expect(page.get_by_text(ko("chat.intro"))).to_be_visible()
    page.get_by_text("English").click()
    expect(page.get_by_text(en("chat.intro"))).to_be_visible()
    page.get_by_role("link", name=en("nav.status")).click()
    expect(page.get_by_text(en("status.all_up"))).to_be_visible()
    page.reload()  # language and page stay
    expect(page.get_by_text(en("status.all_up"))).to_be_visible()
    expect(page).to_have_url(f"{ui_url}/status?lang=en")
    page = visit(f"{ui_url}/chat", locale="en-US")
    page.get_by_text("한국어").click()
    expect(page.get_by_text(ko("chat.intro"))).to_be_visible()
    expect(page).to_have_url(f"{ui_url}/chat?lang=ko")


def test_a_link_leads_to_a_page_in_a_language(ui_url: str, visit: Callable[..., Page]) -> None:
    """Both survive a reload, page links and the browser's Back."""
    page = visit(f"{ui_url}/status?lang=ko", locale="en-US")
    expect(page.get_by_text(ko("status.all_up"))).to_be_visible()
    page.reload()
    expect(page.get_by_text(ko("status.all_up"))).to_be_visible()
    page.get_by_role("link", name=ko("nav.chat")).click()
    expect(page.get_by_text(ko("chat.intro"))).to_be_visible()
    expect(page).to_have_url(f"{ui_url}/chat?lang=ko")
    page.go_back()
    expect(page.get_by_text(ko("status.all_up"))).to_be_visible()
    expect(page).to_have_url(f"{ui_url}/status?lang=ko")
    page.get_by_text("English").click()
    expect(page.get_by_text(en("status.all_up"))).to_be_visible()
    page.go_back()
    expect(page.get_by_text(ko("status.all_up"))).to_be_visible()
    expect(page).to_have_url(f"{ui_url}/status?lang=ko")


# ---- leaving in the middle ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["silent", "endless"])
def test_stop_reaches_the_proxy(ui_url: str, proxy: StandIn, visit: Callable[..., Page], mode: Any) -> None:
    """By the keyboard alone, before the first token and after it, of an answer without an end; what came stays."""
    proxy.mode, proxy.words = mode, ["word"]
    page = visit(f"{ui_url}/chat")
    button(page, QUESTION).focus()
    page.keyboard.press("Enter")
    button(page, en("chat.stop")).wait_for()
    eventually(lambda: proxy.requests)
    if mode == "endless":
        page.get_by_text("word word").wait_for()
    page.keyboard.press("Escape")
    eventually(lambda: proxy.left)
    expect(page.get_by_text(en("chat.stopped"))).to_be_visible()
    expect(page.get_by_text("word word")).to_have_count(1 if mode == "endless" else 0)
    expect(button(page, en("chat.stop"))).to_have_count(0)


def test_leaving_the_page_leaves_no_request_running(ui_url: str, proxy: StandIn, visit: Callable[..., Page]) -> None:
    """Two readers side by side, each leaves in a way of its own; their answers have no end."""
    proxy.mode, proxy.words = "endless", ["word"]
    leave: dict[str, Callable[[Page], object]] = {
        "close": lambda page: page.close(),
        "another page": lambda page: page.get_by_role("link", name=en("nav.status")).click(),
    }
    pages = {how: visit(f"{ui_url}/chat") for how in leave}
    for how, page in pages.items():
        ask(page, how)
    for how, page in pages.items():
        page.get_by_text("word word").wait_for()
        leave[how](page)
    eventually(lambda: sorted(body["messages"][-1]["content"] for body in proxy.left) == sorted(leave))


def test_another_question_takes_the_place_of_the_running_one(
    ui_url: str, proxy: StandIn, visit: Callable[..., Page]
) -> None:
    """The running answer, which would never end, is stopped and stays."""
    proxy.mode, proxy.words = "endless", ["word"]
    page = visit(f"{ui_url}/chat")
    ask(page)
    page.get_by_text("word word").wait_for()
    proxy.mode, proxy.words = "up", ["Paris."]
    ask(page)
    expect(page.get_by_text("Paris.", exact=True)).to_be_visible()
    expect(page.get_by_text(en("chat.stopped"))).to_be_visible()
    expect(page.get_by_text("word word").first).to_be_visible()
    eventually(lambda: proxy.left)


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
    page = visit(f"{ui_url}/chat")
    ask(page)
    page.get_by_text("TTFT").wait_for()
    # The policy itself, without our escaping.
    refused = "url => new Promise(over => document.body.append(Object.assign(new Image(), {onerror: over, src: url})))"
    page.evaluate(refused, f"{proxy.url}/leak.png")
    httpx2.get(f"{proxy.url}/afterwards")
    assert proxy.fetched == ["/afterwards"]
    assert page.locator("[data-testid=stChatMessage] img").count() == 0


# ---- narrow, long ---------------------------------------------------------------------------------------------------


def test_nothing_is_cut_on_a_phone_or_loaded_from_elsewhere(ui_url: str, visit: Callable[..., Page]) -> None:
    """A walk over both pages, in Korean."""
    page = visit("about:blank", viewport={"width": 390, "height": 844}, locale="ko-KR")
    foreign: list[str] = []
    own = ("data:", "blob:", ui_url)
    page.on("request", lambda request: None if request.url.startswith(own) else foreign.append(request.url))
    wide = "document.querySelector('.stMain').scrollWidth"
    page.goto(f"{ui_url}/chat")
    page.get_by_text(ko("chat.intro")).wait_for()
    ask(page)
    page.get_by_text("TTFT").wait_for()
    page.get_by_text(ko("code.title")).click()
    page.get_by_text("from openai import").wait_for()
    assert page.evaluate(wide) <= 390
    page.goto(f"{ui_url}/status")
    page.get_by_text(ko("status.all_up")).wait_for()
    assert page.evaluate(wide) <= 390
    assert foreign == []


def test_a_very_long_answer_is_shown_whole_and_the_page_goes_on(
    ui_url: str, proxy: StandIn, visit: Callable[..., Page]
) -> None:
    """8,000 words at the speed of a cache hit; after it the language can be switched."""
    proxy.words = [f"word{number}" for number in range(8000)]
    page = visit(f"{ui_url}/chat")
    ask(page)
    page.get_by_text("TTFT").wait_for()
    shown = page.get_by_test_id("stChatMessage").last.inner_text()
    assert re.findall(r"word\d+", shown) == proxy.words
    page.get_by_text("한국어").click()
    page.get_by_text(ko("chat.new")).wait_for()


# ---- every page: console, accessibility, dark, phone ----------------------------------------------------------------

# Streamlit asks below a deep link for its server first, and then at the root; the browser logs the first as an error.
PROBES = ("/_stcore/health", "/_stcore/host-config")
RULES = {"runOnly": {"type": "tag", "values": ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa"]}}
# In Streamlit's own markup, which the lab does not write: its page heading order, its tooltips' and menus' roles.
STREAMLITS_OWN = "[data-testid=stHeader], [data-testid=stSidebarNav], [data-testid=stMainMenu]"


@pytest.fixture(scope="session")
def axe(tmp_path_factory: pytest.TempPathFactory) -> str:
    """axe-core's script, fetched by npm; it is no part of the lab."""
    folder = tmp_path_factory.mktemp("axe")
    npm = shutil.which("npm")
    if npm is None:
        pytest.skip("the accessibility rules (axe-core) are fetched by npm, which is not installed")
    fetched = subprocess.run(
        [npm, "pack", "axe-core@4.10.3", "--silent"], cwd=folder, capture_output=True, timeout=120, check=False
    )
    if fetched.returncode:
        pytest.skip("the accessibility rules (axe-core) cannot be fetched: no network")
    with tarfile.open(next(folder.glob("*.tgz"))) as archive:
        script = archive.extractfile("package/axe.min.js")
        assert script is not None
        return script.read().decode()


LOOKS = 5  # at a page in which axe finds something, one second apart


def violations(page: Page, script: str) -> list[str]:
    """Findings of axe that are serious or critical, outside Streamlit's own header and navigation."""
    # What fades in has its last colour at once.
    page.add_style_tag(content="* { transition: none !important; animation: none !important; }")
    page.evaluate(script)
    found = page.evaluate(
        "([rules, own]) => axe.run({exclude: own.split(', ').map(each => [each])}, rules)", [RULES, STREAMLITS_OWN]
    )
    return [
        f"{each['id']}: {each['help']}: {[node['html'][:200] + node['failureSummary'] for node in each['nodes'][:3]]}"
        for each in found["violations"]
        if each["impact"] in {"serious", "critical"}
    ]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_page_is_accessible_and_its_console_is_quiet(
    ui_url: str, visit: Callable[..., Page], axe: str, scheme: str
) -> None:
    """In Korean and English, light and dark; on a phone nothing is wider than the screen."""
    language = "ko" if scheme == "dark" else "en"
    page = visit("about:blank", color_scheme=scheme)
    errors: list[str] = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on(
        "console",
        lambda message: (
            None
            if message.type != "error" or message.location.get("url", "").endswith(PROBES)
            else errors.append(message.text)
        ),
    )
    found = {}
    for each in PAGES:
        page.set_viewport_size({"width": 1280, "height": 900})
        path = "" if each is PAGES[0] else each.url_path
        page.goto(f"{ui_url}/{path}?lang={language}")
        page.get_by_role("heading", name=texts.load(language)(f"{each.name}.title"), exact=True).first.wait_for()
        expect(page.locator("[data-stale=true]")).to_have_count(0)
        for _ in range(LOOKS):  # a page that has just been opened may be drawn once more
            try:
                broken = violations(page, axe)
            except Error as error:  # the page was loaded anew meanwhile
                broken = [str(error)]
            if not broken:
                break
            page.wait_for_timeout(1000)
        else:
            found[each.name] = broken
        page.set_viewport_size({"width": 390, "height": 844})
        page.wait_for_function("document.querySelector('.stMain').scrollWidth <= 390")  # charts follow a little later
    assert not found, "\n".join(f"{name}: {each}" for name, broken in found.items() for each in broken)
    assert errors == []


# ---- the chat ------------------------------------------------------------------------------------------------------


def test_a_syllable_in_composition_is_not_sent(ui_url: str, proxy: StandIn, visit: Callable[..., Page]) -> None:
    """Enter that ends a composition sends nothing; the next Enter sends the whole question, once."""
    page = visit(f"{ui_url}/chat")
    field = page.get_by_test_id("stChatInputTextArea")
    field.click()
    session = page.context.new_cdp_session(page)
    session.send("Input.imeSetComposition", {"text": "안녕", "selectionStart": 2, "selectionEnd": 2})
    session.send("Input.dispatchKeyEvent", {"type": "rawKeyDown", "key": "Process", "code": "Enter",
                                            "windowsVirtualKeyCode": 229})  # fmt: skip
    session.send("Input.insertText", {"text": "안녕"})
    assert proxy.requests == []
    expect(field).to_have_value("안녕")
    field.press("Enter")
    page.get_by_text("TTFT").wait_for()
    assert [body["messages"][-1]["content"] for body in proxy.requests] == ["안녕"]


def test_a_reload_in_the_middle_of_an_answer_loses_nothing(
    ui_url: str, proxy: StandIn, visit: Callable[..., Page]
) -> None:
    """The conversation is in the browser; the answer goes on in the ui and is found again."""
    proxy.mode, proxy.words = "endless", ["word"]
    page = visit(f"{ui_url}/chat")
    ask(page, "first question")
    page.get_by_text("word word").wait_for()
    page.reload()
    page.get_by_text("word word").wait_for()
    expect(page.get_by_text("first question").first).to_be_visible()
    button(page, en("chat.stop")).click()
    expect(page.get_by_text(en("chat.stopped"))).to_be_visible()
    # In another tab the conversation is in the list, and the page begins anew.
    other = page.context.new_page()
    other.goto(f"{ui_url}/chat")
    other.get_by_role("button", name="first question").click()
    expect(other.get_by_text("word word").first).to_be_visible()


def test_two_columns_answer_side_by_side_from_a_link(ui_url: str, proxy: StandIn, visit: Callable[..., Page]) -> None:
    """The link holds codes: settings and the question; nothing is asked before the reader agrees."""
    page = visit(f"{ui_url}/chat?columns=2&temperature2=0.5&q=Who%3F")
    button(page, "Who?").wait_for()
    assert proxy.requests == []
    button(page, "Who?").click()
    expect(page.get_by_text("TTFT")).to_have_count(2)
    assert sorted(body["temperature"] for body in proxy.requests) == [0, 0.5]
    expect(page).to_have_url(re.compile(r"columns=2&temperature2=0\.5&q=Who"))


def test_a_key_lets_a_reader_in(ui_url: str, proxy: StandIn, visit: Callable[..., Page]) -> None:
    """It is asked for where it is missing, sent as a Bearer token, and neither in the link nor in the storage."""
    proxy.mode = "refusing"
    page = visit(f"{ui_url}/chat")
    page.get_by_text(en("faults.key_needed.what")).wait_for()
    proxy.mode = "up"
    page.get_by_label(en("key.label")).last.fill("sk-of-a-reader")
    page.get_by_label(en("key.label")).last.press("Enter")
    button(page, QUESTION).click()
    page.get_by_text("TTFT").wait_for()
    assert ("/v1/chat/completions", "Bearer sk-of-a-reader") in proxy.keys
    assert "sk-of" not in page.url + page.evaluate("JSON.stringify([localStorage, sessionStorage])")
