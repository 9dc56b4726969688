"""The engine against a plain model of it: any order of submits, cancels, ends, deadlines and faults.

The runner is a stand-in that remembers which token lies in which page and answers from what it reads there: a page that
was shared wrongly, written twice or not computed again changes an answer.
"""

from __future__ import annotations

import threading
import time
import zlib
from collections.abc import Sequence
from functools import cache
from typing import Any

import pytest
import tiny
import torch
from counts import cases
from driven import Clock, Driven
from hypothesis import HealthCheck, settings
from hypothesis import event as count
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from lab_model.engine.kv_pages import PAGE_TOKENS
from lab_model.engine.request import (
    DeadlineError,
    EngineClosedError,
    EngineFaultError,
    QueueFullError,
    Request,
    StepOutput,
)
from lab_model.engine.runner import Span
from lab_model.engine.sampler import sample
from lab_model.engine.sampling_params import SampledToken, SamplingParams, SamplingState
from lab_model.engine.scheduler import MOST_FAULTS, Scheduler
from lab_model.runners.llama import LlamaRunner
from lab_model.runners.transformers import TransformersRunner
from lab_model.weights import llama as llama_weights
from processes import GENEROUS_SECONDS
from tiny import one_thread  # noqa: F401 - of all tests here

VOCABULARY = 64
POISON = 7  # a text that holds it has logits of NaN; no text that does not can come to it


def scores(text: Sequence[int]) -> torch.Tensor:
    """The stand-in's logits: a function of the whole text and nothing else."""
    if POISON in text:
        return torch.full((VOCABULARY,), float("nan"))
    noise = torch.Generator().manual_seed(zlib.crc32(bytes(text)))
    made = torch.randn(VOCABULARY, generator=noise) * 3
    made[POISON] = -float("inf")
    return made


class Memory:
    """A runner whose pool holds the token ids themselves, and nothing where nobody wrote."""

    def __init__(self, exact: bool, context: int) -> None:
        self.batch_invariant, self.context, self.vocab = exact, context, VOCABULARY
        self.broken = False

    def allocate(self, pages: int) -> None:
        self.pool: list[list[int | None]] = [[None] * PAGE_TOKENS for _ in range(pages)]

    def read(self, pages: Sequence[int], stop: int) -> list[int | None]:
        return [token for page in pages for token in self.pool[page]][:stop]

    def _write(self, pages: Sequence[int], place: int, token: int) -> None:
        page = pages[place // PAGE_TOKENS]
        assert page, "page 0 is for padding"
        self.pool[page][place % PAGE_TOKENS] = token

    def _scores(self, pages: Sequence[int], stop: int) -> torch.Tensor:
        text = self.read(pages, stop)
        assert None not in text, "a token that nobody computed"
        return scores([token for token in text if token is not None])

    def _fail(self) -> None:
        if self.broken:
            self.broken = False
            raise RuntimeError("made for this test")

    def prefill(self, ids: Sequence[int], spans: Sequence[Span]) -> torch.Tensor:
        left = list(ids)
        for span in spans:
            assert span.stop <= len(span.pages) * PAGE_TOKENS
            for place in range(span.start, span.stop):
                self._write(span.pages, place, left.pop(0))
        assert not left
        self._fail()
        return torch.stack([self._scores(span.pages, span.stop) for span in spans])

    def all_logits(self, ids: Sequence[int], pages: Sequence[int]) -> torch.Tensor:
        return torch.stack([scores(ids[: stop + 1]) for stop in range(len(ids))])

    def decode(self, ids: Sequence[int], positions: Sequence[int], pages: Sequence[Sequence[int]]) -> torch.Tensor:
        for token, place, row in zip(ids, positions, pages, strict=True):
            self._write(row, place, token)
        self._fail()
        return torch.stack([self._scores(row, place + 1) for row, place in zip(pages, positions, strict=True)])

    def zero_pages(self, pages: Sequence[int]) -> None:
        for page in pages:
            self.pool[page] = [None] * PAGE_TOKENS


def expected(request: Request) -> tuple[list[int], str]:
    """What this request gets when it is alone in the world: its tokens, and how it ends."""
    draw = SamplingState(request.sampling, request.prompt)
    tokens: list[int] = []
    while True:
        (choice,) = sample(scores([*request.prompt, *tokens])[None], [draw])
        if not isinstance(choice, SampledToken):
            return tokens, "fault"
        if choice.token in request.stop_ids:
            return tokens, "stop"
        tokens.append(choice.token)
        if len(tokens) == request.max_tokens:
            return tokens, "length"


SHARED = [[(i * step) % 50 + 10 for i in range(300)] for step in (1, 3)]  # beginnings that prompts have in common
PROMPTS = st.builds(
    lambda start, length, tail: SHARED[start][:length] + tail,
    st.integers(0, 1),
    st.sampled_from([0, 5, 31, 32, 33, 64, 65, 100, 256, 290]),
    st.lists(st.integers(8, 60), min_size=1, max_size=20),
)
SAMPLINGS = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 1.0]),
    top_p=st.sampled_from([0.7, 1.0]),
    repetition_penalty=st.sampled_from([1.0, 1.2]),
    seed=st.integers(0, 5),
)


class EngineMachine(RuleBasedStateMachine):
    """The engine, stepped by hand as its thread would, beside what a reader of its documentation expects."""

    batch_invariant = True

    @initialize(pages=st.integers(12, 18), places=st.integers(2, 6), queue=st.integers(0, 6))
    def begin(self, pages: int, places: int, queue: int) -> None:
        self.runner = Memory(self.batch_invariant, 12 * PAGE_TOKENS)
        self.engine = Scheduler(
            self.runner, lambda _: None, kv_tokens=pages * PAGE_TOKENS, max_running=places, max_queued=queue
        )
        self.number: dict[Request, int] = {}  # in the order of their submission
        self.heard: dict[Request, list[int]] = {}
        self.ended: dict[Request, StepOutput] = {}
        self.gone: set[Request] = set()  # cancelled
        self.late: set[Request] = set()
        self.faults = 0

    @property
    def live(self) -> list[Request]:
        return [r for r in self.number if r not in self.ended and r not in self.gone]

    def hear(self, events: list[StepOutput]) -> None:
        for event in events:
            assert event.request not in self.ended, "an event after the end"
            if event.request in self.gone:
                assert event.finish or event.error, "more than the last event after the cancellation"
                self.ended[event.request] = event
                continue
            self.heard[event.request] += event.tokens
            if event.finish or event.error:
                self.ended[event.request] = event

    def turn(self) -> bool:
        """One turn of the loop; whether there was anything to do."""
        events: list[StepOutput] = []
        with self.engine._changed:
            self.engine._drop(events)
            self.engine._admit()
        busy = bool(self.engine._running)
        assert busy or not self.engine._waiting, "somebody waits and nobody runs"
        failing = self.runner.broken
        try:
            self.engine._step(events)
        except RuntimeError:
            assert failing
            self.faults += 1
            events += self.engine._fail_running(EngineFaultError("made for this test"))
        self.hear(events)
        return busy

    @rule(
        prompts=st.lists(PROMPTS, min_size=1, max_size=4),
        tokens=st.sampled_from([1, 2, 33, 64]),
        sampling=SAMPLINGS,
        stops=st.frozensets(st.integers(8, 60), max_size=3),
        poisoned=st.integers(0, 15),
    )
    def submit(
        self, prompts: list[list[int]], tokens: int, sampling: SamplingParams, stops: frozenset[int], poisoned: int
    ) -> None:
        if not poisoned:
            prompts[0].append(POISON)
        asked = [Request(prompt, tokens, stops, sampling) for prompt in prompts]
        room = self.engine.capacity - len(self.engine._running) - len(self.engine._waiting)
        if len(asked) > room:
            with pytest.raises(QueueFullError) as full:
                self.engine.submit(*asked)
            assert full.value.retry_after >= 0
            return
        self.engine.submit(*asked)
        for request in asked:
            self.number[request] = len(self.number)
            self.heard[request] = []

    @rule(start=st.sampled_from([0, 31, 40, 255]), count=st.integers(3, 6), turns=st.integers(30, 70))
    def crowd(self, start: int, count: int, turns: int) -> None:
        """Several at once that begin alike and grow together: until the pages run out and some are sent back."""
        for number in range(count):
            room = self.engine.capacity - len(self.engine._running) - len(self.engine._waiting)
            if room:
                request = Request([*SHARED[0][:start], 10 + number], 64, sampling=SamplingParams(1.0, seed=number))
                self.engine.submit(request)
                self.number[request] = len(self.number)
                self.heard[request] = []
        self.steps(turns)

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        request = data.draw(st.sampled_from(self.live))
        self.engine.cancel(request)
        self.gone.add(request)

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def deadline_passes(self, data: st.DataObject) -> None:
        request = data.draw(st.sampled_from(self.live))
        request.deadline = time.monotonic() - 1
        self.late.add(request)

    @precondition(lambda self: self.live)
    @rule(turns=st.sampled_from([1, 3, 40]))
    def go_on(self, turns: int) -> None:
        self.steps(turns)

    def steps(self, turns: int) -> None:
        for _ in range(turns):
            if not self.turn():
                break
            self.whole()

    @precondition(lambda self: self.engine._running)
    @rule()
    def a_step_fails(self) -> None:
        self.runner.broken = True
        held = [r for r in self.engine._running if not r.cancelled and r not in self.late]
        before = self.engine.stats().preempted
        self.turn()
        if not self.runner.broken:
            # Whoever was sent back for want of pages in this very step was not part of it any more and waits again.
            unheard = [r for r in held if r not in self.ended]
            assert set(unheard) <= set(self.engine._waiting), "a request in flight did not hear of the fault"
            assert len(unheard) <= self.engine.stats().preempted - before, "a failed request waits again"
        self.runner.broken = False

    @invariant()
    def whole(self) -> None:
        """Slots, pages and order."""
        engine = self.engine
        queue = [*engine._running, *engine._waiting]
        # Order: who came first is served first; who was sent back is before those that never ran.
        assert [self.number[r] for r in queue] == sorted(self.number[r] for r in queue)
        assert len(engine._running) <= engine._max_running
        assert len(queue) <= engine.capacity
        assert set(self.live) == {r for r in queue if r not in self.gone}
        # Pages: those that run hold their own, each one once; what lies in them is what their owners computed.
        held = {page for request in engine._running for page in request.pages}
        assert not [r for r in engine._waiting if r.pages or r.computed_tokens]
        assert all(len(set(r.pages)) == len(r.pages) for r in engine._running)
        stats = engine.stats()
        assert (stats.running, stats.waiting) == (len(engine._running), len(engine._waiting))
        assert stats.pages_used == len(held)
        assert stats.pages_used + stats.pages_kept <= stats.pages_total
        for request in engine._running:
            assert self.runner.read(request.pages, request.computed_tokens) == request.tokens[: request.computed_tokens]

    def teardown(self) -> None:
        """Everybody who stayed gets the answer that is due alone; then every page is free or kept."""
        if not hasattr(self, "engine"):
            return
        while self.turn():
            self.whole()
        assert not self.live
        stats = self.engine.stats()
        assert stats.pages_used == 0
        count(f"sent back: {min(stats.preempted, 3)}")
        count(f"began in the cache: {stats.reused_tokens > 0}")
        for request, heard in self.heard.items():
            tokens, end = expected(request)
            assert heard == tokens[: len(heard)]
            event = self.ended[request]
            if request in self.gone:
                continue
            if event.finish:
                assert (heard, event.finish) == (tokens, end)
            elif isinstance(event.error, DeadlineError):
                assert request in self.late
            else:
                assert isinstance(event.error, EngineFaultError)
                assert end == "fault" or self.faults


class InexactMachine(EngineMachine):
    """Prompts in fixed pieces, as for models whose results depend on how many tokens are computed together."""

    batch_invariant = False


MANY = settings(
    max_examples=cases(10, 30), stateful_step_count=25, deadline=None, suppress_health_check=list(HealthCheck)
)
TestExact = EngineMachine.TestCase
TestExact.settings = MANY
TestInexact = InexactMachine.TestCase
TestInexact.settings = MANY
# Hypothesis takes up to five minutes to make a failure small: cut off before, it would not be shown at all.
TestExact.pytestmark = TestInexact.pytestmark = pytest.mark.timeout(600)  # type: ignore[attr-defined]


# ---- in its own thread


def test_after_a_fault_the_loop_goes_on_and_counts_it() -> None:
    """Those in flight get EngineFaultError, those in the queue and after it their answer; the engine stays alive."""
    runner = Memory(True, 256)
    with Driven(runner, max_running=2) as driven:
        running = [Request([10, 11, 12], 200), Request([13, 14], 200)]
        queued, later = Request([20, 21], 20), Request([10, 11, 12], 20)
        runner.broken = True
        driven.engine.submit(*running, queued)
        driven.wait([*running, queued])
        assert {type(driven.ended[r].error) for r in running} == {EngineFaultError}
        assert driven.tokens[queued] == expected(queued)[0]
        assert driven.answer(later) == [expected(later)[0]]
        assert driven.engine.stats().faults == 1
        assert driven.engine.alive
        driven.settled()


def test_an_engine_that_only_fails_says_so() -> None:
    """After MOST_FAULTS faults in a row readiness is lost; a step that works brings it back."""

    class Failing(Memory):
        def _fail(self) -> None:
            if self.broken:
                raise RuntimeError("made for this test")

    runner = Failing(True, 256)
    with Driven(runner) as driven:
        runner.broken = True
        for _ in range(MOST_FAULTS):
            assert driven.engine.alive
            driven.fails(Request([10, 11], 5))
        assert not driven.engine.alive
        runner.broken = False
        request = Request([10, 11], 5)
        assert driven.answer(request) == [expected(request)[0]]
        assert driven.engine.alive
        assert driven.engine.stats().faults == MOST_FAULTS


def test_a_step_that_hangs_fails_its_requests_and_the_engine() -> None:
    """Those that run and those that wait are told; no new one is taken, and the replica counts as dead."""
    entered, released = threading.Event(), threading.Event()

    class Hanging(Memory):
        def _fail(self) -> None:
            entered.set()
            assert released.wait(GENEROUS_SECONDS)

    with Driven(Hanging(True, 256), max_running=1, step_timeout=0.2) as driven:
        running, waiting = Request([10, 11], 5), Request([12, 13], 5)
        driven.engine.submit(running, waiting)
        assert entered.wait(GENEROUS_SECONDS)
        assert driven.engine.alive
        driven.wait([running, waiting])
        assert {type(driven.ended[r].error) for r in (running, waiting)} == {EngineFaultError}
        assert not driven.engine.alive
        with pytest.raises(EngineClosedError, match="hangs"):
            driven.engine.submit(Request([14], 5))
        released.set()  # a late end of the step delivers nothing: the `with` would see it


class Costly:
    """A grammar that allows everything; `filled`: whose masks were computed, in order."""

    def __init__(self, name: str, filled: list[str]) -> None:
        self._name, self._filled = name, filled

    def fill(self, row: torch.Tensor) -> bool:
        self._filled.append(self._name)
        return False

    def accept(self, token: int) -> None:
        pass


def test_costly_masks_hold_up_nobody_else(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step computes no more masks than its time allows, here one: requests with grammars take turns, the one
    without gets a token in every step."""
    monkeypatch.setattr("lab_model.engine.scheduler.MASK_SECONDS", 0.0)
    filled: list[str] = []
    with Driven(Memory(True, 256)) as driven:
        free = Request([10, 11], 50)
        bound = [Request([20, number], 30, grammar=Costly(name, filled)) for number, name in enumerate("abc")]
        with driven.paused():
            driven.engine.submit(free, *bound)
        driven.wait([free, *bound])
        assert driven.tokens[free] == expected(free)[0]
        assert [driven.tokens[each] for each in bound] == [expected(each)[0] for each in bound]
        assert "".join(filled) == "abc" * 30
        assert next(iter(driven.ended)) is free
        assert driven.engine.stats().steps >= 3 * 30


def test_a_long_prompt_is_computed_in_pieces_that_others_can_bear(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside a running answer a step prefills no more than takes 80 ms at the pace of the last ones."""
    clock = Clock(monkeypatch)
    pieces: list[int] = []
    pace = 2000  # tokens a second

    class Paced(Memory):
        def prefill(self, ids: Sequence[int], spans: Sequence[Span]) -> torch.Tensor:
            pieces.append(len(ids))
            clock.now += len(ids) / pace
            return super().prefill(ids, spans)

    with Driven(Paced(True, 2048)) as driven:
        running, long = Request([10, 11], 1000), Request([i % 50 + 10 for i in range(900)], 2)
        with driven.paused():
            driven.engine.submit(running)
            driven.started(running)
            driven.engine.submit(long)
        driven.wait([long])
        assert running not in driven.ended
        _, *of_long = pieces
        assert sum(of_long) == 900
        # Whole pages: 160 tokens take 80 ms, and the measured pace comes near 2,000 from below.
        assert max(of_long) == 160 - PAGE_TOKENS


# ---- 31 neighbours, and one who means harm


class Allow:
    """A grammar of the same ids always; `fails` raises where it says."""

    def __init__(self, ids: Sequence[int] = (), fails: str = "") -> None:
        self.ids, self.fails = ids, fails

    def fill(self, row: torch.Tensor) -> bool:
        if self.fails == "fill":
            raise MemoryError("a schema that explodes")
        row.zero_()
        for token in self.ids:
            row[token // 32] |= -(2**31) if token % 32 == 31 else 1 << token % 32
        return True

    def accept(self, token: int) -> None:
        if self.fails == "accept":
            raise RecursionError("a schema that explodes")


class Poisoned:
    """A runner whose logits are NaN after every prompt that holds this token."""

    def __init__(self, runner: Any) -> None:
        self._runner = runner
        self.batch_invariant, self.context, self.vocab = runner.batch_invariant, runner.context, runner.vocab

    def __getattr__(self, name: str) -> Any:
        return getattr(self._runner, name)

    def prefill(self, ids: Sequence[int], spans: Sequence[Span]) -> torch.Tensor:
        logits: torch.Tensor = self._runner.prefill(ids, spans)
        at = 0
        for row, span in enumerate(spans):
            if POISON in ids[at : at + span.stop - span.start]:
                logits[row] = float("nan")
            at += span.stop - span.start
        return logits


class NaNLlama(LlamaRunner):
    """Our own forward, whose embedding of the token `rare` is NaN."""

    rare = -1

    def _embed(self, ids: torch.Tensor) -> torch.Tensor:
        return super()._embed(ids).masked_fill(ids[:, None] == self.rare, float("nan"))


EVERY = range(tiny.VOCABULARY)
HOSTILE: dict[str, Request] = {
    "NaN logits": Request([5, POISON, 5], 10),
    "temperature 0": Request([5], 10, sampling=SamplingParams(temperature=0.0, top_p=0.5, top_k=3)),
    "temperature 1e-9": Request([5], 10, sampling=SamplingParams(temperature=1e-9)),
    "top_p 0": Request([5], 10, sampling=SamplingParams(temperature=1.0, top_p=0.0)),
    "top_p 1e-9": Request([5], 10, sampling=SamplingParams(temperature=1.0, top_p=1e-9)),
    "bias +100 on all": Request(
        [5], 10, sampling=SamplingParams(temperature=1.0, logit_bias=dict.fromkeys(EVERY, 100.0))
    ),
    "bias -100 on all": Request(
        [5], 10, sampling=SamplingParams(temperature=1.0, logit_bias=dict.fromkeys(EVERY, -100.0))
    ),
    "bias beyond the vocabulary": Request([5], 10, sampling=SamplingParams(logit_bias={10**9: 1.0})),
    "only special tokens": Request([0, 1, 2] * 10, 10),
    "invalid UTF-8": Request([*range(130, 200)], 10),
    "10,000 stop tokens": Request([5], 10, stop_ids=frozenset(range(1000, 11000))),
    "a schema that explodes": Request([5], 10, grammar=Allow(fails="fill")),
    "a schema that explodes later": Request([5], 10, grammar=Allow([9], fails="accept")),
    "a schema that allows nothing": Request([5], 10, grammar=Allow()),
    "the longest prompt": Request([9] * 1000, 24, sampling=SamplingParams(temperature=1.0, top_p=0.99, seed=1)),
    "already too late": Request([5], 10, deadline=0.0),
}
FAULTS = {name for name in HOSTILE if "schema" in name or name in {"NaN logits", "bias beyond the vocabulary"}}


@cache
def llama() -> Any:
    return tiny.model("llama")


def runner(kind: str) -> Any:
    model = llama()
    return (
        LlamaRunner(llama_weights.from_model(model), model.device, model.dtype)
        if kind == "llama"
        else TransformersRunner(model)
    )


def neighbours() -> list[Request]:
    torch.manual_seed(3)
    sorts: list[dict[str, Any]] = [
        {},
        {"temperature": 1.0},
        {"temperature": 0.8, "top_p": 0.9},
        {"temperature": 1.0, "top_k": 10, "repetition_penalty": 1.2},
    ]
    return [
        Request(
            torch.randint(8, tiny.VOCABULARY, (3 + 7 * i % 60,)).tolist(),
            24,
            sampling=SamplingParams(seed=i, **sorts[i % 4]),
        )
        for i in range(31)
    ]


@cache
def undisturbed(kind: str) -> list[list[int]]:
    """What the 31 get without a thirty-second."""
    with Driven(runner(kind)) as driven:
        return driven.answer(*neighbours())


# What transformers' own forward sees of a request; parameters, grammars and deadlines never reach a runner.
OF_THE_RUNNER = ["NaN logits", "only special tokens", "invalid UTF-8", "the longest prompt"]


@pytest.mark.parametrize(
    ("name", "kind"), [*((name, "llama") for name in HOSTILE), *((name, "plain") for name in OF_THE_RUNNER)]
)
def test_thirty_one_neighbours_are_unchanged(name: str, kind: str) -> None:
    """Beside each hostile request 31 others get, in float32, the tokens that they get without it; it fails alone."""
    given = HOSTILE[name]
    ill = Request(given.prompt, given.max_tokens, given.stop_ids, given.sampling, given.grammar, given.deadline)
    with Driven(Poisoned(runner(kind))) as driven:
        asked = neighbours()
        driven.engine.submit(*asked[:16], ill, *asked[16:])
        driven.wait([*asked, ill])
        assert [driven.tokens[request] for request in asked] == undisturbed(kind)
        assert not [request for request in asked if driven.ended[request].error]
        error = driven.ended[ill].error
        if name == "already too late":
            assert isinstance(error, DeadlineError)
        else:
            assert isinstance(error, EngineFaultError) == (name in FAULTS), error


@pytest.mark.parametrize("kind", ["llama", "plain"])
@pytest.mark.parametrize(("place", "length"), [(0, 3), (5, 60), (300, 301)])
def test_keys_that_are_no_numbers_reach_no_neighbour(kind: str, place: int, length: int) -> None:
    """One prompt's keys and values are NaN from `place` on; the padding beside it computes with them too."""
    want = undisturbed(kind)
    rare = min(set(EVERY) - {token for text in [*want, *(n.prompt for n in neighbours())] for token in text} - {0, 5})
    made = tiny.model("llama")
    made.get_input_embeddings().register_forward_hook(
        lambda _, given, out: out.masked_fill(given[0][..., None] == rare, float("nan"))
    )
    model = (
        NaNLlama(llama_weights.from_model(made), made.device, made.dtype)
        if kind == "llama"
        else TransformersRunner(made)
    )
    model.rare = rare
    with Driven(model) as driven:
        for _ in range(2):  # the second time in pages that were the first's
            asked, ill = neighbours(), Request([*[5] * place, rare, *[5] * (length - place - 1)], 10)
            driven.engine.submit(*asked[:16], ill, *asked[16:])
            driven.wait([*asked, ill])
            assert isinstance(driven.ended[ill].error, EngineFaultError)
            assert [driven.tokens[request] for request in asked] == want


def test_an_empty_prompt_is_refused_before_any_work() -> None:
    with Driven(Memory(True, 256)) as driven:
        with pytest.raises(ValueError, match="at least one prompt token"):
            driven.engine.submit(Request([], 5))
        assert driven.engine.stats().steps == 0
