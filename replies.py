"""A reply as its readers see it, and the statuses in which it is final."""

import asyncio
from bisect import bisect_right
from collections.abc import Iterable
from weakref import WeakValueDictionary

import sql
from database import Database
from sql import Reply, Status

FINAL = frozenset({"complete", "stopped", "interrupted", "failed", "empty"})
SMALL = 512  # characters; shorter pieces are joined, so that a reply of many words is not a list of as many strings
LARGE = 65_536  # characters; longer pieces are split, so that no step of a reader costs more than what it sends


DELETED = sql.Ending("stopped", "", None, None, None, None)  # of a reply whose session was deleted


def finish_reason(status: Status, stored: str | None) -> str | None:
    """Returns the `finish_reason` of the API for a reply; None while it is not final.

    `stored` is the reason for which the model itself ended a complete reply early.
    """
    if status not in FINAL:
        return None
    if status in ("complete", "empty"):
        return stored or "stop"
    return "error" if status == "failed" else status


class LiveReply:
    """A reply as the readers in this process see it. If another process runs its turn, it follows the reply's row.

    Its text only grows. Offsets and lengths are in characters (Unicode code points).
    """

    def __init__(self, row: Reply) -> None:
        self.id = row.id
        self.message_id = row.message_id
        self.session_id = row.session_id
        self.created_at = row.created_at
        self.status: Status = row.status
        self.usage = row.usage
        self.error = row.error
        self.finish_reason = row.finish_reason  # of the model
        self.run_id: str | None = None
        self.first_after: float | None = None  # seconds from the request to the first text, if this process made it
        self.length = 0
        self._parts: list[str] = []
        self._ends: list[int] = []
        self._waiting: list[asyncio.Future[None]] = []

    @property
    def is_final(self) -> bool:
        """True if the reply has ended and will not change any more."""
        return self.status in FINAL

    def append(self, text: str) -> None:
        """Adds text and wakes the readers."""
        if not text:
            return
        if self._parts and len(self._parts[-1]) + len(text) <= SMALL:
            self.length += len(text)
            self._parts[-1] += text
            self._ends[-1] = self.length
        else:
            for at in range(0, len(text), LARGE):
                self._parts.append(text[at : at + LARGE])
                self.length += len(self._parts[-1])
                self._ends.append(self.length)
        self.wake()

    def text(self, after: int = 0, limit: int | None = None) -> str:
        """Returns text from offset `after` on: all of it, or at most `limit` characters even if more follow."""
        left = self.length - after if limit is None else min(limit, self.length - after)
        found: list[str] = []
        at = bisect_right(self._ends, after)
        while left > 0:
            start = after - (self._ends[at] - len(self._parts[at]))
            found.append(self._parts[at][start : start + left])
            after += len(found[-1])
            left -= len(found[-1])
            at += 1
        return "".join(found)

    def end(self, how: sql.Ending | Reply) -> None:
        """Sets how the reply ended, and wakes the readers. Its text must be complete."""
        self.status, self.usage, self.error, self.finish_reason = how.status, how.usage, how.error, how.finish_reason
        self.wake()

    def wake(self) -> None:
        """Wakes all readers, so that each checks what has changed."""
        waiting, self._waiting = self._waiting, []
        for waiter in waiting:
            _resolve(waiter)

    async def change(self, seconds: float) -> None:
        """Waits for the next change, at most `seconds`."""
        loop = asyncio.get_running_loop()
        waiter = loop.create_future()
        timer = loop.call_later(seconds, _resolve, waiter)
        self._waiting.append(waiter)
        try:
            await waiter
        finally:
            timer.cancel()

    async def finished(self) -> None:
        """Waits until the reply is final."""
        while not self.is_final:
            await self.change(60)


def _resolve(waiter: "asyncio.Future[None]") -> None:
    if not waiter.done():
        waiter.set_result(None)


class Replies:
    """The replies that somebody in this process reads or makes, each loaded once however many read it."""

    def __init__(self, db: Database) -> None:
        self._db = db
        self._loaded: WeakValueDictionary[int, LiveReply] = WeakValueDictionary()
        self._loading: dict[int, asyncio.Future[LiveReply | None]] = {}  # so that many readers load a reply once

    def add(self, reply: LiveReply) -> LiveReply:
        """Makes a reply known to its readers. Returns the one that is known already, if there is one."""
        return self._loaded.setdefault(reply.id, reply)

    async def get(self, reply_id: int) -> LiveReply | None:
        """Returns a reply, live while it runs in this process or another one; None if it does not exist."""
        reply = self._loaded.get(reply_id)
        if reply is not None:
            return reply
        loading = self._loading.get(reply_id)
        if loading is None:
            loading = self._loading[reply_id] = asyncio.ensure_future(self._load_reply(reply_id))
            loading.add_done_callback(lambda _: self._loading.pop(reply_id))
        return await asyncio.shield(loading)

    async def _load_reply(self, reply_id: int) -> LiveReply | None:
        row = self._db.read(sql.select_reply, reply_id)
        if row is None:
            return None
        reply = LiveReply(row)
        for piece in await self._load_text(row):
            reply.append(piece)
        return self.add(reply)

    async def follow(self, reply: LiveReply) -> None:
        """Reads what another process has stored of a reply since the last call."""
        row = self._db.read(sql.select_reply, reply.id)
        if row is None:
            reply.end(DELETED)
            return
        while pieces := self._db.read(sql.select_pieces, reply.id, reply.length):
            for piece in pieces:
                reply.append(piece)
            await asyncio.sleep(0)  # a long text must not hold the event loop
        if row.status in FINAL:
            position = 0
            for piece in await self._load_text(row):
                reply.append(piece[max(reply.length - position, 0) :])
                position += len(piece)
            # A delete between the two reads leaves a text that is not complete.
            deleted = self._db.read(sql.select_reply, reply.id) is None
            reply.end(DELETED if deleted else row)
        else:
            reply.status = row.status

    async def follow_all(self, but: Iterable[int]) -> None:
        """Follows the replies that other processes run; `but` are those that this one runs."""
        for reply in list(self._loaded.values()):
            if not reply.is_final and reply.id not in but:
                await self.follow(reply)

    async def _load_text(self, row: Reply) -> list[str]:
        """The whole stored text. A short one is read at once, a long one on a thread."""
        if row.status in FINAL and self._db.read(sql.text_size, row.id) <= LARGE:
            return self._db.read(sql.read_text, row.id)
        return await self._db.read_aside(sql.read_text, row.id)
