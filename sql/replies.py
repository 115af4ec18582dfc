"""The replies in `messages`, and the table `reply_pieces`: the text of a running reply, in the pieces that arrived.

The text of a reply is `messages.content` and, after it, the pieces. While a reply runs, pieces are only appended, so
that storing one costs what it adds; `turns.finish_turn` folds them into `content`. Offsets are in characters.
"""

import codecs
from collections.abc import Iterator
from sqlite3 import Connection
from typing import NamedTuple

from .messages import Failure, Status, decoded

PIECE = 65_536  # characters, or bytes of UTF-8, that are read at once


class Reply(NamedTuple):
    """A reply without its text. `message_id` and `owner` are None for a legacy reply, which has no turn.

    `owner` is also None for an unowned queued turn. `finish_reason` is `length` or `content_filter` if the model
    itself ended the reply early.
    """

    id: int
    message_id: int | None
    session_id: int
    status: Status
    error: Failure | None
    usage: dict[str, int] | None
    finish_reason: str | None
    created_at: str
    owner: str | None


def select_reply(conn: Connection, reply_id: int) -> Reply | None:
    """Returns a reply, or None if there is no reply with this id."""
    row = conn.execute(
        "SELECT m.id, t.message_id, m.session_id, m.status, m.error, m.usage, m.finish_reason, m.created_at, t.owner "
        "FROM messages m LEFT JOIN turns t ON t.reply_id = m.id WHERE m.id = ? AND m.role = 'assistant'",
        (reply_id,),
    ).fetchone()
    if row is None:
        return None
    message_id, user_message_id, session_id, status, error, usage, finish_reason, created_at, owner = row
    return Reply(
        *(message_id, user_message_id, session_id, status, decoded(error), decoded(usage)),
        *(finish_reason, created_at, owner),
    )


def append_text(
    conn: Connection, owner: str, reply_id: int, start: int, text: str, run_id: str | None = None
) -> int | None:
    """Appends text that begins at the offset `start` to a running reply, without what is stored already.

    A `run_id` is stored with it: the gateway's name of the run.

    Returns the length that is stored then. It is below `start`, and nothing was stored, if the text in between is
    missing: append from there. Returns None if `owner` no longer runs the reply.
    """
    row = conn.execute(
        "SELECT m.content, (SELECT max(until) FROM reply_pieces WHERE reply_id = m.id) FROM messages m "
        "JOIN turns t ON t.reply_id = m.id WHERE m.id = ? AND m.status = 'streaming' AND t.owner = ?",
        (reply_id, owner),
    ).fetchone()
    if row is None:
        return None
    stored = len(row[0]) if row[1] is None else int(row[1])
    if run_id is not None:
        conn.execute("UPDATE turns SET run_id = ? WHERE reply_id = ? AND run_id IS NOT ?", (run_id, reply_id, run_id))
    until = start + len(text)
    if not start <= stored < until:
        return stored
    for at in range(stored, until, PIECE):
        piece = text[at - start : at - start + PIECE]
        conn.execute(
            "INSERT INTO reply_pieces (reply_id, until, text) VALUES (?, ?, ?)", (reply_id, at + len(piece), piece)
        )
    return until


def select_pieces(conn: Connection, reply_id: int, after: int) -> list[str]:
    """Returns the stored pieces of a running reply beyond the offset `after`, about PIECE characters of them.

    The list is empty if there are no more pieces, in particular once they are folded into `content`.
    """
    pieces: list[str] = []
    size = 0
    for until, text in conn.execute(
        "SELECT until, text FROM reply_pieces WHERE reply_id = ? AND until > ? ORDER BY until", (reply_id, after)
    ):
        new = until - after - size
        pieces.append(text[len(text) - new :])
        size += new
        if size >= PIECE:
            break
    return pieces


def stored_text(conn: Connection, reply_id: int) -> str:
    """Returns the whole stored text of a reply that exists."""
    (content,) = conn.execute("SELECT content FROM messages WHERE id = ?", (reply_id,)).fetchone()
    pieces = conn.execute("SELECT text FROM reply_pieces WHERE reply_id = ? ORDER BY until", (reply_id,))
    return str(content) + "".join(row[0] for row in pieces)


def text_size(conn: Connection, reply_id: int) -> int:
    """Returns the bytes of `content`, without reading it; 0 if the reply was deleted."""
    conn.execute("BEGIN")  # so that it is not deleted in between
    try:
        if select_reply(conn, reply_id) is None:
            return 0
        with conn.blobopen("messages", "content", reply_id, readonly=True) as blob:
            return len(blob)
    finally:
        conn.execute("ROLLBACK")


def read_text(conn: Connection, reply_id: int) -> list[str]:
    """Returns the whole text of a reply, in strings of at most PIECE characters; nothing if it was deleted.

    The read is split, so that on a thread it never keeps the interpreter from the event loop for long.
    """
    conn.execute("BEGIN")  # so that the pieces are not folded in between
    try:
        if select_reply(conn, reply_id) is None:
            return []
        pieces = list(_read_content(conn, reply_id))
        after = sum(map(len, pieces))
        while more := select_pieces(conn, reply_id, after):
            pieces += more
            after += sum(map(len, more))
    finally:
        conn.execute("ROLLBACK")
    return pieces


def _read_content(conn: Connection, reply_id: int) -> Iterator[str]:
    decode = codecs.getincrementaldecoder("utf-8")("replace").decode
    with conn.blobopen("messages", "content", reply_id, readonly=True) as blob:
        while read := blob.read(PIECE):
            yield decode(read)
