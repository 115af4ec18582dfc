"""A copy of this checkout for a test: with the current code, committed or not, on free ports, ready to be started."""

import os
import shutil
import socket
import subprocess
import sys
from hashlib import sha256
from pathlib import Path

import httpx

from .service import CHECKOUT, COVERAGE, JSON, free_port

TOOLS = {"PATH": os.environ["PATH"], "PYTHON": sys.executable, "GIT_CONFIG_GLOBAL": "/dev/null", **COVERAGE}


class Checkout:
    """A git repository on `main` with a copy of this code, and an environment that the scripts do not build again."""

    def __init__(self, path: Path, settings: dict[str, str]) -> None:
        """Creates the directory `path`. Writes `settings` to its `.env`."""
        self.path = path
        self.port = free_port()
        self.development_port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        path.mkdir(parents=True)
        listed = subprocess.run(
            ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
            cwd=CHECKOUT,
            capture_output=True,
            check=True,
        )
        for name in filter(None, listed.stdout.decode().split("\0")):
            if (CHECKOUT / name).exists():
                (path / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(CHECKOUT / name, path / name)
        self.edit("start-backend.sh", "USUAL_PORT=8002", f"USUAL_PORT={self.port}")
        self.edit("start-backend.sh", "USUAL_PORT=8001", f"USUAL_PORT={self.development_port}")
        self.write_settings(settings)
        self.git("init", "--quiet", "--initial-branch", "main")
        self.commit()
        use_this_python(path)

    def write_settings(self, settings: dict[str, str]) -> None:
        """Replaces the file `.env`."""
        (self.path / ".env").write_text("".join(f"{name}={value}\n" for name, value in settings.items()))

    def edit(self, name: str, old: str, new: str) -> None:
        """Replaces the first occurrence of `old` in a file. Fails if there is none."""
        file = self.path / name
        text = file.read_text(encoding="utf-8")
        assert old in text, f"{name} has no {old!r}"
        file.write_text(text.replace(old, new, 1), encoding="utf-8")

    def git(self, *words: str) -> str:
        """Runs git in the repository. Returns its output; fails if git fails."""
        who = ("-c", "user.name=Test", "-c", "user.email=test@example.com")
        done = subprocess.run(["git", *who, *words], cwd=self.path, env=TOOLS, capture_output=True, check=False)
        assert done.returncode == 0, done.stderr.decode()
        return done.stdout.decode().strip()

    def commit(self) -> str:
        """Commits all changes, or an empty commit if there are none. Returns the hash of the commit."""
        self.git("add", "--all")
        self.git("commit", "--quiet", "--allow-empty", "--message", "A change")
        return self.git("rev-parse", "HEAD")

    def worktree(self, path: Path, branch: str) -> Path:
        """Creates a worktree on a new branch, ready to be started. Returns its path."""
        self.git("worktree", "add", "--quiet", "-b", branch, str(path))
        return self.prepare(path)

    def prepare(self, path: Path) -> Path:
        """Gives a worktree an environment and the settings. Returns its path."""
        use_this_python(path)
        shutil.copy(self.path / ".env", path)
        return path

    def health(self) -> JSON:
        """Returns the response of `/health`, requested on a new connection."""
        answer: JSON = httpx.get(f"{self.url}/health", timeout=5, trust_env=False).json()
        return answer

    def front(self) -> int:
        """Returns the process id of the front of the production port; 0 while its lock file is empty."""
        return int((self.path / f"run/{self.port}/front.lock").read_text() or 0)

    def workers(self) -> list[int]:
        """Returns the sorted process ids of the workers on both ports that serve or retire. The names of their Unix
        sockets contain them."""
        return sorted(int(path.stem) for path in self.path.glob("run/*/*.sock"))


def use_this_python(path: Path) -> None:
    """Gives a checkout a `venv/` whose programs run the Python of the tests, with a stamp that marks it as complete."""
    programs = path / "venv" / "bin"
    programs.mkdir(parents=True)
    for name, start in (("python", ""), ("uvicorn", "-m uvicorn")):
        (programs / name).write_text(f'#!/bin/sh\nexec "{sys.executable}" {start} "$@"\n')
        (programs / name).chmod(0o755)
    content = sha256((path / "requirements.lock").read_bytes()).hexdigest()
    (path / "venv" / ".stamp").write_text(f"{sys.version.split()[0]} {path / 'venv'}\n{content}\n")


def is_alive(pid: int) -> bool:
    """Returns whether the process exists and is not a zombie."""
    try:
        return not Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].startswith(" Z")
    except FileNotFoundError:
        return False


def is_open(port: int) -> bool:
    """Returns whether a process listens on the port of this machine."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0
