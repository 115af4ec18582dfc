"""The routes of projects, sessions and project files, and the creation of project folders."""

import asyncio
import logging
import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Literal

from fastapi import APIRouter, Query, Response, status
from pydantic import BaseModel, Field, StringConstraints

import errors
import file_utils
import sql
from auth import CurrentUser
from background import completed
from web import LONGEST_LIST, Before, Body, Id, Limit, OpenParts, Parts, page

log = logging.getLogger("clawd.projects")

MAX_FILE = 10 * 1024 * 1024  # bytes; docs/api.md states this limit

router = APIRouter()

Name = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1, max_length=200)]
Description = Annotated[str, StringConstraints(max_length=4000)]
Label = Annotated[str, StringConstraints(strip_whitespace=True, max_length=200)]
AgentId = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]{0,63}$")]


class ProjectIn(Body):
    name: Name
    description: Description | None = None


class ProjectChange(Body):
    name: Name | None = None
    description: Description | None = None


class ProjectOut(BaseModel):
    id: int
    user_id: int
    name: str
    description: str | None
    project_path: str
    created_at: str


class SessionIn(Body):
    label: Label | None = None
    agent_id: AgentId | None = Field(None, description="Id of the agent in OpenClaw. Default: `main`.")


class SessionChange(Body):
    label: Label | None = None
    archived: bool | None = None


class SessionOut(BaseModel):
    id: int
    project_id: int
    session_key: str
    label: str | None = Field(
        description="The label that was set, or else the first words of the first message. Null before that message."
    )
    archived: Literal[0, 1]
    scope: str
    channel: str
    agent_id: str
    created_at: str
    last_used_at: str | None


class Deleted(BaseModel):
    status: Literal["deleted"] = "deleted"
    message: str


class FileNode(BaseModel):
    type: Literal["file", "folder"]
    name: str
    path: str = Field(description="Path relative to the project's folder, with `/` between names.")
    size: int | None = Field(None, description="Size in bytes. Only for files.")
    children: "list[FileNode] | None" = Field(None, description="Content of the folder. Only for folders.")


class FileOut(BaseModel):
    content: str = Field(description="Empty for a binary file.")
    is_binary: bool
    size: int = Field(description="Size in bytes.")


class FileIn(Body):
    content: str


class FileWritten(BaseModel):
    success: Literal[True] = True
    size: int = Field(description="Size in bytes.")


# --- projects -----------------------------------------------------------------------------------------


@router.get("/projects", tags=["projects"])
async def list_projects(
    user: CurrentUser, parts: OpenParts, response: Response, limit: Limit = LONGEST_LIST, before: Before = sql.MAX_ID
) -> list[ProjectOut]:
    """Returns the user's projects, newest first."""
    projects = parts.db.read(sql.select_projects, user.id, limit + 1, before)
    return [_project_out(project) for project in page(projects, limit, response)]


@router.post(
    "/projects", status_code=status.HTTP_201_CREATED, tags=["projects"], openapi_extra=errors.raises("disk_unavailable")
)
async def create_project(body: ProjectIn, user: CurrentUser, parts: OpenParts) -> ProjectOut:
    """Creates a project, and its folder with a `README.md`. If either fails, neither remains."""
    return _project_out(await completed(_create(parts, user.id, body)))


async def _create(parts: Parts, user_id: int, body: ProjectIn) -> sql.Project:
    async with _new_folder(parts, body.name, body.description) as (folder, job):
        return await parts.db.write(sql.insert_project, user_id, body.name, body.description, folder, job.id)


async def _give_folder(parts: Parts, project: sql.Project) -> str:
    """Returns the folder of a legacy project that had none: a new one, or the one of a concurrent request."""
    async with _new_folder(parts, project.name, project.description) as (folder, job):
        given = await parts.db.write(sql.update_project_path, project.id, folder, job.id)
    if given != folder:
        await parts.outbox.run([job])
    return given


@asynccontextmanager
async def _new_folder(parts: Parts, name: str, description: str | None) -> AsyncIterator[tuple[str, sql.OutboxJob]]:
    """Creates a folder below PROJECTS_DIR. Yields its path, and the outbox job that removes it.

    The block must store the path and delete the job in one transaction. If the block raises, the job runs.
    """
    stamp = f"{datetime.now(UTC):%Y%m%d_%H%M%S}_{secrets.token_hex(3)}"
    folder = parts.settings.projects / f"{file_utils.slug(name)}_{stamp}"
    with parts.outbox.holding(str(folder)):
        # The job is stored before the folder exists: if this process dies here, another worker removes the folder.
        job = await parts.db.write(sql.insert_outbox_job, "folder", str(folder), parts.turns.owner)
        try:
            await asyncio.to_thread(_make_folder, folder, name, description)
            yield str(folder), job
        except Exception:
            await parts.outbox.run([job])
            raise


def _make_folder(folder: Path, name: str, description: str | None) -> None:
    file_utils.make_folder(folder)
    about = f"# {name}\n" + (f"\n{description}\n" if description else "")
    file_utils.write_atomic(folder / "README.md", about.encode())


@router.get("/projects/{project_id}", tags=["projects"], openapi_extra=errors.raises("project_not_found"))
async def read_project(project_id: Id, user: CurrentUser, parts: OpenParts) -> ProjectOut:
    """Returns a project."""
    return _project_out(parts.db.read(sql.select_project, user.id, project_id))


@router.put("/projects/{project_id}", tags=["projects"], openapi_extra=errors.raises("project_not_found"))
async def change_project(project_id: Id, body: ProjectChange, user: CurrentUser, parts: OpenParts) -> ProjectOut:
    """Changes the fields that the body contains. The project's folder keeps its name."""
    return _project_out(await parts.db.write(sql.update_project, user.id, project_id, body.name, body.description))


@router.delete("/projects/{project_id}", tags=["projects"], openapi_extra=errors.raises("project_not_found"))
async def delete_project(project_id: Id, user: CurrentUser, parts: OpenParts) -> Deleted:
    """Deletes a project with its sessions (also in the gateway), messages, images and folder. Stops its turns."""
    await parts.turns.delete(sql.delete_project, user.id, project_id)
    return Deleted(message="Project deleted")


def _project_out(project: sql.Project) -> ProjectOut:
    return ProjectOut.model_validate(project._asdict())


# --- sessions -----------------------------------------------------------------------------------------


@router.get("/projects/{project_id}/sessions", tags=["sessions"], openapi_extra=errors.raises("project_not_found"))
async def list_sessions(
    project_id: Id,
    user: CurrentUser,
    parts: OpenParts,
    response: Response,
    archived: Annotated[bool, Query(description="Return the archived sessions instead of the others.")] = False,
    limit: Limit = LONGEST_LIST,
    before: Before = sql.MAX_ID,
) -> list[SessionOut]:
    """Returns the sessions of a project, newest first."""
    sessions = parts.db.read(sql.select_sessions, user.id, project_id, archived, limit + 1, before)
    return [_session_out(session) for session in page(sessions, limit, response)]


@router.post(
    "/projects/{project_id}/sessions",
    status_code=status.HTTP_201_CREATED,
    tags=["sessions"],
    openapi_extra=errors.raises("project_not_found"),
)
async def create_session(
    project_id: Id, user: CurrentUser, parts: OpenParts, body: SessionIn | None = None
) -> SessionOut:
    """Creates a session, which is a separate conversation with an agent."""
    body = body or SessionIn()
    session = await parts.db.write(sql.insert_session, user.id, project_id, body.label, body.agent_id or "main")
    return _session_out(session)


@router.put("/sessions/{session_id}", tags=["sessions"], openapi_extra=errors.raises("session_not_found"))
async def change_session(session_id: Id, body: SessionChange, user: CurrentUser, parts: OpenParts) -> SessionOut:
    """Renames, archives or unarchives a session."""
    return _session_out(await parts.db.write(sql.update_session, user.id, session_id, body.label, body.archived))


@router.delete("/sessions/{session_id}", tags=["sessions"], openapi_extra=errors.raises("session_not_found"))
async def delete_session(session_id: Id, user: CurrentUser, parts: OpenParts) -> Deleted:
    """Deletes a session (also in the gateway) with its messages and images. Stops its turns."""
    return await _delete_session(parts, user.id, session_id, None)


@router.delete(
    "/projects/{project_id}/sessions/{session_id}", tags=["sessions"], openapi_extra=errors.raises("session_not_found")
)
async def delete_session_of_project(project_id: Id, session_id: Id, user: CurrentUser, parts: OpenParts) -> Deleted:
    """Deletes a session of this project, like `DELETE /sessions/{session_id}`."""
    return await _delete_session(parts, user.id, session_id, project_id)


async def _delete_session(parts: Parts, user_id: int, session_id: int, project_id: int | None) -> Deleted:
    await parts.turns.delete(sql.delete_session, user_id, session_id, project_id)
    return Deleted(message="Session deleted")


def _session_out(session: sql.Session) -> SessionOut:
    return SessionOut.model_validate(session._asdict())


# --- files --------------------------------------------------------------------------------------------


@router.get(
    "/projects/{project_id}/files",
    tags=["files"],
    response_model_exclude_none=True,
    openapi_extra=errors.raises("project_not_found", "file_not_found", "disk_unavailable"),
)
async def list_files(project_id: Id, user: CurrentUser, parts: OpenParts) -> list[FileNode]:
    """Returns the project's files and folders, each level sorted by name. Links are neither shown nor followed."""
    project = parts.db.read(sql.select_project, user.id, project_id)
    if not project.project_path:
        return []
    nodes = await asyncio.to_thread(file_utils.tree, Path(project.project_path))
    return [FileNode.model_validate(node) for node in nodes]


@router.get(
    "/projects/{project_id}/files/{path:path}",
    tags=["files"],
    openapi_extra=errors.raises(
        "project_not_found", "file_not_found", "invalid_path", "file_too_large", "disk_unavailable"
    ),
)
async def read_file(project_id: Id, path: str, user: CurrentUser, parts: OpenParts) -> FileOut:
    """Returns a file's text. A file that is not text has `is_binary: true` and empty `content`."""
    project = parts.db.read(sql.select_project, user.id, project_id)
    if not project.project_path:
        raise errors.NotFound("There is no such file.", code="file_not_found")
    data = await asyncio.to_thread(file_utils.read_file, Path(project.project_path), path, MAX_FILE)
    try:
        text = data.decode()
    except UnicodeDecodeError:
        text = "\0"
    binary = "\0" in text
    return FileOut(content="" if binary else text, is_binary=binary, size=len(data))


@router.put(
    "/projects/{project_id}/files/{path:path}",
    tags=["files"],
    openapi_extra=errors.raises(
        "project_not_found", "file_not_found", "invalid_path", "file_too_large", "disk_unavailable"
    ),
)
async def write_file(project_id: Id, path: str, body: FileIn, user: CurrentUser, parts: OpenParts) -> FileWritten:
    """Writes a file, and creates missing folders. If that fails, the file keeps its old content."""
    data = body.content.encode()
    if len(data) > MAX_FILE:
        raise errors.TooLarge("The content is too large. A file may have at most 10 MB.", code="file_too_large")
    project = parts.db.read(sql.select_project, user.id, project_id)
    root = project.project_path or await completed(_give_folder(parts, project))
    await asyncio.to_thread(file_utils.write_file, Path(root), path, data)
    return FileWritten(size=len(data))
