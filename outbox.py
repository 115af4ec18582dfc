"""The outbox: what a delete leaves to do outside the database, and doing it until it is done."""

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

RETRY_AT_MOST = 30  # seconds between two tries of a job


class Outbox:
    """The outbox of a database, as one process works on it."""

    def __init__(
        self, db: Database, openclaw: gateway.Gateway, images: image_handler.ImageStore, projects: Path
    ) -> None:
        """`projects` is the folder below which project folders may be removed."""
        self._db = db
        self._gateway = openclaw
        self._images = images
        self._projects = projects
        self._tasks = Tasks()

    async def close(self) -> None:
        """Returns when nothing is being done any more."""
        while self._tasks:
            await self._tasks.wait()

    async def run_due_jobs(self) -> None:
        """Claims the jobs that are due and nobody's, and runs them as `run` does."""
        if not self._db.read(sql.has_due_outbox_jobs, time.time()):
            return
        await self.run(await self._db.write(sql.claim_outbox_jobs, self._db.lease.name, time.time()))

    async def run(self, jobs: Sequence[OutboxJob]) -> None:
        """Runs jobs that this worker owns. Returns when folders and images are gone; the gateway, which may be
        down, is not waited for."""
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
                agent_id, session_key = job.target.split(" ", 1)  # a key of old may have a space, an agent none
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
            log.warning("%s is not below PROJECTS_DIR: it is left as it is", folder)
