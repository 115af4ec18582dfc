"""The gateway of the demo as a program. A first chat through the service is tested with the start scripts."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from .service import CHECKOUT, until


@pytest.mark.parametrize("end", [signal.SIGTERM, signal.SIGINT])
def test_it_says_what_it_is(tmp_path: Path, end: signal.Signals) -> None:
    """The reply names the demo, repeats the message and ends as OpenClaw's does; other tokens are refused."""
    port_file = tmp_path / "port"
    command = [sys.executable, "demo.py", "--token", "T", "--port-file", str(port_file)]
    with subprocess.Popen(command, cwd=CHECKOUT) as process:
        url = f"http://127.0.0.1:{until(lambda: port_file.exists() and port_file.read_text().strip(), 20, 'the port')}"
        body = {"model": "agent:main", "messages": [{"role": "user", "content": "Who is there?"}], "stream": True}
        headers = {"Authorization": "Bearer T", "x-openclaw-session-key": "agent:main:x"}
        with httpx.Client(base_url=url, trust_env=False) as client:
            answer = client.post("/v1/chat/completions", json=body, headers=headers)
            refused = client.get("/v1/models", headers={"Authorization": "Bearer U"})
        process.send_signal(end)
        assert process.wait(10) in (0, 130, -signal.SIGTERM, -signal.SIGINT)
    lines = [line.removeprefix("data: ") for line in answer.text.splitlines() if line.startswith("data: ")]
    choices = [choice for line in lines[:-1] for choice in json.loads(line)["choices"]]
    reply = "".join(choice["delta"].get("content", "") for choice in choices)
    assert "no agent behind me" in reply and "“Who is there?”" in reply
    assert (choices[-1]["finish_reason"], lines[-1]) == ("stop", "[DONE]")
    assert refused.status_code == 401
