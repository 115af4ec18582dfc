"""What a person is told when the gateway cannot or will not answer, and that its token is never told."""

import secrets
from pathlib import Path

import pytest

from tests.service import JSON, Person, Service, until

from .gateway import Gateway

either_way = pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])


def refused(service: Service, token: str, stream: bool, status_code: int, code: str, *, agent: str = "main") -> None:
    """Says one message and holds that it is refused just so, everywhere and without telling the token."""
    with service.person() as person:
        talk = person.session(agent_id=agent)
        answer = person.say(talk, "MARK-refused", stream=stream)
        assert (answer.status_code, answer.code) == (status_code, code), answer.body
        failed = person.reply(talk, "failed")
        assert failed is not None, person.messages(talk)
        assert (failed["content"], failed["error"]["code"]) == ("", code)
        assert status_code != 503 or "Retry-After" in answer.headers
        told = [answer.body, str(answer.headers), str(failed), person.ready().text, service.output()]
        assert not [text for text in told if token in text]


def said_or_refused_for_now(person: Person, session: JSON, text: str) -> str | None:
    """The reply to a message; None where it failed in such a way that it may be sent again."""
    answer = person.say(session, text)
    if answer.status_code == 200:
        return answer.text
    failed = person.reply(session, "failed")
    assert failed is not None, answer.body
    assert (failed["error"]["code"], failed["error"]["retryable"]) == ("gateway_error", True)
    return None


@either_way
def test_a_wrong_token_is_gateway_auth(gateway: Gateway, tmp_path: Path, stream: bool) -> None:
    """The gateway answers 401: a status, not a reply, and the wrong token is not told either."""
    wrong = secrets.token_hex(24)
    with Service(tmp_path, gateway.url, wrong) as service:
        # Each wrong token makes the gateway slower to refuse the next; a right one ends that.
        assert gateway.models(gateway.token) == 200
        refused(service, wrong, stream, 502, "gateway_auth")


@either_way
def test_an_unknown_agent_is_gateway_error(gateway: Gateway, service: Service, stream: bool) -> None:
    """The gateway answers 400 to an agent that it does not have."""
    refused(service, gateway.token, stream, 502, "gateway_error", agent="nope")


@either_way
def test_a_closed_endpoint_is_gateway_endpoint_disabled(closed_gateway: Gateway, tmp_path: Path, stream: bool) -> None:
    """The gateway answers 404 as long as its operator has not switched the endpoint on."""
    with Service(tmp_path, closed_gateway.url, closed_gateway.token) as service:
        refused(service, closed_gateway.token, stream, 502, "gateway_endpoint_disabled")


def test_a_stopped_gateway_is_gateway_unavailable_until_it_is_back(mortal_gateway: Gateway, tmp_path: Path) -> None:
    """Cut in mid-reply, refused while it is away, and the same conversation again as soon as it is back."""
    with (
        Service(tmp_path, mortal_gateway.url, mortal_gateway.token) as service,
        service.person() as person,
    ):
        session = person.session()
        assert person.say(session, "MARK-calm").text == "seen: calm"
        with person.listen(session, "MARK-storm SLOW-100") as (_, stream):
            stream.read(to_first_text=True)
            mortal_gateway.stop()
            stream.read()
        assert (stream.finish, stream.done) == ("error", True)
        assert stream.frames[-1]["error"]["code"] == "gateway_incomplete"
        broken = person.reply(session, "failed")
        assert broken is not None, person.messages(session)
        assert (broken["content"], broken["error"]["code"]) == (stream.text, "gateway_incomplete")
        for stream_it in (False, True):
            refused(service, mortal_gateway.token, stream_it, 503, "gateway_unavailable")
        mortal_gateway.start()
        # A gateway that was killed in a run takes it up again by itself, and may refuse a message meanwhile.
        text = until(lambda: said_or_refused_for_now(person, session, "MARK-back"), 120, "a reply")
        assert text.startswith("seen: calm,")
        assert text.endswith("back")


def test_the_token_is_nowhere_in_the_log_of_a_working_service(
    gateway: Gateway, service: Service, person: Person
) -> None:
    """Neither the gateway's token nor the user's own is written down by what works."""
    assert person.say(person.session(), "MARK-quiet", stream=True).text == "seen: quiet"
    assert gateway.token not in service.output()
    assert person.token not in service.output()
