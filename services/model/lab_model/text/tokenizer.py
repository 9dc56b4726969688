"""Text to token ids and back: chat templates, prompts, names of tokens.

Knows one tokenizer and its chat template. Knows nothing of models, batching or HTTP.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any

import jinja2
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from ..errors import CatalogueError
from .decoding import ByteDecoding, Decoding, PieceDecoding

# A token of one byte, as SentencePiece writes it.
BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class TemplateError(Exception):
    """The model's chat template refuses these messages. The message is the template's own."""


class ModelTokenizer:
    """One model's tokenizer and chat template.

    names: the special tokens by the names that templates use (`bos_token`, `eos_token` and so on).
    """

    def __init__(
        self, tokenizer: Tokenizer, template: str | None = None, names: Mapping[str, str] | None = None
    ) -> None:
        # A file may request truncation and padding, but no request may be truncated silently.
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self.tokenizer, self.template = tokenizer, template
        self._names = {name: token for name, token in (names or {}).items() if isinstance(token, str)}
        self.vocab_size: int = tokenizer.get_vocab_size(with_added_tokens=True)
        added = tokenizer.get_added_tokens_decoder()
        self._special = {id_: token.content for id_, token in added.items() if token.special}
        longest_first = sorted(self._special.values(), key=len, reverse=True)
        self._special_names = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
        # Part of the placeholder for a special token that a user has written; random, so that it cannot be guessed.
        self._mark = secrets.token_hex(8)
        self._bytes: dict[int, bytes] = {}
        self.byte_level = isinstance(tokenizer.decoder, decoders.ByteLevel)

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> ModelTokenizer:
        """From a tokenizer of transformers. Raises CatalogueError if it is not backed by the tokenizers library."""
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if not isinstance(backend, Tokenizer):
            raise CatalogueError(f"its tokenizer, {type(tokenizer).__name__}, is not of the tokenizers library")
        template = getattr(tokenizer, "chat_template", None)
        return cls(backend, template if isinstance(template, str) else None, tokenizer.special_tokens_map)

    # Text to ids

    @property
    def takes_tools(self) -> bool:
        """Whether the template writes tool calls in Hermes' format, which `tool_calls` parses."""
        template = self.template or ""
        return "tools" in template and "<tool_call>" in template and "<function=" not in template

    def chat(self, messages: Sequence[dict[str, Any]], tools: Sequence[dict[str, Any]] = ()) -> list[int]:
        """Token ids of a conversation and of the beginning of the answer. Raises TemplateError.

        Only the template writes special tokens; in a message their names are plain text.
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
            variables: dict[str, Any] = {
                "tools": plain(list(tools)) or None,
                "chat_template": self.template,
                **self._names,
            }
            # Annotated as str; it returns the rendered texts and the spans generated in them.
            result: Any = render_jinja_template([plain(list(messages))], add_generation_prompt=True, **variables)
            rendered: str = result[0][0]
        except (jinja2.TemplateError, TypeError, ValueError, RecursionError) as error:
            raise TemplateError(self._unmark(str(error))) from None
        if not marked:
            return self.encode(rendered, special=False)
        tokenizer, stand_ins = self._unspecial
        ids = tokenizer.encode(rendered, add_special_tokens=False).ids
        return [part for id_ in ids for part in stand_ins.get(id_, (id_,))]

    def encode(self, prompt: str, *, special: bool = True) -> list[int]:
        """Token ids of a text. special: add the tokens that the model expects at its beginning or end."""
        ids: list[int] = self.tokenizer.encode(prompt, add_special_tokens=special).ids
        return ids

    def offsets(self, text: str, *, special: bool = True) -> list[tuple[int, int]]:
        """Begin and end of each token of `encode` in the text, in characters."""
        found: list[tuple[int, int]] = self.tokenizer.encode(text, add_special_tokens=special).offsets
        return found

    def special(self, token: int) -> str | None:
        """The name of a special token; None for all others."""
        return self._special.get(token)

    def complete(self, ids: list[int]) -> list[int]:
        """Token ids of a text with the special tokens that `encode` adds, if they are not there."""
        first, last = self._ends
        whole = tuple(ids[: len(first)]) == first and (not last or tuple(ids[-len(last) :]) == last)
        return ids if whole else [*first, *ids, *last]

    @cached_property
    def _ends(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The special tokens that `encode` adds before and after a text."""
        plain, whole = self.encode("a", special=False), self.encode("a")
        at = next((i for i in range(len(whole)) if whole[i : i + len(plain)] == plain), 0)
        return tuple(whole[:at]), tuple(whole[at + len(plain) :])

    def _stand_in(self, name: str) -> str:
        return f"<{self._mark}:{list(self._special.values()).index(name)}>"

    def _unmark(self, text: str) -> str:
        for name in self._special.values():
            text = text.replace(self._stand_in(name), name)
        return text

    @cached_property
    def _unspecial(self) -> tuple[Tokenizer, dict[int, list[int]]]:
        """A tokenizer with a placeholder for each special token, and the ids of their names as plain text."""
        tokenizer = Tokenizer.from_str(self.tokenizer.to_str())
        tokenizer.add_tokens(
            [AddedToken(self._stand_in(name), normalized=False, special=False) for name in self._special.values()]
        )
        plain = {}
        for id_, name in self._special.items():
            # After a placeholder, because SentencePiece may put a space before the first word of a text.
            stand_in = self._stand_in(name)
            tokenizer.encode_special_tokens = True
            found: list[int] = tokenizer.encode(stand_in + name, add_special_tokens=False).ids
            first, ids = found[0], found[1:]
            if id_ in ids:  # the vocabulary contains the name as a word
                ids = tokenizer.encode(stand_in + name[0] + stand_in + name[1:], add_special_tokens=False).ids
                ids = [id_ for id_ in ids if id_ != first]
            plain[first] = ids
        tokenizer.encode_special_tokens = False
        return tokenizer, plain

    # Ids to text

    def decode(self, ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True))

    def decoding(self) -> Decoding:
        """A new incremental decoder. Its joined output equals `decode` of all its tokens."""
        return ByteDecoding(self.bytes_of) if self.byte_level else PieceDecoding(self.decode)

    def bytes_of(self, token: int) -> bytes:
        """The bytes that this token adds to a text; none for special tokens."""
        found = self._bytes.get(token)
        if found is None:
            found = self._bytes[token] = self._find_bytes(token)
        return found

    def name(self, token: int) -> tuple[str, list[int] | None]:
        """A token's name in `logprobs`, and its bytes; None for a special token."""
        if special := self._special.get(token):
            return special, None
        found = self.bytes_of(token)
        try:
            return found.decode(), list(found)
        except UnicodeDecodeError:
            # OpenAI's form for tokens that are not UTF-8 on their own; it is unique, unlike U+FFFD.
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in found), list(found)

    def _find_bytes(self, token: int) -> bytes:
        piece = self.tokenizer.id_to_token(token)
        if piece is None or token in self._special:
            return b""
        if self.byte_level:
            try:
                return bytes(BYTE_OF[character] for character in piece)
            except KeyError:  # an added token, which the decoder copies unchanged
                return piece.encode()
        if found := BYTE.fullmatch(piece):
            return bytes([int(found.group(1), 16)])
        return piece.replace("▁", " ").encode()

    @property
    def separator(self) -> str | None:
        """The special token between two texts of one input; None if the tokenizer has none."""
        return self._names.get("sep_token")

    def stop_ids(self, configured: Iterable[int] = ()) -> frozenset[int]:
        """Tokens that end an answer: the tokenizer's end of sequence and those that the model's files name."""
        own = self.tokenizer.token_to_id(self._names["eos_token"]) if "eos_token" in self._names else None
        return frozenset(configured if own is None else [*configured, own])


def _byte_of() -> dict[str, int]:
    """GPT-2's alphabet: printable bytes stand for themselves, the others are U+0100 onwards, in order."""
    shown = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = [byte for byte in range(256) if byte not in shown]
    return {chr(byte): byte for byte in shown} | {chr(256 + i): byte for i, byte in enumerate(hidden)}


BYTE_OF = _byte_of()
assert BYTE_OF.keys() == set(pre_tokenizers.ByteLevel.alphabet())  # noqa: S101  (once, at import)
