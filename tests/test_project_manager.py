"""The routes of projects, sessions and files, for their owner and for other users."""

import http.client
import json
import re
import shutil
import sqlite3
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest

from .conftest import make_settings
from .service import JSON, Person, Served, until
from .stand_in import StandIn

PNG = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="  # one pixel
UUID4 = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}")
TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z")
LARGEST_ID = 2**63 - 1
TEN_MB = 10 * 1024 * 1024
Serve = Callable[..., Served]


@pytest.fixture(scope="module")
def openclaw() -> Iterator[StandIn]:
    """A gateway that all tests of this file share."""
    with StandIn() as gateway:
        yield gateway


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory, openclaw: StandIn) -> Iterator[Served]:
    """An app that the tests share, except those that start their own."""
    with Served(make_settings(tmp_path_factory.mktemp("projects"), openclaw)) as app:
        yield app


@pytest.fixture(scope="module")
def carol(served: Served) -> Iterator[Person]:
    """A user whose data no test changes."""
    with served.person() as person:
        yield person


@pytest.fixture(scope="module")
def dave(served: Served) -> Iterator[Person]:
    """Another user, who owns none of Carol's data."""
    with served.person() as person:
        yield person


@pytest.fixture(scope="module")
def owned(carol: Person) -> dict[str, object]:
    """The ids of Carol's data, for paths and bodies: a project with a file, a session, a reply, an image."""
    project = carol.project("Carol's")
    session = carol.session(project)
    reply = carol.say(session, "Look", image=PNG)
    message = carol.messages(session)[0]
    link = urlsplit(message["image"])
    return {
        "project": project["id"],
        "session": session["id"],
        "key": session["session_key"],
        "message": reply.message_id,
        "image": link.path.rpartition("/")[2],
    }


def rows(app: Served, sql: str, *values: object) -> list[tuple[object, ...]]:
    """Runs a statement on the database, on a connection of its own. Returns the rows."""
    with closing(sqlite3.connect(app.settings.db_path, timeout=10)) as conn, conn:
        return conn.execute(sql, values).fetchall()


def as_sent(person: Person, method: str, path: str, body: bytes | None = None) -> tuple[int, JSON]:
    """Sends a request with exactly this path, which httpx would normalize. Returns status and body."""
    url = urlsplit(str(person.http.base_url))
    headers = {"Authorization": f"Bearer {person.token}", "Content-Type": "application/json"}
    with closing(http.client.HTTPConnection(url.netloc, timeout=60)) as connection:
        connection.request(method, path, body, headers)
        response = connection.getresponse()
        return response.status, json.loads(response.read())


# --- projects -----------------------------------------------------------------------------------------


def test_a_project_is_created_read_and_listed(served: Served, ada: Person, bob: Person) -> None:
    """A project has exactly the documented fields, equal in every route, and the newest is listed first."""
    assert ada.http.get("/projects").json() == []
    made = ada.http.post("/projects", json={"name": "  First  ", "description": "What for"})
    assert made.status_code == 201
    first = made.json()
    assert first == {
        "id": first["id"],
        "user_id": ada.http.get("/auth/me").json()["id"],
        "name": "First",
        "description": "What for",
        "project_path": first["project_path"],
        "created_at": first["created_at"],
    }
    assert TIME.fullmatch(first["created_at"])
    others = [ada.http.post("/projects", json={"name": name}).json() for name in ("Second", "Third")]
    assert others[0]["description"] is None
    bob.project()
    assert ada.http.get("/projects").json() == [*reversed(others), first]
    assert ada.http.get(f"/projects/{first['id']}").json() == first


@pytest.mark.parametrize(
    "name",
    [
        *("../../escaped", "/etc", "..", ".", "a/b", "a\\b", "C:", "-rf", "~", "$HOME", "a\nb", "\0", "\u202e", "🦞"),
        *("x" * 200, "é" * 200, "日" * 200, "\uff2e\uff35\uff2c", "CON", ".git", "'; DROP TABLE projects; --"),
    ],
)
def test_a_projects_folder_is_one_of_its_own(served: Served, ada: Person, name: str) -> None:
    """Every project gets a new folder directly below `PROJECTS_DIR`, with a README that contains its name."""
    projects = [ada.project(name, "In short") for _ in range(2)]
    folders = [Path(project["project_path"]) for project in projects]
    assert [project["name"] for project in projects] == [name, name]
    assert folders[0] != folders[1]
    for folder in folders:
        assert folder.resolve().parent == served.settings.projects.resolve()
        assert [path.name for path in folder.iterdir()] == ["README.md"]
        about = (folder / "README.md").read_text()
        assert name in about and "In short" in about


@pytest.mark.parametrize(
    "body",
    [
        *({}, {"name": ""}, {"name": " \n\t"}, {"name": None}, {"name": 7}, {"name": ["x"]}, {"name": "x" * 201}),
        {"name": "x", "description": "x" * 4001},
    ],
)
def test_a_project_needs_a_name_of_some_length(ada: Person, served: Served, body: JSON) -> None:
    """A name that is missing, blank or too long is refused and creates neither a row nor a folder."""
    before = set(served.settings.projects.iterdir()) if served.settings.projects.exists() else set()
    answer = ada.http.post("/projects", json=body)
    assert (answer.status_code, answer.json()["code"]) == (422, "invalid_request")
    assert ada.http.get("/projects").json() == []
    assert before == (set(served.settings.projects.iterdir()) if served.settings.projects.exists() else set())


@pytest.mark.parametrize("what", ["is a file", "lies below a file"])
def test_without_a_folder_there_is_no_project(serve: Serve, tmp_path: Path, what: str) -> None:
    """If the folder cannot be created, the answer is `disk_unavailable`, and no row remains."""
    projects = tmp_path / "taken"
    app = serve(projects_dir=projects if what == "is a file" else projects / "below")
    with app.person() as ada:
        shutil.rmtree(projects, ignore_errors=True)
        projects.write_text("in the way")
        answer = ada.http.post("/projects", json={"name": "Nowhere"})
        assert (answer.status_code, answer.json()["code"]) == (503, "disk_unavailable")
        assert int(answer.headers["Retry-After"]) >= 1
        assert ada.http.get("/projects").json() == []
        assert rows(app, "SELECT (SELECT count(*) FROM projects), (SELECT count(*) FROM outbox)") == [(0, 0)]
        projects.unlink()
        assert Path(ada.project("Somewhere")["project_path"], "README.md").exists()


def test_a_change_affects_only_the_fields_of_the_body(ada: Person) -> None:
    """A rename keeps the folder and all fields that the body does not contain; null changes nothing."""
    project = ada.project("Before", "Words")
    path = f"/projects/{project['id']}"
    for body, expected in (
        ({"name": " After "}, {**project, "name": "After"}),
        ({"description": ""}, {**project, "name": "After", "description": ""}),
        ({"name": None, "description": None}, {**project, "name": "After", "description": ""}),
        ({}, {**project, "name": "After", "description": ""}),
    ):
        assert ada.http.put(path, json=body).json() == expected
        assert ada.http.get(path).json() == expected
    assert ada.http.put(path, json={"name": " "}).status_code == 422
    assert Path(project["project_path"]).is_dir()


def test_deleting_a_project_deletes_all_that_is_in_it(served: Served, openclaw: StandIn, ada: Person) -> None:
    """Rows, images, folder and gateway sessions are deleted, after a running reply is stopped; other projects stay."""
    kept, project = ada.project(), ada.project()
    kept_session, session, busy = ada.session(kept), ada.session(project), ada.session(project)
    for one in (kept_session, session):
        assert ada.say(one, "Look", image=PNG).status_code == 200
    ada.http.put(f"/projects/{project['id']}/files/deep/er/file", json={"content": "x"})
    Path(project["project_path"], "out").symlink_to(kept["project_path"])
    link = ada.messages(session)[0]["image"]
    assert ada.http.get(link).status_code == 200
    with ada.listen(busy, "[[chunks=1000 delay=0.05]]") as (_, stream):
        stream.read(to_first_text=True)
        answer = ada.http.delete(f"/projects/{project['id']}")
        stream.read()
    assert (answer.status_code, answer.json()) == (200, {"status": "deleted", "message": "Project deleted"})
    assert stream.finish == "stopped"
    assert not Path(project["project_path"]).exists()
    assert not (served.settings.images / session["session_key"]).exists()
    for path in (f"/projects/{project['id']}", f"/sessions/{session['id']}/messages", link):
        assert ada.http.get(path).status_code == 404
    for table, column in (("sessions", "id"), ("messages", "session_id"), ("turns", "session_id")):
        counted = rows(served, f"SELECT count(*) FROM {table} WHERE {column} = ?", session["id"])
        assert counted == [(0,)]
    keys = {f"agent:main:openai-user:adapter-session-{one['session_key']}" for one in (session, busy)}
    until(lambda: keys <= set(openclaw.deleted), 10, "the sessions' deletion in the gateway")
    assert ada.http.get("/projects").json() == [kept]
    assert Path(kept["project_path"], "README.md").exists()
    assert ada.http.get(ada.messages(kept_session)[0]["image"]).status_code == 200
    assert ada.http.delete(f"/projects/{project['id']}").json()["code"] == "project_not_found"


def test_a_project_created_while_its_owner_is_deleted_leaves_nothing(serve: Serve) -> None:
    """A project that is created during the deletion of its account is refused or deleted, with its folder."""
    app = serve()
    statuses: Counter[int] = Counter()
    for _ in range(6):
        with app.person() as eve, httpx.Client(base_url=app.url, headers=eve.http.headers, timeout=60) as http:
            start = threading.Barrier(5)

            def make(begin: threading.Barrier = start, client: httpx.Client = http) -> list[int]:
                begin.wait()
                made = [client.post("/projects", json={"name": "Late"}).status_code]
                while made[-1] == 201:
                    made.append(client.post("/projects", json={"name": "Late"}).status_code)
                return made

            with ThreadPoolExecutor(4) as pool:
                working = [pool.submit(make) for _ in range(4)]
                start.wait()
                eve.delete("/auth/me", password=eve.password)
                statuses.update(status for work in working for status in work.result())
    assert set(statuses) <= {201, 401, 404}
    assert rows(app, "SELECT count(*) FROM projects") == [(0,)]
    until(lambda: not list(app.settings.projects.iterdir()), 10, "the folders to be gone")
    assert rows(app, "SELECT count(*) FROM outbox WHERE kind = 'folder'") == [(0,)]


# --- sessions -----------------------------------------------------------------------------------------


def test_a_session_is_created_and_listed(ada: Person) -> None:
    """A session has exactly the documented fields and defaults, and the newest is listed first."""
    project = ada.project()
    path = f"/projects/{project['id']}/sessions"
    assert ada.http.get(path).json() == []
    bare = ada.http.post(path)
    assert bare.status_code == 201
    first = bare.json()
    assert first == {
        "id": first["id"],
        "project_id": project["id"],
        "session_key": first["session_key"],
        "label": None,
        "archived": 0,
        "scope": "private",
        "channel": "webchat",
        "agent_id": "main",
        "created_at": first["created_at"],
        "last_used_at": None,
    }
    assert UUID4.fullmatch(first["session_key"]) and TIME.fullmatch(first["created_at"])
    second = ada.http.post(path, json={"label": " Named ", "agent_id": "other_agent-2"}).json()
    assert (second["label"], second["agent_id"]) == ("Named", "other_agent-2")
    ada.session()
    assert ada.http.get(path).json() == [second, first]


@pytest.mark.parametrize("body", [{}, {"label": None}, {"agent_id": None}, {"label": None, "agent_id": None}])
def test_optional_fields_of_a_session_may_be_null(ada: Person, body: JSON) -> None:
    """An optional field that is null means the same as a missing one."""
    made = ada.http.post(f"/projects/{ada.project()['id']}/sessions", json=body)
    assert made.status_code == 201
    assert (made.json()["label"], made.json()["agent_id"]) == (None, "main")


@pytest.mark.parametrize(
    "agent", ["", " ", "a b", "a\n", "../main", "a/b", "main:x", "-x", "ä", "x" * 65, "a\0", 7, ["main"]]
)
def test_an_agents_id_is_a_plain_name(ada: Person, agent: object) -> None:
    """An agent id that could name another session in the gateway, or none, is refused."""
    project = ada.project()
    refused = ada.http.post(f"/projects/{project['id']}/sessions", json={"agent_id": agent})
    assert (refused.status_code, refused.json()["code"]) == (422, "invalid_request")
    assert ada.http.get(f"/projects/{project['id']}/sessions").json() == []


def test_an_archived_session_is_listed_separately_and_takes_no_messages(ada: Person, openclaw: StandIn) -> None:
    """`?archived=true` lists only archived sessions. A message to one is refused with 404 and starts no turn. An
    unarchived session takes messages again."""
    project = ada.project()
    kept, session = ada.session(project), ada.session(project)
    assert ada.say(session, "Before").status_code == 200
    archived = ada.http.put(f"/sessions/{session['id']}", json={"archived": True}).json()
    assert (archived["archived"], archived["label"]) == (1, "Before")
    path = f"/projects/{project['id']}/sessions"
    assert ada.http.get(path).json() == ada.http.get(path, params={"archived": "false"}).json() == [kept]
    assert ada.http.get(path, params={"archived": "true"}).json() == [archived]
    asked = len(openclaw.requests)
    for stream in (False, True):
        refused = ada.say(session, "Hello?", stream=stream)
        assert (refused.status_code, refused.code) == (404, "session_not_found")
    assert len(openclaw.requests) == asked
    assert ada.messages(session)[0]["content"] == "Before"
    back = ada.http.put(f"/sessions/{session['id']}", json={"archived": False})
    assert back.json()["archived"] == 0
    assert ada.http.get(path, params={"archived": "true"}).json() == []
    assert ada.say(session, "After").status_code == 200


@pytest.mark.parametrize(
    ("label", "said", "expected"),
    [
        (None, "Hello there", "Hello there"),
        (None, "  Two\n lines\t here ", "Two lines here"),
        (None, f"{'word ' * 40}", f"{'word ' * 12}".rstrip() + "…"),
        (None, "x" * 500, "x" * 60 + "…"),
        (None, "日本語 " * 30, None),
        ("", "Hello there", "Hello there"),
        ("Mine", "Hello there", "Mine"),
    ],
)
def test_a_session_is_labelled_by_its_first_words(
    ada: Person, label: str | None, said: str, expected: str | None
) -> None:
    """A session without a label gets the first words of its first message. No label changes with later messages."""
    session = ada.session() if label is None else ada.session(label=label)
    path = f"/projects/{session['project_id']}/sessions"
    for text in (said, "Something else"):
        assert ada.say(session, text).status_code == 200
        (listed,) = ada.http.get(path).json()
        if expected is None:
            assert said.startswith(listed["label"].removesuffix("…"))
            assert len(listed["label"]) <= 61
        else:
            assert listed["label"] == expected
        assert TIME.fullmatch(listed["last_used_at"])


def test_a_session_is_renamed(ada: Person) -> None:
    """Renaming changes only the label; null keeps it; a label of 201 characters is refused."""
    session = ada.session(label="Before")
    path = f"/sessions/{session['id']}"
    assert ada.http.put(path, json={"label": " After "}).json() == {**session, "label": "After"}
    assert ada.http.put(path, json={"label": None, "archived": None}).json() == {**session, "label": "After"}
    assert ada.http.put(path, json={"label": "x" * 200}).status_code == 200
    assert ada.http.put(path, json={"label": "x" * 201}).status_code == 422


@pytest.mark.parametrize("path", ["/sessions/{session}", "/projects/{project}/sessions/{session}"])
def test_deleting_a_session_deletes_what_was_said_in_it(
    served: Served, openclaw: StandIn, ada: Person, path: str
) -> None:
    """Both routes delete its messages, images and gateway session; the project and its other sessions stay."""
    project = ada.project()
    kept, session = ada.session(project), ada.session(project)
    for one in (kept, session):
        assert ada.say(one, "Look", image=PNG).status_code == 200
    answer = ada.http.delete(path.format(project=project["id"], session=session["id"]))
    assert (answer.status_code, answer.json()) == (200, {"status": "deleted", "message": "Session deleted"})
    assert ada.http.get(f"/sessions/{session['id']}/messages").json()["code"] == "session_not_found"
    assert not (served.settings.images / session["session_key"]).exists()
    assert (served.settings.images / kept["session_key"]).exists()
    assert len(ada.messages(kept)) == 2
    assert Path(project["project_path"]).exists()
    key = f"agent:main:openai-user:adapter-session-{session['session_key']}"
    until(lambda: key in openclaw.deleted, 10, "the session's deletion in the gateway")
    assert ada.http.delete(path.format(project=project["id"], session=session["id"])).status_code == 404


def test_a_session_is_deleted_in_its_own_project_alone(ada: Person) -> None:
    """`DELETE /projects/{pid}/sessions/{id}` with another project of the same user is a 404 that deletes nothing."""
    session, other = ada.session(), ada.project()
    answer = ada.http.delete(f"/projects/{other['id']}/sessions/{session['id']}")
    assert (answer.status_code, answer.json()["code"]) == (404, "session_not_found")
    assert ada.messages(session) == []


# --- data of another user, and wrong ids --------------------------------------------------------------

CHAT: JSON = {"session_key": "{key}", "messages": [{"role": "user", "content": "Hello"}]}
ROUTES: tuple[tuple[str, str, JSON | None], ...] = (
    ("GET", "/projects/{project}", None),
    ("PUT", "/projects/{project}", {"name": "Mine now"}),
    ("DELETE", "/projects/{project}", None),
    ("GET", "/projects/{project}/sessions", None),
    ("GET", "/projects/{project}/sessions?archived=true", None),
    ("POST", "/projects/{project}/sessions", {}),
    ("DELETE", "/projects/{project}/sessions/{session}", None),
    ("GET", "/projects/{project}/files", None),
    ("GET", "/projects/{project}/files/README.md", None),
    ("PUT", "/projects/{project}/files/README.md", {"content": "Mine now"}),
    ("PUT", "/sessions/{session}", {"label": "Mine now"}),
    ("DELETE", "/sessions/{session}", None),
    ("GET", "/sessions/{session}/messages", None),
    ("GET", "/sessions/{session}/messages?limit=1", None),
    ("GET", "/sessions/{session}/messages/{message}/stream", None),
    ("POST", "/sessions/{session}/stop", None),
    ("POST", "/chat", CHAT),
    ("POST", "/chat/stream", CHAT),
    ("GET", "/images/{image}", None),
    ("GET", "/images/{image}?expires=9999999999&signature=00000000000000000000000000000000", None),
)
NAMES = [f"{method} {path}" for method, path, _ in ROUTES]


def filled(body: JSON | None, names: dict[str, object]) -> JSON | None:
    """Returns the body with the session key filled in."""
    return {**body, "session_key": names["key"]} if body and "session_key" in body else body


@pytest.mark.parametrize(("method", "path", "body"), ROUTES, ids=NAMES)
def test_data_of_another_user_does_not_exist(
    carol: Person, dave: Person, owned: dict[str, object], method: str, path: str, body: JSON | None
) -> None:
    """Data of another user gives exactly the same 404 as data that never existed, and does not change."""
    nothing: dict[str, object] = {
        **dict.fromkeys(("project", "session", "message"), LARGEST_ID),
        "key": "00000000-0000-4000-8000-000000000000",
        "image": f"{LARGEST_ID}.png",
    }
    before = [carol.http.get(f"/projects/{owned['project']}{of}").text for of in ("", "/sessions", "/files")]
    foreign = dave.http.request(method, path.format(**owned), json=filled(body, owned))
    missing = dave.http.request(method, path.format(**nothing), json=filled(body, nothing))
    assert foreign.status_code == missing.status_code == 404
    assert foreign.json() == missing.json()
    volatile = {"date", "x-request-id"}
    assert [(k, v) for k, v in foreign.headers.items() if k not in volatile] == [
        (k, v) for k, v in missing.headers.items() if k not in volatile
    ]
    assert before == [carol.http.get(f"/projects/{owned['project']}{of}").text for of in ("", "/sessions", "/files")]


def test_a_message_is_found_only_in_its_own_session(ada: Person) -> None:
    """A reply cannot be streamed under another session, and a user's message cannot be streamed."""
    session, other = ada.session(), ada.session()
    reply = ada.say(session, "Hello").message_id
    question = ada.messages(session)[0]["id"]
    for path in (
        f"/sessions/{other['id']}/messages/{reply}/stream",
        f"/sessions/{session['id']}/messages/{question}/stream",
    ):
        answer = ada.http.get(path)
        assert (answer.status_code, answer.json()["code"]) == (404, "message_not_found")


NUMBERED = [(method, path, body) for method, path, body in ROUTES if "{" in path]


@pytest.mark.parametrize(
    "number",
    ["0", "-1", "9223372036854775808", "18446744073709551616", "9" * 5000, "abc", "1.5", "%00", "\uff11", "NaN"],
)
@pytest.mark.parametrize(("method", "path", "body"), NUMBERED, ids=[f"{method} {path}" for method, path, _ in NUMBERED])
def test_an_invalid_id_is_refused(carol: Person, method: str, path: str, body: JSON | None, number: str) -> None:
    """An id that is not a number, or not one that a row can have, is refused with 404 or 422, never with 500."""
    names = dict.fromkeys(("project", "session", "message"), number)
    answer = carol.http.request(method, path.format(**names, image=f"{number}.png"), json=body)
    assert answer.status_code == 400 if number == "%00" else answer.status_code in (404, 422)
    assert set(answer.json()) == {"detail", "code"}


@pytest.mark.parametrize("number", ["0", "-1", "9223372036854775808", "18446744073709551616", "x", "", "1e9"])
@pytest.mark.parametrize("name", ["limit", "before"])
def test_an_invalid_page_is_refused(carol: Person, owned: dict[str, object], name: str, number: str) -> None:
    """`limit` and `before` are refused unless they are numbers in their range."""
    answer = carol.http.get(f"/sessions/{owned['session']}/messages", params={name: number})
    assert (answer.status_code, answer.json()["code"]) == (422, "invalid_request")


TEXTS: tuple[tuple[str, str, JSON], ...] = (
    ("POST", "/projects", {"name": "@"}),
    ("POST", "/projects", {"name": "x", "description": "@"}),
    ("PUT", "/projects/{project}", {"name": "@"}),
    ("PUT", "/projects/{project}", {"description": "@"}),
    ("POST", "/projects/{project}/sessions", {"label": "@"}),
    ("POST", "/projects/{project}/sessions", {"agent_id": "@"}),
    ("PUT", "/sessions/{session}", {"label": "@"}),
    ("PUT", "/projects/{project}/files/new", {"content": "@"}),
    ("POST", "/chat", {**CHAT, "session_key": "@"}),
    ("POST", "/chat", {**CHAT, "messages": [{"role": "user", "content": "@"}]}),
    ("POST", "/chat", {**CHAT, "messages": [{"role": "user", "content": [{"type": "text", "text": "@"}]}]}),
    ("POST", "/chat", {**CHAT, "image": "@"}),
)


@pytest.mark.parametrize(("method", "path", "body"), TEXTS, ids=[f"{t[0]} {t[1]} {t[2]}" for t in TEXTS])
def test_a_lone_surrogate_is_refused(
    carol: Person, owned: dict[str, object], method: str, path: str, body: JSON
) -> None:
    """A lone surrogate, which JSON can express and Unicode cannot, is refused in every text field without effect."""
    before = [carol.http.get(at).text for at in ("/projects", f"/sessions/{owned['session']}/messages")]
    text = json.dumps(body).replace("{key}", str(owned["key"])).replace('"@"', '"\\ud800"')
    headers = {"Content-Type": "application/json"}
    answer = carol.http.request(method, path.format(**owned), content=text, headers=headers)
    assert answer.status_code in (400, 404, 422)
    assert set(answer.json()) == {"detail", "code"}
    assert before == [carol.http.get(at).text for at in ("/projects", f"/sessions/{owned['session']}/messages")]


# --- files --------------------------------------------------------------------------------------------


@pytest.fixture
def project(ada: Person) -> JSON:
    """A project of Ada's."""
    return ada.project("Files")


@pytest.fixture
def folder(project: JSON) -> Path:
    """The project's folder."""
    return Path(project["project_path"])


@pytest.fixture
def files(project: JSON) -> str:
    """The path of the route for the project's files."""
    return f"/projects/{project['id']}/files"


def test_the_tree_shows_every_level_sorted(ada: Person, files: str, folder: Path) -> None:
    """Folders have children and files a size; each level is sorted by name; links are left out."""
    for path, content in (("b/z.txt", b"12345"), ("b/a/deep.bin", b"\0\1"), ("a.txt", "é".encode()), ("B.txt", b"")):
        target = folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content)
    (folder / "empty").mkdir()
    (folder / "link").symlink_to("/etc")
    (folder / "b/file-link").symlink_to("z.txt")
    readme = (folder / "README.md").stat().st_size
    deep = {"type": "file", "name": "deep.bin", "path": "b/a/deep.bin", "size": 2}
    assert ada.http.get(files).json() == [
        {"type": "file", "name": "B.txt", "path": "B.txt", "size": 0},
        {"type": "file", "name": "README.md", "path": "README.md", "size": readme},
        {"type": "file", "name": "a.txt", "path": "a.txt", "size": 2},
        {
            "type": "folder",
            "name": "b",
            "path": "b",
            "children": [
                {"type": "folder", "name": "a", "path": "b/a", "children": [deep]},
                {"type": "file", "name": "z.txt", "path": "b/z.txt", "size": 5},
            ],
        },
        {"type": "folder", "name": "empty", "path": "empty", "children": []},
    ]


@pytest.mark.parametrize(
    "content",
    ["", "text", "zwölf \N{GRINNING FACE} 日本", "a\r\nb\n", "\ufeffBOM", "\u2028", "x" * 1_000_000, "'; DROP TABLE x"],
    ids=["empty", "text", "unicode", "crlf", "bom", "separator", "large", "sql"],
)
def test_what_is_written_is_read(ada: Person, files: str, folder: Path, content: str) -> None:
    """A file contains exactly what was sent; missing folders are created; an existing file is replaced completely."""
    path = f"{files}/new/folders/a file.txt"
    size = len(content.encode())
    for text in ("what was there before", content):
        written = ada.http.put(path, json={"content": text})
        assert (written.status_code, written.json()) == (200, {"success": True, "size": len(text.encode())})
    assert ada.http.get(path).json() == {"content": content, "is_binary": False, "size": size}
    assert (folder / "new/folders/a file.txt").read_bytes() == content.encode()
    assert [path.name for path in (folder / "new/folders").iterdir()] == ["a file.txt"]


@pytest.mark.parametrize("data", [b"\x89PNG\r\n\x1a\n\0\0", b"\xff\xfe\x41\x00", b"text\0text", b"\x80", b"ab\xc3"])
def test_a_binary_file_is_marked(ada: Person, files: str, folder: Path, data: bytes) -> None:
    """A file that is not UTF-8, or contains a NUL, is binary: it has no content, and its real size."""
    (folder / "data").write_bytes(data)
    assert ada.http.get(f"{files}/data").json() == {"content": "", "is_binary": True, "size": len(data)}


@pytest.mark.parametrize(("size", "status"), [(TEN_MB, 200), (TEN_MB + 1, 413)])
def test_a_file_has_at_most_10_mb(ada: Person, files: str, folder: Path, size: int, status: int) -> None:
    """The limit counts bytes, and applies to reading and writing. A file that is too large is not written."""
    (folder / "there").write_bytes(b"x" * size)
    content = "é" * (size // 2) + "x" * (size % 2)
    read, written = ada.http.get(f"{files}/there"), ada.http.put(f"{files}/new", json={"content": content})
    assert (read.status_code, written.status_code) == (status, status)
    if status == 413:
        assert read.json()["code"] == written.json()["code"] == "file_too_large"
    assert (folder / "new").exists() == (status == 200)


@pytest.mark.parametrize(
    "body", [{}, {"content": None}, {"content": 7}, {"content": ["x"]}, {"content": {"x": 1}}, [], "x", None]
)
def test_content_must_be_a_string(ada: Person, files: str, folder: Path, body: object) -> None:
    """Unless `content` is a string, the request is refused and nothing is written."""
    refused = ada.http.put(f"{files}/new", json=body)
    assert (refused.status_code, refused.json()["code"]) == (422, "invalid_request")
    assert not (folder / "new").exists()


@pytest.fixture(scope="module")
def outside(served: Served) -> Path:
    """A file next to the directory of the project folders."""
    path = served.settings.projects.parent / "outside.txt"
    path.write_text("OUTSIDE")
    return path


@pytest.fixture(scope="module")
def trapped(outside: Path, dave: Person) -> JSON:
    """A project of Dave's that contains links to files and folders outside, which an agent could create."""
    project = dave.project("Trapped")
    folder = Path(project["project_path"])
    (folder / "folder-link").symlink_to(outside.parent)
    (folder / "file-link").symlink_to(outside)
    (folder / "sub").mkdir()
    (folder / "sub/up").symlink_to(outside.parent)
    (folder / "loop").symlink_to("loop")
    (folder / "dangling").symlink_to(outside.parent / "not-there.txt")
    (folder / "self").symlink_to(".")
    return project


ESCAPES = (
    *("../outside.txt", "../../outside.txt", "a/../../../outside.txt", "./../../outside.txt", "README.md/../../.."),
    *("%2e%2e/%2e%2e/outside.txt", "%2e%2e%2f%2e%2e%2foutside.txt", "..%2f..%2foutside.txt", ".%2e/.%2e/outside.txt"),
    *("%252e%252e%252foutside.txt", "%252e%252e/outside.txt", "..%255c..%255coutside.txt"),
    *("..\\..\\outside.txt", "..%5c..%5coutside.txt", "%5c%5coutside.txt", "C:%5coutside.txt"),
    *("..%c0%af..%c0%afoutside.txt", "%c0%ae%c0%ae/%c0%ae%c0%ae/outside.txt", "..%ef%bc%8f..%ef%bc%8foutside.txt"),
    *("..;/..;/outside.txt", "..%00/outside.txt", "..%0a/outside.txt", "outside.txt%00.md", "%00", "a%00/../b"),
    *("/etc/passwd", "//etc/passwd", "%2fetc%2fpasswd", "%2f%2fetc/passwd", "/", "//", "", ".", "..", "%2e", "%2e%2e"),
    *("file:///etc/passwd", "~root/.bashrc", "/proc/self/environ", "a//b", "README.md/", "folder-link/outside.txt"),
    *("file-link", "sub/up/../outside.txt", "sub/up/outside.txt", "loop/loop/x", "dangling", "self"),
    *("x" * 256, "a/" * 2000 + "x", "%f0%9f%a6%9e" * 64, "%ed%a0%80/x", "%7f", "%0d%0aX-Injected:%201"),
)


@pytest.mark.parametrize("method", ["GET", "PUT"])
@pytest.mark.parametrize("path", ESCAPES)
def test_no_path_leads_out_of_the_folder(dave: Person, trapped: JSON, outside: Path, path: str, method: str) -> None:
    """No spelling of a path, and no link in it, reads or writes anything outside of the project's folder."""

    def around() -> set[Path]:
        folder = Path(trapped["project_path"])
        return {path for path in outside.parent.rglob("*") if folder not in path.parents and ".db" not in path.name}

    before = around()
    body = b'{"content": "WRITTEN"}' if method == "PUT" else None
    status, answer = as_sent(dave, method, f"/projects/{trapped['id']}/files/{path}", body)
    assert status in (200, 400, 404)
    if status == 200:  # an unusual but valid name inside the folder, which this test has written
        assert answer == {"success": True, "size": 7} or answer["content"] == "WRITTEN"
    assert status != 400 or answer["code"] == "invalid_path"
    assert "OUTSIDE" not in json.dumps(answer)
    assert "root:" not in json.dumps(answer)
    assert outside.read_text() == "OUTSIDE"
    assert around() == before


@pytest.mark.parametrize("path", ["../outside.txt", "..%2f..%2foutside.txt", "folder-link/outside.txt", "file-link"])
def test_a_path_to_the_outside_is_an_invalid_path(dave: Person, trapped: JSON, path: str) -> None:
    """A path that leads outside of the folder gives 400 `invalid_path` for reading and writing."""
    for method, body in (("GET", None), ("PUT", b'{"content": "WRITTEN"}')):
        status, answer = as_sent(dave, method, f"/projects/{trapped['id']}/files/{path}", body)
        assert (status, answer["code"]) == (400, "invalid_path")


@pytest.mark.parametrize(
    ("path", "code"),
    [
        ("none.txt", "file_not_found"),
        ("none/none.txt", "file_not_found"),
        ("sub", "invalid_path"),
        ("README.md/x", "invalid_path"),
    ],
)
def test_only_files_are_read(ada: Person, files: str, folder: Path, path: str, code: str) -> None:
    """A missing file gives 404. A folder, and a path below a file, give `invalid_path`."""
    (folder / "sub").mkdir()
    answer = ada.http.get(f"{files}/{path}")
    assert (answer.status_code, answer.json()["code"]) == (404 if code == "file_not_found" else 400, code)


def test_files_of_a_removed_folder(ada: Person, files: str, folder: Path) -> None:
    """If its folder was removed, a project has no files, which is not an internal error; a write creates it again."""
    (folder / "README.md").unlink()
    folder.rmdir()
    assert ada.http.get(files).json() == []
    assert ada.http.get(f"{files}/README.md").json()["code"] == "file_not_found"
    assert ada.http.put(f"{files}/back/again", json={"content": "x"}).status_code == 200
    assert (folder / "back/again").read_text() == "x"


def test_a_folder_that_became_a_link_is_not_followed(
    served: Served, ada: Person, bob: Person, project: JSON, files: str, folder: Path
) -> None:
    """If an agent replaces its project's folder by a link to another project's, that project's files can neither be
    read nor be changed, and deleting the project removes only the link."""
    other = Path(bob.project("Bob's")["project_path"])
    (folder / "README.md").unlink()
    folder.rmdir()
    folder.symlink_to(other)
    assert ada.http.get(files).json() == []
    assert ada.http.get(f"{files}/README.md").status_code in (400, 404)
    assert ada.http.put(f"{files}/README.md", json={"content": "mine"}).status_code in (400, 404)
    assert ada.http.delete(f"/projects/{project['id']}").status_code == 200
    assert "Bob's" in (other / "README.md").read_text()
    assert not folder.is_symlink()


def test_lists_come_in_pages(ada: Person) -> None:
    """Newest first, from `before` on, at most `limit`; `X-More` says that there are more; the pages are the whole."""
    made = [ada.project(f"P{number}")["id"] for number in range(7)]
    sessions = [ada.session({"id": made[0]})["id"] for _ in range(7)]
    for path, ids in (("/projects", made), (f"/projects/{made[0]}/sessions", sessions)):
        newest = sorted(ids, reverse=True)
        whole = ada.http.get(path)
        assert [item["id"] for item in whole.json()] == newest
        assert "X-More" not in whole.headers
        found: list[int] = []
        more = True
        while more:
            page = ada.http.get(path, params={"limit": 3, **({"before": found[-1]} if found else {})})
            found += [item["id"] for item in page.json()]
            more = page.headers.get("X-More") == "true"
            assert len(page.json()) <= 3
        assert found == newest
        exactly = ada.http.get(path, params={"limit": 7})
        assert len(exactly.json()) == 7 and "X-More" not in exactly.headers
        for wrong in ({"limit": 0}, {"limit": 1001}, {"before": 0}):
            assert ada.http.get(path, params=wrong).status_code == 422


def test_a_list_has_a_thousand_entries_at_most(ada: Person, served: Served) -> None:
    """Without `limit` too; the answer says that there are more."""
    project = ada.project()
    with closing(sqlite3.connect(served.settings.db_path)) as conn:
        rows = ((project["id"], f"00000000-0000-4000-8000-{number:012d}") for number in range(1005))
        conn.executemany("INSERT INTO sessions (project_id, session_key, created_at) VALUES (?, ?, '2026')", rows)
        conn.commit()
    answer = ada.http.get(f"/projects/{project['id']}/sessions")
    assert len(answer.json()) == 1000
    assert answer.headers["X-More"] == "true"
