"""Loads an encoder, of kind embedding: its embedder and tokenizer, and the API over them.

Knows transformers' encoders. Knows nothing of causal models.
"""

from __future__ import annotations

import torch
from transformers import AutoModel

from ..api.app import create_app
from ..api.embeddings import EncoderClient
from ..encoders.embedder import Embedder
from ..encoders.probe import SentimentProbe
from ..encoders.queue import EncoderQueue
from .catalogue import AppArgs
from .kinds import KINDS, Loaded
from .memory import pick_dtype
from .sources import Source, revision
from .tokenizers import read_tokenizer


def load(args: AppArgs, source: Source, device: torch.device) -> Loaded:
    """Raises OSError or CatalogueError."""
    entry, spec = args.entry, KINDS[args.entry.kind]
    dtype = pick_dtype(entry.dtype)
    tokenizer = read_tokenizer(source)
    model = AutoModel.from_pretrained(source.folder, dtype=dtype, **source.arguments()).to(device).eval()
    stamp = revision(entry, source, str(dtype), tokenizer.template or "", folder=args.folder)
    embedder = Embedder(model, entry.context or spec.context)
    probe = SentimentProbe.load()
    (vector,) = embedder.forward([tokenizer.encode(probe.check_text)])  # a model that cannot run fails here
    queue = EncoderQueue(embedder, args.max_queued)
    client = EncoderClient(entry.id, stamp, tokenizer, queue, probe=probe if probe.fits(vector) else None)
    app = create_app(client, spec.paths, max_body_bytes=args.max_body_bytes, hosts=args.allowed_hosts)
    size = sum(parameter.nbytes for parameter in model.parameters())
    info = {"revision": stamp, "weights": str(dtype).removeprefix("torch."), "weights_bytes": size}
    return Loaded(app, info | {"context": embedder.context, "dimensions": embedder.dimensions}, lambda: True)
