"""SQLite: connections, transactions, migrations, rows, and every SQL statement as a function of a connection.

The caller brings a function that takes a connection; `Database` owns the threads and the transactions.
As a program it is `admin`: `python database.py --help`.
"""

import asyncio
import fcntl
import json
import logging
import os
import queue
import runpy
import sqlite3
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from contextvars import Context, copy_context
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from sqlite3 import Connection
from typing import Concatenate, Literal, NamedTuple, ParamSpec, TypeVar

import errors
import sql
from clock import now

P = ParamSpec("P")
T = TypeVar("T")
Status = Literal["queued", "streaming", "complete", "stopped", "interrupted", "failed", "empty"]

log = logging.getLogger("clawd.database")

WAITING_TURNS = 10  # contract: at most 10 turns wait in a session


# --- connections and transactions ---------------------------------------------------------------------


def connect(path: Path, *, read_only: bool) -> Connection:
    """A connection with every pragma that the service relies on, in the order that makes them take hold.

    `read_only` connections cannot write: all writes of a process go through one connection, since two that
    write and checkpoint at once can lose a commit (sqlite.org, "WAL reset bug", before 3.51.3).
    """
    conn = sqlite3.connect(path, isolation_level=None, check_same_thread=False, cached_statements=256)
    for pragma in (
        "busy_timeout=5000",
        "journal_mode=WAL",
        "synchronous=FULL",
        "foreign_keys=ON",
        "journal_size_limit=67108864",
        "temp_store=MEMORY",
        "trusted_schema=OFF",
        f"query_only={'ON' if read_only else 'OFF'}",
    ):
        conn.execute(f"PRAGMA {pragma}")
    return conn


class FileLock:
    """An exclusive lock between processes, held in a `with`. The kernel frees it when its process ends."""

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)

    def __enter__(self) -> None:
        fcntl.flock(self._file, fcntl.LOCK_EX)

    def __exit__(self, *_: object) -> None:
        fcntl.flock(self._file, fcntl.LOCK_UN)

    def close(self) -> None:
        """Gives the file back; the lock cannot be taken any more."""
        os.close(self._file)


class Lease:
    """A worker's name that is taken exactly as long as its process lives.

    It is a locked file: the kernel lets go of it the moment the process ends, however it ends, and never
    while it lives, so a process that was merely slow or suspended is not taken for dead.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._file = -1
        self.name = ""

    def take(self) -> None:
        """Takes a new name, and removes the files of the dead."""
        self.name = ""
        self._folder.mkdir(parents=True, exist_ok=True)
        for path in self._folder.iterdir():
            self._lock_is_free(path.name, remove=True)
        while not self.name:
            name = uuid.uuid4().hex
            path = self._folder / name
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            fcntl.flock(self._file, fcntl.LOCK_EX)
            if path.exists():  # nobody took the file for a dead one's before it was locked
                os.write(self._file, b"%d" % os.getpid())  # for who has to be told what runs
                self.name = name
            else:
                os.close(self._file)

    def release(self) -> None:
        """Gives the name up in order."""
        (self._folder / self.name).unlink(missing_ok=True)
        os.close(self._file)

    def alive(self, name: str) -> bool:
        """Whether the process that took this name still lives."""
        return not self._lock_is_free(name, remove=False)

    def _lock_is_free(self, name: str, *, remove: bool) -> bool:
        path = self._folder / name
        try:
            file = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            return True
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        else:
            if remove:
                path.unlink(missing_ok=True)
            return True
        finally:
            os.close(file)


@dataclass(slots=True)
class _Job:
    run: Callable[[Connection], object]
    loop: asyncio.AbstractEventLoop
    future: "asyncio.Future[object]"
    context: Context  # of who waits for it: what is logged on the way says whose it is
    result: object = None
    error: BaseException | None = None

    def settle(self) -> None:
        if self.future.done():
            return
        if self.error is not None:
            self.future.set_exception(self.error)
        else:
            self.future.set_result(self.result)


def _settle(jobs: Sequence[_Job]) -> None:
    for job in jobs:
        job.settle()


class _Writer(threading.Thread):
    """The one connection that writes: it commits together what has queued up, holding the lock between
    processes over BEGIN … COMMIT. A job that raises undoes itself alone."""

    def __init__(self, conn: Connection, lock: FileLock) -> None:
        super().__init__(name="database-writer", daemon=True)
        self._conn = conn
        self._lock = lock
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self.seconds = 0.0
        self.commits = 0

    def submit(self, job: _Job) -> None:
        self._jobs.put(job)

    def stop(self) -> None:
        """Ends the thread after what has been submitted."""
        self._jobs.put(None)
        self.join()

    def run(self) -> None:
        last = False
        while not last:
            batch, last = self._next_batch()
            if not batch:
                continue
            started = time.perf_counter()
            self._commit(batch)
            self.seconds += time.perf_counter() - started
            self.commits += 1
            batch[0].loop.call_soon_threadsafe(_settle, batch)

    def _next_batch(self) -> tuple[list[_Job], bool]:
        batch: list[_Job] = []
        job = self._jobs.get()
        while job is not None:
            batch.append(job)
            if len(batch) == 256 or self._jobs.empty():
                return batch, False
            job = self._jobs.get()
        return batch, True

    def _commit(self, batch: list[_Job]) -> None:
        try:
            with self._lock:
                try:
                    self._conn.execute("BEGIN IMMEDIATE")
                    for job in batch:
                        self._run_job(job)
                    self._conn.execute("COMMIT")
                finally:
                    if self._conn.in_transaction:
                        self._conn.execute("ROLLBACK")
        except (sqlite3.Error, OSError) as error:
            context = batch[0].context if len(batch) == 1 else Context()  # the failure of several is nobody's own
            failed = context.run(_unavailable, error)
            for job in batch:
                job.error = job.error or failed

    def _run_job(self, job: _Job) -> None:
        self._conn.execute("SAVEPOINT job")
        try:
            job.result = job.context.run(job.run, self._conn)
        except Exception as error:  # noqa: BLE001 - whatever it is, it belongs to the one who waits for this job
            self._conn.execute("ROLLBACK TO job")
            job.error = job.context.run(_unavailable, error) if _is_unusable(error) else error
        self._conn.execute("RELEASE job")


def _is_unusable(error: Exception) -> bool:
    """Whether SQLite could not do its work, in contrast to a rule of the schema that was broken."""
    return isinstance(error, sqlite3.OperationalError) or type(error) is sqlite3.DatabaseError


def _unavailable(error: Exception) -> errors.Unavailable:
    log.error("the database failed", exc_info=error)
    failed = errors.Unavailable(
        "The database cannot be used right now. Try again; if it goes on, the operator should look at the "
        "service's log and at the disk.",
        code="database_unavailable",
        retry_after=2,
    )
    failed.__cause__ = error
    return failed


class Database:
    """One SQLite file as one process uses it.

    Small reads run where they are (6 µs on a kept connection), large ones on two threads, writes on the
    writer. Nothing is opened before `open`.
    """

    def __init__(self, path: Path, adoption: "sql.AdoptionContext | None" = None) -> None:
        """`adoption` is what the migration of a legacy database needs of the service."""
        self.path = path
        self._adoption = adoption
        self.lease = Lease(path.with_name(path.name + ".workers"))
        self._local = threading.local()
        self._opened: list[Connection] = []

    def open(self) -> None:
        """Opens, migrates, and starts the threads. Raises errors.Unavailable where the file cannot be used."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._lock = FileLock(self.path.with_name(self.path.name + ".lock"))
        with ExitStack() as undo:
            undo.callback(self._lock.close)
            with self._lock:
                self.lease.take()  # a `restore` holds the lock while it looks who lives and replaces the file
                undo.callback(self.lease.release)
                sql.migrate(self.path, self._adoption)
                writing = connect(self.path, read_only=False)
                self._reader = connect(self.path, read_only=True)
            undo.pop_all()
        self._opened = [self._reader, writing]
        self._threads = ThreadPoolExecutor(2, thread_name_prefix="database-reader")
        self._writer = _Writer(writing, self._lock)
        self._writer.start()
        for user_id, projects in self.read(select_unclaimed):
            log.warning(
                "nobody can sign in as user %d, who owns %d projects; give them to an account that can: "
                "python database.py claim --from-user %d --to EMAIL",
                *(user_id, projects, user_id),
            )

    def close(self) -> None:
        """Ends the threads after what was submitted and closes every connection."""
        self._writer.stop()
        self._threads.shutdown()
        with self._lock:  # the last connection to close makes a checkpoint
            for conn in self._opened:
                conn.close()
        self._lock.close()
        self.lease.release()

    async def write(self, job: Callable[Concatenate[Connection, P], T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Runs `job(conn, …)` in a transaction and returns its result once that is committed and on disk.

        Raises what the job raised (it alone is undone), errors.Unavailable where SQLite failed. A caller
        that is cancelled meanwhile does not undo the job.
        """
        loop = asyncio.get_running_loop()
        future: asyncio.Future[object] = loop.create_future()
        self._writer.submit(_Job(lambda conn: job(conn, *args, **kwargs), loop, future, copy_context()))
        return await future  # type: ignore[return-value]  # the job's own type, through the queue

    def read(self, job: Callable[Concatenate[Connection, P], T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Runs a small reading `job(conn, …)` at once, on the event loop's own connection."""
        try:
            return job(self._reader, *args, **kwargs)
        except sqlite3.DatabaseError as error:
            raise _unavailable(error) from error

    async def read_aside(self, job: Callable[Concatenate[Connection, P], T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Runs a large reading `job(conn, …)` on a thread, so that it holds nobody up."""
        loop, context = asyncio.get_running_loop(), copy_context()
        read = partial(self._read_in_thread, job, *args, **kwargs)
        return await loop.run_in_executor(self._threads, context.run, read)

    def _read_in_thread(self, job: Callable[Concatenate[Connection, P], T], *args: P.args, **kwargs: P.kwargs) -> T:
        conn: Connection | None = getattr(self._local, "conn", None)
        if conn is None:
            conn = self._local.conn = connect(self.path, read_only=True)
            self._opened.append(conn)
        try:
            return job(conn, *args, **kwargs)
        except sqlite3.DatabaseError as error:
            raise _unavailable(error) from error

    def version(self) -> int:
        """A number that changes whenever anybody, in whichever process, has committed."""
        return int(self._reader.execute("PRAGMA data_version").fetchone()[0])

    def write_time(self) -> tuple[int, float]:
        """How many transactions were committed, and the seconds they took together."""
        return self._writer.commits, self._writer.seconds


# --- rows ---------------------------------------------------------------------------------------------


class User(NamedTuple):
    id: int
    email: str | None
    name: str | None
    created_at: str
    password: str | None
    token_version: int


class Project(NamedTuple):
    id: int
    user_id: int
    name: str
    description: str | None
    project_path: str
    created_at: str


class Session(NamedTuple):
    id: int
    project_id: int
    session_key: str
    label: str | None
    archived: int
    scope: str
    channel: str
    agent_id: str
    created_at: str
    last_used_at: str | None


class Message(NamedTuple):
    id: int
    role: str
    content: str
    status: Status
    error: str | None
    usage: str | None
    created_at: str


class Reply(NamedTuple):
    """A reply as it stands; `owner` is the worker that makes it. Replies of old have no turn: its columns are
    None."""

    id: int
    message_id: int | None
    session_id: int
    content: str
    status: Status
    error: str | None
    usage: str | None
    created_at: str
    owner: str | None


class Turn(NamedTuple):
    """All that is needed to ask the gateway for a reply."""

    reply_id: int
    message_id: int
    session_id: int
    session_key: str
    agent_id: str
    user_id: int
    project_name: str
    project_description: str | None
    project_path: str
    text: str
    run_id: str | None


class Begun(NamedTuple):
    """A turn that was begun now, or (`existing`) one begun before with the same key."""

    reply_id: int
    message_id: int
    session_id: int
    existing: bool


class Errand(NamedTuple):
    """One entry of the outbox."""

    id: int
    kind: Literal["gateway_session", "images", "folder"]
    target: str
    attempts: int


_USER = "id, email, name, created_at, password, token_version"
_PROJECT = "p.id, p.user_id, p.name, p.description, p.project_path, p.created_at"
_SESSION = (
    "s.id, s.project_id, s.session_key, s.label, s.archived, s.scope, s.channel, s.agent_id, s.created_at, "
    "s.last_used_at"
)
_MESSAGE = "m.id, m.role, m.content, m.status, m.error, m.usage, m.created_at"
_OWNED_SESSION = "sessions s JOIN projects p ON p.id = s.project_id AND p.user_id = :user_id"


# --- users --------------------------------------------------------------------------------------------


def insert_user(conn: Connection, email: str, name: str | None, password: str) -> User:
    """A new account. Raises errors.Conflict where the e-mail has one."""
    row = conn.execute(
        "INSERT INTO users (email, email_key, name, password, created_at) VALUES (?, ?, ?, ?, ?) "
        f"ON CONFLICT (email_key) DO NOTHING RETURNING {_USER}",
        (email, sql.email_key(email), name, password, now()),
    ).fetchone()
    if row is None:
        raise errors.Conflict("There is an account with this e-mail already: log in instead.", code="email_taken")
    return User(*row)


def select_user_by_email(conn: Connection, email: str) -> User | None:
    """The account of an e-mail, whatever its case; its exact spelling wins where two differ by case alone."""
    row = conn.execute(
        f"SELECT {_USER} FROM users WHERE email_key IN (:key, :exact) ORDER BY email = :exact DESC LIMIT 1",
        {"key": sql.email_key(email), "exact": email},
    ).fetchone()
    return row and User(*row)


def select_user_by_token(conn: Connection, user_id: int, token_version: int, jti: str) -> User | None:
    """The account that a token speaks for, unless the token or all of its age were revoked."""
    row = conn.execute(
        f"SELECT {_USER} FROM users WHERE id = ? AND token_version = ? "
        "AND NOT EXISTS (SELECT 1 FROM revoked_tokens WHERE jti = ?)",
        (user_id, token_version, jti),
    ).fetchone()
    return row and User(*row)


def update_password_hash(conn: Connection, user_id: int, old: str, new: str) -> None:
    """A better hash of the same password; tokens stay valid. Nothing, where the password changed meanwhile."""
    conn.execute("UPDATE users SET password = ? WHERE id = ? AND password = ?", (new, user_id, old))


def update_password(conn: Connection, user_id: int, password: str) -> User | None:
    """A new password; every token made before is refused from now on."""
    row = conn.execute(
        f"UPDATE users SET password = ?, token_version = token_version + 1 WHERE id = ? RETURNING {_USER}",
        (password, user_id),
    ).fetchone()
    return row and User(*row)


def insert_revoked_token(conn: Connection, jti: str, expires_at: int) -> None:
    """Refuses a token until it would have expired (unix seconds); forgets those that have."""
    conn.execute("DELETE FROM revoked_tokens WHERE expires_at < ?", (int(time.time()),))
    conn.execute("INSERT OR IGNORE INTO revoked_tokens (jti, expires_at) VALUES (?, ?)", (jti, expires_at))


def delete_user(conn: Connection, user_id: int) -> None:
    """The account and every row it owns; what lies outside the database goes into the outbox."""
    for (project_id,) in conn.execute("SELECT id FROM projects WHERE user_id = ?", (user_id,)).fetchall():
        delete_project(conn, user_id, project_id)
    conn.execute("DELETE FROM users WHERE id = ?", (user_id,))


def select_unclaimed(conn: Connection) -> list[tuple[int, int]]:
    """The accounts that nobody can sign into and that own projects: (user, how many)."""
    return conn.execute(
        f"SELECT u.id, count(*) FROM users u JOIN projects p ON p.user_id = u.id WHERE {_CLOSED} GROUP BY u.id"
    ).fetchall()


_CLOSED = "(coalesce(u.email, '') = '' OR coalesce(u.password, '') = '')"


def claim_projects(conn: Connection, user_id: int, email: str) -> int:
    """Gives the projects of an account that nobody can sign into to the account of an e-mail; how many.

    Raises errors.Invalid where there is no such account, somebody can sign into it, or nobody into the heir's.
    """
    row = conn.execute(f"SELECT {_CLOSED} FROM users u WHERE u.id = ?", (user_id,)).fetchone()
    heir = select_user_by_email(conn, email)
    if row is None or heir is None:
        missing = f"a user {user_id}" if row is None else f"an account with the e-mail {email}: sign up first"
        raise errors.Invalid(f"There is not {missing}.")
    if not row[0] or heir.id == user_id:
        raise errors.Invalid(f"Somebody can sign in as user {user_id}: what is theirs cannot be claimed.")
    if not heir.password:
        raise errors.Invalid(f"Nobody can sign in as {email} either: it has no password.")
    return conn.execute("UPDATE projects SET user_id = ? WHERE user_id = ?", (heir.id, user_id)).rowcount


# --- projects -----------------------------------------------------------------------------------------


def insert_project(
    conn: Connection, user_id: int, name: str, description: str | None, project_path: str, errand_id: int
) -> Project:
    """A project whose folder exists; the errand that would have removed an abandoned folder is called off.

    Raises errors.NotFound where the account is gone meanwhile.
    """
    row = conn.execute(
        "INSERT INTO projects (user_id, name, description, project_path, created_at, updated_at) "
        f"SELECT id, ?, ?, ?, ?, ? FROM users WHERE id = ? RETURNING {_PROJECT.replace('p.', '')}",
        (name, description, project_path, now(), now(), user_id),
    ).fetchone()
    if row is None:
        raise errors.NotFound("The account was deleted meanwhile.", code="project_not_found")
    conn.execute("DELETE FROM outbox WHERE id = ?", (errand_id,))
    return Project(*row)


def select_projects(conn: Connection, user_id: int) -> list[Project]:
    """All projects of a user, newest first."""
    rows = conn.execute(f"SELECT {_PROJECT} FROM projects p WHERE p.user_id = ? ORDER BY p.id DESC", (user_id,))
    return [Project(*row) for row in rows]


def select_project(conn: Connection, user_id: int, project_id: int) -> Project:
    """One project. Raises errors.NotFound."""
    row = conn.execute(
        f"SELECT {_PROJECT} FROM projects p WHERE p.id = ? AND p.user_id = ?", (project_id, user_id)
    ).fetchone()
    if row is None:
        raise errors.NotFound("There is no such project.", code="project_not_found")
    return Project(*row)


def update_project(
    conn: Connection, user_id: int, project_id: int, name: str | None, description: str | None
) -> Project:
    """Changes what is not None. Raises errors.NotFound."""
    conn.execute(
        "UPDATE projects SET name = coalesce(?, name), description = coalesce(?, description), updated_at = ? "
        "WHERE id = ? AND user_id = ?",
        (name, description, now(), project_id, user_id),
    )
    return select_project(conn, user_id, project_id)


def update_project_path(conn: Connection, project_id: int, project_path: str, errand_id: int) -> str:
    """Gives a project of old that has no folder this one, and calls off the errand that would remove it; returns
    the folder that it has then. Raises errors.NotFound where the project is gone."""
    row = conn.execute("SELECT project_path FROM projects WHERE id = ?", (project_id,)).fetchone()
    if row is None:
        raise errors.NotFound("There is no such project.", code="project_not_found")
    if row[0]:
        return str(row[0])
    conn.execute("UPDATE projects SET project_path = ? WHERE id = ?", (project_path, project_id))
    conn.execute("DELETE FROM outbox WHERE id = ?", (errand_id,))
    return project_path


def delete_project(conn: Connection, user_id: int, project_id: int) -> None:
    """A project with its sessions and messages; its folder goes into the outbox. Raises errors.NotFound."""
    project = select_project(conn, user_id, project_id)
    for session in conn.execute("SELECT id FROM sessions WHERE project_id = ?", (project_id,)).fetchall():
        delete_session(conn, user_id, session[0])
    if project.project_path:
        insert_errand(conn, "folder", project.project_path)
    conn.execute("DELETE FROM projects WHERE id = ?", (project_id,))


# --- sessions -----------------------------------------------------------------------------------------


def insert_session(conn: Connection, user_id: int, project_id: int, label: str | None, agent_id: str) -> Session:
    """A session in a project of the user's. Raises errors.NotFound."""
    select_project(conn, user_id, project_id)
    session_id = conn.execute(
        "INSERT INTO sessions (project_id, session_key, label, agent_id, created_at) VALUES (?, ?, ?, ?, ?)",
        (project_id, str(uuid.uuid4()), label, agent_id, now()),
    ).lastrowid
    return select_session(conn, user_id, session_id or 0)


def select_sessions(conn: Connection, user_id: int, project_id: int, archived: bool) -> list[Session]:
    """The sessions of a project, newest first. Raises errors.NotFound."""
    select_project(conn, user_id, project_id)
    rows = conn.execute(
        f"SELECT {_SESSION} FROM sessions s WHERE s.project_id = ? AND s.archived = ? ORDER BY s.id DESC",
        (project_id, int(archived)),
    )
    return [Session(*row) for row in rows]


def select_session(conn: Connection, user_id: int, session_id: int, project_id: int | None = None) -> Session:
    """One session (of that project, where one is given). Raises errors.NotFound."""
    row = conn.execute(
        f"SELECT {_SESSION} FROM {_OWNED_SESSION} WHERE s.id = :id AND s.project_id = coalesce(:project_id, p.id)",
        {"user_id": user_id, "id": session_id, "project_id": project_id},
    ).fetchone()
    if row is None:
        raise _no_session()
    return Session(*row)


def _no_session() -> errors.NotFound:
    return errors.NotFound("There is no such session, or it is archived.", code="session_not_found")


def update_session(
    conn: Connection, user_id: int, session_id: int, label: str | None, archived: bool | None
) -> Session:
    """Changes what is not None. Raises errors.NotFound."""
    select_session(conn, user_id, session_id)
    conn.execute(
        "UPDATE sessions SET label = coalesce(?, label), archived = coalesce(?, archived) WHERE id = ?",
        (label, archived, session_id),
    )
    return select_session(conn, user_id, session_id)


def delete_session(conn: Connection, user_id: int, session_id: int) -> None:
    """A session with its messages; its images and its session in the gateway go into the outbox.

    Raises errors.NotFound.
    """
    session = select_session(conn, user_id, session_id)
    insert_errand(conn, "images", session.session_key)
    insert_errand(conn, "gateway_session", f"{session.agent_id} {session.session_key}")
    conn.execute("DELETE FROM sessions WHERE id = ?", (session_id,))


def select_session_ids(conn: Connection, user_id: int, project_id: int | None = None) -> list[int]:
    """The sessions of a user, or of one of the user's projects."""
    rows = conn.execute(
        f"SELECT s.id FROM {_OWNED_SESSION} WHERE s.project_id = coalesce(:project_id, p.id)",
        {"user_id": user_id, "project_id": project_id},
    )
    return [row[0] for row in rows]


# --- messages -----------------------------------------------------------------------------------------


def select_messages(
    conn: Connection, user_id: int, session_id: int, limit: int | None, before: int | None
) -> list[Message]:
    """The newest `limit` messages older than message `before`, oldest first. Raises errors.NotFound."""
    select_session(conn, user_id, session_id)
    rows = conn.execute(
        f"SELECT {_MESSAGE} FROM messages m WHERE m.session_id = ? AND m.id < ? ORDER BY m.id DESC LIMIT ?",
        (session_id, sql.MAX_ID if before is None else before, -1 if limit is None else limit),
    ).fetchall()
    return [Message(*row) for row in reversed(rows)]


def select_images(conn: Connection, first: int, last: int, session_id: int) -> dict[int, list[tuple[int, str]]]:
    """The images of a session's messages from one id to another: message id → [(image id, file)]."""
    images: dict[int, list[tuple[int, str]]] = {}
    for message_id, image_id, file in conn.execute(
        "SELECT i.message_id, i.id, i.file FROM messages m JOIN message_images i ON i.message_id = m.id "
        "WHERE m.session_id = ? AND m.id BETWEEN ? AND ? ORDER BY i.id",
        (session_id, first, last),
    ):
        images.setdefault(message_id, []).append((image_id, file))
    return images


def select_image_files(conn: Connection, message_id: int) -> list[str]:
    """The files of a message's images, in their order."""
    rows = conn.execute("SELECT file FROM message_images WHERE message_id = ? ORDER BY id", (message_id,))
    return [row[0] for row in rows]


def select_image_file(conn: Connection, image_id: int) -> str:
    """The file of an image. Raises errors.NotFound."""
    row = conn.execute("SELECT file FROM message_images WHERE id = ?", (image_id,)).fetchone()
    if row is None:
        raise errors.NotFound("There is no such image.", code="image_not_found")
    return str(row[0])


def insert_images(conn: Connection, message_id: int, files: Iterable[str]) -> None:
    """Images of a message, in their order."""
    conn.executemany(
        "INSERT INTO message_images (message_id, file) VALUES (?, ?)", ((message_id, file) for file in files)
    )


# --- turns --------------------------------------------------------------------------------------------


def begin_turn(
    conn: Connection, user_id: int, session_key: str, text: str, label: str, digest: str, key: str | None, owner: str
) -> Begun:
    """Stores a user's message and the empty row of its reply, `streaming` or, behind others, `queued`.

    `digest` stands for what is said; with an idempotency `key` used before, the turn begun then comes back.
    Raises errors.NotFound, errors.Unprocessable (the key with another digest), errors.TooMany.
    """
    session_id = check_chat_session(conn, user_id, session_key)
    if key is not None and (begun := _select_begun(conn, session_id, key, digest)):
        return begun
    live = _count_live(conn, session_id)
    at = now()
    conn.execute(
        "UPDATE sessions SET last_used_at = ?, label = coalesce(nullif(label, ''), ?) WHERE id = ?",
        (at, label or None, session_id),
    )
    insert = "INSERT INTO messages (session_id, role, content, status, created_at) VALUES (?, ?, ?, ?, ?)"
    message_id = conn.execute(insert, (session_id, "user", text, "complete", at)).lastrowid or 0
    status = "queued" if live else "streaming"
    reply_id = conn.execute(insert, (session_id, "assistant", "", status, at)).lastrowid or 0
    conn.execute(
        "INSERT INTO turns (reply_id, message_id, session_id, idempotency_key, digest, owner) "
        "VALUES (?, ?, ?, ?, ?, ?)",
        (reply_id, message_id, session_id, key, digest, owner),
    )
    return Begun(reply_id, message_id, session_id, existing=False)


def check_chat_session(conn: Connection, user_id: int, session_key: str) -> int:
    """The id of a session that the user may chat in. Raises errors.NotFound."""
    row = conn.execute(
        f"SELECT s.id FROM {_OWNED_SESSION} WHERE s.session_key = :key AND s.archived = 0",
        {"user_id": user_id, "key": session_key},
    ).fetchone()
    if row is None:
        raise _no_session()
    return int(row[0])


def _select_begun(conn: Connection, session_id: int, key: str, digest: str) -> Begun | None:
    row = conn.execute(
        "SELECT reply_id, message_id, digest FROM turns WHERE session_id = ? AND idempotency_key = ?",
        (session_id, key),
    ).fetchone()
    if row is None:
        return None
    if row[2] != digest:
        raise errors.Unprocessable(
            "This Idempotency-Key was used in this session for another message: use a new key for a new message.",
            code="idempotency_key_reused",
        )
    return Begun(row[0], row[1], session_id, existing=True)


def _count_live(conn: Connection, session_id: int) -> int:
    running = conn.execute(
        "SELECT count(*) FROM messages WHERE session_id = ? AND status = 'streaming'", (session_id,)
    ).fetchone()[0]
    waiting = conn.execute(
        "SELECT count(*) FROM messages WHERE session_id = ? AND status = 'queued'", (session_id,)
    ).fetchone()[0]
    if waiting >= WAITING_TURNS:
        raise errors.TooMany(
            f"{WAITING_TURNS} messages wait in this session already: wait for a reply, or stop the session.",
            code="session_busy",
            retry_after=5,
        )
    return int(running + waiting)


def select_reply(conn: Connection, reply_id: int) -> Reply | None:
    """A turn's reply as it stands."""
    row = conn.execute(
        "SELECT m.id, t.message_id, m.session_id, m.content, m.status, m.error, m.usage, m.created_at, t.owner "
        "FROM messages m LEFT JOIN turns t ON t.reply_id = m.id WHERE m.id = ? AND m.role = 'assistant'",
        (reply_id,),
    ).fetchone()
    return row and Reply(*row)


def select_owned_message(conn: Connection, user_id: int, session_id: int, message_id: int) -> Message:
    """One message of a session of the user's. Raises errors.NotFound."""
    row = conn.execute(
        f"SELECT {_MESSAGE} FROM {_OWNED_SESSION} JOIN messages m ON m.session_id = s.id "
        "WHERE m.id = :id AND s.id = :session_id",
        {"user_id": user_id, "session_id": session_id, "id": message_id},
    ).fetchone()
    if row is None:
        raise errors.NotFound("There is no such message.", code="message_not_found")
    return Message(*row)


def select_turn(conn: Connection, reply_id: int) -> Turn | None:
    """What the gateway must be told for this reply."""
    row = conn.execute(
        "SELECT t.reply_id, t.message_id, t.session_id, s.session_key, s.agent_id, p.user_id, p.name, "
        "p.description, p.project_path, m.content, t.run_id FROM turns t JOIN messages m ON m.id = t.message_id "
        "JOIN sessions s ON s.id = t.session_id JOIN projects p ON p.id = s.project_id WHERE t.reply_id = ?",
        (reply_id,),
    ).fetchone()
    return row and Turn(*row)


_NEXT_IN_LINE = (
    "m.status = 'queued' AND NOT EXISTS (SELECT 1 FROM messages x WHERE x.session_id = m.session_id "
    "AND x.status = 'streaming') AND NOT EXISTS (SELECT 1 FROM messages x WHERE x.session_id = m.session_id "
    "AND x.status = 'queued' AND x.id < m.id)"
)


def select_claimable(conn: Connection, owner: str) -> list[int]:
    """The waiting replies that are next in their session and that this worker may run."""
    rows = conn.execute(
        f"SELECT m.id FROM messages m JOIN turns t ON t.reply_id = m.id WHERE {_NEXT_IN_LINE} "
        "AND (t.owner = ? OR t.owner IS NULL)",
        (owner,),
    )
    return [row[0] for row in rows]


def claim_turns(conn: Connection, owner: str) -> list[int]:
    """Makes this worker the one that runs whatever it may; returns those replies, now `streaming`."""
    claimed = select_claimable(conn, owner)
    for reply_id in claimed:
        conn.execute("UPDATE messages SET status = 'streaming' WHERE id = ?", (reply_id,))
        conn.execute("UPDATE turns SET owner = ? WHERE reply_id = ?", (owner, reply_id))
    return claimed


_RUNNING_HERE = (
    "id = :id AND status = 'streaming' AND EXISTS (SELECT 1 FROM turns WHERE reply_id = :id AND owner = :owner)"
)


def update_replies(conn: Connection, owner: str, replies: Sequence[tuple[int, str, str | None]]) -> list[int]:
    """Stores the text so far of (reply, text, gateway's run id); returns the replies that are not this
    worker's any more."""
    lost = []
    for reply_id, text, run_id in replies:
        values = {"id": reply_id, "owner": owner, "content": text}
        if conn.execute(f"UPDATE messages SET content = :content WHERE {_RUNNING_HERE}", values).rowcount == 0:
            lost.append(reply_id)
        elif run_id is not None:
            conn.execute(
                "UPDATE turns SET run_id = ? WHERE reply_id = ? AND run_id IS NOT ?", (run_id, reply_id, run_id)
            )
    return lost


def finish_turn(
    conn: Connection,
    reply_id: int,
    owner: str,
    status: Status,
    text: str,
    run_id: str | None,
    usage: dict[str, int] | None,
    error: dict[str, object] | None,
) -> bool:
    """The end of a turn, in one write. False where it is not this worker's any more, and nothing changed."""
    done = conn.execute(
        f"UPDATE messages SET status = :status, content = :content, usage = :usage, error = :error "
        f"WHERE {_RUNNING_HERE}",
        {
            "id": reply_id,
            "owner": owner,
            "status": status,
            "content": text,
            "usage": usage and json.dumps(usage),
            "error": error and json.dumps(error),
        },
    ).rowcount
    conn.execute("UPDATE turns SET run_id = coalesce(?, run_id) WHERE reply_id = ?", (run_id, reply_id))
    return done == 1


class Halted(NamedTuple):
    """What a stop found: replies that run and will end as `stopped`, and waiting ones that were dropped."""

    running: list[int]
    dropped: list[int]


def request_stop(conn: Connection, session_ids: Sequence[int]) -> Halted:
    """Asks the worker of each running turn of these sessions to stop it; drops the waiting ones."""
    running: list[int] = []
    dropped: list[int] = []
    for session_id in session_ids:
        running += _ids(conn, "SELECT id FROM messages WHERE session_id = ? AND status = 'streaming'", session_id)
        dropped += _ids(conn, "SELECT id FROM messages WHERE session_id = ? AND status = 'queued'", session_id)
    conn.executemany("UPDATE turns SET stop_requested = 1 WHERE reply_id = ?", ((i,) for i in running))
    conn.executemany("UPDATE messages SET status = 'stopped' WHERE id = ?", ((i,) for i in dropped))
    return Halted(running, dropped)


def _ids(conn: Connection, sql: str, *values: object) -> list[int]:
    return [row[0] for row in conn.execute(sql, values)]


def archive_sessions(conn: Connection, session_ids: Sequence[int]) -> None:
    """Lets no new turn begin in these sessions."""
    conn.executemany("UPDATE sessions SET archived = 1 WHERE id = ?", ((i,) for i in session_ids))


def select_stops(conn: Connection, owner: str) -> list[int]:
    """The replies that this worker runs and was asked to stop."""
    return _ids(
        conn,
        "SELECT m.id FROM messages m JOIN turns t ON t.reply_id = m.id WHERE m.status = 'streaming' "
        "AND t.stop_requested = 1 AND t.owner = ?",
        owner,
    )


def count_turns(conn: Connection) -> tuple[int, int]:
    """How many turns run and how many wait, in every process."""
    running = conn.execute("SELECT count(*) FROM messages WHERE status = 'streaming'").fetchone()
    waiting = conn.execute("SELECT count(*) FROM messages WHERE status = 'queued'").fetchone()
    return running[0], waiting[0]


def select_owners(conn: Connection) -> list[str]:
    """The workers that run turns, have them waiting, or are about an errand."""
    rows = conn.execute(
        "SELECT t.owner FROM messages m JOIN turns t ON t.reply_id = m.id WHERE m.status = 'streaming' "
        "UNION SELECT t.owner FROM messages m JOIN turns t ON t.reply_id = m.id WHERE m.status = 'queued' "
        "UNION SELECT owner FROM outbox"
    )
    return [row[0] for row in rows if row[0] is not None]


def inherit(conn: Connection, dead: str, heir: str) -> list[int]:
    """Makes `heir` the owner of the replies that a dead worker left running, and returns them; what it had
    waiting and its errands are up for grabs."""
    conn.execute("UPDATE outbox SET owner = NULL WHERE owner = ?", (dead,))
    conn.execute(
        "UPDATE turns SET owner = NULL WHERE owner = ? AND reply_id IN "
        "(SELECT id FROM messages WHERE status = 'queued')",
        (dead,),
    )
    left = _ids(
        conn,
        "SELECT m.id FROM messages m JOIN turns t ON t.reply_id = m.id WHERE m.status = 'streaming' AND t.owner = ?",
        dead,
    )
    conn.executemany("UPDATE turns SET owner = ? WHERE reply_id = ?", ((heir, reply_id) for reply_id in left))
    return left


def release_waiting(conn: Connection, owner: str) -> None:
    """Gives the turns that wait for this worker to whoever lives."""
    conn.execute(
        "UPDATE turns SET owner = NULL WHERE owner = ? AND reply_id IN "
        "(SELECT id FROM messages WHERE status = 'queued')",
        (owner,),
    )


def select_known_runs(conn: Connection, session_id: int) -> set[str]:
    """The gateway's run ids of a session's turns."""
    rows = conn.execute("SELECT run_id FROM turns WHERE session_id = ? AND run_id IS NOT NULL", (session_id,))
    return {row[0] for row in rows}


# --- outbox -------------------------------------------------------------------------------------------


def insert_errand(conn: Connection, kind: str, target: str, owner: str | None = None) -> int:
    """Something to be done outside the database. With an owner it waits until that worker calls it off or
    dies."""
    return (
        conn.execute(
            "INSERT INTO outbox (kind, target, owner, due_at) VALUES (?, ?, ?, ?)",
            (kind, target, owner, time.time()),
        ).lastrowid
        or 0
    )


def claim_errands(conn: Connection, owner: str, at: float) -> list[Errand]:
    """Takes all errands that are due at that time (unix seconds) and nobody's."""
    rows = conn.execute(
        "UPDATE outbox SET owner = ?, attempts = attempts + 1 WHERE owner IS NULL AND due_at <= ? "
        "RETURNING id, kind, target, attempts",
        (owner, at),
    ).fetchall()
    return sorted(Errand(*row) for row in rows)


def has_due_errands(conn: Connection, at: float) -> bool:
    """Whether there is an errand to claim at that time (unix seconds)."""
    return bool(
        conn.execute("SELECT EXISTS (SELECT 1 FROM outbox WHERE owner IS NULL AND due_at <= ?)", (at,)).fetchone()[0]
    )


def delete_errand(conn: Connection, errand_id: int) -> None:
    """An errand that is done."""
    conn.execute("DELETE FROM outbox WHERE id = ?", (errand_id,))


def postpone_errand(conn: Connection, errand_id: int, due_at: float) -> None:
    """An errand to be tried again at that time (unix seconds), by anybody."""
    conn.execute("UPDATE outbox SET owner = NULL, due_at = ? WHERE id = ?", (due_at, errand_id))


def check(conn: Connection) -> None:
    """Raises sqlite3.Error where the database cannot be read."""
    conn.execute("SELECT count(*) FROM (SELECT 1 FROM users LIMIT 1)").fetchone()


if __name__ == "__main__":
    runpy.run_module("admin", run_name="__main__", alter_sys=True)
