"""The locks between the processes that use one database: one around each transaction, and the lease of each worker.

Both are `flock` locks on files next to the database. The kernel releases them when a process ends, however it ends.
Every wait for such a lock has a deadline, because the process that holds it may be suspended.
"""

import fcntl
import logging
import os
import queue
import struct
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

log = logging.getLogger("clawd.database")

LOCK_TIMEOUT = 5.0  # seconds that a command waits for a lock
LINE_TIMEOUT = 0.1  # seconds that a process waits for its place in line, because the first in line may be suspended
SKIP_LINE_FOR = 1.0  # seconds after such a wait in which it waits for no place
LINE_PAUSE = 0.0001  # seconds between two attempts at a place in line
LOOK_EVERY = 0.5  # seconds between two looks, while waiting, at whether the file was removed or replaced
RENEW_EVERY = 1.0  # seconds between two checks of a lease's own file
MISSING_FOR = 5.0  # seconds after which a worker whose file is missing counts as dead
FORGET_AFTER = 15.0  # seconds between two looks at a missing file after which the time starts again
# `struct flock` of fcntl(2): type, whence, start, length and pid, for the first byte of a file.
_FIRST_BYTE = "hhqqi4x"
_TAKE = struct.pack(_FIRST_BYTE, fcntl.F_WRLCK, os.SEEK_SET, 0, 1, 0)
_LEAVE = struct.pack(_FIRST_BYTE, fcntl.F_UNLCK, os.SEEK_SET, 0, 1, 0)


class LockHeldError(TimeoutError):
    """Another process held a lock until the deadline. The message names that process."""


def holders(*paths: Path) -> str:
    """Returns the other processes that have locked one of these files exclusively, for a log line or an error.

    `/proc/locks` lists them by the inode of the file. The result is empty if there is none.
    """
    inodes = {str(path.stat().st_ino) for path in paths if path.exists()}
    pids = set()
    for line in Path("/proc/locks").read_text().splitlines():
        _, *fields = line.split()  # for example: 1: FLOCK ADVISORY WRITE 1234 fe:00:5678 0 EOF; a waiter has "->"
        if fields[0] != "->" and fields[2] == "WRITE" and fields[4].rpartition(":")[2] in inodes:
            pids.add(int(fields[3]))
    known = sorted(pid for pid in pids - {os.getpid()} if pid > 0)  # 0 and -1 stand for processes that are not known
    return " and ".join(f"process {pid} ({_describe(pid)})" for pid in known)


def _describe(pid: int) -> str:
    """Returns the name of a process, and whether it is suspended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text(errors="replace").splitlines()
    except OSError:
        return "which has ended or cannot be read"
    status = dict(line.split(":\t", 1) for line in lines if ":\t" in line)
    suspended = status.get("State", "")[:1] in ("T", "t")
    return f"{status.get('Name', 'unknown')}{', suspended' if suspended else ''}"


class _Waiter(threading.Thread):
    """Waits for the `flock` of an open file in a thread of its own, because `flock` has no timeout.

    The kernel wakes it as soon as the lock is free. With repeated attempts instead, two processes that commit without
    a pause would together make half as many commits.
    """

    def __init__(self, file: int) -> None:
        super().__init__(name="database-lock", daemon=True)
        self._file = file
        self._guard = threading.Lock()
        self._requests: queue.SimpleQueue[bool] = queue.SimpleQueue()
        self._granted: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._wanted = False
        self.is_waiting = False

    def wait(self, seconds: float) -> bool:
        """Returns True once the file is locked, False after this many seconds."""
        with self._guard:
            self._wanted = True
            if not self.is_waiting:
                self.is_waiting = True
                self._requests.put(True)
        try:
            self._granted.get(timeout=seconds)
        except queue.Empty:
            with self._guard:
                self._wanted = False
                return not self.is_waiting and self._granted.get() is None
        return True

    def end(self) -> None:
        """Closes the file once it is not waited for any more, and ends the thread."""
        self._requests.put(False)

    def run(self) -> None:
        while self._requests.get():
            fcntl.flock(self._file, fcntl.LOCK_EX)
            with self._guard:
                self.is_waiting = False
                if self._wanted:
                    self._granted.put(None)
                else:
                    fcntl.flock(self._file, fcntl.LOCK_UN)
        os.close(self._file)


class FileLock:
    """An exclusive lock between processes, held during a `with`. It belongs to one thread at a time.

    Before each attempt at the `flock`, a process takes its place in line, which is a lock on the first byte of the
    same file, and leaves it once it holds the `flock`. A process that commits without a pause therefore comes after
    the one that waits. Mutual exclusion depends on the `flock` alone, which older versions of this service know.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._name = str(path)
        self._skip_line_until = 0.0
        self._waiter: _Waiter | None = None
        self._open()

    def _open(self) -> None:
        self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)

    def acquire(self, seconds: float = LOCK_TIMEOUT) -> None:
        """Acquires the lock. Raises LockHeldError if another process still holds it after this many seconds."""
        deadline = time.monotonic() + seconds
        in_line = self._try_line() or self._wait_in_line()
        try:
            while not self._lock(min(max(deadline - time.monotonic(), 0), LOOK_EVERY)):
                if time.monotonic() >= deadline:
                    who = holders(self.path) or "a process that is not known"
                    raise LockHeldError(f"{self.path} has been locked for {seconds:g} s by {who}")
        finally:
            if in_line:
                fcntl.fcntl(self._file, fcntl.F_OFD_SETLK, _LEAVE)

    def _wait_in_line(self) -> bool:
        """Takes the place in line, unless another process keeps it for too long. Returns True if it has it."""
        now = time.monotonic()
        if now < self._skip_line_until:
            return False
        while time.monotonic() < now + LINE_TIMEOUT:
            time.sleep(LINE_PAUSE)
            if self._try_line():
                return True
        self._skip_line_until = time.monotonic() + SKIP_LINE_FOR
        return False

    def _try_line(self) -> bool:
        try:
            fcntl.fcntl(self._file, fcntl.F_OFD_SETLK, _TAKE)
        except BlockingIOError:
            return False
        return True

    def _lock(self, seconds: float) -> bool:
        """Returns True once the file that has the name is locked, False after this many seconds."""
        locked = not (self._waiter and self._waiter.is_waiting) and _try_flock(self._file, fcntl.LOCK_EX)
        if not locked:
            if self._waiter is None:
                self._waiter = _Waiter(self._file)
                self._waiter.start()
            locked = self._waiter.wait(seconds)
        if _is_at(self._file, self._name):
            return locked
        self.close()  # somebody removed or replaced the file, and others lock the one that has the name now
        self._open()
        return False

    def release(self) -> None:
        """Releases the lock."""
        fcntl.flock(self._file, fcntl.LOCK_UN)

    @contextmanager
    def within(self, seconds: float) -> Iterator[None]:
        """Holds the lock during a `with`, acquired as `acquire` does."""
        self.acquire(seconds)
        try:
            yield
        finally:
            self.release()

    def __enter__(self) -> None:
        self.acquire()

    def __exit__(self, *_: object) -> None:
        self.release()

    def close(self) -> None:
        """Closes the lock file, which releases the lock."""
        if self._waiter is None:
            os.close(self._file)
        else:
            self._waiter.end()  # the thread may be using the file
            self._waiter = None


def _try_flock(file: int, kind: int) -> bool:
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_at(file: int, path: str | Path) -> bool:
    """Returns True if the open file is the one at this path."""
    try:
        there = os.stat(path)  # noqa: PTH116 - a Path takes longer, and each commit does this
    except FileNotFoundError:
        return False
    mine = os.fstat(file)
    return (there.st_ino, there.st_dev) == (mine.st_ino, mine.st_dev)


class Lease:
    """A unique worker name, and a locked file of that name which proves that the worker's process is alive.

    The kernel releases the lock when the process ends, however it ends, and never before. A slow or suspended
    process is therefore not mistaken for a dead one. A thread restores the file if somebody removes it, and other
    processes give it the time to do so.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._file = -1
        self._dead: set[str] = set()  # whose files this process removed
        self._missing: dict[str, tuple[float, float]] = {}  # name → first and last time its file was found missing
        self.name = ""

    def take(self) -> None:
        """Creates and locks a file with a new name, and removes the files of dead processes."""
        self._folder.mkdir(parents=True, exist_ok=True)
        for path in self._folder.iterdir():
            if self._look(path.name) == "unlocked":
                self._dead.add(path.name)
                path.unlink(missing_ok=True)
        self.name = uuid.uuid4().hex
        self._file = self._create()
        self._released = threading.Event()
        self._thread = threading.Thread(target=self._renew_until_released, name="database-lease", daemon=True)
        self._thread.start()

    def release(self) -> None:
        """Removes the file and releases its lock."""
        self._released.set()
        self._thread.join(timeout=RENEW_EVERY)  # not for ever, because the disk may be stalled
        self._dead.add(self.name)
        (self._folder / self.name).unlink(missing_ok=True)
        os.close(self._file)

    def alive(self, name: str) -> bool:
        """Returns True if the process that took this name is alive.

        A process whose file exists unlocked is dead. A process whose file is missing counts as alive for MISSING_FOR
        seconds, in which it restores the file if it is alive.
        """
        if name in self._dead:
            return False
        if name == self.name:
            return True
        state = self._look(name)
        if state != "missing":
            self._missing.pop(name, None)
            return state == "locked"
        now = time.monotonic()
        first, last = self._missing.get(name, (now, now))
        if now - last > FORGET_AFTER:  # this process was suspended, and perhaps the other one with it
            first = now
        self._missing[name] = first, now
        return now - first < MISSING_FOR

    def processes(self) -> list[str]:
        """Returns the ids of the processes that hold a lease in this folder, an empty text for an older version's."""
        return [pid for path in self._folder.glob("*") if (pid := self._read_if_locked(path)) is not None]

    def _read_if_locked(self, path: Path) -> str | None:
        try:
            return path.read_text() if self._look(path.name) == "locked" else None
        except FileNotFoundError:  # its process has ended meanwhile
            return None

    def _look(self, name: str) -> Literal["locked", "unlocked", "missing"]:
        try:
            file = os.open(self._folder / name, os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            return "missing"
        try:
            # Shared, so that a process that is suspended right here does not make a dead one look alive to others.
            return "unlocked" if _try_flock(file, fcntl.LOCK_SH) else "locked"
        finally:
            os.close(file)

    def _create(self) -> int:
        """Creates the file, locked from the moment that it has its name. Returns its descriptor."""
        while True:
            self._folder.mkdir(exist_ok=True)
            temporary = self._folder / uuid.uuid4().hex
            try:
                file = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            except FileNotFoundError:  # somebody removed the folder
                continue
            try:
                if _try_flock(file, fcntl.LOCK_EX):
                    os.write(file, b"%d" % os.getpid())  # `restore` names this process in its error
                    temporary.rename(self._folder / self.name)
                    return file
            except FileNotFoundError:  # another process removed the file, still unlocked, as that of a dead process
                log.debug("the new file in %s was removed, creating another one", self._folder)
            os.close(file)

    def _renew_until_released(self) -> None:
        failed = ""
        while not self._released.wait(RENEW_EVERY):
            try:
                self._renew()
                failed = ""
            except OSError as error:
                if str(error) != failed:
                    log.error("could not restore this worker's file in %s, retrying: %s", self._folder, error)
                failed = str(error)

    def _renew(self) -> None:
        if not _is_at(self._file, self._folder / self.name):
            file = self._create()
            os.close(self._file)
            self._file = file
            log.warning("restored this worker's file in %s, which had been removed", self._folder)
