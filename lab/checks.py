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
# Exact versions of everything that services, tests and images install, made by `make constraints` from .venv.
# pip takes them by -c: they choose versions, they install nothing. torch carries no build tag, so that
# `pip install torch` may take the CPU or the CUDA build.
"""

TOOLS = {  # those of .pre-commit-config.yaml too
    "ruff check": ["-m", "ruff", "check", "."],
    "ruff format": ["-m", "ruff", "format", "--check", "."],
    "mypy": ["-m", "mypy", "lab", "bench"],
    "assertions on a clock": ["tests/clocks.py"],
    "standard terms": ["tests/terms.py"],
}


def check(root: Path) -> int:
    """Lint, format, types, no assertion on a clock, no old term. All run; 1 if any complains."""
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
}


def test(root: Path, lane: str, arguments: Sequence[str]) -> int:
    """One lane of the tests: pytest's exit code, and one closing line over its calls."""
    arguments = [*given_arguments(os.environ), *arguments]
    if lane == "stack":
        return _pytest(root, ["-m", "stack", *arguments])
    need_chromium()
    environ = {"LAB_TEST_FULL": "1"} if lane == "all" else {}
    # 1. Side by side, a worker for each core; 2. what stops shared services or needs the machine to itself.
    parallel = ["-n", str(cores()), "--dist", "loadgroup", "--no-loadscope-reorder"]
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        counts = Path(folder) / "counts"
        environ["LAB_TEST_COUNTS"] = str(counts)
        codes = [
            _pytest(root, ["-m", "not alone and not stack and not gpu", *parallel, *arguments], environ),
            _pytest(root, ["-m", "alone and not stack and not gpu", *arguments], environ),
        ]
        say(closing_line(counts.read_text().splitlines() if counts.exists() else [], time.monotonic() - began))
    # 3. With a selection (ARGS="-k cache") one of the calls may find nothing to run.
    return max((code for code in codes if code != NOTHING_COLLECTED), default=NOTHING_COLLECTED)


def closing_line(counts: Sequence[str], seconds: float) -> str:
    """pytest's closing line over several calls, each a line of JSON: outcome -> count (tests/conftest.py)."""
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
    """Make sure of a browser for the browser test: there, else from the system's packages, else Playwright's own."""
    if chromium():
        return
    say("lab: installing chromium for the browser test")
    if shutil.which("apt-get"):
        root = [] if os.getuid() == 0 else ["sudo", "-n"]
        packages = ["chromium", "fonts-noto-cjk"]
        environ = dict(os.environ) | {"DEBIAN_FRONTEND": "noninteractive"}
        for command in (["update", "-q"], ["install", "-yq", "--no-install-recommends", *packages]):
            subprocess.run([*root, "apt-get", *command], env=environ, stdout=subprocess.DEVNULL, check=False)
    if not chromium():
        subprocess.run([sys.executable, "-m", "playwright", "install", "chromium"], check=False)
    if not chromium():
        raise LabError(Exit.BROWSER, "the browser test needs chromium, which could not be installed; install it "
                      "(apt-get install chromium), then repeat the command")  # fmt: skip


def chromium() -> str | None:
    """The browser on PATH, or the one that Playwright fetched; None without."""
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
    """Write constraints.txt from what .venv holds."""
    frozen = subprocess.run(
        [sys.executable, "-m", "pip", "freeze", "--all", "--exclude-editable", "--disable-pip-version-check"],
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    pins = [re.sub(r"\+\w+$", "", line) for line in frozen.splitlines() if re.match(r"[\w.-]+==", line)]
    pins = sorted((pin for pin in pins if not pin.startswith("pip==")), key=str.lower)
    (root / "constraints.txt").write_text(HEADER + "".join(pin + "\n" for pin in pins))
    say(f"lab: constraints.txt holds {len(pins)} versions")
    return Exit.FINE
