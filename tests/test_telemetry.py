"""Log lines, the ids and secrets in them, and the metrics."""

import asyncio
import json
import logging
import os
import re
import socket
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from contextvars import copy_context
from pathlib import Path

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from pydantic import SecretStr
from starlette.requests import Request

import database
import errors
import health
import telemetry

from .conftest import make_settings
from .service import CHECKOUT, JSON, NOWHERE, Person, Served, Service, until
from .stand_in import StandIn

PNG = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="  # one pixel
FORMS: tuple[telemetry.Form, ...] = ("plain", "json")
TOKEN = "the-token-of-the-metrics"
PLAIN = re.compile(
    r"(?P<time>\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3}) (?P<level>[A-Z]+) (?P<logger>[\w.]+) "
    r"\[(?P<request_id>\S+)(?: user=(?P<user_id>\d+))?(?: session=(?P<session_id>\d+))?(?: turn=(?P<turn_id>\d+))?\] "
    r"(?P<message>.*)"
)
Serve = Callable[..., Served]

each_form = pytest.mark.parametrize("form", FORMS)


def parsed(line: str) -> JSON:
    """Returns the fields of a line of either format, under the names of the JSON format; the time keeps its format."""
    if line.startswith("{"):
        fields: JSON = json.loads(line)
        return fields
    match = PLAIN.fullmatch(line)
    assert match, line
    fields = {name: value for name, value in match.groupdict().items() if value is not None and value != "-"}
    return fields | {name: int(value) for name, value in fields.items() if name in ("user_id", "session_id", "turn_id")}


class Log:
    """Writes the log of this process to a file."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def start(self, form: telemetry.Form, *secrets: str, level: str = "DEBUG") -> None:
        """Logs to the file in this format from now on."""
        telemetry.start_logging(level, form, secrets, self._fd)

    def text(self) -> str:
        """Returns everything that was logged so far."""
        return self._path.read_text("utf-8")

    def lines(self) -> list[str]:
        """Returns the lines, split at every character that Python takes for the end of a line."""
        return self.text().splitlines()

    def close(self) -> None:
        """Stops logging to the file."""
        telemetry.start_logging("DEBUG", "plain", (), NOWHERE)
        os.close(self._fd)


@pytest.fixture
def log(tmp_path: Path) -> Iterator[Log]:
    """The log of one test."""
    kept = Log(tmp_path / "the.log")
    yield kept
    kept.close()


@pytest.fixture
def ours() -> logging.Logger:
    """A logger of the service."""
    return logging.getLogger("clawd.tests")


# --- the two formats ----------------------------------------------------------------------------------

ODD = (
    *("a\nb", "a\r\nb", "a\rb", "tab\there", "\x1b[31mred", "a\u2028b", "a\u2029b", "a\x85b", "a\x0b\x0c\x1cb"),
    *("half \ud800", "nul\x00", '"quoted" \\n {}', "naïve ☃ 😀", "%s %d", ""),
)


@each_form
@pytest.mark.parametrize("text", ODD, ids=ascii)
def test_an_event_is_one_line(form: telemetry.Form, text: str, log: Log, ours: logging.Logger) -> None:
    """No content of a message ends the line or controls a terminal. JSON returns the content unchanged."""
    log.start(form)
    ours.info("said %s.", text)
    ours.info("next")
    first, second = log.text().removesuffix("\n").split("\n")
    assert first.isprintable() and len(first.splitlines()) == 1
    assert parsed(second)["message"] == "next"
    if form == "json" or text.isprintable():
        assert parsed(first)["message"] == f"said {text}."


@each_form
def test_a_line_says_what_is_known(form: telemetry.Form, log: Log, ours: logging.Logger) -> None:
    """Each line has time, level, logger and message; request, user, session and turn are in it if they are known."""
    log.start(form)

    def logged() -> JSON:
        ours.warning("%d things", 3)
        line = parsed(log.lines()[-1])
        when = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z" if form == "json" else r"[\d: -]{19},\d{3}"
        assert re.fullmatch(when, line.pop("time"))
        return line

    def story() -> None:
        usual = {"level": "WARNING", "logger": "clawd.tests", "message": "3 things"}
        assert logged() == usual
        telemetry.begin_request("abc")
        assert logged() == usual | {"request_id": "abc"}
        telemetry.note(user_id=7)
        telemetry.note(session_id=12, turn_id=345)
        known = {"request_id": "abc", "user_id": 7, "session_id": 12, "turn_id": 345}
        assert logged() == usual | known
        assert telemetry.turn_context(13, 346, asked_here=True).run(logged) == usual | known | {
            "session_id": 13,
            "turn_id": 346,
        }
        assert telemetry.turn_context(13, 346, asked_here=False).run(logged) == usual | {
            "session_id": 13,
            "turn_id": 346,
        }
        assert logged() == usual | known
        telemetry.begin_request("next")
        assert logged() == usual | {"request_id": "next"}

    copy_context().run(story)


def test_a_duration_is_a_field(log: Log, ours: logging.Logger) -> None:
    """A JSON line about something that takes time has the milliseconds as a number."""
    log.start("json")
    ours.info("done", extra={"duration_ms": 12.5})
    assert json.loads(log.text())["duration_ms"] == 12.5


@each_form
def test_a_traceback_stays_with_its_event(form: telemetry.Form, log: Log, ours: logging.Logger) -> None:
    """In JSON, a traceback is a field. In the plain format it follows on indented lines, even if it contains a forged
    line."""
    log.start(form)
    try:
        raise RuntimeError("broken\n2026-11-24 09:00:00,123 INFO clawd.app [-] FORGED\x1b[31m")
    except RuntimeError:
        ours.exception("it failed")
    first, *more = log.lines()
    line = parsed(first)
    if form == "json":
        assert not more
        assert line["exception"].startswith("Traceback") and "FORGED" in line["exception"]
    else:
        assert "Traceback" in more[0] and "FORGED" in more[-1]
        assert all(one.startswith("    ") and one.isprintable() for one in more)
    assert line["message"] == "it failed"


@each_form
def test_arguments_that_do_not_fit_are_no_error(
    form: telemetry.Form, log: Log, capfd: pytest.CaptureFixture[str]
) -> None:
    """A log call whose arguments do not match its format string logs the format string only, because the arguments
    could contain secrets that were never checked."""
    log.start(form)
    *_, lines = logging.getLogger().handlers  # only our handler, because those of pytest would raise
    lines.handle(logging.LogRecord("clawd.tests", logging.INFO, "", 1, "%d of %d", ("a text",), None))
    assert "%d of %d" in parsed(log.lines()[0])["message"]
    assert "a text" not in log.text() + capfd.readouterr().err


@each_form
def test_secrets_are_replaced(form: telemetry.Form, log: Log, ours: logging.Logger) -> None:
    """Known secrets, and text that looks like an access token, are replaced in messages, tracebacks and request ids. A
    secret that is too short is not replaced."""
    log.start(form, "a long secret", "INFO")
    access = f"eyJ{'a' * 20}.eyJ{'b' * 20}.{'c-_' * 10}"
    try:
        raise ValueError(f"with a long secret and {access}")
    except ValueError:
        ours.exception("got a long secret, %s", f"Bearer {access}")
    context = copy_context()
    context.run(telemetry.begin_request, access)
    context.run(ours.info, "with an odd id")
    assert "a long secret" not in log.text() and access not in log.text() and "c-_c-_" not in log.text()
    assert "got [secret], Bearer [token]" in log.text()
    assert parsed(log.lines()[-1])["level"] == "INFO"


OTHERS = """
import logging, sys, warnings
import telemetry
logging.config = __import__("logging.config", fromlist=["config"])
from uvicorn.config import LOGGING_CONFIG
logging.config.dictConfig(LOGGING_CONFIG)
telemetry.start_logging("INFO", sys.argv[1], ())
telemetry.start_logging("INFO", sys.argv[1], ())
warnings.warn("a warning")
logging.getLogger("uvicorn").warning("from uvicorn")
logging.getLogger("uvicorn.error").info("from its errors")
logging.getLogger("asyncio").error("from asyncio")
logging.getLogger("somebody.else").warning("from a library")
logging.getLogger("clawd.app").info("from us")
logging.getLogger("uvicorn.access").info("an access")
print(logging.getLogger("uvicorn.access").hasHandlers(), file=sys.stderr)
"""


@each_form
def test_others_lines_are_like_ours(form: str) -> None:
    """uvicorn, asyncio, warnings and libraries log in the same format, each line once, even if logging is started
    twice. uvicorn's access log is off, because it would contain the signatures of image URLs."""
    environment = {**os.environ, "PYTHONPATH": str(CHECKOUT)}
    done = subprocess.run(
        [sys.executable, "-c", OTHERS, form], capture_output=True, text=True, check=True, env=environment
    )
    lines = [parsed(line) for line in done.stdout.splitlines()]
    assert [line["logger"] for line in lines] == [
        *("py.warnings", "uvicorn", "uvicorn.error", "asyncio", "somebody.else", "clawd.app")
    ]
    assert "a warning" in lines[0]["message"]
    assert done.stderr.splitlines() == ["False"]


# --- a full pipe --------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [100, 100_000])
def test_a_full_pipe_costs_lines_and_no_more(
    length: int, ours: logging.Logger, log: Log, capfd: pytest.CaptureFixture[str]
) -> None:
    """While the pipe of a worker is full, whole lines are lost; nothing is raised or printed to stderr. Once the pipe
    is read again, new lines are complete."""
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    os.set_blocking(reading, False)
    received = b""

    def drain() -> None:
        nonlocal received
        while True:
            try:
                received += os.read(reading, 1 << 20)
            except BlockingIOError:
                return

    telemetry.start_logging("INFO", "json", (), writing)
    for number in range(3_000_000 // length // 10):
        ours.info("%d %s", number, "x" * length)
    drain()
    for _ in range(3):
        ours.info("again")
        drain()
    lines = [json.loads(line)["message"] for line in received.decode().splitlines()]
    numbers = [int(line.partition(" ")[0]) for line in lines[:-3]]
    assert lines[-3:] == ["again"] * 3
    assert 0 < len(numbers) < 3_000_000 // length // 10
    assert numbers == sorted(set(numbers))
    os.close(reading)
    ours.info("nobody is there")
    os.close(writing)
    ours.info("nothing is there")
    assert capfd.readouterr().err == ""


# --- a real session -----------------------------------------------------------------------------------


class Story:
    """A service in its own process that logs everything, and the actions of its user."""

    def __init__(self, form: str, directory: Path, stack: ExitStack) -> None:
        gateway = stack.enter_context(StandIn(token="the-gateways-token"))
        self.signing = "the secret of the service that logs"
        environment = {"JWT_SECRET": self.signing, "LOG_LEVEL": "DEBUG", "LOG_FORMAT": form, "METRICS_TOKEN": TOKEN}
        environment |= {"SIGNUP": "the-invite-code", "DRAIN_SECONDS": "0"}
        self.service = Service(directory, gateway.url, gateway.token, **environment)
        self.service.start()
        stack.callback(self.service.kill)
        self.http = stack.enter_context(httpx.Client(base_url=self.service.url, timeout=60, trust_env=False))
        self.headers: dict[str, str] = {}
        self.password = "correct horse battery"
        account = self.ask("signup", "POST", "/auth/signup", email="ada@example.com", invite="the-invite-code")
        self.token: str = account["access_token"]
        self.user_id: int = account["user"]["id"]
        self.headers = {"Authorization": f"Bearer {self.token}"}
        project = self.ask("project", "POST", "/projects", name="Plans", description="A hidden description")
        self.session = self.ask("session", "POST", f"/projects/{project['id']}/sessions")
        self.live()

    def ask(self, request_id: str, method: str, path: str, **body: object) -> JSON:
        """Sends one request with this id. Returns the JSON of the response, or `raw` text."""
        if path.startswith("/auth/") and "password" not in body:
            body["password"] = self.password
        headers = {**self.headers, "X-Request-ID": request_id}
        response = self.http.request(method, path, json=body or None, headers=headers)
        kind = response.headers["Content-Type"]
        answer: JSON | list[JSON] = response.json() if kind == "application/json" else {"raw": response.text}
        return {
            **(answer if isinstance(answer, dict) else {"items": answer}),
            "turn": int(response.headers.get("X-Message-Id", 0)),
        }

    def chat(self, request_id: str, text: str, path: str = "/chat", **more: object) -> JSON:
        """Sends a message and returns the response."""
        said = [{"role": "user", "content": text}]
        return self.ask(request_id, "POST", path, session_key=self.session["session_key"], messages=said, **more)

    def live(self) -> None:
        """Performs all actions whose log lines are tested."""
        own = f"/sessions/{self.session['id']}"
        self.whole = self.chat("whole", "What I tell nobody", image=PNG)["turn"]
        self.streamed = self.chat("streamed", "Whispered [[chunks=4 end=done]]", "/chat/stream")["turn"]
        self.chat("failed", "A failing secret [[status=500]]")
        self.chat("broken", "Half a secret [[chunks=3 end=error]]", "/chat/stream")
        self.ask("wrong", "POST", "/auth/login", email="ada@example.com", password="A mistyped one")
        self.ask("typo", "POST", "/auth/signup", email="A typo", password="A mistyped one")
        self.ask("login", "POST", "/auth/login", email="ada@example.com")
        self.ask("file", "PUT", f"/projects/{self.session['project_id']}/files/plan.txt", content="Hidden content")
        self.ask("none", "GET", "/projects/999999")
        self.image = self.ask("messages", "GET", f"{own}/messages")["items"][0]["image"]
        self.http.get(self.image)
        self.ask("resume", "GET", f"{own}/messages/{self.streamed}/stream")
        self.run_and_stop(own)
        for token in (TOKEN, "a-wrong-metrics-token"):
            headers = {"Authorization": f"Bearer {token}", "X-Forwarded-For": "8.8.8.8"}
            self.http.get("/metrics", headers=headers)
        self.headers = {}
        self.ask("anonymous", "GET", "/projects")

    def run_and_stop(self, own: str) -> None:
        """Queues turns behind others: one until the first ends, one until a stop, one until after a kill -9."""
        short, endless = "Slow secret [[chunks=20 delay=0.03]]", "Endless secret [[chunks=9999 delay=0.02]]"
        with self.talk("first", short), self.talk("second", short) as self.waited:
            self.ended(self.waited)
        with self.talk("third", endless), self.talk("fourth", endless):
            self.ask("stop", "POST", f"{own}/stop")
        with self.talk("left", endless) as self.left, self.talk("behind", endless) as self.behind:
            self.service.kill()
        self.service.start()
        self.ended(self.left)
        until(lambda: self.about(turn_id=self.behind, logger="clawd.gateway"), 15, "the turn behind it")
        self.ask("last", "POST", f"{own}/stop")
        self.ended(self.behind)

    @contextmanager
    def talk(self, request_id: str, text: str) -> Iterator[int]:
        """Sends a message without reading its reply; yields the id of the reply."""
        said = [{"role": "user", "content": text}]
        body = {"session_key": self.session["session_key"], "messages": said}
        headers = {**self.headers, "X-Request-ID": request_id}
        with self.http.stream("POST", "/chat/stream", json=body, headers=headers) as response:
            yield int(response.headers["X-Message-Id"])

    def ended(self, turn: int) -> None:
        """Waits until the log says that the turn has ended."""
        until(lambda: f"reply {turn} in session" in self.service.output(), 15, f"the end of turn {turn}")

    def lines(self) -> list[JSON]:
        """Returns the lines that the app logged, without tracebacks and without uvicorn's lines from before the
        start."""
        lines = [line for line in self.service.output().split("\n") if line and not line.startswith(("    ", "INFO: "))]
        return [parsed(line) for line in lines]

    def about(self, **known: object) -> list[JSON]:
        """Returns the lines with these fields."""
        return [line for line in self.lines() if known.items() <= line.items()]


@pytest.fixture(scope="module", params=FORMS)
def story(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Story]:
    """A user's actions at a service, with each log format."""
    with ExitStack() as stack:
        yield Story(request.param, tmp_path_factory.mktemp("story"), stack)


def test_no_line_tells_a_secret(story: Story) -> None:
    """No line contains a password, token, signature or secret, or the content of a message, reply, description or
    file."""
    log = story.service.output()
    assert "POST /auth/login 401" in log and "GET /metrics 401" in log
    for secret in (
        *(story.password, "A mistyped one", story.token, story.token.rpartition(".")[2], TOKEN, story.signing),
        *("the-gateways-token", "a-wrong-metrics-token", "the-invite-code", story.image.rpartition("signature=")[2]),
        *("I tell nobody", "Whispered", "failing secret", "Half a secret", "Endless secret", "[[", PNG[:40]),
        *("You said", "Hello ", "naïve", "na\\u00efve", "日本", "\\u65e5", "Hidden content", "hidden description"),
    ):
        assert secret not in log


@pytest.mark.parametrize("request_id", ["whole", "streamed"])
def test_a_chat_is_one_story(story: Story, request_id: str) -> None:
    """All lines of one chat have the same request, user, session and turn, so that each of these ids finds all of
    them."""
    turn = getattr(story, request_id)
    lines = story.about(request_id=request_id)
    known = {"user_id": story.user_id, "session_id": story.session["id"], "turn_id": turn}
    assert {line["logger"] for line in lines} == {"clawd.app", "clawd.gateway", "clawd.turns"}
    assert all(known.items() <= line.items() for line in lines)
    assert lines == [line for line in story.about(turn_id=turn) if line["request_id"] == request_id]
    sent = f"[CHAT] Sending to OpenClaw with 'user' field: adapter-session-{story.session['session_key']}"
    assert [line["message"] for line in lines if line["logger"] == "clawd.gateway"] == [sent]
    if lines[0]["time"].endswith("Z"):
        assert all(line["duration_ms"] > 0 for line in lines if line["logger"] != "clawd.gateway")


def test_a_turn_that_waited_has_no_request(story: Story) -> None:
    """A queued turn begins when another one ends, or in another process than the one that received it. Its lines
    name user, session and turn, but not the request of the turn before it. The request that reads its stream has its
    own id."""
    for turn in (story.waited, story.behind):
        lines = [line for line in story.about(turn_id=turn) if line["logger"] != "clawd.app"]
        assert {line["logger"] for line in lines} == {"clawd.gateway", "clawd.turns"}
        assert not [line for line in lines if "request_id" in line]
        assert {(line["user_id"], line["session_id"]) for line in lines} == {(story.user_id, story.session["id"])}
    (request,) = [line for line in story.about(turn_id=story.waited) if line["logger"] == "clawd.app"]
    assert request["request_id"] == "second"
    sent, *ended = story.about(turn_id=story.left)
    assert (sent["request_id"], sent["logger"]) == ("left", "clawd.gateway")
    assert [line["logger"] for line in ended] == ["clawd.turns"] and "request_id" not in ended[0]
    assert (ended[0]["user_id"], ended[0]["session_id"]) == (story.user_id, story.session["id"])


@pytest.mark.parametrize(
    ("request_id", "known"),
    [
        ("signup", {"user_id"}),
        ("login", {"user_id"}),
        ("wrong", set()),
        ("typo", set()),
        ("anonymous", set()),
        ("none", {"user_id"}),
        ("project", {"user_id"}),
        ("messages", {"user_id", "session_id"}),
        ("resume", {"user_id", "session_id", "turn_id"}),
        ("stop", {"user_id", "session_id"}),
        ("failed", {"user_id", "session_id", "turn_id"}),
        ("broken", {"user_id", "session_id", "turn_id"}),
    ],
)
def test_a_requests_line_says_whose_it_is(story: Story, request_id: str, known: set[str]) -> None:
    """The line of a request, also of a failed one, names user, session and turn if they are known."""
    (line,) = [line for line in story.about(request_id=request_id) if line["logger"] == "clawd.app"]
    found = {name: line[name] for name in ("user_id", "session_id", "turn_id") if name in line}
    assert set(found) == known
    assert found.get("user_id", story.user_id) == story.user_id
    assert found.get("session_id", story.session["id"]) == story.session["id"]


def test_uvicorn_says_once_that_it_serves(story: Story) -> None:
    """uvicorn's lines have the app's format from the app's start on, and are not repeated."""
    starts = [line for line in story.lines() if line["message"].startswith("clawd-backend ")]
    complete = [line for line in story.lines() if line["message"] == "Application startup complete."]
    assert len(starts) == len(complete) == 2
    assert {line["logger"] for line in complete} == {"uvicorn.error"}


def test_what_was_known_of_a_request_is_not_said_of_the_next(served: Served, log: Log) -> None:
    """Two requests arrive in one packet, only the first with a token: the line of the second must not name the user."""
    with served.person() as ada, socket.create_connection(("127.0.0.1", served.port)) as client:
        log.start("json")
        first = f"GET /auth/me HTTP/1.1\r\nHost: x\r\nX-Request-ID: one\r\nAuthorization: Bearer {ada.token}\r\n\r\n"
        client.sendall((first + "GET /nowhere HTTP/1.1\r\nHost: x\r\nX-Request-ID: two\r\n\r\n").encode())
        until(lambda: '"two"' in log.text(), 10, "both lines")
    one, two = (json.loads(line) for line in log.lines() if '"one"' in line or '"two"' in line)
    assert "user_id" in one and "user_id" not in two


def test_a_failure_of_the_database_says_whose_it_was(served: Served, ada: Person, log: Log) -> None:
    """This also holds for failures in a thread of the database: the writer, and the threads for large reads."""
    session = ada.session()
    with closing(sqlite3.connect(served.settings.db_path)) as conn:
        conn.execute("ALTER TABLE messages RENAME TO elsewhere")
        conn.execute("ALTER TABLE projects RENAME TO nowhere")
    log.start("json")
    written = ada.http.post("/projects", json={"name": "Plans"}, headers={"X-Request-ID": "written"})
    read = ada.http.get(f"/sessions/{session['id']}/messages", headers={"X-Request-ID": "read"})
    assert (written.status_code, read.status_code) == (503, 503)
    failures = [line for line in map(json.loads, log.lines()) if line["message"] == "database operation failed"]
    ids = {line.get("request_id"): (line.get("user_id"), line.get("session_id")) for line in failures}
    user_id = ada.http.get("/auth/me").json()["id"]
    assert ids["written"] == (user_id, None)
    assert ids["read"] == (user_id, session["id"])


def test_a_commit_that_fails_says_whose_it_was(tmp_path: Path, log: Log) -> None:
    """The failed commit of a single job has the id of its request; that of several jobs, committed together, has
    none."""
    begun, go_on = threading.Event(), threading.Event()

    def orphan(conn: sqlite3.Connection) -> None:
        conn.execute("PRAGMA defer_foreign_keys=ON")
        conn.execute(
            "INSERT INTO projects (user_id, name, project_path, created_at, updated_at) "
            "VALUES (999, 'Plans', '', '', '')"
        )

    def wait(conn: sqlite3.Connection) -> None:
        begun.set()
        go_on.wait(10)
        orphan(conn)

    async def write(request_id: str, job: Callable[[sqlite3.Connection], None]) -> None:
        telemetry.begin_request(request_id)
        with pytest.raises(errors.Unavailable):
            await db.write(job)

    async def story() -> None:
        held = asyncio.create_task(write("alone", wait))
        await asyncio.to_thread(begun.wait, 10)
        others = [asyncio.create_task(write(name, orphan)) for name in ("one", "two")]
        await asyncio.sleep(0.1)
        go_on.set()
        await asyncio.gather(held, *others)

    db = database.Database(tmp_path / "a.db")
    db.open()
    log.start("json")
    asyncio.run(story())
    db.close()
    failures = [line for line in map(json.loads, log.lines()) if line["message"] == "database operation failed"]
    assert [line.get("request_id") for line in failures] == ["alone", None]
    assert all("FOREIGN KEY" in line["exception"] for line in failures)


def test_a_turns_line_says_when_its_text_began(served: Served, ada: Person, log: Log) -> None:
    """The line has the seconds to the first text in addition to those to the end, but only if there was text."""
    session = ada.session()
    log.start("plain")
    ada.say(session, "[[first=0.2 chunks=3 delay=0.1]]")
    ada.say(session, "[[end=empty]]", stream=True)
    whole, empty = [line for line in log.lines() if " clawd.turns [" in line]
    times = re.search(r"is complete: \d+ characters, the first after (\d+\.\d{3}) s, (\d+\.\d{3}) s$", whole)
    assert times and 0.2 <= float(times[1]) < float(times[2])
    assert re.search(r"is empty: 0 characters, \d+\.\d{3} s$", empty)


# --- the metrics --------------------------------------------------------------------------------------


def figures(served: Served | Service, **headers: str) -> dict[str, float]:
    """Scrapes the metrics: `name{label="value",…}` → value."""
    response = httpx.get(f"{served.url}/metrics", headers=headers, timeout=60, trust_env=False)
    assert response.status_code == 200, response.text
    assert response.headers["Content-Type"] == "text/plain; version=0.0.4; charset=utf-8"
    found = {}
    for family in text_string_to_metric_families(response.text):
        assert family.documentation, family.name
        for sample in family.samples:
            labels = ",".join(f'{name}="{value}"' for name, value in sorted(sample.labels.items()))
            found[f"{sample.name}{{{labels}}}" if labels else sample.name] = sample.value
    return found


def requests_of(method: str, route: str, status: int) -> str:
    """Returns the name of the counter of such requests."""
    return f'clawd_requests_total{{method="{method}",route="{route}",status="{status}"}}'


def test_requests_are_counted_by_route_and_status(served: Served, ada: Person) -> None:
    """Requests are counted by the template of their route, also with invalid ids, and by status."""
    before = figures(served)
    project = ada.project()
    for number in (project["id"], 999_998, 999_999):
        ada.http.get(f"/projects/{number}")
    ada.http.get("/projects/none")
    ada.http.patch("/projects")
    ada.http.get("/projects", headers={"Authorization": "Bearer nonsense"})
    ada.http.get(f"/projects/{project['id']}/files/a/b/c")
    after = figures(served)
    grown = {name: value - before.get(name, 0) for name, value in after.items() if name.startswith("clawd_requests")}
    assert {name: value for name, value in grown.items() if value} == {
        requests_of("POST", "/projects", 201): 1,
        requests_of("GET", "/projects/{project_id}", 200): 1,
        requests_of("GET", "/projects/{project_id}", 404): 2,
        requests_of("GET", "/projects/{project_id}", 422): 1,
        requests_of("PATCH", "/projects", 405): 1,
        requests_of("GET", "/projects", 401): 1,
        requests_of("GET", "/projects/{project_id}/files/{path:path}", 404): 1,
        requests_of("GET", "/metrics", 200): 1,
    }


def test_made_up_addresses_make_no_series(served: Served) -> None:
    """A thousand made-up addresses add at most one series per method and status."""
    figures(served)
    before = set(figures(served))
    with httpx.Client(base_url=served.url, timeout=60, trust_env=False) as http:
        for number in range(200):
            http.get(f"/nowhere/{number}")
            http.request("PROPFIND", f"/{number}")
            http.get(f"/projects/{number}/sessions")
            http.options(f"/{number}", headers={"Origin": f"https://{number}.example"})
    assert set(figures(served)) - before == {
        requests_of("GET", "unmatched", 404),
        requests_of("other", "unmatched", 404),
        requests_of("GET", "/projects/{project_id}/sessions", 401),
        requests_of("OPTIONS", "unmatched", 404),
    }


def test_turns_are_counted_by_their_end(served: Served, ada: Person) -> None:
    """Each turn is counted once by its final status, including queued turns that a stop drops. Running and queued turns
    are shown meanwhile."""
    session = ada.session()
    counts = {name: value for name, value in figures(served).items() if name.startswith("clawd_turns")}
    assert counts == {
        **{
            f'clawd_turns_total{{status="{status}"}}': 0
            for status in ("complete", "stopped", "interrupted", "failed", "empty")
        },
        "clawd_turns_running": 0,
        "clawd_turns_waiting": 0,
    }
    ada.say(session, "Hello")
    ada.say(session, "Hello again", stream=True)
    ada.say(session, "[[status=500]]")
    ada.say(session, "[[end=empty]]", stream=True)
    with ada.listen(session, "[[chunks=9999 delay=0.02]]") as (_, stream):
        stream.read(to_first_text=True)
        for _ in range(2):
            with ada.listen(session, "Hello"):
                continue
        now = figures(served)
        assert (now["clawd_turns_running"], now["clawd_turns_waiting"]) == (1, 2)
        assert ada.stop(session)
    wanted = {"complete": 2, "failed": 1, "empty": 1, "stopped": 3, "interrupted": 0}

    def ended() -> bool:
        now = figures(served)
        return {status: now[f'clawd_turns_total{{status="{status}"}}'] for status in wanted} == wanted

    until(ended, 5, "the counts")
    assert (figures(served)["clawd_turns_running"], figures(served)["clawd_turns_waiting"]) == (0, 0)


def test_the_first_token_is_timed(served: Served, ada: Person) -> None:
    """The time runs from the request to the gateway to the first text. A reply without text is not counted."""
    session = ada.session()
    ada.say(session, "[[first=0.3 chunks=3 delay=0.5]]")
    ada.say(session, "[[end=empty]]", stream=True)
    ada.say(session, "[[status=500]]")
    now = figures(served)
    assert now["clawd_first_token_seconds_count"] == 1
    assert 0.3 <= now["clawd_first_token_seconds_sum"] < 1
    assert now['clawd_first_token_seconds_bucket{le="0.25"}'] == 0
    assert now['clawd_first_token_seconds_bucket{le="1.0"}'] == 1


def test_the_gateway_is_up_or_not(served: Served, openclaw: StandIn) -> None:
    """The gauge shows the result of the last check."""
    httpx.get(f"{served.url}/health/ready", trust_env=False)
    assert figures(served)["clawd_gateway_up"] == 1
    openclaw.stop()
    until(lambda: httpx.get(f"{served.url}/health/ready", trust_env=False).status_code == 503, 10, "the next look")
    assert figures(served)["clawd_gateway_up"] == 0


def test_writes_are_counted_and_timed(served: Served, ada: Person) -> None:
    """Every write transaction is counted, with its seconds."""
    before = figures(served)
    ada.project()
    after = figures(served)
    assert after["clawd_database_commits_total"] > before["clawd_database_commits_total"]
    assert after["clawd_database_write_seconds_total"] > before["clawd_database_write_seconds_total"]


def test_metrics_say_which_code_runs(served: Served) -> None:
    """The version, branch and commit are those of `/health`, and the process's own metrics are included."""
    health = httpx.get(f"{served.url}/health", trust_env=False).json()
    labels = ",".join(f'{name}="{health[name]}"' for name in ("branch", "commit", "version"))
    now = figures(served)
    assert now[f"clawd_build_info{{{labels}}}"] == 1
    assert now["process_resident_memory_bytes"] > 1e6


def test_each_app_counts_for_itself(served: Served, tmp_path: Path, openclaw: StandIn) -> None:
    """Two apps in one process do not add to each other's counters."""
    (tmp_path / "other").mkdir()
    with Served(make_settings(tmp_path / "other", openclaw)) as other:
        httpx.get(f"{other.url}/nowhere", trust_env=False)
        assert figures(other)[requests_of("GET", "unmatched", 404)] == 1
        assert requests_of("GET", "unmatched", 404) not in figures(served)


def test_metrics_outlive_the_database_and_the_gateway(serve: Serve, openclaw: StandIn) -> None:
    """Metrics are returned while database and gateway are broken, without the numbers of turns, which are in the
    database."""
    shown = serve()
    openclaw.stop()
    assert "clawd_turns_running" in figures(shown)
    with closing(sqlite3.connect(shown.settings.db_path)) as conn:
        conn.execute("ALTER TABLE messages RENAME TO elsewhere")
    now = figures(shown)
    assert "clawd_turns_running" not in now and "clawd_turns_waiting" not in now
    assert now["clawd_database_commits_total"] >= 0


# --- who may read them --------------------------------------------------------------------------------

BEHIND_A_PROXY = (
    *({"X-Forwarded-For": address} for address in ("8.8.8.8", "127.0.0.1", "::1", "", "127.0.0.1, 8.8.8.8")),
    *({"Forwarded": "for=127.0.0.1"}, {"X-Real-IP": "127.0.0.1"}, {"X-Forwarded-Proto": "https"}, {"Via": "1.1 proxy"}),
    {"Origin": "https://somewhere.example"},
)


@pytest.mark.parametrize("headers", BEHIND_A_PROXY, ids=str)
def test_a_proxy_on_this_machine_does_not_open_the_metrics(serve: Serve, headers: dict[str, str]) -> None:
    """A request that a proxy on the same machine forwards comes from 127.0.0.1, but needs the token. Headers of the
    caller do not change that, nor does uvicorn, which trusts such a proxy."""
    shown = serve(metrics_token=SecretStr(TOKEN))
    refused = httpx.get(f"{shown.url}/metrics", headers=headers, trust_env=False)
    assert (refused.status_code, refused.json()["code"]) == (401, "unauthorized")
    assert "METRICS_TOKEN" in refused.json()["detail"] and TOKEN not in refused.text
    assert figures(shown, **headers, Authorization=f"Bearer {TOKEN}")["clawd_gateway_up"] in (0, 1)
    assert figures(shown)


@pytest.mark.parametrize(
    "sent",
    [
        *(b"Bearer wrong-token-of-the-metrics", b"Bearer", b"", b"Basic " + TOKEN.encode(), TOKEN.encode()),
        *("Bearer tökentökentöken".encode(), b"Bearer \xff\xfe", f"Bearer {TOKEN}x".encode(), b"Bearer None"),
    ],
    ids=ascii,
)
@pytest.mark.parametrize("token", [TOKEN, None])
def test_a_wrong_token_opens_nothing(serve: Serve, sent: bytes, token: str | None) -> None:
    """The answer is a 401 of the usual shape, also if no token is set, and for bytes that are not ASCII."""
    shown = serve(metrics_token=token and SecretStr(token))
    headers = [(b"X-Forwarded-For", b"8.8.8.8"), (b"Authorization", sent)]
    refused = httpx.get(f"{shown.url}/metrics", headers=headers, trust_env=False)
    assert (refused.status_code, refused.json()["code"]) == (401, "unauthorized")
    assert refused.headers["WWW-Authenticate"] == "Bearer"


@pytest.mark.parametrize(
    ("host", "local"),
    [
        *((host, True) for host in ("127.0.0.1", "127.8.9.10", "::1", "::ffff:127.0.0.1")),
        *((host, False) for host in ("8.8.8.8", "10.0.0.1", "::", "fe80::1", "::ffff:8.8.8.8")),
        *((host, False) for host in ("", "localhost", "testclient", "127.0.0.1:80", None)),
    ],
)
def test_this_machine_is_told_by_the_connection(host: str | None, local: bool) -> None:
    """Loopback addresses of IPv4 and IPv6 are local; addresses that only look like them are not."""
    scope: JSON = {"type": "http", "headers": [], "client": None if host is None else (host, 1)}
    assert health._is_local(Request(scope)) is local


def test_a_scrape_is_silent(serve: Serve, log: Log) -> None:
    """A scrape every 15 seconds must not fill the log at INFO. A refused one is logged."""
    shown = serve(metrics_token=SecretStr(TOKEN))
    log.start("plain", level="INFO")
    for _ in range(3):
        figures(shown)
    assert "/metrics" not in log.text()
    httpx.get(f"{shown.url}/metrics", headers={"X-Forwarded-For": "8.8.8.8"}, trust_env=False)
    assert "GET /metrics 401" in until(log.text, 5, "a line")
