"""Work that outlives its caller: it is kept, completed, and repeated however often it fails."""

import asyncio
import logging

import pytest

from background import LONGEST_PAUSE, Tasks, completed, repeat


def test_repeated_work_survives_any_number_of_failures(monkeypatch: pytest.MonkeyPatch) -> None:
    """After some 1,024 failures, 85 minutes of a full disk, the pause once overflowed and the work ended for good."""
    pauses: list[float] = []
    calls = 0

    async def sleep(seconds: float) -> None:
        pauses.append(seconds)

    async def fail() -> None:
        nonlocal calls
        calls += 1
        if calls == 3000:
            raise asyncio.CancelledError
        raise OSError("on purpose")

    monkeypatch.setattr(asyncio, "sleep", sleep)
    log = logging.getLogger("tests.quiet")
    log.disabled = True
    with pytest.raises(asyncio.CancelledError):
        asyncio.run(repeat(0.2, fail, log, "test"))
    assert pauses[:4] == [0.4, 0.8, 1.6, 3.2]
    assert set(pauses[5:]) == {LONGEST_PAUSE}
    assert len(pauses) == 2999


def test_work_is_completed_although_its_caller_is_cancelled() -> None:
    """The caller stops waiting, the work ends all the same."""
    done: list[str] = []

    async def work() -> None:
        await asyncio.sleep(0.05)
        done.append("work")

    async def story() -> None:
        caller = asyncio.create_task(completed(work()))
        await asyncio.sleep(0.01)
        caller.cancel()
        with pytest.raises(asyncio.CancelledError):
            await caller
        await asyncio.sleep(0.2)

    asyncio.run(story())
    assert done == ["work"]


def test_tasks_can_be_waited_for_and_cancelled() -> None:
    """`wait` returns after its seconds, `cancel` once every task has ended."""

    async def story() -> None:
        tasks = Tasks()
        task = tasks.spawn(asyncio.sleep(60))
        await tasks.wait(0.01)
        assert tasks
        await tasks.cancel()
        assert task.cancelled()
        assert not tasks

    asyncio.run(story())
