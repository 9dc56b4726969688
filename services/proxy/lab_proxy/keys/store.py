"""Storage of virtual keys in redis: create, list, change, rotate, revoke. Secrets are stored as hashes.

A secret is 256 random bits, so a plain SHA-256 is safe: a slow hash protects short passwords and would only cost time
at a key's first use. `create` and `rotate` return the secret once; it is stored nowhere. Used by the command line and
the operator's pages. Knows nothing of requests.
"""

from __future__ import annotations

import hashlib
import re
import secrets
import time
import unicodedata
from collections.abc import Awaitable, Callable, Sequence
from datetime import UTC, datetime
from decimal import Decimal
from typing import Annotated, Any, Literal

import redis.asyncio as redis
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from redis.asyncio.client import Pipeline
from redis.exceptions import WatchError

from ..errors import InvalidRequest, KeyNotFound
from ..ledger import money

PREFIX = "sk-lab-"
RECORDS = "lab:key:records"  # hash: id -> record
DIGESTS = "lab:key:digests"  # hash: the first half of a secret's SHA-256 -> id
VERSION = "lab:key:version"  # grows with every change; processes poll it
MAX_AT_ONCE = 10_000
MAX_GRACE = 30 * 86400
RESERVED = frozenset({"local"})  # the tenant of callers without keys
_NAME = re.compile(r"[\w.@+-](?:[\w .@+-]{0,62}[\w.@+-])?")
_MODEL = re.compile(r"[\w./:@*?\[\]+-]{1,200}")


def _name(value: object) -> object:
    """NFC, printable, and without `:`, which separates parts of redis names."""
    if not isinstance(value, str):
        return value
    name = unicodedata.normalize("NFC", value.strip())
    if not _NAME.fullmatch(name):
        raise ValueError("takes 1 to 64 letters, digits, spaces and any of . @ + - _")
    if name in RESERVED:
        raise ValueError(f"{name!r} is the tenant of callers without keys: choose another name")
    return name


def _list(value: object) -> object:
    names = re.split(r"[,;\s]+", value.strip()) if isinstance(value, str) else value
    if isinstance(names, list | tuple):
        kept = tuple(name for name in names if name)
        if not all(isinstance(name, str) and _MODEL.fullmatch(name) for name in kept):
            raise ValueError("must be names of models, or shell patterns of them")
        return kept or None
    return names


def _usd(value: object) -> object:
    if isinstance(value, bool):
        raise ValueError("must be an amount in USD")  # noqa: TRY004 - pydantic expects ValueError
    if isinstance(value, int | float | str):
        value = Decimal(str(value)) if re.fullmatch(r"\s*[0-9.]+\s*", str(value)) else value
    if isinstance(value, Decimal):
        money.from_usd(value)
    return value


def _count(value: object) -> object:
    if isinstance(value, bool):
        raise ValueError("must be a whole number")  # noqa: TRY004 - as above
    return value


def _time(value: object) -> object:
    """A day means its last second in UTC; a time without a zone is UTC."""
    if isinstance(value, str) and re.fullmatch(r"\d{4}-\d\d-\d\d", value.strip()):
        value = f"{value.strip()}T23:59:59Z"
    if isinstance(value, str) and re.fullmatch(r"\d{1,5}d", value.strip()):
        return datetime.fromtimestamp(int(time.time()) + int(value.strip()[:-1]) * 86400, UTC)
    if isinstance(value, str):
        value = datetime.fromisoformat(value.strip())
    if isinstance(value, datetime) and value.tzinfo is None:
        value = value.replace(tzinfo=UTC)
    return value


Name = Annotated[str, BeforeValidator(_name)]
Usd = Annotated[Decimal, BeforeValidator(_usd), Field(ge=0, le=1_000_000)]
Count = Annotated[int, BeforeValidator(_count), Field(ge=1, le=1_000_000_000)]


class KeySpec(BaseModel):
    """Owner, models and limits of a key. None: no limit."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    owner: Name
    name: Name | None = None
    models: Annotated[tuple[str, ...] | None, BeforeValidator(_list)] = None
    rpm: Count | None = None
    tpm: Count | None = None
    concurrency: Count | None = None
    budget_per_day_usd: Usd | None = None
    budget_total_usd: Usd | None = None
    expires: Annotated[datetime | None, BeforeValidator(_time)] = None
    namespace: Name | None = None  # owners with the same namespace share cached answers


SPEC_FIELDS = tuple(KeySpec.model_fields)


class Secret(BaseModel):
    digest: str  # SHA-256, hex
    until: float | None = None  # unix seconds: end of the grace period after a rotation


class Key(KeySpec):
    """One key as stored in redis."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    id: str
    created: float
    rotated: float | None = None
    revoked: float | None = None
    secrets: tuple[Secret, ...]

    def state(self, now: float) -> Literal["active", "expired", "revoked"]:
        if self.revoked is not None:
            return "revoked"
        return "expired" if self.expires and self.expires.timestamp() <= now else "active"

    def public_fields(self) -> dict[str, Any]:
        """For the operator: all fields but the digests."""
        said = self.model_dump(mode="json", exclude={"secrets", "created", "rotated", "revoked"})
        times = {"created": self.created, "rotated": self.rotated, "revoked": self.revoked}
        return {
            "id": self.id,
            "state": self.state(time.time()),
            **{name: value for name, value in said.items() if name != "id"},
            **{name: when and datetime.fromtimestamp(int(when), UTC).isoformat() for name, when in times.items()},
        }


def digest_of(secret: str) -> bytes:
    return hashlib.sha256(secret.encode()).digest()


def key_spec(given: dict[str, Any]) -> KeySpec:
    """A KeySpec from JSON or a CSV line. Raises InvalidRequest that names the field."""
    try:
        return KeySpec.model_validate(given)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"][:1])
        why = "is not known" if first["type"] == "extra_forbidden" else first["msg"].removeprefix("Value error, ")
        raise InvalidRequest(f"`{field[:60]}`: {why}", param=field[:60]) from None


class KeyStore:
    """All virtual keys. Raises link.FAULTS if redis fails: keys are stored nowhere else."""

    def __init__(self, client: redis.Redis) -> None:
        self._redis = client

    async def create(self, wanted: Sequence[KeySpec]) -> list[tuple[Key, str]]:
        """Create all keys or none. Each comes with its secret, which cannot be read again."""
        if len(wanted) > MAX_AT_ONCE:
            raise InvalidRequest(f"At most {MAX_AT_ONCE} keys at once.")
        made = []
        for each in wanted:
            secret = PREFIX + secrets.token_urlsafe(32)
            own = Secret(digest=digest_of(secret).hex())
            key = Key(**dict(each), id=f"key_{secrets.token_hex(8)}", created=time.time(), secrets=(own,))
            made.append((key, secret))
        pipe = self._redis.pipeline(transaction=True)
        for key, _ in made:
            _put(pipe, key)
        if made:
            await pipe.execute()
        return made

    async def list(self) -> list[Key]:
        """All keys, the oldest first."""
        raws = await self._redis.hgetall(RECORDS)
        return sorted((Key.model_validate_json(raw) for raw in raws.values()), key=lambda key: (key.created, key.id))

    async def get(self, key_id: str) -> Key:
        """Raises NoSuchKey."""
        return _read(await self._redis.hget(RECORDS, key_id), key_id)

    async def change(self, key_id: str, given: dict[str, Any]) -> Key:
        """Set some fields; null removes a limit. The owner cannot change, because the ledger refers to it."""
        if "owner" in given:
            raise InvalidRequest("A key keeps its owner: revoke it and make another.", param="owner")

        def changed(key: Key) -> Key:
            now = {name: getattr(key, name) for name in SPEC_FIELDS}
            return key.model_copy(update=dict(key_spec(now | given)))

        return await self._alter(key_id, changed)

    async def rotate(self, key_id: str, grace: float = 0) -> tuple[Key, str]:
        """Add a new secret; older ones stay valid for `grace` seconds."""
        if not 0 <= grace <= MAX_GRACE:
            raise InvalidRequest(f"The grace is 0 to {MAX_GRACE} seconds.", param="grace_seconds")
        secret = PREFIX + secrets.token_urlsafe(32)

        def rotated(key: Key) -> Key:
            if key.revoked is not None:
                raise InvalidRequest(f"{key_id} is revoked: make a new key.")
            now = time.time()
            end = now + grace
            old = [each for each in key.secrets if grace and (each.until is None or each.until > now)]
            kept = [Secret(digest=each.digest, until=min(end, each.until or end)) for each in old]
            new = Secret(digest=digest_of(secret).hex())
            return key.model_copy(update={"secrets": (new, *kept), "rotated": now})

        return await self._alter(key_id, rotated), secret

    async def revoke(self, key_id: str) -> Key:
        """Revoke for ever. The record stays, because the ledger refers to it."""
        return await self._alter(
            key_id, lambda key: key if key.revoked else key.model_copy(update={"revoked": time.time()})
        )

    async def _alter(self, key_id: str, change: Callable[[Key], Key]) -> Key:
        """Read, change, write; again if another writer changed a key in between."""

        async def attempt(pipe: Pipeline) -> Key:
            key = _read(await pipe.hget(RECORDS, key_id), key_id)
            changed = change(key)
            pipe.multi()  # type: ignore[no-untyped-call]  # redis-py's stub
            for old in {each.digest for each in key.secrets} - {each.digest for each in changed.secrets}:
                pipe.hdel(DIGESTS, old[:32])
            _put(pipe, changed)
            return changed

        return await _transaction(self._redis, attempt)


async def _transaction(client: redis.Redis, attempt: Callable[[Pipeline], Awaitable[Key]]) -> Key:
    async with client.pipeline(transaction=True) as pipe:
        for _ in range(100):
            try:
                await pipe.watch(VERSION)
                made = await attempt(pipe)
                await pipe.execute()
            except WatchError:
                continue
            return made
    raise InvalidRequest("Somebody changes keys all the time: try again.", status=409)


def _put(pipe: Pipeline, key: Key) -> None:
    pipe.hset(RECORDS, key.id, key.model_dump_json())
    for each in key.secrets:
        pipe.hset(DIGESTS, each.digest[:32], key.id)
    pipe.incr(VERSION)


def _read(raw: bytes | str | None, key_id: str) -> Key:
    if raw is None:
        raise KeyNotFound(f"There is no key {key_id[:60]}: `list` shows what there is.")
    return Key.model_validate_json(raw)
