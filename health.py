"""What operators ask: alive, ready, the metrics, and which code runs."""

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
from web import OpenParts

router = APIRouter(tags=["health"])


VERSION = "1.0.0"


CHECK_CHECKOUT_EVERY = 2  # seconds


# Headers of a request that came to this machine from elsewhere, or that a browser sends for a web page.
SPEAKS_FOR_OTHERS = frozenset({"forwarded", "x-real-ip", "via", "origin"})


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
    """Which code runs, since when (seconds of the monotonic clock), and what the checkout holds by now."""

    runs: checkout.Checkout
    now: checkout.Checkout
    started: float

    @property
    def environment(self) -> checkout.Kind:
        """Which service this code is."""
        return checkout.kind_of(self.runs.branch)


async def watch_checkout(origin: Origin) -> None:
    """Keeps what health says of the checkout fresh."""
    while True:
        await asyncio.sleep(CHECK_CHECKOUT_EVERY)
        origin.now = await asyncio.to_thread(checkout.read, CHECKOUT)


@router.get("/health", response_model=Health, responses={503: {"model": Health}})
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


@router.get("/health/ready", response_model=Ready, openapi_extra=errors.raises("not_ready"))
async def read_ready(parts: OpenParts) -> Ready:
    """Whether a turn can be taken now: 503 while the gateway cannot, or this process ends."""
    if parts.turns.draining:
        raise errors.Unavailable("This process is ending; another one takes over.", code="not_ready", retry_after=1)
    state = await parts.openclaw.check(max_age=1)
    if not state.ok:
        raise errors.Unavailable(state.detail, code="not_ready", retry_after=5)
    websocket = WebSocketHealth(ok=state.websocket.ok, detail=state.websocket.detail)
    return Ready(status="ready", detail=state.detail, gateway_version=state.version, websocket=websocket)


@router.get("/metrics", response_class=PlainTextResponse, openapi_extra=errors.raises("unauthorized"))
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
