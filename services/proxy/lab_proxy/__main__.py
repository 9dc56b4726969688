"""`python -m lab_proxy`: settings, parts, server. A wrong setting ends it with one line and exit code 2."""

from __future__ import annotations

import atexit
import logging
import queue
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Sequence
from logging.handlers import QueueHandler, QueueListener
from pathlib import Path
from typing import Any

import orjson
from pydantic import ValidationError

from . import cli
from .batches.files import FilePages, FileStore
from .batches.worker import BatchWorker
from .cache.flight import SingleFlight
from .cache.store import Cache, NoCache, load_secret
from .http.app import App
from .http.pages.keys import KeyPages
from .http.server import serve
from .http.workers import SPREADS, Workers
from .keys.authentication import Authenticator, NoKeys
from .keys.limits import Limits
from .keys.store import KeyStore
from .ledger.ledger import Ledger
from .ledger.prices import Prices
from .redis.link import connect
from .reload import Reloader
from .settings import Settings
from .telemetry import access_log
from .telemetry.metrics import Metrics
from .telemetry.traces import Traces, installed
from .upstreams.client import UpstreamPool
from .upstreams.routes import Routes

log = logging.getLogger("lab_proxy")


class LogFormatter(logging.Formatter):
    """One line a record: JSON, or text for a terminal."""

    def __init__(self, text: bool) -> None:
        super().__init__()
        self._text = text

    def format(self, record: logging.LogRecord) -> str:
        lines: list[access_log.Line] | None = getattr(record, "lines", None)
        if lines is not None:
            return "\n".join(self._line(*line) for line in lines)
        said: dict[str, Any] = getattr(record, "said", None) or {"message": record.getMessage()}
        if record.exc_text:
            said = said | {"trace": record.exc_text}
        return self._line(record.created, record.levelno, said)

    def _line(self, at: float, level: int, said: dict[str, Any]) -> str:
        name = logging.getLevelName(level).lower()
        if self._text:
            shown = " ".join(f"{field}={value}" for field, value in said.items() if value not in ("", None))
            return f"{time.strftime('%H:%M:%S', time.localtime(at))} {name} {shown}"
        return orjson.dumps({"ts": round(at, 3), "level": name, "service": "proxy", **said}, default=str).decode()


def start_log(settings: Settings, *, threaded: bool = True) -> None:
    """Log by a thread of its own: a slow terminal or disk must not hold the event loop. A parent that forks has none:
    `threaded` is False there."""
    text = settings.log_format == "text" or (settings.log_format == "auto" and sys.stderr.isatty())
    lines: queue.SimpleQueue[logging.LogRecord] = queue.SimpleQueue()
    stderr = logging.StreamHandler()
    stderr.setFormatter(LogFormatter(text))
    root = logging.getLogger()
    root.setLevel(logging.INFO)
    root.handlers = [QueueHandler(lines) if threaded else stderr]
    if threaded:
        listener = QueueListener(lines, stderr)
        listener.start()
        atexit.register(listener.stop)
    logging.getLogger("asyncio").setLevel(logging.WARNING)
    logging.getLogger("python_multipart").setLevel(logging.CRITICAL)  # a line for each broken upload


def main(argv: Sequence[str] = ()) -> int:
    if argv:
        return command(list(argv))
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # until there is somebody who reads files again
    # 1. What must be right before anything starts.
    try:
        settings = Settings()
        routes = Routes(settings)
        prices = Prices(settings.prices_file)
        secret = load_secret(settings.cache_secret_file) if settings.cache_enabled else b""
        if settings.otlp_endpoint and not installed():
            raise ValueError("PROXY_OTLP_ENDPOINT wants the OpenTelemetry packages: pip install 'lab-proxy[otel]'")
    except ValidationError as error:
        print(f"proxy: {_wrong(error)}", file=sys.stderr)  # noqa: T201 before there is a log
        return 2
    except ValueError as error:
        print(f"proxy: {error}", file=sys.stderr)  # noqa: T201 before there is a log
        return 2
    try:
        listener = listen(settings, shared=False)
    except OSError as error:
        print(f"proxy: PROXY_HOST and PROXY_PORT cannot be listened on: {error}", file=sys.stderr)  # noqa: T201 as above
        return 1
    # 2. One process, or a parent of several.
    if settings.workers == 1:
        start_log(settings)
        log.info("listening on http://%s:%s", settings.host, settings.port)
        return serve(build(settings, routes, prices, secret, Metrics()), settings, listener)
    folder = Path(tempfile.mkdtemp(prefix="lab-proxy-"))  # where workers leave their numbers for each other

    def work(listener: socket.socket, parent: int) -> int:
        start_log(settings)
        return serve(build(settings, routes, prices, secret, Metrics(folder)), settings, listener, parent)

    start_log(settings, threaded=False)
    log.info("listening on http://%s:%s with %d workers", settings.host, settings.port, settings.workers)
    listener.close()  # it showed that the port is free
    code = Workers(
        settings.workers, lambda: listen(settings, shared=SPREADS), work, settings.drain_timeout_seconds
    ).run()
    shutil.rmtree(folder, ignore_errors=True)
    return code


def command(argv: list[str]) -> int:
    """The operator's commands, which start no server."""
    try:
        settings = Settings()
    except ValidationError as error:
        print(f"proxy: {_wrong(error)}", file=sys.stderr)  # noqa: T201 on a terminal
        return 2
    return cli.run(argv, settings)


def _wrong(error: ValidationError) -> str:
    """What is wrong with the first wrong setting, and its variable."""
    first = error.errors()[0]
    variable = "".join(f"PROXY_{str(part).upper()}: " for part in first["loc"][:1])
    return f"{variable}{first['msg'].removeprefix('Value error, ')}"


def listen(settings: Settings, *, shared: bool) -> socket.socket:
    """A listening socket; `shared`: others of this user may listen on the same port. Raises OSError."""
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    return socket.create_server((settings.host, settings.port), family=family, backlog=2048, reuse_port=shared)


def build(settings: Settings, routes: Routes, prices: Prices, secret: bytes, metrics: Metrics) -> App:
    """The application of one process, from its parts."""
    cache = (
        Cache(
            settings.redis_url,
            secret,
            timeout=settings.redis_timeout_ms / 1000,
            max_entry_bytes=settings.cache_max_entry_bytes,
            near_bytes=settings.cache_near_bytes,
            on_error=lambda operation: metrics.count("redis_errors", operation),
            on_time=lambda operation, seconds: metrics.time("redis", operation, seconds=seconds),
        )
        if settings.cache_enabled
        else NoCache()
    )

    def failed(operation: str) -> None:
        metrics.count("redis_errors", operation)

    client = connect(settings.redis_url)
    timeout, admin_key = settings.redis_timeout_ms / 1000, settings.operator_key()
    keys = (
        Authenticator(client, timeout=max(timeout, 0.1), admin_key=admin_key, on_error=failed)
        if settings.keys_required
        else NoKeys()
    )
    book = Ledger(client, prices, folder=settings.spool_folder, max_bytes=settings.ledger_spool_bytes, on_error=failed)
    limits = Limits(
        client,
        prices,
        book,
        when_down=settings.limits_when_redis_is_down,
        timeout=timeout,
        on_refusal=lambda reason: metrics.count("limits_refused", reason),
        on_error=failed,
    )
    admin = KeyPages(keys, KeyStore(client), book, enabled=admin_key is not None)
    files = FileStore(
        settings.files_folder, max_bytes=settings.files_max_bytes, max_total_bytes=settings.files_total_bytes
    )
    uploads = FilePages(files, silence=settings.body_timeout_seconds, total=settings.total_timeout_seconds)
    batches = BatchWorker(
        files, uploads, keys, client, at_once=settings.batch_concurrency, max_line_bytes=settings.max_body_bytes
    )
    upstreams = UpstreamPool(routes, settings, metrics)
    flights = SingleFlight(
        settings.redis_url if settings.cache_enabled else None,
        limit=settings.cache_max_entry_bytes,
        drain=settings.drain_timeout_seconds,
        on_error=failed,
    )
    watch = Reloader({"routes": routes, "prices": prices}, metrics, after=upstreams.on_routes_reloaded)
    spans = Traces(settings.otlp_endpoint) if settings.otlp_endpoint else None
    return App(
        settings,
        cache,
        upstreams,
        routes,
        metrics,
        keys=keys,
        limits=limits,
        ledger=book,
        flights=flights,
        # The ledger ends last of these: others charge until their end.
        parts=[book, limits, metrics, watch, *([spans] if spans else [])],
        reports={"files": watch.report},
        trace=spans.record if spans else None,
        pages=admin.pages(),
        batches=batches,
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
