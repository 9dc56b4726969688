"""`make bench-ui`: measures the time of a page switch and the memory of 20 sessions.

Starts a separate ui for a running lab (`--proxy`, default: that of `make lab`) and controls it with a real browser. A
switch is timed from the click on a link to the heading of the new page, so it includes the browser's time.
"""

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

from lab_ui import texts
from lab_ui.pages import PAGES
from playwright.sync_api import Page, sync_playwright

from bench.processes import free_port, server
from bench.report import Row, machine, save
from bench.report import page as table
from lab.checks import chromium

SESSIONS = 20
ROUNDS = 3  # over all pages
TARGET_MS, TARGET_MIB = 300, 400


def switches(page: Page) -> list[float]:
    """Milliseconds of each switch, without the first round, in which the pages import their modules."""
    words, times = texts.load("en"), []
    for turn in range(ROUNDS + 1):
        for each in PAGES:
            began = time.perf_counter()
            page.get_by_test_id("stSidebarNavLink").get_by_text(words(f"nav.{each.name}"), exact=True).click()
            page.get_by_role("heading", name=words(f"{each.name}.title"), exact=True).first.wait_for()
            if turn:
                times.append((time.perf_counter() - began) * 1000)
            page.wait_for_timeout(300)
    return times


def main() -> int:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--proxy", default="http://127.0.0.1:8080")
    given = arguments.parse_args()
    port = free_port()
    env = {"UI_PORT": str(port), "UI_PROXY_URL": given.proxy}
    with (
        tempfile.TemporaryDirectory() as folder,
        server("ui", [sys.executable, "-m", "lab_ui"], port, Path(folder), env=env, ready="/_stcore/health") as ui,
        sync_playwright() as playwright,
    ):
        browser = playwright.chromium.launch(executable_path=chromium(), args=["--no-sandbox", "--disable-gpu"])
        pages = []
        times: list[float] = []
        for number in range(SESSIONS):
            page = browser.new_context(locale="en-US").new_page()
            page.goto(f"{ui.url}/{PAGES[1 + number % (len(PAGES) - 1)].url_path}")
            page.get_by_role("heading").first.wait_for()
            times = times or switches(page)  # before the other sessions open, because their browsers share these cores
            pages.append(page)
        used = ui.memory()
    median, slowest = statistics.median(times), max(times)
    rows = [
        Row("page switch", f"median of {len(times)}", median, "ms", f"≤ {TARGET_MS}", median <= TARGET_MS),
        Row("page switch", "slowest", slowest, "ms"),
        Row("memory", f"{SESSIONS} sessions", used / 2**20, "MiB", f"≤ {TARGET_MIB}", used <= TARGET_MIB * 2**20),
    ]
    sys.stdout.write(table("ui", machine(), rows) + "\n")
    save("bench-ui", machine(), rows)
    return 0 if all(row.passed is not False for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
