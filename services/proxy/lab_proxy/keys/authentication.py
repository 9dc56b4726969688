"""Authentication: a virtual key becomes an identity, without a redis round trip for a key that was verified before.

Verified keys are cached as long as redis reports no change of keys (a version, polled four times a second), and for
five minutes while redis is down. Knows headers; not the requests' meaning.
"""

import asyncio
import hashlib
import hmac
import logging
import re
import time
from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from ..errors import InvalidKey, KeysUnavailable
from ..ledger import money
from ..redis.client import Client, OnError, Script
from ..redis.connection import RedisError
from ..tasks import end, supervise
from .identity import LOCAL, Identity
from .store import DIGESTS, PREFIX, RECORDS, VERSION, Key, digest_of

log = logging.getLogger("lab_proxy.keys")

POLL_SECONDS = 0.25  # a revocation takes effect everywhere within 1 s
REVIEW_TIMEOUT = 5.0
VERIFIED_SECONDS = 300.0  # while redis is down
MAX_VERIFIED = 10_000

# KEYS: digests, records, version. ARGV: the first half of a digest. Answers the record and the version.
_LOOKUP = Script("""
local id = redis.call('HGET', KEYS[1], ARGV[1])
return {id and redis.call('HGET', KEYS[2], id), redis.call('GET', KEYS[3])}
""")
_SECRET = re.compile(r"[!-~]+")


class Authenticator:
    """Finds the identities of callers. A part: start and stop it."""

    def __init__(
        self,
        client: Client,
        *,
        required: bool = True,
        timeout: float,
        admin_key: str | None = None,
        on_error: OnError = lambda _: None,
    ) -> None:
        """`required`: every caller needs a virtual key; otherwise all are LOCAL. `timeout`: seconds to look up a key
        that is not cached. `on_error` is called for each failure of redis."""
        self.required = required
        self._redis = client
        self._timeout = timeout
        self._admin = hashlib.sha256(admin_key.encode()).digest() if admin_key else None
        self.has_admin = self._admin is not None
        self._on_error = on_error
        self._up = True
        self._version: bytes | None = None
        self._confirmed = 0.0  # time.monotonic() of redis's last reply
        self._verified: dict[bytes, tuple[Identity, float]] = {}  # digest -> identity, and its end (unix seconds)
        self._lookups: dict[bytes, asyncio.Future[Identity]] = {}  # look-ups in flight
        self._poller: asyncio.Task[None] | None = None

    async def start(self) -> None:
        if not self.required:
            return
        await self._poll()
        self._poller = supervise("keys", self._poll_forever)

    async def stop(self) -> None:
        await end(self._poller)

    def is_admin(self, headers: Mapping[str, str]) -> bool:
        """Whether the request has the admin key. Compares in constant time."""
        given = _bearer(headers) if self._admin else None
        return given is not None and hmac.compare_digest(hashlib.sha256(given.encode()).digest(), self._admin or b"")

    async def authenticate(self, headers: Mapping[str, str]) -> Identity:
        """The caller's identity. Raises InvalidKey, or KeysUnavailable for an unverified key while redis is down."""
        if not self.required:
            return LOCAL
        secret = _bearer(headers)
        if secret is None:
            raise InvalidKey("This proxy requires a key: send `Authorization: Bearer sk-lab-…`.")
        if not secret.startswith(PREFIX) or len(secret) > 200:
            raise InvalidKey("This is not a key of this proxy: its keys begin with `sk-lab-`.")
        digest = digest_of(secret)  # looked up by digest, so that timing reveals nothing of the secret
        known = self._verified.get(digest)
        if known is not None and time.monotonic() - self._confirmed < VERIFIED_SECONDS:
            identity, until = known
            if until > time.time():
                return identity
        if not self._up:
            raise _unavailable()
        # Requests with the same key share one look-up. It is shielded: its first caller may leave before the others.
        lookup = self._lookups.get(digest)
        if lookup is None:
            lookup = self._lookups[digest] = asyncio.ensure_future(self._verify(digest))
            lookup.add_done_callback(lambda done: (self._lookups.pop(digest), done.exception()))
        return await asyncio.shield(lookup)

    async def identity_of(self, key_id: str) -> Identity:
        """The identity of a key by its id, as currently stored: for work that runs without its caller. Raises
        InvalidKey for a revoked or expired key, KeysUnavailable while redis is down."""
        if not self.required:
            raise InvalidKey(f"{key_id} cannot be used: the proxy does not require keys.")
        return _identity_of(await self._execute("HGET", RECORDS, key_id))[0]

    async def _verify(self, digest: bytes) -> Identity:
        raw, version = await self._execute(*_LOOKUP((DIGESTS, RECORDS, VERSION), digest.hex()[:32]))
        found = _identity_of(raw, digest)
        # Not cached if the poller has seen a later version: it has reviewed the cached keys of that version already.
        if int(version or 0) >= int(self._version or 0):
            while len(self._verified) >= MAX_VERIFIED:
                del self._verified[next(iter(self._verified))]
            self._verified[digest] = found
        return found[0]

    async def _execute(self, *command: Any) -> Any:
        """The reply of redis. Raises KeysUnavailable."""
        try:
            return await self._redis.execute(*command, within=self._timeout)
        except RedisError as error:
            self._fail(error)
            raise _unavailable() from None

    async def _poll_forever(self) -> None:
        while True:
            await asyncio.sleep(POLL_SECONDS)
            await self._poll()

    async def _poll(self) -> None:
        try:
            version = await self._redis.execute("GET", VERSION)
            if version != self._version:
                await self._review()
                self._version = version  # read before the records: a later change has another version
        except RedisError as error:
            self._fail(error)
            return
        self._confirmed = time.monotonic()
        if not self._up:
            self._up = True
            log.warning("keys: redis is back")

    async def _review(self) -> None:
        """Some key has changed: look up all cached keys again."""
        digests = list(self._verified)
        if not digests:
            return
        halves = (digest.hex()[:32] for digest in digests)
        ids = await self._redis.execute("HMGET", DIGESTS, *halves, within=REVIEW_TIMEOUT)
        names = (key_id or "" for key_id in ids)  # no key has an empty id
        raws = await self._redis.execute("HMGET", RECORDS, *names, within=REVIEW_TIMEOUT)
        for digest, raw in zip(digests, raws, strict=True):
            try:
                self._verified[digest] = _identity_of(raw, digest)
            except InvalidKey:
                self._verified.pop(digest, None)

    def _fail(self, error: RedisError) -> None:
        self._on_error("keys")
        if self._up:
            self._up = False
            log.warning("keys: redis is down (%s); keys verified in the last 5 minutes stay valid", error)


def _bearer(headers: Mapping[str, str]) -> str | None:
    scheme, _, secret = headers.get("authorization", "").partition(" ")
    secret = secret.strip()
    return secret if scheme.lower() == "bearer" and _SECRET.fullmatch(secret) else None


def _identity_of(raw: bytes | None, digest: bytes | None = None) -> tuple[Identity, float]:
    """The identity of a stored key, and its end (unix seconds). Without a `digest` any of its secrets counts. Raises
    InvalidKey."""
    try:
        key = Key.model_validate_json(raw) if raw else None
    except ValidationError:  # fields of other types, amounts out of range
        log.error("keys: a record in redis is not a key")  # noqa: TRY400 its message would show the record
        key = None
    ours = digest.hex() if digest else key.secrets[0].digest if key else ""
    secret = next((each for each in key.secrets if hmac.compare_digest(each.digest, ours)), None) if key else None
    if key is None or secret is None:
        raise InvalidKey("The proxy does not know this key.")
    if key.revoked is not None:
        raise InvalidKey("This key is revoked.")
    expires = key.expires.timestamp() if key.expires else None
    until = min(expires or float("inf"), secret.until or float("inf"))
    if until <= time.time():
        raise InvalidKey("This key has expired." if secret.until is None else "This key was rotated: use the new one.")
    day, total = (usd if usd is None else money.from_usd(usd) for usd in (key.budget_per_day_usd, key.budget_total_usd))
    tenant = f"shared:{key.namespace}" if key.namespace else key.owner
    who = (tenant, key.owner, key.id, key.models, key.rpm, key.tpm, key.concurrency)
    return Identity(*who, day, total, expires, key.namespace is not None), until


def _unavailable() -> KeysUnavailable:
    return KeysUnavailable(
        "Redis is down, and this key was not used in the last 5 minutes: try again in a moment.",
        headers={"retry-after": "2"},
    )
