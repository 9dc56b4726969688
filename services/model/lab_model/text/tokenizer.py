"""Between text and token ids: chat templates, prompts, incremental decoding, stop strings.

Knows a tokenizer; knows nothing of models, batching or HTTP.
"""

from __future__ import annotations

import codecs
import re
import secrets
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any

import jinja2
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from ..errors import CatalogueError
from ..models.catalogue import Source

# Two bytes of an unfinished UTF-8 character decode to this; text that ends in it may still change.
UNFINISHED = "\N{REPLACEMENT CHARACTER}"
# A token of one byte, as SentencePiece writes it.
BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class TemplateError(Exception):
    """The model's chat template does not take these messages. The message is the template's own."""


class Text:
    """One model's tokenizer and chat template, wherever they come from.

    `names`: the special tokens by the names that templates use (`bos_token`, `eos_token` and so on).
    """

    def __init__(
        self, tokenizer: Tokenizer, template: str | None = None, names: Mapping[str, str] | None = None
    ) -> None:
        # A file may say that texts are cut and filled up to one length: no request shall be cut in silence.
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self.tokenizer, self.template = tokenizer, template
        self._names = {name: token for name, token in (names or {}).items() if isinstance(token, str)}
        self.vocab_size: int = tokenizer.get_vocab_size(with_added_tokens=True)
        added = tokenizer.get_added_tokens_decoder()
        self._special = {id_: token.content for id_, token in added.items() if token.special}
        longest_first = sorted(self._special.values(), key=len, reverse=True)
        self._special_names = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
        # What a special token that a user has written is called in the template: nobody can guess it.
        self._mark = secrets.token_hex(8)
        self._bytes: dict[int, bytes] = {}
        self._byte_level = isinstance(tokenizer.decoder, decoders.ByteLevel)

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> Text:
        """The text of a transformers tokenizer. Raises CatalogueError for one without the Rust library's tokenizer."""
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if not isinstance(backend, Tokenizer):
            raise CatalogueError(f"its tokenizer, {type(tokenizer).__name__}, is not one of the tokenizers library")
        template = getattr(tokenizer, "chat_template", None)
        return cls(backend, template if isinstance(template, str) else None, tokenizer.special_tokens_map)

    @classmethod
    def load(cls, source: Source) -> Text:
        """Raises what transformers raises: OSError for missing files."""
        return cls.of(AutoTokenizer.from_pretrained(source.folder, **source.arguments()))

    # Text to ids

    @property
    def takes_tools(self) -> bool:
        """Whether the template writes tool calls as Hermes does, which is the form that `tools.py` reads."""
        template = self.template or ""
        return "tools" in template and "<tool_call>" in template and "<function=" not in template

    def chat(self, messages: Sequence[dict[str, Any]], tools: Sequence[dict[str, Any]] = ()) -> list[int]:
        """Token ids of a conversation with the answer's beginning. Raises TemplateError.

        Special tokens are those that the template writes; one that stands in a message is text like any other.
        """
        marked = False

        def mark(found: re.Match[str]) -> str:
            nonlocal marked
            marked = True
            return self._stand_in(found.group())

        def plain(value: Any) -> Any:
            if isinstance(value, str):
                return self._special_names.sub(mark, value)
            if isinstance(value, dict):
                return {plain(name): plain(part) for name, part in value.items()}
            return [plain(part) for part in value] if isinstance(value, list) else value

        try:
            said: dict[str, Any] = {"tools": plain(list(tools)) or None, "chat_template": self.template, **self._names}
            # Its annotation says str; it returns a list of texts and what is generated in them.
            made: Any = render_jinja_template([plain(list(messages))], add_generation_prompt=True, **said)
            rendered: str = made[0][0]
        except (jinja2.TemplateError, TypeError, ValueError, RecursionError) as error:
            raise TemplateError(self._unmark(str(error))) from None
        if not marked:
            return self.encode(rendered, special=False)
        tokenizer, stand_ins = self._unspecial
        ids = tokenizer.encode(rendered, add_special_tokens=False).ids
        return [part for id_ in ids for part in stand_ins.get(id_, (id_,))]

    def encode(self, prompt: str, *, special: bool = True) -> list[int]:
        """Token ids of a text, with the model's own beginning or end tokens where `special`."""
        ids: list[int] = self.tokenizer.encode(prompt, add_special_tokens=special).ids
        return ids

    def _stand_in(self, name: str) -> str:
        return f"<{self._mark}:{list(self._special.values()).index(name)}>"

    def _unmark(self, text: str) -> str:
        for name in self._special.values():
            text = text.replace(self._stand_in(name), name)
        return text

    @cached_property
    def _unspecial(self) -> tuple[Tokenizer, dict[int, list[int]]]:
        """A tokenizer that also knows a stand-in for each special token, and the ids of their names as plain text."""
        tokenizer = Tokenizer.from_str(self.tokenizer.to_str())
        tokenizer.add_tokens(
            [AddedToken(self._stand_in(name), normalized=False, special=False) for name in self._special.values()]
        )
        plain = {}
        for id_, name in self._special.items():
            # The stand-in before it: what begins a text may be given a space (SentencePiece).
            stand_in = self._stand_in(name)
            tokenizer.encode_special_tokens = True
            found: list[int] = tokenizer.encode(stand_in + name, add_special_tokens=False).ids
            first, ids = found[0], found[1:]
            if id_ in ids:  # a vocabulary that holds the name as a word
                ids = tokenizer.encode(stand_in + name[0] + stand_in + name[1:], add_special_tokens=False).ids
                ids = [id_ for id_ in ids if id_ != first]
            plain[first] = ids
        tokenizer.encode_special_tokens = False
        return tokenizer, plain

    # Ids to text

    def decode(self, ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True))

    def decoding(self) -> Decoding:
        """A new incremental decoder: what it returns adds up to `decode` of all its tokens."""
        return ByteDecoding(self.bytes_of) if self._byte_level else PieceDecoding(self.decode)

    def bytes_of(self, token: int) -> bytes:
        """What this token adds to a text; nothing for special tokens."""
        found = self._bytes.get(token)
        if found is None:
            found = self._bytes[token] = self._find_bytes(token)
        return found

    def name(self, token: int) -> tuple[str, list[int] | None]:
        """How `logprobs` shows a token, and its bytes; those of a special token are None."""
        if special := self._special.get(token):
            return special, None
        found = self.bytes_of(token)
        try:
            return found.decode(), list(found)
        except UnicodeDecodeError:
            # OpenAI's way of showing what is no text of its own; unique, where U+FFFD would not be.
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in found), list(found)

    def _find_bytes(self, token: int) -> bytes:
        piece = self.tokenizer.id_to_token(token)
        if piece is None or token in self._special:
            return b""
        if self._byte_level:
            try:
                return bytes(BYTE_OF[character] for character in piece)
            except KeyError:  # an added token: the decoder, too, takes it as it is written
                return piece.encode()
        if found := BYTE.fullmatch(piece):
            return bytes([int(found.group(1), 16)])
        return piece.replace("▁", " ").encode()

    def stop_ids(self, configured: int | Sequence[int] | None = None) -> frozenset[int]:
        """Tokens that end an answer: the tokenizer's end of sequence and what the model's configuration names."""
        found = [configured] if isinstance(configured, int) else list(configured or ())
        own = self.tokenizer.token_to_id(self._names["eos_token"]) if "eos_token" in self._names else None
        return frozenset(found if own is None else [*found, own])


def _byte_of() -> dict[str, int]:
    """GPT-2's alphabet: printable bytes are themselves, the others follow from U+0100 on, in order."""
    shown = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = [byte for byte in range(256) if byte not in shown]
    return {chr(byte): byte for byte in shown} | {chr(256 + i): byte for i, byte in enumerate(hidden)}


BYTE_OF = _byte_of()
assert BYTE_OF.keys() == set(pre_tokenizers.ByteLevel.alphabet())  # noqa: S101  (once, at import)


class ByteDecoding:
    """Tokens are bytes: each is looked up once, and only unfinished characters wait."""

    def __init__(self, bytes_of: Callable[[int], bytes]) -> None:
        self._bytes_of = bytes_of
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, ids: Sequence[int]) -> str:
        """The text that is certain after these tokens."""
        return self._utf8.decode(b"".join([self._bytes_of(token) for token in ids]))

    def rest(self) -> str:
        """What waits at the end: bytes that never became a character are U+FFFD."""
        return self._utf8.decode(b"", final=True)


class PieceDecoding:
    """For every other tokenizer: decode the last tokens again with the new ones, and return the difference."""

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        self._decode = decode
        self._ids: list[int] = []
        # Decoded from `_start`, so that a token which depends on the one before it (spaces, bytes) comes out right;
        # text up to `_read` is out already.
        self._start = self._read = 0
        self._before = ""

    def push(self, ids: Sequence[int]) -> str:
        self._ids.extend(ids)
        now = self._decode(self._ids[self._start :])
        if len(now) <= len(self._before) or now.endswith(UNFINISHED):
            return ""
        fresh = now[len(self._before) :]
        self._start, self._read = self._read, len(self._ids)
        self._before = self._decode(self._ids[self._start : self._read])
        return fresh

    def rest(self) -> str:
        fresh = self._decode(self._ids[self._start :])[len(self._before) :]
        self._start = self._read = len(self._ids)
        self._before = ""
        return fresh


Decoding = ByteDecoding | PieceDecoding


class Growing:
    """The text of an answer while its tokens arrive, cut at the first stop string.

    `push` returns only text that later tokens cannot change or turn into a stop string; `rest` what is left at the end.
    `starts`, where it is kept: the place in the text, in characters, at which each token begins; `length`: how much of
    the text is out.
    """

    def __init__(self, decoding: Decoding, stop: Sequence[str] = (), *, aligned: bool = False) -> None:
        self._decoding = decoding
        self._stop = tuple(stop)
        longest = max(map(len, self._stop), default=0)
        # By length: what text may end in that a stop string begins with, the longest first.
        self._beginnings = [
            (length, tuple({stop[:length] for stop in self._stop if len(stop) > length}))
            for length in range(longest - 1, 0, -1)
        ]
        self._held = ""  # decoded, but perhaps the beginning of a stop string
        self.stopped = False
        self.starts: list[int] | None = [] if aligned else None
        self.length = 0

    def push(self, ids: Sequence[int]) -> str:
        """Text that is certain after these tokens; sets `stopped` at a stop string, of which nothing is returned."""
        if self.starts is None:
            return self._cut(self._decoding.push(ids))
        decoded = self.length + len(self._held)
        text = ""
        for token in ids:
            self.starts.append(decoded + len(text))
            text += self._decoding.push([token])
        return self._cut(text)

    def rest(self) -> str:
        """What was held back, at the end of the answer: bytes that never became a character are U+FFFD."""
        if self.stopped:
            return ""
        tail = self._cut(self._decoding.rest())
        held, self._held = self._held, ""  # nothing, when that was a stop string
        self.length += len(held)
        return tail + held

    def _cut(self, fresh: str) -> str:
        if self.stopped:
            return ""
        if self._stop:
            fresh = self._held + fresh
            found = [at for at in (fresh.find(stop) for stop in self._stop) if at >= 0]
            if found:
                self.stopped, self._held = True, ""
                fresh = fresh[: min(found)]
            else:
                keep = next((n for n, heads in self._beginnings if n <= len(fresh) and fresh.endswith(heads)), 0)
                self._held = fresh[len(fresh) - keep :]
                fresh = fresh[: len(fresh) - keep]
        self.length += len(fresh)
        return fresh
