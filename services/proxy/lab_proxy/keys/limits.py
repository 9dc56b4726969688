"""How much a key may use: requests and tokens a minute, requests at once, dollars a day and in all.

One script in redis decides for all workers (limits.lua) and rides along with the cache's read. Requests and tokens are
counted by GCRA, a bucket that refills all the time, so that a minute's edge allows no second burst. Tokens are reserved
by an estimate and corrected when the answer is over; a slot of a worker that died comes back by itself.
"""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import logging
import math
import secrets
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from importlib import resources
from typing import Any, Literal, Protocol

import redis.asyncio as redis

from ..cache.entry import EMBEDDINGS
from ..cache.store import PipelinedCommand
from ..errors import BudgetExceeded, LimitReached, LimitsUnavailable, ProxyError
from ..ledger import money
from ..ledger.ledger import SUMS
from ..ledger.prices import Prices
from ..redis.link import FAULTS
from .authentication import Identity

log = logging.getLogger("lab_proxy.limits")

PREFIX = "lab:limit:"
SLOT_SECONDS = 15  # after its worker's last word, a request counts as over
RENEW_SECONDS = 5.0
SETTLE_SECONDS = 0.005  # what ends within it is told together, unless a slot waits for it
ASK_SECONDS = 0.06
MOST_UNTOLD = 20_000  # ends of requests that redis has not heard of; more are forgotten, and their slots run out
UNSAID_TOKENS = 256  # reserved for an answer whose length the caller does not limit; the real number corrects it
DATA_TOKENS = 1000  # reserved for an image or a sound in the prompt, whose bytes say nothing of its tokens
MEASURED_BYTES = 16_384  # of a body: only larger ones may hold such
MOST_TOKENS = 10**9
_UNKNOWN = 9 * 10**15  # a time that is later than all: nobody knows when it was admitted

SCRIPT = resources.files(__package__).joinpath("limits.lua").read_text("utf-8")
SHA = hashlib.sha1(SCRIPT.encode(), usedforsecurity=False).hexdigest()

_DAY, _TOTAL, _SLOTS, _REQUESTS, _TOKENS, _TOO_LARGE = range(1, 7)
_NAMES = ("", "budget_day", "budget_total", "concurrency", "rpm", "tpm", "tpm")


Ended = tuple[str, int, int, int]
"""A request that is over: its member, tokens used, tokens reserved, when it was admitted (redis's microseconds).

Without a member: one that redis has heard of as over, and what it used was not what was said then (now `reserved`).
"""


class Unbooked(Protocol):
    """The ledger as the limits see it."""

    def unflushed_cost(self, key_id: str) -> int:
        """Pico-dollars that are not in redis yet."""


class Admission:
    """One request's claim. A cache.Ask: `heard` or `unheard` says whether it may go on."""

    __slots__ = ("_at", "_carried", "_limits", "_over", "_used", "cost", "headers", "identity", "member", "reserved")

    def __init__(self, limits: Limits, identity: Identity, member: str, *, reserved: int, cost: int) -> None:
        """`reserved` tokens, and `cost` pico-dollars that the request may come to. No `member`: it is never settled."""
        self._limits = limits
        self.identity, self.member, self.reserved, self.cost = identity, member, reserved, cost
        self.headers: dict[str, str] = {}
        self._at = 0  # microseconds of redis's clock; 0: not admitted
        self._over = False
        self._used = 0
        self._carried: list[Ended] | None = None

    def command(self, whole: bool = False) -> tuple[Any, ...]:
        if self._carried is None:
            self._carried = self._limits.take_finished(self.identity)
        return self._limits.command(self.identity, self._carried, whole, self)

    def on_reply(self, reply: Any) -> None:
        """Raises LimitReached and BudgetSpent."""
        try:
            verdict, now, wait, *left = (int(each) for each in reply)
            requests, requests_full, tokens, tokens_full = left
        except (TypeError, ValueError):
            return self.on_failure()
        self._carried = None
        limits, who, headers = self._limits, self.identity, self.headers
        limits.mark_up(now)
        if who.rpm is not None:
            headers["x-ratelimit-limit-requests"] = str(who.rpm)
            headers["x-ratelimit-remaining-requests"] = str(requests)
            headers["x-ratelimit-reset-requests"] = duration(requests_full)
        if who.tpm is not None:
            headers["x-ratelimit-limit-tokens"] = str(who.tpm)
            headers["x-ratelimit-remaining-tokens"] = str(tokens)
            headers["x-ratelimit-reset-tokens"] = duration(tokens_full)
        if verdict:
            self._over = True
            limits.on_refusal(_NAMES[verdict])
            raise _refusal(self, verdict, wait=wait, now=now, left=tokens)
        if self.member:
            self._at = now
            limits.track(self)
        return None

    def on_failure(self) -> None:
        """Raises LimitsUnavailable where that is what the operator wants."""
        limits = self._limits
        limits.restore_finished(self.identity, self._carried or [])
        self._carried = None
        self._at = _UNKNOWN  # redis may have admitted it all the same
        limits.mark_down()
        self.headers["x-lab-limits"] = limits.when_down
        if limits.when_down == "closed":
            raise LimitsUnavailable(
                "Redis is down, so nobody knows what this key has used: try again in a moment.",
                headers={"retry-after": "2", "x-lab-limits": "closed"},
            )

    def settle(self, tokens: int) -> None:
        """The request is over and used so many tokens of an upstream: 0 for a hit. Later calls change nothing."""
        if self._over:
            return
        self._over = True
        if self._at:
            self._used = tokens
            self._limits.release(self, (self.member, tokens, self.reserved, self._at))

    def correct(self, tokens: int) -> None:
        """A request that is over really used so many tokens. Before its end it changes nothing."""
        if self._over and self._at and tokens != self._used and self.identity.tpm is not None:
            self._limits.add_correction(self, ("", tokens, self._used, self._at))
            self._used = tokens


class NoLimits:
    """What stands in for limits where no key has any."""

    async def start(self) -> None: ...

    async def stop(self) -> None: ...

    def admission(self, *_: Any, **__: Any) -> None:
        return None

    async def ask(self, admission: Any) -> None: ...


class Limits:
    """The limits of all keys, in redis. Hands out admissions and tells redis when they are over."""

    def __init__(
        self,
        client: redis.Redis,
        prices: Prices,
        ledger: Unbooked,
        *,
        when_down: Literal["open", "closed"],
        timeout: float = ASK_SECONDS,
        on_refusal: Callable[[str], None] = lambda _: None,
        on_error: Callable[[str], None] = lambda _: None,
    ) -> None:
        """`timeout`: seconds for a question that the cache cannot carry. `on_refusal` hears which limit it was."""
        self._redis = client
        self._prices, self._ledger = prices, ledger
        self.when_down = when_down
        self._timeout = timeout
        self.on_refusal = on_refusal
        self._on_error = on_error
        self._up = True
        self._worker = secrets.token_hex(6)
        self._numbers = itertools.count(1)
        self._finished: dict[Identity, list[Ended]] = {}  # what redis has not heard of
        self._unsent = 0
        self._running: dict[str, Admission] = {}
        self._skew = 0.0  # seconds that redis's clock is ahead
        self._some, self._soon = asyncio.Event(), asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        loop = asyncio.get_running_loop()
        self._tasks = [loop.create_task(self._tell(), name="limits"), loop.create_task(self._renew(), name="slots")]

    async def stop(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._settle()

    def admission(  # noqa: PLR0917 all that a limit can be about
        self,
        identity: Identity,
        endpoint: str,
        model: str,
        body: Mapping[str, Any],
        size_bytes: int,
        upstream: str,
        *,
        at_once: bool = False,
    ) -> Admission | None:
        """None for a key without limits. `size_bytes`: of the request's body. `at_once`: its answer is at hand, so that
        it takes neither slot nor tokens from others, and there is nothing to settle."""
        if not identity.limited:
            return None
        prompt, completion = estimate(endpoint, body, size_bytes, identity.tpm)
        reserved = min(prompt + completion, MOST_TOKENS) if identity.tpm is not None else 0
        if at_once:
            return Admission(self, identity, "", reserved=reserved, cost=0)
        cost = 0
        if identity.budget_day is not None or identity.budget_total is not None:
            cost = min(self._prices.cost(upstream, model, prompt, completion) or 0, 9 * 10**15)
        # The script reads the cost from the member: it goes with the slot, also where the slot just runs out.
        return Admission(self, identity, f"{self._worker}-{next(self._numbers)}:{cost}", reserved=reserved, cost=cost)

    async def ask(self, admission: PipelinedCommand) -> None:
        """The question by itself, where no read of the cache carries it. Raises like Admission.heard and .unheard."""
        try:
            async with asyncio.timeout(self._timeout):
                reply = await self._redis.execute_command(*admission.command(whole=True))  # type: ignore[no-untyped-call]
        except FAULTS:
            return admission.on_failure()
        return admission.on_reply(reply)

    # ---- what an admission tells

    def command(self, who: Identity, over: list[Ended], whole: bool, claim: Admission | None) -> tuple[Any, ...]:
        """The script with its arguments. Without a claim nothing is asked, only told what is over."""
        limits = (who.rpm, who.tpm, who.concurrency, who.budget_day, who.budget_total)
        if claim is None:
            limits = (None, who.tpm, None, None, None)
        return (
            *(("EVAL", SCRIPT) if whole else ("EVALSHA", SHA)),
            3,
            _name(who),
            _slots(who),
            f"{SUMS}{who.key_id}",
            *("" if limit is None else limit for limit in limits),
            *((0, 0, "") if claim is None else (claim.reserved, claim.cost, claim.member)),
            SLOT_SECONDS,
            f"day:{datetime.now(UTC).date().isoformat()}" if who.budget_day is not None else "-",
            self._ledger.unflushed_cost(who.key_id or ""),
            *itertools.chain.from_iterable(over),
        )

    def take_finished(self, who: Identity) -> list[Ended]:
        """What is over of this key: it rides along with the next question."""
        taken = self._finished.pop(who, [])
        self._unsent -= len(taken)
        return taken

    def restore_finished(self, who: Identity, carried: list[Ended]) -> None:
        """Redis may not have heard it; what is told twice counts once, but for corrections, which are told once."""
        for each in carried:
            if each[0]:
                self._put(who, each)

    def track(self, admission: Admission) -> None:
        self._running[admission.member] = admission

    def release(self, admission: Admission, told: Ended) -> None:
        self._running.pop(admission.member, None)
        self._put(admission.identity, told)
        if admission.identity.concurrency is not None:
            self._soon.set()
        self._some.set()

    def add_correction(self, admission: Admission, told: Ended) -> None:
        self._put(admission.identity, told)
        self._some.set()

    def mark_up(self, now: int) -> None:
        """`now`: redis's clock, microseconds."""
        self._skew = now / 1e6 - time.time()
        if not self._up:
            self._up = True
            log.warning("limits: redis is back")

    def mark_down(self) -> None:
        self._on_error("limits")
        if self._up:
            self._up = False
            log.warning("limits: redis is down; requests of limited keys are %s", _WHEN_DOWN[self.when_down])

    def _put(self, who: Identity, told: Ended) -> None:
        if self._unsent < MOST_UNTOLD:
            self._finished.setdefault(who, []).append(told)
            self._unsent += 1

    # ---- in the background

    async def _tell(self) -> None:
        while True:
            await self._some.wait()
            if not self._soon.is_set():
                try:
                    async with asyncio.timeout(SETTLE_SECONDS):
                        await self._soon.wait()
                except TimeoutError:
                    pass
            self._some.clear()
            self._soon.clear()
            if not await self._settle():
                await asyncio.sleep(0.5)
                self._some.set()

    async def _settle(self) -> bool:
        """Tell redis what is over. False when it does not listen."""
        told = [(who, self.take_finished(who)) for who in list(self._finished)]
        if not told:
            return True
        pipe = self._redis.pipeline(transaction=False)
        for who, over in told:
            for at in range(0, len(over), 500):
                pipe.execute_command(*self.command(who, over[at : at + 500], True, None))
        try:
            async with asyncio.timeout(1.0):
                await pipe.execute()
        except FAULTS:
            for who, over in told:
                self.restore_finished(who, over)
            return False
        return True

    async def _renew(self) -> None:
        """Slots of requests that go on."""
        while True:
            await asyncio.sleep(RENEW_SECONDS)
            slots: dict[str, list[str]] = {}
            for admission in self._running.values():
                slots.setdefault(_slots(admission.identity), []).append(admission.member)
            if not slots:
                continue
            until = (time.time() + self._skew + SLOT_SECONDS) * 1e6
            pipe = self._redis.pipeline(transaction=False)
            for name, members in slots.items():
                pipe.zadd(name, dict.fromkeys(members, until), xx=True)
                pipe.expire(name, SLOT_SECONDS * 2)
            try:
                async with asyncio.timeout(2.0):
                    await pipe.execute()
            except FAULTS:
                self._on_error("limits")


_WHEN_DOWN = {"open": "let through unlimited", "closed": "refused"}


def estimate(endpoint: str, body: Mapping[str, Any], size_bytes: int, tpm: int | None) -> tuple[int, int]:
    """Tokens that the prompt may have (a quarter of its bytes) and that the answer may get.

    A length that the caller did not limit is a guess, which alone never makes a request too large for its limit.
    """
    prompt = max(1, (size_bytes if size_bytes <= MEASURED_BYTES else _text(body)) // 4)
    if endpoint == EMBEDDINGS:
        return prompt, 0
    said = body.get("max_completion_tokens") or body.get("max_tokens") or body.get("max_output_tokens")
    many = body.get("n")
    times = many if isinstance(many, int) and not isinstance(many, bool) and many > 0 else 1
    if isinstance(said, int) and not isinstance(said, bool) and said > 0:
        return prompt, min(said * times, MOST_TOKENS)
    guess = UNSAID_TOKENS * min(times, MOST_TOKENS)
    return prompt, guess if tpm is None else max(0, min(guess, tpm - prompt))


def _text(value: Any) -> int:
    """Bytes of the strings inside; data URLs and sounds count as DATA_TOKENS."""
    if isinstance(value, str):
        if value.startswith("data:") or (len(value) > MEASURED_BYTES and " " not in value[:MEASURED_BYTES]):
            return min(len(value), DATA_TOKENS * 4)
        return len(value.encode("utf-8", "replace"))
    if isinstance(value, dict):
        return sum(len(name) + _text(inner) for name, inner in value.items())
    if isinstance(value, list):
        return sum(map(_text, value)) + 4 * sum(isinstance(each, int) for each in value)  # token ids
    return 0


def duration(microseconds: int) -> str:
    """As OpenAI's headers say it: `120ms`, `7.66s`, `6m0s`, `1h2m3s`; rounded up to a millisecond."""
    ms = math.ceil(microseconds / 1000)
    if ms < 1000:
        return f"{ms}ms" if ms else "0s"
    minutes, rest = divmod(ms, 60_000)
    hours, minutes = divmod(minutes, 60)
    seconds = f"{rest / 1000:.3f}".rstrip("0").rstrip(".")
    return f"{f'{hours}h' if hours else ''}{f'{minutes}m' if hours or minutes else ''}{seconds}s"


def _name(who: Identity) -> str:
    return f"{PREFIX}{{{who.key_id}}}"


def _slots(who: Identity) -> str:
    return f"{PREFIX}{{{who.key_id}}}:slots"


def _refusal(admission: Admission, verdict: int, *, wait: int, now: int, left: int) -> ProxyError:
    """`wait` and `now` in microseconds, `left` in tokens."""
    who, said = admission.identity, dict(admission.headers)
    if verdict == _TOTAL:
        return BudgetExceeded(f"This key's budget of {money.shown(who.budget_total or 0)} USD is spent.", headers=said)
    if verdict == _DAY:
        said["retry-after"] = str(86400 - now // 1_000_000 % 86400)
        budget = money.shown(who.budget_day or 0)
        return BudgetExceeded(
            f"This key's budget of {budget} USD a day is spent: it begins anew at midnight UTC.", headers=said
        )
    if verdict == _TOO_LARGE:  # waiting does not help
        why = f"Limit {who.tpm}, Requested {admission.reserved}. Ask for fewer tokens."
        return LimitReached(f"Request too large for this key on tokens per min (TPM): {why}", "tokens", said)
    said["retry-after"] = str(math.ceil(wait / 1e6))
    said["retry-after-ms"] = str(math.ceil(wait / 1000))
    kind, why = {
        _SLOTS: ("requests", f"concurrent requests: Limit {who.concurrency}."),
        _REQUESTS: ("requests", f"requests per min (RPM): Limit {who.rpm}."),
        _TOKENS: ("tokens", f"tokens per min (TPM): Limit {who.tpm}, Left {left}, Requested {admission.reserved}."),
    }[verdict]
    return LimitReached(f"Rate limit reached for this key on {why} Please try again in {duration(wait)}.", kind, said)
