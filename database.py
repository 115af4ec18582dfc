"""Access to the SQLite file from one process: connections, the writer thread, the lock between processes, the lease.

Callers pass a function of `sql`, which takes a connection, to `Database.read` or `Database.write`. `Database` owns
the threads and the transactions. `python database.py` runs the command line of `admin`.
"""

import asyncio
import fcntl
import logging
import os
import queue
import runpy
import sqlite3
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from contextvars import Context, copy_context
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from sqlite3 import Connection
from typing import Concatenate, ParamSpec, TypeVar

import errors
import sql

P = ParamSpec("P")
T = TypeVar("T")

log = logging.getLogger("clawd.database")


def connect(path: Path, *, read_only: bool) -> Connection:
    """Opens a connection and sets the pragmas that the service relies on, in an order in which each takes effect.

    A `read_only` connection refuses to write. All writes of a process go through one connection, because two
    connections that write and checkpoint at the same moment can lose a commit (the "WAL reset bug" of SQLite before
    3.51.3, see sqlite.org).
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
    """An exclusive lock between processes, held during a `with`. The kernel releases it when the process ends."""

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)

    def __enter__(self) -> None:
        fcntl.flock(self._file, fcntl.LOCK_EX)

    def __exit__(self, *_: object) -> None:
        fcntl.flock(self._file, fcntl.LOCK_UN)

    def close(self) -> None:
        """Closes the lock file. The lock cannot be acquired afterwards."""
        os.close(self._file)


class Lease:
    """A unique worker name, and a locked file of that name which proves that the worker's process is alive.

    The kernel releases the lock when the process ends, however it ends, and never before. A slow or suspended
    process is therefore not mistaken for a dead one.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._file = -1
        self.name = ""

    def take(self) -> None:
        """Creates and locks a file with a new name, and removes the files of dead processes."""
        self.name = ""
        self._folder.mkdir(parents=True, exist_ok=True)
        for path in self._folder.iterdir():
            self._lock_is_free(path.name, remove=True)
        while not self.name:
            name = uuid.uuid4().hex
            path = self._folder / name
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            fcntl.flock(self._file, fcntl.LOCK_EX)
            # Before the file was locked, another process may have removed it, as that of a dead process.
            if path.exists():
                os.write(self._file, b"%d" % os.getpid())  # `restore` names this process in its error
                self.name = name
            else:
                os.close(self._file)

    def release(self) -> None:
        """Removes the file and releases its lock."""
        (self._folder / self.name).unlink(missing_ok=True)
        os.close(self._file)

    def alive(self, name: str) -> bool:
        """Returns True if the process that took this name is alive."""
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
    context: Context  # of the caller, so that log lines of the job contain the ids of its request
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
    """The thread with the only writing connection of the process.

    Commits all queued jobs in one transaction, and holds the lock between processes from BEGIN to COMMIT. Each job
    has a savepoint, so that a job that raises is rolled back without the others.
    """

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
        """Ends the thread once it has run every submitted job."""
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
            context = batch[0].context if len(batch) == 1 else Context()  # no ids of one request for several jobs
            failed = context.run(_unavailable, error)
            for job in batch:
                job.error = job.error or failed

    def _run_job(self, job: _Job) -> None:
        self._conn.execute("SAVEPOINT job")
        try:
            job.result = job.context.run(job.run, self._conn)
        except Exception as error:  # noqa: BLE001 - every error is passed on to the caller that awaits the job
            self._conn.execute("ROLLBACK TO job")
            job.error = job.context.run(_unavailable, error) if _is_sqlite_failure(error) else error
        self._conn.execute("RELEASE job")


def _is_sqlite_failure(error: Exception) -> bool:
    """Returns True for a failure of SQLite, False for a violated constraint of the schema and for other errors."""
    return isinstance(error, sqlite3.OperationalError) or type(error) is sqlite3.DatabaseError


def _unavailable(error: Exception) -> errors.Unavailable:
    log.error("database operation failed", exc_info=error)
    failed = errors.Unavailable(
        "The database is unavailable. Try again. If this error persists, the operator should check the service's "
        "log and the disk.",
        code="database_unavailable",
        retry_after=2,
    )
    failed.__cause__ = error
    return failed


class Database:
    """The SQLite file, for one process.

    Short reads run in the caller's thread (6 µs on the open connection), long reads on two other threads, writes on
    the writer thread. Nothing is opened before `open`.
    """

    def __init__(self, path: Path, adoption: "sql.AdoptionContext | None" = None) -> None:
        """`adoption` is passed to the migration of a legacy database."""
        self.path = path
        self._adoption = adoption
        self.lease = Lease(path.with_name(path.name + ".workers"))
        self._local = threading.local()
        self._opened: list[Connection] = []

    def open(self) -> None:
        """Takes a lease, migrates the file, opens it, and starts the threads.

        Raises errors.Unavailable if the file cannot be opened or migrated.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._lock = FileLock(self.path.with_name(self.path.name + ".lock"))
        with ExitStack() as undo:
            undo.callback(self._lock.close)
            with self._lock:
                # `restore` holds this lock while it checks for living processes and replaces the file. Without the
                # lock, a restore could come between the lease and the opening of the file.
                self.lease.take()
                undo.callback(self.lease.release)
                sql.migrate(self.path, self._adoption)
                writing = connect(self.path, read_only=False)
                self._reader = connect(self.path, read_only=True)
            undo.pop_all()
        self._opened = [self._reader, writing]
        self._threads = ThreadPoolExecutor(2, thread_name_prefix="database-reader")
        self._writer = _Writer(writing, self._lock)
        self._writer.start()
        for user_id, projects in self.read(sql.select_unclaimed):
            log.warning(
                "nobody can log in as user %d, who owns %d projects; give them to another account with: "
                "python database.py claim --from-user %d --to EMAIL",
                *(user_id, projects, user_id),
            )

    def close(self) -> None:
        """Ends the threads once they have run every submitted job, closes the connections, and releases the lease."""
        self._writer.stop()
        self._threads.shutdown()
        with self._lock:  # closing makes a checkpoint, and one during a commit can lose it: see `connect`
            for conn in self._opened:
                conn.close()
        self._lock.close()
        self.lease.release()

    async def write(self, job: Callable[Concatenate[Connection, P], T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Runs `job(conn, …)` in a transaction and returns its result once that is committed and on disk.

        Raises what the job raised, after rolling it back, or errors.Unavailable if SQLite failed. Cancelling the
        caller does not cancel the job.
        """
        loop = asyncio.get_running_loop()
        future: asyncio.Future[object] = loop.create_future()
        self._writer.submit(_Job(lambda conn: job(conn, *args, **kwargs), loop, future, copy_context()))
        return await future  # type: ignore[return-value]  # the queue holds futures of `object`; this one has T

    def read(self, job: Callable[Concatenate[Connection, P], T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Runs a short, reading `job(conn, …)` at once, on the event loop's connection. Raises errors.Unavailable."""
        try:
            return job(self._reader, *args, **kwargs)
        except sqlite3.DatabaseError as error:
            raise _unavailable(error) from error

    async def read_aside(self, job: Callable[Concatenate[Connection, P], T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Runs a long, reading `job(conn, …)` on another thread, so that it does not block the event loop.

        Raises errors.Unavailable.
        """
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
        """Returns a number that changes whenever another connection, in any process, has committed."""
        return int(self._reader.execute("PRAGMA data_version").fetchone()[0])

    def write_time(self) -> tuple[int, float]:
        """Returns the number of write transactions, and the seconds that they took in total."""
        return self._writer.commits, self._writer.seconds


if __name__ == "__main__":
    runpy.run_module("admin", run_name="__main__", alter_sys=True)
