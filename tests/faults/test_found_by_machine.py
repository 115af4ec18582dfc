"""What the fault machine has found, each as a test of its own that fails without its fix."""

import asyncio
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path
from sqlite3 import Connection
from typing import Any

import httpx
import pytest

import errors
import sql
from database import Database
from locks import FileLock
from replies import LiveReply, Replies
from tests.service import Service, until
from tests.stand_in import StandIn


@pytest.fixture
def pair(tmp_path: Path, openclaw: StandIn) -> Iterator[tuple[Service, Service]]:
    """Two processes of the service on one database."""
    with Service(tmp_path, openclaw.url, openclaw.token) as one, Service(tmp_path, openclaw.url, openclaw.token) as two:
        yield one, two


@pytest.mark.parametrize("then", ["thaw", pytest.param("kill", marks=pytest.mark.slow)])
@pytest.mark.parametrize("stopped", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_run_that_ends_after_the_delete_leaves_nothing(
    pair: tuple[Service, Service], openclaw: StandIn, then: str, stopped: bool
) -> None:
    """A session is deleted, or stopped and deleted, while the process that runs its turn is suspended. The gateway
    finishes that run after the delete and so creates the session again. Once the process continues, or has died, the
    session is deleted in the gateway once more."""
    one, two = pair
    with one.person() as ada, ada.at(two.url) as elsewhere:
        session = ada.session()
        with ada.listen(session, "[[chunks=50 delay=0.1]]") as (_, stream):
            stream.read(to_first_text=True)
            one.freeze()
            if stopped:
                assert elsewhere.stop(session)
            elsewhere.delete(f"/sessions/{session['id']}")
            until(lambda: openclaw.deleted, 10, "the first delete in the gateway")
            until(lambda: openclaw.completed, 30, "the gateway to finish the run")
            assert openclaw.sessions
            if then == "thaw":
                one.thaw()
                stream.read()
            else:
                one.kill()
                with pytest.raises(httpx.TransportError):
                    stream.read()
        until(lambda: not openclaw.sessions, 45, "the session to be deleted again")


def test_an_error_that_follows_from_what_was_rolled_back_reaches_nobody(tmp_path: Path) -> None:
    """Two writes are in one transaction, and the second fails because of what the first has changed, like a message to
    a session that is just deleted. The commit fails: both callers get errors.Unavailable, not one of them a 404."""

    def delete(conn: Connection) -> None:
        conn.execute("PRAGMA defer_foreign_keys=ON")  # the next line makes the commit fail
        conn.execute("INSERT INTO turns (reply_id, message_id, session_id, digest) VALUES (1, 1, 1, '')")

    def send(conn: Connection) -> None:
        if conn.execute("SELECT 1 FROM turns").fetchone():
            raise errors.NotFound("There is no such session.", code="session_not_found")

    async def story() -> list[object]:
        db = Database(tmp_path / "a.db")
        db.open()
        lock = FileLock(tmp_path / "a.db.lock")
        with lock.within(1):  # until both are waiting
            writes = [asyncio.ensure_future(db.write(delete)), asyncio.ensure_future(db.write(send))]
            await asyncio.sleep(0.1)
        found = await asyncio.gather(*writes, return_exceptions=True)
        await db.write(send)  # nothing of the first write has stayed
        lock.close()
        db.close()
        return list(found)

    assert [type(result) for result in asyncio.run(story())] == [errors.Unavailable, errors.Unavailable]


def test_a_reader_of_a_deleted_reply_gets_the_status_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reply ends and its session is deleted while another process follows it, between the read of its row and the
    read of its text: its readers get the status `stopped`, not `failed`."""
    ending = sql.Ending("failed", "some text", None, None, None, None)

    async def story() -> LiveReply:
        db = Database(tmp_path / "a.db")
        db.open()
        user = await db.write(sql.insert_user, f"{time.time_ns()}@example.com", None, "hash")
        project = await db.write(sql.insert_project, user.id, "P", None, "", 0)
        session = await db.write(sql.insert_session, user.id, project.id, None, "main")
        turn = sql.NewTurn(user.id, session.session_key, "Hi", "Hi", "digest", None, "another")
        begun = await db.write(sql.begin_turn, turn)
        reply = LiveReply(begun.reply("another"))
        await db.write(sql.finish_turn, begun.reply_id, "another", ending)
        read = db.read

        def read_and_delete(job: Any, *arguments: Any) -> Any:
            found: Any = read(job, *arguments)
            if job is sql.select_reply and not deleted:
                deleted.append(True)
                with sqlite3.connect(tmp_path / "a.db") as conn:
                    conn.execute("PRAGMA foreign_keys=ON")
                    conn.execute("DELETE FROM sessions")
            return found

        deleted: list[bool] = []
        monkeypatch.setattr(db, "read", read_and_delete)
        await Replies(db).follow(reply)
        assert deleted
        db.close()
        return reply

    assert asyncio.run(story()).status == "stopped"
