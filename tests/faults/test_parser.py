"""Streams of the gateway that are unusual, cut off or wrong. What carries no meaning is ignored, and text that has
arrived is never lost by how the stream ends."""

import json
from collections.abc import Iterator

import pytest

import errors
from gateway import NO_REPLY, CompletionReader

DONE = b"data: [DONE]\n\n"


def event(text: str | None = None, **more: object) -> bytes:
    """A chunk of a completion as an event, with other fields than text if they are given."""
    choice = {"index": 0, "delta": {} if text is None else {"content": text}, "finish_reason": None}
    return b"data: " + json.dumps({"id": "run", "choices": [choice], **more}).encode() + b"\n\n"


def read(data: bytes, step: int = 10_000) -> tuple[str, CompletionReader]:
    """The text of a whole stream that comes in pieces of `step` bytes, and its reader."""
    reader = CompletionReader()
    text = "".join(reader.feed(data[start : start + step]) for start in range(0, len(data), step))
    if not reader.done:
        reader.finish()
    return text + reader.rest(), reader


MEANINGLESS = {
    "unknown field": b"nonsense: 1\n",
    "line without a colon": b"nonsense\n",
    "colon without a field": b":\n",
    "other fields": b"event: message\nid: 7\nretry: 10\n\n",
    "fields without a value": b"id\nevent\nretry\ndata\n\n",
    "empty data": b"data:\n\ndata: \n\n",
    "null": b"data: null\n\n",
    "no error": b'data: {"error": null}\n\ndata: {"error": false}\n\ndata: {"error": ""}\n\n',
    "no choices": b'data: {}\n\ndata: {"choices": null}\n\ndata: {"choices": []}\n\n',
    "no delta": b'data: {"choices": [{"index": 0}]}\n\ndata: {"choices": [{"index": 0, "delta": null}]}\n\n',
    "no content": b'data: {"choices": [{"index": 0, "delta": {"content": null, "role": "assistant"}}]}\n\n',
    "no usage": b'data: {"choices": [], "usage": null}\n\n',
    "another choice": b'data: {"choices": [{"index": 1, "delta": {"content": "x"}, "finish_reason": "length"}]}\n\n',
    "two choices, ours last": b'data: {"choices": [{"index": 2, "delta": {"content": "x"}}, {"index": 0}]}\n\n',
}


@pytest.mark.parametrize("step", [1, 3, 10_000])
@pytest.mark.parametrize("end", [b"\n", b"\r", b"\r\n"], ids=["LF", "CR", "CRLF"])
@pytest.mark.parametrize("odd", MEANINGLESS)
def test_what_carries_no_meaning_changes_nothing(odd: str, end: bytes, step: int) -> None:
    """Each oddity failed the whole reply, or was mixed into it. It must be ignored, whatever the line ends."""
    data = event("a", usage={"prompt_tokens": 1, "completion_tokens": 2, "total_tokens": 3})
    data += MEANINGLESS[odd] + event("é") + MEANINGLESS[odd] + DONE
    text, reader = read(data.replace(b"\n", end), step)
    assert (text, reader.done, reader.run_id, reader.finish_reason) == ("aé", True, "run", None)
    assert reader.usage == {"prompt_tokens": 1, "completion_tokens": 2, "total_tokens": 3}


@pytest.mark.parametrize("step", [1, 2, 10_000])
@pytest.mark.parametrize("first", [b"", b": comment\n\n", b"\n\r\n\r"])
def test_a_byte_order_mark_comes_first_only(first: bytes, step: int) -> None:
    """A BOM at the start failed the reply. It is ignored there, and is text within a text."""
    assert read(b"\xef\xbb\xbf" + first + event("a\ufeff") + DONE, step)[0] == "a\ufeff"


@pytest.mark.parametrize("step", [1, 5, 10_000])
def test_line_ends_may_be_mixed(step: int) -> None:
    """LF, CR LF and a lone CR each end a line, wherever the network cuts."""
    data = (
        event("a").replace(b"\n\n", b"\r\r\n") + event("b").replace(b"\n\n", b"\n\r") + event("c") + b"data: [DONE]\r\r"
    )
    assert read(data, step)[0] == "abc"


@pytest.mark.parametrize("done", [b"data: [DONE]\n", b"data:[DONE]\r", b"data: [DONE]", b"data: [DONE] \r\n"])
def test_the_end_needs_no_blank_line(done: bytes) -> None:
    """`[DONE]` in the last line of a stream, or in one that ends with it, made the whole reply incomplete."""
    for before in (event("a"), event("a")[:-1]):
        text, reader = read(before + done)
        assert (text, reader.done) == ("a", True)


def test_the_end_is_seen_before_the_connection_ends() -> None:
    """A gateway that leaves out the blank line and the connection open would end the turn by its silence."""
    reader = CompletionReader()
    assert reader.feed(event("a") + b"data: [DONE]\n") == "a"
    assert reader.done


@pytest.mark.parametrize("cut", [1, 2])
def test_an_event_without_its_blank_line_is_text(cut: int) -> None:
    """Text that arrived whole was lost if the stream ended before the blank line behind it, or the line's end."""
    text, reader = read(event("a") + event("b")[:-cut])
    assert (text, reader.done) == ("ab", False)


@pytest.mark.parametrize("cut", [b"dat", b"data: [DO", b'data: {"id"', event("b")[:-4]])
def test_half_an_event_is_neither_text_nor_an_error(cut: bytes) -> None:
    """A connection that breaks within an event is a broken connection, not an answer of another program."""
    text, reader = read(event("a") + cut)
    assert (text, reader.done) == ("a", False)


def test_an_error_as_the_last_line_is_that_error() -> None:
    """An error without its blank line was taken for a broken connection."""
    reader = CompletionReader()
    reader.feed(event("a") + b'data: {"error": {"message": "internal error"}}')
    with pytest.raises(errors.GatewayError) as caught:
        reader.finish()
    assert caught.value.code == "gateway_error"
    assert reader.rest() == ""


@pytest.mark.parametrize("error", [b'{"message": "x"}', b"{}", b'"x"', b"true", b"5"])
def test_an_error_is_an_error(error: bytes) -> None:
    """Tolerance stops at what says that the agent failed: half a reply must not be stored as whole."""
    reader = CompletionReader()
    with pytest.raises(errors.GatewayError):
        reader.feed(event("a") + b'data: {"error": ' + error + b"}\n\n" + event("b") + DONE)
    assert (reader.rest(), reader.done) == ("a", False)


def foreign() -> Iterator[bytes]:
    """Bodies in which nothing belongs to a chat completion."""
    yield b"<!doctype html>\n<title>Welcome</title>\n"
    yield b"\x00\xffnothing that resembles\xfe an event stream\r\r\n{]"
    yield b": only comments\n\n"
    yield b'data: {"cut'


@pytest.mark.parametrize("data", list(foreign()))
def test_a_stream_without_any_chunk_is_another_programs(data: bytes) -> None:
    """Lines without meaning are ignored one by one, but a stream of nothing else is an error."""
    reader = CompletionReader()
    assert reader.feed(data) == ""
    with pytest.raises(errors.GatewayError) as caught:
        reader.finish()
    assert (caught.value.code, caught.value.retryable) == ("gateway_error", False)


@pytest.mark.parametrize("line", [b"x", b": ping", b"data:", b"data"])
def test_a_flood_without_any_event_is_refused(line: bytes) -> None:
    """What is ignored does not fill the memory, nor keep a turn busy for ever."""
    reader = CompletionReader()
    with pytest.raises(errors.GatewayError):
        for _ in range(40):
            reader.feed(line * (1_000_000 // len(line)))


def test_deep_nesting_is_an_error_of_the_gateway() -> None:
    """JSON nested deeper than Python's stack ended the turn with an unexpected exception."""
    reader = CompletionReader()
    with pytest.raises(errors.GatewayError) as caught:
        reader.feed(event("a") + b'data: {"x": ' + b"[" * 200_000 + b"\n\n")
    assert caught.value.code == "gateway_error"
    assert reader.rest() == "a"


def test_bytes_that_are_not_utf8_cost_one_character() -> None:
    """One wrong byte failed the whole reply; the standard replaces it."""
    assert read(event("caf*").replace(b"*", b"\xe9") + DONE)[0] == "caf\ufffd"


@pytest.mark.parametrize("pieces", [["N"], ["No resp"], ["No response ", "from"], ["No response from OpenClaw"]])
def test_text_that_begins_like_no_reply_is_not_lost(pieces: list[str]) -> None:
    """Text that may become the gateway's words for an empty reply is held back, and was lost on a stop."""
    data = b"".join(map(event, pieces))
    reader = CompletionReader()
    assert reader.feed(data) == "" and reader.undecided
    assert reader.rest() == "".join(pieces)
    reader = CompletionReader()
    reader.feed(data)
    assert reader.release() == "".join(pieces) and not reader.undecided
    assert reader.feed(event(NO_REPLY)) == NO_REPLY


@pytest.mark.parametrize(
    ("reasons", "finish"),
    [
        (["stop"], "stop"),
        (["length"], "length"),
        (["content_filter"], "content_filter"),
        (["length", "stop"], "stop"),
        (["stop", "length", None], "length"),
        (["tool_calls"], "stop"),
        ([None], None),
        ([5], None),
    ],
)
def test_the_reason_of_the_end_is_kept(reasons: list[object], finish: str | None) -> None:
    """A reply that the model's budget cut off was reported as complete. The last reason counts."""
    ends = [b'data: {"choices":[{"finish_reason":' + json.dumps(reason).encode() + b"}]}\n\n" for reason in reasons]
    text, reader = read(event("a") + b"".join(ends) + DONE)
    assert (text, reader.finish_reason, reader.chunk("x").finish_reason) == ("a", finish, finish)


@pytest.mark.parametrize("odd", ["", "\ud83d", "a\nb", "a\x00", "é", "x" * 201, 5, None, ["run"]])
def test_a_run_id_that_cannot_be_stored_is_ignored(odd: object) -> None:
    """A run id with half a surrogate pair made each write of its reply fail. The next sound one is taken."""
    reader = CompletionReader()
    reader.feed(event("a", id=odd))
    assert reader.run_id is None
    reader.feed(event("b", id="chatcmpl_1") + event("c", id="chatcmpl_2"))
    assert reader.run_id == "chatcmpl_1"


@pytest.mark.parametrize("usage", [{}, {"prompt_tokens": True}, {"prompt_tokens": "1"}, [1], "1", None])
def test_usage_that_is_none_does_not_replace_usage(usage: object) -> None:
    """Counts that are missing or not integers are ignored, and don't remove what an earlier event said."""
    rest = {"completion_tokens": 2, "total_tokens": 3}
    odd = {**rest, **usage} if isinstance(usage, dict) else usage
    assert read(event("a", usage=odd) + DONE)[1].usage is None
    sound = {"prompt_tokens": 1, **rest}
    assert read(event("a", usage=sound) + event("b", usage=odd) + DONE)[1].usage == sound
