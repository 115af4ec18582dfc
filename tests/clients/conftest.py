"""What the tests of clients share: the programs that run them."""

import os
from pathlib import Path

import pytest


def pytest_sessionstart() -> None:
    """Without its programs the suite fails at once and says what to do; it is never skipped."""
    if "CLIENTS_NODE_BIN" not in os.environ:
        raise pytest.UsageError("CLIENTS_NODE_BIN is not set: run ./tests/run --clients, which installs Node")


@pytest.fixture(scope="session")
def node() -> Path:
    """The program `node`."""
    return Path(os.environ["CLIENTS_NODE_BIN"]) / "node"
