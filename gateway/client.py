"""The HTTP client of the gateway: chats, health checks, and calls about sessions.

The gateway's behavior was determined with OpenClaw 2026.9.6; the tests in `tests/openclaw` verify it.
"""

import asyncio
import json
import logging
import math
import time
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from datetime import UTC, datetime

import aiohttp

import errors

from .completions import Chunk, CompletionReader
from .failures import explained, incomplete, no_completion, refused
from .history import HISTORY, Finished, Period, find_reply
from .request import ChatRequest, agent_session
from .rpc import Rpc

log = logging.getLogger("clawd.gateway")

KEEP_ALIVE = 3  # seconds; the gateway (Node) closes idle connections after 5 s, which could break a new request
CONNECT_TIMEOUT = 5  # seconds
CHECK_TIMEOUT = aiohttp.ClientTimeout(total=3, sock_connect=2)
WEBSOCKET_CHECK = 2  # seconds
REFUSAL_TIMEOUT = 3  # seconds that the gateway has to explain a refusal
UNDECIDED = 0.1  # seconds that text which may become NO_REPLY is held back


@dataclass(frozen=True, slots=True)
class WebSocketState:
    """Whether the gateway's WebSocket works. Deletes, recovery, and restoring archived conversations need it."""

    ok: bool
    detail: str


@dataclass(frozen=True, slots=True)
class State:
    """The result of a check. `ok`: the gateway can take a turn. `checked_at`: Unix time, 0 before the first check."""

    ok: bool
    detail: str
    version: str | None
    checked_at: float
    websocket: WebSocketState

    @property
    def summary(self) -> str:
        """What an operator should know: the detail, and that of a WebSocket that fails although turns work."""
        return f"{self.detail} {self.websocket.detail}" if self.ok and not self.websocket.ok else self.detail


NOT_TRIED = WebSocketState(False, "The WebSocket is tried when OpenClaw can take a turn.")


class Gateway:
    """OpenClaw at one address. All requests share one HTTP client, which `open` creates on the running event loop."""

    def __init__(self, url: str, token: str, silence: float) -> None:
        """`silence` is the time in seconds without a byte after which a chat fails."""
        self.url = url
        self._token = token
        self._silence = silence
        self._checking = asyncio.Lock()
        self._checked = -math.inf  # of the monotonic clock
        self.state = State(False, "OpenClaw has not been checked yet.", None, 0, NOT_TRIED)

    def open(self) -> None:
        """Creates the HTTP client. Needs a running event loop."""
        self._client = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEP_ALIVE),
            headers={"Authorization": f"Bearer {self._token}"} if self._token else None,
            json_serialize=lambda body: json.dumps(body, ensure_ascii=False, separators=(",", ":")),
            read_bufsize=256 * 1024,
        )
        self._rpc = Rpc(self._client, self.url, self._token)

    async def close(self) -> None:
        """Closes every connection, which aborts the requests on it."""
        await self._client.close()

    async def stream(self, request: ChatRequest) -> AsyncGenerator[Chunk, None]:
        """Sends a message and yields the reply, one chunk for each read from the network.

        Ends when the gateway has sent `[DONE]`. Otherwise raises errors.GatewayError or, if the task is cancelled,
        asyncio.CancelledError, after it has yielded all text that arrived. Closing the generator early aborts the
        agent's run.
        """
        log.info("[CHAT] Sending to OpenClaw with 'user' field: %s", request.body["user"])
        reader = CompletionReader()
        try:
            async with explained(self.url), self._post(request) as response:
                if response.status != 200:
                    raise await self._refusal(response)
                if response.content_type != "text/event-stream":
                    log.warning("the gateway answered with %.100r, not text/event-stream", response.content_type)
                    raise no_completion()
                while not reader.done:
                    received = await _read_next(response, reader)
                    if received == b"":
                        reader.finish()
                        break
                    yield reader.chunk(reader.release() if received is None else reader.feed(received))
                if reader.done:
                    await _read_to_end(response)  # otherwise the connection could not be reused
                else:
                    raise incomplete()
        except (errors.GatewayError, asyncio.CancelledError):
            yield reader.chunk(reader.rest())  # a stop cancels the task that reads: what arrived belongs to the reply
            raise
        yield reader.chunk(reader.rest())

    def _post(self, request: ChatRequest) -> "aiohttp.client._RequestContextManager":
        return self._client.post(
            f"{self.url}/v1/chat/completions",
            json=request.body,
            headers=request.headers,
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_TIMEOUT, sock_read=self._silence),
            allow_redirects=False,
        )

    async def _refusal(self, response: aiohttp.ClientResponse) -> errors.GatewayError:
        try:
            async with asyncio.timeout(REFUSAL_TIMEOUT):
                body = (await _read_some(response, 2000)).decode(errors="replace")
        except (TimeoutError, aiohttp.ClientError) as error:
            body = f"(its answer did not arrive: {error!r})"
        log.warning("the gateway answered with status %d: %.500r", response.status, self._without_token(body))
        return refused(response.status, response.headers.get("Retry-After"), body)

    def _without_token(self, text: str) -> str:
        return text.replace(self._token, "[token]") if self._token else text

    # --- health checks ---

    async def check(self, max_age: float) -> State:
        """Returns the gateway's state, after a new check if the last one is at least `max_age` seconds old."""
        async with self._checking:
            if time.monotonic() - self._checked >= max_age:
                self.state = await self._ask_state()
                self._checked = time.monotonic()
        return self.state

    async def _ask_state(self) -> State:
        try:
            async with explained(self.url):
                async with self._client.get(f"{self.url}/v1/models", timeout=CHECK_TIMEOUT) as response:
                    body = await response.read()
                    if response.status != 200:
                        raise refused(response.status, None, body.decode(errors="replace"))
                version = await self._ask_version()
        except errors.GatewayTimeout:
            detail = f"OpenClaw at {self.url} accepts connections but does not answer."
            return State(False, detail, None, time.time(), NOT_TRIED)
        except errors.GatewayError as error:
            return State(False, error.message, None, time.time(), NOT_TRIED)
        websocket = await self._try_websocket()
        return State(True, f"OpenClaw {version or 'of unknown version'} answers.", version, time.time(), websocket)

    async def _ask_version(self) -> str | None:
        async with self._client.get(f"{self.url}/startupz", timeout=CHECK_TIMEOUT) as response:
            answer = await _read_some(response, 10_000)
        try:
            version = json.loads(answer).get("version")
        except (ValueError, AttributeError):
            return None
        return version if isinstance(version, str) else None

    async def _try_websocket(self) -> WebSocketState:
        try:
            async with self._rpc.connection(WEBSOCKET_CHECK):
                return WebSocketState(True, "OpenClaw's WebSocket answers.")
        except errors.GatewayError as error:
            return WebSocketState(
                False,
                "OpenClaw's WebSocket, on the same port, cannot be used: conversations are not deleted in the gateway "
                f"and replies are not recovered from it. {error.message}",
            )

    # --- sessions ---

    async def delete_session(self, agent_id: str, session_key: str) -> None:
        """Deletes a conversation with its transcript. Succeeds if the gateway does not know the conversation.

        Raises errors.GatewayError.
        """
        key = agent_session(agent_id, session_key)
        await self._rpc.call("sessions.delete", {"key": key, "deleteTranscript": True})

    async def restore(self, agent_id: str, session_key: str) -> bool:
        """Restores a conversation that the gateway has archived, which then continues with its whole history.

        Returns False if the conversation is not archived. Raises errors.GatewayError.
        """
        key = agent_session(agent_id, session_key)
        async with self._rpc.connection() as connection:
            session = (await connection.call("sessions.describe", {"key": key})).get("session")
            if not isinstance(session, dict) or session.get("archived") is not True:
                return False
            change = {"key": key, "archived": False, "expectedSessionId": session.get("sessionId")}
            await connection.call("sessions.patch", change)
        log.info(
            "restored the conversation %s, which the gateway had archived: %.50r", key, session.get("archiveReason")
        )
        return True

    async def finished_reply(
        self,
        agent_id: str,
        session_key: str,
        *,
        asked: str,
        run_id: str | None,
        known: set[str],
        got: str,
        since: str | None = None,
    ) -> Finished | None:
        """Returns the reply to a message if the gateway's history provably contains it, whole or in part.

        The reply must have the run id `run_id`. If that is None because it never arrived, the newest message must be
        `asked`, the gateway must have received it after `since` (ISO 8601; the message was not sent before), and the
        reply's run must not be in `known`. `got` is the text that has arrived: the reply must begin with it. Returns
        None if there is no such reply, or only in part and no longer than `got`. Raises errors.GatewayError.
        """
        sent_at = _unix_time(since)
        if run_id is None and sent_at is None:
            return None
        key = agent_session(agent_id, session_key)
        async with self._rpc.connection() as connection:
            history = await connection.call("chat.history", {"sessionKey": key, **HISTORY})
        messages = history.get("messages")
        items = [item for item in messages if isinstance(item, dict)] if isinstance(messages, list) else []
        ahead = connection.clock_ahead
        # The gateway's times and ours are cut to whole milliseconds.
        period = None if sent_at is None else Period(sent_at + ahead - 0.001, time.time() + ahead)
        return find_reply(items, asked, run_id, known, got, period=period, in_flight=history.get("inFlightRun"))


def _unix_time(iso: str | None) -> float | None:
    try:
        time_of_day = datetime.fromisoformat(iso or "")
    except ValueError:
        return None
    return time_of_day.replace(tzinfo=time_of_day.tzinfo or UTC).timestamp()


async def _read_next(response: aiohttp.ClientResponse, reader: CompletionReader) -> bytes | None:
    """Returns the next bytes, b"" at the end; None if nothing comes while the reader holds back text."""
    if not reader.undecided:
        return await response.content.readany()
    try:
        async with asyncio.timeout(UNDECIDED) as limit:
            return await response.content.readany()
    except TimeoutError:
        if limit.expired():
            return None
        raise  # the silence of the gateway


async def _read_some(response: aiohttp.ClientResponse, limit: int) -> bytes:
    """Returns the body, or at least `limit` bytes of it."""
    body = b""
    while len(body) < limit and (received := await response.content.readany()):
        body += received
    return body


async def _read_to_end(response: aiohttp.ClientResponse) -> None:
    try:
        async with asyncio.timeout(1):
            while await response.content.readany():
                continue
    except (TimeoutError, aiohttp.ClientError):
        log.debug("the gateway did not close its stream after [DONE]")
