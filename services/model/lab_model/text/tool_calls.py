"""Tool calls: how functions are described to a model, and how its calls are parsed from its text.

The format is Hermes': `<tool_call>{"name": …, "arguments": {…}}</tool_call>`. Knows text. Knows nothing of tokens or
HTTP.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

from .grammar import CALL_BEGIN, CALL_END, ending

# The wording of Qwen and Hermes, for templates without tools.
PROMPT = """# Tools

You may call one or more functions to assist with the user query.

You are provided with function signatures within <tools></tools> XML tags:
<tools>
{tools}
</tools>

For each function call, return a json object with function name and arguments within <tool_call></tool_call> XML tags:
<tool_call>
{{"name": <function-name>, "arguments": <args-json-object>}}
</tool_call>"""

# The beginning of a call under a grammar: `grammar.beginning` of any name.
FORCED = re.compile(rf'\s*{CALL_BEGIN}\n\{{"name":"([A-Za-z0-9_-]+)","arguments":')


def render_tools(messages: Sequence[dict[str, Any]], tools: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The conversation for a template without tools: tools, calls and results become text."""
    out: list[dict[str, Any]] = []
    if tools:
        prompt = PROMPT.format(tools="\n".join(_json(tool) for tool in tools))
        if messages and messages[0]["role"] == "system":
            prompt = f"{messages[0]['content']}\n\n{prompt}"
            messages = messages[1:]
        out.append({"role": "system", "content": prompt})
    before = ""
    for message in messages:
        role, content = message["role"], message["content"]
        if role == "tool":
            content = f"<tool_response>\n{content}\n</tool_response>"
            if before == "tool":  # some templates require alternating roles: several results become one message
                out[-1]["content"] += f"\n{content}"
            else:
                out.append({"role": "user", "content": content})
        else:
            calls = [f"{CALL_BEGIN}\n{_json(call['function'])}\n{CALL_END}" for call in message.get("tool_calls", ())]
            out.append({"role": role, "content": "\n".join([content, *calls] if content else calls or [""])})
        before = role
    return out


class CallPart(NamedTuple):
    """A part of a tool call: first its id and name, then its arguments."""

    call: int  # its index in the answer
    arguments: str
    id: str | None = None
    name: str | None = None


class TextSpan(NamedTuple):
    """Text of the answer outside calls, and its offset in the whole text, in characters."""

    text: str
    start: int


class ToolCallParser:
    """Parses text that may contain calls. A call that is incomplete or of an unknown function is text.

    most: calls that an answer may hold; `done` after so many.
    """

    def __init__(self, names: Collection[str], most: int | None = None) -> None:
        self._names, self._most = frozenset(names), most
        self._pending = ""  # text that may still become a call
        self.at = 0  # its offset in the text; everything before it is final
        self.count = 0

    @property
    def done(self) -> bool:
        return self.count == self._most

    def push(self, text: str, *, last: bool = False) -> list[TextSpan | CallPart]:
        """What has become final, in order. last: no text follows, so nothing is held back."""
        out: list[TextSpan | CallPart] = []
        self._pending += text
        text_until = 0  # call marks before it are text, because no call follows them
        while (begin := self._pending.find(CALL_BEGIN, text_until)) >= 0 and not self.done:
            before = len(self._pending[:begin].rstrip())
            end = self._pending.find(CALL_END, begin)
            if end < 0 and not last:
                self._emit_text(out, before)
                return out
            # A complete call counts even if the model omits the closing mark.
            stop = end if end >= 0 else len(self._pending)
            calls = self._parse(self._pending[begin + len(CALL_BEGIN) : stop])
            if not calls:
                text_until = begin + len(CALL_BEGIN)
                continue
            self._emit_text(out, before)
            self._skip(stop - before + (len(CALL_END) if end >= 0 else 0))
            out += calls
            text_until = 0
        if self.done or (last and self.count and not self._pending.strip()):
            return out
        self._emit_text(out, len(self._pending) if last else len(_final(self._pending)))
        return out

    def _emit_text(self, out: list[TextSpan | CallPart], length: int) -> None:
        if length:
            out.append(TextSpan(self._pending[:length], self.at))
            self._skip(length)

    def _skip(self, length: int) -> None:
        self.at += length
        self._pending = self._pending[length:]

    def _parse(self, written: str) -> list[CallPart]:
        """The calls between the marks (SmolLM writes a list there); none if it is not a call."""
        out: list[CallPart] = []
        try:
            found = json.loads(written)
            for call in found if isinstance(found, list) else [found]:
                name, arguments = call["name"], call["arguments"]
                if not isinstance(name, str) or name not in self._names or not isinstance(arguments, dict):
                    return []
                written = _json(arguments)
                written.encode()  # JSON can escape lone surrogates, UTF-8 cannot encode them
                index = self.count + len(out) // 2
                out += [CallPart(index, "", call_id(), name), CallPart(index, written)]
        except (ValueError, TypeError, KeyError, RecursionError):
            return []
        if self._most is not None:
            out = out[: 2 * (self._most - self.count)]
        self.count += len(out) // 2
        return out


class ForcedToolCallParser:
    """Parses calls under a grammar: their format is known, so that arguments stream as they are generated."""

    done = False  # the grammar ends the answer
    at = 0  # there is no text outside calls

    def __init__(self) -> None:
        self._pending = ""
        self._inside = False
        self.count = 0

    def push(self, text: str, *, last: bool = False) -> list[TextSpan | CallPart]:
        """What has become final. last: arguments that were cut off are returned as far as they go."""
        out: list[TextSpan | CallPart] = []
        self._pending += text
        while True:
            if not self._inside:
                if not (head := FORCED.match(self._pending)):
                    return out
                out.append(CallPart(self.count, "", call_id(), head.group(1)))
                self._inside, self.count = True, self.count + 1
                self._pending = self._pending[head.end() :]
            # A line break in a JSON string is escaped, so that the arguments cannot contain the end mark.
            part, end, rest = self._pending.partition(ending())
            if not end:
                held = 0 if last else _overlap(part, ending())
                part, rest = part[: len(part) - held], part[len(part) - held :]
            if part:
                out.append(CallPart(self.count - 1, part))
            self._pending = rest
            if not end:
                return out
            self._inside = False


CallParser = ToolCallParser | ForcedToolCallParser


def call_id() -> str:
    return f"call_{secrets.token_hex(12)}"


def _final(text: str) -> str:
    """The text without what may belong to a call that begins at its end: white space and part of the mark."""
    return text[: len(text) - _overlap(text, CALL_BEGIN)].rstrip()


def _overlap(text: str, mark: str) -> int:
    """How many characters at the end of `text` are the beginning of `mark`."""
    return next((n for n in range(min(len(mark) - 1, len(text)), 0, -1) if text.endswith(mark[:n])), 0)


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False)
