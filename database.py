"""Access to the SQLite file from one process: connections, the writer thread, its deadlines.

Callers pass a function of `sql`, which takes a connection, to `Database.read` or `Database.write`. `Database` owns
the threads and the transactions. `python database.py` runs the command line of `admin`.
"""

import asyncio
import ctypes
import logging
import math
import os
import queue
import runpy
import sqlite3
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from contextvars import Context, copy_context
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from sqlite3 import Connection
from typing import Concatenate, ParamSpec, TypeVar

import errors
import sql
from locks import FileLock, Lease, LockHeldError, holders

P = ParamSpec("P")
T = TypeVar("T")

log = logging.getLogger("clawd.database")

OPEN_TIMEOUT = 10.0  # seconds that a starting process waits for the lock
WRITE_TIMEOUT = 5.0  # seconds from the submission of a write to its commit
LAST_CHANCE = 0.5  # seconds at the end of WRITE_TIMEOUT in which this process certainly runs
TRY_FOR = 0.5  # seconds that the writer waits for another process before it looks for new orders
CLOSE_TIMEOUT = 2.0  # seconds that an ending process waits for the lock and for its own writes
LARGEST_BATCH = 256  # writes in one transaction
PROBE_EVERY = 1.0  # seconds between two writes that only test whether the database can be written
PROBE_PATIENCE = 0.25  # seconds that a health check waits for such a write
REPORT_FAILURE_FOR = 5.0  # seconds for which health checks report that a write to the disk failed
FREE_SPACE = 256 * 1024  # bytes; sending a message needs about 50 KB, without images
DISK_ERRORS = (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN)


def connect(path: Path, *, read_only: bool, busy_timeout: float = 5.0) -> Connection:
    """Opens a connection and sets the pragmas that the service relies on, in an order in which each takes effect.

    A `read_only` connection refuses to write. Each waits `busy_timeout` seconds for the locks of other programs. All
    writes of a process go through one connection, because two connections that write and checkpoint at the same
    moment can lose a commit (the "WAL reset bug" of SQLite before 3.51.3, see sqlite.org).
    """
    conn = sqlite3.connect(path, isolation_level=None, check_same_thread=False, cached_statements=256)
    for pragma in (
        f"busy_timeout={busy_timeout * 1000:.0f}",
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


@dataclass(slots=True, eq=False)
class _Job:
    run: Callable[[Connection], object]
    loop: asyncio.AbstractEventLoop
    future: "asyncio.Future[object]"
    context: Context  # of the caller, so that log lines of the job contain the ids of its request
    submitted: float = field(default_factory=time.monotonic)
    timer: asyncio.TimerHandle | None = None
    result: object = None
    error: BaseException | None = None

    def settle(self) -> None:
        if self.timer is not None:
            self.timer.cancel()
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

    Commits all waiting jobs in one transaction, and holds the lock between processes from BEGIN to COMMIT. Each job
    has a savepoint, so that a job that raises is rolled back without the others. A job waits until the transaction
    has begun, and can be withdrawn until then.
    """

    def __init__(self, conn: Connection, lock: FileLock) -> None:
        super().__init__(name="database-writer", daemon=True)
        self._conn = conn
        self._lock = lock
        self._guard = threading.Lock()
        self._waiting: deque[_Job] = deque()
        self._wake: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._unserved_since: float | None = None
        self._ending = self._abandoned = False
        self.failed_at = -math.inf  # monotonic time of the last failure to write to the disk
        self.seconds = 0.0
        self.commits = 0

    def submit(self, job: _Job) -> None:
        """Raises errors.Unavailable after `stop`."""
        with self._guard:
            if self._ending:
                raise _unavailable(RuntimeError("this process has closed the database"))
            self._waiting.append(job)
            if self._unserved_since is None:
                self._unserved_since = job.submitted
        self._wake.put(None)

    def withdraw(self, job: _Job) -> bool:
        """Removes a job that has not begun. Returns False if it has."""
        with self._guard:
            if job not in self._waiting:
                return False
            self._waiting.remove(job)
            return True

    def waited(self) -> float:
        """Returns for how many seconds the oldest write has waited for its commit, also if it was withdrawn."""
        since = self._unserved_since
        return 0.0 if since is None else time.monotonic() - since

    def stop(self, seconds: float) -> bool:
        """Ends the thread once it has run every submitted job. Returns False if that takes longer."""
        with self._guard:
            self._ending = True
        self._wake.put(None)
        self.join(seconds)
        self._abandoned = self.is_alive()
        return not self._abandoned

    def run(self) -> None:
        while not self._abandoned:
            self._wake.get()
            while self._unserved_since is not None and not self._abandoned:
                self._serve()
            if self._ending:
                return

    def _serve(self) -> None:
        """Commits the waiting jobs. Leaves them waiting if another process prevents that for TRY_FOR seconds."""
        started = time.perf_counter()
        batch: list[_Job] = []
        try:
            with self._lock.within(TRY_FOR):
                self._commit(batch)
        except LockHeldError:
            return
        except (sqlite3.Error, OSError) as error:
            if _is_busy(error) and not batch:
                return
            batch = batch or self._take()
            self._fail(batch, error)
        finally:
            self.seconds += time.perf_counter() - started
        with self._guard:
            self._unserved_since = self._waiting[0].submitted if self._waiting else None
        if batch:
            self.commits += 1
            batch[0].loop.call_soon_threadsafe(_settle, batch)

    def _take(self) -> list[_Job]:
        with self._guard:
            return [self._waiting.popleft() for _ in range(min(len(self._waiting), LARGEST_BATCH))]

    def _commit(self, batch: list[_Job]) -> None:
        try:
            self._conn.execute("BEGIN IMMEDIATE")
            batch += self._take()
            for job in batch:
                self._run_job(job)
            self._conn.execute("COMMIT")
        finally:
            if self._conn.in_transaction:
                self._conn.execute("ROLLBACK")

    def _fail(self, batch: Sequence[_Job], error: Exception) -> None:
        self.failed_at = time.monotonic()
        context = batch[0].context if len(batch) == 1 else Context()  # no ids of one request for several jobs
        failed = context.run(_unavailable, error)
        for job in batch:
            job.error = failed  # also of a job that raised, perhaps because of what another job had changed before it

    def _run_job(self, job: _Job) -> None:
        self._conn.execute("SAVEPOINT job")
        try:
            job.result = job.context.run(job.run, self._conn)
        except Exception as error:  # noqa: BLE001 - every error is passed on to the caller that awaits the job
            self._conn.execute("ROLLBACK TO job")
            job.error = error
            if _is_sqlite_failure(error):
                job.error = job.context.run(_unavailable, error)
            if _code(error) in DISK_ERRORS:
                self.failed_at = time.monotonic()
        self._conn.execute("RELEASE job")


def _code(error: Exception) -> int:
    """Returns SQLite's primary error code, 0 for an error that is not SQLite's."""
    return int(getattr(error, "sqlite_errorcode", 0)) & 0xFF


def _is_busy(error: Exception) -> bool:
    """Returns True if another process prevented a transaction."""
    return _code(error) == sqlite3.SQLITE_BUSY


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


def _is_full(folder: Path) -> bool:
    """Returns True if the disk has hardly any space left for this process."""
    disk = os.statvfs(folder)
    free = disk.f_bavail if os.geteuid() else disk.f_bfree  # root may also use what is reserved
    return disk.f_blocks > 0 and free * disk.f_frsize < FREE_SPACE


def close_or_leave(lock: FileLock, connections: Sequence[Connection], seconds: float) -> None:
    """Closes connections under the lock, because closing makes a checkpoint, which next to a commit of another
    process could trigger the bug named in `connect`.

    If another process holds the lock for longer than `seconds`, the connections stay open until the kernel closes
    them with the process, and nothing is lost.
    """
    try:
        with lock.within(seconds):
            for conn in connections:
                conn.close()
    except LockHeldError as error:
        log.warning("leaving the database without closing it: %s", error)
        leave_open(connections)


def leave_open(connections: Sequence[Connection]) -> None:
    """Keeps connections open until the process ends, also while Python deletes all objects at its exit, which would
    close them without the lock."""
    for conn in connections:
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(conn))


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
        self._probe: asyncio.Task[bool] | None = None
        self._probed_at = -math.inf

    def open(self) -> None:
        """Takes a lease, migrates the file, opens it, and starts the threads.

        Raises errors.Unavailable if the file cannot be opened or migrated, or if another process holds the lock for
        longer than OPEN_TIMEOUT seconds.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._lock = FileLock(self._next_to(".lock"))
        with ExitStack() as undo:
            undo.callback(self._lock.close)
            with self._explained_lock():
                # `restore` holds this lock while it checks for living processes and replaces the file. Without the
                # lock, a restore could come between the lease and the opening of the file.
                self.lease.take()
                undo.callback(self.lease.release)
                sql.migrate(self.path, self._adoption)
                writing = connect(self.path, read_only=False, busy_timeout=TRY_FOR)
                self._reader = connect(self.path, read_only=True, busy_timeout=TRY_FOR)
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

    @contextmanager
    def _explained_lock(self) -> Iterator[None]:
        try:
            with self._lock.within(OPEN_TIMEOUT):
                yield
        except LockHeldError as error:
            advice = "If that is a restore or another start, wait until it has ended. Otherwise end that process."
            raise errors.Unavailable(f"{error}. {advice}", code="database_unavailable") from error

    def _next_to(self, suffix: str) -> Path:
        return self.path.with_name(self.path.name + suffix)

    def close(self) -> None:
        """Ends the threads once they have run every submitted job, closes the connections, and releases the lease.

        Waits at most CLOSE_TIMEOUT seconds for other processes; after that it leaves the database as it is.
        """
        deadline = time.monotonic() + CLOSE_TIMEOUT
        ended = self._writer.stop(CLOSE_TIMEOUT)
        self._threads.shutdown()
        if ended:
            close_or_leave(self._lock, self._opened, max(0, deadline - time.monotonic()))
            self._lock.close()
        else:
            log.warning("leaving the database without closing it, because a write has not ended: %s", self._cause())
            leave_open(self._opened)
        self.lease.release()

    async def write(self, job: Callable[Concatenate[Connection, P], T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Runs `job(conn, …)` in a transaction and returns its result once that is committed and on disk.

        Raises what the job raised, after rolling it back, or errors.Unavailable if SQLite failed or the commit takes
        more than WRITE_TIMEOUT seconds. Cancelling the caller does not cancel the job.
        """
        loop = asyncio.get_running_loop()
        future: asyncio.Future[object] = loop.create_future()
        submitted = _Job(lambda conn: job(conn, *args, **kwargs), loop, future, copy_context())
        self._writer.submit(submitted)
        submitted.timer = loop.call_later(WRITE_TIMEOUT - LAST_CHANCE, self._give_last_chance, submitted)
        return await future  # type: ignore[return-value]  # the queue holds futures of `object`; this one has T

    def _give_last_chance(self, job: _Job) -> None:
        # The time may have passed while this process was suspended or its event loop was busy.
        job.timer = job.loop.call_later(LAST_CHANCE, self._give_up, job)

    def _give_up(self, job: _Job) -> None:
        """Fails a job that has waited for WRITE_TIMEOUT seconds. It does not run if it has not begun."""
        state = "was not begun" if self._writer.withdraw(job) else "has not ended, but may still be committed,"
        # A copy of the context, because the writer thread may be running the job in the context itself.
        job.error = job.context.copy().run(
            _unavailable, TimeoutError(f"a write {state} within {WRITE_TIMEOUT:g} s: {self._cause()}")
        )
        job.settle()

    def _cause(self) -> str:
        """Returns why writes wait."""
        who = holders(self._next_to(".lock"), self.path, self._next_to("-shm"))
        return f"{who} has locked the database" if who else "no other process has locked it, the disk may be stalled"

    async def trouble(self) -> str:
        """Returns why the database cannot be written now, or an empty text.

        Commits a small transaction to find out, at most once in PROBE_EVERY seconds, and waits PROBE_PATIENCE seconds
        for it. A write that takes longer is reported once it has waited for WRITE_TIMEOUT seconds.
        """
        if self._probe is None or (self._probe.done() and time.monotonic() - self._probed_at >= PROBE_EVERY):
            self._probed_at = time.monotonic()
            self._probe = asyncio.create_task(self._try_to_write())
        await asyncio.wait([self._probe], timeout=PROBE_PATIENCE)
        waited = self.waited()
        if waited >= WRITE_TIMEOUT:
            return f"A write has been waiting for {waited:.0f} s, because {self._cause()}."
        if time.monotonic() - self._writer.failed_at < REPORT_FAILURE_FOR:
            return "A write to the disk failed. Check the disk space; the log contains the error."
        if self._probe.done() and not self._probe.result():
            return "A test write failed; the log contains the error."
        return "The disk with the database is full." if _is_full(self.path.parent) else ""

    async def _try_to_write(self) -> bool:
        try:
            await self.write(sql.rewrite_version)
        except errors.Unavailable:
            return False
        return True

    def waited(self) -> float:
        """Returns for how many seconds the oldest write has been waiting for its commit."""
        return self._writer.waited()

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
