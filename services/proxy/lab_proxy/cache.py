"""Where answers rest: redis, a secret for the keys, and what a caller may ask of a cache (RFC 9111, RFC 9211).

Redis may be absent, dead, paused or full: a request then goes on without it, later by at most one timeout, and a probe
finds out when redis is back. Knows entries as bytes under a key; does not know what is in them or what may be stored.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import redis.asyncio as redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError, ResponseError

from .entry import Entry

log = logging.getLogger("lab_proxy.cache")

PREFIX = "lab:entry:"
BATCH = 64  # keys in one command: redis serves others in between
PROBE_SECONDS = (0.2, 0.5, 1.0)  # between looks at a redis that failed; the last one repeats
PROBE_TIMEOUT = 1.0


def load_secret(path: Path) -> bytes:
    """The secret of the cache keys, made once: of several processes that start together one makes it, all read it.

    Raises ValueError naming the variable when the file can be neither read nor made, or is too short to be a secret.
    """
    try:
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            draft = path.with_name(f"{path.name}.{os.getpid()}.{secrets.token_hex(4)}")
            descriptor = os.open(draft, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
            try:
                with os.fdopen(descriptor, "w") as out:
                    out.write(secrets.token_hex(32))
                with contextlib.suppress(FileExistsError):
                    os.link(draft, path)  # appears whole, and only if nobody was faster
            finally:
                draft.unlink()
        secret = path.read_bytes().strip()
    except OSError as error:
        raise ValueError(f"PROXY_CACHE_SECRET_FILE cannot be read or made: {error}") from None
    if len(secret) < 32:
        raise ValueError(f"PROXY_CACHE_SECRET_FILE {path} holds fewer than 32 bytes: remove it and a new one is made")
    return secret


@dataclass(frozen=True, slots=True)
class Wishes:
    """What the caller's `Cache-Control` asks. Unknown or malformed directives are ignored, as HTTP wants it."""

    no_store: bool = False
    no_cache: bool = False
    only_if_cached: bool = False
    max_age: int | None = None

    @classmethod
    def read(cls, header: str) -> Wishes:
        if not header:
            return PLAIN
        said = {}
        for part in header.lower().split(","):
            name, _, value = part.strip().partition("=")
            said[name.strip()] = value.strip().strip('"')
        age = said.get("max-age", "")
        return cls(
            no_store="no-store" in said,
            no_cache="no-cache" in said,
            only_if_cached="only-if-cached" in said,
            max_age=int(age[:12]) if age.isascii() and age.isdigit() else None,
        )


PLAIN = Wishes()


class Cache:
    """Entries in redis, fail-soft. `read` and `write` never raise for redis's sake."""

    enabled = True

    def __init__(
        self,
        url: str,
        secret: bytes,
        *,
        timeout: float,
        max_entry_bytes: int,
        on_error: Callable[[str], None] = lambda _: None,
    ) -> None:
        """`timeout`: seconds that one read or one write takes at most. `on_error` hears of each failed operation."""
        self.secret = secret
        self._timeout = timeout
        self._max_entry_bytes = max_entry_bytes
        self._on_error = on_error
        self._up = True
        self._detail = ""
        self._probe: asyncio.Task[None] | None = None
        self._redis = redis.Redis.from_url(
            url,
            socket_timeout=PROBE_TIMEOUT,
            socket_connect_timeout=PROBE_TIMEOUT,
            retry=Retry(NoBackoff(), 0),
            max_connections=512,
            protocol=2,
            lib_name=None,
            lib_version=None,
        )

    @property
    def up(self) -> bool:
        return self._up

    async def start(self) -> None:
        try:
            async with asyncio.timeout(PROBE_TIMEOUT):
                await self._redis.ping()
        except (RedisError, OSError, TimeoutError) as error:
            self._fail("start", error)

    async def stop(self) -> None:
        if self._probe:
            self._probe.cancel()
            await asyncio.gather(self._probe, return_exceptions=True)
        with contextlib.suppress(RedisError, OSError, TimeoutError):
            async with asyncio.timeout(PROBE_TIMEOUT):
                await self._redis.aclose()

    async def read(self, keys: Sequence[str]) -> list[Entry | None] | None:
        """An entry or None for each key; None for all when redis cannot be asked. What is no entry counts as none."""
        if not self._up:
            return None
        raws: list[Any] = []
        try:
            async with asyncio.timeout(self._timeout):  # for all batches together
                for start in range(0, len(keys), BATCH):
                    names = [PREFIX + key for key in keys[start : start + BATCH]]
                    try:
                        raws += [await self._redis.get(names[0])] if len(names) == 1 else await self._redis.mget(names)
                    except ResponseError:  # a foreign type at our key: a miss, and the next write replaces it
                        self._on_error("read")
                        raws += [None] * len(names)
        except (RedisError, OSError, TimeoutError) as error:
            self._fail("read", error, answers=bool(raws))
            return None
        found = [Entry.unpack(raw) for raw in raws]
        now = time.time()
        return [entry if entry and entry.age(now) < entry.ttl else None for entry in found]

    async def write(self, entries: Mapping[str, Entry]) -> str | None:
        """Store entries under their keys; a word for `detail=` where one could not be, else None."""
        packed = [(PREFIX + key, entry.pack(), entry.ttl) for key, entry in entries.items()]
        fit = [item for item in packed if len(item[1]) <= self._max_entry_bytes]
        if fit and not self._up:
            return "redis"
        start = 0
        try:
            async with asyncio.timeout(self._timeout):  # for all batches together
                for start in range(0, len(fit), BATCH):
                    pipe = self._redis.pipeline(transaction=False)
                    for name, raw, ttl in fit[start : start + BATCH]:
                        pipe.set(name, raw, ex=ttl)
                    await pipe.execute()
        except ResponseError as error:  # full or read-only: it still reads
            self._on_error("write")
            log.warning("redis refused an entry: %s", type(error).__name__)
            return "redis"
        except (RedisError, OSError, TimeoutError) as error:
            self._fail("write", error, answers=start > 0)
            return "redis"
        return "size" if len(fit) < len(packed) else None

    async def report(self) -> dict[str, Any]:
        """For the status page: `state`, and what redis says of itself."""
        if not self._up:
            return {"state": "down", "detail": self._detail}
        try:
            async with asyncio.timeout(PROBE_TIMEOUT):
                started = time.perf_counter()
                await self._redis.ping()
                latency = (time.perf_counter() - started) * 1000
                info = await self._redis.info()
                entries = await self._redis.dbsize()
        except (RedisError, OSError, TimeoutError) as error:
            self._fail("report", error)
            return {"state": "down", "detail": self._detail}
        server = "valkey" if "valkey_version" in info else "redis"
        return {
            "state": "up",
            "server": server,
            "version": info.get(f"{server}_version"),
            "used_memory_bytes": info.get("used_memory"),
            "latency_ms": round(latency, 3),
            "entries": entries,
        }

    def _fail(self, operation: str, error: BaseException, *, answers: bool = False) -> None:
        """`answers`: it did in this operation, so that a lack of time says that much was asked, not that it is down."""
        self._on_error(operation)
        if not self._up or (answers and isinstance(error, TimeoutError)):
            return
        self._up = False
        kind = "no answer in time" if isinstance(error, (TimeoutError, redis.TimeoutError)) else "no connection"
        self._detail = f"{kind}; answers are not cached until it is back (make logs, or PROXY_REDIS_URL)"
        log.warning("redis is down (%s): %s", operation, kind)
        self._probe = asyncio.get_running_loop().create_task(self._watch(), name="redis-probe")

    async def _watch(self) -> None:
        """Ask a failed redis until it answers. Connections of before are dropped: they may hold late answers."""
        await self._redis.connection_pool.disconnect(inuse_connections=False)
        for turn in range(1_000_000_000):
            await asyncio.sleep(PROBE_SECONDS[min(turn, len(PROBE_SECONDS) - 1)])
            try:
                async with asyncio.timeout(PROBE_TIMEOUT):
                    await self._redis.ping()
            except (RedisError, OSError, TimeoutError):
                continue
            self._up, self._detail = True, ""
            log.warning("redis is back")
            return


class NoCache:
    """What stands in for a cache that is switched off."""

    enabled = False
    up = False
    secret = bytes(32)

    async def start(self) -> None: ...

    async def stop(self) -> None: ...

    async def read(self, keys: Sequence[str]) -> list[Entry | None] | None:
        return None

    async def write(self, entries: Mapping[str, Entry]) -> str | None:
        return "disabled"

    async def report(self) -> dict[str, Any]:
        return {"state": "down", "detail": "the cache is switched off (PROXY_CACHE_ENABLED)"}
