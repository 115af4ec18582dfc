"""`database.py` on real files: transactions, constraints of the schema, leases, migrations, concurrent processes."""

import asyncio
import itertools
import multiprocessing
import os
import random
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from sqlite3 import Connection

import pytest

import database
import errors
import sql
from database import Database
from locks import Lease

from .service import CHECKOUT, using


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """The path of a database that does not exist yet."""
    return tmp_path / "some.db"


@pytest.fixture
def conn(path: Path) -> Iterator[Connection]:
    """A connection to a new database that contains a session."""
    sql.migrate(path)
    conn = database.connect(path, read_only=False)
    user = sql.insert_user(conn, "Ada@example.com", None, "hash")
    project = sql.insert_project(conn, user.id, "P", None, "/p", 0)
    sql.insert_session(conn, user.id, project.id, None, "main")
    yield conn
    conn.close()


def begin(conn: Connection, key: str | None = None, owner: str = "me") -> sql.Begun:
    """Begins a turn in the session."""
    session = sql.select_session(conn, 1, 1)
    return sql.begin_turn(conn, sql.NewTurn(1, session.session_key, "Hi", "Hi", "digest", key, owner))


# --- transactions -------------------------------------------------------------------------------------


def test_a_failing_job_is_rolled_back_alone(path: Path) -> None:
    """When a job raises, its changes are rolled back; the other jobs of the same transaction are committed."""

    def fail(conn: Connection) -> None:
        sql.insert_user(conn, "bad@example.com", None, "h")
        raise errors.Conflict("no")

    async def work(db: Database) -> list[object]:
        good = [db.write(sql.insert_user, f"{number}@example.com", None, "h") for number in range(20)]
        results = await asyncio.gather(*good[:10], db.write(fail), *good[10:], return_exceptions=True)
        assert [type(result) for result in results] == [sql.User] * 10 + [errors.Conflict] + [sql.User] * 10
        return db.read(lambda conn: conn.execute("SELECT count(*) FROM users").fetchone())

    assert using(path, work) == (20,)


def test_a_reader_cannot_write(path: Path) -> None:
    """The reading connections refuse to write, so that only one connection writes and checkpoints."""

    async def work(db: Database) -> None:
        with pytest.raises(errors.Unavailable):
            db.read(sql.insert_user, "a@example.com", None, "h")
        with pytest.raises(errors.Unavailable):
            await db.read_aside(sql.insert_user, "a@example.com", None, "h")

    using(path, work)


def test_a_write_waits_for_another_process(path: Path) -> None:
    """A write that another process blocks with a transaction waits, and succeeds afterwards."""

    async def work(db: Database) -> None:
        script = (
            "import sqlite3, sys, time; c = sqlite3.connect(sys.argv[1], isolation_level=None); "
            "c.execute('BEGIN IMMEDIATE'); print(flush=True); time.sleep(1); c.execute('COMMIT')"
        )
        other = await asyncio.create_subprocess_exec(sys.executable, "-c", script, path, stdout=subprocess.PIPE)
        assert other.stdout is not None
        await other.stdout.readline()
        user = await db.write(sql.insert_user, "a@example.com", None, "h")
        assert db.read(sql.select_user_by_email, "A@EXAMPLE.COM") == user

    using(path, work)


def test_a_full_disk_rolls_back_the_transaction(path: Path) -> None:
    """When SQLite cannot write, the jobs raise errors.Unavailable and store nothing; later jobs succeed."""

    async def work(db: Database) -> None:
        await db.write(lambda conn: conn.execute("PRAGMA max_page_count=60"))
        big = [db.write(sql.insert_user, f"{number}@example.com", "x" * 100_000, "h") for number in range(9)]
        results = await asyncio.gather(*big, return_exceptions=True)
        assert any(isinstance(result, errors.Unavailable) for result in results)
        stored = db.read(lambda conn: conn.execute("SELECT count(*) FROM users").fetchone()[0])
        assert stored == sum(isinstance(result, sql.User) for result in results)
        assert await db.write(sql.insert_user, "small@example.com", None, "h")

    using(path, work)


# --- constraints of the schema ------------------------------------------------------------------------


def test_one_reply_runs_in_a_session(conn: Connection) -> None:
    """The database refuses a second running reply in a session."""
    begin(conn)
    second = begin(conn)
    with pytest.raises(sqlite3.IntegrityError):
        conn.execute("UPDATE messages SET status = 'streaming' WHERE id = ?", (second.reply_id,))


def test_a_key_makes_one_turn(conn: Connection) -> None:
    """Beginning a turn with a used key returns the earlier turn; the database refuses a second row with the key."""
    first, other = begin(conn, "key"), begin(conn)
    assert begin(conn, "key") == first._replace(existing=True)
    with pytest.raises(sqlite3.IntegrityError, match="idempotency_key"):
        conn.execute("UPDATE turns SET idempotency_key = 'key' WHERE reply_id = ?", (other.reply_id,))


ALLOWED = {
    "queued": ("streaming", "stopped"),
    "streaming": ("complete", "stopped", "interrupted", "failed", "empty"),
}
STATUSES = ("queued", "streaming", "complete", "stopped", "interrupted", "failed", "empty")


@pytest.mark.parametrize("new", STATUSES)
@pytest.mark.parametrize("old", STATUSES)
def test_other_changes_of_status_are_refused(conn: Connection, old: str, new: str) -> None:
    """The database accepts each allowed change of a status, and refuses every other one."""
    insert = "INSERT INTO messages (id, session_id, role, content, status, created_at) VALUES (9, 1, 'a', '', ?, '')"
    conn.execute(insert, (old,))
    change = ("UPDATE messages SET status = ? WHERE id = 9", (new,))
    if new == old or new in ALLOWED.get(old, ()):
        conn.execute(*change)
    else:
        with pytest.raises(sqlite3.IntegrityError, match="cannot go"):
            conn.execute(*change)


def test_only_a_running_reply_changes(conn: Connection) -> None:
    """The database refuses to change the text of a message that is final or queued."""
    begun = begin(conn)
    for message_id in (begun.message_id, begin(conn).reply_id):
        with pytest.raises(sqlite3.IntegrityError, match="only a running reply"):
            conn.execute("UPDATE messages SET content = 'longer than before' WHERE id = ?", (message_id,))
    conn.execute("UPDATE messages SET content = 'x' WHERE id = ?", (begun.reply_id,))


def test_a_worker_cannot_write_to_the_turn_of_another(conn: Connection) -> None:
    """A worker that does not own a turn can neither store its text nor end it."""
    begun = begin(conn, owner="another")
    assert sql.append_text(conn, "me", begun.reply_id, 0, "text") is None
    assert not sql.finish_turn(conn, begun.reply_id, "me", sql.Ending("complete", "text", None, None, None, None))
    reply = sql.select_reply(conn, begun.reply_id)
    assert reply is not None
    assert (reply.status, sql.read_text(conn, reply.id)) == ("streaming", [])


# --- leases -------------------------------------------------------------------------------------------


def _hold(folder: Path, name: "multiprocessing.Queue[str]") -> None:
    lease = Lease(folder)
    lease.take()
    name.put(lease.name)
    time.sleep(60)


def test_a_lease_lives_as_long_as_its_process(tmp_path: Path) -> None:
    """A suspended process keeps its lease; a killed process loses it at once."""
    mine, context = Lease(tmp_path), multiprocessing.get_context("spawn")
    mine.take()
    names: multiprocessing.Queue[str] = context.Queue()
    process = context.Process(target=_hold, args=(tmp_path, names))
    process.start()
    name = names.get(timeout=30)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGSTOP)
    assert mine.alive(name)
    assert mine.alive(mine.name)
    process.kill()
    process.join()
    assert not mine.alive(name)
    Lease(tmp_path).take()
    assert not (tmp_path / name).exists()
    mine.release()
    assert not mine.alive(mine.name)


# --- migrations ---------------------------------------------------------------------------------------


def test_a_new_database_has_the_newest_schema(path: Path) -> None:
    """The migrations create a new file, without a copy; opening it again changes nothing."""
    sql.migrate(path)
    before = path.read_bytes()
    sql.migrate(path)
    assert path.read_bytes() == before
    with sqlite3.connect(path) as conn:
        assert conn.execute("PRAGMA user_version").fetchone()[0] == len(sql.MIGRATIONS)
        assert conn.execute("PRAGMA integrity_check").fetchone()[0] == "ok"
    assert list(path.parent.glob("*.backup")) == []


@pytest.mark.parametrize("content", [b"this is not a database, just a text that is long enough to look like one" * 20])
def test_a_file_that_is_not_a_database_is_refused(path: Path, content: bytes) -> None:
    """Opening a file that is not a database fails with an error that says so, and leaves the file unchanged."""
    path.write_bytes(content)
    with pytest.raises(errors.Unavailable, match=r"Cannot open .* as a database"):
        Database(path).open()
    assert path.read_bytes() == content


def test_a_newer_database_is_refused(path: Path) -> None:
    """Opening a file with a newer schema fails with an error that says what to do, and leaves the file unchanged."""
    sql.migrate(path)
    with sqlite3.connect(path) as conn:
        conn.execute("PRAGMA user_version=999")
    conn.close()
    before = path.read_bytes()
    with pytest.raises(errors.Unavailable, match="Start the newer code"):
        Database(path).open()
    assert path.read_bytes() == before


def test_processes_that_start_at_once_make_one_database(path: Path) -> None:
    """Four processes that create the same database at the same moment all succeed."""
    script = (
        "import pathlib, sys; sys.path.insert(0, sys.argv[2]); import database; "
        "db = database.Database(pathlib.Path(sys.argv[1])); db.open(); db.close()"
    )
    starts = [subprocess.Popen([sys.executable, "-c", script, path, CHECKOUT]) for _ in range(4)]
    assert [start.wait(60) for start in starts] == [0] * 4
    with sqlite3.connect(path) as conn:
        assert conn.execute("PRAGMA user_version").fetchone()[0] == len(sql.MIGRATIONS)


# --- two processes, kill -9 ---------------------------------------------------------------------------


class Writers:
    """Processes of tests/writer.py, each with a name, that write to one database."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._pids: dict[str, int] = {}
        command = [sys.executable, "-m", "tests.writer"]
        self._forker = subprocess.Popen(command, cwd=CHECKOUT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def start(self, name: str) -> str:
        """Starts a process, and returns its name."""
        assert self._forker.stdin is not None and self._forker.stdout is not None
        file = self._path.parent / name
        file.write_bytes(bytes(8))
        self._forker.stdin.write(f"{self._path}\t{name}\t{file}\n")
        self._forker.stdin.flush()
        self._pids[name] = int(self._forker.stdout.readline())
        return name

    def acknowledged(self, name: str) -> int:
        """Returns the number of users whose commits were acknowledged to the process."""
        return int.from_bytes((self._path.parent / name).read_bytes(), "little")

    def kill(self, name: str) -> int:
        """Sends SIGKILL to the process, and returns the number of users acknowledged until then."""
        pid = self._pids.pop(name)
        os.kill(pid, signal.SIGKILL)
        while Path(f"/proc/{pid}").exists():
            time.sleep(0.0005)
        return self.acknowledged(name)

    def stop(self) -> None:
        """Kills all processes."""
        for name in list(self._pids):
            self.kill(name)
        self._forker.communicate()


@pytest.mark.parametrize(
    ("part", "kills"), [(0, 40), *(pytest.param(part, 200, marks=pytest.mark.slow) for part in range(1, 6))]
)
def test_kills_while_two_processes_write_lose_no_commit(path: Path, part: int, kills: int) -> None:
    """Kills one of two writing processes again and again, 1,000 times with --slow.

    Each time, every commit that was acknowledged to it is in the database, and `integrity_check` passes.
    """
    sql.migrate(path)
    writers, chance, numbers = Writers(path), random.Random(part), itertools.count()
    stored = "SELECT count(*) FROM users WHERE email_key > ? AND email_key < ?"
    with closing(database.connect(path, read_only=True)) as conn:
        names = [writers.start(f"w{next(numbers)}") for _ in range(2)]
        for _ in range(kills):
            victim = names.pop(chance.randrange(2))
            while not writers.acknowledged(victim):
                time.sleep(0.001)
            time.sleep(chance.uniform(0, 0.01))
            count = writers.kill(victim)
            names.append(writers.start(f"w{next(numbers)}"))
            assert conn.execute(stored, (f"{victim}-", f"{victim}.")).fetchone()[0] >= count > 0
            assert conn.execute("PRAGMA integrity_check").fetchone()[0] == "ok"
        writers.stop()
