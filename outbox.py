"""Runs the jobs of the outbox: the removals outside the database that a delete requires, retried until they succeed."""

import asyncio
import logging
import time
from collections.abc import Sequence
from pathlib import Path

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

    async def close(self) -> None:
        """Waits until all jobs that run in the background have ended."""
        while self._tasks:
            await self._tasks.wait()

    async def run_due_jobs(self) -> None:
        """Claims the jobs that are due and unowned, and runs them as `run` does."""
        if not self._db.read(sql.has_due_outbox_jobs, time.time()):
            return
        await self.run(await self._db.write(sql.claim_outbox_jobs, self._db.lease.name, time.time()))

    async def run(self, jobs: Sequence[OutboxJob]) -> None:
        """Runs jobs that this worker owns. A job that fails is postponed and released, for any worker to claim.

        Returns after one attempt at each folder and image. Sessions in the gateway are deleted in the background,
        since the gateway may be down.
        """
        for job in jobs:
            if job.kind != "gateway_session":
                await self._do(job)
        remote = [job for job in jobs if job.kind == "gateway_session"]
        if remote:
            self._tasks.spawn(self._do_all(remote))

    async def _do_all(self, jobs: Sequence[OutboxJob]) -> None:
        for job in jobs:
            await self._do(job)

    async def _do(self, job: OutboxJob) -> None:
        try:
            if job.kind == "gateway_session":
                agent_id, session_key = job.target.split(" ", 1)  # a legacy key may contain spaces, an agent id cannot
                await self._gateway.delete_session(agent_id, session_key)
            elif job.kind == "images":
                await asyncio.to_thread(self._images.remove_session, job.target)
            else:
                await asyncio.to_thread(self._remove_folder, Path(job.target))
        except errors.AppError as error:
            delay = min(2**job.attempts, RETRY_AT_MOST)
            log.warning("could not remove %s %s, retrying in %d s: %s", job.kind, job.target, delay, error.message)
            await self._db.write(sql.postpone_outbox_job, job.id, time.time() + delay)
        else:
            await self._db.write(sql.delete_outbox_job, job.id)

    def _remove_folder(self, folder: Path) -> None:
        if file_utils.is_below(self._projects, folder):
            file_utils.remove_tree(folder)
        else:
            log.warning("keeping the project folder %s, because it is not below PROJECTS_DIR", folder)
