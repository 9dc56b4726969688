"""PROXY_REDIS_URL: host, user, database and TLS, and how a connection is opened. Knows nothing of other commands."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections.abc import Callable, Iterable
from typing import Any

from redis.asyncio.connection import SSLConnection, parse_url

from .connection import Command, CommandError, Connection


class Address:
    """PROXY_REDIS_URL, parsed once. Raises ValueError for unsupported options."""

    def __init__(self, url: str) -> None:
        options: dict[str, Any] = dict(parse_url(url))
        secure = options.pop("connection_class", None) is SSLConnection
        self._path = options.pop("path", None)
        self._host, self._port = options.pop("host", "localhost"), options.pop("port", 6379)
        self._user, self._password = options.pop("username", None) or "default", options.pop("password", None)
        self._db = options.pop("db", 0)
        self._tls = _tls(options) if secure else None
        if options:
            raise ValueError(f"PROXY_REDIS_URL: {', '.join(sorted(options))} is not supported")

    def hello(self) -> Iterable[Command]:
        """The first commands of a connection."""
        yield ("HELLO", 3, "AUTH", self._user, self._password) if self._password else ("HELLO", 3)
        if self._db:
            yield ("SELECT", self._db)

    async def connect(self, make: Callable[[], Connection]) -> Connection:
        """An open connection after HELLO. Raises OSError, TimeoutError, or CommandError with redis's message."""
        loop = asyncio.get_running_loop()
        if self._path:
            _, connection = await loop.create_unix_connection(make, self._path)
        else:
            _, connection = await loop.create_connection(make, self._host, self._port, ssl=self._tls)
        try:
            pipeline = await connection.execute(list(self.hello()))
            for reply in pipeline.replies:
                if isinstance(reply, CommandError):
                    raise reply
        except BaseException:
            connection.close()
            raise
        return connection


def _tls(options: dict[str, Any]) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=options.pop("ssl_ca_certs", None))
    if options.pop("ssl_check_hostname", True) in {False, "False", "false", "no", "0"}:
        context.check_hostname = False
    if options.pop("ssl_cert_reqs", "required") == "none":
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    with contextlib.suppress(KeyError):
        context.load_cert_chain(options.pop("ssl_certfile"), options.pop("ssl_keyfile", None))
    return context
