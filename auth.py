"""Who is asking: passwords, tokens, the `/auth` routes, and `CurrentUser` in the signature of every other route."""

import asyncio
import hmac
import re
import secrets
import time
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Annotated, Any, Literal, NamedTuple, TypeVar, cast

from email_validator import SPECIAL_USE_DOMAIN_NAMES, EmailNotValidError, validate_email
from fastapi import APIRouter, Depends, Request, status
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from jose import JWTError, jwt
from limits import RateLimitItemPerMinute
from limits.storage import MemoryStorage
from limits.strategies import FixedWindowRateLimiter
from passlib.context import CryptContext
from passlib.exc import UnknownHashError
from pydantic import AfterValidator, BaseModel, Field, StringConstraints

import errors
import file_utils
import sql
import telemetry
from settings import Settings
from web import Body, OpenParts

T = TypeVar("T")

ISSUER = "clawd-backend"
WAITING_HASHES = 64  # logins that may wait for the one hashing thread; a hash takes some 20 ms
FAILURES_BY_CALLER = RateLimitItemPerMinute(10, 5)  # wrong passwords of one address for one account
FAILURES_BY_ACCOUNT = RateLimitItemPerMinute(100, 5)  # wrong passwords for one account, whoever tries

SPECIAL_USE_DOMAIN_NAMES.clear()  # people in a company's own network have such e-mails

router = APIRouter(tags=["auth"])


class Claims(NamedTuple):
    """What a valid token says. `expires_at` is in unix seconds."""

    user_id: int
    version: int
    jti: str
    expires_at: int


class Passwords:
    """Hashes on one thread of its own, so that logins hold up neither the event loop nor each other's streams."""

    def __init__(self) -> None:
        # OWASP's minimum for argon2id; hex_sha256 is what accounts of old have until their next login.
        self._context = CryptContext(
            schemes=["argon2", "hex_sha256"],
            deprecated=["hex_sha256"],
            argon2__type="ID",
            argon2__memory_cost=19_456,
            argon2__time_cost=2,
            argon2__parallelism=1,
        )
        self._waiting = 0

    def open(self) -> None:
        """Starts the thread and makes the hash that unknown e-mails are compared with."""
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="passwords")
        self._dummy = self._context.hash(secrets.token_hex(16))

    def close(self) -> None:
        """Ends the thread."""
        self._thread.shutdown(cancel_futures=True)

    async def hash(self, password: str) -> str:
        """The argon2id hash of a password. Raises errors.TooMany where too many wait already."""
        return await self._run(lambda: self._context.hash(password))

    async def verify(self, password: str, hashed: str | None, throttle: "Throttle", who: tuple[str, ...]) -> str | None:
        """Returns where it is the password: a better hash of it, if there is one.

        Raises errors.Unauthorized where it is not, errors.TooMany after too many that were not, or where too
        many wait. Whatever stands in place of a hash takes the time of one.
        """
        throttle.check(*who)
        return await self._run(lambda: self._verify(password, hashed, throttle, who))

    def _verify(self, password: str, hashed: str | None, throttle: "Throttle", who: tuple[str, ...]) -> str | None:
        throttle.check(*who)  # again, on the one thread: guesses sent at once are counted one after another
        if not (hashed or "").startswith("$argon2"):
            self._context.verify(password, self._dummy)
        try:
            valid, better = self._context.verify_and_update(password, hashed) if hashed else (False, None)
        except (UnknownHashError, ValueError):
            valid, better = self._context.verify(password, self._dummy), None
        if not valid:
            throttle.count(*who)
            raise errors.Unauthorized("The e-mail or the password is wrong.", code="invalid_credentials")
        return better

    async def _run(self, work: Callable[[], T]) -> T:
        if self._waiting >= WAITING_HASHES:
            raise errors.TooMany(
                "Too many people sign in at this moment. Try again in a few seconds.",
                code="too_many_attempts",
                retry_after=3,
            )
        self._waiting += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, work)
        finally:
            self._waiting -= 1


class Tokens:
    """Signs and checks access tokens: HS256, with every claim that is set also required."""

    def __init__(self, secret: bytes, ttl: int) -> None:
        """`ttl` is in seconds."""
        self._key = hmac.digest(secret, b"access-token", "sha256")
        self.ttl = ttl

    def issue(self, user: sql.User) -> str:
        """A token that speaks for a user until it expires or is revoked."""
        at = int(time.time())
        claims = {"sub": str(user.id), "ver": user.token_version, "jti": uuid.uuid4().hex}
        claims |= {"iat": at, "exp": at + self.ttl, "iss": ISSUER, "aud": ISSUER}
        return jwt.encode(claims, self._key, algorithm="HS256")

    def check(self, token: str) -> Claims:
        """What a token says. Raises errors.Unauthorized for any that is not ours, whole and of this time."""
        options = {f"require_{claim}": True for claim in ("sub", "iat", "exp", "jti", "aud", "iss")}
        try:
            if len(token) > 1024 or jwt.get_unverified_header(token) != {"alg": "HS256", "typ": "JWT"}:
                raise _unauthorized()
            claims = jwt.decode(token, self._key, ["HS256"], options, audience=ISSUER, issuer=ISSUER)
            return _claims(claims)
        except (JWTError, ValueError, KeyError, TypeError, OverflowError):
            raise _unauthorized() from None


def _claims(claims: dict[str, Any]) -> Claims:
    """The claims as `issue` writes them. Raises ValueError or KeyError for any others, signed or not."""
    subject, version, jti, expires_at = (claims[name] for name in ("sub", "ver", "jti", "exp"))
    if not re.fullmatch("[0-9]{1,18}", subject) or not re.fullmatch("[0-9a-f]{32}", jti):
        raise ValueError("a claim is not ours")
    if type(version) is not int or type(expires_at) is not int or max(version, expires_at) > sql.MAX_ID:
        raise ValueError("a claim is not ours")
    return Claims(int(subject), version, jti, expires_at)


class Throttle:
    """Counts wrong passwords in this process, over five minutes: of one caller for one account, and for one
    account whoever tries."""

    def __init__(self) -> None:
        self._limiter = FixedWindowRateLimiter(MemoryStorage())

    def check(self, account: str, caller: str) -> None:
        """Raises errors.TooMany where there were too many."""
        for limit, keys in self._limits(account, caller):
            if not self._limiter.test(limit, *keys):
                reset_at = self._limiter.get_window_stats(limit, *keys).reset_time
                raise errors.TooMany(
                    "There were too many wrong passwords for this account. Wait some minutes, then try again.",
                    code="too_many_attempts",
                    retry_after=max(1, round(reset_at - time.time())),
                )

    def count(self, account: str, caller: str) -> None:
        """One more wrong password."""
        for limit, keys in self._limits(account, caller):
            self._limiter.hit(limit, *keys)

    def _limits(self, account: str, caller: str) -> tuple[tuple[RateLimitItemPerMinute, tuple[str, ...]], ...]:
        return (FAILURES_BY_CALLER, (account, caller)), (FAILURES_BY_ACCOUNT, (account,))


class Identity:
    """What the routes here need beside the database."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self.passwords = Passwords()
        self.throttle = Throttle()

    def open(self, secret: bytes) -> None:
        """Starts the hashing thread; `secret` is what tokens are signed with."""
        self.tokens = Tokens(secret, self._settings.token_ttl)
        self.passwords.open()

    def close(self) -> None:
        """Ends the hashing thread."""
        self.passwords.close()

    def check_signup(self, invite: str | None) -> None:
        """Raises errors.Forbidden where signing up is closed, or needs an invite code that this is not."""
        signup = self._settings.signup.get_secret_value()
        if signup.lower() == "closed":
            raise errors.Forbidden("Signing up is closed here: ask the operator for an account.", code="signup_closed")
        if signup.lower() != "open" and not hmac.compare_digest((invite or "").encode(), signup.encode()):
            raise errors.Forbidden(
                "Signing up needs an invite code here: send the right one as `invite`.", code="signup_closed"
            )

    def token(self, user: sql.User) -> "Token":
        """The token object of the contract."""
        token = self.tokens.issue(user)
        return Token(access_token=token, token=token, expires_in=self.tokens.ttl, user=_user_out(user))


def load_secret(settings: Settings) -> bytes:
    """The secret that tokens and image URLs are signed with: `JWT_SECRET`, or one that is made once and kept in
    the data directory, readable by its owner alone. Raises errors.Unavailable."""
    if settings.jwt_secret is not None:
        return settings.jwt_secret.get_secret_value().encode()
    path = settings.data / "secret.key"
    secret = file_utils.create_once(path, secrets.token_hex(32).encode(), 0o600)
    if len(secret.strip()) < 32:
        message = f"{path} is too short to sign with: delete it, and everybody signs in again; or set JWT_SECRET."
        raise errors.Unavailable(message, code="disk_unavailable")
    return secret


def _unauthorized() -> errors.Unauthorized:
    return errors.Unauthorized(
        "Sign in first: this needs a valid token in the header `Authorization: Bearer <token>`.", code="unauthorized"
    )


# --- who is asking ------------------------------------------------------------------------------------


class Caller(NamedTuple):
    """The user that a request's token speaks for, and the token's claims."""

    user: sql.User
    claims: Claims


async def _identity(request: Request) -> Identity:
    return cast(Identity, request.state.identity)


OpenIdentity = Annotated[Identity, Depends(_identity)]
_bearer = HTTPBearer(auto_error=False, description="The `access_token` of a sign-up or login.")


async def _caller(
    credentials: Annotated[HTTPAuthorizationCredentials | None, Depends(_bearer)],
    identity: OpenIdentity,
    parts: OpenParts,
) -> Caller:
    if credentials is None:
        raise _unauthorized()
    claims = identity.tokens.check(credentials.credentials)
    user = parts.db.read(sql.select_user_by_token, claims.user_id, claims.version, claims.jti)
    if user is None:
        raise _unauthorized()
    telemetry.note(user_id=user.id)
    return Caller(user, claims)


async def _current_user(caller: Annotated[Caller, Depends(_caller)]) -> sql.User:
    return caller.user


CurrentCaller = Annotated[Caller, Depends(_caller)]
CurrentUser = Annotated[sql.User, Depends(_current_user)]


# --- the routes ---------------------------------------------------------------------------------------


def _check_email(email: str) -> str:
    """The e-mail without white space around it. Raises ValueError for a malformed one; whether it can be
    delivered to, on the internet or at all, is not asked."""
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
    invite: str | None = Field(None, max_length=200, description="Where SIGNUP is an invite code: that code.")


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
    token_type: Literal["bearer"] = "bearer"  # noqa: S105 - the name of a scheme
    expires_in: int = Field(description="Seconds.")
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
    """Makes an account and signs it in."""
    identity.check_signup(body.invite)
    hashed = await identity.passwords.hash(body.password)
    user = await parts.db.write(sql.insert_user, body.email, body.name, hashed)
    telemetry.note(user_id=user.id)
    return identity.token(user)


@router.post("/auth/login", openapi_extra=errors.raises("invalid_credentials", "too_many_attempts"))
async def log_in(body: LoginIn, request: Request, identity: OpenIdentity, parts: OpenParts) -> Token:
    """Signs in. A wrong password and an unknown e-mail are one answer, in words and in time."""
    email = body.email.strip()
    user = parts.db.read(sql.select_user_by_email, email)
    who = (f"login {sql.email_key(email)}", _address(request))
    better = await identity.passwords.verify(body.password, user and user.password, identity.throttle, who)
    if user is None:  # which no password fits: `verify` has raised
        raise _unauthorized()
    telemetry.note(user_id=user.id)
    if better and user.password:
        await parts.db.write(sql.update_password_hash, user.id, user.password, better)
    return identity.token(user)


@router.get("/auth/me")
async def read_me(user: CurrentUser) -> UserOut:
    """The account that the token speaks for."""
    return _user_out(user)


@router.post("/auth/logout")
async def log_out(caller: CurrentCaller, parts: OpenParts) -> Done:
    """Refuses this token from now on."""
    await parts.db.write(sql.insert_revoked_token, caller.claims.jti, caller.claims.expires_at)
    return Done(message="Logged out")


@router.put("/auth/password", openapi_extra=errors.raises("invalid_credentials", "too_many_attempts"))
async def change_password(
    body: PasswordIn, request: Request, user: CurrentUser, identity: OpenIdentity, parts: OpenParts
) -> Token:
    """Sets a new password, and refuses every earlier token of the user."""
    await _confirm(user, body.current_password, request, identity)
    hashed = await identity.passwords.hash(body.new_password)
    changed = await parts.db.write(sql.update_password, user.id, hashed)
    if changed is None:
        raise _unauthorized()  # the account was deleted meanwhile
    return identity.token(changed)


@router.delete("/auth/me", openapi_extra=errors.raises("invalid_credentials", "too_many_attempts"))
async def delete_me(
    body: AccountDeletionIn, request: Request, user: CurrentUser, identity: OpenIdentity, parts: OpenParts
) -> Done:
    """Deletes the account and everything it owns, on disk and in the gateway too."""
    await _confirm(user, body.password, request, identity)
    await parts.turns.clear(parts.db.read(sql.select_session_ids, user.id))
    await parts.db.write(sql.delete_user, user.id)
    await parts.outbox.do_errands()
    return Done(message="Account deleted")


async def _confirm(user: sql.User, password: str, request: Request, identity: Identity) -> None:
    who = (f"user {user.id}", _address(request))
    await identity.passwords.verify(password, user.password, identity.throttle, who)


def _address(request: Request) -> str:
    return request.client.host if request.client else ""
