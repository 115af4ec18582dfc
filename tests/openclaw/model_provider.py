"""The model behind the real gateway: an OpenAI-compatible server with deterministic answers.

A test writes `MARK-<word>` into each of its messages. The reply lists the words of every user message that the gateway
sent to the model ("seen: one,two"), so the reply shows what the agent remembers. Directives after the newest mark
control its reply: `SLOW-60` adds 60 words, one every 50 ms; `SILENT-3` sends nothing for 3 s; `LENGTH-1` ends it as cut
off by the model's output budget.
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
    """Returns the text of a message, whose content is a string or a list of parts."""
    if isinstance(content, str):
        return content
    return "\n".join(part.get("text", "") for part in content)


def _pictures(content: str | list[dict[str, Any]]) -> list[bytes]:
    """Returns the decoded `data:` URLs of a message's image parts."""
    if isinstance(content, str):
        return []
    urls = [part["image_url"]["url"] for part in content if part["type"] == "image_url"]
    return [base64.b64decode(url.partition(";base64,")[2]) for url in urls]


@dataclass
class Run:
    """A request from the gateway: its body, the text sent so far, and how the reply ended."""

    body: dict[str, Any]
    sent: str = ""
    state: Literal["running", "finished", "aborted"] = "running"
    marked: list[dict[str, Any]] = field(init=False)

    def __post_init__(self) -> None:
        # The gateway adds user messages of its own; only those of the tests contain a mark.
        self.marked = [m for m in self.body["messages"] if m["role"] == "user" and MARK.search(_text(m["content"]))]

    @property
    def marks(self) -> list[str]:
        """The words of all marks in the request, oldest first."""
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
        """Returns the number after `<name>-` behind the newest mark, or 0 if there is none."""
        # The gateway joins a message that got no reply with the next one, so only the last mark counts.
        newest = _text(self.marked[-1]["content"]).rpartition("MARK-")[2] if self.marked else ""
        found = re.search(rf"{name}-(\d+)", newest)
        return int(found[1]) if found else 0

    def words(self) -> list[str]:
        """Returns the reply, in the pieces in which it is sent."""
        seen = f"seen: {','.join(self.marks)}"
        return [seen, *(f" w{n}" for n in range(1, self.directive("SLOW") + 1))]


def _event(delta: dict[str, str] | None, finish: str | None = None) -> str:
    """Returns a frame of the model's stream; if `delta` is None, the frame with the usage."""
    chunk: dict[str, Any] = {"id": "x", "object": "chat.completion.chunk", "created": 1, "model": "echo"}
    if delta is None:
        chunk |= {"choices": [], "usage": USAGE}
    else:
        chunk |= {"choices": [{"index": 0, "delta": delta, "finish_reason": finish}]}
    return f"data: {json.dumps(chunk)}\n\n"


async def _reply(run: Run) -> AsyncIterator[str]:
    """Yields the stream of a run. Records in the run what was sent, and whether the gateway read it to the end."""
    try:
        await asyncio.sleep(run.directive("SILENT"))
        yield _event({"role": "assistant"})
        for word in run.words():
            run.sent += word
            yield _event({"content": word})
            await asyncio.sleep(WORD_SECONDS)
        yield _event({}, "length" if run.directive("LENGTH") else "stop")
        yield _event(None)
        yield "data: [DONE]\n\n"
        run.state = "finished"
    finally:
        # Starlette cancels the generator when the gateway disconnects.
        if run.state == "running":
            run.state = "aborted"


class ModelProvider:
    """The server, in a thread of the tests' process. `runs` contains all requests that it received."""

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
        """Returns the runs whose newest message has this mark, in the order of their start."""
        return [run for run in self.runs if run.marks[-1:] == [mark]]

    def run(self, mark: str) -> Run:
        """Returns the run that a message caused. Fails if the gateway sent more than one request for it."""
        runs = self.of(mark)
        assert len(runs) == 1, f"{len(runs)} runs for MARK-{mark}"
        return runs[0]
