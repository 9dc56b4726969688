"""`python -m lab_proxy`: settings, parts, server. A wrong setting ends it with one line and exit code 2."""

from __future__ import annotations

import atexit
import logging
import queue
import signal
import socket
import sys
import time
from logging.handlers import QueueHandler, QueueListener
from typing import Any

import orjson
import uvicorn
from pydantic import ValidationError

from .app import Metrics, create_app
from .cache import Cache, NoCache, load_secret
from .routes import Routes
from .settings import Settings
from .upstream import Upstream


class Line(logging.Formatter):
    """One line a record: JSON, or text for a terminal."""

    def __init__(self, text: bool) -> None:
        super().__init__()
        self._text = text

    def format(self, record: logging.LogRecord) -> str:
        said: dict[str, Any] = getattr(record, "said", None) or {"message": record.getMessage()}
        if record.exc_text:
            said = said | {"trace": record.exc_text}
        if self._text:
            shown = " ".join(f"{name}={value}" for name, value in said.items() if value not in ("", None))
            return f"{time.strftime('%H:%M:%S', time.localtime(record.created))} {record.levelname.lower()} {shown}"
        head = {"ts": round(record.created, 3), "level": record.levelname.lower(), "service": "proxy"}
        return orjson.dumps(head | said, default=str).decode()


def start_log(settings: Settings) -> None:
    """Log by a thread of its own: a slow terminal or disk must not hold the event loop."""
    text = settings.log_format == "text" or (settings.log_format == "auto" and sys.stderr.isatty())
    lines: queue.SimpleQueue[logging.LogRecord] = queue.SimpleQueue()
    stderr = logging.StreamHandler()
    stderr.setFormatter(Line(text))
    listener = QueueListener(lines, stderr)
    listener.start()
    atexit.register(listener.stop)
    root = logging.getLogger()
    root.setLevel(logging.INFO)
    root.addHandler(QueueHandler(lines))
    logging.getLogger("asyncio").setLevel(logging.WARNING)


def main() -> int:
    try:
        settings = Settings()
        routes = Routes(settings)
        secret = load_secret(settings.cache_secret_file) if settings.cache_enabled else b""
        metrics = Metrics()
        cache = (
            Cache(
                settings.redis_url,
                secret,
                timeout=settings.redis_timeout_ms / 1000,
                max_entry_bytes=settings.cache_max_entry_bytes,
                on_error=lambda operation: metrics.redis_errors.labels(operation).inc(),
            )
            if settings.cache_enabled
            else NoCache()
        )
    except ValidationError as error:
        first = error.errors()[0]
        variable = "".join(f"PROXY_{str(part).upper()}: " for part in first["loc"][:1])
        print(f"proxy: {variable}{first['msg'].removeprefix('Value error, ')}", file=sys.stderr)  # noqa: T201 before the log
        return 2
    except ValueError as error:
        print(f"proxy: {error}", file=sys.stderr)  # noqa: T201 before there is a log
        return 2
    try:
        family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
        listener = socket.create_server((settings.host, settings.port), family=family, backlog=2048)
    except OSError as error:
        print(f"proxy: PROXY_HOST and PROXY_PORT cannot be listened on: {error}", file=sys.stderr)  # noqa: T201 as above
        return 1
    start_log(settings)
    upstreams = {name: Upstream(access, settings) for name, access in routes.access.items()}
    config = uvicorn.Config(
        create_app(settings, cache, upstreams, routes, metrics),
        loop="uvloop",
        http="httptools",
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_graceful_shutdown=settings.drain_timeout_seconds,
    )
    logging.getLogger("uvicorn.error").setLevel(logging.WARNING)
    server = uvicorn.Server(config)
    logging.getLogger("lab_proxy").info("listening on http://%s:%s", settings.host, settings.port)
    for number in (signal.SIGTERM, signal.SIGINT):
        # uvicorn raises the signal again when it has drained: leave by exit, which flushes the log
        signal.signal(number, lambda *_: sys.exit(0))
    server.run([listener])
    return 0 if server.started else 1


if __name__ == "__main__":
    sys.exit(main())
