"""Limits wrong passwords, so that nobody guesses them by trying."""

import time

from limits import RateLimitItemPerMinute
from limits.storage import MemoryStorage
from limits.strategies import FixedWindowRateLimiter

import errors

FAILURES_BY_CALLER = RateLimitItemPerMinute(10, 5)  # wrong passwords from one IP address for one account, per 5 minutes
FAILURES_BY_ACCOUNT = RateLimitItemPerMinute(100, 5)  # wrong passwords from all addresses for one account


class Throttle:
    """Limits wrong passwords per five minutes: from one IP address for one account, and from all addresses for one
    account. The counts are in memory, so each process counts for itself and starts from zero."""

    def __init__(self) -> None:
        self._limiter = FixedWindowRateLimiter(MemoryStorage())

    def check(self, account: str, caller: str) -> None:
        """Raises errors.TooMany if a limit is reached; its `retry_after` is the time until the window ends."""
        for limit, keys in self._limits(account, caller):
            if not self._limiter.test(limit, *keys):
                reset_at = self._limiter.get_window_stats(limit, *keys).reset_time
                raise errors.TooMany(
                    "There were too many wrong passwords for this account. Wait a few minutes, then try again.",
                    code="too_many_attempts",
                    retry_after=max(1, round(reset_at - time.time())),
                )

    def count(self, account: str, caller: str) -> None:
        """Counts one wrong password for an account from a caller's address."""
        for limit, keys in self._limits(account, caller):
            self._limiter.hit(limit, *keys)

    def _limits(self, account: str, caller: str) -> tuple[tuple[RateLimitItemPerMinute, tuple[str, ...]], ...]:
        return (FAILURES_BY_CALLER, (account, caller)), (FAILURES_BY_ACCOUNT, (account,))
