"""The migrations of the schema, the runner that applies them, and the check of a whole database."""

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
from .versions import store_replies_in_pieces

log = logging.getLogger("clawd.database")


MAX_ID = 2**63 - 1  # SQLite's largest integer; Python's sqlite3 raises OverflowError past it


# Append only. Each migration runs in one transaction, which also sets `user_version`. After version 1, a migration
# may only add to the schema, because during a restart an old worker may still be serving on it.
MIGRATIONS: tuple[Callable[[Connection, AdoptionContext], None], ...] = (adopt, store_replies_in_pieces)


# Our tables that have foreign keys. Tables of other programs in the same file are not checked: a broken reference
# in one of them must not prevent the start.
REFERRING = ("projects", "sessions", "messages", "message_images", "turns", "reply_pieces")


def migrate(path: Path, context: AdoptionContext | None = None) -> None:
    """Migrates a database file to the newest schema, or creates it. Copies an existing file before migrating it.

    Without a context, images of a legacy database stay in their column, and its relative project paths are resolved
    against the current directory. Raises errors.Unavailable, and leaves the file unchanged, if its schema is newer
    than this code, it is damaged, or it is not a database.
    """
    try:
        with closing(_connect_without_changes(path)) as conn:
            version = schema_version(conn)
            if version > len(MIGRATIONS):
                raise errors.Unavailable(
                    f"{path} has schema version {version}, but this code supports only versions up to "
                    f"{len(MIGRATIONS)}. Start the newer code, or restore a backup with an older schema.",
                    code="database_unavailable",
                )
            outdated = version < len(MIGRATIONS) and count(conn, "sqlite_master") > 0
            if outdated:
                _check_integrity(conn, path)
        if version < len(MIGRATIONS):
            _migrate_from(path, version, outdated, context or AdoptionContext(lambda _key, _image: None, Path.cwd()))
    except sqlite3.DatabaseError as error:
        if getattr(error, "sqlite_errorcode", 0) & 0xFF in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
            message = f"Cannot open {path} as a database: {error}. {_RESTORE}"
        else:
            message = f"Cannot open or migrate {path}: {error}. The file is unchanged."
        raise errors.Unavailable(message, code="database_unavailable") from error


_RESTORE = "If the file is damaged, restore a backup: python database.py restore FILE"


def _connect_without_changes(path: Path) -> Connection:
    """Opens a connection for reading that leaves an existing file unchanged.

    A connection that may write would copy the contents of a -wal file, which a crash left, into the database.
    """
    if path.exists() and path.with_name(path.name + "-wal").exists():
        return sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True, isolation_level=None)
    return sqlite3.connect(path, isolation_level=None)


def _migrate_from(path: Path, version: int, outdated: bool, context: AdoptionContext) -> None:
    with closing(sqlite3.connect(path, isolation_level=None)) as conn:
        conn.create_function("email_key", 1, email_key, deterministic=True)
        if outdated:
            _copy_database(conn, path, version)
        conn.execute("PRAGMA cache_size=-262144")  # 256 MB, for this connection only
        conn.execute("PRAGMA legacy_alter_table=ON")  # otherwise a view on a legacy table makes its rename fail
        for number in range(version, len(MIGRATIONS)):
            _apply(conn, MIGRATIONS[number], number + 1, context)


def _check_integrity(conn: Connection, path: Path) -> None:
    found = conn.execute("PRAGMA integrity_check(1)").fetchone()[0]
    if found != "ok":
        raise errors.Unavailable(f"{path} is damaged: {found}. {_RESTORE}", code="database_unavailable")


def _copy_database(conn: Connection, path: Path, version: int) -> None:
    """Copies the database before its migration, unless the newest such copy is identical.

    Without that comparison, a start that fails again and again would fill the disk with copies.
    """
    size = path.stat().st_size // 1_000_000
    log.info("migrating %s (%d MB) from schema version %d, copying it first", path, size, version)
    partial = path.with_name(f"{path.name}.v{version}.partial.backup")
    partial.unlink(missing_ok=True)
    conn.execute("VACUUM INTO ?", (str(partial),))
    with partial.open("rb") as file:
        os.fsync(file.fileno())
    copies = sorted(path.parent.glob(f"{glob.escape(path.name)}.*Z.v{version}.backup"))
    if copies and filecmp.cmp(copies[-1], partial, shallow=False):
        partial.unlink()
        log.info("an identical copy already exists: %s", copies[-1].name)
        return
    copy = path.with_name(f"{path.name}.{datetime.now(UTC):%Y%m%dT%H%M%S%fZ}.v{version}.backup")
    partial.rename(copy)
    log.info("copied the database to %s", copy.name)


def _apply(
    conn: Connection,
    migration: Callable[[Connection, AdoptionContext], None],
    version: int,
    context: AdoptionContext,
) -> None:
    conn.execute("BEGIN IMMEDIATE")
    try:
        migration(conn, context)
        existing = {row[0] for row in conn.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
        for table in existing.intersection(REFERRING):
            if conn.execute(f"PRAGMA foreign_key_check({table})").fetchone():
                raise sqlite3.IntegrityError(f"a row of {table} references a row that does not exist")
        conn.execute(f"PRAGMA user_version={version:d}")
        conn.execute("COMMIT")
    finally:
        if conn.in_transaction:
            conn.execute("ROLLBACK")


def schema_version(conn: Connection) -> int:
    """Returns the version of the schema; 0 for a legacy database or an empty file."""
    return int(conn.execute("PRAGMA user_version").fetchone()[0])


class Findings(NamedTuple):
    """The result of `examine`: the schema version, the number of rows by table, and a sentence for each fault."""

    version: int
    rows: dict[str, int]
    faults: list[str]


def examine(conn: Connection) -> Findings:
    """Checks the integrity, the tables and the foreign keys of a database, and counts its rows.

    Lists at most 20 faults from `integrity_check` and 20 per table. Raises sqlite3.DatabaseError if the file cannot
    be read.
    """
    faults = [row[0] for row in conn.execute("PRAGMA integrity_check(20)") if row[0] != "ok"]
    version = schema_version(conn)
    names = [row[0] for row in conn.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
    if missing := sorted(LEGACY.keys() - {name.lower() for name in names}):
        faults.append(f"this is not a database of this service: it lacks the tables {', '.join(missing)}")
        return Findings(version, {}, faults)
    if version:  # a legacy database may have such rows; its migration moves them to orphaned_…
        faults += [
            f"a row of {table} (rowid {rowid}) references a row of {parent} that does not exist"
            for checked in REFERRING
            if checked in names
            for table, rowid, parent, _ in conn.execute(f"PRAGMA foreign_key_check({checked})").fetchmany(20)
        ]
    ours = [name for name in names if not name.startswith("sqlite_")]
    rows = {name: int(conn.execute(f'SELECT count(*) FROM "{name}"').fetchone()[0]) for name in ours}
    return Findings(version, rows, faults)


def rewrite_version(conn: Connection) -> None:
    """Writes the version of the schema unchanged, which proves that the database can be written.

    SQLite writes the page that contains it to the WAL, and syncs it at the commit, although no byte differs.
    """
    conn.execute(f"PRAGMA user_version={schema_version(conn):d}")


def check(conn: Connection) -> None:
    """Reads from the database. Raises sqlite3.Error if that fails."""
    conn.execute("SELECT count(*) FROM (SELECT 1 FROM users LIMIT 1)").fetchone()
