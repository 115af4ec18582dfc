"""Deletes reach the gateway, even if it is down at that moment."""

import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.service import JSON, Person, Service, until

from .gateway import Gateway, session_of
from .model_provider import ModelProvider


def delete_session(person: Person, session: JSON) -> None:
    """Deletes a session by its own route."""
    person.delete(f"/sessions/{session['id']}")


def delete_session_of_project(person: Person, session: JSON) -> None:
    """Deletes a session by the route below its project."""
    person.delete(f"/projects/{session['project_id']}/sessions/{session['id']}")


def delete_project(person: Person, session: JSON) -> None:
    """Deletes a session with its project."""
    person.delete(f"/projects/{session['project_id']}")


def delete_account(person: Person, session: JSON) -> None:
    """Deletes a session with its user's account."""
    person.delete("/auth/me", password=person.password)


every_way = pytest.mark.parametrize(
    "delete", [delete_session, delete_session_of_project, delete_project, delete_account]
)


@every_way
def test_the_gateways_session_is_deleted_too(
    gateway: Gateway, person: Person, delete: Callable[[Person, JSON], None]
) -> None:
    """After the delete of a session, project or account, `sessions.list` does not contain the conversation."""
    kept, deleted = person.session(), person.session()
    for session in (kept, deleted):
        assert person.say(session, "MARK-delete").status_code == 200
    assert session_of(deleted["session_key"]) in gateway.sessions()
    delete(person, deleted)
    until(lambda: session_of(deleted["session_key"]) not in gateway.sessions(), 30, "the session to be gone")
    if delete is delete_account:
        until(lambda: session_of(kept["session_key"]) not in gateway.sessions(), 30, "the other to be gone")
    else:
        assert session_of(kept["session_key"]) in gateway.sessions()


def test_a_running_reply_is_stopped_before_its_session_is_deleted(
    gateway: Gateway, provider: ModelProvider, person: Person
) -> None:
    """The agent's run is aborted, and does not create the session in the gateway again."""
    session = person.session()
    with person.listen(session, "MARK-deleterun SLOW-200") as (_, stream):
        stream.read(to_first_text=True)
        person.delete(f"/sessions/{session['id']}")
        until(lambda: provider.run("deleterun").state == "aborted", 10, "the model's run to be aborted")
        stream.read()
    assert stream.done
    until(lambda: session_of(session["session_key"]) not in gateway.sessions(), 30, "the session to be gone")


def test_deleting_does_not_wait_for_a_gateway_that_is_down(mortal_gateway: Gateway, tmp_path: Path) -> None:
    """The delete is answered at once. The gateway's session is deleted when the gateway is back, even if the service
    was restarted in between."""
    with (
        Service(tmp_path, mortal_gateway.url, mortal_gateway.token) as service,
        service.person() as person,
    ):
        before, across = person.session(), person.session()
        for session in (before, across):
            assert person.say(session, "MARK-outbox").status_code == 200
        mortal_gateway.stop()
        started = time.monotonic()
        person.delete(f"/sessions/{before['id']}")
        person.delete(f"/sessions/{across['id']}")
        # A delete that waited for the gateway would not be answered at all, because the gateway is down.
        assert time.monotonic() - started < 5
        service.kill()
        service.start()
        mortal_gateway.start()
        keys = {session_of(session["session_key"]) for session in (before, across)}
        until(lambda: not keys & set(mortal_gateway.sessions()), 90, "both sessions to be gone")
