"""The HTTP contract: each route, error code and convention, tested over real HTTP against the real app."""

import base64
import io
import json
import re
import shutil
import sqlite3
import ssl
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import parse_qs, urlsplit

import httpx
import PIL.Image
import pillow_heif
import pytest
from fastapi.routing import iter_route_contexts
from pydantic import SecretStr, ValidationError

import errors
import health
import web
from demo import USAGE
from image_handler import ImageStore

from .conftest import make_settings
from .service import JSON, Person, Served, free_port, until
from .stand_in import Received, StandIn, reply_text

# --- shapes -------------------------------------------------------------------------------------------
# A shape is a type, a pattern for a string, a dict with exactly these keys, a list whose one item is the shape of all
# items, a tuple of alternatives, or the value itself.

Shape = Any

NO_TLS = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # without the system's certificates, which take long to load

TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?Z")
UUID4 = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}")
USER = {"id": int, "email": str, "name": (str, None), "created_at": TIME}
TOKEN = {"access_token": str, "token": str, "token_type": "bearer", "expires_in": int, "user": USER}
PROJECT = {
    "id": int,
    "user_id": int,
    "name": str,
    "description": (str, None),
    "project_path": str,
    "created_at": TIME,
}
SESSION = {
    "id": int,
    "project_id": int,
    "session_key": UUID4,
    "label": (str, None),
    "archived": (0, 1),
    "scope": str,
    "channel": str,
    "agent_id": str,
    "created_at": TIME,
    "last_used_at": (TIME, None),
}
TOKENS_USED = {"prompt_tokens": int, "completion_tokens": int, "total_tokens": int}
FAILURE = {"code": str, "message": str, "retryable": bool}
LINK = re.compile(r"https?://[^/]+/images/\d+\.(jpg|png|gif|webp)\?expires=\d+&signature=[0-9a-f]+")
FINISH_REASON = ("stop", "length", "content_filter", "stopped", "interrupted", "error", None)
MESSAGE = {
    "id": int,
    "role": ("user", "assistant"),
    "content": str,
    "image": (LINK, None),
    "images": [LINK],  # all images; the original contract has only `image`
    "status": ("queued", "streaming", "complete", "stopped", "interrupted", "failed", "empty"),
    "finish_reason": FINISH_REASON,
    "error": (FAILURE, None),
    "usage": (TOKENS_USED, None),
    "created_at": TIME,
}
REPLY = {
    "id": int,
    "role": "assistant",
    "content": str,
    "status": ("complete", "empty", "stopped"),
    "finish_reason": FINISH_REASON,
    "usage": (TOKENS_USED, None),
    "created_at": TIME,
}
NODE: tuple[JSON, JSON] = (
    {"type": "file", "name": str, "path": str, "size": int},
    {"type": "folder", "name": str, "path": str, "children": []},
)
NODE[1]["children"].append(NODE)
DATABASE = {"ok": bool, "detail": str, "oldest_write_seconds": float, "sqlite": str}
HEALTH = {
    "status": "ok",
    "version": health.VERSION,
    "environment": ("production", "development"),
    "branch": str,
    "commit": str,
    "port": int,
    "uptime_seconds": float,
    "stale": bool,
    "failed_start": None,
    "database": DATABASE | {"ok": True},
    "gateway": {"url": str, "ok": bool, "checked_at": (TIME, None), "detail": str},
}
READY = {
    "status": "ready",
    "detail": str,
    "gateway_version": (str, None),
    "websocket": {"ok": bool, "detail": str},
}


def differences(value: object, shape: Shape, at: str = "$") -> list[str]:
    """Returns where a value does not match a shape; an empty list if it matches."""
    if isinstance(shape, tuple):
        found = [differences(value, one, at) for one in shape]
        return [] if [] in found else min(found, key=len)
    if isinstance(shape, dict) and isinstance(value, dict):
        keys = [f"{at}.{key} is {'missing' if key in shape else 'more'}" for key in shape.keys() ^ value.keys()]
        common = shape.keys() & value.keys()
        return keys + [wrong for key in common for wrong in differences(value[key], shape[key], f"{at}.{key}")]
    if isinstance(shape, list) and isinstance(value, list):
        return [wrong for item in value for wrong in differences(item, shape[0], f"{at}[]")]
    if isinstance(shape, re.Pattern):
        fits = isinstance(value, str) and shape.fullmatch(value) is not None
    else:
        fits = type(value) is shape if isinstance(shape, type) else type(value) is type(shape) and value == shape
    return [] if fits else [f"{at} is {value!r}, not {shape}"]


# --- the routes ---------------------------------------------------------------------------------------


class Route(NamedTuple):
    """A route of the contract. Names in braces, in path and body, are replaced by values of a `Scene`."""

    method: str
    path: str
    shape: Shape  # of the successful response; a string is the media type of a response that is not JSON
    codes: str = ""  # error codes in addition to those of all routes
    body: Any = None
    status: int = 200
    public: bool = False
    query: str = ""

    @property
    def name(self) -> str:
        """Returns method and path."""
        return f"{self.method} {self.path}"

    @property
    def missing(self) -> str:
        """Returns the 404 code for the project, session, message, image or file that the route names; empty if it names
        none."""
        request = self.path + json.dumps(self.body)
        return next((code for name, code in MISSING.items() if name in request), "")


MISSING = {
    "{message_id}": "message_not_found",
    "{image_id}": "image_not_found",
    "{session_id}": "session_not_found",
    "{session_key}": "session_not_found",
    "{project_id}": "project_not_found",
}


CHAT_CODES = (
    "no_user_message image_too_large unsupported_image invalid_image idempotency_key_reused session_busy "
    "gateway_unavailable gateway_error gateway_auth gateway_endpoint_disabled gateway_timeout gateway_incomplete "
    "interrupted disk_unavailable"
)
CHAT = {"session_key": "{session_key}", "messages": [{"role": "user", "content": "Hello"}]}
PROJECT_ID = "/projects/{project_id}"
SESSION_ID = "/sessions/{session_id}"
FILE = PROJECT_ID + "/files/{path}"
DELETED_PROJECT = {"status": "deleted", "message": "Project deleted"}
DELETED_SESSION = {"status": "deleted", "message": "Session deleted"}
SSE = "text/event-stream"
IMAGE = Route(
    *("GET", "/images/{image_id}.{extension}", "image/png"),
    codes="database_unavailable",
    public=True,
    query="?expires={expires}&signature={signature}",
)

ROUTES = (
    Route(
        *("POST", "/auth/signup", TOKEN),
        codes="email_taken signup_closed too_many_attempts database_unavailable",
        body={"email": "{new_email}", "password": "12345678", "name": "Ada"},
        status=201,
        public=True,
    ),
    Route(
        *("POST", "/auth/login", TOKEN),
        codes="invalid_credentials too_many_attempts database_unavailable",
        body={"email": "{email}", "password": "{password}"},
        public=True,
    ),
    Route("GET", "/auth/me", USER),
    Route("POST", "/auth/logout", {"message": "Logged out"}),
    Route(
        *("PUT", "/auth/password", TOKEN),
        codes="invalid_credentials too_many_attempts",
        body={"current_password": "{password}", "new_password": "another one"},
    ),
    Route(
        *("DELETE", "/auth/me", {"message": str}),
        codes="invalid_credentials too_many_attempts",
        body={"password": "{password}"},
    ),
    Route("GET", "/projects", [PROJECT]),
    Route(
        *("POST", "/projects", PROJECT),
        codes="disk_unavailable",
        body={"name": "New", "description": "Words"},
        status=201,
    ),
    Route("GET", PROJECT_ID, PROJECT),
    Route("PUT", PROJECT_ID, PROJECT, body={"name": "Other", "description": "Words"}),
    Route("DELETE", PROJECT_ID, DELETED_PROJECT),
    Route("GET", PROJECT_ID + "/sessions", [SESSION]),
    Route("POST", PROJECT_ID + "/sessions", SESSION, body={"label": "Mine", "agent_id": "main"}, status=201),
    Route("PUT", SESSION_ID, SESSION, body={"label": "Other", "archived": True}),
    Route("DELETE", SESSION_ID, DELETED_SESSION),
    Route("DELETE", PROJECT_ID + SESSION_ID, DELETED_SESSION),
    Route("GET", SESSION_ID + "/messages", [MESSAGE]),
    Route("POST", "/chat", REPLY, codes=CHAT_CODES, body=CHAT),
    Route("POST", "/chat/stream", SSE, codes=CHAT_CODES, body=CHAT),
    Route("GET", SESSION_ID + "/messages/{message_id}/stream", SSE, codes="invalid_request"),
    Route("POST", SESSION_ID + "/stop", {"stopped": False}),
    IMAGE,
    Route("GET", PROJECT_ID + "/files", [NODE], codes="disk_unavailable"),
    Route(
        *("GET", FILE, {"content": str, "is_binary": bool, "size": int}),
        codes="invalid_path file_not_found file_too_large disk_unavailable",
    ),
    Route(
        *("PUT", FILE, {"success": True, "size": 5}),
        codes="invalid_path file_too_large disk_unavailable",
        body={"content": "w\u00f6rd"},
    ),
    Route("GET", "/health", HEALTH, public=True),
    Route("GET", "/health/ready", READY, codes="not_ready", public=True),
    Route("GET", "/metrics", "text/plain", codes="unauthorized", public=True),
)
OWNED = [route for route in ROUTES if route.missing]
PRIVATE = [route for route in ROUTES if not route.public]
PAGES = {"/openapi.json", "/docs", "/docs/oauth2-redirect", "/redoc"}

# The status of each error code, as docs/api.md lists them.
STATUS = {
    **dict.fromkeys(("invalid_path", "invalid_image", "no_user_message", "invalid_request"), 400),
    **dict.fromkeys(("unauthorized", "invalid_credentials"), 401),
    "signup_closed": 403,
    **{f"{what}_not_found": 404 for what in ("project", "session", "message", "image", "file")},
    "email_taken": 409,
    **dict.fromkeys(("image_too_large", "file_too_large"), 413),
    "unsupported_image": 415,
    "idempotency_key_reused": 422,
    **dict.fromkeys(("too_many_attempts", "session_busy"), 429),
    "internal_error": 500,
    **dict.fromkeys(("gateway_error", "gateway_auth", "gateway_endpoint_disabled", "gateway_incomplete"), 502),
    **dict.fromkeys(("gateway_unavailable", "interrupted", "not_ready"), 503),
    **dict.fromkeys(("database_unavailable", "disk_unavailable"), 503),
    "gateway_timeout": 504,
}


def by_name(route: Route) -> str:
    """Returns the id of a route's test case."""
    return route.name


# --- users --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def openclaw() -> Iterator[StandIn]:
    """One gateway for all tests of this file."""
    with StandIn(token="a token that is found nowhere") as gateway:
        yield gateway


@pytest.fixture(scope="module")
def served(openclaw: StandIn, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """One app for all tests of this file that need no settings of their own; each test signs up new users."""
    with Served(make_settings(tmp_path_factory.mktemp("contract"), openclaw)) as service:
        yield service


class Scene:
    """A user who owns one of everything; `names` has the values for the names in braces of the routes."""

    def __init__(self, person: Person) -> None:
        self.person = person
        self.project = person.project("Garden", "Roses")
        self.session = person.session(self.project)
        assert person.say(self.session, "Look", image=encoded(PNG)).status_code == 200
        asked, reply = person.messages(self.session)
        link = urlsplit(asked["image"])
        image_id, extension = link.path.rpartition("/")[2].split(".")
        self.names = {
            "email": person.email,
            "password": person.password,
            "new_email": f"{uuid.uuid4().hex}@example.com",
            "project_id": self.project["id"],
            "session_id": self.session["id"],
            "session_key": self.session["session_key"],
            "message_id": reply["id"],
            "image_id": image_id,
            "extension": extension,
            **{name: values[0] for name, values in parse_qs(link.query).items()},
            "path": "README.md",
        }

    def all(self) -> list[Any]:
        """Returns everything that the user owns, as the routes return it."""
        paths = ["/auth/me", "/projects", PROJECT_ID, PROJECT_ID + "/sessions", SESSION_ID + "/messages"]
        paths += [PROJECT_ID + "/files", FILE]
        return [self.person.http.get(path.format_map(self.names)).json() for path in paths]


def send(http: httpx.Client, route: Route, names: JSON, **headers: str) -> httpx.Response:
    """Sends the request of a route of the table."""
    path = (route.path + route.query).format_map(names)
    if route.body is None:
        return http.request(route.method, path, headers=headers)
    body = _filled(json.dumps(route.body), names)
    return http.request(route.method, path, content=body, headers={"Content-Type": "application/json"} | headers)


def _filled(text: str, names: JSON) -> str:
    return re.sub(r"\{(\w+)\}", lambda match: str(names[match[1]]), text)


@pytest.fixture
def scene(ada: Person) -> Scene:
    """The scene of a new user."""
    return Scene(ada)


@pytest.fixture(scope="module")
def hers(served: Served) -> Iterator[Scene]:
    """The scene of a user whose data no test may change, and no other user may read."""
    with served.person() as person:
        yield Scene(person)


@pytest.fixture(scope="module")
def his(served: Served) -> Iterator[Scene]:
    """The scene of another user."""
    with served.person() as person:
        yield Scene(person)


def anonymous(url: str) -> httpx.Client:
    """Returns a client without a token."""
    return httpx.Client(base_url=url, trust_env=False, verify=NO_TLS)


def get(url: str, headers: dict[str, str] | None = None) -> httpx.Response:
    """Returns the response to a GET request without a token."""
    with anonymous("") as http:
        return http.get(url, headers=headers)


def asked(openclaw: StandIn, session: JSON) -> list[Received]:
    """Returns the requests that the gateway received in a session."""
    return [request for request in openclaw.requests if session["session_key"] in request.session_key]


# --- images -------------------------------------------------------------------------------------------


def picture(kind: str, color: str = "red") -> bytes:
    """Returns a small image in a format of Pillow."""
    output = io.BytesIO()
    image = PIL.Image.new("RGB", (24, 16), color)
    if kind == "HEIF":
        pillow_heif.from_pillow(image).save(output)
    else:
        image.save(output, kind)
    return output.getvalue()


def encoded(data: bytes) -> str:
    """Returns bytes in base64."""
    return base64.b64encode(data).decode()


PNG = picture("PNG")
MEGABYTE = 1024 * 1024


# --- OpenAPI ------------------------------------------------------------------------------------------

WORDS_ONLY = {"title", "description", "default", "examples"}
TYPES: dict[str, tuple[type, ...]] = {
    "string": (str,),
    "integer": (int,),
    "number": (int, float),
    "boolean": (bool,),
    "object": (dict,),
    "array": (list,),
    "null": (type(None),),
}


@pytest.fixture(scope="module")
def document(served: Served) -> JSON:
    """The OpenAPI document, requested without a token."""
    response = get(f"{served.url}/openapi.json")
    assert response.status_code == 200
    got: JSON = response.json()
    return got


def violations(value: Any, schema: JSON, document: JSON, at: str = "$") -> list[str]:
    """Returns where a value violates a JSON schema or contains a property that the schema does not list."""
    if "$ref" in schema:
        return violations(value, lookup(schema["$ref"], document), document, at)
    rest = schema.keys() - WORDS_ONLY - {"type", "properties", "required", "items", "anyOf", "enum", "const"}
    assert not rest, f"this check does not know {rest}"
    if "anyOf" in schema:
        found = [violations(value, one, document, at) for one in schema["anyOf"]]
        return [] if [] in found else min(found, key=len)
    if "type" in schema and type(value) not in TYPES[schema["type"]]:
        return [f"{at} is {value!r}, not of type {schema['type']}"]
    if value not in schema.get("enum", [value]) or schema.get("const", value) != value:
        return [f"{at} is {value!r}, not {schema.get('enum', schema.get('const'))}"]
    inner: list[tuple[Any, JSON, str]] = []
    wrong: list[str] = []
    if isinstance(value, list) and "items" in schema:
        inner = [(item, schema["items"], f"{at}[]") for item in value]
    if isinstance(value, dict) and "properties" in schema:
        listed = schema["properties"]
        wrong = [f"{at}.{key} is missing" for key in set(schema.get("required", ())) - value.keys()]
        wrong += [f"{at}.{key} is not in the schema" for key in value.keys() - listed.keys()]
        inner = [(value[key], listed[key], f"{at}.{key}") for key in value.keys() & listed.keys()]
    return wrong + [one for item, kind, place in inner for one in violations(item, kind, document, place)]


def lookup(reference: str, document: JSON) -> JSON:
    """Returns the part of the document that a reference such as `#/a/b` names."""
    found: JSON = document
    for name in reference.removeprefix("#/").split("/"):
        found = found[name]
    return found


def undocumented(response: httpx.Response, document: JSON) -> list[str]:
    """Returns which of a response's status, media type, code and shape the OpenAPI document does not describe."""
    operation = _operation(response.request, document)
    described = operation["responses"].get(str(response.status_code))
    if described is None:
        return [f"status {response.status_code}"]
    kind = response.headers["Content-Type"].partition(";")[0]
    media = described.get("content", {})
    if kind not in media:
        return [] if f"{kind.partition('/')[0]}/*" in media else [f"content type {kind}"]
    if kind != "application/json":
        return []
    body = response.json()
    wrong = violations(body, media[kind]["schema"], document)
    named = isinstance(body, list) or not isinstance(body.get("detail"), str) or "code" not in body
    if not named and f"`{body['code']}`" not in described["description"]:
        wrong.append(f"code {body['code']}")
    return wrong


def _operation(request: httpx.Request, document: JSON) -> JSON:
    paths = sorted(document["paths"], key=lambda path: path.count("{"))
    for path in paths:
        pattern = re.sub(r"\\{(\w+)\\}", lambda match: ".+" if match[1] == "path" else "[^/]+", re.escape(path))
        if re.fullmatch(pattern, request.url.path) and request.method.lower() in document["paths"][path]:
            operation: JSON = document["paths"][path][request.method.lower()]
            return operation
    pytest.fail(f"{request.method} {request.url.path} is not in the document")


def test_the_table_holds_every_route(served: Served, document: JSON) -> None:
    """The table above, the app and the OpenAPI document have the same routes. Only FastAPI's own pages are not
    documented."""
    table = {(route.method, route.path) for route in ROUTES}
    described = {(method.upper(), path) for path, item in document["paths"].items() for method in item}
    assert described == table
    routed = {
        (method, str(route.path).replace("{path:path}", "{path}"))
        for route in iter_route_contexts(served.app.routes)
        for method in getattr(route, "methods", None) or ()
        if route.path not in PAGES
    }
    assert routed == table


@pytest.mark.parametrize("route", ROUTES, ids=by_name)
def test_openapi_describes_a_route(route: Route, document: JSON) -> None:
    """Each operation has a description, a success response with a model, its error codes under the right statuses, and
    a 422 response if it takes parameters or a body."""
    operation = document["paths"][route.path][route.method.lower()]
    responses = operation["responses"]
    assert operation["summary"] and operation["description"] and operation["tags"]
    assert [status for status in responses if status.startswith("2")] == [str(route.status)]
    media = responses[str(route.status)]["content"]
    if isinstance(route.shape, str):
        assert route.shape in media or f"{route.shape.partition('/')[0]}/*" in media
    else:
        assert "$ref" in json.dumps(media["application/json"]["schema"])
    assert ("security" in operation) == (not route.public)
    takes = bool(operation.get("parameters") or operation.get("requestBody"))
    assert ("422" in responses) == takes
    usual = ["internal_error"] + ["unauthorized", "database_unavailable"] * (not route.public)
    codes = {*route.codes.split(), *usual, *filter(None, [route.missing])}
    absent = {code for code in codes if f"`{code}`" not in responses.get(str(STATUS[code]), {}).get("description", "")}
    assert not absent


def test_openapi_names_codes_that_exist(document: JSON) -> None:
    """Each code in the document exists in the contract and is under its own status, with the model `ErrorOut`."""
    for path, item in document["paths"].items():
        for method, operation in item.items():
            for status, response in operation["responses"].items():
                named = re.findall(r"`(\w+)`", response["description"])
                known = STATUS | {"request_too_large": 413}
                assert {known[code] for code in named} <= {int(status)}, (method, path)
                if named:
                    assert "#/components/schemas/ErrorOut" in json.dumps(response["content"])


def test_openapi_is_whole(document: JSON) -> None:
    """Every reference can be resolved, operation ids are unique, and the internal key `x-errors` is removed."""
    text = json.dumps(document)
    for reference in set(re.findall(r'"\$ref": "([^"]+)"', text)):
        assert lookup(reference, document)
    ids = [operation["operationId"] for item in document["paths"].values() for operation in item.values()]
    assert len(set(ids)) == len(ids) == len(ROUTES)
    assert "x-errors" not in text
    assert document["info"]["version"] == health.VERSION


@pytest.mark.parametrize("path", ["/docs", "/redoc", "/openapi.json"])
def test_the_documentation_is_open(path: str, served: Served) -> None:
    """The documentation can be read without a token."""
    assert get(served.url + path).status_code == 200


def test_every_code_has_one_status() -> None:
    """The classes of `errors.CODES` map to the statuses of the contract."""
    mapped = {
        code: next(web.STATUSES[base] for base in kind.__mro__ if base in web.STATUSES)
        for code, kind in errors.CODES.items()
    }
    assert mapped == STATUS


# --- every route --------------------------------------------------------------------------------------


@pytest.mark.parametrize("route", ROUTES, ids=by_name)
def test_a_route_answers_as_the_contract_says(route: Route, scene: Scene, document: JSON) -> None:
    """The response has the documented status, and exactly the documented keys and types."""
    response = send(scene.person.http, route, scene.names)
    assert response.status_code == route.status, response.text
    if isinstance(route.shape, str):
        assert response.headers["Content-Type"].partition(";")[0] == route.shape
    else:
        assert not differences(response.json(), route.shape)
    assert not undocumented(response, document)


@pytest.mark.parametrize("route", PRIVATE, ids=by_name)
def test_a_route_is_closed_to_the_anonymous(route: Route, hers: Scene, served: Served, document: JSON) -> None:
    """Without a token, the answer is a documented 401 with `WWW-Authenticate`, and nothing changes."""
    before = hers.all()
    with anonymous(served.url) as http:
        response = send(http, route, hers.names)
    assert response.status_code == 401
    assert not differences(response.json(), {"detail": str, "code": "unauthorized"})
    assert response.headers["WWW-Authenticate"] == "Bearer"
    assert not undocumented(response, document)
    assert hers.all() == before


@pytest.mark.parametrize("route", [route for route in ROUTES if route.public], ids=by_name)
def test_a_public_route_needs_no_token(route: Route, hers: Scene, served: Served) -> None:
    """Login, sign-up, health and signed image URLs work without a token and with an invalid one."""
    with anonymous(served.url) as http:
        fresh = hers.names | {"new_email": f"{uuid.uuid4().hex}@example.com"}
        assert send(http, route, fresh).status_code == route.status
        fresh = hers.names | {"new_email": f"{uuid.uuid4().hex}@example.com"}
        assert send(http, route, fresh, Authorization="Bearer nonsense").status_code == route.status


@pytest.mark.parametrize("route", OWNED, ids=by_name)
def test_somebody_elses_is_not_there(route: Route, hers: Scene, his: Scene, document: JSON) -> None:
    """Something that belongs to another user gets the same answer, including headers, as something that does not exist;
    nothing changes."""
    before = hers.all()
    nobodys = hers.names | {"session_key": str(uuid.uuid4())}
    nobodys |= dict.fromkeys(("project_id", "session_id", "message_id", "image_id"), 2**53)
    stolen = hers.names | ({"signature": his.names["signature"]} if route.public else {})
    other, none = (send(his.person.http, route, names) for names in (stolen, nobodys))
    assert other.status_code == 404
    assert not differences(other.json(), {"detail": str, "code": route.missing})
    assert (other.status_code, other.json(), _lasting(other)) == (none.status_code, none.json(), _lasting(none))
    assert not undocumented(other, document)
    assert hers.all() == before


def _lasting(response: httpx.Response) -> dict[str, str]:
    return {name: value for name, value in response.headers.items() if name not in ("x-request-id", "date")}


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("DELETE", "/projects/{his_project}/sessions/{session_id}"),
        ("DELETE", "/projects/{project_id}/sessions/{his_session}"),
        ("GET", "/sessions/{his_session}/messages/{message_id}/stream"),
    ],
)
def test_one_of_ones_own_opens_nobody_elses(method: str, path: str, hers: Scene, his: Scene) -> None:
    """If a path names two things, both must belong to the caller and to each other."""
    before, mine = hers.all(), his.all()
    names = hers.names | {"his_project": his.names["project_id"], "his_session": his.names["session_id"]}
    assert his.person.http.request(method, path.format_map(names)).status_code == 404
    assert (hers.all(), his.all()) == (before, mine)


def test_a_message_is_streamed_from_its_own_session(scene: Scene) -> None:
    """`message_not_found` for a reply of another session of the same user, and for a message that is not a reply."""
    other = scene.person.session()
    http, (said, reply) = scene.person.http, scene.person.messages(scene.session)
    for session, message in ((other, reply), (scene.session, said)):
        response = http.get(f"/sessions/{session['id']}/messages/{message['id']}/stream")
        assert (response.status_code, response.json()["code"]) == (404, "message_not_found")


@pytest.mark.parametrize(
    "header",
    ["", "Bearer", "Bearer nonsense", "Basic YTpi", "Bearer a.b.c", "Bearer " + "a" * 5000, "Token {token}"],
)
def test_a_token_that_is_none_is_refused(header: str, ada: Person) -> None:
    """Any value that is not a valid bearer token gets a 401 with the same text."""
    sent = {"Authorization": header.format(token=ada.token)}
    response = ada.http.get("/auth/me", headers=sent)
    assert (response.status_code, response.json()["code"]) == (401, "unauthorized")
    assert response.headers["WWW-Authenticate"] == "Bearer"


def test_a_token_of_another_secret_is_refused(ada: Person, serve: Callable[..., Served]) -> None:
    """A service with another `JWT_SECRET` refuses the token."""
    with ada.at(serve(jwt_secret=SecretStr("a secret of somebody else, long enough")).url) as stranger:
        assert stranger.http.get("/auth/me").status_code == 401


# --- every code ---------------------------------------------------------------------------------------


class Stage(NamedTuple):
    """What a function needs to provoke an error code: a user, and a way to start an app with other settings."""

    person: Person
    serve: Callable[..., Served]


Provoke = Callable[[Stage], httpx.Response]
PROVOKED: dict[str, Provoke] = {}


def provokes(code: str) -> Callable[[Provoke], Provoke]:
    """Registers a function that makes the app return `code`."""

    def register(provoke: Provoke) -> Provoke:
        PROVOKED[code] = provoke
        return provoke

    return register


def chat(person: Person, content: object, session: JSON | None = None, **more: Any) -> httpx.Response:
    """Sends a message, in `session` or else in a new one."""
    headers = more.pop("headers", {})
    key = (session or person.session())["session_key"]
    body = {"session_key": key, "messages": [{"role": "user", "content": content}], **more}
    return person.http.post("/chat", json=body, headers=headers)


def file_of(person: Person, path: str) -> str:
    """Returns the URL of a file in a new project."""
    return f"/projects/{person.project()['id']}/files/{path}"


def spoil(service: Served, statement: str, *values: object) -> None:
    """Runs a statement on the database behind the app's back, as an operator with a shell could."""
    with closing(sqlite3.connect(service.settings.db_path)) as conn, conn:
        conn.execute(statement, values)


@provokes("invalid_path")
def _(stage: Stage) -> httpx.Response:
    return stage.person.http.get(file_of(stage.person, "..%2f..%2fetc%2fpasswd"))


@provokes("invalid_image")
def _(stage: Stage) -> httpx.Response:
    return chat(stage.person, "Look", image=encoded(PNG[:-20]))


@provokes("no_user_message")
def _(stage: Stage) -> httpx.Response:
    return chat(stage.person, "  ")


@provokes("invalid_request")
def _(stage: Stage) -> httpx.Response:
    session = stage.person.session()
    stage.person.say(session, "Hello")
    reply = stage.person.messages(session)[-1]
    path = f"/sessions/{session['id']}/messages/{reply['id']}/stream"
    return stage.person.http.get(path, headers={"Last-Event-ID": "five"})


@provokes("unauthorized")
def _(stage: Stage) -> httpx.Response:
    return stage.person.http.get("/projects", headers={"Authorization": "Bearer nonsense"})


@provokes("invalid_credentials")
def _(stage: Stage) -> httpx.Response:
    return stage.person.http.post("/auth/login", json={"email": stage.person.email, "password": "wrong"})


@provokes("signup_closed")
def _(stage: Stage) -> httpx.Response:
    with anonymous(stage.serve(signup=SecretStr("closed")).url) as http:
        return sign_up(http)


@provokes("project_not_found")
def _(stage: Stage) -> httpx.Response:
    return stage.person.http.get("/projects/99999")


@provokes("session_not_found")
def _(stage: Stage) -> httpx.Response:
    return chat(stage.person, "Hello", {"session_key": str(uuid.uuid4())})


@provokes("message_not_found")
def _(stage: Stage) -> httpx.Response:
    return stage.person.http.get(f"/sessions/{stage.person.session()['id']}/messages/99999/stream")


@provokes("image_not_found")
def _(stage: Stage) -> httpx.Response:
    return stage.person.http.get("/images/1.png?expires=99999999999&signature=00")


@provokes("file_not_found")
def _(stage: Stage) -> httpx.Response:
    return stage.person.http.get(file_of(stage.person, "nothing.txt"))


@provokes("email_taken")
def _(stage: Stage) -> httpx.Response:
    return stage.person.http.post("/auth/signup", json={"email": stage.person.email.upper(), "password": "12345678"})


@provokes("image_too_large")
def _(stage: Stage) -> httpx.Response:
    return chat(stage.person, "Look", image=encoded(PNG + b"\0" * 10 * MEGABYTE))


@provokes("file_too_large")
def _(stage: Stage) -> httpx.Response:
    return stage.person.http.put(file_of(stage.person, "big.txt"), json={"content": "x" * (10 * MEGABYTE + 1)})


@provokes("unsupported_image")
def _(stage: Stage) -> httpx.Response:
    return chat(stage.person, "Look", image="data:image/png;base64," + encoded(picture("BMP")))


@provokes("idempotency_key_reused")
def _(stage: Stage) -> httpx.Response:
    session, key = stage.person.session(), {"Idempotency-Key": "once"}
    assert chat(stage.person, "One thing", session, headers=key).status_code == 200
    return chat(stage.person, "Another thing", session, headers=key)


@provokes("too_many_attempts")
def _(stage: Stage) -> httpx.Response:
    tries = (PROVOKED["invalid_credentials"](stage) for _ in range(20))
    return next(response for response in tries if response.status_code != 401)


@provokes("session_busy")
def _(stage: Stage) -> httpx.Response:
    person, session = stage.person, stage.person.session()
    with ThreadPoolExecutor(11) as pool:
        waiting = [pool.submit(chat, person, "[[end=hang]]", session) for _ in range(11)]
        until(lambda: len(person.messages(session)) == 22, 10, "eleven turns")
        refused = chat(person, "[[end=hang]]", session)
        assert person.stop(session)
        assert [one.result().json()["status"] for one in waiting] == ["stopped"] * 11
    assert len(person.messages(session)) == 22
    return refused


@provokes("database_unavailable")
def _(stage: Stage) -> httpx.Response:
    service = stage.serve()
    spoil(service, "ALTER TABLE users RENAME TO elsewhere")
    with stage.person.at(service.url) as person:
        return person.http.get("/projects")


@provokes("disk_unavailable")
def _(stage: Stage) -> httpx.Response:
    service = stage.serve()
    with service.person() as person:
        person.project()
        shutil.rmtree(service.settings.projects)
        service.settings.projects.write_text("a file where the folder was")
        return person.http.post("/projects", json={"name": "New"})


@provokes("not_ready")
def _(stage: Stage) -> httpx.Response:
    service = stage.serve(clawdbot_base_url=f"http://127.0.0.1:{free_port()}")
    return get(f"{service.url}/health/ready")


@provokes("gateway_error")
def _(stage: Stage) -> httpx.Response:
    return chat(stage.person, "[[status=500]]")


@provokes("gateway_auth")
def _(stage: Stage) -> httpx.Response:
    with stage.serve(clawdbot_token=SecretStr("wrong")).person() as person:
        return chat(person, "Hello")


@provokes("gateway_endpoint_disabled")
def _(stage: Stage) -> httpx.Response:
    return chat(stage.person, "[[status=404]]")


@provokes("gateway_incomplete")
def _(stage: Stage) -> httpx.Response:
    return chat(stage.person, "[[end=drop]]")


@provokes("gateway_unavailable")
def _(stage: Stage) -> httpx.Response:
    with stage.serve(clawdbot_base_url=f"http://127.0.0.1:{free_port()}").person() as person:
        return chat(person, "Hello")


@provokes("gateway_timeout")
def _(stage: Stage) -> httpx.Response:
    with stage.serve(clawdbot_timeout=0.3).person() as person:
        return chat(person, "[[end=hang]]")


@provokes("interrupted")
def _(stage: Stage) -> httpx.Response:
    service, endless = stage.serve(drain_seconds=0), "[[chunks=9999 delay=0.05]]"
    with service.person() as person:
        session = person.session()
        with person.listen(session, endless, key="once") as (_, stream):
            stream.read(to_first_text=True)
        service.stop()
        with person.at(stage.serve().url) as again:
            return chat(again, endless, session, headers={"Idempotency-Key": "once"})


@provokes("internal_error")
def _(stage: Stage) -> httpx.Response:
    service = stage.serve()
    with service.person() as person:
        session = person.session()
        person.say(session, "Hello")
        spoil(service, "UPDATE messages SET usage = 'no JSON' WHERE role = 'assistant'")
        return person.http.get(f"/sessions/{session['id']}/messages")


@pytest.mark.parametrize("code", sorted(errors.CODES))
def test_every_code_is_met(code: str, ada: Person, serve: Callable[..., Served], document: JSON) -> None:
    """Each code can be provoked over HTTP. The response has its status, a sentence, the headers of that status, and is
    as the OpenAPI document describes it for the route."""
    response = PROVOKED[code](Stage(ada, serve))
    assert (response.status_code, response.json().get("code")) == (STATUS[code], code)
    stored = {"message_id": int} if "gateway" in code or code == "interrupted" else {}
    assert not differences(response.json(), {"detail": str, "code": code, **stored})
    assert re.fullmatch(r"\S.+ .+\.", response.json()["detail"], re.DOTALL)
    assert ("WWW-Authenticate" in response.headers) == (response.status_code == 401)
    if response.status_code in (429, 503):
        assert int(response.headers["Retry-After"]) > 0
    assert response.headers["X-Request-ID"]
    assert not undocumented(response, document)


# --- conventions --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/nothing", 404), ("PATCH", "/projects", 405), ("DELETE", "/health", 405), ("GET", "/auth/login", 405)],
)
def test_what_no_route_takes_is_an_error_like_any(method: str, path: str, status: int, ada: Person) -> None:
    """A wrong path or method gets an error of the usual shape."""
    response = ada.http.request(method, path)
    assert response.status_code == status
    assert not differences(response.json(), {"detail": str, "code": re.compile("[a-z_]+")})


def test_a_request_that_is_too_large_is_an_error_like_any(ada: Person, document: JSON) -> None:
    """A body over 32 MB gets a documented 413 of the usual shape, with or without a Content-Length."""
    size = 33 * MEGABYTE
    for body in (b" " * size, iter([b" " * MEGABYTE] * 33)):
        response = ada.http.post("/chat", content=body, headers={"Content-Type": "application/json"})
        assert response.status_code == 413
        assert response.headers["Content-Type"] == "application/json"
        assert not differences(response.json(), {"detail": str, "code": "request_too_large"})
        assert response.headers["X-Request-ID"]
        assert not undocumented(response, document)


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"5", b'"text"', b"\xff", b'{"name": 5}', b"[" * 50_000])
def test_a_malformed_body_is_refused(body: bytes, ada: Person, document: JSON) -> None:
    """The answer is a documented 400 or 422 that does not repeat what was sent."""
    response = ada.http.post("/projects", content=body, headers={"Content-Type": "application/json"})
    assert response.status_code in (400, 422)
    assert response.json()["code"] == "invalid_request"
    detail = [{"type": str, "loc": list, "msg": str}] if response.status_code == 422 else str
    assert not differences(response.json()["detail"], detail)
    assert not undocumented(response, document)


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("POST", "/auth/signup", {"email": "\ud800@example.com", "password": "12345678"}),
        ("POST", "/auth/signup", {"email": "surrogate@example.com", "password": "\ud800 12345678"}),
        ("POST", "/auth/signup", {"email": "surrogate@example.com", "password": "12345678", "name": "\ud800"}),
        ("POST", "/auth/login", {"email": "\ud800", "password": "\ud800"}),
        ("PUT", "/auth/password", {"current_password": "\ud800", "new_password": "12345678"}),
        ("POST", "/projects", {"name": "\ud800"}),
        ("POST", "/projects", {"name": "New", "description": "\ud800"}),
        ("PUT", SESSION_ID, {"label": "\ud800"}),
        ("PUT", FILE, {"content": "\ud800"}),
        ("POST", "/chat", {"session_key": "\ud800", "messages": [{"role": "user", "content": "Hello"}]}),
        ("POST", "/chat", {"session_key": "{session_key}", "messages": [{"role": "user", "content": "\ud800"}]}),
        (
            "POST",
            "/chat/stream",
            {
                "session_key": "{session_key}",
                "messages": [{"role": "user", "content": [{"type": "text", "text": "\ud800"}]}],
            },
        ),
        (
            "POST",
            "/chat",
            {"session_key": "{session_key}", "messages": [{"role": "user", "content": "Hello"}], "image": "\ud800"},
        ),
    ],
)
def test_half_a_character_is_refused(method: str, path: str, body: JSON, scene: Scene) -> None:
    """JSON can contain a lone surrogate, which cannot be encoded as UTF-8: the answer is a 422 instead of a 500, and
    nothing changes."""
    before = scene.all()
    response = send(scene.person.http, Route(method, path, None, body=body), scene.names)
    assert response.status_code in (400, 401, 422), response.text
    assert scene.all() == before


@pytest.mark.parametrize("path", [PROJECT_ID, PROJECT_ID + "/files", SESSION_ID + "/messages"])
@pytest.mark.parametrize("wrong", ["0", "-1", "x", "1.5", str(2**63), "9" * 5000])
def test_an_id_that_is_none_is_refused(path: str, wrong: str, ada: Person) -> None:
    """The answer is 404 or 422, never 500."""
    response = ada.http.get(path.format(project_id=wrong, session_id=wrong))
    assert response.status_code in (404, 422)


def test_every_response_carries_its_id(scene: Scene) -> None:
    """Each response, also an error, carries the caller's `X-Request-ID`, or a generated one if that is too long or not
    printable ASCII without spaces."""
    http = scene.person.http
    for path in ("/health", "/projects", "/nothing", f"/sessions/{scene.session['id']}/messages", "/projects/0"):
        response = http.get(path, headers={"X-Request-ID": "mine-1"})
        assert response.headers["X-Request-ID"] == "mine-1"
        assert len(http.get(path).headers["X-Request-ID"]) >= 16
    for strange in (b"x" * 1000, b"two words", b"\xff", b""):
        name = http.get("/health", headers={b"X-Request-ID": strange}).headers["X-Request-ID"]
        assert re.fullmatch(r"[\x21-\x7e]{16,128}", name)
        assert name.encode() != strange


def test_every_origin_may_call(ada: Person) -> None:
    """By default, CORS allows all origins, exposes the headers that clients need, and allows no cookies."""
    origin = {"Origin": "https://chat.example.com"}
    asks = {
        "Access-Control-Request-Method": "DELETE",
        "Access-Control-Request-Headers": "authorization, content-type, idempotency-key, last-event-id",
    }
    preflight = ada.http.options("/projects/1", headers=origin | asks)
    assert preflight.status_code == 200
    assert preflight.headers["Access-Control-Allow-Origin"] == "*"
    assert "DELETE" in preflight.headers["Access-Control-Allow-Methods"]
    for path in ("/health", "/nothing", "/projects/0"):
        response = ada.http.get(path, headers=origin)
        assert response.headers["Access-Control-Allow-Origin"] == "*"
        assert "Access-Control-Allow-Credentials" not in response.headers
        exposed = {name.strip() for name in response.headers["Access-Control-Expose-Headers"].split(",")}
        assert {"X-Request-ID", "X-Message-Id", "X-User-Message-Id", "Retry-After"} <= exposed


def test_only_configured_origins_may_call(serve: Callable[..., Served]) -> None:
    """With a list in `CORS_ORIGINS`, CORS allows only these origins."""
    service = serve(cors_origins=("https://chat.example.com", "http://localhost:3000"))
    for origin, allowed in (("https://chat.example.com", True), ("https://evil.example.com", False)):
        response = get(f"{service.url}/health", headers={"Origin": origin})
        assert response.headers.get("Access-Control-Allow-Origin") == (origin if allowed else None)


# --- auth ---------------------------------------------------------------------------------------------


def sign_up(http: httpx.Client, **changes: object) -> httpx.Response:
    """Signs up with valid values, except for `changes`."""
    usual = {"email": f"{uuid.uuid4().hex}@example.com", "password": "12345678"}
    return http.post("/auth/signup", json=usual | changes)


def log_in(person: Person, **changes: str) -> httpx.Response:
    """Logs in with valid values, except for `changes`."""
    return person.http.post("/auth/login", json={"email": person.email, "password": person.password} | changes)


@pytest.mark.parametrize(
    "wrong",
    [
        *({"email": email} for email in ("", "ada", "ada@", "@example.com", "a b@example.com", "a@b@c", None)),
        *({"password": password} for password in ("", "1234567", "x" * 1025, None, 12345678)),
    ],
)
def test_a_wrong_sign_up_is_refused(wrong: JSON, ada: Person) -> None:
    """A malformed e-mail, or a password of less than 8 or more than 1,024 characters, gets a 422."""
    assert sign_up(ada.http, **wrong).status_code == 422


@pytest.mark.parametrize("password", ["12345678", "x" * 1024, "p\u00e4ssw\u00f6rd \U0001f511"])
def test_a_token_object_is_whole(password: str, ada: Person, served: Served) -> None:
    """Sign-up and login return the same object. Its token works under both names and expires after `expires_in`."""
    email = f"{uuid.uuid4().hex}@example.com"
    made = sign_up(ada.http, email=email, password=password).json()
    again = ada.http.post("/auth/login", json={"email": email.upper(), "password": password}).json()
    for token in (made, again):
        assert token["access_token"] == token["token"]
        assert token["expires_in"] == served.settings.token_ttl
        assert token["user"] == made["user"]
        header = {"Authorization": f"Bearer {token['token']}"}
        assert ada.http.get("/auth/me", headers=header).json() == token["user"]


def test_a_refused_login_does_not_tell_who_has_an_account(ada: Person) -> None:
    """An unknown e-mail and a wrong password get the same answer, including headers."""
    unknown = log_in(ada, email="nobody@example.com")
    wrong = log_in(ada, password="not the password")
    assert (unknown.status_code, unknown.json()) == (wrong.status_code, wrong.json())
    assert _lasting(unknown) == _lasting(wrong)
    assert wrong.json()["code"] == "invalid_credentials"


def test_logging_out_refuses_this_token_alone(ada: Person) -> None:
    """The token is refused after the logout; another token of the same user stays valid."""
    other = {"Authorization": f"Bearer {log_in(ada).json()['token']}"}
    assert ada.http.post("/auth/logout").json() == {"message": "Logged out"}
    assert ada.http.get("/auth/me").status_code == 401
    assert ada.http.post("/auth/logout").status_code == 401
    assert ada.http.get("/auth/me", headers=other).status_code == 200


def test_a_new_password_refuses_every_earlier_token(ada: Person) -> None:
    """Only the token that the answer contains stays valid; earlier tokens and the old password are refused."""
    body = {"current_password": ada.password, "new_password": "something else"}
    old = ada.http.headers["Authorization"]
    token = ada.http.put("/auth/password", json=body).json()["token"]
    assert ada.http.get("/auth/me", headers={"Authorization": old}).status_code == 401
    assert ada.http.get("/auth/me", headers={"Authorization": f"Bearer {token}"}).status_code == 200
    assert log_in(ada).status_code == 401
    assert log_in(ada, password="something else").status_code == 200


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("PUT", "/auth/password", {"current_password": "wrong", "new_password": "something else"}),
        ("DELETE", "/auth/me", {"password": "wrong"}),
    ],
)
def test_the_password_is_asked_for_what_matters(method: str, path: str, body: JSON, ada: Person) -> None:
    """Changing the password and deleting the account require the password in addition to a token."""
    response = ada.http.request(method, path, json=body)
    assert (response.status_code, response.json()["code"]) == (401, "invalid_credentials")
    assert log_in(ada).status_code == 200


@pytest.mark.parametrize(("invite", "status"), [("let me in", 201), ("let me", 403), ("", 403), (None, 403)])
def test_an_invite_opens_the_sign_up(invite: str | None, status: int, serve: Callable[..., Served]) -> None:
    """If `SIGNUP` is an invite code, a sign-up must send exactly this code."""
    with anonymous(serve(signup=SecretStr("let me in")).url) as http:
        response = sign_up(http, **({} if invite is None else {"invite": invite}))
        assert response.status_code == status


# --- projects, sessions, files ------------------------------------------------------------------------


def test_the_newest_comes_first(ada: Person) -> None:
    """Projects and sessions are listed newest first; archived sessions are listed separately."""
    projects = [ada.project(name) for name in ("One", "Two", "Three")]
    assert ada.http.get("/projects").json() == projects[::-1]
    sessions = [ada.session(projects[0], label=label) for label in ("One", "Two", "Three")]
    listing = f"/projects/{projects[0]['id']}/sessions"
    assert ada.http.get(listing).json() == sessions[::-1]
    archived = ada.http.put(f"/sessions/{sessions[1]['id']}", json={"archived": True}).json()
    assert archived == sessions[1] | {"archived": 1}
    assert ada.http.get(listing).json() == [sessions[2], sessions[0]]
    assert ada.http.get(listing, params={"archived": "true"}).json() == [archived]


def test_a_new_project_has_its_folder(ada: Person, served: Served) -> None:
    """A new project's folder contains a `README.md`, which the file routes list and return."""
    project = ada.project("Rosen & Gärten", "About roses")
    folder = served.settings.projects / project["project_path"].rpartition("/")[2]
    assert "Rosen & Gärten" in (folder / "README.md").read_text(encoding="utf-8")
    path = f"/projects/{project['id']}/files"
    size = (folder / "README.md").stat().st_size
    assert ada.http.get(path).json() == [{"type": "file", "name": "README.md", "path": "README.md", "size": size}]
    assert "About roses" in ada.http.get(f"{path}/README.md").json()["content"]


def test_a_project_of_old_gets_a_folder_with_its_first_file(ada: Person, served: Served) -> None:
    """A legacy project without a folder has an empty list of files; writing the first file creates its folder."""
    project = ada.project("Of old")
    spoil(served, "UPDATE projects SET project_path = '' WHERE id = ?", project["id"])
    path = f"/projects/{project['id']}/files"
    assert ada.http.get(path).json() == []
    missing = ada.http.get(f"{path}/a.txt")
    assert (missing.status_code, missing.json()["code"]) == (404, "file_not_found")
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda n: ada.http.put(f"{path}/{n}.txt", json={"content": str(n)}), range(4)))
    assert [answer.status_code for answer in answers] == [200] * 4
    names = [node["name"] for node in ada.http.get(path).json()]
    assert names == ["0.txt", "1.txt", "2.txt", "3.txt", "README.md"]
    folder = Path(ada.http.get(f"/projects/{project['id']}").json()["project_path"])
    others = set(served.settings.projects.glob("Of_old*")) - {folder, Path(project["project_path"])}
    assert not others, "a folder is left that simultaneous requests created in addition"


def test_a_session_is_what_it_was_asked_to_be(ada: Person) -> None:
    """The defaults are `webchat` and `main`; without a label, a session gets the beginning of its first message as its
    label."""
    project = ada.project()
    bare = ada.http.post(f"/projects/{project['id']}/sessions").json()
    assert (bare["channel"], bare["agent_id"], bare["archived"], bare["label"]) == ("webchat", "main", 0, None)
    named = ada.session(project, label="Mine")
    for session in (bare, named):
        ada.say(session, "How do I\ngrow roses?")
        ada.say(session, "And tulips?")
    labels = [session["label"] for session in ada.http.get(f"/projects/{project['id']}/sessions").json()]
    assert labels == ["Mine", "How do I grow roses?"]


def test_an_archived_session_takes_no_message(ada: Person) -> None:
    """The answer is 404 until the session is unarchived."""
    session = ada.session()
    ada.http.put(f"/sessions/{session['id']}", json={"archived": True})
    assert ada.say(session, "Hello").code == "session_not_found"
    ada.http.put(f"/sessions/{session['id']}", json={"archived": False})
    assert ada.say(session, "Hello").status_code == 200


@pytest.mark.parametrize(
    "route", [route for route in ROUTES if route.method == "DELETE" and not route.public], ids=by_name
)
def test_what_is_deleted_is_gone(route: Route, scene: Scene, served: Served, openclaw: StandIn) -> None:
    """Deleting a session, its project or the account removes messages, images and the conversation in the gateway, and
    stops the running turn. Deleting a project or account also removes the project's folder."""
    person, session, names = scene.person, scene.session, scene.names
    with person.listen(session, "[[chunks=9999 delay=0.05]]") as (_, stream):
        stream.read(to_first_text=True)
        assert send(person.http, route, names).status_code == 200
        assert stream.read().finish == "stopped"
    until(lambda: [key for key in openclaw.deleted if session["session_key"] in key], 5, "the gateway's deletion")
    shown = send(person.http, IMAGE, names)
    assert shown.status_code == 404
    assert not (served.settings.images / session["session_key"]).exists()
    folder = served.settings.projects / scene.project["project_path"].rpartition("/")[2]
    assert folder.exists() == ("/sessions/" in route.path)
    gone = 401 if route.path == "/auth/me" else 404
    assert person.http.get(f"/sessions/{session['id']}/messages").status_code == gone


def test_files_are_listed_in_order(ada: Person) -> None:
    """Folders and files are sorted by name; each path is relative to the project's folder."""
    root = f"/projects/{ada.project()['id']}/files"
    for path in ("b/two.txt", "b/a/deep.txt", "a.txt", "c.txt"):
        assert ada.http.put(f"{root}/{path}", json={"content": "words"}).json() == {"success": True, "size": 5}
    tree = ada.http.get(root).json()
    assert [node["path"] for node in tree] == ["README.md", "a.txt", "b", "c.txt"]
    assert [node["path"] for node in tree[2]["children"]] == ["b/a", "b/two.txt"]
    assert tree[2]["children"][0]["children"] == [
        {"type": "file", "name": "deep.txt", "path": "b/a/deep.txt", "size": 5}
    ]


@pytest.mark.parametrize(
    ("data", "content", "binary"),
    [
        ("Grüße 👩‍👩‍👧‍👦\n".encode(), "Grüße 👩‍👩‍👧‍👦\n", False),
        (b"", "", False),
        (b"\xff\xfe", "", True),
        (b"a\0b", "", True),
        (PNG, "", True),
        (b"x" * 10 * MEGABYTE, "x" * 10 * MEGABYTE, False),
    ],
    ids=["text", "empty", "undecodable", "zero", "picture", "10 MB"],
)
def test_a_file_is_text_or_binary(data: bytes, content: str, binary: bool, ada: Person, served: Served) -> None:
    """A binary file is returned without its content; the size is in bytes."""
    project = ada.project()
    folder = served.settings.projects / project["project_path"].rpartition("/")[2]
    (folder / "file").write_bytes(data)
    got = ada.http.get(f"/projects/{project['id']}/files/file").json()
    assert got == {"content": content, "is_binary": binary, "size": len(data)}


def test_a_file_over_10_mb_is_not_read(ada: Person, served: Served) -> None:
    """The answer is 413 for a larger file, even if another program wrote it."""
    project = ada.project()
    folder = served.settings.projects / project["project_path"].rpartition("/")[2]
    (folder / "file").write_bytes(b"x" * (10 * MEGABYTE + 1))
    response = ada.http.get(f"/projects/{project['id']}/files/file")
    assert (response.status_code, response.json()["code"]) == (413, "file_too_large")


# --- chat ---------------------------------------------------------------------------------------------

SAYINGS = [
    "Hello",
    "Grüße 日本語 👩‍👩‍👧‍👦",
    "[[chunks=30 size=7]]",
    "[[chunks=30 size=7 split=3]]",
    "[[chunks=9 size=5 crlf=1 comments=1]]",
    "[[chunks=9 size=1 end=surrogates]]",
    "[[big=200001]]",
    "[[end=empty]]",
    "[[end=blank]]",
]
PICTURES = pytest.mark.parametrize("image", [None, encoded(PNG)], ids=["text", "image"])


def expected(text: str, images: list[bytes]) -> str:
    """Returns the text of the reply that a client must receive."""
    return "" if "end=empty" in text or "end=blank" in text else reply_text(text, 1, images)


def pieces(raw: bytes) -> list[tuple[int, JSON]]:
    """Returns the frames of a whole stream with their ids, and asserts that each byte has the documented format."""
    *blocks, rest = raw.decode().split("\n\n")
    assert rest == ""
    assert blocks.pop() == "data: [DONE]"
    frames = []
    for block in blocks:
        if not block.startswith(":"):
            match = re.fullmatch(r"id: (\d+)\ndata: (\{.*\})", block)
            assert match, block
            frames.append((int(match[1]), json.loads(match[2])))
    return frames


def read(frames: list[tuple[int, JSON]], reply_id: int, after: int = 0) -> str:
    """Returns the text of the frames after an offset, and asserts that each frame has the documented format and
    offset."""
    text = ""
    for number, (until_here, frame) in enumerate(frames, 1):
        last = number == len(frames)
        keys = {"id", "object", "choices"} | ({"usage"} | ({"error"} & frame.keys()) if last else set())
        assert frame.keys() == keys
        assert (frame["id"], frame["object"]) == (str(reply_id), "chat.completion.chunk")
        (choice,) = frame["choices"]
        reason = ("stop", "stopped", "interrupted", "error") if last else None
        assert not differences(choice, {"index": 0, "delta": {"content": str}, "finish_reason": reason})
        text += choice["delta"]["content"]
        assert last == (choice["delta"]["content"] == "")
        assert until_here == after + len(text)
    return text


@PICTURES
@pytest.mark.parametrize("text", SAYINGS)
def test_a_stream_is_framed_as_the_contract_shows(text: str, image: str | None, ada: Person) -> None:
    """Headers, frames and ids are the same with and without an image. `X-Message-Id` and `X-User-Message-Id` name the
    two stored messages, which have the streamed text."""
    session = ada.session()
    with ada.listen(session, text, image=image) as (response, _):
        raw = response.read()
    assert response.status_code == 200
    assert response.headers["Content-Type"].partition(";")[0] == "text/event-stream"
    assert (response.headers["Cache-Control"], response.headers["X-Accel-Buffering"]) == ("no-cache", "no")
    said, reply = ada.messages(session)
    assert (response.headers["X-User-Message-Id"], response.headers["X-Message-Id"]) == (
        str(said["id"]),
        str(reply["id"]),
    )
    frames = pieces(raw)
    whole = expected(text, [PNG] if image else [])
    assert read(frames, reply["id"]) == whole == reply["content"]
    assert frames[-1][1]["choices"][0]["finish_reason"] == "stop"
    assert frames[-1][1]["usage"] == reply["usage"] == USAGE
    assert reply["status"] == ("complete" if whole else "empty")
    assert (said["content"], said["status"], said["image"] is not None) == (text, "complete", image is not None)


@PICTURES
@pytest.mark.parametrize("text", SAYINGS)
def test_a_reply_comes_whole_where_it_is_not_streamed(text: str, image: str | None, ada: Person) -> None:
    """Without streaming, the answer is the same reply as one JSON object, as it is stored."""
    session = ada.session()
    response = chat(ada, text, session, **({"image": image} if image else {}))
    reply = ada.messages(session)[-1]
    whole = expected(text, [PNG] if image else [])
    assert (response.status_code, response.json()["content"]) == (200, whole)
    assert not differences(response.json(), REPLY)
    assert response.json() == {key: reply[key] for key in REPLY}
    assert (reply["status"], reply["usage"]) == ("complete" if whole else "empty", USAGE)


@pytest.mark.parametrize("stream", [True, False])
def test_chat_stream_is_chat_with_stream(stream: bool, ada: Person) -> None:
    """`POST /chat` with `stream: true` and `POST /chat/stream` with any `stream` answer alike."""
    text, got = "[[chunks=20 size=6]]", []
    for path, flag in (("/chat", True), ("/chat/stream", stream)):
        session = ada.session()
        body = {"session_key": session["session_key"], "messages": [{"role": "user", "content": text}], "stream": flag}
        response = ada.http.post(path, json=body)
        frames = pieces(response.content)
        length, last = frames[-1]
        whole = read(frames, int(last["id"]))
        got.append((whole, length, last | {"id": "its own"}, sorted(response.headers)))
    assert got[0] == got[1]


def test_only_the_last_user_message_is_taken(ada: Person, openclaw: StandIn) -> None:
    """`messages` may contain the whole conversation. Only the last message of the user is sent, because the gateway
    keeps the history."""
    session = ada.session()
    conversation = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "First"},
        {"role": "assistant", "content": None},
        {"role": "user", "content": "Second"},
        {"role": "assistant", "content": "Not a question"},
    ]
    body = {"session_key": session["session_key"], "messages": conversation}
    assert ada.http.post("/chat", json=body).json()["content"] == reply_text("Second")
    assert [message["content"] for message in ada.messages(session)] == ["Second", reply_text("Second")]
    (request,) = asked(openclaw, session)
    assert [message["role"] for message in request.body["messages"]] == ["system", "user"]
    assert request.body["messages"][1]["content"] == "Second"
    assert "Be brief." not in json.dumps(request.body)


@pytest.mark.parametrize(
    "messages",
    [
        [],
        [{"role": "assistant", "content": "Hello"}],
        [{"role": "user", "content": "Hello"}, {"role": "user", "content": ""}],
        [{"role": "user", "content": "Hello"}, {"role": "user", "content": " \n"}],
        [{"role": "user", "content": None}],
        [{"role": "user"}],
        [{"role": "user", "content": []}],
        [{"role": "user", "content": [{"type": "text", "text": ""}]}],
        [{"role": "user", "content": [{"type": "input_audio"}]}],
    ],
)
@pytest.mark.parametrize("path", ["/chat", "/chat/stream"])
def test_a_message_says_something(path: str, messages: list[JSON], ada: Person) -> None:
    """A request without a user's message, or with an empty one, is refused and stores nothing."""
    session = ada.session()
    response = ada.http.post(path, json={"session_key": session["session_key"], "messages": messages})
    assert (response.status_code, response.json()["code"]) == (400, "no_user_message")
    assert ada.messages(session) == []


def content_of(openclaw: StandIn, session: JSON) -> tuple[list[str], list[bytes]]:
    """Returns the texts and images of the only message that the gateway received in a session."""
    (request,) = asked(openclaw, session)
    content = request.body["messages"][-1]["content"]
    urls = [part["image_url"]["url"] for part in content if part["type"] == "image_url"]
    texts = [part["text"] for part in content if part["type"] == "text"]
    return texts, [base64.b64decode(url.partition(",")[2]) for url in urls]


KINDS = {"JPEG": "image/jpeg", "PNG": "image/png", "GIF": "image/gif", "WEBP": "image/webp", "HEIF": "image/heic"}


@pytest.mark.parametrize("label", ["", "its own", "data:image/png;base64,", "data:image/x-whatever;base64,"])
@pytest.mark.parametrize("kind", KINDS)
def test_an_image_is_judged_by_its_bytes(kind: str, label: str, ada: Person, openclaw: StandIn) -> None:
    """The media type comes from the bytes, with any `data:` prefix or none. HEIC is converted to JPEG, because not
    every browser shows HEIC."""
    session, data = ada.session(), picture(kind, "blue")
    prefix = f"data:{KINDS[kind]};base64," if label == "its own" else label
    assert chat(ada, "Look", session, image=prefix + encoded(data)).status_code == 200
    texts, images = content_of(openclaw, session)
    shown = get(ada.messages(session)[0]["image"])
    assert (texts, images) == (["Look"], [shown.content])
    if kind == "HEIF":
        assert PIL.Image.open(io.BytesIO(shown.content)).size == (24, 16)
        assert shown.headers["Content-Type"] == "image/jpeg"
    else:
        assert shown.content == data
        assert shown.headers["Content-Type"] == KINDS[kind]


def test_content_may_be_parts(ada: Person, openclaw: StandIn) -> None:
    """OpenAI content parts are accepted, also together with `image`. Texts and images keep their order, and the one in
    `image` is the last image. The stored message shows its first image as `image`."""
    colors = [picture("PNG", color) for color in ("red", "green", "blue")]
    urls = [f"data:image/png;base64,{encoded(data)}" for data in colors]
    parts = [
        {"type": "text", "text": "These"},
        {"type": "image_url", "image_url": {"url": urls[0]}},
        {"type": "text", "text": "are colours"},
        {"type": "image_url", "image_url": {"url": urls[1], "detail": "low"}},
    ]
    session = ada.session()
    assert chat(ada, parts, session, image=urls[2]).status_code == 200
    assert content_of(openclaw, session) == (["These\nare colours"], colors)
    said = ada.messages(session)[0]
    assert said["content"] == "These\nare colours"
    assert [get(url).content for url in said["images"]] == colors
    assert said["image"] == said["images"][0]


def test_an_image_needs_no_words(ada: Person, openclaw: StandIn) -> None:
    """A message may consist of an image only."""
    session = ada.session()
    assert chat(ada, "", session, image=encoded(PNG)).status_code == 200
    assert content_of(openclaw, session) == ([], [PNG])


ONE = {"type": "image_url", "image_url": {"url": encoded(PNG)}}
SEVEN_MB = {"type": "image_url", "image_url": {"url": encoded(PNG + b"\0" * 7 * MEGABYTE)}}


@pytest.mark.parametrize(
    ("content", "image", "status", "code"),
    [
        ([ONE] * 9, None, 413, "image_too_large"),
        ([ONE] * 8, encoded(PNG), 413, "image_too_large"),
        ([SEVEN_MB] * 3, None, 413, "image_too_large"),
        ("Look", encoded(PNG + b"\0" * 10 * MEGABYTE), 413, "image_too_large"),
        ("Look", encoded(picture("BMP")), 415, "unsupported_image"),
        ("Look", encoded(b"%PDF-1.7"), 415, "unsupported_image"),
        ("Look", encoded(b"<svg xmlns='http://www.w3.org/2000/svg'/>"), 415, "unsupported_image"),
        ("Look", encoded(PNG[:40]), 400, "invalid_image"),
        ("Look", encoded(picture("JPEG")[:200]), 400, "invalid_image"),
        ("Look", encoded(b"GIF89a/*<script>*/"), 400, "invalid_image"),
        ("Look", "not base64!", 400, "invalid_image"),
        ("Look", "data:image/png;base64,", 400, "invalid_image"),
        ("Look", "https://example.com/picture.png", 400, "invalid_image"),
        ([{"type": "image_url", "image_url": {"url": "https://example.com/a.png"}}], None, 400, "invalid_image"),
        ([{"type": "image_url"}], None, 400, "invalid_image"),
        ([ONE, {"type": "image_url", "image_url": {"url": encoded(b"no picture")}}], None, 415, "unsupported_image"),
    ],
)
@pytest.mark.parametrize("path", ["/chat", "/chat/stream"])
def test_a_refused_image_leaves_nothing(
    path: str,
    content: object,
    image: str | None,
    status: int,
    code: str,
    ada: Person,
    served: Served,
    openclaw: StandIn,
) -> None:
    """A refused image leaves no row, no file and no turn."""
    session = ada.session()
    body = {"session_key": session["session_key"], "messages": [{"role": "user", "content": content}], "image": image}
    response = ada.http.post(path, json=body)
    assert (response.status_code, response.json()["code"]) == (status, code)
    assert ada.messages(session) == []
    assert asked(openclaw, session) == []
    assert not (served.settings.images / session["session_key"]).exists()
    assert not list((served.settings.images / "incoming").glob("*"))


def test_as_many_images_as_the_contract_allows(ada: Person, openclaw: StandIn) -> None:
    """Eight images are accepted, one of them just below 10 MB."""
    big = PNG + b"\0" * (10 * MEGABYTE - len(PNG))
    assert chat(ada, [ONE] * 8).status_code == 200
    session = ada.session()
    assert chat(ada, "Look", session, image=encoded(big)).status_code == 200
    assert content_of(openclaw, session) == (["Look"], [big])


# --- idempotency --------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["a", "x" * 255, "with spaces, and: signs~"])
def test_a_key_makes_one_turn(key: str, ada: Person, openclaw: StandIn) -> None:
    """The second request returns the first reply, streamed or not, without another request to the gateway. The same key
    in another session begins a turn of its own."""
    session, header = ada.session(), {"Idempotency-Key": key}
    first = chat(ada, "Hello", session, headers=header)
    again = chat(ada, "Hello", session, headers=header)
    assert (again.status_code, again.json()) == (200, first.json())
    streamed = ada.say(session, "Hello", stream=True, key=key)
    assert (streamed.message_id, streamed.text) == (first.json()["id"], first.json()["content"])
    assert len(asked(openclaw, session)) == 1
    assert len(ada.messages(session)) == 2
    other = ada.session()
    assert chat(ada, "Something else", other, headers=header).json()["id"] != first.json()["id"]


def test_a_key_finds_the_reply_that_still_runs(ada: Person, openclaw: StandIn) -> None:
    """The second request streams the running reply, live and from its beginning."""
    session, text = ada.session(), "[[chunks=30 size=8 delay=0.02]]"
    with ada.listen(session, text, key="once") as (response, stream):
        stream.read(to_first_text=True)
        with ada.listen(session, text, key="once") as (second, other):
            assert second.headers["X-Message-Id"] == response.headers["X-Message-Id"]
            assert other.read().text == stream.read().text == reply_text(text)
    assert len(asked(openclaw, session)) == 1


@pytest.mark.parametrize("changed", [{"content": "Other"}, {"content": "Hello", "image": encoded(PNG)}])
def test_a_key_stands_for_one_message(changed: JSON, ada: Person) -> None:
    """The same key with another text or image is refused and stores nothing."""
    session, header = ada.session(), {"Idempotency-Key": "once"}
    assert chat(ada, "Hello", session, headers=header).status_code == 200
    response = chat(ada, session=session, headers=header, **changed)
    assert (response.status_code, response.json()["code"]) == (422, "idempotency_key_reused")
    assert len(ada.messages(session)) == 2


@pytest.mark.parametrize("key", [b"", b"x" * 256, b"\xc3\xa9", b"tab\there"])
def test_a_key_is_short_and_printable(key: bytes, ada: Person) -> None:
    """A key that is not 1 to 255 printable ASCII characters gets a 422."""
    session = ada.session()
    response = chat(ada, "Hello", session, headers={"Idempotency-Key": key})
    assert (response.status_code, response.json()["code"]) == (422, "invalid_request")
    assert ada.messages(session) == []


# --- how a turn fails ---------------------------------------------------------------------------------

# An instruction to the stand-in gateway, the error code that must follow, and whether it is `retryable`.
FAILURES = [
    ("[[status=400]]", "gateway_error", False),
    ("[[status=401]]", "gateway_auth", False),
    ("[[status=403]]", "gateway_auth", False),
    ("[[status=404]]", "gateway_endpoint_disabled", False),
    ("[[status=413]]", "gateway_error", False),
    ("[[status=429]]", "gateway_error", True),
    ("[[status=500]]", "gateway_error", True),
    ("[[status=503]]", "gateway_error", True),
    ("[[end=html]]", "gateway_error", False),
    ("[[end=garbage]]", "gateway_error", False),
    ("[[chunks=0 end=error]]", "gateway_error", True),
    ("[[chunks=0 end=eof]]", "gateway_incomplete", True),
    ("[[chunks=0 end=drop]]", "gateway_incomplete", True),
    ("[[chunks=0 end=badjson]]", "gateway_error", False),
]
BREAKS = [
    ("[[chunks=4 size=9 end=error]]", "gateway_error", True),
    ("[[chunks=4 size=9 end=eof]]", "gateway_incomplete", True),
    ("[[chunks=4 size=9 end=drop]]", "gateway_incomplete", True),
    ("[[chunks=4 size=9 end=no_done]]", "gateway_incomplete", True),
    ("[[chunks=4 size=9 end=badjson]]", "gateway_error", False),
]


def failed(person: Person, session: JSON, code: str, retryable: bool) -> JSON:
    """Returns the failed reply of a session, and asserts how its failure is stored."""
    reply = person.messages(session)[-1]
    assert not differences(reply, MESSAGE | {"status": "failed", "error": FAILURE | {"code": code}})
    assert reply["error"]["retryable"] is retryable
    return reply


@pytest.mark.parametrize("path", ["/chat", "/chat/stream"])
@pytest.mark.parametrize(("text", "code", "retryable"), FAILURES)
def test_a_failure_before_any_text_is_a_status(
    path: str, text: str, code: str, retryable: bool, ada: Person, openclaw: StandIn, document: JSON
) -> None:
    """This holds for both routes. The answer has the stored sentence, without the gateway's token or error text."""
    session = ada.session()
    body = {"session_key": session["session_key"], "messages": [{"role": "user", "content": text}]}
    response = ada.http.post(path, json=body)
    reply = failed(ada, session, code, retryable)
    assert response.status_code == STATUS[code]
    assert response.json() == {"detail": reply["error"]["message"], "code": code, "message_id": reply["id"]}
    assert response.headers["X-Message-Id"] == str(reply["id"])
    assert reply["content"] == ""
    # This sentence of the service contains the stand-in's error text "internal error" by coincidence.
    shown = response.text.replace("OpenClaw had an internal error", "")
    for word in (openclaw.token, "internal error", "Unknown agent"):
        assert word not in shown
    assert not undocumented(response, document)


@PICTURES
@pytest.mark.parametrize(("text", "code", "retryable"), BREAKS)
def test_a_failure_after_text_is_a_frame(text: str, code: str, retryable: bool, image: str | None, ada: Person) -> None:
    """The text received so far is kept; the last frame has the error, which is not part of the text, and `[DONE]`
    follows. Resuming returns the same."""
    session = ada.session()
    with ada.listen(session, text, image=image) as (response, _):
        frames = pieces(response.read())
    reply = failed(ada, session, code, retryable)
    assert response.status_code == 200
    assert read(frames, reply["id"]) == reply["content"] == reply_text(text)
    last = frames[-1][1]
    assert last["error"] == reply["error"]
    assert last["choices"] == [{"index": 0, "delta": {"content": ""}, "finish_reason": "error"}]
    again = pieces(ada.http.get(f"/sessions/{session['id']}/messages/{reply['id']}/stream").content)
    assert (read(again, reply["id"]), again[-1]) == (reply["content"], frames[-1])


@pytest.mark.parametrize(("text", "code", "retryable"), BREAKS)
def test_a_failure_after_text_is_a_status_where_it_is_not_streamed(
    text: str, code: str, retryable: bool, ada: Person
) -> None:
    """The answer has the `message_id` under which the text received so far can be read."""
    session = ada.session()
    response = chat(ada, text, session)
    reply = failed(ada, session, code, retryable)
    assert response.status_code == STATUS[code]
    assert response.json() == {"detail": reply["error"]["message"], "code": code, "message_id": reply["id"]}
    assert reply["content"] == reply_text(text)


def test_the_next_message_goes_on_after_a_failure(ada: Person) -> None:
    """A session accepts messages after a turn that failed."""
    session = ada.session()
    assert ada.say(session, "[[status=500]]").code == "gateway_error"
    assert ada.say(session, "[[chunks=3 end=drop]]").code == "gateway_incomplete"
    assert ada.say(session, "[[chunks=3]]").text == reply_text("[[chunks=3]]")


# --- stopping -----------------------------------------------------------------------------------------


def test_a_stopped_reply_keeps_what_it_has(ada: Person, openclaw: StandIn) -> None:
    """Stream and row end as `stopped`, the agent's run is aborted, and a second stop finds nothing to stop."""
    session = ada.session()
    with ada.listen(session, "[[chunks=9999 delay=0.02]]") as (response, stream):
        stream.read(to_first_text=True)
        assert ada.stop(session) is True
        stream.read()
    assert (stream.finish, stream.done, stream.error) == ("stopped", True, None)
    reply = ada.reply(session, "stopped")
    assert reply is not None
    assert (reply["content"], str(reply["id"])) == (stream.text, response.headers["X-Message-Id"])
    until(lambda: [run for run in openclaw.aborted if session["session_key"] in run.session_key], 5, "the abort")
    assert ada.stop(session) is False


def test_a_stopped_reply_that_is_not_streamed_comes_as_it_is(ada: Person) -> None:
    """The stopped turn answers 200 with its text so far and the status `stopped`; the turns queued behind it also
    answer `stopped`."""
    session = ada.session()
    with ThreadPoolExecutor(2) as pool:
        running = pool.submit(chat, ada, "[[chunks=9999 delay=0.02]]", session)
        until(lambda: ada.messages(session), 5, "the running turn")
        waiting = pool.submit(chat, ada, "Hello", session)
        until(lambda: ada.reply(session, "queued"), 5, "the waiting turn")
        until(lambda: ada.messages(session)[1]["content"], 5, "some text")
        assert ada.stop(session)
        first, second = running.result(), waiting.result()
    assert (first.status_code, first.json()["status"], bool(first.json()["content"])) == (200, "stopped", True)
    assert (second.status_code, second.json()["status"], second.json()["content"]) == (200, "stopped", "")


# --- comments in a stream -----------------------------------------------------------------------------


def test_a_silent_agent_is_waited_for_with_comments(serve: Callable[..., Served]) -> None:
    """The response begins with a comment within a second, and a comment follows every `PING_SECONDS`."""
    with serve(ping_seconds=0.2).person() as person:
        started = time.monotonic()
        with person.listen(person.session(), "[[first=1.5 chunks=3]]") as (response, stream):
            assert time.monotonic() - started < 1
            stream.read()
        assert response.status_code == 200
        assert stream.comments >= 3
        assert stream.longest_gap < 1
        assert stream.text == reply_text("[[first=1.5 chunks=3]]")


def test_a_waiting_turn_is_waited_for_with_comments(serve: Callable[..., Served]) -> None:
    """The stream of a queued turn also begins within a second, and can be read to its end."""
    with serve(ping_seconds=0.2).person() as person:
        session = person.session()
        with person.listen(session, "[[chunks=20 delay=0.06]]") as (_, first):
            first.read(to_first_text=True)
            started = time.monotonic()
            with person.listen(session, "[[chunks=4]]") as (_, second):
                assert time.monotonic() - started < 1
                second.read()
            assert first.read().finish == "stop"
        assert second.comments >= 2
        assert second.text == reply_text("[[chunks=4]]")


def test_comments_come_every_15_seconds_at_least(served: Served, openclaw: StandIn) -> None:
    """The maximum of `PING_SECONDS` is 15."""
    assert served.settings.ping_seconds <= 15
    with pytest.raises(ValidationError):
        make_settings(served.settings.data, openclaw, ping_seconds=15.1)


# --- resuming -----------------------------------------------------------------------------------------

LONG = "[[chunks=20 size=11]]"
LENGTH = len(reply_text(LONG))
OFFSETS = [0, 1, 5, 10, 11, 12, 100, LENGTH - 1, LENGTH, LENGTH + 1, 10**12]


class Stored(NamedTuple):
    """A complete reply, and the path of its stream."""

    http: httpx.Client
    url: str
    id: int


@pytest.fixture(scope="module")
def stored(served: Served) -> Iterator[Stored]:
    """A complete reply of 220 characters."""
    with served.person() as person:
        session = person.session()
        reply_id = chat(person, LONG, session).json()["id"]
        yield Stored(person.http, f"/sessions/{session['id']}/messages/{reply_id}/stream", reply_id)


@pytest.mark.parametrize("after", OFFSETS)
@pytest.mark.parametrize("how", ["header", "query", "both"])
def test_a_reply_is_resumed_from_any_character(how: str, after: int, stored: Stored) -> None:
    """`Last-Event-ID` takes precedence over `?from=`. The response contains the text after the offset, the end and
    `[DONE]`; after an offset past the end, only the end and `[DONE]`."""
    headers = {} if how == "query" else {"Last-Event-ID": str(after)}
    params = {"query": {"from": after}, "both": {"from": 3}}.get(how, {})
    response = stored.http.get(stored.url, headers=headers, params=params)
    assert response.status_code == 200
    assert response.headers["Content-Type"].partition(";")[0] == "text/event-stream"
    assert (response.headers["Cache-Control"], response.headers["X-Accel-Buffering"]) == ("no-cache", "no")
    assert response.headers["X-Message-Id"] == str(stored.id)
    frames = pieces(response.content)
    assert read(frames, stored.id, min(after, LENGTH)) == reply_text(LONG)[after:]
    assert frames[-1][1]["choices"][0]["finish_reason"] == "stop"
    assert frames[-1][0] == LENGTH


def test_without_an_offset_a_reply_comes_from_its_beginning(stored: Stored) -> None:
    """The response contains the whole reply."""
    assert read(pieces(stored.http.get(stored.url).content), stored.id) == reply_text(LONG)


@pytest.mark.parametrize("wrong", [b"five", b"-1", b"1.5", b"1e3", b"", b"0x10", b"1_0", b"\xb2", b"9" * 5000])
def test_a_malformed_last_event_id_is_refused(wrong: bytes, stored: Stored, document: JSON) -> None:
    """The answer is 400: starting at 0 instead would make the client show text twice."""
    response = stored.http.get(stored.url, headers={b"Last-Event-ID": wrong})
    assert (response.status_code, response.json()["code"]) == (400, "invalid_request")
    assert not undocumented(response, document)


@pytest.mark.parametrize("wrong", ["five", "-1", "1.5", "", "9" * 5000])
def test_a_malformed_from_is_refused(wrong: str, stored: Stored, document: JSON) -> None:
    """The answer is 422, as for every malformed parameter."""
    response = stored.http.get(stored.url, params={"from": wrong})
    assert response.status_code == 422
    assert not undocumented(response, document)


def test_every_frames_id_is_a_place_to_resume(ada: Person) -> None:
    """After any frame, resuming returns the missing text, also for characters outside of ASCII."""
    text, session = "[[chunks=12 size=5 split=2 end=surrogates]]", ada.session()
    with ada.listen(session, text) as (response, _):
        frames = pieces(response.read())
    reply_id = int(response.headers["X-Message-Id"])
    so_far = ""
    for last_id, frame in frames:
        so_far += frame["choices"][0]["delta"]["content"]
        with ada.resume(session, reply_id, last_id) as rest:
            assert so_far + rest.read().text == reply_text(text)


def test_a_running_reply_has_any_number_of_readers(ada: Person) -> None:
    """Several clients read it live, from different offsets, to the same end."""
    session, text = ada.session(), "[[chunks=30 size=9 delay=0.02]]"
    with ada.listen(session, text) as (response, stream):
        stream.read(to_first_text=True)
        reply_id = int(response.headers["X-Message-Id"])
        with ada.resume(session, reply_id) as whole, ada.resume(session, reply_id, 4) as rest:
            assert whole.read(to_first_text=True).text
            assert ada.reply(session, "streaming"), "the reply ended too early for this test"
            assert whole.read().text == reply_text(text)
            assert rest.read().text == reply_text(text)[4:]
        assert stream.read().text == reply_text(text)
    assert {reader.finish for reader in (stream, whole, rest)} == {"stop"}


def test_a_reader_past_the_end_of_a_running_reply_waits_for_it(ada: Person) -> None:
    """The client receives no character again that it already has."""
    session, text = ada.session(), "[[chunks=30 size=9 delay=0.02]]"
    after = len(reply_text(text)) - 5
    with ada.listen(session, text) as (response, stream):
        stream.read(to_first_text=True)
        with ada.resume(session, int(response.headers["X-Message-Id"]), after) as rest:
            assert rest.read().text == reply_text(text)[after:]


def test_an_interrupted_reply_ends_as_such(serve: Callable[..., Served]) -> None:
    """After a restart of the service, the stream contains the text received so far, the status `interrupted` and the
    reason."""
    service = serve(drain_seconds=0)
    with service.person() as person:
        session = person.session()
        with person.listen(session, "[[chunks=9999 delay=0.05]]") as (response, stream):
            stream.read(to_first_text=True)
        service.stop()
        with person.at(serve().url) as again, again.resume(session, int(response.headers["X-Message-Id"])) as rest:
            rest.read()
            reply = again.messages(session)[-1]
    assert (rest.finish, rest.done, reply["status"]) == ("interrupted", True, "interrupted")
    assert rest.error == reply["error"]
    assert not differences(rest.error, FAILURE | {"code": "interrupted", "retryable": True})
    assert rest.text == reply["content"]
    assert rest.text.startswith(stream.text)


# --- messages and images ------------------------------------------------------------------------------


def test_messages_are_paged_from_the_newest(ada: Person) -> None:
    """Messages are listed oldest first. `limit` selects the newest ones, `before` those older than an id, and both
    together a page."""
    session = ada.session()
    for text in ("One", "Two", "Three"):
        ada.say(session, text)
    every, path = ada.messages(session), f"/sessions/{session['id']}/messages"
    assert [message["role"] for message in every] == ["user", "assistant"] * 3
    assert [message["id"] for message in every] == sorted(message["id"] for message in every)

    def page(**params: int) -> list[JSON]:
        got: list[JSON] = ada.http.get(path, params=params).json()
        return got

    assert page(limit=4) == every[2:]
    assert page(limit=100) == page(limit=1000) == every
    assert page(before=every[3]["id"]) == every[:3]
    assert page(before=every[3]["id"], limit=2) == every[1:3]
    assert page(before=every[0]["id"]) == []
    assert page(before=every[5]["id"] + 1000, limit=1) == every[5:]


@pytest.mark.parametrize("params", [{"limit": 0}, {"limit": -1}, {"limit": "all"}, {"before": "x"}, {"before": 2**63}])
def test_a_malformed_page_is_refused(params: JSON, scene: Scene) -> None:
    """The answer is 422."""
    response = scene.person.http.get(f"/sessions/{scene.session['id']}/messages", params=params)
    assert response.status_code == 422


def test_a_picture_loads_without_a_header(scene: Scene, served: Served) -> None:
    """An `<img>` element can load it from its absolute URL. The response has the image's bytes and media type, and
    headers that keep a browser from showing it as a page."""
    url = scene.person.messages(scene.session)[0]["image"]
    assert url.startswith(served.url)
    response = get(url)
    assert (response.status_code, response.content) == (200, PNG)
    assert response.headers["Content-Type"] == "image/png"
    assert response.headers["X-Content-Type-Options"] == "nosniff"
    assert response.headers["Content-Security-Policy"] == "default-src 'none'; sandbox"
    assert "public" not in response.headers["Cache-Control"]


def test_a_pictures_url_is_the_public_one(serve: Callable[..., Served]) -> None:
    """With `PUBLIC_BASE_URL`, image URLs begin with it."""
    with serve(public_base_url="https://chat.example.com/api").person() as person:
        session = person.session()
        chat(person, "Look", session, image=encoded(PNG))
        url = person.messages(session)[0]["image"]
        assert url.startswith("https://chat.example.com/api/images/")
        assert person.http.get(url.removeprefix("https://chat.example.com/api")).content == PNG


@pytest.mark.parametrize(
    "change",
    [
        {"image_id": "1000000"},
        {"extension": "jpg"},
        {"extension": "svg"},
        {"expires": "9999999999"},
        {"expires": ""},
        {"expires": "never"},
        {"signature": "0" * 32},
        {"signature": ""},
        {"signature": "\u00e9"},
    ],
)
def test_a_pictures_url_cannot_be_changed(change: JSON, hers: Scene, document: JSON) -> None:
    """A URL with any changed part gets `image_not_found`."""
    response = send(hers.person.http, IMAGE, hers.names | change)
    assert (response.status_code, response.json()["code"]) == (404, "image_not_found")
    assert not undocumented(response, document)


@pytest.mark.parametrize("query", ["", "?expires={expires}", "?signature={signature}"])
def test_a_pictures_url_is_needed_whole(query: str, hers: Scene) -> None:
    """A URL without its whole query gets 404, also with the token of the image's owner."""
    path = "/images/{image_id}.{extension}" + query
    assert hers.person.http.get(path.format_map(hers.names)).status_code == 404


@pytest.mark.parametrize(("age", "status"), [(0, 200), (3 * 86_400, 404)])
def test_a_pictures_url_expires(age: int, status: int, hers: Scene, served: Served) -> None:
    """A valid signature that was made three days ago gets 404."""
    assert served.settings.jwt_secret is not None
    store = ImageStore(served.settings.images, served.settings.jwt_secret.get_secret_value().encode())
    path = store.sign(int(hers.names["image_id"]), "any/file.png", time.time() - age)
    response = hers.person.http.get(path)
    assert response.status_code == status
    if status == 404:
        assert response.json()["code"] == "image_not_found"


# --- health -------------------------------------------------------------------------------------------


def test_health_says_what_runs(served: Served, openclaw: StandIn) -> None:
    """Version, port and gateway are those of this service, and no secret is shown."""
    response = get(f"{served.url}/health")
    health = response.json()
    assert (health["port"], health["gateway"]["url"]) == (served.port, openclaw.url)
    assert (health["environment"] == "production") == (health["branch"] == "main")
    assert served.settings.jwt_secret is not None
    for secret in (openclaw.token, served.settings.jwt_secret.get_secret_value(), str(served.settings.data)):
        assert secret not in response.text


def test_health_does_not_wait_for_the_gateway(serve: Callable[..., Served], document: JSON) -> None:
    """`/health` answers 200 at once while the gateway is down; `/health/ready` answers 503 with the cause and the
    fix."""
    service = serve(clawdbot_base_url=f"http://127.0.0.1:{free_port()}")
    get(f"{service.url}/health")
    started = time.monotonic()
    response = get(f"{service.url}/health")
    assert time.monotonic() - started < 0.5
    assert response.status_code == 200
    until(lambda: get(f"{service.url}/health").json()["gateway"]["checked_at"], 5, "a check of the gateway")
    assert get(f"{service.url}/health").json()["gateway"]["ok"] is False
    ready = get(f"{service.url}/health/ready")
    assert (ready.status_code, ready.json()["code"]) == (503, "not_ready")
    assert "CLAWDBOT_BASE_URL" in ready.json()["detail"]
    assert not undocumented(ready, document)


def test_health_is_an_error_without_the_database(serve: Callable[..., Served], document: JSON) -> None:
    """The answer is a documented 503."""
    service = serve()
    spoil(service, "ALTER TABLE users RENAME TO elsewhere")
    response = get(f"{service.url}/health")
    assert response.status_code == 503
    assert not differences(response.json(), HEALTH | {"status": "error", "database": DATABASE | {"ok": False}})
    assert int(response.headers["Retry-After"]) > 0
    assert not undocumented(response, document)
