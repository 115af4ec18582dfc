"""The requests to the gateway, the parser of its stream, and the search in its history."""

import json
from collections.abc import Iterator
from typing import Any

import pytest

import errors
from gateway import NO_REPLY, CompletionReader, EventReader, agent_session, build_request, find_reply

KEY = "6f1c2a34-0b1c-4d5e-8f90-a1b2c3d4e5f6"
IMAGE: dict[str, object] = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}


@pytest.mark.parametrize("images", [[], [IMAGE], [IMAGE, IMAGE]])
def test_every_request_names_its_conversation_twice(images: list[dict[str, object]]) -> None:
    """`user` and the header name the same session, with and without images; `model` names the session's agent."""
    request = build_request(
        agent_id="Helper", session_key=KEY, project=("P", "about", "/folder"), text="Hello", images=images
    )
    assert request.body["user"] == f"adapter-session-{KEY}"
    assert request.headers == {"x-openclaw-session-key": f"agent:helper:openai-user:adapter-session-{KEY}"}
    assert request.body["model"] == "agent:Helper"
    assert "session_key" not in json.dumps(request.body)
    messages: Any = request.body["messages"]
    system, user = messages
    assert all(word in system["content"] for word in ("'P'", "about", "/folder"))
    assert user["content"] == ([{"type": "text", "text": "Hello"}, *images] if images else "Hello")


def test_images_alone_need_no_text() -> None:
    """A message that has only images has no empty text part."""
    request = build_request(agent_id="main", session_key=KEY, project=("P", None, ""), text="", images=[IMAGE])
    assert request.body["messages"][-1]["content"] == [IMAGE]  # type: ignore[index]  # JSON, whose types are unknown


def test_the_session_key_is_lower_case() -> None:
    """The key is in lower case. The gateway converts `user` to lower case but not the header, and both must match."""
    assert agent_session("Main", KEY.upper()) == f"agent:main:openai-user:adapter-session-{KEY}"


def frame(text: str | None, **more: object) -> bytes:
    """Returns a chunk of a stream as an event."""
    delta = {} if text is None else {"content": text}
    return b"data: " + json.dumps({"id": "run", "choices": [{"delta": delta}], **more}).encode() + b"\n\n"


DONE = b"data: [DONE]\n\n"


def read(data: bytes, step: int) -> tuple[str, CompletionReader]:
    """Feeds a stream to a reader in pieces of `step` bytes. Returns its text and the reader."""
    reader = CompletionReader()
    text = "".join(reader.feed(data[start : start + step]) for start in range(0, len(data), step))
    return text + reader.rest(), reader


@pytest.mark.parametrize("step", [1, 2, 3, 7, 10_000])
@pytest.mark.parametrize("ends", [b"\n", b"\r\n"])
def test_a_stream_may_be_cut_anywhere(step: int, ends: bytes) -> None:
    """Text, run id, usage and end do not depend on where the bytes are cut and how the lines end."""
    usage = {"prompt_tokens": 1, "completion_tokens": 2, "total_tokens": 3, "more": {}}
    data = b": comment\n\nevent: x\nid: 1\nretry: 5\n" + frame(None) + frame("é🚀 \u2028") + frame("\n\nb")
    data += b'data: {"choices":[],\ndata: "usage":' + json.dumps(usage).encode() + b"}\n\n" + DONE
    text, reader = read(data.replace(b"\n", ends), step)
    assert (text, reader.done, reader.run_id) == ("é🚀 \u2028\n\nb", True, "run")
    assert reader.usage == {"prompt_tokens": 1, "completion_tokens": 2, "total_tokens": 3}


@pytest.mark.parametrize("step", [1, 5, 10_000])
@pytest.mark.parametrize(
    ("pieces", "text"),
    [
        ([NO_REPLY], ""),
        (["No resp", "onse from OpenClaw."], ""),
        (["No resp"], "No resp"),
        (["No response from OpenClaw.", " Really."], "No response from OpenClaw. Really."),
        (["None", NO_REPLY], f"None{NO_REPLY}"),
        (["a\ud83d", "\ude00b"], "a😀b"),
        (["a\ud83d"], "a\ufffd"),
        (["\ude00b"], "\ufffdb"),
    ],
)
def test_placeholder_and_surrogates(pieces: list[str], text: str, step: int) -> None:
    """The placeholder for an empty reply is dropped only if it is the whole text; surrogate halves are joined."""
    data = b"".join(map(frame, pieces)) + DONE
    assert read(data, step)[0] == text


def wrong() -> Iterator[bytes]:
    """Yields data that is not a stream of a chat completion."""
    yield b"data: {\n\n"
    yield b"data: 5\n\n"
    yield b'data: "text"\n\n'
    yield b"data: \xff\n\n"
    yield b'data: {"choices": 5}\n\n'
    yield b'data: {"choices": [5]}\n\n'
    yield b'data: {"choices": [{"delta": {"content": 5}}]}\n\n'
    yield b'data: {"choices": [{"delta": 5}]}\n\n'


@pytest.mark.parametrize("data", list(wrong()))
def test_invalid_streams_raise_an_error(data: bytes) -> None:
    """Bytes that are not a chat completion raise an error that is not retryable. Text before them is kept."""
    reader = CompletionReader()
    with pytest.raises(errors.GatewayError) as caught:
        reader.feed(frame("before") + data)
    assert (caught.value.code, caught.value.retryable) == ("gateway_error", False)
    assert reader.rest() == "before"


def test_an_error_frame_raises_an_error() -> None:
    """An error frame raises an error that does not contain the gateway's message. Text before it is kept."""
    reader = CompletionReader()
    with pytest.raises(errors.GatewayError) as caught:
        reader.feed(frame("so far") + b'data: {"error": {"message": "secret inside"}}\n\n' + DONE)
    assert caught.value.retryable
    assert "secret" not in caught.value.message
    assert reader.rest() == "so far"


def test_an_endless_line_is_refused() -> None:
    """A line that never ends raises an error at a limit, so that it does not fill the memory."""
    reader = EventReader()
    with pytest.raises(errors.GatewayError):
        for _ in range(40):
            list(reader.feed(b"x" * 1_000_000))


def item(role: str, text: str, run_id: str | None = None, **more: Any) -> dict[str, object]:
    """Returns an item of the gateway's history."""
    note = {"id": "i", **({"runId": run_id} if run_id else {}), **more}
    content: object = text if role == "user" else [{"type": "text", "text": text}]
    return {"role": role, "content": content, "stopReason": "stop", "__openclaw": note}


@pytest.mark.parametrize(
    ("items", "run_id", "known", "got", "text"),
    [
        ([item("user", "q"), item("assistant", "abc", "r")], "r", set(), "ab", "abc"),
        ([item("user", "q"), item("assistant", "abc", "r")], None, set(), "", "abc"),
        ([item("user", "q"), item("assistant", "a", "r"), item("assistant", "b", "r")], "r", set(), "a\n", "a\n\nb"),
        ([item("user", "q"), item("assistant", "abc", "r")], None, {"r"}, "", None),
        ([item("user", "q"), item("assistant", "abc", "other")], "r", set(), "", None),
        ([item("user", "another"), item("assistant", "abc", "r")], None, set(), "", None),
        ([item("user", "q"), item("assistant", "abc", "r")], "r", set(), "xyz", None),
        ([item("user", "q"), item("assistant", "abc", "r", truncated=True)], "r", set(), "", None),
        ([item("assistant", "old", "r0"), item("user", "q")], None, set(), "", None),
        ([{**item("assistant", "abc", "r"), "stopReason": "aborted"}], "r", set(), "", None),
        ([], "r", set(), "", None),
    ],
)
def test_only_the_reply_itself_is_recovered(
    items: list[dict[str, object]], run_id: str | None, known: set[str], got: str, text: str | None
) -> None:
    """A reply in the history is used only if it certainly belongs to the turn, is complete, and begins with the text
    that has arrived."""
    found = find_reply(items, "q", run_id, known, got)
    assert (found and found.text) == text
