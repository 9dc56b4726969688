"""The upstream client before raw sockets: broken answers, connections, timeouts, cancellation, TLS, forward proxies."""

from __future__ import annotations

import asyncio
import contextlib
import datetime as dt
import ipaddress
import socket
import ssl
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import httpx2
import pytest
import uvloop
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from fixtures_proxy import CHAT_MODEL, UPSTREAM_KEY, Bench, new, proxy, redis_url
from lab_proxy.errors import ProxyError, UpstreamBroken, UpstreamDown, UpstreamTimeout
from lab_proxy.settings import Settings, forward_proxy
from lab_proxy.telemetry.metrics import Metrics
from lab_proxy.upstreams.client import UpstreamClient, UpstreamFault, UpstreamRequest
from lab_proxy.upstreams.reply import UpstreamResponse, forwarded_headers
from lab_proxy.upstreams.routes import Routes, Target, UpstreamConfig
from processes import eventually_async

Step = bytes | float | str  # bytes to send, seconds to wait, or `close`, `reset`, `hang`
Run = Callable[[Coroutine[Any, Any, None]], None]
Handler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]

OK = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}"
CHUNKED = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"
OPEN = b"HTTP/1.1 200 OK\r\n\r\n"
CHAT = b'{"choices": [{"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": "Yes."}}]}'
CHAT_OK = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%s" % (len(CHAT), CHAT)


@pytest.fixture
def run() -> Run:
    """Run a test on the loop that the proxy uses."""

    async def bounded(work: Awaitable[None]) -> None:
        async with asyncio.timeout(60):
            await work

    return lambda work: uvloop.run(bounded(work))


@dataclass
class Peer:
    """A server whose n-th answer is the n-th of its turns; the last one repeats."""

    turns: tuple[Sequence[Step], ...]
    url: str = ""
    requests: list[bytes] = field(default_factory=list)  # head and body
    connections: int = 0
    gone: asyncio.Event = field(default_factory=asyncio.Event)  # the client left during `hang`

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        while await self.answer(reader, writer):
            pass

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """Whether the connection is kept."""
        head = await reader.readuntil(b"\r\n\r\n")
        length = [line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")]
        body = await reader.readexactly(int(length[0].split(b":")[1])) if length else b""
        self.requests.append(head + body)
        for step in self.turns[min(len(self.requests), len(self.turns)) - 1]:
            if isinstance(step, bytes):
                writer.write(step)
                await writer.drain()
            elif isinstance(step, float):
                await asyncio.sleep(step)
            elif step == "hang":
                if not await reader.read():
                    self.gone.set()
            elif step == "reset":
                link = writer.get_extra_info("socket")
                link.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")
                writer.transport.abort()
                return False
            else:
                return False
        return True


@contextlib.asynccontextmanager
async def serving(handler: Handler, tls: ssl.SSLContext | None = None) -> AsyncIterator[int]:
    """The port of a server; its connections end with it."""
    tasks = set()

    async def kept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        tasks.add(asyncio.current_task())
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError, ssl.SSLError):
            await handler(reader, writer)
        writer.close()

    server = await asyncio.start_server(kept, "127.0.0.1", 0, ssl=tls, limit=2**20)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()
        for task in tasks:
            if task is not None:
                task.cancel()
        await asyncio.sleep(0)


@contextlib.asynccontextmanager
async def peer(*turns: Sequence[Step], tls: ssl.SSLContext | None = None) -> AsyncIterator[Peer]:
    made = Peer(turns)
    async with serving(made.serve, tls) as port:
        made.url = f"{'https' if tls else 'http'}://127.0.0.1:{port}"
        yield made


class Client:
    """An upstream client and one request at a time."""

    def __init__(self, url: str, key: str | None = "sk-x", kind: str = "openai", **settings: Any) -> None:
        native = kind == "model"
        self.config = UpstreamConfig("paid", kind, url, key, configured=True, stream_usage=True, native=native)
        self.calls: list[Any] = []
        metrics = cast("Metrics", SimpleNamespace(count=lambda *_: None))
        self.client = UpstreamClient(self.config, Settings(**{"upstream_retries": 0} | settings), metrics)

    async def send(
        self, body: bytes = b"{}", *, stream: bool = False, within: float = 30, model: str = "m"
    ) -> UpstreamResponse:
        target = Target("paid", model, None, False, None, 10, False, {}, {}, self.config)
        deadline = time.perf_counter() + within
        asked = UpstreamRequest("/v1/chat/completions", "id", stream, deadline, lambda _: body, self.calls.append)
        try:
            return await self.client.send(asked, target)
        except UpstreamFault as fault:
            raise fault.error from None

    async def json(self, body: bytes = b"{}", **more: Any) -> bytes:
        reply = await self.send(body, **more)
        try:
            return (await reply.json())[0]
        finally:
            reply.close()

    async def chunks(self, **more: Any) -> bytes:
        reply = await self.send(stream=True, **more)
        try:
            return b"".join([piece async for piece in reply.chunks()])
        finally:
            reply.close()


@contextlib.asynccontextmanager
async def client(url: str, **more: Any) -> AsyncIterator[Client]:
    made = Client(url, **more)
    try:
        yield made
    finally:
        await made.client.stop()


# ---- answers


@pytest.mark.parametrize(
    "steps",
    [
        [b"SSH-2.0-OpenSSH_9.7\r\n"],
        [b"HTTP/1.1 200 OK\r\nx-a: 1\0\r\n\r\n"],
        [b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\ntransfer-encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n"],
        [b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\ncontent-length: 3\r\n\r\n{} "],
        [b"HTTP/1.1 200 OK\r\ntransfer-encoding: gzip\r\n\r\n{}"],
        [b"HTTP/1.1 101 Switching\r\nconnection: upgrade\r\nupgrade: websocket\r\n\r\n"],
        [CHUNKED, b"2\r\n{}\r\n", 0.02, b"zz\r\n"],
        [CHUNKED, b"2\r\n{}", 0.02, b"k"],
        [CHUNKED, b"2\r\n{}\r\n", "close"],
        [b"HTTP/1.1 200 OK\r\ncontent-length: 3\r\n\r\n{}", "close"],
        [b"HTTP/1.1 200 OK\r\ncontent-length: 3\r\n\r\n{}", 0.02, "reset"],
        [OPEN, b"{}", 0.02, "reset"],
        [b"HTTP/1.1 200 OK\r\ncont", "close"],
        ["reset"],
        [b"HTTP/1.1 200 OK\r\n%s\r\n" % (b"x-a: 1\r\n" * 200)],
        [b"HTTP/1.1 200 OK\r\nx-a: ", *[b"a" * 10_000] * 7, b"\r\n\r\n"],
        [CHUNKED, b"2\r\n{}\r\n0\r\n", b"x-a: 1\r\n" * 500],
    ],
    ids=[
        "ssh", "nul", "length and chunks", "two lengths", "transfer coding", "upgrade", "chunk size",
        "chunk end", "last chunk", "length", "length, reset", "no length, reset", "head", "reset", "many headers",
        "long header", "many trailers",
    ],
)  # fmt: skip
def test_an_answer_that_is_faulty_or_cut_off_is_an_error(run: Run, steps: list[Step]) -> None:
    """As a body and as a stream: at once, without waiting for a timeout, and the connection is closed."""

    async def work() -> None:
        async with peer([*steps, "hang"]) as there, client(there.url) as asked:
            with pytest.raises(UpstreamBroken):
                await asked.json()
            with pytest.raises(UpstreamBroken):
                await asked.chunks()
            assert there.connections == 2

    run(work())


@pytest.mark.parametrize(
    "steps",
    [
        [OPEN, b"{", 0.02, b"}", "close"],
        [b"HTTP/1.0 200 OK\r\n\r\n{}", "close"],
        [b"HTTP/1.1 100 Continue\r\n\r\n", 0.02, b"HTTP/1.1 103 Early Hints\r\nlink: x\r\n\r\n" + OK],
        [CHUNKED, b"1\r\n{\r\n", 0.02, b"1;a=b\r\n}\r\n0\r\nx-trailer: 1\r\n\r\n"],
    ],
    ids=["to the end", "1.0", "interim", "chunks and trailers"],
)
def test_answers_end_where_http_says(run: Run, steps: list[Step]) -> None:
    async def work() -> None:
        async with peer(steps) as there, client(there.url) as asked:
            assert await asked.json() == b"{}"
            assert await asked.chunks() == b"{}"

    run(work())


def test_an_answer_that_is_compressed_unasked_is_refused_by_name(run: Run) -> None:
    async def work() -> None:
        packed = b"HTTP/1.1 200 OK\r\ncontent-encoding: gzip\r\ncontent-length: 2\r\n\r\n{}"
        async with peer([packed]) as there, client(there.url) as asked:
            with pytest.raises(UpstreamBroken, match="content-encoding: gzip"):
                await asked.json()

    run(work())


def test_the_first_of_several_headers_counts_and_control_characters_are_not_forwarded(run: Run) -> None:
    async def work() -> None:
        head = (
            b"HTTP/1.1 200 OK\r\nX-RateLimit-A: 1\r\nx-ratelimit-a: 2\r\nx-ratelimit-b: \xe9\r\nx-ratelimit-c: \x01\r\n"
        )
        async with peer([head + OK.partition(b"\r\n")[2]]) as there, client(there.url) as asked:
            reply = await asked.send()
            assert reply.headers == {"x-ratelimit-a": "1", "x-ratelimit-b": "é"}
            reply.close()

    run(work())
    assert not forwarded_headers({"set-cookie": "a=b", "retry-after": "1\x1b"})


def test_an_answer_before_the_whole_request_is_read_is_passed_on(run: Run) -> None:
    """And the connection, which has the rest of the request in it, is closed."""

    async def early(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        said = b'{"error": {"message": "Too large."}}'
        writer.write(b"HTTP/1.1 413 Too Large\r\ncontent-length: %d\r\n\r\n%s" % (len(said), said))
        await reader.read()

    async def work() -> None:
        async with serving(early) as port, client(f"http://127.0.0.1:{port}") as asked:
            with pytest.raises(ProxyError) as caught:
                await asked.json(bytes(50_000_000))
            assert caught.value.status == 413

    run(work())


# ---- requests


def test_a_request_has_the_headers_that_were_meant_and_each_once(run: Run) -> None:
    """Path below the base URL's, not encoded twice; a model id cannot end the line."""

    async def work() -> None:
        async with peer([OK]) as there:
            async with client(f"{there.url}/b%20ase/") as asked:
                await asked.json(b'{"a": 1}')
            async with client(there.url, key=None, kind="model") as asked:
                await asked.json(model="a\r\nb/ä")
            async with client(there.url.replace("//", "//me:a%20b@"), key=None) as asked:
                await asked.json()
        head, _, body = there.requests[0].partition(b"\r\n\r\n")
        first, *lines = head.decode().split("\r\n")
        names = [line.partition(":")[0].lower() for line in lines]
        assert (first, body) == ("POST /b%20ase/chat/completions HTTP/1.1", b'{"a": 1}')
        assert sorted(names) == [
            "accept", "accept-encoding", "authorization", "content-length", "content-type", "host", "user-agent",
            "x-request-id",
        ]  # fmt: skip
        assert "accept-encoding: identity" in lines
        assert there.requests[1].startswith(b"POST /m/a%0D%0Ab%2F%C3%A4/v1/chat/completions HTTP/1.1\r\n")
        assert b"authorization: Basic bWU6YSBi\r\n" in there.requests[2]

    run(work())


def test_cookies_are_not_kept_and_redirects_not_followed(run: Run) -> None:
    async def work() -> None:
        away = b"HTTP/1.1 307 Away\r\nlocation: /there\r\nset-cookie: a=b\r\ncontent-length: 0\r\n\r\n"
        async with peer([away], [OK]) as there, client(there.url) as asked:
            with pytest.raises(UpstreamBroken):
                await asked.json()
            await asked.json()
            assert len(there.requests) == 2
            assert b"cookie" not in there.requests[1].lower()

    run(work())


# ---- connections


def test_a_connection_is_used_again_where_the_answer_has_an_end(run: Run) -> None:
    async def work() -> None:
        turns: list[list[Step]] = [[OK], [CHUNKED + b"2\r\n{}\r\n0\r\n\r\n"], [OK]]
        async with peer(*turns) as there, client(there.url) as asked:
            for _ in range(5):
                assert await asked.json() == b"{}"
                assert await asked.chunks() == b"{}"
            assert there.connections == 1
        closing = OK.replace(b"OK\r\n", b"OK\r\nconnection: close\r\n")
        async with peer([closing]) as there, client(there.url) as asked:
            for _ in range(2):
                assert await asked.json() == b"{}"
            assert there.connections == 2

    run(work())


EVIL = b"HTTP/1.1 200 OK\r\ncontent-length: 4\r\n\r\nevil"


@pytest.mark.parametrize(
    "steps",
    [[OK + EVIL], [OK[:-2], 0.02, b"{}" + EVIL], [OK[:-2], 0.02, b"{}!"], [OK, 0.02, EVIL], [OK, 0.02, b"zzz"]],
    ids=["glued", "glued to its end", "byte", "idle", "idle garbage"],
)
def test_bytes_that_nobody_asked_for_are_no_answer(run: Run, steps: list[Step]) -> None:
    """More than one answer to one request: the next request does not get the rest, and has a connection of its own."""

    async def work() -> None:
        written = asyncio.Event()

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await there.answer(reader, writer)
            written.set()
            await there.answer(reader, writer)

        there = Peer((steps, [OK]))
        async with serving(serve) as port, client(f"http://127.0.0.1:{port}") as asked:
            assert await asked.json() == b"{}"
            await written.wait()
            await asyncio.sleep(0.02)  # the bytes arrive
            assert await asked.json() == b"{}"
            assert len(there.requests) == 2

    run(work())


def test_a_connection_that_was_closed_or_idle_for_long_is_not_used(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    async def work() -> None:
        async with peer([OK, "close"]) as there, client(there.url) as asked:
            for count in range(3):
                assert await asked.json() == b"{}"
                assert there.connections == count + 1
                await asyncio.sleep(0.02)  # the end arrives
        monkeypatch.setattr("lab_proxy.upstreams.client.KEEPALIVE_SECONDS", 0.0)
        async with peer([OK]) as there, client(there.url) as asked:
            for _ in range(2):
                await asked.json()
            assert there.connections == 2

    run(work())


def test_a_post_is_repeated_as_often_as_the_setting_says_and_a_get_once(run: Run) -> None:
    """The upstream closes a used connection as the next request arrives. A POST may have been worked on: only the
    counted retries repeat it."""

    async def work() -> None:
        async with peer([OK], ["close"], [OK]) as there, client(there.url) as asked:
            await asked.json()
            with pytest.raises(UpstreamBroken):
                await asked.json()
            assert (len(there.requests), [call.outcome for call in asked.calls]) == (2, ["ok", "failed"])
        async with peer([OK], ["close"], [OK]) as there, client(there.url, upstream_retries=1) as asked:
            await asked.json()
            await asked.json()
            assert [call.outcome for call in asked.calls] == ["ok", "failed", "ok"]
        async with peer([OK], ["close"], [OK]) as there, client(there.url) as asked:
            for _ in range(2):
                assert await asked.client.get_json("/models", 30) == (200, {})
            assert (len(there.requests), there.connections) == (3, 2)

    run(work())


def test_as_many_connections_as_requests(run: Run) -> None:
    """No request waits for another: each is answered when the last one has arrived."""

    async def work() -> None:
        count, everyone = 120, asyncio.Event()

        async def together(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.readuntil(b"\r\n\r\n{}")
            arrived.append(1)
            if len(arrived) == count:
                everyone.set()
            await everyone.wait()
            writer.write(OK)
            await reader.read()

        arrived: list[int] = []
        async with serving(together) as port, client(f"http://127.0.0.1:{port}") as asked:
            assert await asyncio.gather(*(asked.json() for _ in range(count))) == [b"{}"] * count

    run(work())


def test_a_caller_that_does_not_read_stops_the_upstream(run: Run) -> None:
    """Memory does not grow with the answer; read to its end, the answer is whole and the connection used again."""
    size = 64 * 1024 * 1024

    async def work() -> None:
        sent = 0

        async def flood(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            nonlocal sent
            await reader.readuntil(b"\r\n\r\n{}")
            writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % size)
            for _ in range(size // 65_536):
                writer.write(bytes(65_536))
                await writer.drain()
                sent += 65_536
            await reader.readuntil(b"\r\n\r\n{}")
            writer.write(OK)

        async with serving(flood) as port, client(f"http://127.0.0.1:{port}") as asked:
            reply = await asked.send(stream=True)
            before = -1
            while sent != before:  # until it stands still
                before = sent
                await asyncio.sleep(0.1)
            assert sent < size / 2
            pieces = [len(piece) async for piece in reply.chunks()]
            reply.close()
            assert sum(pieces) == size
            assert max(pieces) < 2**21
            assert await asked.json() == b"{}"

    run(work())


# ---- waiting, leaving


def test_every_wait_has_a_bound(run: Run) -> None:
    """For the head, for the next piece, for the connection. The upstream sees each end."""

    async def work() -> None:
        async with peer(["hang"]) as there, client(there.url) as asked:
            with pytest.raises(UpstreamTimeout, match="sent no data"):
                await asked.json(within=0.1)
            await there.gone.wait()
        first = CHUNKED + b"2\r\n{}\r\n"
        async with peer([first, "hang"]) as there, client(there.url, idle_timeout_seconds=0.1) as asked:
            reply = await asked.send(stream=True)
            pieces = reply.chunks()
            assert await anext(pieces) == b"{}"
            with pytest.raises(UpstreamTimeout, match="sent no data"):
                await anext(pieces)
            reply.close()
            await there.gone.wait()
        with socket.create_server(("127.0.0.1", 0), backlog=0) as full, contextlib.ExitStack() as others:
            for _ in range(4):  # as many as the kernel accepts by itself
                one = others.enter_context(socket.socket())
                one.setblocking(False)
                one.connect_ex(full.getsockname())
            url = f"http://127.0.0.1:{full.getsockname()[1]}"
            async with client(url, connect_timeout_seconds=0.1) as asked:
                with pytest.raises(UpstreamTimeout, match="did not accept a connection"):
                    await asked.json()
            async with client(url) as asked:
                with pytest.raises(UpstreamTimeout, match="sent no data"):
                    await asked.json(within=0.1)

    run(work())


def test_nobody_there_is_told_from_a_timeout(run: Run) -> None:
    async def work() -> None:
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            for host in (f"127.0.0.1:{taken.getsockname()[1]}", "no-such-host.invalid"):
                async with client(f"http://{host}") as asked:
                    with pytest.raises(UpstreamDown, match="cannot be reached"):
                        await asked.json()

    run(work())


@pytest.mark.parametrize("secure", [False, True], ids=["plain", "tls"])
@pytest.mark.parametrize("steps", [["hang"], [CHUNKED + b"2\r\n{}\r\n", "hang"]], ids=["head", "body"])
def test_a_cancelled_request_closes_its_connection(
    run: Run, steps: list[Step], secure: bool, authority: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def work() -> None:
        async with peer(steps, tls=authority.server() if secure else None) as there:
            if secure:
                monkeypatch.setattr("aiohttp.connector._SSL_CONTEXT_VERIFIED", authority.client())
            async with client(there.url) as asked:
                task = asyncio.ensure_future(asked.json())
                await eventually_async(lambda: there.requests)
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
                await there.gone.wait()

    run(work())


def test_stop_ends_answers_that_are_still_read(run: Run) -> None:
    async def work() -> None:
        async with peer([CHUNKED + b"2\r\n{}\r\n", "hang"]) as there, client(there.url) as asked:
            reply = await asked.send(stream=True)
            pieces = reply.chunks()
            assert await anext(pieces) == b"{}"
            await asked.client.stop()
            await there.gone.wait()
            with pytest.raises(UpstreamBroken):
                await anext(pieces)
            reply.close()

    run(work())


# ---- TLS and forward proxies


@dataclass(frozen=True)
class Authority:
    """A certificate of `localhost`, 127.0.0.1 and upstream.example that signs itself."""

    path: Path
    key: Path

    def server(self) -> ssl.SSLContext:
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.load_cert_chain(self.path, self.key)
        return context

    def client(self) -> ssl.SSLContext:
        return ssl.create_default_context(cafile=self.path)


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    folder = tmp_path_factory.mktemp("tls")
    key, name = ec.generate_private_key(ec.SECP256R1()), x509.Name.from_rfc4514_string("CN=company")
    now = dt.datetime.now(dt.UTC)
    names: list[x509.GeneralName] = [
        x509.DNSName("localhost"), x509.DNSName("upstream.example"),
        x509.IPAddress(ipaddress.ip_address("127.0.0.1")),
    ]  # fmt: skip
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - dt.timedelta(hours=1))
        .not_valid_after(now + dt.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    found = Authority(folder / "cert.pem", folder / "key.pem")
    found.path.write_bytes(made.public_bytes(serialization.Encoding.PEM))
    plain = serialization.NoEncryption()
    found.key.write_bytes(key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, plain))
    return found


def test_tls_ends_are_noticed_and_names_checked(
    run: Run, authority: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A body that breaks off is broken; a certificate of another name, and a port without TLS, are 503."""
    monkeypatch.setattr("aiohttp.connector._SSL_CONTEXT_VERIFIED", authority.client())

    async def other(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"220 mail.example ESMTP\r\n")
        await reader.read()

    async def work() -> None:
        short = b"HTTP/1.1 200 OK\r\ncontent-length: 3\r\n\r\n{}"
        async with peer([OPEN, b"{}", "close"], [short, "close"], tls=authority.server()) as there:
            async with client(there.url) as asked:
                assert await asked.json() == b"{}"
                with pytest.raises(UpstreamBroken):
                    await asked.json()
            async with client(there.url.replace("127.0.0.1", "127.0.0.2")) as asked:
                with pytest.raises(UpstreamDown):
                    await asked.json()
            assert len(there.requests) == 2
        async with serving(other) as port, client(f"https://127.0.0.1:{port}") as asked:
            with pytest.raises(UpstreamDown):
                await asked.json()

    run(work())


@dataclass
class ForwardProxy:
    """Sends everything to one port, whatever host was asked for."""

    port: int
    heads: list[bytes] = field(default_factory=list)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        self.heads.append(head)
        there_reader, there_writer = await asyncio.open_connection("127.0.0.1", self.port)
        if head.startswith(b"CONNECT "):
            writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
        else:
            there_writer.write(head)
        await asyncio.gather(_copy(reader, there_writer), _copy(there_reader, writer))


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        while data := await reader.read(65_536):
            writer.write(data)
    finally:
        writer.close()


def test_a_foreign_upstream_is_reached_through_the_forward_proxy(
    bench: Bench, tmp_path: Path, authority: Authority
) -> None:
    """HTTPS by a tunnel that does not show the key, HTTP by absolute URLs; hosts in NO_PROXY and the model directly.

    The company's authority is trusted by SSL_CERT_FILE; without it the error names that variable, and no key is sent.
    """

    async def work() -> None:
        async with (
            peer([CHAT_OK], tls=authority.server()) as secure,
            peer([CHAT_OK]) as plain,
            serving((tunnel := ForwardProxy(int(secure.url.rpartition(":")[2]))).serve) as tunnel_port,
            serving((forward := ForwardProxy(int(plain.url.rpartition(":")[2]))).serve) as forward_port,
        ):
            variables = {
                "HTTPS_PROXY": f"http://me:secret@127.0.0.1:{tunnel_port}",
                "HTTP_PROXY": f"127.0.0.1:{forward_port}",
                "NO_PROXY": "other.example",
            }

            async def status(paid: str, **more: str) -> tuple[int, str]:
                upstreams = {"redis": redis_url(bench.redis), "model": bench.model.url, "paid": paid}
                with (
                    proxy(tmp_path, **upstreams, env=variables | more, upstream_retries="0") as started,
                    httpx2.Client(base_url=started.url, timeout=60) as http,
                ):
                    other = Bench(started, bench.paid, bench.model, bench.redis, http)
                    heard = await asyncio.to_thread(other.chat, new())
                    local = await asyncio.to_thread(other.chat, new(), model=CHAT_MODEL)
                assert local.status_code == 200, local.text  # the model is asked directly
                return heard.status_code, heard.text

            # 1. Without the authority: refused, and nothing but the tunnel was asked for.
            code, text = await status("https://upstream.example", HTTPS_PROXY=f"http://127.0.0.1:{tunnel_port}")
            assert (code, "SSL_CERT_FILE" in text, secure.requests) == (503, True, [])
            # 2. With it.
            code, text = await status("https://upstream.example", SSL_CERT_FILE=str(authority.path))
            assert (code, len(secure.requests)) == (200, 1), text
            assert UPSTREAM_KEY.encode() in secure.requests[0]
            assert len(tunnel.heads) == 2
            for head in tunnel.heads:
                assert head.startswith(b"CONNECT upstream.example:443 HTTP/1.1\r\n")
                assert UPSTREAM_KEY.encode() not in head
            named = [b"Proxy-Authorization: Basic bWU6c2VjcmV0\r\n" in head for head in tunnel.heads]
            assert named == [False, True]
            # 3. HTTP.
            code, text = await status("http://upstream.example")
            assert code == 200, text
            assert [head.split(b"\r\n")[0] for head in forward.heads] == [
                b"POST http://upstream.example/v1/chat/completions HTTP/1.1"
            ]
            # 4. NO_PROXY.
            code, text = await status(plain.url, NO_PROXY="127.0.0.1")
            assert (code, len(plain.requests), len(forward.heads)) == (200, 2, 1), text

    uvloop.run(work())


@pytest.fixture
def proxies(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    for name in ("http_proxy", "https_proxy", "no_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)

    def set_all(**values: str) -> None:
        for name, value in values.items():
            monkeypatch.setenv(name, value)

    return set_all


def test_which_upstreams_have_a_forward_proxy(proxies: Callable[..., None]) -> None:
    """By scheme; not the hosts in NO_PROXY, never the model service; another kind of proxy stops the start."""
    proxies(HTTPS_PROXY="corp.example:3128", HTTP_PROXY="http://corp.example", NO_PROXY="lab.example,h:8080,::1")
    assert forward_proxy("https://api.example/v1") == "http://corp.example:3128"
    assert forward_proxy("http://api.example/v1") == "http://corp.example"
    for url in ("https://lab.example", "http://a.lab.example:1", "http://me:x@h:8080", "http://[::1]:8080"):
        assert forward_proxy(url) is None, url
    routes = Routes(Settings(openai_api_key="sk-x", model_url="http://model:8000"))  # type: ignore[arg-type] - read from text
    chosen = {name: config.forward_proxy for name, config in routes.upstreams.items()}
    assert chosen == {"model": None, "openai": "http://corp.example:3128"}
    proxies(HTTPS_PROXY="socks5://corp.example")
    Routes(Settings())  # no upstream would use it
    with pytest.raises(ValueError, match="HTTPS_PROXY must be"):
        Routes(Settings(openai_api_key="sk-x"))  # type: ignore[arg-type] - read from text


def test_a_forward_proxy_that_fails_is_named(run: Run, proxies: Callable[..., None]) -> None:
    async def work() -> None:
        refusal = b"HTTP/1.1 407 Proxy Authentication Required\r\ncontent-length: 0\r\n\r\n"
        async with peer([refusal, "close"]) as refusing:
            for url, answered in ((refusing.url, "answered 407"), ("http://127.0.0.1:1", "HTTPS_PROXY")):
                config = UpstreamConfig(
                    "paid", "openai", "https://upstream.example", "sk-x", True, True, forward_proxy=url
                )
                made = Client("http://unused.example")
                await made.client.stop()
                metrics = cast("Metrics", SimpleNamespace(count=lambda *_: None))
                made.client = UpstreamClient(config, Settings(upstream_retries=0), metrics)
                with pytest.raises(UpstreamDown, match=answered):
                    await made.json()
                await made.client.stop()

    run(work())
