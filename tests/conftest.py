"""Shared fixtures: a stand-in for OpenClaw, the real app in front of it, and users of the app."""

from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr

from settings import Settings

from .service import Person, Served, free_port
from .stand_in import StandIn


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Replaces lone surrogates, which some tests log on purpose, because pytest-xdist cannot send a report that
    contains them."""
    report = yield
    report.sections = [(name, text.encode(errors="backslashreplace").decode()) for name, text in report.sections]
    return report


@pytest.fixture
def openclaw() -> Iterator[StandIn]:
    """A stand-in gateway for one test."""
    with StandIn(free_port()) as gateway:
        yield gateway


@pytest.fixture
def settings(tmp_path: Path, openclaw: StandIn) -> Settings:
    """Settings with a database and directories for one test. They do not depend on the environment or a `.env`."""
    return make_settings(tmp_path, openclaw)


def make_settings(directory: Path, openclaw: StandIn, **changes: Any) -> Settings:
    """Returns settings for an app in `directory` in front of the gateway `openclaw`."""
    usual: dict[str, Any] = {
        "db_path": directory / "service.db",
        "clawdbot_base_url": openclaw.url,
        "clawdbot_token": SecretStr(openclaw.token),
        "jwt_secret": SecretStr("a secret of the tests, long enough"),
        "drain_seconds": 0.2,
        "log_level": "DEBUG",
    }
    return Settings.model_validate({**usual, **changes})


@pytest.fixture
def serve(tmp_path: Path, openclaw: StandIn) -> Iterator[Callable[..., Served]]:
    """A function that starts the app, with `changes` to the usual settings. The app is stopped after the test."""
    with ExitStack() as stack:

        def start(**changes: Any) -> Served:
            return stack.enter_context(Served(make_settings(tmp_path, openclaw, **changes)))

        yield start


@pytest.fixture
def served(serve: Callable[..., Served]) -> Served:
    """The app with the usual settings."""
    return serve()


@pytest.fixture
def ada(served: Served) -> Iterator[Person]:
    """A signed-up user."""
    with served.person() as person:
        yield person


@pytest.fixture
def bob(served: Served) -> Iterator[Person]:
    """Another signed-up user."""
    with served.person() as person:
        yield person
