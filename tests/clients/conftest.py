"""Fixtures of the client tests: the programs that run the clients."""

import os
from pathlib import Path

import pytest


def pytest_sessionstart() -> None:
    """Fails the run if Node is not installed, and says how to install it. The tests are never skipped."""
    if "CLIENTS_NODE_BIN" not in os.environ:
        raise pytest.UsageError("CLIENTS_NODE_BIN is not set: run ./tests/run --clients, which installs Node")


@pytest.fixture(scope="session")
def node() -> Path:
    """The program `node`."""
    return Path(os.environ["CLIENTS_NODE_BIN"]) / "node"
