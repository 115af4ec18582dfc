"""What is told about the running service: one line of the log for each event, and the metrics.

Who knows what a task is about says so once (`begin_request`, `note`); every line of that task then carries it.
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
SHORTEST_SECRET = 8  # characters; to replace a shorter one everywhere would make lines unreadable
ACCESS_TOKEN = re.compile(r"eyJ[\w-]+\.[\w-]+\.[\w-]*")
# All that is taken for the end of a line, by a terminal, a log shipper or Python, or steers a terminal.
CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
TELL_EVERY = 2.0  # seconds between two lines on long work
FIRST_TOKEN_BUCKETS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)  # seconds

disable_created_metrics()  # type: ignore[no-untyped-call]  # a second series beside each, which nobody needs


# --- what a line is about -----------------------------------------------------------------------------


class _About(NamedTuple):
    request_id: str | None = None
    user_id: int | None = None
    session_id: int | None = None
    turn_id: int | None = None


_NOTHING = _About()
_about: ContextVar[_About] = ContextVar("about", default=_NOTHING)


def begin_request(request_id: str) -> None:
    """The lines of this task are about that request from now on, and about nothing that was noted before."""
    _about.set(_About(request_id))


def note(*, user_id: int | None = None, session_id: int | None = None, turn_id: int | None = None) -> None:
    """The lines of this task are about these too. A turn's id is that of its reply's message."""
    known = _about.get()
    _about.set(
        _About(known.request_id, user_id or known.user_id, session_id or known.session_id, turn_id or known.turn_id)
    )


def turn_context(session_id: int, turn_id: int, *, asked_here: bool) -> Context:
    """What a turn's tasks run in. `asked_here`: the request of this task began it, and its lines say so."""
    about = _about.get() if asked_here else _NOTHING
    context = copy_context()
    context.run(_about.set, about._replace(session_id=session_id, turn_id=turn_id))
    return context


# --- the log ------------------------------------------------------------------------------------------


class _Formatter(logging.Formatter):
    """What both formats have in common."""

    def __init__(self, secrets: Iterable[str]) -> None:
        super().__init__()
        self._secrets = [secret for secret in secrets if len(secret) >= SHORTEST_SECRET]

    def _message(self, record: logging.LogRecord) -> str:
        try:
            return self._without_secrets(record.getMessage())
        except (TypeError, ValueError):
            return f"{record.msg} (with arguments that do not fit)"

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
        """A line; a traceback follows on indented ones."""
        about = _about.get()
        names = ("user", about.user_id), ("session", about.session_id), ("turn", about.turn_id)
        known = [self._without_secrets(about.request_id or "-")]
        known += [f"{name}={value}" for name, value in names if value is not None]
        head = f"{self.formatTime(record)} {record.levelname} {record.name} [{' '.join(known)}] "
        lines = [head + _escaped(self._message(record))]
        lines += ["    " + _escaped(line) for line in self._traceback(record).split("\n") if line]
        return "\n".join(lines)


def _escaped(text: str) -> str:
    return text if text.isprintable() else CONTROL.sub(lambda odd: odd[0].encode("unicode_escape").decode(), text)


class _Json(_Formatter):
    def format(self, record: logging.LogRecord) -> str:
        """A line with one JSON object in ASCII, without what is not known."""
        about = _about.get()
        at = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        fields = {
            "time": at.replace("+00:00", "Z"),
            "level": record.levelname,
            "logger": record.name,
            "message": self._message(record),
            **about._asdict(),
            "request_id": about.request_id and self._without_secrets(about.request_id),
            "duration_ms": getattr(record, "duration_ms", None),
            "exception": self._traceback(record) or None,
        }
        return json.dumps({name: value for name, value in fields.items() if value is not None})


class _Lines(logging.Handler):
    """Writes whole lines, or none. Where nobody reads, the service goes on and lines are lost."""

    def __init__(self, fd: int) -> None:
        super().__init__()
        self._fd = fd
        self._rest = b""  # of the line that a full pipe took half of

    def emit(self, record: logging.LogRecord) -> None:
        """Called by `handle`, which holds the handler's lock."""
        line = self.format(record) + "\n"
        with suppress(OSError):  # a full pipe, a reader that is gone, a full disk: there is nobody to tell
            self._write_rest()
            self._rest = line.encode("utf-8", "backslashreplace")
            self._write_rest()

    def _write_rest(self) -> None:
        while self._rest:
            self._rest = self._rest[os.write(self._fd, self._rest) :]


def start_logging(level: str, form: Form, secrets: Iterable[str], fd: int = STDOUT) -> None:
    """From now on every line of the process goes to `fd` in this form, ours from `level` on. `secrets` are
    replaced wherever they turn up. Called again, it changes the form."""
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
        logger.propagate = name != "uvicorn.access"  # it would tell each request a second time, signatures and all
    logging.captureWarnings(True)


# --- the metrics --------------------------------------------------------------------------------------


class Figures(NamedTuple):
    """What is looked up when the metrics are asked for."""

    turns: tuple[int, int] | None  # running and waiting; None where the database does not say
    gateway_up: bool
    commits: int
    write_seconds: float
    build: Mapping[str, str]


class _FiguresCollector(Collector):
    """The metrics that are made of `figures`."""

    figures: Figures | None = None

    def collect(self) -> Iterator[Metric]:
        """What the registry asks for."""
        if self.figures is None:
            return
        turns, up, commits, seconds, build = self.figures
        if turns is not None:
            yield GaugeMetricFamily("clawd_turns_running", "Replies on their way, in every process.", turns[0])
            yield GaugeMetricFamily("clawd_turns_waiting", "Turns in line, in every process.", turns[1])
        yield GaugeMetricFamily("clawd_gateway_up", "Whether the gateway could take a turn at the last look.", up)
        yield CounterMetricFamily("clawd_database_commits", "Transactions that wrote, of this process.", commits)
        yield CounterMetricFamily(
            "clawd_database_write_seconds", "Seconds that they took, waiting for other processes included.", seconds
        )
        info = GaugeMetricFamily("clawd_build_info", "The code that runs.", labels=list(build))
        info.add_metric(list(build.values()), 1)
        yield info


class Metrics:
    """What one app counts, from its start on."""

    def __init__(self, statuses: Sequence[str]) -> None:
        """`statuses` are those with which a turn can end."""
        self._registry = CollectorRegistry()
        ProcessCollector(registry=self._registry)
        self._figures = _FiguresCollector()
        self._registry.register(self._figures)
        self._requests = Counter(
            "clawd_requests",
            "Requests that ended; `unmatched` is what no route took, status 0 what got no answer.",
            ["method", "route", "status"],
            registry=self._registry,
        )
        turns = Counter(
            "clawd_turns", "Turns that ended in this process, by final status.", ["status"], registry=self._registry
        )
        self._first_token = Histogram(
            "clawd_first_token_seconds",
            "From a turn's start at the gateway to the first text of its reply.",
            registry=self._registry,
            buckets=FIRST_TOKEN_BUCKETS,
        )
        self._turns = {status: turns.labels(status) for status in statuses}
        self._seen: dict[tuple[str, str, int], Counter] = {}  # to look a label up takes longer than to count

    def count_request(self, method: str, route: str, status: int) -> None:
        """A request ended. `route` is its template, so that the number of series does not grow with the paths."""
        key = (method if method in METHODS else "other", route, status)
        counter = self._seen.get(key)
        if counter is None:
            counter = self._seen[key] = self._requests.labels(*key)
        counter.inc()

    def count_turns(self, status: str, number: int = 1) -> None:
        """So many turns ended with this status."""
        self._turns[status].inc(number)

    def time_first_token(self, seconds: float) -> None:
        """The first text of a reply came after so long."""
        self._first_token.observe(seconds)

    def render(self, figures: Figures) -> bytes:
        """All of it in Prometheus' text format, whose media type is `CONTENT_TYPE`."""
        self._figures.figures = figures
        return generate_latest(self._registry)


# --- progress -----------------------------------------------------------------------------------------


class Progress:
    """Tells how much of long work is done, every few seconds; nothing of work that is quick."""

    def __init__(self, tell: Callable[[str], object], doing: str) -> None:
        self._tell = tell
        self._doing = doing
        self._told = time.monotonic()

    def __call__(self, done: float, total: float) -> None:
        if time.monotonic() - self._told > TELL_EVERY and total:
            self._told = time.monotonic()
            self._tell(f"{self._doing}: {min(100 * done / total, 100):.0f} %")
