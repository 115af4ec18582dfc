"""The errors that users receive if the gateway fails or refuses, and that no answer or log line contains its token."""

import secrets
from pathlib import Path

import pytest

from tests.service import JSON, Person, Service, until

from .gateway import Gateway

either_way = pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])


def refused(service: Service, token: str, stream: bool, status_code: int, code: str, *, agent: str = "main") -> None:
    """Sends a message and checks that answer and stored reply have this error, and that nothing contains the token."""
    with service.person() as person:
        talk = person.session(agent_id=agent)
        answer = person.say(talk, "MARK-refused", stream=stream)
        assert (answer.status_code, answer.code) == (status_code, code), answer.body
        failed = person.reply(talk, "failed")
        assert failed is not None, person.messages(talk)
        assert (failed["content"], failed["error"]["code"]) == ("", code)
        assert status_code != 503 or "Retry-After" in answer.headers
        texts = [answer.body, str(answer.headers), str(failed), person.ready().text, service.output()]
        assert not [text for text in texts if token in text]


def said_or_refused_for_now(person: Person, session: JSON, text: str) -> str | None:
    """Sends a message. Returns the reply, or None after a `gateway_error` that is retryable."""
    answer = person.say(session, text)
    if answer.status_code == 200:
        return answer.text
    failed = person.reply(session, "failed")
    assert failed is not None, answer.body
    assert (failed["error"]["code"], failed["error"]["retryable"]) == ("gateway_error", True)
    return None


@either_way
def test_a_wrong_token_is_gateway_auth(gateway: Gateway, tmp_path: Path, stream: bool) -> None:
    """A wrong token, to which the gateway answers 401, gives `gateway_auth`, without that token in any text."""
    wrong = secrets.token_hex(24)
    with Service(tmp_path, gateway.url, wrong) as service:
        # The gateway delays its answer after each wrong token; a request with the right one resets the delay.
        assert gateway.models(gateway.token) == 200
        refused(service, wrong, stream, 502, "gateway_auth")


@either_way
def test_an_unknown_agent_is_gateway_error(gateway: Gateway, service: Service, stream: bool) -> None:
    """An agent that the gateway does not have, to which it answers 400, gives `gateway_error`."""
    refused(service, gateway.token, stream, 502, "gateway_error", agent="nope")


@either_way
def test_a_closed_endpoint_is_gateway_endpoint_disabled(closed_gateway: Gateway, tmp_path: Path, stream: bool) -> None:
    """A chat endpoint that is not enabled, to which the gateway answers 404, gives `gateway_endpoint_disabled`."""
    with Service(tmp_path, closed_gateway.url, closed_gateway.token) as service:
        refused(service, closed_gateway.token, stream, 502, "gateway_endpoint_disabled")


def test_a_stopped_gateway_is_gateway_unavailable_until_it_is_back(mortal_gateway: Gateway, tmp_path: Path) -> None:
    """A gateway that stops during a reply gives `gateway_incomplete`, and `gateway_unavailable` while it is down. When
    it is up again, the conversation continues."""
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
        # A gateway that was killed during a run resumes the run when it starts, and may refuse messages meanwhile.
        text = until(lambda: said_or_refused_for_now(person, session, "MARK-back"), 120, "a reply")
        assert text.startswith("seen: calm,")
        assert text.endswith("back")


def test_the_token_is_nowhere_in_the_log_of_a_working_service(
    gateway: Gateway, service: Service, person: Person
) -> None:
    """Without failures, the log contains neither the gateway's token nor the user's."""
    assert person.say(person.session(), "MARK-quiet", stream=True).text == "seen: quiet"
    assert gateway.token not in service.output()
    assert person.token not in service.output()
