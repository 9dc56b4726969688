"""`make check`, `make test` and `make constraints`: the commands that developers and CI run."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from lab.terminal import Exit, LabError, given_arguments, say

HEADER = """\
# Exact versions of all packages of services, tests and images, written by `make constraints` from .venv.
# pip reads this file by -c: it fixes versions and installs nothing. torch has no build tag here, so that
# `pip install torch` can take the CPU or the CUDA build.
"""

TOOLS = {  # .pre-commit-config.yaml has the same
    "ruff check": ["-m", "ruff", "check", "."],
    "ruff format": ["-m", "ruff", "format", "--check", "."],
    "mypy": ["-m", "mypy", "lab", "bench"],
    "assertions on a clock": ["tests/clocks.py"],
    "standard terms": ["tests/terms.py"],
}


def check(root: Path) -> int:
    """Run all of TOOLS. Returns 1 if any of them fails."""
    places = [*root.glob("services/*/lab_*"), *root.glob("load/lab_*")]
    packages = sorted(str(place) for place in places if place.suffix != ".egg-info")
    failed = []
    for name, argv in TOOLS.items():
        say(f"lab: {name}")
        more = packages if name == "mypy" else []
        if subprocess.run([sys.executable, *argv, *more], cwd=root, check=False).returncode:
            failed.append(name)
    say(f"lab: {', '.join(failed)} failed" if failed else "lab: all checks passed")
    return 1 if failed else Exit.FINE


NOTHING_COLLECTED = 5  # pytest's exit code
LANES = {
    "quick": "everything that needs no container, with few generated cases",
    "all": "the same with all generated cases",
    "stack": "against containers of their own",
    "cluster": "against several Ray nodes in containers, with the upgrade drill",
}


def test(root: Path, lane: str, arguments: Sequence[str]) -> int:
    """Run one lane of the tests; print one closing line for all calls of pytest. Returns pytest's exit code."""
    arguments = [*given_arguments(os.environ), *arguments]
    if lane in ("stack", "cluster"):
        return _pytest(root, ["-m", lane, *arguments])
    need_chromium()
    environ = {"LAB_TEST_FULL": "1"} if lane == "all" else {}
    here = "not stack and not cluster and not gpu"
    # 1. Tests that run in parallel, one worker for each core. 2. Tests marked `alone`, which stop shared services or
    #    need the whole machine.
    parallel = ["-n", str(cores()), "--dist", "loadgroup", "--no-loadscope-reorder"]
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        counts = Path(folder) / "counts"
        environ["LAB_TEST_COUNTS"] = str(counts)
        codes = [
            _pytest(root, ["-m", f"not alone and {here}", *parallel, *arguments], environ),
            _pytest(root, ["-m", f"alone and {here}", *arguments], environ),
        ]
        say(closing_line(counts.read_text().splitlines() if counts.exists() else [], time.monotonic() - began))
    # 3. With a selection (ARGS="-k cache") one of the two calls may find no test.
    return max((code for code in codes if code != NOTHING_COLLECTED), default=NOTHING_COLLECTED)


def closing_line(counts: Sequence[str], seconds: float) -> str:
    """pytest's closing line for several calls. counts: one line of JSON for each call, outcome -> number of tests
    (written by tests/conftest.py)."""
    total: Counter[str] = Counter()
    for line in counts:
        total.update(json.loads(line))
    shown = [f"{total[name]} {name}" for name in ("failed", "passed", "skipped", "error") if total[name]]
    return f" {', '.join(shown) or 'no tests ran'} in {seconds:.2f}s ".center(80, "=")


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _pytest(root: Path, arguments: Sequence[str], environ: Mapping[str, str] | None = None) -> int:
    argv = [sys.executable, "-m", "pytest", *arguments]
    return subprocess.run(argv, cwd=root, env=os.environ | (environ or {}), check=False).returncode


def need_chromium() -> None:
    """Install Chromium for the browser tests unless there is one: from the system's packages, else from Playwright.
    Raises LabError."""
    if chromium():
        return
    say("lab: installing chromium for the browser tests")
    if shutil.which("apt-get"):
        root = [] if os.getuid() == 0 else ["sudo", "-n"]
        packages = ["chromium", "fonts-noto-cjk"]
        environ = dict(os.environ) | {"DEBIAN_FRONTEND": "noninteractive"}
        for command in (["update", "-q"], ["install", "-yq", "--no-install-recommends", *packages]):
            subprocess.run([*root, "apt-get", *command], env=environ, stdout=subprocess.DEVNULL, check=False)
    if not chromium():
        subprocess.run([sys.executable, "-m", "playwright", "install", "chromium"], check=False)
    if not chromium():
        raise LabError(Exit.BROWSER, "the browser tests need chromium, which could not be installed; install it "
                      "(apt-get install chromium), then repeat the command")  # fmt: skip


def chromium() -> str | None:
    """Path of the browser on PATH, or of the one that Playwright downloaded; None if there is none."""
    for name in ("chromium", "chromium-browser", "google-chrome"):
        if found := shutil.which(name):
            return found
    folder = os.environ.get("PLAYWRIGHT_BROWSERS_PATH")
    folders = [Path(folder)] if folder else [Path.home() / ".cache", Path.home() / "Library" / "Caches"]
    for place in folders:
        for found_at in place.glob("chromium-*/*" if folder else "ms-playwright/chromium-*/*"):
            return str(found_at)
    return None


def constraints(root: Path) -> int:
    """Write the versions of .venv's packages to constraints.txt."""
    frozen = subprocess.run(
        [sys.executable, "-m", "pip", "freeze", "--all", "--exclude-editable", "--disable-pip-version-check"],
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    pins = [re.sub(r"\+\w+$", "", line) for line in frozen.splitlines() if re.match(r"[\w.-]+==", line)]
    pins = sorted((pin for pin in pins if not pin.startswith("pip==")), key=str.lower)
    (root / "constraints.txt").write_text(HEADER + "".join(pin + "\n" for pin in pins))
    say(f"lab: constraints.txt holds {len(pins)} versions")
    return Exit.FINE
