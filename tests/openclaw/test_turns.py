"""Turns with a real gateway: closed tabs, stops, queues, silence and crashes."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.service import Person, Service, until

from .gateway import Gateway
from .model_provider import ModelProvider

# Seconds after the next start within which a turn that a crash left is final; docs/reliability.md promises this.
SETTLED = 15


@pytest.fixture
def mortal(gateway: Gateway, tmp_path: Path) -> Iterator[Service]:
    """A service that a test may kill."""
    with Service(tmp_path, gateway.url, gateway.token) as service:
        yield service


def test_a_closed_tab_changes_nothing(provider: ModelProvider, person: Person) -> None:
    """If the client disconnects after the first frame, the run continues and the whole reply is stored."""
    session = person.session()
    with person.listen(session, "MARK-cut SLOW-60") as (_, stream):
        stream.read(to_first_text=True)
    assert provider.run("cut").state == "running"
    reply = until(lambda: person.reply(session, "complete"), 20, "the reply to be complete")
    run = provider.run("cut")
    assert reply["content"] == run.sent
    assert run.sent.endswith(" w60")
    assert run.state == "finished"


def test_stop_aborts_the_run_and_keeps_its_text(provider: ModelProvider, person: Person) -> None:
    """A stop aborts the agent's run within about a second and keeps the text; the conversation continues."""
    session = person.session()
    with person.listen(session, "MARK-stop SLOW-200") as (_, stream):
        stream.read(to_first_text=True)
        assert person.stop(session) is True
        # One second is the service's promise; the other one is for the gateway to abort the model's run.
        until(lambda: provider.run("stop").state == "aborted", 2, "the model's run to be aborted")
        stream.read()
    assert (stream.finish, stream.done) == ("stopped", True)
    reply = until(lambda: person.reply(session, "stopped"), 5, "the reply to be stopped")
    assert reply["content"] == stream.text
    assert stream.text.startswith("seen: stop")
    assert provider.run("stop").sent.startswith(stream.text)
    assert person.stop(session) is False
    assert person.say(session, "MARK-afterstop").text == "seen: stop,afterstop"


def test_stop_ends_a_silent_run(provider: ModelProvider, person: Person) -> None:
    """A run that has produced no text is stopped just as fast, and a request that waits for the reply is answered."""
    session = person.session()
    with ThreadPoolExecutor(1) as pool:
        send = pool.submit(person.say, session, "MARK-hush SILENT-60")
        until(lambda: provider.of("hush"), 30, "the model to be asked")
        assert person.stop(session) is True
        until(lambda: provider.run("hush").state == "aborted", 2, "the model's run to be aborted")
        answer = send.result()
    assert (answer.status_code, answer.text) == (200, ""), answer.body
    reply = until(lambda: person.reply(session, "stopped"), 5, "the reply to be stopped")
    assert (reply["content"], reply["error"]) == ("", None)


def test_four_sends_at_once_take_their_turns(provider: ModelProvider, person: Person) -> None:
    """Four concurrent messages are all answered, one after the other; the gateway itself would refuse some."""
    session = person.session()
    with ThreadPoolExecutor(4) as pool:
        sends = [pool.submit(person.say, session, f"MARK-turn{n} SLOW-5", stream=n % 2 == 0) for n in range(4)]
        answers = [send.result() for send in sends]
    assert [answer.status_code for answer in answers] == [200] * 4, [answer.body for answer in answers]
    messages = person.messages(session)
    assert [message["role"] for message in messages] == ["user", "assistant"] * 4
    assert {message["status"] for message in messages} == {"complete"}
    asked = [message["content"].split()[0].removeprefix("MARK-") for message in messages[::2]]
    assert sorted(asked) == ["turn0", "turn1", "turn2", "turn3"]
    for number, reply in enumerate(messages[1::2]):
        assert reply["content"].startswith(f"seen: {','.join(asked[: number + 1])} w1")


def test_twenty_seconds_of_silence_are_delivered(person: Person) -> None:
    """The reply of an agent that is silent for 20 s is delivered; comments keep the connection open until then."""
    with person.listen(person.session(), "MARK-silent SILENT-20") as (_, stream):
        stream.read()
    assert (stream.text, stream.finish) == ("seen: silent", "stop")
    assert stream.comments > 0
    # At most 15 s between two writes (the limit of PING_SECONDS), and a second for a loaded machine.
    assert stream.longest_gap < 16


def test_a_reply_that_outlived_the_service_is_taken_from_the_gateway(
    mortal: Service, gateway: Gateway, provider: ModelProvider
) -> None:
    """A reply that the gateway finished while the service was frozen is completed from the gateway's history."""
    with mortal.person() as person:
        session = person.session()
        person.say(session, "MARK-before")
        with person.listen(session, "MARK-outlived SLOW-40") as (_, stream):
            stream.read(to_first_text=True)
            mortal.freeze()
            until(lambda: provider.run("outlived").state == "finished", 30, "the model to finish")
            sent = provider.run("outlived").sent
            key = session["session_key"]
            until(
                lambda: (gateway.idle_history(key) or [("", "")])[-1] == ("assistant", sent),
                30,
                "the gateway to have stored the reply",
            )
            mortal.kill()
        mortal.start()
        reply = until(lambda: person.reply(session, "complete", "interrupted", "failed"), SETTLED, "the reply's end")
        assert (reply["status"], reply["content"], reply["error"]) == ("complete", sent, None)
        assert person.say(session, "MARK-afterlife").text == "seen: before,outlived,afterlife"


def test_a_reply_that_died_with_the_service_is_interrupted(mortal: Service, provider: ModelProvider) -> None:
    """After kill -9 during a reply, the reply keeps its text and is `interrupted`; the next message is answered."""
    with mortal.person() as person:
        session = person.session()
        with person.listen(session, "MARK-died SLOW-100") as (_, stream):
            stream.read(to_first_text=True)
            until(lambda: " w20" in provider.run("died").sent, 30, "twenty words")
            mortal.kill()
        until(lambda: provider.run("died").state == "aborted", 10, "the model's run to be aborted")
        mortal.start()
        reply = until(lambda: person.reply(session, "complete", "interrupted", "failed"), SETTLED, "the reply's end")
        assert (reply["status"], reply["error"]["code"]) == ("interrupted", "interrupted")
        assert reply["content"].startswith("seen: died w1")
        assert provider.run("died").sent.startswith(reply["content"])
        assert person.say(session, "MARK-afterdeath").text == "seen: died,afterdeath"
