"""Translates the gateway's failures into errors that say what happened, who can fix it, and whether to retry."""

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import aiohttp

import errors


def no_completion() -> errors.GatewayError:
    """Returns the error for an answer that OpenClaw would not give, such as a web page."""
    return errors.GatewayError(
        "The server at CLAWDBOT_BASE_URL did not answer as OpenClaw does. The operator should check that address.",
        retryable=False,
    )


def incomplete() -> errors.GatewayError:
    """Returns the error for a connection that broke before the reply was complete."""
    return errors.GatewayError(
        "The connection to OpenClaw broke before the reply was complete. Send the message again.",
        code="gateway_incomplete",
        retryable=True,
    )


def unavailable(retry_after: float = 5) -> errors.GatewayUnavailable:
    """Returns the error for a gateway that suspends or drains: it finishes what runs and accepts nothing new."""
    return errors.GatewayUnavailable(
        "OpenClaw is suspending or restarting and accepts nothing new until it is back. Try again in a few seconds. "
        "If the error persists, the operator should restart the gateway (openclaw gateway run).",
        retryable=True,
        retry_after=max(1, round(retry_after)),
    )


def refused(status: int, retry_after: str | None, body: str = "") -> errors.GatewayError:
    """Returns the error for a status other than 200. `retry_after` is the value of that header, `body` the answer."""
    if status in (401, 403):
        return errors.GatewayError(
            "OpenClaw rejected this service's token. The operator should set CLAWDBOT_TOKEN to the gateway's "
            "gateway.auth.token and restart this service.",
            code="gateway_auth",
            retryable=False,
        )
    if status == 404:
        return errors.GatewayError(
            "OpenClaw's chat endpoint is disabled. The operator should set "
            "gateway.http.endpoints.chatCompletions.enabled to true in openclaw.json and restart the gateway.",
            code="gateway_endpoint_disabled",
            retryable=False,
        )
    if status == 429:
        wait = int(retry_after) if retry_after and retry_after.isdecimal() else 10
        return errors.GatewayError(
            f"OpenClaw accepts no more requests at the moment. Try again in {wait} seconds.",
            retryable=True,
            retry_after=wait,
        )
    if status == 413:
        return errors.GatewayError(
            "The message is larger than OpenClaw accepts (20 MB with encoded images). Send fewer or smaller images.",
            retryable=False,
        )
    if status >= 500:
        failed = errors.GatewayError(
            f"OpenClaw failed (status {status}). Try again. If the error persists, the operator should look at the "
            "gateway's log.",
            retryable=True,
        )
        return unavailable() if _code_of(body) == "gateway_unavailable" else failed
    return errors.GatewayError(
        f"OpenClaw refused the message (status {status}). Check that the session's agent exists in OpenClaw. The "
        "gateway's answer is in this service's log.",
        retryable=False,
    )


def _code_of(body: str) -> object:
    try:
        error = json.loads(body)["error"]
        return error.get("code")
    except (ValueError, RecursionError, LookupError, TypeError, AttributeError):
        return None  # the body of a proxy, or of another program


@asynccontextmanager
async def explained(url: str) -> AsyncIterator[None]:
    """Translates the exceptions of aiohttp in its block into errors.GatewayError."""
    try:
        yield
    except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError) as error:
        raise errors.GatewayUnavailable(
            f"OpenClaw cannot be reached at {url}. The operator should start it (openclaw gateway run) or correct "
            "CLAWDBOT_BASE_URL.",
            retryable=True,
            retry_after=5,
        ) from error
    except TimeoutError as error:  # before ClientError, since aiohttp's timeouts are subclasses of both
        raise errors.GatewayTimeout(
            "OpenClaw sent nothing for longer than CLAWDBOT_TIMEOUT allows. Try again, or have the operator raise it.",
            retryable=True,
        ) from error
    except aiohttp.WSServerHandshakeError as error:
        if error.status == 503:  # OpenClaw's answer while it suspends or drains
            raise unavailable() from error
        raise (refused(error.status, None) if error.status in (401, 403, 429) else no_completion()) from error
    except aiohttp.ClientResponseError as error:
        raise no_completion() from error
    except aiohttp.ClientError as error:
        raise incomplete() from error
