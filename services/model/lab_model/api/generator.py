"""One model's answers: the way between the engine's thread and the event loop, and what the engine's errors mean.

Knows engine and asyncio; knows nothing of HTTP requests or token ids.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from prometheus_client import Gauge

from .. import errors
from ..engine.scheduler import (
    DeadlineError,
    Engine,
    EngineError,
    EngineFaultError,
    Event,
    QueueFullError,
    Request,
    UnknownTokenError,
)
from ..errors import deadline_exceeded
from ..text.choice import Choice
from ..text.grammar import Grammars, TokenGrammar
from ..text.tokenizer import Text
from .http.service import Record
from .http.usage import Used
from .wire.answers import Piece

T = TypeVar("T")

# A schema's compilation ends by its own limits after about a second; this is for those who wait behind others.
COMPILE_SECONDS = 10
MOST_COMPILING = 16
# The gauges are at most this old.
MEASURE_SECONDS = 0.5
# What is done for a token costs the cores that the engine computes on, and ten times what it takes by itself: after a
# step the caches hold weights. Together the streams write about so often a second: a token waits for those that follow
# it, the longer the more streams there are, and until then nobody touches it; never longer than this, or one step.
WRITES_A_SECOND = 640
LONGEST_WAIT_SECONDS = 0.05

# `sum` over the replicas of a model, each a process.
RUNNING = Gauge("model_running", "Requests in the batch.", ["model"], multiprocess_mode="livesum")
WAITING = Gauge("model_waiting", "Requests in the queue.", ["model"], multiprocess_mode="livesum")
KV_USED = Gauge("model_kv_used_ratio", "Part of the KV pages in use.", ["model"], multiprocess_mode="livemax")
FAULTS = Gauge("model_engine_faults", "Steps that failed since the start.", ["model"], multiprocess_mode="livesum")
PREEMPTED = Gauge(
    "model_preempted", "Requests sent back to the queue for their pages.", ["model"], multiprocess_mode="livesum"
)


class Work:
    """What the engine does for one request of the API. `ended` is set while it has nothing to do for it."""

    def __init__(self, requests: Sequence[Request], each: int) -> None:
        """`each`: so many `requests`, one after the other, share a prompt."""
        self.requests = requests
        self.ended = asyncio.Event()
        self.ended.set()
        self.counted: dict[int, int] = {}  # tokens of those that ended for the caller, by their place
        self._each = each
        self._open: set[Request] = set()

    def begin(self) -> None:
        self._open = set(self.requests)
        self.ended.clear()

    def end(self, request: Request) -> None:
        self._open.discard(request)
        if not self._open:
            self.ended.set()

    def used(self) -> Used:
        """What was computed, final when `ended`: of a prompt as much as was prefilled, or found in the prefix cache on
        the way; of an answer every token, also one that nobody was there for. An answer that ended before the request
        did counts like a whole one."""
        prompt = cached = 0
        for at in range(0, len(self.requests), self._each):
            alike = self.requests[at : at + self._each]
            computed = max(min(request.prefilled, len(request.prompt)) for request in alike)
            prompt += computed
            cached += min(computed, alike[0].reused)
        tokens = [self.counted.get(at, request.generated) for at, request in enumerate(self.requests)]
        return Used(prompt, sum(tokens), cached)


class Flow:
    """One call of the API while it is answered: the engine's events in, pieces out, gathered until they leave."""

    def __init__(self, work: Work, choices: Sequence[Choice], record: Record, *, stream: bool) -> None:
        self.work, self.stream = work, stream
        self.woken = asyncio.Event()  # it is time to take what there is
        self.begun = False  # something was taken
        self.left = len(choices)
        self.error: Exception | None = None
        self._choices, self._record = choices, record
        self._counts = [0] * len(choices)
        self._pieces: list[Piece] = []
        self._last: dict[int, Piece] = {}  # of each choice, of those in `_pieces`

    def take(self) -> list[Piece]:
        """What has gathered, at most a piece for each choice, but for tool calls."""
        self.woken.clear()
        pieces, self._pieces, self._last = self._pieces, [], {}
        self.begun = self.begun or bool(pieces)
        return pieces

    def push(self, index: int, event: Event) -> bool:
        """What the engine brought choice `index`; whether the engine may forget its request.

        Stop strings and tool calls are found here and now: an answer that has ended makes no more tokens, and its end
        waits for nobody.
        """
        choice = self._choices[index]
        if choice.ended or self.error or not self.left:
            return False
        if self._record.ttft is None:
            self._record.ttft = time.monotonic() - self._record.started
        if event.error:
            self.end(event.error)
            return False
        # Of what was delivered: the engine may be steps ahead when a stop string is found here.
        count = len(event.tokens) + (event.finish == "stop")
        self._record.completion_tokens += count
        self._counts[index] += count
        piece = choice.push(event)
        if piece is None:
            return False
        self._add(piece)
        if piece.finish:
            self.left -= 1
            self.work.counted[index] = self._counts[index]
            self.woken.set()
        return bool(piece.finish and not event.finish)

    def end(self, error: Exception) -> None:
        """There is no more than what has gathered, and this."""
        self.error = error
        self.woken.set()

    def close(self) -> None:
        """Nobody takes anything any more."""
        self.left = 0

    @property
    def ended(self) -> bool:
        return not self.left or self.error is not None

    @property
    def waiting(self) -> bool:
        return bool(self._pieces) and not self.woken.is_set()

    def eager(self, index: int) -> bool:
        """Whether choice `index` has to see each token when it comes: it may end the answer, or show the first one."""
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


class Generator:
    """One chat or base model: tokenizer, engine, and the way between the engine's thread and the event loop."""

    def __init__(self, *, name: str, kind: str, revision: str, text: Text, default_max_tokens: int) -> None:
        self.name, self.kind, self.revision, self.text = name, kind, revision, text
        self.default_max_tokens = default_max_tokens
        self._measured = 0.0
        self.stop_ids: frozenset[int] = frozenset()
        self.vocab_size = text.vocab_size
        self._engine: Engine | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._flows: dict[Request, tuple[Flow, int]] = {}  # of requests that the engine has not let go, whose they are
        self._begun: set[Flow] = set()  # streams that have, and get more
        self._arrived: deque[list[Event]] = deque()  # what the engine's steps brought, for the loop
        self._gathered: dict[Request, Event] = {}  # of it what waits
        self._eager: set[Request] = set()  # whose events never wait
        self._held: set[Flow] = set()  # streams with pieces to show
        self._delivered = self._since = 0.0  # when the last step came, and the first whose events may wait
        self._grammars: Grammars | None = None
        self._compilers = ThreadPoolExecutor(1, thread_name_prefix="grammar")
        self._compiling = 0

    @property
    def engine(self) -> Engine:
        assert self._engine is not None, "attach the engine first"  # noqa: S101
        return self._engine

    def attach(self, engine: Engine, stop_ids: frozenset[int]) -> None:
        self._engine, self.stop_ids = engine, stop_ids
        # A tokenizer may know more than the model has embeddings for.
        self.vocab_size = min(self.text.vocab_size, engine.vocab)
        self._grammars = Grammars(self.text.tokenizer, stop_ids)

    @property
    def grammars(self) -> Grammars:
        assert self._grammars is not None, "attach the engine first"  # noqa: S101
        return self._grammars

    def deliver(self, events: list[Event]) -> None:
        """The engine's `deliver`: at most one hop into the event loop a step, however many requests it served."""
        if self._loop and not self._loop.is_closed():
            self._hand_over(events, self._loop)
        if not events or time.monotonic() - self._measured > MEASURE_SECONDS:
            self._measure()

    def _hand_over(self, events: list[Event], loop: asyncio.AbstractEventLoop) -> None:
        now, before = time.monotonic(), self._delivered
        self._delivered = now
        if events:
            self._arrived.append(events)
            self._since = self._since or now
        # A stream that is alone waits for nobody; without any there is nothing to show. And what came first shall not
        # wait for another step like the last one.
        streams = len(self._begun)
        wait = min((streams - 1) / WRITES_A_SECOND, LONGEST_WAIT_SECONDS) if streams else LONGEST_WAIT_SECONDS
        due = bool(self._since) and now + (now - before) - self._since > wait
        if due:
            self._since = 0.0
        if due or any(event.finish or event.error or event.request in self._eager for event in events):
            loop.call_soon_threadsafe(self._sort, due)

    def _sort(self, due: bool) -> None:
        """Give to whom they belong the events that do not wait; when it is time, all: the tokens of several steps at
        once, and of all streams together."""
        while self._arrived:
            for event in self._arrived.popleft():
                request = event.request
                waits = not (event.finish or event.error or request in self._eager)
                earlier = self._gathered.pop(request, None)
                if earlier is not None and event.error:
                    self._give(earlier)
                elif earlier is not None:
                    event.tokens[:0] = earlier.tokens
                    event.logprobs[:0] = earlier.logprobs
                if waits:
                    self._gathered[request] = event
                else:
                    self._give(event)
        if due:
            gathered, self._gathered = self._gathered, {}
            for event in gathered.values():
                self._give(event)
            for flow in self._held:
                flow.woken.set()
            self._held.clear()

    def _give(self, event: Event) -> None:
        request = event.request
        if not (found := self._flows.get(request)):
            return
        flow, index = found
        try:
            if flow.push(index, event):
                self.engine.cancel(request)
        except Exception as error:
            flow.end(error)  # its own fault, not that of the others in this step
        if event.finish or event.error:
            del self._flows[request]
            flow.work.end(request)
        if flow.ended:
            self._begun.discard(flow)  # whoever reads it slowly has no part in how long others wait
        elif flow.waiting and not flow.begun:
            flow.woken.set()  # the first token never waits
        elif flow.waiting and flow.stream:
            self._held.add(flow)
        if request not in self._flows or not flow.eager(index):
            self._eager.discard(request)

    async def run(self, flow: Flow) -> AsyncGenerator[list[Piece]]:
        """Submit the call's requests and yield its pieces as they come, until all have ended. Raises WireError when the
        engine gives up.

        However the caller leaves, the places of the unfinished are freed before the engine's next step.
        """
        self._loop = asyncio.get_running_loop()
        requests = flow.work.requests
        with on_the_wire(requests):
            self._flows |= {request: (flow, index) for index, request in enumerate(requests)}
            self._eager.update(requests)
            self._sort(due=True)  # a prompt makes a long step: what waits shall not wait for it too
            try:
                self.engine.submit(*requests)
            except BaseException:
                for request in requests:
                    del self._flows[request]
                self._eager.difference_update(requests)
                raise
            flow.work.begin()
            try:
                ended = False
                while not ended:
                    await flow.woken.wait()
                    ended, pieces = not flow.left, flow.take()
                    if flow.stream and flow.begun and not flow.ended:
                        self._begun.add(flow)
                    if pieces:
                        yield pieces
                    if flow.error:
                        raise flow.error
            finally:
                flow.close()
                self._begun.discard(flow)
                self._held.discard(flow)
                if open_ := [request for request in requests if request in self._flows]:
                    self.engine.cancel(*open_)

    async def grammar(self, build: Callable[[Grammars], T]) -> T:
        """Compile away from the event loop, a few at a time. Raises BadRequestError, BusyError or what `build` does."""
        if self._compiling >= MOST_COMPILING:
            raise errors.BusyError("Too many schemas are being compiled. Retry after the time in Retry-After.", 1)
        self._compiling += 1
        # Counted until the thread is done: a caller that leaves does not stop it.
        work = asyncio.get_running_loop().run_in_executor(self._compilers, build, self.grammars)
        work.add_done_callback(self._compiled)
        try:
            return await asyncio.wait_for(asyncio.shield(work), COMPILE_SECONDS)
        except TimeoutError:
            raise errors.BadRequestError(
                f"The schema was not compiled within {COMPILE_SECONDS} s.", code="invalid_value"
            ) from None

    def _compiled(self, work: asyncio.Future[Any]) -> None:
        self._compiling -= 1
        if not work.cancelled():
            work.exception()  # read, or asyncio complains when nobody waited for it

    def _measure(self) -> None:
        self._measured = time.monotonic()
        stats = self.engine.stats()
        RUNNING.labels(self.name).set(stats.running)
        WAITING.labels(self.name).set(stats.waiting)
        KV_USED.labels(self.name).set(stats.pages_used / stats.pages_total)
        FAULTS.labels(self.name).set(stats.faults)
        PREEMPTED.labels(self.name).set(stats.preempted)


@contextlib.contextmanager
def on_the_wire(requests: Sequence[Request]) -> Iterator[None]:
    """The engine's errors as the API says them."""
    try:
        yield
    except QueueFullError as error:
        raise errors.BusyError(
            "The model is busy: every place and the queue are taken. Retry after the time in Retry-After.",
            error.retry_after,
        ) from None
    except DeadlineError:
        raise deadline_exceeded() from None
    except UnknownTokenError:
        raise errors.BadRequestError(
            "The prompt holds a token that this model's tokenizer knows and the model itself does not.",
            code="invalid_value",
        ) from None
    except EngineFaultError as error:
        for request in requests:
            if isinstance(request.grammar, TokenGrammar) and request.grammar.fault:
                raise errors.BadRequestError(
                    f"The schema is too complex: {request.grammar.fault}", code="invalid_value"
                ) from None
        raise errors.ServerError(f"The model could not finish this answer: {error}.") from None
    except EngineError as error:
        raise errors.UnavailableError(f"The model takes no request now: {error}.") from None
