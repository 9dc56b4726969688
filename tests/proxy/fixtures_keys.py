"""Two proxies that ask for virtual keys, one redis behind them: for test_keys.py, test_limits.py, test_ledger.py."""

from __future__ import annotations

import contextlib
import io
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import fixtures_proxy
import httpx2
import pytest
import redis
from fixtures_proxy import Bench, mock, new, proxy, redis_url
from lab_proxy import __main__ as program
from lab_proxy.keys import limits
from processes import SHOWN_ON_FAILURE, Process, eventually, redis_server

ADMIN_KEY = "hQ7zW2mXv9Lr4KcT8nBf3JyPd6Sg1UeA"
PRICES = """
upstreams:
  model:
    source: this machine
    checked: 2026-11-23
    every: {input: 0, output: 0}
  openai:
    source: the tests
    checked: 2026-11-23
    models:
      gpt-mock: {input: 3, cached: 0.3, output: 7}
      gpt-mock-slow: {input: 3, output: 7}
      gpt-mock-endless: {input: 3, output: 7}
      gpt-dear: {input: 100000, output: 100000}
"""


@dataclass
class Holder:
    """Somebody with a key, at one of the proxies."""

    bench: Bench
    key: str
    id: str = ""

    @property
    def headers(self) -> dict[str, str]:
        return {"authorization": f"Bearer {self.key}"}

    def chat(self, text: str | None = None, *, headers: dict[str, str] | None = None, **more: Any) -> httpx2.Response:
        return self.bench.chat(text or new(), headers=self.headers | (headers or {}), **more)

    def get(self, path: str) -> httpx2.Response:
        return self.bench.http.get(path, headers=self.headers)

    def usage(self) -> dict[str, Any]:
        answer = self.get("/usage")
        assert answer.status_code == 200, answer.text
        said: dict[str, Any] = answer.json()
        return said


@dataclass
class School:
    """`one` and `two` are two proxy processes; they share nothing but redis and the folder of the cache secret."""

    one: Bench
    two: Bench
    redis: Process
    folder: Path
    db: redis.Redis = field(repr=False)

    def admin(self, method: str, path: str, *, at: Bench | None = None, **more: Any) -> httpx2.Response:
        headers = {"authorization": f"Bearer {ADMIN_KEY}"} | more.pop("headers", {})
        return (at or self.one).http.request(method, f"/admin/{path}", headers=headers, **more)

    def key(self, owner: str | None = None, *, at: Bench | None = None, **terms: Any) -> Holder:
        """A new key; its owner is nobody else's unless named."""
        answer = self.admin("POST", "keys", json={"owner": owner or new()} | terms)
        assert answer.status_code == 201, answer.text
        return Holder(at or self.one, answer.json()["key"], answer.json()["id"])

    def at_two(self, holder: Holder) -> Holder:
        return Holder(self.two, holder.key, holder.id)

    def command(self, *args: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """`python -m lab_proxy …` with these proxies' redis, without a process of its own."""
        out, errors = io.StringIO(), io.StringIO()
        with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors):
            patch.setenv("PROXY_REDIS_URL", redis_url(self.redis))
            patch.setenv("PROXY_REQUIRE_KEYS", "true")
            code = program.main(args)
        assert not check or code == 0, errors.getvalue()
        return subprocess.CompletedProcess(args, code, out.getvalue(), errors.getvalue())

    @contextlib.contextmanager
    def another(self, folder: Path, server: Process | None = None, **settings: str) -> Iterator[Bench]:
        """A proxy more before the same upstreams and prices, with what it writes in `folder`; on the same redis unless
        another `server` is given. For tests that kill it, or its redis."""
        with _bench(folder, self.one.paid, self.one.model, server or self.redis, **settings) as bench:
            yield bench

    def heard(self) -> None:
        """Wait until both proxies know every change of keys until now. Changes reach a proxy in their order: here that
        a key is refused which both used and which is revoked last."""
        last = self.key()
        for each in (last, self.at_two(last)):
            assert each.get("/v1/models").status_code == 200
        self.admin("DELETE", f"keys/{last.id}")
        for each in (last, self.at_two(last)):
            eventually(lambda each=each: each.get("/v1/models").status_code == 401, what="a revocation at a proxy")

    # ---- the limits of a key, as redis has them: a bucket refills by redis's clock

    def redis_time(self) -> int:
        """Microseconds of redis's clock."""
        seconds, micros = self.db.execute_command("TIME")
        return int(seconds) * 1_000_000 + int(micros)

    def refilled(self, since: int, a_minute: int) -> int:
        """How many at most came back since `since` (redis_time) to a bucket that refills by so many a minute."""
        return (self.redis_time() - since) * a_minute // 60_000_000

    def pass_time(self, key_id: str, seconds: float) -> None:
        """Make redis see the limits of this key as it would `seconds` later: all its times lie that much earlier."""
        micros, slots = round(seconds * 1e6), slots_of(key_id)
        for name in ("r", "t", "full"):
            self.db.hincrbyfloat(limits_of(key_id), name, -micros)
        for member in self.db.zrange(slots, 0, -1):
            self.db.zincrby(slots, -micros, member)

    def keep_slots(self, key_id: str) -> None:
        """The slots of this key's requests no longer run out: only the end of a request frees one."""
        slots = slots_of(key_id)
        never = self.redis_time() + 3600 * 1_000_000
        self.db.zadd(slots, dict.fromkeys(self.db.zrange(slots, 0, -1), never), xx=True)
        self.db.persist(slots)


def changed(monkeypatch: pytest.MonkeyPatch, assignment: str) -> None:
    """Proxies that start from here on have another value of a constant: `batches.worker.LEASE_SECONDS = 1.0`."""
    module = assignment.partition(" ")[0].rpartition(".")[0]
    program = (
        f"import sys, lab_proxy.{module}, lab_proxy.__main__ as program; "
        f"lab_proxy.{assignment}; sys.exit(program.main())"
    )
    monkeypatch.setattr(fixtures_proxy, "python", lambda _: [sys.executable, "-c", program])


def limits_of(key_id: str) -> str:
    """The name in redis of what limits.lua keeps of a key."""
    return f"{limits.PREFIX}{{{key_id}}}"


def slots_of(key_id: str) -> str:
    """The name in redis of the requests of a key that run."""
    return f"{limits_of(key_id)}:slots"


@contextlib.contextmanager
def _bench(folder: Path, paid: Process, model: Process, server: Process, **settings: str) -> Iterator[Bench]:
    prices = folder / "prices.yaml"
    if not prices.exists():  # of another proxy, which watches it
        prices.write_text(PRICES)
    given = {"admin_key": ADMIN_KEY, "prices_file": str(prices), "upstream_retries": "0"} | settings
    with (
        proxy(folder, redis=redis_url(server), model=model.url, paid=paid.url, **given) as started,
        httpx2.Client(base_url=started.url, timeout=60, event_hooks=SHOWN_ON_FAILURE) as http,
    ):
        yield Bench(started, paid, model, server, http)


@contextlib.contextmanager
def school_on(folder: Path, *, paid_port: int | None = None, **settings: str) -> Iterator[School]:
    with contextlib.ExitStack() as stack:
        paid, model = stack.enter_context(mock(folder, paid_port)), stack.enter_context(mock(folder))
        server = stack.enter_context(redis_server(folder))
        one, two = (stack.enter_context(_bench(folder, paid, model, server, **settings)) for _ in range(2))
        db = stack.enter_context(contextlib.closing(redis.Redis(port=server.port, socket_timeout=60)))
        yield School(one, two, server, folder, db)
