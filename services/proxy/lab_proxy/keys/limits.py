"""Limits of a key: requests and tokens per minute, concurrent requests, budgets per day and in total; and the caps of
upstreams, which all keys share.

One redis script decides for all processes (limits.lua). For a key it is sent with the cache's read. For a cap it is
sent before each call of the upstream: only then is it known that there is a call, and of which upstream. Requests and
tokens are counted by GCRA, a continuously refilled bucket, so that no second burst is possible at the edge of a minute.
Tokens are reserved by an estimate and corrected at the end of the answer; slots of a dead process expire.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import secrets
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from importlib import resources
from typing import Any, Literal

from ..errors import LimitsUnavailable
from ..ledger.ledger import SUMS, UPSTREAM_SUMS, Ledger
from ..ledger.prices import Prices
from ..ledger.usage import NOBODY
from ..long_bodies import LONG_BODY
from ..redis.client import Client, OnError, Script
from ..redis.connection import Command, RedisError
from ..tasks import end, supervise
from ..upstreams.routes import UpstreamConfig
from .estimate import MAX_TOKENS, estimate
from .identity import CapShare, Identity
from .refusal import NAMES, duration, refusal

log = logging.getLogger("lab_proxy.limits")

PREFIX = "lab:limit:"
SLOT_SECONDS = 15  # a request counts as finished so long after its process's last renewal
STATE_SECONDS = 150  # above the script's own: two minutes, and the slot
RENEW_SECONDS = 5.0
SETTLE_SECONDS = 0.005  # requests that end within it are sent together, unless the key has a concurrency limit
CHECK_SECONDS = 0.06
MAX_UNSENT = 20_000  # finished requests not yet sent to redis; further ones are dropped, and their slots expire
_UNKNOWN = 9 * 10**15  # later than any time: the time of admission is unknown

SCRIPT = Script(resources.files(__package__).joinpath("limits.lua").read_text("utf-8"))


Finished = tuple[str, int, int, int]
"""A finished request: member, tokens used, tokens reserved, time of admission (microseconds of redis's clock).

Without a member: a correction of a request that redis already has as finished; `reserved` is the number sent then.
"""


@dataclass(slots=True, eq=False)
class Admission:
    """One request's claim on its key's limits: a PipelinedCommand that raises if the request is refused."""

    limits: Limits
    identity: Identity
    member: str  # empty if it needs no settling
    reserved: int  # tokens
    cost: int  # the most it may cost, in pico-dollars
    headers: dict[str, str] = field(default_factory=dict)
    _at: int = 0  # microseconds of redis's clock; 0: not admitted
    _over: bool = False
    _used: int = 0
    _taken: list[Finished] | None = None

    def command(self) -> Command:
        if self._taken is None:
            self._taken = self.limits.take_finished(self.identity)
        return self.limits.command(self.identity, self._taken, self)

    def on_reply(self, reply: Any) -> None:
        """Raises LimitReached and BudgetExceeded."""
        try:
            verdict, now, wait, requests, requests_full, tokens, tokens_full = map(int, reply)
        except (TypeError, ValueError):
            return self.on_failure()
        self._taken = None
        limits, who, headers = self.limits, self.identity, self.headers
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
            limits.on_refusal(("upstream_" if isinstance(who, CapShare) else "") + NAMES[verdict])
            raise refusal(who, verdict, headers, wait=wait, now=now, left=tokens, requested=self.reserved)
        if self.member:
            self._at = now
            limits.running[self.member] = self
        return None

    def on_failure(self) -> None:
        """Raises LimitsUnavailable if the settings say `closed`."""
        limits = self.limits
        limits.restore_finished(self.identity, self._taken or [])
        self._taken = None
        self._at = _UNKNOWN  # redis may have admitted it nevertheless
        limits.mark_down()
        self.headers["x-lab-limits"] = limits.when_down
        if limits.when_down == "closed":
            raise LimitsUnavailable(
                "Redis is down, so this key's usage is unknown: retry in a moment.",
                headers={"retry-after": "2", "x-lab-limits": "closed"},
            )

    def settle(self, tokens: int) -> None:
        """The request has ended and used `tokens` of an upstream, 0 for a hit. Further calls change nothing."""
        if self._over:
            return
        self._over = True
        if self._taken is not None:  # cancelled before the reply: redis may have admitted it, and the others' ends
            self.limits.restore_finished(self.identity, self._taken)
            self._taken, self._at = None, _UNKNOWN
        if self._at and self.member:
            self._used = tokens
            self.limits.running.pop(self.member, None)
            self.limits.finish(self.identity, (self.member, tokens, self.reserved, self._at))

    def count(self, tokens: int) -> None:
        """The request has ended and used `tokens`, or it is known by now that it did."""
        self.settle(tokens)
        self.correct(tokens)

    def correct(self, tokens: int) -> None:
        """Correct the tokens of an ended request. Before its end this changes nothing."""
        if self._over and self._at and self.member and tokens != self._used and self.identity.tpm is not None:
            self.limits.finish(self.identity, ("", tokens, self._used, self._at))
            self._used = tokens


class Limits:
    """The limits of all keys, in redis. Creates admissions and sends finished ones. A part: start and stop it."""

    def __init__(
        self,
        client: Client,
        prices: Prices,
        ledger: Ledger,
        *,
        when_down: Literal["open", "closed"],
        timeout: float = CHECK_SECONDS,
        on_refusal: Callable[[str], None] = lambda _: None,
        on_error: OnError = lambda _: None,
    ) -> None:
        """`timeout`: of a check that is not sent with a cache read. `on_refusal` gets the name of the limit."""
        self._redis = client
        self._prices, self._ledger = prices, ledger
        self.when_down = when_down
        self._timeout = timeout
        self.on_refusal = on_refusal
        self._on_error = on_error
        self._up = True
        self._process = secrets.token_hex(6)
        self._numbers = itertools.count(1)
        self._finished: dict[Identity, list[Finished]] = {}  # not yet sent to redis
        self._unsent = 0
        self._sending: dict[Identity, list[Finished]] = {}  # sent, not confirmed
        self.running: dict[str, Admission] = {}  # admitted requests, by member
        self._skew = 0.0  # seconds by which redis's clock is ahead
        self._some, self._soon = asyncio.Event(), asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        self._tasks = [supervise("limits", self._send_forever), supervise("limits-slots", self._renew_slots)]

    async def stop(self) -> None:
        await end(*self._tasks)
        await self._send_finished()

    async def admission(  # noqa: PLR0917 - all that a limit depends on
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
        """None for a key without limits. `size_bytes`: of the request's body. `at_once`: for a local hit, which
        takes no slot and no tokens, and needs no settling."""
        if not identity.limited:
            return None
        what = (endpoint, body, size_bytes, identity.tpm)
        prompt, completion = estimate(*what) if size_bytes <= LONG_BODY else await asyncio.to_thread(estimate, *what)
        reserved = min(prompt + completion, MAX_TOKENS) if identity.tpm is not None else 0
        if at_once:
            return Admission(self, identity, "", reserved, 0)
        cost = 0
        if identity.budget_day is not None or identity.budget_total is not None:
            cost = min(self._prices.cost(upstream, model, prompt, completion) or 0, 9 * 10**15)
        # The script reads the cost from the member, so that it is released with the slot, also when the slot expires.
        return Admission(self, identity, f"{self._process}-{next(self._numbers)}:{cost}", reserved, cost)

    async def count(self, identity: Identity) -> None:
        """Count a request that no model answers against RPM. Raises like `check`."""
        if identity.limited:
            admission = Admission(self, identity, "", 0, 0)
            try:
                await self.check(admission)
            finally:
                admission.settle(0)

    async def claim_call(  # noqa: PLR0917 - all that a cap depends on
        self,
        caller: Identity,
        upstream: UpstreamConfig,
        endpoint: str,
        model: str,
        body: Mapping[str, Any],
        size_bytes: int,
    ) -> Admission | None:
        """Count a call against its upstream's cap; None if there is none. Settle it at the end of the call. Raises like
        `check`: a refused call does not count."""
        cap = upstream.cap
        if cap is None:
            return None
        name = upstream.name
        share = CapShare(
            tenant="",
            owner=caller.key_id or NOBODY,
            key_id=f"upstream:{name}",
            rpm=cap.rpm,
            tpm=cap.tpm,
            budget_day=cap.day,
            upstream=name,
        )
        admission = await self.admission(share, endpoint, model, body, size_bytes, name)
        if admission is not None:
            try:
                await self.check(admission)
            except BaseException:  # cancelled too: redis may have admitted it
                admission.settle(0)
                raise
        return admission

    async def check(self, admission: Admission) -> None:
        """Check without a cache read. Raises like Admission.on_reply and .on_failure."""
        try:
            reply = await self._redis.execute(*admission.command(), within=self._timeout)
        except RedisError:
            return admission.on_failure()
        return admission.on_reply(reply)

    # ---- for admissions

    def command(self, who: Identity, finished: list[Finished], claim: Admission | None) -> Command:
        """The script with its arguments. Without a claim it only sends finished requests."""
        limits = (who.rpm, who.tpm, who.concurrency, who.budget_day, who.budget_total)
        if claim is None:
            limits = (None, who.tpm, None, None, None)
        name, day = f"{PREFIX}{{{who.key_id}}}", self._ledger.today()
        names, spent, caller = [name, _slots(who), f"{SUMS}{who.key_id}"], f"day:{day}", ""
        if isinstance(who, CapShare):
            names[2:] = [f"{UPSTREAM_SUMS}{day}:{who.upstream}", f"{name}:shares", f"{name}:active"]
            spent, caller = "total", who.owner
        return SCRIPT(
            names,
            *("" if limit is None else limit for limit in limits),
            *((0, 0, "") if claim is None else (claim.reserved, claim.cost, claim.member)),
            SLOT_SECONDS,
            spent if who.budget_day is not None else "-",
            self._ledger.unflushed_cost(who.key_id or ""),
            caller,
            *itertools.chain.from_iterable(finished),
        )

    def take_finished(self, who: Identity) -> list[Finished]:
        """Finished requests of this key, to be sent with the next command."""
        taken = self._finished.pop(who, [])
        self._unsent -= len(taken)
        # Those being sent use another connection and may arrive after this command. If sent twice, they count once.
        sending = self._sending.get(who, ()) if who.concurrency is not None else ()
        return [each for each in sending if each[0]] + taken

    def restore_finished(self, who: Identity, taken: list[Finished]) -> None:
        """Redis may not have them. Sent twice they count once, except corrections, which are never repeated."""
        for each in taken:
            if each[0]:
                self._put(who, each)

    def finish(self, who: Identity, finished: Finished) -> None:
        """Send a finished request, or a correction of one, soon."""
        self._put(who, finished)
        if finished[0] and who.concurrency is not None:
            self._soon.set()
        self._some.set()

    def mark_up(self, now: int) -> None:
        """Redis has answered. `now`: its clock in microseconds."""
        self._skew = now / 1e6 - time.time()
        if not self._up:
            self._up = True
            log.warning("limits: redis is back")

    def mark_down(self) -> None:
        self._on_error("limits")
        if self._up:
            self._up = False
            fate = {"open": "admitted without limits", "closed": "refused"}[self.when_down]
            log.warning("limits: redis is down; requests of limited keys are %s", fate)

    def _put(self, who: Identity, finished: Finished) -> None:
        if self._unsent < MAX_UNSENT:
            self._finished.setdefault(who, []).append(finished)
            self._unsent += 1

    # ---- in the background

    async def _send_forever(self) -> None:
        while True:
            await self._some.wait()
            with suppress(TimeoutError):
                async with asyncio.timeout(SETTLE_SECONDS):
                    await self._soon.wait()
            self._some.clear()
            self._soon.clear()
            if not await self._send_finished():
                await asyncio.sleep(0.5)
                self._some.set()

    async def _send_finished(self) -> bool:
        """Send finished requests to redis. False if it fails."""
        by_key = [(who, self.take_finished(who)) for who in list(self._finished)]
        if not by_key:
            return True
        parts = ((who, each[at : at + 500]) for who, each in by_key for at in range(0, len(each), 500))
        self._sending = dict(by_key)
        try:
            await self._redis.execute_all([self.command(who, finished, None) for who, finished in parts])
        except RedisError:
            for who, finished in by_key:
                self.restore_finished(who, finished)
            return False
        finally:
            self._sending = {}
        return True

    async def _renew_slots(self) -> None:
        """Renew the slots of running requests."""
        while True:
            await asyncio.sleep(RENEW_SECONDS)
            slots: dict[str, list[str]] = {}
            for admission in self.running.values():
                slots.setdefault(_slots(admission.identity), []).append(admission.member)
            if not slots:
                continue
            until = (time.time() + self._skew + SLOT_SECONDS) * 1e6
            commands: list[Command] = []
            for name, members in slots.items():
                commands.append(("ZADD", name, "XX", *(each for member in members for each in (until, member))))
                commands.append(("EXPIRE", name, SLOT_SECONDS * 2))
                # The held cost of running requests is stored there, so it must live longer than they do. The script
                # sets a shorter expiry.
                commands.append(("EXPIRE", name.removesuffix(":slots"), STATE_SECONDS))
            try:
                await self._redis.execute_all(commands)
            except RedisError:
                self._on_error("limits")


def _slots(who: Identity) -> str:
    return f"{PREFIX}{{{who.key_id}}}:slots"
