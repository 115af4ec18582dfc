"""The schema's versions: which migrations there are, and how a file is brought from any version to the newest."""

import filecmp
import glob
import logging
import os
import sqlite3
from collections.abc import Callable
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path
from sqlite3 import Connection
from typing import NamedTuple

import errors

from .adoption import LEGACY, AdoptionContext, adopt, count
from .users import email_key

log = logging.getLogger("clawd.database")


MAX_ID = 2**63 - 1  # SQLite's largest integer; Python's sqlite3 raises OverflowError past it


# Append only. Each runs in a transaction of its own together with its `user_version`, and only adds to what
# the version before it left, because a process of that version may still be serving.
MIGRATIONS: tuple[Callable[[Connection, AdoptionContext], None], ...] = (adopt,)


# The tables of ours that refer to others. What a stranger's table refers to is its own affair.
REFERRING = ("projects", "sessions", "messages", "message_images", "turns")


def migrate(path: Path, context: AdoptionContext | None = None) -> None:
    """Brings the file to the newest schema, a copy of it beside it first. Without a context the images of a legacy
    database stay in their column, and its relative paths begin at the current directory.

    Raises errors.Unavailable, and leaves the file as it is, where it is newer than this code, damaged, or no
    database.
    """
    try:
        with closing(_connect_to_look(path)) as conn:
            version = schema_version(conn)
            if version > len(MIGRATIONS):
                raise errors.Unavailable(
                    f"{path} has schema version {version}, this code knows {len(MIGRATIONS)}: "
                    "start the newer code, or restore a backup made before it.",
                    code="database_unavailable",
                )
            old = version < len(MIGRATIONS) and count(conn, "sqlite_master") > 0
            if old:
                _check_integrity(conn, path)
        if version < len(MIGRATIONS):
            _walk_up(path, version, old, context or AdoptionContext(lambda _key, _image: None, Path.cwd()))
    except sqlite3.DatabaseError as error:
        if getattr(error, "sqlite_errorcode", 0) & 0xFF in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
            message = f"{path} cannot be opened as a database: {error}. {_RESTORE}"
        else:
            message = f"{path} cannot be opened, or brought to this code's schema: {error}. It is as it was."
        raise errors.Unavailable(message, code="database_unavailable") from error


_RESTORE = "Where it is damaged, restore a backup: python database.py restore FILE"


def _connect_to_look(path: Path) -> Connection:
    """A connection that changes nothing: one that may write plays what a crash left in the -wal into the file."""
    if path.exists() and path.with_name(path.name + "-wal").exists():
        return sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True, isolation_level=None)
    return sqlite3.connect(path, isolation_level=None)


def _walk_up(path: Path, version: int, old: bool, context: AdoptionContext) -> None:
    with closing(sqlite3.connect(path, isolation_level=None)) as conn:
        conn.create_function("email_key", 1, email_key, deterministic=True)
        if old:
            _copy_beside(conn, path, version)
        conn.execute("PRAGMA cache_size=-262144")  # 256 MB, for as long as this takes
        conn.execute("PRAGMA legacy_alter_table=ON")  # a view on the tables of old must not be in the way
        for number in range(version, len(MIGRATIONS)):
            _apply(conn, MIGRATIONS[number], number + 1, context)


def _check_integrity(conn: Connection, path: Path) -> None:
    found = conn.execute("PRAGMA integrity_check(1)").fetchone()[0]
    if found != "ok":
        raise errors.Unavailable(f"{path} is damaged: {found}. {_RESTORE}", code="database_unavailable")


def _copy_beside(conn: Connection, path: Path, version: int) -> None:
    """A copy of the database as it was, unless there is one that is the same: a start that fails over and over
    must not fill the disk."""
    size = path.stat().st_size // 1_000_000
    log.info("migrating %s (%d MB) from version %d: first a copy of it is made", path, size, version)
    partial = path.with_name(f"{path.name}.v{version}.partial.backup")
    partial.unlink(missing_ok=True)
    conn.execute("VACUUM INTO ?", (str(partial),))
    with partial.open("rb") as file:
        os.fsync(file.fileno())
    copies = sorted(path.parent.glob(f"{glob.escape(path.name)}.*Z.v{version}.backup"))
    if copies and filecmp.cmp(copies[-1], partial, shallow=False):
        partial.unlink()
        log.info("%s is such a copy already", copies[-1].name)
        return
    copy = path.with_name(f"{path.name}.{datetime.now(UTC):%Y%m%dT%H%M%S%fZ}.v{version}.backup")
    partial.rename(copy)
    log.info("the copy is %s", copy.name)


def _apply(
    conn: Connection,
    migration: Callable[[Connection, AdoptionContext], None],
    version: int,
    context: AdoptionContext,
) -> None:
    conn.execute("BEGIN IMMEDIATE")
    try:
        migration(conn, context)
        for table in REFERRING:
            if conn.execute(f"PRAGMA foreign_key_check({table})").fetchone():
                raise sqlite3.IntegrityError(f"a row of {table} refers to one that is not there")
        conn.execute(f"PRAGMA user_version={version:d}")
        conn.execute("COMMIT")
    finally:
        if conn.in_transaction:
            conn.execute("ROLLBACK")


def schema_version(conn: Connection) -> int:
    """The version of the schema; 0 for a legacy database or an empty file."""
    return int(conn.execute("PRAGMA user_version").fetchone()[0])


class Findings(NamedTuple):
    """What `examine` found: the version of the schema, the rows of each table, and what is wrong."""

    version: int
    rows: dict[str, int]
    faults: list[str]


def examine(conn: Connection) -> Findings:
    """Checks a database as a whole, and lists at most 20 faults of a kind. Raises sqlite3.DatabaseError where the
    file cannot be read at all."""
    faults = [row[0] for row in conn.execute("PRAGMA integrity_check(20)") if row[0] != "ok"]
    version = schema_version(conn)
    names = [row[0] for row in conn.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
    if missing := sorted(LEGACY.keys() - set(names)):
        faults.append(f"it is not a database of this service: it has no table {', '.join(missing)}")
        return Findings(version, {}, faults)
    if version:  # a legacy database may have such rows; the migration sets them aside
        faults += [
            f"a row of {table} (rowid {rowid}) refers to one of {parent} that does not exist"
            for checked in REFERRING
            if checked in names
            for table, rowid, parent, _ in conn.execute(f"PRAGMA foreign_key_check({checked})").fetchmany(20)
        ]
    ours = [name for name in names if not name.startswith("sqlite_")]
    rows = {name: int(conn.execute(f'SELECT count(*) FROM "{name}"').fetchone()[0]) for name in ours}
    return Findings(version, rows, faults)


def check(conn: Connection) -> None:
    """Raises sqlite3.Error where the database cannot be read."""
    conn.execute("SELECT count(*) FROM (SELECT 1 FROM users LIMIT 1)").fetchone()
