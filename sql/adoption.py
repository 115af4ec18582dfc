"""Version 1 of the schema: makes it, and takes over what stands in the tables of a legacy database."""

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from sqlite3 import Connection
from typing import NamedTuple

from telemetry import Progress

log = logging.getLogger("clawd.database")


class KeptImage(NamedTuple):
    """The file that an image of old became; `whole` where it has every byte of it."""

    file: str
    whole: bool


class AdoptionContext(NamedTuple):
    """What the migration of a legacy database needs of the service around it.

    `keep_image(session key, base64)` makes a file of an image, or returns None for what is not an image.
    `checkout` is the directory at which relative project paths begin.
    """

    keep_image: Callable[[str, str], KeptImage | None]
    checkout: Path


# What production ran on before there were migrations, and what each column counts as where it is missing or
# NULL. In a new database these tables are empty for a moment.
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
_BATCH = 50_000  # rows that are copied at once


def _time(column: str) -> str:
    """SQL for a time of old as the contract writes it, NULL where it cannot be read: text in UTC or with an
    offset, or unix seconds or milliseconds. SQLite alone would read `now` and `12:30` too, which are no instants."""
    seconds = f"CASE WHEN {column} BETWEEN -100000000000 AND 100000000000 THEN {column} ELSE {column} / 1000.0 END"
    form = "'%Y-%m-%dT%H:%M:%fZ'"
    return (
        f"CASE WHEN typeof({column}) IN ('integer', 'real') THEN strftime({form}, {seconds}, 'unixepoch') "
        f"WHEN {column} LIKE '____-__-__%' THEN strftime({form}, {column}) END"
    )


def _time_or_now(column: str) -> str:
    return f"coalesce({_time(column)}, strftime('%Y-%m-%dT%H:%M:%fZ', 'now'))"


# Whatever could not go into the new tables as it was: columns that nobody knows, times that cannot be read,
# bytes that are no text. `value` is what stood there.
_KEPT = """CREATE TABLE legacy_values (table_name TEXT NOT NULL, row_id INTEGER NOT NULL,
           column_name TEXT NOT NULL, value, PRIMARY KEY (table_name, row_id, column_name)) WITHOUT ROWID"""
_TABLES = (
    # An account of old whose e-mail differs from another's by case alone keeps its own spelling as its key.
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
# What belongs to nobody is kept as it was. No id is ever used again, not even a deleted row's.
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
_RULES = (
    "CREATE INDEX projects_user ON projects(user_id)",
    "CREATE INDEX sessions_project ON sessions(project_id)",
    "CREATE INDEX messages_session ON messages(session_id)",
    # One running reply a session, and the queue behind it.
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
    # A turn is its reply's row, and here what only its making needs. `owner` is the worker that runs it or
    # whose client waits for it; NULL is up for grabs.
    """CREATE TABLE turns (reply_id INTEGER PRIMARY KEY REFERENCES messages(id) ON DELETE CASCADE,
       message_id INTEGER NOT NULL REFERENCES messages(id) ON DELETE CASCADE,
       session_id INTEGER NOT NULL REFERENCES sessions(id) ON DELETE CASCADE,
       idempotency_key TEXT, digest TEXT NOT NULL, owner TEXT, run_id TEXT,
       stop_requested INTEGER NOT NULL DEFAULT 0)""",
    "CREATE UNIQUE INDEX turns_key ON turns(session_id, idempotency_key) WHERE idempotency_key IS NOT NULL",
    "CREATE INDEX turns_session ON turns(session_id)",
    "CREATE INDEX turns_message ON turns(message_id)",
    "CREATE TABLE revoked_tokens (jti TEXT PRIMARY KEY, expires_at INTEGER NOT NULL) WITHOUT ROWID",
    # What a deleted row leaves to be done outside the database, tried until it is done.
    """CREATE TABLE outbox (id INTEGER PRIMARY KEY AUTOINCREMENT,
       kind TEXT NOT NULL CHECK (kind IN ('gateway_session', 'images', 'folder')), target TEXT NOT NULL,
       owner TEXT, attempts INTEGER NOT NULL DEFAULT 0, due_at REAL NOT NULL)""",
)


def adopt(conn: Connection, context: AdoptionContext) -> None:
    """Version 1: makes the schema, and takes over what stands in the tables of old. Nothing of it is lost."""
    conn.execute(_KEPT)
    existing = {row[0].lower() for row in conn.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
    for table, columns in LEGACY.items():
        _complete_table(conn, table, columns, existing)
    _make_paths_absolute(conn, context.checkout)
    for statement in (*_TABLES, *_COPIES):
        conn.execute(statement)
    total, done = count(conn, "messages"), 0
    progress = Progress(log.info, f"adopting {total:,} messages")
    last = _first_id(conn)
    while (until := _batch_end(conn, last)) is not None:
        _mend_texts(conn, "messages", [column for column in LEGACY["messages"] if _is_text(column)], last, until)
        conn.execute(_COPY_MESSAGES, (last, until))
        done += _BATCH
        progress(done, total)
        last = until
    images = _adopt_images(conn, context)
    for statement in (*_REPLACE, *_RULES):
        conn.execute(statement)
    if existing & LEGACY.keys():
        counts = [f"{count(conn, table):,} {table}" for table in LEGACY]
        orphans = [f"{count(conn, f'orphaned_{table}'):,} {table}" for table in LEGACY if table != "users"]
        log.info(
            "adopted %s; without an owner, and kept aside: %s; images: %d are files now, %d are none and stay as "
            "they were; %d values that fit nowhere are in legacy_values",
            *(", ".join(counts), ", ".join(orphans), *images, count(conn, "legacy_values")),
        )


def count(conn: Connection, table: str) -> int:
    """How many rows a table has."""
    return int(conn.execute(f"SELECT count(*) FROM {table}").fetchone()[0])


def _is_text(column: str) -> bool:
    return column not in _NUMBERS | _TIMES


def _complete_table(conn: Connection, table: str, columns: dict[str, str], existing: set[str]) -> None:
    """Gives a table of old all columns, and no NULL or unreadable value where the new one takes none; what that
    changes is kept. Its triggers go."""
    if table not in existing:
        conn.execute(f"CREATE TABLE {table} (id INTEGER PRIMARY KEY AUTOINCREMENT)")
    for (trigger,) in conn.execute(
        "SELECT name FROM sqlite_master WHERE type = 'trigger' AND lower(tbl_name) = ?", (table,)
    ).fetchall():
        log.info("the trigger %s on %s goes; the copy beside has it", trigger, table)
        conn.execute(f"DROP TRIGGER {_quoted(trigger)}")
    found = [row[1] for row in conn.execute(f"PRAGMA table_info({table})")]
    known = {name.lower() for name in found}  # SQLite does not tell `Image` from `image`
    for column, default in columns.items():
        if column not in known:
            conn.execute(f"ALTER TABLE {table} ADD COLUMN {column}")
        if default != "NULL":
            conn.execute(f"UPDATE {table} SET {column} = {default} WHERE {column} IS NULL")
        if column in _TIMES:
            _keep_values(conn, table, column, f"{_time(column)} IS NULL")
    for column in found:
        if column.lower() not in (*columns, "id"):
            _keep_values(conn, table, column, "1")
    if table != "messages":  # whose texts are looked at in batches
        _mend_texts(conn, table, [column for column in columns if _is_text(column)], -_LARGEST_ID, _LARGEST_ID)


def _make_paths_absolute(conn: Connection, checkout: Path) -> None:
    """A relative path of old began where the service ran: at the checkout. What it was is kept."""
    relative = "project_path <> '' AND project_path NOT LIKE '/%'"
    _keep_values(conn, "projects", "project_path", relative)
    conn.execute(f"UPDATE projects SET project_path = ? || '/' || project_path WHERE {relative}", (str(checkout),))


def _quoted(name: str) -> str:
    doubled = name.replace('"', '""')
    return f'"{doubled}"'


def _keep_values(conn: Connection, table: str, column: str, condition: str) -> None:
    conn.execute(
        f"INSERT OR IGNORE INTO legacy_values SELECT '{table}', id, ?, {_quoted(column)} FROM {table} "
        f"WHERE {_quoted(column)} IS NOT NULL AND {condition}",
        (column,),
    )


def _mend_texts(conn: Connection, table: str, columns: Sequence[str], after: int, until: int) -> None:
    """Makes text of what Python cannot read as text: bytes, and what is no UTF-8. What it was is kept."""
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
            text += f"-{row_id}"  # what cannot be read looks all alike
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
    """The last id of the next batch of messages; None where there is none."""
    row = conn.execute(
        "SELECT max(id) FROM (SELECT id FROM messages WHERE id > ? ORDER BY id LIMIT ?)", (after, _BATCH)
    ).fetchone()
    return None if row[0] is None else int(row[0])


def _adopt_images(conn: Connection, context: AdoptionContext) -> tuple[int, int]:
    """Makes files of the images of old; how many, and how many are no images."""
    ids = [row[0] for row in conn.execute("SELECT id FROM new_messages WHERE legacy_image <> ''")]
    progress = Progress(log.info, f"adopting {len(ids):,} images")
    files = 0
    for done, message_id in enumerate(ids):
        session_key, image = conn.execute(
            "SELECT s.session_key, m.legacy_image FROM new_messages m JOIN new_sessions s ON s.id = m.session_id "
            "WHERE m.id = ?",
            (message_id,),
        ).fetchone()
        kept = context.keep_image(session_key, image)
        if kept is not None:
            files += 1
            conn.execute("INSERT INTO message_images (message_id, file) VALUES (?, ?)", (message_id, kept.file))
            if kept.whole:
                conn.execute("UPDATE new_messages SET legacy_image = NULL WHERE id = ?", (message_id,))
        progress(done, len(ids))
    return files, len(ids) - files
