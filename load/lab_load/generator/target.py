"""What is put under load: whether it answers, which model, which versions. Asked once, before a run."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from typing import Any

from ..measures.trial import Target
from ..settings import Settings

SECONDS = 10  # for each question here


class TargetError(Exception):
    """Nothing there to put load on. The message says what to do."""


def examine(settings: Settings, kind: str = "chat") -> Target:
    """`kind` of the model that is needed; "": the endpoint chooses. Raises TargetError."""
    try:
        listed, server = _get(settings, "/v1/models")
    except urllib.error.HTTPError as error:
        raise TargetError(
            f"{settings.host}/v1/models answers {error.code}: is it the proxy, and ready (make status)?"
        ) from None
    except (OSError, ValueError) as error:
        raise TargetError(
            f"nothing answers at {settings.host} ({getattr(error, 'reason', error)}): start the lab first (make lab, "
            "or make start), or name another target: LOAD_HOST=http://…"
        ) from None
    models = listed.get("data") if isinstance(listed, dict) else None
    # A model that is named need not be listed: the proxy lists its own, and serves those of paid upstreams too.
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
                f"{settings.host} lists no {kind} model (it may still be loading): make status, or LOAD_MODEL=…"
            )
        named = fitting[0]
    return Target(settings.host, named, server, _status(settings))


def _status(settings: Settings) -> dict[str, Any]:
    for path in ("/status", "/ready"):
        try:
            reported, _ = _get(settings, path)
        except (OSError, ValueError):
            continue
        if isinstance(reported, dict):
            return reported
    return {}


def _get(settings: Settings, path: str) -> tuple[Any, str]:
    request = urllib.request.Request(settings.host + path)  # noqa: S310 Settings take http(s) only
    if settings.api_key:
        request.add_header("authorization", f"Bearer {settings.api_key.get_secret_value()}")
    # Without `http_proxy`, as the load itself: Locust's client connects directly.
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with direct.open(request, timeout=SECONDS) as answer:
        return json.load(answer), answer.headers.get("server", "")
