"""Structured output: JSON Schemas and tool calls as grammars over token ids, by llguidance.

`Grammars.make` compiles a schema. It takes milliseconds, or a second for the largest that the limits allow, so it must
not run on an event loop. Masks are computed when they are needed. Knows tokens and schemas. Knows nothing of HTTP or
models.
"""

from __future__ import annotations

import re
import threading
from collections import OrderedDict
from collections.abc import Collection, Mapping
from typing import Any

import orjson
import torch
from llguidance import LLMatcher, LLParserLimits, LLTokenizer
from tokenizers import Tokenizer

Schema = Mapping[str, Any]
ANY_OBJECT: Schema = {"type": "object"}
# Hermes' format of a call, on which Qwen, SmolLM and many others are trained.
CALL_BEGIN, CALL_END = "<tool_call>", "</tool_call>"

# The cost of a schema can grow exponentially, because alternatives multiply. These limits bound a mask to about 20 ms
# and a compilation to about one second; beyond them both raise. llguidance's defaults allow twenty times as much.
LIMITS = LLParserLimits(
    max_items_in_row=500,
    step_max_items=5_000,
    max_lexer_states=20_000,
    max_grammar_size=100_000,
    verbose_errors=False,
)
MOST_SCHEMA_BYTES = 64 * 1024
MOST_CALLS = 8  # calls in an answer that must call, because a small model would never stop
MOST_CACHED = 64
HANGUL = re.compile("[\uac00-\ud7a3]")


class GrammarError(Exception):
    """This schema cannot be enforced. The message is llguidance's."""


class TokenGrammar:
    """The state of one request in a grammar; the engine calls it."""

    def __init__(self, matcher: LLMatcher) -> None:
        self._matcher = matcher
        self.fault: str | None = None

    def fill(self, row: torch.Tensor) -> bool:
        """Write the mask of allowed next ids. Raises GrammarError if the step exceeds the limits."""
        mask = self._matcher.compute_bitmask()
        self._check()
        words = torch.frombuffer(bytearray(mask), dtype=torch.int32)
        row[: len(words)] = words[: len(row)]
        row[len(words) :] = 0
        return True

    def accept(self, token: int) -> None:
        """Raises GrammarError for a token that `fill` did not allow."""
        self._matcher.consume_token(token)
        self._check()

    def again(self) -> TokenGrammar:
        """A copy for another choice; only before the first token."""
        return TokenGrammar(self._matcher.deep_copy())

    def _check(self) -> None:
        if self._matcher.is_error():
            self.fault = _reason(self._matcher.get_error())
            raise GrammarError(self.fault)


class Grammars:
    """The grammars of one model. stop_ids: the tokens that may end an answer once its grammar is complete.

    The first use takes a third of a second. It is not done at the start, because most models never get a schema.
    """

    def __init__(self, tokenizer: Tokenizer, stop_ids: Collection[int]) -> None:
        self._tokenizer, self._stop_ids = tokenizer, sorted(stop_ids)
        self._known: LLTokenizer | None = None
        self._cached: OrderedDict[str, LLMatcher] = OrderedDict()
        self._lock = threading.Lock()

    def make(self, source: str) -> TokenGrammar:
        """A grammar from `answer_source`. Raises GrammarError. Safe in any thread."""
        if not self._stop_ids:
            raise GrammarError("this model has no token that ends an answer")
        with self._lock:
            cached = self._cached.get(source)
            if cached is not None:
                self._cached.move_to_end(source)
                return TokenGrammar(cached.deep_copy())
            if self._known is None:
                self._known = LLTokenizer(self._tokenizer.to_str(), eos_token=self._stop_ids)
        matcher = LLMatcher(self._known, source, log_level=0, limits=LIMITS)
        if not matcher.is_error():
            # The first mask costs most, so it is computed here, where it may exceed the limits, and not in a step.
            matcher.compute_bitmask()
        if matcher.is_error():
            raise GrammarError(_reason(matcher.get_error()))
        with self._lock:
            self._cached[source] = matcher
            while len(self._cached) > MOST_CACHED:
                self._cached.popitem(last=False)
            return TokenGrammar(matcher.deep_copy())


def answer_source(
    schema: Schema | None,
    functions: Mapping[str, Schema] | None = None,
    *,
    must_call: bool = False,
    several: bool = True,
) -> str:
    """The grammar of an answer, as llguidance's Lark. Raises GrammarError for schemas too large or too deep.

    schema: of the answer, None: any text. functions: the schemas of the arguments of functions that it may call
    instead; in free text calls may occur anywhere. must_call: the answer consists of calls alone.
    """
    calls = [
        f"{_string(beginning(name)[len(CALL_BEGIN) :])} {_json(arguments)} {_string(ending())}"
        for name, arguments in (functions or {}).items()
    ]
    lines = ["%llguidance {}"]
    if calls:
        lines.append(f"body: {' | '.join(calls)}")
        lines.append(f"call: {_string(CALL_BEGIN)} body")
        more = f' ("\\n" call){{0,{MOST_CALLS - 1}}}' if several else ""
    if must_call:
        lines.append(f"start: call{more}")
    elif schema is not None:
        lines.append(f"start: {_json(schema)}" + (f" | call{more}" if calls else ""))
    else:
        lines += ["start: said* TEXT", "said: begin body", f"begin[lazy]: TEXT {_string(CALL_BEGIN)}"]
        lines += [r"TEXT: /(.|\n)*/"]
    source = "\n".join(lines)
    if len(source) > MOST_SCHEMA_BYTES:
        raise GrammarError(f"it is larger than {MOST_SCHEMA_BYTES} bytes")
    return source


def span_source(text: str) -> str:
    """The grammar of a line that consists of a space and whole words of `text`, as llguidance's Lark.

    In Korean text, parts of words are allowed too, because particles are written together with the word before them.
    """
    unit = "substring_chars" if HANGUL.search(text) else "substring_words"
    part = orjson.dumps({unit: text}).decode()
    return f'%llguidance {{}}\nstart: SPAN END\nSPAN: / / PART\nPART: %regex {part}\nEND: "\\n"'


def beginning(name: str) -> str:
    """A forced call up to its arguments; `ending` follows them."""
    return f'{CALL_BEGIN}\n{{"name":"{name}","arguments":'


def ending() -> str:
    return f"}}\n{CALL_END}"


def _json(schema: Schema) -> str:
    # Without white space between tokens: a small model often writes nothing else if it is allowed.
    options = {"whitespace_flexible": False, "lenient": False, "coerce_one_of": False}
    try:
        return "%json " + orjson.dumps({**schema, "x-guidance": options}).decode()
    except TypeError:  # orjson's limit is 254 levels
        raise GrammarError("it is nested too deeply") from None


def _string(text: str) -> str:
    return orjson.dumps(text).decode()


def _reason(error: str) -> str:
    """llguidance's message without the grammar's source, which the caller does not know."""
    first = error.replace("<non-verbose/>", "").strip().partition("\n   1 |")[0]
    return first.rpartition("failed to compile JSON schema: ")[2].strip() or "it is too complex"
