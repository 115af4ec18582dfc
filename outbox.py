"""Runs the jobs of the outbox: the removals outside the database that a delete requires, retried until they succeed."""

import asyncio
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from sqlite3 import Connection

import errors
import file_utils
import gateway
import image_handler
import sql
from background import Tasks
from database import Database
from sql import OutboxJob

log = logging.getLogger("clawd.turns")

RETRY_AT_MOST = 30  # maximum seconds between two attempts at a job
AT_ONCE = 4  # sessions that are deleted in the gateway at the same time, so that one that hangs delays few others


class Outbox:
    """Runs the jobs in the outbox of a database that this process owns."""

    def __init__(
        self, db: Database, openclaw: gateway.Gateway, images: image_handler.ImageStore, projects: Path
    ) -> None:
        """`projects` is PROJECTS_DIR. A folder that is not below it is never removed."""
        self._db = db
        self._gateway = openclaw
        self._images = images
        self._projects = projects
        self._tasks = Tasks()
        self._slots = asyncio.Semaphore(AT_ONCE)
        self._in_hand: set[str] = set()  # the targets that a task or a request of this process works on

    async def close(self, seconds: float) -> None:
        """Waits until the jobs in the background have ended, at most `seconds`. Other workers run what is left."""
        await self._tasks.wait(seconds)
        await self._tasks.cancel()

    async def claim_due_jobs(self) -> list[OutboxJob]:
        """Claims the jobs that are due and unowned. Returns them, together with those that this worker owns already
        and does not work on: something failed after it had claimed them, or another worker stored them for it."""
        owner, at = self._db.lease.name, time.time()
        if self._db.read(sql.has_due_outbox_jobs, at, RETRY_AT_MOST):
            await self._db.write(sql.claim_outbox_jobs, owner, at, RETRY_AT_MOST)
        owned = self._db.read(sql.select_outbox_jobs, owner)
        return [job for job in owned if job.target not in self._in_hand]

    @contextmanager
    def holding(self, target: str) -> Iterator[None]:
        """Keeps this worker's job with that target from being run by anybody but the caller."""
        self._in_hand.add(target)
        try:
            yield
        finally:
            self._in_hand.discard(target)

    async def run(self, jobs: Sequence[OutboxJob]) -> None:
        """Runs jobs that this worker owns. A job that fails is postponed and released, for any worker to claim.

        Returns after one attempt at each folder and image. Sessions in the gateway are deleted in the background,
        since the gateway may be down.
        """
        for job in jobs:
            if job.kind == "gateway_session":
                self._tasks.spawn(self._run_in_background(job))
        for job in jobs:
            if job.kind != "gateway_session":
                await self._run_one(job)

    async def _run_in_background(self, job: OutboxJob) -> None:
        with self.holding(job.target):
            async with self._slots:
                await self._run_one(job)

    async def _run_one(self, job: OutboxJob) -> None:
        """Runs a job. Whatever fails is logged, and leaves the job to the next `claim_due_jobs`."""
        with self.holding(job.target):
            try:
                await self._attempt(job)
            except errors.AppError as error:
                delay = min(2**job.attempts, RETRY_AT_MOST)
                log.warning("could not remove %s %s, retrying in %d s: %s", job.kind, job.target, delay, error.message)
                due_at = time.time() + delay
                await self._settle(lambda conn: sql.postpone_outbox_job(conn, job.id, due_at))
            except Exception:
                log.exception("could not remove %s %s, retrying", job.kind, job.target)
            else:
                await self._settle(lambda conn: sql.delete_outbox_job(conn, job.id))

    async def _settle(self, statement: Callable[[Connection], None]) -> None:
        try:
            await self._db.write(statement)
        except errors.Unavailable:
            log.error("could not store the result of an outbox job; the job will be run again")

    async def _attempt(self, job: OutboxJob) -> None:
        if job.kind == "gateway_session":
            agent_id, session_key = job.target.split(" ", 1)  # a legacy key may contain spaces, an agent id cannot
            await self._gateway.delete_session(agent_id, session_key)
        elif job.kind == "images":
            await asyncio.to_thread(self._images.remove_session, job.target)
        else:
            await asyncio.to_thread(self._remove_folder, Path(job.target))

    def _remove_folder(self, folder: Path) -> None:
        if file_utils.is_below(self._projects, folder):
            file_utils.remove_tree(folder)
        else:
            log.warning("keeping the project folder %s, because it is not below PROJECTS_DIR", folder)
