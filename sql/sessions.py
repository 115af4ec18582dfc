"""The table `sessions`. A session is one conversation in a project."""

import uuid
from sqlite3 import Connection
from typing import NamedTuple

import errors
from clock import now

from .projects import select_project


class Session(NamedTuple):
    id: int
    project_id: int
    session_key: str
    label: str | None
    archived: int
    scope: str
    channel: str
    agent_id: str
    created_at: str
    last_used_at: str | None


_SESSION = (
    "s.id, s.project_id, s.session_key, s.label, s.archived, s.scope, s.channel, s.agent_id, s.created_at, "
    "s.last_used_at"
)

OWNED_SESSION = "sessions s JOIN projects p ON p.id = s.project_id AND p.user_id = :user_id"


def insert_session(conn: Connection, user_id: int, project_id: int, label: str | None, agent_id: str) -> Session:
    """Creates a session in a project that the user owns. Raises errors.NotFound."""
    select_project(conn, user_id, project_id)
    session_id = conn.execute(
        "INSERT INTO sessions (project_id, session_key, label, agent_id, created_at) VALUES (?, ?, ?, ?, ?)",
        (project_id, str(uuid.uuid4()), label, agent_id, now()),
    ).lastrowid
    return select_session(conn, user_id, session_id or 0)


def select_sessions(
    conn: Connection, user_id: int, project_id: int, archived: bool, limit: int, before: int
) -> list[Session]:
    """Returns the newest `limit` sessions of a project that are `archived`, or that are not, newest first.

    Only those whose ids are below `before`. Raises errors.NotFound.
    """
    select_project(conn, user_id, project_id)
    rows = conn.execute(
        f"SELECT {_SESSION} FROM sessions s WHERE s.project_id = ? AND s.archived = ? AND s.id < ? "
        "ORDER BY s.id DESC LIMIT ?",
        (project_id, int(archived), before, limit),
    )
    return [Session(*row) for row in rows]


def select_session(conn: Connection, user_id: int, session_id: int, project_id: int | None = None) -> Session:
    """Returns a session that the user owns, in `project_id` if that is given. Raises errors.NotFound."""
    row = conn.execute(
        f"SELECT {_SESSION} FROM {OWNED_SESSION} WHERE s.id = :id AND s.project_id = coalesce(:project_id, p.id)",
        {"user_id": user_id, "id": session_id, "project_id": project_id},
    ).fetchone()
    if row is None:
        raise _no_session()
    return Session(*row)


def _no_session() -> errors.NotFound:
    return errors.NotFound("There is no such session, or it is archived.", code="session_not_found")


def update_session(
    conn: Connection, user_id: int, session_id: int, label: str | None, archived: bool | None
) -> Session:
    """Changes the values that are not None, and returns the session. Raises errors.NotFound."""
    select_session(conn, user_id, session_id)
    conn.execute(
        "UPDATE sessions SET label = coalesce(?, label), archived = coalesce(?, archived) WHERE id = ?",
        (label, archived, session_id),
    )
    return select_session(conn, user_id, session_id)


def check_chat_session(conn: Connection, user_id: int, session_key: str) -> int:
    """Returns the id of a session that the user owns and that is not archived. Raises errors.NotFound."""
    row = conn.execute(
        f"SELECT s.id FROM {OWNED_SESSION} WHERE s.session_key = :key AND s.archived = 0",
        {"user_id": user_id, "key": session_key},
    ).fetchone()
    if row is None:
        raise _no_session()
    return int(row[0])
