"""The front: the small process that PM2 runs. It does not import the app, so it also runs if the app cannot start."""

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

from .protocol import SUCCESSOR_TIMEOUT, State, from_worker, listen, log_line, run_directory, send, write_lines

CHECKOUT = Path(__file__).resolve().parents[1]
PYTHON = str(CHECKOUT / "venv/bin/python")
PIPE_SIZE = 1024 * 1024  # bytes of log that a worker can write while no front reads
LONGEST_LINE = 1024 * 1024  # bytes of an incomplete log line that the front buffers before it writes what it has
START_TIMEOUT = 300  # seconds that a worker gets to start: it may have to migrate a large database
HELLO_TIMEOUT = 15  # seconds that a worker gets to answer a new front before the front kills it as hung
RETIRE_TIMEOUT = 5  # seconds that the old workers get to close their listening sockets, or a killed process to end
MAX_RETRY_DELAY = 30  # seconds between two attempts to start a worker if none serves
FAILED_START_PAUSE = 3  # seconds before a front whose first worker did not start exits and PM2 starts the next front
PORT_TAKEN = 4  # exit status: another process or front uses the port
UNUSABLE = 5  # exit status: the directory run/<port>/ cannot be used
# Exit status of a front that PM2 stops before it is ready. It is one of `stop_exit_codes` in ecosystem.backend.json,
# because PM2 would otherwise start the front again although it was told to stop it.
STOPPED_EARLY = 6
NO_RETRY = (2, 3, PORT_TAKEN, UNUSABLE)  # exit statuses of `start-backend.sh` that a retry cannot change


class _StopRequestedError(Exception):
    """PM2, or Ctrl-C, asked the front to end."""


class _ExitError(Exception):
    """The front has to end with this exit status."""

    def __init__(self, status: int) -> None:
        super().__init__(status)
        self.status = status


class Generation:
    """One worker as a front sees it."""

    def __init__(self, channel: socket.socket, log: int) -> None:
        """`channel` is connected to the worker; `log` is the reading end of the pipe that the worker writes to."""
        self.channel = channel
        self.log = log
        self.pid = 0
        self.state: State = "starting"
        self.failure = ""
        self.unfinished = b""  # the last line of its output while it has no line break yet


class Front:
    """Takes over the listening socket from the old worker, starts a worker, and starts another one when that ends."""

    def __init__(self, host: str, port: int, prepare: Sequence[str], pm2: int | None) -> None:
        """`prepare` is the command that checks the branch and updates `venv/`. The front appends `--check` if it has
        no listening socket yet, so that the port is checked too, otherwise `--prepare`. `pm2` is the file descriptor
        of the channel to PM2, or None. Raises OSError if the directory of the port cannot be used."""
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
        self._status = 1  # exit status if no worker serves
        self._is_ready = False

    def run(self) -> int:
        """Runs until PM2 stops the front, another front takes over, or the first worker fails to start. Returns the
        exit status."""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, _request_stop)
        try:
            self._take_lock()
            self._find_generations()
            failure = self._replace_worker()
            if self._serving is None:
                log_line(f"the service did not start: {failure}")
                self._wait(0 if self._status in NO_RETRY else FAILED_START_PAUSE)
                return self._status
            self._report_ready()
            while True:
                self._supervise()
        except _StopRequestedError:
            return 0 if self._is_ready else STOPPED_EARLY
        except _ExitError as error:
            return error.status
        finally:
            self._announce_exit()

    def _announce_exit(self) -> None:
        """Tells every worker that PM2 ended this front and may start another one. A worker that is not ready yet ends
        with its front."""
        for generation in self._generations:
            send(generation.channel, {"order": "wait"})

    def _report_ready(self) -> None:
        """Sends PM2 the message that its option `wait_ready` waits for."""
        self._is_ready = True
        if self._pm2 is not None:
            with suppress(OSError):  # PM2's daemon has ended; the worker serves nevertheless
                os.write(self._pm2, b'"ready"\n')

    # --- taking over ---

    def _take_lock(self) -> None:
        """Makes this front the only one of its port, by a file lock that the kernel releases when the process ends.
        Waits for a front that is just ending, and raises _ExitError if the other one keeps the lock."""
        until = time.monotonic() + SUCCESSOR_TIMEOUT
        while True:
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() > until:
                    holder = os.pread(self._lock, 20, 0).decode() or "unknown"
                    log_line(
                        f"another front, process {holder}, already runs port {self._port} from this checkout; "
                        "if PM2 has two entries for it, pm2 delete one of them"
                    )
                    raise _ExitError(PORT_TAKEN) from None
                time.sleep(0.05)
            else:
                break
        os.ftruncate(self._lock, 0)
        os.pwrite(self._lock, str(os.getpid()).encode(), 0)

    def _find_generations(self) -> None:
        """Connects to every live worker of this port, takes over the listening socket from the one that serves, and
        deletes the Unix sockets of dead workers. Kills a worker that does not answer within HELLO_TIMEOUT."""
        for path in self._directory.glob("*.sock"):
            channel = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            channel.settimeout(HELLO_TIMEOUT)
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
        self._selector.register(generation.channel, selectors.EVENT_READ, lambda: self._handle_message(generation))
        self._selector.register(generation.log, selectors.EVENT_READ, lambda: self._relay_log(generation))
        return generation

    # --- events ---

    def _wait(self, seconds: float, until: Callable[[], bool] = lambda: False) -> bool:
        """Handles messages and log output of the workers for this many seconds, or until the condition holds. Returns
        whether it holds."""
        deadline = time.monotonic() + seconds
        if os.getppid() != self._parent and self._lock >= 0:
            # PM2's daemon has died. A front of the next daemon has to get the lock; this front continues until then.
            os.close(self._lock)
            self._lock = -1
        while not until() and (left := deadline - time.monotonic()) > 0:
            for key, _ in self._selector.select(min(left, 1)):
                key.data()
        return until()

    def _handle_message(self, generation: Generation) -> None:
        """Reads one message of a worker, or the end of its connection, and updates the state of the generation. Raises
        _ExitError if another front has taken over the worker."""
        try:
            message = from_worker(generation.channel.recv(65536, socket.MSG_DONTWAIT))
        except ConnectionError:
            message = {"state": "gone"}
        generation.pid = message.get("pid", generation.pid)
        generation.failure = message.get("failure", generation.failure)
        generation.state = message.get("state", generation.state)
        if generation.state == "replaced":
            raise _ExitError(0)
        if generation.state == "gone":
            self._remove(generation)
        if generation is self._serving and generation.state != "serving":
            self._serving = None

    def _remove(self, generation: Generation) -> None:
        """Writes the rest of an ended worker's log, and closes and deletes what belongs to the worker."""
        while self._relay_log(generation):
            pass
        if generation.unfinished:
            write_lines(generation.unfinished + b"\n")
        self._selector.unregister(generation.channel)
        if generation.log in self._selector.get_map():
            self._selector.unregister(generation.log)
        generation.channel.close()
        os.close(generation.log)
        # A worker that was killed could not delete its socket itself.
        (self._directory / f"{generation.pid}.sock").unlink(missing_ok=True)
        self._generations.remove(generation)

    def _relay_log(self, generation: Generation) -> bool:
        """Reads up to 64 KB of a worker's output and writes the complete lines to stdout, so that lines of several
        workers do not mix. Returns whether there was any output."""
        if generation not in self._generations:
            return False  # removed by an earlier event of the same select, which returned both
        try:
            written = os.read(generation.log, 65536)
        except BlockingIOError:
            return False
        if not written and generation.log in self._selector.get_map():
            self._selector.unregister(generation.log)  # end of file: no process has the writing end open any more
        lines, end, generation.unfinished = (generation.unfinished + written).rpartition(b"\n")
        write_lines(lines + end)
        if len(generation.unfinished) > LONGEST_LINE:
            write_lines(generation.unfinished)
            generation.unfinished = b""
        return bool(written)

    # --- starting workers ---

    def _supervise(self) -> None:
        """Waits a second, or until the serving worker ends; in that case starts workers until one serves."""
        self._wait(1, lambda: self._serving is None)
        delay = 1
        while self._serving is None:
            log_line(f"no worker serves port {self._port} any more, starting another one")
            failure = self._replace_worker()
            if failure:
                log_line(f"the worker did not start, retrying in {delay} s: {failure}")
                self._wait(delay)
                delay = min(2 * delay, MAX_RETRY_DELAY)

    def _replace_worker(self) -> str:
        """Starts a worker with the current code, and tells the others to retire once it is ready. Returns an empty
        string, or the reason why the new worker did not start. In that case the old worker continues to serve, and
        `/health` shows the reason as `failed_start`."""
        failure = self._run_prepare() or self._start()
        if failure and self._serving is not None:
            pid = self._serving.pid
            log_line(f"the new code did not start, process {pid} continues to serve the old code: {failure}")
            send(self._serving.channel, {"order": "keep", "failure": _redacted(failure)})
        return failure

    def _run_prepare(self) -> str:
        """Runs the start script, which checks the branch and updates `venv/`. Returns an empty string, or the end of
        the script's output if it failed."""
        command = [*self._prepare, "--prepare" if self._listener else "--check"]
        run = subprocess.Popen(  # noqa: S603 - the command comes from the command line of serve.py, not from a request
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # so that one signal to its process group also kills its children, such as pip
        )
        assert run.stdout is not None  # noqa: S101 - tells mypy that stdout=PIPE sets it
        output = bytearray()
        try:
            self._selector.register(run.stdout, selectors.EVENT_READ, lambda: self._collect_output(run, output))
            self._wait(float("inf"), lambda: run.stdout not in self._selector.get_map())
        except BaseException:
            os.killpg(run.pid, signal.SIGKILL)
            raise
        self._status = run.wait()
        return " ".join(output[-1000:].decode(errors="replace").split()) if self._status else ""

    def _collect_output(self, run: "subprocess.Popen[bytes]", output: bytearray) -> None:
        assert run.stdout is not None  # noqa: S101 - tells mypy that stdout=PIPE sets it
        written = os.read(run.stdout.fileno(), 65536)
        output += written
        write_lines(written)
        if not written:
            self._selector.unregister(run.stdout)

    def _start(self) -> str:
        """Starts a worker, and tells the others to retire once it is ready. Returns an empty string, or the reason why
        the worker did not start."""
        self._status = 1
        if self._listener is None:
            try:
                self._listener = listen(self._host, self._port)
            except OSError as error:
                self._status = PORT_TAKEN
                return f"cannot listen on port {self._port}: {error.strerror}"
        new = self._add(self._spawn())
        ready = self._wait(START_TIMEOUT, lambda: new.state != "starting")
        if new.state == "serving":
            log_line(f"process {new.pid} serves port {self._port}")
            self._serving = new
            others = [generation for generation in self._generations if generation is not new]
            for generation in others:
                send(generation.channel, {"order": "retire"})
            self._wait(RETIRE_TIMEOUT, lambda: all(other.state != "serving" for other in others))
            return ""
        if not ready and new.pid:
            os.kill(new.pid, signal.SIGKILL)
            new.failure = f"the worker was not ready after {START_TIMEOUT} s and was killed"
        return new.failure or "the worker ended without giving a reason; see its last lines in the log"

    def _spawn(self) -> Generation:
        """Starts a worker as a daemon: in its own session and with init as its parent. PM2 therefore does not find it
        when it kills the process tree of the front."""
        assert self._listener is not None  # noqa: S101 - tells mypy that the caller has set it
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        reading, writing = os.pipe()
        with suppress(PermissionError):  # the user's pipes exceed the kernel's limit; the default size works too
            fcntl.fcntl(writing, fcntl.F_SETPIPE_SZ, PIPE_SIZE)
        os.set_blocking(writing, False)  # if nobody reads the log, the worker has to drop lines instead of blocking
        inherited = [theirs.fileno(), self._listener.fileno(), reading]
        command = [PYTHON, str(CHECKOUT / "serve.py"), "--port", str(self._port)]
        command += ["--worker", ",".join(map(str, inherited))]
        child = os.fork()
        if child == 0:
            _exec_as_daemon(command, writing, inherited)
        os.waitpid(child, 0)
        theirs.close()
        os.close(writing)
        return Generation(ours, reading)


def _kill_peer(channel: socket.socket) -> None:
    """Kills a hung worker at the other end of the channel, and waits until its process has ended. It can neither serve
    nor hand over its listening socket, and would keep the port."""
    pid = struct.unpack("3i", channel.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[0]
    log_line(f"process {pid} did not answer within {HELLO_TIMEOUT} s, killing it")
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    until = time.monotonic() + RETIRE_TIMEOUT
    while Path(f"/proc/{pid}").exists() and time.monotonic() < until:
        time.sleep(0.02)


def _redacted(failure: str) -> str:
    """Returns the reason without URLs and paths, which may contain secrets: `/health` shows it to everybody."""
    return re.sub(r"\w+://\S+|(?<![\w.])[~.]?/[^\s:;,'\"()]+", "…", failure)


def _request_stop(*_: object) -> NoReturn:
    raise _StopRequestedError


def _exec_as_daemon(command: list[str], output: int, inherited: Sequence[int]) -> NoReturn:
    """Replaces the forked process by a daemon that runs the command, with `output` as stdout and stderr and the file
    descriptors `inherited` open. Makes only system calls and never returns, because the front's own code, such as its
    `finally` blocks, would otherwise run a second time in the child."""
    try:
        os.setsid()
        if os.fork() == 0:
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            os.dup2(output, 1)
            os.dup2(output, 2)
            for fd in inherited:
                os.set_inheritable(fd, True)
            os.execv(command[0], command)  # noqa: S606 - starts no shell, because the command needs none
    except OSError as error:
        os.write(2, f"{command[0]}: {error.strerror}\n".encode())
    finally:
        os._exit(127)
