"""Log lines and metrics.

Code that knows the request, user, session or turn of the current task records it once (`begin_request`, `note`). Each
line that the task logs from then on contains these ids.
"""

import json
import logging
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from contextvars import Context, ContextVar, copy_context
from datetime import UTC, datetime
from typing import Literal, NamedTuple

from prometheus_client import (
    CONTENT_TYPE_PLAIN_0_0_4,
    CollectorRegistry,
    Counter,
    Histogram,
    ProcessCollector,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

Form = Literal["plain", "json"]

CONTENT_TYPE = CONTENT_TYPE_PLAIN_0_0_4
STDOUT = 1
SHORTEST_SECRET = 8  # characters; replacing shorter secrets everywhere would make lines unreadable
ACCESS_TOKEN = re.compile(r"eyJ[\w-]+\.[\w-]+\.[\w-]*")
# Characters that a terminal, a log shipper or Python takes for the end of a line, or that control a terminal. If they
# were not escaped, a caller could forge log lines. Lone surrogates are included because UTF-8 cannot encode them.
CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
PROGRESS_EVERY = 2.0  # seconds between two progress reports
FIRST_TOKEN_BUCKETS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)  # seconds

# Without this, each counter would have a second series `…_created` with its start time, which no dashboard needs.
disable_created_metrics()  # type: ignore[no-untyped-call]  # the package does not annotate this function


# --- ids in log lines ---------------------------------------------------------------------------------


class _Ids(NamedTuple):
    request_id: str | None = None
    user_id: int | None = None
    session_id: int | None = None
    turn_id: int | None = None


_NO_IDS = _Ids()
_ids: ContextVar[_Ids] = ContextVar("ids", default=_NO_IDS)


def begin_request(request_id: str) -> None:
    """Adds a request's id to the log lines of this task, and removes all ids that were recorded before."""
    _ids.set(_Ids(request_id))


def note(*, user_id: int | None = None, session_id: int | None = None, turn_id: int | None = None) -> None:
    """Adds these ids to the log lines of this task, and keeps the others. A turn's id is its reply's message id."""
    known = _ids.get()
    _ids.set(_Ids(known.request_id, user_id or known.user_id, session_id or known.session_id, turn_id or known.turn_id))


def turn_context(session_id: int, turn_id: int, *, asked_here: bool) -> Context:
    """Returns a context for the tasks of a turn, with the turn's ids for their log lines. With `asked_here`, it also
    keeps the ids of the request and user of the current task, because that request began the turn."""
    ids = _ids.get() if asked_here else _NO_IDS
    context = copy_context()
    context.run(_ids.set, ids._replace(session_id=session_id, turn_id=turn_id))
    return context


# --- the log ------------------------------------------------------------------------------------------


class _Formatter(logging.Formatter):
    """Base class of both formats: builds message and traceback without secrets."""

    def __init__(self, secrets: Iterable[str]) -> None:
        super().__init__()
        self._secrets = [secret for secret in secrets if len(secret) >= SHORTEST_SECRET]

    def _message(self, record: logging.LogRecord) -> str:
        try:
            return self._without_secrets(record.getMessage())
        except (TypeError, ValueError):
            return f"{record.msg} (the arguments of this log call do not match its format string)"

    def _traceback(self, record: logging.LogRecord) -> str:
        parts = [self.formatException(record.exc_info)] if record.exc_info and record.exc_info[0] else []
        parts += [self.formatStack(record.stack_info)] if record.stack_info else []
        return self._without_secrets("\n".join(parts))

    def _without_secrets(self, text: str) -> str:
        for secret in self._secrets:
            text = text.replace(secret, "[secret]")
        return ACCESS_TOKEN.sub("[token]", text) if "eyJ" in text else text


class _Plain(_Formatter):
    def format(self, record: logging.LogRecord) -> str:
        """Formats a record as one line of text; a traceback follows on indented lines."""
        ids = _ids.get()
        names = ("user", ids.user_id), ("session", ids.session_id), ("turn", ids.turn_id)
        known = [self._without_secrets(ids.request_id or "-")]
        known += [f"{name}={value}" for name, value in names if value is not None]
        head = f"{self.formatTime(record)} {record.levelname} {record.name} [{' '.join(known)}] "
        lines = [head + _escaped(self._message(record))]
        lines += ["    " + _escaped(line) for line in self._traceback(record).split("\n") if line]
        return "\n".join(lines)


def _escaped(text: str) -> str:
    return text if text.isprintable() else CONTROL.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


class _Json(_Formatter):
    def format(self, record: logging.LogRecord) -> str:
        """Formats a record as one line with a JSON object in ASCII, without fields whose value is unknown."""
        ids = _ids.get()
        at = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        fields = {
            "time": at.replace("+00:00", "Z"),
            "level": record.levelname,
            "logger": record.name,
            "message": self._message(record),
            **ids._asdict(),
            "request_id": ids.request_id and self._without_secrets(ids.request_id),
            "duration_ms": getattr(record, "duration_ms", None),
            "exception": self._traceback(record) or None,
        }
        return json.dumps({name: value for name, value in fields.items() if value is not None})


class _Lines(logging.Handler):
    """Writes lines to a file descriptor. If a write fails, for example because a pipe is full, the service continues
    and lines are lost. A line that was written in part is completed before the next one."""

    def __init__(self, fd: int) -> None:
        super().__init__()
        self._fd = fd
        self._rest = b""  # the part of the last line that is not written yet

    def emit(self, record: logging.LogRecord) -> None:
        """Writes one record. `logging.Handler.handle` calls this while it holds the handler's lock."""
        line = self.format(record) + "\n"
        with suppress(OSError):  # a full pipe, a closed pipe, a full disk: there is no place left to log this error
            self._write_rest()
            self._rest = line.encode("utf-8", "backslashreplace")
            self._write_rest()

    def _write_rest(self) -> None:
        while self._rest:
            self._rest = self._rest[os.write(self._fd, self._rest) :]


def start_logging(level: str, form: Form, secrets: Iterable[str], fd: int = STDOUT) -> None:
    """Sends all log lines of the process to the file descriptor `fd` in the format `form`. `level` applies to the
    loggers of this service (`clawd.…`). Replaces `secrets` and access tokens in all lines. A further call replaces the
    choices of the earlier one."""
    root = logging.getLogger()
    for handler in [handler for handler in root.handlers if isinstance(handler, _Lines)]:
        root.removeHandler(handler)
    lines = _Lines(fd)
    lines.setFormatter(_Json(secrets) if form == "json" else _Plain(secrets))
    root.addHandler(lines)
    logging.getLogger("clawd").setLevel(level)
    for name in ("uvicorn", "uvicorn.error", "uvicorn.access", "asyncio"):
        logger = logging.getLogger(name)
        logger.handlers.clear()
        # `web.RequestLog` logs each request; uvicorn's access log would repeat it, with the signatures of image URLs.
        logger.propagate = name != "uvicorn.access"
    logging.captureWarnings(True)


# --- the metrics --------------------------------------------------------------------------------------


class Figures(NamedTuple):
    """Values that are read when the metrics are requested, in contrast to those that `Metrics` counts."""

    turns: tuple[int, int] | None  # running and waiting; None if the database cannot be read
    gateway_up: bool
    commits: int
    write_seconds: float
    build: Mapping[str, str]


class _FiguresCollector(Collector):
    """Builds the metrics whose values are in `figures`."""

    figures: Figures | None = None

    def collect(self) -> Iterator[Metric]:
        """Yields the metrics; the registry calls this for each scrape."""
        if self.figures is None:
            return
        turns, up, commits, seconds, build = self.figures
        if turns is not None:
            yield GaugeMetricFamily("clawd_turns_running", "Running turns, in all processes.", turns[0])
            yield GaugeMetricFamily("clawd_turns_waiting", "Queued turns, in all processes.", turns[1])
        yield GaugeMetricFamily("clawd_gateway_up", "1 if the gateway could take a turn at the last check.", up)
        yield CounterMetricFamily("clawd_database_commits", "Write transactions of this process.", commits)
        yield CounterMetricFamily(
            "clawd_database_write_seconds",
            "Seconds spent on write transactions, including the wait for other processes.",
            seconds,
        )
        info = GaugeMetricFamily("clawd_build_info", "The code that is running.", labels=list(build))
        info.add_metric(list(build.values()), 1)
        yield info


class Metrics:
    """The metrics of one app, which count from its start."""

    def __init__(self, statuses: Sequence[str]) -> None:
        """`statuses` are the final statuses of a turn; each is reported from the start, with 0."""
        self._registry = CollectorRegistry()
        ProcessCollector(registry=self._registry)
        self._figures = _FiguresCollector()
        self._registry.register(self._figures)
        self._requests = Counter(
            "clawd_requests",
            "Finished requests. Route `unmatched`: no route matches the path; status 0: no response was sent.",
            ["method", "route", "status"],
            registry=self._registry,
        )
        turns = Counter(
            "clawd_turns", "Turns that ended in this process, by final status.", ["status"], registry=self._registry
        )
        self._first_token = Histogram(
            "clawd_first_token_seconds",
            "Seconds from the request to the gateway to the first text of the reply.",
            registry=self._registry,
            buckets=FIRST_TOKEN_BUCKETS,
        )
        self._turns = {status: turns.labels(status) for status in statuses}
        self._seen: dict[tuple[str, str, int], Counter] = {}  # spares each request `Counter.labels`, which is slow

    def count_request(self, method: str, route: str, status: int) -> None:
        """Counts a finished request. `route` is the route's template, for example `/projects/{project_id}`; if it were
        the path, a caller could create any number of series."""
        key = (method if method in METHODS else "other", route, status)
        counter = self._seen.get(key)
        if counter is None:
            counter = self._seen[key] = self._requests.labels(*key)
        counter.inc()

    def count_turns(self, status: str, number: int = 1) -> None:
        """Counts `number` turns that ended with this status."""
        self._turns[status].inc(number)

    def time_first_token(self, seconds: float) -> None:
        """Records the seconds from the request to the gateway to the first text of the reply."""
        self._first_token.observe(seconds)

    def render(self, figures: Figures) -> bytes:
        """Returns all metrics in Prometheus' text format, whose media type is `CONTENT_TYPE`."""
        self._figures.figures = figures
        return generate_latest(self._registry)


# --- progress -----------------------------------------------------------------------------------------


class Progress:
    """Reports the progress of long work in percent, every PROGRESS_EVERY seconds. Shorter work reports nothing."""

    def __init__(self, report: Callable[[str], object], doing: str) -> None:
        """`report` logs or prints a line. `doing` begins the line, for example `copying`."""
        self._report = report
        self._doing = doing
        self._reported_at = time.monotonic()

    def __call__(self, done: float, total: float) -> None:
        if time.monotonic() - self._reported_at > PROGRESS_EVERY and total:
            self._reported_at = time.monotonic()
            self._report(f"{self._doing}: {min(100 * done / total, 100):.0f} %")
