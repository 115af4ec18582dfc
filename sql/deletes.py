"""Deletes of accounts, projects and sessions, with the outbox jobs that remove their data outside the database.

Each runs in one transaction of its caller. Foreign keys cascade from users to projects, sessions, messages, turns
and images.
"""

import time
from sqlite3 import Connection
from typing import NamedTuple

from .outbox import OutboxJob, insert_outbox_job
from .projects import select_project
from .sessions import select_session

_SESSIONS = "sessions s JOIN projects p ON p.id = s.project_id"


class Deleted(NamedTuple):
    """What the caller of a delete must do next: stop the `running` replies, and run the outbox jobs, which it owns.

    `dropped` is the number of queued turns that the delete removed.
    """

    running: list[int]
    dropped: int
    jobs: list[OutboxJob]


def delete_session(
    conn: Connection, owner: str, user_id: int, session_id: int, project_id: int | None = None
) -> Deleted:
    """Deletes a session, in `project_id` if that is given, with its messages. Raises errors.NotFound."""
    select_session(conn, user_id, session_id, project_id)
    deleted = _prepare_sessions(conn, owner, "s.id = ?", session_id)
    conn.execute("DELETE FROM sessions WHERE id = ?", (session_id,))
    return deleted


def delete_project(conn: Connection, owner: str, user_id: int, project_id: int) -> Deleted:
    """Deletes a project with its sessions and messages. Raises errors.NotFound."""
    project = select_project(conn, user_id, project_id)
    deleted = _prepare_sessions(conn, owner, "s.project_id = ?", project_id)
    if project.project_path:
        deleted.jobs.append(insert_outbox_job(conn, "folder", project.project_path, owner))
    conn.execute("DELETE FROM projects WHERE id = ?", (project_id,))
    return deleted


def delete_user(conn: Connection, owner: str, user_id: int) -> Deleted:
    """Deletes an account and every row that it owns. Does nothing if the account does not exist."""
    deleted = _prepare_sessions(conn, owner, "p.user_id = ?", user_id)
    deleted.jobs.extend(
        _insert_jobs(
            conn,
            owner,
            "SELECT 'folder', p.project_path, ?, 1, ? FROM projects p WHERE p.user_id = ? AND p.project_path <> ''",
            user_id,
        )
    )
    conn.execute("DELETE FROM users WHERE id = ?", (user_id,))
    return deleted


def _prepare_sessions(conn: Connection, owner: str, condition: str, value: int) -> Deleted:
    """Stores the outbox jobs for the sessions that match a condition, and returns what else their delete requires.

    Must run before the rows are deleted, since it reads them.
    """
    turns = f"SELECT id FROM messages WHERE session_id IN (SELECT s.id FROM {_SESSIONS} WHERE {condition})"
    running = [row[0] for row in conn.execute(f"{turns} AND status = 'streaming'", (value,))]
    waiting = conn.execute(f"{turns} AND status = 'queued'", (value,)).fetchall()
    targets = (("images", "s.session_key"), ("gateway_session", "s.agent_id || ' ' || s.session_key"))
    jobs = [
        job
        for kind, target in targets
        for job in _insert_jobs(
            conn, owner, f"SELECT '{kind}', {target}, ?, 1, ? FROM {_SESSIONS} WHERE {condition}", value
        )
    ]
    _insert_jobs_for_others(conn, owner, condition, value)
    return Deleted(running, len(waiting), jobs)


def _insert_jobs_for_others(conn: Connection, owner: str, condition: str, value: int) -> None:
    """Has every other worker delete the sessions in the gateway again, once its own run in them has ended, or its heir
    if it dies. A run that is still open, for example in a suspended process, could create the session there again.

    The turn of such a run is `streaming`, or was ended by `stop_turns`, and still has its request to stop.
    """
    conn.execute(
        "INSERT INTO outbox (kind, target, owner, attempts, due_at) "
        "SELECT DISTINCT 'gateway_session', s.agent_id || ' ' || s.session_key, t.owner, 1, ? "
        f"FROM {_SESSIONS} JOIN turns t ON t.session_id = s.id JOIN messages m ON m.id = t.reply_id "
        f"WHERE {condition} AND t.owner <> ? AND (m.status = 'streaming' OR t.stop_requested = 1)",
        (time.time(), value, owner),
    )


def _insert_jobs(conn: Connection, owner: str, query: str, value: int) -> list[OutboxJob]:
    rows = conn.execute(
        f"INSERT INTO outbox (kind, target, owner, attempts, due_at) {query} RETURNING id, kind, target, attempts",
        (owner, time.time(), value),
    )
    return [OutboxJob(*row) for row in rows.fetchall()]
