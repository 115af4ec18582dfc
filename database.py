"""One SQLite file as one process uses it: connections, the one writer, the lock between processes, the lease.

The caller brings a function of `sql`, which takes a connection; `Database` owns the threads and the transactions.
As a program it is `admin`: `python database.py --help`.
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
        for user_id, projects in self.read(sql.select_unclaimed):
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


if __name__ == "__main__":
    runpy.run_module("admin", run_name="__main__", alter_sys=True)
