"""One request to the scheduler: its parameters, its state, the output of each step, and its errors.

Knows token ids and page numbers. Does not compute steps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from .sampling_params import Grammar, Logprob, SamplingParams, SamplingState

Finish = Literal["stop", "length"]
Phase = Literal["queue", "prefill", "decode"]


class EngineError(Exception):
    """Reason why a request gets no tokens, or no more tokens."""


class QueueFullError(EngineError):
    """All places and the queue are full. `retry_after`: estimated seconds until there is room."""

    def __init__(self, retry_after: float) -> None:
        super().__init__("the queue of this model is full")
        self.retry_after = retry_after


class RequestTooLongError(EngineError):
    """Prompt and max_tokens together exceed the context."""


class UnknownTokenError(EngineError):
    """The prompt contains a token id that the model has no embedding for: a tokenizer may have more tokens."""


class DeadlineError(EngineError):
    """The request's deadline passed before its answer was complete."""


class EngineFaultError(EngineError):
    """The step that contained this request failed, or no token could be sampled for it."""


class EngineClosedError(EngineError):
    """The engine is shutting down."""


class CancelledError(EngineError):
    """The last output of a cancelled request: nothing more is generated for it."""


@dataclass(eq=False, slots=True)
class Request:
    """One sequence to continue, and its state while the engine works on it.

    prompt: at least one token id. deadline: as time.monotonic(). on_phase: called in the engine's thread when `prefill`
    and `decode` begin, once each; it must be quick. The fields below it belong to the engine; prefix_hit_tokens: prompt
    tokens found in the prefix cache.
    """

    prompt: Sequence[int]
    max_tokens: int
    stop_ids: frozenset[int] = frozenset()
    sampling: SamplingParams = field(default_factory=SamplingParams)
    grammar: Grammar | None = None
    deadline: float | None = None
    on_phase: Callable[[Phase], None] | None = None

    tokens: list[int] = field(init=False)  # prompt and answer so far
    sampling_state: SamplingState = field(init=False)
    pages: list[int] = field(init=False, default_factory=list)
    computed_tokens: int = field(init=False, default=0)  # how many of `tokens` have keys and values in the pool
    target: int = field(init=False, default=0)  # number of tokens that are prefilled; later ones are decoded
    published: int = field(init=False, default=0)  # pages at the beginning that other requests may find
    node: int = field(init=False, default=0)  # the last published page's in the tree of prefixes, 0: none
    prefix_hit_tokens: int = field(init=False, default=0)
    prefilled: int = field(init=False, default=0)  # the most tokens that any of its prefills has computed
    cancelled: bool = field(init=False, default=False)
    phase: Phase = field(init=False, default="queue")

    def __post_init__(self) -> None:
        self.tokens = list(self.prompt)
        self.sampling_state = SamplingState(self.sampling, self.prompt, self.grammar)

    def enter(self, phase: Phase) -> None:
        """Begin a phase, and report it. A preempted request stays in the phase that it had reached."""
        self.phase = phase
        if self.on_phase is not None:
            self.on_phase(phase)

    @property
    def generated(self) -> int:
        """Tokens generated so far, a final stop token included."""
        return len(self.tokens) - len(self.prompt)

    @property
    def prefilling(self) -> bool:
        return self.computed_tokens < self.target


@dataclass(slots=True)
class StepOutput:
    """The output of one step for one request. `tokens` never contains the stop token; `error` and `finish` end it.

    logprobs: one for each of `tokens` if the request has logprobs, else empty.
    """

    request: Request
    tokens: list[int]
    finish: Finish | None = None
    error: EngineError | None = None
    logprobs: list[Logprob] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Stats:
    """A snapshot. pages_kept: pages without a holder that contain a prefix. The last seven count since the start."""

    running: int
    waiting: int
    pages_used: int
    pages_kept: int
    pages_total: int
    prompt_tokens: int
    reused_tokens: int
    generated_tokens: int
    finished: int
    preempted: int
    faults: int
    steps: int


@dataclass(frozen=True, slots=True)
class Memory:
    """Memory in bytes: of the weights, of one token's keys and values, of the pool for `kv_tokens` tokens. step_tokens:
    tokens of the longest step; vocab: logits of one token."""

    weights: int
    token: int
    kv_tokens: int
    pool: int
    step_tokens: int
    vocab: int
