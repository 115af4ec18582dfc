"""Health, readiness, request ids, error responses, CORS, and what importing the app and its log do."""

import json
import os
import re
import socket
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import httpx
import pytest
from pydantic import SecretStr

import telemetry
from handover import ServedState, ServedTurns
from health import VERSION
from settings import Settings
from turns import Turns

from .conftest import make_settings
from .service import CHECKOUT, JSON, NOWHERE, Person, Served, Service, until
from .stand_in import StandIn

PNG = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="  # one pixel
TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z")
EXPOSED = {"X-Request-ID", "X-Message-Id", "X-User-Message-Id", "Retry-After", "X-More"}
ORIGIN = "https://somewhere.example"
Serve = Callable[..., Served]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """One app for all tests that do not need their own. Its route `/broken` raises an unexpected error."""

    async def broken() -> None:
        raise RuntimeError("a secret of the inside")

    with StandIn() as gateway:
        shared = Served(make_settings(tmp_path_factory.mktemp("app"), gateway))
        shared.app.add_api_route("/broken", broken, tags=["broken"])
        with shared:
            yield shared


@pytest.fixture(scope="module")
def carol(served: Served) -> Iterator[Person]:
    """A user whom no test changes."""
    with served.person() as person:
        yield person


@pytest.fixture
def stranger(served: Served) -> Iterator[httpx.Client]:
    """A client without a token that sends the `Origin` header of another site."""
    with httpx.Client(base_url=served.url, headers={"Origin": ORIGIN}, timeout=60, trust_env=False) as client:
        yield client


def get(url: str, headers: dict[str, str] | None = None) -> httpx.Response:
    """Sends a GET request without a token."""
    return httpx.get(url, headers=headers, timeout=60, trust_env=False)


# --- health -------------------------------------------------------------------------------------------


def test_health_tells_how_the_service_is(served: Served, carol: Person) -> None:
    """Health has exactly the documented fields with correct values, with or without a token."""
    until(lambda: get(f"{served.url}/health").json()["gateway"]["ok"], 10, "the first look at the gateway")
    health = get(f"{served.url}/health")
    assert health.status_code == 200
    said = health.json()
    assert said == {
        "status": "ok",
        "version": VERSION,
        "environment": "production" if said["branch"] == "main" else "development",
        "branch": said["branch"],
        "commit": said["commit"],
        "port": served.port,
        "uptime_seconds": said["uptime_seconds"],
        "stale": False,
        "failed_start": None,
        "database": {"ok": True, "detail": "", "oldest_write_seconds": 0.0, "sqlite": said["database"]["sqlite"]},
        "gateway": {
            "url": served.settings.clawdbot_base_url,
            "ok": True,
            "checked_at": said["gateway"]["checked_at"],
            "detail": said["gateway"]["detail"],
        },
    }
    assert TIME.fullmatch(said["gateway"]["checked_at"])
    assert re.fullmatch(r"[0-9a-f]{40}|unknown", said["commit"])
    later = carol.http.get("/health").json()
    assert later["uptime_seconds"] > said["uptime_seconds"] > 0


def test_health_holds_no_secret(serve: Serve, openclaw: StandIn) -> None:
    """The public routes show no token, secret or path of the machine."""
    openclaw.token = "the-gateways-token"
    shown = serve()
    for path in ("/health", "/health/ready", "/openapi.json", "/docs"):
        text = get(shown.url + path).text
        for secret in (openclaw.token, "a secret of the tests", str(shown.settings.data), "secret.key"):
            assert secret not in text


@pytest.fixture
def silent() -> Iterator[str]:
    """The address of a gateway that accepts connections and never answers."""
    with closing(socket.create_server(("127.0.0.1", 0), backlog=64)) as listener:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"


@pytest.fixture
def gone() -> str:
    """An address on which no program listens."""
    with closing(socket.create_server(("127.0.0.1", 0))) as listener:
        return f"http://127.0.0.1:{listener.getsockname()[1]}"


@pytest.mark.parametrize("gateway", ["silent", "gone"])
def test_health_does_not_wait_for_the_gateway(serve: Serve, request: pytest.FixtureRequest, gateway: str) -> None:
    """With a gateway that hangs or is down, health answers 200 at once and reports it; readiness answers 503 with the
    cause."""
    url = request.getfixturevalue(gateway)
    shown = serve(clawdbot_base_url=url)
    with httpx.Client(base_url=shown.url, timeout=60, trust_env=False) as client:
        for _ in range(20):
            started = time.monotonic()
            health = client.get("/health")
            assert time.monotonic() - started < 1
            assert (health.status_code, health.json()["status"]) == (200, "ok")
            assert health.json()["gateway"]["ok"] is False
        ready = client.get("/health/ready")
        assert (ready.status_code, ready.json()["code"]) == (503, "not_ready")
        assert url in ready.json()["detail"]
        assert client.get("/health").json()["gateway"]["detail"] == ready.json()["detail"]


def test_ready_follows_the_gateway(serve: Serve, openclaw: StandIn) -> None:
    """Readiness is 200 while the gateway can take a turn, and 503 with the cause and the fix while it cannot."""
    shown = serve()

    def ready(status: int) -> JSON:
        def look() -> httpx.Response | None:
            answer = get(f"{shown.url}/health/ready")
            return answer if answer.status_code == status else None

        answer = until(look, 10, f"/health/ready to answer {status}")
        assert status == 200 or int(answer.headers["Retry-After"]) >= 1
        body: JSON = answer.json()
        return body

    assert {**ready(200), "detail": ""} == {
        "status": "ready",
        "detail": "",
        "gateway_version": "stand-in",
        "websocket": {"ok": True, "detail": "OpenClaw's WebSocket answers."},
    }
    openclaw.stop()
    stopped = ready(503)
    assert set(stopped) == {"detail", "code"}
    assert stopped["code"] == "not_ready"
    assert openclaw.url in stopped["detail"] and "start" in stopped["detail"]
    openclaw.start()
    assert ready(200)["status"] == "ready"
    openclaw.endpoint_enabled = False
    assert "gateway.http.endpoints.chatCompletions.enabled" in ready(503)["detail"]
    openclaw.endpoint_enabled = True
    assert ready(200)["status"] == "ready"
    openclaw.token = "changed"
    assert "CLAWDBOT_TOKEN" in ready(503)["detail"]


@pytest.mark.parametrize("token", ["wrong", "", "é"])
def test_ready_names_the_token_that_is_not_taken(serve: Serve, token: str) -> None:
    """With a wrong token or none, readiness names the setting to correct."""
    shown = serve(clawdbot_token=SecretStr(token))
    ready = get(f"{shown.url}/health/ready")
    assert (ready.status_code, ready.json()["code"]) == (503, "not_ready")
    assert "CLAWDBOT_TOKEN" in ready.json()["detail"]


def test_health_says_when_the_database_is_damaged(serve: Serve) -> None:
    """With a database that can no longer be read, health answers 503 with `status: error` instead of a 500."""
    shown = serve()
    with shown.person() as ada:
        ada.session()
        for path in shown.settings.db_path.parent.glob("service.db*"):
            if path.is_file() and not path.name.endswith((".lock", "-shm")):
                path.write_bytes(b"\xa5" * path.stat().st_size)
        health, projects = get(f"{shown.url}/health"), ada.http.get("/projects")
    assert (health.status_code, health.json()["status"]) == (503, "error")
    assert health.json()["database"]["ok"] is False
    assert int(health.headers["Retry-After"]) >= 1
    assert (projects.status_code, projects.json()["code"]) == (503, "database_unavailable")


def test_the_version_is_one(served: Served) -> None:
    """The code, `pyproject.toml`, OpenAPI and the newest entry of the changelog have the same version."""
    project = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())["project"]
    released = re.search(r"^## \[?v?(\d+\.\d+\.\d+)", (CHECKOUT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert released is not None
    openapi = get(f"{served.url}/openapi.json").json()
    assert {VERSION, project["version"], released[1], openapi["info"]["version"]} == {VERSION}


# --- request ids --------------------------------------------------------------------------------------


@pytest.mark.parametrize("sent", ["abc", "0", "x" * 128, "a-b_c.d:e/f", "!\"#$%&'()*+,;<=>?@[]^`{|}~"])
def test_a_callers_request_id_is_kept(stranger: httpx.Client, sent: str) -> None:
    """A caller's id that is short and printable is returned unchanged."""
    assert stranger.get("/health", headers={"X-Request-ID": sent}).headers["X-Request-ID"] == sent


@pytest.mark.parametrize(
    "sent",
    [
        *(b"", b"a b", b"x" * 129, b"x" * 5000, b"\xc3\xa9", b"\xff\x80", "№".encode()),
        *(b"a\tb", b"forged] INFO all is well"),
    ],
)
def test_an_odd_request_id_is_replaced(stranger: httpx.Client, sent: bytes) -> None:
    """An id that is too long, empty, binary or has a space is replaced by a generated one, a different one each
    time."""
    ids = {stranger.get("/health", headers=[(b"X-Request-ID", sent)]).headers["X-Request-ID"] for _ in range(2)}
    assert len(ids) == 2
    for made in ids:
        assert re.fullmatch(r"[0-9a-f]{32}", made)


PREFLIGHT = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization,content-type"}
TOO_MUCH = b"x" * (33 * 1024 * 1024)


def pieces() -> Iterator[bytes]:
    """Yields a body that is too large, without a Content-Length."""
    for _ in range(33):
        yield b"x" * 1024 * 1024


ERRORS: dict[str, tuple[JSON, int, str]] = {
    "no route": ({"method": "GET", "url": "/nowhere"}, 404, "not_found"),
    "no route, odd path": ({"method": "GET", "url": "/%ff/../\N{GRINNING FACE}"}, 404, "not_found"),
    "a control character": ({"method": "GET", "url": "/%ff%00%0a/x"}, 400, "invalid_path"),
    "no such method": ({"method": "PATCH", "url": "/projects"}, 405, "method_not_allowed"),
    "anonymous": ({"method": "GET", "url": "/projects"}, 401, "unauthorized"),
    "no JSON": ({"method": "POST", "url": "/auth/login", "content": b"{"}, 422, "invalid_request"),
    "no body": ({"method": "POST", "url": "/auth/login"}, 422, "invalid_request"),
    "no object": ({"method": "POST", "url": "/auth/login", "content": b"[]"}, 422, "invalid_request"),
    "no number": ({"method": "POST", "url": "/auth/login", "content": b"NaN"}, 422, "invalid_request"),
    "no field": ({"method": "POST", "url": "/auth/login", "content": b"{}"}, 422, "invalid_request"),
    "no UTF-8": ({"method": "POST", "url": "/auth/login", "content": b'{"email":"\xff"}'}, 400, "invalid_request"),
    "nested deeply": ({"method": "POST", "url": "/auth/login", "content": b"[" * 50_000}, 400, "invalid_request"),
    "a long number": ({"method": "POST", "url": "/auth/login", "content": b"9" * 5000}, 400, "invalid_request"),
    "too large": ({"method": "POST", "url": "/auth/login", "content": TOO_MUCH}, 413, "request_too_large"),
    "too large, no length": ({"method": "POST", "url": "/auth/login", "content": pieces}, 413, "request_too_large"),
    "too large for nobody": ({"method": "POST", "url": "/nowhere", "content": TOO_MUCH}, 404, "not_found"),
    "ours": ({"method": "GET", "url": "/broken"}, 500, "internal_error"),
}


@pytest.mark.parametrize("what", ERRORS)
def test_an_error_has_one_shape(stranger: httpx.Client, what: str) -> None:
    """Every error has `detail` and `code`, the request's id, and CORS headers that let a browser read it."""
    request, status, code = ERRORS[what]
    content = request.get("content")
    headers = {"X-Request-ID": "mine", "Content-Type": "application/json"}
    answer = stranger.request(**{**request, "content": content() if callable(content) else content}, headers=headers)
    assert (answer.status_code, answer.headers["Content-Type"]) == (status, "application/json")
    body = answer.json()
    assert set(body) == {"detail", "code"}
    assert body["code"] == code
    assert isinstance(body["detail"], list if status == 422 else str)
    assert "a secret of the inside" not in answer.text
    assert answer.headers["X-Request-ID"] == "mine"
    assert answer.headers["Access-Control-Allow-Origin"] in ("*", ORIGIN)


def test_a_wrong_request_is_not_repeated_to_its_sender(stranger: httpx.Client) -> None:
    """A 422 names the place of the error and does not repeat what was sent, which may be a password."""
    answer = stranger.post(
        "/auth/signup", json={"email": "a secret", "password": ["a secret"], "name": {"a secret": 1}}
    )
    assert answer.status_code == 422
    assert "a secret" not in answer.text
    assert [item["loc"][:2] for item in answer.json()["detail"]] == [
        ["body", "email"],
        ["body", "password"],
        ["body", "name"],
    ]
    for item in answer.json()["detail"]:
        assert set(item) == {"type", "loc", "msg"}


# --- origins ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/projects", "/chat", "/nowhere"])
def test_by_default_every_origin_may_ask(stranger: httpx.Client, path: str) -> None:
    """With `CORS_ORIGINS=*`, preflights succeed for all documented headers, carry a request id, and allow no
    cookies."""
    preflight = stranger.options(path, headers={**PREFLIGHT, "X-Request-ID": "mine"})
    assert preflight.status_code == 200
    assert preflight.headers["X-Request-ID"] == "mine"
    answer = stranger.get(path)
    for response in (preflight, answer):
        assert response.headers["Access-Control-Allow-Origin"] == "*"
        assert "Access-Control-Allow-Credentials" not in response.headers
    assert {name.strip() for name in answer.headers["Access-Control-Expose-Headers"].split(",")} == EXPOSED


@pytest.mark.parametrize("method", ["GET", "POST", "PUT", "DELETE"])
@pytest.mark.parametrize(
    "header", ["Authorization", "Content-Type", "Idempotency-Key", "Last-Event-ID", "X-Request-ID"]
)
def test_a_browser_may_send_what_the_routes_take(stranger: httpx.Client, method: str, header: str) -> None:
    """Every documented method and header passes the preflight."""
    headers = {"Access-Control-Request-Method": method, "Access-Control-Request-Headers": header.lower()}
    preflight = stranger.options("/chat", headers=headers)
    assert preflight.status_code == 200
    assert method in preflight.headers["Access-Control-Allow-Methods"]


@pytest.mark.parametrize(
    ("origin", "allowed"),
    [
        ("https://one.example", True),
        ("http://two.example:3000", True),
        ("https://one.example:8443", False),
        ("http://one.example", False),
        ("https://one.example.evil.example", False),
        ("https://evil-one.example", False),
        ("https://evil.example", False),
        ("null", False),
    ],
)
def test_with_a_list_only_its_origins_may_ask(listed: Served, origin: str, allowed: bool) -> None:
    """With a list of origins, only these are allowed, by name; `Vary: Origin` tells caches that responses differ."""
    with httpx.Client(base_url=listed.url, headers={"Origin": origin}, trust_env=False) as client:
        preflight = client.options("/projects", headers=PREFLIGHT)
        answer = client.get("/projects")
    assert preflight.status_code == (200 if allowed else 400)
    for response in (preflight, answer):
        assert response.headers.get("Access-Control-Allow-Origin") == (origin if allowed else None)
        assert "Origin" in response.headers["Vary"]
        assert response.headers["X-Request-ID"]


@pytest.fixture(scope="module")
def listed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """An app with a list of origins, written as in the environment."""
    origins = "https://one.example, http://two.example:3000/"
    with StandIn() as gateway:
        settings = make_settings(tmp_path_factory.mktemp("listed"), gateway, cors_origins=origins)
        assert isinstance(settings, Settings)
        with Served(settings) as shown:
            yield shown


# --- importing, logging -------------------------------------------------------------------------------

LOOK = """
import json, os, sys, threading
def look():
    with os.scandir("/proc/self/fd") as entries:  # includes the scan's own descriptor, which is closed afterwards
        paths = [entry.path for entry in entries]
    files = sorted(os.readlink(path) for path in paths if os.path.lexists(path))
    return files, sorted(thread.name for thread in threading.enumerate())
before = look()
import app
assert app.app.title == "clawd-backend"
again = app.create_app(app.load_settings())
assert again is not app.app
json.dump([before, look()], sys.stdout)
"""


def test_importing_the_app_opens_nothing(tmp_path: Path) -> None:
    """Neither importing `app` nor `create_app` opens a file or socket, starts a thread, or creates a file or folder."""
    environment = {
        "PATH": os.environ["PATH"],
        "PYTHONPATH": str(CHECKOUT),
        "DB_PATH": str(tmp_path / "data/service.db"),
        "DATA_DIR": str(tmp_path / "data"),
        "PROJECTS_DIR": str(tmp_path / "projects"),
    }
    done = subprocess.run(
        [sys.executable, "-c", LOOK], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    before, after = json.loads(done.stdout)
    assert before == after
    assert list(tmp_path.iterdir()) == []


def test_apps_live_side_by_side(serve: Serve, tmp_path: Path, openclaw: StandIn) -> None:
    """Two apps in one process, each with its own settings, share nothing."""
    (tmp_path / "other").mkdir()
    one = serve()
    with Served(make_settings(tmp_path / "other", openclaw)) as other, one.person() as ada, other.person() as bob:
        ada.project()
        assert len(ada.http.get("/projects").json()) == 1
        assert bob.http.get("/projects").json() == []
        for app_, person in ((one, bob), (other, ada)):
            headers = {"Authorization": f"Bearer {person.token}"}
            mine = get(f"{app_.url}/auth/me", headers)
            assert mine.status_code == 401 or mine.json()["email"] != person.email


@pytest.fixture(scope="module")
def logged(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Person, JSON, Service]]:
    """A service in its own process that logs everything, a user of it, and what the user did."""
    with ExitStack() as stack:
        gateway = stack.enter_context(StandIn(token="the-gateways-token"))
        environment = {"JWT_SECRET": "the secret of the service that logs", "LOG_LEVEL": "DEBUG"}
        directory = tmp_path_factory.mktemp("logged")
        service = stack.enter_context(Service(directory, gateway.url, gateway.token, **environment))
        ada = stack.enter_context(service.person())
        session = ada.session(ada.project("Plans"))
        ada.http.headers["X-Request-ID"] = "talking-1"
        assert ada.say(session, "What I tell nobody", image=PNG).text.startswith("You said: What I tell nobody")
        ada.http.headers["X-Request-ID"] = "failing-2"
        assert ada.say(session, "A failing secret [[status=500]]").status_code == 502
        ada.http.headers["X-Request-ID"] = "refused-3"
        ada.http.post("/auth/login", json={"email": ada.email, "password": "A mistyped one"})
        ada.http.post("/auth/signup", json={"email": "A typo", "password": "A mistyped one"})
        ada.http.put(f"/projects/{session['project_id']}/files/plan.txt", json={"content": "Hidden content"})
        ada.http.get("/auth/me", headers={"Authorization": "Bearer a.forged.token"})
        image = ada.messages(session)[0]["image"]
        assert ada.http.get(image).status_code == 200
        odd = "/nowhere%0aFORGED%0d%0aFORGED%1b[31mFORGED%e2%80%a8FORGED"
        assert ada.http.get(odd, headers={"X-Request-ID": "odd-4"}).status_code == 400
        yield ada, {"session": session, "image": image}, service


def test_the_log_carries_the_requests_id(logged: tuple[Person, JSON, Service]) -> None:
    """Every line that a request causes has its id: the line of the request, and the lines of the turn that it
    begins."""
    _, story, service = logged
    lines = [line for line in service.output().splitlines() if "[talking-1 " in line]
    key = story["session"]["session_key"]
    assert any("POST /chat 200" in line for line in lines)
    assert any(f"[CHAT] Sending to OpenClaw with 'user' field: adapter-session-{key}" in line for line in lines)
    assert any(f"in session {story['session']['id']} is complete" in line for line in lines)
    assert any("POST /chat 502" in line and "[failing-2 " in line for line in service.output().splitlines())


def test_the_log_keeps_secrets(logged: tuple[Person, JSON, Service]) -> None:
    """The log never contains a password, token, signature or secret, or the content of a message, reply or file."""
    ada, story, service = logged
    log = service.output()
    assert "POST /auth/login 401" in log
    for secret in (
        *(ada.password, "A mistyped one", ada.token, ada.token.rpartition(".")[2], "a.forged.token"),
        *("the-gateways-token", "the secret of the service that logs", story["image"].rpartition("signature=")[2]),
        *("What I tell nobody", "A failing secret", "You said", "Hidden content", PNG[:40]),
    ):
        assert secret not in log


def test_nobody_forges_lines_of_the_log(logged: tuple[Person, JSON, Service]) -> None:
    """A path with line breaks stays on the one line of its request, and control characters are escaped."""
    # The line is written only after the response was sent.
    until(lambda: "FORGED" in logged[2].output(), 5, "the request's line")
    lines = re.split("[\n\r\u2028]", logged[2].output())
    forged = [line for line in lines if "FORGED" in line]
    assert len(forged) == 1
    assert "[odd-4]" in forged[0] and " 400 " in forged[0]
    assert forged[0].isprintable()


def test_an_unexpected_error_is_explained_in_the_log(served: Served, tmp_path: Path) -> None:
    """The traceback of a 500 is logged under the id that the caller received, and not sent to the caller."""
    with (tmp_path / "log").open("w+") as log:
        telemetry.start_logging("INFO", "json", (), log.fileno())
        answer = get(f"{served.url}/broken", {"X-Request-ID": "broken-5"})
        telemetry.start_logging("INFO", "plain", (), NOWHERE)
        log.seek(0)
        lines = [json.loads(line) for line in log]
    assert (answer.status_code, answer.headers["X-Request-ID"]) == (500, "broken-5")
    assert "RuntimeError" not in answer.text
    (explained,) = [line for line in lines if "exception" in line]
    assert explained["request_id"] == "broken-5"
    assert "a secret of the inside" in explained["exception"]


def test_the_app_is_what_a_worker_asks_for(served: Served) -> None:
    """`handover` does not import the app; it describes what it uses of the app by a Protocol. The app has all its
    attributes, of the right types as far as mypy can see."""
    asked_for: type[ServedTurns] = Turns
    names = {name for name in vars(ServedTurns) if not name.startswith("_")}
    assert names == {"running", "retire", "end"}
    assert all(hasattr(asked_for, name) for name in names)
    assert isinstance(served.app.state.turns, Turns)
    assert all(hasattr(served.app.state, name) for name in ServedState.__annotations__)
