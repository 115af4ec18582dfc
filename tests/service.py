"""The service as tests start it, and a user who calls its routes over HTTP."""

import asyncio
import json
import os
import random
import secrets
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self, TypeVar

import httpx
import pytest
import uvicorn

import telemetry
from app import create_app
from database import Database
from locks import holders
from settings import Settings

T = TypeVar("T")
JSON = dict[str, Any]
CHECKOUT = Path(__file__).resolve().parents[1]
RESERVED: list[socket.socket] = []
NOWHERE = os.open(os.devnull, os.O_WRONLY)
# The variable with which `./tests/run --coverage` measures subprocesses; empty without that option. A subprocess that
# gets a new environment needs it.
COVERAGE = {name: value for name, value in os.environ.items() if name == "COVERAGE_PROCESS_CONFIG"}


def free_port() -> int:
    """Returns a loopback port on which no program listens, and which no other test gets while this process runs.

    The port is below the range of ephemeral ports. Otherwise the kernel could give it to a connection of another test
    before the caller listens on it. Tests run in parallel, so each port is reserved by an abstract Unix socket, which
    the kernel closes when the process ends.
    """
    for port in random.SystemRandom().sample(range(20_000, 32_000), 1_000):
        reservation = socket.socket(socket.AF_UNIX)
        try:
            reservation.bind(f"\0clawd-backend tests: port {port}")
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", port))
        except OSError:
            reservation.close()
        else:
            RESERVED.append(reservation)
            return port
    raise OSError("there is no free port from 20000 to 31999")


def until(look: Callable[[], T | None], seconds: float, what: str) -> T:
    """Calls `look` until it returns a true value, and returns that. Fails the test after `seconds`; the failure names
    `what`."""
    deadline = time.monotonic() + seconds
    while True:
        if value := look():
            return value
        if time.monotonic() > deadline:
            pytest.fail(f"waited {seconds:g} s for {what}, in vain")
        time.sleep(0.02)


def using(path: Path, work: Callable[[Database], Awaitable[object]]) -> object:
    """Runs `work(db)`, a coroutine function, with the database open, and returns its result."""

    async def run() -> object:
        db = Database(path)
        db.open()
        try:
            return await work(db)
        finally:
            db.close()

    return asyncio.run(run())


def tail(log: Path, characters: int = 4000) -> str:
    """Returns the end of a process's output, for the message of a failure."""
    return log.read_text(errors="replace")[-characters:] if log.exists() else "(no output)"


class Served:
    """The real app in a thread of the test, served by uvicorn over loopback. It starts fast, and a test can access its
    objects."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.app = create_app(settings)
        config = uvicorn.Config(
            self.app, host="127.0.0.1", port=self.port, log_config=None, timeout_graceful_shutdown=1, access_log=False
        )
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        until(lambda: self._server.started or not self._thread.is_alive(), 20, "the app to start")
        assert self._server.started, "the app did not start"
        # pytest captures log records and shows them if a test fails. Lines on stdout would mix with its progress dots.
        telemetry.start_logging(self.settings.log_level, self.settings.log_format, (), NOWHERE)
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Stops the app as SIGTERM does."""
        self._server.should_exit = True
        self._thread.join(30)
        assert not self._thread.is_alive(), "the app did not stop"

    @contextmanager
    def person(self) -> Iterator["Person"]:
        """Signs up a new user."""
        with _client(self.url) as http:
            yield Person(http)


class Service:
    """`uvicorn app:app` in its own process on a free port, with its own database and directories."""

    def __init__(self, directory: Path, gateway_url: str, gateway_token: str, **environment: str) -> None:
        """`environment` overrides the usual settings."""
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.directory = directory
        self.log = directory / f"service-{self.port}.log"
        self._process: subprocess.Popen[bytes] | None = None
        self._lock_files = [directory / f"service.db{suffix}" for suffix in ("", ".lock", "-shm")]
        # All settings that matter are set here, so that a developer's `.env` in the checkout does not change a test.
        self._environment = {
            "PATH": os.environ["PATH"],
            "HOME": str(directory),
            "PYTHONUNBUFFERED": "1",
            **COVERAGE,
            "DB_PATH": str(directory / "service.db"),
            "DATA_DIR": str(directory),
            "PROJECTS_DIR": str(directory / "projects"),
            "CLAWDBOT_BASE_URL": gateway_url,
            "CLAWDBOT_TOKEN": gateway_token,
            "CLAWDBOT_TIMEOUT": "1800",
            "SIGNUP": "open",
            "LOG_LEVEL": "INFO",
            **environment,
        }

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def pid(self) -> int:
        """The id of the running process."""
        assert self._process is not None
        return self._process.pid

    def start(self) -> None:
        """Starts the process and waits until `/health` answers."""
        self.spawn()
        try:
            until(self._serves, 60, "the service's /health")
        except BaseException:
            self.kill()
            raise

    def spawn(self) -> None:
        """Starts the process, which does not serve yet when this returns."""
        command = [sys.executable, "-m", "uvicorn", "app:app", "--host", "127.0.0.1", "--port", str(self.port)]
        command += ["--no-access-log", "--timeout-graceful-shutdown", "1"]
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(command, cwd=CHECKOUT, env=self._environment, stdout=log, stderr=log)

    def _serves(self) -> bool:
        assert self._process is not None and self._process.poll() is None, tail(self.log)
        try:
            return httpx.get(f"{self.url}/health", timeout=5, trust_env=False).status_code == 200
        except httpx.TransportError:
            return False

    def stop(self) -> None:
        """Stops the process with SIGTERM, and kills it if it does not end within 30 s."""
        if self._process is not None:
            self._process.terminate()
            try:
                self._process.wait(timeout=30)
            except subprocess.TimeoutExpired:
                self.kill()
            self._process = None

    def freeze(self, *, locked: bool = False) -> None:
        """Suspends the process (SIGSTOP): it neither reads nor writes until `thaw` or `kill`.

        It then holds no lock of the database, with which other processes could not write, unless `locked` allows it.
        """
        self._suspend()
        while not locked and f"process {self.pid} " in holders(*self._lock_files):
            self.thaw()
            time.sleep(0.01)
            self._suspend()

    def _suspend(self) -> None:
        os.kill(self.pid, signal.SIGSTOP)
        # The signal takes effect a moment after the call.
        status = Path(f"/proc/{self.pid}/status")
        until(lambda: "State:\tT" in status.read_text(), 5, "the process to be suspended")

    def thaw(self) -> None:
        """Continues the suspended process (SIGCONT)."""
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        """Kills the process with SIGKILL, like a crash."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def output(self) -> str:
        """Returns everything that the process has logged."""
        return self.log.read_text(errors="replace")

    @contextmanager
    def person(self) -> Iterator["Person"]:
        """Signs up a new user."""
        with _client(self.url) as http:
            yield Person(http)


NO_TLS = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # without the system's certificates, which take long to load


def _client(url: str) -> httpx.Client:
    limits = httpx.Limits(max_connections=None)
    return httpx.Client(base_url=url, timeout=60, trust_env=False, verify=NO_TLS, limits=limits)


@dataclass
class Answer:
    """The outcome of one message, streamed or not."""

    status_code: int
    body: str
    text: str = ""
    code: str | None = None
    headers: httpx.Headers = field(default_factory=httpx.Headers)

    @property
    def message_id(self) -> int:
        """The id of the reply's message."""
        return int(self.headers["X-Message-Id"])


class Stream:
    """A streamed reply, read as docs/api.md tells clients to read it."""

    def __init__(self, response: httpx.Response | None) -> None:
        """Reads the lines of `response`. Without a response, the caller passes lines to `take`."""
        self._lines = response.iter_lines() if response else iter(())
        self.text = ""
        self.frames: list[JSON] = []
        self.ids: list[int] = []
        self.comments = 0
        self.done = False
        self.longest_gap = 0.0

    @property
    def finish(self) -> str | None:
        """The `finish_reason` of the last frame."""
        reason: str | None = self.frames[-1]["choices"][0]["finish_reason"]
        return reason

    @property
    def error(self) -> JSON | None:
        """The `error` of the last frame."""
        error: JSON | None = self.frames[-1].get("error")
        return error

    def read(self, *, to_first_text: bool = False, one_frame: bool = False) -> Self:
        """Reads to the end of the stream, or only until there is text, or only one more frame."""
        frames = len(self.frames)
        heard = time.monotonic()
        for line in self._lines:
            self.longest_gap = max(self.longest_gap, time.monotonic() - heard)
            heard = time.monotonic()
            self.take(line)
            if (to_first_text and self.text) or (one_frame and len(self.frames) > frames):
                break
        return self

    def take(self, line: str) -> None:
        """Processes one line of the stream."""
        if line.startswith(":"):
            self.comments += 1
        elif line.startswith("id: "):
            self.ids.append(int(line.removeprefix("id: ")))
        elif line == "data: [DONE]":
            self.done = True
        elif line.startswith("data: "):
            frame = json.loads(line.removeprefix("data: "))
            self.text += frame["choices"][0]["delta"]["content"]
            self.frames.append(frame)


class Person:
    """A user with a token. Each method sends one request of the API."""

    def __init__(self, http: httpx.Client) -> None:
        self.password = secrets.token_urlsafe(12)
        self.email = f"{secrets.token_hex(8)}@example.com"
        self.http = http
        account = self._created("/auth/signup", email=self.email, password=self.password)
        self.token: str = account["access_token"]
        http.headers["Authorization"] = f"Bearer {self.token}"

    @contextmanager
    def at(self, url: str) -> Iterator["Person"]:
        """The same user at another process of the service."""
        with _client(url) as http:
            http.headers["Authorization"] = f"Bearer {self.token}"
            other = Person.__new__(Person)
            other.__dict__ = {**self.__dict__, "http": http}
            yield other

    def _created(self, path: str, **body: str) -> JSON:
        response = self.http.post(path, json=body)
        assert response.status_code == 201, response.text
        made: JSON = response.json()
        return made

    def project(self, name: str = "A project", description: str = "") -> JSON:
        """Creates a project."""
        return self._created("/projects", name=name, description=description)

    def session(self, project: JSON | None = None, **body: str) -> JSON:
        """Creates a session, in `project` or else in a new project."""
        return self._created(f"/projects/{(project or self.project())['id']}/sessions", **body)

    def rename(self, project: JSON, **body: str) -> None:
        """Changes the name or description of a project."""
        assert self.http.put(f"/projects/{project['id']}", json=body).status_code == 200

    def say(
        self, session: JSON, text: str, *, image: str | None = None, stream: bool = False, key: str | None = None
    ) -> Answer:
        """Sends a message and waits for the whole reply, or for the error."""
        if stream:
            return self._say_streamed(session, text, image, key)
        response = self.http.post("/chat", json=_message(session, text, image), headers=_key(key))
        body = response.json()
        return Answer(response.status_code, response.text, body.get("content", ""), body.get("code"), response.headers)

    def lose(self, session: JSON, text: str) -> None:
        """Sends a message whose answer may be cut off, because the service is killed in the meantime."""
        with suppress(httpx.TransportError):
            self.say(session, text)

    def _say_streamed(self, session: JSON, text: str, image: str | None, key: str | None) -> Answer:
        with self.listen(session, text, image=image, key=key) as (response, stream):
            if response.status_code != 200:
                body = response.read().decode()
                return Answer(response.status_code, body, "", json.loads(body)["code"], response.headers)
            stream.read()
            assert stream.done
            assert stream.finish == "stop", stream.frames[-1]
            return Answer(200, "", stream.text, None, response.headers)

    @contextmanager
    def listen(
        self, session: JSON, text: str, *, image: str | None = None, key: str | None = None
    ) -> Iterator[tuple[httpx.Response, Stream]]:
        """Sends a message and yields its response and stream for the test to read. Leaving the block closes the
        connection."""
        body = _message(session, text, image)
        with self.http.stream("POST", "/chat/stream", json=body, headers=_key(key)) as response:
            yield response, Stream(response)

    @contextmanager
    def resume(self, session: JSON, message_id: int, after: int | None = None) -> Iterator[Stream]:
        """Yields the stream of a reply, from the offset `after` on."""
        path = f"/sessions/{session['id']}/messages/{message_id}/stream"
        headers = {} if after is None else {"Last-Event-ID": str(after)}
        with self.http.stream("GET", path, headers=headers) as response:
            assert response.status_code == 200, response.read()
            yield Stream(response)

    def messages(self, session: JSON) -> list[JSON]:
        """Returns all messages of a session, oldest first."""
        response = self.http.get(f"/sessions/{session['id']}/messages")
        assert response.status_code == 200, response.text
        rows: list[JSON] = response.json()
        return rows

    def reply(self, session: JSON, *states: str) -> JSON | None:
        """Returns the newest reply of a session if it has one of these statuses, otherwise None."""
        last = self.messages(session)[-1]
        return last if last["role"] == "assistant" and last["status"] in states else None

    def stop(self, session: JSON) -> bool:
        """Stops the session's turns. Returns whether there was anything to stop."""
        response = self.http.post(f"/sessions/{session['id']}/stop")
        assert response.status_code == 200, response.text
        stopped: bool = response.json()["stopped"]
        return stopped

    def delete(self, path: str, **body: str) -> None:
        """Deletes a session, a project or the account."""
        response = self.http.request("DELETE", path, json=body or None)
        assert response.status_code == 200, response.text

    def ready(self) -> httpx.Response:
        """Requests `/health/ready`."""
        return self.http.get("/health/ready")


def _key(key: str | None) -> dict[str, str]:
    return {} if key is None else {"Idempotency-Key": key}


def _message(session: JSON, text: str, image: str | None) -> JSON:
    """Returns the body of `POST /chat` and `POST /chat/stream`."""
    body: JSON = {
        "session_key": session["session_key"],
        "messages": [{"role": "user", "content": text}],
    }
    return body | ({"image": image} if image is not None else {})
