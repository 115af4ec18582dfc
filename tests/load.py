"""Load on a service while it is restarted: requests on new and on keep-alive connections, and long streams.

Speaks HTTP over plain sockets, because a client library might retry a request and so hide a failure.
"""

import asyncio
import json
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Self

from .service import JSON, Person, Stream

REQUEST_INTERVAL = 1 / 60  # seconds between two requests on new connections
KEEP_ALIVE_CLIENTS = 4
KEEP_ALIVE_INTERVAL = 0.05  # seconds between a keep-alive client's response and its next request


@dataclass
class Tally:
    """The number of requests of one kind, and the failures among them by kind."""

    sent: int = 0
    failures: Counter[str] = field(default_factory=Counter)

    def __str__(self) -> str:
        return f"{sum(self.failures.values())} of {self.sent}" + (f" {dict(self.failures)}" if self.failures else "")


class Load:
    """Sends 60 requests per second on new connections, and requests of 4 keep-alive clients, until the block ends."""

    def __init__(self, person: Person, sessions: list[JSON], text: str = "") -> None:
        """In each session, in addition sends `text` and reads the stream of the reply to its end, for which the end of
        the block waits."""
        self.port = person.http.base_url.port or 0
        self.fresh, self.kept, self.streams = Tally(), Tally(), Tally()
        self.texts: list[str] = []
        self.reading = len(sessions)
        self._headers = f"Host: localhost\r\nAuthorization: Bearer {person.token}\r\n"
        self._sessions = sessions
        self._text = text
        self._over = threading.Event()
        self._begun = threading.Semaphore(0)
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()), daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        for _ in self._sessions:
            assert self._begun.acquire(timeout=30), "a stream did not begin"
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self._over.set()
        self._thread.join(5 if kind else 300)
        assert kind or not self._thread.is_alive(), "a stream did not end"

    def failures(self) -> dict[str, int]:
        """Returns the number of failures by kind of request and kind of failure, without zeros."""
        tallies = (("fresh", self.fresh), ("kept", self.kept), ("stream", self.streams))
        return {f"{name} {what}": count for name, tally in tallies for what, count in tally.failures.items()}

    def __str__(self) -> str:
        return f"fresh {self.fresh}; kept {self.kept}; streams {self.streams}"

    async def _run(self) -> None:
        streams = [asyncio.create_task(self._stream(session)) for session in self._sessions]
        kept = [asyncio.create_task(self._keep()) for _ in range(KEEP_ALIVE_CLIENTS)]
        asked: set[asyncio.Task[None]] = set()
        due = time.monotonic()
        while not self._over.is_set():
            asked.add(asyncio.create_task(self._ask()))
            due += REQUEST_INTERVAL
            await asyncio.sleep(max(due - time.monotonic(), 0))
        await asyncio.gather(*asked, *kept, *streams)

    async def _ask(self) -> None:
        """Sends one request on a new connection."""
        self.fresh.sent += 1
        try:
            reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
            writer.write(f"GET /projects HTTP/1.1\r\n{self._headers}Connection: close\r\n\r\n".encode())
            answer = await asyncio.wait_for(reader.read(), 30)
            writer.close()
            if not answer.startswith(b"HTTP/1.1 200 ") or not answer.endswith(b"]"):
                self.fresh.failures[f"answer {answer[:60]!r}"] += 1
        except (OSError, TimeoutError) as error:
            self.fresh.failures[type(error).__name__] += 1

    async def _keep(self) -> None:
        """Sends requests on one connection, and opens another one when the server has closed it."""
        connection = None
        while not self._over.is_set():
            await asyncio.sleep(KEEP_ALIVE_INTERVAL)
            self.kept.sent += 1
            try:
                if connection is None or connection[0].at_eof():  # closed while idle, which any client notices
                    connection = await asyncio.open_connection("127.0.0.1", self.port)
                if await self._ask_again(*connection):
                    connection[1].close()
                    connection = None
            except (OSError, TimeoutError, asyncio.IncompleteReadError, ValueError) as error:
                self.kept.failures[type(error).__name__] += 1
                connection = None
        if connection:
            connection[1].close()

    async def _ask_again(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """Sends a request on an open connection. Returns whether the response has `Connection: close`. Raises
        ValueError if its status is not 200."""
        writer.write(f"GET /projects HTTP/1.1\r\n{self._headers}\r\n".encode())
        head = (await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 30)).decode().lower()
        lines = dict(line.split(": ", 1) for line in head.strip().split("\r\n")[1:])
        await reader.readexactly(int(lines["content-length"]))
        if not head.startswith("http/1.1 200 "):
            raise ValueError(head)
        return lines.get("connection") == "close"

    async def _stream(self, session: JSON) -> None:
        """Sends the message in a session and reads the stream of its reply to the end."""
        self.streams.sent += 1
        stream = Stream(None)
        try:
            reader, writer = await asyncio.open_connection("127.0.0.1", self.port, limit=2**20)
            message = {"session_key": session["session_key"], "messages": [{"role": "user", "content": self._text}]}
            body = json.dumps(message)
            head = f"POST /chat/stream HTTP/1.1\r\n{self._headers}Content-Type: application/json\r\n"
            writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n{body}".encode())
            while not stream.done and (line := await reader.readline()):
                if not stream.frames and line.startswith(b"data"):
                    self._begun.release()
                stream.take(line.decode().rstrip("\r\n"))
            writer.close()
        except OSError as error:
            self.streams.failures[type(error).__name__] += 1
        if not stream.done:
            self.streams.failures["cut"] += 1
        self.texts.append(stream.text)
        self.reading -= 1
