"""All errors that a caller can get, as one tree, and their one wire form: OpenAI's envelope.

Knows status codes and messages. Does not know who raises them.
"""

# ruff: noqa: N818 - an `Error` suffix on every class would add nothing
from __future__ import annotations

from collections.abc import Mapping

import orjson


class ProxyError(Exception):
    """A refusal or failure that is reported to the caller. Subclasses set the status and OpenAI's type."""

    status = 500
    type = "server_error"
    code: str | None = None

    def __init__(
        self,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        status: int | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.code = code or self.code
        self.status = status or self.status
        self.headers = dict(headers or {})

    def body(self) -> bytes:
        """The JSON envelope."""
        error = {"message": self.message, "type": self.type, "param": self.param, "code": self.code}
        return orjson.dumps({"error": error})


class InvalidRequest(ProxyError):
    status = 400
    type = "invalid_request_error"


class BodyTooLarge(InvalidRequest):
    status = 413
    code = "request_too_large"


class ClientDisconnected(InvalidRequest):
    """The client closed the connection. Only the log shows this error."""

    status = 499
    type = "client_gone"


class BodyTimeout(InvalidRequest):
    status = 408
    code = "request_timeout"


class SlowReader(InvalidRequest):
    """A follower of a shared answer fell behind by more than the proxy buffers."""

    status = 408
    code = "read_too_slowly"


class UnsupportedMediaType(InvalidRequest):
    status = 415
    code = "unsupported_media_type"


class HostNotAllowed(InvalidRequest):
    status = 421
    code = "host_not_allowed"


class OriginNotAllowed(InvalidRequest):
    status = 403
    code = "origin_not_allowed"


class PathNotFound(InvalidRequest):
    status = 404
    code = "not_found"


class MethodNotAllowed(InvalidRequest):
    status = 405
    code = "method_not_allowed"


class ModelNotFound(InvalidRequest):
    """`model` is the name after aliases."""

    status = 404
    code = "model_not_found"

    def __init__(self, message: str, model: str) -> None:
        super().__init__(message, param="model")
        self.model = model


class InvalidKey(InvalidRequest):
    """No key, or an unknown, revoked or expired one. The message reveals nothing that its holder does not know."""

    status = 401
    code = "invalid_api_key"

    def __init__(self, message: str) -> None:
        super().__init__(message, headers={"www-authenticate": "Bearer"})


class ModelNotAllowed(InvalidRequest):
    """The key is valid, but not for this model."""

    status = 403
    code = "model_not_allowed"


class KeysUnavailable(ProxyError):
    """Redis is down, and this key was not verified in the last minutes."""

    status = 503
    code = "keys_unavailable"


class LimitsUnavailable(ProxyError):
    """Redis is down, and PROXY_LIMITS_WHEN_REDIS_IS_DOWN is `closed`."""

    status = 503
    code = "limits_unavailable"


class LimitReached(ProxyError):
    """A rate limit of a key: RPM, TPM or concurrency. OpenAI's `type` names it: `requests` or `tokens`."""

    status = 429
    code = "rate_limit_exceeded"

    def __init__(self, message: str, kind: str, headers: Mapping[str, str]) -> None:
        super().__init__(message, headers=headers)
        self.type = kind


class BudgetExceeded(ProxyError):
    status = 429
    type = "insufficient_quota"
    code = "insufficient_quota"


class KeyNotFound(InvalidRequest):
    status = 404
    code = "key_not_found"


class UploadNotFound(InvalidRequest):
    status = 404
    code = "file_not_found"


class BatchNotFound(InvalidRequest):
    status = 404
    code = "batch_not_found"


class StorageFull(InvalidRequest):
    """The owner's files have reached their size limit, or the disk is full."""

    status = 413
    code = "file_storage_full"


class NotCached(ProxyError):
    """The request has `only-if-cached`, and the cache holds no fresh entry."""

    status = 504
    code = "not_cached"


class FlushNotAllowed(InvalidRequest):
    """The key may not flush this tenant's entries."""

    status = 403
    code = "flush_not_allowed"


class CacheUnavailable(ProxyError):
    """Redis is down or refuses a flush, which must not be lost."""

    status = 503
    code = "cache_unavailable"


class UpstreamDown(ProxyError):
    status = 503
    code = "upstream_unavailable"


class CircuitOpen(UpstreamDown):
    """The upstream's circuit breaker is open."""

    code = "upstream_circuit_open"


class Draining(ProxyError):
    """The proxy is shutting down and accepts no new requests."""

    status = 503
    code = "draining"

    def __init__(self) -> None:
        super().__init__("The proxy is ending and takes no new work: ask again.", headers={"retry-after": "1"})


class UpstreamTimeout(ProxyError):
    status = 504
    code = "upstream_timeout"


class DeadlineExceeded(ProxyError):
    """The caller's own deadline has passed."""

    status = 504
    code = "deadline_exceeded"

    def __init__(self) -> None:
        super().__init__("The time that x-request-timeout-ms gave is over.")


class UpstreamBroken(ProxyError):
    """The upstream's answer does not follow the API."""

    status = 502
    code = "upstream_error"


class UpstreamLimited(ProxyError):
    status = 429
    type = "rate_limit_error"
    code = "upstream_rate_limited"


class UpstreamRefused(ProxyError):
    """An error in OpenAI's envelope from the upstream: passed on unchanged."""

    def __init__(self, status: int, envelope: bytes, headers: Mapping[str, str]) -> None:
        super().__init__("the upstream refused the request", status=status, headers=headers)
        self.envelope = envelope

    def body(self) -> bytes:
        return self.envelope
