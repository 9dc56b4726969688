"""Strict JSON in, canonical JSON out.

The canonical form is RFC 8785's, except that integral numbers of up to 40 digits are written as exact integers, so
that 64-bit seeds stay distinct. Knows nothing of requests, models or cache keys.
"""

import json
import math
from collections.abc import Iterable
from decimal import Decimal
from typing import Any, NoReturn

import orjson

from .errors import InvalidRequest

MAX_DEPTH = 64
MAX_DIGITS = 309  # of the largest double: a longer integer is out of range
EXACT = 10**40  # integers below are exact; from here on the double counts, or five bytes (`1e308`) become 309


def parse(raw: bytes) -> dict[str, Any]:
    """A JSON object. Input that parsers read differently is refused.

    Integral numbers (`1`, `1.0`, `1e0`) below EXACT become `int`, exactly; all others `float`. Raises InvalidRequest
    for duplicate keys, NaN and Infinity, numbers beyond a double, invalid UTF-8, lone surrogates, depth over 64, and
    no object.
    """
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise _refused(f"invalid UTF-8 at byte {error.start}") from None
    if text.startswith("\ufeff"):
        raise _refused("it begins with a byte order mark (BOM)")  # RFC 8259, section 8.1
    try:
        value = _decoder.decode(text)
    except RecursionError:
        raise _refused(f"nested deeper than {MAX_DEPTH}") from None
    except json.JSONDecodeError as error:
        raise _refused(f"{error.msg} at line {error.lineno}, column {error.colno}") from None
    if not isinstance(value, dict):
        raise _refused("it is not a JSON object")
    if "\\u" in text:
        _refuse_surrogates(value)
    _refuse_depth(text, value)
    return value


def encode(value: Any) -> bytes:
    """Canonical bytes of a parsed value: keys sorted by UTF-16 code units, no white space, ECMAScript's numbers."""
    return _text(value).encode()


def dump(value: Any) -> bytes:
    """Compact JSON in the caller's key order, which a chat template may print. Integers of any size."""
    try:
        return orjson.dumps(value)
    except TypeError:  # an integer beyond 64 bits
        return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()


def _refused(why: str) -> InvalidRequest:
    return InvalidRequest(f"The request body is not acceptable JSON: {why}.", code="invalid_json")


def _no_constant(name: str) -> NoReturn:
    raise _refused(f"{name} is not a JSON number")


def _integer(text: str) -> int | float:
    if len(text) > MAX_DIGITS + 1:
        raise _refused("a number is out of range")
    value = int(text)
    return value if abs(value) < EXACT else _number(text)


def _number(text: str) -> int | float:
    value = float(text)
    if math.isinf(value):
        raise _refused("a number is out of range")
    if not value.is_integer() or abs(value) > EXACT:
        return value
    if value == 0 or len(text) > 400:
        return int(value)
    exact = Decimal(text)  # 9007199254740993.0 is no double, but an integer
    if abs(exact) >= EXACT:
        return value
    return int(exact) if exact == exact.to_integral_value() else int(value)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        seen: set[str] = set()
        for name, _ in pairs:
            if name in seen:
                raise _refused(f"duplicate key {json.dumps(name[:200])}")
            seen.add(name)
    return made


_decoder = json.JSONDecoder(
    object_pairs_hook=_object, parse_float=_number, parse_int=_integer, parse_constant=_no_constant
)


def _refuse_surrogates(value: Any) -> None:
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise _refused("a lone surrogate in a string") from None


def _refuse_depth(text: str, value: Any) -> None:
    if text.count("{") + text.count("[") > MAX_DEPTH and too_deep(value):
        raise _refused(f"nested deeper than {MAX_DEPTH}")


def too_deep(value: Any) -> bool:
    """The value is nested deeper than MAX_DEPTH."""
    level: Iterable[Any] = [value]
    for _ in range(MAX_DEPTH):
        level = [
            inner
            for outer in level
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(inner, (dict, list))
        ]
        if not level:
            return False
    return True


_escape = json.encoder.encode_basestring  # control characters, quote and backslash: RFC 8785's set


def _text(value: Any) -> str:
    if isinstance(value, str):
        return _escape(value)
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, int):
        return str(value)
    if isinstance(value, float):
        return str(int(value)) if value.is_integer() and abs(value) < EXACT else _ecmascript(value)
    if isinstance(value, dict):
        fields = sorted(value.items(), key=lambda field: field[0].encode("utf-16-be"))
        return "{" + ",".join([f"{_escape(name)}:{_text(inner)}" for name, inner in fields]) + "}"
    return "[" + ",".join([_text(inner) for inner in value]) + "]"


def _ecmascript(value: float) -> str:
    """ECMA-262's Number::toString for a finite double that is no integer below EXACT. Python's digits are the same."""
    mantissa, _, power = f"{Decimal(repr(value)).normalize():E}".partition("E")
    text = mantissa.lstrip("-").replace(".", "")
    point = int(power) + 1  # value = 0.text × 10^point
    if 0 < point <= 21:
        shown = f"{text[:point]}.{text[point:]}"
    elif -6 < point <= 0:
        shown = f"0.{'0' * -point}{text}"
    else:
        shown = f"{text[0]}{'.' if len(text) > 1 else ''}{text[1:]}e{'+' if point > 0 else ''}{point - 1}"
    return f"-{shown}" if value < 0 else shown
