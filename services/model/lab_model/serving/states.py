"""One model of the catalogue: its state, its loading progress, and its card in `/v1/models` and `/ready`.

Knows states and sizes. Knows nothing of when a model is loaded, or how. Imports no torch.
"""

from __future__ import annotations

import re
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from ..models.catalogue import Entry
from ..models.kinds import KINDS
from ..models.progress import Step, read_progress
from ..models.sizes import Size

State = Literal["absent", "loading", "ready", "failed", "unloaded"]
DOWNLOADS = "downloads"  # the detail of a model whose files are being fetched


@dataclass
class Model:
    """progress: the file that its process writes its progress to. since: when its state began, as `time.monotonic()`.
    deployed: Serve has its application, which takes memory until it has ended; draining: it is ending.
    asked: a caller waits for it, so others may be unloaded. settled: its first load has ended.
    info, real (bytes of memory), seconds: of its last load."""

    entry: Entry
    progress: Path
    state: State = "unloaded"
    detail: str = ""
    since: float = field(default_factory=time.monotonic)
    size: Size | None = None
    wanted: bool = False
    asked: bool = False
    deployed: bool = False
    draining: bool = False
    settled: bool = False
    granted: int = 0  # bytes of memory
    info: dict[str, Any] = field(default_factory=dict)
    answered_at: float = 0.0
    real: int | None = None
    seconds: float = 0.0

    def enter(self, state: State, detail: str = "") -> None:
        if state != self.state:
            self.since = time.monotonic()
        self.state, self.detail = state, detail
        if state in ("ready", "failed", "absent"):
            self.settled = True
            self.wanted = self.asked = False

    @property
    def age(self) -> float:
        """Seconds in this state."""
        return time.monotonic() - self.since

    @property
    def step(self) -> Step | None:
        """The current step of loading and its progress; None if the model is not loading."""
        if self.state != "loading":
            return None
        if not self.deployed and self.detail != DOWNLOADS:
            return Step(self.detail or "waits")
        return read_progress(self.progress) or Step("starts its process")

    @property
    def seconds_left(self) -> int:
        """Seconds until it is loaded, 1 to 60, estimated from the progress; for Retry-After."""
        step = self.step
        if step is None or not step.percent:
            return 5
        return max(1, min(60, round(self.age * (100 - step.percent) / step.percent)))

    def describe(self) -> str:
        """Its state in words."""
        step = self.step
        percent = f" {step.percent} %" if step and step.percent is not None else ""
        words = f"{self.state}: {step.what}{percent}, {self.age:.0f} s" if step else str(self.state)
        return f"{words} ({self.detail})" if self.detail else words

    def card(self, predicted: int | None) -> dict[str, Any]:
        """Its entry in `/v1/models` and `/ready`. predicted: bytes of memory, None if its size is not known."""
        entry, info, size = self.entry, self.info, self.size
        card: dict[str, Any] = {"id": entry.id, "kind": entry.kind, "state": self.state, "load": entry.load}
        card |= {name: info[name] for name in info if name not in ("id", "kind")}
        card["endpoints"] = list(KINDS[entry.kind].paths)
        card["source"] = entry.source
        card |= {"licence": entry.licence, "languages": list(entry.languages) or None}
        if size:
            context = min([each for each in (size.context, entry.context) if each], default=None)
            card |= {"parameters": size.parameters, "disk_bytes": size.disk}
            card.setdefault("context", context)
            card["predicted_bytes"] = predicted
        if self.state == "ready":
            card |= {"seconds": round(self.seconds, 1)} | ({"memory_bytes": self.real} if self.real else {})
        if step := self.step:
            card["progress"] = {
                "what": step.what,
                "percent": step.percent,
                "seconds": round(self.age, 1),
            }
        if self.detail:
            card["detail"] = self.detail
        return card


def progress_file(folder: Path, name: str) -> Path:
    """The file to which the process that loads or fetches the model `name` writes its progress."""
    return folder / f"{re.sub(r'[^A-Za-z0-9._-]', '-', name)}.progress"
