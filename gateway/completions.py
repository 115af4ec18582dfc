"""Parses the event stream of a chat completion. Takes bytes and does no network I/O."""

import json
import logging
from collections.abc import Iterator
from typing import NamedTuple

import errors

from .failures import no_completion

log = logging.getLogger("clawd.gateway")


NO_REPLY = "No response from OpenClaw."  # the gateway sends this text if the agent produced none
MAX_FRAME = 32 * 1024 * 1024  # bytes of one event; a larger one is an error, so that it cannot fill the memory


class Chunk(NamedTuple):
    """The result of one read from the gateway: new text, and the run's id and usage if they have arrived."""

    text: str
    run_id: str | None
    usage: dict[str, int] | None


class EventReader:
    """Splits the bytes of an event stream (SSE) into the payloads of its events."""

    def __init__(self) -> None:
        self._open: list[bytes] = []  # pieces of a line whose end has not arrived
        self._size = 0
        self._data: list[bytes] = []

    def feed(self, received: bytes) -> Iterator[bytes]:
        """Yields the payloads that these bytes complete.

        Raises errors.GatewayError if the bytes are not an event stream, or an event is larger than MAX_FRAME.
        """
        self._size += len(received)
        if self._size > MAX_FRAME:
            raise no_completion()
        if b"\n" not in received:
            self._open.append(received)
            return
        lines = b"".join((*self._open, received)).split(b"\n")
        self._open = [lines.pop()]
        self._size = len(self._open[0]) + sum(map(len, self._data))
        for line in lines:
            if line.startswith(b"data:"):
                self._data.append(line[5:])
            elif line in (b"", b"\r"):
                if self._data:
                    payload, self._data = b"\n".join(self._data), []
                    yield payload
            elif not line.startswith((b":", b"event:", b"id:", b"retry:")):
                raise no_completion()


class CompletionReader:
    """Reads the events of one chat completion. `done` is True once the gateway has sent `[DONE]`."""

    def __init__(self) -> None:
        self._events = EventReader()
        self._held = ""  # text that may still become NO_REPLY, or the first half of a surrogate pair
        self._started = False
        self.done = False
        self.run_id: str | None = None
        self.usage: dict[str, int] | None = None

    def feed(self, received: bytes) -> str:
        """Returns the text in these bytes, whole characters only.

        Raises errors.GatewayError if the gateway reports an error or the bytes are not a chat completion. Text that
        came before the error is kept for `rest`.
        """
        for payload in self._events.feed(received):
            if payload.strip() == b"[DONE]":
                self.done = True
                break
            self._held += self._delta(payload)
        return self._release()

    def rest(self) -> str:
        """Returns the text that `feed` held back. To be called at the end of the stream, also after an error."""
        held, self._held = self._held, ""
        return "" if held == NO_REPLY and not self._started else _mend(held)

    def _release(self) -> str:
        text = self._held
        if not text or (not self._started and NO_REPLY.startswith(text)):
            return ""
        self._started = True
        keep = 1 if "\ud800" <= text[-1] <= "\udbff" else 0
        self._held = text[len(text) - keep :]
        return _mend(text[: len(text) - keep])

    def _delta(self, payload: bytes) -> str:
        try:
            chunk = json.loads(payload.decode())
        except ValueError:
            raise no_completion() from None
        if not isinstance(chunk, dict):
            raise no_completion()
        if "error" in chunk:
            log.warning("the gateway reported an error in its stream: %.500r", chunk["error"])
            raise errors.GatewayError(
                "The agent failed while it was replying. Try again. If the error persists, the operator should look "
                "at the gateway's log.",
                retryable=True,
            )
        if self.run_id is None and isinstance(chunk.get("id"), str):
            self.run_id = chunk["id"]
        if isinstance(chunk.get("usage"), dict):
            self.usage = usage_of(chunk["usage"], "prompt_tokens", "completion_tokens", "total_tokens")
        try:
            text = chunk["choices"][0]["delta"].get("content") if chunk["choices"] else None
        except (KeyError, IndexError, TypeError, AttributeError):
            raise no_completion() from None
        if not isinstance(text, str | None):
            raise no_completion()
        return text or ""


def _mend(text: str) -> str:
    """Joins UTF-16 surrogate pairs that arrived in two halves; a lone half becomes U+FFFD."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return text


def usage_of(raw: dict[str, object], prompt: str, completion: str, total: str) -> dict[str, int] | None:
    """Converts the gateway's usage to the names of our API; `prompt`, `completion` and `total` are its names in `raw`.

    Returns None if a count is missing.
    """
    counts = [raw.get(name) for name in (prompt, completion, total)]
    if not all(isinstance(count, int) for count in counts):
        return None
    names = ("prompt_tokens", "completion_tokens", "total_tokens")
    return {name: count for name, count in zip(names, counts, strict=True) if isinstance(count, int)}
