"""Where answers rest: this process and redis, a secret for the keys, and what a caller may ask (RFC 9111, RFC 9211).

Redis may be absent, dead, paused or full: a request then goes on without it, later by at most one timeout, and a look
every second finds out when it is back. Knows entries as bytes under a key; does not know what is in them or what may
be stored.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import secrets
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import orjson

from ..errors import CacheUnavailable, ProxyError
from ..redis.connection import Address, Command, CommandError, Connection, Pipeline
from .entry import Entry

log = logging.getLogger("lab_proxy.cache")

PREFIX = "lab:entry:"


def entry_name(key: str) -> str:
    """Where redis keeps the entry of this key."""
    return PREFIX + key


def sample_key(key: str, slot: int) -> str:
    """The key of one of several samples; the first has the request's own."""
    return f"{key}:{slot}" if slot else key


BATCH = 64  # keys in one command: redis serves others in between
PROBE_SECONDS = (0.2, 0.5, 1.0)  # between looks at a redis that failed; the last one repeats
PROBE_TIMEOUT = 1.0
EPOCHS = "lab:epoch"
LOOK_SECONDS = 0.25  # between looks at the epochs
TRUSTED_SECONDS = 1.0  # after redis's last word: what is near counts no longer than that
MOST_STAMPS = 10_000


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
class CacheControl:
    """What the caller's `Cache-Control` asks. Unknown or malformed directives are ignored, as HTTP wants it."""

    no_store: bool = False
    no_cache: bool = False
    only_if_cached: bool = False
    max_age: int | None = None

    @classmethod
    def read(cls, header: str) -> CacheControl:
        if not header:
            return NO_DIRECTIVES
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


NO_DIRECTIVES = CacheControl()


class PipelinedCommand(Protocol):
    """A redis command that rides along with a read, so that it costs no round trip of its own. May raise ProxyErrors:
    nothing of the cache is given out before `heard` or `unheard` has returned."""

    def command(self, whole: bool = False) -> tuple[Any, ...]:
        """One command. `whole`: redis does not know the script of the other form."""

    def on_reply(self, reply: Any) -> None: ...

    def on_failure(self) -> None:
        """Redis cannot be asked, or refused the command."""


class LocalCache:
    """Entries in this process, at most so many bytes of them: the ones used last."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.size = 0
        self._kept: OrderedDict[str, Entry] = OrderedDict()

    def get(self, key: str) -> Entry | None:
        entry = self._kept.get(key)
        if entry is not None:
            self._kept.move_to_end(key)
        return entry

    def put(self, key: str, entry: Entry) -> None:
        self.drop(key)
        self._kept[key] = entry
        self.size += entry.weight
        while self.size > self.limit:
            self.size -= self._kept.popitem(last=False)[1].weight

    def drop(self, key: str) -> None:
        old = self._kept.pop(key, None)
        if old is not None:
            self.size -= old.weight

    def clear(self) -> None:
        self._kept.clear()
        self.size = 0

    def __len__(self) -> int:
        return len(self._kept)


class Cache:
    """Entries in redis, and copies of them in this process (L1). Fail-soft: nothing here raises for redis's sake, but
    `flush`.

    A copy counts only while redis has spoken within the last second on the connection on which it also tells of every
    changed entry: so none outlives a change by more than that, not even where redis cannot be reached.
    """

    enabled = True

    def __init__(
        self,
        url: str,
        secret: bytes,
        *,
        timeout: float,
        max_entry_bytes: int,
        near_bytes: int = 0,
        on_error: Callable[[str], None] = lambda _: None,
        on_time: Callable[[str, float], None] = lambda *_: None,
    ) -> None:
        """`timeout`: seconds that one read or one write takes at most. `on_error` hears of each failed operation,
        `on_time` of each round trip and its seconds.

        Raises ValueError for a URL with options that are not known.
        """
        self.secret = secret
        self._timeout = timeout
        self._max_entry_bytes = max_entry_bytes
        self._on_error = on_error
        self._on_time = on_time
        self._address = Address(url)
        self._connection: Connection | None = None
        self._detail = ""
        self._watcher: asyncio.Task[None] | None = None
        self._local = LocalCache(near_bytes)
        self._tracking = False  # redis tells of changed entries
        self._confirmed = float("-inf")  # time.monotonic() when the last question that redis answered was sent
        self._epochs: dict[str, str] = {}
        self._epoch_cache: dict[tuple[str, str], str] = {}

    @property
    def up(self) -> bool:
        return self._connection is not None

    async def start(self) -> None:
        await self._connect("start")
        self._watcher = asyncio.get_running_loop().create_task(self._watch(), name="redis-watch")

    async def stop(self) -> None:
        if self._watcher:
            self._watcher.cancel()
            await asyncio.gather(self._watcher, return_exceptions=True)
        if self._connection:
            self._connection.close()

    # ---- entries

    def epoch(self, tenant: str, model: str) -> str:
        """The epoch of this tenant's answers of this model. Taken when a request begins, and stored with its answer."""
        stamp = self._epoch_cache.get((tenant, model))
        if stamp is None:
            if len(self._epoch_cache) >= MOST_STAMPS:
                self._epoch_cache.clear()
            scopes = (scope(None, None), scope(tenant, None), scope(None, model), scope(tenant, model))
            stamp = self._epoch_cache[tenant, model] = ".".join(self._epochs.get(each, "") for each in scopes)
        return stamp

    def get_local(self, key: str, stamp: str, now: float) -> Entry | None:
        """What this process itself holds, and may give out without asking redis. `now`: time.time()."""
        if time.monotonic() - self._confirmed > TRUSTED_SECONDS:
            return None
        return _alive(self._local.get(key), stamp, now)

    def resize(self, key: str, entry: Entry, size: int) -> None:
        """`entry` has become so many bytes heavier, by a form of it that was made once for all."""
        if self._local.get(key) is entry:
            self._local.drop(key)
            entry.weight += size
            self._local.put(key, entry)

    async def read(self, keys: Sequence[str], *asks: PipelinedCommand, stamp: str = "") -> list[Entry | None] | None:
        """An entry or None for each key; None for all when redis cannot be asked. What is no entry counts as none.

        One round trip for the keys that are not near and for `asks`, which may raise ProxyErrors.
        """
        now = time.time()
        found = [self.get_local(key, stamp, now) for key in keys]
        missing = [place for place, entry in enumerate(found) if entry is None]
        if self._connection is None:
            for ask in asks:
                ask.on_failure()
            return None
        if not missing and not asks:
            return found
        commands: list[Command] = [ask.command() for ask in asks]
        for start in range(0, len(missing), BATCH):
            names = [entry_name(keys[place]) for place in missing[start : start + BATCH]]
            commands.append(("GET", names[0]) if len(names) == 1 else ("MGET", *names))
        batch = await self._ask(commands, "read")
        if batch is None:
            for ask in asks:
                ask.on_failure()
            return None
        await self._hear(asks, batch.replies)
        raws = self._raws(commands[len(asks) :], batch.replies[len(asks) :])
        now, fresh = time.time(), self._connection is not None and batch.pushes == self._connection.pushes
        for place, raw in zip(missing, raws, strict=True):
            entry = found[place] = _alive(Entry.unpack(raw), stamp, now)
            if entry is not None and fresh:
                self._keep(keys[place], entry)
        return found

    def _raws(self, commands: Sequence[Command], replies: Sequence[Any]) -> list[Any]:
        raws: list[Any] = []
        for (name, *given), reply in zip(commands, replies, strict=True):
            if isinstance(reply, CommandError):  # a foreign type at our key: a miss, and the next write replaces it
                self._on_error("read")
                raws += [None] * len(given)
            else:
                raws += [reply] if name == "GET" else reply
        return raws

    async def peek(self, key: str) -> Entry | None:
        """What redis holds under this key, of whatever epoch."""
        batch = await self._ask([("GET", entry_name(key))], "read")
        return Entry.unpack(batch.replies[0]) if batch else None

    async def write(self, entries: Mapping[str, Entry]) -> str | None:
        """Store entries under their keys; a word for `detail=` where one could not be, else None."""
        packed = [(key, entry, entry.pack()) for key, entry in entries.items()]
        fit = [item for item in packed if len(item[2]) <= self._max_entry_bytes]
        if fit:
            commands = [("SET", entry_name(key), raw, "EX", entry.ttl + entry.grace) for key, entry, raw in fit]
            batch = await self._ask(commands, "write")
            if batch is None:
                return "redis"
            refused = [reply for reply in batch.replies if isinstance(reply, CommandError)]
            if refused:  # full or read-only: it still reads
                self._on_error("write")
                log.warning("redis refused an entry: %s", str(refused[0]).partition(" ")[0])
                return "redis"
            if self._connection is not None and batch.pushes == self._connection.pushes:
                for key, entry, _ in fit:
                    self._keep(key, entry)
        return "size" if len(fit) < len(packed) else None

    def _keep(self, key: str, entry: Entry) -> None:
        if self._tracking and entry.weight <= self._local.limit:
            self._local.put(key, entry)

    async def _hear(self, asks: Sequence[PipelinedCommand], replies: Sequence[Any]) -> None:
        """Raises the first refusal when all have heard theirs: the others may hold something by now."""
        refusal: ProxyError | None = None
        for ask, said in zip(asks, replies, strict=False):
            reply = said
            if isinstance(said, CommandError) and str(said).startswith("NOSCRIPT"):
                batch = await self._ask([ask.command(whole=True)], "script")
                reply = batch.replies[0] if batch else None
            try:
                if reply is not None and not isinstance(reply, CommandError):
                    ask.on_reply(reply)
                    continue
                if reply is not None:
                    self._on_error("script")
                    log.warning("redis refused a script: %s", str(reply).partition(" ")[0])
                ask.on_failure()
            except ProxyError as error:
                refusal = refusal or error
        if refusal is not None:
            raise refusal

    async def _ask(self, commands: Sequence[Command], operation: str) -> Pipeline | None:
        """None where redis cannot be asked, or not in time."""
        if self._connection is None:
            return None
        began = time.perf_counter()
        try:
            return await self._connection.execute(commands)
        except (TimeoutError, ConnectionError):
            self._on_error(operation)
            return None
        finally:
            self._on_time(operation, time.perf_counter() - began)

    # ---- deletion

    async def flush(self, tenant: str | None = None, model: str | None = None) -> None:
        """Begin a new epoch for one tenant, one model, one tenant's answers of one model, or all. What is of an older
        one is never given out again, and goes by its TTL. Raises CacheUnavailable where redis does not take it."""
        where = scope(tenant, model)
        token = secrets.token_hex(8)
        batch = await self._ask([("HSET", EPOCHS, where, token)], "flush")
        if batch is None or isinstance(batch.replies[0], CommandError):
            raise CacheUnavailable("Redis does not take the flush: nothing was deleted. Try again in a moment.")
        self._learn(self._epochs | {where: token})

    def _learn(self, epochs: dict[str, str]) -> None:
        if epochs != self._epochs:
            self._epochs = epochs
            self._epoch_cache.clear()

    # ---- the connection

    def _pushed(self, message: list[Any]) -> None:
        """Redis's own message: these keys have changed; None: all."""
        if message[0] == b"invalidate" and message[1] is None:
            self._local.clear()
        for name in (message[1] or ()) if message[0] == b"invalidate" else ():
            self._local.drop(name[len(PREFIX) :].decode("ascii", "replace"))

    def _lost(self, why: str) -> None:
        """What changes from here on is not heard of: nothing that is near counts any more."""
        self._connection = None
        self._local.clear()
        self._confirmed = float("-inf")
        self._detail = f"{why}; answers are not cached until it is back (make logs, or PROXY_REDIS_URL)"
        log.warning("redis is down: %s", why)

    async def _connect(self, operation: str) -> None:
        try:
            async with asyncio.timeout(PROBE_TIMEOUT):
                wire = await self._address.connect(lambda: Connection(PROBE_TIMEOUT, self._pushed, self._lost))
                tracking = ("CLIENT", "TRACKING", "ON", "BCAST", "PREFIX", PREFIX, "NOLOOP")
                sent = time.monotonic()
                batch = await wire.execute(
                    [tracking, ("HSETNX", EPOCHS, "", secrets.token_hex(8)), ("HGETALL", EPOCHS)]
                )
        except (OSError, TimeoutError, CommandError) as error:
            self._on_error(operation)
            why = "no answer in time" if isinstance(error, TimeoutError) else "no connection"
            why = f"it refuses ({str(error).partition(' ')[0]})" if isinstance(error, CommandError) else why
            if not self._detail:
                self._lost(why)
            return
        wire.set_timeout(self._timeout)
        self._tracking = not isinstance(batch.replies[0], CommandError)
        if self._detail:
            log.warning("redis is back")
        self._connection, self._detail = wire, ""
        self._hear_epochs(batch.replies[2], sent)

    async def _watch(self) -> None:
        """Look at redis all the time: for new epochs while it is there, for itself while it is not."""
        tries = 0
        while True:
            if self._connection is None:
                await asyncio.sleep(PROBE_SECONDS[min(tries, len(PROBE_SECONDS) - 1)])
                tries += 1
                await self._connect("probe")
                continue
            tries = 0
            await asyncio.sleep(LOOK_SECONDS)
            sent = time.monotonic()
            batch = await self._ask([("HGETALL", EPOCHS)], "epoch")
            if batch is not None:
                self._hear_epochs(batch.replies[0], sent)

    def _hear_epochs(self, reply: Any, sent: float) -> None:
        if isinstance(reply, dict):
            self._learn({name.decode(): token.decode() for name, token in reply.items()})
            self._confirmed = sent

    async def report(self) -> dict[str, Any]:
        """For the status page: `state`, and what redis says of itself."""
        started = time.perf_counter()
        pong = await self._ask([("PING",)], "report")
        latency = (time.perf_counter() - started) * 1000
        batch = await self._ask([("INFO",), ("DBSIZE",)], "report") if pong else None
        if batch is None or any(isinstance(reply, CommandError) for reply in batch.replies):
            return {"state": "down", "detail": self._detail or "it does not tell of itself"}
        info = dict(line.split(":", 1) for line in str(batch.replies[0], "utf-8").splitlines() if ":" in line)
        server = "valkey" if "valkey_version" in info else "redis"
        return {
            "state": "up",
            "server": server,
            "version": info.get(f"{server}_version"),
            "used_memory_bytes": int(info.get("used_memory", 0)),
            "latency_ms": round(latency, 3),
            "entries": batch.replies[1],
        }


def scope(tenant: str | None, model: str | None) -> str:
    """The name of what a flush is about. JSON, so that no two scopes have one name; all: the empty name."""
    return "" if tenant is None and model is None else orjson.dumps([tenant, model]).decode()


def _alive(entry: Entry | None, stamp: str, now: float) -> Entry | None:
    """The entry, unless it is of an older epoch or past all use. It may be stale: its age says so."""
    if entry is None or entry.epoch != stamp or entry.age(now) >= entry.ttl + entry.grace:
        return None
    return entry


class NoCache:
    """What stands in for a cache that is switched off."""

    enabled = False
    up = False
    secret = bytes(32)

    async def start(self) -> None: ...

    async def stop(self) -> None: ...

    def epoch(self, tenant: str, model: str) -> str:
        return ""

    def get_local(self, key: str, stamp: str, now: float) -> Entry | None:
        return None

    def resize(self, key: str, entry: Entry, size: int) -> None: ...

    async def read(self, keys: Sequence[str], *asks: PipelinedCommand, stamp: str = "") -> list[Entry | None] | None:
        for ask in asks:
            ask.on_failure()
        return None

    async def write(self, entries: Mapping[str, Entry]) -> str | None:
        return "disabled"

    async def peek(self, key: str) -> Entry | None:
        return None

    async def flush(self, tenant: str | None = None, model: str | None = None) -> None: ...

    async def report(self) -> dict[str, Any]:
        return {"state": "down", "detail": "the cache is switched off (PROXY_CACHE_ENABLED)"}
