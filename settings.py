"""The settings: read once from the environment and `.env`, validated, and passed on by `app`."""

import re
from pathlib import Path
from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import AfterValidator, Field, SecretStr, ValidationError, field_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

CHECKOUT = Path(__file__).resolve().parent
MIN_INVITE_CODE = 8  # characters
SWITCHES = {"disabled", "enabled", "invite-only", "invite_only", "restricted", "register", "everybody", "everyone"}
# Parts of secrets that examples and templates contain, and that people leave as they are.
PLACEHOLDERS = (
    *("changeme", "change-me", "change_me", "change this", "change-this", "change_this", "replace-me", "placeholder"),
    *("your-secret", "your_secret", "yoursecret", "256-bit", "supersecret", "super-secret", "super_secret", "insecure"),
    *("secretkey", "secret-key", "secret_key", "jwt-secret", "jwt_secret", "jwtsecret", "example"),
)


def _absolute(path: Path) -> Path:
    """Returns an absolute path. Expands `~`; a relative path starts at the checkout, not at the working directory."""
    try:
        return (CHECKOUT / path.expanduser()).resolve()
    except RuntimeError as error:  # raised for `~name` if there is no such user
        raise ValueError(str(error)) from None


def _http_url(url: str) -> str:
    """Returns an http(s) URL without its trailing slash. Raises ValueError for anything else."""
    parts = urlsplit(url)
    _ = parts.port  # raises ValueError for an invalid port
    plain = re.fullmatch(r"[\x21-\x7e]+", url) and not (parts.query or parts.fragment or "@" in parts.netloc)
    if parts.scheme not in ("http", "https") or not parts.hostname or not plain:
        raise ValueError("write it as http://host:port")
    return url.rstrip("/")


def _printable(secret: SecretStr) -> SecretStr:
    """Returns the token of the gateway, which is sent in a header. Raises ValueError if it contains control characters,
    because a header cannot contain them."""
    if re.search(r"[\x00-\x1f\x7f]", secret.get_secret_value()):
        raise ValueError("remove the control character, perhaps a line break")
    return secret


def _bearer(secret: SecretStr) -> SecretStr:
    """Returns a token that callers send to this service in a header. Raises ValueError if it is easy to guess or does
    not fit into a header."""
    if not re.fullmatch(r"[\x21-\x7e]{16,}", secret.get_secret_value()):
        raise ValueError("use at least 16 printable ASCII characters without spaces")
    return secret


def _signing_secret(secret: SecretStr) -> SecretStr:
    """Returns the secret that signs tokens. Raises ValueError if it is a well-known placeholder or hardly random:
    whoever guesses it can log in as anybody."""
    value = secret.get_secret_value()
    repeats = any(value == (value[:period] * len(value))[: len(value)] for period in range(1, 17))
    if repeats or len(set(value)) < 8 or any(word in value.lower() for word in PLACEHOLDERS):
        raise ValueError("it is easy to guess; generate one, for example with: openssl rand -hex 32")
    return secret


def _signup(secret: SecretStr) -> SecretStr:
    """Returns `open`, `closed` or an invite code. Raises ValueError for a code that is short or looks like a switch:
    `SIGNUP=false` once let everybody in who wrote `false`."""
    value = secret.get_secret_value()
    if value.strip().lower() in ("open", "closed"):
        return SecretStr(value.strip().lower())
    if len(value) < MIN_INVITE_CODE or value.strip().lower() in SWITCHES:
        raise ValueError(f"write `open`, `closed`, or an invite code of at least {MIN_INVITE_CODE} characters")
    return secret


AbsolutePath = Annotated[Path, AfterValidator(_absolute)]
HttpUrl = Annotated[str, AfterValidator(_http_url)]


class Settings(BaseSettings):
    """The settings of one app, from environment variables of the same names in capitals or from a file `.env` in the
    checkout; variables take precedence. An empty variable counts as unset. Times are in seconds."""

    model_config = SettingsConfigDict(
        env_file=CHECKOUT / ".env", env_ignore_empty=True, extra="ignore", frozen=True, validate_default=True
    )

    db_path: AbsolutePath = Path("clawdbot_adapter.db")
    data_dir: AbsolutePath | None = None
    projects_dir: AbsolutePath | None = None
    clawdbot_base_url: HttpUrl = "http://localhost:18789"
    clawdbot_token: Annotated[SecretStr, AfterValidator(_printable)] = SecretStr("")
    clawdbot_timeout: float = Field(1800, gt=0, le=172_800)
    public_base_url: HttpUrl | None = None
    cors_origins: Annotated[tuple[str, ...], NoDecode] = ("*",)
    jwt_secret: Annotated[SecretStr, Field(min_length=32), AfterValidator(_signing_secret)] | None = None
    token_ttl: int = Field(7 * 86_400, ge=60, le=366 * 86_400)
    signup: Annotated[SecretStr, Field(max_length=200), AfterValidator(_signup)] = SecretStr("open")
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"
    log_format: Literal["plain", "json"] = "plain"
    metrics_token: Annotated[SecretStr, AfterValidator(_bearer)] | None = None
    ping_seconds: float = Field(10, gt=0, le=15)
    drain_seconds: float = Field(5, ge=0, le=3600)

    @field_validator("cors_origins", mode="before")
    @classmethod
    def _split_origins(cls, value: object) -> object:
        if not isinstance(value, str):
            return value
        origins = tuple(origin.strip().rstrip("/").lower() for origin in value.split(",") if origin.strip())
        for origin in origins:
            if origin != "*" and (_http_url(origin) != origin or urlsplit(origin).path):
                raise ValueError("write * or a comma-separated list of http://host:port")
        return origins or ("*",)

    @field_validator("log_level", mode="before")
    @classmethod
    def _upper(cls, value: object) -> object:
        return value.upper() if isinstance(value, str) else value

    @field_validator("log_format", mode="before")
    @classmethod
    def _lower(cls, value: object) -> object:
        return value.lower() if isinstance(value, str) else value

    @property
    def secrets(self) -> list[str]:
        """The values that must not appear in the log, which `telemetry` replaces there."""
        kept = (self.clawdbot_token, self.jwt_secret, self.signup, self.metrics_token)
        return [secret.get_secret_value() for secret in kept if secret is not None]

    @property
    def data(self) -> Path:
        """Directory of images and the generated secret: `DATA_DIR`, or else the directory of the database."""
        return self.data_dir or self.db_path.parent

    @property
    def projects(self) -> Path:
        """Directory of the project folders: `PROJECTS_DIR`, or else `projects` in the data directory."""
        return self.projects_dir or self.data / "projects"

    @property
    def images(self) -> Path:
        """Directory of the images of messages."""
        return self.data / "images"


def load_settings() -> Settings:
    """Returns the settings of this process. Raises SystemExit with one line that names each invalid variable and the
    rule that its value breaks."""
    try:
        return Settings()
    except ValidationError as error:
        wrong = "; ".join(
            f"{str(item['loc'][0]).upper()}: {item['msg'].removeprefix('Value error, ')}"
            for item in error.errors(include_input=False)
        )
        raise SystemExit(f"clawd-backend cannot start, wrong setting: {wrong}") from None
