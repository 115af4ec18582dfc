"""The parser of a chat completion's stream. It knows bytes and nothing of a network."""

import json
import logging
from collections.abc import Iterator
from typing import NamedTuple

import errors

from .failures import no_completion

log = logging.getLogger("clawd.gateway")


NO_REPLY = "No response from OpenClaw."  # what the gateway writes where the agent said nothing
MAX_FRAME = 32 * 1024 * 1024  # bytes of one event; more is no reply but a fault


class Chunk(NamedTuple):
    """What one read from the gateway brought: new text, the run's id, the usage where it came."""

    text: str
    run_id: str | None
    usage: dict[str, int] | None


class EventReader:
    """Cuts an event stream's bytes into the payloads of its events."""

    def __init__(self) -> None:
        self._open: list[bytes] = []  # pieces of a line whose end has not come
        self._size = 0
        self._data: list[bytes] = []

    def feed(self, received: bytes) -> Iterator[bytes]:
        """The payloads that these bytes complete. Raises errors.GatewayError for what is no event stream."""
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
    """Reads the events of one chat completion. `done` once the gateway has said that it was over."""

    def __init__(self) -> None:
        self._events = EventReader()
        self._held = ""  # might become NO_REPLY, or is half of a character
        self._started = False
        self.done = False
        self.run_id: str | None = None
        self.usage: dict[str, int] | None = None

    def feed(self, received: bytes) -> str:
        """The text that these bytes bring, whole characters only. Raises errors.GatewayError, whose cause may
        have been preceded by text: that is kept for `rest`."""
        for payload in self._events.feed(received):
            if payload.strip() == b"[DONE]":
                self.done = True
                break
            self._held += self._delta(payload)
        return self._release()

    def rest(self) -> str:
        """The text that was held back, at the end of the stream, whatever ended it."""
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
                "The agent failed while it was replying. Try again; if it goes on, the operator should look at "
                "the gateway's log.",
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
    """Joins characters that came as two halves (UTF-16 surrogates); a half alone becomes U+FFFD."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return text


def usage_of(raw: dict[str, object], prompt: str, completion: str, total: str) -> dict[str, int] | None:
    """The usage in the names of the contract, out of a dictionary with these names; None where a count is missing."""
    counts = [raw.get(name) for name in (prompt, completion, total)]
    if not all(isinstance(count, int) for count in counts):
        return None
    names = ("prompt_tokens", "completion_tokens", "total_tokens")
    return {name: count for name, count in zip(names, counts, strict=True) if isinstance(count, int)}
