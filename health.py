"""The routes for operators: health, readiness, metrics, and which code is running."""

import asyncio
import hmac
import sqlite3
import time
from dataclasses import dataclass
from ipaddress import IPv6Address, ip_address
from typing import Any, Literal, cast

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse, PlainTextResponse
from pydantic import BaseModel, Field

import checkout
import clock
import errors
import sql
import telemetry
from settings import CHECKOUT, Settings
from web import OpenParts, Parts

router = APIRouter(tags=["health"])


VERSION = "1.0.0"


CHECK_CHECKOUT_EVERY = 2  # seconds between two readings of the checkout's branch and commit


# Headers that a proxy adds to a request that it forwards, or that a browser adds to a request of a web page.
FORWARDED_HEADERS = frozenset({"forwarded", "x-real-ip", "via", "origin"})


class DatabaseHealth(BaseModel):
    ok: bool
    detail: str = Field(description="Why the database cannot be used; empty if it can.")
    oldest_write_seconds: float = Field(description="How long the oldest write has been waiting for its commit.")
    sqlite: str = Field(description="Version of the SQLite library.")


class GatewayHealth(BaseModel):
    url: str
    ok: bool = Field(description="True if the gateway could take a turn at the last check.")
    checked_at: str | None = Field(description="Time of the last check, ISO 8601 in UTC; null before the first one.")
    detail: str = Field(description="Result of the last check: what is wrong and how to fix it, if anything is.")


class Health(BaseModel):
    status: Literal["ok", "error"]
    version: str
    environment: Literal["production", "development"]
    branch: str
    commit: str
    port: int
    stale: bool = Field(description="Another commit or branch is checked out: a restart would run other code.")
    failed_start: str | None = Field(
        description="Why newer code failed to start while this process continued to serve; otherwise null."
    )
    uptime_seconds: float
    database: DatabaseHealth
    gateway: GatewayHealth


class WebSocketHealth(BaseModel):
    ok: bool
    detail: str


class Ready(BaseModel):
    status: Literal["ready"]
    detail: str
    gateway_version: str | None
    websocket: WebSocketHealth = Field(
        description="Whether the gateway's WebSocket works. Deletes in the gateway and the recovery of replies need it."
    )


@dataclass(slots=True)
class Origin:
    """Which code this process runs, and which code is checked out now."""

    runs: checkout.Checkout
    now: checkout.Checkout
    started: float  # seconds of `time.monotonic`

    @property
    def environment(self) -> checkout.Kind:
        """`production` if the code is of `main`, otherwise `development`."""
        return checkout.kind_of(self.runs.branch)


async def watch_checkout(origin: Origin) -> None:
    """Updates `origin.now` every CHECK_CHECKOUT_EVERY seconds, so that `/health` reads it without calling git."""
    while True:
        await asyncio.sleep(CHECK_CHECKOUT_EVERY)
        origin.now = await asyncio.to_thread(checkout.read, CHECKOUT)


@router.get("/health", response_model=Health, responses={503: {"model": Health}})
async def read_health(request: Request, parts: OpenParts) -> Any:
    """Returns the state of the service. Answers at once, because the gateway is checked in the background. The status
    is 503 if the database cannot be read and written."""
    origin: Origin = request.state.origin
    database = await _database_health(parts)
    state = parts.openclaw.state
    health = Health(
        status="ok" if database.ok else "error",
        version=VERSION,
        environment=origin.environment,
        branch=origin.runs.branch,
        commit=origin.runs.commit,
        port=request.scope["server"][1] or 0,
        stale=origin.now != origin.runs,
        failed_start=request.app.state.failed_start,
        uptime_seconds=round(time.monotonic() - origin.started, 3),
        database=database,
        gateway=GatewayHealth(
            url=parts.openclaw.url, ok=state.ok, checked_at=_iso(state.checked_at), detail=state.detail
        ),
    )
    return health if database.ok else JSONResponse(health.model_dump(), 503, {"Retry-After": "5"})


async def _database_health(parts: Parts) -> DatabaseHealth:
    try:
        parts.db.read(sql.check)
        detail = await parts.db.trouble()
    except errors.Unavailable:
        detail = "The database cannot be read; the log contains the error."
    return DatabaseHealth(
        ok=not detail,
        detail=detail,
        oldest_write_seconds=round(parts.db.waited(), 3),
        sqlite=sqlite3.sqlite_version,
    )


def _iso(seconds: float) -> str | None:
    return clock.iso_time(seconds) if seconds else None


@router.get("/health/ready", response_model=Ready, openapi_extra=errors.raises("not_ready"))
async def read_ready(parts: OpenParts) -> Ready:
    """Answers 200 if a turn can start now, and 503 while the database cannot be written, the gateway cannot take a turn
    or this process is stopping. `detail` states the cause and the fix. Checks the gateway if its last check is older
    than one second."""
    if parts.turns.draining:
        raise errors.Unavailable(
            "This process is stopping. Retry in a second: after a restart, the new process answers.",
            code="not_ready",
            retry_after=1,
        )
    database = await _database_health(parts)
    if not database.ok:
        raise errors.Unavailable(database.detail, code="not_ready", retry_after=5)
    state = await parts.openclaw.check(max_age=1)
    if not state.ok:
        raise errors.Unavailable(state.detail, code="not_ready", retry_after=5)
    websocket = WebSocketHealth(ok=state.websocket.ok, detail=state.websocket.detail)
    return Ready(status="ready", detail=state.detail, gateway_version=state.version, websocket=websocket)


@router.get("/metrics", response_class=PlainTextResponse, openapi_extra=errors.raises("unauthorized"))
async def read_metrics(request: Request, parts: OpenParts) -> Response:
    """Returns metrics in Prometheus' text format. Answers callers on the same machine, and callers elsewhere that send
    `Authorization: Bearer <METRICS_TOKEN>`. Omits the numbers of running and waiting turns while the database cannot be
    read."""
    if not _is_local(request) and not _has_metrics_token(request, parts.settings):
        raise errors.Unauthorized(
            "Only callers on the same machine can read the metrics without a token. From elsewhere or through a proxy, "
            "send `Authorization: Bearer <METRICS_TOKEN>`; the operator sets METRICS_TOKEN."
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
    """Returns whether the request comes from a program on this machine. A proxy on this machine also connects from a
    loopback address, and so does a browser on it that shows a foreign web page: their headers give both away."""
    if any(name.startswith("x-forwarded-") or name in FORWARDED_HEADERS for name in request.headers):
        return False
    try:
        address = ip_address(request.client.host if request.client else "")
    except ValueError:  # a client on a Unix socket has no IP address
        return False
    mapped = address.ipv4_mapped if isinstance(address, IPv6Address) else None
    return (mapped or address).is_loopback


def _has_metrics_token(request: Request, settings: Settings) -> bool:
    if settings.metrics_token is None:
        return False
    scheme, _, sent = request.headers.get("authorization", "").partition(" ")
    token = settings.metrics_token.get_secret_value()
    return scheme.lower() == "bearer" and hmac.compare_digest(sent.strip().encode(), token.encode())
