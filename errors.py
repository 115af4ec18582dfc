"""What can go wrong, in words a person can act on. Statuses belong to `web`, which maps these classes."""


class AppError(Exception):
    """An error that its caller may read: a sentence and a stable code.

    `retry_after` is in seconds. `message_id` names the reply under which the text that came can be read.
    """

    code: str = "internal_error"  # of the class, unless an instance is given another

    def __init__(
        self,
        message: str,
        *,
        code: str | None = None,
        retry_after: int | None = None,
        message_id: int | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.code = code or self.code
        self.retry_after = retry_after
        self.message_id = message_id


class Invalid(AppError):
    """What was sent cannot be used as it is."""

    code = "invalid_request"


class Unprocessable(AppError):
    """What was sent is well formed and contradicts what was sent before."""

    code = "unprocessable"


class Unauthorized(AppError):
    """Nobody we know is asking."""

    code = "unauthorized"


class Forbidden(AppError):
    """We know who asks, or need not, and the answer is no."""

    code = "forbidden"


class NotFound(AppError):
    """It does not exist, or is not the caller's: the two are one answer."""

    code = "not_found"


class Conflict(AppError):
    """It clashes with what exists."""

    code = "conflict"


class TooLarge(AppError):
    """It is over a limit that the message names."""

    code = "too_large"


class Unsupported(AppError):
    """It is of a kind that is not taken."""

    code = "unsupported"


class TooMany(AppError):
    """Too much at once; `retry_after` says when to come again."""

    code = "too_many"


class Unavailable(AppError):
    """Something that we need here, the database or the disk, cannot be used now."""

    code = "unavailable"


class GatewayError(AppError):
    """OpenClaw gave no reply, or not all of it. `retryable`: it may answer otherwise next time."""

    code = "gateway_error"

    def __init__(
        self,
        message: str,
        *,
        retryable: bool,
        code: str | None = None,
        retry_after: int | None = None,
        message_id: int | None = None,
    ) -> None:
        super().__init__(message, code=code, retry_after=retry_after, message_id=message_id)
        self.retryable = retryable


class GatewayUnavailable(GatewayError):
    """Nothing of the request can have reached the agent."""

    code = "gateway_unavailable"


class GatewayTimeout(GatewayError):
    """The gateway was silent for longer than it may be."""

    code = "gateway_timeout"


class Interrupted(GatewayError):
    """This service stopped while the reply was on its way."""

    code = "interrupted"


# Every code that a client can meet, by what it means.
CODES: dict[str, type[AppError]] = {
    "invalid_path": Invalid,
    "invalid_image": Invalid,
    "invalid_request": Invalid,
    "no_user_message": Invalid,
    "unauthorized": Unauthorized,
    "invalid_credentials": Unauthorized,
    "signup_closed": Forbidden,
    "project_not_found": NotFound,
    "session_not_found": NotFound,
    "message_not_found": NotFound,
    "image_not_found": NotFound,
    "file_not_found": NotFound,
    "email_taken": Conflict,
    "image_too_large": TooLarge,
    "file_too_large": TooLarge,
    "unsupported_image": Unsupported,
    "idempotency_key_reused": Unprocessable,
    "too_many_attempts": TooMany,
    "session_busy": TooMany,
    "database_unavailable": Unavailable,
    "disk_unavailable": Unavailable,
    "not_ready": Unavailable,
    "gateway_error": GatewayError,
    "gateway_auth": GatewayError,
    "gateway_endpoint_disabled": GatewayError,
    "gateway_incomplete": GatewayError,
    "gateway_unavailable": GatewayUnavailable,
    "gateway_timeout": GatewayTimeout,
    "interrupted": Interrupted,
    "internal_error": AppError,
}
GATEWAY_CODES = tuple(code for code, kind in CODES.items() if issubclass(kind, GatewayError))


def raises(*codes: str) -> dict[str, list[str]]:
    """What a route's description says of its errors; `web` turns it into OpenAPI's responses."""
    return {"x-errors": list(codes)}


def failure(code: str, message: str, retryable: bool, message_id: int | None = None) -> AppError:
    """The error for a failure that was stored with a reply, of the class that its code belongs to."""
    kind = CODES.get(code, AppError)
    if not issubclass(kind, GatewayError):
        return AppError(message, code=code, message_id=message_id)
    retry_after = 1 if kind in (GatewayUnavailable, Interrupted) else None
    return kind(message, retryable=retryable, code=code, retry_after=retry_after, message_id=message_id)
