"""Turns under cut connections, slow readers, stops, gateway failures, two processes, restarts and kill -9."""

import hashlib
import random
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

import httpx
import pytest

import sql

from .proxy import IdleProxy
from .service import JSON, Answer, Person, Served, Service, Stream, until
from .stand_in import StandIn, reply_text

FINAL = ("complete", "stopped", "interrupted", "failed", "empty")
SLOW = "[[chunks=400 size=5 delay=0.02]]"


@pytest.fixture
def pair(tmp_path: Path, openclaw: StandIn) -> Iterator[tuple[Service, Service]]:
    """Two processes of the service on one database."""
    with Service(tmp_path, openclaw.url, openclaw.token) as one, Service(tmp_path, openclaw.url, openclaw.token) as two:
        yield one, two


def at_once(count: int, work: Callable[[int], Answer]) -> list[Answer]:
    """Calls `work(number)` in `count` threads at the same moment. Returns the results in the order of the numbers."""
    gate = threading.Barrier(count)

    def run(number: int) -> Answer:
        gate.wait()
        return work(number)

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(run, range(count)))


# --- any number of readers, from any offset -----------------------------------------------------------


class CuttingReader:
    """A client whose connection breaks after a random number of bytes. It resumes after the last complete frame."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)
        self.text = ""
        self.offset = 0
        self.done = False
        self.message_id = 0

    def read(self, response: httpx.Response, most: int | None) -> None:
        """Reads a stream to its end, or at most `most` bytes of it."""
        stream, received = Stream(response), b""
        for piece in response.iter_raw():
            received += piece
            if most is not None and len(received) >= most:
                received = received[:most]
                break
        whole = received[: received.rfind(b"\n\n") + 2] if b"\n\n" in received else b""
        for line in whole.decode().split("\n"):
            stream.take(line)
        self.text += stream.text
        self.offset = stream.ids[-1] if stream.ids else self.offset
        self.done = stream.done

    def cut_at(self) -> int:
        """Returns the number of bytes after which the next connection breaks."""
        return self._random.randrange(1, 2500)


def _cut_reply(person: Person, urls: list[str], session: JSON, number: int) -> tuple[str, str]:
    reader = CuttingReader(number)
    text = f"[[chunks=60 size=6 delay=0.004 seed={number}]]"
    body = {"session_key": session["session_key"], "messages": [{"role": "user", "content": text}], "stream": True}
    with person.http.stream("POST", "/chat", json=body) as response:
        reader.message_id = int(response.headers["X-Message-Id"])
        reader.read(response, reader.cut_at())
    for cut in range(5):
        url = f"{urls[cut % len(urls)]}/sessions/{session['id']}/messages/{reader.message_id}/stream"
        if reader.done:
            break
        with person.http.stream("GET", url, headers={"Last-Event-ID": str(reader.offset)}) as response:
            reader.read(response, reader.cut_at() if cut < 4 else None)
    assert reader.done
    assert reader.offset == len(reader.text)
    return _sha(reader.text), _sha(reply_text(text))


def _sha(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


@pytest.mark.parametrize("count", [40, pytest.param(200, marks=pytest.mark.slow)])
def test_replies_cut_five_times_are_whole(pair: tuple[Service, Service], count: int) -> None:
    """Replies that are each cut five times at random bytes and resumed equal the gateway's text. Every fifth one is
    resumed through a second process too."""
    one, two = pair
    with one.person() as person, ThreadPoolExecutor(16) as pool:
        project = person.project()
        sessions = [person.session(project) for _ in range(count)]
        urls = [[one.url, two.url] if number % 5 == 0 else [one.url] for number in range(count)]
        pairs = list(pool.map(_cut_reply, [person] * count, urls, sessions, range(count)))
    assert len(pairs) == count
    assert [got for got, _ in pairs] == [sent for _, sent in pairs]


def test_two_tabs_and_a_latecomer_read_the_same(ada: Person) -> None:
    """Readers of a running reply, from the start or from an offset, get every character once and in order."""
    session = ada.session()
    text = "[[chunks=100 size=7 delay=0.005]]"
    with ada.listen(session, text) as (response, first):
        message_id = int(response.headers["X-Message-Id"])
        first.read(to_first_text=True)
        with ThreadPoolExecutor(3) as pool:
            others = list(pool.map(lambda after: _rest(ada, session, message_id, after), (None, 0, 123)))
        first.read()
    whole = reply_text(text)
    assert [first.text, *(stream.text for stream in others)] == [whole, whole, whole, whole[123:]]
    assert all(stream.done and stream.ids[-1] == len(whole) for stream in (first, *others))


def _rest(person: Person, session: JSON, message_id: int, after: int | None) -> Stream:
    with person.resume(session, message_id, after) as stream:
        return stream.read()


def test_frame_ids_count_characters(ada: Person) -> None:
    """A frame's id is the number of code points so far, not of bytes."""
    with ada.listen(ada.session(), "[[chunks=20 size=9 delay=0.01]]") as (_, stream):
        stream.read()
    lengths, total = [], 0
    for frame in stream.frames:
        total += len(frame["choices"][0]["delta"]["content"])
        lengths.append(total)
    assert stream.ids == lengths


def test_a_reader_who_does_not_read_slows_nobody(ada: Person) -> None:
    """A client that reads nothing does not keep a large reply from being completed and read by others."""
    session = ada.session()
    with ada.listen(session, "[[big=5000000]]") as (response, _):
        message_id = int(response.headers["X-Message-Id"])
        done = until(lambda: ada.reply(session, *FINAL), 20, "the end of the reply")
        assert done["status"] == "complete"
        assert _rest(ada, session, message_id, None).text == reply_text("[[big=5000000]]")


def test_a_closed_tab_changes_nothing(ada: Person, openclaw: StandIn) -> None:
    """If a client disconnects after the first frame, the run is not aborted and the whole reply is stored."""
    session, text = ada.session(), "[[chunks=50 size=5 delay=0.01]]"
    with ada.listen(session, text) as (_, stream):
        stream.read(to_first_text=True)
    reply = until(lambda: ada.reply(session, *FINAL), 10, "the end of the reply")
    assert (reply["status"], reply["content"]) == ("complete", reply_text(text))
    assert openclaw.aborted == []


def test_frames_are_stored_within_a_quarter_second(tmp_path: Path, pair: tuple[Service, Service]) -> None:
    """Another process can read the text of a frame within 250 ms (the median), and within 1 s in the worst case."""
    behind: list[float] = []
    with ExitStack() as stack:
        person = stack.enter_context(pair[0].person())
        conn = stack.enter_context(sqlite3.connect(tmp_path / "service.db"))
        text = "[[chunks=150 size=5 delay=0.02]]"
        response, stream = stack.enter_context(person.listen(person.session(), text))
        message_id = int(response.headers["X-Message-Id"])
        while not stream.done:
            stream.read(one_frame=True)
            arrived, reached = time.monotonic(), len(stream.text)
            while _stored(conn, message_id) < reached and time.monotonic() < arrived + 5:
                time.sleep(0.005)
            behind.append(time.monotonic() - arrived)
    assert len(behind) > 5
    assert sorted(behind)[len(behind) // 2] < 0.25
    assert max(behind) < 1


def _stored(conn: sqlite3.Connection, message_id: int) -> int:
    return len("".join(sql.read_text(conn, message_id)))


# --- order --------------------------------------------------------------------------------------------


def test_sends_run_in_order_and_the_twelfth_is_refused(ada: Person, openclaw: StandIn) -> None:
    """One turn runs and ten are queued in order; the next message is refused with `Retry-After`."""
    session, answers = ada.session(), []
    with ThreadPoolExecutor(11) as pool:
        for number in range(11):
            text = f"{number} [[chunks=10 delay={0 if number else 0.5}]]"  # the first runs while the others are sent
            answers.append(pool.submit(ada.say, session, text))
            count = 2 * (number + 1)
            # mypy cannot infer the type of a lambda with a default.
            until(lambda count=count: len(ada.messages(session)) == count, 5, "the message to be stored")  # type: ignore[misc]
        refused = ada.say(session, "one too many")
        assert all(answer.result().status_code == 200 for answer in answers)
    assert (refused.status_code, refused.code) == (429, "session_busy")
    assert refused.headers["Retry-After"].isdecimal()
    assert [request.text.split()[0] for request in openclaw.requests] == [str(number) for number in range(11)]
    assert [message["status"] for message in ada.messages(session)] == ["complete"] * 22


def test_order_holds_across_processes(pair: tuple[Service, Service], openclaw: StandIn) -> None:
    """Sends to two processes run one at a time in their session, in the order in which they were stored."""
    with pair[0].person() as one, one.at(pair[1].url) as two:
        session = one.session()
        answers = at_once(8, lambda number: (one, two)[number % 2].say(session, f"{number} [[chunks=5 delay=0.02]]"))
        stored = [row["content"] for row in one.messages(session) if row["role"] == "user"]
    assert [answer.status_code for answer in answers] == [200] * 8
    assert [request.text for request in openclaw.requests] == stored


def test_sessions_do_not_wait_for_each_other(ada: Person) -> None:
    """While one session's agent is silent, another session is answered."""
    project = ada.project()
    with ada.listen(ada.session(project), "[[first=30]]"):
        assert ada.say(ada.session(project), "Hello").status_code == 200


# --- idempotency ---------------------------------------------------------------------------------------


def test_twenty_sends_with_one_key_are_one_turn(pair: tuple[Service, Service], openclaw: StandIn) -> None:
    """20 concurrent sends with one key, to two processes, cause one request to the gateway and get equal answers."""
    with pair[0].person() as one, one.at(pair[1].url) as two:
        session, text = one.session(), "[[chunks=30 size=5 delay=0.01]]"
        answers = at_once(20, lambda number: (one, two)[number % 2].say(session, text, key="k", stream=number % 4 > 1))
        assert len(one.messages(session)) == 2
    assert [answer.status_code for answer in answers] == [200] * 20
    assert {answer.text for answer in answers} == {reply_text(text)}
    assert len({answer.message_id for answer in answers}) == 1
    assert len(openclaw.requests) == 1


def test_a_key_holds_after_a_restart(tmp_path: Path, openclaw: StandIn) -> None:
    """After a restart, a key returns the stored reply, and is refused with another message. In another session, it
    begins a new turn."""
    with Service(tmp_path, openclaw.url, openclaw.token) as service, service.person() as person:
        session = person.session()
        first = person.say(session, "Hello", key="k")
        service.stop()
        service.start()
        assert person.say(session, "Hello", key="k").body == first.body
        other = person.say(session, "Something else", key="k")
        assert (other.status_code, other.code) == (422, "idempotency_key_reused")
        assert person.say(person.session(), "Hello", key="k").message_id != first.message_id
    assert len(openclaw.requests) == 2


def test_a_failed_turn_is_not_tried_again_by_its_key(ada: Person, openclaw: StandIn) -> None:
    """A key returns its first answer again, even if that is a failure. A new key begins a new turn."""
    session = ada.session()
    answers = [ada.say(session, "[[status=500]]", key=key) for key in ("a", "a", "b")]
    assert [answer.code for answer in answers] == ["gateway_error"] * 3
    assert len(openclaw.requests) == 2


# --- stop ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("process", [0, 1])
def test_stop_ends_the_run_and_drops_what_waits(pair: tuple[Service, Service], openclaw: StandIn, process: int) -> None:
    """A stop, through either process, aborts the agent's run within a second, keeps the text so far, and drops the
    queued turns. The session accepts the next message."""
    with pair[0].person() as person, person.at(pair[process].url) as elsewhere, ThreadPoolExecutor(2) as pool:
        session = person.session()
        with person.listen(session, SLOW) as (_, stream):
            stream.read(to_first_text=True)
            waiting = pool.submit(person.say, session, "waiting")
            until(lambda: len(person.messages(session)) == 4, 5, "the second message to wait")
            assert elsewhere.stop(session)
            until(lambda: openclaw.aborted, 1, "the run to be aborted")
            stream.read()
        dropped = waiting.result()
        rows = person.messages(session)
        assert (stream.finish, stream.error, stream.text) == ("stopped", None, rows[1]["content"])
        assert (dropped.status_code, '"status":"stopped"' in dropped.body) == (200, True)
        assert [row["status"] for row in rows] == ["complete", "stopped", "complete", "stopped"]
        assert reply_text(SLOW).startswith(rows[1]["content"])
        assert rows[1]["content"] != ""
        assert not elsewhere.stop(session)
        assert person.say(session, "Go on").status_code == 200
    assert [request.text for request in openclaw.requests] == [SLOW, "Go on"]


# --- silence ------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_long_silence_gets_through_a_proxy_that_cuts_it(serve: Callable[..., Served]) -> None:
    """An agent's silence of ten minutes behind a proxy that cuts connections after 30 s without a byte, run a hundred
    times faster: comments keep the connection open, and the reply is delivered."""
    served = serve(ping_seconds=0.15)
    with served.person() as person, IdleProxy(served.port, idle=0.3) as proxy, person.at(proxy.url) as behind:
        with behind.listen(person.session(), "[[first=6 chunks=3]]") as (_, stream):
            stream.read()
        assert (stream.text, stream.done) == (reply_text("[[first=6 chunks=3]]"), True)
        assert stream.comments > 20
        with pytest.raises(httpx.TransportError):  # a response without comments is cut
            behind.say(person.session(), "[[first=2]]")


def test_the_stream_begins_at_once_while_the_agent_is_silent(ada: Person) -> None:
    """A response begins with a comment if there is no text yet."""
    with ada.listen(ada.session(), "[[first=3 chunks=2]]") as (response, stream):
        assert next(response.iter_raw()) == b": ping\n\n"
        del stream


# --- failures of the gateway ---------------------------------------------------------------------------

FAILURES = [
    ("[[status=400]]", 502, "gateway_error", False),
    ("[[status=401]]", 502, "gateway_auth", False),
    ("[[status=404]]", 502, "gateway_endpoint_disabled", False),
    ("[[status=413]]", 502, "gateway_error", False),
    ("[[status=429]]", 502, "gateway_error", True),
    ("[[status=500]]", 502, "gateway_error", True),
    ("[[status=503]]", 502, "gateway_error", True),
    ("[[end=html]]", 502, "gateway_error", False),
    ("[[end=garbage]]", 502, "gateway_error", False),
    ("[[chunks=0 end=error]]", 502, "gateway_error", True),
    ("[[chunks=0 end=eof]]", 502, "gateway_incomplete", True),
    ("[[chunks=0 end=drop]]", 502, "gateway_incomplete", True),
    ("[[chunks=0 end=badjson]]", 502, "gateway_error", False),
    ("[[chunks=0 end=hang]]", 504, "gateway_timeout", True),
]
CUT_SHORT = [
    ("error", "gateway_error", True),
    ("eof", "gateway_incomplete", True),
    ("no_done", "gateway_incomplete", True),
    ("drop", "gateway_incomplete", True),
    ("badjson", "gateway_error", False),
    ("hang", "gateway_timeout", True),
]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("text", "status", "code", "retryable"), FAILURES)
def test_a_failure_before_any_text_is_a_status(
    serve: Callable[..., Served], text: str, status: int, code: str, retryable: bool, stream: bool
) -> None:
    """Each failure has its own status, code and `retryable`, and an empty text, with and without `stream`."""
    # The gateway's timeout must expire before FIRST_BYTE, or the response would begin before the failure.
    served = serve(clawdbot_timeout=0.3 if code == "gateway_timeout" else 30)
    with served.person() as person:
        session = person.session()
        answer = person.say(session, text, stream=stream)
        reply = person.messages(session)[1]
        assert (answer.status_code, answer.code) == (status, code)
        assert (reply["status"], reply["content"]) == ("failed", "")
        assert (reply["error"]["code"], reply["error"]["retryable"]) == (code, retryable)
        assert answer.message_id == reply["id"]


@pytest.mark.parametrize("split", [0, 1])
@pytest.mark.parametrize(("end", "code", "retryable"), CUT_SHORT)
def test_a_failure_after_text_is_a_frame(
    serve: Callable[..., Served], end: str, code: str, retryable: bool, split: int
) -> None:
    """Text that arrived before a failure is streamed and stored; the failure is a separate frame and never text."""
    served = serve(clawdbot_timeout=0.5)
    text = f"[[chunks=9 size=7 end={end} split={split}]]"
    with served.person() as person:
        session = person.session()
        with person.listen(session, text) as (response, stream):
            assert response.status_code == 200
            stream.read()
        reply = person.messages(session)[1]
        assert stream.error == reply["error"]
        assert (stream.finish, stream.done) == ("error", True)
        assert (reply["status"], reply["error"]["code"], reply["error"]["retryable"]) == ("failed", code, retryable)
        assert stream.text == reply["content"] == reply_text(text)
        answer = person.say(session, text)
        assert (answer.code, answer.message_id) == (code, reply["id"] + 2)


def test_a_gateway_that_is_down_is_tried_twice(ada: Person, openclaw: StandIn) -> None:
    """A refused connection is retried once, since the message cannot have reached the agent. If it is refused again,
    the turn fails with a retryable error that says what to do."""
    session, port = ada.session(), openclaw.port
    openclaw.stop()
    answer = ada.say(session, "Hello")
    assert (answer.status_code, answer.code) == (503, "gateway_unavailable")
    assert "openclaw gateway run" in answer.body
    assert answer.headers["Retry-After"].isdecimal()
    assert ada.messages(session)[1]["error"]["retryable"]
    threading.Timer(0.1, openclaw.start).start()
    assert ada.say(session, "Hello again").status_code == 200
    assert openclaw.port == port


@pytest.mark.parametrize("end", ["empty", "blank"])
def test_no_response_is_an_empty_reply(ada: Person, end: str) -> None:
    """The gateway's placeholder for an empty reply is not stored or sent as text, streamed or not."""
    session = ada.session()
    answer = ada.say(session, f"[[end={end}]]")
    assert '"status":"empty"' in answer.body
    assert answer.text == ada.say(session, f"[[end={end} split=1]]", stream=True).text == ""
    assert [row["status"] for row in ada.messages(session) if row["role"] == "assistant"] == ["empty", "empty"]


@pytest.mark.parametrize("how", ["split=1", "split=3 crlf=1", "comments=1", "end=surrogates", "crlf=1 comments=1"])
def test_however_the_bytes_come_the_text_is_the_same(ada: Person, how: str) -> None:
    """The text is the same with frames cut inside a character, CRLF, comments, and split surrogate pairs."""
    session, text = ada.session(), f"[[chunks=12 size=9 {how}]]"
    assert ada.say(session, text, stream=True).text == reply_text(text)
    assert ada.messages(session)[1]["content"] == reply_text(text)


def test_a_frame_of_five_megabytes_is_delivered(ada: Person) -> None:
    """A frame of 5 MB from the gateway is delivered and stored completely."""
    session, text = ada.session(), "[[big=5000000]]"
    assert ada.say(session, text, stream=True).text == reply_text(text)
    assert ada.messages(session)[1]["content"] == reply_text(text)


# --- restart and crash --------------------------------------------------------------------------------


def test_a_process_that_ends_in_order_finishes_its_turns(tmp_path: Path, openclaw: StandIn) -> None:
    """On SIGTERM, a turn that ends within DRAIN_SECONDS is completed and stored."""
    text = "[[chunks=50 size=5 delay=0.02]]"
    with Service(tmp_path, openclaw.url, openclaw.token, DRAIN_SECONDS="20") as service, service.person() as person:
        session = person.session()
        with person.listen(session, text) as (_, stream):
            stream.read(to_first_text=True)
        service.stop()
        service.start()
        reply = person.messages(session)[1]
    assert (reply["status"], reply["content"]) == ("complete", reply_text(text))


def test_a_turn_past_the_drain_is_interrupted_with_its_text(tmp_path: Path, openclaw: StandIn) -> None:
    """A turn that runs longer than DRAIN_SECONDS ends as `interrupted`, keeps its text, and its readers receive that
    error. The next process runs the queued turn."""
    with Service(tmp_path, openclaw.url, openclaw.token, DRAIN_SECONDS="0.1") as service, service.person() as person:
        session = person.session()
        with person.listen(session, SLOW) as (_, stream), ThreadPoolExecutor(1) as pool:
            stream.read(to_first_text=True)
            waiting = pool.submit(person.say, session, "waiting")
            until(lambda: len(person.messages(session)) == 4, 5, "the second message to wait")
            service.stop()
            refused = waiting.result()
        assert (refused.status_code, refused.code) == (503, "interrupted")
        service.start()
        assert refused.message_id == person.messages(session)[3]["id"]
        until(lambda: person.reply(session, "complete"), 15, "the queued turn to be completed")
        reply = person.messages(session)[1]
    assert (reply["status"], reply["error"]["code"]) == ("interrupted", "interrupted")
    assert "Traceback" not in service.output()
    assert reply["error"]["retryable"]
    assert reply["content"] != "" and reply_text(SLOW).startswith(reply["content"])


def test_a_reply_that_the_gateway_finished_is_recovered(tmp_path: Path, openclaw: StandIn) -> None:
    """A reply whose end was not stored before a crash is completed from the gateway's history."""
    text = "[[chunks=40 size=5 delay=0.02]]"
    with Service(tmp_path, openclaw.url, openclaw.token) as service, service.person() as person:
        session = person.session()
        with person.listen(session, text) as (_, stream):
            stream.read(to_first_text=True)
            time.sleep(0.3)  # until some text and the run id are stored
            service.freeze()
            until(lambda: openclaw.completed, 10, "the gateway to finish")
            service.kill()
        service.start()
        reply = until(lambda: person.reply(session, *FINAL), 15, "the reply to be final")
    assert (reply["status"], reply["content"]) == ("complete", reply_text(text))
    assert reply["usage"] == {"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 15}


@pytest.mark.slow
def test_the_other_process_ends_what_a_dead_one_left(pair: tuple[Service, Service]) -> None:
    """After kill -9 the other process ends the turn as interrupted and runs the queued one. As long as the first
    process is only frozen, the other one does not touch its turns."""
    one, two = pair
    with one.person() as person, person.at(two.url) as elsewhere, ThreadPoolExecutor(1) as pool:
        session, other = person.session(), person.session()
        with person.listen(session, SLOW) as (_, stream), elsewhere.listen(other, SLOW) as (_, alive):
            stream.read(to_first_text=True)
            lost = pool.submit(person.lose, session, "waiting")
            until(lambda: len(elsewhere.messages(session)) == 4, 5, "the second message to wait")
            one.freeze()
            time.sleep(5)  # longer than REAP_EVERY
            assert elsewhere.messages(session)[1]["status"] == "streaming"
            one.kill()
            lost.result()
            until(lambda: elsewhere.reply(session, "complete"), 15, "the queued turn to be completed")
            assert elsewhere.messages(session)[1]["status"] == "interrupted"
            alive.read()
        assert (alive.text, alive.finish) == (reply_text(SLOW), "stop")


@contextmanager
def _under_load(person: Person, sessions: list[JSON], sent: list[tuple[str, int]]) -> Iterator[None]:
    """Sends messages to each session, each with its own key, until the block ends. `sent` collects the text and the
    reply's id of each message that was acknowledged."""
    over = threading.Event()

    def send(session: JSON) -> None:
        while not over.is_set():
            text = f"[[chunks=20 size=6 delay=0.01 seed={random.randrange(10**9)}]]"
            try:
                with person.listen(session, text, key=text) as (response, stream):
                    if response.status_code == 200:
                        sent.append((text, int(response.headers["X-Message-Id"])))
                        stream.read()
            except httpx.TransportError:
                over.wait(0.05)

    with ThreadPoolExecutor(len(sessions)) as pool:
        senders = [pool.submit(send, session) for session in sessions]
        try:
            yield
        finally:
            over.set()
        for sender in senders:
            sender.result()


@pytest.mark.parametrize("kills", [3, pytest.param(50, marks=pytest.mark.slow)])
def test_fifty_kills_lose_and_double_nothing(tmp_path: Path, openclaw: StandIn, kills: int) -> None:
    """With repeated kill -9 while six sessions reply, no acknowledged message is lost or doubled, every turn is final
    within 15 s of the next start, and every text is a prefix of the gateway's."""
    sent: list[tuple[str, int]] = []
    with Service(tmp_path, openclaw.url, openclaw.token) as service, service.person() as person:
        project = person.project()
        sessions = [person.session(project) for _ in range(6)]
        for kill in range(kills):
            with _under_load(person, sessions, sent):
                time.sleep(random.Random(kill).uniform(0.1, 0.5))
                service.kill()
            service.start()
            until(lambda: _all_final(tmp_path), 15, "every turn to be final")
        rows = [row for session in sessions for row in person.messages(session)]
    assert len(sent) > 2 * kills, "the load was too small to mean anything"
    _check_rows(rows, sent)
    with sqlite3.connect(tmp_path / "service.db") as conn:
        assert conn.execute("PRAGMA integrity_check").fetchone()[0] == "ok"


def _all_final(directory: Path) -> bool:
    with sqlite3.connect(directory / "service.db") as conn:
        query = "SELECT count(*) FROM messages WHERE status IN ('queued', 'streaming')"
        return bool(conn.execute(query).fetchone()[0] == 0)


def _check_rows(rows: list[JSON], sent: list[tuple[str, int]]) -> None:
    asked = [row["content"] for row in rows if row["role"] == "user"]
    replies = {row["id"]: row for row in rows if row["role"] == "assistant"}
    assert len(asked) == len(set(asked)) == len(replies), "a message was doubled"
    assert {text for text, _ in sent} <= set(asked), "an acknowledged message was lost"
    assert {message_id for _, message_id in sent} <= set(replies)
    pairs = zip(asked, replies.values(), strict=True)
    for text, reply in pairs:
        whole = reply_text(text)
        assert reply["status"] in ("complete", "interrupted")
        assert whole == reply["content"] if reply["status"] == "complete" else whole.startswith(reply["content"])


# --- deleting -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["session", "project", "account"])
def test_deleting_stops_what_runs_and_removes_it_everywhere(
    ada: Person, served: Served, openclaw: StandIn, what: str
) -> None:
    """A delete aborts the agent's run and removes images, project folder and the gateway's session."""
    project = ada.project()
    session = ada.session(project)
    ada.say(session, "a picture", image=PNG)
    with ada.listen(session, SLOW) as (_, stream):
        stream.read(to_first_text=True)
        _delete(ada, what, project, session)
        stream.read()
        assert (stream.finish, stream.done) == ("stopped", True)
    until(lambda: openclaw.deleted, 5, "the gateway's session to be deleted")
    assert openclaw.deleted == [f"agent:main:openai-user:adapter-session-{session['session_key']}"]
    assert len(openclaw.aborted) == 1
    assert not (served.settings.images / session["session_key"]).exists()
    assert Path(project["project_path"]).exists() == (what == "session")


PNG = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mP8z8BQDwAEhQGAhKmMIQAAAABJRU5ErkJggg=="


def _delete(person: Person, what: str, project: JSON, session: JSON) -> None:
    if what == "session":
        person.delete(f"/sessions/{session['id']}")
    elif what == "project":
        person.delete(f"/projects/{project['id']}")
    else:
        person.delete("/auth/me", password=person.password)


def test_a_delete_in_another_process_stops_a_silent_agent(pair: tuple[Service, Service], openclaw: StandIn) -> None:
    """The process that runs a turn notices that another process deleted its row, even while the agent is silent. It
    aborts the agent's run and ends the streams of its readers as `stopped`."""
    one, other = pair
    with one.person() as ada, ada.at(other.url) as elsewhere:
        session = ada.session()
        with ada.listen(session, "[[first=600]]") as (_, stream):
            until(lambda: openclaw.runs, 5, "the run")
            elsewhere.delete(f"/sessions/{session['id']}")
            until(lambda: openclaw.aborted, 2, "the agent's run to be aborted")
            stream.read()
        assert (stream.finish, stream.done) == ("stopped", True)
        until(lambda: openclaw.deleted, 5, "the gateway's session to be deleted")


def test_a_delete_does_not_wait_for_a_gateway_that_is_down(tmp_path: Path, openclaw: StandIn) -> None:
    """While the gateway is down, a delete succeeds. The gateway's session is deleted when it is up again, also after
    a restart of the service."""
    with Service(tmp_path, openclaw.url, openclaw.token) as service, service.person() as person:
        session = person.session()
        person.say(session, "Hello")
        openclaw.stop()
        person.delete(f"/sessions/{session['id']}")
        service.stop()
        service.start()
        openclaw.start()
        until(lambda: openclaw.deleted, 40, "the gateway's session to be deleted")


def test_a_process_that_dies_in_a_delete_leaves_it_to_others(tmp_path: Path, openclaw: StandIn) -> None:
    """A job that a dead process had claimed is completed by the next process."""
    with Service(tmp_path, openclaw.url, openclaw.token) as service, service.person() as person, ExitStack() as stack:
        session = person.session()
        port = openclaw.port
        openclaw.stop()
        hole = stack.enter_context(IdleProxy(1, idle=30, port=port))
        person.delete(f"/sessions/{session['id']}")
        until(lambda: hole.connections, 5, "the process to run its job")
        service.kill()
        stack.close()
        openclaw.start()
        service.start()
        until(lambda: openclaw.deleted, 15, "the gateway's session to be deleted")
