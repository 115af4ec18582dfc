"""Background tasks: work that continues after its caller was cancelled, and periodic work."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine
from contextvars import Context
from typing import Any, TypeVar

T = TypeVar("T")

LONGEST_PAUSE = 5  # seconds between two attempts of periodic work that fails, unless its own interval is longer


class Tasks:
    """A set of running tasks. It holds references to them, because the event loop holds only weak ones and Python could
    otherwise collect a task before it has ended."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[Any]] = set()

    def __bool__(self) -> bool:
        """Returns whether any task is still running."""
        return bool(self._tasks)

    def spawn(self, work: Coroutine[Any, Any, T], context: Context | None = None) -> "asyncio.Task[T]":
        """Starts a task, in `context` if given, otherwise in a copy of the caller's context."""
        task = asyncio.create_task(work, context=context)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def wait(self, seconds: float | None = None) -> None:
        """Waits until the tasks that are running now have ended, at most `seconds` if given. Cancels none of them."""
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=seconds)

    async def cancel(self) -> None:
        """Cancels the tasks that still run, and waits until they have ended."""
        for task in self._tasks:
            task.cancel()
        await self.wait()


_completing = Tasks()


async def completed(work: Coroutine[Any, Any, T]) -> T:
    """Runs `work` and returns its result. If the caller is cancelled while it waits, `work` continues to its end."""
    return await asyncio.shield(_completing.spawn(work))


async def repeat(seconds: float, work: Callable[[], Awaitable[None]], log: logging.Logger, what: str) -> None:
    """Calls `work` forever, `seconds` after it has returned. `what` names it in the log line of a failure.

    After a failure it tries again, with pauses that double up to LONGEST_PAUSE.
    """
    pause = seconds
    while True:
        try:
            await work()
            pause = seconds
        except Exception:
            pause = min(2 * pause, max(seconds, LONGEST_PAUSE))
            log.exception("could not %s, retrying in %g s", what, pause)
        await asyncio.sleep(pause)
