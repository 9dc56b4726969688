"""Between text and token ids: chat templates, prompts, incremental decoding, stop strings.

Knows a tokenizer; knows nothing of models, batching or HTTP.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jinja2
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from .catalogue import Source

# Two bytes of an unfinished UTF-8 character decode to this; text that ends in it may still change.
UNFINISHED = "\N{REPLACEMENT CHARACTER}"


class TemplateError(Exception):
    """The model's chat template does not take these messages. The message is the template's own."""


class Text:
    """One model's tokenizer."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self.vocab_size = len(tokenizer)

    @classmethod
    def load(cls, source: Source) -> Text:
        """Raises what transformers raises: OSError for missing files."""
        return cls(AutoTokenizer.from_pretrained(source.folder, **source.arguments()))

    @property
    def template(self) -> str | None:
        """The chat template, None for a base model."""
        found = self._tokenizer.chat_template
        return found if isinstance(found, str) else None

    def chat(self, messages: Sequence[dict[str, str]]) -> list[int]:
        """Token ids of a conversation with the answer's beginning. Raises TemplateError."""
        try:
            rendered = self._tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, tokenize=False)
        except (jinja2.TemplateError, TypeError, ValueError) as error:
            raise TemplateError(str(error)) from None
        return self.encode(str(rendered), special=False)

    def encode(self, prompt: str, *, special: bool = True) -> list[int]:
        """Token ids of a text, with the model's own beginning or end tokens where `special`."""
        ids: list[int] = self._tokenizer(prompt, add_special_tokens=special)["input_ids"]
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def stop_ids(self, model_config: Any) -> frozenset[int]:
        """Tokens that end an answer: the tokenizer's and the configuration's end of sequence."""
        configured = getattr(model_config, "eos_token_id", None)
        found = configured if isinstance(configured, list) else [configured]
        return frozenset(token for token in [*found, self._tokenizer.eos_token_id] if token is not None)


class Growing:
    """The text of an answer while its tokens arrive, cut at the first stop string.

    `push` returns only text that later tokens cannot change or turn into a stop string; `rest` what is left at the end.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], stop: Sequence[str] = ()) -> None:
        self._decode = decode
        self._stop = tuple(stop)
        self._longest = max(map(len, self._stop), default=0)
        self._ids: list[int] = []
        # Decoded from `_start`, so that a token which depends on the one before it (spaces, bytes) comes out right;
        # text up to `_read` is out already.
        self._start = self._read = 0
        self._held = ""  # decoded, but perhaps the beginning of a stop string
        self.stopped = False

    def push(self, ids: Sequence[int]) -> str:
        """Text that is certain after these tokens; sets `stopped` at a stop string, of which nothing is returned."""
        self._ids.extend(ids)
        before = self._decode(self._ids[self._start : self._read])
        now = self._decode(self._ids[self._start :])
        if len(now) <= len(before) or now.endswith(UNFINISHED):
            return ""
        self._start, self._read = self._read, len(self._ids)
        return self._cut(now[len(before) :])

    def rest(self) -> str:
        """What was held back, at the end of the answer: bytes that never became a character are U+FFFD."""
        if self.stopped:
            return ""
        before = self._decode(self._ids[self._start : self._read])
        tail = self._cut(self._decode(self._ids[self._start :])[len(before) :])
        self._start = self._read = len(self._ids)
        held, self._held = self._held, ""
        return tail if self.stopped else tail + held

    def _cut(self, fresh: str) -> str:
        if not self._stop or self.stopped:
            return "" if self.stopped else fresh
        text = self._held + fresh
        found = [at for at in (text.find(stop) for stop in self._stop) if at >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        keep = next(
            (n for n in range(min(self._longest - 1, len(text)), 0, -1) if text.endswith(self._beginnings(n))), 0
        )
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def _beginnings(self, length: int) -> tuple[str, ...]:
        return tuple(stop[:length] for stop in self._stop if len(stop) > length)
