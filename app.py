"""Composition: `create_app` builds the FastAPI app, and its lifespan opens and closes everything that it uses."""

import asyncio
import logging
import sqlite3
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any, TypedDict

from fastapi import FastAPI
from starlette.middleware import Middleware

import auth
import chat_handlers
import checkout
import database
import errors
import file_utils
import gateway
import health
import image_handler
import project_manager
import sql
import telemetry
import web
from guard import Guard
from outbox import Outbox
from replies import FINAL
from runs import Runs
from settings import CHECKOUT, Settings, load_settings
from turns import Turns
from web import Parts

CHECK_GATEWAY_EVERY = 15  # seconds between two checks of the gateway
DECODING = 2  # messages whose images are decoded at the same time

ROUTERS = (auth.router, project_manager.router, chat_handlers.router, health.router)

log = logging.getLogger("clawd.app")


class State(TypedDict):
    """The objects that the lifespan opened; routes read them from `request.state`."""

    parts: Parts
    identity: auth.Identity
    origin: health.Origin
    metrics: telemetry.Metrics


# --- the app ------------------------------------------------------------------------------------------


def create_app(settings: Settings) -> FastAPI:
    """Returns an app that uses these settings. It opens no file, socket or thread before its lifespan starts."""
    metrics = telemetry.Metrics(sorted(FINAL))
    app = FastAPI(
        title="clawd-backend",
        version=health.VERSION,
        description="Private conversations of many users with an OpenClaw agent.",
        lifespan=_lifespan(settings, metrics),
        middleware=[*web.middleware(settings.cors_origins, metrics), Middleware(Guard, ROUTERS)],
        redirect_slashes=False,
        exception_handlers=web.EXCEPTION_HANDLERS,
    )
    app.state.turns = None  # set by the lifespan; `handover` lets these turns finish before its process exits
    app.state.failed_start = None  # `handover` stores here why newer code did not start
    for router in ROUTERS:
        app.include_router(router)
    # type: FastAPI documents replacing this method as the way to extend the OpenAPI document.
    app.openapi = lambda: web.describe(app)  # type: ignore[method-assign]
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
            outbox = Outbox(db, openclaw, images, settings.projects)
            runs = Runs(db, openclaw, images, metrics)
            turns = Turns(db, runs, images, outbox, metrics, settings.drain_seconds)
            turns.open()
            stack.push_async_callback(turns.close)
            app.state.turns = turns
            code = checkout.read(CHECKOUT)
            origin = health.Origin(code, code, time.monotonic())
            for watching in (_watch_gateway(openclaw), health.watch_checkout(origin)):
                stack.callback(asyncio.create_task(watching).cancel)
            log.info(
                "clawd-backend %s started: branch %s, commit %.7s, database %s",
                *(health.VERSION, code.branch, code.commit, db.path),
            )
            yield State(
                parts=Parts(settings, db, openclaw, images, asyncio.Semaphore(DECODING), turns, outbox),
                identity=identity,
                origin=origin,
                metrics=metrics,
            )
            log.info("stopping clawd-backend")

    return lifespan


def _adoption_context(images: image_handler.ImageStore) -> sql.AdoptionContext:
    def keep(session_key: str, source: str) -> sql.KeptImage | None:
        kept = images.adopt(session_key, source)
        return kept and sql.KeptImage(*kept)

    return sql.AdoptionContext(keep, CHECKOUT)


@contextmanager
def _needs(variable: str, path: Path) -> Iterator[None]:
    """Turns an error raised inside the block into a StartFailedError that names the setting to correct."""
    try:
        yield
    except (errors.AppError, OSError, ValueError, sqlite3.Error) as error:
        raise web.StartFailedError(f"{variable}={path} cannot be used: {error}") from error


async def _watch_gateway(openclaw: gateway.Gateway) -> None:
    """Checks the gateway every CHECK_GATEWAY_EVERY seconds and logs its state whenever that changes. `/health` shows
    the result of the last check."""
    logged = ""
    while True:
        state = await openclaw.check(max_age=0)
        if state.summary != logged:
            logged = state.summary
            log.log(logging.INFO if state.ok and state.websocket.ok else logging.WARNING, "gateway: %s", logged)
        await asyncio.sleep(CHECK_GATEWAY_EVERY)


app = create_app(load_settings())
