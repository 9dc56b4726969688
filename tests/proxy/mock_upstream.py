"""An OpenAI-compatible upstream that does as it is told: `python tests/proxy/mock_upstream.py --port 9000`.

What stands after `mock-` in the model's name is how it behaves (`gpt-mock-reset` resets the stream in its middle): see
MODES. It is a stand-in for a paid upstream at /v1/… and for the model service at /v1/models, /ready and /m/<id>/v1/….
`GET /calls` tells what came in and how many callers left early; `POST /control` sets `revision`, `delay` (seconds
before an answer) and the `state` of /ready, the ids that are still `loading`; `script`, what becomes of the next calls,
one after the other (a status, an object with `status`, `body` and
perhaps its content `type`, `drop`, `hang`, `ok`), with the headers `sent`;
`closed`: a gate before which all answers wait until it is opened (false), `held` another one after each stream's event
number `held_at` (0: the first one); `used`: what /tally tells of every call; `timing`: what /v1/requests/…/timing
answers for every call; `POST /reset` forgets all.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import struct
import time
from collections.abc import Awaitable, Callable
from typing import Any

import orjson
import uvicorn

MODES = {
    "429": "too many requests, with Retry-After: 7",
    "500": "OpenAI's envelope with status 500",
    "401": "refuses the key and repeats it in the message",
    "403": "OpenAI's envelope with status 403, the key in its message",
    "html": "a web page with status 200",
    "html-500": "a web page with status 500",
    "array": "JSON that is no object",
    "redirect": "sends the caller elsewhere",
    "hang": "takes the request and says nothing",
    "stall": "falls silent after the first event",
    "slow": "one event in 100 ms, 12 of them",
    "endless": "one event in 100 ms, for ever",
    "reset": "breaks the connection in the middle of the answer",
    "no-done": "ends the stream without [DONE]",
    "unfinished": "[DONE] without a finish_reason",
    "error-event": "an error, with the key in it, in the middle of the stream",
    "junk": "an event that is not JSON",
    "json": "JSON where a stream was asked for",
    "crlf": "events with CRLF, comments between them",
    "empty": "an answer without content",
    "filter": "finish_reason content_filter",
    "cut": "finish_reason length, though no limit was asked for",
    "bad-args": "a tool call whose arguments do not parse",
    "tools": "two tool calls",
    "reasoning": "reasoning_content before the content",
    "refusal": "a refusal instead of content",
    "pretty": "JSON over many lines, as OpenAI sends it",
    "counting": "like slow, with the usage so far in every chunk",
}

PAGES = {
    "/health",
    "/calls",
    "/control",
    "/reset",
    "/ready",
    "/v1/models",
    "/models/load",
    "/models/add",
    "/openapi.json",
}
LOCAL = {"smollm2-135m-instruct": "chat", "all-minilm-l6-v2": "embedding"}

Message = dict[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


class Mock:
    def __init__(self) -> None:
        self.under_way = 0  # answers that are not over
        self.forget()

    def forget(self) -> None:
        self.calls: dict[str, int] = {}
        self.left = 0
        self.last: dict[str, Any] = {}
        self.revision = "r1"
        self.delay = 0.0
        self.state = "ready"
        self.others: dict[str, dict[str, Any]] = {}  # further models of the model service: id -> state and card
        self.openapi: dict[str, Any] = {}  # the model service's document
        self.operated: list[list[Any]] = []  # what an operator asked for: path and body
        self.loading: list[str] = []  # ids of the model service that are not served yet
        self.script: list[int | str | dict[str, Any]] = []
        self.sent: dict[str, str] = {}
        self.closed = self.held = False
        self.held_at = 0
        self.used: dict[str, int] = {}
        self.timing: dict[str, Any] = {}
        self.at: list[float] = []  # when calls came, time.time()
        self.tokens = {"prompt_tokens": 0, "completion_tokens": 0}  # of answers that were sent whole

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return None
        body = b""
        while True:
            message = await receive()
            body += message.get("body", b"")
            if not message.get("more_body"):
                break
        headers = {name.decode(): value.decode("latin-1") for name, value in scope["headers"]}
        if scope["path"] == "/tally":
            ids = [each.removeprefix("id=") for each in scope["query_string"].decode().split("&")]
            return await whole(send, dict.fromkeys(ids, self.used) if self.used else {})
        if scope["path"].startswith("/v1/requests/"):
            return await whole(send, self.timing, status=200 if self.timing else 404)
        if scope["path"] in PAGES:
            return await self.page(scope["path"], body, send)
        self.under_way += 1
        try:
            work = asyncio.ensure_future(self.answer(scope["path"], headers, body, send))
            gone = asyncio.ensure_future(receive())
            await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                self.left += 1
                work.cancel()
                await asyncio.wait({work})
                return None
            gone.cancel()
            return await work
        finally:
            self.under_way -= 1

    async def answer(self, path: str, headers: dict[str, str], raw: bytes, send: Send) -> None:
        local = None
        if path.startswith("/m/"):
            local, _, path = path[3:].partition("/")
            path = "/" + path
        kind = path.rpartition("/v1/")[2]  # some APIs have more before it: /openai/v1/…, /engines/v1/…
        self.calls[kind] = self.calls.get(kind, 0) + 1
        body = orjson.loads(raw)
        self.last = {"headers": headers, "body": body, "path": path, "raw": raw.decode()}
        self.at.append(time.time())
        extra = {"x-request-id": headers.get("x-request-id", "up-1"), "set-cookie": "s=1", "openai-processing-ms": "5"}
        if local:
            extra |= {"x-model-revision": self.revision, "x-model-replica": "0a1b2c3d"}
        if self.delay:
            await asyncio.sleep(self.delay + 0.001)  # uvloop's timers end up to a millisecond early
        if await self.scripted(send, extra):
            return None
        mode = body["model"].partition("mock-")[2]
        key = headers.get("authorization", "").removeprefix("Bearer ")
        if await refuse(mode, key, send, extra):
            return None
        if kind.startswith(("tasks/", "inspect/")):
            made = tasked(body, kind) if kind.startswith("tasks/") else {"model": body["model"], "usage": tokens(7, 0)}
            await whole(send, made, extra)
            return self.count(made["usage"])
        if kind not in {"chat/completions", "completions", "embeddings", "responses"}:
            return await whole(send, failure("nothing here", "invalid_request_error"), extra, status=404)
        try:
            if kind == "embeddings":
                made = vectors(body, local, self.revision)
                await whole(send, made, extra)
                return self.count(made["usage"])
            if kind == "responses":
                return await respond(send, body, mode, extra)
            made = completion(body, mode, kind == "chat/completions", self.revision if local else "fp_mock")
        except (KeyError, TypeError, AttributeError, IndexError, ValueError):
            return await whole(send, failure("this makes no sense", "invalid_request_error"), extra, status=400)
        if not body.get("stream") or mode == "json":
            if mode == "reset":
                return await broken(send, extra, orjson.dumps(made)[:50])
            shown = orjson.dumps(made, option=orjson.OPT_INDENT_2) if mode == "pretty" else made
            await whole(send, shown, extra)
            return self.count(made["usage"])
        wanted = bool((body.get("stream_options") or {}).get("include_usage"))
        await stream(send, made, mode, usage=wanted, key=key, extra=extra, after=self.after)
        return self.count(made["usage"])

    def count(self, usage: dict[str, Any]) -> None:
        for name in self.tokens:
            self.tokens[name] += usage.get(name, 0)

    async def opened(self, gate: str) -> None:
        while getattr(self, gate):  # noqa: ASYNC110 - it is opened by an assignment
            await asyncio.sleep(0.01)

    async def after(self, place: int) -> None:
        if place == self.held_at:
            await self.opened("held")

    async def scripted(self, send: Send, extra: dict[str, str]) -> bool:
        """The gate, and what the script says of this call. True when it has been dealt with."""
        await self.opened("closed")
        turn = self.script.pop(0) if self.script else "ok"
        if turn == "drop":
            send.__self__.transport.abort()  # type: ignore[attr-defined]  # uvicorn's own, before any head
        elif turn == "hang":
            await asyncio.sleep(3600)
        elif isinstance(turn, dict):
            given = turn["body"]
            kind = turn.get("type") or ("text/plain" if isinstance(given, str) else "application/json")
            said = given.encode() if isinstance(given, str) else given
            await whole(send, said, extra | self.sent, status=turn["status"], content_type=kind)
        elif isinstance(turn, int):
            await whole(send, failure(f"status {turn}", "server_error"), extra | self.sent, status=turn)
        return turn != "ok"

    async def page(self, path: str, raw: bytes, send: Send) -> None:
        if path == "/calls":
            counts = {"calls": self.calls, "total": sum(self.calls.values()), "left": self.left}
            counts |= {
                "under_way": self.under_way,
                "last": self.last,
                "at": self.at,
                "tokens": self.tokens,
                "operated": self.operated,
            }
            return await whole(send, counts)
        if path == "/control":
            for name, value in orjson.loads(raw).items():
                setattr(self, name, value)
        elif path == "/reset":
            self.forget()
        elif path == "/ready":
            models: list[dict[str, Any]] = [
                {"id": name, "kind": kind, "state": "loading" if name in self.loading else "ready"}
                for name, kind in LOCAL.items()
            ]
            models += [{"id": name, "kind": "chat", **card} for name, card in self.others.items()]
            said = {"status": self.state, "device": "cpu", "models": models, "versions": {"lab_model": "mock"}}
            return await whole(send, said, status=200 if self.state == "ready" else 503)
        elif path == "/openapi.json":
            return await whole(send, self.openapi)
        elif path.startswith("/models/"):
            self.operated.append([path, orjson.loads(raw)])
            return await whole(send, {"id": orjson.loads(raw)["model"], "state": "loading"}, status=202)
        elif path == "/v1/models":
            data: list[dict[str, Any]] = [
                {"id": name, "object": "model", "created": 1, "owned_by": "llm-lab", "kind": kind,
                 "revision": self.revision, "context": 8192}
                for name, kind in LOCAL.items()
                if name not in self.loading
            ]  # fmt: skip
            data += [{"id": name, "object": "model", "created": 1, "owned_by": "llm-lab", "kind": "chat", **card}
                     for name, card in self.others.items()]  # fmt: skip
            return await whole(send, {"object": "list", "data": data})
        return await whole(send, {"status": "ok"})


def failure(message: str, kind: str) -> dict[str, Any]:
    return {"error": {"message": message, "type": kind, "param": None, "code": None}}


async def whole(send: Send, said: Any, extra: dict[str, str] | None = None, *, status: int = 200,
                content_type: str = "application/json") -> None:  # fmt: skip
    body = said if isinstance(said, bytes) else orjson.dumps(said)
    headers = {"content-type": content_type, "content-length": str(len(body)), **(extra or {})}
    await send({"type": "http.response.start", "status": status,
                "headers": [(k.encode(), v.encode()) for k, v in headers.items()]})  # fmt: skip
    await send({"type": "http.response.body", "body": body})


async def broken(send: Send, extra: dict[str, str], part: bytes, content_type: str = "application/json") -> None:
    """The head, a part of the body, and then the connection is gone."""
    headers = {"content-type": content_type, **extra}
    await send({"type": "http.response.start", "status": 200,
                "headers": [(k.encode(), v.encode()) for k, v in headers.items()]})  # fmt: skip
    await send({"type": "http.response.body", "body": part, "more_body": True})
    await asyncio.sleep(0.05)
    raise ConnectionResetError("as asked")


async def refuse(mode: str, key: str, send: Send, extra: dict[str, str]) -> bool:
    """The modes that answer before anything is made. True when one did."""
    refusals = {"429": (429, "slow down", "rate_limit_error"), "500": (500, "as asked", "server_error"),
                "401": (401, f"Incorrect API key provided: {key}", "invalid_request_error"),
                "403": (403, f"The key {key} may not", "invalid_request_error")}  # fmt: skip
    if mode in refusals:
        status, message, kind = refusals[mode]
        more = {"retry-after": "7"} if status == 429 else {}
        await whole(send, failure(message, kind), extra | more, status=status)
    elif mode in {"html", "html-500"}:
        page = b"<!doctype html><h1>Gateway</h1>"
        await whole(send, page, extra, status=500 if mode == "html-500" else 200, content_type="text/html")
    elif mode == "array":
        await whole(send, [1, 2], extra)
    elif mode == "redirect":
        await whole(send, {}, extra | {"location": "http://127.0.0.1:9/elsewhere"}, status=307)
    elif mode == "hang":
        await asyncio.sleep(3600)
    else:
        return False
    return True


def said_by(body: dict[str, Any]) -> str:
    """What the caller said last."""
    if "messages" in body:
        content = body["messages"][-1]["content"]
        return content if isinstance(content, str) else "".join(part.get("text", "") for part in content)
    return str(body.get("prompt", ""))


def text_for(body: dict[str, Any], index: int) -> tuple[str, str]:
    """The answer and its finish reason: a function of the question, limited and stopped as asked."""
    asked = said_by(body)
    text = "The capital of France is Paris." if "France" in asked else f"You said: {asked} 그리고 é 👍🏽 done."
    text += f" ({index})" if index else ""
    for stop in [body["stop"]] if isinstance(body.get("stop"), str) else body.get("stop") or []:
        text = text.partition(stop)[0]
    limit = body.get("max_completion_tokens") or body.get("max_tokens")
    words = text.split(" ")
    if limit and len(words) > limit:
        return " ".join(words[:limit]), "length"
    return text, "stop"


def pieces(text: str) -> list[str]:
    words = text.split(" ")
    return [word if place == len(words) - 1 else word + " " for place, word in enumerate(words)]


def completion(body: dict[str, Any], mode: str, chat: bool, fingerprint: str) -> dict[str, Any]:
    """The whole JSON answer; a stream is cut from it."""
    choices: list[dict[str, Any]] = []
    if (body.get("n") or 1) > 128:
        raise ValueError("n")
    for index in range(body.get("n") or 1):
        text, finish = text_for(body, index)
        finish = {"filter": "content_filter", "cut": "length"}.get(mode, finish)
        text = "" if mode == "empty" else text
        logprobs: dict[str, Any] | None = None
        if body.get("logprobs"):
            told = [{"token": t, "logprob": -0.1, "bytes": list(t.encode()), "top_logprobs": []} for t in pieces(text)]
            logprobs = {"content": told, "refusal": None}
            if not chat:
                places = list(range(len(told)))
                logprobs = {"tokens": pieces(text), "token_logprobs": [-0.1 for _ in told], "text_offset": places}
        if not chat:
            choices.append({"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish})
            continue
        message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
        if mode == "reasoning":
            message["reasoning_content"] = "Let me think. Yes."
        if mode == "refusal":
            message |= {"content": None, "refusal": "I will not do that."}
        wants_tools = body.get("tools") and body.get("tool_choice") != "none"
        if wants_tools or mode in {"tools", "bad-args"}:
            arguments = ['{"city": "Paris"', *(["}"] if mode != "bad-args" else [])]
            message |= {"content": None, "tool_calls": [
                {"id": f"call_{i}", "type": "function", "function": {"name": name, "arguments": "".join(arguments)}}
                for i, name in enumerate(("weather", "time"))
            ]}  # fmt: skip
            finish = "tool_calls"
        choices.append({"index": index, "message": message, "logprobs": logprobs, "finish_reason": finish})
    prompt = len(said_by(body).split())
    completed = sum(len(text_for(body, index)[0].split(" ")) for index in range(body.get("n") or 1))
    usage = {"prompt_tokens": prompt, "completion_tokens": completed, "total_tokens": prompt + completed,
             "prompt_tokens_details": {"cached_tokens": 0}}  # fmt: skip
    kind = "chat.completion" if chat else "text_completion"
    return {"id": f"mock-{time.monotonic_ns()}", "object": kind, "created": int(time.time()) - 1000,
            "model": body["model"], "system_fingerprint": fingerprint, "choices": choices, "usage": usage}  # fmt: skip


def deltas(choice: dict[str, Any]) -> list[dict[str, Any]]:
    """One choice as the choices of a stream's chunks."""
    every = {"index": choice["index"], "logprobs": None, "finish_reason": None}
    told = choice["logprobs"]
    if "text" in choice:
        cut = [{**every, "text": t} for t in pieces(choice["text"])]
        for place, part in enumerate(cut):
            part["logprobs"] = told and {name: [values[place]] for name, values in told.items()}
        return [*cut, {**every, "text": "", "finish_reason": choice["finish_reason"]}]
    message = choice["message"]
    parts: list[dict[str, Any]] = [{**every, "delta": {"role": "assistant", "content": "", "refusal": None}}]
    if message["content"] is None:
        parts[0]["delta"]["content"] = None
    for name in ("reasoning_content", "content", "refusal"):
        for place, piece in enumerate(pieces(message[name]) if message.get(name) else []):
            carried = {"logprobs": {"content": [told["content"][place]], "refusal": None}} if told else {}
            parts.append({**every, "delta": {name: piece}, **carried})
    for index, call in enumerate(message.get("tool_calls") or []):
        function = call["function"]
        opened = {"index": index, **call, "function": {"name": function["name"], "arguments": ""}}
        parts.append({**every, "delta": {"tool_calls": [opened]}})
        parts += [
            {**every, "delta": {"tool_calls": [{"index": index, "function": {"arguments": half}}]}}
            for half in (function["arguments"][:7], function["arguments"][7:])
        ]
    return [*parts, {**every, "delta": {}, "finish_reason": choice["finish_reason"]}]


async def stream(send: Send, made: dict[str, Any], mode: str, *, usage: bool, key: str, extra: dict[str, str],
                 after: Callable[[int], Awaitable[None]]) -> None:  # fmt: skip
    """`after` is awaited with the place of each event that is out."""
    end, comment = ("\r\n\r\n", ": still here\r\n\r\n") if mode == "crlf" else ("\n\n", "")
    top = {name: value for name, value in made.items() if name not in {"choices", "usage"}}
    if made["object"] == "chat.completion":
        top["object"] = "chat.completion.chunk"
    parts = [part for choice in made["choices"] for part in deltas(choice)]
    if mode in {"slow", "counting"}:
        parts = [*[parts[1]] * 12, parts[-1]]
    if mode == "endless":
        parts = [parts[1]] * 10_000
    if mode == "unfinished":
        parts = parts[:-1]
    headers = {"content-type": "text/event-stream", **extra}
    await send({"type": "http.response.start", "status": 200,
                "headers": [(k.encode(), v.encode()) for k, v in headers.items()]})  # fmt: skip

    async def put(data: str) -> None:
        await send({"type": "http.response.body", "body": f"{comment}data: {data}{end}".encode(), "more_body": True})

    for place, part in enumerate(parts):
        if place == 2 and mode == "reset":
            await asyncio.sleep(0.05)
            raise ConnectionResetError("as asked")
        if place == 2 and mode == "error-event":
            await put(orjson.dumps(failure(f"the engine fell over, key {key}", "server_error")).decode())
            break
        if place == 1 and mode == "stall":
            await asyncio.sleep(3600)
        if place == 2 and mode == "junk":
            await asyncio.sleep(0.05)
            await put("{not json")
        chunk = {**top, "choices": [part]} | ({"usage": None} if usage else {})
        if mode == "counting":
            chunk["usage"] = made["usage"] | {"completion_tokens": place + 1}
        await put(orjson.dumps(chunk).decode())
        await after(place)
        await asyncio.sleep(0.1 if mode in {"slow", "endless", "counting"} else 0)
    if usage and mode not in {"error-event", "no-done"}:
        await put(orjson.dumps({**top, "choices": [], "usage": made["usage"]}).decode())
    if mode not in {"error-event", "no-done"}:
        await put("[DONE]")
    await send({"type": "http.response.body", "body": b""})


async def respond(send: Send, body: dict[str, Any], mode: str, extra: dict[str, str]) -> None:
    """The Responses API: one message, as JSON or as events. Mode `reset`: the stream breaks off."""
    given = body["input"]
    text = f"You said: {given if isinstance(given, str) else given[-1]['content']}"
    words = len(text.split())
    part = {"type": "output_text", "text": text, "annotations": [], "logprobs": []}
    usage = {"input_tokens": words - 2, "input_tokens_details": {"cached_tokens": 0}, "output_tokens": words,
             "output_tokens_details": {"reasoning_tokens": 0}, "total_tokens": 2 * words - 2}  # fmt: skip
    message = {"type": "message", "id": "msg_1", "status": "completed", "role": "assistant", "content": [part]}
    made = {"id": f"resp_{time.monotonic_ns()}", "object": "response", "created_at": 1, "status": "completed",
            "model": body["model"], "output": [message], "usage": usage, "error": None, "incomplete_details": None,
            "instructions": None, "metadata": {}, "parallel_tool_calls": True, "temperature": 1.0, "top_p": 1.0,
            "tool_choice": "auto", "tools": []}  # fmt: skip
    if not body.get("stream"):
        await whole(send, made, extra)
        return
    begun = made | {"status": "in_progress", "output": [], "usage": None}
    place = {"item_id": "msg_1", "output_index": 0, "content_index": 0}
    events: list[dict[str, Any]] = [{"type": "response.created", "response": begun}]
    item = message | {"status": "in_progress", "content": []}
    events += [{"type": "response.output_item.added", "output_index": 0, "item": item}]
    events += [{"type": "response.content_part.added", **place, "part": part | {"text": ""}}]
    events += [{"type": "response.output_text.delta", **place, "delta": each, "logprobs": []} for each in pieces(text)]
    events += [{"type": "response.output_text.done", **place, "text": text, "logprobs": []}]
    events += [{"type": "response.output_item.done", "output_index": 0, "item": message}]
    events += [{"type": "response.completed", "response": made}]
    headers = {"content-type": "text/event-stream", **extra}
    await send({"type": "http.response.start", "status": 200,
                "headers": [(k.encode(), v.encode()) for k, v in headers.items()]})  # fmt: skip
    for number, event in enumerate(events):
        if mode == "reset" and number == 3:
            await asyncio.sleep(0.05)
            raise ConnectionResetError("as asked")
        said = f"event: {event['type']}\ndata: ".encode() + orjson.dumps(event | {"sequence_number": number}) + b"\n\n"
        await send({"type": "http.response.body", "body": said, "more_body": True})
    await send({"type": "http.response.body", "body": b""})


def tokens(prompt: int, completion: int) -> dict[str, Any]:
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def tasked(body: dict[str, Any], kind: str) -> dict[str, Any]:
    """One result for each input, which repeats it."""
    given = body["inputs"] if isinstance(body["inputs"], list) else [body["inputs"]]
    counts = [len(str(each)) for each in given]
    made = [1 if kind == "tasks/text-generation" else 0 for _ in given]
    by_input = {"per_input_tokens": counts, "per_input_completion_tokens": made}
    results = [{"seen": each, "parameters": body.get("parameters")} for each in given]
    whole = tokens(sum(counts), sum(made)) | by_input
    return {"model": body["model"], "method": "mock", "results": results, "usage": whole}


def vectors(body: dict[str, Any], local: str | None, revision: str) -> dict[str, Any]:
    """A vector that is a function of its input alone, and of the revision."""
    given = body["input"]
    units = given if isinstance(given, list) and given and not isinstance(given[0], int) else [given]
    data = []
    for index, unit in enumerate(units):
        seed = sum(unit) if isinstance(unit, list) else sum(unit.encode())
        vector = [seed / 1000, len(unit) / 7, float(revision[1:] or 0) if local else 0.25]
        packed = base64.b64encode(struct.pack("<3f", *vector)).decode()
        shown = packed if body.get("encoding_format") == "base64" else vector
        data.append({"object": "embedding", "index": index, "embedding": shown})
    counts = [len(unit) if isinstance(unit, list) else len(unit.split()) + 1 for unit in units]
    usage: dict[str, Any] = {"prompt_tokens": sum(counts), "total_tokens": sum(counts)}
    if local:
        usage["per_input_tokens"] = counts
    return {"object": "list", "data": data, "model": body["model"], "usage": usage} | (
        {"system_fingerprint": revision} if local else {}
    )


if __name__ == "__main__":
    arguments = argparse.ArgumentParser()
    arguments.add_argument("--port", type=int, required=True)
    uvicorn.run(Mock(), host="127.0.0.1", port=arguments.parse_args().port, log_level="warning", lifespan="off")
