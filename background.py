"""Work of the process that outlives the caller who asked for it."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine
from contextvars import Context
from typing import Any, TypeVar

T = TypeVar("T")

LONGEST_PAUSE = 5  # seconds between two tries of periodic work that fails


class Tasks:
    """Tasks that run to their end. The event loop keeps weak references only; these are kept here."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[Any]] = set()

    def __bool__(self) -> bool:
        """Whether any task still runs."""
        return bool(self._tasks)

    def spawn(self, work: Coroutine[Any, Any, T], context: Context | None = None) -> "asyncio.Task[T]":
        """Starts work in the background, in that context if one is given."""
        task = asyncio.create_task(work, context=context)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def wait(self, seconds: float | None = None) -> None:
        """Waits until the tasks that run now have ended, or for so many seconds."""
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=seconds)

    async def cancel(self) -> None:
        """Cancels the tasks that still run, and waits until they have ended."""
        for task in self._tasks:
            task.cancel()
        await self.wait()


_completing = Tasks()


async def completed(work: Coroutine[Any, Any, T]) -> T:
    """Runs work to its end, even where the caller that waits for its result is cancelled."""
    return await asyncio.shield(_completing.spawn(work))


async def repeat(seconds: float, work: Callable[[], Awaitable[None]], log: logging.Logger) -> None:
    """Runs work again and again, with a pause of so many seconds. A failure is logged and work is tried again, with
    pauses that double up to LONGEST_PAUSE."""
    failed = 0
    while True:
        try:
            await work()
            failed = 0
        except Exception:
            failed += 1
            log.exception("%s failed, retrying", getattr(work, "__name__", "periodic work"))
        await asyncio.sleep(min(seconds * 2**failed, max(seconds, LONGEST_PAUSE)))
