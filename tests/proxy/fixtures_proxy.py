"""The proxy with a mock upstream, a mock model service and a real redis, for most of the proxy's tests."""

from __future__ import annotations

import contextlib
import functools
import json
import sys
import uuid
from collections.abc import AsyncIterator, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx2
import pytest
from processes import GENEROUS_SECONDS, SHOWN_ON_FAILURE, Process, eventually, free_port, process, python, redis_server  # noqa: F401 - for the tests

if TYPE_CHECKING:
    from lab_proxy.redis.client import Client

# A machine that stands still for a moment is not what most tests are about: those that are say HURRIED_MS, the default.
PATIENT_MS, HURRIED_MS = "2000", "60"
MOCK = Path(__file__).with_name("mock_upstream.py")
UPSTREAM_KEY = "sk-upstream-secret-0123456789"
CHAT_MODEL = "smollm2-135m-instruct"
EMBEDDING_MODEL = "all-minilm-l6-v2"
# For tests of what upstreams and clients that are too slow meet.
SHORT_TIMEOUTS = {
    "connect_timeout_seconds": "1",
    "first_byte_timeout_seconds": "1",
    "idle_timeout_seconds": "1",
    "total_timeout_seconds": "1.6",
    "body_timeout_seconds": "1",
}


@functools.cache
def control_client() -> httpx2.Client:
    """Client of the mocks' own pages. One for all: a client's TLS context takes 20 ms to make.

    No connection is kept: the mock closes an idle one after 5 s, perhaps just when it is asked again.
    """
    return httpx2.Client(timeout=60, limits=httpx2.Limits(max_keepalive_connections=0))


@dataclass
class Bench:
    """A proxy and what stands behind it. `paid` is the OpenAI upstream, `model` the stand-in for the model service."""

    proxy: Process
    paid: Process
    model: Process
    redis: Process
    http: httpx2.Client = field(repr=False)

    def post(self, path: str, body: Any, **headers: str) -> httpx2.Response:
        sent = {name.replace("_", "-"): value for name, value in headers.items()}
        return self.http.post(f"/v1/{path}", json=body, headers=sent)

    def chat(self, text: str | None = None, *, headers: dict[str, str] | None = None, **more: Any) -> httpx2.Response:
        """A chat request at temperature 0 to the paid upstream; a text of its own unless one is given."""
        body = {"model": "gpt-mock", "messages": [{"role": "user", "content": text or new()}], "temperature": 0} | more
        return self.http.post("/v1/chat/completions", json=body, headers=headers or {})

    def embed(self, given: Any, *, headers: dict[str, str] | None = None, **more: Any) -> httpx2.Response:
        body = {"model": EMBEDDING_MODEL, "input": given} | more
        return self.http.post("/v1/embeddings", json=body, headers=headers or {})

    def calls(self, of: Process | None = None) -> dict[str, Any]:
        answer: dict[str, Any] = control_client().get(f"{(of or self.paid).url}/calls").json()
        return answer

    def forget(self) -> None:
        """Each test counts its own calls."""
        for each in (self.paid, self.model):
            control_client().post(f"{each.url}/reset")

    def control(self, of: Process | None = None, **values: Any) -> None:
        """Of the stand-in for the model service, unless another is named."""
        control_client().post(f"{(of or self.model).url}/control", json=values)

    def catch_up(self) -> None:
        """Wait until this proxy has read what redis pushed so far: pushes come before later replies."""
        body = {"model": "gpt-mock", "messages": [{"role": "user", "content": new()}], "temperature": 0}
        answer = self.http.post("/cache/explain", json=body)
        assert answer.json().get("state") == "miss", answer.text

    def age(self, key: str, seconds: float) -> None:
        """Make the entry under this cache key older than it is, and wait until this proxy knows."""
        import redis  # the contract's container has none

        with redis.Redis(port=self.redis.port) as client:
            packed = client.get(f"lab:entry:{key}")
            assert isinstance(packed, bytes), f"nothing is stored under {key}"
            head, _, rest = packed.partition(b"\n")
            told = json.loads(head)
            told["at"] -= seconds
            client.set(f"lab:entry:{key}", json.dumps(told).encode() + b"\n" + rest, keepttl=True)
        self.catch_up()


def new() -> str:
    """A text that nobody has asked before."""
    return f"question {uuid.uuid4().hex}"


def state(answer: httpx2.Response) -> str:
    """`hit`, `miss stored`, `bypass sampled`, …: what Cache-Status says, in short."""
    status = answer.headers["cache-status"]
    assert status.startswith("llm-lab; "), status
    parts = [part for part in status.split("; ")[1:] if not part.startswith(("ttl=", "key="))]
    return " ".join(part.removeprefix("fwd=").removeprefix("detail=") for part in parts)


def key_of(answer: httpx2.Response) -> str:
    """The cache key of a hit."""
    return str(answer.headers["cache-status"].partition('key="')[2].rstrip('"'))


@contextlib.contextmanager
def mock(log_dir: Path, port: int | None = None) -> Iterator[Process]:
    port = port or free_port()
    with process("mock", [sys.executable, MOCK, "--port", str(port)], port=port, log_dir=log_dir) as started:
        yield started


@contextlib.contextmanager
def proxy(
    log_dir: Path,
    *,
    redis: str,
    model: str,
    paid: str | None = None,
    env: Mapping[str, str] | None = None,
    **settings: str,
) -> Iterator[Process]:
    """`settings`: further PROXY_ variables, without the prefix and in lower case. `env`: others.

    Without `env` the upstreams, which are on this machine, are reached directly.
    """
    port = free_port()
    env = {"NO_PROXY": "*", "no_proxy": "*"} if env is None else dict(env)
    env |= {
        "PROXY_PORT": str(port),
        "PROXY_MODEL_URL": model,
        "PROXY_REDIS_URL": redis,
        "PROXY_CACHE_SECRET_FILE": str(log_dir / "cache-secret"),
        "PROXY_FILES_DIR": str(log_dir / "files"),
        "PROXY_REDIS_TIMEOUT_MS": PATIENT_MS,
    }
    if paid:
        env |= {"PROXY_OPENAI_BASE_URL": f"{paid}/v1", "PROXY_OPENAI_API_KEY": UPSTREAM_KEY}
    env |= {f"PROXY_{name.upper()}": value for name, value in settings.items()}
    with process("proxy", python("lab_proxy"), port=port, log_dir=log_dir, env=env) as started:
        yield started


def redis_url(server: Process) -> str:
    return f"redis://127.0.0.1:{server.port}/0"


@contextlib.asynccontextmanager
async def redis_client(server: Process | str, **options: Any) -> AsyncIterator[Client]:
    """The proxy's own client, started, of a server or a URL. It waits for a slow machine unless told otherwise."""
    url = server if isinstance(server, str) else redis_url(server)
    from lab_proxy.redis.client import Client

    client = Client(url, **{"timeout": GENEROUS_SECONDS, **options})
    await client.start()
    try:
        yield client
    finally:
        await client.stop()


@contextlib.contextmanager
def bench_on(log_dir: Path, *, short_timeouts: bool = True, **settings: str) -> Iterator[Bench]:
    """`settings` as in `proxy`. Without `short_timeouts` the proxy has those that it ships with."""
    given = {"max_body_bytes": "100000", "allowed_origins": "https://lab.example"}
    given |= (SHORT_TIMEOUTS if short_timeouts else {}) | settings
    with contextlib.ExitStack() as stack:
        paid, model = stack.enter_context(mock(log_dir)), stack.enter_context(mock(log_dir))
        server = stack.enter_context(redis_server(log_dir))
        started = stack.enter_context(proxy(log_dir, redis=redis_url(server), model=model.url, paid=paid.url, **given))
        http = stack.enter_context(httpx2.Client(base_url=started.url, timeout=60, event_hooks=SHOWN_ON_FAILURE))
        yield Bench(started, paid, model, server, http)


@contextlib.contextmanager
def second(bench: Bench, tmp_path: Path, redis: str | None = None, **settings: str) -> Iterator[Bench]:
    """Another proxy before the same upstreams, with settings of its own."""
    url = redis or redis_url(bench.redis)
    settings = {"model": bench.model.url, "paid": bench.paid.url} | settings
    with (
        proxy(tmp_path, redis=url, **settings) as started,
        httpx2.Client(base_url=started.url, timeout=60, event_hooks=SHOWN_ON_FAILURE) as http,
    ):
        yield Bench(started, bench.paid, bench.model, bench.redis, http)


def events(answer: httpx2.Response) -> list[Any]:
    """The parsed events of a stream; `[DONE]` as text."""
    assert answer.headers["content-type"].startswith("text/event-stream")
    data = [line[6:] for line in answer.text.splitlines() if line.startswith("data: ")]
    return [text if text == "[DONE]" else json.loads(text) for text in data]


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    """A bench for the tests of one file."""
    with bench_on(tmp_path_factory.mktemp("bench")) as started:
        yield started


@pytest.fixture
def bench(running: Bench) -> Bench:
    running.forget()
    return running
