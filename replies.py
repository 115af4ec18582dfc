"""A reply as its readers see it, and the statuses in which it is final."""

import asyncio
from bisect import bisect_right

from sql import Failure, Reply, Status

FINAL = frozenset({"complete", "stopped", "interrupted", "failed", "empty"})


class LiveReply:
    """A reply as the readers in this process see it. If another process runs its turn, it follows the reply's row.

    Offsets and lengths are in characters (Unicode code points).
    """

    def __init__(self, row: Reply) -> None:
        self.id = row.id
        self.message_id = row.message_id
        self.session_id = row.session_id
        self.created_at = row.created_at
        self.status: Status = row.status
        self.usage = row.usage
        self.error = row.error
        self.run_id: str | None = None
        self.first_after: float | None = None  # seconds from the request to the first text, if this process made it
        self.length = 0
        self._parts: list[str] = []
        self._ends: list[int] = []
        self._waiting: list[asyncio.Future[None]] = []
        self.append(row.content)

    @property
    def is_final(self) -> bool:
        """True if the reply has ended and will not change any more."""
        return self.status in FINAL

    def append(self, text: str) -> None:
        """Adds text and wakes the readers."""
        if text:
            self.length += len(text)
            self._parts.append(text)
            self._ends.append(self.length)
            self.wake()

    def text(self, after: int = 0, limit: int | None = None) -> str:
        """Returns text from offset `after` on: all of it, or at most `limit` characters even if more follow."""
        at = bisect_right(self._ends, after)
        if at == len(self._parts):
            return ""
        start = self._ends[at] - len(self._parts[at])
        until = at + 1
        while until < len(self._parts) and (limit is None or self._ends[until] - after <= limit):
            until += 1
        text = "".join(self._parts[at:until])[after - start :]
        return text if limit is None else text[:limit]

    def follow(self, row: Reply | None) -> None:
        """Updates the reply from its row. None stands for a row that was deleted: the reply ends as `stopped`."""
        if row is None:
            self.end("stopped", None, None)
            return
        self.append(row.content[self.length :])
        if row.status != self.status:
            self.end(row.status, row.usage, row.error)

    def end(self, status: Status, usage: dict[str, int] | None, error: Failure | None) -> None:
        """Sets the status, usage and error and wakes the readers."""
        self.status, self.usage, self.error = status, usage, error
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
