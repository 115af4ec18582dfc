"""OpenClaw: the one builder of requests, the reader of its streams, its failures told apart, its sessions.

How the gateway behaves was tried out with OpenClaw 2026.9.6; `tests/openclaw` holds it to that.
"""

import asyncio
import json
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import NamedTuple

import aiohttp

import errors

log = logging.getLogger("clawd.gateway")

NO_REPLY = "No response from OpenClaw."  # what the gateway writes where the agent said nothing
MAX_FRAME = 32 * 1024 * 1024  # bytes of one event; more is no reply but a fault
KEEP_ALIVE = 3  # seconds; the gateway (Node) drops idle connections after 5, and a request must not meet that
CONNECT_TIMEOUT = 5  # seconds
CHECK_TIMEOUT = aiohttp.ClientTimeout(total=3, sock_connect=2)
RPC_TIMEOUT = 10  # seconds
HISTORY = {"limit": 50, "maxChars": 500_000}  # the most text that chat.history gives


class ChatRequest(NamedTuple):
    """One message for the agent, as the gateway wants it."""

    headers: dict[str, str]
    body: dict[str, object]


class Chunk(NamedTuple):
    """What one read from the gateway brought: new text, the run's id, the usage where it came."""

    text: str
    run_id: str | None
    usage: dict[str, int] | None


class Finished(NamedTuple):
    """A reply as the gateway's history has it."""

    text: str
    run_id: str
    usage: dict[str, int] | None


@dataclass(frozen=True, slots=True)
class State:
    """Whether the gateway can take a turn. `checked_at` is unix seconds, 0 before the first look."""

    ok: bool
    detail: str
    version: str | None
    checked_at: float


def agent_session(agent_id: str, session_key: str) -> str:
    """The gateway's own name of a conversation: what it makes of `user`, which it lower-cases."""
    return f"agent:{agent_id}:openai-user:adapter-session-{session_key}".lower()


def build_request(
    *,
    agent_id: str,
    session_key: str,
    project: tuple[str, str | None, str],
    text: str,
    images: Sequence[dict[str, object]],
) -> ChatRequest:
    """The one request there is, for text and images, streamed to the client or not.

    `user` and the header name the same conversation, so it is continued whichever of them a gateway heeds.
    The gateway keeps the history: only the new message goes out, with a word on the project (name,
    description, folder) for the system prompt. `images` are content parts.
    """
    name, description, folder = project
    system = f"This conversation belongs to the project {name!r}."
    if description:
        system += f" Its description: {description}"
    if folder:
        system += f"\nThe project's folder is {folder} : read and write its files there."
    content: object = [*([{"type": "text", "text": text}] if text else []), *images] if images else text
    return ChatRequest(
        headers={"x-openclaw-session-key": agent_session(agent_id, session_key)},
        body={
            "model": f"agent:{agent_id}",
            "user": f"adapter-session-{session_key}",
            "messages": [{"role": "system", "content": system}, {"role": "user", "content": content}],
            "stream": True,
            "stream_options": {"include_usage": True},
        },
    )


# --- what the gateway's answers mean ------------------------------------------------------------------


def _no_completion() -> errors.GatewayError:
    return errors.GatewayError(
        "What answers at CLAWDBOT_BASE_URL does not speak OpenClaw's chat completions: the operator should "
        "check that address.",
        retryable=False,
    )


def _incomplete() -> errors.GatewayError:
    return errors.GatewayError(
        "The connection to OpenClaw broke before the reply was complete. Send the message again.",
        code="gateway_incomplete",
        retryable=True,
    )


def _refused(status: int, retry_after: str | None) -> errors.GatewayError:
    """What a status other than 200 means, in words that say what to do."""
    if status in (401, 403):
        return errors.GatewayError(
            "OpenClaw does not accept our token: the operator should set CLAWDBOT_TOKEN to the gateway's "
            "gateway.auth.token and restart this service.",
            code="gateway_auth",
            retryable=False,
        )
    if status == 404:
        return errors.GatewayError(
            "OpenClaw's chat endpoint is off: the operator should set "
            "gateway.http.endpoints.chatCompletions.enabled to true in openclaw.json and restart the gateway.",
            code="gateway_endpoint_disabled",
            retryable=False,
        )
    if status == 429:
        wait = int(retry_after) if retry_after and retry_after.isdecimal() else 10
        return errors.GatewayError(
            f"OpenClaw takes no more requests for now. Try again in {wait} seconds.",
            retryable=True,
            retry_after=wait,
        )
    if status == 413:
        return errors.GatewayError(
            "The message is larger than OpenClaw takes (20 MB with its images encoded): send fewer or smaller images.",
            retryable=False,
        )
    if status >= 500:
        return errors.GatewayError(
            f"OpenClaw failed inside (status {status}). Try again; if it goes on, the operator should look at "
            "the gateway's log.",
            retryable=True,
        )
    return errors.GatewayError(
        f"OpenClaw refused the message (status {status}). Check that the session's agent exists there; the "
        "gateway's own words are in this service's log.",
        retryable=False,
    )


@asynccontextmanager
async def _failures(url: str) -> AsyncIterator[None]:
    """Turns what the client library raises into what it means for the turn."""
    try:
        yield
    except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError) as error:
        raise errors.GatewayUnavailable(
            f"OpenClaw cannot be reached at {url}: the operator should start it (openclaw gateway run) or "
            "correct CLAWDBOT_BASE_URL.",
            retryable=True,
            retry_after=5,
        ) from error
    except TimeoutError as error:  # aiohttp's time-outs are of this class too
        raise errors.GatewayTimeout(
            "OpenClaw was silent for longer than CLAWDBOT_TIMEOUT allows. Try again, or let the operator raise it.",
            retryable=True,
        ) from error
    except aiohttp.ClientResponseError as error:
        raise _no_completion() from error
    except aiohttp.ClientError as error:
        raise _incomplete() from error


# --- the stream ---------------------------------------------------------------------------------------


class EventReader:
    """Cuts an event stream's bytes into the payloads of its events."""

    def __init__(self) -> None:
        self._open: list[bytes] = []  # pieces of a line whose end has not come
        self._size = 0
        self._data: list[bytes] = []

    def feed(self, received: bytes) -> Iterator[bytes]:
        """The payloads that these bytes complete. Raises errors.GatewayError for what is no event stream."""
        self._size += len(received)
        if self._size > MAX_FRAME:
            raise _no_completion()
        if b"\n" not in received:
            self._open.append(received)
            return
        lines = b"".join((*self._open, received)).split(b"\n")
        self._open = [lines.pop()]
        self._size = len(self._open[0]) + sum(map(len, self._data))
        for line in lines:
            if line.startswith(b"data:"):
                self._data.append(line[5:])
            elif line in (b"", b"\r"):
                if self._data:
                    payload, self._data = b"\n".join(self._data), []
                    yield payload
            elif not line.startswith((b":", b"event:", b"id:", b"retry:")):
                raise _no_completion()


class CompletionReader:
    """Reads the events of one chat completion. `done` once the gateway has said that it was over."""

    def __init__(self) -> None:
        self._events = EventReader()
        self._held = ""  # might become NO_REPLY, or is half of a character
        self._started = False
        self.done = False
        self.run_id: str | None = None
        self.usage: dict[str, int] | None = None

    def feed(self, received: bytes) -> str:
        """The text that these bytes bring, whole characters only. Raises errors.GatewayError, whose cause may
        have been preceded by text: that is kept for `rest`."""
        for payload in self._events.feed(received):
            if payload.strip() == b"[DONE]":
                self.done = True
                break
            self._held += self._delta(payload)
        return self._release()

    def rest(self) -> str:
        """The text that was held back, at the end of the stream, whatever ended it."""
        held, self._held = self._held, ""
        return "" if held == NO_REPLY and not self._started else _mend(held)

    def _release(self) -> str:
        text = self._held
        if not text or (not self._started and NO_REPLY.startswith(text)):
            return ""
        self._started = True
        keep = 1 if "\ud800" <= text[-1] <= "\udbff" else 0
        self._held = text[len(text) - keep :]
        return _mend(text[: len(text) - keep])

    def _delta(self, payload: bytes) -> str:
        try:
            chunk = json.loads(payload.decode())
        except ValueError:
            raise _no_completion() from None
        if not isinstance(chunk, dict):
            raise _no_completion()
        if "error" in chunk:
            log.warning("the gateway reported an error in its stream: %.500r", chunk["error"])
            raise errors.GatewayError(
                "The agent failed while it was replying. Try again; if it goes on, the operator should look at "
                "the gateway's log.",
                retryable=True,
            )
        if self.run_id is None and isinstance(chunk.get("id"), str):
            self.run_id = chunk["id"]
        if isinstance(chunk.get("usage"), dict):
            self.usage = _usage(chunk["usage"], "prompt_tokens", "completion_tokens", "total_tokens")
        try:
            text = chunk["choices"][0]["delta"].get("content") if chunk["choices"] else None
        except (KeyError, IndexError, TypeError, AttributeError):
            raise _no_completion() from None
        if not isinstance(text, str | None):
            raise _no_completion()
        return text or ""


def _mend(text: str) -> str:
    """Joins characters that came as two halves (UTF-16 surrogates); a half alone becomes U+FFFD."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return text


def _usage(raw: dict[str, object], prompt: str, completion: str, total: str) -> dict[str, int] | None:
    counts = [raw.get(name) for name in (prompt, completion, total)]
    if not all(isinstance(count, int) for count in counts):
        return None
    names = ("prompt_tokens", "completion_tokens", "total_tokens")
    return {name: count for name, count in zip(names, counts, strict=True) if isinstance(count, int)}


# --- the gateway --------------------------------------------------------------------------------------


class Gateway:
    """OpenClaw at one address. One client for all requests, opened by `open` on the running event loop."""

    def __init__(self, url: str, token: str, silence: float) -> None:
        """`silence` is how many seconds may pass without a byte."""
        self.url = url
        self._token = token
        self._silence = silence
        self._checking = asyncio.Lock()
        self.state = State(False, "OpenClaw has not been asked yet.", None, 0)

    def open(self) -> None:
        """Makes the client."""
        self._client = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEP_ALIVE),
            headers={"Authorization": f"Bearer {self._token}"} if self._token else None,
            json_serialize=lambda body: json.dumps(body, ensure_ascii=False, separators=(",", ":")),
            read_bufsize=256 * 1024,
        )
        self._rpc = Rpc(self._client, self.url, self._token)

    async def close(self) -> None:
        """Closes every connection, which aborts what runs on it."""
        await self._client.close()

    async def stream(self, request: ChatRequest) -> AsyncGenerator[Chunk, None]:
        """Sends a message and yields the reply, a chunk for each read from the network.

        It ends when the gateway has said that the reply is over, and raises errors.GatewayError otherwise,
        after the text that came. Leaving it early aborts the agent's run.
        """
        log.info("[CHAT] Sending to OpenClaw with 'user' field: %s", request.body["user"])
        reader = CompletionReader()
        try:
            async with _failures(self.url), self._post(request) as response:
                if response.status != 200:
                    raise _refused(response.status, await self._read_refusal(response))
                if response.content_type != "text/event-stream":
                    log.warning("the gateway answered with %.100r", response.content_type)
                    raise _no_completion()
                async for received in response.content.iter_any():
                    yield Chunk(reader.feed(received), reader.run_id, reader.usage)
                    if reader.done:
                        await _read_to_end(response)  # or the connection could not be used again
                        break
                if not reader.done:
                    raise _incomplete()
        except errors.GatewayError:
            yield Chunk(reader.rest(), reader.run_id, reader.usage)
            raise
        yield Chunk(reader.rest(), reader.run_id, reader.usage)

    def _post(self, request: ChatRequest) -> "aiohttp.client._RequestContextManager":
        return self._client.post(
            f"{self.url}/v1/chat/completions",
            json=request.body,
            headers=request.headers,
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_TIMEOUT, sock_read=self._silence),
            allow_redirects=False,
        )

    async def _read_refusal(self, response: aiohttp.ClientResponse) -> str | None:
        said = (await response.content.read(2000)).decode(errors="replace")
        log.warning("the gateway answered %d: %.500r", response.status, self._without_token(said))
        return response.headers.get("Retry-After")

    def _without_token(self, text: str) -> str:
        return text.replace(self._token, "[token]") if self._token else text

    # --- its state ---

    async def check(self, max_age: float) -> State:
        """Whether the gateway can take a turn, asked anew unless that was asked `max_age` seconds ago."""
        async with self._checking:
            if time.time() - self.state.checked_at > max_age:
                self.state = await self._ask_state()
        return self.state

    async def _ask_state(self) -> State:
        try:
            async with _failures(self.url):
                async with self._client.get(f"{self.url}/v1/models", timeout=CHECK_TIMEOUT) as response:
                    if response.status != 200:
                        raise _refused(response.status, None)
                    await response.read()
                version = await self._ask_version()
        except errors.GatewayTimeout:
            return State(False, f"OpenClaw at {self.url} accepts but does not answer.", None, time.time())
        except errors.GatewayError as error:
            return State(False, error.message, None, time.time())
        return State(True, f"OpenClaw {version or 'of unknown version'} answers.", version, time.time())

    async def _ask_version(self) -> str | None:
        async with self._client.get(f"{self.url}/startupz", timeout=CHECK_TIMEOUT) as response:
            said = await response.content.read(10_000)
        try:
            version = json.loads(said).get("version")
        except (ValueError, AttributeError):
            return None
        return version if isinstance(version, str) else None

    # --- its sessions ---

    async def delete_session(self, agent_id: str, session_key: str) -> None:
        """Removes a conversation with its transcript. One that is unknown is no error.

        Raises errors.GatewayError.
        """
        key = agent_session(agent_id, session_key)
        await self._rpc.call("sessions.delete", {"key": key, "deleteTranscript": True})

    async def finished_reply(
        self, agent_id: str, session_key: str, *, asked: str, run_id: str | None, known: set[str], got: str
    ) -> Finished | None:
        """The reply to a message, where the gateway has finished it and its history gives all of it.

        It is found by its run id or, where that did not reach us, as the one that follows our last message
        `asked` and is none of the `known` runs. `got` is the text that we have: a reply that does not go on
        from it is not taken. Raises errors.GatewayError.
        """
        key = agent_session(agent_id, session_key)
        history = await self._rpc.call("chat.history", {"sessionKey": key, **HISTORY})
        messages = history.get("messages")
        items = [item for item in messages if isinstance(item, dict)] if isinstance(messages, list) else []
        return _find_reply(items, asked, run_id, known, got)


class Rpc:
    """The gateway's WebSocket protocol, one connection for each call."""

    def __init__(self, client: aiohttp.ClientSession, url: str, token: str) -> None:
        self._client = client
        self._url = url
        self._token = token

    async def call(self, method: str, params: dict[str, object]) -> dict[str, object]:
        """One call of the gateway's WebSocket protocol; its payload. Raises errors.GatewayError."""
        try:
            async with (
                _failures(self._url),
                asyncio.timeout(RPC_TIMEOUT),
                self._client.ws_connect(self._url, max_msg_size=MAX_FRAME) as socket,
            ):
                await _request(socket, "connect", _hello(self._token))
                return await _request(socket, method, params)
        except (ValueError, TypeError) as error:  # frames that are no JSON or no text
            raise _no_completion() from error


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
        log.warning("the gateway refused %s: %.300r", method, error.get("message"))
        raise _refused(401 if "unauthorized" in str(error.get("message")).lower() else 503, None)
    payload = frame.get("payload")
    return payload if isinstance(payload, dict) else {}


async def _read_to_end(response: aiohttp.ClientResponse) -> None:
    try:
        async with asyncio.timeout(1):
            while await response.content.readany():
                continue
    except (TimeoutError, aiohttp.ClientError):
        log.debug("the gateway did not close its stream after [DONE]")


def _find_reply(
    items: list[dict[str, object]], asked: str, run_id: str | None, known: set[str], got: str
) -> Finished | None:
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
    usage = _usage(raw, "input", "output", "totalTokens") if isinstance(raw, dict) else None
    return Finished(text, found, usage)


def _text_of(item: dict[str, object]) -> str:
    content = item.get("content")
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, list) else []
    return "".join(str(part.get("text", "")) for part in parts if isinstance(part, dict))
