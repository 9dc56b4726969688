"""The client of all rooms: one pipelined connection, opened again after a loss; scripts; commands that share a round
trip. While redis is down every command fails at once."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from ..errors import ProxyError
from ..tasks import end, supervise
from .address import Address
from .connection import Command, CommandError, Connection, Pipeline, RedisError

log = logging.getLogger("lab_proxy.redis")

TIMEOUT = 1.0  # of a command, unless its caller has another one
PROBE_SECONDS = (0.2, 0.5, 1.0)  # between attempts to connect; the last one repeats
PROBE_TIMEOUT = 1.0


OnError = Callable[[str], None]  # it gets the name of the operation that redis failed


class Script(str):
    """A Lua script: its SHA-1, by which it is called, and its text."""

    __slots__ = ("text",)
    text: str

    def __new__(cls, text: str) -> Script:
        script = super().__new__(cls, hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest())
        script.text = text
        return script

    def __call__(self, keys: Sequence[str], *arguments: Any) -> Command:
        return ("EVALSHA", self, len(keys), *keys, *arguments)


class Client:
    """A part: start and stop it. Commands raise RedisError, at the latest after `within` seconds or the timeout."""

    def __init__(
        self,
        url: str,
        *,
        timeout: float = TIMEOUT,
        greeting: Sequence[Command] = (),
        channel: str = "",
        on_push: Callable[[list[Any]], None] = lambda _: None,
        on_up: Callable[[list[Any], float], None] = lambda *_: None,
        on_down: Callable[[str], None] = lambda _: None,
    ) -> None:
        """`timeout`: of a command, and of redis's silence while replies are due, after which the connection is lost.
        `greeting`: the first commands of each connection. `channel`: to subscribe to. `on_up` gets the replies to the
        greeting, and when it was sent (time.monotonic()); `on_down` why a connection was lost or not opened.

        Raises ValueError for a wrong URL.
        """
        self._address = Address(url)
        self._timeout = timeout
        self._greeting, self._channel = greeting, channel
        self._on_push, self._on_up, self._on_down = on_push, on_up, on_down
        self._connection: Connection | None = None
        self._down, self._why = asyncio.Event(), "not started"
        self._task: asyncio.Task[None] | None = None

    @property
    def up(self) -> bool:
        return self._connection is not None

    async def start(self) -> None:
        await self._open()
        self._task = supervise("redis", self._reopen_forever)

    async def stop(self) -> None:
        await end(self._task)
        if self._connection is not None:
            self._connection.close()
        self._connection, self._why = None, "closed"

    async def execute(self, *command: Any, within: float | None = None) -> Any:
        return (await self.execute_all([command], within))[0]

    async def execute_all(self, commands: Sequence[Command], within: float | None = None) -> list[Any]:
        """The replies to commands of one round trip. Raises the first CommandError among them."""
        if not commands:
            return []
        pipeline = await self.pipeline(commands, within)
        for reply in pipeline.replies if pipeline.errors else ():
            if isinstance(reply, CommandError):
                raise reply
        return pipeline.replies

    async def pipeline(self, commands: Sequence[Command], within: float | None = None) -> Pipeline:
        """The same, with CommandErrors among the replies. Scripts that redis does not have are sent again as text."""
        if self._connection is None:
            raise RedisError(self._why)
        within = within or self._timeout
        pipeline = await self._connection.execute(commands, within)
        if pipeline.errors and self._connection is not None:
            unknown = [at for at, reply in enumerate(pipeline.replies) if str(reply).startswith("NOSCRIPT")]
            texts = [("EVAL", commands[at][1].text, *commands[at][2:]) for at in unknown]
            replies = (await self._connection.execute(texts, within)).replies if texts else []
            for at, reply in zip(unknown, replies, strict=True):
                pipeline.replies[at] = reply
        return pipeline

    def unchanged_since(self, pipeline: Pipeline) -> bool:
        """No push message came since the pipeline's first reply."""
        return self._connection is not None and pipeline.pushes == self._connection.pushes

    async def _open(self) -> None:
        with contextlib.ExitStack() as opened:
            try:
                async with asyncio.timeout(PROBE_TIMEOUT):
                    made = await self._address.open(lambda: Connection(PROBE_TIMEOUT, self._on_push, self._on_lost))
                    opened.callback(made.close)
                    sent = time.monotonic()
                    hello = made.execute(self._address.hello(), PROBE_TIMEOUT)
                    if self._channel:
                        made.send(("SUBSCRIBE", self._channel))
                    greeting = made.execute([*self._greeting, ("PING",)], PROBE_TIMEOUT)
                    hello_replies, replies = (pipeline.replies for pipeline in await asyncio.gather(hello, greeting))
                if refused := next((each for each in hello_replies if isinstance(each, CommandError)), None):
                    raise RedisError(f"redis refuses the connection ({str(refused).partition(' ')[0]})")
                if made.closed:
                    raise RedisError("no connection")
            except (OSError, RedisError) as error:  # a TimeoutError is an OSError
                down = "no answer in time" if isinstance(error, TimeoutError) else "no connection"
                return self._on_closed(str(error) if isinstance(error, RedisError) else down)
            opened.pop_all()
        made.timeout = self._timeout
        self._connection = made
        self._down.clear()
        return self._on_up(replies[:-1], sent)

    def _on_lost(self, why: str) -> None:
        if self._connection is not None:  # otherwise `_open` reports it
            self._on_closed(why)

    def _on_closed(self, why: str) -> None:
        self._connection, self._why = None, why
        self._down.set()
        self._on_down(why)

    async def _reopen_forever(self) -> None:
        tries = 0
        while True:
            await self._down.wait()
            await asyncio.sleep(PROBE_SECONDS[min(tries, len(PROBE_SECONDS) - 1)])
            await self._open()
            tries = 0 if self.up else tries + 1


class PipelinedCommand(Protocol):
    """A command that is sent together with a cache read, so that it costs no extra round trip. `on_reply` and
    `on_failure` may raise ProxyErrors; the read's result is used only after one of them has returned."""

    def command(self) -> Command: ...

    def on_reply(self, reply: Any) -> None: ...

    def on_failure(self) -> None:
        """Redis is unavailable or refused the command."""


def deliver(commands: Sequence[PipelinedCommand], replies: Sequence[Any], on_error: Callable[[], None]) -> None:
    """Give each command its reply. Raises the first ProxyError, but only after all commands got their replies, because
    a command can hold resources from its reply on."""
    first: ProxyError | None = None
    for command, reply in zip(commands, replies, strict=False):
        try:
            if isinstance(reply, CommandError):
                on_error()
                log.warning("redis refused a script: %s", str(reply).partition(" ")[0])
                command.on_failure()
            else:
                command.on_reply(reply)
        except ProxyError as error:
            first = first or error
    if first is not None:
        raise first
