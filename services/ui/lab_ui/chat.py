"""The conversation: which models can be asked, the request, the figures and the fault of an answer.

Knows the proxy's model list and what an Answer holds. Knows nothing of HTTP and does not draw: app_pages/chat.py does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .answer import Answer
from .formats import number
from .texts import Texts
from .untrusted import span

# English in both languages: the embedded model's Korean is poor.
EXAMPLES = (
    "What is the capital of France?",
    "Name three primary colors.",
    "What is photosynthesis?",
    "Write a short poem about the sea.",
)
MAX_QUESTION = 32_000  # characters
DEFAULT_CONTEXT = 8192  # tokens, for a model whose context the proxy does not list


@dataclass(frozen=True)
class Turn:
    """A question and its answer."""

    question: str
    answer: Answer


def chat_models(listing: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Chat models by id, from the body of /v1/models. Aliases stand last, with kind and context of their models."""
    entries = {
        str(entry["id"]): entry for entry in listing.get("data", []) if isinstance(entry, dict) and "id" in entry
    }
    chat = {}
    for name, entry in entries.items():
        model = entries.get(str(entry.get("alias_of")), entry)
        if model.get("kind", "chat") == "chat":  # other upstreams list no kind
            chat[name] = {"alias_of": entry.get("alias_of"), "context": model.get("context")}
    return dict(sorted(chat.items(), key=lambda item: item[1]["alias_of"] is not None))


def model_label(name: str, models: Mapping[str, Mapping[str, Any]], texts: Texts) -> str:
    """The model's id; of an alias also its model's."""
    target = models[name]["alias_of"]
    return texts("settings.alias", id=name, target=target) if target else name


def request(turns: Sequence[Turn], question: str, sampling: Mapping[str, Any]) -> dict[str, Any]:
    """The body of the chat completion. `sampling`: `model`, `system`, `temperature`, `top_p`, `max_tokens`.

    Questions whose answer has no text are left out.
    """
    messages = [{"role": "system", "content": sampling["system"]}] if sampling["system"].strip() else []
    for turn in turns:
        if turn.answer.text:
            messages.append({"role": "user", "content": turn.question})
            messages.append({"role": "assistant", "content": turn.answer.text})
    messages.append({"role": "user", "content": question})
    return {
        "model": sampling["model"],
        "messages": messages,
        "temperature": sampling["temperature"],
        "top_p": sampling["top_p"],
        "max_tokens": sampling["max_tokens"],
    }


def figures(answer: Answer, texts: Texts) -> str:
    """One line of Markdown: TTFT, tokens/s, tokens, cache, request id, as far as they are known."""
    known = []
    if answer.ttft is not None:
        known.append(texts("figures.ttft", ms=number(answer.ttft * 1000)))
    if answer.tokens_per_second is not None:
        known.append(texts("figures.speed", speed=number(answer.tokens_per_second, 1)))
    if answer.completion_tokens is not None:
        prompt, completion = answer.prompt_tokens or 0, answer.completion_tokens
        known.append(texts("figures.tokens", prompt=prompt, completion=completion))
    if answer.cache:
        state = texts(f"cache_state.{answer.cache}" if f"cache_state.{answer.cache}" in texts else "cache_state.other")
        known.append(f":green[:material/bolt: {state}]" if answer.cache == "hit" else state)
    known.append(texts("figures.request_id", id=span(answer.request_id[:128])))
    return " · ".join(known)
