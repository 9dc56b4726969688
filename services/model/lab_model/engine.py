"""Continuous batching over a Hugging Face causal LM. Token ids in, token ids out.

Requests join and leave the batch between steps; their keys and values lie in pages of one pool. Knows nothing of HTTP,
Ray, text or tokenization. One thread runs the loop; `submit` and `cancel` may be called from any other.

The model itself runs unmodified: `PagedCache` passes for transformers' cache and the mask is given whole (4-D), which
every attention implementation takes as it is.
"""

from __future__ import annotations

import logging
import math
import random
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch

log = logging.getLogger(__name__)

PAGE_TOKENS = 16
# Tokens (padding counted) that one step may prefill before the running answers get their next token: on 2 cores about
# 400 ms for a 135M model, so a long prompt slows its neighbours but does not stop them.
PREFILL_TOKENS = 512
# Below this temperature the softmax is a one-hot vector in float32 anyway.
GREEDY_BELOW = 1e-4

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


class EngineFaultError(EngineError):
    """The step that held this request failed, or its logits were not finite."""


class EngineClosedError(EngineError):
    """The engine is shutting down."""


@dataclass(eq=False, slots=True)
class Request:
    """One sequence to continue, and its state while the engine works on it.

    `prompt` holds at least one token id. Fields below `seed` belong to the engine.
    """

    prompt: Sequence[int]
    max_tokens: int
    stop_ids: frozenset[int] = frozenset()
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None

    tokens: list[int] = field(init=False)  # prompt and answer so far
    cached: int = field(init=False, default=0)  # how many of them have keys and values in the pool
    pages: list[int] = field(init=False, default_factory=list)
    draw: random.Random = field(init=False)
    cancelled: bool = field(init=False, default=False)

    def __post_init__(self) -> None:
        self.tokens = list(self.prompt)
        # Not cryptographic: a seeded stream per request makes an answer repeatable whoever shares its batch.
        # Unsigned, because Random takes the absolute value.
        self.draw = random.Random(None if self.seed is None else self.seed % 2**64)  # noqa: S311

    @property
    def generated(self) -> int:
        """Tokens generated so far, a final stop token included."""
        return len(self.tokens) - len(self.prompt)


@dataclass(slots=True)
class Event:
    """What one step brought one request. `tokens` never holds the stop token; `error` and `finish` end the request."""

    request: Request
    tokens: list[int]
    finish: Finish | None = None
    error: EngineError | None = None


@dataclass(frozen=True, slots=True)
class Stats:
    """A snapshot. The last six count since the start."""

    running: int
    waiting: int
    pages_used: int
    pages_total: int
    prompt_tokens: int
    generated_tokens: int
    finished: int
    preempted: int
    faults: int
    steps: int


class CausalLM(Protocol):
    """What the engine needs of a model: transformers' `PreTrainedModel` with a language head."""

    config: Any
    device: torch.device
    dtype: torch.dtype

    def __call__(self, **kwargs: Any) -> Any: ...


class PagedCache:
    """Keys and values of all running requests: one pool of pages a layer, page 0 for what padding writes.

    Passes for a transformers cache of one forward: `aim` says where the step writes and what it reads.
    """

    def __init__(self, config: Any, pages: int, device: torch.device, dtype: torch.dtype) -> None:
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        shape = (config.num_hidden_layers, pages * PAGE_TOKENS, heads, dim)
        self.keys = torch.zeros(shape, device=device, dtype=dtype)
        self.values = torch.zeros(shape, device=device, dtype=dtype)
        self._write = self._read = torch.empty(0, dtype=torch.long)
        self._rows = 0

    @property
    def bytes(self) -> int:
        return 2 * self.keys.numel() * self.keys.element_size()

    def aim(self, write: torch.Tensor, read: torch.Tensor) -> None:
        """Before a forward. write: (rows, new) places in the pool; read: (rows, blocks) page numbers."""
        self._write, self._read, self._rows = write.flatten(), read.flatten(), read.shape[0]

    def wipe(self, pages: list[int]) -> None:
        """Zero these pages: a masked NaN still spoils attention, because 0 * NaN is NaN."""
        for page in [0, *pages]:
            part = slice(page * PAGE_TOKENS, (page + 1) * PAGE_TOKENS)
            self.keys[:, part].zero_()
            self.values[:, part].zero_()

    def update(
        self, keys: torch.Tensor, values: torch.Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store (rows, heads, new, dim); return each row's (rows, heads, blocks * page, dim), called by the model."""
        return self._exchange(self.keys[layer_idx], keys), self._exchange(self.values[layer_idx], values)

    def _exchange(self, pool: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        _, heads, _, dim = new.shape
        pool.index_copy_(0, self._write, new.transpose(1, 2).reshape(-1, heads, dim))
        pages = pool.view(-1, PAGE_TOKENS, heads, dim).index_select(0, self._read)
        return pages.view(self._rows, -1, heads, dim).transpose(1, 2)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Asked by some models although positions are given; its value is not used then."""
        return 0


class Engine:
    """The loop, its queue and its pages.

    `deliver` is called from the engine's thread with all events of a step at once, and with none when the last request
    has left; it must not block.
    """

    def __init__(
        self,
        model: CausalLM,
        deliver: Callable[[list[Event]], None],
        *,
        kv_tokens: int = 16384,
        max_running: int = 64,
        max_queued: int = 256,
        context: int | None = None,
    ) -> None:
        self._model = model
        self._deliver = deliver
        self._max_running, self._max_queued = max_running, max_queued
        pages = math.ceil(kv_tokens / PAGE_TOKENS)
        limits = [pages * PAGE_TOKENS, getattr(model.config, "max_position_embeddings", None), context]
        # A window narrower than the context would need its own masks; within the window it changes nothing.
        limits.append(getattr(model.config, "sliding_window", None))
        self.context = min(limit for limit in limits if limit)
        self.cache = PagedCache(model.config, pages + 1, model.device, model.dtype)
        self._free = list(range(pages, 0, -1))
        self._pages_total = pages
        self._running: list[Request] = []  # oldest first
        self._waiting: deque[Request] = deque()
        self._changed = threading.Condition()
        self._closing = False
        self._finished_at: deque[float] = deque(maxlen=32)
        self._step_seconds = 0.1
        self._counts = dict.fromkeys(
            ("prompt_tokens", "generated_tokens", "finished", "preempted", "faults", "steps"), 0
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
        return self._thread.is_alive() and not self._closing

    def submit(self, *requests: Request) -> None:
        """Queue all of them or none. Raises RequestTooLongError, QueueFullError or EngineClosedError."""
        for request in requests:
            if not request.prompt or request.max_tokens < 1:
                raise ValueError("a request needs at least one prompt token and max_tokens of at least 1")
            if len(request.prompt) + request.max_tokens > self.context:
                raise RequestTooLongError(
                    f"{len(request.prompt)} prompt tokens and max_tokens {request.max_tokens} exceed {self.context}"
                )
        with self._changed:
            if self._closing:
                raise EngineClosedError("the model is shutting down")
            room = self.capacity - len(self._running) - len(self._waiting)
            if len(requests) > room:
                raise QueueFullError(self._retry_after())
            self._waiting.extend(requests)
            self._changed.notify()

    def cancel(self, *requests: Request) -> None:
        """Free their places before the next step. Nothing more is delivered for them; ended ones are ignored."""
        with self._changed:
            for request in requests:
                request.cancelled = True
            self._changed.notify()

    def stats(self) -> Stats:
        with self._changed:
            used = self._pages_total - len(self._free)
            return Stats(len(self._running), len(self._waiting), used, self._pages_total, **self._counts)

    def run_alone(self, request: Request, events: list[Event]) -> None:
        """Run one request to its end in the caller's thread, before `start`: faults are raised, not delivered."""
        self.submit(request)
        while self._waiting or self._running:
            self._admit()
            self._step(events)

    # The loop

    def _run(self) -> None:
        with torch.inference_mode():
            while True:
                with self._changed:
                    self._drop_cancelled()
                    if not (self._running or self._waiting or self._closing):
                        self._deliver([])  # who keeps gauges learns that nothing runs
                    while not (self._running or self._waiting or self._closing):
                        self._changed.wait()
                        self._drop_cancelled()
                    if self._closing:
                        break
                    self._admit()
                started = time.monotonic()
                events: list[Event] = []
                try:
                    self._step(events)
                except Exception as error:
                    log.exception("a step failed; its requests end with an error, the loop goes on")
                    self._counts["faults"] += 1
                    events += self._fail_running(EngineFaultError(f"the model failed: {type(error).__name__}"))
                self._step_seconds += 0.1 * (time.monotonic() - started - self._step_seconds)
                self._deliver(events)
        closed = EngineClosedError("the model is shutting down")
        with self._changed:
            waiting, self._waiting = list(self._waiting), deque()
        self._deliver(self._fail_running(closed) + [Event(request, [], error=closed) for request in waiting])

    def _step(self, events: list[Event]) -> None:
        """Advance: a bounded piece of prefill for the oldest that need it, one token for all who have theirs.

        What happened lies in `events` also when the step fails half way: who ended before the fault must hear of it.
        """
        self._counts["steps"] += 1
        # 1. Prefill. Rows are padded to the longest, so the budget counts rows * width.
        rows: list[Request] = []
        width = 0
        for request in self._running:
            wanted = max(width, min(len(request.tokens) - request.cached, PREFILL_TOKENS))
            if wanted > 1 and len(request.tokens) - request.cached > 1 and wanted * (len(rows) + 1) <= PREFILL_TOKENS:
                rows.append(request)
                width = wanted
        decoding = [request for request in self._running if len(request.tokens) - request.cached == 1]
        if rows:
            counts = [min(len(request.tokens) - request.cached, width) for request in rows]
            logits = self._forward(rows, counts)
            whole = [i for i, request in enumerate(rows) if request.cached == len(request.tokens)]
            events += self._extend([rows[i] for i in whole], logits[whole])
        # 2. Decode. Taking a page may send a younger request back to the queue.
        decoding = [request for request in decoding if self._hold(request, request.cached + 1)]
        decoding = [request for request in decoding if request.pages]
        if decoding:
            events += self._extend(decoding, self._forward(decoding, [1] * len(decoding)))

    def _forward(self, rows: list[Request], counts: list[int]) -> torch.Tensor:
        """Run the next counts[i] uncached tokens of each row; logits of the last one: (rows, vocab), float32.

        Shorter rows are padded on the left, so that the last column is every row's newest token. Padding writes to
        page 0 and attends its own row's first key; nobody reads either.
        """
        width = max(counts)
        ids, positions, write = [], [], []
        for request, count in zip(rows, counts, strict=True):
            span = range(request.cached, request.cached + count)
            padding = [0] * (width - count)
            ids.append(padding + request.tokens[span.start : span.stop])
            positions.append([*padding, *span])
            write.append(padding + [request.pages[p // PAGE_TOKENS] * PAGE_TOKENS + p % PAGE_TOKENS for p in span])
        blocks = max(
            math.ceil((request.cached + count) / PAGE_TOKENS) for request, count in zip(rows, counts, strict=True)
        )
        read = [(request.pages[:blocks] + [0] * blocks)[:blocks] for request in rows]

        device = self._model.device
        where = torch.tensor(positions, device=device)  # (rows, width)
        self.cache.aim(torch.tensor(write, device=device), torch.tensor(read, device=device))
        visible = torch.arange(blocks * PAGE_TOKENS, device=device) <= where[:, None, :, None]  # (rows, 1, width, keys)
        output = self._model(
            input_ids=torch.tensor(ids, device=device),
            position_ids=where,
            attention_mask=visible,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        )
        for request, count in zip(rows, counts, strict=True):
            request.cached += count
        return output.logits[:, -1].float()  # type: ignore[no-any-return]

    def _extend(self, rows: list[Request], logits: torch.Tensor) -> list[Event]:
        """Give each row its next token; end those that are done."""
        if not rows:
            return []
        events, ended = [], []
        for request, token in zip(rows, sample(logits, rows), strict=True):
            if token is None:
                self.cache.wipe(request.pages)
                fault = EngineFaultError("the model's logits were not finite")
                events.append(Event(request, [], error=fault))
                ended.append(request)
                continue
            request.tokens.append(token)
            self._counts["generated_tokens"] += 1
            if token in request.stop_ids:
                events.append(Event(request, [], "stop"))
            elif request.generated >= request.max_tokens:
                events.append(Event(request, [token], "length"))
            else:
                events.append(Event(request, [token]))
                continue
            ended.append(request)
            self._counts["finished"] += 1
            self._counts["prompt_tokens"] += len(request.prompt)
            self._finished_at.append(time.monotonic())
        if ended:
            with self._changed:
                for request in ended:
                    self._running.remove(request)
                    self._release(request)
        return [event for event in events if not event.request.cancelled]

    # Places and pages. `_admit` and `_drop_cancelled` are called with the lock held.

    def _admit(self) -> None:
        while self._waiting and len(self._running) < self._max_running:
            needed = math.ceil((len(self._waiting[0].tokens) + 1) / PAGE_TOKENS)
            if needed > len(self._free):
                break
            request = self._waiting.popleft()
            request.pages = [self._free.pop() for _ in range(needed)]
            self._running.append(request)

    def _drop_cancelled(self) -> None:
        for request in [request for request in self._running if request.cancelled]:
            self._running.remove(request)
            self._release(request)
        if any(request.cancelled for request in self._waiting):
            self._waiting = deque(request for request in self._waiting if not request.cancelled)

    def _hold(self, request: Request, tokens: int) -> bool:
        """Have pages for `tokens` tokens, taken from the youngest if need be; False when `request` had to go itself."""
        if not request.pages:
            return False
        while len(request.pages) * PAGE_TOKENS < tokens:
            if not self._free:
                with self._changed:
                    youngest = self._running.pop()
                    self._release(youngest)
                    self._waiting.appendleft(youngest)
                    self._counts["preempted"] += 1
                if youngest is request:
                    return False
                continue
            request.pages.append(self._free.pop())
        return True

    def _release(self, request: Request) -> None:
        self._free.extend(request.pages)
        request.pages, request.cached = [], 0

    def _fail_running(self, error: EngineError) -> list[Event]:
        with self._changed:
            failed, self._running = self._running, []
            for request in failed:
                self.cache.wipe(request.pages)
                self._release(request)
        return [Event(request, [], error=error) for request in failed if not request.cancelled]

    def _retry_after(self) -> float:
        """Seconds until the next request ends and the queue moves up: by the recent rate, at most by what is left."""
        left = min((request.max_tokens - request.generated for request in self._running), default=1)
        longest = left * self._step_seconds
        if len(self._finished_at) < 2:
            return longest
        rate = (len(self._finished_at) - 1) / max(time.monotonic() - self._finished_at[0], 1e-3)
        return min(longest, 1 / rate)


def sample(logits: torch.Tensor, rows: Sequence[Request]) -> list[int | None]:
    """The next token of each row; None where the logits hold no finite maximum. logits: (rows, vocab), float32.

    A row's token depends on its own logits, parameters and random stream alone, never on its neighbours.
    """
    top, best = logits.max(dim=-1)  # (rows,)
    chosen: list[int | None] = [
        int(token) if finite else None for token, finite in zip(best.tolist(), top.isfinite().tolist(), strict=True)
    ]
    warm = [i for i, row in enumerate(rows) if row.temperature > GREEDY_BELOW and chosen[i] is not None]
    for nucleus in (False, True):
        part = [i for i in warm if (rows[i].top_p < 1) is nucleus]
        if not part:
            continue
        heat = torch.tensor([[rows[i].temperature] for i in part], device=logits.device)
        # float64: 49,152 terms of a float32 sum lose the tail.
        weights = ((logits[part] - top[part, None]) / heat).softmax(-1).double()  # (part, vocab)
        order = None
        if nucleus:
            weights, order = weights.sort(dim=-1, descending=True, stable=True)
            limit = torch.tensor([[rows[i].top_p] for i in part], device=logits.device, dtype=torch.double)
            outside = weights.cumsum(-1) - weights >= limit
            outside[:, 0] = False  # top_p 0 still has the most likely token
            weights = weights.masked_fill(outside, 0)
        heaped = weights.cumsum(-1)
        draws = torch.tensor([[rows[i].draw.random()] for i in part], device=logits.device, dtype=torch.double)
        picks = torch.searchsorted(heaped, draws * heaped[:, -1:], right=True).clamp(max=logits.shape[-1] - 1)
        if order is not None:
            picks = order.gather(-1, picks)
        for i, token in zip(part, picks[:, 0].tolist(), strict=True):
            chosen[i] = int(token)
    return chosen
