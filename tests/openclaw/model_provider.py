"""The model behind the real gateway: an OpenAI-compatible server that always answers the same to the same.

A test writes `MARK-<word>` into each of its messages. The reply lists the words of every user message that
the gateway showed to the model ("seen: one,two"), so what the agent remembers can be read in the reply.
What follows the newest mark may steer its reply: `SLOW-60` adds 60 words, one every 50 ms; `SILENT-3`
says nothing at all for 3 s.
"""

import asyncio
import base64
import json
import re
import socket
import threading
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any, Literal, Self

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import StreamingResponse
from starlette.routing import Route

from tests.service import until

MARK = re.compile(r"MARK-(\w+)")
WORD_SECONDS = 0.05
USAGE = {"prompt_tokens": 11, "completion_tokens": 7, "total_tokens": 18}


def _text(content: str | list[dict[str, Any]]) -> str:
    """The words of a message, which OpenAI writes as a string or as parts."""
    if isinstance(content, str):
        return content
    return "\n".join(part.get("text", "") for part in content)


def _pictures(content: str | list[dict[str, Any]]) -> list[bytes]:
    """The decoded `data:` URLs of a message's image parts."""
    if isinstance(content, str):
        return []
    urls = [part["image_url"]["url"] for part in content if part["type"] == "image_url"]
    return [base64.b64decode(url.partition(";base64,")[2]) for url in urls]


@dataclass
class Run:
    """One request that the gateway made: what it showed to the model and how the reply ended."""

    body: dict[str, Any]
    sent: str = ""
    state: Literal["running", "finished", "aborted"] = "running"
    marked: list[dict[str, Any]] = field(init=False)

    def __post_init__(self) -> None:
        # The gateway adds user messages of its own; only ours carry a mark.
        self.marked = [m for m in self.body["messages"] if m["role"] == "user" and MARK.search(_text(m["content"]))]

    @property
    def marks(self) -> list[str]:
        """The words of all marks the model was shown, oldest first."""
        return [word for message in self.marked for word in MARK.findall(_text(message["content"]))]

    @property
    def system(self) -> str:
        """The whole system prompt."""
        return "\n".join(_text(m["content"]) for m in self.body["messages"] if m["role"] == "system")

    @property
    def pictures(self) -> list[bytes]:
        """The images of the newest marked message."""
        return _pictures(self.marked[-1]["content"])

    def directive(self, name: str) -> int:
        """The number behind `<name>-` after the newest mark, 0 without one."""
        # Messages that got no reply are one with the next by the time they come here: only the last counts.
        newest = _text(self.marked[-1]["content"]).rpartition("MARK-")[2] if self.marked else ""
        found = re.search(rf"{name}-(\d+)", newest)
        return int(found[1]) if found else 0

    def words(self) -> list[str]:
        """The reply, in the pieces in which it is sent."""
        seen = f"seen: {','.join(self.marks)}"
        return [seen, *(f" w{n}" for n in range(1, self.directive("SLOW") + 1))]


def _event(delta: dict[str, str] | None, finish: str | None = None) -> str:
    """A frame of the model's stream; without a delta, the one that carries the usage."""
    chunk: dict[str, Any] = {"id": "x", "object": "chat.completion.chunk", "created": 1, "model": "echo"}
    if delta is None:
        chunk |= {"choices": [], "usage": USAGE}
    else:
        chunk |= {"choices": [{"index": 0, "delta": delta, "finish_reason": finish}]}
    return f"data: {json.dumps(chunk)}\n\n"


async def _reply(run: Run) -> AsyncIterator[str]:
    """The stream of one run. Notes in the run what was sent and whether the gateway stayed to the end."""
    try:
        await asyncio.sleep(run.directive("SILENT"))
        yield _event({"role": "assistant"})
        for word in run.words():
            run.sent += word
            yield _event({"content": word})
            await asyncio.sleep(WORD_SECONDS)
        yield _event({}, "stop")
        yield _event(None)
        yield "data: [DONE]\n\n"
        run.state = "finished"
    finally:
        # Starlette cancels the generator when the gateway hangs up.
        if run.state == "running":
            run.state = "aborted"


class ModelProvider:
    """The server, in a thread of the tests' process; `runs` is everything that it was asked."""

    def __init__(self) -> None:
        self.runs: list[Run] = []
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}/v1"
        app = Starlette(routes=[Route("/v1/chat/completions", self._complete, methods=["POST"])])
        self._server = uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=1))
        self._thread = threading.Thread(target=self._server.run, kwargs={"sockets": [self._socket]})

    async def _complete(self, request: Request) -> StreamingResponse:
        run = Run(await request.json())
        self.runs.append(run)
        return StreamingResponse(_reply(run), media_type="text/event-stream")

    def __enter__(self) -> Self:
        self._thread.start()
        until(lambda: self._server.started, 10, "the model provider")
        return self

    def __exit__(self, *_: object) -> None:
        self._server.should_exit = True
        self._thread.join()

    def of(self, mark: str) -> list[Run]:
        """The runs whose newest message carries this mark, in the order of their start."""
        return [run for run in self.runs if run.marks[-1:] == [mark]]

    def run(self, mark: str) -> Run:
        """The one run that a message caused. Fails when the gateway asked the model more than once for it."""
        runs = self.of(mark)
        assert len(runs) == 1, f"{len(runs)} runs for MARK-{mark}"
        return runs[0]
