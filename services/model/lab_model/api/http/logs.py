"""The log: its formats, and the pipe to the service's main process.

Knows log records. Knows nothing of requests; `record` gives a request's fields.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from pathlib import Path
from typing import Any, Literal, TextIO


class JsonFormatter(logging.Formatter):
    """One JSON object per line; fields of a request are in `record.fields`."""

    def format(self, record: logging.LogRecord) -> str:
        moment = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line: dict[str, Any] = {"ts": f"{moment}.{record.msecs:03.0f}Z", "level": record.levelname.lower()}
        line |= {"service": "model"} | getattr(record, "fields", {"message": record.getMessage()})
        if record.exc_info:
            line["trace"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False)


class TextFormatter(logging.Formatter):
    """Time, service, level and message or fields, for a terminal."""

    def format(self, record: logging.LogRecord) -> str:
        fields = getattr(record, "fields", None)
        text = " ".join(f"{k}={v}" for k, v in fields.items()) if fields else record.getMessage()
        line = f"{time.strftime('%H:%M:%S', time.localtime(record.created))} model {record.levelname.lower()} {text}"
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


def start_logging(form: Literal["json", "text"], pipe: Path | None) -> None:
    """Send this package's log to the main process's pipe, or to stderr without one (in a cluster).

    Ray could forward a replica's stderr to the driver, but that adds prefixes and a process. Call this once in each
    process.
    """
    try:
        # Never block on the reader: losing a log line is better than delaying a request.
        descriptor = os.open(pipe, os.O_WRONLY | os.O_NONBLOCK) if pipe else None
    except OSError:
        descriptor = None
    output: TextIO = sys.stderr if descriptor is None else os.fdopen(descriptor, "w", buffering=1, encoding="utf-8")
    logging.raiseExceptions = False
    handler = logging.StreamHandler(output)
    handler.setFormatter(JsonFormatter() if form == "json" else TextFormatter())
    package = logging.getLogger("lab_model")
    package.handlers, package.propagate = [handler], False
    package.setLevel(logging.INFO)
