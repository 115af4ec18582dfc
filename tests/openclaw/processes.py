"""What the gateway and the service have in common: they are processes that the tests start and wait for."""

import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import pytest

T = TypeVar("T")


def free_port() -> int:
    """A loopback port that nobody listens on at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def until(look: Callable[[], T | None], seconds: float, what: str) -> T:
    """The first value of `look()` that is true. Fails the test, naming `what`, when none comes in time."""
    deadline = time.monotonic() + seconds
    while True:
        if value := look():
            return value
        if time.monotonic() > deadline:
            pytest.fail(f"waited {seconds:g} s in vain for {what}")
        time.sleep(0.05)


def tail(log: Path, characters: int = 4000) -> str:
    """The end of a process's output, for the message of a failure."""
    return log.read_text(errors="replace")[-characters:] if log.exists() else "(no output)"
