"""Several models and several kinds of work in one service: memory of three models, streams beside a client that scores
all the time, and how many short sentences are embedded and classified a second.

Sections of `make bench-engine`, over HTTP on services of their own.
"""

from __future__ import annotations

import asyncio
import json
import statistics
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import cycle, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import aiohttp
import yaml

from bench.processes import command, free_port, server
from bench.report import ROOT, BenchError

if TYPE_CHECKING:
    from bench.engine import Bench

GEMMA = ROOT / ".state/models/files/gemma3-270m/gemma-3-270m-q4_k_m.gguf"  # after make models ADD=gemma3-270m
THREE_SECONDS = 300  # until three models are loaded
STREAMS, STREAM_TOKENS = 8, 128
SCORED_TOKENS = 1000  # of each text that is scored
SENTENCES = ("sentiment-train.en.txt", "sentiment-test.en.txt")
BATCH, CALLERS, CALLS = 256, 16, 20  # inputs of one request; callers, and requests of each


def three(bench: Bench) -> None:
    """Memory of all processes of a service that holds three models, each of which has answered."""
    smollm = bench.entry.source
    third = {"source": f"file:{GEMMA}", "kind": "base"} if GEMMA.exists() else {"source": smollm, "kind": "base"}
    rows = [{"source": smollm, "kind": "chat"}, {"source": smollm, "kind": "base"}, third]
    rows = [{"id": f"model-{at}", **row} for at, row in enumerate(rows)]
    with tempfile.TemporaryDirectory(prefix="bench-three-") as place:
        folder = Path(place)
        (folder / "models.yaml").write_text(yaml.safe_dump(rows))
        port = free_port()
        env = {"MODEL_PORT": str(port), "MODEL_CATALOGUE_FILE": str(folder / "models.yaml")}
        env |= {"MODEL_DRAIN_TIMEOUT_SECONDS": "5"}
        argv = [sys.executable, "-m", "lab_model"]
        with server("model", argv, port, folder, ready="/ready", seconds=THREE_SECONDS, env=env) as service:
            for row in rows:
                body = {"model": row["id"], "prompt": bench.tokenizer.decode(bench.prompt(300)), "max_tokens": 32}
                _post(f"{service.url}/v1/completions", body)
            found = [(command(each), int(each.memory_full_info().pss) / 1e9) for each in service.processes()]
    for row in rows:
        own = next(used for title, used in found if f"ServeReplica:{row['id']}:" in title)
        bench.row("three", f"PSS of the replica of {row['id']}, {row['kind']}", own, "GB", note=row["source"][-40:])
    used = sum(each for _, each in found)
    bench.row("three", f"PSS of all {len(found)} processes", used, "GB", aim=("≤ 3.5", used <= 3.5))


def scoring(bench: Bench) -> None:
    """8 streams with and without a client that sends /v1/inspect/score all the time, in turns."""
    from bench.engine import Streams  # noqa: PLC0415 - it imports this module

    service = bench.service

    def bodies() -> list[dict[str, Any]]:
        ends = dict.fromkeys(map(str, bench.ends), -100.0)
        return [
            {"model": bench.entry.id, "max_tokens": STREAM_TOKENS, "temperature": 0, "logit_bias": ends,
             "messages": [{"role": "user", "content": bench.tokenizer.decode(prompt)}],
             "stream": True, "stream_options": {"include_usage": True}}
            for prompt in bench.prompts(STREAMS)
        ]  # fmt: skip

    alone, beside, scored = [], [], 0
    with Streams("127.0.0.1", service.port, "/v1/chat/completions") as streams:
        streams.ask(bodies())
        for _ in range(bench.rounds):
            found = streams.ask(bodies())
            alone.append(found.tokens / found.seconds)
            with _scorer(bench) as answers:
                found = streams.ask(bodies())
            beside.append(found.tokens / found.seconds)
            scored += len(answers)
    shares = [100 * (1 - b / a) for a, b in zip(alone, beside, strict=True)]
    lost = statistics.median(shares)
    bench.row("scoring", f"{STREAMS} streams alone", statistics.median(alone), "tok/s")
    bench.row("scoring", f"{STREAMS} streams beside a scorer", statistics.median(beside), "tok/s",
              note=f"{scored} texts of {SCORED_TOKENS} tokens scored meanwhile")  # fmt: skip
    bench.row("scoring", "speed lost to the scorer", lost, "%", aim=("≤ 10", lost <= 10),
              note=f"{min(shares):.0f} to {max(shares):.0f}, {len(shares)} rounds")  # fmt: skip


@contextmanager
def _scorer(bench: Bench) -> Iterator[list[float]]:
    """A client that scores one text after the other until the end of the block; seconds of each answer."""
    answers: list[float] = []
    ended, troubles = threading.Event(), list[Exception]()

    def run() -> None:
        try:
            while not ended.is_set():
                began = time.perf_counter()
                body = {"model": bench.entry.id, "token_ids": bench.prompt(SCORED_TOKENS)}
                _post(f"{bench.service.url}/v1/inspect/score", body)
                answers.append(time.perf_counter() - began)
        except Exception as error:
            troubles.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield answers
    finally:
        ended.set()
        thread.join()
    if troubles:
        raise BenchError(f"a text was not scored: {troubles[0]}")


def sentences(bench: Bench) -> None:
    """Short sentences a second, in batches and from callers that send one at a time: vectors and sentiment."""
    lines = [line[2:] for name in SENTENCES for line in (ROOT / "bench/tasks" / name).read_text("utf-8").splitlines()]
    encoder = next(entry.id for entry in bench.entries if entry.kind == "embedding")
    url = bench.service.url
    for name, path, field in (("embedded", "/v1/embeddings", "input"),
                              ("classified", "/v1/tasks/sentiment-analysis", "inputs")):  # fmt: skip
        texts = cycle(line for line in lines if line)
        batched, single = [], []
        _post(url + path, {"model": encoder, field: list(islice(texts, BATCH))})
        for _ in range(bench.rounds):
            asked = list(islice(texts, BATCH))
            began = time.perf_counter()
            _post(url + path, {"model": encoder, field: asked})
            batched.append(BATCH / (time.perf_counter() - began))
            asked = list(islice(texts, CALLERS * CALLS))
            single.append(asyncio.run(_one_at_a_time(url + path, [{"model": encoder, field: each} for each in asked])))
        rate = statistics.median(batched)
        bench.row("sentences", f"{name}, {BATCH} a request", rate, "1/s", aim=("≥ 300", rate >= 300))
        rate = statistics.median(single)
        bench.row("sentences", f"{name}, {CALLERS} callers one at a time", rate, "1/s", aim=("≥ 80", rate >= 80))


async def _one_at_a_time(url: str, bodies: Sequence[dict[str, Any]]) -> float:
    """Answers a second of CALLERS callers, each of which sends its next request after its last answer."""
    left = iter(bodies)

    async def caller(session: aiohttp.ClientSession) -> None:
        for body in left:
            async with session.post(url, json=body) as answer:
                if answer.status != 200:
                    raise BenchError(await answer.text())
                await answer.read()

    async with aiohttp.ClientSession() as session:
        began = time.perf_counter()
        await asyncio.gather(*(caller(session) for _ in range(CALLERS)))
        return len(bodies) / (time.perf_counter() - began)


SECTIONS: dict[str, Callable[[Bench], None]] = {"three": three, "scoring": scoring, "sentences": sentences}


def _post(url: str, body: dict[str, Any]) -> Any:
    """The answer's JSON. Raises OSError for any status but 200."""
    request = urllib.request.Request(url, json.dumps(body).encode(), {"content-type": "application/json"})  # noqa: S310 - loopback
    with urllib.request.urlopen(request, timeout=120) as answer:  # noqa: S310 - loopback
        return json.load(answer)
