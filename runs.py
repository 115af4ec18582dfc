"""One run of the agent for one reply: asks the gateway and reads its answer, or recovers what a dead worker left."""

import asyncio
import logging
import time
from collections.abc import Sequence
from contextlib import aclosing
from typing import NamedTuple

import errors
import gateway
import image_handler
import sql
import telemetry
from database import Database
from replies import LiveReply
from sql import Status

log = logging.getLogger("clawd.turns")

RETRY_AFTER = 0.3  # seconds before the only retry, which follows a failure to connect to the gateway


class Outcome(NamedTuple):
    """How a run ended. `finish_reason` is the model's own reason for ending a complete reply early."""

    status: Status
    usage: dict[str, int] | None = None
    error: sql.Failure | None = None
    finish_reason: str | None = None


def failed(error: errors.AppError) -> Outcome:
    """The outcome of a run that this error ended."""
    retryable = isinstance(error, errors.GatewayError) and error.retryable
    status: Status = "interrupted" if isinstance(error, errors.Interrupted) else "failed"
    return Outcome(status, error={"code": error.code, "message": error.message, "retryable": retryable})


def interrupted() -> Outcome:
    """The outcome of a run whose process ended."""
    return failed(
        errors.Interrupted(
            "The service stopped before the reply was complete. The text that had arrived is kept. "
            "Send the message again.",
            retryable=True,
        )
    )


class Runs:
    """The agent, as turns use it: the gateway, with what a request to it is made of."""

    def __init__(
        self,
        db: Database,
        openclaw: gateway.Gateway,
        images: image_handler.ImageStore,
        metrics: telemetry.Metrics,
    ) -> None:
        self._db = db
        self._gateway = openclaw
        self._images = images
        self._metrics = metrics

    async def ask(self, reply: LiveReply) -> Outcome:
        """Sends the message of a turn and reads the answer into its reply. Raises errors.GatewayError."""
        turn = self._db.read(sql.select_turn, reply.id)
        if turn is None or turn.stop_requested:  # its session was deleted, or it was stopped before it began
            return Outcome("stopped")
        telemetry.note(user_id=turn.user_id)
        files = self._db.read(sql.select_image_files, turn.message_id)
        request = gateway.build_request(
            agent_id=turn.agent_id,
            session_key=turn.session_key,
            project=(turn.project_name, turn.project_description, turn.project_path),
            text=turn.text,
            images=await asyncio.to_thread(self._image_parts, files) if files else [],
        )
        try:
            return await self._read(request, reply)
        except errors.GatewayUnavailable:
            # No connection was made, so the agent has not received the message and a retry cannot make it act twice.
            await asyncio.sleep(RETRY_AFTER)
        except errors.GatewayError as error:
            if reply.length or error.code != "gateway_error" or not await self._restore(turn):
                raise
        return await self._read(request, reply)

    async def _restore(self, turn: sql.Turn) -> bool:
        """Restores a conversation that the gateway has archived; True if it had. The gateway does not say so itself,
        and refuses every message of such a conversation before its agent sees it."""
        try:
            return await self._gateway.restore(turn.agent_id, turn.session_key)
        except errors.GatewayError as error:
            log.warning("could not ask the gateway whether the conversation is archived: %s", error.message)
            return False

    def _image_parts(self, files: Sequence[str]) -> list[dict[str, object]]:
        return [image_handler.content_part(self._images.load(file)) for file in files]

    async def _read(self, request: gateway.ChatRequest, reply: LiveReply) -> Outcome:
        usage, reason, asked = None, None, time.monotonic()
        async with aclosing(self._gateway.stream(request)) as chunks:
            async for text, run_id, usage, reason in chunks:  # noqa: B007 - the last ones are read below
                reply.run_id = run_id
                if text and not reply.length:
                    reply.first_after = time.monotonic() - asked
                    self._metrics.time_first_token(reply.first_after)
                reply.append(text)
        return Outcome("complete" if reply.length else "empty", usage, finish_reason=_limit(reason))

    async def recover(self, reply: LiveReply) -> Outcome:
        """Completes a dead worker's reply from the gateway's history, or else ends it as interrupted."""
        turn = self._db.read(sql.select_turn, reply.id)
        if turn is None or turn.stop_requested:
            return Outcome("stopped")
        telemetry.note(user_id=turn.user_id)
        known = self._db.read(sql.select_known_runs, turn.session_id)
        try:
            found = await self._gateway.finished_reply(
                turn.agent_id,
                turn.session_key,
                asked=turn.text,
                run_id=turn.run_id,
                known=known,
                got=reply.text(),
                since=turn.asked_at,
            )
        except errors.GatewayError as error:
            log.warning("could not recover reply %d, ending it as interrupted: %s", reply.id, error.message)
            found = None
        if found is None:
            return interrupted()
        reply.run_id = found.run_id
        reply.append(found.text[reply.length :])
        if not found.complete:
            return interrupted()
        return Outcome("complete", found.usage, finish_reason=_limit(found.finish_reason))


def _limit(reason: str | None) -> str | None:
    """Returns the model's reason for ending a reply early; None if it ended it of its own accord."""
    return None if reason == "stop" else reason
