"""The structure of the code: imports, owners, and what no file may contain. The tests read the syntax trees and run no
code."""

import ast
import re
import sys
from collections.abc import Iterator
from functools import cache
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

import errors

CHECKOUT = Path(__file__).resolve().parents[1]

# From top to bottom; a room imports only from the layers below its own.
LAYERS = (
    ("serve", "demo"),
    ("handover",),
    ("app", "admin"),
    ("backup",),
    ("project_manager", "chat_handlers", "health", "guard"),
    ("auth",),
    ("web",),
    ("turns",),
    ("runs",),
    ("replies", "outbox", "throttle"),
    ("database",),
    ("sql", "gateway", "image_handler"),
    ("locks", "errors", "settings", "file_utils", "telemetry", "clock", "background", "checkout"),
)
NOUNS = {name: depth for depth, layer in enumerate(LAYERS) for name in layer}


def files() -> Iterator[str]:
    """Yields the product's files without `.py`; a file of a package as `sql/users`."""
    for noun in NOUNS:
        if (CHECKOUT / noun).is_dir():
            yield from (f"{noun}/{path.stem}" for path in (CHECKOUT / noun).glob("*.py"))
        else:
            yield noun


ROOMS = tuple(sorted(files()))
PACKAGES = {noun for noun in NOUNS if (CHECKOUT / noun).is_dir()}
WITHIN_LAYER = {("file_utils", "errors")}  # the only allowed import from the same layer
WEB = {"app", "auth", "project_manager", "chat_handlers", "web", "health", "guard"}
# The third-party packages, each with the rooms that may import it.
OWNERS = {
    "fastapi": WEB,
    "starlette": WEB | {"demo"},
    "pydantic": WEB | {"settings"},
    "pydantic_settings": {"settings"},
    "aiohttp": {"gateway"},
    "passlib": {"auth"},
    "jose": {"auth"},
    "email_validator": {"auth"},
    "PIL": {"image_handler"},
    "pillow_heif": {"image_handler"},
    "uvicorn": {"handover", "demo"},
    "prometheus_client": {"telemetry"},
}
LATE = {("handover/worker", "uvicorn")}  # imported late, because a front must run even if requirements are missing
FRAMEWORK = {"fastapi", "starlette", "pydantic"}
NEVER_IMPORTED = {"argon2-cffi": "passlib loads it"}
SQL = re.compile(
    r"\b(SELECT\s.+\sFROM|SELECT\s+1|INSERT\s+(OR\s+\w+\s+)?INTO|UPDATE\s+\w+\s+SET|DELETE\s+FROM"
    r"|(CREATE|DROP|ALTER)\s+(TABLE|(UNIQUE\s+)?INDEX|TRIGGER|VIEW))\b",
    re.DOTALL,
)
OF_A_CONNECTION = re.compile(r"\b(PRAGMA\s+\w+|BEGIN\s+IMMEDIATE|VACUUM\s+INTO)\b")
MOST_LINES = 50
MOST_LINES_OF_A_FILE = 450

Function = ast.FunctionDef | ast.AsyncFunctionDef

each_room = pytest.mark.parametrize("room", ROOMS)


@cache
def tree(room: str) -> ast.Module:
    """Returns the syntax tree of a file, in which each node has its `parent`."""
    module = ast.parse((CHECKOUT / f"{room}.py").read_text(encoding="utf-8"))
    for node in ast.walk(module):
        for child in ast.iter_child_nodes(node):
            child.parent = node  # type: ignore[attr-defined]  # an attribute that we add
    return module


def above(node: ast.AST) -> Iterator[ast.AST]:
    """Yields the nodes that contain a node, innermost first."""
    while (parent := getattr(node, "parent", None)) is not None:
        yield parent
        node = parent


def noun(room: str) -> str:
    """Returns the package of a file, or the file itself."""
    return room.partition("/")[0]


def imports(room: str) -> Iterator[tuple[str, ast.Import | ast.ImportFrom]]:
    """Yields the top-level packages that a file imports, each with its statement. Relative imports from its own package
    are left out."""
    for node in ast.walk(tree(room)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name.partition(".")[0], node
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield str(node.module).partition(".")[0], node


def imported(room: str) -> set[str]:
    """Returns the top-level packages that a file imports."""
    return {name for name, _ in imports(room)}


def docstrings(room: str) -> set[int]:
    """Returns the identities of the constants that are docstrings."""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    bodies = [node.body[0] for node in ast.walk(tree(room)) if isinstance(node, kinds) and node.body]
    return {id(first.value) for first in bodies if isinstance(first, ast.Expr)}


def strings(room: str) -> Iterator[tuple[str, ast.Constant]]:
    """Yields the string constants of a file, including those in f-strings, without docstrings."""
    documentation = docstrings(room)
    for node in ast.walk(tree(room)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in documentation:
            yield node.value, node


def dotted(node: ast.AST) -> str:
    """Returns `a.b.c` for such an expression, otherwise an empty string."""
    if isinstance(node, ast.Attribute):
        inner = dotted(node.value)
        return f"{inner}.{node.attr}" if inner else ""
    return node.id if isinstance(node, ast.Name) else ""


def called(room: str) -> Iterator[tuple[str, ast.Call]]:
    """Yields the calls in a file, each with the last name of the called function."""
    for node in ast.walk(tree(room)):
        if isinstance(node, ast.Call):
            function = node.func
            name = function.attr if isinstance(function, ast.Attribute) else dotted(function)
            yield name, node


def function_of(node: ast.AST) -> str:
    """Returns the name of the outermost function or method that contains a node, or an empty string."""
    names = [outer.name for outer in above(node) if isinstance(outer, Function)]
    return names[-1] if names else ""


def where(room: str, *nodes: ast.AST) -> list[str]:
    """Returns the places of nodes as `file:line`."""
    return [f"{room}.py:{getattr(node, 'lineno', 1)}" for node in nodes]


# --- rooms and imports --------------------------------------------------------------------------------


def test_the_top_level_holds_the_rooms_and_nothing_else() -> None:
    """A new file at the top level is a new room, and needs a layer first."""
    found = {path.stem for path in CHECKOUT.glob("*.py")}
    found |= {path.parent.name for path in CHECKOUT.glob("*/__init__.py")} - {"tests"}
    assert found == set(NOUNS)


@each_room
def test_imports_run_downward(room: str) -> None:
    """A room imports only from layers below its own."""
    wrong = [
        (*where(room, node), name)
        for name, node in imports(room)
        if name in NOUNS and NOUNS[name] <= NOUNS[noun(room)] and (room, name) not in WITHIN_LAYER
    ]
    assert not wrong


@each_room
def test_a_package_has_one_door(room: str) -> None:
    """Code outside of a package names only the package: `sql.begin_turn`, never a file of it. Code in a package imports
    the files next to it relatively, never through the package's name."""
    inside = {(package, path.stem) for package in PACKAGES for path in (CHECKOUT / package).glob("*.py")}
    wrong: list[ast.AST] = []
    for node in ast.walk(tree(room)):
        if isinstance(node, ast.ImportFrom) and node.level == 0:
            package, _, file = str(node.module).partition(".")
            named = {(package, alias.name) for alias in node.names} if package in PACKAGES else set()
            wrong += [node] if named and (file or named & inside or package == noun(room)) else []
        elif isinstance(node, ast.ImportFrom):
            wrong += [node] if node.level > 1 or noun(room) not in PACKAGES or not node.module else []
        elif isinstance(node, ast.Import):
            names = [alias.name.partition(".") for alias in node.names]
            wrong += [node for package, dot, _ in names if package in PACKAGES and (dot or package == noun(room))]
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            wrong += [node] if (node.value.id, node.attr) in inside else []
    assert not where(room, *wrong)


@each_room
def test_imports_stand_at_the_top(room: str) -> None:
    """No import is in a function or a condition, or follows another statement."""
    first, *rest = tree(room).body
    assert isinstance(first, ast.Expr), "a file begins with a docstring"
    past = False
    at_the_top = set()
    for node in rest:
        past = past or not isinstance(node, ast.Import | ast.ImportFrom)
        if not past:
            at_the_top.add(id(node))
    late = [node for name, node in imports(room) if id(node) not in at_the_top and (room, name) not in LATE]
    dynamic = [call for name, call in called(room) if name in ("__import__", "import_module")]
    assert not where(room, *late, *dynamic)


@each_room
def test_a_room_imports_what_is_its_to_import(room: str) -> None:
    """Each third-party package belongs to a room, so that replacing it changes one file."""
    foreign = imported(room) - set(NOUNS) - sys.stdlib_module_names
    assert not {name for name in foreign if noun(room) not in OWNERS.get(name, ())}


@pytest.mark.parametrize("package", sorted(OWNERS.keys() - FRAMEWORK))
def test_a_package_has_one_owner(package: str) -> None:
    """Exactly one room imports the package: its owner."""
    assert {noun(room) for room in ROOMS if package in imported(room)} == OWNERS[package]


def test_errors_is_the_ground() -> None:
    """`errors` imports no other room and contains no HTTP status: the map in `web` has those."""
    assert not imported("errors") - sys.stdlib_module_names
    numbers = [
        node
        for node in ast.walk(tree("errors"))
        if isinstance(node, ast.Constant) and type(node.value) is int and 100 <= node.value <= 599
    ]
    assert not where("errors", *numbers)


# --- who owns what ------------------------------------------------------------------------------------


OPEN_CONNECTIONS = {"sql", "database", "backup", "admin"}


@pytest.mark.parametrize("room", [room for room in ROOMS if noun(room) != "sql"])
def test_a_statement_is_in_sql(room: str) -> None:
    """SQL statements are only in `sql`. PRAGMA and BEGIN belong to a connection and may also be in the rooms that open
    connections; all other rooms open no connection and run no statement."""
    wrong: list[ast.AST] = [node for text, node in strings(room) if SQL.search(text)]
    if room not in OPEN_CONNECTIONS:
        wrong += [node for text, node in strings(room) if OF_A_CONNECTION.search(text)]
        wrong += [call for name, call in called(room) if name in ("execute", "executemany", "executescript", "cursor")]
        wrong += [call for _, call in called(room) if dotted(call.func) in ("connect", "sqlite3.connect")]
    assert not where(room, *wrong)


def test_what_sql_looks_like_is_known() -> None:
    """The pattern finds the statements that exist. Otherwise the test above would prove nothing."""
    assert sum(bool(SQL.search(text)) for room in ROOMS if noun(room) == "sql" for text, _ in strings(room)) > 80


@pytest.mark.parametrize("room", [room for room in ROOMS if room != "settings"])
def test_the_environment_is_read_in_settings(room: str) -> None:
    """Only `settings` reads the environment: a setting that is read in two places sooner or later has two meanings."""
    names = {"environ", "environb", "getenv", "getenvb"}
    looks = [node for node in ast.walk(tree(room)) if isinstance(node, ast.Attribute) and node.attr in names]
    taken = [node for _, node in imports(room) if names & {alias.name for alias in node.names}]
    assert not where(room, *looks, *taken)


@pytest.mark.parametrize("room", [room for room in ROOMS if room != "web"])
def test_http_exception_is_webs(room: str) -> None:
    """Code below the routes raises the exceptions of `errors`; only `web` turns them into HTTP."""
    raised = [node for node in ast.walk(tree(room)) if dotted(node).endswith("HTTPException")]
    taken = [node for _, node in imports(room) if "HTTPException" in {alias.name for alias in node.names}]
    assert not where(room, *raised, *taken)


def test_the_gateways_request_is_built_once() -> None:
    """One function builds the chat body and names the conversation, for text and images, streamed or not."""
    bodies = [
        (room, function_of(node))
        for room in ROOMS
        for node in ast.walk(tree(room))
        if isinstance(node, ast.Dict)
        and {"model", "messages"} <= {key.value for key in node.keys if isinstance(key, ast.Constant)}
    ]
    assert bodies == [("gateway/request", "build_request")]
    named = [(room, function_of(node)) for room in ROOMS for text, node in strings(room) if "adapter-session-" in text]
    assert sorted(named) == [("gateway/request", "agent_session"), ("gateway/request", "build_request")]
    callers = [room for room in ROOMS if room != "demo" for text, _ in strings(room) if "chat/completions" in text]
    assert callers == ["gateway/client"]


# --- what no file may contain -------------------------------------------------------------------------


@each_room
def test_nothing_prints(room: str) -> None:
    """The service writes to its log. Only `database`, run as a program, may print."""

    def as_a_program(node: ast.AST) -> bool:
        tests = [ast.unparse(outer.test) for outer in above(node) if isinstance(outer, ast.If)]
        return room == "database" and "__name__ == '__main__'" in tests

    assert not where(room, *(call for name, call in called(room) if name == "print" and not as_a_program(call)))


@each_room
def test_no_error_is_swallowed(room: str) -> None:
    """There is no bare `except`, no handler that does nothing, and no `suppress` of all errors."""
    handlers = [node for node in ast.walk(tree(room)) if isinstance(node, ast.ExceptHandler)]
    bare = [handler for handler in handlers if handler.type is None]
    silent = [handler for handler in handlers if all(_does_nothing(statement) for statement in handler.body)]
    wide = [
        call
        for name, call in called(room)
        if name == "suppress" and {dotted(kind) for kind in call.args} & {"Exception", "BaseException"}
    ]
    assert not where(room, *bare, *silent, *wide)


def _does_nothing(statement: ast.stmt) -> bool:
    return isinstance(statement, ast.Pass) or (
        isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)
    )


# --- clocks -------------------------------------------------------------------------------------------

# The clock that a person or a time server can set. Durations and deadlines need `time.monotonic`.
WALL_CLOCK = re.compile(
    r"\b(time\.(time|time_ns|localtime|gmtime|ctime|asctime)|clock_gettime|(datetime|date)\.(now|utcnow|today))$"
    r"|^st_[acm]time(_ns)?$|^get[acm]time$"
)
FROM_TIME = {"time", "time_ns", "localtime", "gmtime", "ctime", "asctime", "clock_gettime", "getmtime"}
# The functions that may read it, each with the reason.
READS_WALL_CLOCK = {
    ("auth", "issue"): "signed: `iat` and `exp` of a token",
    ("chat_handlers", "_render"): "signed: the expiry of an image URL",
    ("chat_handlers", "read_image"): "compared with a signed expiry",
    ("sql/users", "insert_revoked_token"): "compared with the signed expiry of tokens",
    ("clock", "now"): "stored and shown: the time of a row",
    ("gateway/client", "_ask_state"): "shown: when the gateway was checked; the age of a check is monotonic",
    ("gateway/client", "finished_reply"): "compared with times that the gateway stored",
    ("gateway/rpc", "connection"): "compared with the gateway's clock",
    ("gateway/rpc", "open"): "compared with the gateway's clock",
    ("outbox", "claim_due_jobs"): "compared with a stored time; one too far ahead counts as passed",
    ("outbox", "_run_one"): "stored: when a job is due, for whichever process runs it",
    ("sql/outbox", "insert_outbox_job"): "stored: a job is due at once",
    ("sql/deletes", "_insert_jobs"): "stored: a job is due at once",
    ("sql/deletes", "_insert_jobs_for_others"): "stored: a job is due at once",
    ("image_handler", "sweep"): "compared with the time of a file; one too far ahead counts as passed",
    ("backup", "_swap"): "shown: the name of a file",
    ("sql/schema", "_copy_database"): "shown: the name of a file",
    ("project_manager", "_new_folder"): "shown: the name of a folder",
    ("handover/protocol", "log_line"): "shown: the time of a log line",
    ("demo", "frame"): "stands in for the gateway, whose frames carry a time",
    ("demo", "now"): "stands in for the gateway, whose messages carry a time",
}


def wall_clock(module: ast.AST) -> list[ast.AST]:
    """Returns the nodes that read the wall clock, or that import a name under which it could be read unseen."""
    found: list[ast.AST] = []
    for node in ast.walk(module):
        if isinstance(node, ast.Attribute):
            found += [node] if WALL_CLOCK.search(dotted(node) or node.attr) or WALL_CLOCK.search(node.attr) else []
        elif isinstance(node, ast.ImportFrom) and node.module in ("time", "os.path"):
            found += [node] if FROM_TIME & {alias.name for alias in node.names} else []
        elif isinstance(node, ast.Import | ast.ImportFrom):
            found += [node for alias in node.names if alias.asname and alias.name in ("time", "datetime", "date")]
    return found


@each_room
def test_durations_are_measured_by_the_monotonic_clock(room: str) -> None:
    """Only the functions that are listed read the wall clock, since a time that is measured by it is wrong by an hour
    after the clock was set back by an hour."""
    assert not where(
        room, *(node for node in wall_clock(tree(room)) if (room, function_of(node)) not in READS_WALL_CLOCK)
    )


def test_the_list_of_readers_of_the_wall_clock_is_current() -> None:
    """Each listed function exists and reads the wall clock."""
    readers = {(room, function_of(node)) for room in ROOMS for node in wall_clock(tree(room))}
    assert not READS_WALL_CLOCK.keys() - readers


@pytest.mark.parametrize(
    ("source", "reads"),
    [
        *(("time.time() - began", 1), ("field(default_factory=time.time)", 1), ("datetime.now(UTC) - began", 1)),
        *(("datetime.datetime.utcnow()", 1), ("from time import time", 1), ("import time as t", 1)),
        *(("from datetime import datetime as d", 1), ("path.stat().st_mtime", 1), ("os.path.getmtime(path)", 1)),
        *(("time.clock_gettime(time.CLOCK_REALTIME)", 1), ("time.monotonic()", 0), ("from time import monotonic", 0)),
        *(("time.perf_counter()", 0), ("from datetime import UTC, datetime", 0), ("clock.now()", 0)),
    ],
)
def test_readers_of_the_wall_clock_are_found(source: str, reads: int) -> None:
    """The rule finds each way to read the wall clock, and takes no other clock for it."""
    assert len(wall_clock(ast.parse(source))) == reads


# --- documentation and size ---------------------------------------------------------------------------


def is_plain(node: ast.ClassDef) -> bool:
    """Returns whether a class is a request body, a response body or a row that only has fields, whose names explain
    it."""
    bases = {dotted(base).rpartition(".")[2] for base in node.bases}
    fields = all(isinstance(statement, ast.AnnAssign | ast.Expr) for statement in node.body)
    return fields and bool(bases & {"BaseModel", "Body", "NamedTuple"})


def public(room: str) -> Iterator[ast.ClassDef | Function]:
    """Yields the public classes, functions and methods: neither their names nor those of their scopes begin with
    `_`."""
    for node in ast.walk(tree(room)):
        if not isinstance(node, ast.ClassDef | Function) or node.name.startswith("_"):
            continue
        outer = [scope for scope in above(node) if isinstance(scope, ast.ClassDef | Function)]
        if not any(isinstance(scope, Function) or scope.name.startswith("_") for scope in outer):
            yield node


@each_room
def test_what_others_use_is_explained(room: str) -> None:
    """Every public class, function and method has a docstring, except classes that only have fields."""
    silent = [
        f"{place} {node.name}"
        for node in public(room)
        for place in where(room, node)
        if not ast.get_docstring(node) and not (isinstance(node, ast.ClassDef) and is_plain(node))
    ]
    assert not silent


@each_room
def test_functions_fit_on_a_screen(room: str) -> None:
    """A function has at most MOST_LINES lines, including its decorators and docstring."""
    long = []
    for node in ast.walk(tree(room)):
        if isinstance(node, Function):
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            lines = (node.end_lineno or first) - first + 1
            if lines > MOST_LINES:
                long.append(f"{room}.py:{first} {node.name} has {lines} lines")
    assert not long


@each_room
def test_a_file_can_be_held_in_the_head(room: str) -> None:
    """A file has at most MOST_LINES_OF_A_FILE lines. A longer one has more than one concern."""
    assert len((CHECKOUT / f"{room}.py").read_text(encoding="utf-8").splitlines()) <= MOST_LINES_OF_A_FILE


# --- requirements -------------------------------------------------------------------------------------


def requirements() -> dict[str, tuple[str, str]]:
    """Returns the requirements: distribution → (the rest of its line, the comment on it)."""
    found = {}
    for line in (CHECKOUT / "requirements.txt").read_text(encoding="utf-8").splitlines():
        asked, _, comment = line.partition("#")
        if asked.strip():
            name = re.match(r"[A-Za-z0-9._-]+", asked)
            assert name, line
            found[name[0]] = (asked[name.end() :].strip(), comment.strip())
    return found


@cache
def distributions() -> dict[str, list[str]]:
    """Returns the installed packages: top-level name → the distributions that contain it."""
    return dict(packages_distributions())


def importers(distribution: str) -> set[str]:
    """Returns the rooms that import a package of a distribution."""
    wanted = _canonical(distribution)
    packages = {name for name, owners in distributions().items() if wanted in map(_canonical, owners)}
    return {noun(room) for room in ROOMS if packages & imported(room)}


def _canonical(distribution: str) -> str:
    return re.sub(r"[-_.]+", "-", distribution).lower()


@pytest.mark.parametrize("distribution", sorted(requirements()))
def test_a_requirement_is_pinned_and_used(distribution: str) -> None:
    """Each requirement names one version and is imported by a room: by the one that the comment on its line names."""
    rest, comment = requirements()[distribution]
    assert re.fullmatch(r"(\[[a-z0-9,_-]+\])?==[0-9][A-Za-z0-9.]*", rest)
    if distribution in NEVER_IMPORTED:
        return
    rooms = importers(distribution)
    assert rooms
    if comment:
        assert rooms == set(comment.partition(",")[0].split(" and "))


def test_every_import_is_required() -> None:
    """What a room imports is in the requirements, and is not installed only because another package depends on it."""
    required = {_canonical(name) for name in requirements()} | {"starlette"}  # FastAPI depends on it by design
    missing = {
        package
        for package in OWNERS
        if not required & {_canonical(owner) for owner in distributions().get(package, ())}
    }
    assert not missing


# --- error codes --------------------------------------------------------------------------------------


def raised(room: str) -> Iterator[tuple[str, str | None, ast.Call]]:
    """Yields the errors that a file creates: the name of the class, its `code` argument or None, and the call."""
    for node in ast.walk(tree(room)):
        if isinstance(node, ast.Call):
            module, _, name = dotted(node.func).rpartition(".")
            if module == "errors" and isinstance(getattr(errors, name, None), type):
                given = [word.value for word in node.keywords if word.arg == "code"]
                codes = [str(code.value) for code in given if isinstance(code, ast.Constant)]
                if len(codes) == len(given):  # a code that is not a constant is checked where it is written
                    yield name, codes[0] if codes else None, node


@each_room
def test_a_code_belongs_to_the_class_that_is_raised(room: str) -> None:
    """Each error is created with a code of `errors.CODES`, its own or that of its class, and by the class that CODES
    gives for it. Otherwise a code could have two statuses."""
    wrong = []
    for name, code, call in raised(room):
        kind = getattr(errors, name)
        if errors.CODES.get(code or kind.code) is not kind:
            wrong.append((*where(room, call), name, code or kind.code))
    assert not wrong


@each_room
def test_a_route_names_codes_that_exist(room: str) -> None:
    """The codes that routes declare and errors carry exist in `errors.CODES`."""
    declared = [
        (argument.value, *where(room, call))
        for _, call in called(room)
        if dotted(call.func) == "errors.raises"
        for argument in ast.walk(call)
        if isinstance(argument, ast.Constant)
    ]
    assert not [(code, place) for code, place in declared if code not in errors.CODES]
    words = [word for _, call in called(room) for word in call.keywords if word.arg == "code"]
    codes = [word.value.value for word in words if isinstance(word.value, ast.Constant)]
    assert not [code for code in codes if code not in errors.CODES]
