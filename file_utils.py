"""Paths and bytes below a root: every name is opened relative to its folder's descriptor, never through a link."""

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

_OWN_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC  # for paths of ours, which the operator may link
_FOLDER = _OWN_FOLDER | os.O_NOFOLLOW
_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC  # a FIFO must not block
_NEW_FILE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_DOOR = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_TEMPORARY = re.compile(r"\.clawd-[0-9a-f]{32}\.tmp")

# What Linux says of a link, a folder, a socket or a file in the wrong place, or of a name it cannot store.
_WRONG_PATH = {
    *(errno.ELOOP, errno.ENOTDIR, errno.EISDIR, errno.EEXIST),
    *(errno.ENXIO, errno.ENODEV, errno.ENAMETOOLONG, errno.EILSEQ),
}


class Node(TypedDict):
    """A file or folder as the contract's `GET /projects/{id}/files` shows it; `size` is in bytes."""

    type: Literal["file", "folder"]
    name: str
    path: str
    size: NotRequired[int]
    children: NotRequired[list["Node"]]


def read_file(root: Path, path: str, limit: int) -> bytes:
    """The bytes of the regular file at `path`, relative to `root` with `/`.

    Raises errors.Invalid (`invalid_path`: no such path may exist, or a link, folder or device stands there),
    errors.NotFound (`file_not_found`), errors.TooLarge (`file_too_large`: over `limit` bytes).
    """
    *folders, name = _names(path)
    with _explained(), _walk(root, folders) as folder, _opened(name, _FILE, folder) as file:
        found = os.fstat(file)
        if not stat.S_ISREG(found.st_mode):
            raise _invalid("there is no file, but a folder or something else")
        if found.st_size > limit or len(data := _read(file, limit + 1)) > limit:
            message = f"This file is over {limit:,} bytes: open a smaller one."
            raise errors.TooLarge(message, code="file_too_large")
        return data


def write_file(root: Path, path: str, data: bytes) -> None:
    """Puts `data` at `path` below `root`: all of it is there afterwards, or what was there before.

    Missing folders are made, the root too; a file that is replaced keeps its mode. Raises errors.Invalid
    (`invalid_path`, nothing written: as in `read_file`) and errors.Unavailable (`disk_unavailable`).
    """
    *folders, name = _names(path)
    make_folder(root)
    with _explained(), _walk(root, folders, make=True) as folder:
        _replace(folder, name, data, _mode(folder, name))


def tree(root: Path) -> list[Node]:
    """All files and folders below `root`, sorted by name; nothing where `root` is missing or a link.

    Links, devices and our own temporary files are left out. A folder that vanishes or may not be read has no
    children, nor has one MAX_DEPTH levels down. Bytes of a name that are not UTF-8 become U+FFFD.
    Raises errors.Unavailable.
    """
    with _explained():
        return _children(os.fspath(root), None, "", MAX_DEPTH)


def write_atomic(target: Path, data: bytes, mode: int = 0o644) -> None:
    """The same as `write_file` for a path of ours, whose folders may be links. Raises errors.Unavailable."""
    make_folder(target.parent)
    with _explained(ours=True), _opened(target.parent, _OWN_FOLDER) as folder:
        _replace(folder, target.name, data, mode)


def create_once(target: Path, data: bytes, mode: int = 0o600) -> bytes:
    """Puts `data` at `target` unless something stands there, and returns what then does.

    Of several callers at once, in any process, one wins and all return its bytes. Raises errors.Unavailable.
    """
    make_folder(target.parent)
    with _explained(ours=True), _opened(target.parent, _OWN_FOLDER) as folder:
        if not target.exists():
            with _temporary(folder, data, mode) as name, suppress(FileExistsError):  # another was first
                os.link(name, target.name, src_dir_fd=folder, dst_dir_fd=folder)
            os.fsync(folder)
        return target.read_bytes()


def move(source: Path, target: Path) -> None:
    """Renames a file of ours, in place of what stands at `target`. Raises errors.NotFound, errors.Unavailable."""
    make_folder(target.parent)
    with _explained(ours=True), _opened(target.parent, _OWN_FOLDER) as folder:
        os.replace(source, target.name, dst_dir_fd=folder)
        os.fsync(folder)


def make_folder(path: Path) -> None:
    """Makes a folder and its parents where they are missing. Raises errors.Unavailable."""
    with _explained(ours=True):
        missing = [folder for folder in (path, *path.parents) if not folder.is_dir()]
        for folder in reversed(missing):
            folder.mkdir(exist_ok=True)
            with _opened(folder.parent, _OWN_FOLDER) as parent:
                os.fsync(parent)


def remove_tree(path: Path) -> None:
    """Removes a file, a link (never what it leads to) or a folder with all that is in it, read-only or not.

    A missing one is no error. Raises errors.Unavailable when something remains.
    """
    if not path.parent.is_dir():
        return
    with _explained(ours=True), suppress(FileNotFoundError), _opened(path.parent, _OWN_FOLDER) as parent:
        if not _unlinked(path.name, parent):
            with _opened(path.name, _FOLDER, parent) as folder:
                _empty(folder)
            os.rmdir(path.name, dir_fd=parent)


def is_below(root: Path, path: Path) -> bool:
    """Whether `path` leads to a place within `root`, and not to `root` itself, all links followed."""
    top, place = os.path.realpath(root), Path(os.path.realpath(path))
    return place != Path(top) and place.is_relative_to(top)


def slug(name: str) -> str:
    """A folder's name out of a project's: letters and digits stay (NFC), all else becomes `_`.

    It has 1 to 40 characters, at most 120 bytes of UTF-8, and is `project` where nothing would stay.
    """
    kept = "".join(char if char.isalnum() else "_" for char in unicodedata.normalize("NFC", name))
    short = kept[:40].encode()[:120].decode(errors="ignore")
    return short if short.strip("_") else "project"


def _invalid(reason: str) -> errors.Invalid:
    return errors.Invalid(f"This path cannot be used: {reason}.", code="invalid_path")


@contextmanager
def _explained(*, ours: bool = False) -> Iterator[None]:
    """Turns what the kernel says into what a caller may be told; of a path that is `ours`, it is the operator's."""
    try:
        yield
    except FileNotFoundError as error:
        raise errors.NotFound("There is no such file.", code="file_not_found") from error
    except OSError as error:
        if error.errno in _WRONG_PATH and not ours:
            raise _invalid("a link, or something that is no such file or folder, stands in it") from error
        message = f"The server's disk cannot be used now ({error.strerror}): its operator has to see to it."
        raise errors.Unavailable(message, code="disk_unavailable") from error


def _names(path: str) -> list[str]:
    """The names in a path that can mean one place only, below its root. Raises errors.Invalid."""
    names = path.split("/")
    if any(name in ("", ".", "..") for name in names):
        raise _invalid("write it relative to the project, with one / between names, without . and ..")
    if any(unicodedata.category(char) in ("Cc", "Cs") for char in path):
        raise _invalid("leave out control characters and what is not valid Unicode")
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
    """A descriptor of the folder at the end of `folders`, each opened within the one before."""
    fd = os.open(root, _FOLDER)
    try:
        for name in folders:
            if make:
                with suppress(FileExistsError):  # what stands there is judged by opening it
                    os.mkdir(name, dir_fd=fd)
                    os.fsync(fd)
            outer, fd = fd, os.open(name, _FOLDER, dir_fd=fd)
            os.close(outer)
        yield fd
    finally:
        os.close(fd)


def _read(file: int, most: int) -> bytes:
    """Up to `most` bytes of a file, which may grow meanwhile."""
    data = bytearray()
    while chunk := os.read(file, min(_CHUNK, most - len(data))):
        data += chunk
    return bytes(data)


def _mode(folder: int, name: str) -> int:
    """The permissions that a file written to this name gets."""
    try:
        found = os.stat(name, dir_fd=folder, follow_symlinks=False)
    except FileNotFoundError:
        return 0o644
    if not stat.S_ISREG(found.st_mode):
        raise _invalid("a folder, a link or something else that is no file stands there")
    return found.st_mode & 0o777


def _replace(folder: int, name: str, data: bytes, mode: int) -> None:
    with _temporary(folder, data, mode) as temporary:
        os.replace(temporary, name, src_dir_fd=folder, dst_dir_fd=folder)
        os.fsync(folder)


@contextmanager
def _temporary(folder: int, data: bytes, mode: int) -> Iterator[str]:
    """The name of a file with all of `data` safely on disk, which is gone at the end unless it was renamed."""
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
        return []  # removed or replaced meanwhile, or closed to us
    return sorted((node for node in nodes if node), key=lambda node: node["name"])


def _node(entry: os.DirEntry[str], folder: int, path: str, depth: int) -> Node | None:
    """An entry as the contract shows it; None for what it leaves out."""
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
    """Removes all that is in a folder."""
    while names := os.listdir(top):
        for name in names:
            with suppress(FileNotFoundError):  # somebody else removes it too
                if not _unlinked(name, top):
                    _lift(name, top)


def _lift(name: str, top: int) -> None:
    """Moves the folders within a folder up to `top`, so that depth costs no stack, and removes the rest of it."""
    with _opened(name, _FOLDER, top) as folder:
        for inner in os.listdir(folder):  # noqa: PTH208
            if not _unlinked(inner, folder):
                os.rename(inner, secrets.token_hex(16), src_dir_fd=folder, dst_dir_fd=top)
    os.rmdir(name, dir_fd=top)


def _unlinked(name: str, folder: int) -> bool:
    """Removes a file or link, if it is there. False for a folder, which can be read and emptied from then on."""
    try:
        os.unlink(name, dir_fd=folder)
    except FileNotFoundError:
        return True
    except IsADirectoryError:
        with _opened(name, _DOOR, folder) as fd:
            door = f"/proc/self/fd/{fd}"  # chmod has no O_NOFOLLOW of its own
            if not os.access(door, os.R_OK | os.W_OK | os.X_OK):
                os.chmod(door, 0o700)  # noqa: PTH101
        return False
    return True
