"""Tool calls: how a model is told of functions, and how its calls are found in what it writes.

The form is Hermes': `<tool_call>{"name": …, "arguments": {…}}</tool_call>`. Knows text; nothing of tokens or HTTP.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

from ..api.wire.answers import CallPart
from .grammar import CALL_BEGIN, CALL_END, ending

# Qwen's and Hermes' own words, for templates that have none.
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

# The head of a call that a grammar has written: `grammar.beginning` of any name.
FORCED = re.compile(rf'\s*{CALL_BEGIN}\n\{{"name":"([A-Za-z0-9_-]+)","arguments":')


def told(messages: Sequence[dict[str, Any]], tools: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The conversation for a template that knows nothing of tools: they, calls and results become text."""
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
            if before == "tool":  # some templates want roles to alternate: several results are one message
                out[-1]["content"] += f"\n{content}"
            else:
                out.append({"role": "user", "content": content})
        else:
            calls = [f"{CALL_BEGIN}\n{_json(call['function'])}\n{CALL_END}" for call in message.get("tool_calls", ())]
            out.append({"role": role, "content": "\n".join([content, *calls] if content else calls or [""])})
        before = role
    return out


class Said(NamedTuple):
    """Words of the answer and their place in the whole text, in characters."""

    text: str
    start: int


class FreeCalls:
    """Calls in a text that may hold them: one is a call when it is complete and of a known function, else text.

    `most`: how many calls an answer may hold; `done` after so many.
    """

    def __init__(self, names: Collection[str], most: int | None = None) -> None:
        self._names, self._most = frozenset(names), most
        self._waiting = ""  # what may still become a call
        self.at = 0  # its place in the text, which is settled so far
        self.count = 0

    @property
    def done(self) -> bool:
        return self.count == self._most

    def push(self, text: str, *, last: bool = False) -> list[Said | CallPart]:
        """What has become certain, in order. `last`: nothing follows, so nothing waits."""
        out: list[Said | CallPart] = []
        self._waiting += text
        text_until = 0  # call marks before it are text: what follows them is no call
        while (begin := self._waiting.find(CALL_BEGIN, text_until)) >= 0 and not self.done:
            before = len(self._waiting[:begin].rstrip())
            end = self._waiting.find(CALL_END, begin)
            if end < 0 and not last:
                self._say(out, before)
                return out
            # A model that forgets the mark at the end has called all the same, when what it wrote is whole.
            stop = end if end >= 0 else len(self._waiting)
            calls = self._read(self._waiting[begin + len(CALL_BEGIN) : stop])
            if not calls:
                text_until = begin + len(CALL_BEGIN)
                continue
            self._say(out, before)
            self._skip(stop - before + (len(CALL_END) if end >= 0 else 0))
            out += calls
            text_until = 0
        if self.done or (last and self.count and not self._waiting.strip()):
            return out
        self._say(out, len(self._waiting) if last else len(_certain(self._waiting)))
        return out

    def _say(self, out: list[Said | CallPart], length: int) -> None:
        if length:
            out.append(Said(self._waiting[:length], self.at))
            self._skip(length)

    def _skip(self, length: int) -> None:
        self.at += length
        self._waiting = self._waiting[length:]

    def _read(self, written: str) -> list[CallPart]:
        """The calls in what stands between the marks (SmolLM writes a list there); none where it is no call."""
        out: list[CallPart] = []
        try:
            found = json.loads(written)
            for call in found if isinstance(found, list) else [found]:
                name, arguments = call["name"], call["arguments"]
                if not isinstance(name, str) or name not in self._names or not isinstance(arguments, dict):
                    return []
                written = _json(arguments)
                written.encode()  # JSON can name halves of characters, UTF-8 cannot
                index = self.count + len(out) // 2
                out += [CallPart(index, "", call_id(), name), CallPart(index, written)]
        except (ValueError, TypeError, KeyError, RecursionError):
            return []
        if self._most is not None:
            out = out[: 2 * (self._most - self.count)]
        self.count += len(out) // 2
        return out


class ForcedCalls:
    """Calls that a grammar makes the model write: their form is known, so that arguments stream as they come."""

    done = False  # the grammar ends the answer
    at = 0  # nothing is said

    def __init__(self) -> None:
        self._waiting = ""
        self._inside = False
        self.count = 0

    def push(self, text: str, *, last: bool = False) -> list[Said | CallPart]:
        """What has become certain. `last`: an answer cut in its arguments shows what there is of them."""
        out: list[Said | CallPart] = []
        self._waiting += text
        while True:
            if not self._inside:
                if not (head := FORCED.match(self._waiting)):
                    return out
                out.append(CallPart(self.count, "", call_id(), head.group(1)))
                self._inside, self.count = True, self.count + 1
                self._waiting = self._waiting[head.end() :]
            # A line break in a JSON string is written \n, so that the end cannot stand in the arguments.
            part, end, rest = self._waiting.partition(ending())
            if not end:
                held = 0 if last else _overlap(part, ending())
                part, rest = part[: len(part) - held], part[len(part) - held :]
            if part:
                out.append(CallPart(self.count - 1, part))
            self._waiting = rest
            if not end:
                return out
            self._inside = False


Calls = FreeCalls | ForcedCalls


def call_id() -> str:
    return f"call_{secrets.token_hex(12)}"


def _certain(text: str) -> str:
    """The text without what may belong to a call that begins at its end: white space and a piece of the mark."""
    return text[: len(text) - _overlap(text, CALL_BEGIN)].rstrip()


def _overlap(text: str, mark: str) -> int:
    """How many characters at the end of `text` a `mark` may begin with."""
    return next((n for n in range(min(len(mark) - 1, len(text)), 0, -1) if text.endswith(mark[:n])), 0)


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False)
