"""A stand-in for the proxy: a real HTTP server in a thread that speaks its wire, and can be unwell in every way.

It keeps what it was asked (`requests`), which of these a client left before the end of the answer (`left`), what must
never be fetched (`fetched`), and each path with its Authorization (`keys`). Answers are cached by their whole body, as
the proxy does. `silent` and `endless` answers have no end, and a `hung` proxy answers nothing at all: a client that
waits for them waits for ever.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import select
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Literal

from lab_ui import texts
from processes import eventually
from streamlit.testing.v1 import AppTest

APP = Path(texts.__file__).with_name("app.py")
CHAT_PAGE = "app_pages/chat.py"
QUESTION = "What is the capital of France?"

Mode = Literal["up", "redis-down", "model-down", "model-loading", "endless", "silent", "error", "busy",
               "too-long", "interrupted", "broken-off", "hung", "refusing", "garbage"]  # fmt: skip

REVISION = "c0ffee5eed" * 4
CHAT = {"id": "smollm2-135m-instruct", "object": "model", "created": 1, "owned_by": "llm-lab", "kind": "chat",
        "revision": REVISION, "context": 8192}  # fmt: skip
EMBEDDING = {"id": "all-minilm-l6-v2", "object": "model", "created": 1, "owned_by": "llm-lab", "kind": "embedding",
             "revision": "beef", "context": 256}  # fmt: skip
ALIAS = {"id": "gpt-3.5-turbo", "object": "model", "created": 1, "owned_by": "llm-lab", "alias_of": CHAT["id"]}
EMBEDDING_ALIAS = {"id": "text-embedding-3-small", "object": "model", "created": 1, "owned_by": "llm-lab",
                   "alias_of": EMBEDDING["id"]}  # fmt: skip
PARIS = "The capital of France is Paris."
PACE = 0.02  # seconds between two pieces of an endless answer


class StandIn(ThreadingHTTPServer):
    """`mode` and `words` (the pieces of the next answer) may be changed at any time; `url` is its base URL."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.mode: Mode = "up"
        self.words = PARIS.split(" ")
        self.phases = ["guards", "queue"]  # of any request
        self.requests: list[dict[str, Any]] = []
        self.left: list[dict[str, Any]] = []
        self.fetched: list[str] = []
        self.keys: list[tuple[str, str | None]] = []
        self.cache: set[str] = set()
        self.answering = 0
        self.closing = threading.Event()
        self._lock = threading.Lock()
        self.url = f"http://127.0.0.1:{self.server_port}"

    def count(self, change: int) -> None:
        with self._lock:
            self.answering += change

    def reset(self) -> None:
        """As it was at its start, once nobody waits for an answer any more."""
        eventually(lambda: not self.answering, what="no answer under way")
        self.mode, self.words, self.phases = "up", PARIS.split(" "), ["guards", "queue"]
        for seen in (self.requests, self.left, self.fetched, self.keys, self.cache):
            seen.clear()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that leaves is what some tests are about: no traceback."""


class Handler(BaseHTTPRequestHandler):
    server: StandIn
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the base class names it so
        pass

    def do_GET(self) -> None:
        mode = self.server.mode
        self.server.keys.append((self.path, self.headers["authorization"]))
        if mode == "hung":
            self._left_within(None)
            return
        if mode == "refusing":
            self._json(401, {"error": NO_KEY})
        elif mode == "garbage":
            self._json(200, ["<html>"])
        elif self.path == "/health":
            self._json(200, {"status": "ok"})
        elif self.path == "/v1/models":
            self._json(200, {"object": "list", "data": [ALIAS, CHAT, EMBEDDING, EMBEDDING_ALIAS]})
        elif self.path == "/status":
            self._json(200, status(mode))
        elif self.path.startswith("/v1/requests/"):
            self._json(200, {"phases": [{"name": name, "start_ms": 0, "ms": 1} for name in self.server.phases]})
        else:
            self.server.fetched.append(self.path)
            self._json(404, {})

    def do_POST(self) -> None:
        self.server.count(+1)
        self.server.keys.append((self.path, self.headers["authorization"]))
        try:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            if self.server.mode == "refusing":
                self._json(401, {"error": NO_KEY})
                return
            self.server.requests.append(body)
            if (answer := self._lookup(body)) is not None:
                self._json(*answer)
                return
            try:
                left = self._answer(body)
            except ConnectionError:  # the client was gone when the next piece was written, or it reset
                left = True
            if left:
                self.server.left.append(body)
                self.close_connection = True
        finally:
            self.server.count(-1)

    def _lookup(self, body: dict[str, Any]) -> tuple[int, dict[str, Any], dict[str, str]] | None:
        """The JSON answer of an endpoint that does not stream; None: the stream answers."""
        if "stream" in body:
            return None
        if self.server.mode in FAULTS:
            code, error, headers = FAULTS[self.server.mode]
            return code, {"error": error}, headers
        if self.path.startswith("/admin/models/"):
            return 202, {"id": body["model"], "state": "loading"}, {}
        if self.path == "/cache/explain":
            key = {"canonical": "[3]", "key": "4f2a", "cacheable": True, "why": None, "state": "miss"}
            differs = ["temperature"] if body.get("against") else []
            return 200, key | {"differs": differs}, {}
        if self.path == "/v1/chat/completions":
            hit = json.dumps(body, sort_keys=True) in self.server.cache
            self.server.cache.add(json.dumps(body, sort_keys=True))
            status = "llm-lab; hit; ttl=41" if hit else "llm-lab; fwd=miss; stored"
            return 200, {"choices": [{"message": {"content": PARIS}}]}, {"cache-status": status}
        if self.path.startswith("/v1/tasks/"):
            return 200, {"model": CHAT["id"], "method": "probe", "results": TASKS[self.path.rpartition("/")[2]]}, {}
        if self.path.startswith("/v1/inspect/"):
            return 200, INSPECTED, {}
        return None

    def _answer(self, body: dict[str, Any]) -> bool:
        """Whether the client left before its end."""
        mode = self.server.mode
        if mode in FAULTS:
            code, error, headers = FAULTS[mode]
            self._json(code, {"error": error}, headers)
            return False
        # 1. Head: the cache says what it knows.
        key = json.dumps({k: v for k, v in body.items() if not k.startswith("stream")}, sort_keys=True)
        hit = key in self.server.cache
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.send_header("x-request-id", self.headers.get("x-request-id", "stand-in"))
        self.send_header("cache-status", 'llm-lab; hit; ttl=41; key="a;b"' if hit else "llm-lab; fwd=miss; stored")
        self.send_header("transfer-encoding", "chunked")
        self.end_headers()
        # 2. The pieces.
        if mode == "silent":
            return self._left_within(None)
        words = list(self.server.words)
        for number, word in enumerate(itertools.cycle(words) if mode == "endless" else words):
            if mode == "endless" and self._left_within(PACE):
                return True
            if number == 3 and mode == "interrupted":
                self._event({"error": {"message": "the model went away", "type": "server_error", "code": None}})
                self._chunk(b"")
                return False
            if number == 3 and mode == "broken-off":
                self.close_connection = True
                self.connection.shutdown(socket.SHUT_RDWR)
                return False
            self._choice({"content": word if number == 0 else " " + word})
        # 3. The end.
        self._choice({}, "stop")
        count = len(words)
        self._event({**CHUNK, "choices": [], "usage": {"prompt_tokens": 37, "completion_tokens": count,
                                                       "total_tokens": 37 + count}})  # fmt: skip
        self._chunk(b"data: [DONE]\n\n")
        self._chunk(b"")
        self.server.cache.add(key)
        return False

    def _choice(self, delta: dict[str, Any], finish: str | None = None) -> None:
        self._event({**CHUNK, "choices": [{"index": 0, "delta": delta, "finish_reason": finish}], "usage": None})

    def _event(self, event: dict[str, Any]) -> None:
        self._chunk(b"data: " + json.dumps(event).encode() + b"\n\n")

    def _chunk(self, data: bytes) -> None:
        self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))
        self.wfile.flush()

    def _left_within(self, seconds: float | None) -> bool:
        """Wait, without `seconds` for ever; True as soon as the client closed its end, or the test is over."""
        while True:
            readable, _, _ = select.select([self.connection], [], [], 0.5 if seconds is None else seconds)
            if self.server.closing.is_set() or (readable and not self.connection.recv(1, socket.MSG_PEEK)):
                self.close_connection = True
                return True
            if seconds is not None:
                return False

    def _json(self, code: int, body: Any, headers: dict[str, str] | None = None) -> None:
        data = json.dumps(body).encode()
        self.send_response(code)
        fields = {"content-type": "application/json", "x-request-id": self.headers.get("x-request-id", "stand-in")}
        for name, value in (fields | (headers or {})).items():
            self.send_header(name, value)
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


PARTS = [
    {"id": 7042, "text": " Paris", "bytes": [*b" Paris"], "special": False, "logprob": -0.26, "probability": 0.77,
     "after_temperature": 0.9, "after_filters": 1.0, "cut_by": None},
    {"id": 236, "text": None, "bytes": [0xEC], "special": False, "logprob": -2.0, "probability": 0.13,
     "after_temperature": 0.1, "after_filters": 0.0, "cut_by": "top_p"},
]  # fmt: skip
INSPECTED = {
    "tokens": PARTS, "steps": [{**PARTS[0], "alternatives": PARTS}], "token_ids": [7042], "ids": [7042, 236],
    "kept": 1, "entropy_bits": 2.13, "vocabulary": 49152,
}  # fmt: skip
TASKS: dict[str, list[Any]] = {
    "sentiment-analysis": [[{"label": "POSITIVE", "score": 0.9}, {"label": "NEGATIVE", "score": 0.1}]] * 12,
    "question-answering": [{"answer": "Busan", "score": 0.7, "start": 28, "end": 33}],
    "text-generation": [{"generated_text": "Large language models are models."}],
}
NO_KEY = {"message": "no key", "type": "invalid_request_error", "code": "invalid_api_key"}
CHUNK = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1, "model": CHAT["id"]}
FAULTS: dict[str, tuple[int, dict[str, Any], dict[str, str]]] = {
    "model-down": (503, {"message": "the model does not answer", "type": "server_error", "code": "model_down"}, {}),
    "model-loading": (503, {"message": "loading", "type": "server_error", "code": None}, {"retry-after": "9"}),
    "error": (500, {"message": "![x](http://example.invalid/x.png)", "type": "server_error", "code": None}, {}),
    "busy": (429, {"message": "too many", "type": "rate_limit_error", "code": "queue_full"}, {"retry-after": "7"}),
    "too-long": (400, {"message": "8,200 tokens are more than the context of 8,192", "type": "invalid_request_error",
                       "param": "messages", "code": "context_length_exceeded"}, {}),
}  # fmt: skip


def status(mode: Mode) -> dict[str, Any]:
    """The body of GET /status."""
    redis = {"state": "up", "version": "8.0.3", "server": "redis", "used_memory_bytes": 1_572_864, "latency_ms": 0.21}
    model: dict[str, Any] = {
        "state": "up",
        "device": "cpu",
        "models": [{**CHAT, "state": "ready"}, {**EMBEDDING, "state": "ready"}],
        "versions": {"lab_model": "0.1.0", "ray": "2.60.0", "torch": "2.13.0", "transformers": "5.23.0",
                     "python": "3.11.7"},
    }  # fmt: skip
    if mode == "model-down":
        model = {"state": "down", "detail": "connection refused"}
    if mode == "model-loading":
        model = {**model, "state": "loading", "models": [{**CHAT, "state": "loading"}]}
    return {
        "proxy": {"version": "0.1.0", "python": "3.11.7", "started": 1_790_000_000,
                  "upstreams": [{"name": "openai", "configured": False}]},
        "redis": {"state": "down", "detail": "connection refused"} if mode == "redis-down" else redis,
        "model": model,
        "cache": {"enabled": True, "entries": 3, "hits": 5, "misses": 3},
    }  # fmt: skip


@contextlib.contextmanager
def stand_in() -> Iterator[StandIn]:
    """A stand-in on a free port, until the block ends."""
    with StandIn() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.closing.set()
            server.shutdown()
            thread.join(5)


# ---- what a page shows


def shown(app: AppTest) -> str:
    """All text on the page, sidebar included."""
    kinds = ("title", "subheader", "markdown", "caption", "error", "warning", "success", "button", "text", "code")
    return "\n".join(
        f"{getattr(e, 'label', '')} {getattr(e, 'title', '')} {getattr(e, 'value', '')}"
        for kind in kinds
        for e in app.get(kind)
    )


def strips(app: AppTest) -> str:
    """The figures and tables that are drawn as HTML."""
    return "\n".join(element.proto.body for element in app.get("html"))


def click(app: AppTest, label: str) -> AppTest:
    """Press the button of this label."""
    done = next(button for button in app.button if button.label == label).click().run()
    assert not done.exception
    return done


def ask(app: AppTest, question: str = QUESTION) -> AppTest:
    done = app.chat_input[0].set_value(question).run()
    assert not done.exception
    return done
