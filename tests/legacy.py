"""Builds legacy databases with odd values, migrates them, and reads what the migration must preserve."""

import base64
import hashlib
import io
import random
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import PIL.Image

import sql
from image_handler import ImageStore
from settings import CHECKOUT

SCHEMA = (Path(__file__).parent / "legacy_schema.sql").read_text(encoding="utf-8")
OLD_PASSWORD = {"Ada@Example.com": "test123", "bob@example.com": "hunter22!"}


def build(path: Path, messages: int = 0, seed: int = 0) -> None:
    """Creates the database of `legacy_schema.sql`, and adds `messages` messages with random odd values."""
    with closing(sqlite3.connect(path)) as conn:
        conn.executescript(SCHEMA)
        if messages:
            _fill(conn, messages, random.Random(seed))
        conn.commit()


def _fill(conn: sqlite3.Connection, count: int, chance: random.Random) -> None:
    conn.execute("ALTER TABLE messages ADD COLUMN model TEXT")
    conn.execute("ALTER TABLE users ADD COLUMN phone")
    conn.execute("CREATE TABLE unrelated_settings (name TEXT, value TEXT)")
    conn.execute("CREATE VIEW last_words AS SELECT session_id, max(id), content FROM messages GROUP BY session_id")
    conn.execute("INSERT INTO users VALUES (4, 'ADA@example.com', 'Another Ada', NULL, 1770000000, '+49 30 123')")
    conn.execute("INSERT INTO projects (id, user_id, name) VALUES (36, 99, 'of nobody')")
    sessions = [
        (100 + number, chance.choice([34, 35, 36, 98]), _key(chance), chance.choice([None, "", "a label"]))
        for number in range(min(count, 1000))
    ]
    conn.executemany("INSERT INTO sessions (id, project_id, session_key, label) VALUES (?, ?, ?, ?)", sessions)
    ids = [session[0] for session in sessions] + [58, 59, 60, 7]
    sources = _images()
    conn.executemany(
        "INSERT INTO messages (id, session_id, role, content, created_at, image, model) VALUES (?, ?, ?, ?, ?, ?, ?)",
        (_message(1000 + number * 2, chance.choice(ids), chance, sources) for number in range(count)),
    )
    conn.execute("UPDATE messages SET content = CAST(x'c3284142ff' AS TEXT) WHERE id = 1000")  # invalid UTF-8
    conn.execute("UPDATE messages SET content = x'48c3a9' WHERE id = 1002")  # bytes
    conn.execute("DELETE FROM messages WHERE id = ?", (1000 + (count - 1) * 2,))  # its id must not be used again


def _key(chance: random.Random) -> str:
    text = f"{chance.getrandbits(128):032x}"
    parts = (text[:8], text[8:12], text[12:16], text[16:20], text[20:])
    return "-".join(parts) if chance.random() < 0.9 else text.upper()


def _message(number: int, session: int, chance: random.Random, sources: list[str]) -> tuple[object, ...]:
    error = "Error: All connection attempts failed"
    words = ["", "Hello", "Grüße, 日本語 👩‍👩‍👧", "a\0b", error, "\u2028\n\r\t", f"text {number} " * 20]
    text = chance.choice(words)
    if chance.random() < 0.001:
        text = "a long one " * 10_000
    at = chance.choice(
        [None, "2026-02-04 10:47:49", "2026-02-04T10:47:49.250+02:00", 1770000000, 1770000000123, "yesterday"]
    )
    image = chance.choice(sources) if chance.random() < 0.002 else None
    return number, session, chance.choice(["user", "assistant"]), text, at, image, chance.choice([None, "gpt"])


def _images() -> list[str]:
    encoded = []
    for kind in ("PNG", "JPEG", "GIF", "WEBP"):
        file = io.BytesIO()
        PIL.Image.new("RGB", (3, 2), "red").save(file, kind)
        encoded.append(base64.b64encode(file.getvalue()).decode())
    with_prefix = [f"data:image/jpeg;base64,{text}" for text in encoded[:2]]
    return [*encoded, *with_prefix, "testimage123", "", "https://example.com/a.png", encoded[0][:40]]


def adopt(path: Path) -> ImageStore:
    """Migrates a legacy database as the service does, and returns the store with its images."""
    store = ImageStore(path.parent / "images", b"secret")

    def keep(key: str, text: str) -> sql.KeptImage | None:
        kept = store.adopt(key, text)
        return kept and sql.KeptImage(*kept)

    sql.migrate(path, sql.AdoptionContext(keep, CHECKOUT))
    return store


def texts(path: Path) -> tuple[int, str]:
    """Returns the number of messages, and a SHA-256 over their original texts, before or after the migration."""
    digest, count = hashlib.sha256(), 0
    with closing(sqlite3.connect(path)) as conn:
        for message_id, text in conn.execute(_TEXTS[conn.execute("PRAGMA user_version").fetchone()[0] > 0]):
            digest.update(b"%d %d " % (message_id, len(text)) + text)
            count += 1
    return count, digest.hexdigest()


_TEXTS = (
    "SELECT id, CAST(content AS BLOB) FROM messages ORDER BY id",
    """SELECT m.id, CAST(coalesce(v.value, m.content) AS BLOB) FROM
       (SELECT id, content FROM messages UNION ALL SELECT id, content FROM orphaned_messages) m
       LEFT JOIN legacy_values v ON v.table_name = 'messages' AND v.row_id = m.id AND v.column_name = 'content'
       ORDER BY m.id""",
)


def images(path: Path) -> Iterator[tuple[int, str]]:
    """Yields (message id, base64) for each image of a legacy database."""
    with closing(sqlite3.connect(path)) as conn:
        yield from conn.execute("SELECT id, image FROM messages WHERE image <> ''").fetchall()
