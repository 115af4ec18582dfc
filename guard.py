"""What a request must pass before its route: its path, its caller, and its body, in that order.

Work in proportion to what a stranger sends is done only once it is known who asks, and within limits.
"""

import asyncio
import re
from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter
from fastapi.routing import APIRoute
from starlette.datastructures import Headers
from starlette.routing import Match
from starlette.types import ASGIApp, Message, Receive, Scope, Send

import auth
import errors
import web

MEGABYTE = 1024 * 1024
# Maximum bytes of a body by route: a message with its images in base64, a file of 10 MB as JSON, and all others.
LIMITS = {
    "/chat": 32 * MEGABYTE,
    "/chat/stream": 32 * MEGABYTE,
    "/projects/{project_id}/files/{path:path}": 11 * MEGABYTE,
}
USUAL_LIMIT = MEGABYTE
MAX_VALUES = 100_000  # of a JSON body; parsing holds the event loop for about 0.1 s per 100,000
STALLED_AFTER = 10  # seconds without a byte of the body
CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
SECURITY_HEADERS = [
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
    (b"referrer-policy", b"no-referrer"),
]


class _Answered(Exception):  # noqa: N818 - it is not an error: it ends the work on a HEAD request
    """The headers are sent, and a HEAD request wants no more."""


class Guard:
    """ASGI middleware that answers what must not reach a route, and completes what all answers have in common."""

    def __init__(self, app: ASGIApp, routers: Sequence[APIRouter]) -> None:
        """`routers` have all routes of the app that take a body."""
        self._app = app
        self._routes = [route for router in routers for route in router.routes if isinstance(route, APIRoute)]
        self._protected = [route for route in self._routes if auth.needs_caller(route)]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handles one ASGI connection."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        send = _with_security_headers(send)
        if CONTROL.search(scope["path"]):
            message = "The address contains a control character. Leave it out."
            await web.error_response(errors.Invalid(message, code="invalid_path"))(scope, receive, send)
        elif scope["method"] == "HEAD":
            await self._head(scope, receive, send)
        elif scope["method"] in ("GET", "OPTIONS"):
            await self._app(scope, receive, send)
        else:
            await self._with_body(scope, receive, send)

    async def _head(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers as GET does, without the body and without doing the work for it."""

        async def send_head(message: Message) -> None:
            if message["type"] == "http.response.start":
                await send(message)
                await send({"type": "http.response.body", "body": b""})
                raise _Answered

        as_get = {**scope, "method": "GET"}
        try:
            await self._app(as_get, receive, send_head)
        except _Answered:
            scope["route"] = as_get.get("route")  # for the metrics

    async def _with_body(self, scope: Scope, receive: Receive, send: Send) -> None:
        route = self._find(scope)
        if route is None:  # the router answers 404 or 405, without reading the body
            await self._app(scope, receive, send)
            return
        try:
            if route in self._protected:
                auth.authenticate(scope)
            body = await _read(scope, receive, LIMITS.get(route.path, USUAL_LIMIT))
            if route.body_field is not None and body:
                _check_json(scope, body)
        except errors.AppError as error:
            await web.error_response(error)(scope, receive, send)
        except web.RefusedError as refused:
            await web.http_error_response(refused.status, None)(scope, receive, send)
        else:
            await self._app(scope, _replay(body, receive), send)

    def _find(self, scope: Scope) -> APIRoute | None:
        return next((route for route in self._routes if route.matches(scope)[0] is Match.FULL), None)


def _with_security_headers(send: Send) -> Send:
    async def send_with_headers(message: Message) -> None:
        if message["type"] == "http.response.start":
            present = {name.lower() for name, _ in message.get("headers", ())}
            missing = [header for header in SECURITY_HEADERS if header[0] not in present]
            message["headers"] = [*message.get("headers", ()), *missing]
        await send(message)

    return send_with_headers


async def _read(scope: Scope, receive: Receive, limit: int) -> bytes:
    """Returns the whole body. Raises RefusedError if it exceeds the limit or stalls."""
    declared = Headers(scope=scope).get("content-length", "")
    if declared.isdecimal() and int(declared[:18]) > limit:
        raise web.RefusedError(413)
    pieces: list[bytes] = []
    size, more = 0, True
    while more:
        try:
            async with asyncio.timeout(STALLED_AFTER):
                message = await receive()
        except TimeoutError:
            raise web.RefusedError(408) from None
        more = message.get("more_body", False)
        pieces.append(message.get("body", b""))
        size += len(pieces[-1])
        if size > limit:
            raise web.RefusedError(413)
    return b"".join(pieces)


def _check_json(scope: Scope, body: bytes) -> None:
    """Raises RefusedError if the body is not labeled as JSON, cannot be UTF-8, or has too many values to be parsed."""
    kind = Headers(scope=scope).get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json" and not re.fullmatch(r"application/[\w.-]+\+json", kind):
        raise web.RefusedError(415)
    if b"\0" in body:  # UTF-16 and UTF-32 have such bytes, JSON in UTF-8 has not
        raise web.RefusedError(400)
    if count_values(body) > MAX_VALUES:
        raise web.RefusedError(413)


def count_values(body: bytes) -> int:
    """Returns an upper bound for the number of values in a JSON text, exact enough to tell text from structure.

    Counting bytes takes a millisecond for 10 MB. Only where strings contain many commas or brackets, as a CSV file
    does, they are cut out first.
    """
    count = _structure(body)
    if count <= MAX_VALUES:
        return count
    bare = body.replace(b"\\\\", b"").replace(b'\\"', b"")
    strings = bare.count(b'"') // 2
    if strings > MAX_VALUES:
        return strings
    return sum(map(_structure, bare.split(b'"')[::2]))


def _structure(text: bytes) -> int:
    return text.count(b",") + text.count(b"[") + text.count(b"{") + 1


def _replay(body: bytes, receive: Receive) -> Receive:
    """Returns a `receive` that gives the body at once, and then what the connection says."""
    messages: list[dict[str, Any]] = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive_again() -> Message:
        return messages.pop() if messages else await receive()

    return receive_again
