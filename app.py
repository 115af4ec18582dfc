"""How the rooms meet: `create_app`, what is opened and closed with it, the one map from error to status, health."""

import asyncio
import hmac
import logging
import re
import sqlite3
import subprocess
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass
from ipaddress import IPv6Address, ip_address
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypedDict, cast

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.openapi.utils import get_openapi
from fastapi.responses import JSONResponse, PlainTextResponse
from pydantic import BaseModel, Field
from pydantic.json_schema import models_json_schema
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

import auth
import chat_handlers
import clock
import database
import errors
import file_utils
import gateway
import image_handler
import project_manager
import settings as environment
import sql
import telemetry
from settings import Settings
from turns import FINAL, Turns
from web import OpenParts, Parts

VERSION = "1.0.0"
MAX_BODY = 32 * 1024 * 1024  # bytes: 20 MB of images, as base64, and the words beside them
CHECK_GATEWAY_EVERY = 15  # seconds
CHECK_CHECKOUT_EVERY = 2  # seconds
DECODING = 2  # messages whose pictures are decoded at once

log = logging.getLogger("clawd.app")

# Headers of a request that came to this machine from elsewhere, or that a browser sends for a web page.
SPEAKS_FOR_OTHERS = frozenset({"forwarded", "x-real-ip", "via", "origin"})

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


class StartFailedError(Exception):
    """The service cannot start as it is set up."""


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


class DatabaseHealth(BaseModel):
    ok: bool
    sqlite: str = Field(description="SQLite's version.")


class GatewayHealth(BaseModel):
    url: str
    ok: bool
    checked_at: str | None
    detail: str


class Health(BaseModel):
    status: Literal["ok", "error"]
    version: str
    environment: Literal["production", "development"]
    branch: str
    commit: str
    port: int
    stale: bool = Field(description="The checkout has moved on: a restart would run other code.")
    failed_start: str | None = Field(description="Why newer code did not start, where the one before serves on.")
    uptime_seconds: float
    database: DatabaseHealth
    gateway: GatewayHealth


class Ready(BaseModel):
    status: Literal["ready"]
    detail: str
    gateway_version: str | None


class Checkout(NamedTuple):
    """What git says of the checkout, `unknown` where it says nothing."""

    branch: str
    commit: str


@dataclass(slots=True)
class Origin:
    """Which code runs, since when (seconds of the monotonic clock), and what the checkout holds by now."""

    runs: Checkout
    now: Checkout
    started: float

    @property
    def environment(self) -> Literal["production", "development"]:
        """`main` is production, whatever else is development."""
        return "production" if self.runs.branch == "main" else "development"


class State(TypedDict):
    """What a running app holds open, in `request.state`."""

    parts: Parts
    identity: auth.Identity
    origin: Origin
    metrics: telemetry.Metrics


# --- what goes around every request -------------------------------------------------------------------


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


def _status(kind: type[errors.AppError]) -> int:
    return next(STATUSES[base] for base in kind.__mro__ if base in STATUSES)


def _error_response(error: errors.AppError) -> JSONResponse:
    status = _status(type(error))
    headers = {"WWW-Authenticate": "Bearer"} if status == 401 else {}
    if status in (429, 503) or error.retry_after is not None:
        headers["Retry-After"] = str(error.retry_after or 5)
    body: dict[str, object] = {"detail": error.message, "code": error.name}
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


# --- the app ------------------------------------------------------------------------------------------


def create_app(settings: Settings) -> FastAPI:
    """An app on these settings. Nothing is opened before its lifespan starts."""
    metrics = telemetry.Metrics(sorted(FINAL))
    app = FastAPI(
        title="clawd-backend",
        version=VERSION,
        description="Many people, each in conversations of their own, with an OpenClaw agent.",
        lifespan=_lifespan(settings, metrics),
        middleware=[
            Middleware(RequestLog, metrics),
            Middleware(
                CORSMiddleware,
                allow_origins=list(settings.cors_origins),
                allow_methods=["GET", "POST", "PUT", "DELETE"],
                allow_headers=["*"],  # which costs nothing without cookies
                expose_headers=["X-Request-ID", "X-Message-Id", "X-User-Message-Id", "Retry-After"],
                max_age=86_400,
            ),
            Middleware(CatchAll),
            Middleware(BodyLimit),
        ],
        exception_handlers={
            errors.AppError: _answer_app_error,
            HTTPException: _answer_http_error,
            RequestValidationError: _answer_validation_error,
        },
    )
    app.state.turns = None  # while they are open: `serve.py` asks for them by this name
    app.state.failed_start = None  # `serve.py` says here why newer code did not start
    app.include_router(auth.router)
    app.include_router(project_manager.router)
    app.include_router(chat_handlers.router)
    app.add_api_route(
        "/health", read_health, tags=["health"], response_model=Health, responses={503: {"model": Health}}
    )
    app.add_api_route(
        "/health/ready", read_ready, tags=["health"], response_model=Ready, openapi_extra=errors.raises("not_ready")
    )
    app.add_api_route(
        "/metrics",
        read_metrics,
        tags=["health"],
        response_class=PlainTextResponse,
        openapi_extra=errors.raises("unauthorized"),
    )
    app.openapi = lambda: _describe(app)  # type: ignore[method-assign]  # the way FastAPI documents
    return app


def _lifespan(settings: Settings, metrics: telemetry.Metrics) -> Callable[[FastAPI], Any]:
    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[State]:
        telemetry.start_logging(settings.log_level, settings.log_format, settings.secrets)
        async with AsyncExitStack() as stack:
            with _needs("DATA_DIR", settings.data):
                secret = auth.load_secret(settings)
                file_utils.make_folder(settings.images)
            with _needs("PROJECTS_DIR", settings.projects):
                file_utils.make_folder(settings.projects)
            images = image_handler.ImageStore(settings.images, secret)
            images.sweep(older_than=86_400)
            with _needs("DB_PATH", settings.db_path):
                db = database.Database(settings.db_path, _adoption_context(images))
                db.open()
            stack.callback(db.close)
            openclaw = gateway.Gateway(
                settings.clawdbot_base_url, settings.clawdbot_token.get_secret_value(), settings.clawdbot_timeout
            )
            openclaw.open()
            stack.push_async_callback(openclaw.close)
            identity = auth.Identity(settings)
            identity.open(secret)
            stack.callback(identity.close)
            turns = Turns(db, openclaw, images, settings, metrics)
            turns.open()
            stack.push_async_callback(turns.close)
            app.state.turns = turns
            checkout = _read_checkout()
            origin = Origin(checkout, checkout, time.monotonic())
            for watching in (_watch_gateway(openclaw), _watch_checkout(origin)):
                stack.callback(asyncio.create_task(watching).cancel)
            log.info("clawd-backend %s of %s (%.7s) serves %s", VERSION, checkout.branch, checkout.commit, db.path)
            yield State(
                parts=Parts(settings, db, openclaw, images, asyncio.Semaphore(DECODING), turns),
                identity=identity,
                origin=origin,
                metrics=metrics,
            )
            log.info("stopping")

    return lifespan


def _adoption_context(images: image_handler.ImageStore) -> sql.AdoptionContext:
    def keep(session_key: str, source: str) -> sql.KeptImage | None:
        kept = images.adopt(session_key, source)
        return kept and sql.KeptImage(*kept)

    return sql.AdoptionContext(keep, environment.CHECKOUT)


@contextmanager
def _needs(variable: str, path: Path) -> Iterator[None]:
    """Says which setting is to blame where something cannot be opened."""
    try:
        yield
    except (errors.AppError, OSError, ValueError, sqlite3.Error) as error:
        raise StartFailedError(f"{variable}={path} cannot be used: {error}") from error


async def _watch_gateway(openclaw: gateway.Gateway) -> None:
    """Keeps what health says of the gateway fresh, and logs when it changes."""
    said = ""
    while True:
        state = await openclaw.check(max_age=0)
        if state.detail != said:
            said = state.detail
            log.log(logging.INFO if state.ok else logging.WARNING, "gateway: %s", said)
        await asyncio.sleep(CHECK_GATEWAY_EVERY)


async def _watch_checkout(origin: Origin) -> None:
    """Keeps what health says of the checkout fresh."""
    while True:
        await asyncio.sleep(CHECK_CHECKOUT_EVERY)
        origin.now = await asyncio.to_thread(_read_checkout)


def _read_checkout() -> Checkout:
    """The branch and commit that are checked out; a detached commit of `main` counts as `main`."""
    commit, _, branch = _git("rev-parse", "HEAD", "--abbrev-ref", "HEAD").partition("\n")
    mains = ("refs/heads/main", "refs/remotes/origin/main")
    if branch == "HEAD" and any(_git("merge-base", "--is-ancestor", commit, main) == "" for main in mains):
        branch = "main"
    return Checkout(branch or "unknown", commit)


def _git(*words: str) -> str:
    try:
        done = subprocess.run(  # noqa: S603 - fixed words
            ["git", "-C", str(environment.CHECKOUT), *words],  # noqa: S607 - whichever git the operator has
            capture_output=True,
            text=True,
            check=True,
            timeout=5,
        )
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return done.stdout.strip()


# --- health -------------------------------------------------------------------------------------------


async def read_health(request: Request, parts: OpenParts) -> Any:
    """How the service is, at once, whatever the gateway does; 503 where the database cannot be used."""
    origin: Origin = request.state.origin
    try:
        parts.db.read(sql.check)
        works = True
    except errors.Unavailable:
        works = False
    state = parts.openclaw.state
    health = Health(
        status="ok" if works else "error",
        version=VERSION,
        environment=origin.environment,
        branch=origin.runs.branch,
        commit=origin.runs.commit,
        port=request.scope["server"][1] or 0,
        stale=origin.now != origin.runs,
        failed_start=request.app.state.failed_start,
        uptime_seconds=round(time.monotonic() - origin.started, 3),
        database=DatabaseHealth(ok=works, sqlite=sqlite3.sqlite_version),
        gateway=GatewayHealth(
            url=parts.openclaw.url, ok=state.ok, checked_at=_iso(state.checked_at), detail=state.detail
        ),
    )
    return health if works else JSONResponse(health.model_dump(), 503, {"Retry-After": "5"})


def _iso(seconds: float) -> str | None:
    return clock.iso_time(seconds) if seconds else None


async def read_ready(parts: OpenParts) -> Ready:
    """Whether a turn can be taken now: 503 while the gateway cannot, or this process ends."""
    if parts.turns.draining:
        raise errors.Unavailable("This process is ending; another one takes over.", code="not_ready", retry_after=1)
    state = await parts.openclaw.check(max_age=1)
    if not state.ok:
        raise errors.Unavailable(state.detail, code="not_ready", retry_after=5)
    return Ready(status="ready", detail=state.detail, gateway_version=state.version)


# --- metrics ------------------------------------------------------------------------------------------


async def read_metrics(request: Request, parts: OpenParts) -> Response:
    """The metrics in Prometheus' text format, for callers on this machine and whoever has METRICS_TOKEN, which is
    sent as `Authorization: Bearer <token>`. What the database does not say is left out."""
    if not _is_local(request) and not _has_metrics_token(request, parts.settings):
        raise errors.Unauthorized(
            "The metrics are for callers on this machine. From elsewhere, send the operator's METRICS_TOKEN in the "
            "header `Authorization: Bearer <token>`."
        )
    try:
        turns = parts.db.read(sql.count_turns)
    except errors.Unavailable:
        turns = None
    commits, seconds = parts.db.write_time()
    runs = cast(Origin, request.state.origin).runs
    build = {"version": VERSION, "branch": runs.branch, "commit": runs.commit}
    figures = telemetry.Figures(turns, parts.openclaw.state.ok, commits, seconds, build)
    return Response(request.state.metrics.render(figures), media_type=telemetry.CONTENT_TYPE)


def _is_local(request: Request) -> bool:
    """Whether the caller is on this machine, and is neither a proxy that speaks for others nor a web page."""
    if any(name.startswith("x-forwarded-") or name in SPEAKS_FOR_OTHERS for name in request.headers):
        return False
    try:
        address = ip_address(request.client.host if request.client else "")
    except ValueError:  # a Unix socket
        return False
    mapped = address.ipv4_mapped if isinstance(address, IPv6Address) else None
    return (mapped or address).is_loopback


def _has_metrics_token(request: Request, settings: Settings) -> bool:
    if settings.metrics_token is None:
        return False
    scheme, _, sent = request.headers.get("authorization", "").partition(" ")
    token = settings.metrics_token.get_secret_value()
    return scheme.lower() == "bearer" and hmac.compare_digest(sent.strip().encode(), token.encode())


# --- OpenAPI ------------------------------------------------------------------------------------------


def _describe(app: FastAPI) -> dict[str, Any]:
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


app = create_app(environment.load())
