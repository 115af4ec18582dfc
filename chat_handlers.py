"""The chat and message routes, and the frames in which a reply is streamed."""

import asyncio
import json
import logging
import re
import time
from json.encoder import encode_basestring_ascii
from sqlite3 import Connection
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Header, Query, Request, Response
from pydantic import BaseModel, BeforeValidator, Field
from starlette.types import Receive, Scope, Send

import errors
import image_handler
import sql
import telemetry
from auth import CurrentUser
from replies import LiveReply, finish_reason
from turns import Said
from web import Body, Id, OpenParts, Parts

log = logging.getLogger("clawd.chat")

FIRST_BYTE = 0.5  # seconds that a stream waits for text before it begins; docs/api.md promises at most 1
FRAME = 4096  # maximum characters of a frame, as the contract has it
FRAMES_AT_ONCE = 4  # frames of one write; more would keep the event loop from others for long
SMALL_PAGE = 100  # messages; a larger page is read and rendered on a thread, so as not to block the event loop

FINISH_REASON = (
    "Why a reply ended: `stop`; `length` or `content_filter` if the model's own limit or filter ended it; `stopped`, "
    "`interrupted` or `error`. Null while it is not final, and for a user's message."
)

router = APIRouter()


class ChatMessage(BaseModel):
    role: str
    content: str | list[dict[str, Any]] | None = Field(
        None, description="A string, or OpenAI content parts: `text`, and `image_url` with a `data:` URL."
    )


def _only_the_last(messages: object) -> object:
    """Leaves out what is not used, so that it is neither validated nor stored: a client may send megabytes of it."""
    if not isinstance(messages, list):
        return messages
    users = (item for item in reversed(messages) if isinstance(item, dict) and item.get("role") == "user")
    return [item for item in (next(users, None),) if item is not None]


class ChatIn(Body):
    session_key: str = Field(max_length=200)
    messages: Annotated[list[ChatMessage], BeforeValidator(_only_the_last)] = Field(
        description="May contain the whole conversation. Only the last message with the role `user` is used."
    )
    stream: bool = False
    image: str | None = Field(
        None, description="An image in base64, with or without the prefix `data:image/...;base64,`."
    )


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
    finish_reason: str | None = Field(description=FINISH_REASON)
    usage: Usage | None
    created_at: str


class MessageOut(BaseModel):
    id: int
    role: str
    content: str
    image: str | None = Field(
        description="Signed URL of the message's first image, which an `<img>` element can load. It expires."
    )
    images: list[str] = Field(description="Signed URLs of all images of the message. The first one equals `image`.")
    status: sql.Status
    finish_reason: str | None = Field(description=FINISH_REASON)
    error: Failure | None
    usage: Usage | None
    created_at: str


class Stopped(BaseModel):
    stopped: bool


# --- frames -------------------------------------------------------------------------------------------


def text_frame(reply_id: int, text: str, until: int) -> bytes:
    """Returns a frame with a part of a reply's text. `until` is the offset of the part's end in characters.

    The frame is pure ASCII: no client mistakes U+2028 for a line break, and no cut splits a character.
    """
    return (
        f'id: {until}\ndata: {{"id":"{reply_id}","object":"chat.completion.chunk","choices":[{{"index":0,'
        f'"delta":{{"content":{encode_basestring_ascii(text)}}},"finish_reason":null}}]}}\n\n'
    ).encode()


def last_frames(reply: LiveReply) -> bytes:
    """Returns the last JSON frame of a reply, with its finish reason, usage and error, and then `[DONE]`."""
    frame: dict[str, object] = {"id": str(reply.id), "object": "chat.completion.chunk"}
    if reply.error is not None:
        frame["error"] = reply.error
    reason = finish_reason(reply.status, reply.finish_reason)
    frame["choices"] = [{"index": 0, "delta": {"content": ""}, "finish_reason": reason}]
    frame["usage"] = reply.usage
    return f"id: {reply.length}\ndata: {json.dumps(frame)}\n\ndata: [DONE]\n\n".encode()


class ReplyStream(Response):
    """Streams a reply to one client, from an offset on and at the client's pace.

    The turn does not depend on this response: a client that disconnects ends only its own stream.
    """

    media_type = "text/event-stream"

    def __init__(self, reply: LiveReply, after: int, ping: float) -> None:
        """`after` is the offset in characters. A comment is sent after `ping` seconds without a frame."""
        super().__init__(headers={**_message_ids(reply), "Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._reply = reply
        self._after = after
        self._ping = ping

    async def __call__(self, _: Scope, receive: Receive, send: Send) -> None:
        """Sends the response, as an ASGI application."""
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        gone = asyncio.ensure_future(_disconnected(receive))
        gone.add_done_callback(lambda _: self._reply.wake())
        try:
            await self._send_frames(send, gone)
        except asyncio.CancelledError:  # the server shuts down; a stream without [DONE] tells the client to resume
            log.info("shutting down, cutting a stream of reply %d; its client can resume it", self._reply.id)
        finally:
            gone.cancel()

    async def _send_frames(self, send: Send, gone: "asyncio.Future[None]") -> None:
        while not gone.done():
            frames = self.next_frames()
            done = self._reply.is_final and self._after >= self._reply.length
            if done:
                frames += last_frames(self._reply)
            await send({"type": "http.response.body", "body": frames or b": ping\n\n", "more_body": not done})
            if done:
                return
            if self._after >= self._reply.length:
                await self._wait(gone)
            else:
                await asyncio.sleep(0)  # while the client reads fast, `send` does not give way to others

    def next_frames(self) -> bytes:
        """Returns the next frames, FRAMES_AT_ONCE at most; nothing if the client has all of the text so far."""
        frames: list[bytes] = []
        while len(frames) < FRAMES_AT_ONCE and (text := self._reply.text(self._after, FRAME)):
            self._after += len(text)
            frames.append(text_frame(self._reply.id, text, self._after))
        return b"".join(frames)

    async def _wait(self, gone: "asyncio.Future[None]") -> None:
        """Waits until there is a frame to send, the client has disconnected, or a comment is due."""
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
        description="A request with a key that was already used in the session starts no turn; it returns the first "
        "reply.",
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
    """Sends a message and returns the complete reply, or with `stream: true` streams the reply as it arrives."""
    reply = await _begin(body, user, parts, idempotency_key)
    if body.stream:
        return await _stream(reply, parts)
    try:
        await reply.finished()
    except asyncio.CancelledError:  # the server shuts down; the turn does not depend on this request
        message = "The service is restarting. Read the reply in the session's messages in a moment."
        raise errors.Interrupted(message, retryable=True, retry_after=2, message_id=reply.id) from None
    _raise_failure(reply)
    response.headers.update(_message_ids(reply))
    return ChatOut(
        id=reply.id,
        role="assistant",
        content=reply.text(),
        status=reply.status,
        finish_reason=finish_reason(reply.status, reply.finish_reason),
        usage=Usage.model_validate(reply.usage) if reply.usage else None,
        created_at=reply.created_at,
    )


@router.post("/chat/stream", tags=["chat"], response_class=Response, responses=STREAM, openapi_extra=CHAT_ERRORS)
async def chat_stream(
    body: ChatIn, user: CurrentUser, parts: OpenParts, idempotency_key: IdempotencyKey = None
) -> Response:
    """Sends a message and streams the reply, like `POST /chat` with `stream: true`."""
    return await _stream(await _begin(body, user, parts, idempotency_key), parts)


async def _begin(body: ChatIn, user: sql.User, parts: Parts, key: str | None) -> LiveReply:
    text, sources = _last_message(body)
    # Checked before the images are decoded, so that a wrong session key does not cost the time and memory for that.
    session_id = parts.db.read(sql.check_chat_session, user.id, body.session_key)
    telemetry.note(session_id=session_id)
    images: list[image_handler.Image] = []
    if sources:
        async with parts.decoding:
            images = await asyncio.to_thread(image_handler.decode, sources)
    reply, _ = await parts.turns.begin(user.id, body.session_key, Said(text, images), key)
    telemetry.note(turn_id=reply.id)
    return reply


async def _stream(reply: LiveReply, parts: Parts) -> Response:
    """Returns the streaming response once there is text, or after FIRST_BYTE seconds.

    Raises the error of a turn that fails before that, so that the client receives it as a status.
    """
    until = time.monotonic() + min(FIRST_BYTE, parts.settings.ping_seconds)
    while reply.length == 0 and not reply.is_final and (left := until - time.monotonic()) > 0:
        await reply.change(left)
    if reply.length == 0:
        _raise_failure(reply)
    return ReplyStream(reply, 0, parts.settings.ping_seconds)


def _last_message(body: ChatIn) -> tuple[str, list[str]]:
    """Returns the text and the encoded images of the last user message. Raises errors.Invalid."""
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
        raise errors.Invalid("The last `user` message is empty. Send text or an image.", code="no_user_message")
    return text, sources


def _text(part: dict[str, Any]) -> str:
    if not isinstance(part.get("text"), str):
        raise errors.Invalid(
            "A content part of type `text` needs a field `text` with a string.", code="no_user_message"
        )
    return str(part["text"])


def _image_url(part: dict[str, Any]) -> str:
    image = part.get("image_url")
    url = image.get("url") if isinstance(image, dict) else image
    if not isinstance(url, str):
        raise errors.Invalid(
            "A content part of type `image_url` needs a field `image_url.url` with a `data:` URL.", code="invalid_image"
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
    limit: Annotated[
        int | None, Query(ge=1, le=10_000, description="Return at most this many messages, the newest ones.")
    ] = None,
    before: Annotated[
        int | None, Query(ge=1, le=sql.MAX_ID, description="Return only messages with an id less than this.")
    ] = None,
) -> Response:
    """Returns the messages of a session, oldest first."""
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
    """Returns a page of messages as JSON, an array of MessageOut."""
    messages = sql.select_messages(conn, user_id, session_id, limit, before)
    images = sql.select_images(conn, messages[0].id, messages[-1].id, session_id) if messages else {}
    at, page = time.time(), []
    for message in messages:
        urls = [base + store.sign(image_id, file, at) for image_id, file in images.get(message.id, ())]
        page.append(
            {
                **message._asdict(),
                "finish_reason": finish_reason(message.status, message.finish_reason)
                if message.role == "assistant"
                else None,
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
    last_event_id: Annotated[
        str | None,
        Header(description="The `id` of the last frame that arrived completely. Takes precedence over `from`."),
    ] = None,
    start: Annotated[
        int,
        Query(alias="from", ge=0, le=sql.MAX_ID, description="Number of characters that the client already has."),
    ] = 0,
) -> Response:
    """Streams the rest of a reply from an offset on, live while the reply is running."""
    telemetry.note(session_id=session_id, turn_id=message_id)
    if last_event_id is not None and not re.fullmatch("[0-9]{1,18}", last_event_id):
        raise errors.Invalid("Last-Event-ID must be a number: the `id` of the last frame that arrived completely.")
    after = int(last_event_id) if last_event_id is not None else start
    parts.db.read(sql.select_owned_message, user.id, session_id, message_id)
    reply = await parts.turns.replies.get(message_id)
    if reply is None:
        raise errors.NotFound("This message is not a reply. Only replies can be streamed.", code="message_not_found")
    return ReplyStream(reply, after, parts.settings.ping_seconds)


@router.post("/sessions/{session_id}/stop", tags=["messages"], openapi_extra=errors.raises("session_not_found"))
async def stop(session_id: Id, user: CurrentUser, parts: OpenParts) -> Stopped:
    """Stops the running turn, aborts the agent's run, and drops the queued turns. The reply keeps its text so far."""
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
    """Returns an image of a message. Its URL comes from the messages; it is signed, and it expires."""
    parts.images.verify(image_id, extension, expires, signature, time.time())
    file = parts.db.read(sql.select_image_file, image_id)
    image = await asyncio.to_thread(parts.images.load, file)
    headers = {
        "Cache-Control": "private, max-age=86400, immutable",
        "X-Content-Type-Options": "nosniff",
        "Content-Security-Policy": "default-src 'none'; sandbox",
    }
    return Response(image.data, media_type=image.media_type, headers=headers)
