"""The tokenizer of a source: read from its GGUF file, or by transformers.

Knows where a tokenizer lies. Knows nothing of what is done with it.
"""

from __future__ import annotations

from transformers import AutoTokenizer

from ..text.gguf_tokenizer import build_tokenizer
from ..text.tokenizer import ModelTokenizer
from ..weights.gguf import GGUFFile
from ..weights.headers import GGUFError
from .sources import Source


def read_tokenizer(source: Source) -> ModelTokenizer:
    """By transformers. Raises what it raises, such as OSError for missing files, or CatalogueError."""
    return ModelTokenizer.of(AutoTokenizer.from_pretrained(source.folder, **source.arguments()))


def read_gguf_tokenizer(file: GGUFFile) -> ModelTokenizer | None:
    """Tokenizer and chat template of a GGUF file; None for kinds that only transformers reads. Raises GGUFError.

    transformers takes 15 s for the embedded model, most of them in Python over 98,000 strings; this takes a fraction of
    a second.
    """
    metadata = file.metadata
    try:
        tokenizer = build_tokenizer(metadata)
    except Exception as error:  # tokenizers raises nothing more specific
        raise GGUFError(f"{file.path}: its tokenizer is damaged: {error}") from None
    if tokenizer is None:
        return None
    tokens = metadata["tokenizer.ggml.tokens"]
    ids = {name: metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("bos", "eos")}
    names = {f"{name}_token": tokens[token] for name, token in ids.items() if token is not None}
    return ModelTokenizer(tokenizer, metadata.get("tokenizer.chat_template"), names)
