"""`make bench-engine`: compares our engine with transformers' own generation on the embedded model, in one process.

Rounds are interleaved and medians taken, because the speed of a machine drifts by more than the measured differences.
Every round has new prompts, so that no prefix cache helps, except where that is measured. Prints a table and writes the
figures as JSON to runs/.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import importlib.util
import io
import itertools
import json
import math
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil
import torch

from bench import beside, model_reactions
from bench.processes import Server, command, cpu_seconds, free_port, server
from bench.report import ROOT, BenchError, Row, machine, page, save, say
from bench.streams import Round

NEW_TOKENS = 64
SERVICE_SECONDS = 180
IDLE_SECONDS = 10
REQUESTS = (1, 8, 32, 64)
# The beginning of Carroll's Alice (1865), typed for this measurement; not an edition.
TEXT = Path(__file__).with_name("alice.txt")


# ---- the engines


class Ours:
    """The engine as a replica loads it, in this process."""

    name = "this engine"

    def __init__(self, entry: Any) -> None:
        from lab_model.models.causal import load_engine  # noqa: PLC0415 - torch's threads are set first

        self._received: dict[Any, list[float]] = defaultdict(list)  # arrival time of each token
        self._ended: set[Any] = set()
        self._changed = threading.Condition()
        self.engine = load_engine(entry, self._deliver)
        self.engine.start()

    def _deliver(self, events: list[Any]) -> None:
        now = time.perf_counter()
        with self._changed:
            for event in events:
                self._received[event.request] += [now] * len(event.tokens)
                if event.error is not None and not event.request.cancelled:
                    say(f"bench: the engine failed a request: {event.error}")
                if event.finish or event.error:
                    self._ended.add(event.request)
            self._changed.notify_all()

    def submit(self, prompts: Sequence[Sequence[int]], tokens: int, **sampling: Any) -> list[Any]:
        from lab_model.engine.request import Request  # noqa: PLC0415
        from lab_model.engine.sampling_params import SamplingParams  # noqa: PLC0415

        requests = [Request(list(prompt), tokens, sampling=SamplingParams(**sampling)) for prompt in prompts]
        self.engine.submit(*requests)
        return requests

    def wait(self, requests: Sequence[Any], timeout: float = 120) -> list[list[float]]:
        """The arrival times of the tokens of each request."""
        with self._changed:
            if not self._changed.wait_for(lambda: all(r in self._ended for r in requests), timeout):
                raise BenchError(f"this engine did not end in {timeout} s")
            return [self._received[request] for request in requests]

    def started(self, requests: Sequence[Any], tokens: int, timeout: float = 60) -> None:
        with self._changed:
            if not self._changed.wait_for(lambda: all(len(self._received[r]) >= tokens for r in requests), timeout):
                raise BenchError(f"this engine gave fewer than {tokens} tokens in {timeout} s")

    def generate(self, prompts: Sequence[Sequence[int]], tokens: int, **sampling: Any) -> int:
        return sum(len(times) for times in self.wait(self.submit(prompts, tokens, **sampling)))

    def first(self, prompt: Sequence[int]) -> tuple[float, int]:
        """Seconds to the first token of this prompt alone, and its tokens that came from the prefix cache."""
        began = time.perf_counter()
        (request,) = self.submit([prompt], 1)
        ((first, *_),) = self.wait([request])
        return first - began, getattr(request, "reused", 0)

    def close(self) -> None:
        self.engine.close()


class Static:
    """transformers' `generate`: one batch from its beginning to its end."""

    name = "HF generate, bf16"

    def __init__(self, entry: Any) -> None:
        self._model = reference(entry, torch.bfloat16)

    def generate(self, prompts: Sequence[Sequence[int]], tokens: int) -> int:
        width = max(map(len, prompts))
        ids = torch.tensor([[0] * (width - len(prompt)) + list(prompt) for prompt in prompts])
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        with torch.inference_mode():
            out = self._model.generate(ids, attention_mask=mask, generation_config=to_the_end(tokens))
        return (int(out.shape[1]) - width) * len(prompts)

    def close(self) -> None:
        del self._model


class Continuous:
    """transformers' own continuous batching, with the settings that were its best here."""

    name = "HF continuous, bf16"

    def __init__(self, entry: Any) -> None:
        from transformers.generation.configuration_utils import ContinuousBatchingConfig  # noqa: PLC0415

        self._model = reference(entry, torch.bfloat16)
        self._stack = contextlib.ExitStack()
        self._manager = self._stack.enter_context(
            self._model.continuous_batching_context_manager(
                generation_config=to_the_end(NEW_TOKENS),
                continuous_batching_config=ContinuousBatchingConfig(
                    page_size=32, max_batch_tokens=512, num_blocks=512, use_cuda_graph=False
                ),
                timeout=5,
                warmup=False,
            )
        )

    def generate(self, prompts: Sequence[Sequence[int]], tokens: int) -> int:
        self._manager.add_requests(inputs=[list(prompt) for prompt in prompts], max_new_tokens=tokens)
        ended, made, until = 0, 0, time.monotonic() + 180
        while ended < len(prompts):
            result = self._manager.get_result(timeout=1)
            if result is not None and result.is_finished():
                ended += 1
                made += len(result.generated_tokens)
            elif result is None and (time.monotonic() > until or not self._manager.is_running()):
                raise BenchError("transformers' continuous batching did not end")
        return made

    def close(self) -> None:
        self._stack.close()


class Vllm:
    """vLLM's CPU build, if it is installed; with the dequantized weights, because it must read a folder."""

    name = "vLLM, bf16"

    def __init__(self, entry: Any) -> None:
        import vllm  # type: ignore[import-not-found]  # noqa: PLC0415
        from lab_model.models.sources import resolve_source  # noqa: PLC0415
        from transformers import AutoTokenizer  # noqa: PLC0415

        source = resolve_source(entry)
        self._folder = tempfile.TemporaryDirectory()
        reference(entry, torch.bfloat16).save_pretrained(self._folder.name)
        AutoTokenizer.from_pretrained(source.folder, **source.arguments()).save_pretrained(self._folder.name)
        self._vllm = vllm
        self._model = vllm.LLM(self._folder.name, dtype="bfloat16", max_model_len=2048, enable_prefix_caching=False)

    def generate(self, prompts: Sequence[Sequence[int]], tokens: int) -> int:
        asked = self._vllm.SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
        reported = self._model.generate(
            [{"prompt_token_ids": list(prompt)} for prompt in prompts], asked, use_tqdm=False
        )
        return sum(len(each.outputs[0].token_ids) for each in reported)

    def close(self) -> None:
        self._folder.cleanup()


class LlamaCpp:
    """llama.cpp through llama-cpp-python, if it is installed: one request after the other."""

    name = "llama.cpp, Q4_1"

    def __init__(self, entry: Any) -> None:
        from lab_model.models.sources import resolve_source  # noqa: PLC0415
        from llama_cpp import Llama  # type: ignore[import-not-found]  # noqa: PLC0415

        source = resolve_source(entry)
        path = Path(source.folder) / (source.gguf_file or "")
        self._model = Llama(str(path), n_ctx=2048, n_threads=torch.get_num_threads(), verbose=False)

    def generate(self, prompts: Sequence[Sequence[int]], tokens: int) -> int:
        return sum(
            len(list(itertools.islice(self._model.generate(list(prompt), temp=0, reset=True), tokens)))
            for prompt in prompts
        )

    def close(self) -> None:
        self._model.close()


def to_the_end(tokens: int) -> Any:
    """Greedy generation of all tokens: -1 is no token, so no answer ends early."""
    import transformers  # noqa: PLC0415

    made: Any = transformers.GenerationConfig
    return made(max_new_tokens=tokens, do_sample=False, eos_token_id=-1, pad_token_id=0)


def reference(entry: Any, dtype: torch.dtype) -> Any:
    """transformers' model of the dequantized file."""
    import transformers  # noqa: PLC0415
    from lab_model.models.sources import resolve_source  # noqa: PLC0415
    from transformers.utils.quantization_config import GgufConfig  # noqa: PLC0415

    source = resolve_source(entry)
    arguments: dict[str, Any] = {**source.arguments(), "dtype": dtype, "attn_implementation": "sdpa"}
    if source.gguf_file:
        arguments["quantization_config"] = GgufConfig(gguf_file=source.gguf_file, dequantize=True)
    # transformers' switch does not hide the progress bar of the dequantization.
    with contextlib.redirect_stderr(io.StringIO()):
        model: Any = transformers.AutoModelForCausalLM.from_pretrained(source.folder, **arguments)
    return model.eval()


# ---- measurements


class Bench:
    """The run: its prompts, the loaded engines, its rows."""

    def __init__(self, options: argparse.Namespace) -> None:
        from lab_model.models.catalogue import load_catalogue  # noqa: PLC0415
        from lab_model.models.sources import resolve_source  # noqa: PLC0415
        from transformers import AutoTokenizer  # noqa: PLC0415

        self.options, self.rounds = options, options.rounds
        self.rows: list[Row] = []
        self.speeds: dict[str, dict[int, float]] = {}  # engine, requests: tokens per second
        self.entries = load_catalogue(None)
        self.entry = next(entry for entry in self.entries if entry.kind == "chat")
        source = resolve_source(self.entry)
        self.source = source
        self.tokenizer: Any = AutoTokenizer.from_pretrained(source.folder, **source.arguments())
        self.ids: list[int] = self.tokenizer(TEXT.read_text(encoding="utf-8"))["input_ids"]
        self._starts = self._places()
        self._up: dict[type[Any], Any] = {}
        self._stack = contextlib.ExitStack()

    def _places(self) -> Iterator[int]:
        order = random.Random(5)  # noqa: S311 - the same prompts in every run
        while True:
            places = list(range(len(self.ids)))
            order.shuffle(places)
            yield from places

    def prompt(self, length: int) -> list[int]:
        """A piece of the text. No other of the last two thousand pieces began at the same place. The text is cyclic."""
        start = next(self._starts)
        return [self.ids[(start + i) % len(self.ids)] for i in range(length)]

    def prompts(self, count: int) -> list[list[int]]:
        return [self.prompt(20 + i * 7 % 21) for i in range(count)]

    def up(self, kind: type[Any]) -> Any:
        if kind not in self._up:
            say(f"bench: loading {kind.name}")
            self._up[kind] = kind(self.entry)
            self._up[kind].generate(self.prompts(2), 4)
        return self._up[kind]

    @cached_property
    def others(self) -> list[type[Any]]:
        found: list[type[Any]] = [Static, Continuous]
        found += [kind for name, kind in (("vllm", Vllm), ("llama_cpp", LlamaCpp)) if importlib.util.find_spec(name)]
        return found

    @cached_property
    def ends(self) -> set[int]:
        """Ids that end an answer."""
        found = self.tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
        return {token for token in [*found, self.tokenizer.eos_token_id] if token is not None}

    def row(
        self,
        section: str,
        name: str,
        value: float | None,
        unit: str = "",
        *,
        aim: tuple[str, bool | None] = ("", None),
        note: str = "",
    ) -> None:
        self.rows.append(Row(section, name, value, unit, *aim, note=note))

    @cached_property
    def service(self) -> Server:
        """The model service in separate processes, as `make lab` starts it."""
        say("bench: starting the model service")
        port = free_port()
        folder = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-engine-")))
        argv = [sys.executable, "-m", "lab_model"]
        return self._stack.enter_context(
            server(
                "model",
                argv,
                port,
                folder,
                ready="/ready",
                seconds=SERVICE_SECONDS,
                env={"MODEL_PORT": str(port), "MODEL_DRAIN_TIMEOUT_SECONDS": "5"},
            )
        )

    def replica(self, name: str) -> psutil.Process:
        """The process of this model's replica. Ray titles it with application and deployment."""
        title = f"ServeReplica:{name}:"
        found = [each for each in self.service.processes() if title in command(each)]
        if len(found) != 1:
            raise BenchError(f"{len(found)} processes of the service look like the replica of {name}")
        return found[0]

    def close(self) -> None:
        self._stack.close()
        for engine in self._up.values():
            engine.close()


# Concurrent requests -> least speed of our engine, as a multiple of the other's.
TARGETS: dict[int, list[tuple[type[Any], float]]] = {
    1: [(Static, 3.5)],
    8: [(Static, 3.0)],
    32: [(Static, 2.2), (Continuous, 3.5)],
    64: [],
}


def decode(bench: Bench, requests: int) -> None:
    """64 new tokens for each of `requests` requests, including prefill; all engines in turns."""
    section = f"decode{requests}"
    kinds: list[type[Any]] = [Ours, *[kind for kind in bench.others if requests == 1 or kind is not LlamaCpp]]
    rates: dict[str, list[float]] = defaultdict(list)
    for _ in range(bench.rounds):
        asked = bench.prompts(requests)
        for kind in kinds:
            engine = bench.up(kind)
            began = time.perf_counter()
            made = engine.generate(asked, NEW_TOKENS)
            seconds = time.perf_counter() - began
            if made != requests * NEW_TOKENS:
                raise BenchError(f"{kind.name} made {made} tokens of {requests * NEW_TOKENS}")
            rates[kind.name].append(made / seconds)
    for kind in kinds:
        speed = statistics.median(rates[kind.name])
        bench.speeds.setdefault(kind.name, {})[requests] = speed
        spread = f"{min(rates[kind.name]):.0f}–{max(rates[kind.name]):.0f}, {len(rates[kind.name])} rounds"
        bench.row(section, f"{requests} requests, {kind.name}", speed, "tok/s", note=spread)
    ours = bench.speeds[Ours.name]
    for other, least in TARGETS[requests]:
        # Per round, so that the drift of the machine cancels out.
        ratio = statistics.median(a / b for a, b in zip(rates[Ours.name], rates[other.name], strict=True))
        bench.row(section, f"{requests} requests, times {other.name}", ratio, "x", aim=(f"≥ {least}", ratio >= least))
    if requests == 64 and 32 in ours:
        share = ours[64] / ours[32]
        # Two medians of the same thing differ by a fiftieth.
        bench.row(section, "64 requests, times 32 requests", share, "x", aim=("≥ 1 (- 2 %)", share >= 0.98))


def ttft(bench: Bench) -> None:
    engine = bench.up(Ours)
    engine.first(bench.prompt(100))
    times = [engine.first(bench.prompt(100))[0] for _ in range(2 * bench.rounds + 1)]
    middle = 1000 * statistics.median(times)
    note = f"highest of {len(times)}: {1000 * max(times):.0f} ms"
    bench.row("ttft", "TTFT of 100 tokens, idle", middle, "ms", aim=("≤ 150", middle <= 150), note=note)


def prefix(bench: Bench) -> None:
    """The second of two requests that share 1,000 tokens, against the first."""
    engine = bench.up(Ours)
    cold, warm, reused = [], [], []
    for _ in range(bench.rounds):
        shared = bench.prompt(1000)
        cold.append(engine.first(shared + bench.prompt(20))[0])
        seconds, held = engine.first(shared + bench.prompt(20))
        warm.append(seconds)
        reused.append(held)
    gain = statistics.median(a / b for a, b in zip(cold, warm, strict=True))
    bench.row("prefix", "TTFT of 1,020 tokens, cold", 1000 * statistics.median(cold), "ms")
    note = f"cached tokens: {statistics.median(reused):.0f}"
    bench.row("prefix", "TTFT when 1,000 are shared", 1000 * statistics.median(warm), "ms", note=note)
    bench.row("prefix", "cold / shared", gain, "x", aim=("≥ 5", gain >= 5))


def stall(bench: Bench) -> None:
    """8 answers run while a prompt of 2,000 tokens joins: the longest time that one of them waits for a token."""
    engine = bench.up(Ours)
    usual, longest, firsts = [], [], []
    for _ in range(bench.rounds):
        running = engine.submit([bench.prompt(30) for _ in range(8)], 400)
        engine.started(running, 20)
        joined = time.perf_counter()
        (late,) = engine.submit([bench.prompt(2000)], 2)
        (arrived,) = engine.wait([late])
        engine.started(running, 1)
        engine.engine.cancel(*running)
        engine.wait(running)  # no request may run during the next measurement
        received = [engine._received[request] for request in running]
        before = [b - a for times in received for a, b in itertools.pairwise(times) if b < joined]
        during = [b - a for times in received for a, b in itertools.pairwise(times) if a < arrived[0] and b > joined]
        usual.append(statistics.median(before))
        longest.append(max(during))
        firsts.append(arrived[0] - joined)
    worst = 1000 * statistics.median(longest)
    note = f"usually {1000 * statistics.median(usual):.0f} ms; worst round {1000 * max(longest):.0f} ms"
    bench.row("stall", "longest gap while 2,000 tokens join", worst, "ms", aim=("≤ 150", worst <= 150), note=note)
    bench.row("stall", "TTFT of the 2,000 tokens beside 8", 1000 * statistics.median(firsts), "ms")


def perplexity(bench: Bench) -> None:
    """Perplexity of a fixed text: the engine's weights and kernels against the dequantized file in float32."""
    ids = bench.ids[:2048]
    targets = torch.tensor(ids[1:])
    with torch.inference_mode():
        ours = torch.nn.functional.cross_entropy(bench.up(Ours).engine.logits(ids)[:-1].float(), targets).item()
        model = reference(bench.entry, torch.float32)
        theirs = torch.nn.functional.cross_entropy(model(torch.tensor([ids])).logits[0, :-1], targets).item()
    bench.row("perplexity", f"dequantized file, float32, {len(ids)} tokens", math.exp(theirs))
    off = 100 * (math.exp(ours - theirs) - 1)
    bench.row("perplexity", "this engine", math.exp(ours))
    bench.row("perplexity", "this engine, off by", off, "%", aim=("within 1", abs(off) <= 1))


def idle(bench: Bench) -> None:
    """CPU time of the service's replicas without requests, and their memory after the earlier requests."""
    service = bench.service
    replicas = {entry.id: bench.replica(entry.id) for entry in bench.entries}
    time.sleep(2)
    everything = service.processes()
    before, began = [cpu_seconds(each) for each in everything], time.monotonic()
    time.sleep(IDLE_SECONDS)
    passed = time.monotonic() - began
    # The figures of a process that has ended are not known.
    shares = {
        each.pid: 100 * (now - used) / passed
        for each, used in zip(everything, before, strict=True)
        if used is not None and (now := cpu_seconds(each)) is not None
    }
    if missing := {replica.pid for replica in replicas.values()} - shares.keys():
        raise BenchError(f"replicas ended without requests: {missing}")
    for name, replica in replicas.items():
        share = shares[replica.pid]
        bench.row("idle", f"replica of {name}, of a core", share, "%", aim=("< 2", share < 2))
    bench.row("idle", f"the service's {len(shares)} processes, Ray among them", sum(shares.values()), "%")
    pair = 0
    for name, replica in replicas.items():
        memory = replica.memory_full_info()
        pair += memory.rss
        note = f"{memory.uss / 1e6:.0f} MB not shared with others"
        bench.row("idle", f"RSS of the replica of {name}", memory.rss / 1e6, "MB", note=note)
    bench.row("idle", "RSS of the embedded pair", pair / 1e6, "MB", aim=("≤ 1,600", pair <= 1.6e9))


def http(bench: Bench) -> None:
    """The same over HTTP, streamed, by the model service without other requests.

    In turns, with the same kind of prompts and parameters: in process, by a client that takes little CPU time
    (bench/streams.py describes how it counts), and by the openai SDK, whose parsing takes the cores on which the engine
    computes. The target is about the service, so the first client decides. The chat template makes each prompt about 30
    tokens longer than those of `decode32`, in process too.
    """
    url = bench.service.url
    engine = bench.up(Ours)
    rates: dict[str, list[float]] = defaultdict(list)
    firsts = asyncio.run(_over_http(bench, url, engine, rates))
    inside, light, sdk = (statistics.median(rates[name]) for name in ("in process", "light", "sdk"))
    bench.row("http", "32 requests, in process", inside, "tok/s", note=_spread(rates["in process"]))
    bench.row("http", "32 requests, streamed", light, "tok/s", note=_spread(rates["light"]))
    # Per round, so that the drift of the machine cancels out.
    shares = [100 * a / b for a, b in zip(rates["light"], rates["in process"], strict=True)]
    share = statistics.median(shares)
    bench.row("http", "32 requests, of in process", share, "%", aim=("≥ 90", share >= 90), note=_spread(shares))
    bench.row("http", "32 requests, streamed to the openai SDK", sdk, "tok/s", note=_spread(rates["sdk"]))
    if 32 in bench.speeds.get(Ours.name, {}):
        shorter = bench.speeds[Ours.name][32]
        bench.row("http", "32 requests, of decode32's shorter prompts", 100 * light / shorter, "%")
    for name in ("light", "sdk"):
        bench.row("http", f"client's own time a token, {name}", statistics.median(rates[f"{name} cpu"]), "µs")
    middle = 1000 * statistics.median(firsts)
    bench.row("http", "TTFT p50 of 100 tokens, idle", middle, "ms", aim=("≤ 150", middle <= 150))


def _spread(values: Sequence[float]) -> str:
    return f"{min(values):.0f}–{max(values):.0f}, {len(values)} rounds"


async def _over_http(bench: Bench, url: str, engine: Ours, rates: dict[str, list[float]]) -> list[float]:
    """Fill `rates` with the tokens per second of all rounds. Returns seconds to the first token of single requests."""
    from openai import AsyncOpenAI  # noqa: PLC0415

    client = AsyncOpenAI(base_url=url.rstrip("/") + "/v1", api_key="none", max_retries=0, timeout=120)
    create: Any = client.chat.completions.create
    # No answer ends early, because the tokens that end an answer are excluded.
    ends = dict.fromkeys(bench.ends, -100.0)
    address = urlsplit(url)
    path = f"{address.path.rstrip('/')}/v1/chat/completions"

    def body(prompt: Sequence[int], tokens: int) -> dict[str, Any]:
        return {
            "model": bench.entry.id,
            "messages": [{"role": "user", "content": bench.tokenizer.decode(list(prompt))}],
            "max_tokens": tokens,
            "temperature": 0,
            "logit_bias": {str(token): bias for token, bias in ends.items()},
            "stream": True,
            "stream_options": {"include_usage": True},
        }

    def templated(prompt: Sequence[int]) -> list[int]:
        messages = [{"role": "user", "content": bench.tokenizer.decode(list(prompt))}]
        text = bench.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return list(bench.tokenizer(text, add_special_tokens=False)["input_ids"])

    async def ask(prompt: Sequence[int], tokens: int) -> tuple[float, int]:
        began, first, made = time.perf_counter(), 0.0, 0
        async for chunk in await create(**body(prompt, tokens)):
            if chunk.choices and chunk.choices[0].delta.content and not first:
                first = time.perf_counter() - began
            if chunk.usage:
                made = chunk.usage.completion_tokens
        return first, made

    def inside(prompts: Sequence[Sequence[int]]) -> None:
        asked = [templated(prompt) for prompt in prompts]
        began = time.perf_counter()
        made = engine.generate(asked, NEW_TOKENS, logit_bias=ends)
        rates["in process"].append(made / (time.perf_counter() - began))

    async def sdk(prompts: Sequence[Sequence[int]]) -> None:
        began, cpu = time.perf_counter(), time.process_time()
        reported = await asyncio.gather(*(ask(prompt, NEW_TOKENS) for prompt in prompts))
        made = sum(tokens for _, tokens in reported)
        rates["sdk"].append(made / (time.perf_counter() - began))
        rates["sdk cpu"].append(1e6 * (time.process_time() - cpu) / made)

    with Streams(address.hostname or "127.0.0.1", address.port or 80, path) as streams:

        def light(prompts: Sequence[Sequence[int]]) -> None:
            reported = streams.ask([body(prompt, NEW_TOKENS) for prompt in prompts])
            rates["light"].append(reported.tokens / reported.seconds)
            rates["light cpu"].append(1e6 * reported.cpu / reported.tokens)

        await asyncio.gather(*(ask(prompt, 8) for prompt in bench.prompts(4)))
        for turn in range(bench.rounds + 1):
            # New prompts each time, so that the prefix cache does not help the second client.
            inside(bench.prompts(32))
            light(bench.prompts(32))
            await sdk(bench.prompts(32))
            if not turn:
                rates.clear()  # the warm-up is over
    asked = 100 - len(templated([]))  # the chat template's tokens count too
    firsts = [(await ask(bench.prompt(asked), 4))[0] for _ in range(2 * bench.rounds + 1)]
    await client.close()
    return firsts


class Streams:
    """bench/streams.py, running."""

    def __init__(self, host: str, port: int, path: str) -> None:
        self._where = {"host": host, "port": port, "path": path}

    def __enter__(self) -> Streams:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "bench.streams"], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate()

    def ask(self, bodies: Sequence[dict[str, Any]]) -> Round:
        assert self._process.stdin is not None and self._process.stdout is not None  # noqa: PT018, S101 - pipes were asked for
        self._process.stdin.write(json.dumps(self._where | {"bodies": list(bodies)}) + "\n")
        self._process.stdin.flush()
        reported = json.loads(self._process.stdout.readline() or '{"trouble": "bench.streams has ended"}')
        if "trouble" in reported:
            raise BenchError(reported["trouble"])
        return Round(**reported)


SECTIONS: dict[str, Callable[[Bench], None]] = {
    **{f"decode{requests}": partial(decode, requests=requests) for requests in REQUESTS},
    "ttft": ttft,
    "prefix": prefix,
    "stall": stall,
    "perplexity": perplexity,
    "http": http,
    "idle": idle,
    **model_reactions.SECTIONS,
    **beside.SECTIONS,
}


# ---- the report


def side_by_side(speeds: dict[str, dict[int, float]]) -> str:
    """A table of tokens per second, one row for each engine."""
    lines = [f"{'tok/s, 64 new tokens a request':34}" + "".join(f"{count:>8}" for count in REQUESTS)]
    for name, row in speeds.items():
        reported = [f"{row[count]:8.0f}" if count in row else f"{'–':>8}" for count in REQUESTS]
        lines.append(f"{name:34}" + "".join(reported))
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="make bench-engine", description=__doc__)
    parser.add_argument("--only", default=",".join(SECTIONS), help=f"of {','.join(SECTIONS)} (default: all)")
    parser.add_argument("--rounds", type=int, default=5, help="interleaved rounds of each figure (default 5)")
    parser.add_argument("--threads", type=int, default=0, help="torch's threads (default: one per core)")
    options = parser.parse_args(argv)
    chosen = [name for name in options.only.split(",") if name]
    if unknown := set(chosen) - set(SECTIONS):
        parser.error(f"unknown section: {', '.join(sorted(unknown))}")
    import transformers  # noqa: PLC0415
    from lab_model.host import cores  # noqa: PLC0415

    torch.set_num_threads(options.threads or cores())
    transformers.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    transformers.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    began = time.monotonic()
    bench = Bench(options)
    reported = machine() | {"torch": torch.__version__, "threads": torch.get_num_threads(), "model": bench.entry.id}
    trouble = ""
    try:
        for name, measure in SECTIONS.items():
            if name in chosen:
                say(f"bench: {time.monotonic() - began:4.0f} s  {name}")
                measure(bench)
    except BenchError as error:
        trouble = str(error)  # the figures measured before are reported all the same
    except KeyboardInterrupt:
        return 130
    finally:
        bench.close()
    say(f"bench: {time.monotonic() - began:4.0f} s  {trouble or 'done'}")
    if bench.speeds:
        print(side_by_side(bench.speeds), end="\n\n")  # noqa: T201 - this is what the command is for
    print(page("engine", reported, bench.rows))  # noqa: T201
    path = save(
        "bench-engine", {"machine": reported, "rounds": options.rounds, "tokens_per_second": bench.speeds}, bench.rows
    )
    failed = [row.name for row in bench.rows if row.passed is False]
    if trouble:
        say(f"bench: {path}; incomplete: {trouble}")
    else:
        say(f"bench: {path}; " + (f"below target: {'; '.join(failed)}" if failed else "all targets met"))
    return 1 if failed or trouble else 0


if __name__ == "__main__":
    sys.exit(main())
