"""Restarts that nobody notices: what operators type, crashes, code that does not start, and the end."""

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
SLOW = "[[chunks=3000 delay=0.2 size=6]]"  # ten minutes; for what is cut short by us


def answers(checkout: Checkout, commit: str) -> bool:
    """Whether new connections reach a worker of that commit."""
    return bool(checkout.health()["commit"] == commit)


def test_thirty_restarts_cost_nothing(running: PM2, checkout: Checkout, ada: Person) -> None:
    """30 plain restarts and reloads in a row, under 60 requests a second, 4 kept connections and 12 streams that are
    longer than the whole: nothing is refused, reset or cut, and after each command the new code answers."""
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
        until(
            lambda: len(checkout.workers()) == 2, 15, "all to go but the one that serves and the one with the streams"
        )
        assert all(ada.stop(session) for session in sessions)
    assert load.failures() == {}, str(load)
    assert sorted(load.texts) == sorted(ada.messages(session)[-1]["content"] for session in sessions)
    assert all(reply_text(text).startswith(read) for read in load.texts)
    assert statistics.median(took) < 3, took  # the slowest is what else the machine does


def test_lines_of_every_generation_are_in_pm2s_log(running: PM2, checkout: Checkout, ada: Person) -> None:
    """`pm2 logs` shows what the old worker writes after the restart too, with time stamps, each line once."""
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
        "the line of the reply's end",
    )
    assert len(line) == 1
    for key in (session["session_key"], other["session_key"]):
        sent = f"[CHAT] Sending to OpenClaw with 'user' field: adapter-session-{key}"
        lines = [line for line in running.shown(NAME).splitlines() if sent in line]
        assert len(lines) == 1
        assert lines[0][:4].isdecimal() and lines[0][4] == "-", lines[0]


def test_a_reply_is_followed_in_the_next_generation(running: PM2, checkout: Checkout, ada: Person) -> None:
    """A reply that the old worker makes can be read, resumed and stopped at the new one; what waits behind it runs
    there."""
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
    until(lambda: not set(old) & set(checkout.workers()), 15, "the old worker to go")


def test_what_waits_goes_on_in_the_next_generation(
    running: PM2, checkout: Checkout, ada: Person, openclaw: StandIn
) -> None:
    """A message that waits behind a reply of the old worker is answered by the new one, in order."""
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
    "a syntax error": ("app.py", TOP, f"{TOP}this is no Python\n", "SyntaxError"),
    "a missing import": ("app.py", TOP, f"{TOP}import nowhere_to_be_found\n", "nowhere_to_be_found"),
    "a failing lifespan": ("app.py", LIFESPAN, f'        raise OSError("on purpose")\n{LIFESPAN}', "on purpose"),
    "a hang": ("app.py", TOP, f"{TOP}import time\ntime.sleep(3600)\n", "not ready after 4 s"),
    "a bad setting": (".env", "CLAWDBOT_TOKEN", "TOKEN_TTL=never\nCLAWDBOT_TOKEN", "TOKEN_TTL"),
}


@pytest.mark.parametrize("what", BREAK)
def test_code_that_does_not_start_costs_nothing(running: PM2, checkout: Checkout, ada: Person, what: str) -> None:
    """The old code serves on, PM2's log and health say why, and the next good reload takes over."""
    name, old, new, reason = BREAK[what]
    checkout.edit("handover/front.py", "START_TIMEOUT = 300", "START_TIMEOUT = 4")
    running.do("restart", NAME)
    before = checkout.health()
    with Load(ada, [ada.session()], "[[chunks=40 delay=0.1]]") as load:
        checkout.edit(name, old, new)
        checkout.commit()
        running.do("reload", NAME)
        told = until(lambda: checkout.health()["failed_start"], 20, "health to say why")
        assert reason in told
        assert reason in running.log(NAME)
        health = checkout.health()
        assert (health["commit"], health["stale"]) == (before["commit"], health["stale"])
        assert running.status(NAME) == "online"
        until(lambda: checkout.health()["stale"], 10, "health to see that the checkout has moved on")
        checkout.edit(name, new, old)
        commit = checkout.commit()
        running.do("reload", NAME)
        after = checkout.health()
        assert (after["commit"], after["stale"], after["failed_start"]) == (commit, False, None)
    assert load.failures() == {}, str(load)


def test_a_reload_during_a_hang_takes_over(running: PM2, checkout: Checkout, ada: Person) -> None:
    """Code that hangs in its start need not be waited for: the next reload ends it."""
    name, old, new, _ = BREAK["a hang"]
    with Load(ada, []) as load:
        checkout.edit(name, old, new)
        running.do("reload", NAME)
        checkout.edit(name, new, old)
        commit = checkout.commit()
        running.do("reload", NAME)
        assert answers(checkout, commit)
    assert load.failures() == {}, str(load)
    until(lambda: len(checkout.workers()) == 1, 15, "the old worker to go")


def test_kills_of_the_front_are_not_noticed(running: PM2, checkout: Checkout, ada: Person) -> None:
    """20 times kill -9 of the process that PM2 sees: nothing is refused, reset or cut."""
    session = ada.session()
    with Load(ada, [session], SLOW) as load:
        for _ in range(20):
            pid, serving = checkout.front(), checkout.workers()
            os.kill(pid, signal.SIGKILL)
            # mypy cannot infer the type of a lambda with a default.
            until(lambda old=serving: set(checkout.workers()) - set(old), 15, "its worker")  # type: ignore[misc]
            assert checkout.front() != pid
        assert ada.stop(session)
    assert load.failures() == {}, str(load)


def test_kills_of_the_worker_refuse_nobody(running: PM2, checkout: Checkout, ada: Person, openclaw: StandIn) -> None:
    """20 times kill -9 of the process that serves: nobody is refused, only what was inside it fails, and its replies
    are final within 15 s with a prefix of what the agent said."""
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
    """Within ten seconds nothing runs or listens any more, not even an older worker; replies that ran are
    `interrupted`, with all of their text that came, and their readers hear so."""
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
        until(lambda: not any(map(is_alive, workers)), max(asked + 10 - time.monotonic(), 0), "their end")
        assert not is_open(checkout.port)
    assert (first.done, second.done) == (True, True)
    assert first.finish == second.finish == "interrupted"
    running.do("start", "ecosystem.backend.json", "--only", NAME, cwd=checkout.path)
    for session, stream in ((older, first), (newer, second)):
        message = ada.messages(session)[-1]
        assert (message["status"], message["content"]) == ("interrupted", stream.text)


@pytest.mark.parametrize("command", ["stop", "delete"])
def test_a_stop_before_it_is_ready_is_one(running: PM2, checkout: Checkout, command: str) -> None:
    """PM2 does not revive what it was told to stop while it waited for it."""
    checkout.edit("app.py", TOP, f"{TOP}import time\ntime.sleep(5)\n")
    with subprocess.Popen(running.command("restart", NAME), env=running.environment, stdout=subprocess.DEVNULL):
        time.sleep(2)
        running.do(command, NAME)
    assert running.status(NAME) == ("stopped" if command == "stop" else "none")
    until(lambda: not is_open(checkout.port), 10, "the service's end")


def test_a_worker_that_hangs_is_replaced(running: PM2, checkout: Checkout, ada: Person) -> None:
    """A restart cures it: one that does not answer is ended, and the next serves."""
    (worker,) = checkout.workers()
    os.kill(worker, signal.SIGSTOP)
    running.do("restart", NAME)
    until(lambda: set(checkout.workers()) - {worker}, 30, "the next worker")
    assert not is_alive(worker)
    assert checkout.health()["status"] == "ok"


def test_a_start_right_after_a_stop_takes_over(running: PM2, checkout: Checkout, ada: Person) -> None:
    """A worker that waits to see whether it was a restart is found by a `pm2 start` as well."""
    with Load(ada, [ada.session()], "[[chunks=50 delay=0.1]]") as load:
        running.do("stop", NAME)
        commit = checkout.commit()
        running.do("start", NAME)
        assert answers(checkout, commit)
    assert load.failures() == {}, str(load)


def test_the_end_of_pm2s_daemon_is_survived(running: PM2, checkout: Checkout, ada: Person) -> None:
    """kill -9 of the daemon, whose log pipes break with it: the service goes on, retires when the next daemon starts
    its successor, and loses nobody."""
    with Load(ada, [ada.session()], "[[chunks=120 delay=0.1]]") as load:
        before = checkout.workers()
        front = running.pid(NAME)
        running.kill_daemon()
        time.sleep(3)
        commit = checkout.commit()
        running.do("start", "ecosystem.backend.json", "--only", NAME, cwd=checkout.path)
        assert answers(checkout, commit)
    assert load.failures() == {}, str(load)
    until(lambda: not is_alive(front), 5, "the orphaned front to go")
    until(lambda: not set(before) & set(checkout.workers()), 15, "the old worker to retire")


def test_an_update_of_pm2_is_survived(running: PM2, checkout: Checkout, ada: Person) -> None:
    """`pm2 update` ends the daemon and all that it runs and starts both anew: nothing is refused, reset or cut."""
    with Load(ada, [ada.session()], "[[chunks=150 delay=0.1]]") as load:
        before = checkout.workers()
        running.do("update")
        until(lambda: running.status(NAME) == "online", 20, "the new daemon to run it")
        until(lambda: set(checkout.workers()) - set(before), 20, "its worker")
    assert load.failures() == {}, str(load)
    until(lambda: not set(before) & set(checkout.workers()), 15, "the old worker to retire")
