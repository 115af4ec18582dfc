"""A gateway without an agent, for `start-backend.sh --demo`: it answers in OpenClaw's shapes and says what it is.

As a program: `python demo.py --help`. The tests' stand-in for OpenClaw extends it with misbehavior.
"""

import argparse
import asyncio
import json
import re
import socket
import time
import uuid
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import BaseRoute, Route, WebSocketRoute
from starlette.websockets import WebSocket

Json = dict[str, Any]

PAUSE = 0.03  # seconds between two words
USAGE = {"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 15}
STORED_USAGE = {"input": 10, "output": 5, "totalTokens": 15}  # the same in the words of `chat.history`
REPLY = (
    "Hello! I am the demo stand-in: there is no OpenClaw gateway and no agent behind me. You wrote: “{text}”. "
    "That was message {number} of this conversation.{seen} A real agent would think about it now; "
    "I only show how a reply arrives, word by word. To talk to a real one, set CLAWDBOT_BASE_URL and CLAWDBOT_TOKEN "
    "and start without --demo."
)
# What OpenClaw 2026.9.6 says with these statuses: message and type; the others are plain text.
ERRORS = {
    400: ("Unknown agent 'nope'.", "invalid_request_error"),
    401: ("Unauthorized", "unauthorized"),
    413: ("Payload too large", "invalid_request_error"),
    429: ("Too many failed authentication attempts. Please try again later.", "rate_limited"),
}
PLAIN_ERRORS = {404: "Not Found", 503: "Service Unavailable"}


class RefusedError(Exception):
    """A request that OpenClaw answers with an error of its own; without a message, with its usual one."""

    def __init__(self, status: int, message: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.message = message or ERRORS.get(status, ("internal error",))[0]


def encoded(data: Json) -> bytes:
    """JSON as JavaScript writes it: only half surrogate pairs are escaped."""
    return json.dumps(data, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "backslashreplace")


def event(data: Json) -> bytes:
    """One event of a stream."""
    return b"data: " + encoded(data) + b"\n\n"


def frame(run_id: str, model: str, choices: list[Json], usage: Json | None = None) -> bytes:
    """A chunk of a chat completion, as an event."""
    head = {"id": run_id, "object": "chat.completion.chunk", "created": int(time.time()), "model": model}
    return event({**head, "choices": choices} | ({"usage": usage} if usage else {}))


def choice(delta: Json, finish_reason: str | None = None) -> list[Json]:
    """The choices of a chunk."""
    return [{"index": 0, "delta": delta, "finish_reason": finish_reason}]


class DemoGateway:
    """OpenClaw's routes and WebSocket as far as the service uses them. `sessions` holds the transcripts."""

    version = "stand-in"

    def __init__(self, token: str) -> None:
        self.token = token
        self.agents = ["main"]
        self.sessions: dict[str, list[Json]] = {}

    def app(self) -> Starlette:
        """The ASGI app."""
        return Starlette(routes=self.routes(), exception_handlers={RefusedError: _refuse})

    def routes(self) -> list[BaseRoute]:
        """The routes of the app."""
        return [
            Route("/v1/chat/completions", self.chat, methods=["POST"]),
            Route("/v1/models", self._models),
            Route("/startupz", lambda _: JSONResponse({"ok": True, "status": "started", "version": self.version})),
            Route("/healthz", lambda _: JSONResponse({"ok": True, "status": "live"})),
            WebSocketRoute("/", self._websocket),
        ]

    def now(self) -> int:
        """The Unix time in milliseconds, by this gateway's clock."""
        return int(time.time() * 1000)

    def check(self, request: Request) -> None:
        """Raises RefusedError for a request without the token."""
        if request.headers.get("authorization") != f"Bearer {self.token}":
            raise RefusedError(401)

    async def _models(self, request: Request) -> Response:
        self.check(request)
        names = ["openclaw", "openclaw/default", *(f"openclaw/{agent}" for agent in self.agents)]
        rest = {"object": "model", "created": 0, "owned_by": "openclaw", "permission": []}
        return JSONResponse({"object": "list", "data": [{"id": name, **rest} for name in names]})

    async def chat(self, request: Request) -> Response:
        """Streams the demo's reply, word by word."""
        self.check(request)
        body = await request.json()
        key = request.headers["x-openclaw-session-key"]
        content = body["messages"][-1]["content"]
        parts = content if isinstance(content, list) else [{"type": "text", "text": content}]
        text = "\n".join(part["text"] for part in parts if part["type"] == "text")
        images = sum(part["type"] == "image_url" for part in parts)
        number = self.record(key, role="user", content=text)
        seen = f" Pictures that came with it: {images}." if images else ""
        words = re.findall(r"\s*\S+|\s+$", REPLY.format(text=text[:200], number=number, seen=seen))
        return StreamingResponse(self._words(key, body["model"], words), media_type="text/event-stream")

    async def _words(self, key: str, model: str, words: list[str]) -> AsyncIterator[bytes]:
        run_id = f"chatcmpl_{uuid.uuid4()}"
        yield frame(run_id, model, choice({"role": "assistant"}))
        for word in words:
            await asyncio.sleep(PAUSE)
            yield frame(run_id, model, choice({"content": word}))
        self.record_reply(key, run_id, "".join(words))
        yield frame(run_id, model, choice({}, "stop"))
        yield frame(run_id, model, [], USAGE)
        yield b"data: [DONE]\n\n"

    def record_reply(self, key: str, run_id: str, text: str, stop_reason: str = "stop") -> None:
        """Appends a finished reply to a transcript."""
        content = [{"type": "text", "text": text}] if text else []
        rest: Json = {"content": content, "stopReason": stop_reason, "usage": STORED_USAGE}
        self.record(key, {"runId": run_id}, role="assistant", **rest)

    def record(self, key: str, marks: Json | None = None, **item: Any) -> int:
        """Appends to a transcript, with marks as OpenClaw's own; returns how many messages the user has in it."""
        items = self.sessions.setdefault(key, [])
        marks = {**(marks or {}), "id": uuid.uuid4().hex[:8], "seq": len(items) + 1}
        items.append({**item, "timestamp": self.now(), "__openclaw": marks})
        return sum(item["role"] == "user" for item in items)

    async def _websocket(self, websocket: WebSocket) -> None:
        await websocket.accept()
        challenge = {"nonce": str(uuid.uuid4()), "ts": self.now()}
        await websocket.send_json({"type": "event", "event": "connect.challenge", "payload": challenge})
        connected = False
        async for text in websocket.iter_text():
            request = json.loads(text)
            answer: Json = {"type": "res", "id": request["id"], "ok": True}
            try:
                if not connected and request["method"] != "connect":
                    raise RefusedError(400, "invalid handshake: first request must be connect")
                answer["payload"] = self.call(request["method"], request.get("params") or {})
                connected = True
            except RefusedError as refused:
                answer |= {"ok": False, "error": {"code": "INVALID_REQUEST", "message": refused.message}}
            await websocket.send_json(answer)
            if not connected:
                await websocket.close(1008)
                return

    def call(self, method: str, params: Json) -> Json:
        """The payload that answers a call over the WebSocket. Raises RefusedError."""
        match method:
            case "connect":
                if (params.get("auth") or {}).get("token") != self.token:
                    raise RefusedError(401, "unauthorized: gateway token mismatch (provide gateway auth token)")
                return {"type": "hello-ok", "protocol": 4, "server": {"version": self.version}}
            case "sessions.delete":
                known = self.sessions.pop(params["key"], None) is not None
                return {"ok": True, "key": params["key"], "deleted": known}
            case "chat.history":
                items = self.sessions.get(params["sessionKey"], [])[-params.get("limit", 200) :]
                return {"sessionKey": params["sessionKey"], "messages": items}
        raise RefusedError(400, f"unknown method: {method}")


async def _refuse(_: Request, refused: Exception) -> Response:
    status, message = (refused.status, refused.message) if isinstance(refused, RefusedError) else (500, "")
    if isinstance(refused, RefusedError) and refused.code:
        error = {"message": message, "type": "service_unavailable", "code": refused.code}
        return JSONResponse({"error": error}, status, {"Retry-After": "1"})
    if status in PLAIN_ERRORS:
        return PlainTextResponse(PLAIN_ERRORS[status], status)
    kind = ERRORS.get(status, ("", "api_error"))[1]
    headers = {"Retry-After": "7"} if status == 429 else None
    return JSONResponse({"error": {"message": message, "type": kind}}, status, headers)


def main() -> None:
    """Serves on a free port of this machine, until SIGINT or SIGTERM."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--token", required=True, help="the token that requests must carry")
    parser.add_argument("--port-file", type=Path, required=True, help="file that gets the port once it listens")
    options = parser.parse_args()
    listener = socket.create_server(("127.0.0.1", 0))
    partial = options.port_file.with_suffix(".partial")
    partial.write_text(f"{listener.getsockname()[1]}\n")
    partial.replace(options.port_file)
    app = DemoGateway(options.token).app()
    uvicorn.Server(uvicorn.Config(app, lifespan="off", log_level="warning", access_log=False)).run([listener])


if __name__ == "__main__":
    main()
