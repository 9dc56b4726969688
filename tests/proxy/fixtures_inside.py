"""The whole proxy in this process, before a real redis and a mock upstream: for tests that hold or cancel its parts."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from fixtures_proxy import UPSTREAM_KEY, control_client, mock, new, redis_url
from lab_proxy import __main__ as program
from lab_proxy.http.app import App
from lab_proxy.keys.store import KeyStore, key_spec
from lab_proxy.ledger.prices import Prices
from lab_proxy.requests.context import Traffic
from lab_proxy.settings import Settings
from lab_proxy.upstreams.routes import Routes
from processes import Process, redis_server

TPM = 600  # tokens a minute of a key: one refills in 0.1 s, in which a request is over


class Caller:
    """The ASGI side of one request."""

    def __init__(self, path: str, body: dict[str, Any] | None, key: str = "") -> None:
        """Without a body a GET."""
        self.raw = b"" if body is None else json.dumps(body).encode()
        headers = {"host": "localhost", "content-type": "application/json", "authorization": f"Bearer {key}"}
        self.scope = {
            "type": "http", "method": "GET" if body is None else "POST", "path": path, "query_string": b"",
            "http_version": "1.1",
            "headers": [(name.encode(), value.encode()) for name, value in headers.items()],
        }  # fmt: skip
        self.status = 0
        self.ended = False
        self.body = b""
        self._asked = False

    async def receive(self) -> dict[str, Any]:
        if self._asked:
            await asyncio.Event().wait()
        self._asked = True
        return {"type": "http.request", "body": self.raw, "more_body": False}

    async def send(self, message: dict[str, Any]) -> None:
        self.status = message.get("status", self.status)
        self.body += message.get("body", b"")
        self.ended = message["type"] == "http.response.body" and not message.get("more_body", False)
        await asyncio.sleep(0)  # uvicorn waits here for a slow client


@dataclass
class Inside:
    """The application and its parts."""

    app: App
    traffic: Traffic
    paid: Process
    parts: dict[str, Any]
    keys: KeyStore

    async def redis(self, *command: Any) -> Any:
        return await self.parts["Client"].execute(*command)

    async def ask(self, path: str, body: dict[str, Any] | None, key: str = "") -> Caller:
        caller = Caller(path, body, key)
        await self.app(caller.scope, caller.receive, caller.send)
        return caller

    async def key(self, tpm: int = TPM) -> tuple[str, str]:
        """Id and secret of a key with every limit."""
        spec = {"owner": new().replace("question ", ""), "rpm": 10_000, "tpm": tpm, "concurrency": 50,
                "budget_per_day_usd": "100"}  # fmt: skip
        ((key, secret),) = await self.keys.create([key_spec(spec)])
        return key.id, secret

    async def booked(self, key_id: str) -> dict[str, Any]:
        ledger = self.parts["Ledger"]
        await ledger.flush()
        today = datetime.now(UTC).date()
        total: dict[str, Any] = (await ledger.usage(today, today, limit=1, key_id=key_id)).total
        return total

    async def clock(self) -> int:
        seconds, micros = await self.redis("TIME")
        return int(seconds) * 1_000_000 + int(micros)


@contextlib.contextmanager
def upstream_and_redis(folder: Path) -> Iterator[tuple[Process, Process]]:
    with mock(folder) as paid, redis_server(folder) as store:
        yield paid, store


@contextlib.asynccontextmanager
async def inside_on(
    outside: tuple[Process, Process], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Inside]:
    """`outside`: what `upstream_and_redis` has started."""
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.setenv(name, "*")
    paid, store = outside
    control_client().post(f"{paid.url}/reset")
    (tmp_path / "prices.yaml").write_text(
        "upstreams:\n  openai:\n    source: the test\n    checked: 2026-11-23\n    models:\n"
        "      gpt-mock: {input: 3, output: 7}\n      text-embedding-mock: {input: 1, output: 0}\n"
        "      gpt-mock-tools: {input: 3, output: 7}\n"
    )
    settings = Settings(
        model_url=paid.url, redis_url=redis_url(store), openai_base_url=f"{paid.url}/v1", openai_api_key=UPSTREAM_KEY,
        require_keys=True, cache_secret_file=tmp_path / "secret", prices_file=tmp_path / "prices.yaml",
        redis_timeout_ms=2000, upstream_retries=0, batch_concurrency=0, model_poll_seconds=60,
    )  # fmt: skip
    routes, prices = Routes(settings), Prices(settings.prices_file)
    app, traffic = program.build(settings, routes, prices, bytes(32))
    async with contextlib.AsyncExitStack() as stack:
        for part in app._parts:
            stack.push_async_callback(part.stop)
            await part.start()
        parts = {type(part).__name__: part for part in app._parts}
        yield Inside(app, traffic, paid, parts, KeyStore(parts["Client"]))


@pytest.fixture(scope="module", name="outside")
def outside_fixture(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Process, Process]]:
    with upstream_and_redis(tmp_path_factory.mktemp("outside")) as made:
        yield made


@pytest.fixture(name="inside")
async def inside_fixture(
    outside: tuple[Process, Process], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Inside]:
    async with inside_on(outside, tmp_path, monkeypatch) as made:
        yield made
