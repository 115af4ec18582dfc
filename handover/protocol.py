"""The messages between fronts and workers, the directory of their Unix sockets, and their log lines.

Each message is one packet of a Unix socket (SOCK_SEQPACKET) and contains a JSON object. The other side may run older
or newer code: a receiver ignores fields and values that it does not know, and the others never change their meaning.

A worker sends:

| message | effect |
|---|---|
| `pid` | The front knows which process to kill if the worker does not become ready. |
| `state: serving` | The worker takes connections. The front tells the other workers to retire. |
| `state: retiring` | The worker takes no new connections; it ends after its last reply and last reader. |
| `state: stopping` | The worker gives its replies `DRAIN_SECONDS`, then ends. The front starts another if it served. |
| `state: replaced` | Another front has connected to the worker. This front exits. |
| `failure` | The reason why the worker did not start. The worker then closes the connection. |
| `pid` and `state` | The worker's answer to a front that connects, with the file descriptors of its log |
| | and, if it serves, of the listening socket. The front takes over. |

A front sends:

| message | effect |
|---|---|
| `order: retire` | The worker becomes `retiring`. |
| `order: keep`, `failure` | Newer code did not start: the worker continues, and `/health` shows `failed_start`. |
| `order: wait` | PM2 ended this front: the worker stops unless another front connects in SUCCESSOR_TIMEOUT s. |

A front that sees the end of the connection records the worker as `gone`: its process has ended. A worker that sees it
without `order: wait` assumes that its front crashed. It stops unless another front connects in FRONT_RESTART_TIMEOUT s.
"""

import json
import socket
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, TypedDict, get_args

State = Literal["starting", "serving", "retiring", "stopping", "replaced", "gone"]
Order = Literal["retire", "keep", "wait"]

BACKLOG = 2048  # connections that the kernel queues while no worker accepts them
SUCCESSOR_TIMEOUT = 3  # seconds that a worker waits for the next front after PM2 ended its front


def log_line(message: str) -> None:
    """Writes one log line to stdout, in the plain format of the app's log (`LOG_FORMAT=plain`)."""
    stamp = time.strftime("%Y-%m-%d %H:%M:%S") + f",{int(time.time() * 1000) % 1000:03d}"
    write_lines(f"{stamp} INFO clawd.serve [-] {message}\n".encode())


def write_lines(lines: bytes) -> None:
    """Writes complete lines to stdout. Drops them if that fails."""
    with suppress(OSError):  # PM2's daemon may have died, or the disk be full; serving matters more than the log
        sys.stdout.buffer.write(lines)
        sys.stdout.buffer.flush()


class FromWorker(TypedDict, total=False):
    """A message from a worker, see the first table above."""

    pid: int
    state: State
    failure: str


class FromFront(TypedDict, total=False):
    """A message from a front, see the second table above."""

    order: Order
    failure: str


def from_worker(packet: bytes) -> FromWorker:
    """Decodes a packet from a worker and drops what this protocol does not define. The empty packet, which `recv`
    returns at the end of the connection, gives the state `gone`."""
    if not packet:
        return {"state": "gone"}
    fields = _decoded(packet)
    known: FromWorker = {}
    if isinstance(fields.get("pid"), int):
        known["pid"] = fields["pid"]
    if fields.get("state") in get_args(State):
        known["state"] = fields["state"]
    if isinstance(fields.get("failure"), str):
        known["failure"] = fields["failure"]
    return known


def from_front(packet: bytes) -> FromFront:
    """Decodes a packet from a front and drops what this protocol does not define."""
    fields = _decoded(packet)
    known: FromFront = {}
    if fields.get("order") in get_args(Order):
        known["order"] = fields["order"]
    if isinstance(fields.get("failure"), str):
        known["failure"] = fields["failure"]
    return known


def _decoded(packet: bytes) -> dict[str, Any]:
    try:
        fields = json.loads(packet)
    except ValueError:
        return {}
    return fields if isinstance(fields, dict) else {}


def send(channel: socket.socket, message: FromWorker | FromFront, fds: Sequence[int] = ()) -> None:
    """Sends one message, with the file descriptors `fds`. Drops it if the other process has closed the connection."""
    with suppress(OSError):  # the code that reads from this channel sees the closed connection and handles it
        socket.send_fds(channel, [json.dumps(message).encode()], list(fds))


def run_directory(port: int) -> Path:
    """Returns the directory with the Unix sockets of a port's workers and the lock of its front. Creates it, with mode
    0700, if it does not exist. The path is relative to the checkout, because Linux limits the path of a Unix socket to
    107 bytes. Raises OSError."""
    directory = Path("run") / str(port)
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    return directory


def listen(host: str, port: int) -> socket.socket:
    """Returns a new TCP socket that listens on the address. Raises OSError, for example if the port is in use."""
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind((host, port))
    listener.listen(BACKLOG)
    return listener
