"""The migration of a legacy database: it loses nothing, and a failure or a kill leaves the old or the new file."""

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
    """Returns the rows of a query."""
    with closing(sqlite3.connect(path)) as conn:
        return conn.execute(query, values).fetchall()


def change(path: Path, *statements: str) -> None:
    """Runs statements on a legacy database."""
    with closing(sqlite3.connect(path)) as conn:
        for statement in statements:
            conn.execute(statement)
        conn.commit()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """The path of a legacy database that does not exist yet."""
    return tmp_path / "clawdbot_adapter.db"


# --- nothing is lost ----------------------------------------------------------------------------------


@pytest.mark.parametrize("messages", [0, 1, 2, 10, 1_000, 100_000, pytest.param(1_000_000, marks=pytest.mark.slow)])
def test_every_row_and_text_is_there(path: Path, messages: int) -> None:
    """The migration keeps every row and every text, which a SHA-256 over all texts proves.

    Each row is in its table or in the orphaned_ table, each image is a file with the same bytes or still in its
    column, and the integrity and foreign key checks pass.
    """
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


def test_values_that_do_not_fit_are_kept(path: Path) -> None:
    """The table `legacy_values` gets unknown columns, unreadable times and undecodable texts.

    Unknown tables and views remain.
    """
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
    decoded = {number: text for number, text in rows(path, every) if number in (1000, 1002)}
    assert decoded == {1000: "\ufffd(AB\ufffd", 1002: "Hé"}
    assert rows(path, "SELECT count(*) FROM unrelated_settings") == [(0,)]
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
    """Every readable format of a time is converted to the same instant in ISO 8601."""
    build(path)
    with closing(sqlite3.connect(path)) as conn:
        conn.execute("UPDATE sessions SET created_at = ?, last_used_at = ? WHERE id = 58", (old, old))
        conn.commit()
    adopt(path)
    assert rows(path, "SELECT created_at, last_used_at FROM sessions WHERE id = 58") == [(new, new)]


@pytest.mark.parametrize("old", ["now", "12:30", "2026-13-40", -(2**63), 10**17])
def test_an_unreadable_time_is_kept(path: Path, old: object) -> None:
    """An unreadable time goes to `legacy_values`. A column that requires a time gets the time of the migration."""
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


def test_names_of_tables_and_columns_in_another_case(path: Path) -> None:
    """The migration ignores the case of table and column names, as SQLite does, also for the sequences of ids."""
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


def test_an_unknown_table_stays(path: Path) -> None:
    """A table of another program remains with its trigger. Its broken references do not prevent migration or backup."""
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


def test_undecodable_keys_stay_distinct(path: Path) -> None:
    """Two session keys or e-mails that are not UTF-8 do not become the same text; their bytes are kept."""
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


def test_a_relative_path_is_resolved_against_the_checkout(path: Path) -> None:
    """A relative project path becomes absolute, so that it does not depend on the directory of the process."""
    build(path)
    change(path, "UPDATE projects SET project_path = 'projects/garden' WHERE id = 35")
    adopt(path)
    assert rows(path, "SELECT project_path FROM projects WHERE id = 35") == [(str(CHECKOUT / "projects/garden"),)]
    assert rows(path, "SELECT row_id, value FROM legacy_values") == [(35, "projects/garden")]


def test_columns_that_an_older_file_lacks(path: Path) -> None:
    """A legacy database that lacks columns is migrated too; the columns get their defaults."""
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
    """New rows do not get the ids of rows that were deleted before the migration."""
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


def test_the_log_states_the_numbers_of_rows(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The log names the copy, the dropped triggers, and how many rows and images of each kind there were."""
    build(path)
    with caplog.at_level(logging.INFO, "clawd"):
        adopt(path)
    (copy,) = path.parent.glob("*.v0.backup")
    assert copy.name in caplog.text
    assert "migrated 3 users, 2 projects, 3 sessions, 7 messages" in caplog.text
    assert "orphaned_… tables: 0 projects, 0 sessions, 2 messages" in caplog.text
    assert "stored 2 images as files, left 1 values that are not images in" in caplog.text
    assert "dropping the trigger update_projects_timestamp on projects" in caplog.text


def test_the_copy_has_everything_and_is_made_once(path: Path) -> None:
    """The copy has every text and the old version. Migrating the same file again makes no second copy."""
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


def test_a_second_start_changes_nothing(path: Path) -> None:
    """Opening a migrated database again leaves every byte unchanged."""
    build(path, 100)
    adopt(path)
    before = path.read_bytes()
    adopt(path)
    assert path.read_bytes() == before


# --- refused, and killed ------------------------------------------------------------------------------


def damage(content: bytes) -> bytes:
    """Overwrites two pages in the middle of a file."""
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
def test_an_unusable_file_is_refused_and_unchanged(path: Path, spoil: Callable[[bytes], bytes], said: str) -> None:
    """A file that is damaged, not a database, or newer is refused with an error that says what to do.

    The file remains unchanged, and no other file is created.
    """
    build(path, 300)
    content = spoil(path.read_bytes())
    path.write_bytes(content)
    with pytest.raises(errors.Unavailable, match=said) as refused:
        adopt(path)
    assert "restore" in str(refused.value)
    assert path.read_bytes() == content
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("spoil", ["PRAGMA user_version=99", "CREATE TABLE turns (x)"])
def test_a_refused_file_keeps_its_wal(path: Path, spoil: str) -> None:
    """A newer file with a -wal from a crash is refused, and neither file is changed.

    A failing migration is rolled back.
    """
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


def test_images_that_cannot_be_stored_leave_the_old_file(path: Path) -> None:
    """If the images cannot be stored, the migration fails and leaves the database unchanged."""
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
    """Starts a process that migrates a legacy database, and returns when it begins."""
    process = subprocess.Popen([sys.executable, "-c", ADOPT, path, CHECKOUT], stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    return process


@pytest.mark.parametrize("kills", [4, pytest.param(30, marks=pytest.mark.slow)])
def test_a_kill_leaves_the_old_or_the_new_file(path: Path, kills: int) -> None:
    """After kill -9 at a random moment, the file is unchanged or migrated; the next start completes the migration."""
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
    assert left.count(0) > kills // 5 - 1, "too few kills came before the end of the migration"


def test_two_starts_at_once_migrate_once(path: Path) -> None:
    """Two processes that open a legacy database at the same moment migrate it once and make one copy."""
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
    """The service, on a migrated legacy database."""
    build(tmp_path / "service.db")
    return serve()


def login(served: Served, email: str, password: str) -> httpx.Response:
    """Returns the response to a login."""
    return httpx.post(f"{served.url}/auth/login", json={"email": email, "password": password}, trust_env=False)


@pytest.mark.parametrize("email", OLD_PASSWORD)
def test_a_legacy_user_logs_in(old: Served, tmp_path: Path, email: str) -> None:
    """The legacy password is accepted, and rehashed with argon2id at the first login. Other passwords are refused."""
    assert login(old, email, "wrong password").status_code == 401
    assert login(old, email.swapcase(), OLD_PASSWORD[email]).status_code == 200
    (hashed,) = rows(tmp_path / "service.db", "SELECT password FROM users WHERE email = ?", email)[0]
    assert hashed.startswith("$argon2id$")
    assert login(old, email, OLD_PASSWORD[email]).status_code == 200
    assert login(old, email, hashed).status_code == 401


def test_a_legacy_user_finds_everything(old: Served) -> None:
    """A legacy user gets the same projects, archived sessions and messages as before, and images as URLs.

    Writing a file creates the folder of a project that had none.
    """
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
    """Concurrent writes of the first files of a legacy project without a folder put all files into one new folder."""
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
def test_a_legacy_session_with_an_odd_key_continues(
    tmp_path: Path, serve: Callable[..., Served], openclaw: StandIn, key: str
) -> None:
    """A session whose key is not a lower-case UUID keeps its images, accepts new ones, and can be deleted.

    The gateway is asked to delete the session under its unchanged key.
    """
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


def test_projects_of_an_account_without_email_can_be_claimed(
    old: Served, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Nobody can log in to an account without e-mail and password. Each start logs a warning if it owns projects.

    The command `claim` gives the projects to an account that can log in.
    """
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
    with new:  # `claim` works while the service runs
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
    """Runs the command `claim`."""
    command = [sys.executable, "database.py", "claim", "--database", str(directory / "service.db")]
    command += ["--from-user", str(user_id), "--to", email]
    return subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True, check=False)


def test_a_claim_before_the_migration_is_refused(tmp_path: Path) -> None:
    """The error says to start the service, which migrates the database."""
    build(tmp_path / "service.db")
    done = claim(tmp_path, 1, "bob@example.com")
    assert (done.returncode, "Start the service" in done.stderr) == (4, True)


def test_nothing_is_claimed_for_an_account_without_a_password(path: Path) -> None:
    """Projects are not given to an account to which nobody can log in."""
    build(path)
    change(path, "INSERT INTO users (id, email) VALUES (4, 'late@example.com')")
    adopt(path)
    with closing(database.connect(path, read_only=False)) as conn:
        with pytest.raises(errors.Invalid, match="no password"):
            sql.claim_projects(conn, 1, "late@example.com")
        assert [project.name for project in sql.select_projects(conn, 1, 10, sql.MAX_ID)] == ["jasd"]
