"""The branches that each service accepts: the table in docs/operate.md row by row, and a `git checkout` while the
service runs."""

import json
from pathlib import Path

import pytest

from tests.checkout import Checkout, is_open
from tests.load import Load
from tests.service import CHECKOUT, Person, until
from tests.test_docs import table

from .pm2 import PM2

ROWS = table("docs/operate.md", "checked out")
APPS = ("clawd-backend", "clawd-backend-dev")


def directory_with(checkout: Checkout, what: str, path: Path) -> Path:
    """Returns a directory in which `what`, a cell of the table, is checked out: the checkout itself for `main`, or a
    new worktree at `path`."""
    if what == "`main`":
        return checkout.path
    if "detached" in what:
        checkout.git("worktree", "add", "--quiet", "--detach", str(path), "main")
        if "not of" in what:
            checkout.git("-C", str(path), "commit", "--quiet", "--allow-empty", "--message", "Not of main")
        return checkout.prepare(path)
    return checkout.worktree(path, what.strip("`"))


@pytest.mark.parametrize("row", ROWS, ids=[row[0] for row in ROWS])
def test_a_branch_runs_where_the_document_says(pm2: PM2, checkout: Checkout, tmp_path: Path, row: list[str]) -> None:
    """`pm2 start ecosystem.backend.json` runs the service that accepts the branch. The other one is stopped after one
    attempt, and its log contains the reason."""
    what, *verdicts = row
    assert set(verdicts) <= {"runs", "refused"}
    directory = directory_with(checkout, what, tmp_path / "a work tree")
    pm2.do("start", "ecosystem.backend.json", cwd=directory)
    for name, port, verdict in zip(APPS, (checkout.port, checkout.development_port), verdicts, strict=True):
        if verdict == "runs":
            assert (pm2.status(name), is_open(port)) == ("online", True), pm2.log(name)
        else:
            assert (pm2.status(name), is_open(port)) == ("stopped", False)
            assert pm2.app(name)["pm2_env"]["restart_time"] == 0
            assert "from branch" in pm2.log(name) and "git worktree add" in pm2.log(name)
    databases = {path.name for path in directory.glob("*.db")}
    expected = {"clawdbot_adapter.db": verdicts[0], "clawdbot_adapter_dev.db": verdicts[1]}
    assert databases == {name for name, verdict in expected.items() if verdict == "runs"}
    pm2("delete", "all")
    until(lambda: not list(directory.glob("run/*/*.sock")), 15, "the end of the workers")


def test_the_service_starts_from_another_directory(pm2: PM2, checkout: Checkout) -> None:
    """With `--cwd`, which names the checkout, PM2 can be called from any directory."""
    file = str(checkout.path / "ecosystem.backend.json")
    pm2.do("start", file, "--only", "clawd-backend", "--cwd", str(checkout.path))
    assert checkout.health()["environment"] == "production"
    pm2("delete", "all")


def test_a_git_checkout_does_not_affect_the_running_service(running: PM2, checkout: Checkout, ada: Person) -> None:
    """After a `git checkout`, `/health` reports `"stale": true`. A restart on the wrong branch leaves the old code
    serving, without any failed request, until the right branch is checked out again."""
    with Load(ada, [ada.session()], "[[chunks=60 delay=0.1]]") as load:
        before = checkout.health()
        assert (before["branch"], before["stale"], before["environment"]) == ("main", False, "production")
        checkout.git("checkout", "--quiet", "-b", "feature/x")
        commit = checkout.commit()
        until(lambda: checkout.health()["stale"], 10, "stale in /health")
        assert checkout.health()["commit"] == before["commit"]
        running.do("restart", "clawd-backend")
        health = checkout.health()
        assert (health["branch"], health["commit"]) == ("main", before["commit"])
        assert "from branch main only" in health["failed_start"]
        assert running.status("clawd-backend") == "online"
        checkout.git("checkout", "--quiet", "--detach", "main")
        running.do("reload", "clawd-backend")
        health = checkout.health()
        assert (health["branch"], health["stale"], health["failed_start"]) == ("main", False, None)
        assert commit != health["commit"]
    assert load.failures() == {}, str(load)


def test_the_configuration_holds_no_secret_and_no_path() -> None:
    """The file works in any checkout, and what `pm2 jlist` prints of it can be shown to anybody."""
    apps = json.loads((CHECKOUT / "ecosystem.backend.json").read_text())["apps"]
    assert [app["name"] for app in apps] == list(APPS)
    for app in apps:
        assert "env" not in app and "cwd" not in app
        assert app["script"].startswith("./start-backend")
