"""`make check`, `make test` and `make constraints`: the commands that developers and CI run."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from lab.doctor import chromium
from lab.terminal import Exit, LabError, say

HEADER = """\
# Exact versions of everything that services, tests and images install, made by `make constraints` from .venv.
# pip takes them by -c: they choose versions, they install nothing. torch carries no build tag, so that
# `pip install torch` may take the CPU or the CUDA build.
"""


def check(root: Path) -> int:
    """Lint, format, types. All three run; 1 if any complains."""
    places = [*root.glob("services/*/lab_*"), *root.glob("load/lab_*")]
    packages = sorted(str(place) for place in places if place.suffix != ".egg-info")
    failed = []
    for name, argv in {
        "ruff check": ["ruff", "check", "."],
        "ruff format": ["ruff", "format", "--check", "."],
        "mypy": ["mypy", "lab", "bench", *packages],
    }.items():
        say(f"lab: {name}")
        if subprocess.run([sys.executable, "-m", *argv], cwd=root, check=False).returncode:
            failed.append(name)
    say(f"lab: {', '.join(failed)} failed" if failed else "lab: lint, format and types are fine")
    return 1 if failed else Exit.FINE


def test(root: Path, arguments: Sequence[str]) -> int:
    """pytest with everything but containers and GPU; its own summary comes last."""
    need_chromium()
    argv = ["pytest", "-m", "not stack and not gpu", *shlex.split(os.environ.get("ARGS", "")), *arguments]
    return subprocess.run([sys.executable, "-m", *argv], cwd=root, check=False).returncode


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
        raise LabError(Exit.BROWSER, "the browser test needs chromium which could not be installed; install it by hand "
                      "(apt-get install chromium), then the same command")  # fmt: skip


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
