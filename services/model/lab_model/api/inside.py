"""POST /v1/inspect/logit-lens, /attention, /memory, /device: layers, attention, memory and device of a causal model.

The first two use a second copy of the model, which the server hands in as `inside` of the ASGI scope. Knows token ids
and numbers. Does not load the copy.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import psutil
import torch
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from ..errors import ApiError, BadRequestError, BusyError, UnavailableError
from ..runners.device import check_device, measure
from ..text.pieces import join
from .generator import EngineClient
from .http.record import Record
from .http.service import Json, until_disconnect
from .inputs import check_model
from .inspect import named, source_ids, source_name, token_of
from .wire.answers import usage
from .wire.inspect import (
    MOST_INSIDE_TOKENS,
    AttentionRequest,
    DeviceRequest,
    LensRequest,
    MemoryRequest,
)

log = logging.getLogger(__name__)
Object = dict[str, Any]
LOAD_SECONDS = 180  # the first call loads the copy


async def logit_lens(model: EngineClient, http: HttpRequest, request: LensRequest) -> Response:
    ids = await _ids(model, http, request)
    layers = await _ask(http, "logit_lens", ids=ids, top=request.top or 3)
    shown = [
        [[named(model.text, token) | {"probability": chance} for token, chance in place] for place in layer]
        for layer in layers
    ]
    return Json(_frame(model, ids) | {"layers": shown})


async def attention(model: EngineClient, http: HttpRequest, request: AttentionRequest) -> Response:
    ids = await _ids(model, http, request)
    layer = request.layer or 0
    count, heads = await _ask(http, "attention", ids=ids, layer=layer)
    return Json(_frame(model, ids) | {"layer": layer, "layers": count, "heads": heads})


async def memory(model: EngineClient, http: HttpRequest, request: MemoryRequest) -> Response:
    """Memory of the model, by formula and as measured in this process."""
    check_model(http, request.model or model.name, model.name)
    found = model.engine.memory()
    tokens = request.tokens or found.kv_tokens
    stats = model.engine.stats()
    process = psutil.Process().memory_info()
    parts = {
        "weights": {"formula": "bytes of all weights as the engine stores them", "measured_bytes": found.weights},
        "kv_cache": {
            "formula": f"keys and values x layers x key heads x width x bytes = {found.token}, x {tokens} tokens",
            "bytes_per_token": found.token,
            "tokens": tokens,
            "predicted_bytes": found.token * tokens,
            "measured_bytes": found.pool,
            "measured_tokens": found.kv_tokens,
            "used_share": stats.pages_used / stats.pages_total,
        },
        "activations": {
            "formula": f"logits: {stats.running or 1} running requests x {found.vocab} tokens x 4 bytes",
            "predicted_bytes": (stats.running or 1) * found.vocab * 4,
        },
        "process": {
            "formula": "resident memory of the model's process, including libraries",
            "measured_bytes": process.rss,
        },
    }
    return Json({"model": model.name, **parts, "usage": usage(0, 0, 0)})


async def device(model: EngineClient, http: HttpRequest, request: DeviceRequest) -> Response:
    """The lecture's check of the GPU, in the model's process, and measured speeds."""
    check_model(http, request.model or model.name, model.name)
    found = check_device()
    used = torch.device("cuda" if found["cuda_available"] else "cpu")
    threads = torch.get_num_threads()
    measured = await asyncio.to_thread(measure, used, threads)
    answer = {"model": model.name, "device": str(used), "threads": threads, **found, **measured}
    return Json(answer | {"usage": usage(0, 0, 0)})


async def _ids(model: EngineClient, http: HttpRequest, request: LensRequest | AttentionRequest) -> list[int]:
    check_model(http, request.model or model.name, model.name)
    ids = await source_ids(model, request, None)
    if len(ids) > MOST_INSIDE_TOKENS:
        name = source_name(request)
        raise BadRequestError(
            f"'{name}' has {len(ids)} tokens; this endpoint allows at most {MOST_INSIDE_TOKENS}.",
            param=name,
            code="context_length_exceeded",
        )
    return ids


async def _ask(http: HttpRequest, method: str, **arguments: Any) -> Any:
    """The copy's answer. Raises UnavailableError if there is no copy or no memory for it, BusyError if too many
    requests wait."""
    inside = http.scope.get("inside")
    if inside is None:
        raise UnavailableError("This server has no second copy of the model, which this endpoint needs.")
    record: Record = http.scope["record"]
    record.prompt_tokens = len(arguments["ids"])
    try:
        async with asyncio.timeout(LOAD_SECONDS):
            return await until_disconnect(http.receive, inside(method, **arguments))
    except ApiError:
        raise
    except TimeoutError:
        raise UnavailableError(f"The model's copy was not loaded within {LOAD_SECONDS} s.") from None
    except Exception as error:
        cause = str(getattr(error, "cause", None) or error)
        if "layers 0 to" in cause:
            raise BadRequestError(cause[cause.index("the model has") :].splitlines()[0], param="layer") from None
        if type(error).__name__ == "BackPressureError":
            raise BusyError("Too many requests wait for the model's copy.", 2) from None
        if type(error).__name__ == "ClientGoneError":
            raise
        log.exception("the model's copy failed")
        raise UnavailableError(f"The model's copy does not answer: {type(error).__name__}.") from None


def _frame(model: EngineClient, ids: list[int]) -> Object:
    pieces = join(model.text, ids)[1]
    return {"model": model.name, "tokens": [token_of(piece) for piece in pieces], "usage": usage(len(ids), 0, 0)}
