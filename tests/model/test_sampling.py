"""`sample` alone: every parameter against a plain reference, and no row against its neighbours."""

from __future__ import annotations

import functools
import math
import random
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from counts import cases
from hypothesis import given, settings
from hypothesis import strategies as st
from lab_model.engine import sampler
from lab_model.engine.sampler import SampleError
from lab_model.engine.sampling_params import Grammar, SampledToken, SamplingParams, SamplingState
from tiny import one_thread  # noqa: F401 - of all tests here

INF = float("inf")


def sample(logits: torch.Tensor, draws: Sequence[SamplingState]) -> list[SampledToken | SampleError]:
    """`sampling.sample` changes what it is given, and these tests use it again."""
    return sampler.sample(logits.clone(), draws)


class Allow:
    """A grammar that always allows the same ids, and fails on demand."""

    def __init__(self, ids: Sequence[int], fails: str = "") -> None:
        self.ids, self.fails = set(ids), fails
        self.accepted: list[int] = []

    def fill(self, row: torch.Tensor) -> bool:
        if self.fails == "fill":
            row.zero_()
            raise RuntimeError("made for this test")
        if self.fails == "idle":
            return False
        for word in range(len(row)):
            bits = sum(1 << bit for bit in range(32) if word * 32 + bit in self.ids)
            row[word] = bits - 2**32 if bits >= 2**31 else bits
        return True

    def accept(self, token: int) -> None:
        if self.fails == "accept":
            raise RuntimeError("made for this test")
        self.accepted.append(token)


def reference(
    logits: Sequence[float], asked: SamplingParams, prompt: Sequence[int], said: Sequence[int], allowed: set[int] | None
) -> list[float]:
    """Probabilities, straight from the definitions and in Python's floats; temperature 0 is none of its business."""
    scores = list(logits)
    count = Counter(said)
    for token in {*prompt, *said}:
        scores[token] *= 1 / asked.repetition_penalty if scores[token] > 0 else asked.repetition_penalty
    for token, times in count.items():
        scores[token] -= times * asked.frequency_penalty + asked.presence_penalty
    for token, bias in asked.logit_bias.items():
        scores[token] += bias
    if allowed is not None:
        scores = [score if token in allowed else -INF for token, score in enumerate(scores)]
    peak = max(scores)
    weights = [math.exp((score - peak) / asked.temperature) for score in scores]

    def keep(stays: Any) -> None:
        nonlocal weights
        whole = sum(weights)
        weights = [w if stays(w, whole) else 0.0 for w in weights]

    if asked.top_k:
        kth = sorted(weights, reverse=True)[min(asked.top_k, len(weights)) - 1]
        keep(lambda w, _: w >= kth)
    if asked.top_p < 1:
        before: dict[float, float] = {}
        heap = 0.0
        for w in sorted(weights, reverse=True):
            before.setdefault(w, heap)
            heap += w
        keep(lambda w, whole: before[w] < asked.top_p * whole)
    keep(lambda w, _: w >= asked.min_p)
    whole = sum(weights)
    return [w / whole for w in weights]


def fits(counts: Counter[int], expected: Sequence[float]) -> None:
    """Pearson's chi-square, bins below 5 pooled, at a chance of about 1e-6 (Wilson and Hilferty's approximation)."""
    draws = counts.total()
    assert not [token for token in counts if expected[token] == 0], "a token that must not come"
    big = [token for token, p in enumerate(expected) if p * draws >= 5]
    bins = [(counts[token], expected[token] * draws) for token in big]
    rest = (draws - sum(seen for seen, _ in bins), draws - sum(wanted for _, wanted in bins))
    if rest[1] >= 5:
        bins.append(rest)
    else:
        assert rest[0] <= 25
    freedom = max(len(bins) - 1, 1)
    statistic = sum((seen - wanted) ** 2 / wanted for seen, wanted in bins)
    limit = freedom * (1 - 2 / (9 * freedom) + 4.75 * math.sqrt(2 / (9 * freedom))) ** 3
    assert statistic < limit, (statistic, limit)


def logits_of(kind: str, vocab: int) -> torch.Tensor:
    torch.manual_seed(7)
    spread = {"peaked": 4.0, "usual": 2.0, "flat": 0.3}[kind]
    # Rounded as a model in bfloat16 gives them: many tokens are equally likely.
    return (torch.randn(vocab) * spread).bfloat16().float()


PROMPT, SAID = [3, 4, 5, 6], [5, 6, 6, 7, 7, 7]
CASES: dict[str, dict[str, Any]] = {
    "temperature": {"temperature": 0.7},
    "hot": {"temperature": 3.0},
    "top_k": {"top_k": 5},
    "top_k of many": {"top_k": 140},
    "top_k beyond the vocabulary": {"top_k": 10**30},
    "top_p": {"top_p": 0.8},
    "top_p of nearly all": {"top_p": 0.999},
    "top_p small": {"top_p": 0.05},
    "min_p": {"min_p": 0.1},
    "min_p of many": {"min_p": 0.001},
    "top_k then top_p": {"top_k": 10, "top_p": 0.7},
    "top_k then top_p then min_p": {"top_k": 200, "top_p": 0.95, "min_p": 0.02},
    "top_p then min_p": {"top_p": 0.9, "min_p": 0.3},
    "presence": {"presence_penalty": 1.5},
    "frequency": {"frequency_penalty": 0.9},
    "repetition": {"repetition_penalty": 1.4},
    "bias": {"logit_bias": {0: 3.0, 1: -100.0, 299: 2.0}},
    "grammar": {"allowed": {1, 2, 3, 31, 32, 63, 64, 255, 299}},
    "all": {
        "temperature": 1.3,
        "top_k": 60,
        "top_p": 0.9,
        "min_p": 0.01,
        "presence_penalty": -0.5,
        "frequency_penalty": 0.4,
        "repetition_penalty": 1.2,
        "logit_bias": {2: 1.0, 5: -1.0, 290: 2.5},
        "allowed": set(range(0, 300, 2)) | {5, 7},
    },
}


@pytest.mark.parametrize("kind", ["peaked", "usual", "flat"])
@pytest.mark.parametrize("case", CASES)
def test_draws_follow_the_reference(case: str, kind: str) -> None:
    """Many draws against probabilities computed from the definitions, for each parameter and for them together."""
    given_parameters = dict(CASES[case])
    allowed = given_parameters.pop("allowed", None)
    asked = SamplingParams(**{"temperature": 1.0, **given_parameters})
    logits = logits_of(kind, 300)
    count = cases(2000, 4000)
    grammar = Allow(allowed) if allowed else None
    draws = []
    for seed in range(count):
        draw = SamplingState(SamplingParams(**{"temperature": 1.0, "seed": seed, **given_parameters}), PROMPT, grammar)
        for token in SAID:
            draw.take(token)
        draws.append(draw)
    got: Counter[int] = Counter()
    for choice in sample(logits.expand(count, -1), draws):
        assert isinstance(choice, SampledToken)
        got[choice.token] += 1
    fits(got, reference(logits.tolist(), asked, PROMPT, SAID, allowed))


@pytest.mark.parametrize("asked", [{"top_p": 0.5}, {"top_p": 0.97}, {"top_k": 1000}, {"top_k": 3000, "top_p": 0.9}])
def test_a_nucleus_larger_than_the_candidates(asked: dict[str, Any]) -> None:
    """5,000 nearly equal tokens: the cut lies beyond the first 128, or beyond 2,048; nothing outside it is drawn."""
    logits, count = logits_of("flat", 5000), cases(1500, 3000)
    draws = [SamplingState(SamplingParams(temperature=1.0, seed=seed, **asked), []) for seed in range(count)]
    got = Counter(chosen(choice) for choice in sample(logits.expand(count, -1), draws))
    expected = reference(logits.tolist(), SamplingParams(temperature=1.0, **asked), [], [], None)
    assert all(expected[token] for token in got)
    # By hundredths of the vocabulary: single tokens come too seldom to be counted.
    fits(
        Counter({part: sum(got[token] for token in range(part, 5000, 50)) for part in range(50)}),
        [sum(expected[part::50]) for part in range(50)],
    )


def chosen(choice: SampledToken | SampleError) -> int:
    assert isinstance(choice, SampledToken), choice
    return choice.token


PARAMETERS = st.fixed_dictionaries(
    {
        "temperature": st.sampled_from([0.0, 1e-9, 1e-4, 0.01, 0.7, 1.0, 2.0, 100.0, 1e300]),
        "top_p": st.sampled_from([0.0, 1e-9, 0.1, 0.5, 0.9, 0.999999, 1.0]),
        "top_k": st.sampled_from([0, 1, 2, 40, 128, 129, 400, 10**30]),
        "min_p": st.sampled_from([0.0, 1e-9, 0.05, 1.0]),
        "presence_penalty": st.sampled_from([0.0, 2.0, -2.0]),
        "frequency_penalty": st.sampled_from([0.0, 2.0, -2.0]),
        "repetition_penalty": st.sampled_from([1.0, 0.1, 1.3, 10.0]),
        "logit_bias": st.sampled_from([{}, {5: 100.0}, {5: -100.0}, dict.fromkeys(range(300), 100.0)]),
        "logprobs": st.sampled_from([None, 0, 1, 20]),
    }
)


@settings(max_examples=cases(50, 80), deadline=None)
@given(PARAMETERS, st.sampled_from(["peaked", "flat"]), st.booleans())
def test_any_parameters_give_a_token_that_they_allow(parameters: dict[str, Any], kind: str, ruled: bool) -> None:
    """Whatever the combination: a token with a chance in the reference, or the most likely one at temperature 0."""
    logits = logits_of(kind, 300)
    allowed = set(range(100, 280)) if ruled else None
    draws = [
        SamplingState(SamplingParams(seed=seed, **parameters), PROMPT, Allow(allowed) if allowed else None)
        for seed in range(6)
    ]
    said: list[list[int]] = [[] for _ in draws]
    for _ in range(4):
        for row, choice in enumerate(sample(logits.expand(6, -1), draws)):
            token = chosen(choice)
            asked = draws[row].sampling
            sharp = asked.temperature < 1e-4
            # Seen from a hair above the edge: the reference computes in float64, a rounding apart at ties.
            calm = SamplingParams(
                temperature=1e-3 if sharp else asked.temperature,
                top_p=min(1.0, asked.top_p + 1e-5),
                top_k=1 if sharp else asked.top_k,
                min_p=asked.min_p * (1 - 1e-5),
                presence_penalty=asked.presence_penalty,
                frequency_penalty=asked.frequency_penalty,
                repetition_penalty=asked.repetition_penalty,
                logit_bias=asked.logit_bias,
            )
            chances = reference(logits.tolist(), calm, PROMPT, said[row], allowed)
            assert chances[token] > 0 or nearly(logits, calm, said[row], allowed, token)
            said[row].append(token)


def nearly(logits: torch.Tensor, asked: SamplingParams, said: list[int], allowed: set[int] | None, token: int) -> bool:
    """float32 made this token as likely as the least one that stays."""
    loose = SamplingParams(
        temperature=asked.temperature,
        repetition_penalty=asked.repetition_penalty,
        presence_penalty=asked.presence_penalty,
        frequency_penalty=asked.frequency_penalty,
        logit_bias=asked.logit_bias,
    )
    whole = reference(logits.tolist(), loose, PROMPT, said, allowed)
    kept = reference(logits.tolist(), asked, PROMPT, said, allowed)
    least = min(w for w, k in zip(whole, kept, strict=True) if k)
    return whole[token] >= least * (1 - 1e-3) > 0


HOSTILE: dict[str, dict[str, Any]] = {
    "not a number": {"logits": float("nan")},
    "one not a number": {"logits": float("nan"), "at": 17},
    "infinite": {"logits": INF, "at": 17},
    "nothing possible": {"logits": -INF},
    "temperature 0": {"temperature": 0.0},
    "temperature 1e-9": {"temperature": 1e-9, "top_p": 0.5},
    "temperature 1e300": {"temperature": 1e300, "top_p": 0.99, "top_k": 299},
    "top_p 0": {"temperature": 1.0, "top_p": 0.0},
    "top_p 1e-9": {"temperature": 1.0, "top_p": 1e-9},
    "bias +100 on all": {"temperature": 1.0, "logit_bias": dict.fromkeys(range(300), 100.0)},
    "bias -100 on all": {"temperature": 1.0, "logit_bias": dict.fromkeys(range(300), -100.0)},
    "bias outside": {"logit_bias": {300: 1.0}},
    "bias far outside": {"logit_bias": {2**40: 1.0}},
    "penalties to infinity": {"frequency_penalty": 3e38, "presence_penalty": 3e38},
    "repetition to infinity": {"repetition_penalty": 1e-40},
    "grammar raises": {"grammar": ([1], "fill")},
    "grammar refuses the token": {"grammar": ([1], "accept")},
    "grammar allows nothing": {"grammar": ([], "")},
    "grammar allows one": {"temperature": 2.0, "grammar": ([299], "")},
    "large top_k": {"temperature": 1.0, "top_k": 10**30, "top_p": 0.999},
    "all logprobs": {"temperature": 5.0, "logprobs": 20},
}
FAULTS = {
    "not a number",
    "one not a number",
    "infinite",
    "nothing possible",
    "bias outside",
    "bias far outside",
    "repetition to infinity",
    "grammar raises",
    "grammar refuses the token",
    "grammar allows nothing",
}


def hostile(kind: str, row: torch.Tensor) -> SamplingState:
    """A request of this kind; spoils its logits if that is what it is about."""
    wanted = dict(HOSTILE[kind])
    if "logits" in wanted:
        row[wanted.pop("at", slice(None))] = wanted.pop("logits")
    ids, fails = wanted.pop("grammar", (None, ""))
    return SamplingState(SamplingParams(seed=1, **wanted), PROMPT, Allow(ids, fails) if ids is not None else None)


def neighbours() -> list[SamplingState]:
    """31 well-behaved requests of every sort."""
    sorts: list[dict[str, Any]] = [
        {},
        {"temperature": 1.0},
        {"temperature": 0.8, "top_p": 0.9},
        {"temperature": 2.0, "top_p": 0.99, "logprobs": 5},
        {"temperature": 1.0, "top_k": 20, "repetition_penalty": 1.2},
        {"temperature": 1.0, "min_p": 0.05, "frequency_penalty": 0.5},
        {"temperature": 1.0, "logit_bias": {7: 5.0}, "logprobs": 0},
        {"logprobs": 3, "presence_penalty": 1.0},
    ]
    return [
        SamplingState(
            SamplingParams(seed=i, **sorts[i % len(sorts)]), PROMPT, Allow(range(0, 300, 3)) if i % 5 == 4 else None
        )
        for i in range(31)
    ]


@functools.cache
def steps_alone() -> tuple[torch.Tensor, list[list[SampledToken | SampleError]]]:
    """Logits of 6 steps, (6, 32, 300), and what each neighbour gets of them alone."""
    torch.manual_seed(5)
    steps = torch.randn(6, 32, 300) * 2
    return steps, [[sample(step[i : i + 1], [draw])[0] for step in steps] for i, draw in enumerate(neighbours())]


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_row_changes_no_neighbour(kind: str) -> None:
    """31 rows beside it get the tokens and logprobs that each gets alone; the hostile row fails alone or is served."""
    steps, alone = steps_alone()
    steps = steps.clone()
    draws = neighbours()
    draws.append(hostile(kind, steps[0, 31]))
    for number, step in enumerate(steps):
        if number:
            hostile(kind, step[31])
        *well, ill = sample(step, draws)
        assert well == [answers[number] for answers in alone]
        if number:
            continue  # what a request does after its fault is nobody's promise
        assert isinstance(ill, SampleError) == (kind in FAULTS), ill


@settings(max_examples=40, deadline=None)
@given(st.lists(PARAMETERS, min_size=1, max_size=32), st.randoms(use_true_random=False))
def test_a_seeded_row_is_the_same_alone_and_in_any_batch(asked: list[dict[str, Any]], order: random.Random) -> None:
    """Bit by bit: token and logprobs, in any order, at the sizes of a real vocabulary's blocks and at odd ones."""
    torch.manual_seed(11)
    logits = (torch.randn(len(asked), 1003) * 3).bfloat16().float()
    made = [SamplingParams(seed=i, **parameters) for i, parameters in enumerate(asked)]
    alone = [sample(logits[i : i + 1], [SamplingState(s, [i])])[0] for i, s in enumerate(made)]
    shuffled = list(range(len(asked)))
    order.shuffle(shuffled)
    together = sample(logits[shuffled], [SamplingState(made[i], [i]) for i in shuffled])
    assert together == [alone[i] for i in shuffled]


def test_the_embedded_vocabulary_alone_and_in_a_batch() -> None:
    """49,152 tokens, where torch splits sums over its threads: still bit by bit the same."""
    torch.set_num_threads(2)
    try:
        torch.manual_seed(12)
        logits = torch.randn(32, 49152) * 3
        sorts: list[dict[str, Any]] = [
            {},
            {"top_p": 0.9},
            {"top_k": 40},
            {"top_p": 0.99, "min_p": 1e-4},
            {"logprobs": 5},
        ]
        made = [SamplingParams(temperature=1.0, seed=i, **sorts[i % 5]) for i in range(32)]
        alone = [sample(logits[i : i + 1], [SamplingState(s, [])])[0] for i, s in enumerate(made)]
        assert sample(logits, [SamplingState(s, []) for s in made]) == alone
    finally:
        torch.set_num_threads(1)


def test_seeds() -> None:
    """The same seed the same tokens, another seed others, a negative seed is another seed, none is never the same."""
    logits = logits_of("flat", 300)[None]

    def tokens(seed: int | None) -> list[int]:
        draw = SamplingState(SamplingParams(temperature=1.0, seed=seed), [])
        return [chosen(sample(logits, [draw])[0]) for _ in range(20)]

    assert tokens(5) == tokens(5)
    assert len({tuple(tokens(seed)) for seed in (5, 6, -5, None, None, 2**63 - 1)}) == 6


@pytest.mark.parametrize("asked", [{}, {"top_p": 0.999}, {"top_k": 200}])
def test_the_end_of_the_stream_still_names_a_possible_token(asked: dict[str, Any]) -> None:
    """A number just below 1 times the whole may round to the whole: not to a token that is out of the question."""

    class Last(random.Random):
        def random(self) -> float:
            return 1 - 2**-53

    for seed in range(20):
        torch.manual_seed(seed)
        logits = torch.randn(300)
        logits[250:] = -INF
        draw = SamplingState(SamplingParams(temperature=1.0, **asked), [])
        draw.random = Last()
        assert chosen(sample(logits[None], [draw])[0]) < 250


def test_greedy_is_the_first_of_the_most_likely() -> None:
    """As argmax: the first id of those equally likely, across blocks and at a vocabulary that is no multiple of one."""
    logits = torch.zeros(4, 1003)
    for row, peaks in enumerate([(1002,), (31, 32), (700, 45, 999), (0, 1001)]):
        logits[row, list(peaks)] = 2.0
    for sharp in ({}, {"temperature": 1.0, "top_k": 1}, {"temperature": 1.0, "top_p": 1e-9}, {"temperature": 1e-9}):
        got = sample(logits, [SamplingState(SamplingParams(**sharp), []) for _ in range(4)])  # type: ignore[arg-type]
        assert [chosen(choice) for choice in got] == [1002, 31, 45, 0]


def test_repetition_penalty_is_transformers_own() -> None:
    """Greedy answers over 30 steps with RepetitionPenaltyLogitsProcessor, prompt and answer both counted."""
    from transformers import RepetitionPenaltyLogitsProcessor

    torch.manual_seed(2)
    steps = torch.randn(30, 1, 300)
    processor = RepetitionPenaltyLogitsProcessor(penalty=1.7)
    draw = SamplingState(SamplingParams(repetition_penalty=1.7), PROMPT)
    ids = torch.tensor([PROMPT])
    for step in steps:
        (choice,) = sample(step, [draw])
        assert chosen(choice) == int(processor(ids, step.clone()).argmax())
        ids = torch.cat([ids, torch.tensor([[chosen(choice)]])], dim=1)


@pytest.mark.parametrize(
    ("asked", "warper"),
    [
        ({"top_k": 7}, ("TopKLogitsWarper", 7)),
        ({"top_p": 0.6}, ("TopPLogitsWarper", 0.6)),
        ({"min_p": 0.2}, ("MinPLogitsWarper", 0.2)),
    ],
)
def test_cuts_are_transformers_own(asked: dict[str, Any], warper: tuple[str, float]) -> None:
    """With all logits different, 1,500 draws bring every token that transformers' own filter leaves, and no other."""
    import transformers

    torch.manual_seed(4)
    logits = torch.randn(300) * 3
    name, value = warper
    left = getattr(transformers, name)(value)(torch.tensor([[0]]), logits[None].clone())[0].isfinite()
    draws = [SamplingState(SamplingParams(temperature=1.0, seed=seed, **asked), []) for seed in range(1500)]
    got = {chosen(choice) for choice in sample(logits.expand(1500, -1), draws)}
    assert got == set(left.nonzero()[:, 0].tolist())


def test_penalties_count_what_was_generated() -> None:
    """OpenAI's formula: logit - count * frequency - (count > 0) * presence; the prompt does not count."""
    asked = SamplingParams(presence_penalty=0.3, frequency_penalty=0.2)
    draw = SamplingState(asked, [9, 9, 9])
    logits = torch.tensor([1.0, 0.953, 0.017, *[-9.0] * 6, 1.021])
    wanted = logits.clone()
    count = torch.zeros(10)
    for _ in range(40):
        token = chosen(sample(logits[None], [draw])[0])
        assert token == int((wanted - count * 0.2 - (count > 0) * 0.3).argmax())
        count[token] += 1


def test_a_long_answer_keeps_its_counts() -> None:
    """1,000 different tokens outgrow the arrays again and again: none is lost."""
    draw = SamplingState(SamplingParams(frequency_penalty=0.1), [])
    for token in [*range(1000), *range(500)]:
        draw.take(token)
    ids, counts = draw.seen
    assert dict(zip(ids.tolist(), counts.tolist(), strict=True)) == {t: 2.0 if t < 500 else 1.0 for t in range(1000)}


def test_logprobs_are_of_the_raw_distribution() -> None:
    """torch.log_softmax of the logits as given, whatever bias, penalties, grammar and temperature make of them."""
    torch.manual_seed(9)
    logits = torch.randn(4, 300) * 3
    wanted = logits.log_softmax(-1)
    twisted = SamplingParams(
        temperature=2.0, top_k=3, logit_bias={11: 100.0}, repetition_penalty=2.0, presence_penalty=1.0, logprobs=7
    )
    draws = [
        SamplingState(twisted, PROMPT),
        SamplingState(SamplingParams(logprobs=0), []),
        SamplingState(SamplingParams(), []),
        SamplingState(SamplingParams(logprobs=20), [], Allow([42])),
    ]
    got = sample(logits, draws)
    for row, count in ((0, 7), (1, 0), (3, 20)):
        choice = got[row]
        assert isinstance(choice, SampledToken)
        assert choice.logprob is not None
        assert choice.logprob.logprob == pytest.approx(wanted[row, choice.token].item(), abs=1e-5)
        best = wanted[row].topk(count)
        assert [token for token, _ in choice.logprob.top] == best.indices.tolist()
        assert [chance for _, chance in choice.logprob.top] == pytest.approx(best.values.tolist(), abs=1e-5)
    assert isinstance(got[2], SampledToken)
    assert got[2].logprob is None


def test_logprobs_of_a_vocabulary_smaller_than_asked() -> None:
    """Five tokens, one impossible: four of them in the list, no id that is not there."""
    (choice,) = sample(torch.tensor([[1.0, 2.0, 3.0, 4.0, -INF]]), [SamplingState(SamplingParams(logprobs=20), [])])
    assert isinstance(choice, SampledToken)
    assert choice.logprob is not None
    assert [token for token, _ in choice.logprob.top] == [3, 2, 1, 0]


def test_the_grammar_hears_every_token_and_may_step_aside() -> None:
    """accept is called with each chosen token; a grammar that allows everything masks nothing."""
    held: Grammar = Allow([5, 6])
    idle: Grammar = Allow([], fails="idle")
    logits = logits_of("peaked", 300).expand(2, -1)
    draws = [SamplingState(SamplingParams(), [], held), SamplingState(SamplingParams(), [], idle)]
    got = [[chosen(choice) for choice in sample(logits, draws)] for _ in range(3)]
    assert held.accepted == [tokens[0] for tokens in got]  # type: ignore[attr-defined]
    assert {tokens[0] for tokens in got} <= {5, 6}
    assert {tokens[1] for tokens in got} == {int(logits[1].argmax())}


def test_grammar_faults_say_what_happened() -> None:
    """Nothing of the user's text, but enough to know that the grammar and not the model failed."""
    logits = torch.randn(2, 300)
    nothing, raises = sample(
        logits,
        [SamplingState(SamplingParams(), [], Allow([])), SamplingState(SamplingParams(), [], Allow([1], "fill"))],
    )
    assert str(nothing) == "the grammar allows no token"
    assert str(raises) == "the grammar failed: RuntimeError"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", INF),
        ("top_p", 1.1),
        ("top_p", float("nan")),
        ("top_k", -1),
        ("min_p", 2.0),
        ("presence_penalty", INF),
        ("frequency_penalty", float("nan")),
        ("repetition_penalty", 0.0),
        ("logit_bias", {-1: 1.0}),
        ("logit_bias", {1: float("nan")}),
        ("logprobs", 21),
    ],
)
def test_parameters_out_of_range_are_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=name):
        SamplingParams(**{name: value})


def test_no_rows() -> None:
    assert sample(torch.empty(0, 300), []) == []


@pytest.mark.gpu
def test_cuda_follows_the_reference_too() -> None:
    """The same draws on the device: nearly all tokens equal the CPU's (sums round differently), logprobs to 1e-4."""
    torch.manual_seed(6)
    logits = torch.randn(32, 49152) * 3
    draws = [[*neighbours(), SamplingState(SamplingParams(temperature=2.0, top_p=0.99, seed=1), [])] for _ in range(2)]
    here, there = sample(logits, draws[0]), sample(logits.cuda(), draws[1])
    same = [chosen(a) == chosen(b) for a, b in zip(here, there, strict=True)]
    assert sum(same) >= 30
