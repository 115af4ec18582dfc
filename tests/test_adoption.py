"""The production database of old is taken over: nothing of it is lost, and whatever happens on the way leaves the old
file or the new one."""

import base64
import logging
import random
import shutil
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx
import pytest

import admin
import clock
import database
import errors
import sql

from .legacy import OLD_PASSWORD, adopt, build, images, texts
from .service import CHECKOUT, Served, until
from .stand_in import StandIn

PNG = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="  # one pixel


def rows(path: Path, query: str, *values: object) -> list[Any]:
    """What a query brings."""
    with closing(sqlite3.connect(path)) as conn:
        return conn.execute(query, values).fetchall()


def change(path: Path, *statements: str) -> None:
    """Changes a database of old."""
    with closing(sqlite3.connect(path)) as conn:
        for statement in statements:
            conn.execute(statement)
        conn.commit()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Where a database of old is to be."""
    return tmp_path / "clawdbot_adapter.db"


# --- nothing is lost ----------------------------------------------------------------------------------


@pytest.mark.parametrize("messages", [0, 1, 2, 10, 1_000, 100_000, pytest.param(1_000_000, marks=pytest.mark.slow)])
def test_every_row_and_text_is_there(path: Path, messages: int) -> None:
    """All texts have the SHA-256 that they had, each row is in its table or among those without an owner, each image
    is a file with its bytes or stands where it stood, and SQLite finds nothing wrong."""
    build(path, messages, seed=messages)
    before = texts(path)
    pictures = dict(images(path))
    tables = ("users", "projects", "sessions", "messages")
    counts = {table: rows(path, f"SELECT count(*) FROM {table}")[0][0] for table in tables}
    highest = dict(rows(path, "SELECT name, seq FROM sqlite_sequence"))
    store = adopt(path)
    assert texts(path) == before
    for table in tables[1:]:
        query = f"SELECT (SELECT count(*) FROM {table}) + (SELECT count(*) FROM orphaned_{table})"
        assert rows(path, query) == [(counts[table],)]
    assert rows(path, "SELECT count(*) FROM users") == [(counts["users"],)]
    assert rows(path, "PRAGMA foreign_key_check") == []
    assert rows(path, "PRAGMA integrity_check") == [("ok",)]
    assert dict(rows(path, "SELECT name, seq FROM sqlite_sequence")).items() >= highest.items()
    kept = dict(rows(path, "SELECT id, legacy_image FROM messages WHERE legacy_image <> ''"))
    kept |= dict(rows(path, "SELECT id, image FROM orphaned_messages WHERE image <> ''"))
    files = dict(rows(path, "SELECT message_id, file FROM message_images"))
    assert kept.keys() | files.keys() == pictures.keys()
    assert not kept.keys() & files.keys()
    assert all(pictures[number] == text for number, text in kept.items())
    for number, file in files.items():
        assert store.load(file).data == base64.b64decode(pictures[number].rpartition(",")[2])


def test_what_fits_nowhere_is_kept(path: Path) -> None:
    """Columns that nobody knows, times that cannot be read and bytes that are no text are in a table of their own;
    other tables and views stay."""
    build(path, 200, seed=3)
    models = rows(path, "SELECT id, model FROM messages WHERE model IS NOT NULL")
    times = rows(path, "SELECT id FROM messages WHERE created_at = 'yesterday'")
    adopt(path)
    value = "SELECT row_id, value FROM legacy_values WHERE table_name = ? AND column_name = ? ORDER BY row_id"
    assert rows(path, value, "messages", "model") == models
    assert rows(path, value, "users", "phone") == [(4, "+49 30 123")]
    assert rows(path, value, "messages", "created_at") == [(number, "yesterday") for (number,) in times]
    assert rows(path, value, "messages", "content") == [(1000, b"\xc3(AB\xff"), (1002, b"H\xc3\xa9")]
    every = "SELECT id, content FROM messages UNION SELECT id, content FROM orphaned_messages ORDER BY id"
    mended = {number: text for number, text in rows(path, every) if number in (1000, 1002)}
    assert mended == {1000: "\ufffd(AB\ufffd", 1002: "Hé"}
    assert rows(path, "SELECT count(*) FROM settings_of_old") == [(0,)]
    assert rows(path, "SELECT count(*) > 0 FROM last_words") == [(1,)]


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("2026-02-04 10:47:49", "2026-02-04T10:47:49.000Z"),
        ("2026-02-04 10:47:49.123456", "2026-02-04T10:47:49.123Z"),
        ("2026-02-04T10:47:49Z", "2026-02-04T10:47:49.000Z"),
        ("2026-02-04T10:47:49.250+02:00", "2026-02-04T08:47:49.250Z"),
        ("2026-02-04", "2026-02-04T00:00:00.000Z"),
        (1770000000, "2026-02-02T02:40:00.000Z"),
        (1770000000.5, "2026-02-02T02:40:00.500Z"),
        (1770000000123, "2026-02-02T02:40:00.123Z"),
    ],
)
def test_a_time_keeps_its_instant(path: Path, old: object, new: str) -> None:
    """However it was written, it is the same moment as the contract writes it."""
    build(path)
    with closing(sqlite3.connect(path)) as conn:
        conn.execute("UPDATE sessions SET created_at = ?, last_used_at = ? WHERE id = 58", (old, old))
        conn.commit()
    adopt(path)
    assert rows(path, "SELECT created_at, last_used_at FROM sessions WHERE id = 58") == [(new, new)]


@pytest.mark.parametrize("old", ["now", "12:30", "2026-13-40", -(2**63), 10**17])
def test_what_is_no_instant_is_not_made_one(path: Path, old: object) -> None:
    """A time that names no moment is kept as it was, and becomes the time of the adoption where there must be one."""
    build(path)
    with closing(sqlite3.connect(path)) as conn:
        conn.execute("UPDATE sessions SET created_at = ?, last_used_at = ? WHERE id = 58", (old, old))
        conn.commit()
    began = clock.now()
    adopt(path)
    ((created, used),) = rows(path, "SELECT created_at, last_used_at FROM sessions WHERE id = 58")
    assert began <= created <= clock.now()
    assert used is None
    kept = rows(path, "SELECT column_name, value FROM legacy_values WHERE table_name = 'sessions' AND row_id = 58")
    assert kept == [("created_at", old), ("last_used_at", old)]


def test_names_in_another_case(path: Path) -> None:
    """SQLite does not tell `Messages` from `messages`, so neither does the adoption; no id is used twice either."""
    build(path, 100)
    before, pictures = texts(path), len(list(images(path)))
    change(path, "DROP TRIGGER update_projects_timestamp", "DROP VIEW last_words")
    for table, column in (("users", "password"), ("messages", "image"), ("sessions", "label")):
        change(
            path,
            f"ALTER TABLE {table} RENAME COLUMN {column} TO {column.title()}",
            f"ALTER TABLE {table} RENAME TO passing",
            f"ALTER TABLE passing RENAME TO {table.title()}",
        )
    change(path, "CREATE TRIGGER stamp AFTER UPDATE ON Sessions BEGIN SELECT RAISE(ABORT, 'no'); END")
    change(path, "DELETE FROM Users WHERE id = 4")
    adopt(path)
    assert texts(path) == before
    kept = "SELECT (SELECT count(*) FROM message_images) + (SELECT count(*) FROM messages WHERE legacy_image <> '')"
    aside = rows(path, "SELECT count(*) FROM orphaned_messages WHERE Image <> ''")[0][0]
    assert rows(path, kept) == [(pictures - aside,)]
    assert rows(path, "SELECT password FROM users WHERE id = 3")[0][0].startswith("e4e0")
    assert dict(rows(path, "SELECT name, seq FROM sqlite_sequence"))["users"] == 4


def test_a_strangers_table_stays(path: Path) -> None:
    """A table that nobody knows is as it was, also where it refers to what is not there, and is in nobody's way."""
    build(path)
    change(
        path,
        "CREATE TABLE attachments (id INTEGER PRIMARY KEY, message_id INTEGER REFERENCES messages(id))",
        "INSERT INTO attachments VALUES (1, 357), (2, 12), (3, 9999)",
        "CREATE TRIGGER forward AFTER INSERT ON attachments BEGIN UPDATE messages SET role = 'user' WHERE 0; END",
    )
    adopt(path)
    assert rows(path, "SELECT message_id FROM attachments ORDER BY id") == [(357,), (12,), (9999,)]
    assert admin.main(["backup", str(path.parent / "some.backup"), "--database", str(path)]) == 0
    assert rows(path, "SELECT name FROM sqlite_master WHERE type = 'trigger' AND name = 'forward'") == [("forward",)]


def test_keys_that_cannot_be_read_stay_apart(path: Path) -> None:
    """Two session keys or e-mails that are no UTF-8 do not become the same one; their bytes are kept."""
    build(path)
    change(
        path,
        "UPDATE sessions SET session_key = CAST(x'ff' AS TEXT) WHERE id = 58",
        "UPDATE sessions SET session_key = CAST(x'fe' AS TEXT) WHERE id = 59",
        "UPDATE users SET email = CAST(x'fd' AS TEXT) WHERE id = 1",
        "UPDATE users SET email = CAST(x'fc' AS TEXT) WHERE id = 3",
    )
    adopt(path)
    assert rows(path, "SELECT session_key FROM sessions WHERE id < 60") == [("\ufffd-58",), ("\ufffd-59",)]
    assert rows(path, "SELECT value FROM legacy_values ORDER BY table_name, row_id") == [
        (b"\xff",),
        (b"\xfe",),
        (b"\xfd",),
        (b"\xfc",),
    ]


def test_a_relative_path_starts_at_the_checkout(path: Path) -> None:
    """A project's folder that was named relative to where the service ran is found from wherever it runs now."""
    build(path)
    change(path, "UPDATE projects SET project_path = 'projects/garden' WHERE id = 35")
    adopt(path)
    assert rows(path, "SELECT project_path FROM projects WHERE id = 35") == [(str(CHECKOUT / "projects/garden"),)]
    assert rows(path, "SELECT row_id, value FROM legacy_values") == [(35, "projects/garden")]


def test_columns_that_an_older_file_lacks(path: Path) -> None:
    """A file from before some column was added is taken over as well, with what the column counts as."""
    build(path)
    with closing(sqlite3.connect(path)) as conn:
        conn.execute("DROP TRIGGER update_projects_timestamp")
        for table, columns in {
            "messages": ["image", "created_at"],
            "projects": ["description", "project_path", "archived", "updated_at"],
            "sessions": ["archived", "scope", "channel", "agent_id", "last_used_at", "label"],
        }.items():
            for column in columns:
                conn.execute(f"ALTER TABLE {table} DROP COLUMN {column}")
        conn.commit()
    before = texts(path)
    adopt(path)
    assert texts(path) == before
    query = "SELECT archived, scope, channel, agent_id, label, last_used_at FROM sessions WHERE id = 58"
    assert rows(path, query) == [(0, "private", "webchat", "main", None, None)]


def test_no_id_is_used_twice(path: Path) -> None:
    """An id of a deleted row of old is never given to a new one."""
    build(path)
    with closing(sqlite3.connect(path)) as conn:
        conn.execute("DELETE FROM messages WHERE id > 100")
        conn.execute("DELETE FROM users WHERE id = 3")
        conn.commit()
    adopt(path)
    with closing(database.connect(path, read_only=False)) as conn:
        assert sql.insert_user(conn, "new@example.com", None, "hash").id == 4
        (key,) = conn.execute("SELECT session_key FROM sessions WHERE id = 58").fetchone()
        begun = sql.begin_turn(conn, sql.NewTurn(1, key, "", "", "", None, ""))
        assert begun.message_id == 364


def test_the_log_says_how_many(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """An operator sees where the copy is, and how many of each there were."""
    build(path)
    with caplog.at_level(logging.INFO, "clawd"):
        adopt(path)
    (copy,) = path.parent.glob("*.v0.backup")
    assert copy.name in caplog.text
    assert "migrated 3 users, 2 projects, 3 sessions, 7 messages" in caplog.text
    assert "orphaned_… tables: 0 projects, 0 sessions, 2 messages" in caplog.text
    assert "stored 2 images as files, left 1 values that are not images in" in caplog.text
    assert "dropping the trigger update_projects_timestamp on projects" in caplog.text


def test_the_copy_beside_is_the_file_as_it_was(path: Path) -> None:
    """It has all that the file had, and a start that comes again does not make another one."""
    build(path, 100)
    before = texts(path)
    original = path.read_bytes()
    for _ in range(3):
        path.write_bytes(original)
        for leftover in path.parent.glob("*.db-*"):
            leftover.unlink()
        adopt(path)
    (copy,) = path.parent.glob("*.backup")
    assert texts(copy) == before
    assert rows(copy, "PRAGMA user_version") == [(0,)]


def test_twice_is_once(path: Path) -> None:
    """A second start changes nothing."""
    build(path, 100)
    adopt(path)
    before = path.read_bytes()
    adopt(path)
    assert path.read_bytes() == before


# --- refused, and killed ------------------------------------------------------------------------------


def damage(content: bytes) -> bytes:
    """The same file with pages in its middle overwritten."""
    middle = len(content) // 2 // 4096 * 4096
    return content[:middle] + b"\xa5" * 8192 + content[middle + 8192 :]


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (damage, "damaged"),
        (lambda content: content[: len(content) // 2], "damaged|malformed"),
        (lambda _: b"This is a letter to my aunt.\n" * 500, "not a database"),
        (lambda content: content[:60] + (99).to_bytes(4, "big") + content[64:], "Start the newer code"),
    ],
)
def test_a_file_that_cannot_be_used_is_untouched(path: Path, spoil: Callable[[bytes], bytes], said: str) -> None:
    """A damaged one, one that is no database, and a newer one are refused with what to do, and stay as they are, with
    nothing beside them."""
    build(path, 300)
    content = spoil(path.read_bytes())
    path.write_bytes(content)
    with pytest.raises(errors.Unavailable, match=said) as refused:
        adopt(path)
    assert "restore" in str(refused.value)
    assert path.read_bytes() == content
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("spoil", ["PRAGMA user_version=99", "CREATE TABLE turns (x)"])
def test_what_a_crash_left_beside_a_refused_file_stays(path: Path, spoil: str) -> None:
    """A file is refused without playing into it what the -wal beside it holds, and the sentence says why."""
    sql.migrate(path)
    if spoil.startswith("CREATE"):
        path.unlink()
        build(path)
    with closing(database.connect(path, read_only=False)) as conn:
        conn.execute(spoil)
        crashed = path.parent / "crashed" / path.name
        crashed.parent.mkdir()
        for suffix in ("", "-wal", "-shm"):
            shutil.copy(f"{path}{suffix}", f"{crashed}{suffix}")
    before = crashed.read_bytes(), Path(f"{crashed}-wal").read_bytes()
    with pytest.raises(errors.Unavailable, match=r"Start the newer code|turns already exists\. The file is unchanged"):
        sql.migrate(crashed)
    if spoil.startswith("PRAGMA"):
        assert (crashed.read_bytes(), Path(f"{crashed}-wal").read_bytes()) == before
    else:
        assert rows(crashed, "PRAGMA user_version") == [(0,)]
        assert rows(crashed, "SELECT count(*) FROM messages") == [(9,)]


def test_a_full_disk_leaves_the_old_file(path: Path) -> None:
    """Where there is no room for the images, nothing has happened."""
    build(path)
    before = path.read_bytes()
    (path.parent / "images").write_text("a file where the folder should be")
    with pytest.raises(errors.Unavailable):
        adopt(path)
    assert path.read_bytes() == before


ADOPT = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
import database
from tests.legacy import adopt
print(flush=True)
adopt(Path(sys.argv[1]))
"""


def start(path: Path) -> "subprocess.Popen[bytes]":
    """A process that adopts; returns when it begins."""
    process = subprocess.Popen([sys.executable, "-c", ADOPT, path, CHECKOUT], stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    return process


@pytest.mark.parametrize("kills", [4, pytest.param(30, marks=pytest.mark.slow)])
def test_a_kill_leaves_the_old_or_the_new_file(path: Path, kills: int) -> None:
    """30 times kill -9 at a random moment: the file is as it was or adopted, and the next start finishes."""
    build(path, 20_000, seed=1)
    before, original = texts(path), path.read_bytes()
    started = time.monotonic()
    start(path).wait()
    duration = time.monotonic() - started
    chance, left = random.Random(7), []
    for _ in range(kills):
        for file in path.parent.glob(f"{path.name}*"):
            file.unlink()
        path.write_bytes(original)
        process = start(path)
        time.sleep(chance.uniform(0, duration))
        process.kill()
        process.wait()
        left.append(rows(path, "PRAGMA user_version")[0][0])
        assert rows(path, "PRAGMA integrity_check") == [("ok",)]
        assert texts(path) == before
        adopt(path)
        assert rows(path, "PRAGMA user_version") == [(len(sql.MIGRATIONS),)]
        assert texts(path) == before
    assert left.count(0) > kills // 5 - 1, "the kills were meant to come in the middle"


def test_two_starts_at_once_are_one(path: Path) -> None:
    """Two processes that open it at the same moment make one adoption and one copy."""
    build(path, 20_000)
    before = texts(path)
    script = "import sys; sys.path.insert(0, sys.argv[2]); import database, pathlib; "
    script += "db = database.Database(pathlib.Path(sys.argv[1])); db.open(); db.close()"
    starts = [subprocess.Popen([sys.executable, "-c", script, path, CHECKOUT]) for _ in range(2)]
    assert [process.wait(60) for process in starts] == [0, 0]
    assert texts(path) == before
    assert len(list(path.parent.glob("*.backup"))) == 1


# --- over HTTP ----------------------------------------------------------------------------------------


@pytest.fixture
def old(tmp_path: Path, serve: Callable[..., Served]) -> Served:
    """The service on the database of old."""
    build(tmp_path / "service.db")
    return serve()


def login(served: Served, email: str, password: str) -> httpx.Response:
    """The answer to a login."""
    return httpx.post(f"{served.url}/auth/login", json={"email": email, "password": password}, trust_env=False)


@pytest.mark.parametrize("email", OLD_PASSWORD)
def test_an_old_user_signs_in(old: Served, tmp_path: Path, email: str) -> None:
    """With the old password, whose hash is a better one from then on; with no other one."""
    assert login(old, email, "wrong password").status_code == 401
    assert login(old, email.swapcase(), OLD_PASSWORD[email]).status_code == 200
    (hashed,) = rows(tmp_path / "service.db", "SELECT password FROM users WHERE email = ?", email)[0]
    assert hashed.startswith("$argon2id$")
    assert login(old, email, OLD_PASSWORD[email]).status_code == 200
    assert login(old, email, hashed).status_code == 401


def test_what_was_theirs_is_theirs(old: Served) -> None:
    """An old user finds projects, archived sessions and messages as they were, images as URLs that load, and can
    write files into a project that never had a folder."""
    token = login(old, "ada@example.com", "test123").json()["access_token"]
    with httpx.Client(base_url=old.url, headers={"Authorization": f"Bearer {token}"}, trust_env=False) as http:
        (project,) = http.get("/projects").json()
        assert (project["id"], project["name"], project["project_path"]) == (35, "Ünïcode / name", "")
        (session,) = http.get("/projects/35/sessions?archived=true").json()
        assert (session["id"], session["archived"], session["last_used_at"]) == (60, 1, "2026-02-04T11:01:12.000Z")
        messages = http.get("/sessions/60/messages").json()
        assert [message["content"] for message in messages[:2]] == ["testing", "Testing confirmed! 🚀"]
        assert {message["status"] for message in messages} == {"complete"}
        picture = http.get(messages[3]["image"])
        assert (picture.status_code, picture.headers["content-type"]) == (200, "image/png")
        assert http.get("/projects/35/files").json() == []
        assert http.get("/projects/35/files/notes.txt").json()["code"] == "file_not_found"
        assert http.put("/projects/35/files/notes.txt", json={"content": "new"}).status_code == 200
        assert http.get("/projects/35/files/notes.txt").json()["content"] == "new"
        assert {node["name"] for node in http.get("/projects/35/files").json()} == {"README.md", "notes.txt"}
        (project,) = http.get("/projects").json()
        assert Path(project["project_path"]).is_relative_to(old.settings.projects)


def test_files_put_at_once_make_one_folder(old: Served, tmp_path: Path) -> None:
    """Many first files of a project of old that had no folder, at the same moment, are all in one new folder."""
    token = login(old, "ada@example.com", "test123").json()["access_token"]
    with (
        httpx.Client(base_url=old.url, headers={"Authorization": f"Bearer {token}"}, trust_env=False) as http,
        ThreadPoolExecutor(8) as pool,
    ):
        answers = pool.map(lambda n: http.put(f"/projects/35/files/{n}.txt", json={"content": str(n)}), range(16))
        assert {answer.status_code for answer in answers} == {200}
        names = {node["name"] for node in http.get("/projects/35/files").json()}
    assert names == {"README.md", *(f"{n}.txt" for n in range(16))}
    (folder,) = old.settings.projects.iterdir()
    assert rows(tmp_path / "service.db", "SELECT project_path FROM projects WHERE id = 35") == [(str(folder),)]
    assert rows(tmp_path / "service.db", "SELECT count(*) FROM outbox") == [(0,)]


@pytest.mark.parametrize("key", ["OLD-KEY", "with a space", "A3877250-ED5A-4708-B965-9CA240AD7F61", "../x", "Grüße"])
def test_a_session_of_old_with_an_odd_key_goes_on(
    tmp_path: Path, serve: Callable[..., Served], openclaw: StandIn, key: str
) -> None:
    """A session whose key is no lower-case UUID keeps its images, takes new ones, and is deleted in the gateway under
    the name that it had there."""
    build(tmp_path / "service.db")
    with closing(sqlite3.connect(tmp_path / "service.db")) as conn:
        conn.execute("UPDATE sessions SET session_key = ?, archived = 0 WHERE id = 60", (key,))
        conn.commit()
    old = serve()
    token = login(old, "ada@example.com", "test123").json()["access_token"]
    with httpx.Client(base_url=old.url, headers={"Authorization": f"Bearer {token}"}, trust_env=False) as http:
        said = {"session_key": key, "image": PNG, "messages": [{"role": "user", "content": "look"}]}
        answer = http.post("/chat", json=said)
        assert answer.status_code == 200, answer.text
        shown = [message["image"] for message in http.get("/sessions/60/messages").json() if message["image"]]
        assert len(shown) == 2
        assert [http.get(url).headers["content-type"] for url in shown] == ["image/png"] * 2
        assert http.delete("/sessions/60").status_code == 200
        assert [http.get(url).status_code for url in shown] == [404, 404]
    gateway_key = f"agent:main:openai-user:adapter-session-{key}".lower()
    until(lambda: gateway_key in openclaw.deleted, 10, "the session's deletion in the gateway")


def test_nobody_is_the_user_without_an_email(old: Served, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """An account without e-mail and password cannot be signed into. What it owns can be claimed for one that can, and
    until then each start says so."""
    for email in ("", "None", "null"):
        assert login(old, email, "").status_code in (401, 422)
    old.stop()
    with caplog.at_level(logging.WARNING, "clawd"):
        db = database.Database(tmp_path / "service.db")
        db.open()
        db.close()
    assert "database.py claim --from-user 1 --to EMAIL" in caplog.text
    for user_id, email, said in (
        (1, "x@example.com", "There is no account with the e-mail x@example.com. Sign up first."),
        (9, "bob@example.com", "There is no user 9"),
        (2, "bob@example.com", "User 2 can log in"),
    ):
        done = claim(tmp_path, user_id, email)
        assert (done.returncode, said in done.stderr) == (2, True), done.stderr
    new = Served(old.settings)
    with new:  # it can be done while the service runs
        done = claim(tmp_path, 1, "BOB@example.com")
        assert (done.returncode, done.stdout) == (0, "1 projects of user 1 now belong to BOB@example.com\n"), (
            done.stderr
        )
        token = login(new, "bob@example.com", "hunter22!").json()["access_token"]
        with httpx.Client(base_url=new.url, headers={"Authorization": f"Bearer {token}"}, trust_env=False) as http:
            assert [project["name"] for project in http.get("/projects").json()] == ["jasd"]
            assert len(http.get("/sessions/59/messages").json()) == 3
    assert rows(tmp_path / "service.db", "SELECT count(*) FROM projects WHERE user_id = 1") == [(0,)]


def claim(directory: Path, user_id: int, email: str) -> "subprocess.CompletedProcess[str]":
    """What an operator types."""
    command = [sys.executable, "database.py", "claim", "--database", str(directory / "service.db")]
    command += ["--from-user", str(user_id), "--to", email]
    return subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True, check=False)


def test_a_claim_before_the_adoption_says_what_to_do(tmp_path: Path) -> None:
    """It needs the new schema, which the first start makes."""
    build(tmp_path / "service.db")
    done = claim(tmp_path, 1, "bob@example.com")
    assert (done.returncode, "Start the service" in done.stderr) == (4, True)


def test_nothing_is_claimed_for_an_account_that_is_closed_too(path: Path) -> None:
    """What nobody can reach is not given to somebody who cannot sign in either."""
    build(path)
    change(path, "INSERT INTO users (id, email) VALUES (4, 'late@example.com')")
    adopt(path)
    with closing(database.connect(path, read_only=False)) as conn:
        with pytest.raises(errors.Invalid, match="no password"):
            sql.claim_projects(conn, 1, "late@example.com")
        assert [project.name for project in sql.select_projects(conn, 1)] == ["jasd"]
