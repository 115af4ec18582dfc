"""How the service starts, hands over and stops, without PM2: a terminal, fronts by hand, and what went wrong once."""

import json
import os
import re
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from pathlib import Path

import httpx
import pytest

from .checkout import TOOLS, Checkout, is_alive, is_open
from .service import NO_TLS, Person, free_port, until
from .stand_in import StandIn, reply_text

SLOW = "[[chunks=3000 delay=0.1 size=6]]"


@pytest.fixture
def checkout(tmp_path: Path, openclaw: StandIn) -> Iterator[Checkout]:
    """A checkout of which nothing runs when the test is over."""
    settings = {"CLAWDBOT_BASE_URL": openclaw.url, "CLAWDBOT_TOKEN": openclaw.token, "DRAIN_SECONDS": "1"}
    checkout = Checkout(tmp_path / "a checkout", settings)
    yield checkout
    for pid in checkout.workers():  # each would wait some seconds for another front
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)
    until(lambda: not [pid for pid in checkout.workers() if is_alive(pid)], 15, "the end of the workers")


Start = Callable[..., "subprocess.Popen[bytes]"]


@pytest.fixture
def start(checkout: Checkout) -> Iterator[Start]:
    """Starts `serve.py` with these options as a process, whose output goes to `serve.log`."""
    processes = []

    def run(*options: str, port: int | None = None) -> "subprocess.Popen[bytes]":
        command = [sys.executable, "serve.py", "--port", str(port or checkout.port), *options]
        with (checkout.path / "serve.log").open("ab") as log:
            process = subprocess.Popen(
                command, cwd=checkout.path, env=TOOLS, stdout=log, stderr=log, start_new_session=True
            )
        processes.append(process)
        return process

    yield run
    for process in processes:
        process.terminate()
        process.wait(10)


@pytest.fixture
def front(start: Start) -> Start:
    """Starts a front, as PM2 does."""
    return lambda **options: start("--front", "./start-backend.sh", **options)


def output(checkout: Checkout) -> str:
    """All that was written."""
    return (checkout.path / "serve.log").read_text(errors="replace")


def serves(checkout: Checkout, *, other_than: int = 0) -> int:
    """The worker that serves, once it is another one than before."""

    def look() -> int:
        found = re.findall(rf"process (\d+) serves port {checkout.port}", output(checkout))
        return int(found[-1]) if found and int(found[-1]) != other_than else 0

    return until(look, 20, "a worker")


def person(checkout: Checkout) -> Person:
    """A user, over connections that are not kept."""
    limits = httpx.Limits(max_keepalive_connections=0)
    return Person(httpx.Client(base_url=checkout.url, timeout=30, trust_env=False, verify=NO_TLS, limits=limits))


# --- as any server ------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_without_pm2_it_ends_in_order(start: Start, checkout: Checkout, number: signal.Signals) -> None:
    """A signal ends it: what runs has `DRAIN_SECONDS` and ends as `interrupted`, which its reader is told; status 0."""
    process = start()
    until(lambda: is_open(checkout.port), 20, "the service")
    ada = person(checkout)
    session = ada.session()
    with ada.listen(session, SLOW) as (_, stream):
        stream.read(to_first_text=True)
        process.send_signal(number)
        stream.read()
    assert (stream.done, stream.finish) == (True, "interrupted")
    assert process.wait(10) == 0
    assert not list(checkout.path.glob("run/*/*.sock"))
    start()
    until(lambda: is_open(checkout.port), 20, "the service")
    reply = ada.messages(session)[-1]
    assert (reply["status"], reply["content"]) == ("interrupted", stream.text)


def test_a_reply_that_ends_in_time_is_whole(start: Start, checkout: Checkout) -> None:
    """A stop lets a reply finish that needs no longer than it may."""
    process = start()
    until(lambda: is_open(checkout.port), 20, "the service")
    ada = person(checkout)
    text = "[[chunks=8 delay=0.1]]"
    with ada.listen(ada.session(), text) as (_, stream):
        stream.read(to_first_text=True)
        process.terminate()
        stream.read()
    assert (stream.finish, stream.text) == ("stop", reply_text(text))


def test_a_second_signal_ends_it_at_once(start: Start, checkout: Checkout) -> None:
    """Whoever presses Ctrl-C twice does not wait for replies."""
    checkout.edit(".env", "DRAIN_SECONDS=1", "DRAIN_SECONDS=600")
    process = start()
    until(lambda: is_open(checkout.port), 20, "the service")
    ada = person(checkout)
    with ada.listen(ada.session(), SLOW) as (_, stream):
        stream.read(to_first_text=True)
        process.send_signal(signal.SIGINT)
        until(lambda: not is_open(checkout.port), 5, "it to listen no more")
        process.send_signal(signal.SIGINT)
        assert process.wait(10) == 0


def test_a_signal_during_the_start_ends_it(start: Start, checkout: Checkout) -> None:
    """Ctrl-C before it serves ends it as soon as it has started, a second one at once."""
    opening = "        async with AsyncExitStack"
    checkout.edit("app.py", opening, f'        print("begun", flush=True)\n        await asyncio.sleep(3)\n{opening}')
    process = start()
    until(lambda: "begun" in output(checkout), 20, "the start")
    process.send_signal(signal.SIGINT)
    assert process.wait(15) == 0
    again = start()
    until(lambda: output(checkout).count("begun") == 2, 20, "the start")
    for _ in range(2):
        again.send_signal(signal.SIGINT)
        time.sleep(0.1)
    assert again.wait(2) == 1


@pytest.mark.parametrize(
    ("name", "old", "new", "said"),
    [
        (".env", "DRAIN_SECONDS=1", "DRAIN_SECONDS=soon", "wrong setting: DRAIN_SECONDS"),
        ("app.py", "import asyncio\n", "import asyncio\nimport nowhere\n", "No module named 'nowhere'"),
        (".env", "DRAIN_SECONDS=1", "DATA_DIR=/proc/nowhere", "DATA_DIR=/proc/nowhere cannot be used"),
    ],
)
def test_what_cannot_start_says_so(start: Start, checkout: Checkout, name: str, old: str, new: str, said: str) -> None:
    """Without anything that serves already, it ends with status 1 and the reason."""
    checkout.edit(name, old, new)
    assert start().wait(30) == 1
    assert said in output(checkout)


# --- fronts and workers -------------------------------------------------------------------------------


def test_a_worker_is_out_of_its_fronts_reach(front: Start, checkout: Checkout) -> None:
    """It has a session of its own and init, or who stands in for it, as its parent: no kill of a process tree finds
    it. PM2's channel is not among its files."""
    process = front()
    worker = serves(checkout)
    stat = Path(f"/proc/{worker}/stat").read_text().rpartition(")")[2].split()
    parent, session = int(stat[1]), int(stat[3])
    assert parent != process.pid
    assert session not in (os.getsid(process.pid), os.getsid(0))
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    assert str(worker) not in children


def test_a_front_that_ends_leaves_the_worker_for_the_next(front: Start, checkout: Checkout) -> None:
    """The next front gets the listening socket from it, and it retires once the other is ready, and ends."""
    first = front()
    old = serves(checkout)
    first.terminate()
    assert first.wait(5) == 0
    assert is_open(checkout.port)
    front()
    assert serves(checkout, other_than=old) != old
    until(lambda: not is_alive(old), 15, "the old worker's end")
    assert checkout.health()["status"] == "ok"


def test_a_worker_without_a_front_ends(front: Start, checkout: Checkout) -> None:
    """Which is what `pm2 stop` means."""
    process = front()
    worker = serves(checkout)
    process.terminate()
    until(lambda: not is_alive(worker), 10, "the worker's end")
    assert not is_open(checkout.port)
    assert checkout.workers() == []


def test_a_retired_worker_ends_its_connections(front: Start, checkout: Checkout) -> None:
    """Over a connection that was open before it answers once more, says that it ends the connection, and that it is
    not ready for turns; while a reader of a reply is left, it stays."""
    first = front()
    old = serves(checkout)
    ada = person(checkout)
    session = ada.session()
    with (
        httpx.Client(base_url=checkout.url, trust_env=False, verify=NO_TLS) as kept,
        ada.listen(session, SLOW) as (_, stream),
    ):
        stream.read(to_first_text=True)
        assert "connection" not in kept.get("/health").headers
        first.terminate()
        first.wait(5)
        front()
        serves(checkout, other_than=old)
        answer = kept.get("/health/ready")
        assert (answer.status_code, answer.headers["connection"]) == (503, "close")
        assert "another one takes over" in answer.json()["detail"]
        assert is_alive(old)
        stream.read(one_frame=True)
    assert httpx.get(f"{checkout.url}/health/ready", trust_env=False).status_code == 200
    ada.stop(session)
    until(lambda: not is_alive(old), 15, "the old worker's end")


@pytest.mark.slow
def test_a_message_over_an_old_connection_is_answered(front: Start, checkout: Checkout, openclaw: StandIn) -> None:
    """A retired worker still takes a message from a client that has its connection: it runs there at once, or, behind
    another reply, in whichever worker is free to take it; none is forgotten."""
    first = front()
    old = serves(checkout)
    with httpx.Client(base_url=checkout.url, timeout=30, trust_env=False, verify=NO_TLS) as one:
        ada = Person(one)
        session = ada.session()
        with ada.at(checkout.url) as other:
            assert other.messages(session) == []  # its connection is open
            with ada.listen(session, "[[chunks=60 delay=0.1]]") as (_, stream):
                stream.read(to_first_text=True)
                first.terminate()
                first.wait(5)
                front()
                serves(checkout, other_than=old)
                with other.listen(session, "Behind it") as (response, behind):
                    assert response.headers["connection"] == "close"
                    behind.read()
                stream.read()
    assert (stream.finish, behind.finish) == ("stop", "stop")
    assert [request.text for request in openclaw.requests] == ["[[chunks=60 delay=0.1]]", "Behind it"]


def test_a_worker_whose_front_dies_before_it_is_ready_claims_nothing(front: Start, checkout: Checkout) -> None:
    """It ends with its front, and the one that serves is found by the next front."""
    first = front()
    old = serves(checkout)
    checkout.edit("app.py", "import asyncio\n", "import asyncio\nimport time\ntime.sleep(5)\n")
    first.terminate()
    first.wait(5)
    second = front()
    starting = until(lambda: _unready(checkout, old), 10, "a worker that starts")
    second.kill()
    until(lambda: not is_alive(starting), 5, "its end")
    assert checkout.workers() == [old]
    checkout.edit("app.py", "import asyncio\nimport time\ntime.sleep(5)\n", "import asyncio\n")
    front()
    assert serves(checkout, other_than=old)


def test_a_front_that_died_unheard_takes_its_worker_along(checkout: Checkout) -> None:
    """Also where it was killed before it had read anything: the worker's end of the channel is reset then."""
    checkout.edit("app.py", "import asyncio\n", "import asyncio\nimport time\ntime.sleep(20)\n")
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        fds = (theirs.fileno(), listener.fileno(), os.open(os.devnull, os.O_RDONLY))
        command = [sys.executable, "serve.py", "--port", "1", "--worker", ",".join(map(str, fds))]
        worker = subprocess.Popen(command, cwd=checkout.path, pass_fds=fds)
    theirs.close()
    os.close(fds[2])
    assert b"pid" in ours.recv(100, socket.MSG_PEEK)
    ours.close()
    assert worker.wait(5) == 1


def _unready(checkout: Checkout, old: int) -> int:
    """The process of a worker of this checkout that does not serve yet."""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().split(b"\0")
        except OSError:
            continue
        pid = int(path.parent.name)
        if b"--worker" in words and str(checkout.path / "serve.py").encode() in words and pid != old:
            return pid
    return 0


def test_a_control_socket_without_a_worker_means_to_bind(front: Start, checkout: Checkout) -> None:
    """What a killed worker left, or a file by that name, stops nobody."""
    directory = checkout.path / "run" / str(checkout.port)
    directory.mkdir(parents=True)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as stale:
        stale.bind(f"/proc/self/fd/{os.open(directory, os.O_RDONLY)}/1.sock")
    (directory / "2.sock").write_text("no socket")
    front()
    worker = serves(checkout)
    assert checkout.workers() == [worker]
    assert checkout.health()["status"] == "ok"


def test_two_fronts_of_a_port_are_one(front: Start, checkout: Checkout) -> None:
    """The second says who is there and ends for good, with a status after which PM2 does not try again."""
    first = front()
    worker = serves(checkout)
    second = front()
    assert second.wait(15) == 4
    assert f"another front, process {first.pid}, already runs port {checkout.port}" in output(checkout)
    assert checkout.workers() == [worker]


def test_two_ports_never_meet(start: Start, checkout: Checkout) -> None:
    """Production and development have fronts, workers and sockets of their own, also in one directory."""
    (checkout.path / "prepared.sh").touch()
    for port in (checkout.port, checkout.development_port):
        start("--front", "./prepared.sh", port=port)
    workers = until(lambda: len(checkout.workers()) == 2 and checkout.workers(), 20, "both workers")
    time.sleep(1)
    assert checkout.workers() == workers
    assert is_open(checkout.port) and is_open(checkout.development_port)


def test_a_port_of_a_stranger_is_said_with_its_holder(front: Start, checkout: Checkout) -> None:
    """The front ends for good and names the process that holds the port."""
    with socket.create_server(("127.0.0.1", checkout.port)):
        assert front().wait(15) == 4
    assert f"Port {checkout.port} is already in use by process {os.getpid()}." in output(checkout)


def test_a_directory_of_somebody_else_is_said(front: Start, checkout: Checkout) -> None:
    """Where fronts and workers cannot meet, the front says so and ends for good."""
    (checkout.path / "run").write_text("")
    assert front().wait(15) == 5
    assert "run/" in output(checkout) and "cannot be used" in output(checkout)


@pytest.mark.slow
def test_a_stop_ends_a_worker_whose_database_is_held(front: Start, checkout: Checkout) -> None:
    """A write that fails while it stops does not keep it alive."""
    process = front()
    worker = serves(checkout)
    with closing(sqlite3.connect(checkout.path / "clawdbot_adapter.db", isolation_level=None)) as conn:
        conn.execute("BEGIN IMMEDIATE")
        process.terminate()
        until(lambda: not is_alive(worker), 25, "the worker's end")
        conn.execute("ROLLBACK")


@pytest.mark.slow
def test_a_second_reason_to_stop_cuts_nothing_short(front: Start, checkout: Checkout) -> None:
    """A reply has the time that it may take, whoever else wants the worker to end: only a second signal hurries it."""
    checkout.edit(".env", "DRAIN_SECONDS=1", "DRAIN_SECONDS=20")
    process = front()
    worker = serves(checkout)
    ada = person(checkout)
    text = "[[chunks=60 delay=0.1]]"
    with ada.listen(ada.session(), text) as (_, stream):
        stream.read(to_first_text=True)
        process.terminate()
        process.wait(5)
        os.kill(worker, signal.SIGTERM)
        stream.read()
    assert (stream.finish, stream.text) == ("stop", reply_text(text))


def test_a_prepare_that_does_not_end_is_ended(front: Start, start: Start, checkout: Checkout) -> None:
    """With all that it started, when its front is asked to go; the worker serves on for the next front."""
    first = front()
    worker = serves(checkout)
    first.terminate()
    first.wait(5)
    (checkout.path / "stubborn.sh").write_text("trap '' INT TERM\nsleep 47 &\necho $! >child\nwait\n")
    stubborn = start("--front", "./stubborn.sh")
    note = checkout.path / "child"
    child = int(until(lambda: (note.exists() and note.read_text()) or "", 5, "its child"))
    stubborn.terminate()
    assert stubborn.wait(2) == 6
    until(lambda: not is_alive(child), 2, "its child's end")
    front()
    assert serves(checkout, other_than=worker)


def test_a_long_reason_is_cut_and_tells_no_path(front: Start, checkout: Checkout) -> None:
    """What health says of code that does not start is short, and has neither paths nor addresses in it."""
    first = front()
    serves(checkout)
    reason = "cannot read /etc/secret.key of https://ada:pw@example.com/x: " + "x" * 100_000
    checkout.edit("app.py", "import asyncio\n", f"import asyncio\nraise RuntimeError({reason!r})\n")
    first.terminate()
    first.wait(5)
    front()
    told = until(lambda: checkout.health()["failed_start"], 20, "health to say why")
    assert told.startswith("RuntimeError: cannot read … of …")
    assert len(told) <= 1000


def test_a_first_start_that_fails_is_tried_again_in_peace(front: Start, checkout: Checkout) -> None:
    """Where nothing serves yet the front says why and ends, after a pause that keeps PM2 from spinning."""
    checkout.edit("app.py", "import asyncio\n", "import asyncio\nimport nowhere\n")
    started = time.monotonic()
    assert front().wait(30) == 1
    assert "the service did not start: ModuleNotFoundError: No module named 'nowhere'" in output(checkout)
    assert time.monotonic() - started > 3
    assert not is_open(checkout.port)


def test_a_worker_that_cannot_come_back_is_tried_again(front: Start, checkout: Checkout) -> None:
    """When the worker dies and the code is broken meanwhile, the front holds the port and tries until it works; who
    connects waits and is served."""
    front()
    worker = serves(checkout)
    checkout.edit("app.py", "import asyncio\n", "import asyncio\nimport nowhere\n")
    os.kill(worker, signal.SIGKILL)
    until(lambda: "the worker did not start, retrying in" in output(checkout), 20, "a try that fails")
    assert is_open(checkout.port)
    checkout.edit("app.py", "import asyncio\nimport nowhere\n", "import asyncio\n")
    assert httpx.get(f"{checkout.url}/health", timeout=30, trust_env=False).status_code == 200


@pytest.mark.slow
def test_a_log_that_nobody_reads_holds_nothing_up(front: Start, checkout: Checkout) -> None:
    """While there is no front a worker's lines wait in a pipe; when that is full they are lost, and it serves on."""
    checkout.edit("handover/front.py", "PIPE_SIZE = 1024 * 1024", "PIPE_SIZE = 4096")
    process = front()
    worker = serves(checkout)
    process.kill()
    process.wait()
    with httpx.Client(base_url=checkout.url, timeout=5, trust_env=False, verify=NO_TLS) as http:
        for number in range(300):
            assert http.get(f"/nothing/{number}").status_code == 404
    front()
    serves(checkout, other_than=worker)
    until(lambda: not is_alive(worker), 15, "the old worker to retire")
    assert "/nothing/0 404" in output(checkout)
    assert "/nothing/299 404" not in output(checkout)


def test_a_front_imports_nothing_of_the_app(checkout: Checkout) -> None:
    """A front runs where the requirements are missing or broken."""
    code = "import sys, serve; print(sorted(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", f"import sys; sys.path.insert(0, {str(checkout.path)!r}); {code}"],
        capture_output=True,
        text=True,
        check=True,
    )
    loaded = set(json.loads(done.stdout.replace("'", '"')))
    assert "serve" in loaded
    assert not loaded & {"app", "uvicorn", "fastapi", "settings", "database"}


def test_another_port_is_free_again(start: Start, checkout: Checkout) -> None:
    """A port is free for the next as soon as the service has ended, whatever connections it had."""
    port = free_port()
    for _ in range(2):
        process = start(port=port)
        until(lambda: is_open(port), 20, "the service")
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False, verify=NO_TLS) as http:
            assert http.get("/health").status_code == 200
            process.terminate()
            assert process.wait(10) == 0
