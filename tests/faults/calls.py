"""Requests that last while faults happen to the service, and what their clients know of the outcome."""

import contextlib
import threading
from dataclasses import dataclass, field
from typing import Any, Literal

import httpx

from tests.service import JSON, Stream


@dataclass(eq=False)
class Conversation:
    """A session as its user knows it."""

    id: int
    key: str
    project: int


@dataclass(eq=False)
class Call:
    """A request on a thread of its own. The outcome is `unknown` if the connection broke before the answer came."""

    client: httpx.Client
    conversation: Conversation
    outcome: Literal["pending", "acknowledged", "refused", "unknown"] = "pending"
    status: int = 0
    code: str | None = None
    settled: threading.Event = field(default_factory=threading.Event)  # the outcome is known
    over: threading.Event = field(default_factory=threading.Event)  # the answer was read to its end, or broke

    def start(self, patience: float) -> None:
        """Sends the request, and waits for its outcome for at most `patience` seconds."""
        threading.Thread(target=self._run, daemon=True).start()
        self.settled.wait(patience)

    def _run(self) -> None:
        try:
            with self.client:
                self.request()
        except httpx.ConnectError:
            self._settle("refused")  # nobody has received the request
        except (httpx.HTTPError, httpx.StreamError):
            self._settle("unknown")
        finally:
            self._settle("unknown")
            self.over.set()

    def _settle(self, outcome: Literal["acknowledged", "refused", "unknown"]) -> None:
        if self.outcome == "pending":
            self.outcome = outcome
            self.settled.set()

    def request(self) -> None:
        """Sends the request, and calls `answer` once it is answered."""
        raise NotImplementedError

    def answer(self, response: httpx.Response) -> bool:
        """Notes the outcome. Returns False, after reading the error, if the request was refused."""
        self.status = response.status_code
        if self.status != 200:
            response.read()
            with contextlib.suppress(ValueError):
                self.code = response.json()["code"]
        # An answer that names a message says that the message is stored, even if its turn failed.
        taken = self.status == 200 or "X-Message-Id" in response.headers
        self.note(response)
        self._settle("acknowledged" if taken else "refused")
        return self.status == 200

    def note(self, response: httpx.Response) -> None:
        """Keeps what a subclass needs of an answer, before the outcome is known to others."""


@dataclass(eq=False)
class Order(Call):
    """A stop, or a delete of a session or project."""

    method: str = "POST"
    path: str = ""
    deletes: list[Conversation] = field(default_factory=list)
    ends: list[int] = field(default_factory=list)  # the replies that a stop ends, since they had begun before it

    def request(self) -> None:
        self.answer(self.client.request(self.method, self.path))


@dataclass(eq=False)
class Reading(Call):
    """A reply that is read as a stream, from the offset `after` on."""

    reply_id: int | None = None
    after: int = 0
    stream: Stream = field(default_factory=lambda: Stream(None))
    whole: JSON | None = None  # the answer that is not a stream

    @property
    def text(self) -> str:
        """The text that has arrived so far."""
        return str(self.whole["content"]) if self.whole else self.stream.text

    @property
    def finish(self) -> str | None:
        """The finish reason, once the reply has been read to its end."""
        if self.whole:
            return str(self.whole["finish_reason"])
        return self.stream.finish if self.stream.done else None

    def request(self) -> None:
        path = f"/sessions/{self.conversation.id}/messages/{self.reply_id}/stream"
        self._read("GET", path, params={"from": self.after})

    def _read(self, method: str, path: str, **options: Any) -> None:
        with self.client.stream(method, path, **options) as response:
            if self.answer(response):
                self.read(response)

    def read(self, response: httpx.Response) -> None:
        """Reads the answer to its end."""
        self.stream = Stream(response)
        self.stream.read()


@dataclass(eq=False)
class Sending(Reading):
    """A message that is sent once. Its reply is the answer, as a stream or in one piece."""

    body: JSON = field(default_factory=dict)
    headers: dict[str, str] = field(default_factory=dict)

    def note(self, response: httpx.Response) -> None:
        if "X-Message-Id" in response.headers:
            self.reply_id = int(response.headers["X-Message-Id"])

    def request(self) -> None:
        self._read("POST", "/chat", json=self.body, headers=self.headers)

    def read(self, response: httpx.Response) -> None:
        if self.body["stream"]:
            super().read(response)
        else:
            response.read()
            self.whole = response.json()
