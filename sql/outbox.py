"""The table `outbox`: jobs for the work outside the database that a delete requires.

Creating a project folder stores a job too, which removes the folder if no row of the project follows. A job whose
`owner` is NULL is unowned: any worker may claim it once `due_at` has passed.
"""

import time
from sqlite3 import Connection
from typing import Literal, NamedTuple


class OutboxJob(NamedTuple):
    """A job that removes something outside the database.

    `target` is `<agent id> <session key>` for `gateway_session`, a session key for `images`, a path for `folder`.
    `attempts` counts the attempts, including the one that the owner is about to make.
    """

    id: int
    kind: Literal["gateway_session", "images", "folder"]
    target: str
    attempts: int


def insert_outbox_job(conn: Connection, kind: str, target: str, owner: str) -> OutboxJob:
    """Stores a job that `owner` runs. Other workers leave it alone unless that worker dies."""
    row = conn.execute(
        "INSERT INTO outbox (kind, target, owner, attempts, due_at) VALUES (?, ?, ?, 1, ?) "
        "RETURNING id, kind, target, attempts",
        (kind, target, owner, time.time()),
    ).fetchone()
    return OutboxJob(*row)


# A time further ahead than any delay was stored before the clock was set back: such a job is due.
_DUE = "owner IS NULL AND due_at NOT BETWEEN :at AND :at + :longest"


def claim_outbox_jobs(conn: Connection, owner: str, at: float, longest: float) -> None:
    """Claims all unowned jobs that are due at the time `at` (Unix seconds). `longest` is the longest delay in s."""
    values = {"owner": owner, "at": at, "longest": longest}
    conn.execute(f"UPDATE outbox SET owner = :owner, attempts = attempts + 1 WHERE {_DUE}", values)


def select_outbox_jobs(conn: Connection, owner: str) -> list[OutboxJob]:
    """Returns the jobs that a worker owns, in the order in which they were stored."""
    rows = conn.execute("SELECT id, kind, target, attempts FROM outbox WHERE owner = ? ORDER BY id", (owner,))
    return [OutboxJob(*row) for row in rows]


def has_due_outbox_jobs(conn: Connection, at: float, longest: float) -> bool:
    """Returns True if an unowned job is due at the time `at` (Unix seconds). `longest` is the longest delay in s."""
    values = {"at": at, "longest": longest}
    return bool(conn.execute(f"SELECT EXISTS (SELECT 1 FROM outbox WHERE {_DUE})", values).fetchone()[0])


def delete_outbox_job(conn: Connection, job_id: int) -> None:
    """Removes a finished job."""
    conn.execute("DELETE FROM outbox WHERE id = ?", (job_id,))


def postpone_outbox_job(conn: Connection, job_id: int, due_at: float) -> None:
    """Releases a job that failed, so that any worker may retry it from `due_at` (Unix seconds) on."""
    conn.execute("UPDATE outbox SET owner = NULL, due_at = ? WHERE id = ?", (due_at, job_id))
