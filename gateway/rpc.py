"""Calls the gateway's WebSocket methods."""

import asyncio
import logging
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import aiohttp

import errors

from .completions import MAX_FRAME
from .failures import explained, incomplete, no_completion, refused, unavailable

log = logging.getLogger("clawd.gateway")


RPC_TIMEOUT = 10  # seconds for a connection with all its calls
CLOSE_TIMEOUT = 1  # seconds that the gateway has to answer the closing of a connection
SCOPES = ("operator.read", "operator.write", "operator.admin")
POLICY_VIOLATION = 1008  # the code with which the gateway closes a connection that it does not allow


class Connection:
    """A connection that the gateway has accepted.

    `clock_ahead` is the number of seconds by which the gateway's clock is ahead of ours; 0 if they may be equal.
    """

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self._socket = socket
        self.clock_ahead = 0.0

    async def call(self, method: str, params: dict[str, object]) -> dict[str, object]:
        """Calls a method and returns the payload of its answer. Raises errors.GatewayError."""
        await self._socket.send_json({"type": "req", "id": method, "method": method, "params": params})
        frame = await self._next_frame()
        while frame.get("id") != method:
            frame = await self._next_frame()
        if not frame.get("ok"):
            raise _refusal(method, frame.get("error"))
        payload = frame.get("payload")
        return payload if isinstance(payload, dict) else {}

    async def open(self, token: str, began: float) -> None:
        """Reads the gateway's clock and authenticates. `began` is the Unix time before the connection was made."""
        challenge = (await self._next_frame()).get("payload")
        sent = challenge.get("ts") if isinstance(challenge, dict) else None
        if isinstance(sent, int | float):
            # The gateway sent this between `began` and now: of the differences that fit, take the least.
            least, most = sent / 1000 - time.time(), sent / 1000 - began
            self.clock_ahead = min(max(least, 0.0), most)
        granted = (await self.call("connect", _hello(token))).get("auth")
        scopes = granted.get("scopes") if isinstance(granted, dict) else None
        if isinstance(scopes, list) and not set(SCOPES) <= {str(scope) for scope in scopes}:
            log.warning("the gateway granted only the scopes %.300r", scopes)
            raise refused(403, None)

    async def _next_frame(self) -> dict[str, object]:
        message = await self._socket.receive()
        if message.type is not aiohttp.WSMsgType.TEXT:
            raise refused(401, None) if self._socket.close_code == POLICY_VIOLATION else incomplete()
        frame = message.json()
        if not isinstance(frame, dict):
            raise no_completion()
        return frame


class Rpc:
    """A client of the gateway's WebSocket protocol."""

    def __init__(self, client: aiohttp.ClientSession, url: str, token: str) -> None:
        self._client = client
        self._url = url
        self._token = token

    @asynccontextmanager
    async def connection(self, seconds: float = RPC_TIMEOUT) -> AsyncIterator[Connection]:
        """Opens a connection, for at most this time. Its block may raise errors.GatewayError."""
        began = time.time()
        options = aiohttp.ClientWSTimeout(ws_close=CLOSE_TIMEOUT)
        try:
            async with (
                explained(self._url),
                asyncio.timeout(seconds),
                self._client.ws_connect(self._url, max_msg_size=MAX_FRAME, timeout=options) as socket,
            ):
                connection = Connection(socket)
                await connection.open(self._token, began)
                yield connection
        except errors.GatewayTimeout as error:
            raise errors.GatewayTimeout(
                f"OpenClaw did not answer over WebSocket within {seconds:g} seconds.", retryable=True
            ) from error
        except ValueError as error:  # a frame that is not JSON
            raise no_completion() from error

    async def call(self, method: str, params: dict[str, object]) -> dict[str, object]:
        """Calls one method and returns the payload of its answer. Raises errors.GatewayError."""
        async with self.connection() as connection:
            return await connection.call(method, params)


def _hello(token: str) -> dict[str, object]:
    return {
        "minProtocol": 3,
        "maxProtocol": 4,
        "client": {"id": "gateway-client", "version": "1.0.0", "platform": "linux", "mode": "backend"},
        "role": "operator",
        "scopes": list(SCOPES),
        "caps": [],
        "auth": {"token": token},
    }


def _refusal(method: str, error: object) -> errors.GatewayError:
    said = error if isinstance(error, dict) else {}
    log.warning("the gateway refused the call %s: %.50r %.300r", method, said.get("code"), said.get("message"))
    if "unauthorized" in str(said.get("message")).lower() or said.get("code") in ("FORBIDDEN", "NOT_PAIRED"):
        return refused(401, None)
    if said.get("code") == "UNAVAILABLE":
        return unavailable()
    return errors.GatewayError(
        f"OpenClaw refused the call {method}. The operator should look at this service's log.", retryable=True
    )
