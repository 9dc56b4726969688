"""Continuous batching over a causal LM. Token ids in, token ids out.

Requests join and leave the batch between steps. Their keys and values are in pages of one pool, and a prefix that was
computed before is not computed again. One thread runs the loop; `submit` and `cancel` may be called from any other.
Knows requests and schedules them. Knows nothing of weights, text, HTTP or Ray.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence

import torch

from .kv_pages import PAGE_TOKENS, KVPages
from .request import (
    CancelledError,
    DeadlineError,
    EngineClosedError,
    EngineError,
    EngineFaultError,
    Memory,
    QueueFullError,
    Request,
    RequestTooLongError,
    Stats,
    StepOutput,
    UnknownTokenError,
)
from .runner import Runner, Span
from .sampler import SampleError, sample
from .scoring import ScoringQueue, ScoringRequest
from .watchdog import Watchdog

log = logging.getLogger(__name__)

# Most tokens that one step may prefill. While other requests decode, it is as many as take about PREFILL_SECONDS_BESIDE
# at the recent pace.
PREFILL_TOKENS = 512
PREFILL_SECONDS_BESIDE = 0.08
# For runners that are not batch invariant, prompts are computed in pieces that begin at multiples of this many tokens:
# a piece gives the same result whether the pieces before it come from the prefix cache or not.
PIECE_TOKENS = 256
# Time that one step spends on masks of grammars, for any schemas. A request whose mask is missing gets no token in this
# step, so that the others need not wait.
MASK_SECONDS = 0.05
# After this many faults in a row the engine counts as dead: if every step fails, the requests are not the cause.
MOST_FAULTS = 3


class Scheduler:
    """The loop, its queue and its pages.

    deliver: called in the engine's thread with all outputs of a step at once, and with none when the last request has
    ended. It must not block.
    """

    def __init__(
        self,
        runner: Runner,
        deliver: Callable[[list[StepOutput]], None],
        *,
        kv_tokens: int = 16384,
        max_running: int = 64,
        max_queued: int = 256,
        context: int | None = None,
        step_timeout: float = 300,
    ) -> None:
        """step_timeout: seconds after which a step counts as hanging: its requests fail, and the engine is dead."""
        self._runner = runner
        self._deliver = deliver
        self._max_running, self._max_queued = max_running, max_queued
        total = math.ceil(kv_tokens / PAGE_TOKENS)
        self.context = min(total * PAGE_TOKENS, runner.context, context or runner.context)
        self.vocab = runner.vocab
        self._pages = KVPages(total)
        runner.allocate(total + 1)
        self._running: list[Request] = []  # oldest first
        self._waiting: deque[Request] = deque()
        self._changed = threading.Condition()
        self._scoring = ScoringQueue(runner, self._pages, self._zero_pages, self._changed)
        self._closing = False
        self._faults_in_a_row = 0
        self._watchdog = Watchdog("engine", step_timeout, self._changed, self._fail_all)
        self._finished_at: deque[float] = deque(maxlen=32)
        self._step_seconds = 0.1
        self._prefill_pace = 1000.0  # tokens a second
        self._counts = dict.fromkeys(
            ("prompt_tokens", "reused_tokens", "generated_tokens", "finished", "preempted", "faults", "steps"), 0
        )
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        self._thread.start()
        self._watchdog.start()

    def close(self, timeout: float = 10) -> None:
        """Stop after the current step; waiting and running requests get EngineClosedError."""
        self._watchdog.stop()
        with self._changed:
            self._closing = True
            self._changed.notify()
        if self._thread.is_alive():
            self._thread.join(timeout)

    def memory(self) -> Memory:
        """Memory of the model."""
        runner, tokens = self._runner, self._pages.total * PAGE_TOKENS
        return Memory(runner.bytes, runner.token_bytes, tokens, runner.pool_bytes, PREFILL_TOKENS, runner.vocab)

    @property
    def capacity(self) -> int:
        """Largest number of requests of one `submit`."""
        return self._max_running + self._max_queued

    @property
    def alive(self) -> bool:
        stopped = self._closing or self._watchdog.hangs or not self._thread.is_alive()
        return not stopped and self._faults_in_a_row < MOST_FAULTS

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
            if self._watchdog.hangs:
                raise EngineClosedError("its computation hangs; the model is restarted automatically")
            answers = [request for request in requests if not isinstance(request, ScoringRequest)]
            scored = [request for request in requests if isinstance(request, ScoringRequest)]
            room = self.capacity - len(self._running) - len(self._waiting)
            if len(answers) > room or len(scored) > self._scoring.room:
                raise QueueFullError(self._retry_after())
            self._waiting.extend(answers)
            for request in scored:
                self._scoring.add(request)
            self._changed.notify()

    def cancel(self, *requests: Request) -> None:
        """Cancel requests before the next step. Only the last output of each is still delivered, whatever it is. Ended
        requests are ignored."""
        with self._changed:
            for request in requests:
                request.cancelled = True
            self._changed.notify()

    def stats(self) -> Stats:
        with self._changed:
            total, kept = self._pages.total, self._pages.kept
            used = total - self._pages.available
            return Stats(len(self._running), len(self._waiting), used, kept, total, **self._counts)

    @property
    def _busy(self) -> bool:
        return bool(self._running or self._waiting or self._scoring)

    def run_alone(self, request: Request, outputs: list[StepOutput]) -> None:
        """Run one request to its end in the caller's thread, before `start`. Faults are raised, not delivered."""
        self.submit(request)
        while self._waiting or self._running:
            self._admit()
            self._step(outputs)

    def logits(self, ids: Sequence[int]) -> torch.Tensor:
        """The logits after each of `ids`, (ids, vocab), float32: for perplexity. Raises RuntimeError while requests
        run, because a runner is used by one thread."""
        if self._busy:
            raise RuntimeError("the engine has requests")
        pages = self._pages.take(-(-len(ids) // PAGE_TOKENS))
        with torch.inference_mode():
            self._zero_pages()
            found = self._runner.all_logits(ids, pages)
        self._pages.release(pages)
        return found

    # The loop

    def _run(self) -> None:
        with torch.inference_mode():
            while True:
                outputs: list[StepOutput] = []
                with self._changed:
                    self._drop(outputs)
                    if not (self._busy or self._closing or outputs):
                        self._emit([])  # gauges show that nothing runs
                    while not (self._busy or self._closing or outputs):
                        self._changed.wait()
                        self._drop(outputs)
                    if self._closing:
                        break
                    self._admit()
                started = time.monotonic()
                self._watchdog.begin()
                try:
                    if self._running:
                        self._step(outputs)
                        self._faults_in_a_row = 0
                except Exception as error:
                    log.exception("a step failed; its requests end with an error, the loop continues")
                    self._counts["faults"] += 1
                    self._faults_in_a_row += 1
                    outputs += self._fail_running(EngineFaultError(f"the model failed: {type(error).__name__}"))
                outputs += self._scoring.step(beside=bool(self._running))
                self._step_seconds += 0.1 * (time.monotonic() - started - self._step_seconds)
                self._watchdog.end()
                if self._watchdog.hangs:
                    return  # their callers have the error
                self._emit(outputs)
        closed = EngineClosedError("the model is shutting down")
        with self._changed:
            waiting, self._waiting = list(self._waiting), deque()
            scored = self._scoring.close(closed)
        self._emit(self._fail_running(closed) + [StepOutput(request, [], error=closed) for request in waiting] + scored)

    def _fail_all(self, why: str) -> None:
        """A step hangs: its requests and all that wait fail. Called with the lock held."""
        error = EngineFaultError(why)
        failed = [StepOutput(request, [], error=error) for request in (*self._running, *self._waiting)]
        self._emit(failed + self._scoring.close(error))

    def _emit(self, outputs: list[StepOutput]) -> None:
        try:
            self._deliver(outputs)
        except Exception:
            # The receiver's event loop may be closed; this loop must not end with it.
            log.exception("outputs could not be delivered")

    def _step(self, outputs: list[StepOutput]) -> None:
        """Advance: a bounded piece of prefill for the oldest requests that need it, one token for all others.

        `outputs` is extended as the step proceeds: the outputs of requests that ended before a fault must be delivered.
        """
        self._counts["steps"] += 1
        self._prepare_masks()
        self._zero_pages()
        decoding = [request for request in self._running if not request.prefilling]
        # 1. Prefill.
        beside = min(PREFILL_TOKENS, int(self._prefill_pace * PREFILL_SECONDS_BESIDE))
        rows, spans = self._pieces(beside if decoding else PREFILL_TOKENS)
        if rows:
            for row in rows:
                if row.phase == "queue":
                    row.enter("prefill")
            ids = [token for row, span in zip(rows, spans, strict=True) for token in row.tokens[span.start : span.stop]]
            started = time.monotonic()
            logits = self._runner.prefill(ids, spans)
            pace = len(ids) / max(time.monotonic() - started, 1e-6)
            self._prefill_pace += 0.5 * (pace - self._prefill_pace)
            for row, span in zip(rows, spans, strict=True):
                row.computed_tokens = span.stop
                row.prefilled = max(row.prefilled, span.stop)
                if self._runner.batch_invariant or len(rows) == 1:
                    self._pages.publish_filled(row)
            whole = [i for i, row in enumerate(rows) if not row.prefilling]
            outputs += self._extend([rows[i] for i in whole], logits[whole])
        # 2. Decode. Taking a page may send a younger request back to the queue.
        decoding = [request for request in decoding if request.sampling_state.prepared]
        decoding = [request for request in decoding if self._hold(request, request.computed_tokens + 1)]
        decoding = [request for request in decoding if request.pages]
        if decoding:
            self._zero_pages()
            logits = self._runner.decode(
                [row.tokens[-1] for row in decoding],
                [row.computed_tokens for row in decoding],
                [row.pages for row in decoding],
            )
            for row in decoding:
                row.computed_tokens += 1
                if self._runner.batch_invariant:
                    self._pages.publish_filled(row)  # the prompt of the conversation's next turn contains this answer
            outputs += self._extend(decoding, logits)

    def _prepare_masks(self) -> None:
        """Compute masks of next tokens for about MASK_SECONDS, at least one, the longest waiting first."""
        missing = [request.sampling_state for request in self._running if not request.sampling_state.prepared]
        until = time.monotonic() + MASK_SECONDS if missing else 0.0
        for state in sorted(missing, key=lambda state: state.prepared_at):
            state.prepare(self.vocab, self._counts["steps"])
            if time.monotonic() >= until:
                break

    def _pieces(self, budget: int) -> tuple[list[Request], list[Span]]:
        """The pieces of prompts that this step computes. A piece that is not a prompt's last ends with a page."""
        grain = PAGE_TOKENS if self._runner.batch_invariant else PIECE_TOKENS
        rows: list[Request] = []
        spans: list[Span] = []
        for request in self._running:
            if not request.prefilling:
                continue
            stop = request.target
            if not self._runner.batch_invariant:
                stop = min(stop, (request.computed_tokens // grain + 1) * grain)
            if stop - request.computed_tokens > budget:
                stop = (request.computed_tokens + budget) // grain * grain
                # One piece is always computed, because a smaller budget would stop the loop.
                if stop <= request.computed_tokens and not rows:
                    stop = min(request.target, (request.computed_tokens // grain + 1) * grain)
            if stop <= request.computed_tokens:
                break
            if stop == request.target and not request.sampling_state.prepared:
                continue  # its end would need a token
            rows.append(request)
            spans.append(Span(request.computed_tokens, stop, request.pages[: -(-stop // PAGE_TOKENS)]))
            budget -= stop - request.computed_tokens
        return rows, spans

    def _extend(self, rows: list[Request], logits: torch.Tensor) -> list[StepOutput]:
        """Sample the next token of each row; end the requests that are complete."""
        if not rows:
            return []
        outputs, ended = [], []
        for request, sampled in zip(rows, sample(logits, [row.sampling_state for row in rows]), strict=True):
            if isinstance(sampled, SampleError):
                self._pages.distrust([request])
                outputs.append(StepOutput(request, [], error=EngineFaultError(str(sampled))))
                ended.append(request)
                continue
            token, logprobs = sampled.token, [sampled.logprob] if sampled.logprob else []
            request.tokens.append(token)
            if request.phase == "prefill":
                request.enter("decode")
            self._counts["generated_tokens"] += 1
            if token in request.stop_ids:
                outputs.append(StepOutput(request, [], "stop"))
            elif request.generated >= request.max_tokens:
                outputs.append(StepOutput(request, [token], "length", logprobs=logprobs))
            else:
                outputs.append(StepOutput(request, [token], logprobs=logprobs))
                continue
            ended.append(request)
            self._counts["finished"] += 1
            self._counts["prompt_tokens"] += len(request.prompt)
            self._counts["reused_tokens"] += request.prefix_hit_tokens
            self._finished_at.append(time.monotonic())
        if ended:
            with self._changed:
                for request in ended:
                    self._running.remove(request)
                    self._pages.evict(request)
        return [output for output in outputs if output.finish or output.error or not output.request.cancelled]

    # Slots. `_admit` and `_drop` are called with the lock held.

    def _admit(self) -> None:
        grain = PAGE_TOKENS if self._runner.batch_invariant else PIECE_TOKENS
        while self._waiting and len(self._running) < self._max_running:
            if self._pages.admit(self._waiting[0], grain):
                self._running.append(self._waiting.popleft())
            elif not self._scoring.release():
                break

    def _drop(self, outputs: list[StepOutput]) -> None:
        """End the requests that were cancelled or passed their deadline."""
        now = time.monotonic()
        late = DeadlineError("the deadline passed before the answer was complete")
        for queue in (self._running, self._waiting):
            for request in [r for r in queue if r.cancelled or (r.deadline is not None and r.deadline <= now)]:
                queue.remove(request)
                self._pages.evict(request)
                outputs.append(
                    StepOutput(request, [], error=CancelledError("it was cancelled") if request.cancelled else late)
                )
        for scored in self._scoring.ended(now):
            self._scoring.drop(scored)
            outputs.append(
                StepOutput(scored, [], error=CancelledError("it was cancelled") if scored.cancelled else late)
            )

    def _hold(self, request: Request, tokens: int) -> bool:
        """Give the request pages for `tokens` tokens. If none is available, the youngest request is preempted. Returns
        False if that is `request` itself."""
        if not request.pages:
            return False
        while len(request.pages) * PAGE_TOKENS < tokens:
            if not self._pages.available:
                with self._changed:
                    if self._scoring.release():
                        continue
                    youngest = self._running.pop()
                    self._pages.evict(youngest)
                    self._waiting.appendleft(youngest)
                    self._counts["preempted"] += 1
                if youngest is request:
                    return False
                continue
            request.pages += self._pages.take(1)
        return True

    def _zero_pages(self) -> None:
        """Zero new pages. Called before the runner computes: at the place where pages are taken, a fault of the device
        would end the loop."""
        if self._pages.dirty:
            self._runner.zero_pages(self._pages.dirty)
            self._pages.dirty = []

    def _fail_running(self, error: EngineError) -> list[StepOutput]:
        with self._changed:
            failed, self._running = self._running, []
            self._pages.distrust(failed)
            for request in failed:
                self._pages.evict(request)
        return [StepOutput(request, [], error=error) for request in failed]

    def _retry_after(self) -> float:
        """Estimated seconds until the next request ends: by the recent rate, at most the time that the shortest
        remaining request needs."""
        left = min((request.max_tokens - request.generated for request in self._running), default=1)
        longest = left * self._step_seconds
        if len(self._finished_at) < 2:
            return longest
        rate = (len(self._finished_at) - 1) / max(time.monotonic() - self._finished_at[0], 1e-3)
        return min(longest, 1 / rate)
