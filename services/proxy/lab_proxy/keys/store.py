"""Storage of virtual keys in redis: create, list, change, rotate, revoke. Secrets are stored as hashes.

A secret is 256 random bits, so a plain SHA-256 is safe: a slow hash protects short passwords and would only cost time
at a key's first use. `create` and `rotate` return the secret once; it is stored nowhere. Used by the command line and
the operator's pages. Knows nothing of requests.
"""

import asyncio
import hashlib
import itertools
import re
import secrets
import time
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, datetime
from decimal import Decimal
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, Field, ValidationError

from ..errors import InvalidRequest, KeyNotFound
from ..ledger import money
from ..redis.client import Client, Script

PREFIX = "sk-lab-"
RECORDS = "lab:key:records"  # hash: id -> record
DIGESTS = "lab:key:digests"  # hash: the first half of a secret's SHA-256 -> id
VERSION = "lab:key:version"  # grows with every change; processes poll it
MAX_AT_ONCE = 10_000
MAX_GRACE = 30 * 86400
TIMEOUT = 10.0  # of all keys in one command
RESERVED = frozenset({"local"})  # the tenant of callers without keys
MAX_MODELS = 200  # of one key
_NAME = re.compile(r"[\w.@+-](?:[\w .@+-]{0,62}[\w.@+-])?")
_MODEL = re.compile(r"[\w./:@*?\[\]+-]{1,200}")

# KEYS: records, digests, version. ARGV: the version at which the changed key was read, '' for new keys; then triples:
# 1 or 2 for one of the first two KEYS, a field, its value or '' to delete it. Answers 0 if the version is another one.
_WRITE = Script("""
if ARGV[1] ~= '' and ARGV[1] ~= (redis.call('GET', KEYS[3]) or '0') then return 0 end
for i = 2, #ARGV, 3 do
  local hash = KEYS[tonumber(ARGV[i])]
  if ARGV[i + 2] == '' then redis.call('HDEL', hash, ARGV[i + 1])
  else redis.call('HSET', hash, ARGV[i + 1], ARGV[i + 2]) end
end
return redis.call('INCR', KEYS[3])
""")


def _name(value: object) -> object:
    """NFC, printable, and without `:`, which separates parts of redis names."""
    if not isinstance(value, str):
        return value
    name = unicodedata.normalize("NFC", value.strip())
    if not _NAME.fullmatch(name):
        raise ValueError("must be 1 to 64 letters, digits, spaces or any of . @ + - _")
    if name in RESERVED:
        raise ValueError(f"{name!r} is the tenant of callers without keys: choose another name")
    return name


def _list(value: object) -> object:
    names = re.split(r"[,;\s]+", value.strip()) if isinstance(value, str) else value
    if isinstance(names, list | tuple):
        kept = tuple(name for name in names if name)
        if len(kept) > MAX_MODELS:
            raise ValueError(f"must have at most {MAX_MODELS} names")
        if not all(isinstance(name, str) and _MODEL.fullmatch(name) for name in kept):
            raise ValueError("must be names of models or shell patterns")
        return kept or None
    return names


def _usd(value: object) -> object:
    return money.parse_usd(value)


def _count(value: object) -> object:
    if isinstance(value, bool):
        raise ValueError("must be a whole number")  # noqa: TRY004 - pydantic expects ValueError
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


class KeySpec(BaseModel, extra="forbid", frozen=True):
    """Owner, models and limits of a key. None: no limit."""

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


class Key(KeySpec, extra="ignore"):
    """One key as stored in redis."""

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
        fields = self.model_dump(mode="json", exclude={"id", "secrets", "created", "rotated", "revoked"})
        times = {"created": self.created, "rotated": self.rotated, "revoked": self.revoked}
        shown = {name: when and datetime.fromtimestamp(int(when), UTC).isoformat() for name, when in times.items()}
        return {"id": self.id, "state": self.state(time.time()), **fields, **shown}


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
    """All virtual keys. Raises RedisError if redis fails: keys are stored nowhere else."""

    def __init__(self, client: Client) -> None:
        self._redis = client
        self._turn = asyncio.Lock()  # one change at a time in this process

    async def create(self, wanted: Sequence[KeySpec]) -> list[tuple[Key, str]]:
        """Create all keys or none. Each comes with its secret, which cannot be read again."""
        if len(wanted) > MAX_AT_ONCE:
            raise InvalidRequest(f"At most {MAX_AT_ONCE} keys at once.")
        made = []
        for each in wanted:
            secret, stored = _new_secret()
            key = Key(**dict(each), id=f"key_{secrets.token_hex(8)}", created=time.time(), secrets=(stored,))
            made.append((key, secret))
        if made:
            await self._write("", [each for key, _ in made for each in _fields(key)])
        return made

    async def list(self) -> list[Key]:
        """All keys, the oldest first."""
        raws = await self._redis.execute("HGETALL", RECORDS, within=TIMEOUT)
        return await asyncio.to_thread(_read_all, list(raws.values()))  # 10,000 keys take half a second

    async def get(self, key_id: str) -> Key:
        """Raises KeyNotFound."""
        return _read(await self._redis.execute("HGET", RECORDS, key_id), key_id)

    async def change(self, key_id: str, given: dict[str, Any]) -> Key:
        """Set some fields; null removes a limit. The owner cannot change, because the ledger refers to it."""
        if "owner" in given:
            raise InvalidRequest("The owner of a key cannot change: revoke the key and create another.", param="owner")

        def changed(key: Key) -> Key:
            now = {name: getattr(key, name) for name in SPEC_FIELDS}
            return key.model_copy(update=dict(key_spec(now | given)))

        return await self._alter(key_id, changed)

    async def rotate(self, key_id: str, grace: float = 0) -> tuple[Key, str]:
        """Add a new secret; older ones stay valid for `grace` seconds."""
        if not 0 <= grace <= MAX_GRACE:
            raise InvalidRequest(f"`grace_seconds` must be from 0 to {MAX_GRACE}.", param="grace_seconds")
        secret, stored = _new_secret()

        def rotated(key: Key) -> Key:
            if key.revoked is not None:
                raise InvalidRequest(f"{key_id} is revoked: create a new key.")
            now = time.time()
            old = [each for each in key.secrets if grace and (each.until or now + 1) > now]
            kept = [Secret(digest=each.digest, until=min(now + grace, each.until or now + grace)) for each in old]
            return key.model_copy(update={"secrets": (stored, *kept), "rotated": now})

        return await self._alter(key_id, rotated), secret

    async def revoke(self, key_id: str) -> Key:
        """Revoke a key permanently. The record stays, because the ledger refers to it."""
        return await self._alter(
            key_id, lambda key: key if key.revoked else key.model_copy(update={"revoked": time.time()})
        )

    async def _alter(self, key_id: str, change: Callable[[Key], Key]) -> Key:
        """Read, change, write; again if another process changed a key in between."""
        async with self._turn:
            for _ in range(100):
                # Read the version first: if a change comes between the two reads, the version is too old, and nothing
                # is written.
                version, raw = await self._redis.execute_all([("GET", VERSION), ("HGET", RECORDS, key_id)])
                key = _read(raw, key_id)
                changed = change(key)
                old = {each.digest for each in key.secrets} - {each.digest for each in changed.secrets}
                fields = [*_fields(changed), *((2, digest[:32], "") for digest in old)]
                if await self._write(version or "0", fields):
                    return changed
        raise InvalidRequest("Other changes of keys interfered: try again.", status=409)

    async def _write(self, version: bytes | str, fields: Sequence[tuple[int, str, str]]) -> int:
        command = _WRITE((RECORDS, DIGESTS, VERSION), version, *itertools.chain.from_iterable(fields))
        written: int = await self._redis.execute(*command, within=TIMEOUT)
        return written


def _new_secret() -> tuple[str, Secret]:
    """A secret, and what is stored of it."""
    secret = PREFIX + secrets.token_urlsafe(32)
    return secret, Secret(digest=digest_of(secret).hex())


def _fields(key: Key) -> Sequence[tuple[int, str, str]]:
    """What the script writes for a key."""
    return [(1, key.id, key.model_dump_json()), *((2, each.digest[:32], key.id) for each in key.secrets)]


def _read_all(raws: Iterable[bytes]) -> list[Key]:
    return sorted(map(Key.model_validate_json, raws), key=lambda key: (key.created, key.id))


def _read(raw: bytes | None, key_id: str) -> Key:
    if raw is None:
        raise KeyNotFound(f"Key {key_id[:60]} does not exist: `list` shows all keys.")
    return Key.model_validate_json(raw)
