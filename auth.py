"""Authentication: passwords, access tokens, the `/auth` routes, and the dependency `CurrentUser` for other routes."""

import asyncio
import hmac
import re
import secrets
import stat
import time
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Annotated, Any, Literal, NamedTuple, TypeVar, cast

from email_validator import SPECIAL_USE_DOMAIN_NAMES, EmailNotValidError, validate_email
from fastapi import APIRouter, Depends, Request, status
from fastapi.routing import APIRoute
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from jose import JWTError, jwt
from passlib.context import CryptContext
from passlib.exc import UnknownHashError
from pydantic import AfterValidator, BaseModel, Field, StringConstraints
from starlette.datastructures import Headers
from starlette.types import Scope

import errors
import file_utils
import sql
import telemetry
from settings import Settings
from throttle import Throttle
from web import Body, OpenParts

T = TypeVar("T")

ISSUER = "clawd-backend"
MAX_PENDING_HASHES = 64  # hashes that may be computed or wait for the one thread; each takes about 20 ms

# email_validator refuses domains such as `.local`, which e-mail addresses of private networks use.
SPECIAL_USE_DOMAIN_NAMES.clear()

router = APIRouter(tags=["auth"])


class Claims(NamedTuple):
    """The claims of a valid access token."""

    user_id: int
    version: int  # the user's `token_version` when the token was issued; a new password raises it
    jti: str
    expires_at: int  # Unix time in seconds


class Passwords:
    """Hashes and verifies passwords on one dedicated thread, because a hash would block the event loop, and with it all
    streams, for about 20 ms."""

    def __init__(self) -> None:
        # The argon2id parameters are OWASP's minimum. Legacy accounts have hex_sha256 hashes until their next login.
        self._context = CryptContext(
            schemes=["argon2", "hex_sha256"],
            deprecated=["hex_sha256"],
            argon2__type="ID",
            argon2__memory_cost=19_456,
            argon2__time_cost=2,
            argon2__parallelism=1,
        )
        self._pending = 0

    def open(self) -> None:
        """Starts the thread and creates the dummy hash that is verified if the account does not exist."""
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="passwords")
        self._dummy = self._context.hash(secrets.token_hex(16))

    def close(self) -> None:
        """Ends the thread and cancels work that waits for it."""
        self._thread.shutdown(cancel_futures=True)

    async def hash(self, password: str) -> str:
        """Returns the argon2id hash of a password. Raises errors.TooMany if too many others wait for the thread."""
        return await self._run(lambda: self._context.hash(password))

    async def verify(self, password: str, hashed: str | None, throttle: "Throttle", who: tuple[str, ...]) -> str | None:
        """Checks a password against the stored hash `hashed`, which is None if there is no account or no password.

        Returns a new hash to store if the stored one has an outdated algorithm or outdated parameters, otherwise None.
        Raises errors.Unauthorized if the password is wrong, and errors.TooMany after too many wrong passwords of `who`
        (see Throttle) or if too many others wait for the thread. A missing, legacy or invalid hash takes as long as an
        argon2id hash, so that the time of an answer does not reveal which accounts exist.
        """
        throttle.check(*who)
        return await self._run(lambda: self._verify(password, hashed, throttle, who))

    def _verify(self, password: str, hashed: str | None, throttle: "Throttle", who: tuple[str, ...]) -> str | None:
        # `verify` has checked this already, but not for guesses sent at the same time: only on this thread are they
        # counted one after another.
        throttle.check(*who)
        if not (hashed or "").startswith("$argon2"):
            self._context.verify(password, self._dummy)
        try:
            valid, new_hash = self._context.verify_and_update(password, hashed) if hashed else (False, None)
        except (UnknownHashError, ValueError):
            valid, new_hash = self._context.verify(password, self._dummy), None
        if not valid:
            throttle.count(*who)
            raise errors.Unauthorized("The e-mail or the password is wrong.", code="invalid_credentials")
        return new_hash

    async def _run(self, work: Callable[[], T]) -> T:
        if self._pending >= MAX_PENDING_HASHES:
            raise errors.TooMany(
                "Too many users are logging in right now. Try again in a few seconds.",
                code="too_many_attempts",
                retry_after=3,
            )
        self._pending += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, work)
        finally:
            self._pending -= 1


class Tokens:
    """Signs and verifies access tokens: JWTs with HS256, in which every claim is required."""

    def __init__(self, secret: bytes, ttl: int) -> None:
        """Derives the signing key from `secret`. `ttl` is the lifetime of a token in seconds."""
        self._key = hmac.digest(secret, b"access-token", "sha256")
        self.ttl = ttl

    def issue(self, user: sql.User) -> str:
        """Returns an access token for a user, valid until it expires or is revoked."""
        at = int(time.time())
        claims = {"sub": str(user.id), "ver": user.token_version, "jti": uuid.uuid4().hex}
        claims |= {"iat": at, "exp": at + self.ttl, "iss": ISSUER, "aud": ISSUER}
        return jwt.encode(claims, self._key, algorithm="HS256")

    def check(self, token: str) -> Claims:
        """Returns the claims of a token. Raises errors.Unauthorized if the token is malformed, expired, or not signed
        by this service. Does not check whether it was revoked."""
        options = {f"require_{claim}": True for claim in ("sub", "iat", "exp", "jti", "aud", "iss")}
        try:
            if len(token) > 1024 or jwt.get_unverified_header(token) != {"alg": "HS256", "typ": "JWT"}:
                raise _unauthorized()
            claims = jwt.decode(token, self._key, ["HS256"], options, audience=ISSUER, issuer=ISSUER)
            return _claims(claims)
        except (JWTError, ValueError, KeyError, TypeError, OverflowError):
            raise _unauthorized() from None


def _claims(claims: dict[str, Any]) -> Claims:
    """Converts decoded claims. Raises ValueError, KeyError or TypeError if they do not have the form that `issue`
    writes, even if the signature is valid."""
    subject, version, jti, expires_at = (claims[name] for name in ("sub", "ver", "jti", "exp"))
    if not re.fullmatch("[0-9]{1,18}", subject) or not re.fullmatch("[0-9a-f]{32}", jti):
        raise ValueError("malformed claim `sub` or `jti`")
    if type(version) is not int or type(expires_at) is not int or max(version, expires_at) > sql.MAX_ID:
        raise ValueError("malformed claim `ver` or `exp`")
    return Claims(int(subject), version, jti, expires_at)


class Identity:
    """What the routes of this module need in addition to the database: passwords, tokens, throttle and settings."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self.passwords = Passwords()
        self.throttle = Throttle()

    def open(self, secret: bytes) -> None:
        """Starts the hashing thread. The key that signs tokens is derived from `secret`."""
        self.tokens = Tokens(secret, self._settings.token_ttl)
        self.passwords.open()

    def close(self) -> None:
        """Ends the hashing thread."""
        self.passwords.close()

    def check_signup(self, invite: str | None) -> None:
        """Raises errors.Forbidden if `SIGNUP` is `closed`, or is an invite code other than `invite`."""
        signup = self._settings.signup.get_secret_value()
        if signup.lower() == "closed":
            raise errors.Forbidden("Sign-up is closed. Ask the operator for an account.", code="signup_closed")
        if signup.lower() != "open" and not hmac.compare_digest((invite or "").encode(), signup.encode()):
            raise errors.Forbidden(
                "Sign-up requires a valid invite code in the field `invite`. Ask the operator for it.",
                code="signup_closed",
            )

    def token(self, user: sql.User) -> "Token":
        """Returns the response body for a user who has signed up, logged in or changed the password."""
        token = self.tokens.issue(user)
        return Token(access_token=token, token=token, expires_in=self.tokens.ttl, user=_user_out(user))


def load_secret(settings: Settings) -> bytes:
    """Returns the secret for signing tokens and image URLs: `JWT_SECRET`, or the content of `secret.key` in the data
    directory. Generates that file at the first start, readable only by its owner. Raises errors.Unavailable if the file
    cannot be read or written or is too short."""
    if settings.jwt_secret is not None:
        return settings.jwt_secret.get_secret_value().encode()
    path = settings.data / "secret.key"
    secret = file_utils.create_once(path, secrets.token_hex(32).encode(), 0o600)
    found = path.lstat()
    if not stat.S_ISREG(found.st_mode) or found.st_mode & 0o077:
        message = (
            f"{path} must be a file that only its owner can read, because whoever has it can log in as anybody. "
            "Delete it if others may have read it: the next start generates a new one, and all users must log in "
            f"again. Otherwise: chmod 600 {path}"
        )
        raise errors.Unavailable(message, code="disk_unavailable")
    if len(secret.strip()) < 32:
        message = (
            f"{path} has fewer than 32 characters, which is not a safe secret. Set JWT_SECRET, or delete the file: "
            "the next start generates a new one, and all users must log in again."
        )
        raise errors.Unavailable(message, code="disk_unavailable")
    return secret


def _unauthorized() -> errors.Unauthorized:
    return errors.Unauthorized(
        "No valid access token was sent. Log in, then send it in the header `Authorization: Bearer <token>`.",
        code="unauthorized",
    )


# --- dependencies -------------------------------------------------------------------------------------


class Caller(NamedTuple):
    """The user whom a request's access token belongs to, and the claims of that token."""

    user: sql.User
    claims: Claims


async def _identity(request: Request) -> Identity:
    return cast(Identity, request.state.identity)


OpenIdentity = Annotated[Identity, Depends(_identity)]
_bearer = HTTPBearer(
    auto_error=False, description="The `access_token` that a sign-up, login or password change returned."
)


def authenticate(scope: Scope) -> Caller:
    """Returns the caller of a request by its token, and keeps it in the scope. Raises errors.Unauthorized."""
    known: Caller | None = scope.get("caller")
    if known is not None:
        return known
    scheme, _, token = Headers(scope=scope).get("authorization", "").partition(" ")
    if scheme.lower() != "bearer" or not token:
        raise _unauthorized()
    state = scope["state"]
    claims = state["identity"].tokens.check(token.strip())
    user = state["parts"].db.read(sql.select_user_by_token, claims.user_id, claims.version, claims.jti)
    if user is None:
        raise _unauthorized()
    telemetry.note(user_id=user.id)
    scope["caller"] = caller = Caller(user, claims)
    return caller


def needs_caller(route: APIRoute) -> bool:
    """Returns True if a route answers 401 without a token."""
    waiting = [route.dependant]
    while waiting:
        dependant = waiting.pop()
        if dependant.call is _caller:
            return True
        waiting += dependant.dependencies
    return False


async def _caller(request: Request, _: Annotated[HTTPAuthorizationCredentials | None, Depends(_bearer)]) -> Caller:
    return authenticate(request.scope)


async def _current_user(caller: Annotated[Caller, Depends(_caller)]) -> sql.User:
    return caller.user


CurrentCaller = Annotated[Caller, Depends(_caller)]
CurrentUser = Annotated[sql.User, Depends(_current_user)]


# --- the routes ---------------------------------------------------------------------------------------


def _check_email(email: str) -> str:
    """Returns an e-mail address without surrounding white space. Raises ValueError if it is malformed. Makes no DNS
    query to check that the domain receives mail, and also accepts domains of private networks."""
    try:
        validate_email(email.strip(), check_deliverability=False, globally_deliverable=False)
    except EmailNotValidError as error:
        raise ValueError(str(error)) from None
    return email.strip()


Email = Annotated[str, Field(max_length=320), AfterValidator(_check_email)]
NewPassword = Annotated[str, Field(min_length=8, max_length=1024)]
Password = Annotated[str, Field(max_length=1024)]


class SignupIn(Body):
    email: Email
    password: NewPassword
    name: Annotated[str, StringConstraints(strip_whitespace=True, max_length=200)] | None = None
    invite: str | None = Field(None, max_length=200, description="Invite code. Required if the setting SIGNUP is one.")


class LoginIn(Body):
    email: str = Field(max_length=320)
    password: Password


class PasswordIn(Body):
    current_password: Password
    new_password: NewPassword


class AccountDeletionIn(Body):
    password: Password


class UserOut(BaseModel):
    id: int
    email: str | None
    name: str | None
    created_at: str


class Token(BaseModel):
    access_token: str
    token: str = Field(description="The same as `access_token`.")
    token_type: Literal["bearer"] = "bearer"  # noqa: S105 - an authentication scheme, not a password
    expires_in: int = Field(description="Lifetime of the token in seconds.")
    user: UserOut


class Done(BaseModel):
    message: str


def _user_out(user: sql.User) -> UserOut:
    return UserOut(id=user.id, email=user.email, name=user.name, created_at=user.created_at)


@router.post(
    "/auth/signup",
    status_code=status.HTTP_201_CREATED,
    openapi_extra=errors.raises("signup_closed", "email_taken", "too_many_attempts"),
)
async def sign_up(body: SignupIn, identity: OpenIdentity, parts: OpenParts) -> Token:
    """Creates an account and returns an access token for it."""
    identity.check_signup(body.invite)
    hashed = await identity.passwords.hash(body.password)
    user = await parts.db.write(sql.insert_user, body.email, body.name, hashed)
    telemetry.note(user_id=user.id)
    return identity.token(user)


@router.post("/auth/login", openapi_extra=errors.raises("invalid_credentials", "too_many_attempts"))
async def log_in(body: LoginIn, request: Request, identity: OpenIdentity, parts: OpenParts) -> Token:
    """Returns an access token. A wrong password and an unknown e-mail get the same error after the same time, so that
    nobody can find out which e-mails have an account."""
    email = body.email.strip()
    user = parts.db.read(sql.select_user_by_email, email)
    who = (f"login {sql.email_key(email)}", _address(request))
    new_hash = await identity.passwords.verify(body.password, user and user.password, identity.throttle, who)
    if user is None:  # cannot happen, because `verify` raises without a hash; mypy needs the check
        raise _unauthorized()
    telemetry.note(user_id=user.id)
    if new_hash and user.password:
        await parts.db.write(sql.update_password_hash, user.id, user.password, new_hash)
    return identity.token(user)


@router.get("/auth/me")
async def read_me(user: CurrentUser) -> UserOut:
    """Returns the account that the access token belongs to."""
    return _user_out(user)


@router.post("/auth/logout")
async def log_out(caller: CurrentCaller, parts: OpenParts) -> Done:
    """Revokes the access token of this request. The user's other tokens stay valid."""
    await parts.db.write(sql.insert_revoked_token, caller.claims.jti, caller.claims.expires_at)
    return Done(message="Logged out")


@router.put("/auth/password", openapi_extra=errors.raises("invalid_credentials", "too_many_attempts"))
async def change_password(
    body: PasswordIn, request: Request, user: CurrentUser, identity: OpenIdentity, parts: OpenParts
) -> Token:
    """Changes the password, revokes all earlier tokens of the user, and returns a new one."""
    await _confirm(user, body.current_password, request, identity)
    hashed = await identity.passwords.hash(body.new_password)
    changed = await parts.db.write(sql.update_password, user.id, hashed)
    if changed is None:
        raise _unauthorized()  # another request has deleted the account since it was read
    return identity.token(changed)


@router.delete("/auth/me", openapi_extra=errors.raises("invalid_credentials", "too_many_attempts"))
async def delete_me(
    body: AccountDeletionIn, request: Request, user: CurrentUser, identity: OpenIdentity, parts: OpenParts
) -> Done:
    """Deletes the account with all its projects, sessions, messages, images and files, and its conversations in the
    gateway."""
    await _confirm(user, body.password, request, identity)
    await parts.turns.delete(sql.delete_user, user.id)
    return Done(message="Account deleted")


async def _confirm(user: sql.User, password: str, request: Request, identity: Identity) -> None:
    who = (f"user {user.id}", _address(request))
    await identity.passwords.verify(password, user.password, identity.throttle, who)


def _address(request: Request) -> str:
    return request.client.host if request.client else ""
