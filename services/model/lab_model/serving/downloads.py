"""Fetches models in processes of their own, by `lab_model.cli`, and reports their progress.

Knows processes and progress files. Knows nothing of hubs or packages. Imports no torch.
"""

from __future__ import annotations

import asyncio
import logging
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..models.progress import Step, read_progress
from .states import progress_file

log = logging.getLogger(__name__)


class Downloads:
    """folder: holds the progress files. offline: downloads are forbidden. settings: environment variables for
    `lab_model.cli`; those that are None are not set."""

    def __init__(self, folder: Path, *, offline: bool, settings: Mapping[str, Path | None]) -> None:
        self._folder = folder
        self._environment = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
        self._environment |= {"HF_HUB_OFFLINE": "1"} if offline else {}
        self._environment |= {name: str(value) for name, value in settings.items() if value}
        self.running: set[str] = set()  # models whose files are being fetched in order to be loaded
        self.adding: dict[str, Any] | None = None  # the model that is being added, or was added last

    async def fetch(self, id_: str) -> str:
        """Fetch the files of a model of the catalogue. Returns why it failed, empty if it succeeded."""
        self.running.add(id_)
        try:
            return await self._run("fetch", id_, progress_file(self._folder, id_))
        finally:
            self.running.discard(id_)

    @property
    def busy(self) -> str | None:
        """The name of the model that is being added, None if none is."""
        return self.adding["name"] if self.adding and self.adding["state"] == "loading" else None

    def begin(self, name: str) -> None:
        """Mark the model as being added (`busy`) until `add` has ended."""
        self.adding = {"name": name, "state": "loading", "since": time.monotonic()}

    async def add(self, name: str) -> None:
        """Fetch a model and add it to the catalogue."""
        why = await self._run("add", name, self._added)
        self.adding = {"name": name, "state": "failed" if why else "ready", "detail": why}
        log.info("%s %s", name, f"cannot be added: {why}" if why else "is added")

    def report(self) -> dict[str, Any] | None:
        """The model that is being added: name, state, and progress or reason of a failure."""
        if self.adding is None:
            return None
        found = {name: value for name, value in self.adding.items() if name != "since"}
        if found["state"] == "loading":
            step = read_progress(self._added) or Step("begins")
            found["progress"] = step._asdict() | {"seconds": round(time.monotonic() - self.adding["since"], 1)}
        return found

    @property
    def _added(self) -> Path:
        return progress_file(self._folder, "added")

    async def _run(self, command: str, name: str, file: Path) -> str:
        """Run the command. Returns its error message, empty if it succeeded."""
        await asyncio.to_thread(file.unlink, missing_ok=True)
        try:
            process = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "lab_model.cli", command, name, "--progress-file", str(file),
                stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.PIPE,
                env=self._environment,
            )  # fmt: skip
        except OSError as error:
            return f"the download cannot be started: {error.strerror}"
        try:
            _, err = await process.communicate()
        finally:
            if process.returncode is None:
                process.terminate()
        if not process.returncode:
            return ""
        lines = err.decode(errors="replace").strip().splitlines()
        return lines[-1].removeprefix("model: ") if lines else f"exit code {process.returncode}"
