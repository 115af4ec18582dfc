"""What is written about the service is true: its settings, routes, files, commands and versions are the real ones."""

import ast
import os
import re
import subprocess
import tomllib
from pathlib import Path

import pytest
from pydantic import SecretStr

import app
from settings import Settings

CHECKOUT = Path(__file__).resolve().parents[1]
DOCUMENTS = ("README.md", "CHANGELOG.md", "SECURITY.md")
NOT_OURS = {"openclaw.json"}  # files that are named and lie elsewhere
SECTIONS = {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}
# A path of somebody's machine, which nobody else has.
MACHINE = re.compile(rb"(?<![\w.~-])/(?:work/|root/|Users/|home/\w|tmp/w/)")

each_document = pytest.mark.parametrize("name", DOCUMENTS)


def text_of(name: str) -> str:
    """A document."""
    return (CHECKOUT / name).read_text(encoding="utf-8")


def table(document: str, first: str) -> list[list[str]]:
    """The rows of the table whose first heading this is; a `|` in backticks would have to be written otherwise."""
    rows, inside = [], False
    for line in text_of(document).splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if not line.startswith("|"):
            inside = False
        elif inside:
            rows.append(cells)
        else:
            inside = cells[0] == first
    return rows[1:]  # without the line below the headings


def spans(document: str) -> list[str]:
    """What stands between backticks in a line, and the lines of code blocks."""
    parts = re.split(r"^```.*$", text_of(document), flags=re.MULTILINE)
    return re.findall(r"`([^`\n]+)`", "".join(parts[::2])) + "".join(parts[1::2]).splitlines()


def git(*words: str) -> subprocess.CompletedProcess[bytes]:
    """Git in this checkout."""
    return subprocess.run(["git", *words], cwd=CHECKOUT, capture_output=True, check=False)


def tracked() -> list[str]:
    """The files that a clone has."""
    done = git("ls-files", "-z")
    assert done.returncode == 0, done.stderr
    return [name for name in done.stdout.decode().split("\0") if name and (CHECKOUT / name).exists()]


# --- settings -----------------------------------------------------------------------------------------

VARIABLES = {row[0].strip("`"): row[1] for row in table("README.md", "variable")}


def written(default: object) -> str:
    """A default as an operator would write it; empty where it depends."""
    if isinstance(default, SecretStr):
        default = default.get_secret_value()
    if isinstance(default, tuple):
        default = ",".join(default)
    if isinstance(default, float) and default.is_integer():
        default = int(default)
    return "" if default is None else str(default)


def test_readme_names_every_setting_and_no_other() -> None:
    """An operator finds all of them in one table, in the order of the code."""
    assert list(VARIABLES) == [name.upper() for name in Settings.model_fields]


@pytest.mark.parametrize("name", Settings.model_fields)
def test_readme_names_a_settings_default(name: str) -> None:
    """It is the one in the code; where that depends on something, words say on what."""
    default = written(Settings.model_fields[name].default)
    cell = VARIABLES.get(name.upper(), "")
    assert cell == f"`{default}`" if default else cell


# --- routes -------------------------------------------------------------------------------------------


def named_routes() -> set[tuple[str, str]]:
    """The routes of README's table; `PUT …` is another method of the path before it."""
    found, path = set(), ""
    for row in table("README.md", "route"):
        for method, named in re.findall(r"`([A-Z]+) (\S+?)(?:\?[^`]*)?`", row[0]):
            path = path if named == "…" else named
            found.add((method, path))
    return found


def test_readme_names_every_route_and_no_other() -> None:
    """Its table is that of the OpenAPI document, to which it points for the rest."""
    paths = app.app.openapi()["paths"]
    assert named_routes() == {(method.upper(), path) for path, item in paths.items() for method in item}
    assert {"/docs", "/openapi.json"} <= set(spans("README.md"))


# --- files and commands -------------------------------------------------------------------------------


@each_document
def test_links_lead_somewhere(name: str) -> None:
    """A file that is there, or a heading of the same document."""
    text = text_of(name)
    headings = {
        re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-")
        for heading in re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    }
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if not re.match(r"[a-z]+:", target):
            path, _, anchor = target.partition("#")
            assert not path or (CHECKOUT / path).exists(), target
            assert path or anchor in headings, target


@each_document
def test_files_that_are_named_exist(name: str) -> None:
    """What looks like a file of this repository is one."""
    words = {word for span in spans(name) for word in re.findall(r"(?<![\w./~<>-])[\w.-][\w./-]*", span)}
    files = {word for word in words if re.fullmatch(r"[\w./-]+\.(py|sh|json|toml|txt|md)", word)}
    assert not {word for word in files - NOT_OURS if not (CHECKOUT / word).exists()}


def commands() -> list[str]:
    """The commands of README that begin with a program of ours, alone or after `&&`."""
    parts = [part.strip() for span in spans("README.md") for part in span.split("&&")]
    return sorted({re.split(r"\s+#", part)[0] for part in parts if re.match(r"\./|\.ci/", part)})


@pytest.mark.parametrize("command", commands())
def test_a_command_can_be_run(command: str) -> None:
    """Its program is in a clone, executable, and knows the options."""
    program, *words = command.split()
    path = CHECKOUT / program
    assert path.is_file() and os.access(path, os.X_OK)
    assert os.path.normpath(program) in tracked()
    source = path.read_text(encoding="utf-8")
    assert not [word for word in words if word.startswith("--") and word not in source]


@pytest.mark.parametrize("command", [command for command in commands() if " -k " in command])
def test_a_promise_is_held_by_tests_that_exist(command: str) -> None:
    """Each word of `-k` picks a test of the file that is named with it, or the promise would be held by nothing."""
    match = re.fullmatch(r'\./tests/run (\S+) -k "?([\w ]+?)"?', command)
    assert match, command
    module = ast.parse((CHECKOUT / match[1]).read_text(encoding="utf-8"))
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    names = [node.name.lower() for node in ast.walk(module) if isinstance(node, kinds)]
    tests = [name for name in names if name.startswith("test")]
    assert not [word for word in match[2].split(" or ") if not any(word in name for name in tests)]


def test_readme_names_every_room() -> None:
    """Whoever changes the service finds where a thing belongs."""
    rooms = [row[0].strip("`") for row in table("README.md", "file")]
    assert sorted(rooms) == sorted(path.name for path in CHECKOUT.glob("*.py"))


# --- versions and the rest ----------------------------------------------------------------------------


def test_there_is_one_version() -> None:
    """The code's, the project's, and the newest in the changelog."""
    project = tomllib.loads(text_of("pyproject.toml"))["project"]["version"]
    newest = re.findall(r"^## \[(\d+\.\d+\.\d+)\]", text_of("CHANGELOG.md"), re.MULTILINE)[0]
    assert app.VERSION == project == newest


def test_the_changelog_is_one() -> None:
    """It keeps to Keep a Changelog: what is not released first, then versions with their days, newest first, each
    with its kinds of change."""
    text = text_of("CHANGELOG.md")
    headings = re.findall(r"^## (.+)$", text, re.MULTILINE)
    assert headings[0] == "[Unreleased]"
    released = [re.fullmatch(r"\[(\d+)\.(\d+)\.(\d+)\] - (\d{4}-\d\d-\d\d)", heading) for heading in headings[1:]]
    assert all(released)
    order = [([int(number) for number in match.groups()[:3]], match[4]) for match in released if match]
    assert order == sorted(order, reverse=True)
    assert set(re.findall(r"^### (.+)$", text, re.MULTILINE)) <= SECTIONS
    assert "keepachangelog.com" in text


def test_security_says_where_to_turn() -> None:
    """Who finds a hole learns how to tell, and that it is not by a public issue."""
    assert re.search(r"report", text_of("SECURITY.md"), re.IGNORECASE)
    assert "public issue" in text_of("SECURITY.md")


def test_nothing_names_a_path_of_one_machine() -> None:
    """A clone works anywhere: no file in it knows where it was written."""
    found = {name: MACHINE.findall((CHECKOUT / name).read_bytes()) for name in tracked()}
    assert not {name: paths for name, paths in found.items() if paths}


@pytest.mark.parametrize(
    "path",
    [
        *("clawdbot_adapter.db", "clawdbot_adapter.db-wal", "clawdbot_adapter.db-shm", "clawdbot_adapter.db.lock"),
        *("clawdbot_adapter_dev.db", "clawdbot_adapter.db.20260101T000000000000Z.v0.backup"),
        *("clawdbot_adapter.db.20260101T000000000000Z.replaced.backup", "clawdbot_adapter.db.restoring"),
        *(".coverage", ".coverage.host.1.abc"),
        *("clawdbot_adapter.db.workers/0", "images/incoming/0", "projects/Garden_20260101/README.md", "secret.key"),
        *(".env", "venv/bin/python", "tests/.venv-3.11/bin/python", "__pycache__/app.pyc", "tests/__pycache__/app.pyc"),
    ],
)
def test_what_running_leaves_is_ignored(path: str) -> None:
    """No database, secret, environment or user's file gets into a commit by `git add .`"""
    assert git("check-ignore", "--quiet", "--no-index", path).returncode == 0


@pytest.mark.parametrize("path", [*DOCUMENTS, "app.py", "tests/stand_in.py", "tests/images/one.png", ".ci/run"])
def test_what_belongs_to_the_code_is_not_ignored(path: str) -> None:
    """The patterns take no more than what they are meant for."""
    assert git("check-ignore", "--quiet", "--no-index", path).returncode == 1


def test_nothing_that_is_ignored_is_tracked() -> None:
    """What was committed before there was a pattern would stay in every clone."""
    assert git("ls-files", "--cached", "--ignored", "--exclude-standard").stdout == b""
