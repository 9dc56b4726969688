"""The proxy's HTTP client before peers that do as they are told: what it sends, what it takes, and what it refuses."""

from __future__ import annotations

import asyncio
import contextlib
import datetime as dt
import gzip
import ipaddress
import socket
import ssl
import time
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import uvloop
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from fixtures_proxy import Bench, new, second
from lab_proxy.upstreams import http1
from lab_proxy.upstreams.http1 import Answer, Broken, ConnectTimeout, Origin, Unreachable
from processes import eventually_async

Step = bytes | float | str  # what to send, how long to wait, or `close`, `reset`, `hang`
Run = Callable[[Coroutine[Any, Any, None]], None]
LOOPS = {"uvloop": uvloop.new_event_loop, "asyncio": asyncio.new_event_loop}

OK = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"
CLOSING = OK.replace(b"OK\r\n", b"OK\r\nconnection: close\r\n")


@pytest.fixture(params=LOOPS)
def run(request: pytest.FixtureRequest) -> Iterator[Run]:
    """Run a test on the loop that the proxy uses, and on Python's own."""
    with asyncio.Runner(loop_factory=LOOPS[request.param]) as runner:

        async def bounded(work: Awaitable[None]) -> None:
            async with asyncio.timeout(60):
                await work

        yield lambda work: runner.run(bounded(work))


@dataclass
class Peer:
    """A server whose n-th answer is the n-th of its turns; the last one repeats."""

    turns: tuple[Sequence[Step], ...]
    port: int = 0
    scheme: str = "http"
    host: str = "127.0.0.1"
    asked: list[bytes] = field(default_factory=list)  # whole requests
    connections: int = 0
    gone: asyncio.Event = field(default_factory=asyncio.Event)  # a caller left before the end

    @property
    def url(self) -> str:
        return f"{self.scheme}://{f'[{self.host}]' if ':' in self.host else self.host}:{self.port}"

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        while await self.answer(reader, writer):
            pass

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """Whether the connection goes on."""
        head = await reader.readuntil(b"\r\n\r\n")
        length = [line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")]
        body = await reader.readexactly(int(length[0].split(b":")[1])) if length else b""
        self.asked.append(head + body)
        for step in self.turns[min(len(self.asked), len(self.turns)) - 1]:
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


Handler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@contextlib.asynccontextmanager
async def serving(handler: Handler, host: str = "127.0.0.1", tls: ssl.SSLContext | None = None) -> AsyncIterator[int]:
    """The port of a server that leaves nothing behind."""
    tasks = set()

    async def kept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        tasks.add(asyncio.current_task())
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            await handler(reader, writer)
        writer.close()

    server = await asyncio.start_server(kept, host, 0, ssl=tls, limit=2**20)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()
        for task in tasks:
            if task is not None:
                task.cancel()
        await asyncio.sleep(0.02)  # the ends of connections are heard


@contextlib.asynccontextmanager
async def peer(
    *turns: Sequence[Step], host: str = "127.0.0.1", tls: ssl.SSLContext | None = None
) -> AsyncIterator[Peer]:
    made = Peer(turns, host=host, scheme="https" if tls else "http")
    async with serving(made.serve, host, tls) as made.port:
        yield made


@contextlib.asynccontextmanager
async def origin(url: str, **changes: Any) -> AsyncIterator[Origin]:
    made = Origin(url, **{"connect_timeout": 30.0, "keepalive": 4.0} | changes)
    try:
        yield made
    finally:
        await made.stop()
        await asyncio.sleep(0)


async def get(asked: Origin, path: str = "/", within: float = 30) -> Answer:
    return await asked.ask("GET", path, {}, within=within)


async def post(asked: Origin, body: bytes = b"{}", within: float = 30, **headers: str) -> Answer:
    return await asked.ask("POST", "/", headers, body, within=within)


async def whole(answer: Answer) -> bytes:
    return b"".join([piece async for piece in pieces(answer)])


async def pieces(answer: Answer) -> AsyncIterator[bytes]:
    while piece := await answer.read(30):
        yield piece


def sends(*steps: Step, broken: str | None = None, body: bytes = b"ok") -> Callable[[], Coroutine[Any, Any, None]]:
    """A peer that answers by these steps: the client has `body` of it, or finds it broken for this reason."""

    async def work() -> None:
        async with peer([*steps]) as there, origin(there.url) as asked:
            if broken is None:
                assert await whole(await post(asked)) == body
            else:
                with pytest.raises(Broken, match=broken):
                    await whole(await post(asked))
                assert not asked.connections

    return work


# ---- what is sent


def test_a_request_is_one_write_of_what_was_meant(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Method, path below the base's, host with its port, every header once, the length; head and body together."""
    writes: list[bytes] = []
    made = http1.Connection.connection_made

    class Listening:
        def __init__(self, transport: Any) -> None:
            self._transport = transport

        def write(self, data: bytes) -> None:
            writes.append(data)
            self._transport.write(data)

        def __getattr__(self, name: str) -> Any:
            return getattr(self._transport, name)

    monkeypatch.setattr(http1.Connection, "connection_made", lambda self, transport: made(self, Listening(transport)))

    async def work() -> None:
        async with (
            peer([OK]) as there,
            origin(f"{there.url}/base/", headers={"user-agent": "lab"}) as asked,
        ):
            answer = await asked.ask("POST", "/v1/é?".replace("é", "%C3%A9"), {"x-a": "1"}, b"body", within=5)
            assert (answer.status, await whole(answer)) == (200, b"ok")
            sent = (
                f"POST /base/v1/%C3%A9? HTTP/1.1\r\nhost: 127.0.0.1:{there.port}\r\nuser-agent: lab\r\n"
                "x-a: 1\r\ncontent-length: 4\r\n\r\nbody"
            )
            assert there.asked == writes == [sent.encode()]
            await whole(await get(asked))
            assert b"content-length" not in there.asked[1]
            (connection,) = asked.connections
            link = connection.transport.get_extra_info("socket")
            assert link.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)

    run(work())


@pytest.mark.parametrize("value", ["a\r\nx-b: 2", "a\nb", "a\rb", "a\0b"])
def test_a_header_that_would_be_two_is_not_sent(run: Run, value: str) -> None:
    async def work() -> None:
        async with peer([OK]) as there, origin(there.url) as asked:
            with pytest.raises(ValueError, match="header 'x-a'"):
                await asked.ask("POST", "/", {"x-a": value}, within=5)
            with pytest.raises(ValueError, match="header"):
                await asked.ask("POST", "/", {f"x-{value}": "1"}, within=5)
            with pytest.raises(ValueError, match="header"):
                Origin(there.url, {"authorization": value}, connect_timeout=1, keepalive=1)
            for path in (f"/{value}", "/ HTTP/1.1\r\n", "/a b", "/é", "*"):
                with pytest.raises(ValueError, match="not to be sent"):
                    await asked.ask("POST", path, {}, within=5)
            for method in ("HEAD", "CONNECT", "post", "GET / HTTP/1.1\r\n"):
                with pytest.raises(ValueError, match="not to be sent"):
                    await asked.ask(method, "/", {}, within=5)
            assert there.connections == 0

    run(work())


def test_urls_with_a_user_an_address_or_nonsense(run: Run) -> None:
    """A user goes as Basic authorization; IPv6 stands in brackets in `host` alone; what is no URL is refused."""

    async def work() -> None:
        async with peer([OK]) as there, origin(there.url.replace("//", "//me:a%20b@")) as asked:
            await whole(await get(asked))
            assert b"authorization: Basic bWU6YSBi\r\n" in there.asked[0]
        try:
            serving = await asyncio.start_server(lambda *_: None, "::1", 0)
        except OSError:
            pytest.skip("no IPv6 on this machine")
        serving.close()
        async with peer([OK], host="::1") as there, origin(there.url) as asked:
            assert await whole(await get(asked)) == b"ok"
            assert f"host: [::1]:{there.port}\r\n".encode() in there.asked[0]

    run(work())
    for url in ("ftp://there", "there:80", "http://", ""):
        with pytest.raises(ValueError, match="URL"):
            Origin(url, connect_timeout=1, keepalive=1)


# ---- what is taken


CHUNKED = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"
OPEN = b"HTTP/1.1 200 OK\r\n\r\n"


@pytest.mark.parametrize(
    ("steps", "body"),
    [
        ([OK], b"ok"),
        ([*(bytes([byte]) for byte in OK)], b"ok"),
        ([CHUNKED, b"1\r\no\r\n", 0.02, b"1;a=b\r\nk\r\n0\r\nx-trailer: 1\r\nx-other: 2\r\n\r\n"], b"ok"),
        ([OPEN, b"o", 0.02, b"k", "close"], b"ok"),
        ([b"HTTP/1.0 200 OK\r\n\r\nok", "close"], b"ok"),
        ([b"HTTP/1.1 204 No Content\r\n\r\n"], b""),
        ([b"HTTP/1.1 304 Not Modified\r\ncontent-length: 7\r\n\r\n"], b""),
        ([b"HTTP/1.1 100 Continue\r\n\r\n", 0.02, b"HTTP/1.1 103 Early Hints\r\nlink: x\r\n\r\n" + OK], b"ok"),
    ],
    ids=["length", "byte by byte", "chunks and trailers", "to the end", "1.0", "204", "304", "interim"],
)
def test_bodies_end_where_http_says(run: Run, steps: list[Step], body: bytes) -> None:
    run(sends(*steps, body=body)())


def test_the_connection_is_used_again_where_its_end_is_known(run: Run) -> None:
    """After a length, chunks, 204 and 304; not after `connection: close`, HTTP/1.0 or a body without end."""

    async def work() -> None:
        again: list[list[Step]] = [
            [OK],
            [CHUNKED + b"2\r\nok\r\n0\r\n\r\n"],
            [b"HTTP/1.1 204 No\r\n\r\n"],
            [b"HTTP/1.1 304 No\r\n\r\n"],
        ]
        async with peer(*again, [OK]) as there, origin(there.url) as asked:
            for _ in range(5):
                await whole(await post(asked))
            assert there.connections == 1
        once = [CLOSING, OK.replace(b"/1.1", b"/1.0")]
        for answer in once:
            async with peer([answer, 1.0]) as there, origin(there.url) as asked:
                assert await whole(await post(asked)) == b"ok"
                await whole(await post(asked))
                assert there.connections == 2

    run(work())


def test_the_first_of_several_headers_counts_and_names_are_lower_case(run: Run) -> None:
    async def work() -> None:
        head = b"HTTP/1.1 200 OK\r\nX-A: 1\r\nx-a: 2\r\nX-\xe9: \xe9\r\nContent-Length: 2\r\n\r\nok"
        async with peer([head.replace(b"X-\xe9", b"X-E")]) as there, origin(there.url) as asked:
            answer = await post(asked)
            assert answer.headers == {"x-a": "1", "x-e": "é", "content-length": "2"}
            await whole(answer)

    run(work())


@pytest.mark.parametrize("coding", ["gzip", "deflate", "x-gzip"])
def test_what_was_compressed_unasked_is_read(run: Run, coding: str) -> None:
    """And what breaks off inside, or grows without end, is not."""
    packed = {"deflate": zlib.compress}.get(coding, gzip.compress)

    def answer(data: bytes) -> bytes:
        return f"HTTP/1.1 200 OK\r\ncontent-encoding: {coding}\r\ncontent-length: {len(data)}\r\n\r\n".encode() + data

    run(sends(answer(packed(b"ok" * 1000)), body=b"ok" * 1000)())
    run(sends(answer(packed(b"ok" * 1000)[:-9]), broken="compressed|connection")())
    run(sends(answer(b"no such thing"), broken="no HTTP")())
    run(sends(answer(packed(bytes(40_000_000))), broken="without end")())


# ---- what is refused


@pytest.mark.parametrize(
    ("steps", "broken"),
    [
        ([b"SSH-2.0-OpenSSH_9.7\r\n"], "no HTTP"),
        ([b"\x15\x03\x01\x00\x02\x02\x46"], "no HTTP"),
        ([b"HTTP/1.1 two hundred\r\n\r\n"], "no HTTP"),
        ([b"HTTP/1.1 200 OK\r\nno colon\r\n\r\n"], "no HTTP"),
        ([b"HTTP/1.1 200 OK\r\nx-a: 1\0\r\n\r\n"], "no HTTP"),
        (
            [b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\ntransfer-encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n"],
            "no HTTP",
        ),
        ([b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\ncontent-length: 3\r\n\r\nok!"], "no HTTP"),
        ([b"HTTP/1.1 200 OK\r\ncontent-length: -2\r\n\r\nok"], "no HTTP"),
        ([b"HTTP/1.1 200 OK\r\ntransfer-encoding: gzip, chunked\r\n\r\n"], "transfer coding"),
        ([b"HTTP/1.1 200 OK\r\ncontent-encoding: br\r\ncontent-length: 2\r\n\r\nok"], "content-encoding: br"),
        ([b"HTTP/1.1 101 Switching\r\nconnection: upgrade\r\nupgrade: websocket\r\n\r\n"], "switches protocols"),
        ([CHUNKED, b"zz\r\n"], "no HTTP"),
        ([CHUNKED, b"2\r\nokk"], "no HTTP"),
        ([CHUNKED, b"2\r\nok\r\n", "close"], "connection ended"),
        ([b"HTTP/1.1 200 OK\r\ncontent-length: 3\r\n\r\nok", "close"], "connection ended"),
        (["close"], "connection ended"),
        (["reset"], "connection ended"),
        ([b"HTTP/1.1 200 OK\r\ncont", "close"], "connection ended"),
        ([b"HTTP/1.1 200 OK\r\ncontent-length: 3\r\n\r\nok", 0.02, "reset"], "connection ended"),
        ([OPEN, b"ok", 0.02, "reset"], "connection ended"),
    ],
)
def test_what_is_no_whole_answer_is_broken(run: Run, steps: list[Step], broken: str) -> None:
    run(sends(*steps, 5.0, broken=broken)())


@pytest.mark.parametrize(
    "steps",
    [
        [b"HTTP/1.1 200 OK\r\n", *[b"x-a: %s\r\n" % (b"a" * 1000)] * 70, b"\r\n"],
        [b"HTTP/1.1 200 OK\r\n%scontent-length: 2\r\n\r\nok" % (b"x-a: %s\r\n" % (b"a" * 1000) * 70)],
        [b"HTTP/1.1 200 OK\r\nx-a: ", *[b"a" * 10_000] * 7, b"\r\n\r\n"],
        [b"HTTP/1.1 200 " + b"K" * 70_000],
        [b"HTTP/1.1 103 Hints\r\nx-a: %s\r\n\r\n" % (b"a" * 1000)] * 70,
        [CHUNKED, b"2\r\nok\r\n0\r\nx-a: ", *[b"a" * 10_000] * 50],
        [CHUNKED, b"2;", *[b"a" * 10_000] * 7],
    ],
    ids=["headers", "headers and body", "a header", "reason", "interim", "trailer", "chunk extension"],
)
def test_heads_have_a_limit(run: Run, steps: list[Step]) -> None:
    """64 KiB for head and trailers, and for what stands around a chunk."""
    run(sends(*steps, 5.0, broken="too large")())


def test_what_comes_unasked_ends_the_connection(run: Run) -> None:
    """More than was asked for: the answer is whole, and nobody gets the rest of it as theirs; nor what comes later."""

    async def work() -> None:
        for turn in ([OK + b"HTTP/1.1 200 OK\r\ncontent-length: 4\r\n\r\nevil"], [OK + b"!"], [OK, 0.05, OK]):
            async with peer([*turn, 5.0], [OK]) as there, origin(there.url) as asked:
                assert await whole(await post(asked)) == b"ok"
                await eventually_async(lambda: not asked.connections)
                assert await whole(await post(asked)) == b"ok"
                assert there.connections == 2

    run(work())


def test_an_answer_before_the_whole_request_is_read_ends_the_connection(run: Run) -> None:
    async def work() -> None:
        async def early(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.readuntil(b"\r\n\r\n")
            writer.write(b"HTTP/1.1 413 Too Large\r\ncontent-length: 2\r\n\r\nno")
            await asyncio.sleep(0.5)

        async with serving(early) as port, origin(f"http://127.0.0.1:{port}") as asked:
            answer = await post(asked, bytes(50_000_000))
            assert (answer.status, await whole(answer)) == (413, b"no")
            assert not asked.connections

    run(work())


# ---- used again, closed meanwhile


def test_a_closed_connection_is_not_used(run: Run) -> None:
    """Neither one that the peer has closed, nor one that has rested for too long, nor is it kept."""

    async def work() -> None:
        async with peer([OK, "close"]) as there, origin(there.url) as asked:
            for _ in range(3):
                assert await whole(await post(asked)) == b"ok"
                await eventually_async(lambda: not asked.connections)
            assert there.connections == 3
        async with peer([OK]) as there, origin(there.url, keepalive=0.2) as asked:
            await whole(await post(asked))
            time.sleep(0.3)  # noqa: ASYNC251 - a loop that was late
            await whole(await post(asked))
            assert there.connections == 2
            await eventually_async(lambda: not asked.connections)

    run(work())


def test_only_a_get_is_repeated_and_only_on_a_used_connection(run: Run) -> None:
    """The peer closes a connection as the next request arrives: a GET may go again, once; a POST may have been worked
    on. What began to answer, and a connection that is new, tell of a fault: never again."""

    async def work() -> None:
        async with peer([OK], ["close"], [OK]) as there, origin(there.url) as asked:
            await whole(await get(asked))
            assert await whole(await get(asked)) == b"ok"
            assert (len(there.asked), there.connections) == (3, 2)
        async with peer([OK], ["close"], ["close"], [OK]) as there, origin(there.url) as asked:
            await whole(await get(asked))
            with pytest.raises(Broken):
                await get(asked)
            assert len(there.asked) == 3
        for ask, turn in ((post, "close"), (post, "reset"), (get, b"HTTP/1.1 2")):
            async with peer([OK], [turn, "close"], [OK]) as there, origin(there.url) as asked:
                await whole(await ask(asked))
                with pytest.raises(Broken):
                    await ask(asked)
                assert len(there.asked) == 2
        async with peer(["close"], [OK]) as there, origin(there.url) as asked:
            with pytest.raises(Broken):
                await get(asked)
            assert len(there.asked) == 1

    run(work())


def test_many_at_once_have_a_connection_each(run: Run) -> None:
    async def work() -> None:
        async with peer([0.1, OK]) as there, origin(there.url) as asked:
            for _ in range(2):
                answers = await asyncio.gather(*(post(asked) for _ in range(20)))
                assert [await whole(each) for each in answers] == [b"ok"] * 20
            assert there.connections == 20

    run(work())


# ---- waiting


def test_every_wait_has_a_bound(run: Run) -> None:
    """For the head, for the next piece of the body, for the connection; then nothing of it is left open."""

    async def work() -> None:
        async with peer(["hang"]) as there, origin(there.url) as asked:
            with pytest.raises(TimeoutError):
                await post(asked, within=0.1)
            await asyncio.wait_for(there.gone.wait(), 30)
            assert not asked.connections
        async with peer([CHUNKED + b"2\r\nok\r\n", "hang"]) as there, origin(there.url) as asked:
            answer = await post(asked)
            assert await answer.read(30) == b"ok"
            with pytest.raises(TimeoutError):
                await answer.read(0.1)
            answer.close()
            await asyncio.wait_for(there.gone.wait(), 30)
        with socket.create_server(("127.0.0.1", 0), backlog=0) as full, contextlib.ExitStack() as others:
            for _ in range(4):  # what the kernel takes before it is silent
                one = others.enter_context(socket.socket())
                one.setblocking(False)
                one.connect_ex(full.getsockname())
            async with origin(f"http://127.0.0.1:{full.getsockname()[1]}", connect_timeout=0.2) as asked:
                with pytest.raises(ConnectTimeout):
                    await post(asked)
            async with origin(f"http://127.0.0.1:{full.getsockname()[1]}", connect_timeout=15) as asked:
                with pytest.raises(TimeoutError):
                    await post(asked, within=0.1)

    run(work())


def test_nobody_there_is_unreachable(run: Run) -> None:
    async def work() -> None:
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            for host in (f"127.0.0.1:{taken.getsockname()[1]}", "no-such-host.invalid"):
                async with origin(f"http://{host}") as asked:
                    with pytest.raises(Unreachable) as said:
                        await post(asked)
                    assert not isinstance(said.value, ConnectTimeout)

    run(work())


def test_a_dead_address_does_not_hold_up_a_living_one(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """RFC 8305: the next address is tried beside a silent one. They are looked up once for many."""

    async def work() -> None:
        loop, looked = asyncio.get_running_loop(), []
        async with peer([OK, "close"]) as there:
            with socket.create_server(("127.0.0.2", there.port), backlog=0) as silent, contextlib.ExitStack() as others:
                for _ in range(4):
                    one = others.enter_context(socket.socket())
                    one.setblocking(False)
                    one.connect_ex(silent.getsockname())

                async def found(*given: Any, **more: Any) -> list[Any]:
                    looked.append(given)
                    stream = (socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP, "")
                    return [(*stream, (host, there.port)) for host in ("127.0.0.2", "127.0.0.1")]

                holder = type("Loop", (), {"__getattr__": lambda _, name: getattr(loop, name), "getaddrinfo": found})()
                monkeypatch.setattr(http1.asyncio, "get_running_loop", lambda: holder)
                async with origin(f"http://lab.example:{there.port}", connect_timeout=3600.0) as asked:
                    answers = await asyncio.gather(*(post(asked) for _ in range(4)))
                    assert [await whole(each) for each in answers] == [b"ok"] * 4
                    assert len(looked) == 1
                monkeypatch.undo()

    run(work())


def test_several_addresses_take_turns(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Replicas behind one name share the connections."""

    async def work() -> None:
        async with peer([CLOSING]) as one, peer([CLOSING]) as other, origin("http://lab.example") as asked:
            stream = (socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP, "")
            found = asyncio.get_running_loop().create_future()
            found.set_result([(*stream, ("127.0.0.1", port)) for port in (one.port, other.port)])
            monkeypatch.setattr(asked, "_resolved", lambda: found)
            for _ in range(4):
                await whole(await post(asked))
            assert (one.connections, other.connections) == (2, 2)

    run(work())


def test_a_cancelled_request_closes_its_connection_at_once(run: Run) -> None:
    """While its head is waited for, and while its body is; so the upstream can stop."""

    async def work() -> None:
        async with peer(["hang"]) as there, origin(there.url) as asked:
            task = asyncio.ensure_future(post(asked))
            await eventually_async(lambda: there.asked)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            await asyncio.wait_for(there.gone.wait(), 30)
            assert not asked.connections
        async with peer([OPEN + b"ok", "hang"]) as there, origin(there.url) as asked:
            answer = await post(asked)
            assert await answer.read() == b"ok"
            answer.close()
            await asyncio.wait_for(there.gone.wait(), 30)
            with pytest.raises(Broken):
                await answer.read()

    run(work())


def test_stop_closes_what_is_idle_and_what_is_in_use(run: Run) -> None:
    async def work() -> None:
        async with peer([OK], [OPEN + b"ok", "hang"]) as there, origin(there.url) as asked:
            await whole(await post(asked))
            answer = await post(asked)
            await asked.stop()
            await asyncio.wait_for(there.gone.wait(), 30)
            assert await answer.read(30) == b"ok"
            with pytest.raises(Broken):
                await answer.read(30)

    run(work())


def test_a_slow_reader_slows_its_sender(run: Run) -> None:
    """What is not taken stays with the sender, but for a buffer; and the connection goes on when it is read."""
    size = 64 * 1024 * 1024

    async def work() -> None:
        sent = 0

        async def flood(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            nonlocal sent
            while await reader.readline() != b"\r\n":
                pass
            writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % size)
            for _ in range(size // 65_536):
                writer.write(bytes(65_536))
                await writer.drain()
                sent += 65_536
            await reader.read()

        async with serving(flood) as port, origin(f"http://127.0.0.1:{port}") as asked:
            answer = await get(asked)
            await asyncio.sleep(0.3)
            assert sent < size / 2
            got = 0
            async for piece in pieces(answer):
                assert len(piece) <= http1.MAX_BUFFER_BYTES + 2**20
                got += len(piece)
            assert got == size
            assert len(asked.connections) == 1  # it can be used again

    run(work())


def test_a_connection_goes_on_before_its_answer_is_read(run: Run) -> None:
    """The answer was whole, and more than the buffer: who reads it late holds up nobody."""

    async def work() -> None:
        large = bytes(http1.MAX_BUFFER_BYTES + 10_000)
        turn = b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%b" % (len(large), large)
        async with peer([turn], [OK]) as there, origin(there.url) as asked:
            first = await post(asked)
            await asyncio.sleep(0.1)
            assert await whole(await post(asked)) == b"ok"
            assert await whole(first) == large
            assert there.connections == 1

    run(work())


def test_a_slow_body_is_whole_in_the_end(run: Run) -> None:
    """Each piece has its own time: many pauses are no silence."""

    async def work() -> None:
        async with peer([CHUNKED, *[0.3, b"1\r\na\r\n"] * 5, b"0\r\n\r\n"]) as there, origin(there.url) as asked:
            answer = await post(asked)
            got = [piece for _ in range(5) if (piece := await answer.read(1.2))]
            assert (b"".join(got), await answer.read(1.2)) == (b"aaaaa", b"")

    run(work())


# ---- TLS


@dataclass(frozen=True)
class Certificate:
    """Of `lab.example` and 127.0.0.1, signed by itself."""

    path: Path
    key: Path

    def server(self) -> ssl.SSLContext:
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.load_cert_chain(self.path, self.key)
        return context


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Certificate:
    folder = tmp_path_factory.mktemp("tls")
    key, name = ec.generate_private_key(ec.SECP256R1()), x509.Name.from_rfc4514_string("CN=lab.example")
    now = dt.datetime.now(dt.UTC)
    names: list[x509.GeneralName] = [x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
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
    found = Certificate(folder / "cert.pem", folder / "key.pem")
    found.path.write_bytes(made.public_bytes(serialization.Encoding.PEM))
    plain = serialization.NoEncryption()
    found.key.write_bytes(key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, plain))
    return found


def test_tls_trusts_whom_the_machine_trusts(
    run: Run, certificate: Certificate, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A certificate that nobody vouches for is refused, and nothing is sent; with its CA in SSL_CERT_FILE it is taken,
    but not under another name. The name is said in the handshake."""

    async def work() -> None:
        said: list[str | None] = []
        context = certificate.server()
        context.sni_callback = lambda _, name, __: said.append(name)
        async with peer([OK], tls=context) as there:
            async with origin(there.url) as asked:
                with pytest.raises(Unreachable, match="CERTIFICATE_VERIFY_FAILED"):
                    await post(asked)
                await eventually_async(lambda: not asked.connections)
            monkeypatch.setenv("SSL_CERT_FILE", str(certificate.path))
            async with origin(there.url.replace("127.0.0.1", "localhost")) as asked:
                for _ in range(2):
                    assert await whole(await post(asked)) == b"ok"
                assert (len(there.asked), len(asked.connections)) == (2, 1)
                assert said[-1] == "localhost"
            async with origin(there.url) as asked:
                assert await whole(await post(asked)) == b"ok"
            async with origin(there.url.replace("127.0.0.1", "127.0.0.2")) as asked:
                with pytest.raises(Unreachable):
                    await post(asked)

    run(work())


def test_over_tls_ends_are_noticed_too(run: Run, certificate: Certificate) -> None:
    """A body without end, a large one, one that breaks off; and a caller who leaves is noticed at once."""
    trust = ssl.create_default_context(cafile=certificate.path)

    async def work() -> None:
        large = bytes(3_000_000)
        turns: list[list[Step]] = [
            [OPEN, b"ok", "close"],
            [b"HTTP/1.1 200 OK\r\ncontent-length: 3000000\r\n\r\n", large],
            [b"HTTP/1.1 200 OK\r\ncontent-length: 3\r\n\r\nok", 0.02, "close"],
            ["hang"],
        ]
        async with peer(*turns, tls=certificate.server()) as there, origin(there.url, tls=trust) as asked:
            assert await whole(await post(asked)) == b"ok"
            assert await whole(await post(asked)) == large
            with pytest.raises(Broken):
                await whole(await post(asked))
            with pytest.raises(TimeoutError):
                await post(asked, within=0.1)
            await asyncio.wait_for(there.gone.wait(), 30)

    run(work())


def test_who_speaks_no_tls_is_unreachable(run: Run) -> None:
    async def work() -> None:
        async def other(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(b"220 mail.example ESMTP\r\n")
            await reader.read()

        async with serving(other) as port, origin(f"https://127.0.0.1:{port}") as asked:
            with pytest.raises(Unreachable) as said:
                await post(asked)
            assert not isinstance(said.value, ConnectTimeout)

    run(work())


# ---- through the proxy


def test_a_paid_upstream_over_tls(bench: Bench, tmp_path: Path, certificate: Certificate) -> None:
    """Its certificate is checked: an answer with the CA trusted, 503 and not a byte of the key without."""
    asyncio.run(_paid_over_tls(bench, tmp_path, certificate))


async def _paid_over_tls(bench: Bench, tmp_path: Path, certificate: Certificate) -> None:
    said = b'{"choices": [{"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": "Yes."}}]}'
    answer = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%s" % (len(said), said)
    async with peer([answer], tls=certificate.server()) as there:
        for trusted in (False, True):
            with pytest.MonkeyPatch.context() as patch:
                if trusted:
                    patch.setenv("SSL_CERT_FILE", str(certificate.path))
                with second(bench, tmp_path, paid=there.url, upstream_retries="0") as other:
                    heard = await asyncio.to_thread(other.chat, new())
            assert heard.status_code == (200 if trusted else 503)
            assert len(there.asked) == trusted
