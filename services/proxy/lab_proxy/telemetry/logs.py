"""The log on stderr: JSON lines, or text on a terminal. Knows records of the logging module; not what is logged."""

import atexit
import logging
import queue
import sys
import time
from logging.handlers import QueueHandler, QueueListener
from typing import Any

import orjson

from ..settings import Settings
from .observer import Line


class LogFormatter(logging.Formatter):
    """One line for each record; a record of the access log holds several lines."""

    def __init__(self, text: bool) -> None:
        super().__init__()
        self._text = text

    def format(self, record: logging.LogRecord) -> str:
        lines: list[Line] | None = getattr(record, "lines", None)
        if lines is not None:
            return "\n".join(self._line(*line) for line in lines)
        fields: dict[str, Any] = {"message": record.getMessage()}
        if record.exc_text:
            fields["trace"] = record.exc_text
        return self._line(record.created, record.levelno, fields)

    def _line(self, at: float, level: int, fields: dict[str, Any]) -> str:
        name = logging.getLevelName(level).lower()
        if self._text:
            shown = " ".join(f"{field}={value}" for field, value in fields.items() if value not in ("", None))
            return f"{time.strftime('%H:%M:%S', time.localtime(at))} {name} {shown}"
        return orjson.dumps({"ts": round(at, 3), "level": name, "service": "proxy", **fields}, default=str).decode()


def start_log(settings: Settings) -> None:
    """Log in a thread of its own, so that a slow terminal or disk does not block the event loop."""
    text = settings.log_format == "text" or (settings.log_format == "auto" and sys.stderr.isatty())
    lines: queue.SimpleQueue[logging.LogRecord] = queue.SimpleQueue()
    stderr = logging.StreamHandler()
    stderr.setFormatter(LogFormatter(text))
    root = logging.getLogger()
    root.setLevel(logging.INFO)
    root.handlers = [QueueHandler(lines)]
    listener = QueueListener(lines, stderr)
    listener.start()
    atexit.register(listener.stop)
    logging.getLogger("asyncio").setLevel(logging.WARNING)
    logging.getLogger("watchfiles").setLevel(logging.WARNING)
    logging.getLogger("python_multipart").setLevel(logging.CRITICAL)  # it logs a line for each broken upload
