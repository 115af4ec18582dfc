"""Limits wrong passwords, so that nobody guesses them by trying."""

import math
import time

import errors

FAILURES_BY_CALLER = 10  # wrong passwords from one IP address for one account, per WINDOW
FAILURES_BY_ACCOUNT = 100  # wrong passwords from all addresses for one account, per WINDOW
WINDOW = 300  # seconds, which begin with the first wrong password


class Throttle:
    """Limits wrong passwords per five minutes: from one IP address for one account, and from all addresses for one
    account. The counts are in memory, so each process counts for itself and starts from zero.

    The five minutes are measured by the monotonic clock, so a change of the system time neither ends nor prolongs them.
    """

    def __init__(self) -> None:
        self._windows: dict[tuple[str, ...], tuple[float, int]] = {}  # key → end of its window, wrong passwords in it

    def check(self, account: str, caller: str) -> None:
        """Raises errors.TooMany if a limit is reached; its `retry_after` is the time until the window ends."""
        now = time.monotonic()
        for limit, key in _limits(account, caller):
            ends_at, count = self._windows.get(key, (now, 0))
            if count >= limit and now < ends_at:
                raise errors.TooMany(
                    "There were too many wrong passwords for this account. Wait a few minutes, then try again.",
                    code="too_many_attempts",
                    retry_after=math.ceil(ends_at - now),
                )

    def count(self, account: str, caller: str) -> None:
        """Counts one wrong password for an account from a caller's address."""
        now = time.monotonic()
        # The windows have one length, so the one that began first ends first: no more than the ended ones are visited.
        while self._windows and next(iter(self._windows.values()))[0] <= now:
            del self._windows[next(iter(self._windows))]
        for _, key in _limits(account, caller):
            ends_at, count = self._windows.get(key, (now + WINDOW, 0))
            self._windows[key] = ends_at, count + 1


def _limits(account: str, caller: str) -> tuple[tuple[int, tuple[str, ...]], ...]:
    return (FAILURES_BY_CALLER, (account, caller)), (FAILURES_BY_ACCOUNT, (account,))
