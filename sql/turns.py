"""Turns: a reply's row while it is being made, and what its making needs."""

import json
from collections.abc import Sequence
from sqlite3 import Connection
from typing import NamedTuple

import errors
from clock import now

from .messages import Status
from .sessions import check_chat_session

WAITING_TURNS = 10  # contract: at most 10 turns wait in a session


class Reply(NamedTuple):
    """A reply as it stands; `owner` is the worker that makes it. Replies of old have no turn: its columns are
    None."""

    id: int
    message_id: int | None
    session_id: int
    content: str
    status: Status
    error: str | None
    usage: str | None
    created_at: str
    owner: str | None


class Turn(NamedTuple):
    """All that is needed to ask the gateway for a reply."""

    reply_id: int
    message_id: int
    session_id: int
    session_key: str
    agent_id: str
    user_id: int
    project_name: str
    project_description: str | None
    project_path: str
    text: str
    run_id: str | None


class Begun(NamedTuple):
    """A turn that was begun now, or (`existing`) one begun before with the same key."""

    reply_id: int
    message_id: int
    session_id: int
    existing: bool


def begin_turn(
    conn: Connection, user_id: int, session_key: str, text: str, label: str, digest: str, key: str | None, owner: str
) -> Begun:
    """Stores a user's message and the empty row of its reply, `streaming` or, behind others, `queued`.

    `digest` stands for what is said; with an idempotency `key` used before, the turn begun then comes back.
    Raises errors.NotFound, errors.Unprocessable (the key with another digest), errors.TooMany.
    """
    session_id = check_chat_session(conn, user_id, session_key)
    if key is not None and (begun := _select_begun(conn, session_id, key, digest)):
        return begun
    live = _count_live(conn, session_id)
    at = now()
    conn.execute(
        "UPDATE sessions SET last_used_at = ?, label = coalesce(nullif(label, ''), ?) WHERE id = ?",
        (at, label or None, session_id),
    )
    insert = "INSERT INTO messages (session_id, role, content, status, created_at) VALUES (?, ?, ?, ?, ?)"
    message_id = conn.execute(insert, (session_id, "user", text, "complete", at)).lastrowid or 0
    status = "queued" if live else "streaming"
    reply_id = conn.execute(insert, (session_id, "assistant", "", status, at)).lastrowid or 0
    conn.execute(
        "INSERT INTO turns (reply_id, message_id, session_id, idempotency_key, digest, owner) "
        "VALUES (?, ?, ?, ?, ?, ?)",
        (reply_id, message_id, session_id, key, digest, owner),
    )
    return Begun(reply_id, message_id, session_id, existing=False)


def _select_begun(conn: Connection, session_id: int, key: str, digest: str) -> Begun | None:
    row = conn.execute(
        "SELECT reply_id, message_id, digest FROM turns WHERE session_id = ? AND idempotency_key = ?",
        (session_id, key),
    ).fetchone()
    if row is None:
        return None
    if row[2] != digest:
        raise errors.Unprocessable(
            "This Idempotency-Key was used in this session for another message: use a new key for a new message.",
            code="idempotency_key_reused",
        )
    return Begun(row[0], row[1], session_id, existing=True)


def _count_live(conn: Connection, session_id: int) -> int:
    running = conn.execute(
        "SELECT count(*) FROM messages WHERE session_id = ? AND status = 'streaming'", (session_id,)
    ).fetchone()[0]
    waiting = conn.execute(
        "SELECT count(*) FROM messages WHERE session_id = ? AND status = 'queued'", (session_id,)
    ).fetchone()[0]
    if waiting >= WAITING_TURNS:
        raise errors.TooMany(
            f"{WAITING_TURNS} messages wait in this session already: wait for a reply, or stop the session.",
            code="session_busy",
            retry_after=5,
        )
    return int(running + waiting)


def select_reply(conn: Connection, reply_id: int) -> Reply | None:
    """A turn's reply as it stands."""
    row = conn.execute(
        "SELECT m.id, t.message_id, m.session_id, m.content, m.status, m.error, m.usage, m.created_at, t.owner "
        "FROM messages m LEFT JOIN turns t ON t.reply_id = m.id WHERE m.id = ? AND m.role = 'assistant'",
        (reply_id,),
    ).fetchone()
    return row and Reply(*row)


def select_turn(conn: Connection, reply_id: int) -> Turn | None:
    """What the gateway must be told for this reply."""
    row = conn.execute(
        "SELECT t.reply_id, t.message_id, t.session_id, s.session_key, s.agent_id, p.user_id, p.name, "
        "p.description, p.project_path, m.content, t.run_id FROM turns t JOIN messages m ON m.id = t.message_id "
        "JOIN sessions s ON s.id = t.session_id JOIN projects p ON p.id = s.project_id WHERE t.reply_id = ?",
        (reply_id,),
    ).fetchone()
    return row and Turn(*row)


_NEXT_IN_LINE = (
    "m.status = 'queued' AND NOT EXISTS (SELECT 1 FROM messages x WHERE x.session_id = m.session_id "
    "AND x.status = 'streaming') AND NOT EXISTS (SELECT 1 FROM messages x WHERE x.session_id = m.session_id "
    "AND x.status = 'queued' AND x.id < m.id)"
)


def select_claimable(conn: Connection, owner: str) -> list[int]:
    """The waiting replies that are next in their session and that this worker may run."""
    rows = conn.execute(
        f"SELECT m.id FROM messages m JOIN turns t ON t.reply_id = m.id WHERE {_NEXT_IN_LINE} "
        "AND (t.owner = ? OR t.owner IS NULL)",
        (owner,),
    )
    return [row[0] for row in rows]


def claim_turns(conn: Connection, owner: str) -> list[int]:
    """Makes this worker the one that runs whatever it may; returns those replies, now `streaming`."""
    claimed = select_claimable(conn, owner)
    for reply_id in claimed:
        conn.execute("UPDATE messages SET status = 'streaming' WHERE id = ?", (reply_id,))
        conn.execute("UPDATE turns SET owner = ? WHERE reply_id = ?", (owner, reply_id))
    return claimed


_RUNNING_HERE = (
    "id = :id AND status = 'streaming' AND EXISTS (SELECT 1 FROM turns WHERE reply_id = :id AND owner = :owner)"
)


def update_replies(conn: Connection, owner: str, replies: Sequence[tuple[int, str, str | None]]) -> list[int]:
    """Stores the text so far of (reply, text, gateway's run id); returns the replies that are not this
    worker's any more."""
    lost = []
    for reply_id, text, run_id in replies:
        values = {"id": reply_id, "owner": owner, "content": text}
        if conn.execute(f"UPDATE messages SET content = :content WHERE {_RUNNING_HERE}", values).rowcount == 0:
            lost.append(reply_id)
        elif run_id is not None:
            conn.execute(
                "UPDATE turns SET run_id = ? WHERE reply_id = ? AND run_id IS NOT ?", (run_id, reply_id, run_id)
            )
    return lost


def finish_turn(
    conn: Connection,
    reply_id: int,
    owner: str,
    status: Status,
    text: str,
    run_id: str | None,
    usage: dict[str, int] | None,
    error: dict[str, object] | None,
) -> bool:
    """The end of a turn, in one write. False where it is not this worker's any more, and nothing changed."""
    done = conn.execute(
        f"UPDATE messages SET status = :status, content = :content, usage = :usage, error = :error "
        f"WHERE {_RUNNING_HERE}",
        {
            "id": reply_id,
            "owner": owner,
            "status": status,
            "content": text,
            "usage": usage and json.dumps(usage),
            "error": error and json.dumps(error),
        },
    ).rowcount
    conn.execute("UPDATE turns SET run_id = coalesce(?, run_id) WHERE reply_id = ?", (run_id, reply_id))
    return done == 1


class Halted(NamedTuple):
    """What a stop found: replies that run and will end as `stopped`, and waiting ones that were dropped."""

    running: list[int]
    dropped: list[int]


def request_stop(conn: Connection, session_ids: Sequence[int]) -> Halted:
    """Asks the worker of each running turn of these sessions to stop it; drops the waiting ones."""
    running: list[int] = []
    dropped: list[int] = []
    for session_id in session_ids:
        running += _ids(conn, "SELECT id FROM messages WHERE session_id = ? AND status = 'streaming'", session_id)
        dropped += _ids(conn, "SELECT id FROM messages WHERE session_id = ? AND status = 'queued'", session_id)
    conn.executemany("UPDATE turns SET stop_requested = 1 WHERE reply_id = ?", ((i,) for i in running))
    conn.executemany("UPDATE messages SET status = 'stopped' WHERE id = ?", ((i,) for i in dropped))
    return Halted(running, dropped)


def _ids(conn: Connection, sql: str, *values: object) -> list[int]:
    return [row[0] for row in conn.execute(sql, values)]


def select_stops(conn: Connection, owner: str) -> list[int]:
    """The replies that this worker runs and was asked to stop."""
    return _ids(
        conn,
        "SELECT m.id FROM messages m JOIN turns t ON t.reply_id = m.id WHERE m.status = 'streaming' "
        "AND t.stop_requested = 1 AND t.owner = ?",
        owner,
    )


def count_turns(conn: Connection) -> tuple[int, int]:
    """How many turns run and how many wait, in every process."""
    running = conn.execute("SELECT count(*) FROM messages WHERE status = 'streaming'").fetchone()
    waiting = conn.execute("SELECT count(*) FROM messages WHERE status = 'queued'").fetchone()
    return running[0], waiting[0]


def select_owners(conn: Connection) -> list[str]:
    """The workers that run turns, have them waiting, or are about an errand."""
    rows = conn.execute(
        "SELECT t.owner FROM messages m JOIN turns t ON t.reply_id = m.id WHERE m.status = 'streaming' "
        "UNION SELECT t.owner FROM messages m JOIN turns t ON t.reply_id = m.id WHERE m.status = 'queued' "
        "UNION SELECT owner FROM outbox"
    )
    return [row[0] for row in rows if row[0] is not None]


def inherit(conn: Connection, dead: str, heir: str) -> list[int]:
    """Makes `heir` the owner of the replies that a dead worker left running, and returns them; what it had
    waiting and its errands are up for grabs."""
    conn.execute("UPDATE outbox SET owner = NULL WHERE owner = ?", (dead,))
    conn.execute(
        "UPDATE turns SET owner = NULL WHERE owner = ? AND reply_id IN "
        "(SELECT id FROM messages WHERE status = 'queued')",
        (dead,),
    )
    left = _ids(
        conn,
        "SELECT m.id FROM messages m JOIN turns t ON t.reply_id = m.id WHERE m.status = 'streaming' AND t.owner = ?",
        dead,
    )
    conn.executemany("UPDATE turns SET owner = ? WHERE reply_id = ?", ((heir, reply_id) for reply_id in left))
    return left


def release_waiting(conn: Connection, owner: str) -> None:
    """Gives the turns that wait for this worker to whoever lives."""
    conn.execute(
        "UPDATE turns SET owner = NULL WHERE owner = ? AND reply_id IN "
        "(SELECT id FROM messages WHERE status = 'queued')",
        (owner,),
    )


def select_known_runs(conn: Connection, session_id: int) -> set[str]:
    """The gateway's run ids of a session's turns."""
    rows = conn.execute("SELECT run_id FROM turns WHERE session_id = ? AND run_id IS NOT NULL", (session_id,))
    return {row[0] for row in rows}
