"""One request's sampling: its parameters, its state from step to step, and the sampled token.

Knows token ids. Knows nothing of logits; `sampler` computes on them.
"""

from __future__ import annotations

import logging
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch

log = logging.getLogger(__name__)

# OpenAI's limit. All rows are computed with it, so that a row's list does not depend on its neighbours'.
MOST_LOGPROBS = 20


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """One request's parameters; `sample` describes their order. Raises ValueError for values out of range.

    top_k: 0 switches it off. logprobs: None for none; k: those of the sampled token and of the k best tokens, of the
    raw distribution.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    logprobs: int | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        within = {
            "temperature": 0 <= self.temperature < math.inf,
            "top_p": 0 <= self.top_p <= 1,
            "top_k": self.top_k >= 0,
            "min_p": 0 <= self.min_p <= 1,
            "presence_penalty": math.isfinite(self.presence_penalty),
            "frequency_penalty": math.isfinite(self.frequency_penalty),
            "repetition_penalty": 0 < self.repetition_penalty < math.inf,
            "logit_bias": all(token >= 0 and math.isfinite(bias) for token, bias in self.logit_bias.items()),
            "logprobs": self.logprobs is None or 0 <= self.logprobs <= MOST_LOGPROBS,
        }
        for name, good in within.items():
            if not good:
                raise ValueError(f"{name} is out of range")

    @property
    def penalises(self) -> bool:
        """Whether earlier tokens change the distribution."""
        return (self.presence_penalty, self.frequency_penalty, self.repetition_penalty) != (0, 0, 1)


class Grammar(Protocol):
    """Decides which tokens are allowed next in one request. Called in the engine's thread."""

    def fill(self, row: torch.Tensor) -> bool:
        """Write the allowed ids into row, (ceil(vocab / 32),) int32 on the CPU; a set bit means allowed. False: all ids
        are allowed."""
        ...

    def accept(self, token: int) -> None:
        """Advance by the sampled token; also called for the stop token."""
        ...


@dataclass(slots=True)
class Logprob:
    """Logprobs of the raw distribution, before penalties, bias, grammar and temperature. top: (id, logprob), the best
    first.

    A token that the raw logits exclude and a bias allows again has -inf; `top` never contains such a token.
    """

    logprob: float
    top: list[tuple[int, float]]


@dataclass(slots=True)
class SampledToken:
    """The next token of one request."""

    token: int
    logprob: Logprob | None = None


class SamplingState:
    """One request's state from step to step: random stream, tokens so far, grammar."""

    def __init__(self, sampling: SamplingParams, prompt: Sequence[int], grammar: Grammar | None = None) -> None:
        self.sampling, self.grammar = sampling, grammar
        # The grammar's mask of the next token, once it is prepared; None: every token is allowed.
        self.prepared = grammar is None
        self.mask: torch.Tensor | None = None
        self.fault: Exception | None = None  # that the grammar raised
        self.prepared_at = 0  # the step in which the last mask was computed
        seed = sampling.seed
        # Not cryptographic: a seeded stream for each request makes its answer repeatable in any batch.
        # Unsigned, because Random takes the absolute value.
        self.random = random.Random(None if seed is None else seed % 2**64)  # noqa: S311
        # Each id so far once, and how often it was generated: arrays with spare room, of which `seen` returns the used
        # part.
        known = dict.fromkeys(prompt) if sampling.repetition_penalty != 1 else {}
        self._places = {token: place for place, token in enumerate(known)}
        self._ids = np.fromiter(known, np.int64, len(known))
        self._counts = np.zeros(len(known), np.float32)
        self.bias_ids = np.fromiter(sampling.logit_bias.keys(), np.int64, len(sampling.logit_bias))
        self.biases = np.fromiter(sampling.logit_bias.values(), np.float32, len(sampling.logit_bias))
        self.highest = max([*known, *sampling.logit_bias], default=0)  # id that these parameters touch

    @property
    def seen(self) -> tuple[np.ndarray, np.ndarray]:
        """(ids so far, how often each was generated). With a repetition_penalty the prompt's ids are included."""
        used = len(self._places)
        return self._ids[:used], self._counts[:used]

    def prepare(self, vocab: int, step: int = 0) -> None:
        """Compute the mask of the next token, (ceil(vocab / 32),) int32, unless it exists. Raises nothing: an exception
        of the grammar is stored in `fault`."""
        if self.prepared or self.grammar is None:
            return
        row = torch.full((-(-vocab // 32),), -1, dtype=torch.int32)
        try:
            self.mask = row if self.grammar.fill(row) else None
        except Exception as error:
            log.exception("a grammar failed; its request ends with an error")
            self.fault = error
        self.prepared, self.prepared_at = True, step

    def take(self, token: int) -> None:
        """Record the sampled token. Raises what the grammar raises."""
        if self.sampling.penalises:
            place = self._places.setdefault(token, len(self._places))
            if place == len(self._ids):
                self._ids = np.concatenate([self._ids, np.zeros(place + 64, np.int64)])
                self._counts = np.concatenate([self._counts, np.zeros(place + 64, np.float32)])
            self._ids[place] = token
            self._counts[place] += 1
        if self.grammar is not None:
            self.prepared, self.mask = False, None
            self.grammar.accept(token)
