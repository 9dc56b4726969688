"""What can go wrong, as one tree, and its one way onto the wire: OpenAI's envelope.

Knows status codes and messages. Does not know who raises them.
"""

# ruff: noqa: N818 - the names say what happened; a suffix would say nothing more
from __future__ import annotations

from collections.abc import Mapping

import orjson


class ProxyError(Exception):
    """A refusal or a failure that the caller is told about. Subclasses say the status and OpenAI's type."""

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
    """Nobody hears this answer: it is for the log."""

    status = 499
    type = "client_gone"


class BodyTimeout(InvalidRequest):
    status = 408
    code = "request_timeout"


class SlowReader(InvalidRequest):
    """Others who share the answer were further ahead than the proxy keeps of it."""

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
    """No key, an unknown, a revoked or an expired one. Never says anything of the key but what its holder knows."""

    status = 401
    code = "invalid_api_key"

    def __init__(self, message: str) -> None:
        super().__init__(message, headers={"www-authenticate": "Bearer"})


class ModelNotAllowed(InvalidRequest):
    """The key is good, but not for this model."""

    status = 403
    code = "model_not_allowed"


class KeysUnavailable(ProxyError):
    """Redis is down, and this key was not seen in the last minutes."""

    status = 503
    code = "keys_unavailable"


class LimitsUnavailable(ProxyError):
    """Redis is down, and PROXY_LIMITS_WHEN_REDIS_IS_DOWN says `closed`."""

    status = 503
    code = "limits_unavailable"


class LimitReached(ProxyError):
    """RPM, TPM or concurrency of a key. OpenAI's `type` says which: `requests` or `tokens`."""

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
    """An owner's files take all the room there is for one."""

    status = 413
    code = "file_storage_full"


class NotCached(ProxyError):
    """`only-if-cached` and nothing fresh in the cache."""

    status = 504
    code = "not_cached"


class FlushNotAllowed(InvalidRequest):
    """Somebody else's answers."""

    status = 403
    code = "flush_not_allowed"


class CacheUnavailable(ProxyError):
    """Redis is down or refuses what must not be lost, a flush."""

    status = 503
    code = "cache_unavailable"


class UpstreamDown(ProxyError):
    status = 503
    code = "upstream_unavailable"


class CircuitOpen(UpstreamDown):
    """The upstream failed so often that nobody asks it for now."""

    code = "upstream_circuit_open"


class Draining(ProxyError):
    """The proxy ends, and takes no new work."""

    status = 503
    code = "draining"

    def __init__(self) -> None:
        super().__init__("The proxy is ending and takes no new work: ask again.", headers={"retry-after": "1"})


class UpstreamTimeout(ProxyError):
    status = 504
    code = "upstream_timeout"


class DeadlineExceeded(ProxyError):
    """The caller's own time is over."""

    status = 504
    code = "deadline_exceeded"

    def __init__(self) -> None:
        super().__init__("The time that x-request-timeout-ms gave is over.")


class UpstreamBroken(ProxyError):
    """The upstream answered, but not what the API promises."""

    status = 502
    code = "upstream_error"


class UpstreamLimited(ProxyError):
    status = 429
    type = "rate_limit_error"
    code = "upstream_rate_limited"


class UpstreamRefused(ProxyError):
    """An error that the upstream itself put into OpenAI's envelope: passed on as it is."""

    def __init__(self, status: int, envelope: bytes, headers: Mapping[str, str]) -> None:
        super().__init__("the upstream refused the request", status=status, headers=headers)
        self.envelope = envelope

    def body(self) -> bytes:
        return self.envelope
