"""Exception classes, error codes, and the HTTP responses that the app makes of them."""

import inspect
from collections.abc import Iterator

import httpx
import pytest

import errors
import web
from errors import AppError, GatewayError

from .conftest import make_settings
from .service import Served
from .stand_in import StandIn

CLASSES = [kind for _, kind in inspect.getmembers(errors, inspect.isclass) if issubclass(kind, AppError)]
STATUSES = {
    400: "invalid_path invalid_image invalid_request no_user_message",
    401: "unauthorized invalid_credentials",
    403: "signup_closed",
    404: "project_not_found session_not_found message_not_found image_not_found file_not_found",
    409: "email_taken",
    413: "image_too_large file_too_large",
    415: "unsupported_image",
    422: "idempotency_key_reused",
    429: "too_many_attempts session_busy",
    500: "internal_error",
    502: "gateway_error gateway_auth gateway_endpoint_disabled gateway_incomplete",
    503: "database_unavailable disk_unavailable not_ready gateway_unavailable interrupted",
    504: "gateway_timeout",
}
STATUS = {code: status for status, codes in STATUSES.items() for code in codes.split()}
ODD = "A sentence with “quotes”, é, \N{GRINNING FACE} and \u2028."


def error_of(kind: type[AppError], code: str | None = None, *, more: bool = False) -> AppError:
    """Returns an error of this class; with `more`, it also has `retry_after` and `message_id`."""
    retry_after, message_id = (7, 12) if more else (None, None)
    if issubclass(kind, GatewayError):
        return kind(ODD, retryable=True, code=code, retry_after=retry_after, message_id=message_id)
    return kind(ODD, code=code, retry_after=retry_after, message_id=message_id)


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """A client of an app with routes that raise every code and class."""

    async def raise_code(code: str, more: bool = False) -> None:
        raise error_of(errors.CODES[code], code, more=more)

    async def raise_class(name: str) -> None:
        raise error_of(getattr(errors, name))

    with StandIn() as gateway:
        served = Served(make_settings(tmp_path_factory.mktemp("errors"), gateway))
        served.app.add_api_route("/codes/{code}", raise_code)
        served.app.add_api_route("/classes/{name}", raise_class)
        with served, httpx.Client(base_url=served.url, timeout=60, trust_env=False) as client:
            yield client


def test_every_code_is_known_here() -> None:
    """`errors.CODES` has exactly the documented codes."""
    assert set(errors.CODES) == set(STATUS)


@pytest.mark.parametrize("code", STATUS)
def test_a_code_has_its_status_shape_and_headers(broken: httpx.Client, code: str) -> None:
    """An error has its documented status, exactly `detail` and `code`, and the headers that its status requires."""
    answer = broken.get(f"/codes/{code}")
    assert answer.status_code == STATUS[code]
    assert answer.json() == {"detail": ODD, "code": code}
    assert answer.headers.get("WWW-Authenticate") == ("Bearer" if answer.status_code == 401 else None)
    assert ("Retry-After" in answer.headers) == (answer.status_code in (429, 503))
    assert int(answer.headers.get("Retry-After", 1)) >= 1
    assert answer.headers["X-Request-ID"]


@pytest.mark.parametrize("code", STATUS)
def test_an_error_carries_when_and_what(broken: httpx.Client, code: str) -> None:
    """`retry_after` becomes the header `Retry-After`; body and header name the reply that has the text received so
    far."""
    answer = broken.get(f"/codes/{code}", params={"more": "true"})
    assert answer.status_code == STATUS[code]
    assert answer.json() == {"detail": ODD, "code": code, "message_id": 12}
    assert (answer.headers["Retry-After"], answer.headers["X-Message-Id"]) == ("7", "12")


@pytest.mark.parametrize("kind", CLASSES, ids=[kind.__name__ for kind in CLASSES])
def test_every_class_has_a_status_of_its_kind(broken: httpx.Client, kind: type[AppError]) -> None:
    """An error raised without a code has the code and status of its class."""
    answer = broken.get(f"/classes/{kind.__name__}")
    assert answer.json() == {"detail": ODD, "code": kind.code}
    assert answer.status_code == web.STATUSES[kind]
    assert (answer.status_code >= 500) == issubclass(kind, GatewayError | errors.Unavailable) or kind is AppError


@pytest.mark.parametrize("code", STATUS)
def test_a_stored_failure_comes_back_as_it_was(code: str) -> None:
    """A failure that was stored with a reply becomes an exception with the same code, text and message id."""
    error = errors.failure(code, ODD, False, 12)
    assert (error.code, error.message, error.message_id, str(error)) == (code, ODD, 12, ODD)
    if issubclass(errors.CODES[code], GatewayError):
        assert type(error) is errors.CODES[code]
        assert isinstance(error, GatewayError) and not error.retryable
    else:
        assert type(error) is AppError


def test_a_failure_of_an_unknown_code_is_still_one() -> None:
    """A code that another version of the service stored is kept, in an AppError."""
    error = errors.failure("gateway_exploded", ODD, True)
    assert (type(error), error.code, error.message_id) == (AppError, "gateway_exploded", None)


def test_the_gateways_codes_are_those_of_its_classes() -> None:
    """The codes with which a turn can fail are those of the gateway."""
    assert set(errors.GATEWAY_CODES) == {code for code in STATUS if code.startswith("gateway_")} | {"interrupted"}
