"""Commands that share a round trip with others, and the retry for scripts that redis does not have yet."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Protocol

from ..errors import ProxyError
from .connection import Command, CommandError, Pipeline

log = logging.getLogger("lab_proxy.redis")


class PipelinedCommand(Protocol):
    """A command that is sent together with a cache read, so that it costs no round trip of its own.

    `on_reply` and `on_failure` may raise ProxyErrors; the read's result is used only after one of them has returned.
    """

    def command(self, whole: bool = False) -> Command:
        """The command. `whole`: with the script's text instead of its hash."""

    def on_reply(self, reply: Any) -> None: ...

    def on_failure(self) -> None:
        """Redis is unavailable or refused the command."""


async def deliver(
    commands: Sequence[PipelinedCommand],
    replies: Sequence[Any],
    execute: Callable[[Command], Awaitable[Pipeline | None]],
    on_error: Callable[[], None],
) -> None:
    """Give each command its reply. Sends a script again as text where redis does not have it.

    Raises the first ProxyError, but only after all commands got their reply: each may hold something by then.
    """
    first: ProxyError | None = None
    for command, received in zip(commands, replies, strict=False):
        reply = received
        if isinstance(received, CommandError) and str(received).startswith("NOSCRIPT"):
            pipeline = await execute(command.command(whole=True))
            reply = pipeline.replies[0] if pipeline else None
        try:
            if reply is not None and not isinstance(reply, CommandError):
                command.on_reply(reply)
                continue
            if reply is not None:
                on_error()
                log.warning("redis refused a script: %s", str(reply).partition(" ")[0])
            command.on_failure()
        except ProxyError as error:
            first = first or error
    if first is not None:
        raise first
