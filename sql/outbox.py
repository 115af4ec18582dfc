"""The outbox: what a delete leaves to be done outside the database."""

import time
from sqlite3 import Connection
from typing import Literal, NamedTuple


class OutboxJob(NamedTuple):
    """One entry of the outbox."""

    id: int
    kind: Literal["gateway_session", "images", "folder"]
    target: str
    attempts: int


def insert_outbox_job(conn: Connection, kind: str, target: str, owner: str) -> OutboxJob:
    """Inserts a job that this worker owns: nobody else runs it, unless the worker dies."""
    row = conn.execute(
        "INSERT INTO outbox (kind, target, owner, attempts, due_at) VALUES (?, ?, ?, 1, ?) "
        "RETURNING id, kind, target, attempts",
        (kind, target, owner, time.time()),
    ).fetchone()
    return OutboxJob(*row)


def claim_outbox_jobs(conn: Connection, owner: str, at: float) -> list[OutboxJob]:
    """Takes all jobs that are due at that time (unix seconds) and nobody's."""
    rows = conn.execute(
        "UPDATE outbox SET owner = ?, attempts = attempts + 1 WHERE owner IS NULL AND due_at <= ? "
        "RETURNING id, kind, target, attempts",
        (owner, at),
    ).fetchall()
    return sorted(OutboxJob(*row) for row in rows)


def has_due_outbox_jobs(conn: Connection, at: float) -> bool:
    """Whether there is a job to claim at that time (unix seconds)."""
    return bool(
        conn.execute("SELECT EXISTS (SELECT 1 FROM outbox WHERE owner IS NULL AND due_at <= ?)", (at,)).fetchone()[0]
    )


def delete_outbox_job(conn: Connection, job_id: int) -> None:
    """A job that is done."""
    conn.execute("DELETE FROM outbox WHERE id = ?", (job_id,))


def postpone_outbox_job(conn: Connection, job_id: int, due_at: float) -> None:
    """A job to be tried again at that time (unix seconds), by anybody."""
    conn.execute("UPDATE outbox SET owner = NULL, due_at = ? WHERE id = ?", (due_at, job_id))
