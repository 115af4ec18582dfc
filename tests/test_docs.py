"""The documents match the code: settings, routes, error codes, rooms, commands, links and versions. Product code and
documents use the terms of the field."""

import ast
import io
import os
import re
import subprocess
import tokenize
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
NOT_OURS = {"openclaw.json"}  # files of other programs that documents name
# Phrases that only this project used, or to which it gave a meaning of its own. Strangers do not understand them, so
# they must not return. The section Conventions of CONTRIBUTING.md lists standard terms.
DIALECT = re.compile(
    r"\b(of old|(goes|go|went) on|(is|are|was) told(?! to)|cannot be had|up for grabs|errands?|walk(s|ed)? up"
    r"|(?<!there )is no (picture|image|file|folder|uuid)|call(s|ed)? off|stays? to be|beside|nobody's"
    r"|(serves?|served) on(?! (a|an|the|port)\b)|made good|seen through|has to see to it)\b"
)
PACKAGES = sorted({path.parent.name for path in CHECKOUT.glob("*/__init__.py")} - {"tests"})
PRODUCT = (
    *sorted(path.name for pattern in ("*.py", "*.sh") for path in CHECKOUT.glob(pattern)),
    *(f"{package}/{path.name}" for package in PACKAGES for path in sorted((CHECKOUT / package).glob("*.py"))),
)
SECTIONS = {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}
# A path that exists only on the machine of one developer.
MACHINE = re.compile(rb"(?<![\w.~-])/(?:work/|root/|Users/|home/\w|tmp/w/)")

each_document = pytest.mark.parametrize("name", DOCUMENTS)


def text_of(name: str) -> str:
    """Returns the text of a document."""
    return (CHECKOUT / name).read_text(encoding="utf-8")


def dialect(prose: str) -> list[str]:
    """Returns the phrases of DIALECT in a text. What is between backticks is a name, not prose."""
    return [match[0] for match in DIALECT.finditer(" ".join(re.sub(r"`[^`]*`", "``", prose).lower().split()))]


def prose_of(name: str) -> list[str]:
    """Returns the docstrings, other strings and comments of a Python file, or the whole text of a shell script.
    Comments on consecutive lines are one text."""
    source = text_of(name)
    if not name.endswith(".py"):
        return [source.replace("#", " ")]
    texts = [
        node.value
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    ]
    last = 0
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            comment = token.string.lstrip("# ")
            if token.start[0] == last + 1:
                texts[-1] += f" {comment}"
            else:
                texts.append(comment)
            last = token.start[0]
    return texts


def table(document: str, first: str) -> list[list[str]]:
    """Returns the rows of the table whose first heading is `first`. Cells must not contain `|`."""
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
    """Returns what is between backticks in a line, and the lines of code blocks."""
    parts = re.split(r"^```.*$", text_of(document), flags=re.MULTILINE)
    return re.findall(r"`([^`\n]+)`", "".join(parts[::2])) + "".join(parts[1::2]).splitlines()


def git(*words: str) -> subprocess.CompletedProcess[bytes]:
    """Runs git in this checkout."""
    return subprocess.run(["git", *words], cwd=CHECKOUT, capture_output=True, check=False)


def tracked() -> list[str]:
    """Returns the files that a clone contains."""
    done = git("ls-files", "-z")
    assert done.returncode == 0, done.stderr
    return [name for name in done.stdout.decode().split("\0") if name and (CHECKOUT / name).exists()]


# --- settings -----------------------------------------------------------------------------------------

VARIABLES = {row[0].strip("`"): row[1] for row in table("docs/operate.md", "variable")}


def written(default: object) -> str:
    """Returns a default as an operator would write it; empty if there is none or it depends on other settings."""
    if isinstance(default, SecretStr):
        default = default.get_secret_value()
    if isinstance(default, tuple):
        default = ",".join(default)
    if isinstance(default, float) and default.is_integer():
        default = int(default)
    return "" if default is None else str(default)


def test_the_settings_table_names_every_setting_and_no_other() -> None:
    """The table has all settings, in the order of the code, and no other."""
    assert list(VARIABLES) == [name.upper() for name in Settings.model_fields]


@pytest.mark.parametrize("name", Settings.model_fields)
def test_the_settings_table_names_a_settings_default(name: str) -> None:
    """The table has the default of the code. If that depends on something, the cell says so in words."""
    default = written(Settings.model_fields[name].default)
    cell = VARIABLES.get(name.upper(), "")
    assert cell == f"`{default}`" if default else cell


# --- routes -------------------------------------------------------------------------------------------


def named_routes() -> set[tuple[str, str]]:
    """Returns the routes of the table in docs/api.md; `PUT …` is another method of the path before it."""
    found, path = set(), ""
    for row in table("docs/api.md", "route"):
        for method, named in re.findall(r"`([A-Z]+) (\S+?)(?:\?[^`]*)?`", row[0]):
            path = path if named == "…" else named
            found.add((method, path))
    return found


def test_the_routes_table_names_every_route_and_no_other() -> None:
    """The table has exactly the routes of the OpenAPI document, and docs/api.md names the addresses of that
    document."""
    paths = app.app.openapi()["paths"]
    assert named_routes() == {(method.upper(), path) for path, item in paths.items() for method in item}
    assert {"/docs", "/openapi.json"} <= set(spans("docs/api.md"))


# --- error codes --------------------------------------------------------------------------------------

ERRORS = {row[0].strip("`"): {int(status) for status in row[1].split(", ")} for row in table("docs/api.md", "code")}


def described_statuses() -> dict[str, set[int]]:
    """Returns the statuses of each code, as the routes of the OpenAPI document describe them."""
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
    """The table has each code of the service once, and no other."""
    assert sorted(row[0].strip("`") for row in table("docs/api.md", "code")) == sorted(errors.CODES)


@pytest.mark.parametrize("code", errors.CODES)
def test_the_errors_table_names_a_codes_status(code: str) -> None:
    """The table has the status with which the routes return the code, and each row says what to do."""
    assert ERRORS.get(code) == described_statuses()[code]
    assert all(row[2] for row in table("docs/api.md", "code"))


# --- files and commands -------------------------------------------------------------------------------


def anchors(name: str) -> set[str]:
    """Returns the anchors that GitHub gives to a document's headings."""
    headings = re.findall(r"^#+ (.+)$", text_of(name), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-") for heading in headings}


@each_document
def test_links_lead_somewhere(name: str) -> None:
    """A relative link names a file that exists, and its anchor is a heading of that file or of this one."""
    for target in re.findall(r"\]\(([^)\s]+)\)", text_of(name)):
        if not re.match(r"[a-z]+:", target):
            path, _, anchor = target.partition("#")
            file = (CHECKOUT / name).parent / path if path else CHECKOUT / name
            assert file.is_file(), target
            assert not anchor or anchor in anchors(os.path.relpath(file, CHECKOUT)), target


def test_every_document_is_linked_from_the_readme() -> None:
    """The README links to every document."""
    links = set(re.findall(r"\]\(([^)\s#]+)", text_of("README.md")))
    assert not set(DOCUMENTS) - links - {"README.md"}


def test_the_readme_is_short() -> None:
    """The README is an overview; the details are in the documents that it links to."""
    assert len(text_of("README.md").splitlines()) <= README_LINES


@each_document
def test_a_document_uses_the_words_of_the_field(name: str) -> None:
    """A document contains no phrase that only this project uses."""
    assert not dialect(text_of(name))


@pytest.mark.parametrize("name", PRODUCT)
def test_code_uses_the_words_of_the_field(name: str) -> None:
    """No docstring, comment or string of a product file has such a phrase: strings are errors, log lines and OpenAPI
    texts, which strangers read too."""
    assert not [(phrase, text) for text in prose_of(name) for phrase in dialect(text)]


@each_document
def test_files_that_are_named_exist(name: str) -> None:
    """Each name in backticks that looks like a file of this repository is one."""
    words = {word for span in spans(name) for word in re.findall(r"(?<![\w./~<>*-])[\w.-][\w./-]*(?![\w./(-])", span)}
    files = {word for word in words if re.fullmatch(r"[\w./-]+\.(py|sh|json|toml|txt|md|lock)", word)}
    assert not {word for word in files - NOT_OURS if not (CHECKOUT / word).exists()}


def commands() -> list[str]:
    """Returns the commands of all documents that begin with a program of this repository, alone or after `&&`."""
    parts = [part.strip() for name in DOCUMENTS for span in spans(name) for part in span.split("&&")]
    return sorted({re.split(r"\s+#", part)[0] for part in parts if re.match(r"\./|\.ci/", part)})


@pytest.mark.parametrize("command", commands())
def test_a_command_can_be_run(command: str) -> None:
    """The program of a command is in a clone and executable, and its source contains the options."""
    program, *words = command.split()
    path = CHECKOUT / program
    assert path.is_file() and os.access(path, os.X_OK)
    assert os.path.normpath(program) in tracked()
    source = path.read_text(encoding="utf-8")
    assert not [word for word in words if word.startswith("--") and word not in source]


@pytest.mark.parametrize("command", [command for command in commands() if " -k " in command])
def test_a_promise_is_held_by_tests_that_exist(command: str) -> None:
    """Each word of `-k` selects a test of the named file. Otherwise the command would run nothing, and no test would
    check the promise."""
    match = re.fullmatch(r'\./tests/run (\S+) -k "?([\w ]+?)"?', command)
    assert match, command
    module = ast.parse((CHECKOUT / match[1]).read_text(encoding="utf-8"))
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    names = [node.name.lower() for node in ast.walk(module) if isinstance(node, kinds)]
    tests = [name for name in names if name.startswith("test")]
    assert not [word for word in match[2].split(" or ") if not any(word in name for name in tests)]


def test_the_rooms_table_names_every_room() -> None:
    """The table has each module and each package at the top level."""
    rooms = [row[0].strip("`") for row in table("CONTRIBUTING.md", "file")]
    modules = {path.name for path in CHECKOUT.glob("*.py")}
    assert sorted(rooms) == sorted(modules | {f"{package}/" for package in PACKAGES})


# --- versions and the rest ----------------------------------------------------------------------------


def test_there_is_one_version() -> None:
    """The code, `pyproject.toml` and the newest entry of the changelog have the same version."""
    project = tomllib.loads(text_of("pyproject.toml"))["project"]["version"]
    newest = re.findall(r"^## \[(\d+\.\d+\.\d+)\]", text_of("CHANGELOG.md"), re.MULTILINE)[0]
    assert app.app.version == project == newest


def test_the_changelog_is_one() -> None:
    """It follows Keep a Changelog: unreleased changes first, then versions with their dates, newest first, each with
    its kinds of changes."""
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
    """A reader who finds a vulnerability learns how to report it, and not to open a public issue."""
    assert re.search(r"report", text_of("SECURITY.md"), re.IGNORECASE)
    assert "public issue" in text_of("SECURITY.md")


def test_nothing_names_a_path_of_one_machine() -> None:
    """No file contains a path of the machine on which it was written, so that a clone works anywhere."""
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
    """`git add .` adds no database, secret, environment or user's file to a commit."""
    assert git("check-ignore", "--quiet", "--no-index", path).returncode == 0


@pytest.mark.parametrize("path", [*DOCUMENTS, "app.py", "tests/stand_in.py", "tests/images/one.png", ".ci/run"])
def test_what_belongs_to_the_code_is_not_ignored(path: str) -> None:
    """The patterns of `.gitignore` do not match files of the code."""
    assert git("check-ignore", "--quiet", "--no-index", path).returncode == 1


def test_nothing_that_is_ignored_is_tracked() -> None:
    """No tracked file matches `.gitignore`. A file that was committed before its pattern existed would stay in every
    clone."""
    assert git("ls-files", "--cached", "--ignored", "--exclude-standard").stdout == b""
