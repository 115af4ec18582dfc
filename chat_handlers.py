"""What a user says: the chat and message routes, and the frames in which a reply is streamed."""

import asyncio
import json
import logging
import re
import time
from json.encoder import encode_basestring_ascii
from sqlite3 import Connection
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Header, Query, Request, Response
from pydantic import BaseModel, Field
from starlette.types import Receive, Scope, Send

import errors
import image_handler
import sql
import telemetry
from auth import CurrentUser
from replies import LiveReply
from turns import Said
from web import Body, Id, OpenParts, Parts

log = logging.getLogger("clawd.chat")

FIRST_BYTE = 0.5  # seconds; contract: the response begins within a second
FRAME = 64 * 1024  # characters of one frame at most, so that a slow reader is fed in small pieces
SMALL_PAGE = 100  # messages that are read in place; more are read and rendered on a thread
FINISH_REASONS = {"complete": "stop", "empty": "stop", "failed": "error"}

router = APIRouter()


class ChatMessage(BaseModel):
    role: str
    content: str | list[dict[str, Any]] | None = Field(
        None, description="A string, or OpenAI content parts: `text`, and `image_url` with a `data:` URL."
    )


class ChatIn(Body):
    session_key: str = Field(max_length=200)
    messages: list[ChatMessage] = Field(
        description="May hold the whole conversation; only its last `user` message is taken."
    )
    stream: bool = False
    image: str | None = Field(None, description="Base64, with or without `data:image/...;base64,`.")


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class Failure(BaseModel):
    code: str
    message: str
    retryable: bool


class ChatOut(BaseModel):
    id: int
    role: Literal["assistant"]
    content: str
    status: sql.Status
    usage: Usage | None
    created_at: str


class MessageOut(BaseModel):
    id: int
    role: str
    content: str
    image: str | None = Field(description="A signed URL that a browser's `<img>` can load; it expires.")
    images: list[str] = Field(description="All images of the message, `image` first.")
    status: sql.Status
    error: Failure | None
    usage: Usage | None
    created_at: str


class Stopped(BaseModel):
    stopped: bool


# --- frames -------------------------------------------------------------------------------------------


def text_frame(reply_id: int, text: str, until: int) -> bytes:
    """A frame with some text of a reply; `until` is the reply's length in characters once it was read.

    It is pure ASCII: no reader of lines takes U+2028 for the end of one, and no cut splits a character.
    """
    return (
        f'id: {until}\ndata: {{"id":"{reply_id}","object":"chat.completion.chunk","choices":[{{"index":0,'
        f'"delta":{{"content":{encode_basestring_ascii(text)}}},"finish_reason":null}}]}}\n\n'
    ).encode()


def last_frames(reply: LiveReply) -> bytes:
    """The end of a reply: why it ended, what it used, what failed, and `[DONE]`."""
    frame: dict[str, object] = {"id": str(reply.id), "object": "chat.completion.chunk"}
    if reply.error is not None:
        frame["error"] = reply.error
    reason = FINISH_REASONS.get(reply.status, reply.status)
    frame["choices"] = [{"index": 0, "delta": {"content": ""}, "finish_reason": reason}]
    frame["usage"] = reply.usage
    return f"id: {reply.length}\ndata: {json.dumps(frame)}\n\ndata: [DONE]\n\n".encode()


class ReplyStream(Response):
    """Reads a reply to one client from an offset on, at the client's pace. It writes its own frames: the reply
    is made elsewhere, so a client that leaves ends nothing but this."""

    media_type = "text/event-stream"

    def __init__(self, reply: LiveReply, after: int, ping: float) -> None:
        """`after` is in characters; a comment is sent after `ping` seconds without anything else."""
        super().__init__(headers={**_message_ids(reply), "Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._reply = reply
        self._after = after
        self._ping = ping

    async def __call__(self, _: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        gone = asyncio.ensure_future(_disconnected(receive))
        gone.add_done_callback(lambda _: self._reply.wake())
        try:
            await self._send_frames(send, gone)
        except asyncio.CancelledError:  # the server ends: without [DONE] the client knows that it must resume
            log.info("the server ends, and with it a stream of reply %d", self._reply.id)
        finally:
            gone.cancel()

    async def _send_frames(self, send: Send, gone: "asyncio.Future[None]") -> None:
        while not gone.done():
            frames = self._next_frames()
            done = self._reply.is_final and self._after >= self._reply.length
            if done:
                frames += last_frames(self._reply)
            await send({"type": "http.response.body", "body": frames or b": ping\n\n", "more_body": not done})
            if done:
                return
            if self._after >= self._reply.length:
                await self._news(gone)

    def _next_frames(self) -> bytes:
        text = self._reply.text(self._after, FRAME)
        self._after += len(text)
        return text_frame(self._reply.id, text, self._after) if text else b""

    async def _news(self, gone: "asyncio.Future[None]") -> None:
        """Returns when there is something to send, or so long after that a comment is due."""
        until = time.monotonic() + self._ping
        while self._reply.length <= self._after and not self._reply.is_final and not gone.done():
            left = until - time.monotonic()
            if left <= 0:
                return
            await self._reply.change(left)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        continue


def _message_ids(reply: LiveReply) -> dict[str, str]:
    ids = {"X-Message-Id": str(reply.id)}
    if reply.message_id is not None:
        ids["X-User-Message-Id"] = str(reply.message_id)
    return ids


def _raise_failure(reply: LiveReply) -> None:
    if reply.error is not None:
        raise errors.failure(**reply.error, message_id=reply.id)


# --- chat ---------------------------------------------------------------------------------------------

IdempotencyKey = Annotated[
    str | None,
    Header(
        pattern=r"^[\x20-\x7e]{1,255}$",
        description="The same key in the same session never makes a second turn: the first reply comes back.",
    ),
]
CHAT_ERRORS = errors.raises(
    *("session_not_found", "no_user_message", "image_too_large", "unsupported_image", "invalid_image"),
    "disk_unavailable",
    *("idempotency_key_reused", "session_busy", *errors.GATEWAY_CODES),
)
STREAM: dict[int | str, dict[str, Any]] = {
    200: {"content": {"text/event-stream": {}}, "description": "The reply as server-sent events."}
}


@router.post("/chat", tags=["chat"], response_model=ChatOut, responses=STREAM, openapi_extra=CHAT_ERRORS)
async def chat(
    body: ChatIn,
    user: CurrentUser,
    parts: OpenParts,
    response: Response,
    idempotency_key: IdempotencyKey = None,
) -> Response | ChatOut:
    """Sends a message and answers with the whole reply, or with `stream: true` as it comes."""
    reply = await _begin(body, user, parts, idempotency_key)
    if body.stream:
        return await _stream(reply, parts)
    try:
        await reply.finished()
    except asyncio.CancelledError:  # the server ends; whoever runs the turn then sees it through
        message = "The service is restarting: the reply is in the session's messages in a moment."
        raise errors.Interrupted(message, retryable=True, retry_after=2, message_id=reply.id) from None
    _raise_failure(reply)
    response.headers.update(_message_ids(reply))
    return ChatOut(
        id=reply.id,
        role="assistant",
        content=reply.text(),
        status=reply.status,
        usage=Usage.model_validate(reply.usage) if reply.usage else None,
        created_at=reply.created_at,
    )


@router.post("/chat/stream", tags=["chat"], response_class=Response, responses=STREAM, openapi_extra=CHAT_ERRORS)
async def chat_stream(
    body: ChatIn, user: CurrentUser, parts: OpenParts, idempotency_key: IdempotencyKey = None
) -> Response:
    """`POST /chat` with `stream: true`."""
    return await _stream(await _begin(body, user, parts, idempotency_key), parts)


async def _begin(body: ChatIn, user: sql.User, parts: Parts, key: str | None) -> LiveReply:
    text, sources = _last_message(body)
    session_id = parts.db.read(sql.check_chat_session, user.id, body.session_key)  # before any work on pictures
    telemetry.note(session_id=session_id)
    images: list[image_handler.Image] = []
    if sources:
        async with parts.decoding:
            images = await asyncio.to_thread(image_handler.decode, sources)
    reply, _ = await parts.turns.begin(user.id, body.session_key, Said(text, images), key)
    telemetry.note(turn_id=reply.id)
    return reply


async def _stream(reply: LiveReply, parts: Parts) -> Response:
    """The response, once there is text or a moment has passed; what has failed before that is raised."""
    until = time.monotonic() + min(FIRST_BYTE, parts.settings.ping_seconds)
    while reply.length == 0 and not reply.is_final and (left := until - time.monotonic()) > 0:
        await reply.change(left)
    if reply.length == 0:
        _raise_failure(reply)
    return ReplyStream(reply, 0, parts.settings.ping_seconds)


def _last_message(body: ChatIn) -> tuple[str, list[str]]:
    """The text and the encoded pictures of the newest user message. Raises errors.Invalid."""
    message = next((message for message in reversed(body.messages) if message.role == "user"), None)
    if message is None:
        raise errors.Invalid("Send a message with the role `user` in `messages`.", code="no_user_message")
    content = message.content or ""
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    text = "\n".join(_text(part) for part in parts if part.get("type") == "text")
    sources = [_image_url(part) for part in parts if part.get("type") == "image_url"]
    if body.image:
        sources.append(body.image)
    if not text.strip() and not sources:
        raise errors.Invalid("The last `user` message is empty: send text or an image.", code="no_user_message")
    return text, sources


def _text(part: dict[str, Any]) -> str:
    if not isinstance(part.get("text"), str):
        raise errors.Invalid("A content part of type `text` needs a string `text`.", code="no_user_message")
    return str(part["text"])


def _image_url(part: dict[str, Any]) -> str:
    image = part.get("image_url")
    url = image.get("url") if isinstance(image, dict) else image
    if not isinstance(url, str):
        raise errors.Invalid(
            "A content part of type `image_url` needs `image_url.url`, a `data:` URL.", code="invalid_image"
        )
    return url


# --- messages -----------------------------------------------------------------------------------------


@router.get(
    "/sessions/{session_id}/messages",
    tags=["messages"],
    response_model=list[MessageOut],
    openapi_extra=errors.raises("session_not_found"),
)
async def list_messages(
    session_id: Id,
    request: Request,
    user: CurrentUser,
    parts: OpenParts,
    limit: Annotated[int | None, Query(ge=1, le=10_000, description="Only the newest so many.")] = None,
    before: Annotated[int | None, Query(ge=1, le=sql.MAX_ID, description="Only older than this id.")] = None,
) -> Response:
    """The messages of a session, oldest first."""
    telemetry.note(session_id=session_id)
    base = parts.settings.public_base_url or str(request.base_url).rstrip("/")
    page = (parts.images, base, user.id, session_id, limit, before)
    small = limit is not None and limit <= SMALL_PAGE
    body = parts.db.read(_render, *page) if small else await parts.db.read_aside(_render, *page)
    return Response(body, media_type="application/json")


def _render(
    conn: Connection,
    store: image_handler.ImageStore,
    base: str,
    user_id: int,
    session_id: int,
    limit: int | None,
    before: int | None,
) -> bytes:
    """A page of messages as JSON (a list of MessageOut)."""
    messages = sql.select_messages(conn, user_id, session_id, limit, before)
    images = sql.select_images(conn, messages[0].id, messages[-1].id, session_id) if messages else {}
    at, page = time.time(), []
    for message in messages:
        urls = [base + store.sign(image_id, file, at) for image_id, file in images.get(message.id, ())]
        page.append(
            {
                **message._asdict(),
                "image": urls[0] if urls else None,
                "images": urls,
            }
        )
    return json.dumps(page, ensure_ascii=False).encode()


@router.get(
    "/sessions/{session_id}/messages/{message_id}/stream",
    tags=["messages"],
    response_class=Response,
    responses=STREAM,
    openapi_extra=errors.raises("message_not_found", "invalid_request"),
)
async def resume_stream(
    session_id: Id,
    message_id: Id,
    user: CurrentUser,
    parts: OpenParts,
    last_event_id: Annotated[str | None, Header(description="Goes before `from`.")] = None,
    start: Annotated[
        int, Query(alias="from", ge=0, le=sql.MAX_ID, description="Characters that are there already.")
    ] = 0,
) -> Response:
    """A reply's remaining frames from an offset on, live while it runs."""
    telemetry.note(session_id=session_id, turn_id=message_id)
    if last_event_id is not None and not re.fullmatch("[0-9]{1,18}", last_event_id):
        raise errors.Invalid("Last-Event-ID is the `id` of the last frame that was read: a number.")
    after = int(last_event_id) if last_event_id is not None else start
    parts.db.read(sql.select_owned_message, user.id, session_id, message_id)
    reply = parts.turns.reply(message_id)
    if reply is None:
        raise errors.NotFound("This message is no reply: there is nothing to stream.", code="message_not_found")
    return ReplyStream(reply, after, parts.settings.ping_seconds)


@router.post("/sessions/{session_id}/stop", tags=["messages"], openapi_extra=errors.raises("session_not_found"))
async def stop(session_id: Id, user: CurrentUser, parts: OpenParts) -> Stopped:
    """Ends the running turn with what it has, aborts the agent's run, and drops the waiting turns."""
    telemetry.note(session_id=session_id)
    parts.db.read(sql.select_session, user.id, session_id)
    return Stopped(stopped=await parts.turns.stop([session_id]))


@router.get(
    "/images/{image_id}.{extension}",
    tags=["messages"],
    response_class=Response,
    responses={200: {"content": {"image/*": {}}, "description": "The image's bytes."}},
    openapi_extra=errors.raises("image_not_found", "disk_unavailable"),
)
async def read_image(
    image_id: Id, extension: str, parts: OpenParts, expires: str = "", signature: str = ""
) -> Response:
    """An image of a message. The URL, from the messages, carries its own signature and expires."""
    parts.images.verify(image_id, extension, expires, signature, time.time())
    file = parts.db.read(sql.select_image_file, image_id)
    image = await asyncio.to_thread(parts.images.load, file)
    headers = {
        "Cache-Control": "private, max-age=86400, immutable",
        "X-Content-Type-Options": "nosniff",
        "Content-Security-Policy": "default-src 'none'; sandbox",
    }
    return Response(image.data, media_type=image.media_type, headers=headers)
