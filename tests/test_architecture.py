"""The house keeps its shape: who imports whom, who owns what, and what is found nowhere. All of it is read from the
syntax tree, without running a line of it."""

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

# From the top; a room imports from the layers below its own.
LAYERS = (
    ("serve", "demo"),
    ("handover",),
    ("app", "admin"),
    ("backup",),
    ("project_manager", "chat_handlers", "health"),
    ("auth",),
    ("web",),
    ("turns",),
    ("runs",),
    ("replies", "outbox"),
    ("database",),
    ("sql", "gateway", "image_handler"),
    ("errors", "settings", "file_utils", "telemetry", "clock", "background", "checkout"),
)
NOUNS = {name: depth for depth, layer in enumerate(LAYERS) for name in layer}


def files() -> Iterator[str]:
    """The files of the product, without `.py`; a noun that needs several is a package: `sql/users`."""
    for noun in NOUNS:
        if (CHECKOUT / noun).is_dir():
            yield from (f"{noun}/{path.stem}" for path in (CHECKOUT / noun).glob("*.py"))
        else:
            yield noun


ROOMS = tuple(sorted(files()))
PACKAGES = {noun for noun in NOUNS if (CHECKOUT / noun).is_dir()}
BESIDE = {("file_utils", "errors")}  # the one import within a layer
WEB = {"app", "auth", "project_manager", "chat_handlers", "web", "health"}
# Whatever is not ours and not Python's, with the rooms that may import it.
OWNERS = {
    "fastapi": WEB,
    "starlette": WEB | {"demo"},
    "pydantic": WEB | {"settings"},
    "pydantic_settings": {"settings"},
    "aiohttp": {"gateway"},
    "passlib": {"auth"},
    "jose": {"auth"},
    "limits": {"auth"},
    "email_validator": {"auth"},
    "PIL": {"image_handler"},
    "pillow_heif": {"image_handler"},
    "uvicorn": {"handover", "demo"},
    "prometheus_client": {"telemetry"},
}
LATE = {("handover/worker", "uvicorn")}  # a front must run where the requirements are missing or broken
FRAMEWORK = {"fastapi", "starlette", "pydantic"}
NEVER_IMPORTED = {"argon2-cffi": "passlib finds it"}
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
    """A room's syntax tree, in which each node knows its `parent`."""
    module = ast.parse((CHECKOUT / f"{room}.py").read_text(encoding="utf-8"))
    for node in ast.walk(module):
        for child in ast.iter_child_nodes(node):
            child.parent = node  # type: ignore[attr-defined]  # an attribute that we add
    return module


def above(node: ast.AST) -> Iterator[ast.AST]:
    """The nodes that a node lies in, from the inside out."""
    while (parent := getattr(node, "parent", None)) is not None:
        yield parent
        node = parent


def noun(room: str) -> str:
    """The package that a file belongs to, or the file itself."""
    return room.partition("/")[0]


def imports(room: str) -> Iterator[tuple[str, ast.Import | ast.ImportFrom]]:
    """The top-level packages that a room imports, with the statements that do it. What it takes from its own
    package, which it does relatively, is not among them."""
    for node in ast.walk(tree(room)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name.partition(".")[0], node
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield str(node.module).partition(".")[0], node


def imported(room: str) -> set[str]:
    """The top-level packages that a room imports."""
    return {name for name, _ in imports(room)}


def docstrings(room: str) -> set[int]:
    """The identities of the constants that are docstrings."""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    bodies = [node.body[0] for node in ast.walk(tree(room)) if isinstance(node, kinds) and node.body]
    return {id(first.value) for first in bodies if isinstance(first, ast.Expr)}


def strings(room: str) -> Iterator[tuple[str, ast.Constant]]:
    """The string constants of a room, those within f-strings too, without docstrings."""
    told = docstrings(room)
    for node in ast.walk(tree(room)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in told:
            yield node.value, node


def dotted(node: ast.AST) -> str:
    """`a.b.c` for such an expression, or else an empty string."""
    if isinstance(node, ast.Attribute):
        inner = dotted(node.value)
        return f"{inner}.{node.attr}" if inner else ""
    return node.id if isinstance(node, ast.Name) else ""


def called(room: str) -> Iterator[tuple[str, ast.Call]]:
    """The calls in a room, by the last name of what is called."""
    for node in ast.walk(tree(room)):
        if isinstance(node, ast.Call):
            function = node.func
            name = function.attr if isinstance(function, ast.Attribute) else dotted(function)
            yield name, node


def function_of(node: ast.AST) -> str:
    """The name of the outermost function or method that a node lies in."""
    names = [outer.name for outer in above(node) if isinstance(outer, Function)]
    return names[-1] if names else ""


def where(room: str, *nodes: ast.AST) -> list[str]:
    """Places, as an editor jumps to them."""
    return [f"{room}.py:{getattr(node, 'lineno', 1)}" for node in nodes]


# --- rooms and imports --------------------------------------------------------------------------------


def test_the_top_level_holds_the_rooms_and_nothing_else() -> None:
    """A new file at the top is a new room, and has to be given a layer first."""
    found = {path.stem for path in CHECKOUT.glob("*.py")}
    found |= {path.parent.name for path in CHECKOUT.glob("*/__init__.py")} - {"tests"}
    assert found == set(NOUNS)


@each_room
def test_imports_run_downward(room: str) -> None:
    """A room imports from layers below its own, never from beside or above."""
    wrong = [
        (*where(room, node), name)
        for name, node in imports(room)
        if name in NOUNS and NOUNS[name] <= NOUNS[noun(room)] and (room, name) not in BESIDE
    ]
    assert not wrong


@each_room
def test_a_package_has_one_door(room: str) -> None:
    """Code outside a package names the package alone: `sql.begin_turn`, never a file of it. Code inside it imports
    its sibling files relatively, and never through the door."""
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
    """No import hides in a function or behind a condition, and none comes after the first other statement."""
    first, *rest = tree(room).body
    assert isinstance(first, ast.Expr), "a room begins with what it is"
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
    """Each third-party package has its room, so that replacing it touches one file."""
    foreign = imported(room) - set(NOUNS) - sys.stdlib_module_names
    assert not {name for name in foreign if noun(room) not in OWNERS.get(name, ())}


@pytest.mark.parametrize("package", sorted(OWNERS.keys() - FRAMEWORK))
def test_a_package_has_one_owner(package: str) -> None:
    """Exactly one room imports it, and that one does."""
    assert {noun(room) for room in ROOMS if package in imported(room)} == OWNERS[package]


def test_errors_is_the_ground() -> None:
    """`errors` imports nothing of ours and knows no status: those are the map's in `web`."""
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
    """Nobody else writes one. What belongs to a connection, a PRAGMA or a BEGIN, may also stand where connections
    are opened; the other rooms run nothing and open nothing."""
    wrong: list[ast.AST] = [node for text, node in strings(room) if SQL.search(text)]
    if room not in OPEN_CONNECTIONS:
        wrong += [node for text, node in strings(room) if OF_A_CONNECTION.search(text)]
        wrong += [call for name, call in called(room) if name in ("execute", "executemany", "executescript", "cursor")]
        wrong += [call for _, call in called(room) if dotted(call.func) in ("connect", "sqlite3.connect")]
    assert not where(room, *wrong)


def test_what_sql_looks_like_is_known() -> None:
    """The search above finds the statements that there are, or it would prove nothing of the others."""
    assert sum(bool(SQL.search(text)) for room in ROOMS if noun(room) == "sql" for text, _ in strings(room)) > 80


@pytest.mark.parametrize("room", [room for room in ROOMS if room != "settings"])
def test_the_environment_is_read_in_settings(room: str) -> None:
    """Nobody else looks at it, for a setting that is read in two places has two meanings sooner or later."""
    names = {"environ", "environb", "getenv", "getenvb"}
    looks = [node for node in ast.walk(tree(room)) if isinstance(node, ast.Attribute) and node.attr in names]
    taken = [node for _, node in imports(room) if names & {alias.name for alias in node.names}]
    assert not where(room, *looks, *taken)


@pytest.mark.parametrize("room", [room for room in ROOMS if room != "web"])
def test_http_exception_is_webs(room: str) -> None:
    """Errors are raised in words; what they are in HTTP is said in one place."""
    raised = [node for node in ast.walk(tree(room)) if dotted(node).endswith("HTTPException")]
    taken = [node for _, node in imports(room) if "HTTPException" in {alias.name for alias in node.names}]
    assert not where(room, *raised, *taken)


def test_the_gateways_request_is_built_once() -> None:
    """Text, image, streamed or not: one function makes the chat body, and names the conversation."""
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


# --- what is found nowhere ----------------------------------------------------------------------------


@each_room
def test_nothing_prints(room: str) -> None:
    """What a service has to say goes to its log; `database`, run as a program, may talk to its operator."""

    def as_a_program(node: ast.AST) -> bool:
        tests = [ast.unparse(outer.test) for outer in above(node) if isinstance(outer, ast.If)]
        return room == "database" and "__name__ == '__main__'" in tests

    assert not where(room, *(call for name, call in called(room) if name == "print" and not as_a_program(call)))


@each_room
def test_no_error_is_swallowed(room: str) -> None:
    """No bare `except`, none that does nothing, and nothing that suppresses every error."""
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


# --- how it reads -------------------------------------------------------------------------------------


def is_plain(node: ast.ClassDef) -> bool:
    """A model of a body or a row: fields, and no more, which say themselves what they are."""
    bases = {dotted(base).rpartition(".")[2] for base in node.bases}
    fields = all(isinstance(statement, ast.AnnAssign | ast.Expr) for statement in node.body)
    return fields and bool(bases & {"BaseModel", "Body", "NamedTuple"})


def public(room: str) -> Iterator[ast.ClassDef | Function]:
    """The classes, functions and methods that others may use: no name on the way to them begins with `_`."""
    for node in ast.walk(tree(room)):
        if not isinstance(node, ast.ClassDef | Function) or node.name.startswith("_"):
            continue
        outer = [scope for scope in above(node) if isinstance(scope, ast.ClassDef | Function)]
        if not any(isinstance(scope, Function) or scope.name.startswith("_") for scope in outer):
            yield node


@each_room
def test_what_others_use_is_explained(room: str) -> None:
    """Every public class, function and method has a docstring, except bodies and rows that are fields alone."""
    silent = [
        f"{place} {node.name}"
        for node in public(room)
        for place in where(room, node)
        if not ast.get_docstring(node) and not (isinstance(node, ast.ClassDef) and is_plain(node))
    ]
    assert not silent


@each_room
def test_functions_fit_on_a_screen(room: str) -> None:
    """No function is longer than that, its decorators and docstring counted."""
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
    """No file has more lines than that: a longer one is more than one noun."""
    assert len((CHECKOUT / f"{room}.py").read_text(encoding="utf-8").splitlines()) <= MOST_LINES_OF_A_FILE


# --- requirements -------------------------------------------------------------------------------------


def requirements() -> dict[str, tuple[str, str]]:
    """The requirements: distribution → (the rest of its line, the comment on it)."""
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
    """The installed packages: top-level name → the distributions that bring it."""
    return dict(packages_distributions())


def importers(distribution: str) -> set[str]:
    """The rooms that import something of a distribution."""
    wanted = _canonical(distribution)
    packages = {name for name, owners in distributions().items() if wanted in map(_canonical, owners)}
    return {noun(room) for room in ROOMS if packages & imported(room)}


def _canonical(distribution: str) -> str:
    return re.sub(r"[-_.]+", "-", distribution).lower()


@pytest.mark.parametrize("distribution", sorted(requirements()))
def test_a_requirement_is_pinned_and_used(distribution: str) -> None:
    """Each names one version, is imported by a room, and by the one that its line names."""
    rest, comment = requirements()[distribution]
    assert re.fullmatch(r"(\[[a-z0-9,_-]+\])?==[0-9][A-Za-z0-9.]*", rest)
    if distribution in NEVER_IMPORTED:
        return
    rooms = importers(distribution)
    assert rooms
    if comment:
        assert rooms == set(comment.partition(",")[0].split(" and "))


def test_every_import_is_required() -> None:
    """What a room imports is named in the requirements, and does not come along with something else by chance."""
    required = {_canonical(name) for name in requirements()} | {"starlette"}  # which is FastAPI's own ground
    missing = {
        package
        for package in OWNERS
        if not required & {_canonical(owner) for owner in distributions().get(package, ())}
    }
    assert not missing


# --- codes --------------------------------------------------------------------------------------------


def raised(room: str) -> Iterator[tuple[str, str | None, ast.Call]]:
    """The errors that a room makes: class, the code it is given, the call."""
    for node in ast.walk(tree(room)):
        if isinstance(node, ast.Call):
            module, _, name = dotted(node.func).rpartition(".")
            if module == "errors" and isinstance(getattr(errors, name, None), type):
                given = [word.value for word in node.keywords if word.arg == "code"]
                codes = [str(code.value) for code in given if isinstance(code, ast.Constant)]
                if len(codes) == len(given):  # one that is handed on was looked at where it was written
                    yield name, codes[0] if codes else None, node


@each_room
def test_a_code_belongs_to_the_class_that_is_raised(room: str) -> None:
    """Each error is made with a code of `errors.CODES`, its own or its class's, and by the class that has it there,
    so that a code has one status wherever it comes from."""
    wrong = []
    for name, code, call in raised(room):
        kind = getattr(errors, name)
        if errors.CODES.get(code or kind.code) is not kind:
            wrong.append((*where(room, call), name, code or kind.code))
    assert not wrong


@each_room
def test_a_route_names_codes_that_exist(room: str) -> None:
    """What a route says of its errors is made of codes that there are."""
    told = [
        (argument.value, *where(room, call))
        for _, call in called(room)
        if dotted(call.func) == "errors.raises"
        for argument in ast.walk(call)
        if isinstance(argument, ast.Constant)
    ]
    assert not [(code, place) for code, place in told if code not in errors.CODES]
    words = [word for _, call in called(room) for word in call.keywords if word.arg == "code"]
    codes = [word.value.value for word in words if isinstance(word.value, ast.Constant)]
    assert not [code for code in codes if code not in errors.CODES]
