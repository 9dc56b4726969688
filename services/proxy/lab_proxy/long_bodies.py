"""Work whose time grows with the size of a body: a long body must not delay other requests of this process.

Knows sizes and JSON. Does not know what a body means.
"""

import asyncio
import codecs
import json
import re
from collections.abc import Callable
from typing import Any, NoReturn, TypeVar

import orjson

LONG_BODY = 64 * 1024  # bytes; work on a longer one goes to a thread: 8 MB took 4.5 s of the event loop
ORJSON_BYTES = 1024 * 1024  # orjson parses these in 1 to 10 ms, in which no other thread of the process runs
MAX_VALUES = 8_000_000  # of one body: 256 MB of `[],` took 5 GB. 2,048 vectors of 3,072 numbers are 6.3 million
SLICE = 1024 * 1024  # bytes that are decoded and searched in one step
_ESCAPE = re.compile(r"\\(?:u([0-9a-fA-F]{4})|.)")
_MAY_BE_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")

Result = TypeVar("Result")


async def off_loop(size: int, work: Callable[..., Result], *args: Any) -> Result:
    """`work(*args)`, in a thread if its input has over LONG_BODY bytes; a thread would only delay a short one."""
    return await asyncio.to_thread(work, *args) if size > LONG_BODY else work(*args)


def loads(raw: bytes) -> Any:
    """The value of a JSON text, with the result of orjson. A long text is parsed by Python's parser, which is slower
    but lets other threads run. Raises ValueError for malformed JSON and for more than MAX_VALUES values."""
    if len(raw) <= ORJSON_BYTES:
        return orjson.loads(raw)
    ends = sum(raw.count(b",", at, at + SLICE) for at in range(0, len(raw), SLICE))
    if ends > MAX_VALUES:
        raise ValueError(f"more than {MAX_VALUES} values")
    decode = codecs.getincrementaldecoder("utf-8")().decode
    text = "".join([decode(raw[at : at + SLICE], at + SLICE >= len(raw)) for at in range(0, len(raw), SLICE)])
    if _MAY_BE_SURROGATE.search(text):
        _refuse_lone_surrogates(text)
    try:
        return _decoder.decode(text)
    except RecursionError:
        raise ValueError("nested too deep") from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    return dict(pairs)


def _integer(text: str) -> int | float:
    """An integer, or a float beyond 64 bits, as in orjson."""
    value = int(text) if len(text) <= 20 else None
    return value if value is not None and -(2**63) <= value < 2**64 else _number(text)


def _number(text: str) -> float:
    value = float(text)
    if value in {float("inf"), float("-inf")}:
        raise ValueError("a number is out of range")
    return value


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


# These hooks are written in Python: at each call another thread may run.
_decoder = json.JSONDecoder(
    object_pairs_hook=_object, parse_float=_number, parse_int=_integer, parse_constant=_no_constant
)


def _refuse_lone_surrogates(text: str) -> None:
    """Raises ValueError for a lone surrogate in an escape: such a text cannot be written as UTF-8."""
    expected = -1  # where the second half of a pair has to begin
    for escape in _ESCAPE.finditer(text):
        unit = int(escape[1], 16) if escape[1] else 0
        is_second = 0xDC00 <= unit <= 0xDFFF and escape.start() == expected
        if (expected >= 0 or 0xDC00 <= unit <= 0xDFFF) and not is_second:
            raise ValueError("a lone surrogate in a string")
        expected = escape.end() if 0xD800 <= unit <= 0xDBFF else -1
    if expected >= 0:
        raise ValueError("a lone surrogate in a string")
