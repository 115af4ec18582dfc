"""The life of a turn: one user message and the work of getting the agent's reply to it.

A turn is a task of the process, not of a request, so it continues when its client disconnects. It reads the gateway's
stream into a `LiveReply`, for the readers in this process, and stores the text in the reply's row, which is the source
of truth: other processes follow the row. `Turns` also recovers the turns of dead workers and runs outbox jobs. A worker
is dead if nothing holds the lock of its lease.
"""

import asyncio
import hashlib
import logging
import time
from collections.abc import Callable, Coroutine, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from sqlite3 import Connection
from typing import Concatenate, NamedTuple, ParamSpec
from weakref import WeakValueDictionary

import errors
import gateway
import image_handler
import sql
import telemetry
from background import Tasks, completed, repeat
from database import Database
from outbox import Outbox
from replies import LiveReply
from settings import Settings
from sql import Status

P = ParamSpec("P")

log = logging.getLogger("clawd.turns")

STORE_EVERY = 0.2  # seconds between two writes of the texts that grew; docs/reliability.md promises 250 ms
WATCH_EVERY = 0.1  # seconds between two checks for commits of other processes
REAP_EVERY = 3.0  # seconds between two searches for turns of dead workers; docs/reliability.md promises 15 s
STOP_WITHIN = 3.0  # seconds that a stop waits for a turn to end, in this process or another one
LABEL_LENGTH = 60  # maximum characters of a session label that is taken from a message
RETRY_AFTER = 0.3  # seconds before the only retry, which follows a failure to connect to the gateway


class Said(NamedTuple):
    """The content of a user's message: text and images."""

    text: str
    images: Sequence[image_handler.Image]

    def digest(self) -> str:
        """Returns a SHA-256 of text and images in hexadecimal. The same message sent again has the same digest."""
        parts = [self.text, *(image.digest for image in self.images)]
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()

    def label(self) -> str:
        """Returns the first words of the text, to be the label of a session that has none."""
        words = " ".join(self.text.split())
        return words if len(words) <= LABEL_LENGTH else words[:LABEL_LENGTH].rsplit(" ", 1)[0] + "…"


class Outcome(NamedTuple):
    """How a turn ended."""

    status: Status
    usage: dict[str, int] | None = None
    error: sql.Failure | None = None


def _failed(error: errors.AppError) -> Outcome:
    retryable = isinstance(error, errors.GatewayError) and error.retryable
    status: Status = "interrupted" if isinstance(error, errors.Interrupted) else "failed"
    return Outcome(status, error={"code": error.code, "message": error.message, "retryable": retryable})


def _interrupted() -> Outcome:
    return _failed(
        errors.Interrupted(
            "The service stopped before the reply was complete. The text that had arrived is kept. "
            "Send the message again.",
            retryable=True,
        )
    )


@dataclass(slots=True)
class _Running:
    """A turn that this process runs."""

    reply: LiveReply
    work: "asyncio.Task[Outcome]"  # the task that a stop cancels
    stored: tuple[int, str | None]  # number of characters and run id that are in the row
    ending: Outcome | None = None  # the outcome to store if the task is cancelled


class Turns:
    """The turns of one process. Its database coordinates them with those of other processes."""

    def __init__(
        self,
        db: Database,
        openclaw: gateway.Gateway,
        images: image_handler.ImageStore,
        settings: Settings,
        outbox: Outbox,
        metrics: telemetry.Metrics,
    ) -> None:
        self._db = db
        self._gateway = openclaw
        self._images = images
        self._outbox = outbox
        self._metrics = metrics
        self._drain_seconds = settings.drain_seconds
        self._replies: WeakValueDictionary[int, LiveReply] = WeakValueDictionary()
        self._running: dict[int, _Running] = {}
        self._tasks = Tasks()
        self._seen_version = -1  # of the database, at the last `_watch`
        self.draining = False

    @property
    def owner(self) -> str:
        """The name of this worker's lease, which is stored as the owner of its turns."""
        return self._db.lease.name

    # --- start and end ---

    def open(self) -> None:
        """Starts the periodic tasks: store texts, watch other processes, reap dead workers."""
        self._periodic = [
            asyncio.create_task(repeat(STORE_EVERY, self._store_texts, log)),
            asyncio.create_task(repeat(WATCH_EVERY, self._watch, log)),
            asyncio.create_task(repeat(REAP_EVERY, self._reap, log)),
        ]

    @property
    def running(self) -> int:
        """The number of turns that this process runs."""
        return len(self._running)

    async def retire(self) -> None:
        """Releases the queued turns to other processes and claims no more work. Running turns continue."""
        self.draining = True
        try:
            await self._db.write(sql.release_waiting, self.owner)
        except errors.Unavailable:
            log.error("could not release this worker's queued turns; other workers claim them when it has ended")

    async def end(self) -> None:
        """Lets running turns finish. After `DRAIN_SECONDS` they end as `interrupted` and keep the text so far."""
        await self.retire()
        if self._running:
            log.info("waiting up to %g s for %d running turns to finish", self._drain_seconds, len(self._running))
            await asyncio.wait([running.work for running in self._running.values()], timeout=self._drain_seconds)
        while self._tasks:
            # Requests may have begun more turns during the wait, so each round cancels all that are running then.
            for reply_id in list(self._running):
                self._cancel(reply_id, _interrupted())
            await self._tasks.wait(seconds=0.1)
        await self._outbox.close()

    async def close(self) -> None:
        """Ends the turns as `end` does, then the periodic tasks."""
        await self.end()
        for task in self._periodic:
            task.cancel()
        await asyncio.gather(*self._periodic, return_exceptions=True)

    # --- beginning and reading ---

    async def begin(self, user_id: int, session_key: str, said: Said, key: str | None) -> tuple[LiveReply, bool]:
        """Stores a message and begins its turn, running or queued. `key` is the idempotency key.

        Returns the reply, and True if an earlier call with the same key had begun the turn. Completes even if the
        caller is cancelled: otherwise a stored turn could be left without a task. Raises errors.NotFound,
        errors.TooMany, errors.Unprocessable as `sql.begin_turn` does.
        """
        return await completed(self._begin(user_id, session_key, said, key))

    async def _begin(self, user_id: int, session_key: str, said: Said, key: str | None) -> tuple[LiveReply, bool]:
        staged = await asyncio.to_thread(self._images.stage, said.images) if said.images else []

        turn = sql.NewTurn(user_id, session_key, said.text, said.label(), said.digest(), key, self.owner)

        def store(conn: Connection) -> sql.Begun:
            begun = sql.begin_turn(conn, turn)
            if staged and not begun.existing:
                sql.insert_images(conn, begun.message_id, self._images.publish(session_key, staged))
            return begun

        try:
            begun = await self._db.write(store)
        finally:
            for image in staged:
                image.discard()
        reply = self.reply(begun.reply_id)
        if reply is None:
            raise errors.NotFound("The session was deleted while the message was sent.", code="session_not_found")
        if reply.status == "streaming" and not begun.existing:
            self._start(reply, self._ask, asked_here=True)
        elif self.draining:
            # This worker claims nothing any more: without the release, the turn would be queued until it ends.
            await self._db.write(sql.release_waiting, self.owner)
        return reply, begun.existing

    def reply(self, reply_id: int) -> LiveReply | None:
        """Returns a reply, live while it runs in this process or another one; None if it does not exist."""
        reply = self._replies.get(reply_id)
        if reply is None:
            row = self._db.read(sql.select_reply, reply_id)
            if row is None:
                return None
            reply = LiveReply(row)
            if not reply.is_final:
                self._replies[reply_id] = reply
        return reply

    # --- running ---

    def _start(
        self,
        reply: LiveReply,
        work: Callable[[LiveReply], Coroutine[object, object, Outcome]],
        *,
        asked_here: bool = False,
    ) -> None:
        if reply.id not in self._running:
            reply.status = "streaming"
            context = telemetry.turn_context(reply.session_id, reply.id, asked_here=asked_here)
            task = asyncio.create_task(work(reply), context=context)
            running = _Running(reply, task, (reply.length, None))
            self._running[reply.id] = running
            self._tasks.spawn(self._supervise(running), context)

    def _cancel(self, reply_id: int, ending: Outcome) -> None:
        running = self._running.get(reply_id)
        if running is not None and running.ending is None:
            running.ending = ending
            running.work.cancel()

    async def _supervise(self, running: _Running) -> None:
        reply, started = running.reply, time.monotonic()
        outcome = await self._outcome(running)
        try:
            await self._finish(reply, outcome)
        finally:
            del self._running[reply.id]
        if reply.is_final:
            self._metrics.count_turns(reply.status)
        took = time.monotonic() - started
        first = "" if reply.first_after is None else f" the first after {reply.first_after:.3f} s,"
        log.info(
            "reply %d in session %d is %s: %d characters,%s %.3f s",
            *(reply.id, reply.session_id, reply.status, reply.length, first, took),
            extra={"duration_ms": round(took * 1000, 1)},
        )
        await self._claim()

    async def _outcome(self, running: _Running) -> Outcome:
        try:
            return await running.work
        except errors.AppError as error:
            return _failed(error)
        except asyncio.CancelledError:
            return running.ending or _interrupted()
        except Exception:
            log.exception("unexpected error in the turn of reply %d, ending it as failed", running.reply.id)
            return _failed(errors.AppError("An internal error ended this reply. Its cause is in the service's log."))

    async def _finish(self, reply: LiveReply, outcome: Outcome) -> None:
        ending = sql.Ending(outcome.status, reply.text(), reply.run_id, outcome.usage, outcome.error)
        stored = False
        while not stored:
            try:
                await self._db.write(sql.finish_turn, reply.id, self.owner, ending)
                stored = True
            except errors.Unavailable:
                if self.draining:
                    log.error("could not store the end of reply %d, leaving it to another worker", reply.id)
                    return
                log.error("could not store the end of reply %d, retrying in 1 s", reply.id)
                await asyncio.sleep(1)
        reply.follow(self._db.read(sql.select_reply, reply.id))

    async def _ask(self, reply: LiveReply) -> Outcome:
        turn = self._db.read(sql.select_turn, reply.id)
        if turn is None:
            return Outcome("stopped")  # its session was deleted
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
        return await self._read(request, reply)

    def _image_parts(self, files: Sequence[str]) -> list[dict[str, object]]:
        return [image_handler.content_part(self._images.load(file)) for file in files]

    async def _read(self, request: gateway.ChatRequest, reply: LiveReply) -> Outcome:
        usage, asked = None, time.monotonic()
        async with aclosing(self._gateway.stream(request)) as chunks:
            async for text, run_id, usage, _ in chunks:  # noqa: B007 - the last usage is read below
                reply.run_id = run_id
                if text and not reply.length:
                    reply.first_after = time.monotonic() - asked
                    self._metrics.time_first_token(reply.first_after)
                reply.append(text)
        return Outcome("complete" if reply.length else "empty", usage)

    async def _recover(self, reply: LiveReply) -> Outcome:
        """Completes a dead worker's reply from the gateway's history, or else ends it as interrupted."""
        turn = self._db.read(sql.select_turn, reply.id)
        if turn is None:
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
                since=reply.created_at,
            )
        except errors.GatewayError as error:
            log.warning("could not recover reply %d, ending it as interrupted: %s", reply.id, error.message)
            found = None
        if found is None:
            return _interrupted()
        reply.run_id = found.run_id
        reply.append(found.text[reply.length :])
        return Outcome("complete", found.usage) if found.complete else _interrupted()

    # --- periodic work ---

    async def _store_texts(self) -> None:
        behind = [
            (running, (running.reply.length, running.reply.run_id))
            for running in self._running.values()
            if running.stored != (running.reply.length, running.reply.run_id)
        ]
        if not behind:
            return
        rows = [(running.reply.id, running.reply.text(), running.reply.run_id) for running, _ in behind]
        lost = await self._db.write(sql.update_replies, self.owner, rows)
        for running, reached in behind:
            running.stored = reached
        for reply_id in lost:
            self._cancel(reply_id, Outcome("stopped"))  # its row was deleted, or is not this worker's any more

    async def _watch(self) -> None:
        version = self._db.version()
        if version == self._seen_version:
            return
        self._seen_version = version
        for reply in list(self._replies.values()):
            if reply.id not in self._running and not reply.is_final:
                reply.follow(self._db.read(sql.select_reply, reply.id))
        owned = self._db.read(sql.select_running, self.owner)
        for reply_id in list(self._running):
            if owned.get(reply_id, True):  # a stop was requested, or the row was deleted
                self._cancel(reply_id, Outcome("stopped"))
        await self._claim()

    async def _claim(self) -> None:
        if self.draining or not self._db.read(sql.select_claimable, self.owner):
            return
        for reply_id in await self._db.write(sql.claim_turns, self.owner):
            reply = self.reply(reply_id)
            if reply is not None:
                self._start(reply, self._ask)

    async def _reap(self) -> None:
        if self.draining:
            return
        for owner in self._db.read(sql.select_owners):
            if not self._db.lease.alive(owner):
                for reply_id in await self._db.write(sql.inherit, owner, self.owner):
                    reply = self.reply(reply_id)
                    if reply is not None:
                        self._start(reply, self._recover)
        await self._claim()
        await self._outbox.run_due_jobs()

    # --- stopping and deleting ---

    async def stop(self, session_ids: Sequence[int]) -> bool:
        """Stops the running turns of these sessions, in all processes, and drops the queued ones.

        Returns True if there were any. Waits until the running turns have ended, at most STOP_WITHIN seconds.
        """
        halted = await self._db.write(sql.request_stop, session_ids)
        self._metrics.count_turns("stopped", len(halted.dropped))
        for reply_id in halted.running:
            self._cancel(reply_id, Outcome("stopped"))
        until = time.monotonic() + STOP_WITHIN
        # Another process may run a turn, and only the reply's row shows its end: there is no event to wait for.
        while any(map(self._is_running, halted.running)) and time.monotonic() < until:  # noqa: ASYNC110 - polls rows
            await asyncio.sleep(0.02)
        return bool(halted.running or halted.dropped)

    def _is_running(self, reply_id: int) -> bool:
        row = self._db.read(sql.select_reply, reply_id)
        return row is not None and row.status == "streaming"

    async def delete(
        self, statement: Callable[Concatenate[Connection, str, P], sql.Deleted], *args: P.args, **kwargs: P.kwargs
    ) -> None:
        """Deletes with `sql.delete_session`, `sql.delete_project` or `sql.delete_user`, in one transaction, and stops
        the turns that ran in the deleted sessions.

        Returns after one attempt to remove their images and folders; their sessions in the gateway are removed in the
        background. Raises what the statement raises; nothing has changed then. Completes even if the caller is
        cancelled.
        """
        await completed(self._delete(lambda conn: statement(conn, self.owner, *args, **kwargs)))

    async def _delete(self, statement: Callable[[Connection], sql.Deleted]) -> None:
        deleted = await self._db.write(statement)
        self._metrics.count_turns("stopped", deleted.dropped)
        for reply_id in deleted.running:
            self._cancel(reply_id, Outcome("stopped"))
        ending = [self._running[reply_id].work for reply_id in deleted.running if reply_id in self._running]
        if ending:  # a run that is still open could create the session in the gateway again after its deletion
            await asyncio.wait(ending, timeout=STOP_WITHIN)
        await self._outbox.run(deleted.jobs)
