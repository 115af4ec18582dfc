"""Faults around the database's file: suspended processes that hold its locks, removed files, a full disk."""

import asyncio
import fcntl
import os
import resource
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from sqlite3 import Connection

import httpx
import pytest

import admin
import database
import errors
import locks
import sql
from database import Database
from locks import FileLock, Lease, LockHeldError
from tests.service import CHECKOUT, Person, Served, Service, until, using
from tests.stand_in import StandIn

Serve = Callable[..., Served]

# Programs that lock the database of their first argument and print a line once they have done so.
HOLDERS = {
    "lock file": """
import fcntl, os, sys, time
fcntl.flock(os.open(sys.argv[1] + ".lock", os.O_RDWR | os.O_CREAT), fcntl.LOCK_EX)
print(flush=True)
time.sleep(600)
""",
    "transaction": """
import asyncio, pathlib, sys, time, database
def stall(conn):
    conn.execute("UPDATE users SET name = name")
    print(flush=True)
    time.sleep(600)
async def main():
    db = database.Database(pathlib.Path(sys.argv[1]))
    db.open()
    await db.write(stall)
asyncio.run(main())
""",
    "sqlite3 shell": """
import sqlite3, sys, time
conn = sqlite3.connect(sys.argv[1], isolation_level=None)
conn.execute("BEGIN IMMEDIATE")
print(flush=True)
time.sleep(600)
""",
}
KINDS = tuple(HOLDERS)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """The path of a database that does not exist yet, the one that `serve` uses."""
    return tmp_path / "service.db"


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shortens the deadlines, so that a test of what happens after them is quick."""
    monkeypatch.setattr(database, "WRITE_TIMEOUT", 1.0)
    monkeypatch.setattr(database, "OPEN_TIMEOUT", 0.7)
    monkeypatch.setattr(database, "REPORT_FAILURE_FOR", 1.0)


@contextmanager
def running(script: str, *arguments: object) -> Iterator[subprocess.Popen[bytes]]:
    """Runs a Python program until it has printed a line. Kills it at the end of the block."""
    command = [sys.executable, "-c", script, *map(str, arguments)]
    with subprocess.Popen(command, cwd=CHECKOUT, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline()
            yield process
        finally:
            process.kill()


def suspend(pid: int) -> None:
    """Suspends a process, and returns once all of its threads have stopped."""
    os.kill(pid, signal.SIGSTOP)
    threads = Path(f"/proc/{pid}/task")
    until(
        lambda: all("State:\tT" in (task / "status").read_text() for task in threads.iterdir()),
        10,
        "its threads to stop",
    )


@contextmanager
def holder(kind: str, path: Path) -> Iterator[int]:
    """Suspends a process that holds a lock of the database, and yields its pid. Kills it at the end of the block."""
    with running(HOLDERS[kind], path) as process:
        suspend(process.pid)
        yield process.pid


def healthy(person: Person) -> bool:
    """Returns True if both health checks answer 200."""
    return [person.http.get(path).status_code for path in ("/health", "/health/ready")] == [200, 200]


def sent(person: Person) -> tuple[httpx.Response, float]:
    """Returns the answer to a request that writes, and the seconds that it took."""
    began = time.monotonic()
    response = person.http.post("/projects", json={"name": "P"})
    return response, time.monotonic() - began


# --- a process that holds a lock and is suspended -----------------------------------------------------


@pytest.mark.usefixtures("hasty")
@pytest.mark.parametrize("kind", KINDS)
def test_a_suspended_process_fails_writes_and_health(
    serve: Serve, path: Path, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    """A process is suspended while it holds a lock of the database: each write fails within its deadline, the log names
    the process, health and readiness answer 503. When the process is gone, everything works again by itself."""
    with serve().person() as ada:
        with holder(kind, path) as pid:
            response, seconds = sent(ada)
            assert (response.status_code, response.json()["code"]) == (503, "database_unavailable")
            assert 0.9 < seconds < 5
            assert f"process {pid} (python" in caplog.text
            assert "suspended" in caplog.text
            health, ready = ada.http.get("/health"), ada.ready()
            assert (health.status_code, ready.status_code) == (503, 503)
            assert health.json()["database"]["oldest_write_seconds"] > 0.9
            assert f"process {pid}" in ready.json()["detail"]
        until(lambda: sent(ada)[0].status_code == 201, 10, "a write")
        until(lambda: healthy(ada), 10, "health")


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_suspended_process_holds_up_a_write_for_six_seconds(
    tmp_path: Path, openclaw: StandIn, path: Path, kind: str
) -> None:
    """The same with the real deadlines and two processes of the service: each caller has its answer within 6 s, however
    many write. SIGTERM ends the service although it cannot write, and a new one says why it does not start."""
    with Service(tmp_path, openclaw.url, openclaw.token) as one, one.person() as ada, holder(kind, path) as pid:
        for response, seconds in (sent(ada), sent(ada)):
            assert response.status_code == 503
            assert 4 < seconds < 6.5
        assert not healthy(ada)
        assert f"process {pid} (python" in one.output()
        began = time.monotonic()
        one.stop()
        assert time.monotonic() - began < 20
        if kind == "lock file":
            another = Service(tmp_path, openclaw.url, openclaw.token)
            with pytest.raises(AssertionError, match=f"process {pid}"):
                another.start()
    with Service(tmp_path, openclaw.url, openclaw.token) as again, ada.at(again.url) as back:
        assert sent(back)[0].status_code == 201


@pytest.mark.usefixtures("hasty")
def test_each_write_has_a_deadline_of_its_own(path: Path) -> None:
    """While the lock is held, the first write fails at its deadline. A write that was submitted later still waits, and
    is committed when the lock is released. The one that failed does not run afterwards."""

    async def work(db: Database) -> list[str]:
        with closing(FileLock(Path(f"{path}.lock"))) as lock:
            lock.acquire()
            first = asyncio.create_task(db.write(sql.insert_user, "first@example.com", None, "h"))
            await asyncio.sleep(0.6)
            second = asyncio.create_task(db.write(sql.insert_user, "second@example.com", None, "h"))
            with pytest.raises(errors.Unavailable):
                await first
            assert not second.done()
            assert 0.9 < db.waited() < 5
            lock.release()
        await second
        assert db.waited() == 0
        return db.read(lambda conn: [row[0] for row in conn.execute("SELECT email FROM users")])

    assert using(path, work) == ["second@example.com"]


@pytest.mark.usefixtures("hasty")
def test_a_commit_that_stalls_fails_its_caller_and_health(path: Path) -> None:
    """A write has begun and does not end, as when the disk does not answer: its caller and those behind it get an
    error, and the database is in trouble until it is through."""
    stalled = threading.Event()

    def stall(_: Connection) -> None:
        stalled.wait(20)

    async def work(db: Database) -> None:
        writes = [db.write(stall), db.write(sql.insert_user, "a@example.com", None, "h")]
        results = await asyncio.gather(*writes, return_exceptions=True)
        assert [type(result) for result in results] == [errors.Unavailable] * 2
        assert "write has been waiting" in await db.trouble()
        stalled.set()
        await db.write(sql.insert_user, "b@example.com", None, "h")
        assert not await db.trouble()

    using(path, work)


@pytest.mark.slow
def test_writes_survive_that_their_own_process_is_suspended(tmp_path: Path, path: Path) -> None:
    """A process is suspended for longer than the deadline of a write and continues: the writes that it had submitted
    are committed, since nothing but its own pause held them up."""
    script = """
import asyncio, pathlib, sys, time, database, sql
async def main():
    db = database.Database(pathlib.Path(sys.argv[1]))
    db.open()
    print(flush=True)
    end = time.monotonic() + 11
    number = 0
    while time.monotonic() < end:
        number += 4
        await asyncio.gather(*(db.write(sql.insert_user, f"{number + i}@example.com", None, "h") for i in range(4)))
    db.close()
asyncio.run(main())
"""
    with running(script, path) as process:
        time.sleep(1)
        suspend(process.pid)
        time.sleep(7)
        process.send_signal(signal.SIGCONT)
        assert process.wait(60) == 0


@pytest.mark.usefixtures("hasty")
def test_a_start_that_cannot_get_the_lock_names_its_holder(path: Path) -> None:
    """A database that another process locks cannot be opened: the error names the process. Nothing is left behind: the
    next attempt succeeds once the lock is free."""
    db = Database(path)
    with holder("lock file", path) as pid, pytest.raises(errors.Unavailable, match=f"process {pid} "):
        db.open()
    db.open()
    db.close()


def test_a_close_that_cannot_get_the_lock_leaves_the_database(path: Path) -> None:
    """A process that ends while another one holds the lock ends within seconds, and makes no checkpoint, neither when
    it closes the database nor when Python deletes its objects. Its commits are there afterwards."""
    script = """
import asyncio, pathlib, sys, database, sql
async def main():
    db = database.Database(pathlib.Path(sys.argv[1]))
    db.open()
    await db.write(sql.insert_user, "a@example.com", None, "h")
    print(flush=True)
    sys.stdin.readline()
    db.close()
asyncio.run(main())
"""
    with running(script, path) as process, holder("lock file", path):
        files = {suffix: Path(f"{path}{suffix}").read_bytes() for suffix in ("", "-wal")}
        began = time.monotonic()
        process.communicate(b"\n", timeout=30)
        assert process.returncode == 0
        assert time.monotonic() - began < 10
        assert {suffix: Path(f"{path}{suffix}").read_bytes() for suffix in files} == files
    with sqlite3.connect(path) as conn:
        assert conn.execute("SELECT count(*) FROM users").fetchone() == (1,)


@pytest.mark.slow
def test_commands_name_the_process_that_holds_the_lock(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`claim` and `restore` give up after some seconds with exit status 3, and name the process. `backup`, which needs
    the lock only to close its connection, is complete."""
    sql.migrate(path)
    backup = path.with_name("a.backup")
    with holder("lock file", path) as pid:
        assert admin.main(["backup", str(backup), "--database", str(path)]) == 0
        for command in (["claim", "--from-user", "1", "--to", "a@example.com"], ["restore", str(backup)]):
            assert admin.main([*command, "--database", str(path)]) == 3
            assert f"process {pid} (python" in capsys.readouterr().err
    assert admin.main(["restore", str(backup), "--database", str(path)]) == 0


# --- two processes that write as fast as they can -----------------------------------------------------

# Acquires the lock again and again, and writes to its own eight bytes of a file how often it did. Prints the largest
# number of times that the other process acquired it during one wait, and the longest wait in ms.
GREEDY = """
import mmap, pathlib, struct, sys, time, locks
lock, mine, other = locks.FileLock(pathlib.Path(sys.argv[1])), int(sys.argv[3]), 8 - int(sys.argv[3])
file = open(sys.argv[2], "r+b")
counts = mmap.mmap(file.fileno(), 16)
read = lambda at: struct.unpack_from("q", counts, at)[0]
write = lambda at, number: struct.pack_into("q", counts, at, number)
overtaken = longest = number = 0
write(mine, 1)
while not read(other):
    time.sleep(0.001)
end = time.monotonic() + 2
while time.monotonic() < end:
    began, before = time.monotonic(), read(other)
    lock.acquire()
    overtaken, longest = max(overtaken, read(other) - before), max(longest, time.monotonic() - began)
    number += 1
    write(mine, number + 1)
    until = time.monotonic() + 0.0002
    while time.monotonic() < until:
        pass
    lock.release()
print(overtaken, round(longest * 1000), number)
"""


def test_two_greedy_processes_take_turns(path: Path) -> None:
    """Two processes acquire the lock without a pause: neither overtakes the other one more than a few times during one
    wait, and no wait is long."""
    counts = path.with_name("counts")
    counts.write_bytes(bytes(16))
    commands = [[sys.executable, "-c", GREEDY, f"{path}.lock", str(counts), str(8 * number)] for number in (0, 1)]
    processes = [subprocess.Popen(command, cwd=CHECKOUT, stdout=subprocess.PIPE) for command in commands]
    results = [[int(word) for word in process.communicate(timeout=60)[0].split()] for process in processes]
    for overtaken, longest, number in results:
        assert number > 50
        assert overtaken < number / 10
        assert longest < 1500


def locks_of(path: Path) -> str:
    """Returns the lines of /proc/locks about a file."""
    return "\n".join(line for line in Path("/proc/locks").read_text().splitlines() if f":{path.stat().st_ino} " in line)


def test_a_process_that_is_suspended_in_line_holds_up_nobody(path: Path) -> None:
    """A process is suspended while it waits for the lock with the first place in line: when the lock is released, the
    others go on without it."""
    script = "import pathlib, sys, locks; print(flush=True); locks.FileLock(pathlib.Path(sys.argv[1])).acquire(60)"
    name = Path(f"{path}.lock")
    with closing(FileLock(name)) as lock, closing(FileLock(name)) as other:
        lock.acquire()
        with running(script, name) as process:
            until(lambda: "OFDLCK" in locks_of(name), 10, "its place in line")
            suspend(process.pid)
            lock.release()
            began = time.monotonic()
            for _ in range(20):
                with other:
                    pass
            assert time.monotonic() - began < 3


def test_a_wait_that_was_given_up_acquires_nothing_later(path: Path) -> None:
    """A process gives up its wait for the lock and does something else. The lock, once released, is free for others."""
    name = Path(f"{path}.lock")
    with closing(FileLock(name)) as lock, closing(FileLock(name)) as impatient, closing(FileLock(name)) as other:
        lock.acquire()
        with pytest.raises(LockHeldError):
            impatient.acquire(0.05)
        lock.release()
        for _ in range(3):
            with other.within(5), pytest.raises(LockHeldError):
                impatient.acquire(0.05)
        with impatient:
            pass


# --- removed files ------------------------------------------------------------------------------------


def remove(path: Path, *, replaced: bool) -> None:
    """Removes a file, and creates an empty one of its name if it is to be replaced."""
    path.unlink()
    if replaced:
        path.touch()


@pytest.mark.parametrize("fault", ["removed", "replaced"])
def test_a_lock_file_that_was_removed_locks_again(path: Path, fault: str) -> None:
    """Somebody removes or replaces the lock file while a process has it open: from the next write on, the process locks
    the file that has the name, as a process that starts now does. One that waits for the old file does not wait on."""
    name = Path(f"{path}.lock")

    async def work(db: Database) -> None:
        with closing(FileLock(name)) as old:
            old.acquire()
            write = asyncio.create_task(db.write(sql.insert_user, "a@example.com", None, "h"))
            await asyncio.sleep(0.2)
            remove(name, replaced=fault == "replaced")
            await write
        with closing(FileLock(name)) as lock:
            lock.acquire()
            write = asyncio.create_task(db.write(sql.insert_user, "b@example.com", None, "h"))
            await asyncio.sleep(0.3)
            assert not write.done()
            lock.release()
        await write

    using(path, work)


@pytest.mark.parametrize("fault", ["folder removed", "file removed", "file replaced", "folder renamed"])
def test_a_lease_is_restored(tmp_path: Path, fault: str) -> None:
    """Somebody removes the files of living processes: another process takes none of them for dead, each restores its
    file within seconds, and `restore` of the command line sees it again. A dead one is dead, as before."""
    folder = tmp_path / "workers"
    mine, other = Lease(folder), Lease(folder)
    mine.take()
    other.take()
    file = folder / mine.name
    if fault == "folder removed":
        shutil.rmtree(folder)
    elif fault == "folder renamed":
        folder.rename(tmp_path / "elsewhere")
    else:
        file.unlink()
        if fault == "file replaced":
            folder.joinpath("new").write_bytes(b"")
            folder.joinpath("new").rename(file)
    if fault != "file replaced":
        assert other.alive(mine.name)
    until(lambda: file.exists() and other.processes() == [str(os.getpid())] * 2, 10, "the leases")
    assert other.alive(mine.name) and mine.alive(other.name) and mine.alive(mine.name)
    mine.release()
    assert not mine.alive(mine.name)
    other.release()
    assert Lease(folder).processes() == []


def test_a_missing_lease_is_dead_after_a_while(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process whose file is missing counts as dead after MISSING_FOR seconds, by the monotonic clock. A file that
    exists and that nobody locks belongs to a dead process at once. A process that was itself suspended in between
    starts to count again, because the other one may have been suspended with it."""
    lease, now = Lease(tmp_path), 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    assert lease.alive("missing")
    now += locks.MISSING_FOR - 0.1
    assert lease.alive("missing")
    now += 0.2
    assert not lease.alive("missing")
    (tmp_path / "unlocked").write_bytes(b"1")
    assert not lease.alive("unlocked")
    assert lease.alive("another")
    now += 60
    assert lease.alive("another")
    now += locks.MISSING_FOR
    assert not lease.alive("another")


@pytest.mark.slow
def test_a_turn_survives_that_the_leases_are_removed(tmp_path: Path, openclaw: StandIn) -> None:
    """Somebody removes `<db>.workers` while a process runs a turn and another one serves next to it: the turn is not
    aborted, and its reply is complete."""
    with (
        Service(tmp_path, openclaw.url, openclaw.token) as one,
        Service(tmp_path, openclaw.url, openclaw.token),
        one.person() as ada,
    ):
        session = ada.session()
        with ada.listen(session, "[[chunks=100 delay=0.12]]") as (_, stream):
            stream.read(to_first_text=True)
            shutil.rmtree(tmp_path / "service.db.workers")
            stream.read()
        assert stream.finish == "stop"
        assert ada.messages(session)[-1]["status"] == "complete"
    assert openclaw.aborted == []


# --- a full disk --------------------------------------------------------------------------------------


@contextmanager
def small_disk(folder: Path) -> Iterator[bool]:
    """Mounts a disk of 8 MB on a folder. Yields False where only root may do that, and this is not root."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(folder)]
    mounted = not os.geteuid() and subprocess.run(command, check=False, capture_output=True).returncode == 0
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", "--lazy", str(folder)], check=True)


@contextmanager
def full(folder: Path, pid: int, *, mounted: bool) -> Iterator[None]:
    """Fills the disk of a folder, or forbids the process to let a file grow beyond the size of the WAL."""
    limit = resource.prlimit(pid, resource.RLIMIT_FSIZE)
    filler = folder / "filler"
    if mounted:
        with pytest.raises(OSError, match="No space left"), filler.open("wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))
    else:
        size = (folder / "service.db-wal").stat().st_size
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (size, limit[1]))
    try:
        yield
    finally:
        filler.unlink(missing_ok=True)
        resource.prlimit(pid, resource.RLIMIT_FSIZE, limit)


@pytest.mark.parametrize("kind", ["disk", "limit"])
def test_a_full_disk_shows_in_health(tmp_path: Path, openclaw: StandIn, kind: str) -> None:
    """The disk is full, or the process may not write more: sends answer 503, and so do health and readiness, which say
    why. When there is space again, all of them answer 200 by themselves."""
    folder = tmp_path / "disk"
    with (
        small_disk(folder) as mounted,
        Service(folder, openclaw.url, openclaw.token) as service,
        service.person() as ada,
    ):
        assert healthy(ada)
        with full(folder, service.pid, mounted=mounted and kind == "disk"):
            until(lambda: not healthy(ada), 15, "503 of the health checks")
            assert ada.ready().json()["code"] == "not_ready"
            assert "disk" in ada.ready().json()["detail"]
            assert not ada.http.get("/health").json()["database"]["ok"]
            until(lambda: sent(ada)[0].status_code == 503, 15, "503 of a send")
            assert [ada.http.get(path).status_code for path in ("/health", "/health/ready")] == [503, 503]
        until(lambda: sent(ada)[0].status_code == 201, 15, "a send")
        until(lambda: healthy(ada), 15, "200 of the health checks")


def test_a_failed_write_shows_in_health_at_once(served: Served, ada: Person, monkeypatch: pytest.MonkeyPatch) -> None:
    """A write fails because of the disk, although a smaller one would succeed: health and readiness say so."""

    def fail(*_: object) -> None:
        error = sqlite3.OperationalError("database or disk is full")
        error.sqlite_errorcode = sqlite3.SQLITE_FULL
        raise error

    assert healthy(ada)
    with monkeypatch.context() as patch:
        patch.setattr(sql, "insert_project", fail)
        assert sent(ada)[0].status_code == 503
    assert [ada.http.get(path).status_code for path in ("/health", "/health/ready")] == [503, 503]


def test_readiness_writes_once_a_second(path: Path) -> None:
    """A health check appends to the WAL, however often it is asked at most once a second."""

    def wal_size() -> int:
        return Path(f"{path}-wal").stat().st_size

    async def work(db: Database) -> None:
        size = wal_size()
        assert not await db.trouble()
        assert wal_size() >= size + 4096
        commits = db.write_time()[0]
        began = time.monotonic()
        for _ in range(50):
            await asyncio.gather(*(db.trouble() for _ in range(20)))
        assert db.write_time()[0] - commits <= time.monotonic() - began + 1

    using(path, work)


def test_the_lock_can_be_held_by_an_older_version(path: Path) -> None:
    """A worker of an older version knows only the `flock` of the file: both exclude each other."""
    name = Path(f"{path}.lock")
    with closing(FileLock(name)) as lock, name.open("r+b") as old:
        fcntl.flock(old, fcntl.LOCK_EX)
        with pytest.raises(LockHeldError):
            lock.acquire(0.05)
        fcntl.flock(old, fcntl.LOCK_UN)
        with lock, pytest.raises(BlockingIOError):
            fcntl.flock(old, fcntl.LOCK_EX | fcntl.LOCK_NB)
        fcntl.flock(old, fcntl.LOCK_EX | fcntl.LOCK_NB)
