"""How fronts and workers talk, and where they meet."""

import json
import socket
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

BACKLOG = 2048  # connections that wait while a worker is being replaced


SUCCESSOR_WITHIN = 3  # seconds that a worker waits for the next front after PM2 ended the one before


def log_line(message: str) -> None:
    """A line among those of the app, in its plain format."""
    stamp = time.strftime("%Y-%m-%d %H:%M:%S") + f",{int(time.time() * 1000) % 1000:03d}"
    write_lines(f"{stamp} INFO clawd.serve [-] {message}\n".encode())


def write_lines(lines: bytes) -> None:
    """Writes to the standard output; where that is not possible, the lines are lost."""
    with suppress(OSError):  # PM2 is gone, or the disk is full: the service goes on
        sys.stdout.buffer.write(lines)
        sys.stdout.buffer.flush()


def send(channel: socket.socket, message: dict[str, object], fds: Sequence[int] = ()) -> None:
    """Sends one message to the other side of a channel, with file descriptors where there are any."""
    with suppress(OSError):  # whoever should have read it is gone, which the reading side sees
        socket.send_fds(channel, [json.dumps(message).encode()], list(fds))


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
