"""A model in the memory of this process: weights, tokenizer, engine, and the ASGI application over them."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import psutil
import torch
import transformers
from starlette.types import ASGIApp
from transformers import AutoModel, AutoModelForCausalLM
from transformers.utils.quantization_config import GgufConfig

from ..api.app import embedding_app, generation_app
from ..api.generator import Generator
from ..api.http.service import start_logging
from ..encoders.embedder import Embedder
from ..engine.kv_pages import PAGE_TOKENS
from ..engine.scheduler import Engine, Event, Request
from ..errors import CatalogueError
from ..host import cores, memory_left
from ..runners import cpu
from ..runners.cpu import Native
from ..runners.llama import Llama
from ..runners.transformers import Plain
from ..settings import AppArgs
from ..text.tokenizer import Text
from ..weights import gguf, llama
from .catalogue import Entry, Source, locate, revision

log = logging.getLogger(__name__)

# Of the memory that is left once the weights are there; the rest is for activations and what else grows.
KV_SHARE = 0.7
LEAST_KV_TOKENS = 512


Loaded = tuple[ASGIApp, dict[str, Any], Callable[[], bool]]
T = TypeVar("T")


def load(args: AppArgs) -> Loaded:
    """The application of one catalogue entry, its info, and whether it still works.

    Raises CatalogueError when the weights are missing or of a kind that cannot run here.
    """
    return apart(lambda: _load(args))


def apart(work: Callable[[], T]) -> T:
    """Do it in a thread that ends.

    Every thread that computes keeps OpenMP threads of its own while it lives; when there are more of them than cores,
    they sleep instead of spin at each operator's end, and a decode step takes twice as long.
    """
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(work).result()


def _load(args: AppArgs) -> Loaded:
    start_logging(args.log_format, args.log_pipe)
    transformers.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    transformers.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    entry = args.entry
    started, before = time.monotonic(), psutil.Process().memory_info().rss
    torch.set_num_threads(args.threads or cores())
    device = pick_device(entry.device or args.device)
    info: dict[str, Any] = {"id": entry.id, "kind": entry.kind, "device": str(device)}
    source = locate(entry)
    try:
        if entry.kind == "embedding":
            app, more, alive = embedding(args, source, device)
        else:
            app, more, alive = generation(args, source, device)
    except OSError as error:
        raise CatalogueError(f"{entry.id}: files are missing ({entry.source}): {str(error).splitlines()[0]}") from None
    except gguf.GGUFError as error:
        raise CatalogueError(f"{entry.id}: {error}") from None
    give_back()
    rss = psutil.Process().memory_info().rss
    info |= more
    grown = {"rss_bytes": rss, "rss_before_bytes": before, "seconds": round(time.monotonic() - started, 1)}
    log.info("loaded", extra={"fields": info | grown})
    return app, info, alive


def embedding(args: AppArgs, source: Source, device: torch.device) -> Loaded:
    entry = args.entry
    dtype = torch.bfloat16 if entry.dtype == "auto" else getattr(torch, entry.dtype)
    text = Text.load(source)
    model = AutoModel.from_pretrained(source.folder, dtype=dtype, **source.arguments()).to(device).eval()
    stamp = stamped(entry, source, str(dtype), text)
    embedder = Embedder(model, entry.context or 512)
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
    size = sum(parameter.nbytes for parameter in model.parameters())
    info = {"revision": stamp, "weights": str(dtype).removeprefix("torch."), "weights_bytes": size}
    return app, info | {"context": embedder.context, "dimensions": embedder.dimensions}, lambda: True


def generation(args: AppArgs, source: Source, device: torch.device) -> Loaded:
    entry = args.entry
    runner, text, config = load_causal(entry, source, device)
    if entry.kind == "chat" and text.template is None:
        raise CatalogueError(f"{entry.id} has no chat template: list it as kind: base")
    stamp = stamped(entry, source, f"{type(runner).__name__} {runner.kind}", text)
    generator = Generator(
        name=entry.id, kind=entry.kind, revision=stamp, text=text, default_max_tokens=args.default_max_tokens
    )
    tokens = affordable(entry.id, args.kv_tokens, runner.token_bytes, device)
    engine = Engine(
        runner,
        generator.deliver,
        kv_tokens=tokens,
        max_running=args.max_running,
        max_queued=args.max_queued,
        context=entry.context,
    )
    generator.attach(engine, text.stop_ids(getattr(config, "eos_token_id", None)))
    warm_up(engine)
    app = generation_app(generator, max_body_bytes=args.max_body_bytes, hosts=args.allowed_hosts)
    info = {
        "revision": stamp,
        "weights": runner.kind,
        "weights_bytes": runner.bytes,
        "context": engine.context,
        "kv_tokens": tokens,
        "kv_bytes": tokens * runner.token_bytes,
        "max_running": args.max_running,
        "max_queued": args.max_queued,
        # What the process will have grown by when every page is in use.
        "predicted_bytes": runner.bytes + tokens * runner.token_bytes,
    }
    return app, info, lambda: engine.alive


def load_engine(entry: Entry, deliver: Callable[[list[Event]], None], *, device: str = "auto") -> Engine:
    """The engine alone, not started, with the service's defaults: for measurements."""
    return apart(lambda: Engine(load_causal(entry, locate(entry), pick_device(device))[0], deliver))


def give_back() -> None:
    """What loading freed, to the system: glibc would keep it, 160 MB for the embedded model."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # no glibc
        ctypes.CDLL(None).malloc_trim(0)


def stamped(entry: Entry, source: Source, weights: str, text: Text) -> str:
    """The model's revision."""
    return revision(entry, source, weights, text.template or "", torch.__version__, transformers.__version__)


def affordable(name: str, asked: int, token_bytes: int, device: torch.device) -> int:
    """Tokens of KV cache: as many as asked, or what memory leaves. Raises CatalogueError when that is too little."""
    left = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else memory_left()
    tokens = min(asked, int(left * KV_SHARE) // token_bytes // PAGE_TOKENS * PAGE_TOKENS)
    if tokens < min(asked, LEAST_KV_TOKENS):
        raise CatalogueError(
            f"{name}: {left >> 20} MiB of memory are left, too little for {LEAST_KV_TOKENS} tokens of KV cache "
            f"({token_bytes} bytes each): raise the memory limit, or serve a smaller model"
        )
    if tokens < asked:
        log.warning("%s: memory leaves room for %s of %s tokens of KV cache", name, tokens, asked)
    return tokens


def load_causal(entry: Entry, source: Source, device: torch.device) -> tuple[Llama | Native | Plain, Text, Any]:
    """Runner, text and transformers' configuration, if there is one, of a chat or base model.

    A GGUF file of a Llama stays quantized where our kernels run, unless the entry asks for a dtype. Raises OSError for
    missing files, CatalogueError for architectures whose attention the engine's pages cannot hold.
    """
    dtype = torch.bfloat16 if entry.dtype == "auto" else getattr(torch, entry.dtype)
    arguments: dict[str, Any] = {**source.arguments(), "dtype": dtype, "attn_implementation": "sdpa"}
    if source.gguf_file:
        file = gguf.File(Path(source.folder) / source.gguf_file)
        with gguf.named(file.path):
            text = read_text(file) or Text.load(source)
            if entry.dtype == "auto" and device.type == "cpu" and cpu.reads(file):
                return Native(file, torch.get_num_threads()), text, None
            if llama.reads(file):
                return Llama(llama.from_file(file, dtype, device), device, dtype), text, None
        # transformers would keep them packed and unpack them in every step: slower than dense on the CPU.
        arguments["quantization_config"] = GgufConfig(gguf_file=source.gguf_file, dequantize=True)
    else:
        text = Text.load(source)
    model: Any = AutoModelForCausalLM.from_pretrained(source.folder, **arguments)
    model = model.to(device).eval()
    kinds = set(getattr(model.config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if kinds:
        raise CatalogueError(f"{source.folder}: layers of type {', '.join(sorted(kinds))} are not supported")
    runner = Llama(llama.from_model(model), device, dtype) if llama.fits(model) else Plain(model)
    return runner, text, model.config


def read_text(file: gguf.File) -> Text | None:
    """The tokenizer and template of a GGUF file; None where transformers has to read them."""
    tokenizer = gguf.tokenizer(file)
    if tokenizer is None:
        return None
    said, tokens = file.metadata, file.metadata["tokenizer.ggml.tokens"]
    ids = {name: said.get(f"tokenizer.ggml.{name}_token_id") for name in ("bos", "eos")}
    names = {f"{name}_token": tokens[token] for name, token in ids.items() if token is not None}
    return Text(tokenizer, said.get("tokenizer.chat_template"), names)


def warm_up(engine: Engine) -> None:
    """One short answer before the first user's: torch picks its kernels now, and a model that cannot run fails here."""
    with torch.inference_mode():
        trial = Request([0] * 4, 8)
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
