"""Computes logits of a given text with low priority beside running answers, and the scores read from them.

While requests run, scoring gets SHARE of the engine's time, in pieces of a page; alone it gets all of it. Knows token
ids and logits. Knows nothing of text.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch

from .kv_pages import PAGE_TOKENS, KVPages
from .request import EngineError, EngineFaultError, Request, StepOutput
from .runner import Runner, Span
from .sampler import GREEDY_BELOW
from .sampling_params import SamplingParams

log = logging.getLogger(__name__)

SHARE = 0.08  # of the engine's time while requests run, so that 8 streams lose at most a tenth of their speed
PIECE_TOKENS = 256  # tokens of one piece if no requests run
# Logits of one piece: bounds its memory (32 MiB in float32, and as much again for each reduction).
PIECE_LOGITS = 2**23
MOST_QUEUED = 64

Filter = Literal["temperature", "top_k", "top_p", "min_p"]
FILTERS: tuple[Filter, ...] = ("temperature", "top_k", "top_p", "min_p")  # in the sampler's order


@dataclass(eq=False, slots=True, kw_only=True)
class ScoringRequest(Request):
    """A request for the logits of a text instead of an answer. Its only output has no tokens and the finish `stop`.

    first: index of the first token whose logits are needed; those of the last token are always computed.
    receive: called in the engine's thread with an index and the logits of that token and the following ones, (tokens,
    vocab), float32. It may be called again from `first` on, if running requests took the pages. It must be quick.
    """

    first: int
    receive: Callable[[int, torch.Tensor], None]
    max_tokens: int = field(default=1, init=False)


class ScoringQueue:
    """Scoring requests, one at a time. `add`, `drop`, `release` and `close` are called with `lock` held."""

    def __init__(
        self, runner: Runner, pages: KVPages, zero_pages: Callable[[], None], lock: threading.Condition
    ) -> None:
        self._runner, self._pages, self._zero_pages, self._lock = runner, pages, zero_pages, lock
        self._requests: deque[ScoringRequest] = deque()
        self._due = 0.0  # time.monotonic() of the next piece beside running requests

    def __bool__(self) -> bool:
        return bool(self._requests)

    @property
    def room(self) -> int:
        return MOST_QUEUED - len(self._requests)

    def add(self, request: ScoringRequest) -> None:
        self._requests.append(request)

    def drop(self, request: ScoringRequest) -> None:
        self._requests.remove(request)
        self._pages.evict(request)

    def ended(self, now: float) -> list[ScoringRequest]:
        """Those that were cancelled or passed their deadline."""
        return [r for r in self._requests if r.cancelled or (r.deadline is not None and r.deadline <= now)]

    def release(self) -> bool:
        """Give the pages to running requests; the text is computed again later. False: there were none."""
        if not self._requests or not self._requests[0].pages:
            return False
        self._pages.evict(self._requests[0])
        return True

    def close(self, error: EngineError) -> list[StepOutput]:
        requests, self._requests = list(self._requests), deque()
        return [StepOutput(request, [], error=error) for request in requests]

    def step(self, *, beside: bool) -> list[StepOutput]:
        """Compute one piece of the oldest request, if it is due. beside: other requests run."""
        started = time.monotonic()
        if not self._requests or (beside and started < self._due):
            return []
        request = self._requests[0]
        try:
            ended = self._advance(request, beside=beside)
        except Exception as error:
            log.exception("a text could not be scored; the loop continues")
            with self._lock:
                self._pages.distrust([request])
                self.drop(request)
            return [StepOutput(request, [], error=EngineFaultError(f"the model failed: {type(error).__name__}"))]
        finally:
            now = time.monotonic()
            self._due = now + (now - started) * (1 / SHARE - 1)
        if not ended:
            return []
        with self._lock:
            self.drop(request)
        return [] if request.cancelled else [StepOutput(request, [], "stop")]

    def _advance(self, request: ScoringRequest, *, beside: bool) -> bool:
        """Whether the request is complete."""
        count = len(request.tokens)
        # 1. Pages. A cached prefix has no logits, so it is used only if just the last logits are needed.
        if not request.pages:
            shared = self._runner.batch_invariant and request.first == count - 1
            with self._lock:
                if not self._pages.admit(request, PAGE_TOKENS if shared else count + PAGE_TOKENS):
                    return False
        self._zero_pages()
        # 2. One piece, which ends with a page or with the text.
        start = request.computed_tokens
        wide = PIECE_TOKENS if request.first >= start + PIECE_TOKENS else PIECE_LOGITS // self._runner.vocab
        size = PAGE_TOKENS if beside else min(PIECE_TOKENS, max(wide, PAGE_TOKENS))
        stop = min(count, (start + size) // PAGE_TOKENS * PAGE_TOKENS)
        span = Span(start, stop, request.pages[: -(-stop // PAGE_TOKENS)])
        ids, first = request.tokens[start:stop], max(request.first, start)
        if first < stop - 1:
            logits = self._runner.all_logits(ids, span.pages, start)[first - start :]
        else:
            logits = self._runner.prefill(ids, [span])
        # 3. The logits that are needed.
        if first < stop:
            request.receive(first, logits)
        request.computed_tokens = stop
        request.prefilled = max(request.prefilled, stop)
        if self._runner.batch_invariant:
            self._pages.publish_filled(request)
        return stop == count


class TokenScore(NamedTuple):
    """The probability of a token at its place. rank: 1 for the most likely; equally likely tokens share a rank.
    top: (id, logprob) of the most likely tokens at this place, best first."""

    logprob: float
    rank: int
    top: list[tuple[int, float]]


def score_tokens(logits: torch.Tensor, targets: Sequence[int], top: int) -> list[TokenScore]:
    """The score of each target by its row of logits, (targets, vocab), float32. top: number of alternatives."""
    total = logits.logsumexp(-1, keepdim=True)  # (targets, 1)
    chosen = logits.gather(1, torch.tensor(targets, device=logits.device)[:, None])  # (targets, 1)
    ranks = (logits > chosen).sum(-1) + 1
    logprobs = (chosen - total)[:, 0]
    best, ids = logits.topk(min(top, logits.shape[1]))  # (targets, top)
    pairs = zip((best - total).tolist(), ids.tolist(), strict=True)
    tops = [list(zip(each_ids, values, strict=True)) for values, each_ids in pairs]
    return [TokenScore(*each) for each in zip(logprobs.tolist(), ranks.tolist(), tops, strict=True)]


class Candidate(NamedTuple):
    """One token that can come next: its logprob by the model, after temperature (tempered), after all filters (final).
    cut_by: the first filter that excludes it; None: it can be sampled."""

    token: int
    logit: float
    logprob: float
    tempered: float
    final: float
    cut_by: Filter | None


class NextToken(NamedTuple):
    """candidates: the most likely tokens, best first. kept: number of tokens of the vocabulary that can be sampled.
    cut: number of tokens that each filter excludes. entropy: of the model's own distribution, in bits."""

    candidates: list[Candidate]
    kept: int
    cut: dict[Filter, int]
    entropy: float


def next_token(logits: torch.Tensor, params: SamplingParams, count: int) -> NextToken:
    """The `count` most likely next tokens before and after the sampling parameters. logits: (vocab,).

    The filters act in the sampler's order: temperature, top_k, top_p of what top_k left, min_p. As in the sampler,
    equally likely tokens stay or go together, and a temperature below 1e-4, a top_k of 1 or a top_p that holds one
    token leave the first of the most likely. Raises ValueError for logits without a finite maximum.
    """
    raw = logits.double().cpu()
    if not raw.max().isfinite():
        raise ValueError("the model's logits were not finite")
    logprobs = raw.log_softmax(-1)
    order = logprobs.argsort(descending=True, stable=True)
    vocab = len(raw)
    first = torch.arange(vocab) == 0  # of the sorted vocabulary
    keeps: dict[Filter, torch.Tensor] = {name: torch.ones(vocab, dtype=torch.bool) for name in FILTERS}
    # 1. Temperature.
    if params.temperature < GREEDY_BELOW:
        tempered = first.double()
        keeps["temperature"] = first
    else:
        tempered = ((raw - raw.max()) / params.temperature).softmax(-1)[order]
        # 2. The filters, on the sorted probabilities.
        if params.top_k == 1:
            keeps["top_k"] = first
        elif 0 < params.top_k < vocab:
            keeps["top_k"] = tempered >= tempered[params.top_k - 1]
        if params.top_p * vocab <= 1:
            keeps["top_p"] = first
        elif params.top_p < 1:
            heaped = tempered.where(keeps["top_k"], 0).cumsum(-1)
            last = torch.searchsorted(heaped, params.top_p * heaped[-1:]).clamp(max=vocab - 1)
            keeps["top_p"] = tempered >= tempered[last]
        keeps["min_p"] = tempered >= params.min_p * tempered[0]
    # 3. The first filter that excludes a token is reported.
    kept = torch.ones(vocab, dtype=torch.bool)
    lost: dict[Filter, torch.Tensor] = {}
    for name, keep in keeps.items():
        lost[name] = kept & ~keep
        kept = kept & keep
    final = tempered.where(kept, 0)
    final = final / final.sum()
    chances = logprobs.exp()
    entropy = float(-(chances * logprobs).where(chances > 0, 0).sum() / math.log(2))
    candidates = [
        Candidate(
            token,
            float(raw[token]),
            float(logprobs[token]),
            float(tempered[place]),
            float(final[place]),
            next((name for name, cut in lost.items() if cut[place]), None),
        )
        for place, token in enumerate(order[:count].tolist())
    ]
    return NextToken(candidates, int(kept.sum()), {name: int(cut.sum()) for name, cut in lost.items()}, entropy)
