"""Exception classes and error codes. `web` maps each class to its HTTP status."""


class AppError(Exception):
    """Base class of the errors that the API returns to its caller.

    `message` states what happened and what the caller can do; it must not contain secrets. `code` is machine-readable
    and does not change between releases. `retry_after` is in seconds. `message_id` is the id of the reply that failed,
    which keeps the text received so far.
    """

    code: str = "internal_error"  # default of the class; an instance can have another one

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
    """A value of the request is invalid."""

    code = "invalid_request"


class Unprocessable(AppError):
    """The request is valid by itself but contradicts an earlier one."""

    code = "unprocessable"


class Unauthorized(AppError):
    """The request has no valid credentials."""

    code = "unauthorized"


class Forbidden(AppError):
    """The configuration of the service does not allow the request."""

    code = "forbidden"


class NotFound(AppError):
    """The requested thing does not exist or belongs to another user. Both cases give the same error, so that nobody can
    find out which ids exist."""

    code = "not_found"


class Conflict(AppError):
    """The request conflicts with existing data."""

    code = "conflict"


class TooLarge(AppError):
    """The request exceeds a size limit, which the message names."""

    code = "too_large"


class Unsupported(AppError):
    """The media type of the data is not supported."""

    code = "unsupported"


class TooMany(AppError):
    """A rate limit or the capacity of a queue is exceeded. `retry_after` states when to try again."""

    code = "too_many"


class Unavailable(AppError):
    """The service cannot do this now: the database, disk or gateway cannot be used, or the process is stopping."""

    code = "unavailable"


class GatewayError(AppError):
    """OpenClaw returned no reply or an incomplete one. `retryable`: sending the same message again may succeed."""

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
    """The gateway could not be reached, so the agent has not received the message."""

    code = "gateway_unavailable"


class GatewayTimeout(GatewayError):
    """The gateway sent nothing within the time limit, which for a reply is `CLAWDBOT_TIMEOUT`."""

    code = "gateway_timeout"


class Interrupted(GatewayError):
    """The process of this service ended while the reply was running."""

    code = "interrupted"


# Each code that routes return, with its class. `web.HTTP_ERRORS` has the codes of requests that reach no route.
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
    """Returns the `openapi_extra` of a route that can fail with these codes. `web.describe` turns it into the error
    responses of the OpenAPI document."""
    return {"x-errors": list(codes)}


def failure(code: str, message: str, retryable: bool, message_id: int | None = None) -> AppError:
    """Returns the exception for a failure that was stored with a reply. Its class is that of `code` if this is a code
    of the gateway, otherwise AppError."""
    kind = CODES.get(code, AppError)
    if not issubclass(kind, GatewayError):
        return AppError(message, code=code, message_id=message_id)
    retry_after = 1 if kind in (GatewayUnavailable, Interrupted) else None
    return kind(message, retryable=retryable, code=code, retry_after=retry_after, message_id=message_id)
