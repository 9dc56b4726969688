"""Workloads: lists of requests made from a seed, as files with a SHA-256. Runs of the same file can be compared.

The model's name and the salt are inserted when a request is sent, so that the file is the same for every run.
"""

from __future__ import annotations

import hashlib
import math
import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import orjson

from ..shape import Shape
from .prompts import Zipf, question, sentence

SALT = "@salt@"  # stands for the run's salt in every text
CHAT, EMBEDDINGS = "/v1/chat/completions", "/v1/embeddings"
ZERO_SHOT, SENTIMENT = "/v1/tasks/zero-shot-classification", "/v1/tasks/sentiment-analysis"
OVERSIZED = 64 * 2**20  # bytes of a body that no service accepts


@dataclass(frozen=True)
class Item:
    """One request. One user sends the items of a group in order, each after the answer to the one before."""

    number: int
    question: int  # items with the same question have the same body
    path: str
    body: dict[str, Any]
    group: int
    at: float | None = None  # seconds after the start, if the workload has a schedule
    stop_after: int | None = None  # close the stream after this many events with content
    pause: float = 0.0  # seconds that a slow reader waits after each event
    raw: str | None = None  # sent instead of the body, one byte for each character: an invalid body
    repeat: int = 1  # number of repetitions of `raw`
    refused: bool = False  # whether the right answer is a status from 400 to 499

    def payload(self, salt: str, model: str | None) -> bytes:
        """The bytes of the body."""
        if self.raw is not None:
            return self.raw.encode("latin-1") * self.repeat
        body = self.body if model is None else {"model": model, **self.body}
        return orjson.dumps(body).replace(SALT.encode(), salt.encode())

    def line(self) -> bytes:
        """One line of the file."""
        fields = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return orjson.dumps(fields)


@dataclass(frozen=True)
class Workload:
    """`cold`: no answer may come from a cache. `once`: each question costs one upstream call, however often it is sent.

    `perfect`: hits of an unlimited cache that is cold at first, one for each item whose question was sent before.
    """

    name: str
    items: tuple[Item, ...]
    about: str
    cold: bool = False
    once: bool = False
    zipf: Zipf | None = None
    kind: str = "chat"  # of the model that answers
    prefix_groups: int = 0  # item n has the prefix of group n mod prefix_groups; 0: no shared prefixes

    @cached_property
    def sha256(self) -> str:
        digest = hashlib.sha256()
        for item in self.items:
            digest.update(item.line() + b"\n")
        return digest.hexdigest()

    def write(self, path: Any) -> None:
        path.write_bytes(b"".join(item.line() + b"\n" for item in self.items))

    @cached_property
    def groups(self) -> list[list[Item]]:
        found: dict[int, list[Item]] = {}
        for item in self.items:
            found.setdefault(item.group, []).append(item)
        return list(found.values())

    @cached_property
    def scheduled(self) -> bool:
        """Whether the workload itself has the start time of each request."""
        return any(item.at is not None for item in self.items)


def chat(text: str, shape: Shape, max_tokens: int | None = None, *before: dict[str, str]) -> dict[str, Any]:
    """Body of a streamed chat request at temperature 0."""
    return {
        "messages": [*before, {"role": "user", "content": text}],
        "max_tokens": shape.max_tokens if max_tokens is None else max_tokens,
        "temperature": 0, "stream": True, "stream_options": {"include_usage": True},
    }  # fmt: skip


def asked(shape: Shape, number: int, words: int | None = None) -> str:
    return question(shape.seed, SALT, number, shape.prompt_words if words is None else words, shape.language)


def _plain(name: str, about: str, bodies: Sequence[tuple[int, str, dict[str, Any]]], **more: Any) -> Workload:
    """A workload with one group for each item. `bodies`: (question, path, body)."""
    items = tuple(Item(n, q, path, body, group=n) for n, (q, path, body) in enumerate(bodies))
    return Workload(name, items, about, **more)


def throughput(shape: Shape) -> Workload:
    bodies = [(n, CHAT, chat(asked(shape, n), shape)) for n in range(1, shape.requests + 1)]
    return _plain("throughput", "distinct questions, so that no cache answers", bodies, cold=True)


def lengths(shape: Shape) -> Workload:
    """Log-normal lengths: medians from the settings, sigma 0.7, at most eight times the median."""
    chosen = random.Random(f"lengths/{shape.seed}")  # noqa: S311 reproducible, not secret

    def draw(median: int) -> int:
        return max(1, min(round(chosen.lognormvariate(math.log(median), 0.7)), 8 * median))

    bodies = [(n, CHAT, chat(asked(shape, n, draw(shape.prompt_words)), shape, draw(shape.max_tokens)))
              for n in range(1, shape.requests + 1)]  # fmt: skip
    return _plain("lengths", "distinct questions; log-normal lengths of question and answer", bodies, cold=True)


def caching(shape: Shape) -> Workload:
    zipf = Zipf(shape.prompts, shape.zipf_exponent, shape.seed)
    drawn = [zipf.draw() for _ in range(shape.requests)]
    bodies = {number: chat(asked(shape, number), shape) for number in set(drawn)}
    return _plain("caching", f"{shape.prompts} questions by Zipf's law, s = {shape.zipf_exponent:g}",
                  [(n, CHAT, bodies[n]) for n in drawn], once=True, zipf=zipf)  # fmt: skip


def prefix(shape: Shape) -> Workload:
    """Groups of questions with the same long system message, which the model's prefix cache can keep."""
    bodies = []
    for n in range(shape.requests):
        group = n % shape.prefix_groups
        shared = {"role": "system", "content": asked(shape, 1_000_000 + group, 5 * shape.prompt_words)}
        bodies.append((n, CHAT, chat(asked(shape, n + 1), shape, None, shared)))
    about = f"{shape.prefix_groups} system messages of {5 * shape.prompt_words} words, shared by distinct questions"
    return _plain("prefix", about, bodies, prefix_groups=shape.prefix_groups)


def sessions(shape: Shape) -> Workload:
    """Conversations of four turns. The file also has the answers in between, so that every run sends the same."""
    items = []
    for n in range(shape.requests):
        session, turn = divmod(n, 4)
        before = []
        for earlier in range(turn):
            words = asked(shape, 4 * session + earlier + 1)
            before += [{"role": "user", "content": words},
                       {"role": "assistant", "content": sentence(shape.seed, 4 * session + earlier, 20)}]  # fmt: skip
        items.append(Item(n, n, CHAT, chat(asked(shape, n + 1), shape, None, *before), group=session))
    return Workload("sessions", tuple(items), "conversations of four turns, one user each")


def stampede(shape: Shape) -> Workload:
    """`users` identical requests at once. Single flight makes one upstream call for all."""
    body = chat(asked(shape, 1), shape)
    items = tuple(Item(n, 1, CHAT, body, group=n, at=0.0) for n in range(shape.users))
    return Workload("stampede", items, f"{shape.users} identical requests at the same time", once=True)


def herd(shape: Shape) -> Workload:
    """A stampede, repeated each time the stored answer has expired. Raises ValueError without a TTL."""
    if shape.ttl_seconds is None:
        raise ValueError("LOAD_TTL_SECONDS is not set: `herd` needs the TTL of the target's cache")
    body, waves = chat(asked(shape, 1), shape), 3
    items = tuple(Item(wave * shape.users + n, wave, CHAT, body, group=wave * shape.users + n,
                       at=wave * (shape.ttl_seconds + 2.0))
                  for wave in range(waves) for n in range(shape.users))  # fmt: skip
    about = f"{waves} waves of {shape.users} identical requests, each after the stored answer has expired"
    return Workload("herd", items, about, once=True)


def abandoned(shape: Shape) -> Workload:
    """Every second client closes its stream after three events; the model must stop computing for it."""
    items = tuple(Item(n, n, CHAT, chat(asked(shape, n + 1), shape), group=n, stop_after=3 if n % 2 else None)
                  for n in range(shape.requests))  # fmt: skip
    return Workload("abandoned", items, "distinct questions; every second stream is closed after three events")


def slow(shape: Shape) -> Workload:
    """Every fourth client waits 0.2 s after each event; it must not slow down the others."""
    items = tuple(Item(n, n, CHAT, chat(asked(shape, n + 1), shape), group=n, pause=0.0 if n % 4 else 0.2)
                  for n in range(shape.requests))  # fmt: skip
    return Workload("slow", items, "distinct questions; every fourth client reads slowly", cold=True)


def garbage(shape: Shape) -> Workload:
    """Bodies that must be refused with a status from 400 to 499, between requests that must be answered."""
    wrong: list[dict[str, Any]] = [
        {"raw": "{"}, {"raw": "[]"}, {"raw": ""}, {"raw": "\xff\xfe"}, {"raw": "[" , "repeat": 100_000},
        {"raw": " ", "repeat": OVERSIZED}, {"body": {"messages": 7}}, {"body": {"messages": []}},
        {"body": chat("x", shape) | {"temperature": "hot"}}, {"body": chat("x", shape) | {"max_tokens": -1}},
        {"body": chat("x", shape) | {"no_such_field": 1}},
    ]  # fmt: skip
    items = []
    for n in range(shape.requests):
        if n % 2:
            items.append(Item(n, n, CHAT, **{"body": {}, **wrong[n // 2 % len(wrong)]}, group=n, refused=True))
        else:
            items.append(Item(n, n, CHAT, chat(asked(shape, n + 1), shape), group=n))
    return Workload("garbage", tuple(items), "oversized and invalid bodies between valid ones")


def embeddings(shape: Shape) -> Workload:
    bodies = [(n, EMBEDDINGS, {"input": asked(shape, n)}) for n in range(1, shape.requests + 1)]
    return _plain("embeddings", "vectors of distinct texts", bodies, cold=True, kind="embedding")


def tasks(shape: Shape) -> Workload:
    bodies: list[tuple[int, str, dict[str, Any]]] = []
    for n in range(1, shape.requests + 1):
        text = {"inputs": asked(shape, n, min(shape.prompt_words, 40))}
        labels = {"parameters": {"candidate_labels": ["sports", "food", "politics"]}}
        bodies.append((n, ZERO_SHOT, text | labels) if n % 2 else (n, SENTIMENT, text))
    return _plain("tasks", "sentiment and zero-shot labels of distinct texts", bodies, cold=True, kind="")


WORKLOADS: dict[str, Callable[[Shape], Workload]] = {
    each.__name__: each
    for each in (throughput, caching, lengths, prefix, sessions, stampede, herd, abandoned, slow, garbage, embeddings,
                 tasks)
}  # fmt: skip


def perfect_hits(questions: Sequence[int]) -> int:
    """Hits of an unlimited cache that is cold at first."""
    return len(questions) - len(Counter(questions))
