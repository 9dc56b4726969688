"""A mock of a paid upstream that takes 20 ms and very little CPU time: `python -m bench.upstream PORT`.

Supports only the HTTP that aiohttp and wrk use. The model's name chooses the answer: `gpt-bench` JSON of 0.5 kB, or
with `"stream":true` 64 chunks at once; `gpt-steps` 16 chunks, 5 ms apart; `gpt-slow` 20 chunks, 250 ms apart;
`gpt-late` JSON after 5 s; embeddings get vectors of 8 numbers. `GET /calls` returns the number of calls and of callers
that disconnected before the end; any other GET gets an empty list.
"""

from __future__ import annotations

import asyncio
import re
import sys
from typing import Any, cast

import orjson
import uvloop

DELAY = 0.02  # seconds to the first byte
CHUNKS = 64
STEPS = {b"gpt-bench": (CHUNKS, 0.0), b"gpt-steps": (16, 0.005), b"gpt-slow": (20, 0.25)}  # chunks, seconds between

_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.I)
_MODEL = re.compile(rb'"model": ?"([\w-]+)"')
_STREAM = re.compile(rb'"stream": ?true')
_USAGE = {"prompt_tokens": 9, "completion_tokens": CHUNKS, "total_tokens": 9 + CHUNKS}


def answer(words: int) -> bytes:
    """A chat answer with `words` words."""
    message = {"role": "assistant", "content": " ".join(["word"] * words), "refusal": None}
    choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": "stop"}
    reply = {"id": "chatcmpl-bench", "object": "chat.completion", "created": 1, "model": "gpt-bench",
            "choices": [choice], "usage": _USAGE}  # fmt: skip
    return orjson.dumps(reply)


def event(delta: dict[str, Any], finish: str | None = None, usage: dict[str, int] | None = None) -> bytes:
    choices = [] if usage else [{"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}]
    reply = {"id": "chatcmpl-bench", "object": "chat.completion.chunk", "created": 1, "model": "gpt-bench",
            "choices": choices, "usage": usage}  # fmt: skip
    return b"data: " + orjson.dumps(reply) + b"\n\n"


def chunk(data: bytes) -> bytes:
    """One chunk of HTTP's chunked encoding."""
    return b"%x\r\n%b\r\n" % (len(data), data)


ANSWER = answer(46)  # 0.5 kB with this frame around it
_JSON = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"
_SSE = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
_LAST = chunk(event({}, "stop")) + chunk(event({}, usage=_USAGE)) + chunk(b"data: [DONE]\n\n") + b"0\r\n\r\n"
_WORD = chunk(event({"content": "word "}))
_LISTED = b'{"object":"list","data":[]}'

_INPUT = re.compile(rb'"input":\[([^\]]*)\]')
LATE_SECONDS = 5.0

calls = left = 0


def vectors(body: bytes) -> bytes:
    """An embeddings answer with one short vector for each input. The texts must not contain a comma."""
    found = _INPUT.search(body)
    count = found[1].count(b",") + 1 if found else 1
    data = [{"object": "embedding", "index": n, "embedding": [0.5] * 8} for n in range(count)]
    usage = {"prompt_tokens": count, "total_tokens": count}
    return orjson.dumps({"object": "list", "model": "text-embedding-bench", "data": data, "usage": usage})


class Connection(asyncio.Protocol):
    transport: asyncio.Transport

    def __init__(self) -> None:
        self._got = b""
        self._busy = 0  # unfinished answers
        self._later = asyncio.get_running_loop().call_later

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)

    def connection_lost(self, exc: Exception | None) -> None:
        global left  # noqa: PLW0603 - one process, one count
        left += self._busy

    def data_received(self, data: bytes) -> None:
        self._got += data
        while (end := self._got.find(b"\r\n\r\n")) >= 0:
            length = _LENGTH.search(self._got, 0, end + 2)
            whole = end + 4 + (int(length[1]) if length else 0)
            if len(self._got) < whole:
                return
            head, body, self._got = self._got[:end], self._got[end + 4 : whole], self._got[whole:]
            self._asked(head, body)

    def _asked(self, head: bytes, body: bytes) -> None:
        global calls  # noqa: PLW0603 - one process, one count
        if head.startswith(b"GET"):
            reply = b'{"total":%d,"left":%d}' % (calls, left) if head.startswith(b"GET /calls ") else _LISTED
            self.transport.write(_JSON % len(reply) + reply)
            return
        calls += 1
        self._busy += 1
        model = _MODEL.search(body)
        count, between = STEPS.get(model[1] if model else b"", (CHUNKS, 0.0))
        if b"/embeddings" in head:
            reply = vectors(body)
            self._later(DELAY, self._put, _JSON % len(reply) + reply)
        elif not _STREAM.search(body):
            self._later(
                LATE_SECONDS if model and model[1] == b"gpt-late" else DELAY, self._put, _JSON % len(ANSWER) + ANSWER
            )
        elif between:
            self._later(DELAY, self._step, count, between, _SSE)
        else:
            self._later(DELAY, self._put, _SSE + _WORD * count + _LAST)

    def _step(self, left: int, between: float, head: bytes = b"") -> None:
        if self.transport.is_closing():
            return
        if not left:
            self._put(_LAST)
            return
        self.transport.write(head + _WORD)
        self._later(between, self._step, left - 1, between)

    def _put(self, data: bytes) -> None:
        if not self.transport.is_closing():
            self.transport.write(data)
            self._busy -= 1


async def main(port: int) -> None:
    server = await asyncio.get_running_loop().create_server(Connection, "127.0.0.1", port, backlog=2048)
    await server.serve_forever()


if __name__ == "__main__":
    uvloop.run(main(int(sys.argv[1])))
