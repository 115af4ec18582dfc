"""HTTP of no feature: what requests have in common, the one map from error to status, middleware, OpenAPI."""

import asyncio
import logging
import re
import time
import uuid
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, cast

from fastapi import Depends, FastAPI, Request, Response
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

MAX_BODY = 32 * 1024 * 1024  # bytes: 20 MB of images, as base64, and the words beside them

log = logging.getLogger("clawd.app")

# The one map from error to status: the nearest class counts.
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
# What Starlette itself raises, in our words.
HTTP_ERRORS = {
    404: ("not_found", "There is nothing at this address."),
    405: ("method_not_allowed", "This address does not take this method."),
    413: ("request_too_large", "The request is too large: 32 MB at most."),
    400: ("invalid_request", "The request cannot be read: send a JSON body."),
}


# --- what routes have in common ---------------------------------------------------------------------


Id = Annotated[int, PathParam(ge=1, le=sql.MAX_ID)]


class Body(BaseModel):
    """A request's JSON object. Text with half a character in it (a lone surrogate) is refused, wherever it is:
    neither SQLite nor a file nor the gateway takes it."""

    @model_validator(mode="before")
    @classmethod
    def _refuse_half_characters(cls, data: object) -> object:
        waiting = [data]
        while waiting:
            value = waiting.pop()
            if isinstance(value, dict):
                waiting += [*value.keys(), *value.values()]
            elif isinstance(value, list):
                waiting += value
            elif isinstance(value, str):
                _check_unicode(value)
        return data


def _check_unicode(text: str) -> None:
    try:
        if not text.isascii():  # pictures are, and long
            text.encode()
    except UnicodeEncodeError:
        raise ValueError("there is text in it that is no valid Unicode") from None


@dataclass(frozen=True, slots=True)
class Parts:
    """The opened parts of one running service."""

    settings: Settings
    db: Database
    openclaw: gateway.Gateway
    images: image_handler.ImageStore
    decoding: asyncio.Semaphore  # pictures of so many messages at once: one can take a gigabyte
    turns: Turns
    outbox: Outbox


async def _parts(request: Request) -> Parts:
    return cast(Parts, request.state.parts)


OpenParts = Annotated[Parts, Depends(_parts)]


# --- errors -----------------------------------------------------------------------------------------


class ErrorOut(BaseModel):
    """Every error but 422 of a malformed request, whose `detail` is a list."""

    detail: str = Field(description="A sentence to act on.")
    code: str = Field(description="Stable.")
    message_id: int | None = Field(None, description="Of a reply that failed: its text so far is stored there.")


class Mistake(BaseModel):
    """What is wrong with one value of a request."""

    type: str
    loc: list[str | int]
    msg: str


class InvalidOut(BaseModel):
    """The error of a malformed request."""

    detail: list[Mistake]
    code: Literal["invalid_request"]


def _status(kind: type[errors.AppError]) -> int:
    return next(STATUSES[base] for base in kind.__mro__ if base in STATUSES)


def _error_response(error: errors.AppError) -> JSONResponse:
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
    assert isinstance(error, errors.AppError)  # noqa: S101 - registered for this class alone
    return _error_response(error)


async def _answer_http_error(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)  # noqa: S101 - registered for this class alone
    return _http_error_response(error.status_code, error.headers)


def _http_error_response(status: int, headers: Mapping[str, str] | None) -> JSONResponse:
    code, detail = HTTP_ERRORS.get(status, ("http_error", "The request cannot be answered."))
    return JSONResponse({"detail": detail, "code": code}, status, headers)


async def _answer_validation_error(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)  # noqa: S101 - registered for this class alone
    # What was sent is not sent back: it may be a password, or text that is no valid Unicode.
    detail = [{key: item[key] for key in ("type", "loc", "msg")} for item in error.errors()]
    return JSONResponse({"detail": detail, "code": "invalid_request"}, 422)


EXCEPTION_HANDLERS: dict[int | type[Exception], Callable[[Request, Any], Coroutine[Any, Any, Response]]] = {
    errors.AppError: _answer_app_error,
    HTTPException: _answer_http_error,
    RequestValidationError: _answer_validation_error,
}


# --- what goes around every request -----------------------------------------------------------------


class StartFailedError(Exception):
    """The service cannot start as it is set up."""


def middleware(origins: Sequence[str], metrics: telemetry.Metrics) -> list[Middleware]:
    """What goes around every request, from the outside in; `origins` are those that browsers may ask from."""
    return [
        Middleware(RequestLog, metrics),
        Middleware(
            CORSMiddleware,
            allow_origins=list(origins),
            allow_methods=["GET", "POST", "PUT", "DELETE"],
            allow_headers=["*"],  # which costs nothing without cookies
            expose_headers=["X-Request-ID", "X-Message-Id", "X-User-Message-Id", "Retry-After"],
            max_age=86_400,
        ),
        Middleware(CatchAll),
        Middleware(BodyLimit),
    ]


class RequestLog:
    """Gives every request an id, which its response and its log lines carry; logs and counts how it went."""

    def __init__(self, app: ASGIApp, metrics: telemetry.Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] != "http":
            await self._app(scope, receive, _short_of_traceback(send))
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
    path = scope["raw_path"].decode("ascii", "replace")  # as it was sent: no line break gets into the log
    log.log(
        logging.DEBUG if quiet else logging.INFO,
        "%s %s %d %.1f ms",
        *(scope["method"], path, status, took),
        extra={"duration_ms": round(took, 1)},
    )


def _short_of_traceback(send: Send) -> Send:
    """A start that failed for a reason that we know says it in one line."""

    async def send_short(message: Message) -> None:
        if message["type"] == "lifespan.startup.failed":
            *_, last = message["message"].strip().splitlines()
            message = {**message, "message": last} if last.startswith(f"{StartFailedError.__module__}.") else message
        await send(message)

    return send_short


class CatchAll:
    """Answers what nobody caught, inside of CORS, so that a browser can read that too."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
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
            log.exception("unexpected error in %s %r", scope["method"], scope["path"])
            failed = errors.AppError("Something went wrong here. Tell the operator this response's X-Request-ID.")
            await _error_response(failed)(scope, receive, send)


class BodyLimit:
    """Refuses a body that is too large, by what its header says or else once that much of it has come."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        received = 0

        async def receive_and_count() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > MAX_BODY:
                raise HTTPException(413)
            return message

        declared = Headers(scope=scope).get("content-length", "") if scope["type"] == "http" else ""
        if declared.isdecimal() and int(declared[:18]) > MAX_BODY:
            await _http_error_response(413, None)(scope, receive, send)
        else:
            await self._app(scope, receive_and_count, send)


# --- OpenAPI ----------------------------------------------------------------------------------------


def describe(app: FastAPI) -> dict[str, Any]:
    """The OpenAPI document, each route with the errors that it names and those that any route can meet."""
    if app.openapi_schema is None:
        schema = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
        models = [(model, "serialization") for model in (ErrorOut, InvalidOut, Mistake)]
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
