"""The outbox: what a delete leaves to do outside the database, and doing it until it is done."""

import asyncio
import logging
import time
from collections.abc import Coroutine, Sequence
from pathlib import Path

import errors
import file_utils
import gateway
import image_handler
import sql
from database import Database
from sql import Errand

log = logging.getLogger("clawd.turns")

ERRAND_AT_MOST = 30  # seconds between two tries of an errand


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
        self._tasks: set[asyncio.Task[None]] = set()

    async def close(self) -> None:
        """Returns when nothing is being done any more."""
        while self._tasks:
            await asyncio.wait(self._tasks)

    def _spawn(self, work: Coroutine[object, object, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def do_errands(self) -> None:
        """Does what the outbox says. Returns when folders and images are gone; the gateway, which may be
        down, is not waited for."""
        if not self._db.read(sql.has_due_errands, time.time()):
            return
        errands = await self._db.write(sql.claim_errands, self._db.lease.name, time.time())
        for errand in errands:
            if errand.kind != "gateway_session":
                await self._do(errand)
        remote = [errand for errand in errands if errand.kind == "gateway_session"]
        if remote:
            self._spawn(self._do_all(remote))

    async def _do_all(self, errands: Sequence[Errand]) -> None:
        for errand in errands:
            await self._do(errand)

    async def _do(self, errand: Errand) -> None:
        try:
            if errand.kind == "gateway_session":
                agent_id, session_key = errand.target.split(" ", 1)  # a key of old may have a space, an agent none
                await self._gateway.delete_session(agent_id, session_key)
            elif errand.kind == "images":
                await asyncio.to_thread(self._images.remove_session, errand.target)
            else:
                await asyncio.to_thread(self._remove_folder, Path(errand.target))
        except errors.AppError as error:
            delay = min(2**errand.attempts, ERRAND_AT_MOST)
            log.warning(
                "%s %s stays to be removed, again in %d s: %s", errand.kind, errand.target, delay, error.message
            )
            await self._db.write(sql.postpone_errand, errand.id, time.time() + delay)
        else:
            await self._db.write(sql.delete_errand, errand.id)

    def _remove_folder(self, folder: Path) -> None:
        if file_utils.is_below(self._projects, folder):
            file_utils.remove_tree(folder)
        else:
            log.warning("%s is not below PROJECTS_DIR: it is left as it is", folder)
