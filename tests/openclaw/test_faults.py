"""Faults with a real gateway: archived conversations, drains, replies that are cut off, and many stops."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from functools import partial
from typing import TypeVar
from uuid import uuid4

import pytest

import errors
from clock import iso_time
from gateway import Chunk, build_request
from gateway import Gateway as Client
from tests.service import Person, until

from .gateway import Gateway, session_of
from .model_provider import ModelProvider, Run

T = TypeVar("T")


def with_client(gateway: Gateway, work: Callable[[Client], Awaitable[T]]) -> T:
    """What `work` returns, which gets the service's client of this gateway."""

    async def run() -> T:
        client = Client(gateway.url, gateway.token, silence=60)
        client.open()
        try:
            return await work(client)
        finally:
            await client.close()

    return asyncio.run(run())


async def say(client: Client, key: str, text: str, chunks: list[Chunk] | None = None) -> str:
    """The text of the reply to a message in the conversation `key`. `chunks` collects what arrives."""
    collected = [] if chunks is None else chunks
    request = build_request(agent_id="main", session_key=key, project=("P", None, "/"), text=text, images=[])
    async for chunk in client.stream(request):
        collected.append(chunk)
    return "".join(chunk.text for chunk in collected)


def archive(gateway: Gateway, key: str) -> None:
    """Archives a conversation as an operator does, and as the gateway's maintenance does after 30 days."""
    session_id = gateway.rpc("sessions.describe", {"key": session_of(key)})["session"]["sessionId"]
    gateway.rpc("sessions.patch", {"key": session_of(key), "archived": True, "expectedSessionId": session_id})


def test_an_archived_conversation_is_restored_with_its_history(gateway: Gateway) -> None:
    """The gateway refuses each message of an archived conversation with `internal error`; restoring it ends that."""
    key = str(uuid4())

    async def restore(client: Client) -> str:
        assert await client.restore("main", key) is False
        await say(client, key, "MARK-kept")
        archive(gateway, key)
        with pytest.raises(errors.GatewayError) as caught:
            await say(client, key, "MARK-refused")
        assert caught.value.code == "gateway_error"
        assert await client.restore("main", key) is True
        assert await client.restore("main", key) is False
        return await say(client, key, "MARK-back")

    assert with_client(gateway, restore) == "seen: kept,back"


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_an_archived_conversation_answers_the_next_message(gateway: Gateway, person: Person, stream: bool) -> None:
    """The user notices nothing of the archive: the message is answered, and the agent knows the earlier ones."""
    session = person.session()
    person.say(session, "MARK-early")
    archive(gateway, session["session_key"])
    assert person.say(session, "MARK-late", stream=stream).text == "seen: early,late"
    assert {message["status"] for message in person.messages(session)} == {"complete"}


def test_a_reply_that_the_budget_cut_says_so(gateway: Gateway) -> None:
    """`finish_reason` is `length` in the stream and in what is recovered from the history."""
    key, chunks, since = str(uuid4()), list[Chunk](), iso_time(time.time())

    async def ask(client: Client) -> None:
        assert await say(client, key, "MARK-budget LENGTH-1", chunks) == "seen: budget"
        assert chunks[-1].finish_reason == "length"
        found = await client.finished_reply(
            "main", key, asked="MARK-budget LENGTH-1", run_id=None, known=set(), got="", since=since
        )
        assert found is not None
        assert (found.text, found.complete, found.finish_reason) == ("seen: budget", True, "length")
        assert found.run_id == chunks[-1].run_id

    with_client(gateway, ask)


def test_what_the_agent_is_writing_can_be_read(gateway: Gateway, provider: ModelProvider) -> None:
    """While a run is in flight, its history gives the text so far, with and without its run id."""
    key, chunks, since = str(uuid4()), list[Chunk](), iso_time(time.time())
    text = "MARK-writing SLOW-60"

    async def ask(client: Client) -> None:
        reading = asyncio.create_task(say(client, key, text, chunks))
        while sum(len(chunk.text) for chunk in chunks) < 40:  # noqa: ASYNC110 - the list has no event to wait for
            await asyncio.sleep(0.05)
        got = "".join(chunk.text for chunk in chunks)
        for run_id in (chunks[-1].run_id, None):
            found = await client.finished_reply(
                "main", key, asked=text, run_id=run_id, known=set(), got=got[:20], since=since
            )
            assert found is not None and (found.complete, found.run_id) == (False, chunks[-1].run_id)
            assert len(found.text) > 20 and provider.run("writing").sent.startswith(found.text)
        await reading

    with_client(gateway, ask)


def test_a_drain_is_told_from_a_failure(mortal_gateway: Gateway) -> None:
    """A gateway that drains refuses messages, health checks and the WebSocket as unavailable; what runs goes on."""

    async def drain(client: Client) -> None:
        await say(client, str(uuid4()), "MARK-warm")
        assert (await client.check(0)).websocket.ok
        chunks: list[Chunk] = []
        reading = asyncio.create_task(say(client, str(uuid4()), "MARK-drained SLOW-200", chunks))
        while not any(chunk.text for chunk in chunks):  # noqa: ASYNC110 - the list has no event to wait for
            await asyncio.sleep(0.05)
        mortal_gateway.drain()
        while (state := await client.check(0)).ok:  # noqa: ASYNC110 - the gateway sends no event for it
            await asyncio.sleep(0.1)
        assert "suspending or restarting" in state.detail
        with pytest.raises(errors.GatewayUnavailable):
            await say(client, str(uuid4()), "MARK-refused")
        with pytest.raises(errors.GatewayUnavailable):
            await client.delete_session("main", str(uuid4()))
        assert (await reading).endswith(" w200")

    try:
        with_client(mortal_gateway, drain)
    finally:
        mortal_gateway.stop()


def aborted(run: Run) -> bool:
    """True once the gateway has left the model's run."""
    return run.state == "aborted"


@pytest.mark.parametrize("count", [5, pytest.param(30, marks=pytest.mark.slow)])
def test_every_stop_reaches_the_agent(provider: ModelProvider, person: Person, count: int) -> None:
    """30 of 30 stops abort the agent's run, keep the text that arrived, and leave a conversation that continues."""
    session = person.session()
    marks = [f"halt{count}x{number}" for number in range(count)]
    for mark in marks:
        with person.listen(session, f"MARK-{mark} SLOW-200") as (_, stream):
            stream.read(to_first_text=True)
            assert person.stop(session) is True
            run = provider.run(mark)
            until(partial(aborted, run), 10, "the model's run to be aborted")
            stream.read()
        assert (stream.finish, stream.done) == ("stopped", True)
        reply = until(lambda: person.reply(session, "stopped"), 10, "the reply to be stopped")
        assert reply["content"] == stream.text != ""
        assert run.sent.startswith(stream.text)
    # Of several messages in a row without a reply, the gateway sends the newest one to the model.
    assert person.say(session, "MARK-afterwards").text == f"seen: {marks[-1]},afterwards"
