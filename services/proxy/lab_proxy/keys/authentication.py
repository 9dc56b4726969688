"""Who asks: a virtual key becomes an identity, without a redis round trip for a key that was seen before.

What was verified is remembered while redis says that no key has changed (a counter, polled four times a second), and
for five minutes when redis says nothing. Knows headers; does not know what a request wants.
"""

from __future__ import annotations

import asyncio
import fnmatch
import hashlib
import hmac
import itertools
import logging
import re
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import redis.asyncio as redis
from pydantic import ValidationError

from ..errors import InvalidKey, KeysUnavailable
from ..ledger import money
from ..redis.link import FAULTS
from .store import DIGESTS, PREFIX, RECORDS, VERSION, Key, digest_of

log = logging.getLogger("lab_proxy.keys")

POLL_SECONDS = 0.25  # a revocation is everywhere within 1 s
POLL_TIMEOUT = 0.5
REMEMBERED_SECONDS = 300.0  # without redis
MOST_REMEMBERED = 10_000


@dataclass(frozen=True, slots=True)
class Identity:
    """Who asks, and on what terms. Budgets are pico-dollars; None: no limit."""

    tenant: str
    owner: str
    key_id: str | None = None
    models: tuple[str, ...] | None = None
    rpm: int | None = None
    tpm: int | None = None
    concurrency: int | None = None
    budget_day: int | None = None
    budget_total: int | None = None
    expires: float | None = None
    shared: bool = False  # the tenant is a namespace of several owners: only the admin flushes it

    limited: bool = field(init=False)  # the key has a limit that redis keeps count of; asked for with every request

    def __post_init__(self) -> None:
        limits = (self.rpm, self.tpm, self.concurrency, self.budget_day, self.budget_total)
        object.__setattr__(self, "limited", any(limit is not None for limit in limits))

    def allows(self, *names: str) -> bool:
        """One of these names of a model (its alias, say) is among those that the key is good for."""
        models = self.models
        return models is None or any(fnmatch.fnmatchcase(name, model) for model in models for name in names)


LOCAL = Identity(tenant="local", owner="local")
"""Everybody, where no key is asked for."""


class NoKeys:
    """What stands in for keys where none are asked for."""

    required = False

    async def start(self) -> None: ...

    async def stop(self) -> None: ...

    async def authenticate(self, headers: Mapping[str, str]) -> Identity:
        return LOCAL

    async def identity_of(self, key_id: str) -> Identity:
        raise InvalidKey(f"{key_id} means nothing while no key is asked for.")

    def is_admin(self, headers: Mapping[str, str]) -> bool:
        return False


class Authenticator:
    """Every caller shows a virtual key."""

    required = True

    def __init__(
        self,
        client: redis.Redis,
        *,
        timeout: float,
        admin_key: str | None = None,
        on_error: Callable[[str], None] = lambda _: None,
    ) -> None:
        """`timeout`: seconds for the look-up of a key that is not remembered. `on_error` hears of redis's failures."""
        self._redis = client
        self._timeout = timeout
        self._admin = hashlib.sha256(admin_key.encode()).digest() if admin_key else None
        self._on_error = on_error
        self._up = True
        self._version: bytes | str | None = None
        self._confirmed = 0.0  # time.monotonic() of redis's last word
        self._known: dict[bytes, tuple[Identity, float]] = {}  # digest -> who, and until when (unix seconds)
        self._asked: dict[bytes, asyncio.Future[Identity]] = {}  # look-ups under way
        self._watcher: asyncio.Task[None] | None = None

    async def start(self) -> None:
        await self._look()
        self._watcher = asyncio.get_running_loop().create_task(self._watch(), name="keys")

    async def stop(self) -> None:
        if self._watcher:
            self._watcher.cancel()
            await asyncio.gather(self._watcher, return_exceptions=True)

    def is_admin(self, headers: Mapping[str, str]) -> bool:
        """The caller shows the admin key. Compared in constant time."""
        given = _bearer(headers)
        if self._admin is None or given is None:
            return False
        return hmac.compare_digest(hashlib.sha256(given.encode()).digest(), self._admin)

    async def authenticate(self, headers: Mapping[str, str]) -> Identity:
        """Who asks. Raises KeyRefused, or KeysUnavailable for an unknown key while redis is down."""
        secret = _bearer(headers)
        if secret is None:
            raise InvalidKey("This proxy wants a key: send `Authorization: Bearer sk-lab-…`.")
        if not secret.startswith(PREFIX) or len(secret) > 200:
            raise InvalidKey("Not a key of this proxy: they begin with `sk-lab-`.")
        digest = digest_of(secret)  # the table is searched by digest: its timing tells nothing of a secret
        known = self._known.get(digest)
        if known is not None and time.monotonic() - self._confirmed < REMEMBERED_SECONDS:
            identity, until = known
            if until > time.time():
                return identity
        if not self._up:
            raise _unavailable()
        # One look-up for all who come with this key now; the one that asks may leave before the others.
        asked = self._asked.get(digest)
        if asked is None:
            asked = self._asked[digest] = asyncio.ensure_future(self._verify(digest))
            asked.add_done_callback(lambda done: (self._asked.pop(digest), done.exception()))
        return await asyncio.shield(asked)

    async def identity_of(self, key_id: str) -> Identity:
        """Who holds this key, as redis has it now: for work that goes on without its caller.

        Raises KeyRefused for a key that is gone, KeysUnavailable while redis is down.
        """
        try:
            async with asyncio.timeout(POLL_TIMEOUT):
                raw = await self._redis.hget(RECORDS, key_id)
        except FAULTS as error:
            self._fail(error)
            raise _unavailable() from None
        return _admitted(raw)[0]

    async def _verify(self, digest: bytes) -> Identity:
        try:
            began = time.monotonic()
            try:
                async with asyncio.timeout(self._timeout):
                    version, raw = await self._record(digest)
            except TimeoutError:
                if time.monotonic() - began < self._timeout * 1.5:
                    raise
                async with asyncio.timeout(self._timeout):  # not redis was late, but this process
                    version, raw = await self._record(digest)
        except FAULTS as error:
            self._fail(error)
            raise _unavailable() from None
        found = _admitted(raw, digest)
        # Not remembered where the watcher is further: it has reviewed what was remembered then, and will not again.
        if int(version or 0) >= int(self._version or 0):
            while len(self._known) >= MOST_REMEMBERED:
                del self._known[next(iter(self._known))]
            self._known[digest] = found
        return found[0]

    async def _record(self, digest: bytes) -> tuple[bytes | str | None, bytes | str | None]:
        """The version, and the key's record as of that version."""
        key_id = await self._redis.hget(DIGESTS, digest.hex()[:32])
        if key_id is None:
            return None, None
        pipe = self._redis.pipeline(transaction=True)
        pipe.get(VERSION)
        pipe.hget(RECORDS, key_id)
        version, raw = await pipe.execute()
        return version, raw

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(POLL_SECONDS)
            await self._look()

    async def _look(self) -> None:
        try:
            async with asyncio.timeout(POLL_TIMEOUT):
                version = await self._redis.get(VERSION)
            if version != self._version:
                async with asyncio.timeout(POLL_TIMEOUT * 10):
                    await self._review()
                self._version = version  # read before the records: a change in between is another version
        except FAULTS as error:
            self._fail(error)
            return
        self._confirmed = time.monotonic()
        if not self._up:
            self._up = True
            log.warning("keys: redis is back")

    async def _review(self) -> None:
        """Some key has changed: look up again those that are remembered."""
        digests = list(self._known)
        if not digests:
            return
        ids = await self._redis.hmget(DIGESTS, [digest.hex()[:32] for digest in digests])
        there = [key_id for key_id in ids if key_id is not None]
        found = await self._redis.hmget(RECORDS, there) if there else []
        raws = dict(zip(there, found, strict=True))
        for digest, key_id in zip(digests, ids, strict=True):
            try:
                self._known[digest] = _admitted(raws.get(key_id) if key_id else None, digest)
            except InvalidKey:
                self._known.pop(digest, None)

    def _fail(self, error: BaseException) -> None:
        self._on_error("keys")
        if self._up:
            self._up = False
            log.warning("keys: redis is down (%s); keys of the last 5 minutes go on", type(error).__name__)


def admin_key_weakness(admin_key: str) -> str | None:
    """Why this admin key could be guessed, or None. Never says the key."""
    if len(admin_key) < 24:
        return "it has fewer than 24 characters"
    lower = admin_key.lower()
    rest = lower
    for word in _COMMON:
        rest = rest.replace(word, "")
    if len(rest) < 20:
        return "most of it is common words"
    if admin_key in (admin_key + admin_key)[1:-1]:
        return "it repeats itself"
    steps = [ord(b) - ord(a) for a, b in itertools.pairwise(lower)]
    if sum(step in {-1, 0, 1} for step in steps) > len(steps) / 2:
        return "it runs through the alphabet or the digits"
    counts = Counter(admin_key)
    if len(counts) < 10 or max(counts.values()) > len(admin_key) / 3:
        return "it uses too few different characters"
    return None


_COMMON = (
    "administrator", "correct", "horse", "battery", "staple", "changeme", "change", "password", "passw0rd",
    "qwertyuiop", "qwerty", "letmein", "welcome", "default", "example", "insecure", "secret", "master", "replace",
    "student", "teacher", "admin", "dummy", "proxy", "openai", "litellm", "virtual", "token", "guest", "test",
    "root", "user", "sk-lab-", "sk-", "llm-lab", "llm", "lab", "key", "123456789", "12345678", "1234567", "123456",
    "12345", "1234", "abcdef", "abc",
)  # fmt: skip


def _bearer(headers: Mapping[str, str]) -> str | None:
    scheme, _, secret = headers.get("authorization", "").partition(" ")
    secret = secret.strip()
    return secret if scheme.lower() == "bearer" and re.fullmatch(r"[!-~]+", secret) else None


def _admitted(raw: bytes | str | None, digest: bytes | None = None) -> tuple[Identity, float]:
    """Who the key belongs to, and until when (unix seconds). Without a `digest` any of its secrets will do.

    Raises KeyRefused.
    """
    try:
        key = Key.model_validate_json(raw) if raw else None
    except ValidationError:
        log.error("keys: a record in redis is not one of ours")  # noqa: TRY400 its message would show the record
        key = None
    ours = digest.hex() if digest else key.secrets[0].digest if key else ""
    secret = next((each for each in key.secrets if hmac.compare_digest(each.digest, ours)), None) if key else None
    if key is None or secret is None:
        raise InvalidKey("This key is not known here.")
    if key.revoked is not None:
        raise InvalidKey("This key is revoked.")
    expires = key.expires.timestamp() if key.expires else None
    until = min(expires or float("inf"), secret.until or float("inf"))
    if until <= time.time():
        raise InvalidKey("This key has expired." if secret.until is None else "This key was rotated: use the new one.")
    return (
        Identity(
            tenant=f"shared:{key.namespace}" if key.namespace else key.owner,
            owner=key.owner,
            key_id=key.id,
            models=key.models,
            rpm=key.rpm,
            tpm=key.tpm,
            concurrency=key.concurrency,
            budget_day=None if key.budget_per_day_usd is None else money.from_usd(key.budget_per_day_usd),
            budget_total=None if key.budget_total_usd is None else money.from_usd(key.budget_total_usd),
            expires=expires,
            shared=key.namespace is not None,
        ),
        until,
    )


def _unavailable() -> KeysUnavailable:
    return KeysUnavailable(
        "Redis is down, and this key was not seen in the last 5 minutes: try again in a moment.",
        headers={"retry-after": "2"},
    )
