"""The client of one model's engine: connects the engine's thread with the event loop, and maps its errors to API
errors.

Knows the scheduler and asyncio. Knows nothing of request bodies or of single endpoints.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol, TypeVar

from prometheus_client import Counter, Gauge

from ..engine.request import (
    DeadlineError,
    EngineError,
    EngineFaultError,
    QueueFullError,
    Request,
    Stats,
    StepOutput,
    UnknownTokenError,
)
from ..engine.scheduler import Scheduler
from ..errors import BadRequestError, BusyError, ServerError, UnavailableError, deadline_exceeded
from ..text.choice import Piece
from ..text.grammar import Grammars, TokenGrammar
from ..text.tokenizer import ModelTokenizer
from .http.record import ENGINE, Record
from .http.usage import TokenUsage

T = TypeVar("T")

# The limits on schemas end a compilation after about a second; this also bounds the wait for others.
COMPILE_SECONDS = 10
MOST_COMPILING = 16
# Largest age of the engine's metrics.
MEASURE_SECONDS = 0.5
# Handling a token takes time from the cores on which the engine computes. Beside the engine it takes ten times as long,
# because after a step the CPU caches contain weights. So all streams together write about this often per second: a
# token waits for later ones, longer with more streams, but at most LONGEST_WAIT_SECONDS or one step.
WRITES_A_SECOND = 640
LONGEST_WAIT_SECONDS = 0.05

# Summed over the replicas of a model, each of which is a process.
LABELS = ["model_name", "engine"]
RUNNING = Gauge("vllm:num_requests_running", "Requests in the batch.", LABELS, multiprocess_mode="livesum")
WAITING = Gauge("vllm:num_requests_waiting", "Requests in the queue.", LABELS, multiprocess_mode="livesum")
KV_USED = Gauge("vllm:kv_cache_usage_perc", "Share of KV pages in use, 0 to 1.", LABELS, multiprocess_mode="livemax")
PREEMPTED = Counter("vllm:num_preemptions", "Requests sent back to the queue for their pages.", LABELS)
QUERIES = Counter("vllm:prefix_cache_queries", "Prompt tokens looked up in the prefix cache.", LABELS)
HITS = Counter("vllm:prefix_cache_hits", "Prompt tokens found in the prefix cache.", LABELS)
SUCCESS = Counter("vllm:request_success", "Choices generated to their end.", [*LABELS, "finished_reason"])
FAULTS = Counter("lab_model_engine_faults", "Steps of the engine that failed.", ["model_name"])


class EngineWork:
    """The engine's work for one API request. `ended` is set while there is none."""

    def __init__(self, requests: Sequence[Request], each: int) -> None:
        """each: number of consecutive `requests` that share a prompt."""
        self.requests = requests
        self.ended = asyncio.Event()
        self.ended.set()
        self.counted: dict[int, int] = {}  # tokens of requests that ended for the caller, by index
        self._each = each
        self._open: set[Request] = set()

    def begin(self) -> None:
        self._open = set(self.requests)
        self.ended.clear()

    def end(self, request: Request) -> None:
        self._open.discard(request)
        if not self._open:
            self.ended.set()

    def used(self) -> TokenUsage:
        """Tokens computed so far; final when `ended`. A prompt counts with the tokens that were prefilled or found in
        the prefix cache; an answer with all its tokens, also those generated after the client disconnected. An answer
        that ended before its engine request counts as complete."""
        prompt = cached = 0
        for at in range(0, len(self.requests), self._each):
            same_prompt = self.requests[at : at + self._each]
            computed = max(min(request.prefilled, len(request.prompt)) for request in same_prompt)
            prompt += computed
            cached += min(computed, same_prompt[0].prefix_hit_tokens)
        tokens = [self.counted.get(at, request.generated) for at, request in enumerate(self.requests)]
        return TokenUsage(prompt, sum(tokens), cached)


class OutputSink(Protocol):
    """Receives the engine's outputs of one request, such as a Choice. ends_itself: it may end before the engine
    does."""

    ended: bool
    ends_itself: bool

    def push(self, output: StepOutput) -> Piece | None: ...


class OutputCollector:
    """Collects the output of one API request: turns the engine's step outputs into pieces, and merges them until they
    are taken."""

    def __init__(self, work: EngineWork, choices: Sequence[OutputSink], record: Record, *, stream: bool) -> None:
        self.work, self.stream = work, stream
        self.ready = asyncio.Event()  # set when pieces should be taken
        self.begun = False  # a piece has been taken
        self.left = len(choices)
        self.error: Exception | None = None
        self._choices, self._record = choices, record
        self._counts = [0] * len(choices)
        self._pieces: list[Piece] = []
        self._last: dict[int, Piece] = {}  # the last piece of each choice in `_pieces`

    def take(self) -> list[Piece]:
        """The collected pieces: without tool calls at most one for each choice."""
        self.ready.clear()
        pieces, self._pieces, self._last = self._pieces, [], {}
        self.begun = self.begun or bool(pieces)
        return pieces

    def push(self, index: int, output: StepOutput) -> bool:
        """Add a step's output of choice `index`. Returns whether the engine may cancel its request.

        Stop strings and tool calls are found here at once, so that an ended answer generates no more tokens and its end
        is not delayed.
        """
        choice = self._choices[index]
        if choice.ended or self.error or not self.left:
            return False
        if self._record.ttft is None:
            self._record.ttft = time.monotonic() - self._record.started
        if output.error:
            self.end(output.error)
            return False
        # Counted by delivered tokens: the engine may be steps ahead when a stop string is found.
        count = len(output.tokens) + (output.finish == "stop")
        self._record.completion_tokens += count
        self._counts[index] += count
        piece = choice.push(output)
        if piece is None:
            return False
        self._add(piece)
        if piece.finish:
            self.left -= 1
            self.work.counted[index] = self._counts[index]
            reason = "length" if piece.finish == "length" else "stop"
            SUCCESS.labels(self._record.model or "-", ENGINE, reason).inc()
            self.ready.set()
        return bool(piece.finish and not output.finish)

    def end(self, error: Exception) -> None:
        """End the output; `error` is raised after the collected pieces."""
        self.error = error
        self.ready.set()

    def close(self) -> None:
        """Discard all further output."""
        self.left = 0

    @property
    def ended(self) -> bool:
        return not self.left or self.error is not None

    @property
    def waiting(self) -> bool:
        return bool(self._pieces) and not self.ready.is_set()

    def eager(self, index: int) -> bool:
        """Whether choice `index` needs each token at once, because a token may end the answer or is its first one."""
        return self._choices[index].ends_itself or not (self.begun or self._pieces)

    def _add(self, piece: Piece) -> None:
        last = self._last.get(piece.index)
        if last is None or last.calls or piece.calls:
            self._pieces.append(piece)
            self._last[piece.index] = piece
            return
        last.text += piece.text
        last.finish = piece.finish
        if last.scored is not None:
            last.scored += piece.scored or ()


class EngineClient:
    """One chat or base model: its name, tokenizer and engine. Its methods run on the event loop, except `deliver`."""

    def __init__(self, *, name: str, kind: str, revision: str, text: ModelTokenizer, default_max_tokens: int) -> None:
        self.name, self.kind, self.revision, self.text = name, kind, revision, text
        self.default_max_tokens = default_max_tokens
        self._measured = 0.0  # when the metrics were last set
        self._stats: Stats | None = None  # of that time
        self.stop_ids: frozenset[int] = frozenset()
        self.vocab_size = text.vocab_size
        self._engine: Scheduler | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        # Collector and choice of each request that the engine has not ended.
        self._collectors: dict[Request, tuple[OutputCollector, int]] = {}
        self._streaming: set[OutputCollector] = set()  # streams that have begun and not ended
        self._arrived: deque[list[StepOutput]] = deque()  # outputs of the engine's steps, for the event loop
        self._gathered: dict[Request, StepOutput] = {}  # outputs held back
        self._eager: set[Request] = set()  # requests whose outputs are never held back
        self._held: set[OutputCollector] = set()  # streams with pieces to write
        self._delivered = self._since = 0.0  # time of the last step, and of the first held-back one
        self._grammars: Grammars | None = None
        self._compilers = ThreadPoolExecutor(1, thread_name_prefix="grammar")
        self._compiling = 0

    @property
    def engine(self) -> Scheduler:
        assert self._engine is not None, "attach the engine first"  # noqa: S101
        return self._engine

    def attach(self, engine: Scheduler, stop_ids: frozenset[int]) -> None:
        self._engine, self.stop_ids = engine, stop_ids
        # A tokenizer may have more tokens than the model has embeddings.
        self.vocab_size = min(self.text.vocab_size, engine.vocab)
        self._grammars = Grammars(self.text.tokenizer, stop_ids)

    @property
    def grammars(self) -> Grammars:
        assert self._grammars is not None, "attach the engine first"  # noqa: S101
        return self._grammars

    def deliver(self, outputs: list[StepOutput]) -> None:
        """The engine's callback, in its thread: makes at most one call into the event loop per step, for all
        requests."""
        if self._loop and not self._loop.is_closed():
            self._enqueue(outputs, self._loop)
        if not outputs or time.monotonic() - self._measured > MEASURE_SECONDS:
            self._measure()

    def _enqueue(self, outputs: list[StepOutput], loop: asyncio.AbstractEventLoop) -> None:
        now, before = time.monotonic(), self._delivered
        self._delivered = now
        if outputs:
            self._arrived.append(outputs)
            self._since = self._since or now
        # A single stream is never held back, and without streams there is nothing to write. The first held-back output
        # must not wait for another step that takes as long as the last one.
        streams = len(self._streaming)
        wait = min((streams - 1) / WRITES_A_SECOND, LONGEST_WAIT_SECONDS) if streams else LONGEST_WAIT_SECONDS
        due = bool(self._since) and now + (now - before) - self._since > wait
        if due:
            self._since = 0.0
        if due or any(output.finish or output.error or output.request in self._eager for output in outputs):
            loop.call_soon_threadsafe(self._dispatch, due)

    def _dispatch(self, due: bool) -> None:
        """Hand urgent outputs to their collectors; when due, all of them: the tokens of several steps and of all
        streams at once."""
        while self._arrived:
            for output in self._arrived.popleft():
                request = output.request
                waits = not (output.finish or output.error or request in self._eager)
                earlier = self._gathered.pop(request, None)
                if earlier is not None and output.error:
                    self._push(earlier)
                elif earlier is not None:
                    output.tokens[:0] = earlier.tokens
                    output.logprobs[:0] = earlier.logprobs
                if waits:
                    self._gathered[request] = output
                else:
                    self._push(output)
        if due:
            gathered, self._gathered = self._gathered, {}
            for output in gathered.values():
                self._push(output)
            for collector in self._held:
                collector.ready.set()
            self._held.clear()

    def _push(self, output: StepOutput) -> None:
        request = output.request
        if not (found := self._collectors.get(request)):
            return
        collector, index = found
        try:
            if collector.push(index, output):
                self.engine.cancel(request)
        except Exception as error:
            collector.end(error)  # the fault of this request: the other requests of the step continue
        if output.finish or output.error:
            del self._collectors[request]
            collector.work.end(request)
        if collector.ended:
            self._streaming.discard(collector)  # a slow reader does not count as a running stream
        elif collector.waiting and not collector.begun:
            collector.ready.set()  # the first token never waits
        elif collector.waiting and collector.stream:
            self._held.add(collector)
        if request not in self._collectors or not collector.eager(index):
            self._eager.discard(request)

    async def run(self, collector: OutputCollector) -> AsyncGenerator[list[Piece]]:
        """Submit the collector's requests and yield its pieces until all have ended. Raises ApiError when the engine
        fails.

        Closing the generator early frees the places of unfinished requests before the engine's next step.
        """
        self._loop = asyncio.get_running_loop()
        requests = collector.work.requests
        with as_api_errors(requests):
            self._collectors |= {request: (collector, index) for index, request in enumerate(requests)}
            self._eager.update(requests)
            self._dispatch(due=True)  # a prompt makes a long step: deliver what is held back before it
            try:
                self.engine.submit(*requests)
            except BaseException:
                for request in requests:
                    del self._collectors[request]
                self._eager.difference_update(requests)
                raise
            collector.work.begin()
            try:
                ended = False
                while not ended:
                    await collector.ready.wait()
                    ended, pieces = not collector.left, collector.take()
                    if collector.stream and collector.begun and not collector.ended:
                        self._streaming.add(collector)
                    if pieces:
                        yield pieces
                    if collector.error:
                        raise collector.error
            finally:
                collector.close()
                self._streaming.discard(collector)
                self._held.discard(collector)
                if open_ := [request for request in requests if request in self._collectors]:
                    self.engine.cancel(*open_)

    async def grammar(self, build: Callable[[Grammars], T]) -> T:
        """Compile in a thread, with a bounded queue. Raises BadRequestError, BusyError or what `build` raises."""
        if self._compiling >= MOST_COMPILING:
            raise BusyError("Too many schemas are being compiled. Retry after the time in Retry-After.", 1)
        self._compiling += 1
        # Counted until the thread is done: a cancelled caller does not stop it.
        work = asyncio.get_running_loop().run_in_executor(self._compilers, build, self.grammars)
        work.add_done_callback(self._compiled)
        try:
            return await asyncio.wait_for(asyncio.shield(work), COMPILE_SECONDS)
        except TimeoutError:
            raise BadRequestError(
                f"The schema was not compiled within {COMPILE_SECONDS} s.", code="invalid_value"
            ) from None

    def _compiled(self, work: asyncio.Future[Any]) -> None:
        self._compiling -= 1
        if not work.cancelled():
            work.exception()  # retrieved: otherwise asyncio logs it when nothing awaited it

    def _measure(self) -> None:
        self._measured = time.monotonic()
        last, stats = self._stats, self.engine.stats()
        self._stats = stats
        labels = self.name, ENGINE
        RUNNING.labels(*labels).set(stats.running)
        WAITING.labels(*labels).set(stats.waiting)
        KV_USED.labels(*labels).set(stats.pages_used / stats.pages_total)
        PREEMPTED.labels(*labels).inc(stats.preempted - (last.preempted if last else 0))
        QUERIES.labels(*labels).inc(stats.prompt_tokens - (last.prompt_tokens if last else 0))
        HITS.labels(*labels).inc(stats.reused_tokens - (last.reused_tokens if last else 0))
        FAULTS.labels(self.name).inc(stats.faults - (last.faults if last else 0))


@contextlib.contextmanager
def as_api_errors(requests: Sequence[Request]) -> Iterator[None]:
    """Turn the engine's errors into API errors."""
    try:
        yield
    except QueueFullError as error:
        raise BusyError(
            "The model is busy: all slots and the queue are full. Retry after the time in Retry-After.",
            error.retry_after,
        ) from None
    except DeadlineError:
        raise deadline_exceeded() from None
    except UnknownTokenError:
        raise BadRequestError(
            "The prompt has a token that this model's tokenizer knows but the model itself does not.",
            code="invalid_value",
        ) from None
    except EngineFaultError as error:
        for request in requests:
            if isinstance(request.grammar, TokenGrammar) and request.grammar.fault:
                raise BadRequestError(
                    f"The schema is too complex: {request.grammar.fault}", code="invalid_value"
                ) from None
        raise ServerError(f"The model could not finish this answer: {error}.") from None
    except EngineError as error:
        raise UnavailableError(f"The model accepts no requests now: {error}.") from None
