"""Two proxies that ask for virtual keys, one redis behind them: for test_keys.py, test_limits.py, test_ledger.py."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2
import redis
from fixtures_proxy import Bench, mock, new, proxy, redis_url
from processes import SHOWN_ON_FAILURE, Process, python, redis_server

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
        """`python -m lab_proxy …` with these proxies' redis."""
        env = os.environ | {"PROXY_REDIS_URL": redis_url(self.redis), "PROXY_REQUIRE_KEYS": "true"}
        done = subprocess.run(
            python("lab_proxy", *args), env=env, capture_output=True, text=True, timeout=60, check=False
        )
        assert not check or done.returncode == 0, done.stderr
        return done


@contextlib.contextmanager
def school_on(folder: Path, redis_port: int | None = None, **settings: str) -> Iterator[School]:
    prices = folder / "prices.yaml"
    prices.write_text(PRICES)
    with contextlib.ExitStack() as stack:
        paid, model = stack.enter_context(mock(folder)), stack.enter_context(mock(folder))
        server = stack.enter_context(redis_server(folder, port=redis_port))
        benches = []
        for _ in range(2):
            started = stack.enter_context(
                proxy(
                    folder,
                    redis=redis_url(server),
                    model=model.url,
                    paid=paid.url,
                    **{"admin_key": ADMIN_KEY, "prices_file": str(prices), "upstream_retries": "0"} | settings,
                )
            )
            http = stack.enter_context(httpx2.Client(base_url=started.url, timeout=60, event_hooks=SHOWN_ON_FAILURE))
            benches.append(Bench(started, paid, model, server, http))
        db = stack.enter_context(contextlib.closing(redis.Redis(port=server.port, socket_timeout=5)))
        yield School(benches[0], benches[1], server, folder, db)
