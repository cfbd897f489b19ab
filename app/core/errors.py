"""The errors a client may see; `app.web.errors` renders all of them in OpenAI's envelope.

Does not cover: failures inside a job (rollout states, `jobs.error`), which never become HTTP answers.

    ServiceError
    ├── InvalidRequest      400   bad field, wrong state (never 409: the SDK would retry it)
    ├── Unauthenticated     401
    ├── Forbidden           403   the key's role is too small
    ├── NotFound            404
    ├── PayloadTooLarge     413
    ├── RateLimited         429   with Retry-After
    └── Unavailable         503   with Retry-After
"""

from __future__ import annotations


class ServiceError(Exception):
    """Base: `message` says what was wrong and how to mend it, `param` is a path into the request."""

    status: int = 500
    type: str = "server_error"
    default_code: str | None = None

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.code = code if code is not None else self.default_code


class InvalidRequest(ServiceError):
    status = 400
    type = "invalid_request_error"


class Unauthenticated(ServiceError):
    status = 401
    type = "invalid_request_error"
    default_code = "invalid_api_key"


class Forbidden(ServiceError):
    status = 403
    type = "invalid_request_error"
    default_code = "insufficient_permissions"


class NotFound(ServiceError):
    status = 404
    type = "invalid_request_error"


class PayloadTooLarge(ServiceError):
    status = 413
    type = "invalid_request_error"


class RateLimited(ServiceError):
    """This key asked too often; the next request is granted after `retry_after_s`."""

    status = 429
    type = "requests"
    default_code = "rate_limit_exceeded"

    def __init__(self, message: str, *, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class Unavailable(ServiceError):
    """Try again after `retry_after_s` (≤ 120: above that the SDK stops retrying)."""

    status = 503
    type = "server_error"

    def __init__(self, message: str, *, retry_after_s: float = 5.0, code: str | None = None) -> None:
        super().__init__(message, code=code)
        self.retry_after_s = min(retry_after_s, 120.0)
