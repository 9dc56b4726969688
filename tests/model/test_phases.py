"""Phases of a request at the model service: where each begins, counted by events, and how they are reported."""

from __future__ import annotations

import itertools
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import tiny
from driven import Driven
from inprocess import InProcess
from lab_model.api import completions
from lab_model.api.http import timing
from lab_model.api.http.timing import SLOTS, TimingRing, find, id_of, phases
from lab_model.engine.request import Request
from lab_model.runners.llama import LlamaRunner
from lab_model.weights import llama as llama_weights
from tiny import one_thread  # noqa: F401 - of all tests here


class Logged(LlamaRunner):
    """Logs what it computes."""

    log: list[str]

    def prefill(self, *args: Any) -> Any:
        self.log.append("computes a prompt")
        return super().prefill(*args)

    def decode(self, *args: Any) -> Any:
        self.log.append("computes a token")
        return super().decode(*args)


def test_a_phase_begins_with_the_step_that_computes_it() -> None:
    """The second of two requests waits for the only place: its prefill begins with the first piece of its prompt, which
    has three, and its decode with its first token."""
    model = tiny.model("llama")
    runner = Logged(llama_weights.from_model(model), model.device, model.dtype)
    log: list[str] = []
    runner.log = log

    def report(name: str, phase: str) -> None:
        log.append(f"{name}: {phase}")

    one = Request([5] * 10, 3, on_phase=partial(report, "one"))
    other = Request([6] * 700, 2, on_phase=partial(report, "other"))
    with Driven(runner, max_running=1) as driven:
        driven.answer(one, other)
    assert log == [
        "one: prefill", "computes a prompt", "one: decode", "computes a token", "computes a token",
        "other: prefill", *["computes a prompt"] * 3, "other: decode", "computes a token",
    ]  # fmt: skip


def test_a_preempted_request_keeps_its_phase() -> None:
    """Two requests need more pages than there are: the younger one is computed again, and reports nothing twice."""
    model = tiny.model("llama")
    runner = LlamaRunner(llama_weights.from_model(model), model.device, model.dtype)
    seen: list[str] = []
    requests = [Request([5 + n] * 40, 60, on_phase=seen.append) for n in range(2)]
    with Driven(runner, kv_tokens=160) as driven:
        driven.answer(*requests)
        assert driven.engine.stats().preempted
    assert sorted(seen) == ["decode", "decode", "prefill", "prefill"]


@pytest.fixture
def ring(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TimingRing:
    """A ring in `tmp_path`. Each look at the clock is one second later."""
    seconds = itertools.count(1)
    monkeypatch.setattr(timing.time, "monotonic", lambda: float(next(seconds)))
    made = TimingRing()
    made.open(tmp_path)
    return made


def test_a_running_request_is_in_its_last_phase(ring: TimingRing, tmp_path: Path) -> None:
    line = ring.begin("a", 0.5)
    for moment, state in (("queue", "queue"), ("prefill", "prefill"), ("decode", "decode"), ("end", "ended")):
        line.mark(moment)
        line.mark(moment)  # by another choice: the first one counts
        found = find(tmp_path, "a")
        assert found is not None
        assert found["state"] == state
    assert found["phases"] == [
        {"name": "prepare", "start_ms": 0, "ms": 500}, {"name": "queue", "start_ms": 500, "ms": 2000},
        {"name": "prefill", "start_ms": 2500, "ms": 2000}, {"name": "decode", "start_ms": 4500, "ms": 2000},
    ]  # fmt: skip
    assert find(tmp_path, "b") is None


def test_a_slot_that_another_request_took_is_not_written_to(ring: TimingRing, tmp_path: Path) -> None:
    line = ring.begin("a", 1.0)
    for number in range(SLOTS):
        ring.begin(f"b{number}", 1.0)
    line.mark("end")
    assert find(tmp_path, "a") is None
    last = find(tmp_path, f"b{SLOTS - 1}")
    assert last is not None
    assert last["state"] == "prepare"


def test_a_request_that_ended_in_the_queue_has_no_later_phase() -> None:
    found = phases((1.0, 1.5, 0.0, 0.0, 4.0), 9.0)
    assert found == {"state": "ended", "phases": [
        {"name": "prepare", "start_ms": 0, "ms": 500}, {"name": "queue", "start_ms": 500, "ms": 2500},
    ]}  # fmt: skip


@pytest.mark.parametrize(
    ("path", "id_"),
    [("/v1/requests/a.1/timing", "a.1"), ("/v1/requests/a.1", ""), ("/v1/requests//timing", "")],
)
def test_the_id_is_in_the_path(path: str, id_: str) -> None:
    assert id_of(path) == id_


@pytest.mark.parametrize("stream", [True, False])
async def test_an_answer_is_recorded_by_its_call_id(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stream: bool
) -> None:
    """The phases of a whole answer with two choices, under the id of the proxy's call."""
    made = TimingRing()
    made.open(tmp_path)
    monkeypatch.setattr(completions, "TIMINGS", made)
    app = InProcess()
    try:
        answer = await app.ask({"x-call-id": "c.1", "x-request-id": "r"}, max_tokens=4, n=2, stream=stream)
        assert answer.status_code == 200
    finally:
        await app.close()
    found = find(tmp_path, "c.1")
    assert found is not None
    assert found["state"] == "ended"
    assert [each["name"] for each in found["phases"]] == ["prepare", "queue", "prefill", "decode"]
    assert find(tmp_path, "r") is None
