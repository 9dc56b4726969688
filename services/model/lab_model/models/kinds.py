"""The kinds of models: the paths that each answers, the module that loads it, its default context.

Knows only names. Imports no torch, because processes that only route read this table. A new kind is a row here and a
module in this folder; a new path is an entry here, its function in api/app and its schema in api/wire/endpoints.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from starlette.types import ASGIApp

Kind = Literal["chat", "base", "embedding", "classifier", "reader"]


@dataclass(frozen=True)
class KindSpec:
    """paths: those at which a request may name a model of this kind. loader: the module of this room whose `load`
    returns a `Loaded`. context: default in tokens; 0: as many as the weights allow."""

    paths: tuple[str, ...]
    loader: str
    context: int = 0


GENERATION = ("/v1/chat/completions", "/v1/completions")
TOKENS = ("/v1/inspect/tokenize", "/v1/inspect/detokenize")
SCORES = tuple(
    f"/v1/inspect/{name}"
    for name in ("next-token", "score", "generate-steps", "logit-lens", "attention", "memory", "device")
)
CONTINUATION, SENTIMENT = "/v1/tasks/text-generation", "/v1/tasks/sentiment-analysis"
ZERO_SHOT, QUESTIONS = "/v1/tasks/zero-shot-classification", "/v1/tasks/question-answering"
CAUSAL = (*GENERATION, *TOKENS, *SCORES, CONTINUATION)
KINDS: Mapping[Kind, KindSpec] = {
    "chat": KindSpec((*CAUSAL, QUESTIONS), "causal"),
    "base": KindSpec((*CAUSAL, QUESTIONS), "causal"),
    "embedding": KindSpec(("/v1/embeddings", *TOKENS, SENTIMENT, ZERO_SHOT), "encoder", context=512),
    "classifier": KindSpec((*TOKENS, SENTIMENT), "classifier", context=512),
    "reader": KindSpec((*TOKENS, QUESTIONS), "classifier", context=512),
}
PATHS = tuple(dict.fromkeys(path for spec in KINDS.values() for path in spec.paths))
# Paths whose requests may omit `model`, and the kinds that then answer, in this order.
DEFAULT_KINDS: Mapping[str, tuple[Kind, ...]] = {
    **dict.fromkeys((*TOKENS, *SCORES), ("chat", "base")),
    CONTINUATION: ("base", "chat"),
    SENTIMENT: ("classifier", "embedding"),
    ZERO_SHOT: ("embedding",),
    QUESTIONS: ("reader", "chat", "base"),
}


def default_model(path: str, kinds: Mapping[str, Kind]) -> str | None:
    """The model that answers a request without `model`, None if the path requires one. kinds: kind by model id, in
    the catalogue's order."""
    return next((id_ for kind in DEFAULT_KINDS.get(path, ()) for id_, each in kinds.items() if each == kind), None)


class Loaded(NamedTuple):
    """A model in memory: its ASGI application, what `/ready` shows of it, and whether it still works."""

    app: ASGIApp
    info: dict[str, Any]
    is_alive: Callable[[], bool]
