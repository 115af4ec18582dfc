"""The gateway's failures in our words: what went wrong, who can act on it, and whether to try again."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import aiohttp

import errors


def no_completion() -> errors.GatewayError:
    """The answer is not a chat completion."""
    return errors.GatewayError(
        "What answers at CLAWDBOT_BASE_URL does not speak OpenClaw's chat completions: the operator should "
        "check that address.",
        retryable=False,
    )


def incomplete() -> errors.GatewayError:
    """The connection broke before the reply was complete."""
    return errors.GatewayError(
        "The connection to OpenClaw broke before the reply was complete. Send the message again.",
        code="gateway_incomplete",
        retryable=True,
    )


def refused(status: int, retry_after: str | None) -> errors.GatewayError:
    """What a status other than 200 means, in words that say what to do."""
    if status in (401, 403):
        return errors.GatewayError(
            "OpenClaw does not accept our token: the operator should set CLAWDBOT_TOKEN to the gateway's "
            "gateway.auth.token and restart this service.",
            code="gateway_auth",
            retryable=False,
        )
    if status == 404:
        return errors.GatewayError(
            "OpenClaw's chat endpoint is off: the operator should set "
            "gateway.http.endpoints.chatCompletions.enabled to true in openclaw.json and restart the gateway.",
            code="gateway_endpoint_disabled",
            retryable=False,
        )
    if status == 429:
        wait = int(retry_after) if retry_after and retry_after.isdecimal() else 10
        return errors.GatewayError(
            f"OpenClaw takes no more requests for now. Try again in {wait} seconds.",
            retryable=True,
            retry_after=wait,
        )
    if status == 413:
        return errors.GatewayError(
            "The message is larger than OpenClaw takes (20 MB with its images encoded): send fewer or smaller images.",
            retryable=False,
        )
    if status >= 500:
        return errors.GatewayError(
            f"OpenClaw failed inside (status {status}). Try again; if it goes on, the operator should look at "
            "the gateway's log.",
            retryable=True,
        )
    return errors.GatewayError(
        f"OpenClaw refused the message (status {status}). Check that the session's agent exists there; the "
        "gateway's own words are in this service's log.",
        retryable=False,
    )


@asynccontextmanager
async def explained(url: str) -> AsyncIterator[None]:
    """Turns what the client library raises into what it means for the turn."""
    try:
        yield
    except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError) as error:
        raise errors.GatewayUnavailable(
            f"OpenClaw cannot be reached at {url}: the operator should start it (openclaw gateway run) or "
            "correct CLAWDBOT_BASE_URL.",
            retryable=True,
            retry_after=5,
        ) from error
    except TimeoutError as error:  # aiohttp's time-outs are of this class too
        raise errors.GatewayTimeout(
            "OpenClaw was silent for longer than CLAWDBOT_TIMEOUT allows. Try again, or let the operator raise it.",
            retryable=True,
        ) from error
    except aiohttp.ClientResponseError as error:
        raise no_completion() from error
    except aiohttp.ClientError as error:
        raise incomplete() from error
