"""Deletes, with all rows below and the outbox entries for what lies outside the database."""

from sqlite3 import Connection

from .outbox import insert_errand
from .projects import select_project
from .sessions import select_session


def delete_user(conn: Connection, user_id: int) -> None:
    """The account and every row it owns; what lies outside the database goes into the outbox."""
    for (project_id,) in conn.execute("SELECT id FROM projects WHERE user_id = ?", (user_id,)).fetchall():
        delete_project(conn, user_id, project_id)
    conn.execute("DELETE FROM users WHERE id = ?", (user_id,))


def delete_project(conn: Connection, user_id: int, project_id: int) -> None:
    """A project with its sessions and messages; its folder goes into the outbox. Raises errors.NotFound."""
    project = select_project(conn, user_id, project_id)
    for session in conn.execute("SELECT id FROM sessions WHERE project_id = ?", (project_id,)).fetchall():
        delete_session(conn, user_id, session[0])
    if project.project_path:
        insert_errand(conn, "folder", project.project_path)
    conn.execute("DELETE FROM projects WHERE id = ?", (project_id,))


def delete_session(conn: Connection, user_id: int, session_id: int) -> None:
    """A session with its messages; its images and its session in the gateway go into the outbox.

    Raises errors.NotFound.
    """
    session = select_session(conn, user_id, session_id)
    insert_errand(conn, "images", session.session_key)
    insert_errand(conn, "gateway_session", f"{session.agent_id} {session.session_key}")
    conn.execute("DELETE FROM sessions WHERE id = ?", (session_id,))
