"""Faults of the gateway and of the connection to it: archived conversations, drains, a WebSocket that fails, clocks
that differ, streams that break off, and histories that contain somebody else's answer."""

import asyncio
import json
import sqlite3
import time
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import errors
from clock import iso_time
from gateway import Chunk, Finished, Gateway, Period, agent_session, build_request, find_reply
from tests.proxy import IdleProxy
from tests.service import JSON, Person, Served, Service, until
from tests.stand_in import StandIn, reply_text

KEY = "6f1c2a34-0b1c-4d5e-8f90-a1b2c3d4e5f6"
CONVERSATION = agent_session("main", KEY)
FINAL = ("complete", "stopped", "interrupted", "failed", "empty")
Serve = Callable[..., Served]


@asynccontextmanager
async def client(gateway: StandIn, token: str | None = None) -> AsyncIterator[Gateway]:
    """The client of a gateway."""
    openclaw = Gateway(gateway.url, token or gateway.token, silence=10)
    openclaw.open()
    try:
        yield openclaw
    finally:
        await openclaw.close()


async def say(openclaw: Gateway, text: str, chunks: list[Chunk] | None = None) -> str:
    """The text of the reply to a message. `chunks` collects what arrives, also if the reply fails."""
    collected = [] if chunks is None else chunks
    request = build_request(agent_id="main", session_key=KEY, project=("P", None, "/"), text=text, images=[])
    async for chunk in openclaw.stream(request):
        collected.append(chunk)
    return "".join(chunk.text for chunk in collected)


# --- what arrived is never lost -----------------------------------------------------------------------


@asynccontextmanager
async def raw_gateway(body: bytes) -> AsyncIterator[Gateway]:
    """The client of a gateway that answers each request with these bytes and then neither sends nor closes."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n" + body)
        await reader.read()  # the request's body, until the client closes
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    openclaw = Gateway(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", "t", silence=10)
    openclaw.open()
    try:
        yield openclaw
    finally:
        await openclaw.close()
        server.close()


ARRIVED = {
    "event without its blank line": (b'data: {"choices":[{"delta":{"content":"one"}}]}\n', "one"),
    "line without its end": (b'data: {"choices":[{"delta":{"content":"one"}}]}', "one"),
    "begins like no reply": (b'data: {"choices":[{"delta":{"content":"No resp"}}]}\n\n', "No resp"),
    "half an event after text": (b'data: {"choices":[{"delta":{"content":"one"}}]}\n\ndata: {"cho', "one"),
    "the words for no reply": (b'data: {"choices":[{"delta":{"content":"No response from OpenClaw."}}]}\n\n', ""),
}


@pytest.mark.parametrize("arrived", ARRIVED)
def test_a_stop_keeps_the_text_that_has_arrived(arrived: str) -> None:
    """A stop cancels the task that reads the stream. Text that its parser still held was lost."""
    body, text = ARRIVED[arrived]

    async def stop() -> str:
        chunks: list[Chunk] = []
        async with raw_gateway(b'data: {"id":"run"}\n\n' + body) as openclaw:
            reading = asyncio.create_task(say(openclaw, "Hello", chunks))
            await asyncio.sleep(0.05)  # less than the time for which a beginning of NO_REPLY is held back
            while not chunks:  # noqa: ASYNC110 - the list has no event to wait for
                await asyncio.sleep(0.01)
            reading.cancel()
            with pytest.raises(asyncio.CancelledError):
                await reading
        assert chunks[-1].run_id == "run"
        return "".join(chunk.text for chunk in chunks)

    assert asyncio.run(stop()) == text


def test_a_reply_that_begins_like_no_reply_is_shown_and_stored(tmp_path: Path, openclaw: StandIn) -> None:
    """An agent that says `No` and then works silently: the text was neither shown nor stored, and kill -9 lost it."""
    text = "[[says=No|_response end=hang]]"
    with Service(tmp_path, openclaw.url, openclaw.token) as service, service.person() as person:
        session = person.session()
        with person.listen(session, text) as (_, stream):
            until(lambda: person.messages(session)[1]["content"] == "No response", 10, "the text to be stored")
            assert stream.read(to_first_text=True).text.startswith("No")
            service.kill()
        service.start()
        reply = until(lambda: person.reply(session, *FINAL), 15, "the reply to be final")
    assert (reply["status"], reply["content"]) == ("interrupted", "No response")


@pytest.mark.parametrize("how", ["odd=1", "odd=1 split=1", "odd=1 split=7"])
def test_odd_streams_carry_the_same_text(ada: Person, how: str) -> None:
    """A BOM, unknown fields, lone CRs, events without meaning, another choice, and `[DONE]` without a blank line."""
    session, text = ada.session(), f"[[chunks=12 size=9 {how}]]"
    assert ada.say(session, text, stream=True).text == reply_text(text)
    assert ada.say(session, text).text == reply_text(text)
    assert {row["status"] for row in ada.messages(session)} == {"complete"}


@pytest.mark.parametrize("reason", ["length", "content_filter", "stop"])
def test_the_reason_of_the_end_reaches_the_turn(openclaw: StandIn, reason: str) -> None:
    """A reply that the model's budget or filter cut off came out as whole."""

    async def ask() -> list[Chunk]:
        chunks: list[Chunk] = []
        async with client(openclaw) as gateway:
            await say(gateway, f"[[finish={reason}]]", chunks)
        return chunks

    assert asyncio.run(ask())[-1].finish_reason == reason


# --- archived conversations ---------------------------------------------------------------------------


def test_an_archived_conversation_is_restored(openclaw: StandIn) -> None:
    """OpenClaw archives a conversation after 30 days and then refuses each message of it, in words for any failure.
    Restoring it brings it back with its history, and a conversation that is not archived stays as it is."""

    async def restore() -> None:
        async with client(openclaw) as gateway:
            assert await gateway.restore("main", KEY) is False  # unknown
            await say(gateway, "one")
            assert await gateway.restore("main", KEY) is False
            openclaw.archived.add(CONVERSATION)
            chunks: list[Chunk] = []
            with pytest.raises(errors.GatewayError) as caught:
                await say(gateway, "two", chunks)
            assert (caught.value.code, [chunk.text for chunk in chunks if chunk.text]) == ("gateway_error", [])
            assert await gateway.restore("main", KEY) is True
            assert "(message 2 of this conversation)" in await say(gateway, "three")

    asyncio.run(restore())
    assert openclaw.archived == set()


def test_restoring_fails_as_the_gateway_fails(openclaw: StandIn) -> None:
    """Without the gateway nothing is known of the conversation, which is an error and not `False`."""

    async def restore(status: int | None) -> errors.GatewayError:
        openclaw.websocket_status = status
        async with client(openclaw) as gateway:
            with pytest.raises(errors.GatewayError) as caught:
                await gateway.restore("main", KEY)
            return caught.value

    assert asyncio.run(restore(404)).code == "gateway_error"
    openclaw.stop()
    assert asyncio.run(restore(None)).code == "gateway_unavailable"


# --- drains, and the WebSocket ------------------------------------------------------------------------


def test_a_draining_gateway_is_unavailable_and_not_failed(ada: Person, openclaw: StandIn) -> None:
    """A gateway that suspends or drains was reported as failed inside, with 502. Nothing has reached the agent: 503,
    retryable, and readiness gives the same cause. Afterwards all is well again."""
    session = ada.session()
    openclaw.draining = True
    for stream in (False, True):
        answer = ada.say(session, "Hello", stream=stream)
        assert (answer.status_code, answer.code) == (503, "gateway_unavailable")
        assert int(answer.headers["Retry-After"]) > 0
        assert "suspending or restarting" in answer.body
        assert ada.messages(session)[-1]["error"]["retryable"] is True
    until(lambda: ada.ready().status_code == 503, 10, "readiness to be 503")
    ready = ada.ready().json()
    assert ready["code"] == "not_ready"
    assert "suspending or restarting" in ready["detail"]
    openclaw.draining = False
    assert ada.say(session, "Hello").status_code == 200
    until(lambda: ada.ready().status_code == 200, 10, "readiness to be 200")


def test_another_503_stays_a_failure(ada: Person) -> None:
    """A 503 without OpenClaw's code may be a proxy's or come after the agent has begun: it is not a drain."""
    answer = ada.say(ada.session(), "[[status=503]]")
    assert (answer.status_code, answer.code) == (502, "gateway_error")


def test_a_draining_gateway_refuses_the_websocket_for_now(openclaw: StandIn) -> None:
    """The refusal of a WebSocket during a drain was taken for the answer of another program, which is not retryable."""

    async def delete() -> errors.GatewayError:
        async with client(openclaw) as gateway:
            with pytest.raises(errors.GatewayError) as caught:
                await gateway.delete_session("main", KEY)
            return caught.value

    openclaw.draining = True
    error = asyncio.run(delete())
    assert (error.code, error.retryable) == ("gateway_unavailable", True)


@pytest.mark.parametrize("status", [404, 403, 503, 0])
def test_readiness_tries_the_websocket(serve: Serve, openclaw: StandIn, status: int) -> None:
    """Deletes and recovery need the WebSocket, and nothing reported that it failed. Readiness stays 200, because
    turns can be taken, and says so; it does not wait for a WebSocket that never answers."""
    openclaw.websocket_status = status
    with serve().person() as person:
        started = time.monotonic()
        ready = person.ready()
        assert time.monotonic() - started < 10
        assert (ready.status_code, ready.json()["status"]) == (200, "ready")
        websocket = ready.json()["websocket"]
        assert websocket["ok"] is False
        assert "WebSocket" in websocket["detail"] and "not deleted" in websocket["detail"]
        assert person.say(person.session(), "Hello").status_code == 200
        openclaw.websocket_status = None
        websocket = until(lambda: (now := person.ready().json()["websocket"])["ok"] and now, 15, "the WebSocket")
        assert websocket == {"ok": True, "detail": "OpenClaw's WebSocket answers."}


def test_the_log_of_the_start_reports_the_websocket(tmp_path: Path, openclaw: StandIn) -> None:
    """The first lines of the log say the same as readiness, as a warning; a WebSocket that works needs no words."""
    openclaw.websocket_status = 404
    with Service(tmp_path, openclaw.url, openclaw.token) as service:
        until(lambda: "gateway: OpenClaw" in service.output(), 15, "the gateway's state in the log")
        line = next(line for line in service.output().splitlines() if "gateway: OpenClaw" in line)
    assert "WARNING" in line and "WebSocket, on the same port, cannot be used" in line


def test_a_token_without_all_scopes_is_reported(openclaw: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    """A gateway may accept a connection and grant too little: deletes would then fail, so readiness says so."""
    grants: JSON = {"auth": {"role": "operator", "scopes": ["operator.read"]}}
    whole = openclaw.call
    monkeypatch.setattr(
        openclaw, "call", lambda method, params: whole(method, params) | (grants if method == "connect" else {})
    )

    async def check() -> bool:
        async with client(openclaw) as gateway:
            return (await gateway.check(0)).websocket.ok

    assert asyncio.run(check()) is False


def test_the_age_of_the_gateways_state_is_monotonic(openclaw: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the clock set back by an hour, readiness and `clawd_gateway_up` kept for an hour what they knew."""

    async def check() -> list[bool]:
        async with client(openclaw) as gateway:
            states = [(await gateway.check(max_age=1)).ok]
            past = SimpleNamespace(time=lambda: time.time() - 3600, monotonic=time.monotonic)
            monkeypatch.setattr("gateway.client.time", past)
            openclaw.stop()
            states.append((await gateway.check(max_age=60)).ok)
            states.append((await gateway.check(max_age=0)).ok)
            assert abs(gateway.state.checked_at - (time.time() - 3600)) < 60  # shown, so by the wall clock
            return states

    assert asyncio.run(check()) == [True, True, False]


# --- recovery from the history ------------------------------------------------------------------------


def forget_runs(database: Path) -> None:
    """Removes the run ids of all turns, as in rows that an older version wrote, or a crash before they arrived."""
    with sqlite3.connect(database) as conn:
        conn.execute("UPDATE turns SET run_id = NULL")


@pytest.mark.parametrize(("ahead", "forgotten"), [(0, False), (0, True), (3600, True), (-3600, True)])
def test_an_older_answer_to_the_same_words_is_not_taken(
    tmp_path: Path, openclaw: StandIn, ahead: int, forgotten: bool
) -> None:
    """The same words are sent twice, the second time without reaching the agent: after a crash, the older answer must
    not be taken for the new reply, even if no run id is stored and the gateway's clock is wrong."""
    openclaw.clock_ahead = ahead
    with Service(tmp_path, openclaw.url, openclaw.token) as service, service.person() as person:
        session = person.session()
        person.say(session, "continue")
        port = openclaw.port
        openclaw.stop()
        hole = IdleProxy(1, idle=30, port=port)  # accepts connections and never answers
        with hole, ThreadPoolExecutor(1) as pool:
            lost = pool.submit(person.lose, session, "continue")
            until(lambda: len(person.messages(session)) == 4, 5, "the message to be stored")
            service.kill()
            lost.result()
        if forgotten:
            forget_runs(tmp_path / "service.db")
        openclaw.start()
        service.start()
        reply = until(lambda: person.reply(session, *FINAL), 15, "the reply to be final")
    assert (reply["status"], reply["content"]) == ("interrupted", "")


@pytest.mark.parametrize("ahead", [0, *(pytest.param(ahead, marks=pytest.mark.slow) for ahead in (3600, -3600))])
def test_a_reply_without_a_run_id_is_recovered(tmp_path: Path, openclaw: StandIn, ahead: int) -> None:
    """The gateway received the message after it was stored here, by whichever clock: its answer is the reply."""
    openclaw.clock_ahead = ahead
    text = "[[chunks=40 size=5 delay=0.02]]"
    with Service(tmp_path, openclaw.url, openclaw.token) as service, service.person() as person:
        session = person.session()
        person.say(session, text)
        with person.listen(session, text) as (_, stream):
            stream.read(to_first_text=True)
            service.freeze()
            until(lambda: len(openclaw.completed) == 2, 10, "the gateway to finish")
            service.kill()
        forget_runs(tmp_path / "service.db")
        service.start()
        reply = until(lambda: person.reply(session, *FINAL), 15, "the reply to be final")
    assert (reply["status"], reply["content"]) == ("complete", reply_text(text))


def test_what_the_agent_is_writing_is_kept(tmp_path: Path, openclaw: StandIn) -> None:
    """A gateway that has not noticed the crash still runs the turn: the reply ends as interrupted, with all that the
    agent had written by the time of the recovery."""
    text = "[[chunks=2000 size=5 delay=0.02 deaf=1]]"
    with Service(tmp_path, openclaw.url, openclaw.token) as service, service.person() as person:
        session = person.session()
        with person.listen(session, text) as (_, stream):
            stream.read(to_first_text=True)
            time.sleep(0.5)  # until the run id is stored
            service.freeze()
            run = openclaw.runs[-1]
            goal = run.sent + 60
            until(lambda: run.sent > goal, 30, "the agent to write on")
            service.kill()
        service.start()
        reply = until(lambda: person.reply(session, *FINAL), 15, "the reply to be final")
    assert (reply["status"], reply["error"]["code"]) == ("interrupted", "interrupted")
    assert len(reply["content"]) > goal
    assert reply_text(text).startswith(reply["content"])


def item(role: str, text: str, run_id: str | None = None, at: float = 0, **more: Any) -> JSON:
    """An entry of the gateway's history, received at this Unix time."""
    note = {"id": "i", **({"runId": run_id} if run_id else {})}
    content: object = text if role == "user" else [{"type": "text", "text": text}]
    shared = {"role": role, "content": content, "timestamp": int(at * 1000), "__openclaw": note}
    return {**shared, **({"stopReason": "stop"} if role == "assistant" else {}), **more}


def proofs() -> Iterator[tuple[str, list[JSON], bool]]:
    """Histories with a conversation in which `q` was asked at 100, and whether its answer is provably there."""
    yield "in time", [item("user", "q", at=100), item("assistant", "abc", "r", 101)], True
    yield "spaces", [item("user", "q ", at=100), item("assistant", "abc", "r", 101)], True
    yield "before", [item("user", "q", at=99.9), item("assistant", "abc", "r", 101)], False
    yield "in the future, so that a clock was set", [item("user", "q", at=201), item("assistant", "abc", "r")], False
    yield "no time", [item("user", "q", timestamp=None), item("assistant", "abc", "r", 101)], False
    yield "odd time", [item("user", "q", timestamp="100000"), item("assistant", "abc", "r", 101)], False
    yield "other words", [item("user", "p", at=100), item("assistant", "abc", "r", 101)], False
    yield "another turn's run", [item("user", "q", at=100), item("assistant", "abc", "known", 101)], False
    yield "no run", [item("user", "q", at=100), item("assistant", "abc", None, 101)], False
    yield "run id that cannot be stored", [item("user", "q", at=100), item("assistant", "abc", "\ud83d", 101)], False
    two = [item("user", "q", at=100), item("assistant", "abc", "r", 101), item("assistant", "d", "r2", 102)]
    yield "two runs", two, False
    yield "newer message", [*two[:2], item("user", "again", at=150)], False


@pytest.mark.parametrize(("items", "proven"), [pytest.param(*rest, id=name) for name, *rest in proofs()])
def test_an_answer_is_taken_only_if_its_message_came_after_ours(items: list[JSON], proven: bool) -> None:
    """Without a run id, the words, the time of the message and a single unknown run are the proof."""
    found = find_reply(items, "q", None, {"known"}, "a", period=Period(100, 200))
    assert (found is not None) is proven


def test_without_a_run_id_and_a_time_nothing_is_taken(openclaw: StandIn) -> None:
    """Nothing proves then that an answer came after the message."""

    async def recover(since: str | None) -> Finished | None:
        async with client(openclaw) as gateway:
            return await gateway.finished_reply(
                "main", KEY, asked="Hello", run_id=None, known=set(), got="", since=since
            )

    async def ask() -> None:
        async with client(openclaw) as gateway:
            await say(gateway, "Hello")

    before = iso_time(time.time())
    asyncio.run(ask())
    for unproven in (None, "", "yesterday", iso_time(time.time() + 60)):
        assert asyncio.run(recover(unproven)) is None
    found = asyncio.run(recover(before))
    assert found is not None and found.complete and found.run_id == openclaw.runs[0].run_id


def parts() -> Iterator[tuple[str, list[JSON], JSON | None, str, tuple[str, bool, str | None] | None]]:
    """Histories of the run `r`, the run in flight, what had arrived, and what is found: text, complete, reason."""
    user, other = item("user", "q"), item("user", "later")
    whole = item("assistant", "abc", "r")
    tool = item("assistant", "Let me look.", "r", stopReason="toolUse")
    flight = {"runId": "r", "text": "abcd"}
    yield "in flight", [user], flight, "ab", ("abcd", False, None)
    yield "in flight, nothing new", [user], flight, "abcd", None
    yield "in flight, of another run", [user], {"runId": "x", "text": "abcd"}, "ab", None
    yield "in flight, other text", [user], flight, "x", None
    yield "in flight, odd", [user], {"runId": "r", "text": 5}, "", None
    yield "in flight, half a character", [user], {"runId": "r", "text": "ab\ud83d"}, "a", ("ab\ufffd", False, None)
    yield "in flight after a tool", [user, tool], flight, "Let", ("Let me look.\n\nabcd", False, None)
    yield (
        "in flight, cumulative",
        [user, tool],
        {"runId": "r", "text": "Let me look.\n\nSo"},
        "",
        (
            "Let me look.\n\nSo",
            False,
            None,
        ),
    )
    yield "after a tool only", [user, tool], None, "", ("Let me look.", False, None)
    yield "aborted", [user, item("assistant", "abc", "r", stopReason="aborted")], None, "a", ("abc", False, None)
    yield "failed", [user, item("assistant", "sorry", "r", stopReason="error")], None, "", None
    yield "settling", [user, whole], {"runId": "r", "text": "abc"}, "a", ("abc", True, "stop")
    yield "cut by the budget", [user, {**whole, "stopReason": "length"}], None, "a", ("abc", True, "length")
    yield "tool, then the answer", [user, tool, whole], None, "Let me look.\n", ("Let me look.\n\nabc", True, "stop")
    yield "tool left out of the stream", [user, tool, whole], None, "ab", ("abc", True, "stop")
    yield "somebody wrote since", [user, whole, other, item("assistant", "x", "r2")], None, "a", ("abc", True, "stop")
    yield "begin is missing", [whole], None, "", None
    yield "half a character", [user, item("assistant", "a\ud83d", "r")], None, "a", ("a\ufffd", True, "stop")


@pytest.mark.parametrize(("items", "flight", "got", "found"), [pytest.param(*rest, id=name) for name, *rest in parts()])
def test_as_much_as_the_history_gives(
    items: list[JSON], flight: JSON | None, got: str, found: tuple[str, bool, str | None] | None
) -> None:
    """A reply whose run id is known is taken whole, or else as far as it was written, if it continues what we have."""
    reply = find_reply(items, "q", "r", set(), got, in_flight=flight)
    assert (reply and (reply.text, reply.complete, reply.finish_reason)) == found
    if reply:
        json.dumps(reply.text, ensure_ascii=False).encode()  # it can be stored
