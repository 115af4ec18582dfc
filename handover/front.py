"""The front: the small process that PM2 runs. It imports nothing of the app."""

import fcntl
import os
import re
import selectors
import signal
import socket
import struct
import subprocess
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

from .protocol import SUCCESSOR_WITHIN, State, from_worker, listen, log_line, run_directory, send, write_lines

CHECKOUT = Path(__file__).resolve().parents[1]
PYTHON = str(CHECKOUT / "venv/bin/python")
PIPE_SIZE = 1024 * 1024  # bytes of log that a worker can write while no front reads
LONGEST_LINE = 1024 * 1024  # bytes; a longer one is passed on in pieces
START_WITHIN = 300  # seconds for a worker's start: it may have to migrate a large database
HELLO_WITHIN = 15  # seconds until a worker that lives answers a new front, however busy it is
RETIRES_WITHIN = 5  # seconds until a worker that was told to retire takes no new connections
RETRY_AT_MOST = 30  # seconds between two tries to start a worker where none serves
PAUSE = 3  # seconds before a front whose first worker did not start gives up, and PM2 starts the next
PORT_TAKEN = 4  # exit status
UNUSABLE = 5  # exit status
ENDED_EARLY = 6  # exit status: with any other, PM2 revives what it was told to stop before it was ready
FOR_GOOD = (2, 3, PORT_TAKEN, UNUSABLE)  # exit statuses of `start-backend.sh` after which another try is of no use


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
        self.state: State = "starting"
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
                log_line(f"the service did not start: {failure}")
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
            send(generation.channel, {"order": "wait"})

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
                    log_line(f"port {self._port} is run from this checkout by another front already, process {holder}")
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
                hello = from_worker(message)
                generation = Generation(channel, fds[0])
                generation.pid, generation.state = hello["pid"], hello["state"]
            except (OSError, LookupError) as error:
                if isinstance(error, TimeoutError):
                    _kill_peer(channel)
                channel.close()
                path.unlink(missing_ok=True)
                continue
            for fd in fds:
                os.set_inheritable(fd, False)
            channel.settimeout(None)
            self._add(generation)
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
            message = from_worker(generation.channel.recv(65536, socket.MSG_DONTWAIT))
        except ConnectionError:
            message = {"state": "gone"}
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
            write_lines(generation.unfinished + b"\n")
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
        write_lines(lines + end)
        if len(generation.unfinished) > LONGEST_LINE:
            write_lines(generation.unfinished)
            generation.unfinished = b""
        return bool(written)

    # --- what it does ---

    def _guard(self) -> None:
        """Sees to it that a worker serves."""
        self._pump(1, lambda: self._serving is None)
        delay = 1
        while self._serving is None:
            log_line("the worker has died: another one is started")
            failure = self._renew()
            if failure:
                log_line(f"the worker did not start, again in {delay} s: {failure}")
                self._pump(delay)
                delay = min(2 * delay, RETRY_AT_MOST)

    def _renew(self) -> str:
        """Starts a worker of the code as it is and lets the others retire. Where that fails, whoever served
        before serves on, and is told why; returns that, or an empty string."""
        failure = self._run_prepare() or self._start()
        if failure and self._serving is not None:
            log_line(f"the new code does not run, process {self._serving.pid} serves on with the old: {failure}")
            send(self._serving.channel, {"order": "keep", "failure": _public(failure)})
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
        write_lines(written)
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
            log_line(f"process {new.pid} serves port {self._port}")
            self._serving = new
            others = [generation for generation in self._generations if generation is not new]
            for generation in others:
                send(generation.channel, {"order": "retire"})
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
    log_line(f"process {pid} has not answered for {HELLO_WITHIN} s and is ended")
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
