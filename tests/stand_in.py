"""A small OpenClaw gateway over real loopback HTTP, for the tests: the demo's, which misbehaves when it is asked to.

It answers in the shapes of the real one (package `openclaw` 2026.9.6) and needs nothing that the service does
not need. A directive in the newest user message, `[[key=value key=value]]`, makes it misbehave: see `Plan`.
"""

import asyncio
import base64
import contextlib
import hashlib
import json
import re
import socket
import threading
import time
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import uvicorn
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import BaseRoute, Route
from starlette.types import Receive, Scope, Send
from starlette.websockets import WebSocket

from demo import USAGE, DemoGateway, Json, RefusedError, encoded, event

NO_RESPONSE = "No response from OpenClaw."
MAX_BODY = 20 * 1024 * 1024
DIRECTIVE = re.compile(r"\[\[(\w+=[^\[\]]*)\]\]")
MODEL = re.compile(r"openclaw(?:/default)?|(?:openclaw[:/]|agent:)([a-z0-9][a-z0-9_-]{0,63})")
DATA_URL = re.compile(r"data:image/[\w.+-]+;base64,(.*)", re.S)
PICTURE = re.compile(rb"\xff\xd8\xff|\x89PNG\r\n\x1a\n|GIF8[79]a|RIFF....WEBP|....ftyp", re.S)
# Two characters a word at least; most take several bytes each, so that a cut is likely to hit one.
WORDS = ("Hello ", "naïve ", "Grüße, ", "日本語", "👩‍👩‍👧‍👦", '"C:\\dir" ', "a\n\nb", "x\u2028y", "n\u0303 ", "€ ")
FAILED: Json = {"error": {"message": "internal error", "type": "api_error"}}
DRAINING = "Gateway is temporarily unavailable while suspending or restarting"
BAD_IMAGE = "Invalid image_url content in `messages`."
# What `[[end=...]]` may say: OpenClaw itself holds the run for done; the body is this and no more; the rest.
COMPLETE = ("done", "no_done", "empty", "blank", "surrogates")
BODIES = {
    "garbage": b"\x00\xffnothing that resembles\xfe an event stream\r\r\n{]",
    "html": b"<!doctype html><title>Welcome</title><h1>Some other server</h1>",
}
# What the standard lets a stream contain without meaning anything, and what other servers send between two chunks.
ODD_LINES = b"retry: 3\nnonsense: 1\na line without a colon\nevent: message\nid\n"
ODD_EVENTS = (
    b'data:\n\ndata: {"error":null}\n\ndata: {"choices":null,"usage":null}\n\ndata: {"choices":[{"index":0}]}\n\n'
    b'data: {"choices":[{"index":1,"delta":{"content":"another choice"}}]}\n\n'
    b'data: {"choices":[{"index":0,"delta":null,"finish_reason":null}]}\n\n'
)
ENDS = (*COMPLETE, *BODIES, "eof", "drop", "error", "hang", "badjson")


@dataclass(frozen=True)
class Plan:
    """What a message's directive asks for. Times are in seconds, `size` counts characters, `big` bytes.

    `odd` adds what a reader must ignore; a `deaf` run does not notice that its caller left; `finish` is the reason
    for the end; it `says` these chunks, which `|` separates, with `_` for a space.
    """

    chunks: int = 10
    size: int = 12
    delay: float = 0.0
    first: float = 0.0
    seed: int = 0
    end: str = "done"
    status: int = 200
    big: int = 0
    split: int = 0
    crlf: int = 0
    comments: int = 0
    odd: int = 0
    deaf: int = 0
    finish: str = "stop"
    says: str = ""

    @classmethod
    def of(cls, text: str) -> "Plan":
        """The plan in a message. Raises RefusedError for an unknown directive: a test may have misspelt it."""
        kinds = {name: type(value) for name, value in vars(cls()).items()}
        given = [pair.partition("=") for block in DIRECTIVE.findall(text) for pair in block.split()]
        try:
            plan = cls(**{key: kinds[key](value) for key, _, value in given})
        except (KeyError, ValueError) as error:
            raise RefusedError(400, f"The stand-in has no such directive: {error}") from None
        if plan.end not in ENDS:
            raise RefusedError(400, f"The stand-in has no such end: {plan.end}")
        return plan

    def pieces(self) -> list[str]:
        """The contents of the chunks, the same for the same plan."""
        if self.end in ("empty", "blank"):
            return [NO_RESPONSE] * (self.end == "empty")
        if self.says:
            return self.says.replace("_", " ").split("|")
        if self.big:
            return ["é" * (self.big // 2) + "e" * (self.big % 2)]
        total = self.chunks * self.size
        choices = hashlib.shake_256(str(self.seed).encode()).digest(total // 2 + 1)
        text = "".join(WORDS[choice % len(WORDS)] for choice in choices)
        pieces = [text[start : start + self.size] for start in range(0, total, self.size)]
        if self.end == "surrogates":
            pieces[len(pieces) // 2 : len(pieces) // 2] = ["\ud83d", "\ude00"]
        return pieces


def reply_text(directive_text: str, number: int = 1, images: Sequence[bytes] = ()) -> str:
    """The whole reply to a message, the `number`th of its conversation, as a client must have it."""
    return _joined(_pieces(directive_text, number, images))


def _pieces(text: str, number: int, images: Sequence[bytes]) -> list[str]:
    if DIRECTIVE.search(text):
        return Plan.of(text).pieces()
    pictures = "".join(f" [image {hashlib.sha256(image).hexdigest()[:12]}]" for image in images)
    said = f"You said: {text} (message {number} of this conversation){pictures}"
    return re.findall(r"\s*\S+|\s+$", said)


def _joined(pieces: list[str]) -> str:
    return "".join(pieces).encode("utf-16", "surrogatepass").decode("utf-16")


@dataclass
class Received:
    """A chat request as it came; `at` is `time.time()`."""

    headers: dict[str, str]
    body: Json
    text: str
    session_key: str
    at: float = field(default_factory=time.time)


@dataclass
class Run:
    """An agent's run; `sent` counts the characters handed to the connection.

    `aborted` means that its caller left, `failed` that it ended without a reply of its own accord.
    """

    session_key: str
    text: str
    model: str
    run_id: str = field(default_factory=lambda: f"chatcmpl_{uuid.uuid4()}")
    state: Literal["running", "complete", "aborted", "failed"] = "running"
    sent: int = 0
    written: str = ""
    created: int = field(default_factory=lambda: int(time.time()))

    def frame(self, kind: str, choices: list[Json], usage: Json | None = None) -> Json:
        """A completion, or a chunk of one."""
        head = {"id": self.run_id, "object": kind, "created": self.created, "model": self.model}
        return {**head, "choices": choices} | ({"usage": usage} if usage else {})

    def chunk(self, delta: Json, finish_reason: str | None = None) -> bytes:
        """A chunk as an event of the stream."""
        choice = {"index": 0, "delta": delta, "finish_reason": finish_reason}
        return event(self.frame("chat.completion.chunk", [choice]))


def _newest(messages: list[Json]) -> tuple[str, list[bytes]]:
    """Text and pictures of the newest user message. Raises RefusedError in OpenClaw's words."""
    content = next((item["content"] for item in reversed(messages) if item["role"] == "user"), "")
    parts: list[Json] = content if isinstance(content, list) else [{"type": "text", "text": content}]
    text = "\n".join(part["text"] for part in parts if part["type"] == "text")
    images = [_picture(part["image_url"]["url"]) for part in parts if part["type"] == "image_url"]
    if not text.strip() and not images:
        raise RefusedError(400, "Missing user message in `messages`.")
    if len(images) > 8:
        raise RefusedError(400, BAD_IMAGE)
    return text, images


def _picture(url: str) -> bytes:
    encoded = DATA_URL.fullmatch(url)
    with contextlib.suppress(ValueError):
        data = base64.b64decode(encoded[1] if encoded else "", validate=True)
        if PICTURE.match(data):
            return data
    raise RefusedError(400, BAD_IMAGE)


async def _wire(plan: Plan, frames: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """The frames as the plan wants them on the wire."""
    start_of_stream = b"\xef\xbb\xbf"
    async for frame in frames:
        data = b": a comment\n\n: another\n" + frame if plan.comments else frame
        data = data.replace(b"\n", b"\r\n") if plan.crlf else data
        if plan.odd:
            last = b"data: [DONE]" if frame.startswith(b"data: [DONE]") else data + ODD_EVENTS
            data, start_of_stream = start_of_stream + (ODD_LINES + last).replace(b"\n", b"\r"), b""
        step = plan.split or len(data)
        for start in range(0, len(data), step):
            yield data[start : start + step]
            await asyncio.sleep(0)


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class _Answer(StreamingResponse):
    """A run's body. A caller who leaves ends the run, unless it is deaf; `over(left)` is called whatever the end."""

    def __init__(
        self, body: AsyncIterator[bytes], kind: str, cut: bool, over: Callable[[bool], None], deaf: bool = False
    ) -> None:
        super().__init__(body, headers={"Cache-Control": "no-cache"}, media_type=kind)
        self._cut = cut
        self._deaf = deaf
        self._over = over

    async def __call__(self, _scope: Scope, receive: Receive, send: Send) -> None:
        sending = asyncio.create_task(self._send(send))
        leaving = asyncio.create_task(_left(receive))
        try:
            await asyncio.wait((sending, leaving), return_when=asyncio.FIRST_COMPLETED)
            if self._deaf:
                await sending
        finally:
            self._over(leaving.done() and not sending.done())
            leaving.cancel()
            sending.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await sending

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        async for data in self.body_iterator:
            await send({"type": "http.response.body", "body": data, "more_body": True})
        if not self._cut:  # uvicorn closes the connection of a response that was left without its end
            await send({"type": "http.response.body", "body": b""})


class _Server(uvicorn.Server):
    """Ends within milliseconds: a test makes many of these, and a gateway that dies waits for nobody."""

    async def main_loop(self) -> None:
        while not await self.on_tick(0):  # noqa: ASYNC110 - a signal handler sets uvicorn's flag, not an event
            await asyncio.sleep(0.01)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        for server in self.servers:
            server.close()
        for listener in sockets or []:
            listener.close()
        tasks = list(self.server_state.tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for connection in list(self.server_state.connections):
            connection.shutdown()


class StandIn(DemoGateway):
    """The gateway, in a thread of its own: `with StandIn() as gateway: ... gateway.url ...`.

    It may be stopped and started again on its port; its sessions outlive that, as OpenClaw's do.
    `requests`, `runs` and `deleted` grow in the order of events; `sessions` holds the transcripts, `archived` the keys
    of archived conversations. Its clock is `clock_ahead` seconds ahead. While it is `draining`, it refuses new work.
    `websocket_status` is the HTTP status with which it refuses a WebSocket, or 0 to leave it without an answer.
    """

    def __init__(self, port: int = 0, token: str = "stand-in-token") -> None:  # noqa: S107 - of tests
        super().__init__(token)
        self.host = "127.0.0.1"
        self.port = port
        self.endpoint_enabled = True
        self.draining = False
        self.websocket_status: int | None = None
        self.archived: set[str] = set()
        self.clock_ahead = 0.0
        self.requests: list[Received] = []
        self.runs: list[Run] = []
        self.deleted: list[str] = []
        self._busy: set[str] = set()
        self._server: uvicorn.Server | None = None
        self._thread: threading.Thread | None = None

    @property
    def url(self) -> str:
        """Its address, without a trailing slash."""
        return f"http://{self.host}:{self.port}"

    @property
    def completed(self) -> list[Run]:
        """The runs that ended with a reply."""
        return [run for run in self.runs if run.state == "complete"]

    @property
    def aborted(self) -> list[Run]:
        """The runs whose callers left."""
        return [run for run in self.runs if run.state == "aborted"]

    def __enter__(self) -> "StandIn":
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        """Serves from a thread; returns once it does. Raises OSError if the port is taken."""
        self._server, listener = self.bind()
        self._thread = threading.Thread(target=self._server.run, args=([listener],), daemon=True)
        self._thread.start()
        while not self._server.started and self._thread.is_alive():
            time.sleep(0.002)

    def stop(self) -> None:
        """Ends at once and cuts what streams; harmless when it does not run."""
        if self._server and self._thread:
            self._server.should_exit = True
            self._thread.join()
        self._server = self._thread = None

    def bind(self) -> tuple[uvicorn.Server, socket.socket]:
        """A server and the socket it is to serve, which is bound and says the port."""
        # Nothing is logged: what a plan breaks on purpose would look like a fault in a test's output.
        quiet: Json = {"log_config": None, "log_level": "critical", "access_log": False}
        server = _Server(uvicorn.Config(self.app(), lifespan="off", **quiet))
        listener = socket.create_server((self.host, self.port))
        self.port = listener.getsockname()[1]
        return server, listener

    def routes(self) -> list[BaseRoute]:
        """The demo's, and one that lists the runs."""
        return [*super().routes(), Route("/_requests", self._list_runs)]

    def now(self) -> int:
        """As in the demo, by a clock that may be wrong."""
        return super().now() + int(self.clock_ahead * 1000)

    def check(self, request: Request) -> None:
        """As in the demo; the endpoint may be off, or the gateway draining."""
        if self.draining:
            raise RefusedError(503, DRAINING, "gateway_unavailable")
        if not self.endpoint_enabled:
            raise RefusedError(404)
        super().check(request)

    async def _list_runs(self, _: Request) -> Response:
        shown = ("session_key", "text", "run_id", "state", "sent")
        return JSONResponse([{name: getattr(run, name) for name in shown} for run in self.runs])

    async def chat(self, request: Request) -> Response:
        """Does what the message's directive says."""
        self.check(request)
        raw = await request.body()
        if len(raw) > MAX_BODY:
            raise RefusedError(413)
        body = json.loads(raw)
        key = self._session_key(body, request.headers.get("x-openclaw-session-key"))
        text, images = _newest(body["messages"])
        self.requests.append(Received(dict(request.headers), body, text, key))
        plan = Plan.of(text)
        if plan.status != 200:
            raise RefusedError(plan.status)
        run = Run(key, text, body["model"])
        if key in self.archived:
            if not body.get("stream"):
                raise RefusedError(500)
            failed = run.chunk({"role": "assistant"}) + event(FAILED) + b"data: [DONE]\n\n"
            return Response(failed, media_type="text/event-stream")
        await self._claim(key)
        self.runs.append(run)
        number = self.record(key, role="user", content=text)
        return self._answer(run, plan, _pieces(text, number, images), body)

    async def _claim(self, key: str) -> None:
        if key in self._busy:
            await asyncio.sleep(0.02)  # a caller who left just now may not have been noticed yet
        if key in self._busy:
            raise RefusedError(500)
        self._busy.add(key)

    def _answer(self, run: Run, plan: Plan, pieces: list[str], body: Json) -> Response:
        def over(left: bool) -> None:
            self._busy.discard(run.session_key)
            if run.state == "running":
                run.state = "aborted" if left else "failed"

        if body.get("stream"):
            with_usage = bool((body.get("stream_options") or {}).get("include_usage"))
            frames, kind = self._stream(run, plan, pieces, with_usage), "text/event-stream"
        else:
            frames, kind = self._completion(run, plan, pieces), "application/json"
        kind = "text/html" if plan.end == "html" else kind
        return _Answer(_wire(plan, frames), kind, plan.end == "drop", over, bool(plan.deaf))

    async def _stream(self, run: Run, plan: Plan, pieces: list[str], with_usage: bool) -> AsyncIterator[bytes]:
        if plan.end in BODIES:
            yield BODIES[plan.end]
            return
        yield run.chunk({"role": "assistant"})
        await asyncio.sleep(plan.first)
        for index, piece in enumerate(pieces):
            await asyncio.sleep(plan.delay if index else 0)
            run.sent += len(piece)
            run.written += piece
            yield run.chunk({"content": piece})
        if plan.end == "hang":
            await asyncio.Event().wait()
        elif plan.end == "drop":
            yield run.chunk({"content": "é"})[:-12]
        elif plan.end == "error":
            yield event(FAILED) + b"data: [DONE]\n\n"
        elif plan.end == "badjson":
            yield b'data: {"id":"chatcmpl_\n\n'
        if plan.end in COMPLETE:
            self._complete(run, pieces, plan.finish)
        if plan.end in (*COMPLETE, "badjson"):
            yield run.chunk({}, plan.finish)
            if with_usage:
                yield event(run.frame("chat.completion.chunk", [], USAGE))
            if plan.end != "no_done":
                yield b"data: [DONE]\n\n"

    async def _completion(self, run: Run, plan: Plan, pieces: list[str]) -> AsyncIterator[bytes]:
        await asyncio.sleep(plan.first + plan.delay * len(pieces))
        if plan.end == "hang":
            await asyncio.Event().wait()
        message = {"role": "assistant", "content": _joined(pieces)}
        choice = {"index": 0, "message": message, "finish_reason": plan.finish}
        whole = encoded(run.frame("chat.completion", [choice], USAGE))
        if plan.end in COMPLETE:
            self._complete(run, pieces, plan.finish)
            yield whole
        else:
            yield BODIES.get(plan.end, encoded(FAILED) if plan.end == "error" else whole[:-20])

    def _session_key(self, body: Json, header: str | None) -> str:
        named = MODEL.fullmatch(str(body.get("model")).lower())
        if not named:
            raise RefusedError(400, "Invalid `model`. Use `openclaw` or `openclaw/<agentId>`.")
        agent = named[1] or self.agents[0]
        if agent not in self.agents:
            raise RefusedError(400, f"Unknown agent '{agent}'.")
        user = (body.get("user") or "").strip().lower()
        key = header or f"agent:{agent}:" + (f"openai-user:{user}" if user else f"openai:{uuid.uuid4()}")
        if not key.startswith(f"agent:{agent}:"):
            raise RefusedError(400, f"The session key '{key}' is not one of agent '{agent}'.")
        return key

    def _complete(self, run: Run, pieces: list[str], reason: str) -> None:
        text = "" if pieces == [NO_RESPONSE] else _joined(pieces)
        self.record_reply(run.session_key, run.run_id, text, reason)
        run.state = "complete"

    async def _websocket(self, websocket: WebSocket) -> None:
        status = 503 if self.draining else self.websocket_status
        if status == 0:
            await asyncio.Event().wait()
        elif status:
            await websocket.send_denial_response(PlainTextResponse("Service unavailable", status))
        else:
            await super()._websocket(websocket)

    def _in_flight(self, key: str) -> Json:
        running = [run for run in self.runs if run.session_key == key and run.state == "running"]
        info: Json = {"sessionInfo": {"hasActiveRun": bool(running)}}
        if running:
            run = running[-1]
            written = {"text": _joined([run.written]), "startedAt": self.now(), "sessionAbortable": True}
            info["inFlightRun"] = {"runId": run.run_id, **written}
        return info

    def _describe(self, key: str) -> Json:
        if key not in self.sessions:
            return {"session": None}
        archived = key in self.archived
        rest = {"archivedAt": int(time.time() * 1000), "archiveReason": "age-retention"} if archived else {}
        return {"session": {"key": key, "sessionId": _session_id(key), "archived": archived, **rest}}

    def _patch(self, params: Json) -> Json:
        key = params["key"]
        if "archived" in params:
            if "expectedSessionId" not in params:
                raise RefusedError(400, f"expectedSessionId required for session lifecycle patch: {key}")
            if params["expectedSessionId"] != _session_id(key):
                raise RefusedError(400, f"Session {key} changed before patch. Retry.")
            (self.archived.add if params["archived"] else self.archived.discard)(key)
        return {"ok": True, "key": key, "entry": {"sessionId": _session_id(key)}}

    def call(self, method: str, params: Json) -> Json:
        """As in the demo, with the sessions that were deleted or archived, a list of sessions, the run in flight, and
        texts cut as OpenClaw cuts."""
        match method:
            case "sessions.delete":
                self.deleted.append(params["key"])
                self.archived.discard(params["key"])
            case "sessions.describe":
                return self._describe(params["key"])
            case "sessions.patch":
                return self._patch(params)
            case "sessions.list":
                keys = list(self.sessions)[: params.get("limit")]
                return {"count": len(keys), "sessions": [{"key": key} for key in keys]}
            case "chat.history":
                cap = params.get("maxChars", 8000)
                if cap > 500_000:
                    raise RefusedError(400, "invalid chat.history params: at /maxChars: must be <= 500000")
                payload = super().call(method, params)
                shown = [_shown(item, cap) for item in payload["messages"]]
                return {**payload, "messages": shown, **self._in_flight(params["sessionKey"])}
        return super().call(method, params)


def _session_id(key: str) -> str:
    return str(uuid.uuid5(uuid.NAMESPACE_OID, key))


def _shown(item: Json, cap: int) -> Json:
    """An item as `chat.history` shows it: a text of more than `cap` UTF-16 units is cut and marked."""
    by_user = item["role"] == "user"
    text = item["content"] if by_user else "".join(part["text"] for part in item["content"])
    units = text.encode("utf-16-le")
    if len(units) <= 2 * cap:
        return item
    cut = units[: 2 * cap].decode("utf-16-le", "ignore") + "\n...(truncated)..."
    content = cut if by_user else [{"type": "text", "text": cut}]
    return {**item, "content": content, "__openclaw": {**item["__openclaw"], "truncated": True}}
