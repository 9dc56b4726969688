"""Loads a causal LM, of kind chat or base: its runner, tokenizer and scheduler, and the API over them.

Knows which runner supports which weights. Does not compute.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.utils.quantization_config import GgufConfig

from ..api.app import create_app
from ..api.generator import EngineClient
from ..engine.kv_pages import PAGE_TOKENS
from ..engine.request import Request, StepOutput
from ..engine.scheduler import Scheduler
from ..errors import CatalogueError
from ..runners import cpu
from ..runners.cpu import CpuRunner
from ..runners.llama import LlamaRunner
from ..runners.transformers import TransformersRunner
from ..text.tokenizer import ModelTokenizer
from ..weights import gemma, gguf, llama
from ..weights.headers import naming_file
from .catalogue import AppArgs, Entry
from .kinds import KINDS, Loaded
from .memory import detach, kv_token_budget, pick_device, pick_dtype
from .progress import Progress
from .sources import Source, resolve_source, revision
from .tokenizers import read_gguf_tokenizer, read_tokenizer


def load(args: AppArgs, source: Source, device: torch.device) -> Loaded:
    """Raises OSError, GGUFError or CatalogueError."""
    entry, progress = args.entry, Progress(args.progress_file)
    runner, tokenizer, ends = load_causal(entry, source, device, progress, args.folder)
    if entry.kind == "chat" and tokenizer.template is None:
        raise CatalogueError(f"{entry.id} has no chat template: list it as kind: base")
    progress.report("digests")
    engine_name = f"{type(runner).__name__} {runner.kind}"
    stamp = revision(entry, source, engine_name, tokenizer.template or "", folder=args.folder)
    client = EngineClient(
        name=entry.id, kind=entry.kind, revision=stamp, text=tokenizer, default_max_tokens=args.default_max_tokens
    )
    tokens = kv_token_budget(entry.id, args.kv_tokens, runner.token_bytes, device)
    engine = Scheduler(
        runner,
        client.deliver,
        kv_tokens=tokens,
        max_running=args.max_running,
        max_queued=args.max_queued,
        context=entry.context,
        step_timeout=args.step_timeout_seconds,
    )
    client.attach(engine, tokenizer.stop_ids(ends))
    progress.report("warm-up")
    warm_up(engine)
    app = create_app(client, KINDS[entry.kind].paths, max_body_bytes=args.max_body_bytes, hosts=args.allowed_hosts)
    info = {
        "revision": stamp,
        "engine": engine_name,
        "weights": runner.kind,
        "weights_bytes": runner.bytes,
        "context": engine.context,
        "kv_tokens": tokens,
        # Prompts share their beginning in pages; a runner that is not batch invariant shares only some of them.
        "page_tokens": PAGE_TOKENS if runner.batch_invariant else None,
        "kv_bytes": tokens * runner.token_bytes,
        "max_running": args.max_running,
        "max_queued": args.max_queued,
        # The growth of the process until every page is in use.
        "predicted_bytes": runner.bytes + tokens * runner.token_bytes,
    }
    return Loaded(app, info, lambda: engine.alive)


def load_engine(entry: Entry, deliver: Callable[[list[StepOutput]], None], *, device: str = "auto") -> Scheduler:
    """The engine alone, not started, with the service's defaults: for measurements."""
    return detach(lambda: Scheduler(load_causal(entry, resolve_source(entry), pick_device(device))[0], deliver))


def load_causal(
    entry: Entry,
    source: Source,
    device: torch.device,
    progress: Progress | None = None,
    folder: Path | None = None,
) -> tuple[LlamaRunner | CpuRunner | TransformersRunner, ModelTokenizer, set[int]]:
    """Runner, tokenizer and the tokens that end an answer. folder: MODEL_FOLDER, where conversions are kept.

    A GGUF file of a Llama stays quantized where the C kernels run, unless the entry names a dtype. Raises OSError for
    missing files, CatalogueError for architectures whose attention the engine's pages cannot hold.
    """
    dtype = pick_dtype(entry.dtype)
    progress = progress or Progress()
    progress.report("tokenizer")

    def on_layer(share: float) -> None:
        progress.report("weights", share)

    arguments: dict[str, Any] = {**source.arguments(), "dtype": dtype}
    if source.gguf_file:
        file = gguf.GGUFFile(Path(source.folder) / source.gguf_file)
        with naming_file(file.path):
            tokenizer = read_gguf_tokenizer(file, folder) or read_tokenizer(source)
            if entry.dtype == "auto" and device.type == "cpu" and cpu.can_run(file):
                return CpuRunner(file, torch.get_num_threads(), on_layer), tokenizer, gguf_ends(file)
            if llama.can_read(file):
                weights = llama.from_file(file, dtype, device, on_layer)
                return LlamaRunner(weights, device, dtype), tokenizer, gguf_ends(file)
            if gemma.can_read(file):
                return (
                    checked(gemma.load(file, dtype, on_layer).to(device).eval(), progress),
                    tokenizer,
                    gguf_ends(file),
                )
        # transformers would keep them packed and unpack them in every step, which is slower than dense on the CPU.
        arguments["quantization_config"] = GgufConfig(gguf_file=source.gguf_file, dequantize=True)
    else:
        tokenizer = read_tokenizer(source)
    model: Any = AutoModelForCausalLM.from_pretrained(source.folder, **arguments)
    model = model.to(device).eval()
    unknown = set(getattr(model.config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if unknown:
        layers = ", ".join(sorted(unknown))
        raise CatalogueError(f"{type(model).__name__} cannot be served: layers of type {layers} are not supported")
    if llama.supports(model):
        return LlamaRunner(llama.from_model(model), device, dtype), tokenizer, ends_of(model)
    return checked(model, progress), tokenizer, ends_of(model)


def checked(model: Any, progress: Progress) -> TransformersRunner:
    """Raises CatalogueError for a model whose attention the engine's pages cannot hold."""
    progress.report("check")
    try:
        runner = TransformersRunner(model)
        runner.check()
    except Exception as error:  # of a forward that expects other arguments
        why = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        raise CatalogueError(f"{type(model).__name__} cannot be served: {why}") from None
    return runner


def gguf_ends(file: gguf.GGUFFile) -> set[int]:
    """The tokens of a GGUF file that end a text, a turn or a message."""
    ids = [file.metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
    return {id_ for id_ in ids if isinstance(id_, int)}


def ends_of(model: Any) -> set[int]:
    """The end tokens of a transformers model: of its configuration and of generation_config.json."""
    ends: set[int] = set()
    for config in (model.config.get_text_config(), model.generation_config):
        configured = getattr(config, "eos_token_id", None)
        ends |= {configured} if isinstance(configured, int) else set(configured or ())
    return ends


def warm_up(engine: Scheduler) -> None:
    """Generate a few tokens before the first request, so that torch chooses its kernels and a model that cannot run
    fails here. Then start the engine."""
    with torch.inference_mode():
        outputs: list[StepOutput] = []
        engine.run_alone(Request([0] * 4, 8), outputs)
    if any(output.error for output in outputs):
        raise CatalogueError(f"the model cannot run in the engine: {outputs[-1].error}")
    engine.start()
