"""The documents agree with the code: settings, routes, error codes, rooms, commands, links and versions are the real
ones, and the client in docs/api.md works."""

import ast
import os
import re
import subprocess
import tomllib
from pathlib import Path

import pytest
from pydantic import SecretStr

import app
import errors
from settings import Settings

CHECKOUT = Path(__file__).resolve().parents[1]
DOCUMENTS = (
    *("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md"),
    *sorted(f"docs/{path.name}" for path in (CHECKOUT / "docs").glob("*.md")),
)
README_LINES = 150
NOT_OURS = {"openclaw.json"}  # files that are named and lie elsewhere
# Phrases that only this project used, which a reader from elsewhere does not understand.
DIALECT = re.compile(
    r"\b(of old|goes on|is told|cannot be had|is no (picture|image)|up for grabs|errands?|walk(s|ed)? up"
    r"|call(s|ed)? off|stays to be)\b"
)
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

VARIABLES = {row[0].strip("`"): row[1] for row in table("docs/operate.md", "variable")}


def written(default: object) -> str:
    """A default as an operator would write it; empty where it depends."""
    if isinstance(default, SecretStr):
        default = default.get_secret_value()
    if isinstance(default, tuple):
        default = ",".join(default)
    if isinstance(default, float) and default.is_integer():
        default = int(default)
    return "" if default is None else str(default)


def test_the_settings_table_names_every_setting_and_no_other() -> None:
    """An operator finds all of them in one table, in the order of the code."""
    assert list(VARIABLES) == [name.upper() for name in Settings.model_fields]


@pytest.mark.parametrize("name", Settings.model_fields)
def test_the_settings_table_names_a_settings_default(name: str) -> None:
    """It is the one in the code; where that depends on something, words say on what."""
    default = written(Settings.model_fields[name].default)
    cell = VARIABLES.get(name.upper(), "")
    assert cell == f"`{default}`" if default else cell


# --- routes -------------------------------------------------------------------------------------------


def named_routes() -> set[tuple[str, str]]:
    """The routes of the table in docs/api.md; `PUT …` is another method of the path before it."""
    found, path = set(), ""
    for row in table("docs/api.md", "route"):
        for method, named in re.findall(r"`([A-Z]+) (\S+?)(?:\?[^`]*)?`", row[0]):
            path = path if named == "…" else named
            found.add((method, path))
    return found


def test_the_routes_table_names_every_route_and_no_other() -> None:
    """It has the routes of the OpenAPI document, and the document links to that for details."""
    paths = app.app.openapi()["paths"]
    assert named_routes() == {(method.upper(), path) for path, item in paths.items() for method in item}
    assert {"/docs", "/openapi.json"} <= set(spans("docs/api.md"))


# --- error codes --------------------------------------------------------------------------------------

ERRORS = {row[0].strip("`"): {int(status) for status in row[1].split(", ")} for row in table("docs/api.md", "code")}


def described_statuses() -> dict[str, set[int]]:
    """The statuses of each code, as the routes of the OpenAPI document describe them."""
    found: dict[str, set[int]] = {}
    for item in app.app.openapi()["paths"].values():
        for operation in item.values():
            for status, response in operation["responses"].items():
                codes = re.findall(r"`([a-z_]+)`", response.get("description", ""))
                if "InvalidOut" in str(response):
                    codes.append("invalid_request")
                for code in codes:
                    found.setdefault(code, set()).add(int(status))
    return found


def test_the_errors_table_names_every_code_once() -> None:
    """A client's author finds each code, and no code that the service does not have."""
    assert sorted(row[0].strip("`") for row in table("docs/api.md", "code")) == sorted(errors.CODES)


@pytest.mark.parametrize("code", errors.CODES)
def test_the_errors_table_names_a_codes_status(code: str) -> None:
    """It is the status with which the routes answer, and the row says what to do."""
    assert ERRORS.get(code) == described_statuses()[code]
    assert all(row[2] for row in table("docs/api.md", "code"))


# --- files and commands -------------------------------------------------------------------------------


def anchors(name: str) -> set[str]:
    """The anchors that GitHub gives to a document's headings."""
    headings = re.findall(r"^#+ (.+)$", text_of(name), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-") for heading in headings}


@each_document
def test_links_lead_somewhere(name: str) -> None:
    """A relative link names a file that exists, and its anchor a heading of that file or of this one."""
    for target in re.findall(r"\]\(([^)\s]+)\)", text_of(name)):
        if not re.match(r"[a-z]+:", target):
            path, _, anchor = target.partition("#")
            file = (CHECKOUT / name).parent / path if path else CHECKOUT / name
            assert file.is_file(), target
            assert not anchor or anchor in anchors(os.path.relpath(file, CHECKOUT)), target


def test_every_document_is_linked_from_the_readme() -> None:
    """A reader finds each document from the first one."""
    links = set(re.findall(r"\]\(([^)\s#]+)", text_of("README.md")))
    assert not set(DOCUMENTS) - links - {"README.md"}


def test_the_readme_is_short() -> None:
    """It is an overview; the details are in the documents that it links to."""
    assert len(text_of("README.md").splitlines()) <= README_LINES


@each_document
def test_a_document_uses_the_words_of_the_field(name: str) -> None:
    """No phrase in it is one that only this project used."""
    prose = " ".join(text_of(name).lower().split())
    assert not [match[0] for match in DIALECT.finditer(prose)]


@each_document
def test_files_that_are_named_exist(name: str) -> None:
    """What looks like a file of this repository is one."""
    words = {word for span in spans(name) for word in re.findall(r"(?<![\w./~<>*-])[\w.-][\w./-]*(?![\w./(-])", span)}
    files = {word for word in words if re.fullmatch(r"[\w./-]+\.(py|sh|json|toml|txt|md|lock)", word)}
    assert not {word for word in files - NOT_OURS if not (CHECKOUT / word).exists()}


def commands() -> list[str]:
    """The commands of all documents that begin with a program of ours, alone or after `&&`."""
    parts = [part.strip() for name in DOCUMENTS for span in spans(name) for part in span.split("&&")]
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
    """Each word of `-k` picks a test of the named file. Otherwise the command would run nothing, and nothing would hold
    the promise."""
    match = re.fullmatch(r'\./tests/run (\S+) -k "?([\w ]+?)"?', command)
    assert match, command
    module = ast.parse((CHECKOUT / match[1]).read_text(encoding="utf-8"))
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    names = [node.name.lower() for node in ast.walk(module) if isinstance(node, kinds)]
    tests = [name for name in names if name.startswith("test")]
    assert not [word for word in match[2].split(" or ") if not any(word in name for name in tests)]


def test_the_rooms_table_names_every_room() -> None:
    """A developer finds where a thing belongs: each module and each package at the top level."""
    rooms = [row[0].strip("`") for row in table("CONTRIBUTING.md", "file")]
    packages = {path.parent.name for path in CHECKOUT.glob("*/__init__.py")} - {"tests"}
    modules = {path.name for path in CHECKOUT.glob("*.py")}
    assert sorted(rooms) == sorted(modules | {f"{package}/" for package in packages})


# --- versions and the rest ----------------------------------------------------------------------------


def test_there_is_one_version() -> None:
    """The code's, the project's, and the newest in the changelog."""
    project = tomllib.loads(text_of("pyproject.toml"))["project"]["version"]
    newest = re.findall(r"^## \[(\d+\.\d+\.\d+)\]", text_of("CHANGELOG.md"), re.MULTILINE)[0]
    assert app.app.version == project == newest


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
