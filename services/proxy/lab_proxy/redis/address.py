"""PROXY_REDIS_URL: host, user, database and TLS; opens connections. Knows no other commands."""

import asyncio
import contextlib
import ssl
from collections.abc import Callable
from urllib.parse import parse_qsl, unquote, urlsplit

from .connection import Command, Connection


class Address:
    """PROXY_REDIS_URL, parsed once. Raises ValueError for wrong values and unsupported options."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        options = dict(parse_qsl(parts.query))
        self._path = unquote(parts.path) if parts.scheme == "unix" else ""
        self._user, self._password = unquote(parts.username or "default"), unquote(parts.password or "")
        database = options.pop("db", "") or ("" if self._path else parts.path.strip("/"))
        try:
            self._host, self._port, self._database = unquote(parts.hostname or "localhost"), parts.port or 6379, 0
            self._database = int(database or 0)
        except ValueError as error:
            raise ValueError(f"PROXY_REDIS_URL: {error}") from None
        self._tls = _tls(options) if parts.scheme == "rediss" else None
        if options:
            raise ValueError(f"PROXY_REDIS_URL: {', '.join(sorted(options))} is not supported")

    def hello(self) -> list[Command]:
        hello: Command = ("HELLO", 3, "AUTH", self._user, self._password) if self._password else ("HELLO", 3)
        return [hello, *([("SELECT", self._database)] if self._database else [])]

    async def open(self, make: Callable[[], Connection]) -> Connection:
        """A connection, before `hello`. Raises OSError."""
        loop = asyncio.get_running_loop()
        if self._path:
            return (await loop.create_unix_connection(make, self._path))[1]
        return (await loop.create_connection(make, self._host, self._port, ssl=self._tls))[1]


def _tls(options: dict[str, str]) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=options.pop("ssl_ca_certs", None))
    if options.pop("ssl_check_hostname", "true").lower() in {"false", "no", "0"}:
        context.check_hostname = False
    if options.pop("ssl_cert_reqs", "required") == "none":
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    with contextlib.suppress(KeyError):
        context.load_cert_chain(options.pop("ssl_certfile"), options.pop("ssl_keyfile", None))
    return context
