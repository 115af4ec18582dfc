"""Restarts without downtime under PM2: restart and reload, crashes, code that does not start, and stop."""

import os
import signal
import statistics
import subprocess
import time

import httpx
import pytest

from tests.checkout import Checkout, is_alive, is_open
from tests.load import Load
from tests.service import Person, until
from tests.stand_in import StandIn, reply_text

from .pm2 import PM2

NAME = "clawd-backend"
SLOW = "[[chunks=3000 delay=0.2 size=6]]"  # takes ten minutes; for replies that the test ends itself


def answers(checkout: Checkout, commit: str) -> bool:
    """Returns whether new connections reach a worker that runs this commit."""
    return bool(checkout.health()["commit"] == commit)


def test_thirty_restarts_fail_no_request(running: PM2, checkout: Checkout, ada: Person) -> None:
    """30 restarts and reloads in a row, with 60 requests per second, 4 keep-alive clients, and 12 streams that run all
    the time: no request is refused, no connection reset, no stream cut, and each command starts the new code."""
    project = ada.project()
    sessions = [ada.session(project) for _ in range(12)]
    text = "[[chunks=9000 delay=0.1 size=7 seed=5]]"
    took = []
    with Load(ada, sessions, text) as load:
        for number in range(30):
            commit = checkout.commit()
            started = time.monotonic()
            running.do("reload" if number % 2 else "restart", NAME)
            took.append(time.monotonic() - started)
            assert answers(checkout, commit)
        assert load.reading == 12
        until(lambda: len(checkout.workers()) == 2, 15, "the end of all workers without streams but the serving one")
        assert all(ada.stop(session) for session in sessions)
    assert load.failures() == {}, str(load)
    assert sorted(load.texts) == sorted(ada.messages(session)[-1]["content"] for session in sessions)
    assert all(reply_text(text).startswith(read) for read in load.texts)
    assert statistics.median(took) < 3, took  # the maximum depends on what else the machine does


def test_lines_of_every_generation_are_in_pm2s_log(running: PM2, checkout: Checkout, ada: Person) -> None:
    """`pm2 logs` also shows the lines that the old worker writes after the restart, with timestamps and once each."""
    session = ada.session()
    with ada.listen(session, "[[chunks=40 delay=0.1]]") as (response, stream):
        assert response.status_code == 200
        running.do("restart", NAME)
        other = ada.session()
        ada.say(other, "Hello")
        stream.read()
    reply = ada.messages(session)[-1]["id"]
    line = until(
        lambda: [line for line in running.shown(NAME).splitlines() if f"reply {reply} in" in line],
        10,
        "the log line of the reply's end",
    )
    assert len(line) == 1
    for key in (session["session_key"], other["session_key"]):
        sent = f"[CHAT] Sending to OpenClaw with 'user' field: adapter-session-{key}"
        lines = [line for line in running.shown(NAME).splitlines() if sent in line]
        assert len(lines) == 1
        assert lines[0][:4].isdecimal() and lines[0][4] == "-", lines[0]


def test_a_reply_of_the_old_worker_is_readable_at_the_new_one(running: PM2, checkout: Checkout, ada: Person) -> None:
    """A reply that runs in the old worker can be read, resumed and stopped through the new one."""
    session = ada.session()
    text = "[[chunks=60 delay=0.1 seed=3]]"
    with ada.listen(session, text) as (response, stream):
        stream.read(to_first_text=True)
        old = checkout.workers()
        running.do("reload", NAME)
        with ada.resume(session, int(response.headers["X-Message-Id"]), after=5) as resumed:
            resumed.read()
        stream.read()
    assert stream.text == reply_text(text)
    assert resumed.text == reply_text(text)[5:]
    with ada.listen(session, SLOW) as (_, stream):
        stream.read(to_first_text=True)
        running.do("reload", NAME)
        assert ada.stop(session)
        stream.read()
        assert stream.finish == "stopped"
    until(lambda: not set(old) & set(checkout.workers()), 15, "the end of the old worker")


def test_a_queued_message_is_answered_by_the_new_worker(
    running: PM2, checkout: Checkout, ada: Person, openclaw: StandIn
) -> None:
    """A message that waits for a reply of the old worker is answered by the new one, in order."""
    session = ada.session()
    with ada.listen(session, "[[chunks=50 delay=0.1]]") as (_, first):
        first.read(to_first_text=True)
        with ada.listen(session, "Second") as (_, second):
            running.do("restart", NAME)
            first.read()
            second.read()
    assert first.finish == second.finish == "stop"
    assert [request.text for request in openclaw.requests] == ["[[chunks=50 delay=0.1]]", "Second"]


TOP = "import asyncio\n"
LIFESPAN = "        async with AsyncExitStack"
BREAK = {
    "a syntax error": ("app.py", TOP, f"{TOP}def broken(:\n", "SyntaxError"),
    "a missing import": ("app.py", TOP, f"{TOP}import nowhere_to_be_found\n", "nowhere_to_be_found"),
    "a failing lifespan": ("app.py", LIFESPAN, f'        raise OSError("on purpose")\n{LIFESPAN}', "on purpose"),
    "a hang": ("app.py", TOP, f"{TOP}import time\ntime.sleep(3600)\n", "not ready after 4 s"),
    "a bad setting": (".env", "CLAWDBOT_TOKEN", "TOKEN_TTL=never\nCLAWDBOT_TOKEN", "TOKEN_TTL"),
}


@pytest.mark.parametrize("what", BREAK)
def test_code_that_does_not_start_fails_no_request(running: PM2, checkout: Checkout, ada: Person, what: str) -> None:
    """The old code continues to serve, PM2's log and `/health` contain the reason, and a reload of corrected code takes
    over."""
    name, old, new, reason = BREAK[what]
    checkout.edit("handover/front.py", "START_TIMEOUT = 300", "START_TIMEOUT = 4")
    running.do("restart", NAME)
    before = checkout.health()
    with Load(ada, [ada.session()], "[[chunks=40 delay=0.1]]") as load:
        checkout.edit(name, old, new)
        checkout.commit()
        running.do("reload", NAME)
        shown = until(lambda: checkout.health()["failed_start"], 20, "the reason in /health")
        assert reason in shown
        assert reason in running.log(NAME)
        health = checkout.health()
        assert (health["commit"], health["stale"]) == (before["commit"], health["stale"])
        assert running.status(NAME) == "online"
        until(lambda: checkout.health()["stale"], 10, "stale in /health")
        checkout.edit(name, new, old)
        commit = checkout.commit()
        running.do("reload", NAME)
        after = checkout.health()
        assert (after["commit"], after["stale"], after["failed_start"]) == (commit, False, None)
    assert load.failures() == {}, str(load)


def test_a_reload_during_a_hang_takes_over(running: PM2, checkout: Checkout, ada: Person) -> None:
    """A reload ends a worker that hangs during its start; an operator does not have to wait for its timeout."""
    name, old, new, _ = BREAK["a hang"]
    with Load(ada, []) as load:
        checkout.edit(name, old, new)
        running.do("reload", NAME)
        checkout.edit(name, new, old)
        commit = checkout.commit()
        running.do("reload", NAME)
        assert answers(checkout, commit)
    assert load.failures() == {}, str(load)
    until(lambda: len(checkout.workers()) == 1, 15, "the end of the old worker")


def test_kills_of_the_front_fail_no_request(running: PM2, checkout: Checkout, ada: Person) -> None:
    """20 times kill -9 of the front: no request is refused, no connection reset, and no stream cut."""
    session = ada.session()
    with Load(ada, [session], SLOW) as load:
        for _ in range(20):
            pid, serving = checkout.front(), checkout.workers()
            os.kill(pid, signal.SIGKILL)
            # mypy cannot infer the type of a lambda with a default.
            until(lambda old=serving: set(checkout.workers()) - set(old), 40, "the new worker")  # type: ignore[misc]
            assert checkout.front() != pid
            time.sleep(1.1)  # PM2 gives up after 16 ends within a second of the start
        assert ada.stop(session)
    assert load.failures() == {}, str(load)


def test_kills_of_the_worker_refuse_no_connection(
    running: PM2, checkout: Checkout, ada: Person, openclaw: StandIn
) -> None:
    """20 times kill -9 of the serving worker: no connection is refused, only requests inside the worker fail, and each
    of its replies is `interrupted` within 15 s, with a prefix of the agent's text."""
    text = "[[chunks=3000 delay=0.05 size=5 seed=9]]"
    sessions = []
    with Load(ada, []) as load:
        for _ in range(20):
            (pid,) = checkout.workers()
            session = ada.session()
            sessions.append(session)
            with ada.listen(session, text) as (_, stream):
                stream.read(to_first_text=True)
                os.kill(pid, signal.SIGKILL)
                with pytest.raises(httpx.TransportError):
                    stream.read()
            # mypy cannot infer the type of a lambda with a default.
            until(lambda pid=pid: set(checkout.workers()) - {pid}, 15, "the next worker")  # type: ignore[misc]
            until(lambda session=session: ada.reply(session, "interrupted"), 15, "the reply's end")  # type: ignore[misc]
    refused = {what: count for what, count in load.failures().items() if "Refused" in what}
    assert refused == {}
    assert sum(load.failures().values()) <= 20 * 16, str(load)
    for session in sessions:
        message = ada.messages(session)[-1]
        assert reply_text(text).startswith(message["content"])
        assert message["error"]["code"] == "interrupted"


@pytest.mark.parametrize("command", ["stop", "delete"])
def test_a_stop_ends_everything(running: PM2, checkout: Checkout, ada: Person, command: str) -> None:
    """Within ten seconds no worker runs and no process listens, not even an older worker. Running replies end as
    `interrupted` with all text that had arrived, and so do the streams of their readers."""
    older, newer = ada.session(), ada.session()
    with ada.listen(older, SLOW) as (_, first):
        first.read(to_first_text=True)
        running.do("restart", NAME)
        with ada.listen(newer, SLOW) as (_, second):
            second.read(to_first_text=True)
            workers = checkout.workers()
            assert len(workers) == 2
            asked = time.monotonic()
            running.do(command, NAME)
            second.read()
            first.read()
        until(lambda: not any(map(is_alive, workers)), max(asked + 10 - time.monotonic(), 0), "the end of the workers")
        assert not is_open(checkout.port)
    assert (first.done, second.done) == (True, True)
    assert first.finish == second.finish == "interrupted"
    running.do("start", "ecosystem.backend.json", "--only", NAME, cwd=checkout.path)
    for session, stream in ((older, first), (newer, second)):
        message = ada.messages(session)[-1]
        assert (message["status"], message["content"]) == ("interrupted", stream.text)


@pytest.mark.parametrize("command", ["stop", "delete"])
def test_a_stop_before_the_service_is_ready_is_final(running: PM2, checkout: Checkout, command: str) -> None:
    """PM2 does not start an app again that it was told to stop while it waited for the app's ready message."""
    checkout.edit("app.py", TOP, f"{TOP}import time\ntime.sleep(5)\n")
    with subprocess.Popen(running.command("restart", NAME), env=running.environment, stdout=subprocess.DEVNULL):
        time.sleep(2)
        running.do(command, NAME)
    assert running.status(NAME) == ("stopped" if command == "stop" else "none")
    until(lambda: not is_open(checkout.port), 10, "the service's end")


def test_a_worker_that_hangs_is_replaced(running: PM2, checkout: Checkout, ada: Person) -> None:
    """A restart kills a worker that does not answer the new front, and starts another one."""
    (worker,) = checkout.workers()
    os.kill(worker, signal.SIGSTOP)
    running.do("restart", NAME)
    until(lambda: set(checkout.workers()) - {worker}, 30, "the next worker")
    assert not is_alive(worker)
    assert checkout.health()["status"] == "ok"


def test_a_start_right_after_a_stop_takes_over(running: PM2, checkout: Checkout, ada: Person) -> None:
    """A `pm2 start` shortly after a `pm2 stop` takes over from the worker, which still waits for another front."""
    with Load(ada, [ada.session()], "[[chunks=50 delay=0.1]]") as load:
        running.do("stop", NAME)
        commit = checkout.commit()
        running.do("start", NAME)
        assert answers(checkout, commit)
    assert load.failures() == {}, str(load)


def test_the_service_survives_a_kill_of_pm2s_daemon(running: PM2, checkout: Checkout, ada: Person) -> None:
    """kill -9 of the daemon also breaks the pipes of the log. The service continues, the front of the next daemon takes
    over, and no request fails."""
    with Load(ada, [ada.session()], "[[chunks=120 delay=0.1]]") as load:
        before = checkout.workers()
        front = running.pid(NAME)
        running.kill_daemon()
        time.sleep(3)
        commit = checkout.commit()
        running.do("start", "ecosystem.backend.json", "--only", NAME, cwd=checkout.path)
        assert answers(checkout, commit)
    assert load.failures() == {}, str(load)
    until(lambda: not is_alive(front), 5, "the end of the orphaned front")
    until(lambda: not set(before) & set(checkout.workers()), 15, "the old worker to retire")


def test_the_service_survives_an_update_of_pm2(running: PM2, checkout: Checkout, ada: Person) -> None:
    """`pm2 update` ends the daemon and its apps and starts them again: no request is refused, no connection reset, and
    no stream cut."""
    with Load(ada, [ada.session()], "[[chunks=150 delay=0.1]]") as load:
        before = checkout.workers()
        running.do("update")
        until(lambda: running.status(NAME) == "online", 20, "the new daemon to run it")
        until(lambda: set(checkout.workers()) - set(before), 20, "the new worker")
    assert load.failures() == {}, str(load)
    until(lambda: not set(before) & set(checkout.workers()), 15, "the old worker to retire")
