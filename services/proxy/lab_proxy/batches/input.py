"""The input file of a batch: its lines, and their validation. Knows JSON; does not answer lines."""

import codecs
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from .. import canonical
from ..errors import InvalidRequest

MAX_LINES = 50_000
MAX_ERRORS = 100


@dataclass(frozen=True, slots=True)
class InputLine:
    number: int
    custom_id: str
    endpoint: str
    body: dict[str, Any]
    size: int  # bytes of the line


def read_lines(file: BinaryIO) -> Iterator[InputLine]:
    """The requests of a validated file."""
    for number, raw in _numbered(file):
        if raw.strip():
            item = canonical.parse(raw)
            yield InputLine(number, item["custom_id"], item["url"], item["body"], len(raw))


def _numbered(file: BinaryIO) -> Iterator[tuple[int, bytes]]:
    """The lines, numbered from 1. A byte order mark at the beginning is removed: editors and PowerShell write one."""
    for number, raw in enumerate(file, 1):
        yield number, raw.removeprefix(codecs.BOM_UTF8) if number == 1 else raw


def validate(path: Path, endpoint: str, max_line_bytes: int) -> tuple[list[dict[str, Any]], int, set[str]]:
    """The errors of a batch's input, its number of requests, and their models."""
    errors: list[dict[str, Any]] = []
    ids: set[str] = set()
    models: set[str] = set()
    total = 0
    with path.open("rb") as file:
        for number, raw in _numbered(file):
            if not raw.strip():
                continue
            total += 1
            if len(errors) >= MAX_ERRORS or total > MAX_LINES:
                break
            try:
                if len(raw) > max_line_bytes:
                    raise InvalidRequest(f"The line is longer than {max_line_bytes} bytes (PROXY_MAX_BODY_BYTES).")
                item = canonical.parse(raw)
            except InvalidRequest as error:
                errors.append(_error(number, "invalid_json_line", error.message))
                continue
            errors += [_error(number, *each) for each in _line_errors(item, endpoint, ids)]
            ids.add(str(item.get("custom_id")))
            if isinstance(body := item.get("body"), dict):
                models.add(str(body.get("model")))
    if not total:
        errors.append(_error(None, "empty_file", "The file contains no request."))
    if total > MAX_LINES:
        errors.append(_error(None, "too_many_requests", f"The file contains more than {MAX_LINES} requests."))
    return errors[:MAX_ERRORS], total, models


def _error(line: int | None, what: str, message: str, param: str | None = None) -> dict[str, Any]:
    return {"code": what, "line": line, "message": message, "param": param}


def _line_errors(item: Mapping[str, Any], endpoint: str, ids: set[str]) -> Iterator[tuple[str, str, str]]:
    """The errors of one line; `ids`: of the lines before it."""
    custom_id, body = item.get("custom_id"), item.get("body")
    if not isinstance(custom_id, str) or not custom_id or len(custom_id) > 512:
        yield "missing_required_parameter", "`custom_id` must be a text that identifies the line.", "custom_id"
    elif custom_id in ids:
        yield "duplicate_custom_id", f"An earlier line has the `custom_id` {custom_id[:80]}.", "custom_id"
    if item.get("method") != "POST":
        yield "invalid_method", "`method` must be POST.", "method"
    if item.get("url") != endpoint:
        yield "invalid_url", f"`url` must be the batch's endpoint, {endpoint}.", "url"
    if not isinstance(body, dict):
        yield "missing_required_parameter", "`body` must be the request, a JSON object.", "body"
        return
    if not isinstance(body.get("model"), str) or not body["model"]:
        yield "missing_required_parameter", "`model` must be the name of a model.", "body.model"
    if body.get("stream"):
        yield "invalid_request", "`stream` must be false: answers of a batch are not streamed.", "body.stream"
