"""Loads an encoder, of kind embedding: its embedder and tokenizer, and the API over them.

Knows transformers' encoders. Knows nothing of causal models.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from transformers import AutoModel

from ..api.app import create_app
from ..api.embeddings import EncoderClient
from ..encoders.embedder import Embedder, Pooling
from ..encoders.probe import SentimentProbe
from ..encoders.queue import EncoderQueue
from ..errors import CatalogueError
from .catalogue import AppArgs
from .kinds import KINDS, Loaded
from .memory import pick_dtype
from .sizes import read_json
from .sources import Source, revision
from .tokenizers import read_tokenizer


def load(args: AppArgs, source: Source, device: torch.device) -> Loaded:
    """Raises OSError or CatalogueError."""
    entry, spec = args.entry, KINDS[args.entry.kind]
    dtype = pick_dtype(entry.dtype)
    tokenizer = read_tokenizer(source)
    model = AutoModel.from_pretrained(source.folder, dtype=dtype, **source.arguments()).to(device).eval()
    stamp = revision(entry, source, str(dtype), tokenizer.template or "", folder=args.folder)
    pooling, normalize = pooling_of(Path(source.folder))
    embedder = Embedder(model, entry.context or spec.context, pooling, normalize=normalize)
    probe = SentimentProbe.load()
    (vector,) = embedder.forward([tokenizer.encode(probe.check_text)])  # a model that cannot run fails here
    queue = EncoderQueue(embedder, args.max_queued, step_timeout=args.step_timeout_seconds)
    client = EncoderClient(entry.id, stamp, tokenizer, queue, probe=probe if probe.fits(vector) else None)
    app = create_app(client, spec.paths, max_body_bytes=args.max_body_bytes, hosts=args.allowed_hosts)
    size = sum(parameter.nbytes for parameter in model.parameters())
    info = {"revision": stamp, "weights": str(dtype).removeprefix("torch."), "weights_bytes": size}
    return Loaded(app, info | {"context": embedder.context, "dimensions": embedder.dimensions}, lambda: queue.alive)


POOLINGS: dict[str, Pooling] = {
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_cls_token": "cls",
    "pooling_mode_lasttoken": "last",
    "pooling_mode_max_tokens": "max",
}


def pooling_of(folder: Path) -> tuple[Pooling, bool]:
    """How a sentence-transformers folder pools and whether it normalizes; without its files the mean, normalized.

    Raises CatalogueError for a pooling or a module that is not supported."""
    normalize, place = True, folder / "1_Pooling"
    if (folder / "modules.json").exists():
        try:
            modules = [
                str(each["type"]).rpartition(".")[2] for each in json.loads((folder / "modules.json").read_text())
            ]
        except (ValueError, TypeError, KeyError) as error:
            raise CatalogueError(f"{folder / 'modules.json'} is not a list of modules: {error}") from None
        if unknown := [each for each in modules if each not in ("Transformer", "Pooling", "Normalize")]:
            raise CatalogueError(f"modules of type {', '.join(unknown)} are not supported ({folder / 'modules.json'})")
        normalize = "Normalize" in modules
    if not (place / "config.json").exists():
        return "mean", normalize
    config = read_json(place / "config.json")
    chosen = [name for name, value in config.items() if name.startswith("pooling_mode_") and value is True]
    if len(chosen) != 1 or chosen[0] not in POOLINGS:
        raise CatalogueError(f"the pooling {', '.join(chosen) or '(none)'} is not supported ({place / 'config.json'})")
    return POOLINGS[chosen[0]], normalize
