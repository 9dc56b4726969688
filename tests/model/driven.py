"""An engine in its own thread and what it delivered. Tests pause it between steps and set its clock."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
from lab_model.engine.request import EngineFaultError, Request, StepOutput
from lab_model.engine.scheduler import Scheduler
from processes import GENEROUS_SECONDS, eventually


class Driven:
    """tokens, ended: what was delivered and the last event, by request. reports: how often the engine delivered.
    idle: the last report was that nothing runs.

    Used in a `with`, which closes the engine. An event after a request's last one fails the test there.
    """

    def __init__(self, runner: Any, **limits: Any) -> None:
        self.tokens: dict[Request, list[int]] = {}
        self.ended: dict[Request, StepOutput] = {}  # in the order in which they ended
        self.reports, self.idle = 0, False
        self._too_late: list[StepOutput] = []
        self._changed = threading.Condition()
        self._pause = threading.Lock()
        self.engine = Scheduler(runner, self._deliver, **limits)
        self.engine.start()

    def __enter__(self) -> Driven:
        return self

    def __exit__(self, *_: object) -> None:
        self.engine.close()
        assert not self._too_late, "an event after the end"

    def _deliver(self, events: list[StepOutput]) -> None:
        # The engine reports that it is idle with its lock held: a pause there would block `submit`.
        stats = self.engine.stats()
        idle = not (events or stats.running or stats.waiting)
        with self._changed:
            self.reports, self.idle = self.reports + 1, idle
            for event in events:
                if event.request in self.ended:
                    self._too_late.append(event)
                self.tokens.setdefault(event.request, []).extend(event.tokens)
                if event.finish or event.error:
                    self.ended[event.request] = event
            self._changed.notify_all()
        if not idle:
            with self._pause:
                pass

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """At most one step runs inside: the engine waits after it until the end of the block."""
        with self._pause:
            yield

    def wait(self, requests: Sequence[Request]) -> None:
        """Until all of them have ended."""
        with self._changed:
            ended = self._changed.wait_for(lambda: all(r in self.ended for r in requests), GENEROUS_SECONDS)
        assert ended, "not finished"

    def started(self, request: Request) -> None:
        """Until its first token."""
        with self._changed:
            assert self._changed.wait_for(lambda: self.tokens.get(request), GENEROUS_SECONDS), "no first token"

    def answer(self, *requests: Request) -> list[list[int]]:
        self.engine.submit(*requests)
        self.wait(requests)
        return [self.tokens[request] for request in requests]

    def fails(self, request: Request) -> None:
        """It ends as one whose step failed."""
        self.engine.submit(request)
        self.wait([request])
        assert isinstance(self.ended[request].error, EngineFaultError)

    def settled(self) -> None:
        """Nothing runs, nothing waits, every page is free."""

        def free() -> bool:
            stats = self.engine.stats()
            return (stats.running, stats.waiting, stats.pages_used) == (0, 0, 0)

        eventually(free, what=f"nothing runs and no page is held: {self.engine.stats()}")


class Clock:
    """The engine's time.monotonic, which goes on only where the test says so. `read`: how often it was read."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.read = 0.0, 0
        self.module = SimpleNamespace(monotonic=self._monotonic)  # stands for `time`
        monkeypatch.setattr("lab_model.engine.scheduler.time", self.module)

    def _monotonic(self) -> float:
        self.read += 1
        return self.now
