"""Runs a real OpenClaw gateway, with its own home directory, on a free port, with our model provider behind it."""

import contextlib
import json
import os
import secrets
import signal
import subprocess
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import httpx
from websockets.sync.client import ClientConnection, connect

from tests.service import free_port, tail, until

# Seconds. An agent's run takes a few seconds, so only a gateway that hangs reaches this limit.
TIMEOUT = 60
# Seconds that a gateway gets to end after SIGTERM.
DRAIN = 2
CONNECT = {
    "minProtocol": 3,
    "maxProtocol": 4,
    "client": {"id": "gateway-client", "version": "1.0.0", "platform": "linux", "mode": "backend"},
    "role": "operator",
    "scopes": ["operator.read", "operator.write", "operator.admin"],
    "caps": [],
}
MODEL = {
    "id": "echo",
    "name": "Echo",
    "reasoning": False,
    "input": ["text", "image"],
    "cost": {"input": 0, "output": 0, "cacheRead": 0, "cacheWrite": 0},
    "contextWindow": 131072,
    "maxTokens": 4096,
}


@dataclass(frozen=True)
class OpenClaw:
    """An installed OpenClaw: its executable, and the directory of the Node that runs it."""

    executable: Path
    node: Path

    @classmethod
    def of_environment(cls) -> Self:
        """Returns the one that OPENCLAW_BIN and OPENCLAW_NODE_BIN name. Raises LookupError if there is none."""
        paths = [Path(os.environ.get(name, "")) for name in ("OPENCLAW_BIN", "OPENCLAW_NODE_BIN")]
        if not all(path.is_absolute() and path.exists() for path in paths):
            raise LookupError(
                "OPENCLAW_BIN and OPENCLAW_NODE_BIN do not name an installed OpenClaw and its Node: "
                "run ./tests/run --openclaw, which installs both and sets them"
            )
        return cls(*paths)

    def environment(self, home: Path) -> dict[str, str]:
        """Returns the gateway's whole environment. A developer's own OPENCLAW_ variables must not affect the tests."""
        return {
            "PATH": os.pathsep.join([str(self.node), os.environ["PATH"]]),
            "HOME": str(home),
            "LANG": "C.UTF-8",
            "OPENCLAW_SKIP_CHANNELS": "1",
            "OPENCLAW_SKIP_CRON": "1",
        }

    def version(self, home: Path) -> str:
        """Returns the program's version, such as `2026.9.6`."""
        command = [str(self.executable), "--version"]
        done = subprocess.run(command, env=self.environment(home), capture_output=True, text=True, check=True)
        return next(word for word in done.stdout.split() if word[0].isdigit())


def session_of(session_key: str) -> str:
    """Returns the gateway's key of a session, as `sessions.list` shows it."""
    return f"agent:main:openai-user:adapter-session-{session_key}"


class Gateway:
    """A gateway that can be stopped and started again, on the same port and with the same sessions."""

    def __init__(self, openclaw: OpenClaw, home: Path, provider_url: str, *, endpoint: bool = True) -> None:
        self.openclaw = openclaw
        self.home = home
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.token = secrets.token_hex(24)
        self.log = home / "gateway.log"
        self._process: subprocess.Popen[bytes] | None = None
        self._configure(provider_url, endpoint)

    def _configure(self, provider_url: str, endpoint: bool) -> None:
        provider = {"baseUrl": provider_url, "apiKey": "x", "api": "openai-completions", "models": [MODEL]}
        workspace = self.home / "workspace"
        config = {
            "gateway": {
                "mode": "local",
                "port": self.port,
                "bind": "loopback",
                "auth": {"mode": "token", "token": self.token},
                "http": {"endpoints": {"chatCompletions": {"enabled": endpoint}}},
            },
            "agents": {
                "defaults": {
                    "workspace": str(workspace),
                    "skipBootstrap": True,
                    "model": {"primary": "stub/echo"},
                }
            },
            "models": {"mode": "merge", "providers": {"stub": provider}},
            "cron": {"enabled": False},
            # By default, all gateways on a machine log into the same directory.
            "logging": {"file": str(self.home / "openclaw.log")},
        }
        workspace.mkdir(parents=True)
        (self.home / ".openclaw").mkdir()
        (self.home / ".openclaw" / "openclaw.json").write_text(json.dumps(config))

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        """Starts the gateway unless it is running, and waits until it serves."""
        if self._process is not None:
            return
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                [self.openclaw.executable, "gateway", "run"],
                env=self.openclaw.environment(self.home),
                cwd=self.home,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        try:
            until(self._serves, 120, "the gateway's /startupz")
        except BaseException:
            self.stop()
            raise

    def _serves(self) -> bool:
        assert self._process is not None and self._process.poll() is None, tail(self.log)
        try:
            return httpx.get(f"{self.url}/startupz", timeout=5, trust_env=False).status_code == 200
        except httpx.TransportError:
            return False

    def drain(self) -> None:
        """Asks the gateway to end: it finishes what runs, and refuses everything new until then."""
        assert self._process is not None
        os.killpg(self._process.pid, signal.SIGTERM)

    def stop(self) -> None:
        """Stops the gateway and its child processes. Kills them after DRAIN seconds, since a gateway drains for
        minutes on SIGTERM."""
        if self._process is None:
            return
        # The executable may be a wrapper, whose child in the same process group serves.
        group = self._process.pid
        with contextlib.suppress(ProcessLookupError):
            os.killpg(group, signal.SIGTERM)
            deadline = time.monotonic() + DRAIN
            while time.monotonic() < deadline:
                self._process.poll()
                os.killpg(group, 0)
                time.sleep(0.05)
            os.killpg(group, signal.SIGKILL)
        self._process.wait()
        self._process = None

    def complete(self, text: str, *, headers: Mapping[str, str] | None = None, **body: object) -> httpx.Response:
        """Sends a message directly to the gateway, without our service. Returns the response."""
        return httpx.post(
            f"{self.url}/v1/chat/completions",
            headers={"Authorization": f"Bearer {self.token}", **(headers or {})},
            json={"model": "agent:main", "messages": [{"role": "user", "content": text}], **body},
            timeout=TIMEOUT,
            trust_env=False,
        )

    def models(self, token: str) -> int:
        """Requests `/v1/models` with this token. Returns the status."""
        headers = {"Authorization": f"Bearer {token}"}
        return httpx.get(f"{self.url}/v1/models", headers=headers, timeout=TIMEOUT, trust_env=False).status_code

    def rpc(self, method: str, params: dict[str, Any]) -> dict[str, Any]:
        """Calls a method over the gateway's WebSocket. Returns the payload of the answer."""
        with connect(f"ws://127.0.0.1:{self.port}/", max_size=None, proxy=None) as wire:
            _call(wire, "connect", CONNECT | {"auth": {"token": self.token}})
            return _call(wire, method, params)

    def sessions(self) -> list[str]:
        """Returns the keys of all sessions in the gateway."""
        rows = self.rpc("sessions.list", {"limit": 1000})["sessions"]
        return [row["key"] for row in rows]

    def idle_history(self, session_key: str) -> list[tuple[str, str]] | None:
        """Returns role and text of a session's messages, or None while a run is active in the session."""
        history = self.rpc("chat.history", {"sessionKey": session_of(session_key), "limit": 100})
        if history["sessionInfo"].get("hasActiveRun"):
            return None
        return [(message["role"], _words(message["content"])) for message in history["messages"]]


def _words(content: str | list[dict[str, Any]]) -> str:
    """Returns the text of a message in the history."""
    if isinstance(content, str):
        return content
    return "".join(part.get("text", "") for part in content)


def _call(wire: ClientConnection, method: str, params: dict[str, Any]) -> dict[str, Any]:
    """Sends a request and returns the payload of its answer. Skips events that arrive in between."""
    wire.send(json.dumps({"type": "req", "id": method, "method": method, "params": params}))
    while True:
        frame = json.loads(wire.recv(timeout=TIMEOUT))
        if frame.get("id") == method:
            assert frame["ok"], frame
            payload: dict[str, Any] = frame["payload"]
            return payload
