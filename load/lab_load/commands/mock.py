"""A server with known times, for the calibration: `python -m lab_load.commands.mock`.

It answers /v1/models and streams chat answers. The model's name chooses the kind of stream, one of `KINDS`. If times
are set, event k is sent `ttft + k * gap` seconds after the request was read, and the server records when it was sent.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from dataclasses import dataclass, field
from typing import Any

EVENTS = 20
KINDS = {
    "plain": "one token in each event",
    "role": "first, at once, an event with the role and no text",
    "reasoning": "half of the tokens are reasoning",
    "three": "three tokens in each event",
    "crlf": "lines end with CRLF, with comments between them",
    "split": "Korean text; each event is written in two parts, cut inside a character",
    "error": "an error event after three tokens",
    "reset": "the connection breaks after three tokens",
    "fast": "all events at once",
}


@dataclass
class Mock:
    """The server. `left`: number at the start of a question -> times when its events were sent (time.perf_counter)."""

    ttft: float = 0.05
    gap: float = 0.01
    left: dict[str, list[float]] = field(default_factory=dict)
    received: dict[str, float] = field(default_factory=dict)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection."""
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
                lines = head.split("\r\n")
                length = next(
                    (int(line.partition(":")[2]) for line in lines if line.lower().startswith("content-length")), 0
                )
                body = await reader.readexactly(length)
                received = time.perf_counter()
                method, path, _ = lines[0].split(" ")
                if method == "POST":
                    await self._answer(writer, json.loads(body), received)
                else:
                    self._page(writer, path)
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    def _page(self, writer: asyncio.StreamWriter, path: str) -> None:
        pages: dict[str, Any] = {
            "/v1/models": {"object": "list", "data": [{"id": kind, "kind": "chat"} for kind in KINDS]},
            "/left": {"left": self.left, "received": self.received},
        }
        body = json.dumps(pages.get(path, {})).encode()
        status = "200 OK" if path in pages else "404 Not Found"
        writer.write(
            f"HTTP/1.1 {status}\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n".encode()
            + body
        )

    async def _answer(self, writer: asyncio.StreamWriter, body: dict[str, Any], received: float) -> None:
        kind, name = body["model"], body["messages"][-1]["content"].partition(":")[0]
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n")
        if kind == "fast":
            writer.write(FAST)
            return
        left = self.left[name] = []
        self.received[name] = received
        end = "\r\n\r\n" if kind == "crlf" else "\n\n"
        if kind == "role":
            _chunk(writer, _event({"role": "assistant", "content": ""}, end))
        for number in range(EVENTS):
            delay = received + self.ttft + number * self.gap - time.perf_counter()
            if delay > 0:
                await asyncio.sleep(delay)
            if number == 3 and kind == "error":
                _chunk(writer, b'data: {"error": {"type": "server_error", "message": "as asked"}}\n\n')
                break
            if number == 3 and kind == "reset":
                transport: Any = writer.transport
                transport.abort()
                raise ConnectionResetError
            channel = "reasoning_content" if kind == "reasoning" and number < EVENTS // 2 else "content"
            event = _event({channel: {"three": "a b c ", "split": "한국어 "}.get(kind, "word ")}, end)
            left.append(time.perf_counter())
            if kind == "crlf":
                _chunk(writer, b": comment\r\n\r\n")
            if kind == "split":
                cut = event.index("한".encode()) + 1
                _chunk(writer, event[:cut])
                await writer.drain()
                await asyncio.sleep(0.001)
                left[-1] = time.perf_counter()
                event = event[cut:]
            _chunk(writer, event)
            await writer.drain()
        tokens = EVENTS * (3 if kind == "three" else 1)
        _chunk(writer, _usage(tokens, end) + f"data: [DONE]{end}".encode())
        writer.write(b"0\r\n\r\n")


def _event(delta: dict[str, str], end: str) -> bytes:
    return f"data: {json.dumps({'choices': [{'index': 0, 'delta': delta}]}, ensure_ascii=False)}{end}".encode()


def _usage(tokens: int, end: str) -> bytes:
    usage = {"prompt_tokens": 7, "completion_tokens": tokens, "total_tokens": tokens + 7}
    return f"data: {json.dumps({'choices': [], 'usage': usage})}{end}".encode()


def _chunk(writer: asyncio.StreamWriter, data: bytes) -> None:
    writer.write(b"%x\r\n%s\r\n" % (len(data), data))


def _fast() -> bytes:
    """The bytes of a whole answer, made once: the measurement of the capacity needs a mock that costs little."""
    parts = [*[_event({"content": "word "}, "\n\n")] * EVENTS, _usage(EVENTS, "\n\n"), b"data: [DONE]\n\n"]
    return b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in parts) + b"0\r\n\r\n"


FAST = _fast()


async def _main() -> None:
    server = await asyncio.start_server(Mock().serve, "127.0.0.1", 0, backlog=1024)
    sys.stdout.write(f"{server.sockets[0].getsockname()[1]}\n")
    sys.stdout.flush()
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(_main())
