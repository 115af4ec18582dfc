"""What the tests share: a stand-in for OpenClaw, the real app in front of it, and a person who uses it."""

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
    """pytest-xdist cannot send a report with half a character in it, which some tests log on purpose."""
    report = yield
    report.sections = [(name, text.encode(errors="backslashreplace").decode()) for name, text in report.sections]
    return report


@pytest.fixture
def openclaw() -> Iterator[StandIn]:
    """A gateway of the test's own."""
    with StandIn(free_port()) as gateway:
        yield gateway


@pytest.fixture
def settings(tmp_path: Path, openclaw: StandIn) -> Settings:
    """Settings with a database and folders of the test's own, which heed no environment and no `.env`."""
    return make_settings(tmp_path, openclaw)


def make_settings(directory: Path, openclaw: StandIn, **changes: Any) -> Settings:
    """Settings for an app in that directory, in front of that gateway."""
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
    """Starts the app, with settings that differ from the usual ones as told, and stops it after the test."""
    with ExitStack() as stack:

        def start(**changes: Any) -> Served:
            return stack.enter_context(Served(make_settings(tmp_path, openclaw, **changes)))

        yield start


@pytest.fixture
def served(serve: Callable[..., Served]) -> Served:
    """The app on the usual settings."""
    return serve()


@pytest.fixture
def ada(served: Served) -> Iterator[Person]:
    """A user."""
    with served.person() as person:
        yield person


@pytest.fixture
def bob(served: Served) -> Iterator[Person]:
    """Another user."""
    with served.person() as person:
        yield person
