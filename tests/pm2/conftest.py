"""Fixtures of the tests under PM2: each test has its own daemon, copy of this checkout, and user."""

import signal
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.checkout import Checkout
from tests.service import NO_TLS, Person, until
from tests.stand_in import StandIn

from .pm2 import PM2


def pytest_sessionstart() -> None:
    """Fails immediately and names the command that installs PM2 if it is missing, instead of skipping the tests."""
    try:
        PM2(Path())
    except LookupError as missing:
        raise pytest.UsageError(str(missing)) from None
    signal.signal(signal.SIGTERM, signal.default_int_handler)


@pytest.fixture
def pm2(tmp_path: Path) -> Iterator[PM2]:
    """A PM2 daemon for one test."""
    home = tmp_path / "home"
    home.mkdir()
    with PM2(home) as pm2:
        yield pm2


@pytest.fixture
def checkout(tmp_path: Path, openclaw: StandIn) -> Iterator[Checkout]:
    """A copy of this checkout on `main`, with a space in its path. Waits for the end of its workers after the test."""
    settings = {
        "CLAWDBOT_BASE_URL": openclaw.url,
        "CLAWDBOT_TOKEN": openclaw.token,
        "JWT_SECRET": "a secret of the tests, long enough",
    }
    checkout = Checkout(tmp_path / "a checkout", settings)
    yield checkout
    until(lambda: not checkout.workers(), 30, "the end of the workers")


@pytest.fixture
def running(pm2: PM2, checkout: Checkout) -> Iterator[PM2]:
    """The daemon, which runs the production service until the end of the test."""
    pm2.do("start", "ecosystem.backend.json", "--only", "clawd-backend", cwd=checkout.path)
    yield pm2
    pm2("delete", "all")


@pytest.fixture
def ada(running: PM2, checkout: Checkout) -> Iterator[Person]:
    """A user of the production service, whose client opens a new connection for each request."""
    limits = httpx.Limits(max_keepalive_connections=0)
    with httpx.Client(base_url=checkout.url, timeout=60, trust_env=False, verify=NO_TLS, limits=limits) as http:
        yield Person(http)
