"""What fronts and workers say to each other, and where they meet.

Each message is one packet of a Unix socket (SOCK_SEQPACKET), a JSON object. The other side may run older or newer
code, so a word that is not known here is ignored, and a word that stands here is never given another meaning.

A worker says:

| message | what follows |
|---|---|
| `pid` | The front knows which process to kill if the worker does not become ready. |
| `state: serving` | The worker takes connections. The front tells the other workers to retire. |
| `state: retiring` | The worker takes no new connections; it ends after its last reply and last reader. |
| `state: stopping` | The worker ends within `DRAIN_SECONDS`; a front that wants a worker starts another. |
| `state: replaced` | Another front has connected to the worker. This front exits. |
| `failure` | The reason why the worker did not start; the end of the connection follows. |
| `pid` and `state` | The worker's answer to a front that connects, with the file descriptors of its log |
| | and, if it serves, of the listening socket. The front takes over. |

A front says:

| message | what follows |
|---|---|
| `order: retire` | The worker becomes `retiring`. |
| `order: keep`, `failure` | Newer code did not start; `/health` shows the failure as `failed_start`. |
| `order: wait` | PM2 ended this front: the worker stops unless another front connects in SUCCESSOR_WITHIN s. |

The end of the connection means that a worker has died (`gone`). If a front has died, the worker stops unless another
front connects in REVIVAL_WITHIN s.
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


class FromWorker(TypedDict, total=False):
    """What a worker says: see the table above."""

    pid: int
    state: State
    failure: str


class FromFront(TypedDict, total=False):
    """What a front says: see the table above."""

    order: Order
    failure: str


def from_worker(packet: bytes) -> FromWorker:
    """Decodes a worker's packet, without what is not of this protocol. An empty packet is the worker's end."""
    if not packet:
        return {"state": "gone"}
    said = _decoded(packet)
    known: FromWorker = {}
    if isinstance(said.get("pid"), int):
        known["pid"] = said["pid"]
    if said.get("state") in get_args(State):
        known["state"] = said["state"]
    if isinstance(said.get("failure"), str):
        known["failure"] = said["failure"]
    return known


def from_front(packet: bytes) -> FromFront:
    """Decodes a front's packet, without what is not of this protocol."""
    said = _decoded(packet)
    known: FromFront = {}
    if said.get("order") in get_args(Order):
        known["order"] = said["order"]
    if isinstance(said.get("failure"), str):
        known["failure"] = said["failure"]
    return known


def _decoded(packet: bytes) -> dict[str, Any]:
    try:
        said = json.loads(packet)
    except ValueError:
        return {}
    return said if isinstance(said, dict) else {}


def send(channel: socket.socket, message: FromWorker | FromFront, fds: Sequence[int] = ()) -> None:
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
