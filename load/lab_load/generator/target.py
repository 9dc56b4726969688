"""Examines the target before a run: whether it answers, which model it has, which versions."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from typing import Any

from ..measures.prefix import SharedPrefix
from ..measures.trial import Target
from ..settings import Settings
from ..workloads.workload import Workload

SECONDS = 10  # timeout of each request here
MOST_GROUPS = 64  # at most this many groups have their shared tokens counted, with two requests each


class TargetError(Exception):
    """There is no usable target. The message has a remedy."""


def examine(settings: Settings, kind: str = "chat") -> Target:
    """The target of a run. `kind`: of the model that the workload needs; "": the endpoint chooses one. Raises
    TargetError."""
    try:
        listed, server = _get(settings, "/v1/models")
    except urllib.error.HTTPError as error:
        if error.code in {401, 403}:
            raise TargetError(
                f"{settings.host} does not accept the key (status {error.code}): LOAD_API_KEY=sk-lab-…, a virtual key "
                "of the proxy (make keys)"
            ) from None
        raise TargetError(
            f"{settings.host}/v1/models answers {error.code}: check that it is the proxy and ready (make status)"
        ) from None
    except (OSError, ValueError) as error:
        raise TargetError(
            f"nothing answers at {settings.host} ({getattr(error, 'reason', error)}): start the lab first (make lab, "
            "or make start), or name another target: LOAD_HOST=http://…"
        ) from None
    models = listed.get("data") if isinstance(listed, dict) else None
    # A model that LOAD_MODEL names need not be listed: the proxy also serves models of paid upstreams.
    named = settings.model
    if named is None and kind:
        fitting = [
            model["id"]
            for model in models or ()
            if model.get("kind", "chat") == kind
            and not model.get("alias_of")
            and model.get("state", "ready") == "ready"
        ]
        if not fitting:
            raise TargetError(
                f"{settings.host} lists no {kind} model (it may still be loading): see make status, or set LOAD_MODEL"
            )
        named = fitting[0]
    page = next((model.get("page_tokens") for model in models or () if model.get("id") == named), None)
    return Target(settings.host, named, server, _status(settings), page if isinstance(page, int) else None)


def shared_prefix(settings: Settings, target: Target, workload: Workload, salt: str) -> SharedPrefix | None:
    """Number of tokens that the prompts of each group share, by the target's tokenizer; None if it cannot be asked."""
    groups = workload.prefix_groups
    if not groups or groups > MOST_GROUPS or target.page_tokens is None:
        return None
    found: dict[int, int] = {}
    try:
        for group in range(min(groups, len(workload.items) - groups)):
            prompts = []
            for item in (workload.items[group], workload.items[group + groups]):
                messages = json.loads(item.payload(salt, target.model))["messages"]
                body = json.dumps({"model": target.model, "messages": messages}).encode()
                answer, _ = _get(settings, "/v1/inspect/tokenize", body)
                prompts.append(answer["ids"])
            pairs = enumerate(zip(*prompts, strict=False))
            found[group] = next((n for n, (a, b) in pairs if a != b), min(map(len, prompts)))
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return SharedPrefix(found, target.page_tokens)


def _status(settings: Settings) -> dict[str, Any]:
    for path in ("/status", "/ready"):
        try:
            reported, _ = _get(settings, path)
        except (OSError, ValueError):
            continue
        if isinstance(reported, dict):
            return reported
    return {}


def _get(settings: Settings, path: str, body: bytes | None = None) -> tuple[Any, str]:
    """JSON of the answer, and its server. `body`: JSON to POST, GET if None. Raises OSError, ValueError."""
    request = urllib.request.Request(settings.host + path, body)  # noqa: S310 Settings take http(s) only
    if body is not None:
        request.add_header("content-type", "application/json")
    if settings.api_key:
        request.add_header("authorization", f"Bearer {settings.api_key.get_secret_value()}")
    # Ignores `http_proxy`, as Locust's client does.
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with direct.open(request, timeout=SECONDS) as answer:
        return json.load(answer), answer.headers.get("server", "")
