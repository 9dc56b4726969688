"""The ASGI application of one loaded model: a table from path to handler.

Knows only this table; models/kinds says which kind of model has which paths. Ray Serve, or any ASGI server, runs it.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping
from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.types import ASGIApp

from . import inside, inspect, tasks
from .chat import chat_completions
from .completions import completions
from .embeddings import EncoderClient, embeddings
from .generator import EngineClient
from .http.service import Endpoint, HttpService, read_json
from .wire.endpoints import REQUESTS
from .wire.requests import parse

# (model, request, its body parsed by REQUESTS) -> response; the class of the model depends on the path's kinds.
Handler = Callable[[Any, HttpRequest, Any], Awaitable[Response]]

HANDLERS: Mapping[str, Handler] = {
    "/v1/chat/completions": chat_completions,
    "/v1/completions": completions,
    "/v1/embeddings": embeddings,
    "/v1/inspect/tokenize": inspect.tokenize_text,
    "/v1/inspect/detokenize": inspect.detokenize,
    "/v1/inspect/next-token": inspect.next_tokens,
    "/v1/inspect/score": inspect.score_text,
    "/v1/inspect/generate-steps": inspect.generate_steps,
    "/v1/inspect/logit-lens": inside.logit_lens,
    "/v1/inspect/attention": inside.attention,
    "/v1/inspect/memory": inside.memory,
    "/v1/inspect/device": inside.device,
    "/v1/tasks/text-generation": tasks.text_generation,
    "/v1/tasks/sentiment-analysis": tasks.sentiment_analysis,
    "/v1/tasks/zero-shot-classification": tasks.zero_shot_classification,
    "/v1/tasks/question-answering": tasks.question_answering,
}


def create_app(
    model: EngineClient | EncoderClient, paths: Iterable[str], *, max_body_bytes: int, hosts: Collection[str] = ()
) -> ASGIApp:
    def endpoint(path: str) -> Endpoint:
        handler, shape = HANDLERS[path], REQUESTS[path]

        async def respond(http: HttpRequest) -> Response:
            return await handler(model, http, parse(shape, await read_json(http, max_body_bytes)))

        return respond

    posts = {path: endpoint(path) for path in paths}
    return HttpService(posts, name=model.name, revision=model.revision, hosts=hosts)
