"""Every error leaves here in one envelope: `{"error": {"message", "type", "param", "code"}}` (contract §1.2).

Does not cover: an exception nobody expected, which `app.web.middleware` turns into a 500 with its request id.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from sqlalchemy.exc import DataError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from starlette.exceptions import HTTPException

from app.core.errors import InvalidRequest, RateLimited, ServiceError, Unavailable
from app.storage.errors import StorageUnavailable

log = logging.getLogger(__name__)

_PLACES = {"body", "query", "path", "header", "cookie"}


class ErrorBody(BaseModel):
    """What went wrong; all four keys are always there."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorResponse(BaseModel):
    """The envelope of every error."""

    error: ErrorBody


def envelope(message: str, type: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    return {"error": {"message": message, "type": type, "param": param, "code": code}}


def response(error: ServiceError) -> JSONResponse:
    """The answer to a typed error, with the headers that steer the SDK's retries (contract §1.3)."""
    headers: dict[str, str] = {}
    if isinstance(error, Unavailable):
        headers["retry-after"] = str(max(1, math.ceil(error.retry_after_s)))
        headers["x-should-retry"] = "true"
    elif isinstance(error, RateLimited):
        headers["retry-after"] = str(max(1, math.ceil(error.retry_after_s)))
        headers["retry-after-ms"] = str(max(1, math.ceil(error.retry_after_s * 1000)))
    elif error.status >= 500:
        headers["x-should-retry"] = "false"  # a typed 5xx that is not Unavailable does not heal by itself
    if error.status == 401:
        headers["www-authenticate"] = "Bearer"
    return JSONResponse(envelope(error.message, error.type, error.param, error.code), error.status, headers)


def from_validation(errors: Sequence[Mapping[str, Any]]) -> InvalidRequest:
    """The first of pydantic's errors, in words about the request; `param` is the path from its root."""
    first = errors[0]
    path = [part for part in first["loc"] if not (isinstance(part, str) and part.startswith("function-"))]
    if path and path[0] in _PLACES:
        path = path[1:]
    param = ".".join(str(part) for part in path) or None
    kind, detail = str(first["type"]), str(first["msg"])
    if kind == "json_invalid":
        where = first["loc"][-1] if isinstance(first["loc"][-1], int) else None
        place = "" if where is None else f" (at character {where})"
        return InvalidRequest(f"We could not parse the JSON body of your request{place}.", code="invalid_json")
    if kind == "missing":
        if param is None:
            return InvalidRequest("The request has no body; send a JSON object.", code="missing_required_parameter")
        return InvalidRequest(f"Missing required parameter: '{param}'.", param=param, code="missing_required_parameter")
    if kind == "extra_forbidden":
        return InvalidRequest(f"Unknown parameter: '{param}'.", param=param, code="unknown_parameter")
    wrong_type = kind.endswith(("_type", "_parsing"))
    subject = f"Invalid {'type' if wrong_type else 'value'} for '{param}'" if param else "Invalid request body"
    detail = detail.removeprefix("Value error, ").removeprefix("Assertion failed, ")
    return InvalidRequest(
        f"{subject}: {detail[:1].lower()}{detail[1:]}.".replace("..", "."),
        param=param,
        code="invalid_type" if wrong_type else "invalid_value",
    )


def from_http(request: Request, error: HTTPException) -> ServiceError:
    """Starlette's own errors: no such route, wrong method, unreadable body."""
    where = f"{request.method} {request.url.path}"
    if error.status_code == 404:
        made = ServiceError(f"Invalid URL ({where}).", code="unknown_url")
    elif error.status_code == 405:
        made = ServiceError(f"Method not allowed ({where}).", code="method_not_allowed")
    else:
        made = ServiceError(str(error.detail))
    made.status = error.status_code
    made.type = "invalid_request_error" if error.status_code < 500 else "server_error"
    return made


def install(app: FastAPI) -> None:
    """Replace FastAPI's handlers. An async handler keeps each answer on the event loop: none of them waits."""

    @app.exception_handler(ServiceError)
    async def _service(request: Request, error: ServiceError) -> JSONResponse:
        return response(error)

    @app.exception_handler(RequestValidationError)
    async def _validation(request: Request, error: RequestValidationError) -> JSONResponse:
        return response(from_validation(error.errors()))

    @app.exception_handler(HTTPException)
    async def _http(request: Request, error: HTTPException) -> JSONResponse:
        made = response(from_http(request, error))
        made.headers.update(error.headers or {})
        return made

    @app.exception_handler(OperationalError)
    @app.exception_handler(PoolTimeout)
    async def _database(request: Request, error: OperationalError | PoolTimeout) -> JSONResponse:
        log.error("the database did not answer: %s", getattr(error, "orig", None) or error)
        return response(Unavailable("The database did not answer in time; try again.", retry_after_s=2))

    @app.exception_handler(DataError)
    async def _data(request: Request, error: DataError) -> JSONResponse:
        """PostgreSQL, for which a text cannot hold U+0000; no such name or id exists."""
        log.info("the database cannot hold a value: %s", error.orig)
        return response(InvalidRequest("A value of the request holds U+0000, which no stored text can hold."))

    @app.exception_handler(StorageUnavailable)
    async def _storage(request: Request, error: StorageUnavailable) -> JSONResponse:
        log.error("%s", error)
        return response(Unavailable("The server's storage did not answer; try again.", retry_after_s=10))
