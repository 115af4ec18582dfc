"""The HTTP client of the gateway: a chat, its state, and its sessions.

How the gateway behaves was tried out with OpenClaw 2026.9.6; `tests/openclaw` holds it to that.
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

KEEP_ALIVE = 3  # seconds; the gateway (Node) drops idle connections after 5, and a request must not meet that
CONNECT_TIMEOUT = 5  # seconds
CHECK_TIMEOUT = aiohttp.ClientTimeout(total=3, sock_connect=2)


@dataclass(frozen=True, slots=True)
class State:
    """Whether the gateway can take a turn. `checked_at` is unix seconds, 0 before the first look."""

    ok: bool
    detail: str
    version: str | None
    checked_at: float


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
            async with explained(self.url), self._post(request) as response:
                if response.status != 200:
                    raise refused(response.status, await self._read_refusal(response))
                if response.content_type != "text/event-stream":
                    log.warning("the gateway answered with %.100r", response.content_type)
                    raise no_completion()
                async for received in response.content.iter_any():
                    yield Chunk(reader.feed(received), reader.run_id, reader.usage)
                    if reader.done:
                        await _read_to_end(response)  # or the connection could not be used again
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
            async with explained(self.url):
                async with self._client.get(f"{self.url}/v1/models", timeout=CHECK_TIMEOUT) as response:
                    if response.status != 200:
                        raise refused(response.status, None)
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
        return find_reply(items, asked, run_id, known, got)


async def _read_to_end(response: aiohttp.ClientResponse) -> None:
    try:
        async with asyncio.timeout(1):
            while await response.content.readany():
                continue
    except (TimeoutError, aiohttp.ClientError):
        log.debug("the gateway did not close its stream after [DONE]")
