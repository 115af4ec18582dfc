"""What a request must pass before its route, tried over real connections."""

import json
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager

import httpx
import pytest

import guard
from guard import MAX_VALUES, MEGABYTE, count_values

from .service import Person, Served, until

JSON_TYPE = {"Content-Type": "application/json"}


@contextmanager
def connection(served: Served) -> Iterator[socket.socket]:
    """A raw connection to the service."""
    with closing(socket.create_connection(("127.0.0.1", served.port), timeout=30)) as sock:
        yield sock


def answer_of(sock: socket.socket) -> str:
    """What the service sends until it closes the connection or is silent for a moment."""
    sock.settimeout(2)
    received = b""
    try:
        while part := sock.recv(65536):
            received += part
    except TimeoutError:
        pass
    return received.decode(errors="replace")


# --- the caller comes before the body -----------------------------------------------------------------


@pytest.mark.parametrize("path", ["/chat", "/chat/stream", "/projects"])
@pytest.mark.parametrize("token", [None, "Bearer nonsense", "Basic eDp5"])
def test_a_stranger_is_answered_before_the_body_is_read(served: Served, path: str, token: str | None) -> None:
    """With 30 MB announced and not one byte of them sent, 401 comes at once."""
    with connection(served) as sock:
        authorization = f"Authorization: {token}\r\n" if token else ""
        head = f"POST {path} HTTP/1.1\r\nHost: x\r\n{authorization}Content-Type: application/json\r\n"
        sock.sendall(f"{head}Content-Length: 30000000\r\n\r\n".encode())
        sock.settimeout(5)
        assert sock.recv(4096).startswith(b"HTTP/1.1 401 ")


def test_every_route_that_needs_a_token_and_takes_a_body_is_protected(served: Served) -> None:
    """The list is made from the routes themselves, and agrees with the OpenAPI document."""
    with httpx.Client(base_url=served.url, trust_env=False) as client:
        for path, item in served.app.openapi()["paths"].items():
            for method, operation in item.items():
                if method in ("post", "put", "delete", "patch"):
                    filled = path.replace("{extension}", "png").replace("{path}", "a")
                    answer = client.request(method, _with_ids(filled), content=b"{", headers=JSON_TYPE)
                    assert (answer.status_code == 401) == ("security" in operation), (method, path)


def _with_ids(path: str) -> str:
    for name in ("project_id", "session_id", "message_id", "image_id"):
        path = path.replace(f"{{{name}}}", "1")
    return path


# --- limits of the body -------------------------------------------------------------------------------


def test_a_body_has_the_limit_of_its_route(ada: Person) -> None:
    """1 MB, 11 MB for a file, 32 MB for a chat; with a length that is declared and one that is not."""
    project, session = ada.project(), ada.session()
    file = f"/projects/{project['id']}/files/a.txt"
    over = {"/projects": ("POST", MEGABYTE), file: ("PUT", 11 * MEGABYTE), "/chat": ("POST", 32 * MEGABYTE)}
    for path, (method, limit) in over.items():
        body = b'{"x": "' + b"x" * limit + b'"}'
        for content in (body, iter([body[:1000], body[1000:]])):
            answer = ada.http.request(method, path, content=content, headers=JSON_TYPE)
            assert (answer.status_code, answer.json()["code"]) == (413, "request_too_large"), path
    assert ada.http.put(file, json={"content": "x" * (10 * MEGABYTE)}).status_code == 200
    long = {
        "session_key": session["session_key"],
        "messages": [{"role": "user", "content": "Hi"}],
        "x": "x" * 30_000_000,
    }
    assert ada.http.post("/chat", json=long).status_code == 200


@pytest.mark.parametrize(
    "body",
    [
        b'{"messages": [' + b"1," * MAX_VALUES + b"1]}",
        b'{"messages": [' + b"[]," * MAX_VALUES + b"[]]}",
        b'{"messages": [' + b"{}," * MAX_VALUES + b"{}]}",
        b"[" * (MAX_VALUES + 1),
        b'{"messages": [' + b'"a",' * MAX_VALUES + b'"a"]}',
        b'{"messages": [' + b'"\\\\",' * MAX_VALUES + b'"a"]}',
        b'{"a": "' + b"\\\\" * 50_000 + b'", "messages": [' + b"1," * MAX_VALUES + b"1]}",
    ],
)
def test_too_many_values_are_not_parsed(ada: Person, body: bytes) -> None:
    """Whatever the values are, and however strings are written between them."""
    answer = ada.http.post("/chat", content=body, headers=JSON_TYPE)
    assert (answer.status_code, answer.json()["code"]) == (413, "request_too_large")


@pytest.mark.parametrize(
    "text", ["a,b,c\n" * 200_000, "[{" * 200_000, '"quoted", "more"\n' * 40_000, "\\" * 100_001 + ",[" * 100_000]
)
def test_text_is_not_taken_for_values(ada: Person, text: str) -> None:
    """A CSV file, JSON as text, quotes and backslashes: one string is one value."""
    project = ada.project()
    answer = ada.http.put(f"/projects/{project['id']}/files/a.csv", json={"content": text})
    assert answer.status_code == 200
    assert ada.http.get(f"/projects/{project['id']}/files/a.csv").json()["content"] == text


def test_values_are_counted_where_strings_end() -> None:
    """The count is at least the number of values, and not far above it."""
    values: list[object] = [[], [1, 2, 3], {"a": [{}, {"b": "x,y"}]}, ["a\\", 'b"],[', "\\\\"], [[[]]] * 5]
    for value in values:
        body = json.dumps(value).encode()
        assert count_values(body) >= _count(value)
    assert count_values(json.dumps({"a": ",[{" * MAX_VALUES}).encode()) < 10


def _count(value: object) -> int:
    if isinstance(value, dict):
        return 1 + sum(map(_count, value.values()))
    return 1 + sum(map(_count, value)) if isinstance(value, list) else 1


def test_a_422_lists_twenty_mistakes_at_most(ada: Person) -> None:
    """However many there are, and of the messages only the last one of the user is looked at."""
    content = [{"type": 1}] * 50 + ["text"] * 50
    body = {"session_key": 5, "messages": [1, 2, {"role": "user", "content": content}, [], {"role": 7}]}
    answer = ada.http.post("/chat", json=body)
    assert answer.status_code == 422
    assert 0 < len(answer.json()["detail"]) <= 20
    session = ada.session()
    good = {"role": "user", "content": "Hello"}
    sent = {"session_key": session["session_key"], "messages": [1, None, {"role": 5}, good, {"role": "assistant"}]}
    assert ada.http.post("/chat", json=sent).json()["content"].startswith("You said: Hello")


def test_a_body_that_stalls_is_given_up(served: Served, ada: Person, monkeypatch: pytest.MonkeyPatch) -> None:
    """408, with a code, instead of a connection that is held for ever."""
    monkeypatch.setattr(guard, "STALLED_AFTER", 0.5)
    with connection(served) as sock:
        head = f"POST /projects HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {ada.token}\r\n"
        sock.sendall(f'{head}Content-Type: application/json\r\nContent-Length: 100\r\n\r\n{{"na'.encode())
        assert "408" in answer_of(sock).splitlines()[0]


# --- kinds of bodies ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [None, "text/plain", "application/x-www-form-urlencoded", "application/jsonp", "json"])
def test_a_body_that_is_not_labeled_as_json_is_refused(ada: Person, kind: str | None) -> None:
    """415 says what to send; curl's own label is the usual case."""
    headers = {"Content-Type": kind} if kind else {}
    answer = ada.http.post("/projects", content=b'{"name": "A"}', headers=headers)
    assert (answer.status_code, answer.json()["code"]) == (415, "unsupported_media_type")
    assert "application/json" in answer.json()["detail"]


@pytest.mark.parametrize("kind", ["application/json", "Application/JSON; charset=utf-8", "application/problem+json"])
def test_a_body_that_is_labeled_as_json_is_taken(ada: Person, kind: str) -> None:
    """Whatever the case, with parameters, and by the suffix."""
    assert ada.http.post("/projects", content=b'{"name": "A"}', headers={"Content-Type": kind}).status_code == 201


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-be", "utf-32"])
def test_only_utf_8_is_taken(ada: Person, encoding: str) -> None:
    """Python's parser would guess other encodings."""
    answer = ada.http.post("/projects", content='{"name": "A"}'.encode(encoding), headers=JSON_TYPE)
    assert (answer.status_code, answer.json()["code"]) == (400, "invalid_request")


# --- addresses and methods ----------------------------------------------------------------------------


@pytest.mark.parametrize("odd", ["%0A", "%0a", "%00", "%7F", "%1b", "%C2%85"])
@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE", "HEAD"])
def test_a_control_character_in_an_address_is_refused(ada: Person, method: str, odd: str) -> None:
    """`%0A` at the end once meant the resource without it: another file was overwritten, a session deleted."""
    project = ada.project()
    session = ada.session(project)
    for path in (f"/projects/{project['id']}/files/README.md{odd}", f"/sessions/{session['id']}{odd}"):
        answer = ada.http.request(method, path, json={"content": "x"} if method == "PUT" else None)
        assert answer.status_code == 400
        assert method == "HEAD" or answer.json()["code"] == "invalid_path"
    assert ada.http.get(f"/projects/{project['id']}/files/README.md").json()["content"].startswith("# ")
    assert len(ada.http.get(f"/projects/{project['id']}/sessions").json()) == 1


@pytest.mark.parametrize(
    "path", ["/health", "/health/ready", "/projects", "/auth/me", "/openapi.json", "/docs", "/nowhere"]
)
def test_head_answers_as_get_without_the_body(ada: Person, path: str) -> None:
    """Uptime monitors ask with it."""
    got, head = ada.http.get(path), ada.http.head(path)
    assert head.status_code == got.status_code
    assert head.content == b""
    assert head.headers["Content-Type"] == got.headers["Content-Type"]


def test_head_of_a_stream_ends_at_once(ada: Person) -> None:
    """It neither waits for the reply nor stops it."""
    session = ada.session()
    with ada.listen(session, "[[chunks=30 delay=0.1]]") as (response, stream):
        started = time.monotonic()
        path = f"/sessions/{session['id']}/messages/{response.headers['X-Message-Id']}/stream"
        assert ada.http.head(path).headers["Content-Type"].startswith("text/event-stream")
        assert time.monotonic() - started < 2
        stream.read()
        assert stream.finish == "stop"


@pytest.mark.parametrize("path", ["/projects/", "/health/", "/auth/me/"])
def test_a_trailing_slash_is_another_address(ada: Person, path: str) -> None:
    """A redirect would lead to http:// behind a proxy that terminates TLS."""
    assert (ada.http.get(path).status_code, ada.http.get(path).json()["code"]) == (404, "not_found")


def test_every_answer_has_the_security_headers(served: Served, ada: Person) -> None:
    """Once each, refusals and errors included."""
    for path in ("/health", "/projects", "/nowhere", "/projects/1%0a", "/docs"):
        headers = ada.http.get(path).headers
        for name in ("X-Content-Type-Options", "X-Frame-Options", "Referrer-Policy"):
            assert len(headers.get_list(name)) == 1, (path, name)


def test_what_a_stranger_sends_holds_nobody_up(serve: Callable[..., Served]) -> None:
    """While strangers send large bodies, without a token and to where none is needed, health answers."""
    served = serve()
    junk = b'{"email": [' + b"1," * 15_000_000 + b"1]}"
    with httpx.Client(base_url=served.url, trust_env=False, timeout=60) as client:
        slowest = 0.0
        for path in ("/auth/login", "/chat", "/auth/signup"):
            with connection(served) as sock:
                head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
                sock.sendall(f"{head}Content-Length: {len(junk)}\r\n\r\n".encode())
                started = time.monotonic()
                assert client.get("/health").status_code == 200
                slowest = max(slowest, time.monotonic() - started)
                assert answer_of(sock).splitlines()[0].split()[1] in ("401", "413")
    assert slowest < 2
    assert until(lambda: httpx.get(f"{served.url}/health", trust_env=False), 5, "health").status_code == 200
