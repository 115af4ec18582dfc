"""Measures which failures clients see during one `pm2 restart` or `pm2 reload`: of this service, and of plain uvicorn.

Prints the table of docs/reliability.md, section "Restarts in figures". It counts the requests from five seconds before
the command until ten seconds after it, and the streams that run meanwhile to their end.
"""

import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import httpx

from tests.checkout import Checkout
from tests.load import Load, Tally
from tests.pm2.pm2 import PM2
from tests.service import NO_TLS, Person, until
from tests.stand_in import StandIn

NAME = "clawd-backend"
HEADINGS = ("set-up", "command", "failed requests", "failed on keep-alive", "streams cut", "available again after")
TEXT = "[[chunks=250 delay=0.1]]"  # 25 s


def start_as_documented(pm2: PM2, checkout: Checkout) -> None:
    """Starts the service as docs/operate.md describes it."""
    pm2.do("start", "ecosystem.backend.json", "--only", NAME, cwd=checkout.path)


def start_by_default(pm2: PM2, checkout: Checkout, *options: str) -> None:
    """Starts uvicorn with PM2's defaults."""
    command = ["-m", "uvicorn", "app:app", "--port", str(checkout.port), "--no-access-log"]
    name = ("--name", NAME, "--interpreter", "none", *options)
    pm2.do("start", str(checkout.path / "venv/bin/python"), *name, "--", *command, cwd=checkout.path)


def start_with_kill_timeout(pm2: PM2, checkout: Checkout) -> None:
    """Starts uvicorn so that PM2 waits 30 s for its streams to end before it kills it."""
    start_by_default(pm2, checkout, "--kill-timeout", "30000")


SET_UPS: dict[str, Callable[[PM2, Checkout], None]] = {
    "uvicorn with PM2's defaults": start_by_default,
    "the same with `kill_timeout` 30 s": start_with_kill_timeout,
    "`ecosystem.backend.json`": start_as_documented,
}


def measure(start: Callable[[PM2, Checkout], None], command: str, directory: Path) -> tuple[Load, float]:
    """Runs one PM2 command under load. Returns the load and the seconds until the command returned."""
    (directory / "home").mkdir()
    with StandIn() as openclaw, PM2(directory / "home") as pm2:
        settings = {"CLAWDBOT_BASE_URL": openclaw.url, "CLAWDBOT_TOKEN": openclaw.token, "LOG_LEVEL": "WARNING"}
        checkout = Checkout(directory / "checkout", settings)
        start(pm2, checkout)
        until(lambda: _is_up(checkout), 30, "the service")
        limits = httpx.Limits(max_keepalive_connections=0)
        with httpx.Client(base_url=checkout.url, timeout=60, trust_env=False, verify=NO_TLS, limits=limits) as http:
            ada = Person(http)
            sessions = [ada.session() for _ in range(12)]
            with Load(ada, sessions, TEXT) as load:
                time.sleep(5)
                started = time.monotonic()
                pm2.do(command, NAME)
                took = time.monotonic() - started
                time.sleep(10)
        pm2("delete", "all")
        until(lambda: not checkout.workers(), 30, "the end of the workers")
    return load, took


def _is_up(checkout: Checkout) -> bool:
    try:
        return bool(checkout.health())
    except httpx.TransportError:
        return False


def _cell(tally: Tally) -> str:
    return f"{sum(tally.failures.values())} of {tally.sent}"


def main() -> None:
    """Measures each set-up with both commands and prints the table."""
    write = sys.stdout.write
    write(f"| {' | '.join(HEADINGS)} |\n")
    write("|---|---|---|---|---|---|\n")
    for name, start in SET_UPS.items():
        for command in ("restart", "reload"):
            with tempfile.TemporaryDirectory() as directory:
                load, took = measure(start, command, Path(directory))
            cells = (_cell(load.fresh), _cell(load.kept), _cell(load.streams))
            write(f"| {name} | `pm2 {command}` | {' | '.join(cells)} | {took:.1f} s |\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main()
