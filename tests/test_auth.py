"""Sign-up, login, passwords and access tokens."""

import base64
import hashlib
import hmac
import json
import re
import sqlite3
import stat
import statistics
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import httpx
import pytest
from pydantic import SecretStr

import auth
import errors

from .conftest import make_settings
from .service import JSON, Person, Served, until
from .stand_in import StandIn

PNG = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="  # one pixel
TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z")
LONE_SURROGATE = '"\\ud800 and more"'  # valid JSON for a string that cannot be encoded as UTF-8
HTTP = httpx.Client(timeout=60, trust_env=False, limits=httpx.Limits(max_connections=None))  # without a token
Serve = Callable[..., Served]
Forge = Callable[[JSON], str]


@pytest.fixture(scope="module")
def openclaw() -> Iterator[StandIn]:
    """One gateway for all tests of this file."""
    with StandIn() as gateway:
        yield gateway


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory, openclaw: StandIn) -> Iterator[Served]:
    """One app for all tests that do not need their own."""
    with Served(make_settings(tmp_path_factory.mktemp("auth"), openclaw)) as app:
        yield app


@pytest.fixture(scope="module")
def carol(served: Served) -> Iterator[Person]:
    """A user whom no test changes."""
    with served.person() as person:
        yield person


def post(app: Served, path: str, **body: object) -> httpx.Response:
    """Sends a POST request without a token."""
    return HTTP.post(app.url + path, json=body)


def log_in(app: Served, email: str, password: str) -> httpx.Response:
    """Logs in."""
    return post(app, "/auth/login", email=email, password=password)


def me(app: Served, token: str) -> httpx.Response:
    """Requests the account that a token belongs to."""
    return HTTP.get(f"{app.url}/auth/me", headers={"Authorization": f"Bearer {token}"})


def rows(app: Served, sql: str, *values: object) -> list[tuple[object, ...]]:
    """Runs a statement on the database behind the app's back, and returns its rows."""
    with closing(sqlite3.connect(app.settings.db_path, timeout=10)) as conn, conn:
        return conn.execute(sql, values).fetchall()


def insert_user(app: Served, email: str | None, password: str | None) -> None:
    """Inserts an account with any e-mail and hash, as a legacy database can contain."""
    rows(
        app,
        "INSERT INTO users (email, email_key, password, created_at) VALUES (?, ?, ?, '2024-01-01T00:00:00.000Z')",
        *(email, email, password),
    )


def attempts_until_429(app: Served, email: str) -> httpx.Response:
    """Logs in with wrong passwords until the answer is 429, and returns that answer."""
    for number in range(50):
        answer = log_in(app, email, f"wrong {number}")
        if answer.status_code == 429:
            return answer
        assert answer.status_code == 401
    pytest.fail("50 wrong passwords in a row did not lead to a 429")


# --- sign-up and login --------------------------------------------------------------------------------


def test_signing_up_and_in_answer_with_the_token_object(served: Served) -> None:
    """Both routes return exactly the documented token object, and `/auth/me` returns its user."""
    signed_up = post(served, "/auth/signup", email="Grace@Example.com", password="12345678", name=" Grace ")
    logged_in = log_in(served, "Grace@Example.com", "12345678")
    assert (signed_up.status_code, logged_in.status_code) == (201, 200)
    for answer in (signed_up.json(), logged_in.json()):
        user = answer.pop("user")
        assert user == {
            "id": user["id"],
            "email": "Grace@Example.com",
            "name": "Grace",
            "created_at": user["created_at"],
        }
        assert type(user["id"]) is int
        assert TIME.fullmatch(user["created_at"])
        assert me(served, answer["token"]).json() == user
        token = answer["access_token"]
        assert answer == {
            "access_token": token,
            "token": token,
            "token_type": "bearer",
            "expires_in": served.settings.token_ttl,
        }
    assert signed_up.json()["token"] != logged_in.json()["token"]


def test_a_name_is_optional(served: Served) -> None:
    """An account that signs up without a name has the name null."""
    assert post(served, "/auth/signup", email="noname@example.com", password="12345678").json()["user"]["name"] is None


def test_token_ttl_is_how_long_a_token_lives(serve: Serve) -> None:
    """`expires_in` and the lifetime of the token are `TOKEN_TTL`."""
    with serve(token_ttl=61).person() as person:
        answer = person.http.post("/auth/login", json={"email": person.email, "password": person.password}).json()
    claims = claims_of(answer["token"])
    assert answer["expires_in"] == claims["exp"] - claims["iat"] == 61


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("case@example.com", "CASE@EXAMPLE.COM"),
        ("Mixed@Example.Com", "mixed@example.com"),
        ("blank@example.com", "  Blank@example.com\n"),
        ("äda@example.com", "ÄDA@example.com"),
    ],
    ids=["upper", "lower", "blanks", "beyond-ascii"],
)
def test_an_email_is_one_account_in_any_spelling(served: Served, first: str, second: str) -> None:
    """E-mails are compared without case and without surrounding white space, at sign-up and at login."""
    made = post(served, "/auth/signup", email=first, password="12345678")
    again = post(served, "/auth/signup", email=second, password="another one")
    assert (made.status_code, again.status_code, again.json()["code"]) == (201, 409, "email_taken")
    assert log_in(served, second, "12345678").json()["user"] == made.json()["user"]
    assert log_in(served, second, "another one").status_code == 401


def test_of_racing_signups_one_wins(served: Served) -> None:
    """Of several simultaneous sign-ups with one e-mail, one succeeds; all others get `email_taken`."""
    start = threading.Barrier(12)

    def sign_up(number: int) -> tuple[int, str | None]:
        start.wait()
        email = "race@example.com" if number % 2 else "RACE@example.com"
        answer = post(served, "/auth/signup", email=email, password=f"password {number}")
        return answer.status_code, answer.json().get("code")

    with ThreadPoolExecutor(12) as pool:
        answers = Counter(pool.map(sign_up, range(12)))
    assert answers == {(201, None): 1, (409, "email_taken"): 11}
    assert rows(served, "SELECT count(*) FROM users WHERE email LIKE 'race@%'") == [(1,)]


@pytest.mark.parametrize("signup", ["closed", "open sesame"])
def test_signing_up_may_be_closed_or_need_an_invite(serve: Serve, signup: str) -> None:
    """`SIGNUP=closed` refuses every sign-up; an invite code accepts only a sign-up that sends exactly this code."""
    app = serve(signup=SecretStr(signup))
    account = {"email": "invited@example.com", "password": "12345678"}
    invites = [{}, *({"invite": code} for code in (None, "", "open", "closed", "OPEN SESAME", "open sesame ", "é"))]
    for invite in invites:
        if invite.get("invite") == signup:
            continue
        answer = post(app, "/auth/signup", **account, **invite)
        assert (answer.status_code, answer.json()["code"]) == (403, "signup_closed"), invite
    right = post(app, "/auth/signup", **account, invite="open sesame")
    assert right.status_code == (403 if signup == "closed" else 201)
    assert rows(app, "SELECT count(*) FROM users") == [(0 if signup == "closed" else 1,)]


# --- invalid values -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("password", "status"),
    [
        ("1234567", 422),
        ("12345678", 201),
        ("éééééééé", 201),
        ("x" * 1024, 201),
        ("x" * 1025, 422),
        ("\N{GRINNING FACE}" * 1024, 201),
        ("\0" * 8, 201),
    ],
    ids=["7", "8", "8-beyond-ascii", "1024", "1025", "1024-of-4-bytes", "NUL"],
)
def test_a_password_has_8_to_1024_characters(served: Served, ada: Person, password: str, status: int) -> None:
    """The limits are in characters and hold at sign-up and at a password change. A password within the limits can log
    in."""
    email = f"other-{ada.email}"
    signed_up = post(served, "/auth/signup", email=email, password=password)
    changed = ada.http.put("/auth/password", json={"current_password": ada.password, "new_password": password})
    assert (signed_up.status_code, changed.status_code) == (status, 200 if status == 201 else 422)
    for address in (email, ada.email):
        answer = log_in(served, address, password)
        assert answer.status_code == (200 if status == 201 else 422 if len(password) > 1024 else 401)


@pytest.mark.parametrize(
    "email",
    [
        *("", " ", "ada", "ada@", "@example.com", "a@b@example.com", "a da@example.com", "ada@exa mple.com"),
        *("ada@example..com", "ada@-example.com", "ada@example.com\0", "a\nb@example.com", "a\0b@example.com"),
        *("<ada@example.com>", "ada@example.com, bob@example.com"),
        f"ada@{'a.' * 160}com",
    ],
)
def test_a_malformed_email_is_refused(served: Served, email: str) -> None:
    """A malformed e-mail creates no account, and the error repeats neither the e-mail nor the password."""
    answer = post(served, "/auth/signup", email=email, password="a password to keep")
    assert (answer.status_code, answer.json()["code"]) == (422, "invalid_request")
    assert [item["loc"] for item in answer.json()["detail"]] == [["body", "email"]]
    assert "a password to keep" not in answer.text
    assert "input" not in answer.json()["detail"][0]


@pytest.mark.parametrize("domain", ["localhost", "box.local", "company.test", "nowhere.invalid", "intranet"])
def test_an_email_need_not_be_deliverable(served: Served, domain: str) -> None:
    """Nothing is ever sent to an e-mail, so domains of private networks are accepted."""
    assert post(served, "/auth/signup", email=f"ada@{domain}", password="12345678").status_code == 201


BODIES: dict[tuple[str, str], JSON] = {
    ("POST", "/auth/signup"): {"email": "e@example.com", "password": "12345678", "name": "n", "invite": "i"},
    ("POST", "/auth/login"): {"email": "e@example.com", "password": "12345678"},
    ("PUT", "/auth/password"): {"current_password": "12345678", "new_password": "12345678"},
    ("DELETE", "/auth/me"): {"password": "12345678"},
}


@pytest.mark.parametrize("wrong", [LONE_SURROGATE, "7", "[]", "{}", "true", "1e999"])
@pytest.mark.parametrize(
    ("method", "path", "field"),
    [(method, path, field) for (method, path), body in BODIES.items() for field in body],
)
def test_what_is_no_text_is_refused(carol: Person, method: str, path: str, field: str, wrong: str) -> None:
    """A lone surrogate or a wrong type in any field of any route gets a 422 that names the field."""
    body = json.dumps({**BODIES[method, path], field: "@"}).replace('"@"', wrong)
    answer = carol.http.request(method, path, content=body, headers={"Content-Type": "application/json"})
    assert (answer.status_code, answer.json()["code"]) == (422, "invalid_request")
    (mistake,) = answer.json()["detail"]
    assert mistake["loc"] in (["body", field], ["body"])


@pytest.mark.parametrize("text", ["'; DROP TABLE users; --", "' OR '1'='1", '" OR ""="', "%", "_", "\\", "{0}", "$1"])
def test_sql_is_text(served: Served, ada: Person, text: str) -> None:
    """SQL in a name, a password or an e-mail is stored as text and not executed."""
    email = f"sql-{ada.email}"
    made = post(served, "/auth/signup", email=email, password=text * 8, name=text)
    assert (made.status_code, made.json()["user"]["name"]) == (201, text)
    assert log_in(served, email, text * 8).status_code == 200
    for address, password in ((text, text), (email, text), (f"{email}{text}", text * 8)):
        assert log_in(served, address, password).status_code == 401
    assert ada.http.get("/auth/me").status_code == 200


# --- wrong passwords ----------------------------------------------------------------------------------


@pytest.fixture
def old_accounts(served: Served, ada: Person) -> JSON:
    """E-mails for which a wrong password must get the same answer, after the same time, as for Ada's account."""
    hashes = {
        "no password": None,
        "empty password": "",
        "SHA-256": hashlib.sha256(b"long ago").hexdigest(),
        "plain text": "long ago",
        "half an argon2": "$argon2id$v=19$m=19456,t=2,p=1$c29tZXNhbHQ",
    }
    emails: JSON = {"unknown": f"unknown-{ada.email}"}
    for number, (kind, hashed) in enumerate(hashes.items()):
        emails[kind] = f"old-{number}-{ada.email}"
        insert_user(served, emails[kind], hashed)
    return emails


KINDS = ["unknown", "no password", "empty password", "SHA-256", "plain text", "half an argon2"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_failed_login_says_the_same_of_every_email(
    served: Served, ada: Person, old_accounts: JSON, kind: str
) -> None:
    """An unknown e-mail, and an account without a valid hash, get the same answer as a wrong password."""
    wrong, other = log_in(served, ada.email, "not hers"), log_in(served, old_accounts[kind], "not hers")
    assert (wrong.status_code, wrong.json()["code"]) == (401, "invalid_credentials")
    assert wrong.headers["WWW-Authenticate"] == "Bearer"
    assert (other.status_code, other.json()) == (401, wrong.json())
    assert set(wrong.headers) == set(other.headers)


@pytest.mark.parametrize("kind", KINDS)
def test_a_failed_login_takes_the_same_time_for_every_email(
    served: Served, ada: Person, old_accounts: JSON, kind: str
) -> None:
    """The time of an answer does not reveal which e-mails have an account, because each attempt computes one hash."""

    def seconds(email: str) -> float:
        started = time.perf_counter()
        log_in(served, email, "not hers")
        return time.perf_counter() - started

    pairs = [(seconds(ada.email), seconds(old_accounts[kind])) for _ in range(7)]
    known, other = (statistics.median(times) for times in zip(*pairs, strict=True))
    assert other > known / 3


@pytest.mark.parametrize("password", [None, ""])
def test_an_account_without_a_password_cannot_be_logged_into(served: Served, password: str | None) -> None:
    """No password can log in to an account without a hash or without an e-mail."""
    insert_user(served, None, hashlib.sha256(b"long ago").hexdigest())
    email = f"without-{password is None}@example.com"
    insert_user(served, email, password)
    for attempt in ("", "None", "null", "long ago"):
        assert log_in(served, email, attempt).status_code == 401
        assert log_in(served, "None", attempt).status_code == 401


def test_a_login_makes_a_hash_of_old_a_good_one(served: Served) -> None:
    """The first successful login replaces an unsalted SHA-256 hash by an argon2id one; a failed login does not. The
    password stays valid."""
    email, old = "legacy@example.com", hashlib.sha256("pässword".encode()).hexdigest()
    insert_user(served, email, old)
    for wrong in ("wrong", old):
        assert log_in(served, email, wrong).status_code == 401
    assert rows(served, "SELECT password FROM users WHERE email = ?", email) == [(old,)]
    token = log_in(served, email, "pässword").json()["token"]
    new = rows(served, "SELECT password FROM users WHERE email = ?", email)[0][0]
    assert str(new).startswith("$argon2id$v=19$m=19456,t=2,p=1$")
    assert me(served, token).json()["email"] == email
    assert log_in(served, email, "pässword").status_code == 200
    assert rows(served, "SELECT password FROM users WHERE email = ?", email) == [(new,)]


def test_repeated_wrong_passwords_have_to_wait(served: Served, ada: Person, bob: Person) -> None:
    """Too many wrong passwords for an e-mail, in any case and with spaces around it, get a 429. Another e-mail can
    still log in."""
    refused = attempts_until_429(served, ada.email)
    assert refused.json()["code"] == "too_many_attempts"
    assert 1 <= int(refused.headers["Retry-After"]) <= 900
    for spelling in (ada.email, ada.email.upper(), f" {ada.email}"):
        assert log_in(served, spelling, ada.password).status_code == 429
    assert log_in(served, bob.email, bob.password).status_code == 200
    assert ada.http.get("/auth/me").status_code == 200


def test_guessing_in_parallel_gives_no_more_guesses(served: Served, ada: Person, bob: Person) -> None:
    """The number of wrong passwords before the 429 is the same whether they are sent one by one or at the same time."""
    guesses = 0
    while log_in(served, ada.email, "wrong").status_code == 401:
        guesses += 1
        assert guesses < 50
    start = threading.Barrier(50)

    def guess(number: int) -> int:
        start.wait()
        return log_in(served, bob.email, f"wrong {number}").status_code

    with ThreadPoolExecutor(50) as pool:
        statuses = Counter(pool.map(guess, range(50)))
    assert statuses == {401: guesses, 429: 50 - guesses}


@pytest.mark.parametrize("email", ["{email}", "user {id}", "{id}"])
def test_a_stranger_cannot_keep_a_signed_in_user_from_a_new_password(served: Served, ada: Person, email: str) -> None:
    """Failed logins, with any e-mail, do not affect users who have a token."""
    user = ada.http.get("/auth/me").json()
    attempts_until_429(served, email.format(**user))
    changed = ada.http.put("/auth/password", json={"current_password": ada.password, "new_password": "another one"})
    assert changed.status_code == 200


@pytest.mark.parametrize(
    ("method", "path", "field"), [("PUT", "password", "current_password"), ("DELETE", "me", "password")]
)
def test_a_stolen_token_does_not_help_to_guess_the_password(ada: Person, method: str, path: str, field: str) -> None:
    """The routes that require the password return 429 after too many wrong ones, then also for the right one."""
    body = {field: "wrong", "new_password": "another one"}
    answers = [ada.http.request(method, f"/auth/{path}", json=body) for _ in range(20)]
    statuses = [answer.status_code for answer in answers]
    assert statuses == sorted(statuses)
    assert set(statuses) == {401, 429}
    right = ada.http.request(method, f"/auth/{path}", json={**body, field: ada.password})
    assert (right.status_code, right.json()["code"]) == (429, "too_many_attempts")
    assert int(right.headers["Retry-After"]) >= 1
    assert ada.http.get("/auth/me").status_code == 200


# --- revoked tokens -----------------------------------------------------------------------------------


def test_logging_out_refuses_this_token_for_good(serve: Serve) -> None:
    """A token is refused after its logout, also after a restart. The user's other tokens stay valid."""
    app = serve()
    with app.person() as ada:
        other = log_in(app, ada.email, ada.password).json()["token"]
        out = ada.http.post("/auth/logout")
        again = ada.http.post("/auth/logout")
    assert (out.status_code, out.json()) == (200, {"message": "Logged out"})
    assert (again.status_code, again.json()["code"]) == (401, "unauthorized")
    app.stop()
    app = serve()
    assert [me(app, token).status_code for token in (ada.token, other)] == [401, 200]


def test_a_new_password_refuses_every_earlier_token(serve: Serve) -> None:
    """A password change revokes all earlier tokens, also after a restart. The token that it returns is valid."""
    app = serve()
    with app.person() as ada:
        other = log_in(app, ada.email, ada.password).json()["token"]
        body = {"current_password": ada.password, "new_password": "a better one"}
        wrong = ada.http.put("/auth/password", json={**body, "current_password": "wrong"})
        assert (wrong.status_code, wrong.json()["code"]) == (401, "invalid_credentials")
        assert me(app, ada.token).status_code == 200
        changed = ada.http.put("/auth/password", json=body)
    assert changed.status_code == 200
    assert set(changed.json()) == {"access_token", "token", "token_type", "expires_in", "user"}
    new = changed.json()["token"]
    for _ in range(2):
        assert [me(app, token).status_code for token in (ada.token, other, new)] == [401, 401, 200]
        assert log_in(app, ada.email, ada.password).status_code == 401
        assert log_in(app, ada.email, "a better one").status_code == 200
        app.stop()
        app = serve()


def test_deleting_the_account_deletes_all_it_owns(served: Served, openclaw: StandIn, ada: Person, bob: Person) -> None:
    """With the right password, the account and its rows, folders, images and conversations in the gateway are deleted.
    Those of other users are not."""
    owned: dict[str, tuple[JSON, JSON, Path, Path]] = {}
    for person in (ada, bob):
        project = person.project()
        session = person.session(project)
        assert person.say(session, "A secret", image=PNG).status_code == 200
        images = served.settings.images / session["session_key"]
        owned[person.email] = (project, session, Path(project["project_path"]), images)
        assert list(images.iterdir()) and Path(project["project_path"], "README.md").exists()
    wrong = ada.http.request("DELETE", "/auth/me", json={"password": bob.password})
    assert (wrong.status_code, wrong.json()["code"]) == (401, "invalid_credentials")
    assert len(ada.messages(owned[ada.email][1])) == 2

    right = ada.http.request("DELETE", "/auth/me", json={"password": ada.password})
    assert right.status_code == 200
    assert ada.http.get("/projects").status_code == 401
    assert log_in(served, ada.email, ada.password).status_code == 401
    project, session, folder, images = owned[ada.email]
    assert not folder.exists() and not images.exists()
    for table, column, value in (
        ("users", "email", ada.email),
        ("projects", "id", project["id"]),
        ("sessions", "id", session["id"]),
        ("messages", "session_id", session["id"]),
        ("turns", "session_id", session["id"]),
    ):
        assert rows(served, f"SELECT count(*) FROM {table} WHERE {column} = ?", value) == [(0,)]
    key = f"agent:main:openai-user:adapter-session-{session['session_key']}"
    until(lambda: key in openclaw.deleted, 10, "the session's deletion in the gateway")

    project, session, folder, images = owned[bob.email]
    assert folder.exists() and list(images.iterdir())
    assert len(bob.messages(session)) == 2
    assert not any(session["session_key"] in deleted for deleted in openclaw.deleted)


def test_a_deleted_email_may_sign_up_anew(served: Served, ada: Person) -> None:
    """A new account with the same e-mail is another account: the old token is not valid for it."""
    old = ada.http.get("/auth/me").json()["id"]
    ada.delete("/auth/me", password=ada.password)
    made = post(served, "/auth/signup", email=ada.email, password=ada.password)
    assert made.status_code == 201
    assert made.json()["user"]["id"] != old
    assert me(served, ada.token).status_code == 401


# --- the secret ---------------------------------------------------------------------------------------


def test_the_secret_is_made_once_and_for_its_owner_alone(serve: Serve) -> None:
    """Without `JWT_SECRET`, a secret is generated with mode 0600. A restart uses the same one, so tokens stay valid."""
    app = serve(jwt_secret=None)
    file = app.settings.data / "secret.key"
    with app.person() as ada:
        made = file.read_bytes()
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
        assert len(made) >= 32
    app.stop()
    app = serve(jwt_secret=None)
    assert me(app, ada.token).status_code == 200
    assert (file.read_bytes(), stat.S_IMODE(file.stat().st_mode)) == (made, 0o600)
    app.stop()
    file.unlink()
    assert me(serve(jwt_secret=None), ada.token).status_code == 401


def test_a_given_secret_is_not_written_down(serve: Serve) -> None:
    """With `JWT_SECRET` no file is written. With another `JWT_SECRET`, old tokens are refused."""
    app = serve()
    with app.person() as ada:
        assert not (app.settings.data / "secret.key").exists()
    app.stop()
    assert me(serve(jwt_secret=SecretStr("another secret of the tests, long too")), ada.token).status_code == 401


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # the server's thread fails
@pytest.mark.parametrize("content", [b"", b"short\n"])
def test_a_spoilt_secret_is_not_signed_with(tmp_path: Path, openclaw: StandIn, content: bytes) -> None:
    """An empty or short `secret.key` stops the start, because it could be guessed and tokens forged with it."""
    (tmp_path / "secret.key").write_bytes(content)
    app = Served(make_settings(tmp_path, openclaw, jwt_secret=None))
    with pytest.raises(AssertionError, match="the app did not start"), app:
        pass


# --- forged tokens ------------------------------------------------------------------------------------


def encode(data: bytes) -> str:
    """Returns base64 as JWTs use it."""
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def claims_of(token: str) -> JSON:
    """Returns the claims of a token without checking its signature."""
    claims: JSON = json.loads(base64.urlsafe_b64decode(token.split(".")[1] + "=="))
    return claims


HS256 = {"alg": "HS256", "typ": "JWT"}
GOOD_SECRET = b"a secret of the tests, long enough"


def sign(
    claims: JSON, header: JSON | list[str] | None = None, secret: bytes = GOOD_SECRET, digest: str = "sha256"
) -> str:
    """Returns a token that is signed as the service signs it, except for what the arguments change."""
    key = hmac.digest(secret, b"access-token", "sha256")
    text = f"{encode(json.dumps(HS256 if header is None else header).encode())}.{encode(json.dumps(claims).encode())}"
    return f"{text}.{encode(hmac.digest(key, text.encode(), digest))}"


def without(name: str) -> Forge:
    """Returns a function that forges a correctly signed token without one claim."""
    return lambda claims: sign({key: value for key, value in claims.items() if key != name})


def with_(**changes: object) -> Forge:
    """Returns a function that forges a correctly signed token with changed claims."""
    return lambda claims: sign({**claims, **changes})


def with_header(header: JSON | list[str], digest: str = "sha256") -> Forge:
    """Returns a function that forges a signed token with another header."""
    return lambda claims: sign(claims, header, digest=digest)


def unsigned(header: JSON) -> Forge:
    """Returns a function that forges a token without a signature."""
    return lambda claims: f"{encode(json.dumps(header).encode())}.{encode(json.dumps(claims).encode())}."


def changed(part: int) -> Forge:
    """Returns a function that forges a token by changing one character in the middle of one of its three parts."""

    def forge(claims: JSON) -> str:
        parts = sign(claims).split(".")
        text = parts[part]
        at = len(text) // 2
        parts[part] = text[:at] + ("A" if text[at] != "A" else "B") + text[at + 1 :]
        return ".".join(parts)

    return forge


FORGED: dict[str, Forge] = {
    "alg none": unsigned({"alg": "none", "typ": "JWT"}),
    "alg None": unsigned({"alg": "None", "typ": "JWT"}),
    "no signature": unsigned(HS256),
    "alg none, signed": with_header({"alg": "none", "typ": "JWT"}),
    "HS512": with_header({"alg": "HS512", "typ": "JWT"}, "sha512"),
    "HS256 said, HS512 done": with_header(HS256, "sha512"),
    "RS256": with_header({"alg": "RS256", "typ": "JWT"}),
    "no alg": with_header({"typ": "JWT"}),
    "crit": with_header({**HS256, "crit": ["exp"]}),
    "kid": with_header({**HS256, "kid": "../../dev/null"}),
    "jwk": with_header({**HS256, "jwk": {"kty": "oct", "k": "AA"}}),
    "a header that is a list": with_header(["HS256"]),
    "another secret": lambda claims: sign(claims, secret=b"another secret of the tests, long too"),
    "no secret": lambda claims: sign(claims, secret=b""),
    "header changed": changed(0),
    "claims changed": changed(1),
    "signature changed": changed(2),
    **{f"without {name}": without(name) for name in ("sub", "ver", "jti", "iat", "exp", "iss", "aud")},
    "another issuer": with_(iss="somebody"),
    "issuers": with_(iss=["clawd-backend"]),
    "another audience": with_(aud="somebody"),
    "expired": with_(iat=1_000_000_000, exp=1_000_000_060),
    "just expired": lambda claims: sign({**claims, "exp": int(time.time()) - 1}),
    "exp is null": with_(exp=None),
    "exp is text": with_(exp="9999999999"),
    "exp is 10**30": with_(exp=10**30),
    "exp is infinite": with_(exp=float("inf")),
    "exp is not a number": with_(exp=float("nan")),
    "exp is a list": with_(exp=[9999999999]),
    "not yet": with_(nbf=9_999_999_999),
    "sub is a number": with_(sub=1),
    "sub is nobody": with_(sub="999999"),
    "sub is a word": with_(sub="ada"),
    "sub is 0": with_(sub="0"),
    "sub is 2**64": with_(sub=str(2**64)),
    "ver is another": with_(ver=1),
    "ver is 2**64": with_(ver=2**64),
    "ver is null": with_(ver=None),
    "jti is null": with_(jti=None),
    "jti is no Unicode": with_(jti="\ud800"),
    "claims that are a list": lambda _: sign([1]),  # type: ignore[arg-type]  # the test is about this wrong type
    "nested deeply": lambda _: f"{encode(b'[' * 700)}.e30.AAAA",
    "two parts": lambda claims: sign(claims).rpartition(".")[0],
    "four parts": lambda claims: sign(claims) + ".AAAA",
    "five parts": lambda _: "a.b.c.d.e",
    "dots": lambda _: "..",
    "garbage": lambda _: "garbage",
    "10 kB": lambda _: "a" * 10_240,
    "10 kB of claims": with_(more="a" * 10_240),
    "null": lambda _: "null",
}


@pytest.mark.parametrize("kind", FORGED)
def test_a_forged_token_is_refused(served: Served, carol: Person, kind: str) -> None:
    """Every token that the service has not issued, or that has expired, gets a 401 with `WWW-Authenticate`."""
    answer = me(served, FORGED[kind](claims_of(carol.token)))
    assert (answer.status_code, answer.json()["code"]) == (401, "unauthorized")
    assert answer.headers["WWW-Authenticate"] == "Bearer"


def test_what_is_forged_here_would_work_if_it_were_ours(served: Served, carol: Person) -> None:
    """A token that the tests sign with valid claims is accepted. Otherwise the refusals above would prove nothing."""
    assert me(served, sign(claims_of(carol.token))).status_code == 200


@pytest.mark.parametrize(
    ("header", "status"),
    [
        (b"Bearer {token}", 200),
        (b"bearer {token}", 200),
        (b"BEARER {token}", 200),
        (b"{token}", 401),
        (b"Bearer", 401),
        (b"Bearer Bearer {token}", 401),
        (b"Bearer {token},{token}", 401),
        (b"Basic {token}", 401),
        (b"Token {token}", 401),
        (b"", 401),
        (b"Bearer \xe9\xff.\xfe.\x80", 401),
        ("Bearer ключ.ключ.ключ".encode(), 401),
        (b"\xff\xfe", 401),
        (None, 401),
    ],
)
def test_the_header_is_bearer_and_a_token(served: Served, carol: Person, header: bytes | None, status: int) -> None:
    """The scheme `Bearer` is accepted in any case. Another scheme, none, or bytes that are not ASCII get a 401."""
    headers = [] if header is None else [(b"Authorization", header.replace(b"{token}", carol.token.encode()))]
    answer = HTTP.get(f"{served.url}/auth/me", headers=headers)
    assert answer.status_code == status
    assert answer.headers.get("WWW-Authenticate") == (None if status == 200 else "Bearer")


@pytest.mark.parametrize("fault", ["readable by the group", "readable by all", "a link"])
def test_a_secret_that_others_may_have_read_stops_the_start(tmp_path: Path, openclaw: StandIn, fault: str) -> None:
    """The sentence names the file and what to do; the file stays as it is."""
    settings = make_settings(tmp_path, openclaw, jwt_secret=None)
    key, secret = settings.data / "secret.key", b"0123456789abcdef0123456789abcdef"
    if fault == "a link":
        (tmp_path / "elsewhere").write_bytes(secret)
        (tmp_path / "elsewhere").chmod(0o600)
        key.symlink_to(tmp_path / "elsewhere")
    else:
        key.write_bytes(secret)
        key.chmod(0o640 if "group" in fault else 0o604)
    with pytest.raises(errors.Unavailable, match="only its owner can read") as refused:
        auth.load_secret(settings)
    assert str(key) in refused.value.message and "chmod 600" in refused.value.message
    assert key.read_bytes() == secret
