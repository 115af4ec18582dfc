"""The current time, and the format of all times in the API and the database: ISO 8601 in UTC with milliseconds."""

import time
from datetime import UTC, datetime


def now() -> str:
    """Returns the current time, for example `2026-11-25T09:00:00.123Z`."""
    return iso_time(time.time())


def iso_time(seconds: float) -> str:
    """Formats a Unix time in seconds, for example as `2026-11-25T09:00:00.123Z`."""
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
