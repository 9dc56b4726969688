"""Loads the encoders that answer tasks, of kind classifier and reader, and the API over them.

Knows transformers' classes. Knows nothing of embeddings or causal models.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoModelForQuestionAnswering, AutoModelForSequenceClassification

from ..api.app import create_app
from ..api.embeddings import EncoderClient
from ..encoders.classifier import Classifier
from ..encoders.queue import Encoder, EncoderQueue
from ..encoders.reader import Reader
from ..errors import CatalogueError
from .catalogue import AppArgs
from .kinds import KINDS, Loaded
from .memory import pick_dtype
from .sources import Source, revision
from .tokenizers import read_tokenizer


def load(args: AppArgs, source: Source, device: torch.device) -> Loaded:
    """Raises OSError or CatalogueError, also for weights without the head that the kind needs."""
    entry, spec = args.entry, KINDS[args.entry.kind]
    dtype = pick_dtype(entry.dtype)
    tokenizer = read_tokenizer(source)
    of: Any = AutoModelForSequenceClassification if entry.kind == "classifier" else AutoModelForQuestionAnswering
    model, report = of.from_pretrained(source.folder, dtype=dtype, output_loading_info=True, **source.arguments())
    if missing := sorted(report["missing_keys"]):
        raise CatalogueError(
            f"{entry.id}: its weights have no head for kind {entry.kind} ({', '.join(missing[:3])} are missing)"
        )
    model = model.to(device).eval()
    context = entry.context or spec.context
    encoder: Encoder
    if entry.kind == "classifier":
        encoder = Classifier(model, context)
    else:
        separator = tokenizer.tokenizer.token_to_id(tokenizer.separator or "")
        if separator is None:
            raise CatalogueError(f"{entry.id}: its tokenizer names no separator between question and text")
        encoder = Reader(model, context, separator)
    encoder.forward([[0]])  # a model that cannot run fails here
    stamp = revision(entry, source, str(dtype), tokenizer.template or "", folder=args.folder)
    queue = EncoderQueue(encoder, args.max_queued, step_timeout=args.step_timeout_seconds)
    client = EncoderClient(entry.id, stamp, tokenizer, queue, kind=entry.kind)
    app = create_app(client, spec.paths, max_body_bytes=args.max_body_bytes, hosts=args.allowed_hosts)
    size = sum(parameter.nbytes for parameter in model.parameters())
    info: dict[str, Any] = {"revision": stamp, "weights": str(dtype).removeprefix("torch."), "weights_bytes": size}
    if isinstance(encoder, Classifier):
        info["labels"] = encoder.labels
    return Loaded(app, info | {"context": encoder.context}, lambda: queue.alive)
