"""The HTTP client of the gateway: chats, health checks, and calls about sessions.

The gateway's behavior was determined with OpenClaw 2026.9.6; the tests in `tests/openclaw` verify it.
"""

import asyncio
import json
import logging
import time
from collections.abc import AsyncGenerator
from dataclasses import dataclass

import aiohttp

import errors

from .completions import Chunk, CompletionReader
from .failures import explained, incomplete, no_completion, refused
from .request import ChatRequest, agent_session
from .rpc import HISTORY, Finished, Rpc, find_reply

log = logging.getLogger("clawd.gateway")

KEEP_ALIVE = 3  # seconds; the gateway (Node) closes idle connections after 5 s, which could break a new request
CONNECT_TIMEOUT = 5  # seconds
CHECK_TIMEOUT = aiohttp.ClientTimeout(total=3, sock_connect=2)


@dataclass(frozen=True, slots=True)
class State:
    """The result of a check. `ok`: the gateway can take a turn. `checked_at`: Unix time, 0 before the first check."""

    ok: bool
    detail: str
    version: str | None
    checked_at: float


class Gateway:
    """OpenClaw at one address. All requests share one HTTP client, which `open` creates on the running event loop."""

    def __init__(self, url: str, token: str, silence: float) -> None:
        """`silence` is the time in seconds without a byte after which a chat fails."""
        self.url = url
        self._token = token
        self._silence = silence
        self._checking = asyncio.Lock()
        self.state = State(False, "OpenClaw has not been checked yet.", None, 0)

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

        Ends when the gateway has sent `[DONE]`. Otherwise raises errors.GatewayError, after it has yielded all text
        that arrived. Closing the generator early aborts the agent's run.
        """
        log.info("[CHAT] Sending to OpenClaw with 'user' field: %s", request.body["user"])
        reader = CompletionReader()
        try:
            async with explained(self.url), self._post(request) as response:
                if response.status != 200:
                    raise refused(response.status, await self._read_refusal(response))
                if response.content_type != "text/event-stream":
                    log.warning("the gateway answered with %.100r, not text/event-stream", response.content_type)
                    raise no_completion()
                async for received in response.content.iter_any():
                    yield Chunk(reader.feed(received), reader.run_id, reader.usage)
                    if reader.done:
                        await _read_to_end(response)  # otherwise the connection could not be reused
                        break
                if not reader.done:
                    raise incomplete()
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
        answer = (await response.content.read(2000)).decode(errors="replace")
        log.warning("the gateway answered with status %d: %.500r", response.status, self._without_token(answer))
        return response.headers.get("Retry-After")

    def _without_token(self, text: str) -> str:
        return text.replace(self._token, "[token]") if self._token else text

    # --- health checks ---

    async def check(self, max_age: float) -> State:
        """Returns the gateway's state, after a new check if the last one is more than `max_age` seconds old."""
        async with self._checking:
            if time.time() - self.state.checked_at > max_age:
                self.state = await self._ask_state()
        return self.state

    async def _ask_state(self) -> State:
        try:
            async with explained(self.url):
                async with self._client.get(f"{self.url}/v1/models", timeout=CHECK_TIMEOUT) as response:
                    if response.status != 200:
                        raise refused(response.status, None)
                    await response.read()
                version = await self._ask_version()
        except errors.GatewayTimeout:
            return State(False, f"OpenClaw at {self.url} accepts connections but does not answer.", None, time.time())
        except errors.GatewayError as error:
            return State(False, error.message, None, time.time())
        return State(True, f"OpenClaw {version or 'of unknown version'} answers.", version, time.time())

    async def _ask_version(self) -> str | None:
        async with self._client.get(f"{self.url}/startupz", timeout=CHECK_TIMEOUT) as response:
            answer = await response.content.read(10_000)
        try:
            version = json.loads(answer).get("version")
        except (ValueError, AttributeError):
            return None
        return version if isinstance(version, str) else None

    # --- sessions ---

    async def delete_session(self, agent_id: str, session_key: str) -> None:
        """Deletes a conversation with its transcript. Succeeds if the gateway does not know the conversation.

        Raises errors.GatewayError.
        """
        key = agent_session(agent_id, session_key)
        await self._rpc.call("sessions.delete", {"key": key, "deleteTranscript": True})

    async def finished_reply(
        self, agent_id: str, session_key: str, *, asked: str, run_id: str | None, known: set[str], got: str
    ) -> Finished | None:
        """Returns the reply to the newest message if the gateway has finished it and its history contains it whole.

        The reply must have the run id `run_id`. If that is None because it never arrived, the newest message must be
        `asked` and the reply's run must not be in `known`. `got` is the text that has arrived: the reply must begin
        with it. Returns None if there is no such reply. Raises errors.GatewayError.
        """
        key = agent_session(agent_id, session_key)
        history = await self._rpc.call("chat.history", {"sessionKey": key, **HISTORY})
        messages = history.get("messages")
        items = [item for item in messages if isinstance(item, dict)] if isinstance(messages, list) else []
        return find_reply(items, asked, run_id, known, got)


async def _read_to_end(response: aiohttp.ClientResponse) -> None:
    try:
        async with asyncio.timeout(1):
            while await response.content.readany():
                continue
    except (TimeoutError, aiohttp.ClientError):
        log.debug("the gateway did not close its stream after [DONE]")
