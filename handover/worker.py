"""The worker: the app on a listening socket, until it is told to retire or to stop."""

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

from .protocol import SUCCESSOR_WITHIN, State, from_front, log_line, run_directory, send

REVIVAL_WITHIN = 30  # the same after a front that died: PM2 starts it again
IDLE_WITHIN = 10  # seconds that a retired worker leaves idle connections open; uvicorn closes them after 5
LINGER = 3600  # seconds that a retired worker without turns waits for its last readers
FINISH_WITHIN = 1  # seconds that requests have to end once the turns have


class ServedTurns(Protocol):
    """What a worker asks of the app's turns, which it finds as `app.state.turns` once the lifespan has started."""

    @property
    def running(self) -> int:
        """How many turns run in this process."""

    async def retire(self) -> None:
        """Leaves queued turns to other processes; running ones continue."""

    async def end(self) -> None:
        """Lets running turns finish for `DRAIN_SECONDS`, then ends them as `interrupted`."""


class ServedState(Protocol):
    """What a worker reads and writes in `app.state`."""

    turns: ServedTurns
    failed_start: str | None


class ServedApp(Protocol):
    """An ASGI app as a worker knows it; it imports nothing of ours."""

    state: ServedState

    async def __call__(self, scope: "Scope", receive: "Receive", send: "Send") -> None:
        """ASGI."""


Scope = dict[str, Any]
Receive = Callable[[], Any]
Send = Callable[[Any], Any]


class Worker:
    """The app on a listening socket, until it is told to retire or to stop."""

    def __init__(self, listener: socket.socket) -> None:
        self._listener = listener
        self._app: ServedApp
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
        log_line(f"serving port {self._listener.getsockname()[1]}; Ctrl-C ends it")

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
        send(self._channel, {"pid": os.getpid()})
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
            send(self._channel, {"failure": self.failure[:1000]})

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
        send(self._channel, {"state": "serving"})

    def retire(self) -> None:
        """As `Worker.retire`; the front hears that new connections are its successor's from now on."""
        super().retire()
        send(self._channel, {"state": self._state})

    def stop(self) -> None:
        """As `Worker.stop`; a front that still wants a worker starts another one."""
        super().stop()
        send(self._channel, {"state": self._state})

    @property
    def _state(self) -> State:
        if self._stopping:
            return "stopping"
        return "serving" if self._retired_at is None else "retiring"

    def _open_door(self) -> None:
        """Another front: it gets the socket, unless that was closed, and what was logged meanwhile."""
        channel, _ = self._door.accept()
        asyncio.get_running_loop().remove_reader(self._channel.fileno())
        send(self._channel, {"state": "replaced"})
        self._channel.close()
        self._channel = channel
        fds = [self._log] + ([self._listener.fileno()] if self._state == "serving" else [])
        send(channel, {"pid": os.getpid(), "state": self._state}, fds)
        self._listen_to_front()

    def _listen_to_front(self) -> None:
        self._told_to_wait = False
        if self._alone is not None:
            self._alone.cancel()
        asyncio.get_running_loop().add_reader(self._channel.fileno(), self._hear)

    def _hear(self) -> None:
        try:
            packet = self._channel.recv(65536, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return
        except ConnectionError:
            packet = b""
        if not packet:
            self._be_alone()
            return
        message = from_front(packet)
        order = message.get("order")
        if order == "retire":
            self.retire()
        elif order == "keep":
            self._app.state.failed_start = message.get("failure")
        elif order == "wait":
            self._told_to_wait = True

    def _be_alone(self) -> None:
        loop = asyncio.get_running_loop()
        loop.remove_reader(self._channel.fileno())
        self._alone = loop.call_later(SUCCESSOR_WITHIN if self._told_to_wait else REVIVAL_WITHIN, self._stop_once)

    def _stop_once(self) -> None:
        if not self._stopping:  # to stop twice means at once, which only a signal says
            self.stop()
