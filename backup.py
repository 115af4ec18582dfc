"""The commands `backup`, `restore` and `check`: copy, replace and check the database file."""

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
from database import close_or_leave
from locks import LOCK_TIMEOUT, FileLock, Lease, LockHeldError
from settings import Settings
from telemetry import Progress

DAMAGED, IN_USE, FILE_PROBLEM = 1, 3, 4  # exit statuses; 0 means done, argparse uses 2 for wrong arguments
_SQLITE_FILES = ("-wal", "-journal", "-shm")  # files that SQLite creates next to a database that is in use


class CommandError(Exception):
    """Ends a command with an exit status and a message for the operator."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


def print_stdout(line: str) -> None:
    """Prints a line of the command's result to stdout."""
    sys.stdout.write(line + "\n")


def print_stderr(line: str) -> None:
    """Prints progress or an error to stderr."""
    sys.stderr.write(line + "\n")
    sys.stderr.flush()


@contextmanager
def open_to_read(path: Path) -> Iterator[Connection]:
    """Opens a read-only connection to a database that a service may be using.

    The connection changes nothing, not even the journal mode, and makes no checkpoint. Raises CommandError if there
    is no such file.
    """
    if not path.is_file():
        raise CommandError(FILE_PROBLEM, f"The database {path} does not exist. Select one with --database or DB_PATH.")
    with closing(FileLock(path.with_name(path.name + ".lock"))) as lock:
        conn = _connect_to_read(path)
        try:
            yield conn
        finally:
            close_or_leave(lock, [conn], LOCK_TIMEOUT)


def _connect_to_read(path: Path) -> Connection:
    conn = sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True, isolation_level=None)
    conn.execute("PRAGMA busy_timeout=5000")
    conn.execute("PRAGMA trusted_schema=OFF")
    return conn


def _examine(conn: Connection, what: Path) -> sql.Findings:
    """Checks a database and counts its rows, see `sql.examine`. Damage that prevents reading is a fault, too."""
    print_stderr(f"checking {what.name} ({what.stat().st_size / 1e6:.1f} MB)")
    try:
        return sql.examine(conn)
    except sqlite3.DatabaseError as error:
        if exit_status(error) != DAMAGED:
            raise
        return sql.Findings(0, {}, [f"SQLite error: {error}"])


def _too_new(version: int) -> list[str]:
    known = len(sql.MIGRATIONS)
    if version <= known:
        return []
    return [f"its schema version is {version}, but this code supports only versions up to {known}: use the newer code"]


def _refuse_faults(faults: Sequence[str], what: Path, advice: str) -> None:
    if faults:
        raise CommandError(DAMAGED, "\n".join((f"{what} failed the check. {advice}", *faults)))


def _print_contents(found: sql.Findings) -> None:
    print_stdout(f"schema version: {found.version}")
    print_stdout("rows: " + ", ".join(f"{table} {count}" for table, count in found.rows.items()))


def _print_some(what: str, items: Sequence[str]) -> None:
    """Prints a line for each of the first 20 items, and the number of the others."""
    for item in items[:20]:
        print_stdout(f"{what}: {item}")
    if len(items) > 20:
        print_stdout(f"{what}: and {len(items) - 20} more")


def _sync(path: Path) -> None:
    """Syncs a file, or the names of the files in a folder, to disk."""
    file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def suffixed(path: Path, suffix: str) -> Path:
    """Returns a path with a suffix appended to its name: `a.db` and `-wal` give `a.db-wal`."""
    return path.with_name(path.name + suffix)


def _new_file(path: Path) -> int:
    """Creates a file that only its owner can read, since a database contains private messages and password hashes."""
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)


def _remove(path: Path) -> None:
    """Removes a temporary database that is not in use, and the files that SQLite created next to it."""
    for suffix in ("", *_SQLITE_FILES):
        suffixed(path, suffix).unlink(missing_ok=True)


# --- backup -----------------------------------------------------------------------------------------


def backup(settings: Settings, given: argparse.Namespace) -> None:
    """Writes a backup of everything that was committed before it began, and the list of its files.

    The backup gets its name only once it is complete and checked. Raises CommandError.
    """
    target, made_at = given.file.absolute(), now()
    partial = suffixed(target, ".partial")
    if not target.parent.is_dir():
        raise CommandError(FILE_PROBLEM, f"The directory {target.parent} does not exist. Create it first.")
    if os.path.lexists(target):
        raise CommandError(FILE_PROBLEM, f"{target} already exists and was not changed. Choose another name.")
    try:
        os.close(_new_file(partial))
    except FileExistsError as error:
        advice = "A backup of this name is running or was killed. If none is running, delete the file."
        raise CommandError(FILE_PROBLEM, f"{partial} already exists. {advice}") from error
    try:
        _copy_pages(settings.db_path, partial)
        manifest = {"made_at": made_at, "database": str(settings.db_path), **_describe(partial, settings)}
        file_utils.write_atomic(suffixed(target, ".files.json"), json.dumps(manifest, indent=1).encode(), 0o600)
        partial.rename(target)
        _sync(target.parent)
    finally:
        _remove(partial)
    print_stdout(f"backup: {target} ({target.stat().st_size} bytes), as of {made_at}")
    print_stdout(f"list of files: {suffixed(target, '.files.json')}")
    print_stdout(f"not included, copy also: {settings.images}, {settings.projects}, {settings.data / 'secret.key'}")


def _copy_pages(path: Path, partial: Path) -> None:
    """Copies one state of the database, which a read transaction preserves while other processes write."""
    with open_to_read(path) as conn:
        conn.execute("BEGIN")
        sql.schema_version(conn)  # the first read after BEGIN determines the state that is copied
        with closing(sqlite3.connect(partial, isolation_level=None)) as copy:
            copy.execute("PRAGMA synchronous=OFF")  # `_sync` below syncs the complete file
            progress = Progress(print_stderr, "copying")
            conn.backup(copy, pages=4096, progress=lambda _, left, total: progress(total - left, total))
            copy.execute("PRAGMA journal_mode=DELETE")  # leaves one file, without a -wal
    _sync(partial)


def _describe(partial: Path, settings: Settings) -> dict[str, object]:
    """Returns the content of a backup's `.files.json`. Raises CommandError if the backup fails the check."""
    with _open_copy(partial) as conn:
        found = _examine(conn, partial)
        _refuse_faults(found.faults, settings.db_path, "No backup was made. Restore an earlier one.")
        inventory = _inventory(conn, settings, found)
    with partial.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    _print_contents(found)
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
def _open_copy(path: Path) -> Iterator[Connection]:
    """Opens a connection to a copy that no other process uses."""
    with closing(sqlite3.connect(path, isolation_level=None)) as conn:
        conn.execute("PRAGMA trusted_schema=OFF")
        yield conn


def _inventory(conn: Connection, settings: Settings, found: sql.Findings) -> dict[str, list[dict[str, Any]]]:
    """Lists the images and project folders that the rows reference: whether they exist now, and sizes in bytes."""
    progress = Progress(print_stderr, "checking images and folders")
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
    """Counts the files of a project folder. The path of a legacy project without a folder is empty."""
    files = size = 0
    for top, _, names in os.walk(path) if path else ():
        for name in names:
            with suppress(FileNotFoundError):  # the file was removed since the listing
                size += Path(top, name).lstat().st_size
                files += 1
    return {"there": bool(path) and Path(path).is_dir(), "files": files, "bytes": size}


# --- restore ----------------------------------------------------------------------------------------


def restore(settings: Settings, given: argparse.Namespace) -> None:
    """Replaces the database with a checked copy of a backup. Raises CommandError.

    If the process is killed, either the old or the new database is in place, complete.
    """
    source, path, new = given.file.absolute(), settings.db_path, suffixed(settings.db_path, ".restoring")
    if not source.is_file():
        raise CommandError(FILE_PROBLEM, f"{source} does not exist or is not a file. Name a backup.")
    if path.exists() and source.samefile(path):
        raise CommandError(FILE_PROBLEM, f"{source} is the database itself. Name a backup.")
    path.parent.mkdir(parents=True, exist_ok=True)
    with closing(FileLock(suffixed(path, ".lock"))) as lock, lock:  # a service that is started now waits
        _refuse_while_served(path)
        _refuse_while_served(source)
        _remove_leftovers(path, new)
        try:
            found, differences = _copy_checked(settings, source, new)
            kept = _swap(path, new)
        finally:
            _remove(new)
    print_stdout(f"restored: {source} is now {path}")
    if kept:
        print_stdout(f"replaced database: {kept}")
    _print_contents(found)
    if found.version < len(sql.MIGRATIONS):
        print_stdout("its schema is older: the next start of the service migrates it")
    _print_some("warning", differences)


def _refuse_while_served(path: Path) -> None:
    """Raises CommandError if a service is running on this database."""
    living = Lease(suffixed(path, ".workers")).processes()
    if living:
        who = ", ".join(f"process {pid}" if pid else "a process of an older version" for pid in sorted(living))
        advice = "Stop it (pm2 stop clawd-backend, or Ctrl-C), wait until it has ended, and try again."
        raise CommandError(IN_USE, f"A service is running on {path}: {who}. Nothing was changed. {advice}")


def _remove_leftovers(path: Path, new: Path) -> None:
    """Removes the files that a killed restore left.

    A `.replaced.backup` may be a hard link to the database itself, if `_swap` was killed after creating it. It is
    removed, because it does not contain a replaced database.
    """
    _remove(new)
    for kept in path.parent.iterdir():
        ours = kept.name.startswith(f"{path.name}.") and kept.name.endswith(".replaced.backup")
        if ours and path.exists() and kept.samefile(path):
            kept.unlink()


def _copy_checked(settings: Settings, source: Path, new: Path) -> tuple[sql.Findings, list[str]]:
    """Copies a backup and checks the copy. Returns the findings, and the files that are missing or differ.

    If `source` is not a backup but a database file, its -wal or -journal belongs to it and is copied too.
    """
    listed = _read_list(source)
    digest = _copy_file(source, new)
    if listed and listed["sha256"] != digest:
        advice = f"Use another backup. To restore this one nevertheless, delete {source.name}.files.json."
        raise CommandError(DAMAGED, f"{source} was changed after the backup: its SHA-256 differs. {advice}")
    for suffix in ("-wal", "-journal"):
        if suffixed(source, suffix).exists():
            _copy_file(suffixed(source, suffix), suffixed(new, suffix))
    with _open_copy(new) as conn:
        found = _examine(conn, new)
        _refuse_faults(found.faults + _too_new(found.version), source, "The database was not changed.")
        differences = _differences(_inventory(conn, settings, found), listed, settings)
        conn.execute("PRAGMA journal_mode=WAL")  # as the service sets it; closing leaves one file, without a -wal
    if any(suffixed(new, suffix).exists() for suffix in _SQLITE_FILES):
        raise CommandError(FILE_PROBLEM, f"Could not write {new} completely. Nothing was changed. Check the disk.")
    _copy_owner_and_mode(settings.db_path, new)
    _sync(new)
    return found, differences


def _copy_file(source: Path, target: Path) -> str:
    """Copies a file to a new file, and returns the SHA-256 of its bytes in hex."""
    digest, size, done, progress = hashlib.sha256(), source.stat().st_size, 0, Progress(print_stderr, "copying")
    with source.open("rb") as read, os.fdopen(_new_file(target), "wb") as write:
        while chunk := read.read(4 * 1024 * 1024):
            write.write(chunk)
            digest.update(chunk)
            done += len(chunk)
            progress(done, size)
    return digest.hexdigest()


def _read_list(source: Path) -> dict[str, Any] | None:
    """Reads the `.files.json` of a backup: bytes by image, number of files by project id. None if the list is missing.

    Leaves out images and folders that were missing at the time of the backup. Raises CommandError.
    """
    path = suffixed(source, ".files.json")
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
        raise CommandError(DAMAGED, f"{path} is damaged. Delete it to restore the backup without it.") from error


def _differences(
    inventory: dict[str, list[dict[str, Any]]], listed: dict[str, Any] | None, settings: Settings
) -> list[str]:
    """Returns a sentence for each image or folder that is missing or differs from the list of the backup."""
    images, projects = (listed["images"], listed["projects"]) if listed else ({}, {})
    found = []
    for image in inventory["images"]:
        if not image["there"]:
            already = "" if not listed or image["file"] in images else ", as it was when the backup was made"
            found.append(f"the image {settings.images / image['file']} is missing{already}")
        elif image["bytes"] != images.get(image["file"], image["bytes"]):
            found.append(f"the image {settings.images / image['file']} has another size than at the time of the backup")
    for project in inventory["projects"]:
        if not project["there"] and project["path"]:
            already = "" if not listed or project["id"] in projects else ", as it was when the backup was made"
            found.append(f"the folder {project['path']} of project {project['id']} is missing{already}")
        elif project["files"] < projects.get(project["id"], 0):
            had = projects[project["id"]]
            found.append(f"the folder {project['path']} has {project['files']} files, but had {had} in the backup")
    return found


def _copy_owner_and_mode(path: Path, new: Path) -> None:
    """Gives the new file the owner and mode of the file that it replaces, also when root runs the restore."""
    if path.exists():
        old, own = path.stat(), new.stat()
        if (old.st_uid, old.st_gid) != (own.st_uid, own.st_gid):
            os.chown(new, old.st_uid, old.st_gid)
        new.chmod(old.st_mode & 0o777)


def _swap(path: Path, new: Path) -> Path | None:
    """Renames the new database to its final name. Returns the name under which the old one remains, if there was one.

    A -wal or -journal of the old database must never be next to the new one, since SQLite would apply it to it.
    """
    if path.exists():
        _checkpoint(path)
    kept = suffixed(path, f".{datetime.now(UTC):%Y%m%dT%H%M%S%fZ}.replaced.backup")
    if path.exists():
        os.link(path, kept)
    for suffix in _SQLITE_FILES:  # exist only if the old database is damaged or was deleted by hand
        if suffixed(path, suffix).exists():
            suffixed(path, suffix).rename(suffixed(kept, suffix))
    _sync(path.parent)
    new.replace(path)
    _sync(path.parent)
    return kept if kept.exists() else None


def _checkpoint(path: Path) -> None:
    """Moves the contents of the -wal into the database, and removes it. Leaves a damaged database unchanged.

    Raises sqlite3.OperationalError if another process uses the database.
    """
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
    """Prints what the database contains. Raises CommandError if it is damaged or an image is missing."""
    with open_to_read(settings.db_path) as conn:
        found = _examine(conn, settings.db_path)
        # Twice, because a running service may delete an image after its row was read.
        missing = _missing_images(conn, settings, found) & _missing_images(conn, settings, found)
    print_stdout(f"database: {settings.db_path}")
    _print_contents(found)
    _print_some("missing image", sorted(missing))
    _refuse_faults(found.faults + _too_new(found.version), settings.db_path, "Restore a backup.")
    if missing:
        advice = f"Copy them back to {settings.images}."
        raise CommandError(DAMAGED, f"The database passed the check, but images are missing. {advice}")
    print_stdout("the database passed the check, and every image exists")


def _missing_images(conn: Connection, settings: Settings, found: sql.Findings) -> set[str]:
    if "message_images" not in found.rows:
        return set()
    return {file for _, file in sql.select_all_images(conn) if not (settings.images / file).is_file()}


def exit_status(error: sqlite3.Error | LockHeldError) -> int:
    """Returns the exit status for an error of SQLite, or for a lock that another process holds."""
    if isinstance(error, LockHeldError):
        return IN_USE
    code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR) & 0xFF
    if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
        return IN_USE
    return DAMAGED if code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB) else FILE_PROBLEM
