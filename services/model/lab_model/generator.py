"""One model's answers: the way between the engine's thread and the event loop, and what the engine's errors mean.

Knows engine and asyncio; knows nothing of HTTP requests or token ids.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from prometheus_client import Gauge

from . import wire
from .answer import Piece
from .choice import Choice
from .engine import DeadlineError, Engine, EngineError, EngineFaultError, Event, QueueFullError, Request
from .envelope import Record
from .grammar import Grammars, TokenGrammar
from .tally import Used
from .text import Text

T = TypeVar("T")

# A schema's compilation ends by its own limits after about a second; this is for those who wait behind others.
COMPILE_SECONDS = 10
MOST_COMPILING = 16
# The gauges are at most this old.
MEASURE_SECONDS = 0.5

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


class Generator:
    """One chat or base model: tokenizer, engine, and the way between the engine's thread and the event loop."""

    def __init__(self, *, name: str, kind: str, revision: str, text: Text, default_max_tokens: int) -> None:
        self.name, self.kind, self.revision, self.text = name, kind, revision, text
        self.default_max_tokens = default_max_tokens
        self._measured = 0.0
        self.stop_ids: frozenset[int] = frozenset()
        self._engine: Engine | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._inboxes: dict[Request, tuple[asyncio.Queue[tuple[int, Event]], int, Work]] = {}
        self._grammars: Grammars | None = None
        self._compilers = ThreadPoolExecutor(1, thread_name_prefix="grammar")
        self._compiling = 0

    @property
    def engine(self) -> Engine:
        assert self._engine is not None, "attach the engine first"  # noqa: S101
        return self._engine

    def attach(self, engine: Engine, stop_ids: frozenset[int]) -> None:
        self._engine, self.stop_ids = engine, stop_ids
        self._grammars = Grammars(self.text.tokenizer, stop_ids)

    @property
    def grammars(self) -> Grammars:
        assert self._grammars is not None, "attach the engine first"  # noqa: S101
        return self._grammars

    def deliver(self, events: list[Event]) -> None:
        """The engine's `deliver`: one hop into the event loop a step, however many requests it served."""
        if not events or time.monotonic() - self._measured > MEASURE_SECONDS:
            self._measure()
        if events and self._loop and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._sort, events)

    def _sort(self, events: list[Event]) -> None:
        for event in events:
            if found := self._inboxes.get(event.request):
                found[0].put_nowait((found[1], event))
                if event.finish or event.error:
                    del self._inboxes[event.request]
                    found[2].end(event.request)

    async def run(self, work: Work) -> AsyncGenerator[list[tuple[int, Event]]]:
        """Submit all requests and yield what has come, with the request's index, until all have ended.

        However the caller leaves, the places of the unfinished are freed before the engine's next step.
        """
        self._loop = asyncio.get_running_loop()
        requests = work.requests
        inbox: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
        self._inboxes |= {request: (inbox, index, work) for index, request in enumerate(requests)}
        open_ = set(requests)
        try:
            self.engine.submit(*requests)
        except BaseException:
            for request in requests:
                del self._inboxes[request]
            raise
        work.begin()
        try:
            while open_:
                # What has gathered while this task could not run goes on its way together.
                come = [await inbox.get()]
                while not inbox.empty():
                    come.append(inbox.get_nowait())
                for _, event in come:
                    if event.finish or event.error:
                        open_.discard(event.request)
                yield come
        finally:
            if open_:
                self.engine.cancel(*open_)

    async def grammar(self, build: Callable[[Grammars], T]) -> T:
        """Compile away from the event loop, a few at a time. Raises BadRequestError, BusyError or what `build` does."""
        if self._compiling >= MOST_COMPILING:
            raise wire.BusyError("Too many schemas are being compiled. Retry after the time in Retry-After.", 1)
        self._compiling += 1
        # Counted until the thread is done: a caller that leaves does not stop it.
        work = asyncio.get_running_loop().run_in_executor(self._compilers, build, self.grammars)
        work.add_done_callback(self._compiled)
        try:
            return await asyncio.wait_for(asyncio.shield(work), COMPILE_SECONDS)
        except TimeoutError:
            raise wire.BadRequestError(
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


async def progress(model: Generator, work: Work, choices: list[Choice], record: Record) -> AsyncGenerator[list[Piece]]:
    """The answer's pieces as they come. Raises WireError when the engine gives up."""
    left, requests = len(choices), work.requests
    counts = [0] * left
    async with contextlib.aclosing(model.run(work)) as run:
        with on_the_wire(requests):
            async for come in run:
                if record.ttft is None:
                    record.ttft = time.monotonic() - record.started
                pieces = []
                for index, event in come:
                    choice = choices[index]
                    if choice.ended:
                        continue
                    if event.error:
                        raise event.error
                    # Of what was delivered: the engine may be steps ahead when a stop string is found here.
                    count = len(event.tokens) + (event.finish == "stop")
                    record.completion_tokens += count
                    counts[index] += count
                    piece = choice.push(event)
                    if piece is None:
                        continue
                    pieces.append(piece)
                    if piece.finish:
                        left -= 1
                        work.counted[index] = counts[index]
                        if not event.finish:
                            model.engine.cancel(requests[index])
                if pieces:
                    yield pieces
                if not left:
                    return


@contextlib.contextmanager
def on_the_wire(requests: Sequence[Request]) -> Iterator[None]:
    """The engine's errors as the API says them."""
    try:
        yield
    except QueueFullError as error:
        raise wire.BusyError(
            "The model is busy: every place and the queue are taken. Retry after the time in Retry-After.",
            error.retry_after,
        ) from None
    except DeadlineError:
        raise late() from None
    except EngineFaultError as error:
        for request in requests:
            if isinstance(request.grammar, TokenGrammar) and request.grammar.fault:
                raise wire.BadRequestError(
                    f"The schema is too complex: {request.grammar.fault}", code="invalid_value"
                ) from None
        raise wire.ServerError(f"The model could not finish this answer: {error}.") from None
    except EngineError as error:
        raise wire.UnavailableError(f"The model takes no request now: {error}.") from None


def late() -> wire.DeadlineExceededError:
    return wire.DeadlineExceededError("The time that x-request-timeout-ms gave is over.")
