"""The stand-in behaves as OpenClaw was observed to behave. Otherwise the other tests would prove little."""

import base64
import hashlib
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from websockets.sync.client import connect

from .stand_in import StandIn, reply_text

Json = dict[str, Any]

ROOT = Path(__file__).resolve().parent.parent
KEY = "agent:main:openai-user:someone"
PNG = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)


@pytest.fixture
def gateway() -> Iterator[StandIn]:
    with StandIn() as stand_in:
        yield stand_in


def ask(gateway: StandIn, content: object, headers: dict[str, str] | None = None, **body: object) -> httpx.Response:
    payload = {"model": "agent:main", "user": "someone", "messages": [{"role": "user", "content": content}], **body}
    token = {"Authorization": f"Bearer {gateway.token}"}
    return httpx.post(f"{gateway.url}/v1/chat/completions", json=payload, headers=token | (headers or {}))


def events(body: str) -> list[Json]:
    """Returns the JSON of each event of a stream, with an empty dict for `[DONE]`, and without comments."""
    lines = [line for line in body.replace("\r\n", "\n").split("\n") if line.startswith("data: ")]
    return [{} if line == "data: [DONE]" else json.loads(line[6:]) for line in lines]


def text_of(body: str) -> str:
    deltas = [event["choices"][0]["delta"] for event in events(body) if event.get("choices")]
    whole = "".join(delta.get("content", "") for delta in deltas)
    return whole.encode("utf-16", "surrogatepass").decode("utf-16")


@contextmanager
def calling(gateway: StandIn, text: str, stream: bool) -> Iterator[None]:
    """Sends a request, and closes its connection at the end of the block without having read the response."""
    body = {"model": "agent:main", "user": "someone", "stream": stream, "messages": [{"role": "user", "content": text}]}
    content = json.dumps(body).encode()
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nHost: stand-in\r\nAuthorization: Bearer {gateway.token}\r\n"
        f"Content-Length: {len(content)}\r\n\r\n"
    )
    with socket.create_connection((gateway.host, gateway.port)) as connection:
        connection.sendall(head.encode() + content)
        yield


def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def call(gateway: StandIn, method: str, params: Json, token: str | None = None) -> Json:
    """Calls a method over WebSocket, after the handshake. Returns its answer, or that of a handshake that failed."""
    with connect(gateway.url.replace("http", "ws") + "/") as websocket:
        assert json.loads(websocket.recv())["event"] == "connect.challenge"
        auth = {"minProtocol": 3, "maxProtocol": 4, "auth": {"token": token or gateway.token}}
        answer: Json = {}
        for number, (name, values) in enumerate((("connect", auth), (method, params))):
            websocket.send(json.dumps({"type": "req", "id": str(number), "method": name, "params": values}))
            answer = json.loads(websocket.recv())
            assert (answer["type"], answer["id"]) == ("res", str(number))
            if not answer["ok"]:
                break
        return answer


def history(gateway: StandIn, **params: object) -> list[Json]:
    messages: list[Json] = call(gateway, "chat.history", {"sessionKey": KEY, **params})["payload"]["messages"]
    return messages


def test_a_stream_has_openclaws_chunks_in_openclaws_order(gateway: StandIn) -> None:
    response = ask(gateway, "good day", stream=True, stream_options={"include_usage": True})
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    first, *contents, stop, usage, done = events(response.text)
    assert first["choices"] == [{"index": 0, "delta": {"role": "assistant"}, "finish_reason": None}]
    assert stop["choices"] == [{"index": 0, "delta": {}, "finish_reason": "stop"}]
    assert usage["choices"] == []
    assert usage["usage"] == {"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 15}
    assert done == {}
    assert [content["choices"][0]["delta"]["content"] for content in contents[:3]] == ["You", " said:", " good"]
    assert text_of(response.text) == "You said: good day (message 1 of this conversation)"
    heads = {(event["id"], event["object"], event["model"]) for event in events(response.text)[:-1]}
    assert heads == {(gateway.runs[0].run_id, "chat.completion.chunk", "agent:main")}
    assert gateway.runs[0].run_id.startswith("chatcmpl_")


def test_the_usage_chunk_is_sent_only_on_request(gateway: StandIn) -> None:
    assert all("usage" not in event for event in events(ask(gateway, "good day", stream=True).text))


def test_a_response_without_streaming_is_a_chat_completion(gateway: StandIn) -> None:
    body = ask(gateway, "good day").json()
    assert body["object"] == "chat.completion"
    message = {"role": "assistant", "content": "You said: good day (message 1 of this conversation)"}
    assert body["choices"] == [{"index": 0, "message": message, "finish_reason": "stop"}]
    assert body["usage"]["total_tokens"] == 15


def test_a_conversation_is_remembered_by_user_and_by_header(gateway: StandIn) -> None:
    """The header takes precedence over `user`. Without either, or with the key in the body, each message begins a new
    conversation."""
    ask(gateway, "one", user="Some-One")
    key = {"x-openclaw-session-key": "agent:main:openai-user:some-one"}
    assert text_of(ask(gateway, "two", key, user="other", stream=True).text).endswith(
        "(message 2 of this conversation)"
    )
    for _ in range(2):
        alone = ask(gateway, "three", user=None, session_key="agent:main:openai-user:some-one")
        assert "(message 1 of this conversation)" in alone.text
    assert [request.text for request in gateway.requests] == ["one", "two", "three", "three"]
    assert gateway.requests[1].session_key == key["x-openclaw-session-key"]
    assert gateway.requests[1].headers["x-openclaw-session-key"] == key["x-openclaw-session-key"]
    assert gateway.requests[1].body["user"] == "other"


def test_only_the_newest_user_message_is_answered(gateway: StandIn) -> None:
    messages = [
        {"role": "user", "content": "old"},
        {"role": "assistant", "content": "x"},
        {"role": "user", "content": "new"},
    ]
    assert "You said: new (" in ask(gateway, "", messages=messages).text


def test_images_reach_the_agent(gateway: StandIn) -> None:
    url = f"data:image/png;base64,{base64.b64encode(PNG).decode()}"
    content = [{"type": "text", "text": "look"}, {"type": "image_url", "image_url": {"url": url}}]
    reply = ask(gateway, content).json()["choices"][0]["message"]["content"]
    assert reply.endswith(f"[image {hashlib.sha256(PNG).hexdigest()[:12]}]")
    assert reply == reply_text("look", images=[PNG])


def image_part(url: str) -> list[Json]:
    return [{"type": "image_url", "image_url": {"url": url}}]


@pytest.mark.parametrize(
    ("content", "model", "message"),
    [
        ("x", "agent:nope", "Unknown agent 'nope'."),
        ("x", "gpt-5", "Invalid `model`. Use `openclaw` or `openclaw/<agentId>`."),
        (" ", "agent:main", "Missing user message in `messages`."),
        (image_part("http://example.com/b.png"), "agent:main", "Invalid image_url content in `messages`."),
        (image_part("data:image/png;base64,aGk="), "agent:main", "Invalid image_url content in `messages`."),
        (image_part("data:image/png;base64,###"), "agent:main", "Invalid image_url content in `messages`."),
        ("[[chunk=1]]", "agent:main", "The stand-in has no such directive: 'chunk'"),
        ("[[end=well]]", "agent:main", "The stand-in has no such end: well"),
    ],
)
def test_a_bad_request_is_refused_with_openclaws_message(
    gateway: StandIn, content: object, model: str, message: str
) -> None:
    response = ask(gateway, content, model=model)
    assert response.status_code == 400
    assert response.json() == {"error": {"message": message, "type": "invalid_request_error"}}


def test_a_body_over_20_mib_is_refused(gateway: StandIn) -> None:
    assert ask(gateway, "x" * (20 * 1024 * 1024)).status_code == 413


def test_chat_and_models_need_the_token_and_an_enabled_endpoint(gateway: StandIn) -> None:
    wrong = {"Authorization": "Bearer wrong"}
    right = {"Authorization": f"Bearer {gateway.token}"}
    models = f"{gateway.url}/v1/models"
    unauthorized = {"error": {"message": "Unauthorized", "type": "unauthorized"}}
    assert ask(gateway, "x", wrong).json() == httpx.get(models, headers=wrong).json() == unauthorized
    listed = httpx.get(models, headers=right).json()
    assert [model["id"] for model in listed["data"]] == ["openclaw", "openclaw/default", "openclaw/main"]
    gateway.endpoint_enabled = False
    for response in (ask(gateway, "x"), httpx.get(models, headers=right)):
        assert (response.status_code, response.text) == (404, "Not Found")
        assert response.headers["content-type"].startswith("text/plain")
    assert gateway.requests == []


def test_its_health_needs_no_token(gateway: StandIn) -> None:
    started = {"ok": True, "status": "started", "version": "stand-in"}
    assert httpx.get(f"{gateway.url}/startupz").json() == started
    assert httpx.get(f"{gateway.url}/healthz").json() == {"ok": True, "status": "live"}


@pytest.mark.parametrize("status", [400, 401, 404, 413, 429, 500, 503])
def test_a_failing_status_has_openclaws_body(gateway: StandIn, status: int) -> None:
    response = ask(gateway, f"[[status={status}]]", stream=True)
    assert response.status_code == status
    assert response.headers.get("retry-after") == ("7" if status == 429 else None)
    assert response.text in ("Not Found", "Service Unavailable") or response.json()["error"]["message"]
    assert gateway.sessions == {}


def test_the_text_is_deterministic_and_has_special_characters(gateway: StandIn) -> None:
    directive = "[[chunks=40 size=25 seed=3]]"
    text = reply_text(directive)
    assert text_of(ask(gateway, directive, stream=True).text) == text
    assert len(text) == 1000
    assert {"\n", "\u2028", "\u200d", '"', "\\", "日", "é" if "é" in text else "ï"} <= set(text)
    assert text != reply_text("[[chunks=40 size=25 seed=4]]")
    assert len(events(ask(gateway, directive, stream=True).text)) == 40 + 3


@pytest.mark.parametrize("framing", ["split=1", "split=7", "crlf=1", "comments=1", "split=5 crlf=1 comments=1"])
def test_unusual_framing_carries_the_same_text(gateway: StandIn, framing: str) -> None:
    response = ask(gateway, f"[[chunks=8 size=9 {framing}]]", stream=True)
    assert text_of(response.text) == reply_text("[[chunks=8 size=9]]")
    assert ("\r\n\r\n" in response.text) == ("crlf" in framing)
    assert response.text.startswith(": a comment") == ("comments" in framing)


def test_split_cuts_within_characters(gateway: StandIn) -> None:
    text = "[[chunks=8 size=9 split=1]]"
    body = {"model": "agent:main", "messages": [{"role": "user", "content": text}], "stream": True}
    url, token = f"{gateway.url}/v1/chat/completions", {"Authorization": f"Bearer {gateway.token}"}
    with httpx.stream("POST", url, json=body, headers=token) as response:
        sizes = {len(piece) for piece in response.iter_raw()}
    assert 1 in sizes


def test_big_is_one_chunk_of_that_many_bytes(gateway: StandIn) -> None:
    text = text_of(ask(gateway, "[[big=100001]]", stream=True).text)
    assert len(text.encode()) == 100_001
    assert text == reply_text("[[big=100001]]")


def test_ends_of_complete_replies(gateway: StandIn) -> None:
    """These directives complete the reply; after `no_done`, only the line `[DONE]` is missing."""
    for end, last in (("done", {}), ("empty", {}), ("blank", {}), ("surrogates", {}), ("no_done", None)):
        directive = f"[[chunks=2 end={end}]]"
        body = ask(gateway, directive, stream=True).text
        assert text_of(body) == reply_text(directive)
        *_, before, final = events(body)
        assert (final if last is None else before)["choices"][0]["finish_reason"] == "stop"
        assert (final == {}) == (last == {})
    assert reply_text("[[end=empty]]") == "No response from OpenClaw."
    assert reply_text("[[end=blank]]") == ""
    assert [run.state for run in gateway.runs] == ["complete"] * 5


def test_surrogates_are_sent_as_two_escapes(gateway: StandIn) -> None:
    body = ask(gateway, "[[chunks=2 size=3 end=surrogates]]", stream=True).content
    assert rb'{"content":"\ud83d"}' in body
    assert rb'{"content":"\ude00"}' in body
    assert "😀" in reply_text("[[chunks=2 size=3 end=surrogates]]")


def test_ends_of_incomplete_replies(gateway: StandIn) -> None:
    """Each response has status 200 and a correctly terminated body, but the transcript contains no reply."""
    eof = ask(gateway, "[[chunks=2 end=eof]]", stream=True).text
    assert text_of(eof) == reply_text("[[chunks=2]]")
    assert 'finish_reason":"stop' not in eof
    error = ask(gateway, "[[chunks=2 end=error]]", stream=True).text
    failed = {"error": {"message": "internal error", "type": "api_error"}}
    assert events(error)[-2:] == [failed, {}]
    assert b"data:" not in ask(gateway, "[[end=garbage]]", stream=True).content
    page = ask(gateway, "[[end=html]]", stream=True)
    assert page.headers["content-type"].startswith("text/html")
    with pytest.raises(json.JSONDecodeError):
        events(ask(gateway, "[[end=badjson]]", stream=True).text)
    assert [run.state for run in gateway.runs] == ["failed"] * 5
    assert {item["role"] for item in gateway.sessions[KEY]} == {"user"}
    assert gateway.aborted == []


def test_drop_cuts_the_connection_within_the_body(gateway: StandIn) -> None:
    with pytest.raises(httpx.RemoteProtocolError, match="incomplete chunked read"):
        ask(gateway, "[[chunks=2 end=drop]]", stream=True)
    assert [run.state for run in gateway.runs] == ["failed"]


@pytest.mark.parametrize("end", ["error", "garbage", "html", "badjson", "eof"])
def test_a_response_without_streaming_can_fail_too(gateway: StandIn, end: str) -> None:
    body = ask(gateway, f"[[end={end}]]").content.decode(errors="replace")
    assert "chat.completion" not in body or not body.endswith("}")


@pytest.mark.parametrize("directive", ["[[end=hang chunks=2]]", "[[first=60]]", "[[delay=60]]"])
@pytest.mark.parametrize("stream", [True, False])
def test_a_caller_that_disconnects_aborts_the_run(gateway: StandIn, directive: str, stream: bool) -> None:
    """The transcript keeps the user's message without a reply, and the session accepts another message."""
    with calling(gateway, directive, stream=stream):
        until(lambda: gateway.runs)
    until(lambda: gateway.aborted)
    assert [item["role"] for item in gateway.sessions[KEY]] == ["user"]
    assert "(message 2 of this conversation)" in ask(gateway, "again").text
    assert [run.text for run in gateway.completed] == ["again"]


def test_a_second_run_at_once_in_a_session_fails(gateway: StandIn) -> None:
    with calling(gateway, "[[end=hang]]", stream=True):
        until(lambda: gateway.runs)
        response = ask(gateway, "too soon")
        assert response.status_code == 500
        assert response.json() == {"error": {"message": "internal error", "type": "api_error"}}
        assert ask(gateway, "elsewhere", user="another").status_code == 200
    until(lambda: gateway.aborted)
    assert ask(gateway, "in time").status_code == 200


def test_history_has_openclaws_format(gateway: StandIn) -> None:
    ask(gateway, "good day", stream=True)
    user, assistant = history(gateway)
    assert (user["role"], user["content"], user["__openclaw"]["seq"]) == ("user", "good day", 1)
    assert assistant["content"] == [{"type": "text", "text": reply_text("good day")}]
    assert assistant["stopReason"] == "stop"
    assert assistant["usage"] == {"input": 10, "output": 5, "totalTokens": 15}
    assert assistant["__openclaw"]["runId"] == gateway.runs[0].run_id
    assert assistant["__openclaw"]["seq"] == 2
    assert isinstance(assistant["timestamp"], int)
    assert [item["role"] for item in history(gateway, limit=1)] == ["assistant"]


def test_history_truncates_long_messages(gateway: StandIn) -> None:
    ask(gateway, "[[chunks=900 size=10]]")
    long = history(gateway)[1]
    assert long["__openclaw"]["truncated"] is True
    assert long["content"][0]["text"].endswith("\n...(truncated)...")
    assert len(long["content"][0]["text"]) <= 8000 + 20
    whole = history(gateway, maxChars=500_000)[1]
    assert whole["content"][0]["text"] == reply_text("[[chunks=900 size=10]]")
    assert "truncated" not in whole["__openclaw"]
    assert call(gateway, "chat.history", {"sessionKey": KEY, "maxChars": 500_001})["ok"] is False


def test_a_session_can_be_deleted_and_an_unknown_one_too(gateway: StandIn) -> None:
    ask(gateway, "good day")
    assert call(gateway, "sessions.list", {"limit": 10})["payload"]["sessions"] == [{"key": KEY}]
    for known in (True, False):
        answer = call(gateway, "sessions.delete", {"key": KEY, "deleteTranscript": True})
        assert (answer["ok"], answer["payload"]["deleted"]) == (True, known)
    assert gateway.deleted == [KEY, KEY]
    assert history(gateway) == []
    assert "(message 1 of this conversation)" in ask(gateway, "new").text


def test_the_websocket_refuses_a_wrong_token_and_an_unknown_method(gateway: StandIn) -> None:
    refused = call(gateway, "sessions.list", {}, token="wrong")
    assert (refused["ok"], refused["error"]["code"]) == (False, "INVALID_REQUEST")
    assert refused["error"]["message"].startswith("unauthorized: ")
    assert call(gateway, "nothing", {})["error"]["message"] == "unknown method: nothing"
    hello = call(gateway, "connect", {"auth": {"token": gateway.token}})["payload"]
    assert hello == {"type": "hello-ok", "protocol": 4, "server": {"version": "stand-in"}}


def test_the_stand_in_stops_during_streams_and_restarts_on_its_port() -> None:
    gateway = StandIn()
    gateway.start()
    port = gateway.port
    failures: list[Exception] = []

    def hang() -> None:
        try:
            ask(gateway, "[[end=hang]]", stream=True)
        except httpx.HTTPError as error:
            failures.append(error)

    caller = threading.Thread(target=hang)
    caller.start()
    until(lambda: gateway.runs and gateway.runs[0].sent == 120)
    gateway.stop()
    caller.join(5)
    assert [type(failure) for failure in failures] == [httpx.RemoteProtocolError]
    assert gateway.runs[0].state == "failed"
    with pytest.raises(httpx.ConnectError):
        ask(gateway, "x")
    gateway.start()
    assert gateway.port == port
    assert "(message 2 of this conversation)" in ask(gateway, "good day").text
    gateway.stop()
    gateway.stop()
