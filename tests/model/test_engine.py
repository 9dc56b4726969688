"""The engine alone: token ids in, token ids out, on tiny seeded models in float32."""

from __future__ import annotations

import itertools
import queue
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lab_model.engine.kv_pages import PAGE_TOKENS
from lab_model.engine.request import (
    CancelledError,
    DeadlineError,
    EngineClosedError,
    EngineFaultError,
    QueueFullError,
    Request,
    RequestTooLongError,
    StepOutput,
    UnknownTokenError,
)
from lab_model.engine.runner import Runner
from lab_model.engine.sampling_params import SamplingParams
from lab_model.engine.scheduler import PIECE_TOKENS, Scheduler
from lab_model.runners.cuda_graphs import CudaGraphs
from lab_model.runners.llama import LlamaRunner
from lab_model.runners.transformers import TransformersRunner
from lab_model.weights import llama as llama_weights

# Every architecture by transformers' own forward, and those of the family by ours too.
RUNNERS = ("llama", "llama plain", "qwen2", "qwen3", "qwen3 plain", "gpt2 plain")


def runner(model: Any, *, plain: bool = False) -> Runner:
    return (
        TransformersRunner(model) if plain else LlamaRunner(llama_weights.from_model(model), model.device, model.dtype)
    )


class Bench:
    """An engine and what it delivered, by request."""

    def __init__(self, model: Any, **limits: int) -> None:
        """model: a runner, or a transformers model of the family."""
        self.tokens: dict[Request, list[int]] = {}
        self.ended: dict[Request, StepOutput] = {}
        self.steps: queue.Queue[list[StepOutput]] = queue.Queue()
        self._changed = threading.Condition()
        self.engine = Scheduler(model if hasattr(model, "prefill") else runner(model), self._deliver, **limits)
        self.engine.start()

    def _deliver(self, events: list[StepOutput]) -> None:
        with self._changed:
            for event in events:
                assert event.request not in self.ended, "an event after the end"
                self.tokens.setdefault(event.request, []).extend(event.tokens)
                if event.finish or event.error:
                    self.ended[event.request] = event
            self._changed.notify_all()

    def wait(self, requests: Sequence[Request], timeout: float = 60) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: all(r in self.ended for r in requests), timeout), "not finished"

    def started(self, request: Request, timeout: float = 60) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: self.tokens.get(request), timeout), "no first token"

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
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:
            stats = self.engine.stats()
            if (stats.running, stats.waiting, stats.pages_used) == (0, 0, 0):
                return
            time.sleep(0.01)
        raise AssertionError(self.engine.stats())


@pytest.fixture(scope="module")
def llama() -> Any:
    return tiny.model("llama")


@pytest.fixture
def bench(llama: Any) -> Iterator[Bench]:
    made = Bench(llama)
    yield made
    made.engine.close()


def prompts(*lengths: int, seed: int = 1) -> list[list[int]]:
    torch.manual_seed(seed)
    return [torch.randint(3, tiny.VOCABULARY, (length,)).tolist() for length in lengths]


def asking(prompt: Sequence[int], tokens: int) -> Request:
    """A greedy request that ends at the model's end of sequence, as `reference` does."""
    return Request(prompt, tokens, stop_ids=frozenset({0}))


def reference(model: Any, prompt: list[int], tokens: int) -> list[int]:
    """transformers' own greedy answer, by `generate`, up to its end-of-sequence token."""
    ids = torch.tensor([prompt], device=model.device)
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False, pad_token_id=1
    )
    new: list[int] = out[0, len(prompt) :].tolist()
    return new[: new.index(0)] if 0 in new else new


@pytest.mark.parametrize("which", RUNNERS)
def test_greedy_equals_generate(which: str) -> None:
    """Greedy decoding gives `generate`'s tokens in any batch; the lengths lie around a page and a piece of prefill."""
    architecture, _, plain = which.partition(" ")
    model = tiny.model(architecture)
    bench = Bench(runner(model, plain=bool(plain)))
    try:
        asked = prompts(1, 2, 31, 32, 33, 65, 200, 257, 511, 513, 700)
        got = bench.answer(*[asking(p, 40) for p in asked])
        for prompt, answer in zip(asked, got, strict=True):
            assert answer == reference(model, prompt, 40), len(prompt)
        bench.settled()
    finally:
        bench.engine.close()


def test_logits_are_for_an_engine_at_rest() -> None:
    """A runner is for one thread: who asks beside a request is told so, and may ask when it has ended."""
    engine = Scheduler(runner(tiny.model("llama")), lambda events: None, kv_tokens=256)
    asked = Request([5, 6, 7], 2)
    engine.submit(asked)
    with pytest.raises(RuntimeError, match="requests"):
        engine.logits([5, 6])
    with torch.inference_mode():
        engine.run_alone(Request([5, 6], 2), [])
    assert asked.generated == 2
    assert engine.logits([5, 6]).isfinite().all()


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_steps_of_one_shape_equal_generate(device: str) -> None:
    """What CUDA records as graphs gives the same tokens; on the CPU the same code runs unrecorded."""
    model = tiny.model("qwen3").to(device)
    made = LlamaRunner(llama_weights.from_model(model), torch.device(device), torch.float32)
    made.graphs = CudaGraphs(made.step, torch.device(device))
    bench = Bench(made)
    try:
        asked = prompts(1, 5, 33, 40, 64, 100, 300)
        got = bench.answer(*[asking(p, 40) for p in asked])
        assert got == [reference(model, p, 40) for p in asked]
    finally:
        bench.engine.close()


def test_batched_equals_alone(bench: Bench) -> None:
    """A seeded sampled answer does not depend on who else is in the batch."""
    asked = prompts(5, 20, 40, 7, 90, 3, 12, 60)

    def requests() -> list[Request]:
        return [Request(p, 30, sampling=SamplingParams(0.9, (1.0, 0.7)[i % 2], seed=i)) for i, p in enumerate(asked)]

    together = bench.answer(*requests())
    alone = [bench.answer(request)[0] for request in requests()]
    assert together == alone


def test_pages_run_out_and_nothing_is_lost(llama: Any) -> None:
    """With room for a few requests only, the youngest go back to the queue; their answers stay the same."""
    bench = Bench(llama, kv_tokens=256)
    try:
        asked = prompts(*[40] * 6)
        got = bench.answer(*[asking(p, 60) for p in asked])
        assert bench.engine.stats().preempted > 0
        assert got == [reference(llama, p, 60) for p in asked]
        bench.settled()
    finally:
        bench.engine.close()


def test_requests_join_and_leave_between_steps(bench: Bench, llama: Any) -> None:
    """A short request that comes later ends before a long one that came first."""
    long, short = (Request(p, n) for p, n in zip(prompts(10, 10), (900, 5), strict=True))
    bench.engine.submit(long)
    bench.started(long)
    answer, goes_on = bench.answer(short), long not in bench.ended
    assert goes_on
    assert answer == [reference(llama, list(short.prompt), 5)]
    bench.engine.cancel(long)
    bench.settled()


def test_cancel_frees_the_place(bench: Bench) -> None:
    """Cancelled in the queue or in the batch: one last event, which says so, every page free."""
    asked = [Request(p, 900) for p in prompts(*[30] * 20)]
    bench.engine.submit(*asked)
    bench.started(asked[0])
    bench.engine.cancel(*asked)
    bench.settled()
    told = {request: len(tokens) for request, tokens in bench.tokens.items()}
    time.sleep(0.1)
    assert told == {request: len(tokens) for request, tokens in bench.tokens.items()}
    bench.wait(asked)
    assert all(isinstance(bench.ended[request].error, CancelledError) for request in asked)


def test_queue_full_says_when_to_come_back(llama: Any) -> None:
    """All or none of a submission is taken; the refused learn a positive, finite time."""
    bench = Bench(llama, max_running=2, max_queued=2)
    try:
        asked = [Request(p, 500) for p in prompts(*[10] * 5)]
        bench.engine.submit(*asked[:3])
        with pytest.raises(QueueFullError) as refused:
            bench.engine.submit(*asked[3:])
        assert 0 < refused.value.retry_after < 600
        bench.engine.submit(asked[3])
        bench.engine.cancel(*asked)
        bench.settled()
        bench.answer(Request([5], 3))
    finally:
        bench.engine.close()


def test_the_time_to_come_back_is_that_of_the_queue(llama: Any) -> None:
    """Five have ended: the next place is free after a fourth of their time, whatever those who run may still ask."""
    bench = Bench(llama, max_running=1, max_queued=1)
    try:
        began = time.monotonic()
        for prompt in prompts(*[10] * 5):
            bench.answer(Request(prompt, 3))
        bench.engine.submit(*[Request(prompt, 500) for prompt in prompts(10, 11)])
        with pytest.raises(QueueFullError) as refused:
            bench.engine.submit(Request([5], 1))
        assert 0 < refused.value.retry_after <= (time.monotonic() - began) / 4
    finally:
        bench.engine.close()


def test_too_long_is_refused_before_any_work(bench: Bench) -> None:
    with pytest.raises(RequestTooLongError):
        bench.engine.submit(Request([5] * 1000, 25))
    assert bench.engine.stats().steps == 0


def test_stop_token_ends_the_answer_and_is_not_in_it(bench: Bench, llama: Any) -> None:
    (prompt,) = prompts(12)
    free = reference(llama, prompt, 30)
    stop = next(token for token in free[3:] if token not in free[:3])
    request = Request(prompt, 30, stop_ids=frozenset({stop}))
    (got,) = bench.answer(request)
    assert got == free[: free.index(stop)]
    assert bench.ended[request].finish == "stop"
    assert request.generated == len(got) + 1


class Poisoned:
    """A transformers model whose logits are NaN for every row that holds token 7."""

    def __init__(self, model: Any, poison: float = float("nan")) -> None:
        self._model, self._poison = model, poison
        self.config, self.device, self.dtype = model.config, model.device, model.dtype
        self.get_input_embeddings = model.get_input_embeddings

    def __call__(self, **kwargs: Any) -> Any:
        output = self._model(**kwargs)
        ill = (kwargs["input_ids"] == 7).any(dim=1)
        output.logits[ill] = self._poison
        return output


class NaN(LlamaRunner):
    """Our own forward, with NaN wherever token 7 goes: in its keys and values too, and so in all that follows it."""

    def _embed(self, ids: torch.Tensor) -> torch.Tensor:
        return super()._embed(ids).masked_fill(ids[:, None] == 7, float("nan"))


def test_not_finite_logits_end_one_request_alone(llama: Any) -> None:
    """The ill request fails; its neighbours' answers are what they would have been."""
    bench = Bench(NaN(llama_weights.from_model(llama), llama.device, llama.dtype))
    try:
        well = [p for p in prompts(20, 30, 40) if 7 not in p]
        requests = [asking(p, 20) for p in well]
        ill = Request([5, 7, 5], 20)
        bench.engine.submit(*requests, ill)
        bench.wait([*requests, ill])
        assert isinstance(bench.ended[ill].error, EngineFaultError)
        clean = [r for r in requests if 7 not in r.tokens]
        assert clean
        for request in clean:
            assert bench.tokens[request] == reference(llama, list(request.prompt), 20)
        bench.settled()
        # Who shares its beginning, or inherits its pages, gets none of it.
        again = asking([5] * 40, 20)
        assert bench.answer(again) == [reference(llama, [5] * 40, 20)]
    finally:
        bench.engine.close()


def test_who_leaves_half_way_leaves_no_nan_behind(llama: Any) -> None:
    """A request of which one piece is computed, NaN and all, is cancelled; two others inherit its pages."""
    events: list[StepOutput] = []
    engine = Scheduler(
        NaN(llama_weights.from_model(llama), llama.device, llama.dtype), events.extend, kv_tokens=10 * PAGE_TOKENS
    )
    ill = Request([5, 7] * 145, 20)
    engine.submit(ill)
    with torch.inference_mode():
        engine._admit()
        engine._step(events)
        assert ill.prefilling
        assert ill.computed_tokens == PIECE_TOKENS
        engine.cancel(ill)
        engine._drop(events)
        heirs = [asking([5] * 140, 10), asking([6] * 100, 10)]  # the shorter one is padded beside the longer one
        engine.submit(*heirs)
        while any(heir.pages or not heir.generated for heir in heirs):
            engine._admit()
            engine._step(events)
    for heir in heirs:
        got = [token for event in events if event.request is heir for token in event.tokens]
        assert got == reference(llama, list(heir.prompt), 10)


@pytest.mark.parametrize("plain", [False, True])
def test_a_token_that_the_model_does_not_have_is_refused(llama: Any, plain: bool) -> None:
    """A tokenizer may know more ids than there are embeddings: in the batch it would fail everybody."""
    bench = Bench(runner(llama, plain=plain))
    try:
        running = Request([5], 50)
        bench.engine.submit(running)
        for wrong in (tiny.VOCABULARY, -1):
            with pytest.raises(UnknownTokenError, match=str(wrong)):
                bench.engine.submit(Request([5], 5), Request([5, wrong, 5], 5))
        (got,) = bench.answer(asking([tiny.VOCABULARY - 1], 5))
        assert got == reference(llama, [tiny.VOCABULARY - 1], 5)
        bench.wait([running])
        assert bench.ended[running].finish == "length"
    finally:
        bench.engine.close()


def test_what_was_once_nan_is_computed_again(llama: Any) -> None:
    """A prompt's pages are shared before its logits are looked at: once these were NaN, nobody finds them."""

    class Once(LlamaRunner):
        ill = True

        def _embed(self, ids: torch.Tensor) -> torch.Tensor:
            embedded = super()._embed(ids)
            return embedded * float("nan") if self.ill else embedded

    made = Once(llama_weights.from_model(llama), llama.device, llama.dtype)
    bench = Bench(made)
    try:
        (prompt,) = prompts(300)
        bench.fails(asking(prompt, 5))
        made.ill = False
        again = asking(prompt, 5)
        assert bench.answer(again) == [reference(llama, prompt, 5)]
        assert again.prefix_hit_tokens == 0
    finally:
        bench.engine.close()


def test_fault_in_a_step_fails_those_in_flight_and_the_loop_goes_on(llama: Any) -> None:
    class Broken(Poisoned):
        broken = False

        def __call__(self, **kwargs: Any) -> Any:
            if self.broken:
                raise RuntimeError("made for this test")
            return super().__call__(**kwargs)

    model = Broken(llama)
    bench = Bench(TransformersRunner(model))
    try:
        (prompt,) = prompts(9)
        model.broken = True
        bench.fails(Request(prompt, 5))
        model.broken = False
        assert bench.answer(Request(prompt, 5)) == [reference(llama, prompt, 5)]
        assert bench.engine.stats().faults == 1
        assert bench.engine.alive
        model.broken = True
        for _ in range(3):
            late = Request(prompt, 5)
            bench.engine.submit(late)
            bench.wait([late])
        assert not bench.engine.alive, "a model that always fails is not ready"
    finally:
        bench.engine.close()


def test_a_device_that_cannot_wipe_pages_fails_a_step_and_not_the_loop(llama: Any) -> None:
    class Unwiped(LlamaRunner):
        broken = True

        def zero_pages(self, pages: Sequence[int]) -> None:
            if self.broken:
                raise RuntimeError("made for this test")
            super().zero_pages(pages)

    made = Unwiped(llama_weights.from_model(llama), llama.device, llama.dtype)
    bench = Bench(made)
    try:
        (prompt,) = prompts(9)
        bench.fails(asking(prompt, 5))
        made.broken = False
        assert bench.answer(asking(prompt, 5)) == [reference(llama, prompt, 5)]
        bench.settled()
    finally:
        bench.engine.close()


def test_who_ended_before_the_fault_of_a_step_hears_of_it(llama: Any) -> None:
    """One step prefills a one-token answer and then fails while it decodes: the first is whole, the second an error."""

    class BreaksBeside(Poisoned):
        def __call__(self, **kwargs: Any) -> Any:
            if late.tokens[len(late.prompt) :] and kwargs["input_ids"].shape[1] == 1:
                raise RuntimeError("made for this test")
            return super().__call__(**kwargs)

    early, late = Request([5] * 4, 900), Request([9] * 40, 1)
    bench = Bench(TransformersRunner(BreaksBeside(llama)))
    try:
        bench.engine.submit(early)
        bench.started(early)
        bench.engine.submit(late)
        bench.wait([early, late], timeout=20)
        assert bench.ended[late].finish == "length"
        assert isinstance(bench.ended[early].error, EngineFaultError)
    finally:
        bench.engine.close()


def test_a_negative_seed_is_another_seed() -> None:
    seeded = [Request([1], 1, sampling=SamplingParams(seed=seed)).sampling_state.random.random() for seed in (5, -5)]
    assert seeded[0] != seeded[1]


def test_close_answers_everybody(llama: Any) -> None:
    bench = Bench(llama, max_running=2)
    asked = [Request(p, 1000) for p in prompts(*[10] * 4)]
    bench.engine.submit(*asked)
    bench.started(asked[0])
    bench.engine.close()
    bench.wait(asked)
    assert {type(bench.ended[r].error) for r in asked} == {EngineClosedError}
    with pytest.raises(EngineClosedError):
        bench.engine.submit(Request([5], 1))
    assert not bench.engine.alive


def test_idle_engine_does_nothing(bench: Bench) -> None:
    """No busy loop: an idle second costs the thread no measurable time."""
    bench.answer(Request([5], 3))
    before, steps = time.process_time(), bench.engine.stats().steps
    time.sleep(1)
    assert time.process_time() - before < 0.1
    assert bench.engine.stats().steps == steps


def test_a_shared_beginning_is_computed_once(bench: Bench, llama: Any) -> None:
    """The second request reuses the first one's whole pages and answers as it would alone."""
    (shared, one, two) = prompts(300, 20, 25)
    first, second = asking(shared + one, 20), asking(shared + two, 20)
    bench.answer(first)
    assert bench.answer(second) == [reference(llama, shared + two, 20)]
    assert (first.prefix_hit_tokens, second.prefix_hit_tokens) == (0, 256)  # in float32: whole pieces
    assert bench.engine.stats().reused_tokens == 256
    again = asking(shared + one, 20)
    assert bench.answer(again) == [bench.tokens[first]]
    assert again.prefix_hit_tokens == 256


def test_what_is_held_is_shared_while_it_runs(bench: Bench, llama: Any) -> None:
    """A running request's prompt serves the next one; when the first leaves, the second keeps its pages."""
    (shared,) = prompts(260)
    first, second = asking([*shared, 9], 700), asking([*shared, 11, 12], 30)
    bench.engine.submit(first)
    bench.started(first)
    bench.engine.submit(second)
    bench.started(second)
    bench.engine.cancel(first)
    bench.wait([second])
    assert second.prefix_hit_tokens == 256
    assert bench.tokens[second] == reference(llama, [*shared, 11, 12], 30)
    bench.settled()


def test_kept_beginnings_give_way(llama: Any) -> None:
    """What nobody holds is dropped when its place is needed, the longest unused first, and nothing is lost."""
    bench = Bench(llama, kv_tokens=640)
    try:
        for prompt in prompts(*[300] * 6):
            assert bench.answer(asking(prompt, 10)) == [reference(llama, prompt, 10)]
        stats = bench.engine.stats()
        assert stats.pages_used == 0
        assert 0 < stats.pages_kept <= stats.pages_total
        (last,) = prompts(*[300] * 6)[-1:]
        again = asking(last, 10)
        bench.answer(again)
        assert again.prefix_hit_tokens == 256
    finally:
        bench.engine.close()


def test_a_deadline_ends_the_request_where_it_is(llama: Any) -> None:
    """In the queue or in the batch: DeadlineError, the place is free, the neighbour goes on."""
    bench = Bench(llama, max_running=1)
    decode = bench.engine._runner.decode

    def slowly(*asked: Any) -> torch.Tensor:
        time.sleep(0.002)  # or a fast machine has 1,000 tokens before the deadline
        return decode(*asked)

    bench.engine._runner.decode = slowly  # type: ignore[method-assign]
    try:
        running = Request([5] * 10, 1000, deadline=time.monotonic() + 0.5)
        queued = Request([6] * 10, 1000, deadline=time.monotonic() + 0.2)
        patient = asking([9] * 10, 5)
        bench.engine.submit(running, queued, patient)
        bench.wait([running, queued, patient], timeout=20)
        assert {type(bench.ended[r].error) for r in (running, queued)} == {DeadlineError}
        assert 0 < len(bench.tokens[running]) < 1000
        assert bench.tokens[queued] == []
        assert bench.tokens[patient] == reference(llama, [9] * 10, 5)
        bench.settled()
    finally:
        bench.engine.close()


def test_a_long_prompt_lets_others_go_on(bench: Bench) -> None:
    """While 900 tokens are prefilled, a running answer gets a token between any two pieces."""
    steps: list[int] = []
    original = bench.engine._runner.prefill

    def watched(ids: Sequence[int], spans: Any) -> Any:
        steps.append(running.generated)
        return original(ids, spans)

    bench.engine._runner.prefill = watched  # type: ignore[method-assign]
    running, long = Request([5] * 10, 900), asking(prompts(900)[0], 2)
    bench.engine.submit(running)
    bench.started(running)
    steps.clear()
    bench.engine.submit(long)
    bench.wait([long])
    assert len(steps) == 4  # pieces of 256
    assert [b - a for a, b in itertools.pairwise(steps)] == [1, 1, 1]
    bench.engine.cancel(running)
    bench.settled()


def test_two_hundred_who_leave_cost_nothing_afterwards(bench: Bench, llama: Any) -> None:
    """200 requests are begun and abandoned; then every place is free and an answer is right."""
    asked = [Request(p, 900) for p in prompts(*[40] * 200)]
    bench.engine.submit(*asked)
    bench.started(asked[0])
    bench.engine.cancel(*asked)
    bench.settled()
    (prompt,) = prompts(12)
    assert bench.answer(asking(prompt, 20)) == [reference(llama, prompt, 20)]


@settings(max_examples=15, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 60), st.integers(1, 30), st.booleans()), min_size=1, max_size=25))
def test_any_mix_of_submits_and_cancels_leaves_nothing_behind(plan: list[tuple[int, int, bool]]) -> None:
    """Whoever is not cancelled gets the answer it would get alone; afterwards every place and page is free."""
    model = tiny.model("llama")
    bench = Bench(model, kv_tokens=10 * PAGE_TOKENS, max_running=5, max_queued=100)
    try:
        kept = []
        for length, tokens, leave in plan:
            request = asking([(length * 7 + i) % 500 + 3 for i in range(length)], tokens)
            bench.engine.submit(request)
            if leave:
                bench.engine.cancel(request)
            else:
                kept.append(request)
        bench.wait(kept)
        bench.settled()
        for request in kept[:3]:
            assert bench.tokens[request] == reference(model, list(request.prompt), request.max_tokens)
    finally:
        bench.engine.close()
