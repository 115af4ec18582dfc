"""Fixtures of the tests with OpenClaw: a model provider, gateways and services, shared where no test stops them."""

import signal
from collections.abc import Iterator

import pytest

from tests.service import Person, Service

from .gateway import Gateway, OpenClaw
from .model_provider import ModelProvider


def pytest_sessionstart() -> None:
    """Fails the run if OpenClaw is not installed, and says how to install it. The tests are never skipped."""
    try:
        OpenClaw.of_environment()
    except LookupError as missing:
        raise pytest.UsageError(str(missing)) from None
    # A CI job that is stopped receives SIGTERM. As with Ctrl-C, the fixtures must then stop their gateways.
    signal.signal(signal.SIGTERM, signal.default_int_handler)


@pytest.fixture(scope="session")
def openclaw() -> OpenClaw:
    """The installed OpenClaw."""
    return OpenClaw.of_environment()


@pytest.fixture(scope="session")
def provider() -> Iterator[ModelProvider]:
    """The model provider behind every gateway."""
    with ModelProvider() as provider:
        yield provider


@pytest.fixture(scope="session")
def gateway(openclaw: OpenClaw, provider: ModelProvider, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    """A gateway that no test stops."""
    with Gateway(openclaw, tmp_path_factory.mktemp("gateway"), provider.url) as gateway:
        yield gateway


@pytest.fixture(scope="session")
def _mortal_gateway(
    openclaw: OpenClaw, provider: ModelProvider, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Gateway]:
    with Gateway(openclaw, tmp_path_factory.mktemp("mortal_gateway"), provider.url) as gateway:
        yield gateway


@pytest.fixture
def mortal_gateway(_mortal_gateway: Gateway) -> Gateway:
    """A running gateway that the test may stop. It is started again for the next test."""
    _mortal_gateway.start()
    return _mortal_gateway


@pytest.fixture(scope="session")
def closed_gateway(
    openclaw: OpenClaw, provider: ModelProvider, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Gateway]:
    """A gateway whose chat endpoint is disabled, which is OpenClaw's default."""
    home = tmp_path_factory.mktemp("closed_gateway")
    with Gateway(openclaw, home, provider.url, endpoint=False) as gateway:
        yield gateway


@pytest.fixture(scope="session")
def service(gateway: Gateway, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """A service that no test stops."""
    with Service(tmp_path_factory.mktemp("service"), gateway.url, gateway.token) as service:
        yield service


@pytest.fixture
def person(service: Service) -> Iterator[Person]:
    """A new user of the shared service."""
    with service.person() as person:
        yield person
