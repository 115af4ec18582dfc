"""Schema version 1: creates it, and migrates a legacy database, one from before migrations existed, to it."""

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from sqlite3 import Connection
from typing import NamedTuple

from telemetry import Progress

log = logging.getLogger("clawd.database")


class KeptImage(NamedTuple):
    """The file in which a legacy image was stored.

    `whole` is True if the file has the bytes of the original. A HEIC image is converted to JPEG, so its original stays
    in `messages.legacy_image`.
    """

    file: str
    whole: bool


class AdoptionContext(NamedTuple):
    """What the migration of a legacy database needs from the rest of the service.

    `keep_image(session key, base64)` stores an image as a file, or returns None if the text is not an image.
    `checkout` is the directory against which relative project paths are resolved.
    """

    keep_image: Callable[[str, str], KeptImage | None]
    checkout: Path


# The columns of a legacy database, each with the SQL expression that replaces a missing or NULL value. A new database
# gets these tables too, empty, so that one migration serves both cases.
LEGACY = {
    "users": {"email": "NULL", "name": "NULL", "password": "NULL", "created_at": "NULL"},
    "projects": {
        **{"user_id": "0", "name": "'Project'", "description": "NULL", "project_path": "''", "archived": "0"},
        **{"created_at": "NULL", "updated_at": "NULL"},
    },
    "sessions": {
        **{"project_id": "0", "session_key": "lower(hex(randomblob(16)))", "label": "NULL", "archived": "0"},
        **{"scope": "'private'", "channel": "'webchat'", "agent_id": "'main'", "created_at": "NULL"},
        "last_used_at": "NULL",
    },
    "messages": {
        **{"session_id": "0", "role": "'assistant'", "content": "''", "created_at": "NULL", "image": "NULL"},
    },
}
_NUMBERS = {"user_id", "project_id", "session_id", "archived"}
_TIMES = {"created_at", "updated_at", "last_used_at"}
_UNIQUE = {"email", "session_key"}
_LARGEST_ID = 2**63 - 1
_BATCH = 50_000  # messages that one statement copies


def _time(column: str) -> str:
    """Returns SQL that converts a legacy time to ISO 8601 in UTC, or to NULL if it is not a time.

    A legacy time is text, in UTC or with an offset, or a number of Unix seconds or milliseconds. The pattern excludes
    text such as `now` and `12:30`, which SQLite also accepts although it names no fixed instant.
    """
    seconds = f"CASE WHEN {column} BETWEEN -100000000000 AND 100000000000 THEN {column} ELSE {column} / 1000.0 END"
    form = "'%Y-%m-%dT%H:%M:%fZ'"
    return (
        f"CASE WHEN typeof({column}) IN ('integer', 'real') THEN strftime({form}, {seconds}, 'unixepoch') "
        f"WHEN {column} LIKE '____-__-__%' THEN strftime({form}, {column}) END"
    )


def _time_or_now(column: str) -> str:
    return f"coalesce({_time(column)}, strftime('%Y-%m-%dT%H:%M:%fZ', 'now'))"


# Original values that the new tables cannot contain: unknown columns, unreadable times, bytes that are not text,
# and relative project paths.
_LEGACY_VALUES = """CREATE TABLE legacy_values (table_name TEXT NOT NULL, row_id INTEGER NOT NULL,
           column_name TEXT NOT NULL, value, PRIMARY KEY (table_name, row_id, column_name)) WITHOUT ROWID"""
_TABLES = (
    # `email_key` is the normalized e-mail. If the e-mails of legacy accounts differ only in case, all but one
    # have their exact spelling there instead, since the column is unique.
    """CREATE TABLE new_users (id INTEGER PRIMARY KEY AUTOINCREMENT, email TEXT, email_key TEXT UNIQUE, name TEXT,
       password TEXT, token_version INTEGER NOT NULL DEFAULT 0, created_at TEXT NOT NULL)""",
    """CREATE TABLE new_projects (id INTEGER PRIMARY KEY AUTOINCREMENT,
       user_id INTEGER NOT NULL REFERENCES users(id) ON DELETE CASCADE, name TEXT NOT NULL, description TEXT,
       project_path TEXT NOT NULL, archived INTEGER NOT NULL DEFAULT 0, created_at TEXT NOT NULL,
       updated_at TEXT NOT NULL)""",
    """CREATE TABLE new_sessions (id INTEGER PRIMARY KEY AUTOINCREMENT,
       project_id INTEGER NOT NULL REFERENCES projects(id) ON DELETE CASCADE, session_key TEXT NOT NULL UNIQUE,
       label TEXT, archived INTEGER NOT NULL DEFAULT 0 CHECK (archived IN (0, 1)),
       scope TEXT NOT NULL DEFAULT 'private', channel TEXT NOT NULL DEFAULT 'webchat',
       agent_id TEXT NOT NULL DEFAULT 'main', created_at TEXT NOT NULL, last_used_at TEXT)""",
    """CREATE TABLE new_messages (id INTEGER PRIMARY KEY AUTOINCREMENT,
       session_id INTEGER NOT NULL REFERENCES sessions(id) ON DELETE CASCADE, role TEXT NOT NULL,
       content TEXT NOT NULL, status TEXT NOT NULL DEFAULT 'complete' CHECK (status IN
       ('queued', 'streaming', 'complete', 'stopped', 'interrupted', 'failed', 'empty')),
       error TEXT, usage TEXT, created_at TEXT NOT NULL, legacy_image TEXT)""",
    """CREATE TABLE message_images (id INTEGER PRIMARY KEY AUTOINCREMENT,
       message_id INTEGER NOT NULL REFERENCES messages(id) ON DELETE CASCADE, file TEXT NOT NULL)""",
)
_COPIES = (
    f"""INSERT INTO new_users (id, email, email_key, name, password, created_at)
        SELECT id, email, CASE WHEN row_number() OVER (PARTITION BY email_key(email)
                               ORDER BY email <> email_key(email), id) = 1 THEN email_key(email) ELSE email END,
               name, password, {_time_or_now("created_at")} FROM users""",
    f"""INSERT INTO new_projects SELECT id, user_id, name, description, project_path, archived,
        {_time_or_now("created_at")}, {_time_or_now("updated_at")}
        FROM projects WHERE user_id IN (SELECT id FROM users)""",
    f"""INSERT INTO new_sessions SELECT id, project_id, session_key, label, archived <> 0, scope, channel,
        agent_id, {_time_or_now("created_at")}, {_time("last_used_at")}
        FROM sessions WHERE project_id IN (SELECT id FROM new_projects)""",
)
_COPY_MESSAGES = f"""INSERT INTO new_messages (id, session_id, role, content, created_at, legacy_image)
    SELECT id, session_id, role, content, {_time_or_now("created_at")}, image FROM messages
    WHERE id > ? AND id <= ? AND session_id IN (SELECT id FROM new_sessions)"""
# Rows without an owner go unchanged to the tables orphaned_…. The sequences continue from the legacy ones, so that
# the id of a deleted row is never used again.
_REPLACE = (
    "CREATE TABLE orphaned_projects AS SELECT * FROM projects WHERE user_id NOT IN (SELECT id FROM users)",
    "CREATE TABLE orphaned_sessions AS SELECT * FROM sessions WHERE project_id NOT IN (SELECT id FROM new_projects)",
    """CREATE TABLE orphaned_messages AS SELECT * FROM messages
       WHERE session_id NOT IN (SELECT id FROM new_sessions)""",
    *(
        statement.format(table)
        for table in ("messages", "sessions", "projects", "users")
        for statement in (
            "DELETE FROM sqlite_sequence WHERE name = 'new_{0}'",
            """INSERT INTO sqlite_sequence (name, seq) SELECT 'new_{0}', max(
               coalesce((SELECT max(id) FROM {0}), 0),
               coalesce((SELECT max(seq) FROM sqlite_sequence WHERE lower(name) = '{0}'), 0))""",
            "DROP TABLE {0}",
            "ALTER TABLE new_{0} RENAME TO {0}",
        )
    ),
)
_REST_OF_SCHEMA = (
    "CREATE INDEX projects_user ON projects(user_id)",
    "CREATE INDEX sessions_project ON sessions(project_id)",
    "CREATE INDEX messages_session ON messages(session_id)",
    # Enforces that at most one reply of a session is running.
    "CREATE UNIQUE INDEX messages_streaming ON messages(session_id) WHERE status = 'streaming'",
    "CREATE INDEX messages_queued ON messages(session_id, id) WHERE status = 'queued'",
    """CREATE TRIGGER messages_status BEFORE UPDATE OF status ON messages
       WHEN OLD.status <> NEW.status AND NOT (
         (OLD.status = 'queued' AND NEW.status IN ('streaming', 'stopped')) OR (OLD.status = 'streaming'
           AND NEW.status IN ('complete', 'stopped', 'interrupted', 'failed', 'empty')))
       BEGIN SELECT RAISE(ABORT, 'a turn cannot go from one of these states to the other'); END""",
    """CREATE TRIGGER messages_content BEFORE UPDATE OF content ON messages WHEN OLD.status <> 'streaming'
       BEGIN SELECT RAISE(ABORT, 'only a running reply can change'); END""",
    "CREATE INDEX message_images_message ON message_images(message_id)",
    # A turn: the columns that only the work on a reply needs. The reply itself is a row of `messages`. `owner` is the
    # worker that runs the turn or whose client waits for it; NULL means unowned.
    """CREATE TABLE turns (reply_id INTEGER PRIMARY KEY REFERENCES messages(id) ON DELETE CASCADE,
       message_id INTEGER NOT NULL REFERENCES messages(id) ON DELETE CASCADE,
       session_id INTEGER NOT NULL REFERENCES sessions(id) ON DELETE CASCADE,
       idempotency_key TEXT, digest TEXT NOT NULL, owner TEXT, run_id TEXT,
       stop_requested INTEGER NOT NULL DEFAULT 0)""",
    "CREATE UNIQUE INDEX turns_key ON turns(session_id, idempotency_key) WHERE idempotency_key IS NOT NULL",
    "CREATE INDEX turns_session ON turns(session_id)",
    "CREATE INDEX turns_message ON turns(message_id)",
    "CREATE TABLE revoked_tokens (jti TEXT PRIMARY KEY, expires_at INTEGER NOT NULL) WITHOUT ROWID",
    # Jobs for the work outside the database that a delete requires, retried until they succeed.
    """CREATE TABLE outbox (id INTEGER PRIMARY KEY AUTOINCREMENT,
       kind TEXT NOT NULL CHECK (kind IN ('gateway_session', 'images', 'folder')), target TEXT NOT NULL,
       owner TEXT, attempts INTEGER NOT NULL DEFAULT 0, due_at REAL NOT NULL)""",
)


def adopt(conn: Connection, context: AdoptionContext) -> None:
    """Creates schema version 1, and moves every value of the legacy tables to it or to a table that preserves it."""
    conn.execute(_LEGACY_VALUES)
    existing = {row[0].lower() for row in conn.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
    for table, columns in LEGACY.items():
        _complete_table(conn, table, columns, existing)
    _make_paths_absolute(conn, context.checkout)
    for statement in (*_TABLES, *_COPIES):
        conn.execute(statement)
    total, done = count(conn, "messages"), 0
    progress = Progress(log.info, f"migrating {total:,} messages")
    last = _first_id(conn)
    while (until := _batch_end(conn, last)) is not None:
        _decode_texts(conn, "messages", [column for column in LEGACY["messages"] if _is_text(column)], last, until)
        conn.execute(_COPY_MESSAGES, (last, until))
        done += _BATCH
        progress(done, total)
        last = until
    images = _adopt_images(conn, context)
    for statement in (*_REPLACE, *_REST_OF_SCHEMA):
        conn.execute(statement)
    if existing & LEGACY.keys():
        counts = [f"{count(conn, table):,} {table}" for table in LEGACY]
        orphans = [f"{count(conn, f'orphaned_{table}'):,} {table}" for table in LEGACY if table != "users"]
        log.info(
            "migrated %s; moved rows without an owner to orphaned_… tables: %s; stored %d images as files, left %d "
            "values that are not images in messages.legacy_image; saved %d original values in legacy_values",
            *(", ".join(counts), ", ".join(orphans), *images, count(conn, "legacy_values")),
        )


def count(conn: Connection, table: str) -> int:
    """Returns the number of rows of a table."""
    return int(conn.execute(f"SELECT count(*) FROM {table}").fetchone()[0])


def _is_text(column: str) -> bool:
    return column not in _NUMBERS | _TIMES


def _complete_table(conn: Connection, table: str, columns: dict[str, str], existing: set[str]) -> None:
    """Adds missing columns to a legacy table, and replaces NULL and undecodable text, which the new table refuses.

    Saves undecodable text, unreadable times and the values of unknown columns in `legacy_values`. Drops the triggers
    of the table, which could otherwise fail or change rows during the migration.
    """
    if table not in existing:
        conn.execute(f"CREATE TABLE {table} (id INTEGER PRIMARY KEY AUTOINCREMENT)")
    for (trigger,) in conn.execute(
        "SELECT name FROM sqlite_master WHERE type = 'trigger' AND lower(tbl_name) = ?", (table,)
    ).fetchall():
        log.info("dropping the trigger %s on %s; the copy of the database still contains it", trigger, table)
        conn.execute(f"DROP TRIGGER {_quoted(trigger)}")
    found = [row[1] for row in conn.execute(f"PRAGMA table_info({table})")]
    known = {name.lower() for name in found}  # SQLite ignores the case of column names
    for column, default in columns.items():
        if column not in known:
            conn.execute(f"ALTER TABLE {table} ADD COLUMN {column}")
        if default != "NULL":
            conn.execute(f"UPDATE {table} SET {column} = {default} WHERE {column} IS NULL")
        if column in _TIMES:
            _save_values(conn, table, column, f"{_time(column)} IS NULL")
    for column in found:
        if column.lower() not in (*columns, "id"):
            _save_values(conn, table, column, "1")
    if table != "messages":  # `adopt` decodes those in batches
        _decode_texts(conn, table, [column for column in columns if _is_text(column)], -_LARGEST_ID, _LARGEST_ID)


def _make_paths_absolute(conn: Connection, checkout: Path) -> None:
    """Resolves relative legacy paths against the checkout, in which the legacy service ran. Saves the originals."""
    relative = "project_path <> '' AND project_path NOT LIKE '/%'"
    _save_values(conn, "projects", "project_path", relative)
    conn.execute(f"UPDATE projects SET project_path = ? || '/' || project_path WHERE {relative}", (str(checkout),))


def _quoted(name: str) -> str:
    doubled = name.replace('"', '""')
    return f'"{doubled}"'


def _save_values(conn: Connection, table: str, column: str, condition: str) -> None:
    conn.execute(
        f"INSERT OR IGNORE INTO legacy_values SELECT '{table}', id, ?, {_quoted(column)} FROM {table} "
        f"WHERE {_quoted(column)} IS NOT NULL AND {condition}",
        (column,),
    )


def _decode_texts(conn: Connection, table: str, columns: Sequence[str], after: int, until: int) -> None:
    """Converts bytes and invalid UTF-8, which Python cannot read as text, to text. Saves the originals.

    Converts the rows with `after` < id <= `until`.
    """
    conn.text_factory = bytes
    wrong: list[tuple[int, str, bytes]] = []
    try:
        for column in columns:
            rows = conn.execute(
                f"SELECT id, {column}, typeof({column}) = 'blob' FROM {table} "
                f"WHERE id > ? AND id <= ? AND {column} IS NOT NULL",
                (after, until),
            )
            wrong += [(row_id, column, value) for row_id, value, is_blob in rows if is_blob or not _is_utf8(value)]
    finally:
        conn.text_factory = str
    for row_id, column, value in wrong:
        text = value.decode(errors="replace")
        if column in _UNIQUE and not _is_utf8(value):
            text += f"-{row_id}"  # two undecodable values can become the same text, which a unique column refuses
        conn.execute("INSERT INTO legacy_values VALUES (?, ?, ?, ?)", (table, row_id, column, value))
        conn.execute(f"UPDATE {table} SET {column} = ? WHERE id = ?", (text, row_id))


def _is_utf8(value: object) -> bool:
    try:
        return not isinstance(value, bytes) or value.isascii() or bool(value.decode())
    except UnicodeDecodeError:
        return False


def _first_id(conn: Connection) -> int:
    first = conn.execute("SELECT min(id) FROM messages").fetchone()[0]
    return (first or 0) - 1


def _batch_end(conn: Connection, after: int) -> int | None:
    """Returns the last id of the batch of messages that follows the id `after`, or None at the end."""
    row = conn.execute(
        "SELECT max(id) FROM (SELECT id FROM messages WHERE id > ? ORDER BY id LIMIT ?)", (after, _BATCH)
    ).fetchone()
    return None if row[0] is None else int(row[0])


def _adopt_images(conn: Connection, context: AdoptionContext) -> tuple[int, int]:
    """Stores the legacy images as files. Returns the number of files, and of values that are not images."""
    ids = [row[0] for row in conn.execute("SELECT id FROM new_messages WHERE legacy_image <> ''")]
    progress = Progress(log.info, f"migrating {len(ids):,} images")
    files = 0
    for done, message_id in enumerate(ids):
        session_key, image = conn.execute(
            "SELECT s.session_key, m.legacy_image FROM new_messages m JOIN new_sessions s ON s.id = m.session_id "
            "WHERE m.id = ?",
            (message_id,),
        ).fetchone()
        stored = context.keep_image(session_key, image)
        if stored is not None:
            files += 1
            conn.execute("INSERT INTO message_images (message_id, file) VALUES (?, ?)", (message_id, stored.file))
            if stored.whole:
                conn.execute("UPDATE new_messages SET legacy_image = NULL WHERE id = ?", (message_id,))
        progress(done, len(ids))
    return files, len(ids) - files
