"""Now, and times as the contract writes them: ISO 8601, UTC, milliseconds, `Z`."""

import time
from datetime import UTC, datetime


def now() -> str:
    """The time as the contract writes it: ISO 8601, UTC, milliseconds, `Z`."""
    return iso_time(time.time())


def iso_time(seconds: float) -> str:
    """A time in unix seconds as the contract writes it."""
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
