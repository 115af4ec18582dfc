"""Calls the gateway's WebSocket methods, and finds replies in the history that one of them returns."""

import asyncio
import logging
from typing import NamedTuple

import aiohttp

from .completions import MAX_FRAME, usage_of
from .failures import explained, no_completion, refused

log = logging.getLogger("clawd.gateway")


RPC_TIMEOUT = 10  # seconds
HISTORY = {"limit": 50, "maxChars": 500_000}  # the maximum of text that chat.history returns


class Finished(NamedTuple):
    """A finished reply in the gateway's history."""

    text: str
    run_id: str
    usage: dict[str, int] | None


class Rpc:
    """A client of the gateway's WebSocket protocol. It opens a connection for each call."""

    def __init__(self, client: aiohttp.ClientSession, url: str, token: str) -> None:
        self._client = client
        self._url = url
        self._token = token

    async def call(self, method: str, params: dict[str, object]) -> dict[str, object]:
        """Calls a method and returns the payload of its answer. Raises errors.GatewayError."""
        try:
            async with (
                explained(self._url),
                asyncio.timeout(RPC_TIMEOUT),
                self._client.ws_connect(self._url, max_msg_size=MAX_FRAME) as socket,
            ):
                await _request(socket, "connect", _hello(self._token))
                return await _request(socket, method, params)
        except (ValueError, TypeError) as error:  # frames that are not JSON or not text
            raise no_completion() from error


def _hello(token: str) -> dict[str, object]:
    return {
        "minProtocol": 3,
        "maxProtocol": 4,
        "client": {"id": "gateway-client", "version": "1.0.0", "platform": "linux", "mode": "backend"},
        "role": "operator",
        "scopes": ["operator.read", "operator.write", "operator.admin"],
        "caps": [],
        "auth": {"token": token},
    }


async def _request(
    socket: aiohttp.ClientWebSocketResponse, method: str, params: dict[str, object]
) -> dict[str, object]:
    await socket.send_json({"type": "req", "id": method, "method": method, "params": params})
    while True:
        frame = await socket.receive_json()
        if frame.get("id") == method:
            break
    if not frame.get("ok"):
        error = frame.get("error") or {}
        log.warning("the gateway refused the call %s: %.300r", method, error.get("message"))
        raise refused(401 if "unauthorized" in str(error.get("message")).lower() else 503, None)
    payload = frame.get("payload")
    return payload if isinstance(payload, dict) else {}


def find_reply(
    items: list[dict[str, object]], asked: str, run_id: str | None, known: set[str], got: str
) -> Finished | None:
    """Returns the finished reply among the items of `chat.history`, or None.

    The other arguments are those of `Gateway.finished_reply`.
    """
    last = max((at for at, item in enumerate(items) if item.get("role") == "user"), default=-1)
    replies = [item for item in items[last + 1 :] if item.get("role") == "assistant"]
    if last < 0 or not replies or replies[-1].get("stopReason") != "stop":
        return None
    notes = [item.get("__openclaw") for item in replies]
    runs = {note.get("runId") for note in notes if isinstance(note, dict)}
    cut = any(isinstance(note, dict) and note.get("truncated") for note in notes)
    ours = runs == {run_id} if run_id else _text_of(items[last]) == asked and not runs & known
    if cut or not ours or len(runs) != 1:
        return None
    texts = [_text_of(item) for item in replies]
    text = next((text for text in ("".join(texts), "\n\n".join(texts)) if text.startswith(got)), None)
    found = next(iter(runs))
    if not text or not isinstance(found, str):
        return None
    raw = replies[-1].get("usage")
    usage = usage_of(raw, "input", "output", "totalTokens") if isinstance(raw, dict) else None
    return Finished(text, found, usage)


def _text_of(item: dict[str, object]) -> str:
    content = item.get("content")
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, list) else []
    return "".join(str(part.get("text", "")) for part in parts if isinstance(part, dict))
