"""Runs the client program in docs/api.md against the service, so that the document stays correct."""

import re
import subprocess
from collections.abc import Callable
from pathlib import Path

from tests.proxy import IdleProxy
from tests.service import Served
from tests.stand_in import reply_text
from tests.test_docs import text_of


def run_client(node: Path, directory: Path, url: str, *texts: str) -> list[str]:
    """Runs the JavaScript of docs/api.md against the service at `url`, with `texts` in place of its two messages.
    Returns the lines that it prints."""
    source = "\n".join(re.findall(r"^```js\n(.*?)^```$", text_of("docs/api.md"), re.MULTILINE | re.DOTALL))
    replacements = {"http://127.0.0.1:8002": url, "Good morning. Who are you?": texts[0], "Tell me more.": texts[1]}
    for old, new in replacements.items():
        assert source.count(old) == 1
        source = source.replace(old, new)
    (directory / "client.mjs").write_text(source, encoding="utf-8")
    done = subprocess.run([node, "client.mjs"], cwd=directory, capture_output=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout.decode().split("\n")


def test_the_client_in_the_document_works(serve: Callable[..., Served], node: Path, tmp_path: Path) -> None:
    """The client streams a reply through a proxy that cuts the connection at every pause, resumes it each time, gets
    the complete text, and stops the next reply."""
    text = "[[chunks=4 delay=4 seed=3]]"
    served = serve(ping_seconds=15)
    with IdleProxy(served.port, idle=2) as proxy:
        printed = run_client(node, tmp_path, proxy.url, text, "[[chunks=100 delay=0.1]]")
        assert proxy.connections > 4
    whole = reply_text(text)
    *reply, finish, stopped, end = printed
    assert ("\n".join(reply), finish, end) == (whole, "stop", "")
    assert re.fullmatch(r"stopped after \d+ characters", stopped)
