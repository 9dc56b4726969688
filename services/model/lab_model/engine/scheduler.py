"""Continuous batching over a causal LM. Token ids in, token ids out.

Requests join and leave the batch between steps; their keys and values lie in pages of one pool, and the beginning of a
prompt that was computed before is not computed again. Knows nothing of HTTP, Ray, text or tokenization. One thread runs
the loop; `submit` and `cancel` may be called from any other.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

import torch

from .kv_pages import PAGE_TOKENS, ROOT, Pages
from .sampler import Draw, Grammar, Logprob, SampleError, Sampling, sample

log = logging.getLogger(__name__)

# Tokens that one step may prefill; while answers run, as many as take about this long at the pace of the last ones.
PREFILL_TOKENS = 512
PREFILL_SECONDS_BESIDE = 0.08
# Where results depend on how many tokens are computed together, prompts are computed in pieces that begin at multiples
# of this many, so that a piece comes out alike with the pieces before it taken from the cache or not.
PIECE_TOKENS = 256
# After as many faults in a row the engine calls itself dead: a step that always fails is not one request's fault.
MOST_FAULTS = 3

Finish = Literal["stop", "length"]


class EngineError(Exception):
    """What the engine answers instead of tokens."""


class QueueFullError(EngineError):
    """All places and the queue are taken. `retry_after`: estimated seconds until one is free."""

    def __init__(self, retry_after: float) -> None:
        super().__init__("the queue of this model is full")
        self.retry_after = retry_after


class RequestTooLongError(EngineError):
    """Prompt and answer together do not fit the context."""


class UnknownTokenError(EngineError):
    """The prompt holds a token id that the model has no embedding for: its tokenizer knows more than it does."""


class DeadlineError(EngineError):
    """The request's deadline passed before its answer was whole."""


class EngineFaultError(EngineError):
    """The step that held this request failed, or no token could be chosen for it."""


class EngineClosedError(EngineError):
    """The engine is shutting down."""


class CancelledError(EngineError):
    """The last event of a request that was cancelled: nothing is generated for it any more."""


@dataclass(frozen=True, slots=True)
class Span:
    """Tokens [start, stop) of one request in a prefill, at least one. pages: those that hold [0, stop)."""

    start: int
    stop: int
    pages: Sequence[int]


class Runner(Protocol):
    """A model with its pool of pages. Logits are (rows, vocab), float32.

    exact: what is computed for a token does not depend on how many others are computed with it, nor on whether it was
    prefilled or decoded.
    """

    exact: bool
    context: int
    vocab: int  # token ids below it have an embedding

    def allocate(self, pages: int) -> None:
        """Make the pool; page 0 stands where a row has fewer pages than others, and is nobody's."""
        ...

    def prefill(self, ids: Sequence[int], spans: Sequence[Span]) -> torch.Tensor:
        """Compute the spans' tokens, `ids` one after the other; logits of each span's last token."""
        ...

    def every(self, ids: Sequence[int], pages: Sequence[int]) -> torch.Tensor:
        """A prefill of one text that gives the logits of each of its tokens."""
        ...

    def decode(self, ids: Sequence[int], positions: Sequence[int], pages: Sequence[Sequence[int]]) -> torch.Tensor:
        """One more token for each row. positions: their places in the rows' texts."""
        ...

    def wipe(self, pages: Sequence[int]) -> None:
        """Pages change hands: zero what attention reads beyond a row's own tokens. A masked NaN still spoils it,
        because 0 * NaN is NaN, and nobody knows what a request that left half way has left behind."""
        ...


@dataclass(eq=False, slots=True)
class Request:
    """One sequence to continue, and its state while the engine works on it.

    `prompt` holds at least one token id. deadline: time.monotonic() after which nobody wants the answer any more.
    Fields below it belong to the engine; `reused` says how many prompt tokens were taken from the prefix cache.
    """

    prompt: Sequence[int]
    max_tokens: int
    stop_ids: frozenset[int] = frozenset()
    sampling: Sampling = field(default_factory=Sampling)
    grammar: Grammar | None = None
    deadline: float | None = None

    tokens: list[int] = field(init=False)  # prompt and answer so far
    draw: Draw = field(init=False)
    pages: list[int] = field(init=False, default_factory=list)
    cached: int = field(init=False, default=0)  # how many of `tokens` have keys and values in the pool
    target: int = field(init=False, default=0)  # how many of them are prefilled; what comes after is decoded
    published: int = field(init=False, default=0)  # pages at the beginning that others may find
    node: int = field(init=False, default=ROOT)  # the last published page's
    reused: int = field(init=False, default=0)
    prefilled: int = field(init=False, default=0)  # the furthest that any of its prefills came
    cancelled: bool = field(init=False, default=False)

    def __post_init__(self) -> None:
        self.tokens = list(self.prompt)
        self.draw = Draw(self.sampling, self.prompt, self.grammar)

    @property
    def generated(self) -> int:
        """Tokens generated so far, a final stop token included."""
        return len(self.tokens) - len(self.prompt)

    @property
    def prefilling(self) -> bool:
        return self.cached < self.target


@dataclass(slots=True)
class Event:
    """What one step brought one request. `tokens` never holds the stop token; `error` and `finish` end the request.

    logprobs: one for each of `tokens` where the request asked for them, else empty.
    """

    request: Request
    tokens: list[int]
    finish: Finish | None = None
    error: EngineError | None = None
    logprobs: list[Logprob] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Stats:
    """A snapshot. pages_kept: held by nobody, but a prompt's beginning. The last seven count since the start."""

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


class Engine:
    """The loop, its queue and its pages.

    `deliver` is called from the engine's thread with all events of a step at once, and with none when the last request
    has left; it must not block.
    """

    def __init__(
        self,
        runner: Runner,
        deliver: Callable[[list[Event]], None],
        *,
        kv_tokens: int = 16384,
        max_running: int = 64,
        max_queued: int = 256,
        context: int | None = None,
    ) -> None:
        self._runner = runner
        self._deliver = deliver
        self._max_running, self._max_queued = max_running, max_queued
        total = math.ceil(kv_tokens / PAGE_TOKENS)
        self.context = min(total * PAGE_TOKENS, runner.context, context or runner.context)
        self.vocab = runner.vocab
        self._pages = Pages(total)
        runner.allocate(total + 1)
        self._unwiped: list[int] = []  # pages that were taken and hold what another left
        self._running: list[Request] = []  # oldest first
        self._waiting: deque[Request] = deque()
        self._changed = threading.Condition()
        self._closing = False
        self._faults_in_a_row = 0
        self._finished_at: deque[float] = deque(maxlen=32)
        self._step_seconds = 0.1
        self._prefill_pace = 1000.0  # tokens a second
        self._counts = dict.fromkeys(
            ("prompt_tokens", "reused_tokens", "generated_tokens", "finished", "preempted", "faults", "steps"), 0
        )
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self, timeout: float = 10) -> None:
        """Stop after the current step; whoever still waits or runs gets EngineClosedError."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        if self._thread.is_alive():
            self._thread.join(timeout)

    @property
    def capacity(self) -> int:
        """The most requests that one `submit` can ever bring."""
        return self._max_running + self._max_queued

    @property
    def alive(self) -> bool:
        return self._thread.is_alive() and not self._closing and self._faults_in_a_row < MOST_FAULTS

    def submit(self, *requests: Request) -> None:
        """Queue all of them or none. Raises RequestTooLongError, UnknownTokenError, QueueFullError or
        EngineClosedError."""
        for request in requests:
            if not request.prompt or request.max_tokens < 1:
                raise ValueError("a request needs at least one prompt token and max_tokens of at least 1")
            if len(request.prompt) + request.max_tokens > self.context:
                raise RequestTooLongError(
                    f"{len(request.prompt)} prompt tokens and max_tokens {request.max_tokens} exceed {self.context}"
                )
            if not 0 <= min(request.prompt) <= max(request.prompt) < self.vocab:
                ids = f"{min(request.prompt)} to {max(request.prompt)}"
                raise UnknownTokenError(f"token ids from {ids}, where the model has 0 to {self.vocab - 1}")
        with self._changed:
            if self._closing:
                raise EngineClosedError("the model is shutting down")
            room = self.capacity - len(self._running) - len(self._waiting)
            if len(requests) > room:
                raise QueueFullError(self._retry_after())
            self._waiting.extend(requests)
            self._changed.notify()

    def cancel(self, *requests: Request) -> None:
        """Free their places before the next step. Of each only its last event is still delivered, whichever that is;
        ended ones are ignored."""
        with self._changed:
            for request in requests:
                request.cancelled = True
            self._changed.notify()

    def stats(self) -> Stats:
        with self._changed:
            total, kept = self._pages.total, self._pages.kept
            used = total - self._pages.available
            return Stats(len(self._running), len(self._waiting), used, kept, total, **self._counts)

    def run_alone(self, request: Request, events: list[Event]) -> None:
        """Run one request to its end in the caller's thread, before `start`: faults are raised, not delivered."""
        self.submit(request)
        while self._waiting or self._running:
            self._admit()
            self._step(events)

    def logits(self, ids: Sequence[int]) -> torch.Tensor:
        """Those after each of `ids`, (ids, vocab), float32. What perplexity needs. Raises RuntimeError while requests
        run: a runner is for one thread."""
        if self._running or self._waiting:
            raise RuntimeError("the engine has requests")
        pages = self._take(-(-len(ids) // PAGE_TOKENS))
        with torch.inference_mode():
            self._wipe()
            found = self._runner.every(ids, pages)
        self._pages.release(pages)
        return found

    # The loop

    def _run(self) -> None:
        with torch.inference_mode():
            while True:
                events: list[Event] = []
                with self._changed:
                    self._drop(events)
                    if not (self._running or self._waiting or self._closing or events):
                        self._tell([])  # who keeps gauges learns that nothing runs
                    while not (self._running or self._waiting or self._closing or events):
                        self._changed.wait()
                        self._drop(events)
                    if self._closing:
                        break
                    self._admit()
                started = time.monotonic()
                try:
                    self._step(events)
                    self._faults_in_a_row = 0
                except Exception as error:
                    log.exception("a step failed; its requests end with an error, the loop goes on")
                    self._counts["faults"] += 1
                    self._faults_in_a_row += 1
                    events += self._fail_running(EngineFaultError(f"the model failed: {type(error).__name__}"))
                self._step_seconds += 0.1 * (time.monotonic() - started - self._step_seconds)
                self._tell(events)
        closed = EngineClosedError("the model is shutting down")
        with self._changed:
            waiting, self._waiting = list(self._waiting), deque()
        self._tell(self._fail_running(closed) + [Event(request, [], error=closed) for request in waiting])

    def _tell(self, events: list[Event]) -> None:
        try:
            self._deliver(events)
        except Exception:
            # Who listens may be gone (an event loop that closes); the loop here must not end with it.
            log.exception("events could not be delivered")

    def _step(self, events: list[Event]) -> None:
        """Advance: a bounded piece of prefill for the oldest that need it, one token for all who have theirs.

        What happened lies in `events` also when the step fails half way: who ended before the fault must hear of it.
        """
        self._counts["steps"] += 1
        self._wipe()
        decoding = [request for request in self._running if not request.prefilling]
        # 1. Prefill.
        beside = min(PREFILL_TOKENS, int(self._prefill_pace * PREFILL_SECONDS_BESIDE))
        rows, spans = self._pieces(beside if decoding else PREFILL_TOKENS)
        if rows:
            ids = [token for row, span in zip(rows, spans, strict=True) for token in row.tokens[span.start : span.stop]]
            started = time.monotonic()
            logits = self._runner.prefill(ids, spans)
            pace = len(ids) / max(time.monotonic() - started, 1e-6)
            self._prefill_pace += 0.5 * (pace - self._prefill_pace)
            for row, span in zip(rows, spans, strict=True):
                row.cached = span.stop
                row.prefilled = max(row.prefilled, span.stop)
                if self._runner.exact or len(rows) == 1:
                    self._publish(row)
            whole = [i for i, row in enumerate(rows) if not row.prefilling]
            events += self._extend([rows[i] for i in whole], logits[whole])
        # 2. Decode. Taking a page may send a younger request back to the queue.
        decoding = [request for request in decoding if self._hold(request, request.cached + 1)]
        decoding = [request for request in decoding if request.pages]
        if decoding:
            self._wipe()
            logits = self._runner.decode(
                [row.tokens[-1] for row in decoding], [row.cached for row in decoding], [row.pages for row in decoding]
            )
            for row in decoding:
                row.cached += 1
                if self._runner.exact:
                    self._publish(row)  # the next turn of a conversation begins with this answer
            events += self._extend(decoding, logits)

    def _pieces(self, budget: int) -> tuple[list[Request], list[Span]]:
        """What of which prompt this step computes. A piece that is not a prompt's last ends with a page."""
        grain = PAGE_TOKENS if self._runner.exact else PIECE_TOKENS
        rows: list[Request] = []
        spans: list[Span] = []
        for request in self._running:
            if not request.prefilling:
                continue
            stop = request.target
            if not self._runner.exact:
                stop = min(stop, (request.cached // grain + 1) * grain)
            if stop - request.cached > budget:
                stop = (request.cached + budget) // grain * grain
                # One piece is always computed: a budget below it would stop the loop.
                if stop <= request.cached and not rows:
                    stop = min(request.target, (request.cached // grain + 1) * grain)
            if stop <= request.cached:
                break
            rows.append(request)
            spans.append(Span(request.cached, stop, request.pages[: -(-stop // PAGE_TOKENS)]))
            budget -= stop - request.cached
        return rows, spans

    def _publish(self, row: Request) -> None:
        """Let others find the pages that the request has filled so far."""
        for index in range(row.published, row.cached // PAGE_TOKENS):
            content = row.tokens[index * PAGE_TOKENS : (index + 1) * PAGE_TOKENS]
            row.node = self._pages.publish(row.pages[index], row.node, content)
            row.published = index + 1

    def _extend(self, rows: list[Request], logits: torch.Tensor) -> list[Event]:
        """Give each row its next token; end those that are done."""
        if not rows:
            return []
        events, ended = [], []
        for request, choice in zip(rows, sample(logits, [row.draw for row in rows]), strict=True):
            if isinstance(choice, SampleError):
                self._distrust([request])
                events.append(Event(request, [], error=EngineFaultError(str(choice))))
                ended.append(request)
                continue
            token, logprobs = choice.token, [choice.logprob] if choice.logprob else []
            request.tokens.append(token)
            self._counts["generated_tokens"] += 1
            if token in request.stop_ids:
                events.append(Event(request, [], "stop"))
            elif request.generated >= request.max_tokens:
                events.append(Event(request, [token], "length", logprobs=logprobs))
            else:
                events.append(Event(request, [token], logprobs=logprobs))
                continue
            ended.append(request)
            self._counts["finished"] += 1
            self._counts["prompt_tokens"] += len(request.prompt)
            self._counts["reused_tokens"] += request.reused
            self._finished_at.append(time.monotonic())
        if ended:
            with self._changed:
                for request in ended:
                    self._running.remove(request)
                    self._release(request)
        return [event for event in events if event.finish or event.error or not event.request.cancelled]

    # Places and pages. `_admit` and `_drop` are called with the lock held.

    def _admit(self) -> None:
        while self._waiting and len(self._running) < self._max_running:
            request = self._waiting[0]
            # At least one token is computed: its logits are what the answer begins with.
            grain = PAGE_TOKENS if self._runner.exact else PIECE_TOKENS
            most = (len(request.tokens) - 1) // grain * grain // PAGE_TOKENS
            found, node = self._pages.match(request.tokens, most)
            if len(found) * PAGE_TOKENS % grain:
                found = found[: len(found) * PAGE_TOKENS // grain * grain // PAGE_TOKENS]
                _, node = self._pages.match(request.tokens, len(found))
            self._pages.share(found)
            needed = math.ceil((len(request.tokens) + 1) / PAGE_TOKENS) - len(found)
            if needed > self._pages.available:
                self._pages.release(found)
                break
            self._waiting.popleft()
            request.pages = found + self._take(needed)
            request.target, request.cached = len(request.tokens), len(found) * PAGE_TOKENS
            request.published, request.node = len(found), node
            if not request.generated:
                request.reused = request.cached
            self._running.append(request)

    def _drop(self, events: list[Event]) -> None:
        """Let go of who was cancelled or came too late."""
        now = time.monotonic()
        late = DeadlineError("the deadline passed before the answer was whole")
        for queue in (self._running, self._waiting):
            for request in [r for r in queue if r.cancelled or (r.deadline is not None and r.deadline <= now)]:
                queue.remove(request)
                self._release(request)
                events.append(
                    Event(request, [], error=CancelledError("it was cancelled") if request.cancelled else late)
                )

    def _hold(self, request: Request, tokens: int) -> bool:
        """Have pages for `tokens` tokens, taken from the youngest if need be; False when `request` had to go itself."""
        if not request.pages:
            return False
        while len(request.pages) * PAGE_TOKENS < tokens:
            if not self._pages.available:
                with self._changed:
                    youngest = self._running.pop()
                    self._release(youngest)
                    self._waiting.appendleft(youngest)
                    self._counts["preempted"] += 1
                if youngest is request:
                    return False
                continue
            request.pages += self._take(1)
        return True

    def _take(self, count: int) -> list[int]:
        pages = [self._pages.take() for _ in range(count)]
        self._unwiped += pages
        return pages

    def _wipe(self) -> None:
        """Before the runner computes: where pages are taken, a fault of the device would end the loop."""
        if self._unwiped:
            self._runner.wipe(self._unwiped)
            self._unwiped = []

    def _release(self, request: Request) -> None:
        self._pages.release(request.pages)
        request.pages, request.cached, request.target = [], 0, 0

    def _distrust(self, requests: Sequence[Request]) -> None:
        """What these computed may hold NaN: nobody shall share it."""
        for request in requests:
            self._pages.forget(request.pages)

    def _fail_running(self, error: EngineError) -> list[Event]:
        with self._changed:
            failed, self._running = self._running, []
            self._distrust(failed)
            for request in failed:
                self._release(request)
        return [Event(request, [], error=error) for request in failed]

    def _retry_after(self) -> float:
        """Seconds until the next request ends and the queue moves up: by the recent rate, at most by what is left."""
        left = min((request.max_tokens - request.generated for request in self._running), default=1)
        longest = left * self._step_seconds
        if len(self._finished_at) < 2:
            return longest
        rate = (len(self._finished_at) - 1) / max(time.monotonic() - self._finished_at[0], 1e-3)
        return min(longest, 1 / rate)
