"""Scoring beside running requests: logits of a given text, at low priority. Tiny seeded models in float32."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from driven import Clock, Driven
from hypothesis import given, settings
from hypothesis import strategies as st
from lab_model.engine.kv_pages import PAGE_TOKENS, KVPages
from lab_model.engine.request import CancelledError, EngineFaultError, QueueFullError, Request
from lab_model.engine.sampler import sample
from lab_model.engine.sampling_params import SampledToken, SamplingParams, SamplingState
from lab_model.engine.scoring import MOST_QUEUED, SHARE, ScoringQueue, ScoringRequest, next_token, score_tokens
from lab_model.runners.llama import LlamaRunner
from lab_model.runners.transformers import TransformersRunner
from lab_model.weights import llama as llama_weights
from tiny import one_thread  # noqa: F401 - of all tests here


def runner(kind: str = "llama") -> Any:
    model = tiny.model(kind.partition(" ")[0])
    if "plain" in kind:
        return TransformersRunner(model)
    return LlamaRunner(llama_weights.from_model(model), model.device, model.dtype)


def text(length: int, seed: int = 1) -> list[int]:
    torch.manual_seed(seed)
    return torch.randint(3, tiny.VOCABULARY, (length,)).tolist()


class Logits:
    """What one scoring request received, by place."""

    def __init__(self, ids: list[int], first: int = 0) -> None:
        self.rows: dict[int, torch.Tensor] = {}
        self.pieces: list[int] = []  # how many tokens each call had
        self.request = ScoringRequest(ids, first=first, receive=self._receive)

    def _receive(self, first: int, logits: torch.Tensor) -> None:
        self.pieces.append(len(logits))
        self.rows |= {first + place: row.clone() for place, row in enumerate(logits)}

    @property
    def all(self) -> torch.Tensor:
        return torch.stack([self.rows[place] for place in sorted(self.rows)])


@pytest.mark.parametrize("kind", ["llama", "llama plain", "gpt2 plain"])
def test_every_place_has_transformers_logits(kind: str) -> None:
    """Of a text of several pieces, and with other requests running; the last place alone from a cached prefix too."""
    ids = text(300)
    want = tiny.model(kind.partition(" ")[0])(torch.tensor([ids])).logits[0]
    with Driven(runner(kind)) as driven:
        beside = [Request(text(40, seed), 60) for seed in range(2, 5)]
        driven.engine.submit(*beside)
        everything, last = Logits(ids), Logits(ids, len(ids) - 1)
        driven.answer(everything.request, last.request)
        driven.wait(beside)
        driven.settled()
    assert driven.ended[everything.request].finish == "stop"
    assert sorted(everything.rows) == list(range(len(ids)))
    assert torch.allclose(everything.all, want, atol=2e-3)
    assert list(last.rows) == [len(ids) - 1]
    assert torch.allclose(last.all, want[-1:], atol=2e-3)


def test_running_requests_wait_for_a_page_at_most(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside them a piece is one page, and the next one comes when it has taken no more than its share of the time."""
    clock = Clock(monkeypatch)
    monkeypatch.setattr("lab_model.engine.scoring.time", clock.module)
    made, pages, asked = runner(), KVPages(40), Logits(text(200))
    made.allocate(41)
    queue = ScoringQueue(made, pages, lambda: None, threading.Condition())
    queue.add(asked.request)
    compute = made.all_logits

    def slow(*arguments: Any) -> torch.Tensor:
        clock.now += 1
        return compute(*arguments)

    monkeypatch.setattr(made, "all_logits", slow)
    with torch.inference_mode():
        assert not queue.step(beside=True)
        assert asked.pieces == [PAGE_TOKENS]
        clock.now += 1 / SHARE - 1.01
        queue.step(beside=True)
        assert asked.pieces == [PAGE_TOKENS]
        clock.now += 0.02
        queue.step(beside=True)
        assert asked.pieces == [PAGE_TOKENS] * 2
        (ended,) = queue.step(beside=False)  # alone it waits for nothing
    assert ended.finish == "stop"
    assert asked.pieces == [PAGE_TOKENS] * 2 + [200 - 2 * PAGE_TOKENS]
    assert pages.available == 40


@pytest.mark.parametrize(("prompt", "tokens"), [(120, 60), (60, 150)])
def test_running_requests_take_the_pages_of_a_text(monkeypatch: pytest.MonkeyPatch, prompt: int, tokens: int) -> None:
    """A half computed text gives way to an answer whose prompt, or whose growth, needs its pages, and is computed
    again."""
    monkeypatch.setattr("lab_model.engine.scoring.SHARE", 1e-6)  # no piece beside the answer
    ids = text(400)
    want = tiny.model()(torch.tensor([ids])).logits[0]
    with Driven(runner("llama plain"), kv_tokens=512) as driven:
        asked, answer = Logits(ids), Request(text(prompt, 2), tokens)
        receive = asked.request.receive

        def first_piece(first: int, logits: torch.Tensor) -> None:
            if not asked.pieces:
                driven.engine.submit(answer)
            receive(first, logits)

        asked.request.receive = first_piece
        driven.engine.submit(asked.request)
        driven.wait([answer, asked.request])
        driven.settled()
        assert driven.engine.stats().preempted == 0
    assert driven.ended[answer].finish == "length"
    assert list(driven.ended) == [answer, asked.request]
    assert torch.allclose(asked.all, want, atol=2e-3)
    assert sum(asked.pieces) > len(ids)


def test_a_cancelled_text_frees_its_pages_and_a_fault_ends_one_text_alone() -> None:
    def fault(*_: Any) -> None:
        raise ZeroDivisionError

    with Driven(runner()) as driven:
        gone, faulty, well = Logits(text(400)), ScoringRequest(text(40), first=0, receive=fault), Logits(text(50))
        with driven.paused():
            driven.engine.submit(gone.request, faulty, well.request)
            driven.engine.cancel(gone.request)
        driven.wait([gone.request, faulty, well.request])
        assert isinstance(driven.ended[gone.request].error, CancelledError)
        assert isinstance(driven.ended[faulty].error, EngineFaultError)
        assert driven.ended[well.request].finish == "stop"
        driven.settled()
        assert driven.engine.alive


def test_the_queue_of_texts_is_bounded() -> None:
    with Driven(runner()) as driven:
        requests = [Logits(text(4)).request for _ in range(MOST_QUEUED + 1)]
        with pytest.raises(QueueFullError):
            driven.engine.submit(*requests)
        driven.answer(*requests[1:])


def test_scores_are_ranks_and_logprobs() -> None:
    logits = torch.tensor([[1.0, 3.0, 2.0, 2.0], [0.0, 0.0, 0.0, 5.0]])
    first, second = score_tokens(logits, [2, 3], 2)
    assert (first.rank, second.rank) == (2, 1)
    assert first.logprob == pytest.approx(float(logits.log_softmax(-1)[0, 2]))
    assert first.top[0][0] == 1
    assert second.top[0] == (3, second.logprob)


@settings(deadline=None)
@given(
    st.lists(st.sampled_from([-4.0, -1.0, 0.0, 0.5, 2.0, 2.5]), min_size=4, max_size=64),
    st.sampled_from([0.0, 0.3, 1.0, 1.7]),
    st.sampled_from([0, 1, 2, 5, 100]),
    st.sampled_from([0.0, 0.2, 0.5, 0.9, 1.0]),
    st.sampled_from([0.0, 0.1, 0.5, 1.0]),
)
def test_the_kept_tokens_are_those_that_the_sampler_draws(
    values: list[float], temperature: float, top_k: int, top_p: float, min_p: float
) -> None:
    """For each token that may come and no other there is a random number for which the sampler draws it."""
    logits = torch.tensor(values)
    params = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    found = next_token(logits, params, len(values))
    kept = {each.token for each in found.candidates if each.cut_by is None}
    assert len(kept) == found.kept
    assert sum(found.cut.values()) == len(values) - found.kept
    assert sum(each.final for each in found.candidates) == pytest.approx(1)
    assert all((each.final > 0) == (each.cut_by is None) for each in found.candidates)
    states = [SamplingState(params, [1]) for _ in range(100)]
    for place, state in enumerate(states):
        state.random = _Fixed((place + 0.5) / len(states))  # type: ignore[assignment]
    sampled = sample(logits.repeat(len(states), 1), states)
    drawn = {each.token for each in sampled if isinstance(each, SampledToken)}
    assert len(sampled) == len(states)
    assert drawn <= kept
    likely = {each.token for each in found.candidates if each.final > 0.02}
    assert likely <= drawn


class _Fixed:
    def __init__(self, value: float) -> None:
        self.value = value

    def random(self) -> float:
        return self.value


def test_each_filter_is_named_for_what_it_cuts() -> None:
    logits = torch.tensor(np.log([0.4, 0.3, 0.15, 0.1, 0.05]), dtype=torch.float32)
    found = next_token(logits, SamplingParams(temperature=1, top_k=4, top_p=0.8, min_p=0.5), 5)
    assert [each.cut_by for each in found.candidates] == [None, None, "min_p", "top_p", "top_k"]
    assert found.cut == {"temperature": 0, "top_k": 1, "top_p": 1, "min_p": 1}
    assert [each.final for each in found.candidates[:2]] == pytest.approx([4 / 7, 3 / 7], abs=1e-6)
    greedy = next_token(logits, SamplingParams(temperature=0), 2)
    assert [each.cut_by for each in greedy.candidates] == [None, "temperature"]
    assert greedy.cut["temperature"] == 4
