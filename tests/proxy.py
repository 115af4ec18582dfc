"""A proxy that cuts a connection on which the service has sent nothing for a while, as many proxies do."""

import contextlib
import socket
import threading
from typing import Self

from .service import free_port


class IdleProxy:
    """Forwards connections to the loopback port `target`: `with IdleProxy(port, idle=0.3) as proxy: ... proxy.url`.

    If nothing listens on `target`, it accepts connections and never answers.
    """

    def __init__(self, target: int, idle: float, port: int | None = None) -> None:
        """`idle` is the number of silent seconds after which it cuts. `port` is its own port; default: a free one."""
        self._target = target
        self._idle = idle
        self._port = port or free_port()
        self._open: list[socket.socket] = []
        self.connections = 0

    @property
    def url(self) -> str:
        """The address on which it listens."""
        return f"http://127.0.0.1:{self._port}"

    def __enter__(self) -> Self:
        self._listener = socket.create_server(("127.0.0.1", self._port))
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for one in self._open:
            _close(one)

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # the listener was closed
            while True:
                client, _ = self._listener.accept()
                self.connections += 1
                self._open.append(client)
                threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        try:
            server = socket.create_connection(("127.0.0.1", self._target))
        except OSError:
            return  # the client's connection stays open without an answer
        self._open.append(server)
        server.settimeout(self._idle)
        threading.Thread(target=_pump, args=(client, server), daemon=True).start()
        _pump(server, client)


def _pump(source: socket.socket, target: socket.socket) -> None:
    with contextlib.suppress(OSError):  # the connection broke, or was silent for too long
        while data := source.recv(65536):
            target.sendall(data)
    _close(source)
    _close(target)


def _close(one: socket.socket) -> None:
    with contextlib.suppress(OSError):  # closed already
        one.shutdown(socket.SHUT_RDWR)
    one.close()
