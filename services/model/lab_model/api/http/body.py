"""A request's body: content codings and strict JSON.

Knows bytes. Knows nothing of HTTP servers, fields or models.
"""

from __future__ import annotations

import json
import zlib
from typing import Any

import orjson

from ... import errors

GZIP, ZLIB, DEFLATE = 31, 15, -15  # zlib's wbits
MAX_DEPTH = 64
CODINGS = "gzip, deflate"
MAX_CODINGS = 2
MAX_MEMBERS = 64  # members of one gzip body; each costs a copy of the bytes after it


def decode_content(raw: bytes, codings: str, limit: int) -> bytes:
    """The decoded content of `raw`. codings: of the header Content-Encoding (RFC 9110, section 8.4).

    Raises MediaTypeError for an unknown coding, BodyTooLargeError for a result of more than `limit` bytes,
    BadRequestError if the body does not have these codings.
    """
    names = [name for part in codings.split(",") if (name := part.strip().lower()) not in {"", "identity"}]
    if len(names) > MAX_CODINGS:
        error = errors.MediaTypeError(f"A body has at most {MAX_CODINGS} content codings.")
        error.headers = {"accept-encoding": CODINGS}
        raise error
    for name in reversed(names):
        if name not in {"gzip", "x-gzip", "deflate"}:
            error = errors.MediaTypeError(f"The content coding '{name[:50]}' is not supported: use {CODINGS} or none.")
            error.headers = {"accept-encoding": CODINGS}
            raise error
        # Some senders of deflate leave out zlib's head, against the RFC.
        kinds = (ZLIB, DEFLATE) if name == "deflate" else (GZIP,)
        found = next((out for kind in kinds if (out := _inflate(raw, kind, limit)) is not None), None)
        if found is None:
            raise errors.BadRequestError(
                f"The header Content-Encoding says {name}, but the body is not {name}.",
                param="content-encoding",
                code="invalid_value",
            )
        raw = found
    return raw


def _inflate(raw: bytes, kind: int, limit: int) -> bytes | None:
    """None if `raw` is not whole or not of this kind. Raises BodyTooLargeError."""
    out = b""
    for _ in range(MAX_MEMBERS):
        decoder = zlib.decompressobj(kind)
        try:
            out += decoder.decompress(raw, limit + 1 - len(out))
        except zlib.error:
            return None
        if len(out) > limit:
            raise errors.BodyTooLargeError(f"The body is larger than {limit} bytes when it is decoded.")
        if not decoder.eof:
            return None
        raw = decoder.unused_data  # gzip may have several members
        if not raw:
            return out
    return None


def parse_json(raw: bytes) -> Any:
    """The parsed value. JSON that parsers read differently is refused, as in the proxy. Raises BadRequestError."""
    try:
        value = orjson.loads(raw)
    except orjson.JSONDecodeError as error:
        raise _refused(str(error)) from None
    if raw.count(b"{") + raw.count(b"[") > MAX_DEPTH and _deeper(value, MAX_DEPTH):
        raise _refused(f"nested deeper than {MAX_DEPTH}")
    json.loads(raw, object_pairs_hook=_check_keys)
    return value


def _check_keys(pairs: list[tuple[str, None]]) -> None:
    if len({name for name, _ in pairs}) == len(pairs):
        return
    seen: set[str] = set()
    for name, _ in pairs:
        if name in seen:
            raise _refused(f"duplicate key {json.dumps(name[:200])}")
        seen.add(name)


def _deeper(value: Any, levels: int) -> bool:
    """Whether the value has more than `levels` levels of objects and lists."""
    level = [value] if isinstance(value, dict | list) else []
    for _ in range(levels):
        inside = (part for each in level for part in (each.values() if isinstance(each, dict) else each))
        level = [part for part in inside if isinstance(part, dict | list)]
    return bool(level)


def _refused(why: str) -> errors.BadRequestError:
    return errors.BadRequestError(f"The body is not valid JSON: {why}.", code="invalid_json")
