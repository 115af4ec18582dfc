"""Reading real git repositories. The tests of the start scripts cover the branch rules."""

import subprocess
from pathlib import Path

import pytest

import checkout

from .checkout import TOOLS


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A repository with two commits on `main`."""
    git(tmp_path, "init", "--quiet", "--initial-branch", "main")
    for message in ("First", "Second"):
        git(tmp_path, "commit", "--quiet", "--allow-empty", "--message", message)
    return tmp_path


def git(directory: Path, *words: str) -> str:
    """Runs git in a directory and returns what it prints."""
    who = ("-c", "user.name=Test", "-c", "user.email=test@example.com")
    done = subprocess.run(["git", *who, *words], cwd=directory, env=TOOLS, capture_output=True, text=True, check=True)
    return done.stdout.strip()


@pytest.mark.parametrize(
    ("words", "branch", "kind"),
    [
        (["checkout", "main"], "main", "production"),
        (["checkout", "--detach", "main~1"], "main", "production"),
        (["checkout", "-b", "feature/x"], "feature/x", "development"),
        (["checkout", "-b", "maintenance"], "maintenance", "development"),
    ],
)
def test_a_checkout_is_read(repository: Path, words: list[str], branch: str, kind: str) -> None:
    """Reads branch and commit, and decides which service the branch belongs to."""
    git(repository, *words)
    found = checkout.read(repository)
    assert (found.branch, found.commit) == (branch, git(repository, "rev-parse", "HEAD"))
    assert checkout.kind_of(found.branch) == kind


def test_a_detached_commit_that_is_not_of_main_is_not_main(repository: Path) -> None:
    """Checking out an older commit of a feature branch does not start production."""
    git(repository, "checkout", "--detach", "main")
    git(repository, "commit", "--quiet", "--allow-empty", "--message", "Not of main")
    assert checkout.read(repository).branch == "HEAD"
    assert "does not belong to main" in (checkout.refusal("production", repository) or "")


def test_without_git_it_is_unknown(tmp_path: Path) -> None:
    """A copy of the code without git history counts as development, and the start scripts refuse it."""
    assert checkout.read(tmp_path) == ("unknown", "unknown")
    assert checkout.kind_of("unknown") == "development"
    assert "is not a git checkout" in (checkout.refusal("development", tmp_path) or "")
