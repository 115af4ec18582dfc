"""The real PM2, with a daemon and a home directory for one test."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from tests.service import until


class PM2:
    """One PM2 daemon. The end of the block kills it and everything that it runs."""

    def __init__(self, home: Path) -> None:
        """`home` is the daemon's home directory. Raises LookupError if PM2 is not installed."""
        try:
            self._program, node = os.environ["PM2_BIN"], os.environ["PM2_NODE_BIN"]
        except KeyError as missing:
            raise LookupError(f"{missing} is not set: run ./tests/run --pm2, which installs PM2") from None
        self._home = home
        self.environment = {
            "PATH": f"{node}{os.pathsep}{os.environ['PATH']}",
            "HOME": str(home),
            "PM2_HOME": str(home / "pm2"),
            "GIT_CONFIG_GLOBAL": "/dev/null",
            "LANG": "C.UTF-8",
            "PYTHON": sys.executable,
        }

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self("kill")

    def command(self, *words: str) -> list[str]:
        """Returns a `pm2` command as a program and its arguments."""
        return [self._program, *words]

    def __call__(
        self, *words: str, cwd: Path | None = None, environment: Mapping[str, str] | None = None
    ) -> "subprocess.CompletedProcess[str]":
        """Runs a `pm2` command, in the home directory or in `cwd`. Returns its exit status and output."""
        return subprocess.run(
            self.command(*words),
            cwd=cwd or self._home,
            env=self.environment | dict(environment or {}),
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )

    def do(self, *words: str, cwd: Path | None = None) -> str:
        """Runs a `pm2` command. Returns its stdout; fails if the command fails."""
        done = self(*words, cwd=cwd)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def app(self, name: str) -> dict[str, Any]:
        """Returns the entry of an app in `pm2 jlist`, or an empty dict if there is none."""
        lines = self.do("jlist").splitlines()
        apps = json.loads(next(line for line in reversed(lines) if line.startswith("[")))
        found: dict[str, Any] = next((app for app in apps if app["name"] == name), {})
        return found

    def status(self, name: str) -> str:
        """Returns PM2's status of an app, such as `online` or `stopped`, or `none` if PM2 does not have the app."""
        return str(self.app(name).get("pm2_env", {}).get("status", "none"))

    def pid(self, name: str) -> int:
        """Returns the process id that PM2 shows for an app. It is that of the front."""
        return int(self.app(name)["pid"])

    def log(self, name: str) -> str:
        """Returns the contents of an app's log files."""
        return "".join(
            path.read_text(errors="replace") for path in sorted((self._home / "pm2/logs").glob(f"{name}-*.log"))
        )

    def shown(self, name: str, lines: int = 200) -> str:
        """Returns the last lines of an app's log, as `pm2 logs` prints them."""
        return self.do("logs", name, "--nostream", "--raw", "--lines", str(lines))

    def kill_daemon(self) -> None:
        """Kills the daemon with SIGKILL, as the kernel does when memory runs out. Waits for its end."""
        pid = int((self._home / "pm2/pm2.pid").read_text())
        os.kill(pid, signal.SIGKILL)
        until(lambda: not Path(f"/proc/{pid}").exists(), 10, "the daemon's end")
