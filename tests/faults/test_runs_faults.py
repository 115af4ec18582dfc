"""Faults between a turn and the gateway: archived conversations, replies that the model's own limit ended."""

import pytest

from tests.service import Person, Served
from tests.stand_in import StandIn


def agent_key(session: dict[str, str]) -> str:
    """The gateway's name of a session's conversation."""
    return f"agent:main:openai-user:adapter-session-{session['session_key']}"


@pytest.mark.parametrize("stream", [False, True])
def test_an_archived_conversation_answers_the_next_message(ada: Person, openclaw: StandIn, stream: bool) -> None:
    """The gateway archives a conversation that was idle for 30 days, and then refuses every message with an internal
    error. It is restored, with its whole history, and the message is answered once."""
    session = ada.session()
    ada.say(session, "First")
    openclaw.archived.add(agent_key(session))
    answer = ada.say(session, "Second", stream=stream)
    assert (answer.status_code, answer.text) == (200, "You said: Second (message 2 of this conversation)")
    assert [request.text for request in openclaw.requests].count("Second") <= 2
    assert [run.text for run in openclaw.completed] == ["First", "Second"]
    assert len(ada.messages(session)) == 4


def test_an_internal_error_of_a_live_conversation_is_a_failure(ada: Person, openclaw: StandIn) -> None:
    """It stands for much else too: where the conversation is not archived, nothing is sent again."""
    session = ada.session()
    answer = ada.say(session, "[[status=500]]")
    assert (answer.status_code, answer.code) == (502, "gateway_error")
    assert len(openclaw.requests) == 1


def test_an_archived_conversation_fails_if_the_websocket_refuses(
    ada: Person, openclaw: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If its WebSocket refuses, the failure of the message itself is what the client sees."""
    session = ada.session()
    ada.say(session, "First")
    openclaw.archived.add(agent_key(session))
    monkeypatch.setattr(openclaw, "call", lambda *_: (_ for _ in ()).throw(OSError("on purpose")))
    assert ada.say(session, "Second").code == "gateway_error"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("reason", ["length", "content_filter"])
def test_a_reply_that_the_models_limit_ended_says_so(served: Served, ada: Person, stream: bool, reason: str) -> None:
    """It is complete, as far as it goes, and is not passed off as whole: in the answer, in the stream, in the
    messages, and when it is resumed."""
    session = ada.session()
    text = f"[[chunks=3 finish={reason}]]"
    if stream:
        with ada.listen(session, text) as (response, read):
            assert response.status_code == 200
            assert read.read().finish == reason
    else:
        answer = ada.say(session, text)
        assert (answer.status_code, answer.text != "") == (200, True)
        assert f'"finish_reason":"{reason}"' in answer.body.replace(" ", "")
    message = ada.messages(session)[-1]
    assert (message["status"], message["finish_reason"]) == ("complete", reason)
    with ada.resume(session, message["id"]) as resumed:
        assert resumed.read().finish == reason
    ada.say(session, "Next")
    assert ada.messages(session)[-1]["finish_reason"] == "stop"
    assert ada.messages(session)[0]["finish_reason"] is None
