"""Finds a reply in the gateway's history of a conversation, as its WebSocket method `chat.history` returns it."""

from collections.abc import Sequence
from typing import NamedTuple

from .completions import LIMITS, mended, safe_run_id, usage_of

HISTORY = {"limit": 200, "maxChars": 500_000}  # maxChars: the maximum of a text that chat.history returns
ENDED = LIMITS | {"stop"}  # values of `stopReason` in the last message of a finished reply
WRITTEN = ENDED | {"toolUse", "aborted"}  # values of `stopReason` in messages whose text is the agent's

Item = dict[str, object]


class Finished(NamedTuple):
    """A reply in the gateway's history. `complete` is False if the text is only what the agent had written so far.

    `finish_reason` is `length` or `content_filter` if a limit of the model ended the reply, otherwise `stop`; None
    if the reply is not complete.
    """

    text: str
    run_id: str
    usage: dict[str, int] | None
    complete: bool = True
    finish_reason: str | None = "stop"


class Period(NamedTuple):
    """Unix times in seconds, of the gateway's clock, between which the gateway must have received a message."""

    start: float
    end: float


def find_reply(
    items: Sequence[Item],
    asked: str,
    run_id: str | None,
    known: set[str],
    got: str,
    *,
    period: Period | None = None,
    in_flight: object = None,
) -> Finished | None:
    """Returns the reply among the items of `chat.history`, or None.

    A known `run_id` identifies the reply. Without one, the newest user message must be `asked` and must have arrived
    in the `period` if there is one, and the only run after it, which must not be in `known`, is that of the reply.
    `in_flight` is the history's `inFlightRun`. The reply must begin with `got`.
    """
    flight: Item = in_flight if isinstance(in_flight, dict) else {}
    users = [at for at, item in enumerate(items) if item.get("role") == "user"]
    if run_id is None:
        if not users or not _is_asked(items[users[-1]], asked, period):
            return None
        after = [_run_of(item) for item in items[users[-1] + 1 :] if item.get("role") == "assistant"]
        runs = {*after, *([flight.get("runId")] if flight else [])}
        run_id = safe_run_id(runs.pop()) if len(runs) == 1 else None
        if run_id is None or run_id in known:
            return None
    ours = [at for at, item in enumerate(items) if item.get("role") == "assistant" and _run_of(item) == run_id]
    if ours and (not users or users[0] > ours[0]):
        return None  # the reply may have begun before the first item
    rows = [items[at] for at in ours]
    if any(_notes(row).get("truncated") for row in rows):
        return None
    return _reply(rows, flight.get("text") if flight.get("runId") == run_id else None, run_id, got)


def _reply(rows: Sequence[Item], writing: object, run_id: str, got: str) -> Finished | None:
    """`writing` is the text of the run if it is in flight, otherwise None."""
    live = mended(writing) if isinstance(writing, str) else ""
    texts = [text for row in rows if row.get("stopReason") in WRITTEN and (text := _text_of(row))]
    reason = rows[-1].get("stopReason") if rows else None
    if reason in ENDED and any(text.endswith(live) for text in _joined(texts)):
        # The stream may have left out messages before a tool call, so the reply may begin with a later message.
        wholes = (text for start in range(len(texts)) for text in _joined(texts[start:]))
        text = next((text for text in wholes if text.startswith(got)), "")
        raw = rows[-1].get("usage")
        usage = usage_of(raw, "input", "output", "totalTokens") if isinstance(raw, dict) else None
        return Finished(text, run_id, usage, finish_reason=str(reason)) if text else None
    cumulative = any(text and live.startswith(text) for text in _joined(texts))
    found = [live] if cumulative else [live, *_joined([*texts, live])]
    text = max((text for text in found if text.startswith(got)), key=len, default="")
    return Finished(text, run_id, None, complete=False, finish_reason=None) if len(text) > len(got) else None


def _joined(texts: Sequence[str]) -> list[str]:
    """Returns the ways in which the gateway may have joined the texts of several messages in its stream."""
    streamed = ""
    for text in texts:
        there = len(streamed) - len(streamed.rstrip("\n")) + len(text) - len(text.lstrip("\n"))
        streamed += "\n" * max(0, 2 - there if streamed and text else 0) + text
    return ["".join(texts), streamed]


def _is_asked(item: Item, asked: str, period: Period | None) -> bool:
    at = item.get("timestamp")
    if period and not (isinstance(at, int | float) and period.start <= at / 1000 <= period.end):
        return False
    return _text_of(item).strip() == asked.strip()  # the gateway stores messages without the space around them


def _run_of(item: Item) -> object:
    return _notes(item).get("runId")


def _notes(item: Item) -> Item:
    notes = item.get("__openclaw")
    return notes if isinstance(notes, dict) else {}


def _text_of(item: Item) -> str:
    content = item.get("content")
    if isinstance(content, str):
        return mended(content)
    parts = content if isinstance(content, list) else []
    return mended("".join(str(part.get("text", "")) for part in parts if isinstance(part, dict)))
