"""The outbox: what a delete leaves to be done outside the database."""

import time
from sqlite3 import Connection
from typing import Literal, NamedTuple


class Errand(NamedTuple):
    """One entry of the outbox."""

    id: int
    kind: Literal["gateway_session", "images", "folder"]
    target: str
    attempts: int


def insert_errand(conn: Connection, kind: str, target: str, owner: str | None = None) -> int:
    """Something to be done outside the database. With an owner it waits until that worker calls it off or
    dies."""
    return (
        conn.execute(
            "INSERT INTO outbox (kind, target, owner, due_at) VALUES (?, ?, ?, ?)",
            (kind, target, owner, time.time()),
        ).lastrowid
        or 0
    )


def claim_errands(conn: Connection, owner: str, at: float) -> list[Errand]:
    """Takes all errands that are due at that time (unix seconds) and nobody's."""
    rows = conn.execute(
        "UPDATE outbox SET owner = ?, attempts = attempts + 1 WHERE owner IS NULL AND due_at <= ? "
        "RETURNING id, kind, target, attempts",
        (owner, at),
    ).fetchall()
    return sorted(Errand(*row) for row in rows)


def has_due_errands(conn: Connection, at: float) -> bool:
    """Whether there is an errand to claim at that time (unix seconds)."""
    return bool(
        conn.execute("SELECT EXISTS (SELECT 1 FROM outbox WHERE owner IS NULL AND due_at <= ?)", (at,)).fetchone()[0]
    )


def delete_errand(conn: Connection, errand_id: int) -> None:
    """An errand that is done."""
    conn.execute("DELETE FROM outbox WHERE id = ?", (errand_id,))


def postpone_errand(conn: Connection, errand_id: int, due_at: float) -> None:
    """An errand to be tried again at that time (unix seconds), by anybody."""
    conn.execute("UPDATE outbox SET owner = NULL, due_at = ? WHERE id = ?", (due_at, errand_id))
