"""A model in the memory of this process: weights, tokenizer, engine, and the ASGI application over them."""

from __future__ import annotations

import logging
import math
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch
import transformers
from starlette.types import ASGIApp
from transformers import AutoModel, AutoModelForCausalLM
from transformers.utils.quantization_config import GgufConfig

from .api import Generator, embedding_app, generation_app
from .catalogue import CatalogueError, Source, locate, revision
from .embedding import Embedder
from .engine import Engine, Event, Request
from .envelope import start_logging
from .settings import AppArgs
from .text import Text

log = logging.getLogger(__name__)


def load(args: AppArgs) -> tuple[ASGIApp, dict[str, Any], Callable[[], bool]]:
    """The application of one catalogue entry, its info, and whether it still works.

    Raises CatalogueError when the weights are missing or of a kind that cannot run here.
    """
    start_logging(args.log_format, args.log_pipe)
    transformers.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    transformers.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    entry = args.entry
    started = time.monotonic()
    torch.set_num_threads(args.threads or cores())
    device = pick_device(entry.device or args.device)
    dtype = torch.bfloat16 if entry.dtype == "auto" else getattr(torch, entry.dtype)
    source = locate(entry)
    try:
        text = Text.load(source)
        if entry.kind == "embedding":
            weights = AutoModel.from_pretrained(source.folder, dtype=dtype, **source.arguments())
        else:
            weights = load_causal(source, dtype)
    except OSError as error:
        raise CatalogueError(f"{entry.id}: files are missing ({entry.source}): {str(error).splitlines()[0]}") from None
    weights = weights.to(device).eval()
    stamp = revision(entry, source, str(dtype), text.template or "", torch.__version__, transformers.__version__)
    info: dict[str, Any] = {"id": entry.id, "kind": entry.kind, "revision": stamp, "device": str(device)}
    info |= {"dtype": str(dtype).removeprefix("torch."), "weights_bytes": weight_bytes(weights)}

    if entry.kind == "embedding":
        embedder = Embedder(weights, entry.context or 512)
        embedder.embed([[0]], threading.Event())
        app = embedding_app(
            embedder,
            text,
            entry.id,
            stamp,
            max_body_bytes=args.max_body_bytes,
            max_queued=args.max_queued,
            hosts=args.allowed_hosts,
        )
        info |= {"context": embedder.context, "dimensions": embedder.dimensions}
        alive: Callable[[], bool] = lambda: True  # noqa: E731
    else:
        if entry.kind == "chat" and text.template is None:
            raise CatalogueError(f"{entry.id} has no chat template: list it as kind: base")
        generator = Generator(
            name=entry.id, kind=entry.kind, revision=stamp, text=text, default_max_tokens=args.default_max_tokens
        )
        engine = Engine(
            weights,
            generator.deliver,
            kv_tokens=args.kv_tokens,
            max_running=args.max_running,
            max_queued=args.max_queued,
            context=entry.context,
        )
        generator.attach(engine, text.stop_ids(weights.config))
        warm_up(engine)
        app = generation_app(generator, max_body_bytes=args.max_body_bytes, hosts=args.allowed_hosts)
        info |= {"context": engine.context, "kv_tokens": args.kv_tokens, "kv_bytes": engine.cache.bytes}
        info |= {"max_running": args.max_running, "max_queued": args.max_queued}
        alive = lambda: engine.alive  # noqa: E731
    rss = psutil.Process().memory_info().rss
    log.info("loaded", extra={"fields": {**info, "rss_bytes": rss, "seconds": round(time.monotonic() - started, 1)}})
    return app, info, alive


def load_causal(source: Source, dtype: torch.dtype) -> Any:
    """A causal LM with plain dense weights; those of a GGUF file are dequantized.

    Raises CatalogueError for architectures whose attention the engine's pages cannot hold.
    """
    arguments: dict[str, Any] = {**source.arguments(), "dtype": dtype, "attn_implementation": "sdpa"}
    if source.gguf_file:
        # transformers would keep them packed and unpack them in every step: slower than dense on the CPU.
        arguments["quantization_config"] = GgufConfig(gguf_file=source.gguf_file, dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(source.folder, **arguments)
    kinds = set(getattr(model.config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if kinds:
        raise CatalogueError(f"{source.folder}: layers of type {', '.join(sorted(kinds))} are not supported")
    return model


def warm_up(engine: Engine) -> None:
    """One short answer before the first user's: torch picks its kernels now, and a model that cannot run fails here."""
    with torch.inference_mode():
        trial = Request([0] * 4, 2)
        ended: list[Event] = []
        engine.run_alone(trial, ended)
    if any(event.error for event in ended):
        raise CatalogueError(f"the model cannot run in the engine: {ended[-1].error}")
    engine.start()


def pick_device(asked: str) -> torch.device:
    """The device for `auto`, `cpu` or `cuda`. Raises CatalogueError rather than fall back from CUDA."""
    if asked == "cuda" and not torch.cuda.is_available():
        raise CatalogueError("MODEL_DEVICE is cuda, but torch sees no CUDA device here")
    return torch.device("cuda" if asked != "cpu" and torch.cuda.is_available() else "cpu")


def weight_bytes(model: torch.nn.Module) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())


def cores(quota_file: Path = Path("/sys/fs/cgroup/cpu.max")) -> int:
    """CPU cores this process may use: its affinity, bounded by the cgroup's quota (version 2)."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = quota_file.read_text().split()
        return max(1, min(allowed, math.ceil(int(quota) / int(period))))
    except (OSError, ValueError):  # no cgroup, or "max"
        return allowed
