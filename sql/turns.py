"""The table `turns`, and the rows of replies in `messages` while their turns are queued or running.

Here, `owner` is the name of the worker that runs a turn, or that holds it in the queue (see `database.Lease`).
A queued turn whose owner is NULL is unowned: any worker may claim it.
"""

import json
from collections.abc import Sequence
from sqlite3 import Connection
from typing import NamedTuple

import errors
from clock import now

from .messages import Failure, Status
from .replies import Reply, stored_text
from .sessions import check_chat_session

WAITING_TURNS = 10  # queued turns that a session may have; docs/api.md documents this number


class Turn(NamedTuple):
    """What a request to the gateway needs: the message, its session and project, and the gateway's run id if any.

    `asked_at` is the time when the turn began to run: its message was not sent before. None in a turn of version 1.
    """

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
    stop_requested: bool
    asked_at: str | None


class NewTurn(NamedTuple):
    """The input of `begin_turn`. `digest` is a hash of the message's text and images, `label` a name for the session.

    The session gets the label if it has none. `owner` is the worker that begins the turn.
    """

    user_id: int
    session_key: str
    text: str
    label: str
    digest: str
    idempotency_key: str | None
    owner: str


class Ending(NamedTuple):
    """The final status of a turn, with the whole text of its reply."""

    status: Status
    text: str
    run_id: str | None
    usage: dict[str, int] | None
    error: Failure | None
    finish_reason: str | None


class Begun(NamedTuple):
    """The result of `begin_turn`: a new turn, or (`existing`) an earlier one with the same idempotency key."""

    reply_id: int
    message_id: int
    session_id: int
    status: Status
    created_at: str
    existing: bool

    def reply(self, owner: str) -> Reply:
        """Returns the row of a reply that was stored just now."""
        return Reply(
            id=self.reply_id,
            message_id=self.message_id,
            session_id=self.session_id,
            status=self.status,
            error=None,
            usage=None,
            finish_reason=None,
            created_at=self.created_at,
            owner=owner,
        )


def begin_turn(conn: Connection, turn: NewTurn) -> Begun:
    """Stores a user's message and the empty row of its reply: `streaming`, or `queued` behind other turns.

    If the session already has a turn with this idempotency key, returns that turn and stores nothing. Raises
    errors.NotFound, errors.Unprocessable (the key belongs to a message with another digest), or errors.TooMany.
    """
    session_id = check_chat_session(conn, turn.user_id, turn.session_key)
    if turn.idempotency_key is not None and (begun := _select_begun(conn, session_id, turn)):
        return begun
    live = _count_live(conn, session_id)
    at = now()
    conn.execute(
        "UPDATE sessions SET last_used_at = ?, label = coalesce(nullif(label, ''), ?) WHERE id = ?",
        (at, turn.label or None, session_id),
    )
    insert = "INSERT INTO messages (session_id, role, content, status, created_at) VALUES (?, ?, ?, ?, ?)"
    message_id = conn.execute(insert, (session_id, "user", turn.text, "complete", at)).lastrowid or 0
    status: Status = "queued" if live else "streaming"
    reply_id = conn.execute(insert, (session_id, "assistant", "", status, at)).lastrowid or 0
    conn.execute(
        "INSERT INTO turns (reply_id, message_id, session_id, idempotency_key, digest, owner, asked_at) "
        "VALUES (?, ?, ?, ?, ?, ?, ?)",
        (reply_id, message_id, session_id, turn.idempotency_key, turn.digest, turn.owner, None if live else at),
    )
    return Begun(reply_id, message_id, session_id, status, at, existing=False)


def _select_begun(conn: Connection, session_id: int, turn: NewTurn) -> Begun | None:
    row = conn.execute(
        "SELECT t.reply_id, t.message_id, t.digest, m.status, m.created_at FROM turns t "
        "JOIN messages m ON m.id = t.reply_id WHERE t.session_id = ? AND t.idempotency_key = ?",
        (session_id, turn.idempotency_key),
    ).fetchone()
    if row is None:
        return None
    if row[2] != turn.digest:
        raise errors.Unprocessable(
            "This Idempotency-Key was already used for another message in this session. Use a new key.",
            code="idempotency_key_reused",
        )
    return Begun(row[0], row[1], session_id, row[3], row[4], existing=True)


def _count_live(conn: Connection, session_id: int) -> int:
    running = conn.execute(
        "SELECT count(*) FROM messages WHERE session_id = ? AND status = 'streaming'", (session_id,)
    ).fetchone()[0]
    waiting = conn.execute(
        "SELECT count(*) FROM messages WHERE session_id = ? AND status = 'queued'", (session_id,)
    ).fetchone()[0]
    if waiting >= WAITING_TURNS:
        raise errors.TooMany(
            f"{WAITING_TURNS} messages are already waiting in this session. Wait for a reply, or stop the session.",
            code="session_busy",
            retry_after=5,
        )
    return int(running + waiting)


def select_turn(conn: Connection, reply_id: int) -> Turn | None:
    """Returns what a request to the gateway for this reply needs, or None if the reply has no turn."""
    row = conn.execute(
        "SELECT t.reply_id, t.message_id, t.session_id, s.session_key, s.agent_id, p.user_id, p.name, "
        "p.description, p.project_path, m.content, t.run_id, t.stop_requested = 1, t.asked_at FROM turns t "
        "JOIN messages m ON m.id = t.message_id JOIN sessions s ON s.id = t.session_id "
        "JOIN projects p ON p.id = s.project_id WHERE t.reply_id = ?",
        (reply_id,),
    ).fetchone()
    return row and Turn(*row)


_NEXT_IN_QUEUE = (
    "m.status = 'queued' AND NOT EXISTS (SELECT 1 FROM messages x WHERE x.session_id = m.session_id "
    "AND x.status = 'streaming') AND NOT EXISTS (SELECT 1 FROM messages x WHERE x.session_id = m.session_id "
    "AND x.status = 'queued' AND x.id < m.id)"
)


def select_claimable(conn: Connection, owner: str) -> list[int]:
    """Returns the queued replies that are next in an idle session and belong to `owner` or are unowned."""
    rows = conn.execute(
        f"SELECT m.id FROM messages m JOIN turns t ON t.reply_id = m.id WHERE {_NEXT_IN_QUEUE} "
        "AND (t.owner = ? OR t.owner IS NULL)",
        (owner,),
    )
    return [row[0] for row in rows]


def claim_turns(conn: Connection, owner: str) -> list[int]:
    """Makes `owner` run every turn that `select_claimable` returns: sets it to `streaming`. Returns the replies."""
    claimed = select_claimable(conn, owner)
    for reply_id in claimed:
        conn.execute("UPDATE messages SET status = 'streaming' WHERE id = ?", (reply_id,))
        conn.execute("UPDATE turns SET owner = ?, asked_at = ? WHERE reply_id = ?", (owner, now(), reply_id))
    return claimed


_RUNNING_HERE = (
    "id = :id AND status = 'streaming' AND EXISTS (SELECT 1 FROM turns WHERE reply_id = :id AND owner = :owner)"
)


def finish_turn(conn: Connection, reply_id: int, owner: str, ending: Ending) -> bool:
    """Stores the end of a turn in one UPDATE, and folds the pieces of its reply into `content`.

    If more text is stored than the ending has, that text is kept. Returns False, and leaves the reply unchanged, if
    `owner` no longer runs it.
    """
    ours = {"id": reply_id, "owner": owner}
    running = conn.execute(f"SELECT 1 FROM messages WHERE {_RUNNING_HERE}", ours).fetchone() is not None
    if running:
        _end(conn, reply_id, ending)
    # From here on this worker has no open run, for which a delete would have to wait.
    conn.execute("UPDATE turns SET stop_requested = 0 WHERE reply_id = :id AND owner = :owner", ours)
    return running


def _end(conn: Connection, reply_id: int, ending: Ending) -> None:
    stored = stored_text(conn, reply_id)
    # First, so that the UPDATE uses the pages that this frees: SQLite then writes each of them once.
    conn.execute("DELETE FROM reply_pieces WHERE reply_id = ?", (reply_id,))
    conn.execute(
        "UPDATE messages SET status = ?, content = ?, usage = ?, error = ?, finish_reason = ? WHERE id = ?",
        (
            ending.status,
            max(ending.text, stored, key=len),
            ending.usage and json.dumps(ending.usage),
            ending.error and json.dumps(ending.error),
            ending.finish_reason,
            reply_id,
        ),
    )
    conn.execute("UPDATE turns SET run_id = coalesce(?, run_id) WHERE reply_id = ?", (ending.run_id, reply_id))


def stop_turns(conn: Connection, reply_ids: Sequence[int]) -> None:
    """Ends those of the replies that still run as `stopped`, whoever owns them, with the text that is stored.

    Their owners find that they no longer run them.
    """
    for reply_id in reply_ids:
        if conn.execute("SELECT 1 FROM messages WHERE id = ? AND status = 'streaming'", (reply_id,)).fetchone():
            _end(conn, reply_id, Ending("stopped", "", None, None, None, None))


class Halted(NamedTuple):
    """The replies that a stop affected: `running` ones, which their workers stop, and `dropped` queued ones."""

    running: list[int]
    dropped: list[int]


def request_stop(conn: Connection, session_ids: Sequence[int]) -> Halted:
    """Requests a stop of the running turns of these sessions, and ends the queued ones as `stopped`.

    The worker of a running turn sees the request in `select_running`.
    """
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


class Owned(NamedTuple):
    """A running reply as its owner finds it: whether to stop it, and whether it was inherited from a dead worker."""

    stop_requested: bool
    inherited: bool


def select_running(conn: Connection, owner: str) -> dict[int, Owned]:
    """Returns the running replies that a worker owns, by reply id."""
    rows = conn.execute(
        "SELECT m.id, t.stop_requested = 1, t.inherited = 1 FROM messages m JOIN turns t ON t.reply_id = m.id "
        "WHERE m.status = 'streaming' AND t.owner = ?",
        (owner,),
    )
    return {reply_id: Owned(bool(stop), bool(inherited)) for reply_id, stop, inherited in rows}


def count_turns(conn: Connection) -> tuple[int, int]:
    """Returns the numbers of running and of queued turns, across all processes."""
    running = conn.execute("SELECT count(*) FROM messages WHERE status = 'streaming'").fetchone()
    waiting = conn.execute("SELECT count(*) FROM messages WHERE status = 'queued'").fetchone()
    return running[0], waiting[0]


def select_owners(conn: Connection) -> list[str]:
    """Returns the workers that own running turns, queued turns or outbox jobs. Some of them may be dead."""
    rows = conn.execute(
        "SELECT t.owner FROM messages m JOIN turns t ON t.reply_id = m.id WHERE m.status = 'streaming' "
        "UNION SELECT t.owner FROM messages m JOIN turns t ON t.reply_id = m.id WHERE m.status = 'queued' "
        "UNION SELECT owner FROM outbox"
    )
    return [row[0] for row in rows if row[0] is not None]


def inherit(conn: Connection, dead: str, heir: str) -> list[int]:
    """Makes `heir` the owner of the replies that a dead worker left running, and returns their ids.

    The queued turns and the outbox jobs of the dead worker become unowned.
    """
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
    conn.executemany(
        "UPDATE turns SET owner = ?, inherited = 1 WHERE reply_id = ?", ((heir, reply_id) for reply_id in left)
    )
    return left


def release_waiting(conn: Connection, owner: str) -> None:
    """Makes the queued turns of a worker unowned, so that another worker can claim them."""
    conn.execute(
        "UPDATE turns SET owner = NULL WHERE owner = ? AND reply_id IN "
        "(SELECT id FROM messages WHERE status = 'queued')",
        (owner,),
    )


def select_known_runs(conn: Connection, session_id: int) -> set[str]:
    """Returns the gateway's run ids that are stored for the turns of a session."""
    rows = conn.execute("SELECT run_id FROM turns WHERE session_id = ? AND run_id IS NOT NULL", (session_id,))
    return {row[0] for row in rows}
