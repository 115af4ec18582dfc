"""The worker: a process that serves the app with uvicorn, on a socket that already listens."""

import asyncio
import os
import signal
import socket
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Protocol

from .protocol import SUCCESSOR_TIMEOUT, State, from_front, log_line, run_directory, send

FRONT_RESTART_TIMEOUT = 30  # seconds that a worker waits for the next front after its front crashed
IDLE_TIMEOUT = 10  # seconds that a retired worker keeps idle connections; uvicorn normally closes them after 5
READER_TIMEOUT = 3600  # seconds that a retired worker waits for open requests after its last turn has ended
SHUTDOWN_TIMEOUT = 1  # seconds that open requests get to end after the turns have ended


class ServedTurns(Protocol):
    """The methods of `app.state.turns` that a worker calls. The app sets the attribute when its lifespan starts."""

    @property
    def running(self) -> int:
        """The number of turns that run in this process."""

    async def retire(self) -> None:
        """Leaves queued turns to other processes; running ones continue."""

    async def end(self) -> None:
        """Lets running turns finish for `DRAIN_SECONDS`, then ends them as `interrupted`."""


class ServedState(Protocol):
    """The attributes of `app.state` that a worker reads and writes."""

    turns: ServedTurns
    failed_start: str | None


class ServedApp(Protocol):
    """The ASGI app as a worker uses it. A protocol, because a worker imports the app only at run time."""

    state: ServedState

    async def __call__(self, scope: "Scope", receive: "Receive", send: "Send") -> None:
        """Handles one ASGI connection."""


Scope = dict[str, Any]
Receive = Callable[[], Any]
Send = Callable[[Any], Any]


class Worker:
    """Serves the app on a listening socket until it gets the order to retire or to stop."""

    def __init__(self, listener: socket.socket) -> None:
        self._listener = listener
        self._app: ServedApp
        self._server: Any = None
        self._active = 0  # number of open requests
        self._retired_at: float | None = None
        self._stopping = False
        self._tasks: set[asyncio.Task[None]] = set()
        self.failure = ""

    def run(self) -> bool:
        """Serves until the worker has retired or stopped. Returns whether it ever served; if not, `failure` contains
        the reason. Raises what importing the app raises."""
        # A front imports this module, and has to run even if the requirements are missing or broken.
        import uvicorn  # noqa: PLC0415 - see above
        from uvicorn.importer import import_from_string  # noqa: PLC0415 - see above

        try:
            self._app = import_from_string("app:app")
        except BaseException as error:
            self.failure = str(error) if isinstance(error, SystemExit) else f"{type(error).__name__}: {error}"
            raise
        config = uvicorn.Config(
            self, access_log=False, log_config=None, lifespan="on", timeout_graceful_shutdown=SHUTDOWN_TIMEOUT
        )
        self._server = uvicorn.Server(config)
        # uvicorn raises SystemExit if the lifespan does not start.
        with suppress(SystemExit), asyncio.Runner(loop_factory=config.get_loop_factory()) as runner:
            runner.run(self._serve())
        return bool(self._server.started)

    async def _serve(self) -> None:
        serving = asyncio.ensure_future(self._server.serve(sockets=[self._listener]))
        # Let uvicorn install its signal handlers before replacing them: they would shut down without ending the turns.
        await asyncio.sleep(0)
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, self.stop)
        while not self._server.started and not serving.done():  # noqa: ASYNC110 - uvicorn has no event for it
            await asyncio.sleep(0.02)
        if self._server.started and not self._stopping:
            self.on_ready()
        await serving

    def on_complete(self) -> None:
        """Called when the app's lifespan has started, before the worker accepts the first connection."""

    def on_ready(self) -> None:
        """Called once the worker accepts connections."""
        log_line(f"serving port {self._listener.getsockname()[1]}; press Ctrl-C to stop")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes an ASGI connection to the app, and counts it while it is open. After the worker has retired, adds
        `Connection: close` to the response, so that the client's next request goes to the new worker."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, self._observe_lifespan(send))
            return
        self._active += 1
        try:
            await self._app(scope, receive, send if self._retired_at is None else _add_connection_close(send))
        finally:
            self._active -= 1

    def _observe_lifespan(self, send: Send) -> Send:
        async def observe(message: Scope) -> None:
            if message["type"] == "lifespan.startup.complete":
                self.on_complete()
            if message["type"] == "lifespan.startup.failed":
                self.failure = (message.get("message", "").strip().splitlines() or ["the app's lifespan failed"])[-1]
            await send(message)

        return observe

    # --- stopping and retiring ---

    def stop(self) -> None:
        """Begins to stop: closes the listening socket, gives running turns `DRAIN_SECONDS`, and shuts down. A second
        call shuts down immediately. During the start, the first call stops the worker as soon as it has started, and
        the second one exits with status 1."""
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
        """Begins to retire: closes its copy of the listening socket, leaves queued turns to other workers, and shuts
        down after the last turn and the last request of this worker have ended."""
        if self._retired_at is None:
            self._retired_at = time.monotonic()
            self._close_listener()
            self._spawn(self._retire())

    async def _retire(self) -> None:
        try:
            await self._app.state.turns.retire()
            last_turn = time.monotonic()
            while not self._has_finished(last_turn):
                await asyncio.sleep(0.1)
                if self._app.state.turns.running:
                    last_turn = time.monotonic()
        finally:
            self._server.should_exit = True

    def _has_finished(self, last_turn: float) -> bool:
        """Returns whether a retired worker may shut down. `last_turn` is the monotonic time when a turn last ran."""
        now = time.monotonic()
        if self._app.state.turns.running:
            return False
        if self._active:
            return now - last_turn > READER_TIMEOUT
        return not self._server.server_state.connections or now - (self._retired_at or now) > IDLE_TIMEOUT

    def _close_listener(self) -> None:
        for server in self._server.servers:
            server.close()
        self._listener.close()

    def _spawn(self, work: Any) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _add_connection_close(send: Send) -> Send:
    async def send_closing(message: Scope) -> None:
        if message["type"] == "http.response.start":
            message = {**message, "headers": [*message.get("headers", ()), (b"connection", b"close")]}
        await send(message)

    return send_closing


class GuardedWorker(Worker):
    """A worker that a front starts and that continues to serve when the front ends."""

    def __init__(self, port: int, channel: socket.socket, listener: socket.socket, log: int) -> None:
        """`channel` is connected to the front. `log` is the reading end of the pipe that is this worker's stdout; the
        worker keeps it open to pass it on to later fronts."""
        super().__init__(listener)
        self._channel = channel
        self._log = log
        self._path = run_directory(port) / f"{os.getpid()}.sock"
        self._control = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._ready = threading.Event()
        self._told_to_wait = False
        self._stop_timer: asyncio.TimerHandle | None = None

    def run(self) -> bool:
        """Like `Worker.run`, but reports to the front instead of raising exceptions of the app."""
        send(self._channel, {"pid": os.getpid()})
        threading.Thread(target=self._exit_with_front, daemon=True).start()
        try:
            return super().run()
        except SystemExit:
            return False
        except Exception:  # noqa: BLE001 - the app may raise anything, and the front gets each reason as `failure`
            traceback.print_exc()
            return False
        finally:
            self._path.unlink(missing_ok=True)
            send(self._channel, {"failure": self.failure[:1000]})

    def _exit_with_front(self) -> None:
        """Exits if the front ends before the worker is ready. The next front cannot find such a worker, and starts
        another one. Runs on a thread of its own, because importing the app blocks the main thread."""
        with suppress(ConnectionError):  # the front was killed before it read what this worker had sent
            self._channel.recv(1, socket.MSG_PEEK)  # blocks until the front ends or sends its first order
        if not self._ready.is_set():
            os._exit(1)

    def on_complete(self) -> None:
        """Opens the Unix socket by which later fronts find this worker. From now on the worker may have connections, so
        it no longer ends with its front."""
        self._control.bind(str(self._path))
        self._control.listen(8)
        self._ready.set()

    def on_ready(self) -> None:
        """Reports to the front that the worker serves, and begins to handle orders and connections of other fronts."""
        asyncio.get_running_loop().add_reader(self._control.fileno(), self._accept_front)
        self._listen_to_front()
        send(self._channel, {"state": "serving"})

    def retire(self) -> None:
        """Like `Worker.retire`, and reports it to the front."""
        super().retire()
        send(self._channel, {"state": self._state})

    def stop(self) -> None:
        """Like `Worker.stop`, and reports it to the front, which starts another worker if this one was serving."""
        super().stop()
        send(self._channel, {"state": self._state})

    @property
    def _state(self) -> State:
        if self._stopping:
            return "stopping"
        return "serving" if self._retired_at is None else "retiring"

    def _accept_front(self) -> None:
        """Accepts the connection of another front. Sends it the pipe with the log and, if this worker is serving, the
        listening socket. Tells the previous front that it is replaced."""
        channel, _ = self._control.accept()
        asyncio.get_running_loop().remove_reader(self._channel.fileno())
        send(self._channel, {"state": "replaced"})
        self._channel.close()
        self._channel = channel
        fds = [self._log] + ([self._listener.fileno()] if self._state == "serving" else [])
        send(channel, {"pid": os.getpid(), "state": self._state}, fds)
        self._listen_to_front()

    def _listen_to_front(self) -> None:
        self._told_to_wait = False
        if self._stop_timer is not None:
            self._stop_timer.cancel()
        asyncio.get_running_loop().add_reader(self._channel.fileno(), self._handle_message)

    def _handle_message(self) -> None:
        """Reads one message of the front, or the end of its connection, and obeys the order."""
        try:
            packet = self._channel.recv(65536, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return
        except ConnectionError:
            packet = b""
        if not packet:
            self._wait_for_front()
            return
        message = from_front(packet)
        order = message.get("order")
        if order == "retire":
            self.retire()
        elif order == "keep":
            self._app.state.failed_start = message.get("failure")
        elif order == "wait":
            self._told_to_wait = True

    def _wait_for_front(self) -> None:
        """Schedules the stop of this worker, which another front that connects before that cancels."""
        loop = asyncio.get_running_loop()
        loop.remove_reader(self._channel.fileno())
        delay = SUCCESSOR_TIMEOUT if self._told_to_wait else FRONT_RESTART_TIMEOUT
        self._stop_timer = loop.call_later(delay, self._stop_once)

    def _stop_once(self) -> None:
        if not self._stopping:  # a second `stop` would cut replies short, which only a second signal may do
            self.stop()
