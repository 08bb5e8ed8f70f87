"""Errors as LMDeploy answers them, and the only statuses that its clients know."""

import json
from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from pydantic import BaseModel, ValidationError
from starlette.exceptions import HTTPException

from serve_app.errors import (
    DecoderUnavailable,
    EngineAsleep,
    EngineOverloaded,
    EngineUnavailable,
    InvalidRequest,
    KeyUnreadable,
    PrefixMismatch,
    R3Error,
    RecordError,
    RoutesGap,
    StoreFull,
    StoreUnavailable,
    UnknownKey,
    WeightsMismatch,
)

RETRY_AFTER_S = 1


class UnknownModel(InvalidRequest):
    """A model that this server does not have."""


class Forbidden(InvalidRequest):
    """Something that this server's configuration does not allow to anybody."""


class NotAcceptable(InvalidRequest):
    """No form of the answer that the client accepts."""


_STATUS: dict[type[R3Error], int] = {
    InvalidRequest: 400,
    PrefixMismatch: 400,
    RecordError: 400,
    RoutesGap: 400,
    WeightsMismatch: 400,
    Forbidden: 403,
    UnknownModel: 404,
    NotAcceptable: 406,
    UnknownKey: 404,
    KeyUnreadable: 404,
    EngineOverloaded: 429,
    EngineAsleep: 503,
    EngineUnavailable: 503,
    StoreFull: 503,
    StoreUnavailable: 503,
    DecoderUnavailable: 503,
}
_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
}


class ErrorBody(BaseModel):
    """LMDeploy's error answer. ``type`` is a word of OpenAI's, or the name of a store error."""

    message: str
    type: str
    code: int
    param: str | None = None
    object: str = "error"


def documented(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Return what a route's OpenAPI says of its errors; any may refuse a key, or be busy."""
    return {
        status: {"model": ErrorBody}
        for status in sorted({400, 401, 403, 404, 408, 429, 500, 503, *statuses})
    }


def sampling(answer: type[BaseModel]) -> dict[int | str, dict[str, Any]]:
    """Return what a sampling route's OpenAPI says: its answer, whole or as events, and errors."""
    whole: dict[str, Any] = {"model": answer, "content": {"text/event-stream": {}}}
    return {200: whole, **documented()}


def failure(
    status: int, message: str, kind: str | None = None, headers: dict[str, str] | None = None
) -> Response:
    """Return an error answer; busy servers say when to come back."""
    headers = dict(headers or {})
    if status in (429, 503):
        headers.setdefault("retry-after", str(RETRY_AFTER_S))
    if status == 401:
        headers["www-authenticate"] = "Bearer"
    body = error_body(status, message, kind)
    return Response(json.dumps(body), status, headers, media_type="application/json")


def error_body(status: int, message: str, kind: str | None = None) -> dict[str, Any]:
    """Return LMDeploy's words for an error."""
    usual = "server_error" if status >= 500 else "invalid_request_error"
    kind = kind or _TYPES.get(status, usual)
    return ErrorBody(message=message, type=kind, code=status).model_dump()


def status_of(error: R3Error) -> int:
    """Return the status that says what an error means for a retry."""
    return next((_STATUS[kind] for kind in type(error).__mro__ if kind in _STATUS), 500)


def body_of(error: R3Error) -> dict[str, Any]:
    """Return the words for one of our errors; reasons why a key cannot be read keep their name."""
    kind = type(error).__name__ if isinstance(error, (KeyUnreadable, RoutesGap)) else None
    return error_body(status_of(error), str(error), kind)


def handle_errors(app: FastAPI) -> None:
    """Let an application answer every failure in LMDeploy's shape."""

    async def refuse(_: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        return failure(400, explain(error.errors()))

    async def refuse_route(_: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        # LMDeploy's clients know no 405, 413, 415 or 422.
        status = {404: 404, 405: 404}.get(error.status_code, 400)
        return failure(status, str(error.detail))

    async def fail(_: Request, error: Exception) -> Response:
        assert isinstance(error, R3Error)
        body = body_of(error)
        return failure(body["code"], body["message"], body["type"])

    async def break_down(_: Request, error: Exception) -> Response:
        return failure(500, f"internal error ({type(error).__name__})")

    app.add_exception_handler(RequestValidationError, refuse)
    app.add_exception_handler(HTTPException, refuse_route)
    app.add_exception_handler(R3Error, fail)
    app.add_exception_handler(Exception, break_down)


def explain(errors: Sequence[Any]) -> str:
    """Say in a line what the first of pydantic's errors found where; nothing that was sent."""
    first = errors[0]
    place = [str(part) for part in first["loc"] if part not in ("body", "query")]
    where = ".".join(place) or "body"
    more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
    return f"{where}: {first['msg']}{more}"


def refused(error: ValidationError) -> InvalidRequest:
    """Turn what pydantic says of a request into our error."""
    return InvalidRequest(explain(error.errors(include_input=False, include_url=False)))
