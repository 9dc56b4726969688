"""OpenAI's tokenizers cl100k_base and o200k_base, from the package bpe-openai, which contains their vocabularies.

For comparison: no model of the lab uses them. Knows token ids and bytes. Knows nothing of models or HTTP.
"""

from __future__ import annotations

import functools
import warnings


class OpenAITokenizer:
    """name: `cl100k_base` (GPT-4, GPT-3.5) or `o200k_base` (GPT-4o and later)."""

    def __init__(self, name: str) -> None:
        with warnings.catch_warnings():
            # It reads its files by importlib.resources.open_binary, deprecated in Python 3.11 and 3.12 only.
            warnings.simplefilter("ignore", DeprecationWarning)
            # Reads vocabularies: 0.6 s and 180 MB, which most replicas never need.
            import bpe_openai  # type: ignore[import-untyped]  # noqa: PLC0415

            self._encoding = bpe_openai.get_encoding(name)
        self.vocab_size: int = self._encoding.n_vocab

    def encode(self, prompt: str, *, special: bool = True) -> list[int]:
        """Token ids. Names of special tokens count as plain text, and no special token is added."""
        ids: list[int] = self._encoding.encode_ordinary(prompt)
        return ids

    def offsets(self, text: str, *, special: bool = True) -> list[tuple[int, int]]:
        raise NotImplementedError("its tokens' bytes are those of the text")

    def bytes_of(self, token: int) -> bytes:
        """The bytes of a token; empty for ids without bytes, because the vocabulary has gaps before its special
        tokens."""
        try:
            found: bytes = self._encoding.decode_single_token_bytes(token)
        except KeyError:
            return b""
        return found

    def special(self, token: int) -> str | None:
        return self.bytes_of(token).decode() if self._encoding.is_special_token(token) else None


@functools.cache
def openai_tokenizer(name: str) -> OpenAITokenizer:
    """The tokenizer of this process. Its first use takes half a second, so call it in a thread."""
    return OpenAITokenizer(name)
