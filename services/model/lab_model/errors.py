"""Errors: an unusable catalogue, and one tree of the errors of the API."""

from __future__ import annotations

from typing import Any, ClassVar


class CatalogueError(Exception):
    """The catalogue or a model's source cannot be used. The message has the line and a remedy."""


class ApiError(Exception):
    """Becomes OpenAI's error envelope."""

    status: ClassVar[int] = 400
    type: ClassVar[str] = "invalid_request_error"
    code: str | None = None
    param: str | None = None

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.param = param
        self.code = code or self.code
        self.headers: dict[str, str] = {}

    def body(self) -> dict[str, Any]:
        return {"error": {"message": str(self), "type": self.type, "param": self.param, "code": self.code}}


class BadRequestError(ApiError):
    pass


class NotFoundError(ApiError):
    status = 404


class MethodNotAllowedError(ApiError):
    status = 405
    code = "method_not_allowed"


class BodyTooLargeError(ApiError):
    status = 413
    code = "request_too_large"


class BodyTooSlowError(ApiError):
    status = 408
    code = "request_timeout"


class HostError(ApiError):
    status = 421
    code = "host_not_allowed"


class MediaTypeError(ApiError):
    status = 415
    code = "unsupported_media_type"


class BusyError(ApiError):
    status = 429
    type = "rate_limit_error"
    code = "queue_full"

    def __init__(self, message: str, retry_after: float) -> None:
        super().__init__(message)
        # Whole seconds, at least one: RFC 9110 has no fractions here.
        self.headers = {"retry-after": str(max(1, round(retry_after + 0.499)))}


class ServerError(ApiError):
    status = 500
    type = "server_error"
    code: str | None = "model_fault"


class DeadlineExceededError(ServerError):
    status = 504
    code = "deadline_exceeded"


class UnavailableError(ServerError):
    status = 503
    code = "model_unavailable"


def deadline_exceeded() -> DeadlineExceededError:
    error = DeadlineExceededError("The deadline of x-request-timeout-ms has passed.")
    error.headers = {"x-should-retry": "false"}  # OpenAI's clients would try again
    return error
