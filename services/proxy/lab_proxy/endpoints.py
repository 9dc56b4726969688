"""The endpoints that answer with a model, one row each, and the paths with rules of their own. Data only.

To add an endpoint, add its row to ENDPOINTS. If no handler of the executor fits, add one there too.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

CHAT, COMPLETIONS, EMBEDDINGS = "/v1/chat/completions", "/v1/completions", "/v1/embeddings"
RESPONSES = "/v1/responses"

Fields = Mapping[str, Any]  # request field -> default value


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Properties of one endpoint."""

    path: str
    operation: str  # `gen_ai.operation.name` of the trace
    handler: Literal["completions", "embeddings", "tasks", "responses"]  # name of the executor's handler
    kinds: frozenset[str]  # kinds of the model service's models that it accepts
    cacheable: bool = True
    batchable: bool = True  # a batch may name it
    generates: bool = True  # the answer's length is not known before, so tokens are reserved for it
    fallback: Literal["generator", "same_model", "responses"] = "generator"  # who may answer instead: see failover
    billing: Literal["call", "answer"] = "call"  # a charge for each upstream call, or one for each answer
    per_input: bool = False  # the cache keeps one entry for each input, so an answer may mix cached and fetched ones
    max_inputs: int | None = None  # inputs of one request
    input_field: str = "input"  # the field that holds them
    default_kinds: tuple[str, ...] = ()  # kinds of the model that answers if `model` is left out; (): it is required
    defaults: Mapping[str, Fields] = field(default_factory=dict)  # table -> fields; `openai` or `lab`


GENERATORS = frozenset({"chat", "base"})

_INSPECT = "/v1/inspect/"


def _inspect(name: str, *kinds: str, generates: bool = False) -> Endpoint:
    """An endpoint that inspects a model: its answers are metered and passed on, not cached."""
    return Endpoint(
        _INSPECT + name,
        operation="inspect",
        handler="embeddings",  # this handler passes on answers that may not be cached
        cacheable=False,
        batchable=False,
        kinds=frozenset(kinds),
        generates=generates,
        fallback="same_model",
        default_kinds=kinds,
    )


def _task(name: str, *kinds: str, generates: bool = False) -> Endpoint:
    """A task of the lecture: its results are cached by input."""
    return Endpoint(
        f"/v1/tasks/{name}",
        operation=name,
        handler="tasks",
        batchable=False,
        kinds=frozenset(kinds),
        generates=generates,
        fallback="same_model",
        per_input=True,
        max_inputs=2048,
        input_field="inputs",
        default_kinds=kinds,
    )


_COMMON: Fields = {"n": 1, "temperature": 1, "top_p": 1, "presence_penalty": 0, "frequency_penalty": 0}
_LAB: Fields = {"top_k": 0, "min_p": 0, "repetition_penalty": 1}
_CHAT: Fields = {
    **_COMMON,
    "logprobs": False,
    "logit_bias": {},
    "response_format": {"type": "text"},
    "service_tier": "auto",
    "parallel_tool_calls": True,
    "modalities": ["text"],
}
_COMPLETIONS: Fields = {**_COMMON, "best_of": 1, "echo": False, "logit_bias": {}}
_EMBEDDINGS: Fields = {"encoding_format": "float"}

ENDPOINTS: Mapping[str, Endpoint] = {
    row.path: row
    for row in (
        Endpoint(
            CHAT,
            operation="chat",
            handler="completions",
            kinds=GENERATORS,
            defaults={"openai": _CHAT, "lab": {**_CHAT, "top_logprobs": 0, **_LAB}},
        ),
        Endpoint(
            COMPLETIONS,
            operation="text_completion",
            handler="completions",
            kinds=GENERATORS,
            defaults={"openai": {**_COMPLETIONS, "max_tokens": 16}, "lab": {**_COMPLETIONS, "max_tokens": 16, **_LAB}},
        ),
        Endpoint(
            EMBEDDINGS,
            operation="embeddings",
            handler="embeddings",
            kinds=frozenset({"embedding"}),
            generates=False,
            fallback="same_model",  # vectors of two models cannot be compared
            per_input=True,
            max_inputs=2048,  # OpenAI's limit
            defaults={"openai": _EMBEDDINGS, "lab": _EMBEDDINGS},
        ),
        Endpoint(
            RESPONSES,
            operation="chat",
            handler="responses",
            cacheable=False,
            batchable=False,
            kinds=GENERATORS,
            fallback="responses",
            billing="answer",  # its usage comes with its last event
        ),
        _task("text-generation", "base", "chat", generates=True),
        _task("sentiment-analysis", "classifier", "embedding"),
        _task("zero-shot-classification", "embedding"),
        _task("question-answering", "reader", "chat", "base"),
        _inspect("tokenize", "chat", "base", "embedding", "classifier", "reader"),
        _inspect("detokenize", "chat", "base", "embedding", "classifier", "reader"),
        _inspect("next-token", "chat", "base"),
        _inspect("score", "chat", "base"),
        _inspect("generate-steps", "chat", "base", generates=True),
        *(_inspect(name, "chat", "base") for name in ("logit-lens", "attention", "memory", "device")),
    )
}

CACHEABLE = tuple(path for path, row in ENDPOINTS.items() if row.cacheable)
BATCHABLE = tuple(path for path, row in ENDPOINTS.items() if row.batchable)


def default_tables() -> dict[str, dict[str, Fields]]:
    """The tables of defaults that routes may name: table -> path -> field -> value."""
    tables: dict[str, dict[str, Fields]] = {}
    for row in ENDPOINTS.values():
        for table, fields in row.defaults.items():
            tables.setdefault(table, {})[row.path] = fields
    return tables


# ---- paths with rules of their own

FLUSH = "/cache/flush"
KEYED = ("/v1/", "/usage", "/cache/")  # prefixes of the paths that need a virtual key, where keys are required
MONITORED = frozenset({"/metrics", "/status"})  # need one too, unless PROXY_METRICS_PUBLIC is set
ADMIN_TOO = MONITORED | {FLUSH}  # of the paths that need a virtual key: the admin key opens them too
OPERATE_MODELS = "/admin/models/"  # open without a key where no keys are required and only this machine calls
OPERATOR = "/admin/"  # prefix of the operator's pages: no web page may call them, whatever its origin
UNCHECKED = frozenset({"/health", "/ready"})  # probes call them by IP address; they reveal nothing
QUIET = frozenset({"/health", "/ready", "/metrics"})  # called every few seconds: logged only when they fail
OTHER_ROUTES = frozenset({"/status", "/v1/models", "/v1/files", "/v1/batches"})  # values of the metrics' label `route`
ALWAYS_SERVED = QUIET | {"/status"}  # also while the proxy drains
