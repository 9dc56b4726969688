"""The limits page: limits of a key, a burst with the client's back-off, the price table, and what saves cost.

Knows the formats of /usage and of OpenAI's rate-limit headers. Does not draw.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from .answer import Fault
from .prices import Price
from .proxy import Reply

MAX_BURST = 60
MAX_TRIES = 4
LONGEST_WAIT = 30.0  # seconds between two tries; a longer Retry-After ends the call
# A realistic mix: some questions repeat, some are easy. (question, whether it is easy)
QUESTIONS: tuple[tuple[str, bool], ...] = (
    ("What is the capital of France?", True),
    ("What is photosynthesis?", False),
    ("What is the capital of France?", True),
    ("Name three primary colors.", True),
    ("Explain what a transformer is in two sentences.", False),
    ("What is the capital of France?", True),
    ("What is photosynthesis?", False),
    ("Name three primary colors.", True),
    ("Who wrote Hamlet?", True),
    ("What is the capital of France?", True),
    ("Write a short poem about the sea.", False),
    ("Who wrote Hamlet?", True),
)
LONG_PROMPT = (
    "You are a very helpful, very polite and very knowledgeable assistant. Always read the question carefully, think "
    "about what the user wants to know, and then answer in clear, simple and friendly English. Do not use more than "
    "two sentences. Do not add greetings, do not repeat the question, and do not talk about yourself. If you do not "
    "know the answer, say so."
)
SHORT_PROMPT = "Answer in at most two sentences."
MAX_TOKENS = 40
BATCH_SHARE = 0.5  # share of the price that a batch costs, at OpenAI and in this proxy


# ---- what is left


@dataclass(frozen=True)
class Gauge:
    """A limit and what is left of it. `name`: key of a text below limits.gauge."""

    name: str
    limit: float
    left: float
    reset: str = ""

    @property
    def share(self) -> float:
        """Share of the limit that is left, from 0 to 1."""
        return max(0.0, min(1.0, self.left / self.limit)) if self.limit else 0.0


def gauges(headers: Mapping[str, str]) -> list[Gauge]:
    """Requests and tokens per minute, from the headers of an answer; empty for a key without limits."""
    found = []
    for name in ("requests", "tokens"):
        try:
            limit = float(headers[f"x-ratelimit-limit-{name}"])
            left = float(headers[f"x-ratelimit-remaining-{name}"])
        except (KeyError, ValueError):
            continue
        found.append(Gauge(name, limit, left, headers.get(f"x-ratelimit-reset-{name}", "")))
    return found


def budgets(usage: Mapping[str, Any]) -> list[Gauge]:
    """Dollars per day and in total, from the body of /usage; budgets without a limit are left out."""
    found = []
    budget = usage.get("budget_usd")
    for name, each in budget.items() if isinstance(budget, Mapping) else ():
        if isinstance(each, Mapping) and isinstance(each.get("limit"), int | float):
            left = each.get("left")
            found.append(Gauge(str(name), float(each["limit"]), float(left if isinstance(left, int | float) else 0)))
    return found


# ---- a burst


@dataclass(frozen=True)
class Try:
    """One request of a call: seconds since the burst began, and its outcome (`ok`, or a kind of fault)."""

    call: int
    number: int
    begin: float
    end: float
    outcome: str


def burst(count: int, send: Callable[[], Reply | Fault], sleep: Callable[[float], None] = time.sleep) -> list[Try]:
    """Make `count` calls at once. As a good client does, each waits after a 429 for the seconds of Retry-After and
    tries again, with at most MAX_TRIES requests."""
    began = time.monotonic()

    def call(number: int) -> list[Try]:
        tries: list[Try] = []
        while len(tries) < MAX_TRIES:
            begin = time.monotonic()
            reply = send()
            outcome = reply.kind if isinstance(reply, Fault) else "ok"
            tries.append(Try(number, len(tries) + 1, begin - began, time.monotonic() - began, outcome))
            if not isinstance(reply, Fault) or reply.status != 429:
                break
            wait = seconds(reply.retry_after)
            wait = 2.0 ** len(tries) / 2 if wait is None else wait
            if wait > LONGEST_WAIT:
                break
            if len(tries) < MAX_TRIES:
                sleep(wait)
        return tries

    with ThreadPoolExecutor(count, thread_name_prefix="burst") as pool:
        return [each for tries in pool.map(call, range(1, count + 1)) for each in tries]


def seconds(header: str | None) -> float | None:
    """A Retry-After header in seconds; None for a date or a missing header."""
    return float(header) if header and re.fullmatch(r"\d+(\.\d+)?", header) else None


# ---- what saves cost


@dataclass(frozen=True)
class Asked:
    """One question of the set. `prompt`, `completion`: tokens measured; `shorter_prompt`: prompt tokens with the short
    system prompt."""

    easy: bool
    hit: bool
    prompt: int
    completion: int
    shorter_prompt: int


def request(model: str, question: str, prompt: str, nonce: str) -> dict[str, Any]:
    """A request of the set. `nonce` makes the set a new one, so that only its own repetitions are hits."""
    messages = [{"role": "system", "content": f"{prompt} [{nonce}]"}, {"role": "user", "content": question}]
    return {"model": model, "messages": messages, "temperature": 0, "max_tokens": MAX_TOKENS}


def savings(asked: Sequence[Asked], large: Price, small: Price) -> list[tuple[str, float]]:
    """(name of a text, dollars of 1,000 such sets): without a measure, with each measure alone, with all."""

    def total(*, cache: bool = False, batch: bool = False, routing: bool = False, shorter: bool = False) -> float:
        cost = 0.0
        for each in asked:
            if cache and each.hit:
                continue
            price = small if routing and each.easy else large
            cost += price.cost(each.shorter_prompt if shorter else each.prompt, each.completion)
        return 1000 * cost * (BATCH_SHARE if batch else 1)

    return [
        ("nothing", total()), ("shorter", total(shorter=True)), ("batch", total(batch=True)),
        ("routing", total(routing=True)), ("cache", total(cache=True)),
        ("all", total(cache=True, batch=True, routing=True, shorter=True)),
    ]  # fmt: skip
