"""Reads which code is checked out, and decides which service may run from it.

The start scripts run this file as a program before anything is installed, so it imports the standard library only:
`python3 checkout.py production` exits with 0, or prints why the checkout is refused and exits with 3.
"""

import subprocess
import sys
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Literal, NamedTuple, cast

Kind = Literal["production", "development"]

WRONG_BRANCH = 3  # exit status
BRANCHES: dict[Kind, tuple[str, ...]] = {
    "production": ("main",),
    "development": ("feature/?*", "fix/?*", "development", "development/?*"),
}
_EXAMPLES: dict[Kind, str] = {"production": "production main", "development": "work feature/work"}
_MAINS = ("refs/heads/main", "refs/remotes/origin/main")


class Checkout(NamedTuple):
    """The branch and commit that are checked out. Each is `unknown` if git fails, for example outside of a checkout."""

    branch: str
    commit: str


def read(directory: Path) -> Checkout:
    """Returns what is checked out. A detached commit that belongs to `main` counts as `main`, because a deployment may
    check out a commit or a remote branch instead of `main` itself."""
    commit, _, branch = _git(directory, "rev-parse", "HEAD", "--abbrev-ref", "HEAD").partition("\n")
    if branch == "HEAD" and any(_git(directory, "merge-base", "--is-ancestor", commit, main) == "" for main in _MAINS):
        branch = "main"
    return Checkout(branch or "unknown", commit)


def kind_of(branch: str) -> Kind:
    """Returns `production` for `main`, and `development` for every other branch."""
    return "production" if branch in BRANCHES["production"] else "development"


def refusal(kind: Kind, directory: Path) -> str | None:
    """Returns why a service of this kind may not run from this directory, and what to do, or None if it may."""
    top = _git(directory, "rev-parse", "--show-toplevel")
    if top != str(directory):
        return f"{directory} is not a git checkout, so its branch cannot be checked. Start from a git clone."
    branch = read(directory).branch
    if any(fnmatchcase(branch, pattern) for pattern in BRANCHES[kind]):
        return None
    name, _, example = _EXAMPLES[kind].partition(" ")
    allowed = ", ".join(pattern.replace("?", "") for pattern in BRANCHES[kind])
    return (
        f"The {kind} service runs from branch {allowed} only, and {directory} is on "
        f"{'a detached commit that does not belong to main' if branch == 'HEAD' else branch}.\n"
        f"Create a worktree for it and start it there:\n"
        f"  git worktree add ../{directory.name}-{name} {example}\n"
        "If the branch does not exist yet, put -b before its name."
    )


def _git(directory: Path, *words: str) -> str:
    try:
        done = subprocess.run(  # noqa: S603 - the arguments are constants of this file, a path and git's own output
            ["git", "-C", str(directory), *words],  # noqa: S607 - uses the git that is in the operator's PATH
            capture_output=True,
            text=True,
            check=True,
            timeout=5,
        )
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return done.stdout.strip()


def main() -> int:
    """Prints why the service that the command line names may not run from the current directory, if so. Returns the
    exit status: 0 or WRONG_BRANCH."""
    refused = refusal(cast(Kind, sys.argv[1]), Path.cwd())
    if refused is None:
        return 0
    sys.stdout.write(refused + "\n")
    return WRONG_BRANCH


if __name__ == "__main__":
    sys.exit(main())
