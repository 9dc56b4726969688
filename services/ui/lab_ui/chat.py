"""The conversation: the chat models, turns with several answers, the request, the figures below an answer.

Knows the proxy's model list and Answer. Knows nothing of HTTP and does not draw; app_pages/chat.py does.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .answer import Answer
from .formats import dollars, milliseconds, number
from .prices import price_of
from .texts import Texts

# English on the Korean page too, because the embedded model's Korean is poor.
EXAMPLES = (
    "What is the capital of France?",
    "Name three primary colors.",
    "What is photosynthesis?",
    "Write a short poem about the sea.",
)
MAX_QUESTION = 200_000  # characters: the model reports too many tokens, while a full field drops text without a word
DEFAULT_CONTEXT = 8192  # tokens, for a model whose context length the proxy does not list
MAX_COLUMNS = 4
ALTERNATIVES = 5  # most likely tokens to request at each place, from the lab's own models
COLUMN_NAMES = "ABCD"
# A running answer's phase, as the proxy reports it -> its text.
PHASES = {"queue": "chat.queued", "prefill": "chat.prefill", "decode": "chat.writing"}
HANGUL = re.compile("[\uac00-\ud7a3\u3131-\u318e]")


@dataclass
class Turn:
    """A question and its answers. `answers`: for each column its siblings, which come from asking again or continuing.
    `shown`: for each column the index of the sibling that is shown."""

    question: str
    answers: list[list[Answer]]
    shown: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.shown = self.shown or [len(siblings) - 1 for siblings in self.answers]

    def answer(self, column: int) -> Answer | None:
        """The answer that is shown in a column; None if the turn has none there."""
        if column >= len(self.answers) or not self.answers[column]:
            return None
        return self.answers[column][self.shown[column]]

    def add(self, column: int, answer: Answer) -> None:
        """Append a sibling and show it."""
        self.answers[column].append(answer)
        self.shown[column] = len(self.answers[column]) - 1

    def move(self, column: int, step: int) -> None:
        """Show the previous (step -1) or the next sibling (step 1)."""
        self.shown[column] = max(0, min(len(self.answers[column]) - 1, self.shown[column] + step))

    @property
    def every(self) -> list[Answer]:
        return [answer for siblings in self.answers for answer in siblings]

    def stop(self) -> None:
        for answer in self.every:
            answer.stop()


def chat_models(listing: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Chat models by id, from the body of /v1/models. Aliases come last, with the properties of their models.

    `local`: whether the lab's model service runs it, and so supports `logprobs`. `languages`: None if not listed.
    """
    entries = {
        str(entry["id"]): entry
        for entry in listing.get("data") or []
        if isinstance(entry, Mapping) and isinstance(entry.get("id"), str)
    }
    chat = {}
    for name, entry in entries.items():
        model = entries.get(str(entry.get("alias_of")), entry)
        if model.get("kind", "chat") == "chat" and model.get("state", "ready") in {"ready", "unloaded"}:
            chat[name] = {
                "alias_of": entry.get("alias_of"), "context": model.get("context"), "local": "kind" in model,
                "languages": model.get("languages") if isinstance(model.get("languages"), list) else None,
            }  # fmt: skip
    return dict(sorted(chat.items(), key=lambda item: item[1]["alias_of"] is not None))


def model_label(name: str, models: Mapping[str, Mapping[str, Any]], texts: Texts) -> str:
    """The model's id; for an alias also the id of its model."""
    target = models.get(name, {}).get("alias_of")
    return texts("settings.alias", id=name, target=target) if target else name


def speaks_korean(model: Mapping[str, Any]) -> bool:
    """False only if the model's list of languages is known and has no Korean."""
    languages = model.get("languages")
    return not languages or any(str(each).lower().startswith(("ko", "multi")) for each in languages)


def request(turns: Sequence[Turn], question: str, sampling: Mapping[str, Any], column: int = 0) -> dict[str, Any]:
    """The body of the chat completion. `sampling`: `model`, `system`, `temperature`, `top_p`, `max_tokens`, `logprobs`.

    Earlier questions whose answer has no text are left out.
    """
    messages = [{"role": "system", "content": sampling["system"]}] if sampling["system"].strip() else []
    for turn in turns:
        answer = turn.answer(column) or turn.answer(0)
        if answer is not None and answer.text:
            messages.append({"role": "user", "content": turn.question})
            messages.append({"role": "assistant", "content": answer.text})
    messages.append({"role": "user", "content": question})
    body = {
        "model": sampling["model"],
        "messages": messages,
        "temperature": sampling["temperature"],
        "top_p": sampling["top_p"],
        "max_tokens": sampling["max_tokens"],
    }
    return body | ({"logprobs": True, "top_logprobs": ALTERNATIVES} if sampling.get("logprobs") else {})


def continuation(request: Mapping[str, Any], prompt_ids: Sequence[int], begun_ids: Sequence[int]) -> dict[str, Any]:
    """The body of the completion that continues an answer. Prompt and answer are token ids, because text could be
    tokenized differently."""
    names = ("model", "temperature", "top_p")
    left = max(1, int(request["max_tokens"]) - len(begun_ids))
    body = {name: request[name] for name in names if name in request}
    return body | {"prompt": [*prompt_ids, *begun_ids], "max_tokens": left, "logprobs": ALTERNATIVES}


def state_text(answer: Answer, texts: Texts) -> str:
    key = f"cache_state.{answer.cache}"
    return texts(key if key in texts else "cache_state.other") if answer.cache else ""


def cost_text(
    answer: Answer, model: Mapping[str, Any] | None, prices: Callable[[], Mapping[str, Any]], texts: Texts
) -> str:
    """What an answer cost; empty where it is not known.

    `model`: of chat_models. `prices`: gives the body of /v1/prices; called only where money may be due.
    """
    if model is not None and model["local"]:
        return texts("figures.free")
    if answer.cache in {"hit", "stale", "collapsed"}:  # no call of its own to an upstream
        return "$0"
    if answer.prompt_tokens is None or answer.completion_tokens is None:
        return ""
    name = str((model or {}).get("alias_of") or answer.request.get("model", ""))
    price = price_of(prices(), name)
    if price is None:
        return texts("figures.no_price")
    return f"${dollars(price.cost(answer.prompt_tokens, answer.completion_tokens, answer.cached_tokens or 0))}"


def figures(answer: Answer, texts: Texts) -> dict[str, str]:
    """Label -> value for the strip below an answer; unknown figures are left out."""
    known = {}
    if answer.ttft is not None:
        known["TTFT"] = f"{milliseconds(answer.ttft)} ms"
    if answer.tokens_per_second is not None:
        known[texts("figures.speed")] = number(answer.tokens_per_second, 1)
    if answer.completion_tokens is not None:
        known[texts("figures.tokens")] = f"{answer.prompt_tokens or 0} + {answer.completion_tokens}"
    if answer.cached_tokens:
        known[texts("figures.cached_tokens")] = number(answer.cached_tokens)
    if state := state_text(answer, texts):
        known[state] = ""
    if answer.finish_reason:
        known[texts("figures.finish")] = answer.finish_reason
    known[texts("figures.request_id")] = answer.request_id[:128]
    return known
