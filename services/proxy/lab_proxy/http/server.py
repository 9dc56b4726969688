"""uvicorn with graceful drain: running answers finish, new requests are refused.

After SIGTERM new requests get a 503 with `connection: close`, /ready reports `draining`, and running answers continue
for at most PROXY_DRAIN_TIMEOUT_SECONDS; then the port closes. A client that reads nothing is disconnected. Knows
connections and tasks, not their content.
"""

import asyncio
import gc
import http
import logging
import signal
import socket
import sys
import time
from functools import partial
from types import FrameType
from typing import Any, cast

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from ..errors import BodyTimeout, HeadTooLarge, InvalidRequest
from ..requests.context import Traffic
from ..settings import Settings
from .app import App

log = logging.getLogger("lab_proxy")

POLL_SECONDS = 0.02
STALL_TICKS = 5  # ticks of uvicorn, 0.1 s each, between two checks for stalled clients
IDLE_SECONDS = 75  # above the 5 s after which httpx (so the openai SDK) closes idle connections itself
MAX_HEAD_BYTES = 64 * 1024  # request line and headers; the model service has the same limit
CANCEL_SECONDS = 2  # for cancelled requests to close their upstream calls


class Connection(HttpToolsProtocol):
    """uvicorn's connection, with bounds on the size and time of a request's head, and errors in OpenAI's format."""

    def __init__(self, *args: Any, head_seconds: float, **more: Any) -> None:
        super().__init__(*args, **more)
        self._head_seconds = head_seconds
        self._timer: asyncio.TimerHandle | None = None  # while a head is not complete
        self._received = 0  # bytes since its beginning
        self._chunk = self._at_most = 0  # bytes of the last read; of the reads since the head began
        self._in_head = False
        self._refused = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(cast("asyncio.Transport", transport))
        self._timer = self.loop.call_later(self._head_seconds, self._too_slow)

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._refused:
            return
        self._received += len(data)
        self._chunk = len(data)
        self._at_most += self._chunk
        super().data_received(data)
        if self._in_head and not self._refused:  # most heads arrive in one piece and need no timer
            if self._timer is None:
                self._timer = self.loop.call_later(self._head_seconds, self._too_slow)
            if self._received > MAX_HEAD_BYTES:
                self._refuse(HeadTooLarge(f"The head of the request is larger than {MAX_HEAD_BYTES} bytes."))

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._at_most = self._chunk
        self._in_head = True
        if self._timer is None:  # not the connection's first request
            self._received = 1  # some of it at least

    def on_headers_complete(self) -> None:
        self._in_head = False
        self._stop_timer()
        # Counted only where so much was received at all.
        if self._at_most > MAX_HEAD_BYTES and (
            sum(len(name) + len(value) + 4 for name, value in self.headers) + len(self.url) > MAX_HEAD_BYTES
        ):
            self._refuse(HeadTooLarge(f"The head of the request is larger than {MAX_HEAD_BYTES} bytes."))
            return
        super().on_headers_complete()

    def send_400_response(self, msg: str) -> None:
        self._refuse(InvalidRequest("This is not an HTTP/1.1 request."))

    @property
    def _answering(self) -> bool:
        """Whether an answer is being written, so that nothing else may be sent."""
        return self.cycle is not None and not self.cycle.response_complete

    def _too_slow(self) -> None:
        self._timer = None
        if self._answering:
            self._timer = self.loop.call_later(self._head_seconds, self._too_slow)
        elif self._received:
            self._refuse(BodyTimeout("The head of the request did not arrive in time (PROXY_HEAD_TIMEOUT_SECONDS)."))
        else:
            self.transport.close()

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _refuse(self, error: InvalidRequest) -> None:
        """Answer without the app, and close."""
        if self._refused:
            return
        self._refused = True
        self._stop_timer()
        if self._answering:
            self.transport.close()
            return
        body = error.body()
        head = f"HTTP/1.1 {error.status} {http.HTTPStatus(error.status).phrase}\r\ncontent-type: application/json\r\n"
        end = f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
        self.transport.write((head + end).encode() + body)
        self.transport.close()


class DrainingServer(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, traffic: Traffic, drain_seconds: float, stall_seconds: float) -> None:
        super().__init__(config)
        self._stall_seconds = stall_seconds
        self._waiting: dict[Any, tuple[int, float]] = {}  # connection -> bytes not yet read by the client, since when
        self._traffic = traffic
        self._drain_seconds = drain_seconds

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._traffic.draining = True
        super().handle_exit(sig, frame)

    async def on_tick(self, counter: int) -> bool:
        if counter % STALL_TICKS == 0:
            self._cut_stalled()
        return await super().on_tick(counter)

    def _cut_stalled(self) -> None:
        """Disconnect clients that have read nothing for `stall_seconds`. Nothing else bounds them: a hit is written at
        once, and a closing connection waits until its client has read everything."""
        now, waiting = time.monotonic(), {}
        for connection in list(self.server_state.connections):
            left = connection.transport.get_write_buffer_size()
            if not left:
                continue
            before, since = self._waiting.get(connection, (left, now))
            if left < before:
                since = now
            elif now - since >= self._stall_seconds:
                connection.transport.abort()
                continue
            waiting[connection] = left, since
        self._waiting = waiting

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        gc.collect()
        # A small threshold: most new objects stay in the cache, and a collection of 10,000 took 2 to 5 ms.
        gc.set_threshold(1_000, 5, 1_000)
        gc.freeze()  # objects of the start are permanent: scanning them again cost 5 % of a miss

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._traffic.draining = True
        for connection in list(self.server_state.connections):
            connection.shutdown()  # idle ones close now, busy ones after their answer
        try:
            async with asyncio.timeout(self._drain_seconds):
                while self.server_state.tasks and not self.force_exit:  # noqa: ASYNC110 - uvicorn has no event for it
                    await asyncio.sleep(POLL_SECONDS)
        except TimeoutError:
            log.warning("%d answers are cut off after PROXY_DRAIN_TIMEOUT_SECONDS", len(self.server_state.tasks))
            for task in list(self.server_state.tasks):
                task.cancel()
        await super().shutdown(sockets)


def serve(app: App, traffic: Traffic, settings: Settings, listener: socket.socket) -> int:
    """Serve until a signal. Returns the exit code."""
    config = uvicorn.Config(
        app,
        loop="uvloop",
        http=cast("Any", partial(Connection, head_seconds=settings.head_timeout_seconds)),
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=IDLE_SECONDS,
        timeout_graceful_shutdown=CANCEL_SECONDS,
    )
    logging.getLogger("uvicorn.error").setLevel(logging.WARNING)
    server = DrainingServer(config, traffic, settings.drain_timeout_seconds, settings.total_timeout_seconds)
    for number in (signal.SIGTERM, signal.SIGINT):
        # uvicorn raises the signal again after the drain: exit, which flushes the log
        signal.signal(number, lambda *_: sys.exit(0))
    server.run([listener])
    return 0 if server.started else 1


def listen(settings: Settings) -> socket.socket:
    """A listening socket. Raises OSError."""
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    return socket.create_server((settings.host, settings.port), family=family, backlog=2048)
