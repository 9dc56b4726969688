"""Requests many streamed answers at once, in a separate process, with as little CPU time as possible.

`python -m bench.streams`: reads a line of JSON (`host`, `port`, `path`, `bodies`: one request for each, all sent at
once), writes a line of JSON (`Round`). The clock starts before the first connection is opened and stops at the last
byte of the last answer; each answer has its own connection. The bytes are parsed only afterwards, because a caller on
another machine would not use the server's cores for that. Then every answer is checked: 200, all events JSON, no error,
text, `finish_reason` "length", the requested number of tokens in `usage`, `[DONE]` at the end. A wrong answer ends the
run.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from dataclasses import asdict, dataclass
from typing import Any, cast

import httptools
import orjson
import uvloop

from bench.report import BenchError

SECONDS = 120


@dataclass
class Round:
    """tokens: of all answers. events: number of events with text. cpu: CPU seconds of this process."""

    seconds: float
    tokens: int
    events: int
    cpu: float


class Stream(asyncio.Protocol):
    """One request and its answer's bytes."""

    def __init__(self, request: bytes, body: dict[str, Any]) -> None:
        self._request, self._body = request, body
        self._parser = httptools.HttpResponseParser(self)
        self._parts: list[bytes] = []
        self._whole = False
        self.ended = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        self._transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        self._parser.feed_data(data)

    def on_body(self, body: bytes) -> None:
        self._parts.append(body)

    def on_message_complete(self) -> None:
        self._whole = True
        self._transport.close()
        self._end()

    def connection_lost(self, _: Exception | None) -> None:
        self._end()

    def _end(self) -> None:
        if not self.ended.done():
            self.ended.set_result(None)

    def check(self) -> tuple[int, int]:
        """Number of tokens and of events with text. Raises BenchError for an incomplete or wrong answer."""
        reply = b"".join(self._parts)
        if not self._whole or self._parser.get_status_code() != 200:
            raise BenchError(f"an answer broke off or was not a 200: {reply[-300:].decode(errors='replace')}")
        *lines, done = [line for line in reply.split(b"\n\n") if line]
        events = [orjson.loads(line.removeprefix(b"data: ")) for line in lines]
        if done != b"data: [DONE]" or any("error" in event for event in events):
            raise BenchError(f"a stream ended with {reply[-300:].decode(errors='replace')}")
        choices = [event["choices"][0] for event in events if event["choices"]]
        texts = [choice["delta"]["content"] for choice in choices if choice["delta"].get("content")]
        finishes = [choice["finish_reason"] for choice in choices if choice["finish_reason"]]
        tokens: int = events[-1]["usage"]["completion_tokens"]
        if not texts or finishes != ["length"] or tokens != self._body["max_tokens"]:
            raise BenchError(
                f"{tokens} tokens of {self._body['max_tokens']}, {len(texts)} events with text, {finishes}"
            )
        return tokens, len(texts)


async def ask(host: str, port: int, path: str, bodies: list[dict[str, Any]]) -> Round:
    loop = asyncio.get_running_loop()
    streams = []
    for body in bodies:
        data = orjson.dumps(body)
        head = f"POST {path} HTTP/1.1\r\nhost: {host}:{port}\r\ncontent-type: application/json\r\n"
        streams.append(Stream(f"{head}content-length: {len(data)}\r\n\r\n".encode() + data, body))
    began, cpu = time.perf_counter(), time.process_time()
    async with asyncio.timeout(SECONDS):
        await asyncio.gather(*(loop.create_connection(lambda one=one: one, host, port) for one in streams))  # type: ignore[misc]
        await asyncio.gather(*(one.ended for one in streams))
    seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
    checked = [one.check() for one in streams]
    return Round(seconds, sum(tokens for tokens, _ in checked), sum(events for _, events in checked), cpu)


def main() -> int:
    for line in sys.stdin:
        try:
            print(json.dumps(asdict(uvloop.run(ask(**json.loads(line))))), flush=True)  # noqa: T201 - for the parent
        except (BenchError, OSError, TimeoutError) as trouble:
            print(json.dumps({"trouble": f"{type(trouble).__name__}: {trouble}"}), flush=True)  # noqa: T201
    return 0


if __name__ == "__main__":
    sys.exit(main())
