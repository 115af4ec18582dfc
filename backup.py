"""The database's file copied, checked and put back: what `backup`, `restore` and `check` of the command line do."""

import argparse
import hashlib
import json
import os
import sqlite3
import sys
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from sqlite3 import Connection
from typing import Any

import file_utils
import sql
from clock import now
from database import FileLock, Lease
from settings import Settings
from telemetry import Progress

DAMAGED, IN_USE, FILE_PROBLEM = 1, 3, 4  # exit statuses; 0 is done, 2 is argparse's


_BESIDE = ("-wal", "-journal", "-shm")  # what SQLite keeps beside a database that is in use


class CommandError(Exception):
    """What ends a command: a sentence for the operator, and the exit status."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


def say(fact: str) -> None:
    """Prints a fact for the operator on the standard output."""
    sys.stdout.write(fact + "\n")


def tell(progress: str) -> None:
    """Prints progress or an error on the standard error output."""
    sys.stderr.write(progress + "\n")
    sys.stderr.flush()


@contextmanager
def reading(path: Path) -> Iterator[Connection]:
    """A connection that changes nothing of a database, its journal mode included, and makes no checkpoint."""
    if not path.is_file():
        raise CommandError(FILE_PROBLEM, f"{path} is not there: name the database by --database or DB_PATH.")
    with closing(FileLock(path.with_name(path.name + ".lock"))) as lock:
        conn = _connect_to_read(path)
        try:
            yield conn
        finally:
            with lock:
                conn.close()


def _connect_to_read(path: Path) -> Connection:
    conn = sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True, isolation_level=None)
    conn.execute("PRAGMA busy_timeout=5000")
    conn.execute("PRAGMA trusted_schema=OFF")
    return conn


def _examine(conn: Connection, what: Path) -> sql.Findings:
    """What is in a database, and what is wrong with it, 20 faults of a kind at most."""
    tell(f"checking {what.name} ({what.stat().st_size / 1e6:.1f} MB)")
    try:
        return sql.examine(conn)
    except sqlite3.DatabaseError as error:
        if exit_status(error) != DAMAGED:
            raise
        return sql.Findings(0, {}, [f"SQLite says: {error}"])


def _too_new(version: int) -> list[str]:
    known = len(sql.MIGRATIONS)
    return [f"its schema version is {version}, this code knows {known}: use the newer code"] if version > known else []


def _refuse_faults(faults: Sequence[str], what: Path, advice: str) -> None:
    if faults:
        raise CommandError(DAMAGED, "\n".join((f"{what} fails the check. {advice}", *faults)))


def _say_contents(found: sql.Findings) -> None:
    say(f"schema version: {found.version}")
    say("rows: " + ", ".join(f"{table} {count}" for table, count in found.rows.items()))


def _say_some(what: str, items: Sequence[str]) -> None:
    """At most 20 of them, each on a line."""
    for item in items[:20]:
        say(f"{what}: {item}")
    if len(items) > 20:
        say(f"{what}: and {len(items) - 20} more")


def _sync(path: Path) -> None:
    """Puts a file, or the names in a folder, on disk."""
    file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def beside(path: Path, suffix: str) -> Path:
    """The path with a suffix appended to its name: `a.db` and `-wal` give `a.db-wal`."""
    return path.with_name(path.name + suffix)


def _new_file(path: Path) -> int:
    """A file of nobody else's to read, for all that a database tells."""
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)


def _remove(path: Path) -> None:
    """Removes a database of ours that is not in use, with what SQLite keeps beside it."""
    for suffix in ("", *_BESIDE):
        beside(path, suffix).unlink(missing_ok=True)


# --- backup -----------------------------------------------------------------------------------------


def backup(settings: Settings, given: argparse.Namespace) -> None:
    """Writes all that was committed when it began to a file, which has its name once it is whole."""
    target, made_at = given.file.absolute(), now()
    partial = beside(target, ".partial")
    if not target.parent.is_dir():
        raise CommandError(FILE_PROBLEM, f"{target.parent} is no folder: make it first.")
    if os.path.lexists(target):
        raise CommandError(FILE_PROBLEM, f"{target} exists already and is left as it is: choose another name.")
    try:
        os.close(_new_file(partial))
    except FileExistsError as error:
        advice = "another backup writes it, or one was killed. If none runs, delete it."
        raise CommandError(FILE_PROBLEM, f"{partial} exists: {advice}") from error
    try:
        _copy_pages(settings.db_path, partial)
        manifest = {"made_at": made_at, "database": str(settings.db_path), **_described(partial, settings)}
        file_utils.write_atomic(beside(target, ".files.json"), json.dumps(manifest, indent=1).encode(), 0o600)
        partial.rename(target)
        _sync(target.parent)
    finally:
        _remove(partial)
    say(f"backup: {target} ({target.stat().st_size} bytes), as of {made_at}")
    say(f"list of files: {beside(target, '.files.json')}")
    say(f"copy beside it: {settings.images}, {settings.projects}, {settings.data / 'secret.key'}")


def _copy_pages(path: Path, partial: Path) -> None:
    """Copies one state of the database, whoever writes meanwhile: the read transaction is what holds it still."""
    with reading(path) as conn:
        conn.execute("BEGIN")
        sql.schema_version(conn)  # the first reading after BEGIN fixes the state that is copied
        with closing(sqlite3.connect(partial, isolation_level=None)) as copy:
            copy.execute("PRAGMA synchronous=OFF")  # it is synced when it is whole
            progress = Progress(tell, "copying")
            conn.backup(copy, pages=4096, progress=lambda _, left, total: progress(total - left, total))
            copy.execute("PRAGMA journal_mode=DELETE")  # one file, without others beside it
    _sync(partial)


def _described(partial: Path, settings: Settings) -> dict[str, object]:
    """What a backup holds and what belongs beside it. Raises CommandError where it fails the check."""
    with _reading_copy(partial) as conn:
        found = _examine(conn, partial)
        _refuse_faults(found.faults, settings.db_path, "No backup was made: restore one made before.")
        inventory = _inventory(conn, settings, found)
    with partial.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    _say_contents(found)
    return {
        "sha256": digest,
        "bytes": partial.stat().st_size,
        "schema_version": found.version,
        "rows": found.rows,
        "images_dir": str(settings.images),
        "projects_dir": str(settings.projects),
        **inventory,
    }


@contextmanager
def _reading_copy(path: Path) -> Iterator[Connection]:
    """A connection to a file that nobody else uses."""
    with closing(sqlite3.connect(path, isolation_level=None)) as conn:
        conn.execute("PRAGMA trusted_schema=OFF")
        yield conn


def _inventory(conn: Connection, settings: Settings, found: sql.Findings) -> dict[str, list[dict[str, Any]]]:
    """The files that the rows speak of, and what of them is on disk now; sizes in bytes."""
    progress = Progress(tell, "looking at images and folders")
    images = []
    if "message_images" in found.rows:
        for message_id, file in sql.select_all_images(conn):
            images.append({"message_id": message_id, "file": file, **_image_on_disk(settings.images / file)})
            progress(len(images), found.rows["message_images"])
    projects = []
    for project_id, path in sql.select_project_paths(conn):
        projects.append({"id": project_id, "path": path, **_folder_on_disk(path)})
        progress(len(projects), found.rows["projects"])
    return {"images": images, "projects": projects}


def _image_on_disk(path: Path) -> dict[str, Any]:
    there = path.is_file()
    return {"there": there, "bytes": path.stat().st_size if there else 0}


def _folder_on_disk(path: str) -> dict[str, Any]:
    """A project of old may have no folder: its path is empty."""
    files = size = 0
    for top, _, names in os.walk(path) if path else ():
        for name in names:
            with suppress(FileNotFoundError):  # removed meanwhile
                size += Path(top, name).lstat().st_size
                files += 1
    return {"there": bool(path) and Path(path).is_dir(), "files": files, "bytes": size}


# --- restore ----------------------------------------------------------------------------------------


def restore(settings: Settings, given: argparse.Namespace) -> None:
    """Puts a checked copy of a backup in the database's place; a kill at any moment leaves one of the two whole."""
    source, path, new = given.file.absolute(), settings.db_path, beside(settings.db_path, ".restoring")
    if not source.is_file():
        raise CommandError(FILE_PROBLEM, f"{source} is not there, or is no file: name a backup.")
    if path.exists() and source.samefile(path):
        raise CommandError(FILE_PROBLEM, f"{source} is the database itself: name a backup.")
    path.parent.mkdir(parents=True, exist_ok=True)
    with closing(FileLock(beside(path, ".lock"))) as lock, lock:  # a service that starts now waits for the end
        _refuse_while_served(path)
        _refuse_while_served(source)
        _forget_unfinished(path, new)
        try:
            found, differences = _copy_checked(settings, source, new)
            kept = _swap(path, new)
        finally:
            _remove(new)
    say(f"restored: {source} is now {path}")
    if kept:
        say(f"the database that was there: {kept}")
    _say_contents(found)
    if found.version < len(sql.MIGRATIONS):
        say("its schema is older: the next start brings it up to date")
    _say_some("attention", differences)


def _refuse_while_served(path: Path) -> None:
    """Raises CommandError while a service runs on this database."""
    lease = Lease(beside(path, ".workers"))
    living = [file.read_text() for file in beside(path, ".workers").glob("*") if lease.alive(file.name)]
    if living:
        who = ", ".join(f"process {pid}" if pid else "a process of older code" for pid in sorted(living))
        advice = "Stop it (pm2 stop clawd-backend, or Ctrl-C), wait until it has ended, and try again."
        raise CommandError(IN_USE, f"A service runs on {path}: {who}. Nothing was changed. {advice}")


def _forget_unfinished(path: Path, new: Path) -> None:
    """Removes what a restore that was killed left; a second name of the database itself is no copy of it."""
    _remove(new)
    for kept in path.parent.iterdir():
        ours = kept.name.startswith(f"{path.name}.") and kept.name.endswith(".replaced.backup")
        if ours and path.exists() and kept.samefile(path):
            kept.unlink()


def _copy_checked(settings: Settings, source: Path, new: Path) -> tuple[sql.Findings, list[str]]:
    """Copies a backup, with what lies beside it where it was no backup but a database, and checks the copy."""
    listed = _read_list(source)
    digest = _copy_file(source, new)
    if listed and listed["sha256"] != digest:
        advice = f"Use another backup; to take this one in spite of it, delete {source.name}.files.json."
        raise CommandError(DAMAGED, f"{source} is not as `backup` wrote it: its SHA-256 differs. {advice}")
    for suffix in ("-wal", "-journal"):
        if beside(source, suffix).exists():
            _copy_file(beside(source, suffix), beside(new, suffix))
    with _reading_copy(new) as conn:
        found = _examine(conn, new)
        _refuse_faults(found.faults + _too_new(found.version), source, "The database is as it was.")
        differences = _differences(_inventory(conn, settings, found), listed, settings)
        conn.execute("PRAGMA journal_mode=WAL")  # as the service has it; on closing all is in the one file
    if any(beside(new, suffix).exists() for suffix in _BESIDE):
        raise CommandError(FILE_PROBLEM, f"{new} could not be written out: look at the disk. Nothing was changed.")
    _take_after(settings.db_path, new)
    _sync(new)
    return found, differences


def _copy_file(source: Path, target: Path) -> str:
    """Copies a file's bytes; returns their SHA-256 in hex."""
    digest, size, done, progress = hashlib.sha256(), source.stat().st_size, 0, Progress(tell, "copying")
    with source.open("rb") as read, os.fdopen(_new_file(target), "wb") as write:
        while chunk := read.read(4 * 1024 * 1024):
            write.write(chunk)
            digest.update(chunk)
            done += len(chunk)
            progress(done, size)
    return digest.hexdigest()


def _read_list(source: Path) -> dict[str, Any] | None:
    """The list of files beside a backup: the images' by name, the projects' by id. None where there is none."""
    path = beside(source, ".files.json")
    try:
        listed = json.loads(path.read_bytes())
        return {
            "sha256": listed["sha256"],
            "images": {image["file"]: image["bytes"] for image in listed["images"] if image["there"]},
            "projects": {project["id"]: project["files"] for project in listed["projects"] if project["there"]},
        }
    except FileNotFoundError:
        return None
    except (ValueError, LookupError, TypeError) as error:
        raise CommandError(DAMAGED, f"{path} is damaged: delete it to restore without it.") from error


def _differences(
    inventory: dict[str, list[dict[str, Any]]], listed: dict[str, Any] | None, settings: Settings
) -> list[str]:
    """What the rows or the list speak of and is not on disk as it was."""
    images, projects = (listed["images"], listed["projects"]) if listed else ({}, {})
    told = []
    for image in inventory["images"]:
        if not image["there"]:
            already = "" if not listed or image["file"] in images else ", as it was when the backup was made"
            told.append(f"the image {settings.images / image['file']} is missing{already}")
        elif image["bytes"] != images.get(image["file"], image["bytes"]):
            told.append(f"the image {settings.images / image['file']} has another size than in the backup")
    for project in inventory["projects"]:
        if not project["there"] and project["path"]:
            already = "" if not listed or project["id"] in projects else ", as it was when the backup was made"
            told.append(f"the folder {project['path']} of project {project['id']} is missing{already}")
        elif project["files"] < projects.get(project["id"], 0):
            had = projects[project["id"]]
            told.append(f"the folder {project['path']} has {project['files']} files, it had {had} at the backup")
    return told


def _take_after(path: Path, new: Path) -> None:
    """Gives the new file the owner and mode of the one that it replaces, which root may do for another user."""
    if path.exists():
        old, own = path.stat(), new.stat()
        if (old.st_uid, old.st_gid) != (own.st_uid, own.st_gid):
            os.chown(new, old.st_uid, old.st_gid)
        new.chmod(old.st_mode & 0o777)


def _swap(path: Path, new: Path) -> Path | None:
    """Renames the new database into its place; the old one stays under another name, which is returned.

    No -wal or -journal of the old may ever lie beside the new: SQLite would play it into it.
    """
    if path.exists():
        _close_down(path)
    kept = beside(path, f".{datetime.now(UTC):%Y%m%dT%H%M%S%fZ}.replaced.backup")
    if path.exists():
        os.link(path, kept)
    for suffix in _BESIDE:  # only a damaged one has these, or one that was deleted by hand
        if beside(path, suffix).exists():
            beside(path, suffix).rename(beside(kept, suffix))
    _sync(path.parent)
    new.replace(path)
    _sync(path.parent)
    return kept if kept.exists() else None


def _close_down(path: Path) -> None:
    """Brings what the -wal holds into the database and closes it, alone; a damaged one stays as it is."""
    try:
        with closing(_connect_to_read(path)) as conn:
            sql.schema_version(conn)
        with closing(sqlite3.connect(path, isolation_level=None)) as conn:
            conn.execute("PRAGMA journal_mode=DELETE")
    except sqlite3.DatabaseError as error:
        if exit_status(error) != DAMAGED:
            raise


# --- check ------------------------------------------------------------------------------------------


def check(settings: Settings, _: argparse.Namespace) -> None:
    """Says what is in the database. Raises CommandError where something is wrong with it."""
    with reading(settings.db_path) as conn:
        found = _examine(conn, settings.db_path)
        missing = _missing_images(conn, settings, found) & _missing_images(
            conn, settings, found
        )  # not deleted meanwhile
    say(f"database: {settings.db_path}")
    _say_contents(found)
    _say_some("missing image", sorted(missing))
    _refuse_faults(found.faults + _too_new(found.version), settings.db_path, "Restore a backup.")
    if missing:
        raise CommandError(DAMAGED, f"The database is sound; bring the missing files back into {settings.images}.")
    say("the database is sound, and every image is there")


def _missing_images(conn: Connection, settings: Settings, found: sql.Findings) -> set[str]:
    if "message_images" not in found.rows:
        return set()
    return {file for _, file in sql.select_all_images(conn) if not (settings.images / file).is_file()}


def exit_status(error: sqlite3.Error) -> int:
    """The exit status for what SQLite says."""
    code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR) & 0xFF
    if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
        return IN_USE
    return DAMAGED if code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB) else FILE_PROBLEM
