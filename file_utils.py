"""Files below a root directory. Each name is opened relative to its folder's descriptor, and no link is followed."""

import errno
import os
import re
import secrets
import stat
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Literal, NotRequired, TypedDict

import errors

MAX_DEPTH = 64  # names in a path; keeps `tree` and the JSON encoder far from Python's recursion limit
_NAME_BYTES = 255  # Linux, NAME_MAX
_CHUNK = 1024 * 1024

# For the service's own directories, which the operator may replace by links.
_OWN_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
_FOLDER = _OWN_FOLDER | os.O_NOFOLLOW
_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC  # opening a FIFO must not block
_NEW_FILE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_HANDLE = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_TEMPORARY = re.compile(r"\.clawd-[0-9a-f]{32}\.tmp")

# Linux's errors for a link, folder, socket or file in the wrong place, and for a name that cannot be stored.
_WRONG_PATH = {
    *(errno.ELOOP, errno.ENOTDIR, errno.EISDIR, errno.EEXIST),
    *(errno.ENXIO, errno.ENODEV, errno.ENAMETOOLONG, errno.EILSEQ),
}


class Node(TypedDict):
    """A file or folder as `GET /projects/{project_id}/files` returns it. `size` is in bytes."""

    type: Literal["file", "folder"]
    name: str
    path: str
    size: NotRequired[int]
    children: NotRequired[list["Node"]]


def read_file(root: Path, path: str, limit: int) -> bytes:
    """Returns the bytes of the regular file at `path`, which is relative to `root` and has `/` between names.

    Raises errors.Invalid (`invalid_path`: the path is not allowed, contains a link, or names a folder or device),
    errors.NotFound (`file_not_found`), errors.TooLarge (`file_too_large`: more than `limit` bytes),
    errors.Unavailable (`disk_unavailable`).
    """
    *folders, name = _names(path)
    with _explained(), _walk(root, folders) as folder, _opened(name, _FILE, folder) as file:
        found = os.fstat(file)
        if not stat.S_ISREG(found.st_mode):
            raise _invalid("it is not the path of a file")
        if found.st_size > limit or len(data := _read(file, limit + 1)) > limit:
            message = f"The file is larger than {limit:,} bytes. Open a smaller one."
            raise errors.TooLarge(message, code="file_too_large")
        return data


def write_file(root: Path, path: str, data: bytes) -> None:
    """Writes `data` to `path` below `root` atomically: if that fails, the file keeps its old content.

    Creates missing folders, including the root. A file that is replaced keeps its permissions. Raises errors.Invalid
    (`invalid_path`, as in `read_file`, and nothing is written) and errors.Unavailable (`disk_unavailable`).
    """
    *folders, name = _names(path)
    make_folder(root)
    with _explained(), _walk(root, folders, make=True) as folder:
        _replace(folder, name, data, _mode(folder, name))


def tree(root: Path) -> list[Node]:
    """Returns all files and folders below `root`, sorted by name. Returns nothing if `root` is missing or a link.

    Leaves out links, devices and this module's temporary files. A folder has no children in the result if it was
    removed during the call, is not readable, or is MAX_DEPTH levels deep. Bytes of a name that are not UTF-8 become
    U+FFFD. Raises errors.Unavailable.
    """
    with _explained():
        return _children(os.fspath(root), None, "", MAX_DEPTH)


def write_atomic(target: Path, data: bytes, mode: int = 0o644) -> None:
    """Does the same as `write_file` for the service's own files, whose folders may be links.

    Raises errors.Unavailable.
    """
    make_folder(target.parent)
    with _explained(ours=True), _opened(target.parent, _OWN_FOLDER) as folder:
        _replace(folder, target.name, data, mode)


def create_once(target: Path, data: bytes, mode: int = 0o600) -> bytes:
    """Writes `data` to `target` unless that file exists, and returns the file's content.

    If several processes call it at once, one of them writes, and all return its bytes. Raises errors.Unavailable.
    """
    make_folder(target.parent)
    with _explained(ours=True), _opened(target.parent, _OWN_FOLDER) as folder:
        if not target.exists():
            with _temporary(folder, data, mode) as name, suppress(FileExistsError):  # another caller was first
                os.link(name, target.name, src_dir_fd=folder, dst_dir_fd=folder)
            os.fsync(folder)
        return target.read_bytes()


def move(source: Path, target: Path) -> None:
    """Renames one of the service's own files, and replaces `target` if it exists.

    Raises errors.NotFound, errors.Unavailable.
    """
    make_folder(target.parent)
    with _explained(ours=True), _opened(target.parent, _OWN_FOLDER) as folder:
        os.replace(source, target.name, dst_dir_fd=folder)
        os.fsync(folder)


def make_folder(path: Path) -> None:
    """Creates a folder and its missing parents, and syncs them to disk. Raises errors.Unavailable."""
    with _explained(ours=True):
        missing = [folder for folder in (path, *path.parents) if not folder.is_dir()]
        for folder in reversed(missing):
            folder.mkdir(exist_ok=True)
            with _opened(folder.parent, _OWN_FOLDER) as parent:
                os.fsync(parent)


def remove_tree(path: Path) -> None:
    """Removes a file, a link (not its target) or a folder with its content, including read-only folders.

    Does nothing if `path` does not exist. Raises errors.Unavailable if something remains.
    """
    if not path.parent.is_dir():
        return
    with _explained(ours=True), suppress(FileNotFoundError), _opened(path.parent, _OWN_FOLDER) as parent:
        if not _unlinked(path.name, parent):
            with _opened(path.name, _FOLDER, parent) as folder:
                _empty(folder)
            os.rmdir(path.name, dir_fd=parent)


def is_below(root: Path, path: Path) -> bool:
    """Returns True if `path` is inside `root`, and not `root` itself, after all links have been resolved."""
    top, place = os.path.realpath(root), Path(os.path.realpath(path))
    return place != Path(top) and place.is_relative_to(top)


def slug(name: str) -> str:
    """Makes a folder's name from a project's: letters and digits are kept (in NFC), all others become `_`.

    The result has 1 to 40 characters and at most 120 bytes of UTF-8. It is `project` if no letter or digit is left.
    """
    kept = "".join(char if char.isalnum() else "_" for char in unicodedata.normalize("NFC", name))
    short = kept[:40].encode()[:120].decode(errors="ignore")
    return short if short.strip("_") else "project"


def _invalid(reason: str) -> errors.Invalid:
    return errors.Invalid(f"This path cannot be used: {reason}.", code="invalid_path")


@contextmanager
def _explained(*, ours: bool = False) -> Iterator[None]:
    """Translates OSError into an error without paths, which a user may see.

    In a path that is `ours`, nothing can be the user's mistake: all errors except a missing file are Unavailable.
    """
    try:
        yield
    except FileNotFoundError as error:
        raise errors.NotFound("There is no such file.", code="file_not_found") from error
    except OSError as error:
        if error.errno in _WRONG_PATH and not ours:
            raise _invalid("a name in it is a link, or not the file or folder that it should be") from error
        message = (
            f"The server's disk cannot be used now ({error.strerror}). The operator must fix that; try again later."
        )
        raise errors.Unavailable(message, code="disk_unavailable") from error


def _names(path: str) -> list[str]:
    """Splits a path into names. Raises errors.Invalid if it could mean a place that is not below the root."""
    names = path.split("/")
    if any(name in ("", ".", "..") for name in names):
        raise _invalid("use a path relative to the project, with one / between names, without . and ..")
    if any(unicodedata.category(char) in ("Cc", "Cs") for char in path):
        raise _invalid("remove control characters and invalid Unicode")
    if len(names) > MAX_DEPTH or any(len(name.encode()) > _NAME_BYTES for name in names):
        raise _invalid(f"use at most {MAX_DEPTH} names of at most {_NAME_BYTES} bytes each")
    return names


@contextmanager
def _opened(name: str | Path, flags: int, folder: int | None = None) -> Iterator[int]:
    fd = os.open(name, flags, dir_fd=folder)
    try:
        yield fd
    finally:
        os.close(fd)


@contextmanager
def _walk(root: Path, folders: list[str], *, make: bool = False) -> Iterator[int]:
    """Yields a descriptor of the folder at the end of `folders`. Opens each relative to the one before."""
    fd = os.open(root, _FOLDER)
    try:
        for name in folders:
            if make:
                with suppress(FileExistsError):  # opening it then fails unless it is a folder
                    os.mkdir(name, dir_fd=fd)
                    os.fsync(fd)
            outer, fd = fd, os.open(name, _FOLDER, dir_fd=fd)
            os.close(outer)
        yield fd
    finally:
        os.close(fd)


def _read(file: int, most: int) -> bytes:
    """Reads at most `most` bytes of a file, since it may grow meanwhile."""
    data = bytearray()
    while chunk := os.read(file, min(_CHUNK, most - len(data))):
        data += chunk
    return bytes(data)


def _mode(folder: int, name: str) -> int:
    """Returns the permissions for a file that is written to this name."""
    try:
        found = os.stat(name, dir_fd=folder, follow_symlinks=False)
    except FileNotFoundError:
        return 0o644
    if not stat.S_ISREG(found.st_mode):
        raise _invalid("it is the path of a folder, a link or something else that is not a file")
    return found.st_mode & 0o777


def _replace(folder: int, name: str, data: bytes, mode: int) -> None:
    with _temporary(folder, data, mode) as temporary:
        os.replace(temporary, name, src_dir_fd=folder, dst_dir_fd=folder)
        os.fsync(folder)


@contextmanager
def _temporary(folder: int, data: bytes, mode: int) -> Iterator[str]:
    """Writes `data` to a temporary file and syncs it to disk. Yields its name; removes it unless it was renamed."""
    name = f".clawd-{secrets.token_hex(16)}.tmp"
    fd = os.open(name, _NEW_FILE, 0o600, dir_fd=folder)
    try:
        with os.fdopen(fd, "wb") as file:
            file.write(data)
            file.flush()
            os.fchmod(fd, mode)
            os.fsync(fd)
        yield name
    finally:
        with suppress(FileNotFoundError):  # renamed
            os.unlink(name, dir_fd=folder)


def _children(name: str, parent: int | None, path: str, depth: int) -> list[Node]:
    try:
        with _opened(name, _FOLDER, parent) as folder, os.scandir(folder) as entries:
            nodes = [_node(entry, folder, path, depth) for entry in entries]
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        return []  # removed or replaced meanwhile, or without permission
    return sorted((node for node in nodes if node), key=lambda node: node["name"])


def _node(entry: os.DirEntry[str], folder: int, path: str, depth: int) -> Node | None:
    """Converts an entry of a folder; returns None for one that `tree` leaves out."""
    try:
        found = entry.stat(follow_symlinks=False)
    except FileNotFoundError:
        return None  # removed meanwhile
    name = os.fsencode(entry.name).decode(errors="replace")
    if stat.S_ISREG(found.st_mode) and not _TEMPORARY.fullmatch(entry.name):
        return {"type": "file", "name": name, "path": path + name, "size": found.st_size}
    if not stat.S_ISDIR(found.st_mode):
        return None
    children = _children(entry.name, folder, f"{path}{name}/", depth - 1) if depth > 1 else []
    return {"type": "folder", "name": name, "path": path + name, "children": children}


def _empty(top: int) -> None:
    """Removes the content of a folder."""
    while names := os.listdir(top):
        for name in names:
            with suppress(FileNotFoundError):  # another process removes it too
                if not _unlinked(name, top):
                    _lift(name, top)


def _lift(name: str, top: int) -> None:
    """Moves the subfolders of a folder up to `top`, so that deep trees need no recursion, and removes the folder."""
    with _opened(name, _FOLDER, top) as folder:
        for inner in os.listdir(folder):  # noqa: PTH208 - pathlib cannot list a descriptor
            if not _unlinked(inner, folder):
                os.rename(inner, secrets.token_hex(16), src_dir_fd=folder, dst_dir_fd=top)
    os.rmdir(name, dir_fd=top)


def _unlinked(name: str, folder: int) -> bool:
    """Removes a file or link, if it exists, and returns True. Makes a folder accessible and returns False."""
    try:
        os.unlink(name, dir_fd=folder)
    except FileNotFoundError:
        return True
    except IsADirectoryError:
        with _opened(name, _HANDLE, folder) as fd:
            handle = f"/proc/self/fd/{fd}"  # chmod itself would follow a link that replaced the folder
            if not os.access(handle, os.R_OK | os.W_OK | os.X_OK):
                os.chmod(handle, 0o700)  # noqa: PTH101 - pathlib has no os.access, so both take a string
        return False
    return True
