"""`requirements.lock`, which `start-backend.sh` and the tests install, matches `requirements.txt`."""

import re
from collections.abc import Iterator
from importlib.metadata import version

from packaging.markers import Marker
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from .service import CHECKOUT

LOCK = (CHECKOUT / "requirements.lock").read_text(encoding="utf-8")
# A pin, with the marker of the Python versions and operating systems that it applies to, and its hashes.
PIN = re.compile(r"([a-z0-9-]+)==([\w.]+)(?: ; (.+?))? \\\n((?:    --hash=sha256:[0-9a-f]{64}(?: \\)?\n)+)")


def pins() -> Iterator[tuple[str, str]]:
    """Yields name and version of each package that the lock file has for this Python and operating system."""
    for name, pinned, marker, _ in PIN.findall(LOCK):
        if not marker or Marker(marker).evaluate():
            yield name, pinned


def test_the_lock_is_of_these_requirements() -> None:
    """The lock file has the versions of `requirements.txt`. If it does not, run `./tests/run --lock`."""
    text = (CHECKOUT / "requirements.txt").read_text(encoding="utf-8")
    lines = (line.partition("#")[0].strip() for line in text.splitlines())
    asked = {(canonicalize_name(of.name), str(of.specifier)) for of in map(Requirement, filter(None, lines))}
    assert asked <= {(name, f"=={pinned}") for name, pinned in pins()}
    asked_for = r"^([a-z0-9-]+)==(?:(?!^\S).)*?^    # via(?:\n    #  )? -r requirements\.txt$"
    direct = re.findall(asked_for, LOCK, re.MULTILINE | re.DOTALL)
    assert sorted(direct) == sorted(name for name, _ in asked)


def test_a_package_is_locked_once_and_with_hashes() -> None:
    """The file contains only pins with hashes, and comments: no index, no directory and no option."""
    names = [name for name, _ in pins()]
    assert len(names) == len(set(names)) > 20
    rest = PIN.sub("", LOCK)
    assert not [line for line in rest.splitlines() if not re.fullmatch(r" *#[^:]*( via the following command:)?", line)]


def test_the_tests_run_on_what_is_locked() -> None:
    """The tests run with the locked versions. Otherwise they would prove nothing about what `start-backend.sh`
    installs."""
    assert {name: version(name) for name, _ in pins()} == dict(pins())
