"""Tool calls: describes functions to a model, and parses its calls from its text.

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

# Under a grammar, the text before arguments: `grammar.beginning` of any name, after `grammar.ending` of a call.
FORCED = re.compile(rf'(?:{re.escape(ending())})?\s*{CALL_BEGIN}\n\{{"name":"([A-Za-z0-9_-]+)","arguments":')


def render_tools(messages: Sequence[dict[str, Any]], tools: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The conversation for a template without tools: tools, calls and results are written as text."""
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


class JsonObject:
    """Finds the end of a JSON object that arrives in parts. Reads brackets and strings; checks nothing else."""

    def __init__(self) -> None:
        self._depth = 0
        self._string = self._escaped = False
        self.closed = False

    def take(self, text: str) -> int:
        """Number of characters of `text`, the next part, that belong to the object. Sets `closed` at its end."""
        for at, character in enumerate(text):
            if self._escaped:
                self._escaped = False
            elif self._string:
                self._escaped, self._string = character == "\\", character != '"'
            elif character == '"':
                self._string = True
            elif character in "{[":
                self._depth += 1
            elif character in "}]":
                self._depth -= 1
                if not self._depth:
                    self.closed = True
                    return at + 1
        return len(text)


class ToolCallParser:
    """Parses text that may contain calls. Anything else, also a call of an unknown function, is text. For a call that
    is cut off, its name and the beginning of its arguments are returned, but never its marks.

    most: largest number of calls in an answer; `done` after that many.
    """

    def __init__(self, names: Collection[str], most: int | None = None) -> None:
        self._names, self._most = frozenset(names), most
        self._pending = ""  # text that may still become a call
        self.at = 0  # its offset in the text; everything before it is final
        self.count = 0

    @property
    def done(self) -> bool:
        return self.count == self._most

    def push(self, text: str, *, last: bool = False, cut: bool = False) -> list[TextSpan | CallPart]:
        """Add text; returns the parts that are now final, in order. last: no text follows, so nothing is held back.
        cut: a limit ended the text, so the beginning of a mark belongs to a call."""
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
            if not calls and end < 0:
                cut_off = self._parse_cut(self._pending[begin + len(CALL_BEGIN) :])
                if cut_off is not None:
                    self._emit_text(out, before)
                    self._skip(len(self._pending))
                    return out + cut_off
            if not calls:
                text_until = begin + len(CALL_BEGIN)
                continue
            self._emit_text(out, before)
            self._skip(stop - before + (len(CALL_END) if end >= 0 else 0))
            out += calls
            text_until = 0
        if self.done or (last and self.count and not self._pending.strip()):
            return out
        shown = len(_final(self._pending))
        if last:
            shown = len(self._pending) - (_overlap(self._pending, CALL_BEGIN) if cut else 0)
        self._emit_text(out, shown)
        return out

    def _emit_text(self, out: list[TextSpan | CallPart], length: int) -> None:
        if length:
            out.append(TextSpan(self._pending[:length], self.at))
            self._skip(length)

    def _skip(self, length: int) -> None:
        self.at += length
        self._pending = self._pending[length:]

    def _parse(self, written: str) -> list[CallPart]:
        """The calls between the marks (SmolLM writes a list there); none if the text is not a call."""
        out: list[CallPart] = []
        try:
            found = json.loads(written)
            for call in found if isinstance(found, list) else [found]:
                name, arguments = call["name"], call["arguments"]
                if not isinstance(name, str) or name not in self._names or not isinstance(arguments, dict):
                    return []
                _json(arguments).encode()  # JSON can escape lone surrogates, UTF-8 cannot encode them
                # As the model wrote them: a call that is cut off has a beginning of the same text.
                as_written = _read_call(written, {name})
                given = as_written[1] if as_written else _json(arguments)
                index = self.count + len(out) // 2
                out += [CallPart(index, "", call_id(), name), CallPart(index, given)]
        except (ValueError, TypeError, KeyError, RecursionError):
            return []
        if self._most is not None:
            out = out[: 2 * (self._most - self.count)]
        self.count += len(out) // 2
        return out

    def _parse_cut(self, written: str) -> list[CallPart] | None:
        """The parts of the calls that end with the text; None if they are not calls."""
        out: list[CallPart] = []
        rest = written.lstrip()
        if is_list := rest.startswith("["):
            rest = rest[1:].lstrip()
        while True:
            call = _read_call(rest, self._names)
            if call is None:
                return out or None
            name, arguments, rest = call
            if name and arguments and not self.done:
                out += [CallPart(self.count, "", call_id(), name), CallPart(self.count, arguments)]
                self.count += 1
            rest = rest.lstrip(" \n},") if is_list else ""
            if not rest:
                return out


class ForcedToolCallParser:
    """Parses calls under a grammar: their format is known, so arguments are streamed while they are generated."""

    done = False  # the grammar ends the answer
    at = 0  # there is no text outside calls

    def __init__(self) -> None:
        self._pending = ""
        self._arguments: JsonObject | None = None  # those that are being written
        self.count = 0

    def push(self, text: str, *, last: bool = False, cut: bool = False) -> list[TextSpan | CallPart]:
        """Add text; returns the parts that are now final. Characters of arguments are final at once."""
        out: list[TextSpan | CallPart] = []
        self._pending += text
        while self._pending:
            if self._arguments is None:
                if not (head := FORCED.match(self._pending)):
                    break
                out.append(CallPart(self.count, "", call_id(), head.group(1)))
                self._arguments, self.count = JsonObject(), self.count + 1
                self._pending = self._pending[head.end() :]
            length = self._arguments.take(self._pending)
            if length:
                out.append(CallPart(self.count - 1, self._pending[:length]))
            self._pending = self._pending[length:]
            if self._arguments.closed:
                self._arguments = None
        return out


CallParser = ToolCallParser | ForcedToolCallParser


def call_id() -> str:
    return f"call_{secrets.token_hex(12)}"


def _read_call(text: str, names: Collection[str]) -> tuple[str, str, str] | None:
    """Parse a call that may be cut off anywhere: its name, the beginning of its arguments, and the text after them,
    each as far as it exists. None if `text` does not begin like a call of one of these functions."""
    name, at = "", 0
    for part in ("{", '"name"', ":", "", ",", '"arguments"', ":"):
        at += len(text[at:]) - len(text[at:].lstrip())
        if not part:
            end = text.find('"', at + 1)
            name = text[at + 1 : end if end > 0 else len(text)]
            known = name in names if end > 0 else any(each.startswith(name) for each in names)
            if not (text[at:] == "" or text[at] == '"') or not known:
                return None
            at = end + 1 if end > 0 else len(text)
        elif text.startswith(part, at):
            at += len(part)
        elif part.startswith(text[at:]):
            return name, "", ""
        else:
            return None
    arguments = text[at:].lstrip()
    if arguments and not arguments.startswith("{"):
        return None
    length = JsonObject().take(arguments)
    return name, arguments[:length], arguments[length:]


def _final(text: str) -> str:
    """The text without a part at its end that may belong to a call: white space and the beginning of the mark."""
    return text[: len(text) - _overlap(text, CALL_BEGIN)].rstrip()


def _overlap(text: str, mark: str) -> int:
    """Number of characters at the end of `text` that are the beginning of `mark`."""
    return next((n for n in range(min(len(mark) - 1, len(text)), 0, -1) if text.endswith(mark[:n])), 0)


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False)
