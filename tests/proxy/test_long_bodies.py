"""What takes long because a body is long holds up nobody: it is done in a thread, and other requests are answered."""

from __future__ import annotations

import asyncio
import importlib
import json
import math
import threading
from collections.abc import Callable
from typing import Any

import orjson
import pytest
from fixtures_inside import Inside, inside_fixture, outside_fixture  # noqa: F401 - fixtures
from fixtures_proxy import control_client, new
from lab_proxy.long_bodies import LONG_BODY, MAX_VALUES, ORJSON_BYTES, loads, off_loop
from processes import GENEROUS_SECONDS, eventually_async

CHAT, EMBEDDINGS = "/v1/chat/completions", "/v1/embeddings"
LONG = "word " * LONG_BODY  # five times as long as what is done on the event loop

WORD = "word-" * LONG_BODY  # one event of a stream


def chat(text: str, **more: Any) -> dict[str, Any]:
    return {"model": "gpt-mock", "messages": [{"role": "user", "content": text}], "temperature": 0} | more


def vector() -> dict[str, Any]:
    """An upstream's answer to one input."""
    return {"object": "list", "data": [{"index": 0, "object": "embedding", "embedding": [0.5] * LONG_BODY}],
            "usage": {"prompt_tokens": 1, "total_tokens": 1}}  # fmt: skip


# What works on a long body: the request, and the answer that the upstream gives to it instead of an echo.
WORK: dict[str, tuple[str, dict[str, Any], dict[str, Any] | None]] = {
    "upstreams.reply:loads": (CHAT, chat(LONG), None),
    "requests.completions:_check": (CHAT, chat(LONG), None),
    "cache.policy:unstorable_reason": (CHAT, chat(LONG), None),
    "requests.planner:canonical_form": (CHAT, chat(LONG), None),
    "canonical:dump": (CHAT, chat(WORD, stream=True), None),
    "requests.delivery:_passed_through": (CHAT, chat(WORD, stream=True), None),
    "keys.limits:estimate": (CHAT, chat(LONG), None),
    "cache.entry:of_vectors": (EMBEDDINGS, {"model": "text-embedding-mock", "input": "a"}, vector()),
    "cache.entry:to_vectors": (EMBEDDINGS, {"model": "text-embedding-mock", "input": "b"}, vector()),
    "cache.entry:Entry.pack": (EMBEDDINGS, {"model": "text-embedding-mock", "input": "c"}, vector()),
    "cache.entry:Entry.unpack": (CHAT, chat(LONG), None),
    "cache.streams:replay_pieces": (CHAT, chat(LONG, stream=True), None),
}
CACHED = {"cache.entry:Entry.unpack", "cache.streams:replay_pieces"}  # of entries that are there before


class Gate:
    """A function that waits in its thread until the test lets it go on. On the event loop it gets nothing long."""

    def __init__(self, work: Callable[..., Any]) -> None:
        self._work = work
        self._loop = threading.get_ident()
        self.entered, self.opened, self.on_loop = threading.Event(), threading.Event(), False

    def __call__(self, *given: Any, **more: Any) -> Any:
        if threading.get_ident() == self._loop:
            self.on_loop = self.on_loop or len(repr(given)) > LONG_BODY  # of a stream most events are short
        else:
            self.entered.set()
            self.opened.wait(GENEROUS_SECONDS)
        return self._work(*given, **more)

    @property
    def of_method(self) -> Callable[..., Any]:
        """As a method of a class: it gets its object."""

        def method(own: Any) -> Any:
            return self(own)

        return method


@pytest.mark.parametrize("where", WORK)
async def test_others_are_answered_while_a_long_body_is_worked_on(
    inside: Inside, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, body, answer = WORK[where]
    _, key = await inside.key(tpm=100_000_000)
    if where in CACHED:
        assert (await inside.ask(path, body | {"stream": False}, key)).status == 200
    if where == "cache.entry:Entry.unpack":
        inside.parts["Cache"]._local.clear()
    if answer:
        turn = {"status": 200, "type": "application/json", "body": json.dumps(answer)}
        control_client().post(f"{inside.paid.url}/control", json={"script": [turn]})
    module, _, names = where.partition(":")
    owner: Any = importlib.import_module(f"lab_proxy.{module}")
    *outer, name = names.split(".")
    for each in outer:
        owner = getattr(owner, each)
    gate = Gate(getattr(owner, name))
    monkeypatch.setattr(owner, name, gate.of_method if name == "pack" else gate)
    asked = asyncio.create_task(inside.ask(path, body, key))
    try:
        await eventually_async(gate.entered.is_set, what="the work has begun in a thread")
        health = await inside.ask("/health", None)
        assert (health.status, asked.done()) == (200, False)
    finally:
        gate.opened.set()
    assert (await asked).status == 200
    assert not gate.on_loop, "another part of the request does it on the event loop"


async def test_cache_d1_a_prepared_hit_counts_as_a_part_of_its_copy(inside: Inside) -> None:
    """Against PROXY_CACHE_NEAR_BYTES, once for each form: 300 hits of 300 kB took 186 MB that nothing counted."""
    _, key = await inside.key()
    copies, body = inside.parts["Cache"]._local, chat(new() + " a b c d")
    assert (await inside.ask(CHAT, body, key)).status == 200
    sizes = [copies._size]
    for stream in (False, True) * 4:
        assert (await inside.ask(CHAT, body | {"stream": stream}, key)).status == 200
        sizes.append(copies._size)
    assert sizes[0] < sizes[-1], sizes
    assert len({*sizes}) == 3, sizes
    ((entry, weight),) = [each for each in copies._items.values() if each[0].prepared]
    assert weight > sum(len(piece) for made in entry.prepared.values() for piece in made.pieces)


async def test_what_is_short_needs_no_thread() -> None:
    """A thread takes longer than the work on a usual body."""
    threads = [await off_loop(size, threading.get_ident) for size in (LONG_BODY, LONG_BODY + 1)]
    assert [thread == threading.get_ident() for thread in threads] == [True, False]


async def test_a_long_text_is_read_by_a_parser_that_lets_others_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """orjson holds the interpreter's lock from its first byte to its last: in a thread it holds up the loop too."""
    raw = orjson.dumps({"data": [{"embedding": [number + 0.5 for number in range(300_000)]}]})
    assert len(raw) > 2 * ORJSON_BYTES
    expected = orjson.loads(raw)
    monkeypatch.setattr(orjson, "loads", None)
    assert loads(raw) == expected


PAD = '"' + "x" * ORJSON_BYTES + '"'


@pytest.mark.parametrize(
    "text",
    [
        '{"a": [1, -2.5e3, 18446744073709551615, 18446744073709551616, 1e-7, true, null]}',
        '["é \\u00e9 \\ud83d\\udc4d \\\\ud83d"]',
        ' [{"a": 1, "a": 2}, [], {}] ',
        '["\\ud83d"]',
        '["\\ud83d\\ud83d\\udc4d"]',
        '["\\udc4d"]',
        '["\\ud83dx\\udc4d"]',
        "[NaN]",
        "[Infinity]",
        "[1e999]",
        "[1",
        "[1] 2",
        "[01]",
        "\ufeff[1]",
        "[" * 5000 + "]" * 5000,
        '["\x01"]',
    ],
    ids=lambda text: repr(text[:30]),
)
def test_a_long_text_is_read_as_a_short_one(text: str) -> None:
    made: list[Any] = []
    for given in (f"[{text}]", f"[{text},{PAD}]"):
        try:
            made.append(loads(given.encode())[0])
        except ValueError:
            made.append("refused")
    assert made[0] == made[1] or (made[0] == math.inf and made[1] == "refused")


@pytest.mark.parametrize("part", [b"[],", b"1,", b'{"a":1},'])
def test_a_text_of_too_many_values_is_refused_before_it_takes_memory(part: bytes) -> None:
    raw = b"[" + part * (MAX_VALUES + 1) + b"0]"
    with pytest.raises(ValueError, match="more than"):
        loads(raw)


def test_a_long_text_that_is_no_utf_8_is_refused() -> None:
    for raw in (b'["' + b"x" * ORJSON_BYTES + b'\xff"]', b'["' + b"x" * ORJSON_BYTES + b"\xe2\x82"):
        with pytest.raises(UnicodeDecodeError):
            loads(raw)
    whole = json.dumps(["€" * ORJSON_BYTES], ensure_ascii=False).encode()  # slices cut its characters
    assert loads(whole) == json.loads(whole)
