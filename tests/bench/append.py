"""The cost of storing and of reading a long reply: `./tests/run --bench append` prints figures of docs/reliability.md.

Storing: a text that arrives in 300 pieces, as within a minute. Reading: 20 readers at once of a finished reply of 10 MB
with an emoji, and the longest time for which one of their steps kept the event loop from everything else.
"""

import asyncio
import sqlite3
import statistics
import struct
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import sql
from chat_handlers import ReplyStream
from database import Database
from replies import Replies

FRAME = 4096 + 24  # bytes of a page in the WAL
READERS = 20


class Storing(NamedTuple):
    """The bytes in the WAL as a multiple of the text's, and the median seconds of the first and the last tenth of the
    writes."""

    wal: float
    first: float
    last: float


def measure_storing(path: Path, megabytes: int, pieces: int) -> Storing:
    """Stores a text of so many MB in so many pieces, and its end."""
    return asyncio.run(_store(path, "0123456789abcd\u00e9" * (megabytes * 62_500), pieces))


async def _store(path: Path, text: str, pieces: int) -> Storing:
    db = Database(path)
    db.open()
    begun = await db.write(_begin, db.lease.name)
    frames, last, took = 0, _frames(path), []
    for number in range(pieces + 1):
        started = time.perf_counter()
        if number < pieces:
            start, end = (len(text) * at // pieces for at in (number, number + 1))
            await db.write(sql.append_text, db.lease.name, begun.reply_id, start, text[start:end])
            took.append(time.perf_counter() - started)
        else:
            ending = sql.Ending("complete", text, None, None, None, None)
            await db.write(sql.finish_turn, begun.reply_id, db.lease.name, ending)
        now = _frames(path)
        frames, last = frames + (now - last if now >= last else now), now  # a checkpoint begins the WAL anew
    db.close()
    tenth = pieces // 10
    return Storing(
        frames * FRAME / len(text.encode()), statistics.median(took[:tenth]), statistics.median(took[-tenth:])
    )


def _frames(path: Path) -> int:
    """The number of frames in the WAL, from the index in shared memory (sqlite.org/walformat.html, mxFrame)."""
    return int(struct.unpack("<I", Path(f"{path}-shm").read_bytes()[16:20])[0])


def _begin(conn: sqlite3.Connection, owner: str) -> sql.Begun:
    user = sql.insert_user(conn, f"{time.time_ns()}@example.com", None, "hash")
    project = sql.insert_project(conn, user.id, "P", None, "", 0)
    session = sql.insert_session(conn, user.id, project.id, None, "main")
    return sql.begin_turn(conn, sql.NewTurn(user.id, session.session_key, "Hi", "Hi", "digest", None, owner))


async def measure_reading(path: Path, megabytes: int) -> tuple[float, float]:
    """Reads a finished reply with READERS at once; the longest gap of the event loop in ms, and the seconds in all."""
    db = Database(path)
    db.open()
    begun = await db.write(_begin, db.lease.name)
    text = "\N{GRINNING FACE}" + "abcdefgh" * (megabytes * 125_000)
    await db.write(sql.finish_turn, begun.reply_id, db.lease.name, sql.Ending("complete", text, None, None, None, None))
    replies, gaps = Replies(db), [0.0]

    async def watch() -> None:
        while True:
            started = time.perf_counter()
            await asyncio.sleep(0)
            gaps.append(time.perf_counter() - started)

    watching, started = asyncio.create_task(watch()), time.perf_counter()
    await asyncio.gather(*(_read(replies, begun.reply_id) for _ in range(READERS)))
    took = time.perf_counter() - started
    watching.cancel()
    db.close()
    return max(gaps) * 1000, took


async def _read(replies: Replies, reply_id: int) -> None:
    """Reads a reply in the steps of `chat_handlers.ReplyStream`, without a network."""
    reply = await replies.get(reply_id)
    assert reply is not None
    stream, sent = ReplyStream(reply, 0, 15), 0
    while frames := stream.next_frames():
        sent += len(frames)
        await asyncio.sleep(0)


def main() -> None:
    """Prints both."""
    sys.stdout.write("| text in a minute | bytes in the WAL / text | first tenth | last tenth |\n|---|---|---|---|\n")
    for megabytes in (1, 5, 20):
        with tempfile.TemporaryDirectory() as folder:
            found = measure_storing(Path(folder) / "a.db", megabytes, 300)
        first, last = (f"{seconds * 1e6:.0f} \u00b5s" for seconds in (found.first, found.last))
        sys.stdout.write(f"| {megabytes} MB | {found.wal:.2f} | {first} | {last} |\n")
    with tempfile.TemporaryDirectory() as folder:
        gap, took = asyncio.run(measure_reading(Path(folder) / "a.db", 10))
    sys.stdout.write(f"\n20 readers of 10 MB: {took:.1f} s in all, the event loop held for at most {gap:.1f} ms\n")


if __name__ == "__main__":
    main()
