"""How the service starts, hands over and stops.

Under PM2 a restart costs nobody anything. PM2 runs a small *front*, which imports nothing of the app; the app
runs in a *worker*, a process in a session of its own that PM2's kill of the process tree does not see. PM2 kills
the front, and the worker serves on. The next front gets the listening socket from it over a Unix socket, starts a
worker of the new code, and once that is ready tells the old one to retire: it takes no more connections, finishes
what it has, and goes. A worker whose front does not come back goes too: that is `pm2 stop`.

Without PM2 it is one process that behaves as any server. `uvicorn app:app` works without all this.
"""

import argparse
import asyncio
import fcntl
import json
import os
import re
import resource
import selectors
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

CHECKOUT = Path(__file__).resolve().parent
PYTHON = str(CHECKOUT / "venv/bin/python")
BACKLOG = 2048  # connections that wait while a worker is being replaced
PIPE_SIZE = 1024 * 1024  # bytes of log that a worker can write while no front reads
LONGEST_LINE = 1024 * 1024  # bytes; a longer one is passed on in pieces
START_WITHIN = 300  # seconds for a worker's start: it may have to migrate a large database
SUCCESSOR_WITHIN = 3  # seconds that a worker waits for the next front after PM2 ended the one before
REVIVAL_WITHIN = 30  # the same after a front that died: PM2 starts it again
HELLO_WITHIN = 15  # seconds until a worker that lives answers a new front, however busy it is
RETIRES_WITHIN = 5  # seconds until a worker that was told to retire takes no new connections
IDLE_WITHIN = 10  # seconds that a retired worker leaves idle connections open; uvicorn closes them after 5
LINGER = 3600  # seconds that a retired worker without turns waits for its last readers
FINISH_WITHIN = 1  # seconds that requests have to end once the turns have
RETRY_AT_MOST = 30  # seconds between two tries to start a worker where none serves
PAUSE = 3  # seconds before a front whose first worker did not start gives up, and PM2 starts the next
PORT_TAKEN = 4  # exit status
UNUSABLE = 5  # exit status
ENDED_EARLY = 6  # exit status: with any other, PM2 revives what it was told to stop before it was ready
FOR_GOOD = (2, 3, PORT_TAKEN, UNUSABLE)  # exit statuses of `start-backend.sh` after which another try is of no use


def _log(message: str) -> None:
    """A line among those of the app, in its plain format."""
    stamp = time.strftime("%Y-%m-%d %H:%M:%S") + f",{int(time.time() * 1000) % 1000:03d}"
    _write(f"{stamp} INFO clawd.serve [-] {message}\n".encode())


def _write(lines: bytes) -> None:
    with suppress(OSError):  # PM2 is gone, or the disk is full: the service goes on
        sys.stdout.buffer.write(lines)
        sys.stdout.buffer.flush()


def _send(channel: socket.socket, message: dict[str, object], fds: Sequence[int] = ()) -> None:
    with suppress(OSError):  # whoever should have read it is gone, which the reading side sees
        socket.send_fds(channel, [json.dumps(message).encode()], list(fds))


# --- the front ----------------------------------------------------------------------------------------


class _AskedToGoError(Exception):
    """PM2 wants the front to end."""


class _GivenUpError(Exception):
    """The front ends, with this exit status."""

    def __init__(self, status: int) -> None:
        super().__init__(status)
        self.status = status


class Generation:
    """A worker as a front sees it."""

    def __init__(self, channel: socket.socket, log: int) -> None:
        """`channel` leads to the worker, `log` is where its output can be read."""
        self.channel = channel
        self.log = log
        self.pid = 0
        self.state = "starting"
        self.failure = ""
        self.unfinished = b""  # the beginning of a line of its output


class Front:
    """What PM2 runs: it starts a worker, takes over from the one before, and keeps one alive."""

    def __init__(self, host: str, port: int, prepare: Sequence[str], pm2: int | None) -> None:
        """`prepare` is the command that checks the branch and refreshes `venv/`, called with `--prepare` or,
        where nothing runs yet and the port must be free, with `--check`. `pm2` is the file descriptor of PM2's
        channel, where there is one. Raises OSError where the directory of the port cannot be used."""
        self._host = host
        self._port = port
        self._prepare = prepare
        self._pm2 = pm2
        self._parent = os.getppid()
        self._directory = run_directory(port)
        self._lock = os.open(self._directory / "front.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        self._selector = selectors.DefaultSelector()
        self._generations: list[Generation] = []
        self._serving: Generation | None = None
        self._listener: socket.socket | None = None
        self._status = 1  # to end with where nothing serves
        self._is_ready = False

    def run(self) -> int:
        """Runs until PM2 ends it. Returns the exit status."""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, _ask_to_go)
        try:
            self._take_lock()
            self._find_generations()
            failure = self._renew()
            if self._serving is None:
                _log(f"the service did not start: {failure}")
                self._pump(0 if self._status in FOR_GOOD else PAUSE)
                return self._status
            self._tell_pm2()
            while True:
                self._guard()
        except _AskedToGoError:
            return 0 if self._is_ready else ENDED_EARLY
        except _GivenUpError as given_up:
            return given_up.status
        finally:
            self._leave()

    def _leave(self) -> None:
        """Tells every worker that PM2 ended this front. One that is not ready ends with it."""
        for generation in self._generations:
            _send(generation.channel, {"order": "wait"})

    def _tell_pm2(self) -> None:
        """What `wait_ready` waits for."""
        self._is_ready = True
        if self._pm2 is not None:
            with suppress(OSError):  # PM2 is gone
                os.write(self._pm2, b'"ready"\n')

    # --- what it finds ---

    def _take_lock(self) -> None:
        """Makes this front the only one of its port. The kernel frees the lock when its process ends."""
        until = time.monotonic() + SUCCESSOR_WITHIN
        while True:
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() > until:
                    holder = os.pread(self._lock, 20, 0).decode() or "unknown"
                    _log(f"port {self._port} is run from this checkout by another front already, process {holder}")
                    raise _GivenUpError(PORT_TAKEN) from None
                time.sleep(0.05)
            else:
                break
        os.ftruncate(self._lock, 0)
        os.pwrite(self._lock, str(os.getpid()).encode(), 0)

    def _find_generations(self) -> None:
        """Connects to every worker of this port that lives, and removes the sockets of the dead."""
        for path in self._directory.glob("*.sock"):
            channel = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            channel.settimeout(HELLO_WITHIN)
            try:
                channel.connect(str(path))
                message, fds, *_ = socket.recv_fds(channel, 65536, 2)
                hello = json.loads(message)
            except (OSError, ValueError) as error:
                if isinstance(error, TimeoutError):
                    _kill_peer(channel)
                channel.close()
                path.unlink(missing_ok=True)
                continue
            for fd in fds:
                os.set_inheritable(fd, False)
            channel.settimeout(None)
            generation = self._add(Generation(channel, fds[0]))
            generation.pid, generation.state = hello["pid"], hello["state"]
            if generation.state == "serving":
                self._serving = generation
                self._listener = socket.socket(fileno=fds[1])

    def _add(self, generation: Generation) -> Generation:
        os.set_blocking(generation.log, False)
        self._generations.append(generation)
        self._selector.register(generation.channel, selectors.EVENT_READ, lambda: self._hear(generation))
        self._selector.register(generation.log, selectors.EVENT_READ, lambda: self._relay(generation))
        return generation

    # --- what it waits for ---

    def _pump(self, seconds: float, until: Callable[[], bool] = lambda: False) -> bool:
        """Relays and listens for so long, or until something holds; returns whether it does."""
        deadline = time.monotonic() + seconds
        if os.getppid() != self._parent and self._lock >= 0:
            os.close(self._lock)  # PM2 has died: its successor's front may take over, until then we go on
            self._lock = -1
        while not until() and (left := deadline - time.monotonic()) > 0:
            for key, _ in self._selector.select(min(left, 1)):
                key.data()
        return until()

    def _hear(self, generation: Generation) -> None:
        """A word from a worker, or its end."""
        try:
            message = json.loads(generation.channel.recv(65536, socket.MSG_DONTWAIT) or b'{"state": "gone"}')
        except ConnectionError:
            message = {"state": "gone"}
        except ValueError:
            message = {}  # not of this protocol: it changes nothing
        generation.pid = message.get("pid", generation.pid)
        generation.failure = message.get("failure", generation.failure)
        generation.state = message.get("state", generation.state)
        if generation.state == "replaced":
            raise _GivenUpError(0)
        if generation.state == "gone":
            self._forget(generation)
        if generation is self._serving and generation.state != "serving":
            self._serving = None

    def _forget(self, generation: Generation) -> None:
        while self._relay(generation):
            pass
        if generation.unfinished:
            _write(generation.unfinished + b"\n")
        self._selector.unregister(generation.channel)
        if generation.log in self._selector.get_map():
            self._selector.unregister(generation.log)
        generation.channel.close()
        os.close(generation.log)
        (self._directory / f"{generation.pid}.sock").unlink(missing_ok=True)  # one that was killed leaves it
        self._generations.remove(generation)

    def _relay(self, generation: Generation) -> bool:
        """Passes on whole lines of what a worker has written, some at a time; whether there were any."""
        if generation not in self._generations:
            return False  # its end was heard in the same round
        try:
            written = os.read(generation.log, 65536)
        except BlockingIOError:
            return False
        if not written and generation.log in self._selector.get_map():
            self._selector.unregister(generation.log)  # nobody writes there any more
        lines, end, generation.unfinished = (generation.unfinished + written).rpartition(b"\n")
        _write(lines + end)
        if len(generation.unfinished) > LONGEST_LINE:
            _write(generation.unfinished)
            generation.unfinished = b""
        return bool(written)

    # --- what it does ---

    def _guard(self) -> None:
        """Sees to it that a worker serves."""
        self._pump(1, lambda: self._serving is None)
        delay = 1
        while self._serving is None:
            _log("the worker has died: another one is started")
            failure = self._renew()
            if failure:
                _log(f"the worker did not start, again in {delay} s: {failure}")
                self._pump(delay)
                delay = min(2 * delay, RETRY_AT_MOST)

    def _renew(self) -> str:
        """Starts a worker of the code as it is and lets the others retire. Where that fails, whoever served
        before serves on, and is told why; returns that, or an empty string."""
        failure = self._run_prepare() or self._start()
        if failure and self._serving is not None:
            _log(f"the new code does not run, process {self._serving.pid} serves on with the old: {failure}")
            _send(self._serving.channel, {"order": "keep", "failure": _public(failure)})
        return failure

    def _run_prepare(self) -> str:
        """Lets the start script check and install; returns its words where it refuses."""
        command = [*self._prepare, "--prepare" if self._listener else "--check"]
        run = subprocess.Popen(  # noqa: S603 - ours
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # so that all of it can be ended together
        )
        assert run.stdout is not None  # noqa: S101 - a pipe was asked for
        said = bytearray()
        try:
            self._selector.register(run.stdout, selectors.EVENT_READ, lambda: self._take_down(run, said))
            self._pump(float("inf"), lambda: run.stdout not in self._selector.get_map())
        except BaseException:
            os.killpg(run.pid, signal.SIGKILL)
            raise
        self._status = run.wait()
        return " ".join(said[-1000:].decode(errors="replace").split()) if self._status else ""

    def _take_down(self, run: "subprocess.Popen[bytes]", said: bytearray) -> None:
        assert run.stdout is not None  # noqa: S101 - a pipe was asked for
        written = os.read(run.stdout.fileno(), 65536)
        said += written
        _write(written)
        if not written:
            self._selector.unregister(run.stdout)

    def _start(self) -> str:
        """Starts a worker; once it is ready the others retire. Returns why it is not."""
        self._status = 1
        if self._listener is None:
            try:
                self._listener = listen(self._host, self._port)
            except OSError as error:
                self._status = PORT_TAKEN
                return f"port {self._port} cannot be had: {error.strerror}"
        new = self._add(self._spawn())
        ready = self._pump(START_WITHIN, lambda: new.state != "starting")
        if new.state == "serving":
            _log(f"process {new.pid} serves port {self._port}")
            self._serving = new
            others = [generation for generation in self._generations if generation is not new]
            for generation in others:
                _send(generation.channel, {"order": "retire"})
            self._pump(RETIRES_WITHIN, lambda: all(other.state != "serving" for other in others))
            return ""
        if not ready and new.pid:
            os.kill(new.pid, signal.SIGKILL)
            new.failure = f"it was not ready after {START_WITHIN} s"
        return new.failure or "it ended without saying why; its last lines are in the log"

    def _spawn(self) -> Generation:
        """A worker in a session of its own, whose parent is init: PM2's tree-kill does not find it."""
        assert self._listener is not None  # noqa: S101 - it was just bound
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        reading, writing = os.pipe()
        with suppress(PermissionError):  # the user's pipes have all the memory that they may; a small one does
            fcntl.fcntl(writing, fcntl.F_SETPIPE_SZ, PIPE_SIZE)
        os.set_blocking(writing, False)  # where nobody reads, lines are lost rather than the service held up
        inherited = [theirs.fileno(), self._listener.fileno(), reading]
        command = [PYTHON, str(CHECKOUT / "serve.py"), "--port", str(self._port)]
        command += ["--worker", ",".join(map(str, inherited))]
        child = os.fork()
        if child == 0:
            _become(command, writing, inherited)
        os.waitpid(child, 0)
        theirs.close()
        os.close(writing)
        return Generation(ours, reading)


def _kill_peer(channel: socket.socket) -> None:
    """Ends a worker that hangs: it can neither serve nor hand over, and would keep the port."""
    pid = struct.unpack("3i", channel.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[0]
    _log(f"process {pid} has not answered for {HELLO_WITHIN} s and is ended")
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    until = time.monotonic() + RETIRES_WITHIN
    while Path(f"/proc/{pid}").exists() and time.monotonic() < until:
        time.sleep(0.02)


def _public(failure: str) -> str:
    """A reason as everybody may read it: without paths and addresses, which may hold secrets."""
    return re.sub(r"\w+://\S+|(?<![\w.])[~.]?/[^\s:;,'\"()]+", "…", failure)


def _ask_to_go(*_: object) -> NoReturn:
    raise _AskedToGoError


def _become(command: list[str], output: int, inherited: Sequence[int]) -> NoReturn:
    """Turns a fork into a worker without parents. Nothing but system calls, and no way back."""
    try:
        os.setsid()
        if os.fork() == 0:
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            os.dup2(output, 1)
            os.dup2(output, 2)
            for fd in inherited:
                os.set_inheritable(fd, True)
            os.execv(command[0], command)  # noqa: S606 - no shell is wanted
    except OSError as error:
        os.write(2, f"{command[0]}: {error.strerror}\n".encode())
    finally:
        os._exit(127)


def run_directory(port: int) -> Path:
    """Where the fronts and workers of a port meet. Relative, since the path of a Unix socket is short."""
    directory = Path("run") / str(port)
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    return directory


def listen(host: str, port: int) -> socket.socket:
    """A listening TCP socket. Raises OSError."""
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind((host, port))
    listener.listen(BACKLOG)
    return listener


# --- the worker ---------------------------------------------------------------------------------------

Scope = dict[str, Any]
Receive = Callable[[], Any]
Send = Callable[[Any], Any]


class Worker:
    """The app on a listening socket, until it is told to retire or to stop."""

    def __init__(self, listener: socket.socket) -> None:
        self._listener = listener
        self._app: Any = None
        self._server: Any = None
        self._active = 0  # requests
        self._retired_at: float | None = None
        self._stopping = False
        self._tasks: set[asyncio.Task[None]] = set()
        self.failure = ""

    def run(self) -> bool:
        """Serves until it is over; whether it ever did. `failure` says why not."""
        # The one import that is not at the top: a front must run where the requirements are broken or missing.
        import uvicorn  # noqa: PLC0415
        from uvicorn.importer import import_from_string  # noqa: PLC0415

        try:
            self._app = import_from_string("app:app")
        except BaseException as error:
            self.failure = str(error) if isinstance(error, SystemExit) else f"{type(error).__name__}: {error}"
            raise
        config = uvicorn.Config(
            self, access_log=False, log_config=None, lifespan="on", timeout_graceful_shutdown=FINISH_WITHIN
        )
        self._server = uvicorn.Server(config)
        # SystemExit is how uvicorn says that the lifespan did not start.
        with suppress(SystemExit), asyncio.Runner(loop_factory=config.get_loop_factory()) as runner:
            runner.run(self._serve())
        return bool(self._server.started)

    async def _serve(self) -> None:
        serving = asyncio.ensure_future(self._server.serve(sockets=[self._listener]))
        await asyncio.sleep(0)  # it installs its own handlers of signals first, which end turns without a word
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, self.stop)
        while not self._server.started and not serving.done():  # noqa: ASYNC110 - uvicorn tells by this alone
            await asyncio.sleep(0.02)
        if self._server.started and not self._stopping:
            self.on_ready()
        await serving

    def on_complete(self) -> None:
        """Called when the app can serve, before it takes the first connection."""

    def on_ready(self) -> None:
        """Called once the app serves."""
        _log(f"serving port {self._listener.getsockname()[1]}; Ctrl-C ends it")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI: the app, whose requests are counted and, once this has retired, end their connections."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, self._noting(send))
            return
        self._active += 1
        try:
            await self._app(scope, receive, send if self._retired_at is None else _closing(send))
        finally:
            self._active -= 1

    def _noting(self, send: Send) -> Send:
        async def note(message: Scope) -> None:
            if message["type"] == "lifespan.startup.complete":
                self.on_complete()
            if message["type"] == "lifespan.startup.failed":
                self.failure = (message.get("message", "").strip().splitlines() or ["its lifespan failed"])[-1]
            await send(message)

        return note

    # --- the end ---

    def stop(self) -> None:
        """Ends in order: running turns have `DRAIN_SECONDS`. The second time, at once."""
        if self._stopping and not self._server.started:
            os._exit(1)
        if self._stopping:
            self._server.force_exit = True
        if self._stopping or not self._server.started:
            self._stopping = self._server.should_exit = True
            return
        self._stopping = True
        self._close_listener()
        self._spawn(self._stop())

    async def _stop(self) -> None:
        try:
            await self._app.state.turns.end()
        finally:
            self._server.should_exit = True

    def retire(self) -> None:
        """Leaves new connections to a successor, and ends when the last turn and the last reader have."""
        if self._retired_at is None:
            self._retired_at = time.monotonic()
            self._close_listener()
            self._spawn(self._retire())

    async def _retire(self) -> None:
        try:
            await self._app.state.turns.retire()
            last_turn = time.monotonic()
            while not self._is_over(last_turn):
                await asyncio.sleep(0.1)
                if self._app.state.turns.running:
                    last_turn = time.monotonic()
        finally:
            self._server.should_exit = True

    def _is_over(self, last_turn: float) -> bool:
        at = time.monotonic()
        if self._app.state.turns.running:
            return False
        if self._active:
            return at - last_turn > LINGER
        return not self._server.server_state.connections or at - (self._retired_at or at) > IDLE_WITHIN

    def _close_listener(self) -> None:
        for server in self._server.servers:
            server.close()
        self._listener.close()

    def _spawn(self, work: Any) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _closing(send: Send) -> Send:
    async def send_closing(message: Scope) -> None:
        if message["type"] == "http.response.start":
            message = {**message, "headers": [*message.get("headers", ()), (b"connection", b"close")]}
        await send(message)

    return send_closing


class GuardedWorker(Worker):
    """A worker that a front started, and that outlives it."""

    def __init__(self, port: int, channel: socket.socket, listener: socket.socket, log: int) -> None:
        """`log` is the reading end of its own output, for the fronts to come."""
        super().__init__(listener)
        self._channel = channel
        self._log = log
        self._path = run_directory(port) / f"{os.getpid()}.sock"
        self._door = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._ready = threading.Event()
        self._told_to_wait = False
        self._alone: asyncio.TimerHandle | None = None

    def run(self) -> bool:
        """As `Worker.run`; the front hears how it went."""
        _send(self._channel, {"pid": os.getpid()})
        threading.Thread(target=self._die_with_front, daemon=True).start()
        try:
            return super().run()
        except SystemExit:
            return False
        except Exception:  # noqa: BLE001 - whatever the app raises, the front is told
            traceback.print_exc()
            return False
        finally:
            self._path.unlink(missing_ok=True)
            _send(self._channel, {"failure": self.failure[:1000]})

    def _die_with_front(self) -> None:
        """A worker that is not ready when its front goes belongs to nobody: the next front starts another."""
        with suppress(ConnectionError):  # a front that was killed before it had read a word of ours
            self._channel.recv(1, socket.MSG_PEEK)  # comes back when the front is gone, or has its first order
        if not self._ready.is_set():
            os._exit(1)

    def on_complete(self) -> None:
        """Lets itself be found: from here on it may have connections, and no longer ends with its front."""
        self._door.bind(str(self._path))
        self._door.listen(8)
        self._ready.set()

    def on_ready(self) -> None:
        """Tells its front, and listens to it and to those to come."""
        asyncio.get_running_loop().add_reader(self._door.fileno(), self._open_door)
        self._listen_to_front()
        _send(self._channel, {"state": "serving"})

    def retire(self) -> None:
        """As `Worker.retire`; the front hears that new connections are its successor's from now on."""
        super().retire()
        _send(self._channel, {"state": self._state})

    def stop(self) -> None:
        """As `Worker.stop`; a front that still wants a worker starts another one."""
        super().stop()
        _send(self._channel, {"state": self._state})

    @property
    def _state(self) -> str:
        if self._stopping:
            return "stopping"
        return "serving" if self._retired_at is None else "retiring"

    def _open_door(self) -> None:
        """Another front: it gets the socket, unless that was closed, and what was logged meanwhile."""
        channel, _ = self._door.accept()
        asyncio.get_running_loop().remove_reader(self._channel.fileno())
        _send(self._channel, {"state": "replaced"})
        self._channel.close()
        self._channel = channel
        fds = [self._log] + ([self._listener.fileno()] if self._state == "serving" else [])
        _send(channel, {"pid": os.getpid(), "state": self._state}, fds)
        self._listen_to_front()

    def _listen_to_front(self) -> None:
        self._told_to_wait = False
        if self._alone is not None:
            self._alone.cancel()
        asyncio.get_running_loop().add_reader(self._channel.fileno(), self._hear)

    def _hear(self) -> None:
        try:
            message = json.loads(self._channel.recv(65536, socket.MSG_DONTWAIT) or b"{}")
        except BlockingIOError:
            return
        except ConnectionError:
            message = {}
        order = message.get("order")
        if order == "retire":
            self.retire()
        elif order == "keep":
            self._app.state.failed_start = message["failure"]
        elif order == "wait":
            self._told_to_wait = True
        else:
            self._be_alone()

    def _be_alone(self) -> None:
        loop = asyncio.get_running_loop()
        loop.remove_reader(self._channel.fileno())
        self._alone = loop.call_later(SUCCESSOR_WITHIN if self._told_to_wait else REVIVAL_WITHIN, self._stop_once)

    def _stop_once(self) -> None:
        if not self._stopping:  # to stop twice means at once, which only a signal says
            self.stop()


# --- the command line ---------------------------------------------------------------------------------


def main() -> int:
    """Runs what the command line says. Returns the exit status."""
    parser = argparse.ArgumentParser(description="Serves the app. Without --front, as one process, until Ctrl-C.")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--front", metavar="SCRIPT", help="run under PM2; SCRIPT --prepare checks and installs")
    parser.add_argument("--pm2", metavar="FD", type=int, help="where PM2 hears that the front is ready")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    os.chdir(CHECKOUT)
    if options.front:
        if options.pm2 is not None:
            os.set_inheritable(options.pm2, False)  # it is the front's alone
        try:
            front = Front(options.host, options.port, ["bash", options.front], options.pm2)
        except OSError as error:
            _log(f"{error.filename} cannot be used: {error.strerror}; it must belong to the user who runs this")
            return UNUSABLE
        return front.run()
    if options.worker:
        channel, listener, log = map(int, options.worker.split(","))
        worker: Worker = GuardedWorker(options.port, socket.socket(fileno=channel), socket.socket(fileno=listener), log)
    else:
        try:
            worker = Worker(listen(options.host, options.port))
        except OSError as error:
            _log(f"port {options.port} cannot be had: {error.strerror}")
            return PORT_TAKEN
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # each connection takes a file
    return 0 if worker.run() else 1


if __name__ == "__main__":
    sys.exit(main())
