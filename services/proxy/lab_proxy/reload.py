"""Files that may change while the proxy runs: read anew at SIGHUP, and when their time or size differs.

Knows paths and that a file can be wrong. What is in it is its reader's affair: one that is no good changes nothing.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from importlib import resources
from pathlib import Path
from typing import Any, Protocol, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from .telemetry.metrics import Metrics

log = logging.getLogger("lab_proxy.watch")

LOOK_SECONDS = 1.0

Shape = TypeVar("Shape", bound=BaseModel)


class Readable(Protocol):
    """What is read from files."""

    def files(self) -> list[Path]:
        """The files it is read from, now."""

    def reload(self) -> None:
        """Read them again, as a whole. Raises ValueError and changes nothing where they are no good."""


class Reloader:
    """Keeps what was read from files as the files are. `after` hears of each good reading."""

    def __init__(
        self, read: Mapping[str, Readable], metrics: Metrics, after: Callable[[], None] = lambda: None
    ) -> None:
        self._read = dict(read)
        self._metrics = metrics
        self._after = after
        self._seen = {name: _looks(each) for name, each in self._read.items()}
        self._trouble: dict[str, str] = {}
        self._times: dict[str, tuple[int, float]] = {name: (1, time.time()) for name in self._read}
        self._task: asyncio.Task[None] | None = None
        metrics.watch(self._gauges)

    async def start(self) -> None:
        loop = asyncio.get_running_loop()
        with suppress(NotImplementedError, RuntimeError, ValueError):  # no signals here, or not the main thread
            loop.add_signal_handler(signal.SIGHUP, self.reload)
        self._task = loop.create_task(self._watch(), name="watch")

    async def stop(self) -> None:
        if self._task:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    def reload(self) -> None:
        """Read all files again, whether they look different or not."""
        for name, each in self._read.items():
            self._again(name, each)

    def report(self) -> dict[str, Any]:
        """For the status page: how often each was read, when last, and what is wrong with what lies there now."""
        return {
            name: {"generation": turn, "read": int(at)}
            | ({"trouble": self._trouble[name]} if name in self._trouble else {})
            for name, (turn, at) in self._times.items()
        }

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(LOOK_SECONDS)
            self._look()

    def _look(self) -> None:
        for name, each in self._read.items():
            if _looks(each) != self._seen[name]:
                self._again(name, each)

    def _again(self, name: str, each: Readable) -> None:
        self._seen[name] = _looks(each)
        try:
            each.reload()
        except ValueError as error:
            self._trouble[name] = str(error)
            self._metrics.count("reloads", name, "refused")
            log.error("%s: the file is no good, the one before it stays in use: %s", name, error)  # noqa: TRY400
            return
        self._seen[name] = _looks(each)  # it may name other files now
        self._trouble.pop(name, None)
        self._times[name] = (self._times[name][0] + 1, time.time())
        self._metrics.count("reloads", name, "read")
        log.info("%s: read anew", name)
        self._after()

    def _gauges(self) -> Mapping[str, Mapping[tuple[str, ...], float]]:
        failing: dict[tuple[str, ...], float] = {(name,): float(name in self._trouble) for name in self._read}
        turns: dict[tuple[str, ...], float] = {(name,): float(turn) for name, (turn, _) in self._times.items()}
        return {"reload_failing": failing, "generation": turns}


def _looks(each: Readable) -> list[tuple[int, int, int] | None]:
    """What tells a changed file: time, size, and which file it is, as editors and ConfigMaps put a new one in place."""
    looks: list[tuple[int, int, int] | None] = []
    for path in each.files():
        try:
            found = path.stat()
        except OSError:
            looks.append(None)
        else:
            looks.append((found.st_mtime_ns, found.st_size, found.st_ino))
    return looks


def read_yaml(shape: type[Shape], path: Path | None, packaged: str, variable: str) -> Shape:
    """The file at `path`, else the one in the package. Raises ValueError in one line that names the variable."""
    try:
        text = (path or resources.files("lab_proxy").joinpath(packaged)).read_text("utf-8")
        return shape.model_validate(yaml.safe_load(text))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"{variable} cannot be read: {' '.join(str(error).split())}") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        why = first["msg"].removeprefix("Value error, ")
        raise ValueError(f"{variable} is wrong at {where or 'the top'}: {why}") from None
