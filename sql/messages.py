"""The tables `messages` and `message_images`."""

import json
from collections.abc import Iterable, Iterator, Sequence
from sqlite3 import Connection
from typing import Any, Literal, NamedTuple, TypedDict

import errors

from .schema import MAX_ID
from .sessions import OWNED_SESSION, select_session

Status = Literal["queued", "streaming", "complete", "stopped", "interrupted", "failed", "empty"]


class Failure(TypedDict):
    """Why a reply failed or was interrupted, in the form in which the API returns it."""

    code: str
    message: str
    retryable: bool


class Message(NamedTuple):
    id: int
    role: str
    content: str
    status: Status
    error: Failure | None
    usage: dict[str, int] | None
    finish_reason: str | None
    created_at: str


# The text of a running reply is not in `content` alone, see `replies`.
_MESSAGE = """m.id, m.role, CASE m.status WHEN 'streaming' THEN m.content || coalesce((SELECT group_concat(text, '')
    FROM (SELECT text FROM reply_pieces WHERE reply_id = m.id ORDER BY until)), '') ELSE m.content END,
    m.status, m.error, m.usage, m.finish_reason, m.created_at"""


def decoded(column: str | None) -> Any:
    """Returns the parsed JSON of a column, or None for NULL."""
    return None if column is None else json.loads(column)


def _message(row: Sequence[Any]) -> Message:
    message_id, role, content, status, error, usage, finish_reason, created_at = row
    return Message(message_id, role, content, status, decoded(error), decoded(usage), finish_reason, created_at)


def select_messages(
    conn: Connection, user_id: int, session_id: int, limit: int | None, before: int | None
) -> list[Message]:
    """Returns the newest `limit` messages of a session whose ids are below `before`, oldest first.

    None for either means no restriction. Raises errors.NotFound if the user has no such session.
    """
    select_session(conn, user_id, session_id)
    rows = conn.execute(
        f"SELECT {_MESSAGE} FROM messages m WHERE m.session_id = ? AND m.id < ? ORDER BY m.id DESC LIMIT ?",
        (session_id, MAX_ID if before is None else before, -1 if limit is None else limit),
    ).fetchall()
    return [_message(row) for row in reversed(rows)]


def select_images(conn: Connection, first: int, last: int, session_id: int) -> dict[int, list[tuple[int, str]]]:
    """Returns the images of a session's messages with ids from `first` to `last`, by message id.

    Each image is a pair (image id, file).
    """
    images: dict[int, list[tuple[int, str]]] = {}
    for message_id, image_id, file in conn.execute(
        "SELECT i.message_id, i.id, i.file FROM messages m JOIN message_images i ON i.message_id = m.id "
        "WHERE m.session_id = ? AND m.id BETWEEN ? AND ? ORDER BY i.id",
        (session_id, first, last),
    ):
        images.setdefault(message_id, []).append((image_id, file))
    return images


def select_image_files(conn: Connection, message_id: int) -> list[str]:
    """Returns the files of a message's images, in the order of the message."""
    rows = conn.execute("SELECT file FROM message_images WHERE message_id = ? ORDER BY id", (message_id,))
    return [row[0] for row in rows]


def select_all_images(conn: Connection) -> Iterator[tuple[int, str]]:
    """Yields (message id, file) for every image in the database."""
    yield from conn.execute("SELECT message_id, file FROM message_images ORDER BY id")


def select_image_file(conn: Connection, image_id: int) -> str:
    """Returns the file of an image. Raises errors.NotFound."""
    row = conn.execute("SELECT file FROM message_images WHERE id = ?", (image_id,)).fetchone()
    if row is None:
        raise errors.NotFound("There is no such image.", code="image_not_found")
    return str(row[0])


def without_row(conn: Connection, files: Iterable[str]) -> list[str]:
    """Returns those of the files that no message has as its image."""
    query = "SELECT 1 FROM message_images WHERE file = ? LIMIT 1"
    return [file for file in files if conn.execute(query, (file,)).fetchone() is None]


def insert_images(conn: Connection, message_id: int, files: Iterable[str]) -> None:
    """Stores the images of a message, in this order."""
    conn.executemany(
        "INSERT INTO message_images (message_id, file) VALUES (?, ?)", ((message_id, file) for file in files)
    )


def select_owned_message(conn: Connection, user_id: int, session_id: int, message_id: int) -> Message:
    """Returns a message of a session that the user owns. Raises errors.NotFound."""
    row = conn.execute(
        f"SELECT {_MESSAGE} FROM {OWNED_SESSION} JOIN messages m ON m.session_id = s.id "
        "WHERE m.id = :id AND s.id = :session_id",
        {"user_id": user_id, "session_id": session_id, "id": message_id},
    ).fetchone()
    if row is None:
        raise errors.NotFound("There is no such message.", code="message_not_found")
    return _message(row)
