"""HTTP without features: what all routes share, the map from errors to statuses, middleware, the OpenAPI document."""

import asyncio
import logging
import re
import time
import uuid
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Self, TypeVar, cast

from fastapi import Depends, FastAPI, Query, Request, Response
from fastapi import Path as PathParam
from fastapi.exceptions import RequestValidationError
from fastapi.openapi.utils import get_openapi
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field, model_validator
from pydantic.json_schema import models_json_schema
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

import errors
import gateway
import image_handler
import sql
import telemetry
from database import Database
from outbox import Outbox
from settings import Settings
from turns import Turns

MAX_MISTAKES = 20  # that a 422 lists

T = TypeVar("T")

log = logging.getLogger("clawd.app")

# HTTP status of each error class. An error of a class that is not listed has the status of its nearest base class.
STATUSES: dict[type[errors.AppError], int] = {
    errors.Invalid: 400,
    errors.Unauthorized: 401,
    errors.Forbidden: 403,
    errors.NotFound: 404,
    errors.Conflict: 409,
    errors.TooLarge: 413,
    errors.Unsupported: 415,
    errors.Unprocessable: 422,
    errors.TooMany: 429,
    errors.Unavailable: 503,
    errors.GatewayError: 502,
    errors.GatewayUnavailable: 503,
    errors.GatewayTimeout: 504,
    errors.Interrupted: 503,
    errors.AppError: 500,
}
# Code and `detail` of the errors that Starlette itself raises, by status.
HTTP_ERRORS = {
    404: ("not_found", "There is no route at this address. See /docs for the routes."),
    405: ("method_not_allowed", "This address does not support this HTTP method. See /docs for the methods."),
    408: ("request_timeout", "No part of the request body arrived for 10 s. Send the request again."),
    413: (
        "request_too_large",
        "The request body is too large. Send at most 32 MB in a chat, 11 MB in a file, 1 MB elsewhere, and at most "
        "100,000 values.",
    ),
    415: ("unsupported_media_type", "Send the body as JSON, with the header `Content-Type: application/json`."),
    400: ("invalid_request", "The request body cannot be parsed. Send valid JSON in UTF-8."),
}


# --- what all routes share --------------------------------------------------------------------------


Id = Annotated[int, PathParam(ge=1, le=sql.MAX_ID)]


LONGEST_LIST = 1000  # entries of a list at once
Limit = Annotated[int, Query(ge=1, le=LONGEST_LIST, description="Return at most this many entries, the newest ones.")]
Before = Annotated[int, Query(ge=1, le=sql.MAX_ID, description="Return only entries with an id less than this.")]


def page(found: list[T], limit: int, response: Response) -> list[T]:
    """Returns the first `limit` entries of those that were found with a limit of one more. If there is one more, the
    response says so by the header `X-More: true`."""
    if len(found) > limit:
        response.headers["X-More"] = "true"
    return found[:limit]


class Body(BaseModel):
    """Base class of the JSON objects in request bodies. Refuses a body in which any string, at any depth, contains a
    lone surrogate, because such text cannot be encoded as UTF-8 for SQLite, a file or the gateway."""

    @model_validator(mode="after")
    def _refuse_surrogates(self) -> Self:
        """Looks at the values that are used, not at all that was sent."""
        unchecked: list[object] = [self]
        while unchecked:
            value = unchecked.pop()
            if isinstance(value, BaseModel):
                unchecked += value.__dict__.values()
            elif isinstance(value, dict):
                unchecked += [*value.keys(), *value.values()]
            elif isinstance(value, list):
                unchecked += value
            elif isinstance(value, str):
                _check_unicode(value)
        return self


def _check_unicode(text: str) -> None:
    try:
        if not text.isascii():  # spares megabytes of base64 an encoded copy
            text.encode()
    except UnicodeEncodeError:
        raise ValueError("text must be valid Unicode, without lone surrogates") from None


@dataclass(frozen=True, slots=True)
class Parts:
    """The opened objects of one running app that routes use."""

    settings: Settings
    db: Database
    openclaw: gateway.Gateway
    images: image_handler.ImageStore
    decoding: asyncio.Semaphore  # limits concurrent decoding, because the images of one message can need 1 GB of memory
    turns: Turns
    outbox: Outbox


async def _parts(request: Request) -> Parts:
    return cast(Parts, request.state.parts)


OpenParts = Annotated[Parts, Depends(_parts)]


# --- errors -----------------------------------------------------------------------------------------


class ErrorOut(BaseModel):
    """The body of every error response except 422 `invalid_request`, whose `detail` is a list."""

    detail: str = Field(description="What happened and what the caller can do, in English.")
    code: str = Field(description="Machine-readable code; does not change between releases.")
    message_id: int | None = Field(
        None, description="Only for a reply that failed: id of its message, which keeps the text received so far."
    )


class Mistake(BaseModel):
    """One invalid value of a request."""

    type: str = Field(description="Pydantic's error type, for example `missing` or `string_too_long`.")
    loc: list[str | int] = Field(description="Path to the value, for example `body`, `email`.")
    msg: str = Field(description="What is wrong with the value, in English.")


class InvalidOut(BaseModel):
    """The body of a 422 response to a request that does not match the schema of its route."""

    detail: list[Mistake]
    code: Literal["invalid_request"]


def _status(kind: type[errors.AppError]) -> int:
    return next(STATUSES[base] for base in kind.__mro__ if base in STATUSES)


def error_response(error: errors.AppError) -> JSONResponse:
    """Returns the response for an error of ours."""
    status = _status(type(error))
    headers = {"WWW-Authenticate": "Bearer"} if status == 401 else {}
    if status in (429, 503) or error.retry_after is not None:
        headers["Retry-After"] = str(error.retry_after or 5)
    body: dict[str, object] = {"detail": error.message, "code": error.code}
    if error.message_id is not None:
        body["message_id"] = error.message_id
        headers["X-Message-Id"] = str(error.message_id)
    return JSONResponse(body, status, headers)


async def _answer_app_error(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, errors.AppError)  # noqa: S101 - narrows the type; registered for this class only
    return error_response(error)


async def _answer_http_error(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)  # noqa: S101 - narrows the type; registered for this class only
    return http_error_response(error.status_code, error.headers)


def http_error_response(status: int, headers: Mapping[str, str] | None) -> JSONResponse:
    """Returns the response for a status that HTTP itself calls for."""
    code, detail = HTTP_ERRORS.get(status, ("http_error", f"The request failed with HTTP status {status}."))
    return JSONResponse({"detail": detail, "code": code}, status, headers)


async def _answer_validation_error(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)  # noqa: S101 - narrows the type; registered for this class only
    # `input` and `ctx` are left out: they repeat what was sent, which may be a password, or text with a lone surrogate
    # that cannot be encoded in the response.
    detail = [{key: item[key] for key in ("type", "loc", "msg")} for item in error.errors()[:MAX_MISTAKES]]
    return JSONResponse({"detail": detail, "code": "invalid_request"}, 422)


EXCEPTION_HANDLERS: dict[int | type[Exception], Callable[[Request, Any], Coroutine[Any, Any, Response]]] = {
    errors.AppError: _answer_app_error,
    HTTPException: _answer_http_error,
    RequestValidationError: _answer_validation_error,
}


# --- middleware -------------------------------------------------------------------------------------


class RefusedError(Exception):
    """A request that is answered with a status of HTTP_ERRORS, before it reaches a route."""

    def __init__(self, status: int) -> None:
        super().__init__(status)
        self.status = status


class StartFailedError(Exception):
    """The service cannot start, because a setting cannot be used. The message names the setting and the cause."""


def middleware(origins: Sequence[str], metrics: telemetry.Metrics) -> list[Middleware]:
    """Returns the middleware of the app, outermost first. `origins` are the origins that CORS allows, or `*`."""
    return [
        Middleware(RequestLog, metrics),
        Middleware(
            CORSMiddleware,
            allow_origins=list(origins),
            allow_methods=["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE"],
            allow_headers=["*"],  # safe, because the service authenticates by a header and never by cookies
            expose_headers=["X-Request-ID", "X-Message-Id", "X-User-Message-Id", "Retry-After", "X-More"],
            max_age=86_400,
        ),
        Middleware(CatchAll),
    ]


class RequestLog:
    """Gives each request an id, which its response and its log lines carry; logs each request with its status and
    duration, and counts it in the metrics. Keeps the caller's `X-Request-ID` if it has 1 to 128 printable ASCII
    characters without spaces; otherwise generates one."""

    def __init__(self, app: ASGIApp, metrics: telemetry.Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handles one ASGI connection."""
        if scope["type"] != "http":
            await self._app(scope, receive, _without_traceback(send))
            return
        sent = Headers(scope=scope).get("x-request-id", "")
        name = sent if re.fullmatch(r"[\x21-\x7e]{1,128}", sent) else uuid.uuid4().hex
        telemetry.begin_request(name)
        started, status = time.perf_counter(), 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["X-Request-ID"] = name
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        finally:
            self._metrics.count_request(scope["method"], getattr(scope.get("route"), "path", "unmatched"), status)
            _log_request(scope, status, (time.perf_counter() - started) * 1000)


def _log_request(scope: Scope, status: int, took: float) -> None:
    quiet = scope["path"].startswith("/health") or (scope["path"] == "/metrics" and status == 200)
    # The path as it was sent, still percent-encoded: a decoded line break could forge a log line.
    path = scope["raw_path"].decode("ascii", "replace")
    log.log(
        logging.DEBUG if quiet else logging.INFO,
        "%s %s %d %.1f ms",
        *(scope["method"], path, status, took),
        extra={"duration_ms": round(took, 1)},
    )


def _without_traceback(send: Send) -> Send:
    """Wraps `send` so that uvicorn logs a StartFailedError as one line. Starlette reports a failed start with its whole
    traceback, which would hide the cause from the operator."""

    async def send_short(message: Message) -> None:
        if message["type"] == "lifespan.startup.failed":
            *_, last = message["message"].strip().splitlines()
            message = {**message, "message": last} if last.startswith(f"{StartFailedError.__module__}.") else message
        await send(message)

    return send_short


class CatchAll:
    """Logs an unexpected exception and answers 500. It runs inside the CORS middleware: without CORS headers, a browser
    would hide the answer from the frontend."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handles one ASGI connection."""
        started = False

        async def send_and_note(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            await self._app(scope, receive, send_and_note)
        except Exception:
            if scope["type"] != "http" or started:
                raise
            log.exception("unexpected error in %s %r, answering 500", scope["method"], scope["path"])
            failed = errors.AppError(
                "An unexpected error occurred on the server. Give the operator the X-Request-ID of this response."
            )
            await error_response(failed)(scope, receive, send)


# --- OpenAPI ----------------------------------------------------------------------------------------


def describe(app: FastAPI) -> dict[str, Any]:
    """Returns the OpenAPI document. Adds to each operation its error responses: those that the route declares with
    `errors.raises`, and those that every route can return."""
    if app.openapi_schema is None:
        schema = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
        models = [(model, "serialization") for model in (ErrorOut, InvalidOut, Mistake)]
        # type: mypy takes the literal "serialization" in the list for a plain `str`.
        _, described = models_json_schema(models, ref_template="#/components/schemas/{model}")  # type: ignore[arg-type]
        schema["components"]["schemas"] |= described["$defs"]
        for path in schema["paths"].values():
            for operation in path.values():
                _describe_errors(operation)
        app.openapi_schema = schema
    return app.openapi_schema


def _describe_errors(operation: dict[str, Any]) -> None:
    codes = [*operation.pop("x-errors", []), "internal_error"]
    if "security" in operation:
        codes.append("unauthorized")
    if "health" not in operation.get("tags", ()):
        codes.append("database_unavailable")
    if malformed := operation["responses"].get("422"):
        malformed["content"] = {"application/json": {"schema": {"anyOf": [_ref("InvalidOut")]}}}
    by_status: dict[int, list[str]] = {}
    for code in dict.fromkeys(codes):
        by_status.setdefault(_status(errors.CODES[code]), []).append(f"`{code}`")
    if "requestBody" in operation:
        for status in (400, 413):
            by_status.setdefault(status, []).append(f"`{HTTP_ERRORS[status][0]}`")
    for status, names in by_status.items():
        response = operation["responses"].setdefault(str(status), {})
        response["description"] = "; ".join(filter(None, [response.get("description"), ", ".join(names)]))
        content = response.setdefault("content", {"application/json": {"schema": {"anyOf": []}}})
        content["application/json"]["schema"]["anyOf"].append(_ref("ErrorOut"))


def _ref(model: str) -> dict[str, str]:
    return {"$ref": f"#/components/schemas/{model}"}
