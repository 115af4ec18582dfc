"""Parses the event stream of a chat completion. Takes bytes and does no network I/O."""

import json
import logging
from collections.abc import Iterator
from typing import NamedTuple

import errors

from .failures import no_completion

log = logging.getLogger("clawd.gateway")


NO_REPLY = "No response from OpenClaw."  # the gateway sends this text if the agent produced none
MAX_FRAME = 32 * 1024 * 1024  # bytes from one event to the next; more is an error, because it would fill the memory
MAX_RUN_ID = 200  # characters; OpenClaw's own have 45
BOM = b"\xef\xbb\xbf"  # may precede an event stream
DONE = b"[DONE]"
LIMITS = frozenset({"length", "content_filter"})  # reasons for an end that the agent did not choose

_decode = json.JSONDecoder().decode  # without the checks of json.loads, which take a tenth of the time of a chunk


class Chunk(NamedTuple):
    """The result of one read from the gateway: new text, and what has arrived of the run's id, usage and end.

    `finish_reason` is `length` or `content_filter` if a limit of the model ended the reply, otherwise `stop`; None
    before the gateway has sent a reason.
    """

    text: str
    run_id: str | None
    usage: dict[str, int] | None
    finish_reason: str | None


class EventReader:
    """Splits the bytes of an event stream into the data of its events.

    Follows the WHATWG's rules for server-sent events (https://html.spec.whatwg.org/multipage/server-sent-events.html):
    lines end with LF, CR LF or CR, a BOM may come first, and comments, lines without a colon and all fields other than
    `data` are ignored. There are two deviations, which keep data that has arrived: `[DONE]` needs no blank line after
    it, and `close` yields the data of an event that the end of the stream cut off.
    """

    def __init__(self) -> None:
        self._open: list[bytes] = []  # pieces of a line whose end has not arrived
        self._size = 0  # bytes since the last event
        self._data: list[bytes] = []
        self._at_start = True  # no line has been read
        self._after_cr = False  # the last byte was a CR, so that an LF that follows belongs to the same line end

    def feed(self, received: bytes) -> Iterator[bytes]:
        """Yields the data of each event that these bytes complete.

        Raises errors.GatewayError if there are more than MAX_FRAME bytes without an event.
        """
        self._size += len(received)
        if self._size > MAX_FRAME:
            raise no_completion()
        if self._after_cr or b"\r" in received:
            received = self._with_line_feeds(received)
        if b"\n" not in received:
            self._open.append(received)
            return
        lines = b"".join((*self._open, received)).split(b"\n")
        self._open = [lines.pop()]
        if self._at_start:
            self._at_start, lines[0] = False, lines[0].removeprefix(BOM)
        for line in lines:
            if line.startswith(b"data:"):
                if len(line) > len(DONE) + 20 or line[5:].strip() != DONE:
                    self._data.append(line[5:])
                    continue
            elif line:
                continue
            if self._data:
                data, self._data = b"\n".join(self._data), []
                self._size = len(self._open[0])
                yield data
            if line:
                yield DONE

    def close(self) -> Iterator[bytes]:
        """Yields the data of the event that is incomplete at the end of the stream, if any."""
        return self.feed(b"\n\n\n")  # a CR may have come last, in which case the first LF is ignored

    def _with_line_feeds(self, received: bytes) -> bytes:
        if self._after_cr:
            received = received.removeprefix(b"\n")
        self._after_cr = received.endswith(b"\r")
        return received.replace(b"\r\n", b"\n").replace(b"\r", b"\n")


class CompletionReader:
    """Reads the events of one chat completion. `done` is True once the gateway has sent `[DONE]`."""

    def __init__(self) -> None:
        self._events = EventReader()
        self._held = ""  # text that may still become NO_REPLY, or the first half of a surrogate pair
        self._started = False
        self._received = self._understood = False
        self.done = False
        self.run_id: str | None = None
        self.usage: dict[str, int] | None = None
        self.finish_reason: str | None = None

    def chunk(self, text: str) -> Chunk:
        """Returns this text with what has arrived besides text."""
        return Chunk(text, self.run_id, self.usage, self.finish_reason)

    def feed(self, received: bytes) -> str:
        """Returns the text in these bytes, whole characters only.

        Raises errors.GatewayError if the gateway reports an error or the bytes are not a chat completion. Text that
        came before the error is kept for `rest`.
        """
        self._received = True
        self._read(self._events.feed(received))
        return self._release()

    def finish(self) -> None:
        """Reads what the end of the stream cut off, for `rest` and `done`.

        Raises errors.GatewayError as `feed` does, and if nothing in the stream was part of a chat completion.
        """
        self._read(self._events.close(), cut=True)
        if self._received and not self._understood:
            raise no_completion()

    @property
    def undecided(self) -> bool:
        """True while `feed` holds back the first part of NO_REPLY, which may also be how a reply begins."""
        return not self._started and self._held != NO_REPLY and bool(self._held)

    def release(self) -> str:
        """Returns the text that `feed` held back because it may become NO_REPLY."""
        self._started = True
        return self._release()

    def rest(self) -> str:
        """Returns all text that has arrived and that `feed` has not returned.

        To be called when no more bytes follow, also after an error. Raises nothing.
        """
        try:
            self._read(self._events.close(), cut=True)
        except errors.GatewayError:
            log.debug("the last event of the stream is an error, and the stream had ended for another reason")
        held, self._held = self._held, ""
        return "" if held == NO_REPLY and not self._started else mended(held)

    def _release(self) -> str:
        text = self._held
        if not text or (not self._started and NO_REPLY.startswith(text)):
            return ""
        self._started = True
        keep = 1 if "\ud800" <= text[-1] <= "\udbff" else 0
        self._held = text[len(text) - keep :]
        return mended(text[: len(text) - keep])

    def _read(self, events: Iterator[bytes], cut: bool = False) -> None:
        """`cut`: the stream has ended, so that an event that is not JSON may be the first part of one."""
        try:
            for data in events:
                if data is DONE or self.done:
                    self.done = self._understood = True
                    break
                self._held += self._text_of(data, cut)
        except errors.GatewayError:
            self._events = EventReader()  # what follows an error is not part of the reply
            raise

    def _text_of(self, data: bytes, cut: bool) -> str:
        """Returns the text of an event. What carries no meaning (null, or absent) is not an error."""
        try:
            event = _decode(data.decode("utf-8", "replace"))
        except (ValueError, RecursionError):
            if cut or not data.strip():
                return ""
            raise no_completion() from None
        if event is None:
            return ""
        if not isinstance(event, dict):
            raise no_completion()
        if (error := event.get("error")) is not None and error not in (False, ""):
            raise _reported(error)
        self._understood = True
        if self.run_id is None:
            self.run_id = safe_run_id(event.get("id"))
        if isinstance(usage := event.get("usage"), dict):
            self.usage = usage_of(usage, "prompt_tokens", "completion_tokens", "total_tokens") or self.usage
        choice = _first_choice(choices) if (choices := event.get("choices")) else None
        if choice is None:
            return ""
        if isinstance(reason := choice.get("finish_reason"), str):
            self.finish_reason = reason if reason in LIMITS else "stop"
        return _content(choice.get("delta"))


def _reported(error: object) -> errors.GatewayError:
    log.warning("the gateway reported an error in its stream: %.500r", error)
    return errors.GatewayError(
        "The agent failed while it was replying. Try again. If the error persists, the operator should look "
        "at the gateway's log.",
        retryable=True,
    )


def _first_choice(choices: object) -> dict[str, object] | None:
    """Returns the choice with index 0, or None. Others are alternatives to it, which were not asked for."""
    if not isinstance(choices, list):
        raise no_completion()
    for at, choice in enumerate(choices):
        if not isinstance(choice, dict):
            raise no_completion()
        index = choice.get("index")
        if (at if index is None else index) == 0:
            return choice
    return None


def _content(delta: object) -> str:
    if isinstance(delta, dict):
        text = delta.get("content")
        if isinstance(text, str):
            return text
        if text is None:
            return ""
    elif delta is None:
        return ""
    raise no_completion()


def mended(text: str) -> str:
    """Joins UTF-16 surrogate pairs that arrived in two halves; a lone half becomes U+FFFD."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return text


def safe_run_id(run_id: object) -> str | None:
    """Returns a run id if it is printable ASCII and not longer than MAX_RUN_ID, otherwise None.

    The gateway's ids are stored and logged; one with half a surrogate pair, for example, could not be stored.
    """
    if isinstance(run_id, str) and 0 < len(run_id) <= MAX_RUN_ID and run_id.isascii() and run_id.isprintable():
        return run_id
    return None


def usage_of(raw: dict[str, object], prompt: str, completion: str, total: str) -> dict[str, int] | None:
    """Converts the gateway's usage to the names of our API; `prompt`, `completion` and `total` are its names in `raw`.

    Returns None if a count is missing.
    """
    names = ("prompt_tokens", "completion_tokens", "total_tokens")
    counts = zip(names, (raw.get(name) for name in (prompt, completion, total)), strict=True)
    usage = {name: count for name, count in counts if isinstance(count, int) and not isinstance(count, bool)}
    return usage if len(usage) == len(names) else None
