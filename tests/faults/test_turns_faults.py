"""Faults in the life of a turn: dead and suspended processes, failed reads and writes, ends without a deadline."""

import asyncio
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

import errors
import image_handler
import outbox
import sql
from database import Database
from replies import LiveReply, Replies
from runs import Runs
from tests.bench.append import measure_storing
from tests.conftest import make_settings
from tests.proxy import IdleProxy
from tests.service import JSON, Person, Served, Service, until
from tests.stand_in import StandIn, reply_text
from turns import Turns

SLOW = "[[chunks=3000 delay=0.02 size=9 seed=4]]"
PNG = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
Serve = Callable[..., Served]


@pytest.fixture
def pair(tmp_path: Path, openclaw: StandIn) -> Iterator[tuple[Service, Service]]:
    """Two processes of the service on one database."""
    with Service(tmp_path, openclaw.url, openclaw.token) as one, Service(tmp_path, openclaw.url, openclaw.token) as two:
        yield one, two


def stored(database: Path, reply_id: int) -> str:
    """The text of a reply that is stored at this moment."""
    with sqlite3.connect(database) as conn:
        return "".join(sql.read_text(conn, reply_id))


def turns_of(served: Served) -> Turns:
    """The turns of an app that runs in this process."""
    turns: Turns = served.app.state.turns
    return turns


def last_status(person: Person, session: JSON) -> str:
    """The status of a session's newest message; empty if it has none."""
    messages = person.messages(session)
    return str(messages[-1]["status"]) if messages else ""


# --- a cached copy is not the truth -------------------------------------------------------------------


@pytest.mark.parametrize("kills", [3, pytest.param(12, marks=pytest.mark.slow)])
def test_an_heir_shortens_no_reply(tmp_path: Path, openclaw: StandIn, kills: int) -> None:
    """A process whose reader follows a reply takes it over from a dead one: every character that the dead one had
    stored is still there, and what is stored is what the gateway sent."""
    with ExitStack() as stack:
        heir = stack.enter_context(Service(tmp_path, openclaw.url, openclaw.token))
        for _ in range(kills):
            with Service(tmp_path, openclaw.url, openclaw.token) as owner, owner.person() as ada:
                session = ada.session()
                with ada.listen(session, SLOW) as (response, stream), ada.at(heir.url) as elsewhere:
                    reply_id = int(response.headers["X-Message-Id"])
                    stream.read(to_first_text=True)
                    with elsewhere.resume(session, reply_id) as followed:
                        followed.read(to_first_text=True)
                        time.sleep(0.5)
                        owner.kill()
                        before = stored(tmp_path / "service.db", reply_id)
                        followed.read()
                    message = elsewhere.messages(session)[-1]
            assert message["status"] == "interrupted"
            assert message["content"].startswith(before)
            assert reply_text(SLOW).startswith(message["content"])
            assert followed.text == message["content"]


def test_no_statement_shortens_a_text(tmp_path: Path) -> None:
    """A copy that lacks text neither overwrites what is stored nor ends the reply with less of it."""
    sql.migrate(tmp_path / "a.db")
    with sqlite3.connect(tmp_path / "a.db", isolation_level=None) as conn:
        begun = begin(conn, "me")
        assert sql.append_text(conn, "me", begun.reply_id, 0, "one two three") == 13
        assert sql.append_text(conn, "me", begun.reply_id, 0, "one") == 13
        assert sql.append_text(conn, "me", begun.reply_id, 20, "a gap") == 13
        assert sql.finish_turn(conn, begun.reply_id, "me", sql.Ending("stopped", "one", None, None, None, None))
        assert "".join(sql.read_text(conn, begun.reply_id)) == "one two three"
        with pytest.raises(sqlite3.IntegrityError, match="never gets shorter"):
            conn.execute("UPDATE messages SET content = 'one' WHERE id = ?", (begun.reply_id,))


def begin(conn: sqlite3.Connection, owner: str) -> sql.Begun:
    """A turn of a new user that runs."""
    user = sql.insert_user(conn, f"{time.time_ns()}@example.com", None, "hash")
    project = sql.insert_project(conn, user.id, "P", None, "", 0)
    session = sql.insert_session(conn, user.id, project.id, None, "main")
    return sql.begin_turn(conn, sql.NewTurn(user.id, session.session_key, "Hi", "Hi", "digest", None, owner))


# --- what is claimed is followed through --------------------------------------------------------------


def test_a_failed_read_after_the_claim_leaves_no_turn_behind(
    served: Served, ada: Person, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the commit that makes this process the owner and the task that does the work, one read fails: the turn
    is found by its row and runs."""
    replies, failures = turns_of(served).replies, iter([True, True])
    get = replies.get

    async def fail_twice(reply_id: int) -> LiveReply | None:
        if next(failures, False):
            raise errors.Unavailable("on purpose", code="database_unavailable")
        return await get(reply_id)

    session = ada.session()
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(ada.say, session, "[[chunks=5 delay=0.1]]")
        until(lambda: last_status(ada, session) == "streaming", 5, "the first reply to run")
        second = pool.submit(ada.say, session, "Second")
        until(lambda: last_status(ada, session) == "queued", 5, "the second to wait")
        monkeypatch.setattr(replies, "get", fail_twice)
        assert first.result(30).status_code == 200
        assert second.result(30).text.startswith("You said: Second")
    assert next(failures, None) is None


@pytest.mark.parametrize(
    "broken", [UnicodeEncodeError("utf-8", "\ud800", 0, 1, "on purpose"), OverflowError("too large")]
)
def test_an_end_that_cannot_be_stored_is_not_the_end(
    served: Served, ada: Person, monkeypatch: pytest.MonkeyPatch, broken: Exception
) -> None:
    """A value that SQLite does not take ends the reply as failed, with its text, instead of leaving it `streaming`."""
    finish = sql.finish_turn

    def refuse(conn: sqlite3.Connection, reply_id: int, owner: str, ending: sql.Ending) -> bool:
        if ending.status == "complete":
            raise broken
        return finish(conn, reply_id, owner, ending)

    monkeypatch.setattr(sql, "finish_turn", refuse)
    session = ada.session()
    text = "[[chunks=4 delay=0.15]]"
    assert ada.say(session, text).code == "internal_error"
    message = ada.messages(session)[-1]
    assert (message["status"], message["error"]["code"]) == ("failed", "internal_error")
    assert message["content"] and reply_text(text).startswith(message["content"])
    monkeypatch.undo()
    assert ada.say(session, "Next").status_code == 200


def test_one_reply_that_cannot_be_stored_does_not_hold_up_the_others(
    served: Served, ada: Person, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While storing the text of one reply fails again and again, the text of another one is stored."""
    append, refused = sql.append_text, 0

    def refuse(conn: sqlite3.Connection, owner: str, reply_id: int, *rest: Any) -> int | None:
        nonlocal refused
        if reply_id == bad_id:
            refused += 1
            raise ValueError("on purpose")
        return append(conn, owner, reply_id, *rest)

    bad, good = ada.session(), ada.session()
    with ada.listen(bad, SLOW) as (response, _), ada.listen(good, SLOW) as (other, _):
        bad_id, good_id = (int(answer.headers["X-Message-Id"]) for answer in (response, other))
        monkeypatch.setattr(sql, "append_text", refuse)
        database = served.settings.db_path
        length = len(stored(database, good_id))
        until(lambda: refused > 1 and len(stored(database, good_id)) > length, 15, "the other text to be stored")
        assert ada.stop(bad) and ada.stop(good)


def test_an_outbox_job_whose_result_was_lost_runs_again(
    served: Served, ada: Person, openclaw: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One failed write after an attempt holds up neither that job nor the rest of its batch."""
    monkeypatch.setattr(outbox, "RETRY_AT_MOST", 1)
    postpone, failures = sql.postpone_outbox_job, iter([True])

    def fail_once(*arguments: Any) -> None:
        if next(failures, False):
            raise sqlite3.OperationalError("on purpose")
        postpone(*arguments)

    monkeypatch.setattr(sql, "postpone_outbox_job", fail_once)
    sessions = [ada.session() for _ in range(6)]
    for session in sessions:
        ada.say(session, "Hello")
    openclaw.stop()
    for session in sessions:
        ada.delete(f"/sessions/{session['id']}")
    until(lambda: next(failures, None) is None, 10, "the write that fails")
    openclaw.start()
    until(lambda: len(set(openclaw.deleted)) == 6, 30, "all six sessions to be deleted in the gateway")


def test_a_stop_ends_the_turn_of_a_suspended_process(pair: tuple[Service, Service]) -> None:
    """The owner is suspended and cannot act: the process that was asked ends the turn, and the owner, once it
    continues, changes nothing any more."""
    one, two = pair
    with one.person() as ada, ada.at(two.url) as elsewhere:
        session = ada.session()
        with ada.listen(session, SLOW) as (response, stream):
            stream.read(to_first_text=True)
            time.sleep(0.5)
            one.freeze()
            assert elsewhere.stop(session)
            message = elsewhere.messages(session)[-1]
            assert (message["id"], message["status"]) == (int(response.headers["X-Message-Id"]), "stopped")
            assert message["content"] and reply_text(SLOW).startswith(message["content"])
            one.thaw()
            stream.read()
        assert stream.finish == "stopped"
        assert elsewhere.messages(session)[-1] == message


# --- the end has one deadline -------------------------------------------------------------------------


def test_a_hung_gateway_does_not_delay_the_end(tmp_path: Path, openclaw: StandIn) -> None:
    """Ten deleted sessions whose removal hangs in the gateway: the process ends all the same, and the next one removes
    them."""
    with ExitStack() as stack:
        service = stack.enter_context(Service(tmp_path, openclaw.url, openclaw.token, DRAIN_SECONDS="0.2"))
        ada = stack.enter_context(service.person())
        sessions = [ada.session() for _ in range(10)]
        for session in sessions:
            ada.say(session, "Hello")
        port = openclaw.port
        openclaw.stop()
        hole = stack.enter_context(IdleProxy(1, idle=300, port=port))
        for session in sessions:
            ada.delete(f"/sessions/{session['id']}")
        until(lambda: hole.connections, 10, "a job to hang")
        started = time.monotonic()
        service.stop()
        assert time.monotonic() - started < 20  # each job hangs for 10 s, one after another it was 100 s
        stack.pop_all().close()
    with StandIn(port, openclaw.token) as again, Service(tmp_path, again.url, again.token):
        until(lambda: len(again.deleted) == 10, 60, "the next process to delete them")


# --- storing costs what it adds -----------------------------------------------------------------------


def test_storing_a_reply_writes_its_text_a_few_times(tmp_path: Path) -> None:
    """5 MB that arrive within a minute, stored five times a second, write at most four times as much to the WAL
    (1,978 MB when every piece rewrote the whole text)."""
    found = measure_storing(tmp_path / "a.db", megabytes=5, pieces=300)
    assert found.wal <= 4


def test_twenty_readers_share_one_copy(tmp_path: Path) -> None:
    """However many read a long reply that is over, it is loaded once, and each step costs what it sends."""
    text = "😀" + "a" * 3_000_000

    async def story() -> None:
        db = Database(tmp_path / "a.db")
        db.open()
        begun = await db.write(begin, db.lease.name)
        ending = sql.Ending("complete", text, None, None, None, None)
        await db.write(sql.finish_turn, begun.reply_id, db.lease.name, ending)
        replies = Replies(db)
        found = await asyncio.gather(*(replies.get(begun.reply_id) for _ in range(20)))
        assert len({id(reply) for reply in found}) == 1
        reply = found[0]
        assert reply is not None
        assert reply.text() == text
        assert reply.text(2_999_990, 4) == "aaaa"
        assert reply.text(0, 3) == "😀aa"
        assert max(map(len, reply._parts)) <= 65_536
        db.close()

    asyncio.run(story())


def test_a_text_is_whole_however_it_is_cut() -> None:
    """Pieces of any size, read from any offset with any limit, are the text."""
    whole = "".join(chr(0x20 + number % 0x2000) for number in range(200_000))
    reply = LiveReply(sql.Reply(1, None, 1, "streaming", None, None, None, "", None))
    position = 0
    for size in (1, 7, 500, 13, 70_000, 1, 1, 65_536, 3, 200_000):
        reply.append(whole[position : position + size])
        position += size
    assert reply.text() == whole
    for after in (0, 1, 8, 507, 70_521, 199_999, 200_000, 300_000):
        for limit in (1, 4096, 65_536, 100_000, None):
            assert reply.text(after, limit) == whole[after : None if limit is None else after + limit]


# --- images -------------------------------------------------------------------------------------------


def test_images_are_written_outside_of_the_transaction(
    served: Served, ada: Person, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the disk is slow to take an image, other people's messages are stored."""
    publish, go_on = image_handler.ImageStore.publish, threading.Event()

    def slow(*arguments: Any) -> list[str]:
        go_on.wait(20)
        return publish(*arguments)

    monkeypatch.setattr(image_handler.ImageStore, "publish", slow)
    one, other = ada.session(), ada.session()
    with ThreadPoolExecutor(1) as pool:
        sent = pool.submit(ada.say, one, "a picture", image=PNG)
        assert ada.say(other, "Hello").status_code == 200
        assert not sent.done()
        go_on.set()
        assert sent.result(20).status_code == 200


def test_a_refused_image_leaves_no_file(served: Served, ada: Person) -> None:
    """A full queue, or a session that is deleted on the way: no file and no folder stays. The same image in another
    message of the session stays where it is."""
    session = ada.session()
    assert ada.say(session, "the first", image=PNG).status_code == 200
    full = ada.session()
    with ThreadPoolExecutor(11) as pool:
        for _ in range(11):
            pool.submit(ada.say, full, SLOW)
        until(lambda: len(ada.messages(full)) == 22, 10, "a full queue")
        assert ada.say(full, "one too many", image=PNG).code == "session_busy"
        assert ada.stop(full)
    assert not (served.settings.images / full["session_key"]).exists()
    image: JSON = ada.messages(session)[0]
    assert ada.http.get(image["image"]).status_code == 200


# --- what was suspected -------------------------------------------------------------------------------


def test_a_version_is_seen_only_when_its_work_is_done(
    tmp_path: Path, openclaw: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Following another process fails just when it commits the end of a reply, and nobody commits afterwards: the
    reader here gets the end all the same."""
    with (
        Served(make_settings(tmp_path, openclaw)) as one,
        Served(make_settings(tmp_path, openclaw)) as two,
        one.person() as ada,
        ada.at(two.url) as elsewhere,
    ):
        session = ada.session()
        text = "[[chunks=10 delay=0.1]]"
        with ada.listen(session, text) as (response, stream):
            stream.read(to_first_text=True)
            with elsewhere.resume(session, int(response.headers["X-Message-Id"])) as followed:
                followed.read(to_first_text=True)
                replies = turns_of(two).replies
                follow_all = replies.follow_all
                failing = threading.Event()
                failing.set()

                async def fail(but: Any) -> None:
                    if failing.is_set():
                        raise errors.Unavailable("on purpose", code="database_unavailable")
                    await follow_all(but)

                monkeypatch.setattr(replies, "follow_all", fail)
                stream.read()
                time.sleep(0.3)
                failing.clear()
                followed.read()
        assert followed.text == reply_text(text)
        assert followed.finish == "stop"


def test_a_turn_that_was_stopped_before_it_began_does_not_begin(tmp_path: Path) -> None:
    """A stop between the claim and the start reaches no agent. (The gateway here would raise.)"""

    async def story() -> None:
        db = Database(tmp_path / "a.db")
        db.open()
        begun = await db.write(begin, db.lease.name)
        await db.write(lambda conn: conn.execute("UPDATE turns SET stop_requested = 1") and None)
        runs = Runs(db, None, None, None)  # type: ignore[arg-type]  # none of them may be used
        reply = LiveReply(begun.reply(db.lease.name))
        assert (await runs.ask(reply)).status == "stopped"
        assert (await runs.recover(reply)).status == "stopped"
        db.close()

    asyncio.run(story())
