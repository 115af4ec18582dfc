"""`python database.py backup`, `restore` and `check`: under load, when killed, and on damaged or unsuitable files."""

import hashlib
import json
import multiprocessing
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path
from types import FrameType

import pytest

import admin
import backup
import database
import errors
import sql
from database import Database
from locks import FileLock

from .legacy import build
from .service import CHECKOUT, Service, until
from .stand_in import StandIn

DONE, FAILED, USAGE, RUNS, FILE_PROBLEM = 0, 1, 2, 3, 4
PNG = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mP8z8BQDwAEhQGAhKmMIQAAAABJRU5ErkJggg=="
GIF = "R0lGODlhAQABAIAAAAAAAP///yH5BAEAAAAALAAAAAABAAEAAAIBRAA7"


@pytest.fixture(autouse=True)
def live(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The DB_PATH of the command, in a directory that does not exist yet."""
    path = tmp_path / "live" / "service.db"
    for name, value in (("DB_PATH", path), ("DATA_DIR", path.parent), ("PROJECTS_DIR", path.parent / "projects")):
        monkeypatch.setenv(name, str(value))
    return path


def command(*words: str | Path, shell: str = "") -> subprocess.CompletedProcess[str]:
    """Runs the command in a process of its own, after the shell command `shell`."""
    program = [sys.executable, str(CHECKOUT / "database.py"), *map(str, words)]
    return subprocess.run(
        ["/bin/sh", "-c", f'{shell or ":"}; exec "$@"', "sh", *program], capture_output=True, text=True, check=False
    )


def run(*words: str | Path) -> int:
    """Runs the command in the process of the test, and returns its exit status."""
    return admin.main([str(word) for word in words])


def make(path: Path, *emails: str) -> Path:
    """Creates a database with these users. The first one has a project, and a session with a message and its reply."""
    path.parent.mkdir(parents=True, exist_ok=True)
    sql.migrate(path)
    with closing(database.connect(path, read_only=False)) as conn:
        for email in emails:
            sql.insert_user(conn, email, None, "hash")
        project = sql.insert_project(conn, 1, "P", None, str(path.parent / "projects" / "p"), 0)
        session = sql.insert_session(conn, 1, project.id, None, "main")
        sql.begin_turn(conn, sql.NewTurn(1, session.session_key, "Hi", "Hi", "digest", None, "me"))
    return path


def users(path: Path) -> set[str]:
    """Returns the e-mails of the users of a database, after an integrity check."""
    with closing(sqlite3.connect(path)) as conn:
        assert conn.execute("PRAGMA integrity_check").fetchone()[0] == "ok"
        return {row[0] for row in conn.execute("SELECT email FROM users")}


def digest(path: Path) -> str:
    """Returns the SHA-256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def names(folder: Path) -> set[str]:
    """Returns the names of the files in a folder, without lock files."""
    return {path.name for path in folder.iterdir() if not path.name.endswith(".lock")}


def execute(path: Path, *statements: str) -> None:
    """Runs statements on a database, and leaves one file without a -wal."""
    with closing(sqlite3.connect(path, isolation_level=None)) as conn:
        for statement in ("PRAGMA journal_mode=DELETE", *statements):
            conn.execute(statement)


# --- with a service -----------------------------------------------------------------------------------


@contextmanager
def load(service: Service, people: int) -> Iterator[list[tuple[int, str]]]:
    """Sends messages as several users without a pause. Yields a list to which it adds (reply id, text) of each."""
    acknowledged: list[tuple[int, str]] = []
    over = threading.Event()

    def talk(number: int) -> None:
        with service.person() as person:
            session = person.session()
            count = 0
            while not over.is_set():
                text = f"{number}-{count}"
                answer = person.say(session, text)
                assert answer.status_code == 200, answer.body
                acknowledged.append((json.loads(answer.body)["id"], text))
                count += 1

    with ThreadPoolExecutor(people) as pool:
        talks = [pool.submit(talk, number) for number in range(people)]
        try:
            until(lambda: len(acknowledged) > 20 * people, 30, "the load")
            yield acknowledged
        finally:
            over.set()
        for done in talks:
            done.result()


def fill(path: Path, megabytes: int) -> None:
    """Adds messages of this total size to a database, so that copying it takes a while."""
    insert = "INSERT INTO messages (session_id, role, content, created_at) VALUES (1, 'user', ?, '')"
    with closing(database.connect(path, read_only=False)) as conn:
        conn.execute("BEGIN")
        conn.executemany(insert, (("x" * 1000,) for _ in range(megabytes * 1000)))
        conn.execute("COMMIT")


@pytest.mark.parametrize(("megabytes", "backups"), [(10, 1), pytest.param(40, 3, marks=pytest.mark.slow)])
def test_a_backup_under_load_restores_to_all_that_was_acknowledged(
    tmp_path: Path, openclaw: StandIn, live: Path, megabytes: int, backups: int
) -> None:
    """A backup during writes contains every message acknowledged before it began, and no turn without its message.

    `check` passes during the writes. A service on the restored database serves its messages.
    """
    fill(make(live, "first@example.com"), megabytes)
    service = Service(tmp_path, openclaw.url, openclaw.token, DB_PATH=str(live), DATA_DIR=str(live.parent))
    with service, service.person() as ada:
        session = ada.session()
        assert ada.say(session, "kept").status_code == 200
        with load(service, 6) as acknowledged:
            for number in range(backups):
                before = dict(acknowledged)
                done = command("backup", tmp_path / f"{number}.backup")
                assert done.returncode == DONE, done.stderr
                assert len(acknowledged) > len(before), "no message was acknowledged during the backup"
                with closing(sqlite3.connect(tmp_path / f"{number}.backup")) as conn:
                    rows = dict(conn.execute("SELECT id, status FROM messages WHERE role = 'assistant'").fetchall())
                    assert {rows[reply] for reply in before} == {"complete"}
                    texts = {row[0] for row in conn.execute("SELECT content FROM messages WHERE role = 'user'")}
                    assert texts >= set(before.values())
                    broken = "SELECT count(*) FROM turns LEFT JOIN messages m ON m.id = message_id WHERE m.id IS NULL"
                    assert conn.execute(broken).fetchone() == (0,)
            checked = command("check")
            assert checked.returncode == DONE, checked.stderr
        newest = tmp_path / f"{backups - 1}.backup"
        refused = command("restore", newest)
        assert refused.returncode == RUNS
        assert f"process {service.pid}" in refused.stderr
        service.kill()
        restored = command("restore", newest)
        assert restored.returncode == DONE, restored.stderr
        service.start()
        assert ada.messages(session)[0]["content"] == "kept"
        assert command("check").returncode == DONE


def test_a_suspended_service_prevents_a_restore(
    tmp_path: Path, openclaw: StandIn, live: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """While a process of the service is suspended, `restore` refuses and leaves no files.

    It accepts another database in the same directory.
    """
    backup = make(tmp_path / "some.backup", "backup@example.com")
    with Service(tmp_path, openclaw.url, openclaw.token, DB_PATH=str(live), DATA_DIR=str(live.parent)) as service:
        service.freeze()
        assert run("restore", backup) == RUNS
        assert f"process {service.pid}" in capsys.readouterr().err
        assert run("restore", backup, "--database", tmp_path / "other.db") == DONE
        service.thaw()
    assert not [name for name in names(live.parent) if "restor" in name or "replaced" in name]
    assert run("restore", backup) == DONE


def test_a_service_that_starts_during_a_restore_waits(live: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A starting service waits for the lock, then takes its lease and opens the file, and then prevents a restore."""
    make(live, "a@example.com")
    backup = make(live.parent / "b", "b@example.com")
    workers, db = Path(f"{live}.workers"), Database(live)
    living: list[int] = []
    monkeypatch.setattr(sql, "migrate", lambda *_: living.append(len(names(workers))))
    with closing(FileLock(Path(f"{live}.lock"))) as lock:
        opening = threading.Thread(target=db.open)
        with lock:
            opening.start()
            time.sleep(0.3)
            assert opening.is_alive()
            assert not workers.exists()
        opening.join(30)
        assert living == [1]
        assert [path.read_text() for path in workers.iterdir()] == [str(os.getpid())]
        monkeypatch.undo()
        assert run("restore", backup, "--database", live) == RUNS
    db.close()
    assert run("restore", backup, "--database", live) == DONE
    assert users(live) == {"b@example.com"}


def test_a_service_that_fails_to_open_releases_its_lease(live: Path) -> None:
    """After a failed start, `restore` is not refused, since it may be the fix."""
    live.parent.mkdir()
    live.write_bytes(b"no database" * 1000)
    with pytest.raises(errors.Unavailable):
        Database(live).open()
    assert run("restore", make(live.parent / "b", "b@example.com")) == DONE
    assert users(live) == {"b@example.com"}


# --- kill -9 ------------------------------------------------------------------------------------------


def restore_until(words: list[str], moment: int, counted: "multiprocessing.Queue[int]") -> None:
    """Runs the command, and sends SIGKILL to its own process before call number `moment` of a C function.

    Counts calls from backup.py and database.py. Puts their number into `counted` if the command completes.
    """
    calls = 0

    def count(frame: FrameType, event: str, _: object) -> None:
        nonlocal calls
        if event == "c_call" and frame.f_code.co_filename in (backup.__file__, database.__file__):
            if calls == moment:
                os.kill(os.getpid(), signal.SIGKILL)
            calls += 1

    sys.setprofile(count)
    status = admin.main(words)
    sys.setprofile(None)
    assert status == DONE
    counted.put(calls)


def test_a_kill_leaves_the_old_or_the_new(tmp_path: Path) -> None:
    """A restore that is killed before any of its steps leaves the old database, with its -wal, or the new one.

    The next restore succeeds, and keeps the old database exactly once.
    """
    old = make(tmp_path / "old" / "service.db", "old@example.com")
    conn = database.connect(old, read_only=False)
    sql.insert_user(conn, "wal@example.com", None, "h")
    new = make(tmp_path / "new.backup", "new@example.com")
    template = tmp_path / "template"
    shutil.copytree(old.parent, template, ignore=shutil.ignore_patterns("*-shm"))
    conn.close()
    assert (template / "service.db-wal").stat().st_size

    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    counted: multiprocessing.Queue[int] = context.Queue()
    path = tmp_path / "work" / "service.db"
    words = ["restore", str(new), "--database", str(path)]

    def restore(moment: int) -> int | None:
        shutil.rmtree(path.parent, ignore_errors=True)
        shutil.copytree(template, path.parent)
        process = context.Process(target=restore_until, args=(words, moment, counted))
        process.start()
        process.join(60)
        return process.exitcode

    assert restore(-1) == 0
    total = counted.get(timeout=10)
    found = []
    for moment in range(total):
        assert restore(moment) == -signal.SIGKILL
        found.append(users(path))
        assert found[-1] in ({"old@example.com", "wal@example.com"}, {"new@example.com"}), moment
        assert run(*words) == DONE
        assert users(path) == {"new@example.com"}
        kept = [users(copy) for copy in path.parent.glob("*.replaced.backup")]
        assert kept.count({"old@example.com", "wal@example.com"}) == 1, moment
        assert {name.rpartition(".")[2] for name in names(path.parent)} == {"db", "backup"}, moment
    assert len(found) > 20
    assert found[0] != found[-1]


def test_a_backup_that_is_killed_leaves_no_backup(live: Path) -> None:
    """A killed backup leaves only a `.partial` file; the error of the next backup says to delete it."""
    fill(make(live, "a@example.com"), 30)
    target = live.parent / "some.backup"
    process = subprocess.Popen([sys.executable, CHECKOUT / "database.py", "backup", target])
    partial = live.parent / "some.backup.partial"
    until(partial.exists, 30, "the backup to begin")
    process.kill()
    process.wait()
    assert not target.exists()
    refused = command("backup", target)
    assert refused.returncode == FILE_PROBLEM
    assert "delete the file" in refused.stderr
    partial.unlink()
    assert run("backup", target) == DONE


# --- images and project folders -----------------------------------------------------------------------


def test_images_and_folders_are_listed_and_compared(
    tmp_path: Path, openclaw: StandIn, live: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The list of a backup contains its images and folders with their sizes; a restore prints what has changed.

    Only the owner can read the backup and the list.
    """
    service = Service(tmp_path, openclaw.url, openclaw.token, DB_PATH=str(live), DATA_DIR=str(live.parent))
    with service, service.person() as ada:
        project = ada.project()
        session = ada.session(project)
        assert ada.say(session, "look", image=PNG).status_code == 200
        assert ada.say(session, "and this", image=GIF).status_code == 200
    backup = tmp_path / "some.backup"
    assert run("backup", backup) == DONE
    listed = json.loads((tmp_path / "some.backup.files.json").read_text())
    assert listed["sha256"] == digest(backup)
    assert listed["rows"]["messages"] == 4
    sizes = {path.relative_to(live.parent / "images").as_posix(): path.stat().st_size for path in _images(live)}
    assert {image["file"]: image["bytes"] for image in listed["images"] if image["there"]} == sizes
    assert len(sizes) == 2
    readme = Path(project["project_path"], "README.md")
    assert listed["projects"] == [
        {"id": project["id"], "path": str(readme.parent), "there": True, "files": 1, "bytes": readme.stat().st_size}
    ]
    assert {path.stat().st_mode & 0o777 for path in tmp_path.glob("some.backup*")} == {0o600}

    first, second = _images(live)
    first.unlink()
    second.write_bytes(b"")
    readme.unlink()
    capsys.readouterr()
    assert run("check") == FAILED
    assert first.name in capsys.readouterr().out
    assert run("restore", backup) == DONE
    said = capsys.readouterr().out
    assert f"the image {first} is missing\n" in said
    assert f"the image {second} has another size" in said
    assert f"the folder {readme.parent} has 0 files, but had 1" in said
    readme.parent.rmdir()
    assert run("restore", backup) == DONE
    assert f"the folder {readme.parent} of project {project['id']} is missing\n" in capsys.readouterr().out


def _images(live: Path) -> list[Path]:
    return sorted((live.parent / "images").glob("*-*/*"))


# --- refusals -----------------------------------------------------------------------------------------


def damaged(path: Path) -> None:
    """Creates a database in which a page is overwritten with zeros."""
    fill(make(path, "x@example.com"), 1)
    execute(path)
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 4096 // 2 * 4096)
        file.write(bytes(4096))


def garbage(path: Path) -> None:
    """Creates a file that is not a database."""
    path.write_bytes(b"this is a text, not a database" * 1000)


def foreign(path: Path) -> None:
    """Creates the database of another program."""
    execute(path, "CREATE TABLE cookies (name TEXT)")


def empty(path: Path) -> None:
    """Creates an empty file, which SQLite opens as a database without tables."""
    path.touch()


def newer(path: Path) -> None:
    """Creates a database with a newer schema version."""
    execute(make(path, "x@example.com"), "PRAGMA user_version=999")


def torn(path: Path) -> None:
    """Creates a database in which a row references a row that does not exist."""
    execute(make(path, "x@example.com"), "PRAGMA foreign_keys=OFF", "DELETE FROM users")


def altered(path: Path) -> None:
    """Creates a backup, and changes it."""
    make(path.parent / "from.db", "x@example.com")
    assert run("backup", path, "--database", path.parent / "from.db") == DONE
    execute(path, "UPDATE users SET email = 'y@example.com'")


def badly_listed(path: Path) -> None:
    """Creates a backup with a truncated list."""
    make(path, "x@example.com")
    Path(f"{path}.files.json").write_text('{"sha256":')


@pytest.mark.parametrize("spoil", [damaged, garbage, foreign, empty, newer, torn, altered, badly_listed])
def test_an_unsuitable_file_is_not_restored(
    tmp_path: Path, live: Path, capsys: pytest.CaptureFixture[str], spoil: Callable[[Path], None]
) -> None:
    """`restore` refuses a file that fails a check with exit status 1, names it, and leaves the database unchanged."""
    make(live, "a@example.com")
    spoil(tmp_path / "unfit")
    before, beside = digest(live), names(live.parent)
    assert run("restore", tmp_path / "unfit") == FAILED
    assert "unfit" in capsys.readouterr().err
    assert (digest(live), names(live.parent)) == (before, beside)
    assert run("restore", tmp_path / "unfit", "--database", tmp_path / "none.db") == FAILED
    assert not (tmp_path / "none.db").exists()


def test_problems_with_files_change_nothing(tmp_path: Path, live: Path) -> None:
    """The exit status is 4 if a file is missing, already exists, is the database itself or does not fit on the disk.

    No file is changed or created, and stderr has at most two lines.
    """
    fill(make(live, "a@example.com"), 2)
    execute(live)
    backup, taken = tmp_path / "some.backup", tmp_path / "taken"
    assert run("backup", backup) == DONE
    taken.write_text("mine")
    before, beside, around = digest(live), names(live.parent), names(tmp_path)
    limit = "ulimit -f 1000"
    for words, shell in (
        (("backup", taken), ""),
        (("backup", tmp_path / "nowhere" / "file"), ""),
        (("backup", tmp_path / "none", "--database", tmp_path / "none.db"), ""),
        (("backup", tmp_path / "large"), limit),
        (("restore", tmp_path / "nowhere"), ""),
        (("restore", tmp_path), ""),
        (("restore", live), ""),
        (("restore", backup), limit),
        (("check", "--database", tmp_path / "none.db"), ""),
    ):
        done = command(*words, shell=shell)
        assert done.returncode == FILE_PROBLEM, (words, done.stderr)
        assert len(done.stderr.splitlines()) <= 2 and "Traceback" not in done.stderr
        assert (digest(live), names(live.parent), names(tmp_path)) == (before, beside, around), words
    assert taken.read_text() == "mine"


def test_wrong_arguments_and_settings(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Wrong arguments and settings end with exit status 2 and an error; --help lists every exit status."""
    for words in ((), ("backup",), ("restore", "a", "b"), ("check", "now")):
        with pytest.raises(SystemExit) as ended:
            run(*words)
        assert ended.value.code == USAGE
    monkeypatch.setenv("TOKEN_TTL", "soon")
    with pytest.raises(SystemExit) as ended:
        run("check")
    assert ended.value.code == USAGE
    assert "TOKEN_TTL" in capsys.readouterr().err
    with pytest.raises(SystemExit) as ended:
        run("--help")
    assert ended.value.code == DONE
    said = capsys.readouterr().out
    assert all(f"\n  {status}  " in said for status in (DONE, FAILED, USAGE, RUNS, FILE_PROBLEM))


def test_a_restore_refuses_while_another_program_uses_the_database(tmp_path: Path, live: Path) -> None:
    """While a shell has the database open, `restore` refuses with exit status 3 and changes nothing."""
    make(live, "a@example.com")
    backup = make(tmp_path / "some.backup", "b@example.com")
    with closing(sqlite3.connect(live)) as shell:
        assert shell.execute("SELECT count(*) FROM users").fetchone() == (1,)
        assert run("restore", backup) == RUNS
    assert users(live) == {"a@example.com"}
    assert not [name for name in names(live.parent) if "restor" in name or "replaced" in name]


# --- restores and checks ------------------------------------------------------------------------------


def test_the_replaced_database_is_kept(tmp_path: Path, live: Path) -> None:
    """The replaced database is kept under another name and can be restored; the new file gets its mode."""
    make(live, "old@example.com").chmod(0o640)
    assert run("restore", make(tmp_path / "some.backup", "new@example.com")) == DONE
    assert users(live) == {"new@example.com"}
    assert live.stat().st_mode & 0o777 == 0o640
    (kept,) = live.parent.glob("service.db.*.replaced.backup")
    assert run("restore", kept) == DONE
    assert users(live) == {"old@example.com"}


def test_a_damaged_database_is_kept_with_its_wal(tmp_path: Path, live: Path) -> None:
    """A damaged database and its -wal are kept unchanged, and the -wal is not applied to the restored database."""
    make(live, "old@example.com")
    with closing(database.connect(live, read_only=False)) as conn:
        sql.insert_user(conn, "wal@example.com", None, "h")
        wal = Path(f"{live}-wal").read_bytes()
    garbage(live)
    Path(f"{live}-wal").write_bytes(wal)
    assert run("check") == FAILED
    assert run("backup", tmp_path / "no.backup") == FAILED
    before = digest(live)
    assert run("restore", make(tmp_path / "some.backup", "new@example.com")) == DONE
    assert users(live) == {"new@example.com"}
    (kept,) = live.parent.glob("service.db.*.replaced.backup")
    assert digest(kept) == before
    assert Path(f"{kept}-wal").read_bytes() == wal


def test_a_database_is_restored_with_its_wal(tmp_path: Path, live: Path) -> None:
    """Restoring a database file that a crash left includes the commits in its -wal, and leaves both files unchanged."""
    source = make(tmp_path / "from" / "a.db", "a@example.com")
    with closing(database.connect(source, read_only=False)) as conn:
        sql.insert_user(conn, "wal@example.com", None, "h")
        shutil.copytree(source.parent, tmp_path / "crashed")
    crashed = tmp_path / "crashed" / "a.db"
    before, beside = digest(crashed), names(crashed.parent)
    assert run("restore", crashed) == DONE
    assert users(live) == {"a@example.com", "wal@example.com"}
    assert (digest(crashed), names(crashed.parent)) == (before, beside)


def test_a_legacy_database_is_backed_up_and_restored(tmp_path: Path, live: Path) -> None:
    """`backup` and `check` leave a legacy database unchanged. The next start migrates the restored one."""
    old = tmp_path / "legacy.db"
    build(old)
    before = digest(old)
    assert run("backup", tmp_path / "some.backup", "--database", old) == DONE
    assert run("check", "--database", old) == DONE
    assert digest(old) == before
    assert run("restore", tmp_path / "some.backup") == DONE
    db = Database(live)
    db.open()
    db.close()
    assert users(live) == {None, "Ada@Example.com", "bob@example.com"}
    with closing(sqlite3.connect(live)) as conn:
        assert conn.execute("SELECT content FROM orphaned_messages").fetchall() == [("orphan",), ("orphan reply",)]


@pytest.mark.parametrize("spoil", [damaged, garbage, foreign, empty, newer, torn])
def test_check_finds_faults_and_changes_nothing(live: Path, spoil: Callable[[Path], None]) -> None:
    """`check` fails with exit status 1. `backup` refuses such a file too, except one with a newer schema."""
    live.parent.mkdir()
    spoil(live)
    before = digest(live)
    assert run("check") == FAILED
    assert run("backup", live.parent / "some.backup") == (DONE if spoil is newer else FAILED)
    assert digest(live) == before
    assert (live.parent / "some.backup").exists() == (spoil is newer)


def test_check_prints_contents_and_missing_images(live: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`check` prints schema version and rows to stdout, progress to stderr; a missing image is exit status 1."""
    make(live, "a@example.com", "b@example.com")
    execute(live, "INSERT INTO message_images (message_id, file) VALUES (1, 'some/image.png')")
    image = live.parent / "images" / "some" / "image.png"
    assert run("check") == FAILED
    assert "missing image: some/image.png" in capsys.readouterr().out
    image.parent.mkdir(parents=True)
    image.touch()
    assert run("check") == DONE
    said = capsys.readouterr()
    assert f"schema version: {len(sql.MIGRATIONS)}\n" in said.out
    assert "users 2" in said.out
    assert said.err.startswith("checking service.db")
