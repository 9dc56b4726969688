"""uvicorn with an end that callers hardly notice: who is being answered is answered, who comes late is told to go on.

From SIGTERM on new work gets a 503 with `connection: close` and /ready says `draining`, while running answers go on, at
most PROXY_DRAIN_TIMEOUT_SECONDS; then the port closes. Who takes nothing of its answer is cut off like one whose live
stream takes too long. Knows connections and tasks, not what they carry.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import signal
import socket
import sys
import time
from types import FrameType
from typing import Any, Protocol, cast

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from ..settings import Settings

log = logging.getLogger("lab_proxy")

WRITE_BYTES = 65_536  # what waits for the end of the loop's turn: from here on a caller who does not read is noticed
LOOK_SECONDS = 0.02
STALL_TICKS = 5  # of uvicorn's clock, 0.1 s each, between two looks at what waits to be taken
IDLE_SECONDS = 75  # above the 5 s after which httpx, and with it the openai SDK, closes: none meets a closed connection
CUT_SECONDS = 2  # for what was cut off to let go of its upstream


class Application(Protocol):
    draining: bool


class Gathering(asyncio.Transport):
    """What is said to one caller in one turn of the loop leaves in one write: uvicorn writes head and body apart, and a
    write costs more than all else that the proxy does for a hit."""

    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport = transport
        self._loop = asyncio.get_running_loop()
        self._parts: list[Any] = []
        self._size = 0

    def write(self, data: Any) -> None:
        if not self._parts:
            self._loop.call_soon(self._flush)
        self._parts.append(data)
        self._size += len(data)
        if self._size > WRITE_BYTES:
            self._flush()

    def close(self) -> None:
        self._flush()
        self._transport.close()

    def abort(self) -> None:
        self._parts.clear()
        self._transport.abort()

    def get_write_buffer_size(self) -> int:
        return self._size + self._transport.get_write_buffer_size()

    def is_closing(self) -> bool:
        return self._transport.is_closing()

    def pause_reading(self) -> None:
        self._transport.pause_reading()

    def resume_reading(self) -> None:
        self._transport.resume_reading()

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return self._transport.get_extra_info(name, default)

    def _flush(self) -> None:
        if self._parts and not self._transport.is_closing():
            self._transport.write(b"".join(self._parts))
        self._parts.clear()
        self._size = 0


class Connection(HttpToolsProtocol):
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(Gathering(cast("asyncio.Transport", transport)))


class DrainingServer(uvicorn.Server):
    """`parent`: a descriptor whose end says that the parent is gone; then this process ends too."""

    def __init__(
        self, config: uvicorn.Config, app: Application, drain_seconds: float, stall_seconds: float, parent: int | None
    ) -> None:
        super().__init__(config)
        self._stall_seconds = stall_seconds
        self._waiting: dict[Any, tuple[int, float]] = {}  # connection -> bytes that wait to be taken, since when
        self._app = app
        self._drain_seconds = drain_seconds
        self._parent = parent

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._app.draining = True
        super().handle_exit(sig, frame)

    async def on_tick(self, counter: int) -> bool:
        if counter % STALL_TICKS == 0:
            self._cut_stalled()
        return await super().on_tick(counter)

    def _cut_stalled(self) -> None:
        """Nothing else bounds it: an answer from the cache is whole at once, and a connection that closes waits until
        what was written is taken."""
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
        # In slices: most of what is young lives on in the cache, and 10,000 of it held everybody up for 2 to 5 ms.
        gc.set_threshold(1_000, 5, 1_000)
        gc.freeze()  # what is there now stays: to look at it again and again cost a miss a twentieth of its time
        if self._parent is not None:
            asyncio.get_running_loop().add_reader(self._parent, self._orphaned, self._parent)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._app.draining = True
        for connection in list(self.server_state.connections):
            connection.shutdown()  # an idle one closes, one in use closes with its answer
        try:
            async with asyncio.timeout(self._drain_seconds):
                while self.server_state.tasks and not self.force_exit:  # noqa: ASYNC110 - uvicorn has no event for it
                    await asyncio.sleep(LOOK_SECONDS)
        except TimeoutError:
            log.warning("%d answers are cut off: PROXY_DRAIN_TIMEOUT_SECONDS are over", len(self.server_state.tasks))
            for task in list(self.server_state.tasks):
                task.cancel()
        await super().shutdown(sockets)

    def _orphaned(self, parent: int) -> None:
        asyncio.get_running_loop().remove_reader(parent)
        log.warning("the parent is gone: ending")
        os.kill(os.getpid(), signal.SIGTERM)


def serve(app: Application, settings: Settings, listener: socket.socket, parent: int | None = None) -> int:
    """Serve until a signal ends it. The exit code."""
    config = uvicorn.Config(
        app,  # type: ignore[arg-type]  # an ASGI application, too
        loop="uvloop",
        http=Connection,
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=IDLE_SECONDS,
        timeout_graceful_shutdown=CUT_SECONDS,
    )
    logging.getLogger("uvicorn.error").setLevel(logging.WARNING)
    server = DrainingServer(config, app, settings.drain_timeout_seconds, settings.total_timeout_seconds, parent)
    for number in (signal.SIGTERM, signal.SIGINT):
        # uvicorn raises the signal again when it has drained: leave by exit, which flushes the log
        signal.signal(number, lambda *_: sys.exit(0))
    server.run([listener])
    return 0 if server.started else 1
