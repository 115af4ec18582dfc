"""Faults of the clock: it is set back or forward while the service runs. Durations must not depend on it."""

import os
import sqlite3
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

import errors
import sql
from database import Database
from image_handler import ImageStore
from tests.service import Person, Served, until
from tests.stand_in import StandIn
from throttle import FAILURES_BY_ACCOUNT, FAILURES_BY_CALLER, WINDOW, Throttle

HOUR = 3600.0
Step = Callable[[float], None]
each_step = pytest.mark.parametrize("step", [-HOUR, HOUR, -366 * 24 * HOUR], ids=["back", "forward", "a year back"])


@pytest.fixture
def set_clock(monkeypatch: pytest.MonkeyPatch) -> Step:
    """A function that sets the clock of this process by so many seconds, seen from the real time."""
    real = time.time

    def shift(seconds: float) -> None:
        monkeypatch.setattr(time, "time", lambda: real() + seconds)
        monkeypatch.setattr(time, "time_ns", lambda: int((real() + seconds) * 1e9))

    return shift


def locked_for(throttle: Throttle, caller: str = "10.0.0.1") -> int:
    """Returns for how many more seconds a caller is locked out, 0 if it is not."""
    try:
        throttle.check("ada", caller)
    except errors.TooMany as error:
        assert error.retry_after is not None
        return error.retry_after
    return 0


# --- wrong passwords ----------------------------------------------------------------------------------


@each_step
def test_a_login_lock_lasts_five_minutes(set_clock: Step, monkeypatch: pytest.MonkeyPatch, step: float) -> None:
    """Too many wrong passwords lock an account for five minutes, whatever happens to the clock in between."""
    throttle, monotonic = Throttle(), time.monotonic
    for _ in range(FAILURES_BY_CALLER):
        assert not locked_for(throttle)
        throttle.count("ada", "10.0.0.1")
    set_clock(step)
    assert WINDOW - 60 < locked_for(throttle) <= WINDOW
    monkeypatch.setattr(time, "monotonic", lambda: monotonic() + WINDOW - 5)
    assert 0 < locked_for(throttle) <= 5
    monkeypatch.setattr(time, "monotonic", lambda: monotonic() + WINDOW + 1)
    assert not locked_for(throttle)
    throttle.count("ada", "10.0.0.1")
    assert not locked_for(throttle)


def test_a_login_lock_counts_all_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many addresses together lock an account, one of them locks only itself, and what has ended is forgotten."""
    throttle, monotonic = Throttle(), time.monotonic
    for number in range(FAILURES_BY_ACCOUNT):
        assert not locked_for(throttle, "another")
        throttle.count("ada", f"10.0.0.{number % 50}")
    assert locked_for(throttle, "another")
    throttle.check("bob", "10.0.0.1")
    monkeypatch.setattr(time, "monotonic", lambda: monotonic() + WINDOW + 1)
    throttle.count("bob", "10.0.0.1")
    assert len(throttle._windows) == 2


@each_step
def test_a_login_says_when_to_come_again(served: Served, ada: Person, set_clock: Step, step: float) -> None:
    """The `Retry-After` of a locked login is at most five minutes after the clock was set."""
    login = {"email": ada.email, "password": "wrong"}
    for _ in range(FAILURES_BY_CALLER):
        assert ada.http.post("/auth/login", json=login).status_code == 401
    set_clock(step)
    response = ada.http.post("/auth/login", json=login)
    assert (response.status_code, response.json()["code"]) == (429, "too_many_attempts")
    assert 1 <= int(response.headers["Retry-After"]) <= WINDOW


# --- what the service knows of the gateway ------------------------------------------------------------


@each_step
def test_readiness_does_not_keep_what_it_knew(
    served: Served, ada: Person, openclaw: StandIn, set_clock: Step, step: float
) -> None:
    """The gateway stops after the clock was set, and starts again: readiness and the metric follow within seconds."""

    def up() -> bool:
        return ada.ready().status_code == 200 and "clawd_gateway_up 1.0" in ada.http.get("/metrics").text

    until(up, 10, "the gateway")
    set_clock(step)
    openclaw.stop()
    until(lambda: not up(), 10, "503")
    assert "clawd_gateway_up 0.0" in ada.http.get("/metrics").text
    openclaw.start()
    until(up, 10, "the gateway")


# --- stored times -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("due_in", "due"), [(-1, True), (20, False), (HOUR, True), (366 * 24 * HOUR, True)], ids=str)
def test_an_outbox_job_is_due_if_its_time_is_too_far_ahead(tmp_path: Path, due_in: float, due: bool) -> None:
    """A job that was postponed before the clock was set back is run at once, not when the clock has caught up."""
    sql.migrate(tmp_path / "some.db")
    with closing(sqlite3.connect(tmp_path / "some.db")) as conn:
        job, now = sql.insert_outbox_job(conn, "images", "key", "me"), time.time()
        sql.postpone_outbox_job(conn, job.id, now + due_in)
        assert sql.has_due_outbox_jobs(conn, now, 30) == due


@pytest.mark.parametrize(("age", "stays"), [(4000, False), (-4000, False), (60, True), (-60, True)])
def test_a_staged_image_of_the_future_is_swept(tmp_path: Path, age: float, stays: bool) -> None:
    """An image that a crash left before the clock was set back is removed, and one that is being stored is not."""
    file = tmp_path / "incoming" / "staged"
    file.parent.mkdir()
    file.write_bytes(b"image")
    os.utime(file, (time.time() - age, time.time() - age))
    ImageStore(tmp_path, b"secret").sweep(older_than=3600)
    assert file.exists() == stays


@each_step
def test_a_reply_survives_a_clock_that_is_set(served: Served, ada: Person, set_clock: Step, step: float) -> None:
    """The clock is set while a reply runs: it is complete, and so is the next one, in the order in which they were
    sent. Writes and the lease of the process go on."""
    session = ada.session()
    with ada.listen(session, "[[chunks=20 delay=0.05]]") as (_, stream):
        stream.read(to_first_text=True)
        set_clock(step)
        stream.read()
    assert stream.finish == "stop"
    assert ada.say(session, "Again").status_code == 200
    assert [message["role"] for message in ada.messages(session)] == ["user", "assistant"] * 2
    db: Database = served.app.state.turns._db
    assert db.lease.alive(db.lease.name)
    assert ada.http.get("/health").status_code == 200
