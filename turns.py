"""The life of a turn: one user message and the work of getting the agent's reply to it.

A turn is a task of the process, not of a request, so it continues when its client disconnects. It reads the gateway's
stream into a `LiveReply`, for the readers in this process, and stores the text in the reply's row, which is the source
of truth: other processes follow the row. `Turns` also recovers the turns of dead workers and runs outbox jobs. A worker
is dead if no process holds the lock of its lease.
"""

import asyncio
import hashlib
import logging
import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from sqlite3 import Connection
from typing import Concatenate, NamedTuple, ParamSpec

import errors
import image_handler
import sql
import telemetry
from background import Tasks, completed, repeat
from database import Database
from outbox import Outbox
from replies import LiveReply, Replies
from runs import Outcome, Runs, failed, interrupted

P = ParamSpec("P")

log = logging.getLogger("clawd.turns")

STORE_EVERY = 0.2  # seconds between two writes of the texts that grew; docs/reliability.md promises 250 ms
WATCH_EVERY = 0.1  # seconds between two checks for commits of other processes
REAP_EVERY = 3.0  # seconds between two searches for turns of dead workers; docs/reliability.md promises 15 s
STOP_WITHIN = 3.0  # seconds that a stop waits for a turn to end, in this process or another one
LABEL_LENGTH = 60  # maximum characters of a session label that is taken from a message
END_WITHIN = 5.0  # seconds, after DRAIN_SECONDS, within which a process gives up what is left to do


LAST_RESORT = sql.Ending(
    *("failed", "", None, None),  # the text that is stored is kept
    error={
        "code": "internal_error",
        "message": "An internal error ended this reply. Its cause is in the service's log.",
        "retryable": False,
    },
    finish_reason=None,
)


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


@dataclass(slots=True)
class _Running:
    """A turn that this process runs."""

    reply: LiveReply
    work: "asyncio.Task[Outcome]"  # the task that a stop cancels
    stored: int  # number of characters that are stored
    run_id: str | None = None  # the gateway's run id that is stored
    ending: Outcome | None = None  # the outcome to store if the task is cancelled


class _RemovedError(Exception):
    """A request that was refused has just removed the file of an image that this one also has."""


class Turns:
    """The turns that one process runs. The database coordinates them with the turns of other processes."""

    def __init__(
        self,
        db: Database,
        runs: Runs,
        images: image_handler.ImageStore,
        outbox: Outbox,
        metrics: telemetry.Metrics,
        drain_seconds: float,
    ) -> None:
        self._db = db
        self._runs = runs
        self._images = images
        self._outbox = outbox
        self._metrics = metrics
        self._drain_seconds = drain_seconds
        self.replies = Replies(db)
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
            asyncio.create_task(repeat(STORE_EVERY, self._store_texts, log, "store the texts of running replies")),
            asyncio.create_task(repeat(WATCH_EVERY, self._watch, log, "follow the commits of other processes")),
            asyncio.create_task(repeat(REAP_EVERY, self._reap, log, "look for work of dead workers")),
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
        """Lets running turns finish. After `DRAIN_SECONDS` they end as `interrupted` and keep the text so far.

        Returns END_WITHIN seconds after that at the latest. What is not done by then is left to other workers.
        """
        deadline = time.monotonic() + self._drain_seconds + END_WITHIN
        await self.retire()
        if self._running:
            log.info("waiting up to %g s for %d running turns to finish", self._drain_seconds, len(self._running))
            await asyncio.wait([running.work for running in self._running.values()], timeout=self._drain_seconds)
        while self._tasks and time.monotonic() < deadline:
            # Requests may have begun more turns during the wait, so each round cancels all that are running then.
            for reply_id in list(self._running):
                self._cancel(reply_id, interrupted())
            await self._tasks.wait(seconds=0.1)
        await self._outbox.close(max(deadline - time.monotonic(), 0))

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
        turn = sql.NewTurn(user_id, session_key, said.text, said.label(), said.digest(), key, self.owner)
        if said.images:
            begun = await self._begin_with_images(turn, said.images)
        else:
            begun = await self._db.write(sql.begin_turn, turn)
        if begun.existing:
            reply = await self.replies.get(begun.reply_id)
            if reply is None:
                raise errors.NotFound("The session was deleted while the message was sent.", code="session_not_found")
        else:
            reply = self.replies.add(LiveReply(begun.reply(self.owner)))
        if reply.status == "streaming" and not begun.existing:
            self._start(reply, self._runs.ask, asked_here=True)
        elif self.draining:
            # This worker claims no more turns: without the release, the turn would stay queued until the process ends.
            await self._db.write(sql.release_waiting, self.owner)
        return reply, begun.existing

    async def _begin_with_images(self, turn: sql.NewTurn, images: Sequence[image_handler.Image]) -> sql.Begun:
        """Publishes the images before their rows are stored, and removes them if the turn is refused."""
        files = await asyncio.to_thread(self._images.save, turn.session_key, images)

        def store(conn: Connection) -> sql.Begun:
            begun = sql.begin_turn(conn, turn)
            if not begun.existing:
                if not self._images.exist(files):
                    raise _RemovedError
                sql.insert_images(conn, begun.message_id, files)
            return begun

        try:
            return await self._db.write(store)
        except _RemovedError:
            return await self._begin_with_images(turn, images)
        except errors.AppError:
            # Another message of the session may have the same image, so only files without a row are removed.
            await self._db.write(lambda conn: self._images.remove(sql.without_row(conn, files)))
            raise

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
            running = _Running(reply, task, reply.length)
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
            return failed(error)
        except asyncio.CancelledError:
            return running.ending or interrupted()
        except Exception:
            log.exception("unexpected error in the turn of reply %d, ending it as failed", running.reply.id)
            return Outcome("failed", error=LAST_RESORT.error)

    async def _finish(self, reply: LiveReply, outcome: Outcome) -> None:
        """Stores how a turn ended, however often it takes. A worker that ends leaves that to another one."""
        status, usage, error, reason = outcome
        ending = sql.Ending(status, reply.text(), reply.run_id, usage, error, reason)
        while True:
            try:
                ours = await self._db.write(sql.finish_turn, reply.id, self.owner, ending)
                break
            except errors.Unavailable:
                if self.draining:
                    log.error("could not store the end of reply %d, leaving it to another worker", reply.id)
                    return
                log.error("could not store the end of reply %d, retrying in 1 s", reply.id)
                await asyncio.sleep(1)
            except Exception:
                if ending == LAST_RESORT:
                    raise
                # One value that cannot be stored must not leave the row `streaming` for ever.
                log.exception("cannot store the end of reply %d as it is, ending it as failed", reply.id)
                ending = LAST_RESORT
        if ours:
            reply.end(ending)
        else:  # it was deleted, or another worker has ended it
            await self.replies.follow(reply)

    # --- periodic work ---

    async def _store_texts(self) -> None:
        behind = [
            running
            for running in self._running.values()
            if (running.stored, running.run_id) != (running.reply.length, running.reply.run_id)
        ]
        # One reply that cannot be stored must not keep the others from it. The writer commits them together.
        results = await asyncio.gather(*map(self._store_text, behind), return_exceptions=True)
        for failure in results:
            if failure is not None:
                raise failure

    async def _store_text(self, running: _Running) -> None:
        reply, run_id = running.reply, running.reply.run_id
        new = reply.text(running.stored)
        stored = await self._db.write(sql.append_text, self.owner, reply.id, running.stored, new, run_id)
        if stored is None:
            self._cancel(reply.id, Outcome("stopped"))  # its row was deleted, or is not this worker's any more
        else:
            running.stored, running.run_id = stored, run_id

    async def _watch(self) -> None:
        version = self._db.version()
        if version == self._seen_version:
            return
        await self.replies.follow_all(but=self._running)
        owned = self._db.read(sql.select_running, self.owner)
        for reply_id in list(self._running):
            if reply_id not in owned or owned[reply_id].stop_requested:  # deleted, taken over, or to be stopped
                self._cancel(reply_id, Outcome("stopped"))
        await self._claim()
        self._seen_version = version  # only now: what failed on the way is done again

    async def _claim(self) -> None:
        """Claims queued turns that may run, and starts what this worker owns."""
        if not self.draining and self._db.read(sql.select_claimable, self.owner):
            await self._db.write(sql.claim_turns, self.owner)
            await self._start_owned()

    async def _start_owned(self) -> None:
        """Starts the running turns that this worker owns and does not work on, whatever came between."""
        for reply_id, owned in self._db.read(sql.select_running, self.owner).items():
            if reply_id in self._running:
                continue
            try:
                reply = await self.replies.get(reply_id)
                if reply is not None:
                    await self.replies.follow(reply)  # a copy that was read before its owner died may lack text
                    self._start(reply, self._runs.recover if owned.inherited else self._runs.ask)
            except Exception:
                log.exception("could not start the turn of reply %d, retrying in %g s", reply_id, REAP_EVERY)

    async def _reap(self) -> None:
        if self.draining:
            return
        for owner in self._db.read(sql.select_owners):
            if not self._db.lease.alive(owner):
                await self._db.write(sql.inherit, owner, self.owner)
        await self._claim()
        await self._start_owned()
        jobs = await self._outbox.claim_due_jobs()
        # Read after the jobs: a delete stores its jobs and removes its turns in one transaction.
        owned = self._db.read(sql.select_running, self.owner)
        await self._end_runs([reply_id for reply_id in self._running if reply_id not in owned])
        await self._outbox.run(jobs)

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
        if left := list(filter(self._is_running, halted.running)):
            log.warning("replies %s did not stop within %g s, ending them without their worker", left, STOP_WITHIN)
            await self._db.write(sql.stop_turns, left)
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
        await self._end_runs(deleted.running)
        await self._outbox.run(deleted.jobs)

    async def _end_runs(self, deleted: Sequence[int]) -> None:
        """Ends the runs of deleted replies in this process before their sessions are deleted in the gateway: an open
        run could create its session there again."""
        for reply_id in deleted:
            self._cancel(reply_id, Outcome("stopped"))
        if ending := [self._running[reply_id].work for reply_id in deleted if reply_id in self._running]:
            await asyncio.wait(ending, timeout=STOP_WITHIN)
