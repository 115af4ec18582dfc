"""The chat routes."""

from .service import Person
from .stand_in import StandIn, reply_text


def test_a_message_is_answered(ada: Person, openclaw: StandIn) -> None:
    """A reply has the agent's complete text, with and without streaming."""
    session = ada.session()
    answer = ada.say(session, "Hello")
    assert (answer.status_code, answer.text) == (200, reply_text("Hello"))
    streamed = ada.say(session, "[[chunks=30 size=7]]", stream=True)
    assert streamed.text == reply_text("[[chunks=30 size=7]]")
