"""The engine alone: token ids in, token ids out, on tiny seeded models in float32."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any

import pytest
import tiny
import torch
from driven import Clock, Driven
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
    UnknownTokenError,
)
from lab_model.engine.runner import Runner, Span
from lab_model.engine.sampling_params import SamplingParams
from lab_model.engine.scheduler import PIECE_TOKENS, Scheduler
from lab_model.runners.cuda_graphs import CudaGraphs
from lab_model.runners.llama import LlamaRunner
from lab_model.runners.transformers import TransformersRunner
from lab_model.weights import llama as llama_weights
from processes import eventually
from tiny import one_thread  # noqa: F401 - of all tests here

# Every architecture by transformers' own forward, and those of the family by ours too.
RUNNERS = ("llama", "llama plain", "qwen2", "qwen3", "qwen3 plain", "gpt2 plain")


# Models that no test changes.
model_of = cache(tiny.model)


def runner(model: Any, *, plain: bool = False) -> Runner:
    return (
        TransformersRunner(model) if plain else LlamaRunner(llama_weights.from_model(model), model.device, model.dtype)
    )


@pytest.fixture(scope="module")
def llama() -> Any:
    return model_of("llama")


@pytest.fixture
def driven(llama: Any) -> Iterator[Driven]:
    with Driven(runner(llama)) as started:
        yield started


def prompts(*lengths: int, seed: int = 1) -> list[list[int]]:
    torch.manual_seed(seed)
    return [torch.randint(3, tiny.VOCABULARY, (length,)).tolist() for length in lengths]


def asking(prompt: Sequence[int], tokens: int) -> Request:
    """A greedy request that ends at the model's end of sequence, as `reference` does."""
    return Request(prompt, tokens, stop_ids=frozenset({0}))


@cache
def generated(model: Any, prompt: tuple[int, ...], tokens: int) -> list[int]:
    ids = torch.tensor([prompt], device=model.device)
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False, pad_token_id=1
    )
    new: list[int] = out[0, len(prompt) :].tolist()
    return new[: new.index(0)] if 0 in new else new


def reference(model: Any, prompt: Sequence[int], tokens: int) -> list[int]:
    """transformers' own greedy answer, by `generate`, up to its end-of-sequence token."""
    return generated(model, tuple(prompt), tokens)


@pytest.mark.parametrize("which", RUNNERS)
def test_greedy_equals_generate(which: str) -> None:
    """Greedy decoding gives `generate`'s tokens in any batch; the lengths lie around a page and a piece of prefill."""
    architecture, _, plain = which.partition(" ")
    model = model_of(architecture)
    with Driven(runner(model, plain=bool(plain))) as driven:
        asked = prompts(1, 2, 31, 32, 33, 65, 200, 257, 511, 513, 700)
        got = driven.answer(*[asking(p, 40) for p in asked])
        for prompt, answer in zip(asked, got, strict=True):
            assert answer == reference(model, prompt, 40), len(prompt)
        driven.settled()


def test_logits_are_for_an_engine_at_rest() -> None:
    """A runner is for one thread: who asks beside a request is told so, and may ask when it has ended."""
    engine = Scheduler(runner(model_of("llama")), lambda events: None, kv_tokens=256)
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
    with Driven(made) as driven:
        asked = prompts(1, 5, 33, 40, 64, 100, 300)
        got = driven.answer(*[asking(p, 40) for p in asked])
        assert got == [reference(model, p, 40) for p in asked]


def test_batched_equals_alone(driven: Driven) -> None:
    """A seeded sampled answer does not depend on who else is in the batch."""
    asked = prompts(5, 20, 40, 7, 90, 3, 12, 60)

    def requests() -> list[Request]:
        return [Request(p, 30, sampling=SamplingParams(0.9, (1.0, 0.7)[i % 2], seed=i)) for i, p in enumerate(asked)]

    together = driven.answer(*requests())
    alone = [driven.answer(request)[0] for request in requests()]
    assert together == alone


def test_pages_run_out_and_nothing_is_lost(llama: Any) -> None:
    """With room for a few requests only, the youngest go back to the queue; their answers stay the same."""
    with Driven(runner(llama), kv_tokens=256) as driven:
        asked = prompts(*[40] * 6)
        got = driven.answer(*[asking(p, 60) for p in asked])
        assert driven.engine.stats().preempted > 0
        assert got == [reference(llama, p, 60) for p in asked]
        driven.settled()


def test_requests_join_and_leave_between_steps(driven: Driven, llama: Any) -> None:
    """A short request that comes later ends before a long one that came first."""
    long, short = (Request(p, n) for p, n in zip(prompts(10, 10), (300, 5), strict=True))
    with driven.paused():
        driven.engine.submit(long)
        driven.started(long)
        driven.engine.submit(short)
    driven.wait([long, short])
    assert list(driven.ended) == [short, long]
    assert driven.tokens[short] == reference(llama, short.prompt, 5)
    driven.settled()


def test_cancel_frees_the_place(driven: Driven) -> None:
    """Cancelled in the queue or in the batch: one last event, which says so; every page free; no token more."""
    asked = [Request(p, 900) for p in prompts(*[30] * 20)]
    with driven.paused():
        driven.engine.submit(*asked)
        driven.started(asked[0])
        driven.engine.cancel(*asked)
        delivered = {request: list(tokens) for request, tokens in driven.tokens.items()}
    driven.wait(asked)
    driven.settled()
    assert all(isinstance(driven.ended[request].error, CancelledError) for request in asked)
    driven.answer(Request([5], 3))
    assert {request: driven.tokens[request] for request in delivered} == delivered
    assert not any(driven.tokens[request] for request in asked if request not in delivered)


def test_who_is_cancelled_during_a_step_gets_nothing_of_it(llama: Any) -> None:
    class Leaving(LlamaRunner):
        def decode(self, *given: Any) -> torch.Tensor:
            driven.engine.cancel(asked)
            return super().decode(*given)

    asked = Request([5] * 10, 900)
    with Driven(Leaving(llama_weights.from_model(llama), llama.device, llama.dtype)) as driven:
        driven.answer(asked)
        assert isinstance(driven.ended[asked].error, CancelledError)
        assert len(driven.tokens[asked]) == 1  # the prefill's


def test_queue_full_says_when_to_come_back(llama: Any) -> None:
    """All or none of a submission is taken; the refused learn a positive, finite time."""
    with Driven(runner(llama), max_running=2, max_queued=2) as driven:
        asked = [Request(p, 500) for p in prompts(*[10] * 5)]
        with driven.paused():
            driven.engine.submit(*asked[:3])
            with pytest.raises(QueueFullError) as refused:
                driven.engine.submit(*asked[3:])
            assert 0 < refused.value.retry_after < math.inf
            driven.engine.submit(asked[3])
            driven.engine.cancel(*asked)
        driven.settled()
        driven.answer(Request([5], 3))


def test_the_time_to_come_back_is_that_of_the_queue(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Five have ended: the next place is free after a fourth of their time, whatever those who run may still ask."""
    clock = Clock(monkeypatch)
    with Driven(runner(llama), max_running=1, max_queued=1) as driven:
        for prompt in prompts(*[10] * 5):  # they end at 3, 6, 9, 12 and 15
            clock.now += 3
            driven.answer(Request(prompt, 3))
        with driven.paused():
            first, second = (Request(prompt, 500) for prompt in prompts(10, 11))
            driven.engine.submit(first, second)
            driven.started(first)
            clock.now += 1
            with pytest.raises(QueueFullError) as refused:
                driven.engine.submit(Request([5], 1))
        assert refused.value.retry_after == pytest.approx((16 - 3) / 4)


def test_too_long_is_refused_before_any_work(driven: Driven) -> None:
    with pytest.raises(RequestTooLongError):
        driven.engine.submit(Request([5] * 1000, 25))
    assert driven.engine.stats().steps == 0


def test_stop_token_ends_the_answer_and_is_not_in_it(driven: Driven, llama: Any) -> None:
    (prompt,) = prompts(12)
    free = reference(llama, prompt, 30)
    stop = next(token for token in free[3:] if token not in free[:3])
    request = Request(prompt, 30, stop_ids=frozenset({stop}))
    (got,) = driven.answer(request)
    assert got == free[: free.index(stop)]
    assert driven.ended[request].finish == "stop"
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
    with Driven(NaN(llama_weights.from_model(llama), llama.device, llama.dtype)) as driven:
        well = [p for p in prompts(20, 30, 40) if 7 not in p]
        requests = [asking(p, 20) for p in well]
        ill = Request([5, 7, 5], 20)
        driven.engine.submit(*requests, ill)
        driven.wait([*requests, ill])
        assert isinstance(driven.ended[ill].error, EngineFaultError)
        clean = [r for r in requests if 7 not in r.tokens]
        assert clean
        for request in clean:
            assert driven.tokens[request] == reference(llama, request.prompt, 20)
        driven.settled()
        # Who shares its beginning, or inherits its pages, gets none of it.
        again = asking([5] * 40, 20)
        assert driven.answer(again) == [reference(llama, [5] * 40, 20)]


def test_who_leaves_half_way_leaves_no_nan_behind(llama: Any) -> None:
    """A request of which one piece is computed, NaN and all, is cancelled; two others inherit its pages."""
    ill = Request([5, 7] * 145, 20)
    heirs = [asking([5] * 140, 10), asking([6] * 100, 10)]  # the shorter one is padded beside the longer one
    with Driven(NaN(llama_weights.from_model(llama), llama.device, llama.dtype), kv_tokens=10 * PAGE_TOKENS) as driven:
        with driven.paused():
            driven.engine.submit(ill)
            eventually(lambda: ill.computed_tokens == PIECE_TOKENS, what="the first piece")
            driven.engine.cancel(ill)
            driven.engine.submit(*heirs)
        driven.wait([ill, *heirs])
        assert isinstance(driven.ended[ill].error, CancelledError)
        for heir in heirs:
            assert driven.tokens[heir] == reference(llama, heir.prompt, 10)


@pytest.mark.parametrize("plain", [False, True])
def test_a_token_that_the_model_does_not_have_is_refused(llama: Any, plain: bool) -> None:
    """A tokenizer may know more ids than there are embeddings: in the batch it would fail everybody."""
    with Driven(runner(llama, plain=plain)) as driven:
        running = Request([5], 50)
        driven.engine.submit(running)
        for wrong in (tiny.VOCABULARY, -1):
            with pytest.raises(UnknownTokenError, match=str(wrong)):
                driven.engine.submit(Request([5], 5), Request([5, wrong, 5], 5))
        (got,) = driven.answer(asking([tiny.VOCABULARY - 1], 5))
        assert got == reference(llama, [tiny.VOCABULARY - 1], 5)
        driven.wait([running])
        assert driven.ended[running].finish == "length"


def test_what_was_once_nan_is_computed_again(llama: Any) -> None:
    """A prompt's pages are shared before its logits are looked at: once these were NaN, nobody finds them."""

    class Once(LlamaRunner):
        ill = True

        def _embed(self, ids: torch.Tensor) -> torch.Tensor:
            embedded = super()._embed(ids)
            return embedded * float("nan") if self.ill else embedded

    made = Once(llama_weights.from_model(llama), llama.device, llama.dtype)
    with Driven(made) as driven:
        (prompt,) = prompts(300)
        driven.fails(asking(prompt, 5))
        made.ill = False
        again = asking(prompt, 5)
        assert driven.answer(again) == [reference(llama, prompt, 5)]
        assert again.prefix_hit_tokens == 0


def test_a_device_that_cannot_wipe_pages_fails_a_step_and_not_the_loop(llama: Any) -> None:
    class Unwiped(LlamaRunner):
        broken = True

        def zero_pages(self, pages: Sequence[int]) -> None:
            if self.broken:
                raise RuntimeError("made for this test")
            super().zero_pages(pages)

    made = Unwiped(llama_weights.from_model(llama), llama.device, llama.dtype)
    with Driven(made) as driven:
        (prompt,) = prompts(9)
        driven.fails(asking(prompt, 5))
        made.broken = False
        assert driven.answer(asking(prompt, 5)) == [reference(llama, prompt, 5)]
        driven.settled()


def test_who_ended_before_the_fault_of_a_step_hears_of_it(llama: Any) -> None:
    """One step prefills a one-token answer and then fails while it decodes: the first is whole, the second an error."""

    class BreaksBeside(Poisoned):
        def __call__(self, **kwargs: Any) -> Any:
            if late.tokens[len(late.prompt) :] and kwargs["input_ids"].shape[1] == 1:
                raise RuntimeError("made for this test")
            return super().__call__(**kwargs)

    early, late = Request([5] * 4, 900), Request([9] * 40, 1)
    with Driven(TransformersRunner(BreaksBeside(llama))) as driven:
        with driven.paused():
            driven.engine.submit(early)
            driven.started(early)
            driven.engine.submit(late)
        driven.wait([early, late])
        assert driven.ended[late].finish == "length"
        assert isinstance(driven.ended[early].error, EngineFaultError)


def test_a_negative_seed_is_another_seed() -> None:
    seeded = [Request([1], 1, sampling=SamplingParams(seed=seed)).sampling_state.random.random() for seed in (5, -5)]
    assert seeded[0] != seeded[1]


def test_close_answers_everybody(llama: Any) -> None:
    with Driven(runner(llama), max_running=2) as driven:
        asked = [Request(p, 1000) for p in prompts(*[10] * 4)]
        with driven.paused():
            driven.engine.submit(*asked)
            driven.started(asked[0])
            driven.engine.close(timeout=0)
        driven.wait(asked)
        assert {type(driven.ended[r].error) for r in asked} == {EngineClosedError}
        with pytest.raises(EngineClosedError):
            driven.engine.submit(Request([5], 1))
        assert not driven.engine.alive


def test_idle_engine_does_nothing(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """No busy loop, no polling: after its report that nothing runs it takes no turn, and each turn reads the clock."""
    clock = Clock(monkeypatch)
    with Driven(runner(llama)) as driven:
        driven.answer(Request([5], 3))
        eventually(lambda: driven.idle, what="the report that nothing runs")
        before = clock.read, driven.reports, driven.engine.stats().steps
        time.sleep(0.05)  # thousands of turns of a busy loop
        assert before == (clock.read, driven.reports, driven.engine.stats().steps)


def test_a_shared_beginning_is_computed_once(driven: Driven, llama: Any) -> None:
    """The second request reuses the first one's whole pages and answers as it would alone."""
    (shared, one, two) = prompts(300, 20, 25)
    first, second = asking(shared + one, 20), asking(shared + two, 20)
    driven.answer(first)
    assert driven.answer(second) == [reference(llama, shared + two, 20)]
    assert (first.prefix_hit_tokens, second.prefix_hit_tokens) == (0, 256)  # in float32: whole pieces
    assert driven.engine.stats().reused_tokens == 256
    again = asking(shared + one, 20)
    assert driven.answer(again) == [driven.tokens[first]]
    assert again.prefix_hit_tokens == 256


def test_what_is_held_is_shared_while_it_runs(driven: Driven, llama: Any) -> None:
    """A running request's prompt serves the next one; when the first leaves, the second keeps its pages."""
    (shared,) = prompts(260)
    first, second = asking([*shared, 9], 700), asking([*shared, 11, 12], 30)
    driven.engine.submit(first)
    driven.started(first)
    driven.engine.submit(second)
    driven.started(second)
    driven.engine.cancel(first)
    driven.wait([second])
    assert second.prefix_hit_tokens == 256
    assert driven.tokens[second] == reference(llama, [*shared, 11, 12], 30)
    driven.settled()


def test_kept_beginnings_give_way(llama: Any) -> None:
    """What nobody holds is dropped when its place is needed, the longest unused first, and nothing is lost."""
    with Driven(runner(llama), kv_tokens=640) as driven:
        for prompt in prompts(*[300] * 6):
            assert driven.answer(asking(prompt, 10)) == [reference(llama, prompt, 10)]
        stats = driven.engine.stats()
        assert stats.pages_used == 0
        assert 0 < stats.pages_kept <= stats.pages_total
        (last,) = prompts(*[300] * 6)[-1:]
        again = asking(last, 10)
        driven.answer(again)
        assert again.prefix_hit_tokens == 256


def test_a_deadline_ends_the_request_where_it_is(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the queue or in the batch: DeadlineError, the place is free, the neighbour goes on."""
    clock = Clock(monkeypatch)

    class SecondByToken(LlamaRunner):
        def decode(self, *asked: Any) -> torch.Tensor:
            clock.now += 1
            return super().decode(*asked)

    running = Request([5] * 10, 1000, deadline=40)
    queued = Request([6] * 10, 1000, deadline=20)
    patient = asking([9] * 10, 5)
    slow = SecondByToken(llama_weights.from_model(llama), llama.device, llama.dtype)
    with Driven(slow, max_running=1) as driven:
        driven.engine.submit(running, queued, patient)
        driven.wait([running, queued, patient])
        assert list(driven.ended) == [queued, running, patient]
        assert {type(driven.ended[r].error) for r in (running, queued)} == {DeadlineError}
        assert len(driven.tokens[running]) == 1 + 40  # the first is the prefill's
        assert driven.tokens[queued] == []
        assert driven.tokens[patient] == reference(llama, [9] * 10, 5)
        driven.settled()


def test_a_long_prompt_lets_others_go_on(llama: Any) -> None:
    """While 900 tokens are prefilled, a running answer gets a token between any two pieces."""
    steps: list[int] = []

    class Watched(LlamaRunner):
        def prefill(self, ids: Sequence[int], spans: Sequence[Span]) -> torch.Tensor:
            steps.append(running.generated)
            return super().prefill(ids, spans)

    running, long = Request([5] * 10, 900), asking(prompts(900)[0], 2)
    with Driven(Watched(llama_weights.from_model(llama), llama.device, llama.dtype)) as driven:
        with driven.paused():
            driven.engine.submit(running)
            driven.started(running)
            driven.engine.submit(long)
        driven.wait([long])
        _, *pieces = steps
        assert len(pieces) == 4  # of 256 tokens
        assert [b - a for a, b in itertools.pairwise(pieces)] == [1, 1, 1]
        driven.engine.cancel(running)
        driven.settled()


def test_two_hundred_who_leave_cost_nothing_afterwards(driven: Driven, llama: Any) -> None:
    """200 requests are begun and abandoned; then every place is free and an answer is right."""
    asked = [Request(p, 900) for p in prompts(*[40] * 200)]
    driven.engine.submit(*asked)
    driven.started(asked[0])
    driven.engine.cancel(*asked)
    driven.settled()
    (prompt,) = prompts(12)
    assert driven.answer(asking(prompt, 20)) == [reference(llama, prompt, 20)]


@settings(max_examples=15, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 60), st.integers(1, 30), st.booleans()), min_size=1, max_size=25))
def test_any_mix_of_submits_and_cancels_leaves_nothing_behind(llama: Any, plan: list[tuple[int, int, bool]]) -> None:
    """Whoever is not cancelled gets the answer it would get alone; afterwards every place and page is free."""
    with Driven(runner(llama), kv_tokens=10 * PAGE_TOKENS, max_running=5, max_queued=100) as driven:
        kept = []
        for length, tokens, leave in plan:
            request = asking([(length * 7 + i) % 500 + 3 for i in range(length)], tokens)
            driven.engine.submit(request)
            if leave:
                driven.engine.cancel(request)
            else:
                kept.append(request)
        driven.wait(kept)
        driven.settled()
        for request in kept[:3]:
            assert driven.tokens[request] == reference(llama, request.prompt, request.max_tokens)
