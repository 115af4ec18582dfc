"""The service as a test starts it, and a person who uses it over HTTP as the contract says."""

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
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self, TypeVar

import httpx
import pytest
import uvicorn

import telemetry
from app import create_app
from settings import Settings

T = TypeVar("T")
JSON = dict[str, Any]
CHECKOUT = Path(__file__).resolve().parents[1]
RESERVED: list[socket.socket] = []
NOWHERE = os.open(os.devnull, os.O_WRONLY)
# What a process with an environment of its own needs to be measured by `./tests/run --coverage`; otherwise empty.
COVERAGE = {name: value for name, value in os.environ.items() if name == "COVERAGE_PROCESS_CONFIG"}


def free_port() -> int:
    """A loopback port that nobody listens on, and that no other test gets while this process lives.

    It is below the range from which the kernel chooses ports of its own: a connection of another test would otherwise
    take it before it is listened on. Tests run in parallel, so each port is reserved by an abstract Unix socket, which
    is gone with the process.
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
    """The first value of `look()` that is true. Fails the test, naming `what`, when none comes in time."""
    deadline = time.monotonic() + seconds
    while True:
        if value := look():
            return value
        if time.monotonic() > deadline:
            pytest.fail(f"waited {seconds:g} s in vain for {what}")
        time.sleep(0.02)


def tail(log: Path, characters: int = 4000) -> str:
    """The end of a process's output, for the message of a failure."""
    return log.read_text(errors="replace")[-characters:] if log.exists() else "(no output)"


class Served:
    """The real app on uvicorn over loopback, in a thread of the test: quick, and open to a look inside."""

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
        # pytest keeps what is logged, and shows it where a test fails; written to stdout too it gets between the dots.
        telemetry.start_logging(self.settings.log_level, self.settings.log_format, (), NOWHERE)
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Ends in order, as SIGTERM does."""
        self._server.should_exit = True
        self._thread.join(30)
        assert not self._thread.is_alive(), "the app did not stop"

    @contextmanager
    def person(self) -> Iterator["Person"]:
        """A newly signed-up user."""
        with _client(self.url) as http:
            yield Person(http)


class Service:
    """`uvicorn app:app` as a process of its own on a free port, with a database and folders of its own."""

    def __init__(self, directory: Path, gateway_url: str, gateway_token: str, **environment: str) -> None:
        """`environment` is what differs from the usual settings."""
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.directory = directory
        self.log = directory / f"service-{self.port}.log"
        self._process: subprocess.Popen[bytes] | None = None
        # Everything is said here: a developer's own `.env` beside the code must not steer a test.
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
        """Of the running process."""
        assert self._process is not None
        return self._process.pid

    def start(self) -> None:
        """Starts it and waits until `/health` answers."""
        command = [sys.executable, "-m", "uvicorn", "app:app", "--host", "127.0.0.1", "--port", str(self.port)]
        command += ["--no-access-log", "--timeout-graceful-shutdown", "1"]
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(command, cwd=CHECKOUT, env=self._environment, stdout=log, stderr=log)
        try:
            until(self._serves, 60, "the service's /health")
        except BaseException:
            self.kill()
            raise

    def _serves(self) -> bool:
        assert self._process is not None and self._process.poll() is None, tail(self.log)
        try:
            return httpx.get(f"{self.url}/health", timeout=5, trust_env=False).status_code == 200
        except httpx.TransportError:
            return False

    def stop(self) -> None:
        """Ends it in order."""
        if self._process is not None:
            self._process.terminate()
            try:
                self._process.wait(timeout=30)
            except subprocess.TimeoutExpired:
                self.kill()
            self._process = None

    def freeze(self) -> None:
        """Holds the process as it is: it neither reads nor writes until it is thawed or killed."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        """Lets it go on."""
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        """Ends it by kill -9, as a crash does."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def output(self) -> str:
        """All that it has logged."""
        return self.log.read_text(errors="replace")

    @contextmanager
    def person(self) -> Iterator["Person"]:
        """A newly signed-up user."""
        with _client(self.url) as http:
            yield Person(http)


NO_TLS = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # to load the world's certificates takes longer than most tests


def _client(url: str) -> httpx.Client:
    limits = httpx.Limits(max_connections=None)
    return httpx.Client(base_url=url, timeout=60, trust_env=False, verify=NO_TLS, limits=limits)


@dataclass
class Answer:
    """What came of one message, streamed or not."""

    status_code: int
    body: str
    text: str = ""
    code: str | None = None
    headers: httpx.Headers = field(default_factory=httpx.Headers)

    @property
    def message_id(self) -> int:
        """The reply's."""
        return int(self.headers["X-Message-Id"])


class Stream:
    """A streamed reply, read as the contract tells a client to read it."""

    def __init__(self, response: httpx.Response | None) -> None:
        """Without a response its lines are given to `take`."""
        self._lines = response.iter_lines() if response else iter(())
        self.text = ""
        self.frames: list[JSON] = []
        self.ids: list[int] = []
        self.comments = 0
        self.done = False
        self.longest_gap = 0.0

    @property
    def finish(self) -> str | None:
        """The last frame's `finish_reason`."""
        reason: str | None = self.frames[-1]["choices"][0]["finish_reason"]
        return reason

    @property
    def error(self) -> JSON | None:
        """The last frame's `error`."""
        error: JSON | None = self.frames[-1].get("error")
        return error

    def read(self, *, to_first_text: bool = False, one_frame: bool = False) -> Self:
        """Reads to the end, or until the first text is there, or one frame more."""
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
        """A line of the stream."""
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
    """A user with a token; every method is one request of the contract."""

    def __init__(self, http: httpx.Client) -> None:
        self.password = secrets.token_urlsafe(12)
        self.email = f"{secrets.token_hex(8)}@example.com"
        self.http = http
        account = self._created("/auth/signup", email=self.email, password=self.password)
        self.token: str = account["access_token"]
        http.headers["Authorization"] = f"Bearer {self.token}"

    @contextmanager
    def at(self, url: str) -> Iterator["Person"]:
        """The same person at another process of the service."""
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
        """A new project."""
        return self._created("/projects", name=name, description=description)

    def session(self, project: JSON | None = None, **body: str) -> JSON:
        """A new session, in a project of its own unless one is given."""
        return self._created(f"/projects/{(project or self.project())['id']}/sessions", **body)

    def rename(self, project: JSON, **body: str) -> None:
        """A project's new name or description."""
        assert self.http.put(f"/projects/{project['id']}", json=body).status_code == 200

    def say(
        self, session: JSON, text: str, *, image: str | None = None, stream: bool = False, key: str | None = None
    ) -> Answer:
        """Sends a message and waits for the whole reply, or for the refusal."""
        if stream:
            return self._say_streamed(session, text, image, key)
        response = self.http.post("/chat", json=_message(session, text, image), headers=_key(key))
        body = response.json()
        return Answer(response.status_code, response.text, body.get("content", ""), body.get("code"), response.headers)

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
        """Sends a message and leaves the reading of the reply to the test; leaving the block closes the tab."""
        body = _message(session, text, image)
        with self.http.stream("POST", "/chat/stream", json=body, headers=_key(key)) as response:
            yield response, Stream(response)

    @contextmanager
    def resume(self, session: JSON, message_id: int, after: int | None = None) -> Iterator[Stream]:
        """The rest of a reply, from so many characters on."""
        path = f"/sessions/{session['id']}/messages/{message_id}/stream"
        headers = {} if after is None else {"Last-Event-ID": str(after)}
        with self.http.stream("GET", path, headers=headers) as response:
            assert response.status_code == 200, response.read()
            yield Stream(response)

    def messages(self, session: JSON) -> list[JSON]:
        """All messages of a session, oldest first."""
        response = self.http.get(f"/sessions/{session['id']}/messages")
        assert response.status_code == 200, response.text
        rows: list[JSON] = response.json()
        return rows

    def reply(self, session: JSON, *states: str) -> JSON | None:
        """The newest reply of a session, once its status is one of these."""
        last = self.messages(session)[-1]
        return last if last["role"] == "assistant" and last["status"] in states else None

    def stop(self, session: JSON) -> bool:
        """Stops the running reply; tells whether one ran."""
        response = self.http.post(f"/sessions/{session['id']}/stop")
        assert response.status_code == 200, response.text
        stopped: bool = response.json()["stopped"]
        return stopped

    def delete(self, path: str, **body: str) -> None:
        """Deletes a session, a project or the account."""
        response = self.http.request("DELETE", path, json=body or None)
        assert response.status_code == 200, response.text

    def ready(self) -> httpx.Response:
        """What `/health/ready` answers."""
        return self.http.get("/health/ready")


def _key(key: str | None) -> dict[str, str]:
    return {} if key is None else {"Idempotency-Key": key}


def _message(session: JSON, text: str, image: str | None) -> JSON:
    """The body of `POST /chat` and `POST /chat/stream`."""
    body: JSON = {
        "session_key": session["session_key"],
        "messages": [{"role": "user", "content": text}],
    }
    return body | ({"image": image} if image is not None else {})
