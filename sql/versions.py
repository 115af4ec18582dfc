"""The migrations after version 1, which `adoption` makes. Each only adds to what the version before left."""

from sqlite3 import Connection

from .adoption import AdoptionContext


def store_replies_in_pieces(conn: Connection, _: AdoptionContext) -> None:
    """Version 2: the text of a running reply is appended in pieces, and a stored text never gets shorter.

    Until version 1, every piece rewrote the whole text, so that the cost of a reply grew with the square of its
    length. A worker of version 1 that still runs writes `content` alone; readers take `content` and the pieces.
    """
    for statement in (
        # The piece ends at offset `until`, in characters of the whole text. SQLite's own length() stops at a NUL.
        """CREATE TABLE reply_pieces (
           reply_id INTEGER NOT NULL REFERENCES messages(id) ON DELETE CASCADE,
           until INTEGER NOT NULL, text TEXT NOT NULL, PRIMARY KEY (reply_id, until)) WITHOUT ROWID""",
        """CREATE TRIGGER messages_never_shorter BEFORE UPDATE OF content ON messages
           WHEN length(CAST(NEW.content AS BLOB)) < length(CAST(OLD.content AS BLOB))
           BEGIN SELECT RAISE(ABORT, 'the text of a message never gets shorter'); END""",
        # Why the model ended a complete reply: `length` or `content_filter`. NULL for all others.
        "ALTER TABLE messages ADD COLUMN finish_reason TEXT",
        # 1 if the owner took the running turn over from a dead worker, so that it recovers it instead of asking again.
        "ALTER TABLE turns ADD COLUMN inherited INTEGER NOT NULL DEFAULT 0",
        # When the message was sent to the gateway at the earliest: older answers of its history are not the reply.
        "ALTER TABLE turns ADD COLUMN asked_at TEXT",
        # Without these, refusing an image and revoking a token each read a whole table.
        "CREATE INDEX message_images_file ON message_images(file)",
        "CREATE INDEX revoked_tokens_expires ON revoked_tokens(expires_at)",
    ):
        conn.execute(statement)
