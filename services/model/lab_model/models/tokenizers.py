"""The tokenizer of a source: read from its GGUF file, or by transformers.

Knows the location of a tokenizer. Does not use it.
"""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import os
from pathlib import Path

from tokenizers import Tokenizer
from transformers import AutoTokenizer

from ..text import gguf_tokenizer
from ..text.gguf_tokenizer import build_tokenizer
from ..text.tokenizer import ModelTokenizer
from ..weights.gguf import GGUFFile
from ..weights.headers import GGUFError
from .sources import FileDigests, Source

MANY_TOKENS = 100_000  # from this size on a conversion is stored


def read_tokenizer(source: Source) -> ModelTokenizer:
    """Read a tokenizer with transformers. Raises CatalogueError, and transformers' own exceptions, such as OSError for
    missing files."""
    return ModelTokenizer.of(AutoTokenizer.from_pretrained(source.folder, **source.arguments()))


def read_gguf_tokenizer(file: GGUFFile, folder: Path | None = None) -> ModelTokenizer | None:
    """Tokenizer and chat template of a GGUF file; None for kinds that only transformers reads. Raises GGUFError.

    transformers takes 15 s for the embedded model, most of them in Python over 98,000 strings; this takes a fraction of
    a second. For Gemma's 262,144 pieces it takes 52 s, and this some seconds: of so large a table the result is kept
    in `folder` (MODEL_FOLDER).
    """
    metadata = file.metadata
    kept = _kept(file, folder)
    try:
        tokenizer = Tokenizer.from_file(str(kept)) if kept and kept.exists() else build_tokenizer(metadata)
        if tokenizer is not None and kept and not kept.exists():
            with contextlib.suppress(OSError):
                kept.parent.mkdir(parents=True, exist_ok=True)
                part = kept.with_suffix(f".{os.getpid()}")
                tokenizer.save(str(part), pretty=False)
                part.replace(kept)
    except Exception as error:  # tokenizers raises nothing more specific
        raise GGUFError(f"{file.path}: its tokenizer is damaged: {error}") from None
    if tokenizer is None:
        return None
    tokens = metadata["tokenizer.ggml.tokens"]
    ids = {name: metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("bos", "eos")}
    names = {f"{name}_token": tokens[token] for name, token in ids.items() if token is not None}
    return ModelTokenizer(tokenizer, metadata.get("tokenizer.chat_template"), names)


def _kept(file: GGUFFile, folder: Path | None) -> Path | None:
    """The file of the converted tokenizer, named by the digests of the GGUF file and of the code that converts it."""
    if folder is None or len(file.metadata.get("tokenizer.ggml.tokens", ())) < MANY_TOKENS:
        return None
    digests = FileDigests(folder)
    code = hashlib.sha256(inspect.getsource(gguf_tokenizer).encode() + digests.of(file.path)).hexdigest()
    digests.save()
    return folder / "tokenizers" / f"{code[:32]}.json"
