"""Reload of files while the proxy runs: at SIGHUP, or when a watcher of their folders sees a change.

Knows paths and faults of files; their readers know the content. If a file is faulty, its old content stays in use.
"""

import asyncio
import logging
import signal
import time
from collections.abc import Callable, Mapping
from contextlib import aclosing, suppress
from importlib import resources
from pathlib import Path
from typing import Any, Protocol, TypeVar

import yaml
from pydantic import BaseModel, ValidationError
from watchfiles import awatch

from .tasks import end, supervise

log = logging.getLogger("lab_proxy.watch")

STEP_MS = 100  # without a further change; then the files are compared
LOOK_MS = 5_000  # between two comparisons without a change: for file systems that report none

Shape = TypeVar("Shape", bound=BaseModel)


class Readable(Protocol):
    """An object that is read from files."""

    def files(self) -> list[Path]:
        """The files it is currently read from."""

    def reload(self) -> None:
        """Read all of them again. Raises ValueError and changes nothing if one is faulty."""


class _Watched:
    """What is read, and its state."""

    def __init__(self, read: Readable) -> None:
        self.read, self.signature = read, _signature(read)
        self.generation, self.at, self.trouble = 1, time.time(), ""

    def report(self) -> dict[str, Any]:
        trouble = {"trouble": self.trouble} if self.trouble else {}
        return {"generation": self.generation, "read": int(self.at), **trouble}


class Reloader:
    """Reloads `read` when its files change. A part: start and stop it."""

    def __init__(
        self,
        read: Mapping[str, Readable],
        *,
        after: Callable[[], None] = lambda: None,
        on_reload: Callable[[str, str], None] = lambda *_: None,
    ) -> None:
        """`after` runs after each successful reload; `on_reload(name, outcome)` after each attempt: read or refused."""
        self._watched = {name: _Watched(each) for name, each in read.items()}
        self._after, self._on_reload = after, on_reload
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        with suppress(NotImplementedError, RuntimeError, ValueError):  # no signals here, or not the main thread
            asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, self.reload)
        if any(each.read.files() for each in self._watched.values()):
            self._task = supervise("watch", self._watch)

    async def stop(self) -> None:
        await end(self._task)

    def reload(self) -> None:
        """Read all files again, changed or not."""
        for name, each in self._watched.items():
            self._reload_one(name, each)

    def report(self) -> dict[str, Any]:
        """For the status page: number of reads, time of the last one, and the fault of the current file, if any."""
        return {name: each.report() for name, each in self._watched.items()}

    async def _watch(self) -> None:
        while True:
            folders = self._folders()
            changes = awatch(
                *folders,
                watch_filter=None,
                step=STEP_MS,
                rust_timeout=LOOK_MS,
                yield_on_timeout=True,
                recursive=False,
            )
            async with aclosing(changes):
                while folders == self._folders():
                    await anext(changes)
                    self._check()

    def _folders(self) -> set[Path]:
        """Folders of the files, and of those that they link to: in a ConfigMap a link beside the files changes."""
        paths = {path for each in self._watched.values() for path in each.read.files()}
        return {folder for path in paths for folder in (path.parent, path.resolve().parent) if folder.is_dir()}

    def _check(self) -> None:
        for name, each in self._watched.items():
            if _signature(each.read) != each.signature:
                self._reload_one(name, each)

    def _reload_one(self, name: str, each: _Watched) -> None:
        each.signature = _signature(each.read)
        try:
            each.read.reload()
        except Exception as error:  # whatever a file holds, the old content stays
            each.trouble = str(error) if isinstance(error, ValueError) else f"the file cannot be read: {error!r}"
            self._on_reload(name, "refused")
            log.error("%s: the file is faulty, its previous content stays in use: %s", name, error)  # noqa: TRY400
            return
        each.signature = _signature(each.read)  # the new content may name other files
        each.trouble, each.generation, each.at = "", each.generation + 1, time.time()
        self._on_reload(name, "read")
        log.info("%s: reloaded", name)
        self._after()

    def gauges(self) -> Mapping[str, Mapping[tuple[str, ...], float]]:
        return {
            "reload_failing": {(name,): float(bool(each.trouble)) for name, each in self._watched.items()},
            "generation": {(name,): float(each.generation) for name, each in self._watched.items()},
        }


def _signature(each: Readable) -> list[tuple[int, int, int] | None]:
    """Modification time, size and inode of each file: editors and ConfigMaps replace files by new ones."""
    signature: list[tuple[int, int, int] | None] = []
    for path in each.files():
        found = None
        with suppress(OSError):
            found = path.stat()
        signature.append(found and (found.st_mtime_ns, found.st_size, found.st_ino))
    return signature


def read_yaml(shape: type[Shape], path: Path | None, packaged: str, variable: str) -> Shape:
    """The YAML file at `path`, or the packaged one. Raises ValueError with one line that names the variable."""
    try:
        text = (path or resources.files(__package__).joinpath(packaged)).read_text("utf-8")
        return shape.model_validate(yaml.safe_load(text))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        why = first["msg"].removeprefix("Value error, ")
        raise ValueError(f"{variable} is wrong at {where or 'the top'}: {why}") from None
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:  # a ValueError: 2026-99-99, or no UTF-8
        raise ValueError(f"{variable} cannot be read: {' '.join(str(error).split())}") from None
