"""No statement reads a whole table that grows with use: each plan is SQLite's own, with an index or a bound."""

import inspect
import re
import sqlite3
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

import database
import errors
import sql

# Tables that have one row per user, project, message and so on.
GROWING = ("users", "projects", "sessions", "messages", "message_images", "turns", "revoked_tokens")
# Functions that read everything on purpose: for commands and checks, or by a partial index of what runs at the moment.
WHOLE = {"select_all_images", "select_project_paths", "select_unclaimed", "examine", "check", "migrate"}
ARGUMENTS: dict[str, Any] = {
    **{"user_id": 1, "project_id": 1, "session_id": 1, "message_id": 1, "reply_id": 2, "image_id": 1, "job_id": 1},
    **{"owner": "me", "dead": "dead", "heir": "me", "email": "a@example.com", "name": "N", "password": "hash"},
    **{"description": None, "project_path": "p", "label": "L", "archived": False, "agent_id": "main", "limit": 10},
    **{"before": 100, "first": 1, "last": 9, "files": ["a"], "session_ids": [1], "reply_ids": [2], "start": 0},
    **{"text": "text", "run_id": "run", "kind": "images", "target": "t", "at": 0.0, "longest": 30.0, "due_at": 0.0},
    **{"after": 0, "old": "a", "new": "b", "jti": "j", "expires_at": 1, "token_version": 0, "session_key": "key"},
    "turn": sql.NewTurn(1, "key", "Hi", "Hi", "digest", "idempotent", "me"),
    "ending": sql.Ending("complete", "text", None, None, None, None),
}


def statements() -> list[tuple[str, Callable[..., object]]]:
    """The functions of `sql` that take a connection."""
    found: list[tuple[str, Callable[..., object]]] = []
    for name in sql.__all__:
        function = getattr(sql, name)
        if inspect.isfunction(function) and "conn" in inspect.signature(function).parameters and name not in WHOLE:
            found.append((name, function))
    return found


@pytest.fixture
def conn(tmp_path: Path) -> sqlite3.Connection:
    """A database in which a turn runs."""
    sql.migrate(tmp_path / "a.db")
    connection = database.connect(tmp_path / "a.db", read_only=False)
    user = sql.insert_user(connection, "a@example.com", None, "hash")
    project = sql.insert_project(connection, user.id, "P", None, "p", 0)
    session = sql.insert_session(connection, user.id, project.id, None, "main")
    connection.execute("UPDATE sessions SET session_key = 'key' WHERE id = ?", (session.id,))
    sql.begin_turn(connection, sql.NewTurn(user.id, "key", "Hi", "Hi", "digest", None, "me"))
    return connection


@pytest.mark.parametrize(("name", "function"), statements(), ids=[name for name, _ in statements()])
def test_no_statement_scans_a_growing_table(
    conn: sqlite3.Connection, name: str, function: Callable[..., object]
) -> None:
    """Whatever the function runs is explained by SQLite: each growing table is searched, never scanned. A new function
    is in this test by itself, or the test fails until it says what to call it with."""
    ran: list[str] = []
    parameters = list(inspect.signature(function).parameters)[1:]
    conn.set_trace_callback(ran.append)
    with suppress(errors.AppError, sqlite3.IntegrityError):  # what matters is the statements, not the outcome
        result = function(conn, *(ARGUMENTS[parameter] for parameter in parameters))
        list(result) if inspect.isgenerator(result) else None
    conn.set_trace_callback(None)
    explained = [line for line in ran if re.match(r"(?i)\s*(SELECT|UPDATE|DELETE|INSERT|WITH)\b", line)]
    assert explained or name in ("text_size", "schema_version", "rewrite_version"), "it ran no statement"
    scans = [
        (statement, detail)
        for statement in explained
        for *_, detail in conn.execute(f"EXPLAIN QUERY PLAN {statement}")
        if _scans(detail)
    ]
    assert not scans


def _scans(detail: str) -> bool:
    """Whether a line of a plan reads a growing table whole. Partial indexes of running and queued turns are small."""
    match = re.match(r"SCAN (\w+)", detail)
    if match is None or "messages_streaming" in detail or "messages_queued" in detail:
        return False
    alias = {"u": "users", "p": "projects", "s": "sessions", "m": "messages", "i": "message_images", "t": "turns"}
    return alias.get(match[1], match[1]) in GROWING


def test_a_scan_is_recognized(conn: sqlite3.Connection) -> None:
    """The check above finds what it looks for."""
    (row,) = conn.execute("EXPLAIN QUERY PLAN SELECT * FROM messages m WHERE content = 'x'").fetchall()
    assert _scans(row[3])
