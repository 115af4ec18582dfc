"""Measures frequent operations with 1,000 and with 1,000,000 messages, and the migration of a legacy database.

Prints the rows of "Database size in figures" in docs/reliability.md. Each operation runs on the two databases
alternately, so that other load on the machine affects both.
"""

import asyncio
import logging
import statistics
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from sqlite3 import Connection

import clock
import sql
from database import Database
from tests import legacy

ROUNDS = 500
SESSIONS_OF_A_PROJECT = 10
PROJECTS_OF_A_USER = 10


async def fill(db: Database, sessions: int, messages: int) -> None:
    """Adds users with 10 projects each, 10 sessions per project, and `messages` messages per session."""

    def insert(conn: Connection) -> None:
        at = clock.now()
        for number in range(1, sessions + 1):
            project = (number - 1) // SESSIONS_OF_A_PROJECT + 1
            conn.execute(
                "INSERT INTO sessions (id, project_id, session_key, created_at) VALUES (?, ?, ?, ?)",
                (number, project, f"key-{number}", at),
            )
        rows = (
            (number % sessions + 1, ("user", "assistant")[number // sessions % 2], f"a message {number} " * 8, at)
            for number in range(sessions * messages)
        )
        conn.executemany("INSERT INTO messages (session_id, role, content, created_at) VALUES (?, ?, ?, ?)", rows)

    def own(conn: Connection) -> None:
        for number in range(max(sessions // 100, 1)):
            user = sql.insert_user(conn, f"{number}@example.com", None, "h")
            for name in range(PROJECTS_OF_A_USER):
                sql.insert_project(conn, user.id, f"P{name}", None, "", 0)

    await db.write(own)
    await db.write(insert)


async def begin_and_end(db: Database) -> float:
    """Begins a turn, ends it, and returns the seconds that the beginning took."""
    started = time.perf_counter()
    begun = await db.write(sql.begin_turn, sql.NewTurn(1, "key-1", "Hello", "Hello", "digest", None, "me"))
    took = time.perf_counter() - started
    await db.write(sql.finish_turn, begun.reply_id, "me", sql.Ending("complete", "Hi", None, None, None, None))
    return took


async def store_text(db: Database) -> float:
    """Begins a turn, stores a text of its reply, ends it, and returns the seconds that storing the text took."""
    begun = await db.write(sql.begin_turn, sql.NewTurn(1, "key-2", "Hello", "Hello", "digest", None, "me"))
    started = time.perf_counter()
    await db.write(sql.append_text, "me", begun.reply_id, 0, "so far " * 100, "run")
    took = time.perf_counter() - started
    await db.write(sql.finish_turn, begun.reply_id, "me", sql.Ending("complete", "Hi", None, None, None, None))
    return took


def reading(job: Callable[..., object], *arguments: object) -> Callable[[Database], Awaitable[float]]:
    """Returns an operation that measures a reading job, in seconds."""

    async def read(db: Database) -> float:
        started = time.perf_counter()
        db.read(job, *arguments)
        return time.perf_counter() - started

    return read


OPERATIONS: dict[str, Callable[[Database], Awaitable[float]]] = {
    "list a user's 10 projects": reading(sql.select_projects, 1, 100, sql.MAX_ID),
    "list a project's 10 sessions": reading(sql.select_sessions, 1, 1, False, 100, sql.MAX_ID),
    "read the last 50 messages of a session": reading(sql.select_messages, 1, 3, 50, None),
    "begin a turn": begin_and_end,
    "store the text of a reply": store_text,
}


async def compare(directory: Path) -> None:
    """Prints a table with the median time of each operation in the small and in the large database."""
    small, large = Database(directory / "small.db"), Database(directory / "large.db")
    for db, sessions, messages in ((small, 20, 50), (large, 1000, 1000)):
        db.open()
        await fill(db, sessions, messages)
    sys.stdout.write("| operation | 1,000 messages | 1,000,000 messages | ratio |\n|---|---|---|---|\n")
    for name, operation in OPERATIONS.items():
        pairs = [(await operation(small), await operation(large)) for _ in range(ROUNDS)]
        first, second = (statistics.median(column) * 1e6 for column in zip(*pairs, strict=True))
        sys.stdout.write(f"| {name} | {first:.0f} µs | {second:.0f} µs | {second / first:.2f} |\n")
    for db in (small, large):
        db.close()


def adopt(directory: Path) -> None:
    """Prints how long the migration of a legacy database with 1,000,000 messages takes."""
    path = directory / "old.db"
    legacy.build(path, 1_000_000)
    started = time.perf_counter()
    sql.migrate(path)
    took = time.perf_counter() - started
    sys.stdout.write(f"\nMigration of {path.stat().st_size / 1e6:.0f} MB with 1,000,000 messages: {took:.1f} s\n")


def main() -> None:
    """Prints the results to stdout, and progress to stderr."""
    logging.basicConfig(level="INFO", format="%(asctime)s %(message)s")
    with tempfile.TemporaryDirectory() as directory:
        asyncio.run(compare(Path(directory)))
        adopt(Path(directory))


if __name__ == "__main__":
    main()
