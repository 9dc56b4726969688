"""All errors that a caller can get, as one tree, and their one wire form: OpenAI's envelope.

Knows status codes and messages. Does not know who raises them.
"""

# ruff: noqa: N818 - an `Error` suffix on every class would add nothing
from collections.abc import Mapping

import orjson


class ProxyError(Exception):
    """A refusal or failure that is reported to the caller. Subclasses set the status, OpenAI's type and the code."""

    status = 500
    type = "server_error"
    code: str | None = None

    def __init_subclass__(cls, status: int | None = None, type: str | None = None, code: str | None = None) -> None:  # noqa: A002
        cls.status, cls.type, cls.code = status or cls.status, type or cls.type, code or cls.code

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


class InvalidRequest(ProxyError, status=400, type="invalid_request_error"):
    """The caller has to change the request."""


class BodyTooLarge(InvalidRequest, status=413, code="request_too_large"):
    """A request body or an uploaded file."""


class HeadTooLarge(InvalidRequest, status=431, code="request_too_large"):
    """Request line and headers."""


class ClientDisconnected(InvalidRequest, status=499, type="client_gone"):
    """The client closed the connection. Only the log shows this error."""


class BodyTimeout(InvalidRequest, status=408, code="request_timeout"):
    """The body did not arrive in time."""


class SlowReader(InvalidRequest, status=408, code="read_too_slowly"):
    """A follower of a shared answer fell behind by more than the proxy buffers."""


class UnsupportedMediaType(InvalidRequest, status=415, code="unsupported_media_type"):
    """The body is not of the type that the path takes."""


class HostNotAllowed(InvalidRequest, status=421, code="host_not_allowed"):
    """The `Host` header names a host that is not in the settings."""


class OriginNotAllowed(InvalidRequest, status=403, code="origin_not_allowed"):
    """The request comes from a web page of another origin."""


class PathNotFound(InvalidRequest, status=404, code="not_found"):
    """There is no such path, or it is turned off."""


class MethodNotAllowed(InvalidRequest, status=405, code="method_not_allowed"):
    """The path exists, but not with this method."""


class ModelNotFound(InvalidRequest, status=404, code="model_not_found"):
    """`model` is the name after aliases."""

    def __init__(self, message: str, model: str) -> None:
        super().__init__(message, param="model")
        self.model = model


class UploadNotFound(InvalidRequest, status=404, code="file_not_found"):
    """This owner has no such file."""


class FilesDisabled(InvalidRequest, status=501, code="files_disabled"):
    """PROXY_FILES_ENABLED is false."""


class BatchNotFound(InvalidRequest, status=404, code="batch_not_found"):
    """This owner has no such batch."""


class StorageFull(InvalidRequest, status=413, code="file_storage_full"):
    """The owner's files have reached their size limit, or the disk is full."""


class NotCached(ProxyError, status=504, code="not_cached"):
    """The request has `only-if-cached`, and the cache holds no fresh entry."""


class DeadlineExceeded(ProxyError, status=504, code="deadline_exceeded"):
    """The caller's own deadline has passed."""

    def __init__(self) -> None:
        # OpenAI's clients would try again.
        super().__init__("The deadline of x-request-timeout-ms has passed.", headers={"x-should-retry": "false"})


class InvalidKey(InvalidRequest, status=401, code="invalid_api_key"):
    """No key, or an unknown, revoked or expired one. The message tells the caller nothing new about the key."""

    def __init__(self, message: str) -> None:
        super().__init__(message, headers={"www-authenticate": "Bearer"})


class ModelNotAllowed(InvalidRequest, status=403, code="model_not_allowed"):
    """The key is valid, but not for this model."""


class FlushNotAllowed(InvalidRequest, status=403, code="flush_not_allowed"):
    """The key may not flush this tenant's entries."""


class KeyNotFound(InvalidRequest, status=404, code="key_not_found"):
    """The operator names a key that does not exist."""


class LimitReached(ProxyError, status=429, code="rate_limit_exceeded"):
    """A rate limit of a key (RPM, TPM, concurrency), or the cap of an upstream. OpenAI's `type` names it: `requests` or
    `tokens`."""

    def __init__(self, message: str, kind: str, headers: Mapping[str, str]) -> None:
        super().__init__(message, headers=headers)
        self.type = kind


class BudgetExceeded(ProxyError, status=429, type="insufficient_quota", code="insufficient_quota"):
    """The key has spent its budget, or all keys together that of an upstream."""


class KeysUnavailable(ProxyError, status=503, code="keys_unavailable"):
    """Redis is down, and this key was not verified in the last minutes."""


class LimitsUnavailable(ProxyError, status=503, code="limits_unavailable"):
    """Redis is down, and PROXY_LIMITS_WHEN_REDIS_IS_DOWN is `closed`."""


class CacheUnavailable(ProxyError, status=503, code="cache_unavailable"):
    """Redis is down or refuses a flush. A flush must not be lost, so the caller has to repeat it."""


class Draining(ProxyError, status=503, code="draining"):
    """The proxy is shutting down and accepts no new requests."""

    def __init__(self) -> None:
        super().__init__("The proxy is shutting down and accepts no new requests: retry.", headers={"retry-after": "1"})


class UpstreamDown(ProxyError, status=503, code="upstream_unavailable"):
    """The upstream cannot be reached, or does not serve the model yet."""


class CircuitOpen(UpstreamDown, code="upstream_circuit_open"):
    """The upstream's circuit breaker is open."""


class UpstreamTimeout(ProxyError, status=504, code="upstream_timeout"):
    """The upstream's answer did not arrive in time."""


class UpstreamBroken(ProxyError, status=502, code="upstream_error"):
    """The upstream's answer does not follow the API."""


class UpstreamLimited(ProxyError, status=429, type="rate_limit_error", code="upstream_rate_limited"):
    """The upstream takes no more requests for now."""


class UpstreamRefused(ProxyError):
    """An error in OpenAI's envelope from the upstream: passed on unchanged."""

    def __init__(self, status: int, envelope: bytes, headers: Mapping[str, str]) -> None:
        super().__init__("the upstream refused the request", status=status, headers=headers)
        self.envelope = envelope

    def body(self) -> bytes:
        return self.envelope
