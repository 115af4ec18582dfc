"""The table `projects`."""

from collections.abc import Iterator
from sqlite3 import Connection
from typing import NamedTuple

import errors
from clock import now


class Project(NamedTuple):
    id: int
    user_id: int
    name: str
    description: str | None
    project_path: str
    created_at: str


_PROJECT = "p.id, p.user_id, p.name, p.description, p.project_path, p.created_at"


def insert_project(
    conn: Connection, user_id: int, name: str, description: str | None, project_path: str, job_id: int
) -> Project:
    """Stores a project whose folder exists, and deletes the outbox job that would have removed the folder.

    Raises errors.NotFound if the account has been deleted in the meantime.
    """
    row = conn.execute(
        "INSERT INTO projects (user_id, name, description, project_path, created_at, updated_at) "
        f"SELECT id, ?, ?, ?, ?, ? FROM users WHERE id = ? RETURNING {_PROJECT.replace('p.', '')}",
        (name, description, project_path, now(), now(), user_id),
    ).fetchone()
    if row is None:
        raise errors.NotFound("The account has been deleted.", code="project_not_found")
    conn.execute("DELETE FROM outbox WHERE id = ?", (job_id,))
    return Project(*row)


def select_projects(conn: Connection, user_id: int, limit: int, before: int) -> list[Project]:
    """Returns the newest `limit` projects of a user whose ids are below `before`, newest first."""
    rows = conn.execute(
        f"SELECT {_PROJECT} FROM projects p WHERE p.user_id = ? AND p.id < ? ORDER BY p.id DESC LIMIT ?",
        (user_id, before, limit),
    )
    return [Project(*row) for row in rows]


def select_project_paths(conn: Connection) -> Iterator[tuple[int, str]]:
    """Yields (id, folder) for every project in the database. A legacy project may have no folder: an empty string."""
    yield from conn.execute("SELECT id, project_path FROM projects ORDER BY id")


def select_project(conn: Connection, user_id: int, project_id: int) -> Project:
    """Returns a project that the user owns. Raises errors.NotFound."""
    row = conn.execute(
        f"SELECT {_PROJECT} FROM projects p WHERE p.id = ? AND p.user_id = ?", (project_id, user_id)
    ).fetchone()
    if row is None:
        raise errors.NotFound("There is no such project.", code="project_not_found")
    return Project(*row)


def update_project(
    conn: Connection, user_id: int, project_id: int, name: str | None, description: str | None
) -> Project:
    """Changes the values that are not None, and returns the project. Raises errors.NotFound."""
    conn.execute(
        "UPDATE projects SET name = coalesce(?, name), description = coalesce(?, description), updated_at = ? "
        "WHERE id = ? AND user_id = ?",
        (name, description, now(), project_id, user_id),
    )
    return select_project(conn, user_id, project_id)


def update_project_path(conn: Connection, project_id: int, project_path: str, job_id: int) -> str:
    """Sets the folder of a legacy project that has none, and deletes the outbox job that would remove the folder.

    Returns the project's folder, which is another one if a concurrent request has set it first. In that case the
    job stays. Raises errors.NotFound if the project has been deleted.
    """
    row = conn.execute("SELECT project_path FROM projects WHERE id = ?", (project_id,)).fetchone()
    if row is None:
        raise errors.NotFound("There is no such project.", code="project_not_found")
    if row[0]:
        return str(row[0])
    conn.execute("UPDATE projects SET project_path = ? WHERE id = ?", (project_path, project_id))
    conn.execute("DELETE FROM outbox WHERE id = ?", (job_id,))
    return project_path
