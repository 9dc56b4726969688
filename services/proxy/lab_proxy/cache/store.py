"""Cache storage: entries in redis, and local copies of them in this process.

If redis is absent, down, slow or full, requests continue without it, delayed by at most one timeout, and a probe every
second detects its return. Knows entries under keys; does not know their content or what may be stored.
"""

import asyncio
import logging
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import orjson

from ..errors import CacheUnavailable
from ..long_bodies import off_loop
from ..lru import LRU
from ..redis.client import Client, OnError, PipelinedCommand, deliver
from ..redis.connection import Command, CommandError, Pipeline, RedisError
from ..tasks import end, supervise
from .entry import Entry

log = logging.getLogger("lab_proxy.cache")

PREFIX = "lab:entry:"
BATCH = 64  # keys in one command: redis serves other clients in between
EPOCHS = "lab:epoch"
POLL_SECONDS = 0.25  # between reads of the epochs
TRUSTED_SECONDS = 1.0  # after redis's last reply, local copies are served for at most this time
MAX_EPOCHS = 10_000


def entry_name(key: str) -> str:
    return PREFIX + key


class Cache:
    """Entries in redis, and local copies (L1). A part. Only `flush` raises when redis fails.

    A local copy is served only if redis has replied within the last second on the connection that also carries its
    invalidations. So a copy is served for at most a second after a change, even if redis is unreachable.
    """

    def __init__(
        self,
        url: str,
        secret: bytes,
        *,
        enabled: bool = True,
        timeout: float,
        max_entry_bytes: int,
        near_bytes: int = 0,
        on_error: OnError = lambda _: None,
        on_time: Callable[[str, float], None] = lambda *_: None,
    ) -> None:
        """`enabled`: if false, it never connects and holds no entry. `timeout`: of one read or write, in seconds.
        `near_bytes`: limit of the local copies. `on_error` gets each failed operation, `on_time` each round trip with
        its seconds. Raises ValueError for a URL with unsupported options."""
        self.enabled, self.secret = enabled, secret
        self.max_entry_bytes = max_entry_bytes
        self._on_error = on_error
        self._on_time = on_time
        tracking = ("CLIENT", "TRACKING", "ON", "BCAST", "PREFIX", PREFIX, "NOLOOP")
        greeting = tracking, ("HSETNX", EPOCHS, "", secrets.token_hex(8)), ("HGETALL", EPOCHS)
        self._redis = Client(
            url, timeout=timeout, greeting=greeting, on_push=self._on_push, on_up=self._on_up, on_down=self._on_down
        )
        self._detail = "" if enabled else "the cache is switched off (PROXY_CACHE_ENABLED)"
        self._poller: asyncio.Task[None] | None = None
        self._local: LRU[Entry] = LRU(near_bytes)
        self._tracking = False  # redis sends invalidations
        self._confirmed = float("-inf")  # time.monotonic() at which the last answered command was sent
        self._epochs: dict[str, str] = {}
        self._epoch_cache: dict[tuple[str, str], str] = {}

    @property
    def up(self) -> bool:
        return self._redis.up

    async def start(self) -> None:
        if not self.enabled:
            return
        await self._redis.start()
        self._poller = supervise("redis-watch", self._poll_forever)

    async def stop(self) -> None:
        await end(self._poller)
        await self._redis.stop()

    # ---- entries

    def epoch(self, tenant: str, model: str) -> str:
        """The current epoch of a tenant's entries of a model: read when a request begins, stored with its answer."""
        epoch = self._epoch_cache.get((tenant, model))
        if epoch is None:
            if len(self._epoch_cache) >= MAX_EPOCHS:
                self._epoch_cache.clear()
            scopes = (scope(None, None), scope(tenant, None), scope(None, model), scope(tenant, model))
            epoch = self._epoch_cache[tenant, model] = ".".join(self._epochs.get(each, "") for each in scopes)
        return epoch

    def get_local(self, key: str, epoch: str, now: float) -> Entry | None:
        """The local copy, if it may be served without asking redis. `now`: time.time()."""
        if time.monotonic() - self._confirmed > TRUSTED_SECONDS:
            return None
        return _alive(self._local.get(key), epoch, now)

    def resize(self, key: str, entry: Entry, size: int) -> None:
        """Count `size` more bytes for a local copy: a prepared form of it is kept with it."""
        if self._local.get(key) is entry:
            entry.weight += size
            self._local.put(key, entry, entry.weight)

    async def read(
        self, keys: Sequence[str], *piggyback: PipelinedCommand, epoch: str = ""
    ) -> list[Entry | None] | None:
        """An entry or None for each key; None as a whole if redis is unavailable. An invalid entry counts as missing.
        The keys without a local copy and the `piggyback` commands, which may raise ProxyErrors, share a round trip."""
        found: list[Entry | None] = []
        missing: list[int] = []
        if keys:
            now = time.time()
            found = [self.get_local(key, epoch, now) for key in keys]
            missing = [place for place, entry in enumerate(found) if entry is None]
        if not missing and not piggyback:
            return found
        commands: list[Command] = [command.command() for command in piggyback]
        for start in range(0, len(missing), BATCH):
            names = [entry_name(keys[place]) for place in missing[start : start + BATCH]]
            commands.append(("GET", names[0]) if len(names) == 1 else ("MGET", *names))
        pipeline = await self._execute(commands, "read")
        if pipeline is None:
            for command in piggyback:
                command.on_failure()
            return None
        if piggyback:
            deliver(piggyback, pipeline.replies, lambda: self._on_error("script"))
        if not missing:
            return found
        raws = self._raws(commands[len(piggyback) :], pipeline.replies[len(piggyback) :])
        now = time.time()
        # An invalidation that came in between may concern one of these entries.
        size = sum(len(raw) for raw in raws if isinstance(raw, bytes))
        entries = await off_loop(size, lambda: [Entry.unpack(raw) for raw in raws])
        unchanged = self._redis.unchanged_since(pipeline)
        for place, unpacked in zip(missing, entries, strict=True):
            entry = found[place] = _alive(unpacked, epoch, now)
            if entry is not None and unchanged:
                self._keep(keys[place], entry)
        return found

    def _raws(self, commands: Sequence[Command], replies: Sequence[Any]) -> list[Any]:
        raws: list[Any] = []
        for (name, *names), reply in zip(commands, replies, strict=True):
            if isinstance(reply, CommandError):  # another type at this name: a miss, and the next write replaces it
                self._on_error("read")
                raws += [None] * len(names)
            else:
                raws += [reply] if name == "GET" else reply
        return raws

    async def peek(self, key: str) -> Entry | None:
        """The entry in redis, of any epoch."""
        pipeline = await self._execute([("GET", entry_name(key))], "read")
        return Entry.unpack(pipeline.replies[0]) if pipeline else None

    async def write(self, entries: Mapping[str, Entry]) -> str | None:
        """Store entries under their keys. A word for `detail=` if one was not stored, else None."""
        size = sum(entry.weight for entry in entries.values())
        packed = await off_loop(size, lambda: [(key, entry, entry.pack()) for key, entry in entries.items()])
        fit = [item for item in packed if len(item[2]) <= self.max_entry_bytes]
        if fit:
            commands = [("SET", entry_name(key), raw, "EX", entry.ttl + entry.grace) for key, entry, raw in fit]
            pipeline = await self._execute(commands, "write")
            if pipeline is None:
                return "redis"
            refused = [reply for reply in pipeline.replies if isinstance(reply, CommandError)]
            if refused:  # full or read-only: reads still work
                self._on_error("write")
                log.warning("redis refused an entry: %s", str(refused[0]).partition(" ")[0])
                return "redis"
            if self._redis.unchanged_since(pipeline):
                for key, entry, _ in fit:
                    self._keep(key, entry)
        return "size" if len(fit) < len(packed) else None

    def _keep(self, key: str, entry: Entry) -> None:
        if self._tracking and entry.weight <= self._local.limit:
            self._local.put(key, entry, entry.weight)

    async def _execute(self, commands: Sequence[Command], operation: str) -> Pipeline | None:
        """None if redis is unavailable or too slow."""
        if not self._redis.up:
            return None
        began = time.perf_counter()
        try:
            return await self._redis.pipeline(commands)
        except RedisError:
            self._on_error(operation)
            return None
        finally:
            self._on_time(operation, time.perf_counter() - began)

    # ---- deletion

    async def flush(self, tenant: str | None = None, model: str | None = None) -> None:
        """Begin a new epoch for one tenant, one model, one tenant's entries of one model, or all. Entries of older
        epochs are never served again and expire by their TTL. Raises CacheUnavailable if redis fails."""
        if not self.enabled:
            return
        if len(self._epochs) >= MAX_EPOCHS:
            model = None  # callers may invent names: each would be kept for ever. A wider flush covers it
        where, token = scope(tenant, model), secrets.token_hex(8)
        pipeline = await self._execute([("HSET", EPOCHS, where, token)], "flush")
        if pipeline is None or isinstance(pipeline.replies[0], CommandError):
            raise CacheUnavailable("Redis did not accept the flush: nothing was deleted. Try again in a moment.")
        self._set_epochs(self._epochs | {where: token})

    def _set_epochs(self, epochs: dict[str, str]) -> None:
        if epochs != self._epochs:
            self._epochs = epochs
            self._epoch_cache.clear()

    # ---- the connection

    def _on_push(self, message: list[Any]) -> None:
        """An invalidation: these names have changed; None means all."""
        if message[0] != b"invalidate":
            return
        if message[1] is None:
            self._local.clear()
        for name in message[1] or ():
            self._local.drop(name[len(PREFIX) :].decode("ascii", "replace"))

    def _on_down(self, why: str) -> None:
        """Without a connection no invalidations arrive: local copies are dropped."""
        if self._detail:
            return self._on_error("probe")
        self._local.clear()
        self._confirmed = float("-inf")
        self._detail = f"{why}; answers are not cached until it is back (make logs, or PROXY_REDIS_URL)"
        return log.warning("redis is down: %s", why)

    def _on_up(self, replies: list[Any], sent: float) -> None:
        self._tracking = not isinstance(replies[0], CommandError)
        if self._detail:
            log.warning("redis is back")
        self._detail = ""
        self._on_epochs(replies[2], sent)

    async def _poll_forever(self) -> None:
        while True:
            await asyncio.sleep(POLL_SECONDS)
            sent = time.monotonic()
            pipeline = await self._execute([("HGETALL", EPOCHS)], "epoch")
            if pipeline is not None:
                self._on_epochs(pipeline.replies[0], sent)

    def _on_epochs(self, reply: Any, sent: float) -> None:
        if isinstance(reply, dict):
            self._set_epochs(
                {name.decode("utf-8", "replace"): token.decode("utf-8", "replace") for name, token in reply.items()}
            )
            self._confirmed = sent

    async def report(self) -> dict[str, Any]:
        """For the status page: `state`, and what redis reports about itself."""
        started = time.perf_counter()
        pong = await self._execute([("PING",)], "report")
        latency = (time.perf_counter() - started) * 1000
        pipeline = await self._execute([("INFO",), ("DBSIZE",)], "report") if pong else None
        if pipeline is None or any(isinstance(reply, CommandError) for reply in pipeline.replies):
            return {"state": "down", "detail": self._detail or "redis does not answer INFO"}
        info = dict(line.split(":", 1) for line in str(pipeline.replies[0], "utf-8").splitlines() if ":" in line)
        server = "valkey" if "valkey_version" in info else "redis"
        about = {"state": "up", "server": server, "version": info.get(f"{server}_version")}
        memory = {"used_memory_bytes": int(info.get("used_memory", 0)), "latency_ms": round(latency, 3)}
        return about | memory | {"entries": pipeline.replies[1]}


def scope(tenant: str | None, model: str | None) -> str:
    """The name of a flush's scope, as JSON, so that no two scopes share a name. All entries: the empty name."""
    return "" if tenant is None and model is None else orjson.dumps([tenant, model]).decode()


def _alive(entry: Entry | None, epoch: str, now: float) -> Entry | None:
    """The entry, unless it is of an older epoch or past its grace. It may be stale: see its age."""
    if entry is None or entry.epoch != epoch or entry.age(now) >= entry.ttl + entry.grace:
        return None
    return entry
