"""How the service starts, hands over and stops, without PM2: as one process, and with fronts that the tests start."""

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
    """A copy of this checkout on free ports. Stops its workers after the test."""
    settings = {"CLAWDBOT_BASE_URL": openclaw.url, "CLAWDBOT_TOKEN": openclaw.token, "DRAIN_SECONDS": "1"}
    checkout = Checkout(tmp_path / "a checkout", settings)
    yield checkout
    for pid in checkout.workers():  # without a signal, each would wait some seconds for another front
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)
    until(lambda: not [pid for pid in checkout.workers() if is_alive(pid)], 15, "the end of the workers")


Start = Callable[..., "subprocess.Popen[bytes]"]


@pytest.fixture
def start(checkout: Checkout) -> Iterator[Start]:
    """Returns a function that starts `serve.py` with options as a process, whose output goes to `serve.log`."""
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
    """Returns a function that starts a front, as PM2 does."""
    return lambda **options: start("--front", "./start-backend.sh", **options)


def output(checkout: Checkout) -> str:
    """Returns everything that the processes have written so far."""
    return (checkout.path / "serve.log").read_text(errors="replace")


def serves(checkout: Checkout, *, other_than: int = 0) -> int:
    """Waits until a worker other than this one serves. Returns its process id."""

    def look() -> int:
        found = re.findall(rf"process (\d+) serves port {checkout.port}", output(checkout))
        return int(found[-1]) if found and int(found[-1]) != other_than else 0

    return until(look, 20, "a worker")


def person(checkout: Checkout) -> Person:
    """Returns a user whose client opens a new connection for each request."""
    limits = httpx.Limits(max_keepalive_connections=0)
    return Person(httpx.Client(base_url=checkout.url, timeout=30, trust_env=False, verify=NO_TLS, limits=limits))


# --- without a front ----------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_shuts_the_service_down_gracefully(start: Start, checkout: Checkout, number: signal.Signals) -> None:
    """After a signal, a running reply has `DRAIN_SECONDS`, then ends as `interrupted`, also for its reader. The exit
    status is 0."""
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


def test_a_reply_that_ends_in_time_is_complete(start: Start, checkout: Checkout) -> None:
    """A stop lets a reply finish that needs less than `DRAIN_SECONDS`."""
    process = start()
    until(lambda: is_open(checkout.port), 20, "the service")
    ada = person(checkout)
    text = "[[chunks=8 delay=0.1]]"
    with ada.listen(ada.session(), text) as (_, stream):
        stream.read(to_first_text=True)
        process.terminate()
        stream.read()
    assert (stream.finish, stream.text) == ("stop", reply_text(text))


def test_a_second_signal_ends_the_service_immediately(start: Start, checkout: Checkout) -> None:
    """An operator who presses Ctrl-C twice does not wait for replies."""
    checkout.edit(".env", "DRAIN_SECONDS=1", "DRAIN_SECONDS=600")
    process = start()
    until(lambda: is_open(checkout.port), 20, "the service")
    ada = person(checkout)
    with ada.listen(ada.session(), SLOW) as (_, stream):
        stream.read(to_first_text=True)
        process.send_signal(signal.SIGINT)
        until(lambda: not is_open(checkout.port), 5, "the port to be closed")
        process.send_signal(signal.SIGINT)
        assert process.wait(10) == 0


def test_a_signal_during_the_start_ends_the_service(start: Start, checkout: Checkout) -> None:
    """Ctrl-C during the start ends the service as soon as it has started, a second Ctrl-C ends it immediately."""
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
    ("name", "old", "new", "reason"),
    [
        (".env", "DRAIN_SECONDS=1", "DRAIN_SECONDS=soon", "wrong setting: DRAIN_SECONDS"),
        ("app.py", "import asyncio\n", "import asyncio\nimport nowhere\n", "No module named 'nowhere'"),
        (".env", "DRAIN_SECONDS=1", "DATA_DIR=/proc/nowhere", "DATA_DIR=/proc/nowhere cannot be used"),
    ],
)
def test_a_failed_start_logs_the_reason(
    start: Start, checkout: Checkout, name: str, old: str, new: str, reason: str
) -> None:
    """A service that cannot start exits with status 1 and prints the reason."""
    checkout.edit(name, old, new)
    assert start().wait(30) == 1
    assert reason in output(checkout)


# --- fronts and workers -------------------------------------------------------------------------------


def test_a_worker_is_not_in_the_process_tree_of_its_front(front: Start, checkout: Checkout) -> None:
    """A worker has its own session, and init or another process that adopts orphans as its parent. PM2 therefore does
    not find it when it kills the process tree of the front."""
    process = front()
    worker = serves(checkout)
    stat = Path(f"/proc/{worker}/stat").read_text().rpartition(")")[2].split()
    parent, session = int(stat[1]), int(stat[3])
    assert parent != process.pid
    assert session not in (os.getsid(process.pid), os.getsid(0))
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    assert str(worker) not in children


def test_the_next_front_takes_over_from_the_worker(front: Start, checkout: Checkout) -> None:
    """After a front has ended, the next one gets the listening socket from the worker. The worker retires once the new
    one is ready, and ends."""
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
    """A worker whose front was stopped ends if no other front connects; `pm2 stop` relies on this."""
    process = front()
    worker = serves(checkout)
    process.terminate()
    until(lambda: not is_alive(worker), 10, "the worker's end")
    assert not is_open(checkout.port)
    assert checkout.workers() == []


def test_a_retired_worker_ends_its_connections(front: Start, checkout: Checkout) -> None:
    """A retired worker answers one more request on an open connection, with `Connection: close`, and
    `/health/ready` says that it takes no turns. It does not end while a client still reads a reply."""
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
        assert "the new process answers" in answer.json()["detail"]
        assert is_alive(old)
        stream.read(one_frame=True)
    assert httpx.get(f"{checkout.url}/health/ready", trust_env=False).status_code == 200
    ada.stop(session)
    until(lambda: not is_alive(old), 15, "the old worker's end")


@pytest.mark.slow
def test_a_message_over_an_old_connection_is_answered(front: Start, checkout: Checkout, openclaw: StandIn) -> None:
    """A retired worker still accepts a message over an open connection. If the message has to wait for another reply of
    its session, any worker may run it later; it is not lost."""
    first = front()
    old = serves(checkout)
    with httpx.Client(base_url=checkout.url, timeout=30, trust_env=False, verify=NO_TLS) as one:
        ada = Person(one)
        session = ada.session()
        with ada.at(checkout.url) as other:
            assert other.messages(session) == []  # opens the connection
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


def test_a_worker_that_is_not_ready_ends_with_its_front(front: Start, checkout: Checkout) -> None:
    """The old worker continues to serve, and the next front takes over from it."""
    first = front()
    old = serves(checkout)
    checkout.edit("app.py", "import asyncio\n", "import asyncio\nimport time\ntime.sleep(5)\n")
    first.terminate()
    first.wait(5)
    second = front()
    starting = until(lambda: _starting_worker(checkout, old), 10, "a worker that starts")
    second.kill()
    until(lambda: not is_alive(starting), 5, "its end")
    assert checkout.workers() == [old]
    checkout.edit("app.py", "import asyncio\nimport time\ntime.sleep(5)\n", "import asyncio\n")
    front()
    assert serves(checkout, other_than=old)


def test_a_starting_worker_ends_even_if_its_front_never_read_its_message(checkout: Checkout) -> None:
    """If the front is killed before it has read what the worker sent, the worker gets ECONNRESET instead of the end of
    the connection."""
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


def _starting_worker(checkout: Checkout, old: int) -> int:
    """Returns the process id of a worker of this checkout other than `old`, also before it serves; otherwise 0."""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().split(b"\0")
        except OSError:
            continue
        pid = int(path.parent.name)
        if b"--worker" in words and str(checkout.path / "serve.py").encode() in words and pid != old:
            return pid
    return 0


def test_a_stale_unix_socket_is_ignored(front: Start, checkout: Checkout) -> None:
    """A front starts although a killed worker left its Unix socket behind, or a file has the name of one."""
    directory = checkout.path / "run" / str(checkout.port)
    directory.mkdir(parents=True)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as stale:
        stale.bind(f"/proc/self/fd/{os.open(directory, os.O_RDONLY)}/1.sock")
    (directory / "2.sock").write_text("not a socket")
    front()
    worker = serves(checkout)
    assert checkout.workers() == [worker]
    assert checkout.health()["status"] == "ok"


def test_a_second_front_of_a_port_ends(front: Start, checkout: Checkout) -> None:
    """The second front names the first one and exits with a status after which PM2 does not start it again."""
    first = front()
    worker = serves(checkout)
    second = front()
    assert second.wait(15) == 4
    assert f"another front, process {first.pid}, already runs port {checkout.port}" in output(checkout)
    assert checkout.workers() == [worker]


def test_services_on_two_ports_are_independent(start: Start, checkout: Checkout) -> None:
    """Production and development have separate fronts, workers and sockets, even in one directory."""
    (checkout.path / "prepared.sh").touch()
    for port in (checkout.port, checkout.development_port):
        start("--front", "./prepared.sh", port=port)
    workers = until(lambda: len(checkout.workers()) == 2 and checkout.workers(), 20, "both workers")
    time.sleep(1)
    assert checkout.workers() == workers
    assert is_open(checkout.port) and is_open(checkout.development_port)


def test_a_port_in_use_is_reported_with_its_process(front: Start, checkout: Checkout) -> None:
    """The front names the process that uses the port, and exits with a status after which PM2 does not restart it."""
    with socket.create_server(("127.0.0.1", checkout.port)):
        assert front().wait(15) == 4
    assert f"Port {checkout.port} is already in use by process {os.getpid()}." in output(checkout)


def test_an_unusable_run_directory_is_reported(front: Start, checkout: Checkout) -> None:
    """The front names the directory and exits with a status after which PM2 does not start it again."""
    (checkout.path / "run").write_text("")
    assert front().wait(15) == 5
    assert "run/" in output(checkout) and "cannot be used" in output(checkout)


@pytest.mark.slow
def test_a_worker_stops_while_its_database_is_locked(front: Start, checkout: Checkout) -> None:
    """A write that fails while the worker stops does not keep the worker running."""
    process = front()
    worker = serves(checkout)
    with closing(sqlite3.connect(checkout.path / "clawdbot_adapter.db", isolation_level=None)) as conn:
        conn.execute("BEGIN IMMEDIATE")
        process.terminate()
        until(lambda: not is_alive(worker), 25, "the worker's end")
        conn.execute("ROLLBACK")


@pytest.mark.slow
def test_a_signal_to_a_worker_whose_front_ended_cuts_no_reply(front: Start, checkout: Checkout) -> None:
    """A reply keeps its `DRAIN_SECONDS` if the worker has two reasons to stop: a signal, and that its front has ended.
    Only a second signal ends the worker immediately."""
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


def test_a_hanging_start_script_is_killed_with_its_front(front: Start, start: Start, checkout: Checkout) -> None:
    """A front that is stopped kills the start script and its children. The worker continues to serve, and the next
    front takes over from it."""
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


def test_failed_start_is_short_and_contains_no_path(front: Start, checkout: Checkout) -> None:
    """`failed_start` in `/health` has at most 1,000 characters and contains neither paths nor URLs."""
    first = front()
    serves(checkout)
    reason = "cannot read /etc/secret.key of https://ada:pw@example.com/x: " + "x" * 100_000
    checkout.edit("app.py", "import asyncio\n", f"import asyncio\nraise RuntimeError({reason!r})\n")
    first.terminate()
    first.wait(5)
    front()
    shown = until(lambda: checkout.health()["failed_start"], 20, "the reason in /health")
    assert shown.startswith("RuntimeError: cannot read … of …")
    assert len(shown) <= 1000


def test_a_front_pauses_after_a_failed_first_start(front: Start, checkout: Checkout) -> None:
    """If no worker serves yet, the front logs the reason and exits after a pause. Without the pause, PM2 would restart
    it in a tight loop."""
    checkout.edit("app.py", "import asyncio\n", "import asyncio\nimport nowhere\n")
    started = time.monotonic()
    assert front().wait(30) == 1
    assert "the service did not start: ModuleNotFoundError: No module named 'nowhere'" in output(checkout)
    assert time.monotonic() - started > 3
    assert not is_open(checkout.port)


def test_a_front_retries_until_a_worker_starts(front: Start, checkout: Checkout) -> None:
    """If the worker dies and the code is broken by then, the front keeps the listening socket and retries. A client
    that connects meanwhile waits, and gets its response once a worker serves."""
    front()
    worker = serves(checkout)
    checkout.edit("app.py", "import asyncio\n", "import asyncio\nimport nowhere\n")
    os.kill(worker, signal.SIGKILL)
    until(lambda: "the worker did not start, retrying in" in output(checkout), 20, "a failed attempt")
    assert is_open(checkout.port)
    checkout.edit("app.py", "import asyncio\nimport nowhere\n", "import asyncio\n")
    assert httpx.get(f"{checkout.url}/health", timeout=30, trust_env=False).status_code == 200


@pytest.mark.slow
def test_a_full_log_pipe_does_not_block_the_worker(front: Start, checkout: Checkout) -> None:
    """While no front runs, a worker's log lines stay in the pipe. When the pipe is full, the worker drops lines and
    continues to serve."""
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


def test_a_front_does_not_import_the_app(checkout: Checkout) -> None:
    """A front can therefore run if the requirements are missing or broken."""
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


def test_a_port_is_free_after_the_service_has_ended(start: Start, checkout: Checkout) -> None:
    """The service can be started again on its port immediately, even if it closed open connections when it ended."""
    port = free_port()
    for _ in range(2):
        process = start(port=port)
        until(lambda: is_open(port), 20, "the service")
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False, verify=NO_TLS) as http:
            assert http.get("/health").status_code == 200
            process.terminate()
            assert process.wait(10) == 0
