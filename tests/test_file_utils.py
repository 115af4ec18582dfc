"""Files below a root: refused paths, links, races with other processes, failing disks, limits, removal."""

import ctypes
import errno
import json
import os
import resource
import shutil
import socket
import stat
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

import errors
import file_utils

LIMIT = 10 * 1024 * 1024
NOBODY = 65_534
LIBC = ctypes.CDLL(None, use_errno=True)
NO_PATHS = (
    *("", "/", "/etc/passwd", ".", "..", "../secret", "a/../../secret", "a/./b", "a//b", "a/", "//etc/passwd"),
    *("a\0b", "a\nb", "a\x7fb", "a\x85b", "\ud800", "a/\udcff", "x" * 256, "é" * 128),
    "/".join("a" * (file_utils.MAX_DEPTH + 1)),
)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """The root below which users' paths are resolved."""
    folder = tmp_path / "project"
    folder.mkdir()
    return folder


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    """A folder next to the root, whose file must never be read or changed."""
    folder = tmp_path / "outside"
    folder.mkdir()
    (folder / "file").write_bytes(b"outside")
    return folder


def everything(folder: Path) -> set[str]:
    """Returns the relative paths of all files and folders below a folder."""
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def descriptors() -> int:
    """Returns the number of open file descriptors of this process."""
    return len(list(Path("/proc/self/fd").iterdir()))


@pytest.fixture
def deep(root: Path) -> Iterator[Path]:
    """A root with 3,000 folders, each inside the one before, which is more than the longest path can name."""
    fd = os.open(root, os.O_RDONLY)
    for _ in range(3000):
        os.mkdir("d", dir_fd=fd)
        outer, fd = fd, os.open("d", os.O_RDONLY, dir_fd=fd)
        os.close(outer)
    os.close(os.open("file", os.O_WRONLY | os.O_CREAT, dir_fd=fd))
    os.close(fd)
    yield root
    subprocess.run(["rm", "-rf", root], check=True)  # pytest cannot remove it, and every later run would fail


@contextmanager
def powerless() -> Iterator[Path]:
    """Yields a folder; until the block ends, the process has only the rights of an ordinary user, even under root."""
    folder = Path(tempfile.mkdtemp())
    was_root = os.geteuid() == 0
    if was_root:
        os.chown(folder, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, 0)
    try:
        yield folder
    finally:
        if was_root:
            os.setresuid(0, 0, 0)
        shutil.rmtree(folder)


@contextmanager
def swapping(one: Path, other: Path) -> Iterator[None]:
    """Swaps two names atomically, again and again, from a thread, until the block ends."""
    over = threading.Event()

    def swap() -> None:
        while not over.is_set():
            assert LIBC.renameat2(-100, bytes(one), -100, bytes(other), 2) == 0  # RENAME_EXCHANGE

    with ThreadPoolExecutor(1) as pool:
        swapper = pool.submit(swap)
        try:
            yield
        finally:
            over.set()
            swapper.result()


def race(act: Callable[[], str]) -> None:
    """Repeats `act` for at least a second, until it has returned both `done` and `refused`."""
    seen: set[str] = set()
    end, limit = time.monotonic() + 1, time.monotonic() + 60
    while time.monotonic() < end or (len(seen) < 2 and time.monotonic() < limit):
        seen.add(act())
    assert seen == {"done", "refused"}


class TestPaths:
    @pytest.mark.parametrize("path", NO_PATHS)
    def test_refused(self, root: Path, tmp_path: Path, path: str) -> None:
        """A path that could mean a place outside of the root, or none, is refused for reading and writing."""
        (tmp_path / "secret").write_bytes(b"secret")
        (root / "a").mkdir()
        before = everything(tmp_path)
        for act in (
            lambda: file_utils.read_file(root, path, LIMIT),
            lambda: file_utils.write_file(root, path, b"x"),
        ):
            with pytest.raises(errors.Invalid) as caught:
                act()
            assert caught.value.code == "invalid_path"
        assert everything(tmp_path) == before

    @pytest.mark.parametrize("path", ["a b", "back\\slash", "ünï/çødé 🚀", ".hidden", "...", "x" * 255, "é" * 127])
    def test_accepted(self, root: Path, path: str) -> None:
        """Every other name that Linux can store is accepted."""
        file_utils.write_file(root, path, b"content")
        assert file_utils.read_file(root, path, LIMIT) == b"content"
        assert (root / path).read_bytes() == b"content"

    def test_refused_path_makes_no_folder(self, root: Path) -> None:
        """If the last name of a path is refused, the folders before it are not created."""
        with pytest.raises(errors.Invalid):
            file_utils.write_file(root, "new/" + "x" * 256, b"")
        assert everything(root) == set()

    def test_deepest_path(self, root: Path) -> None:
        """A path of the maximum depth can be written, read and listed."""
        path = "/".join("d" * (file_utils.MAX_DEPTH - 1)) + "/file"
        file_utils.write_file(root, path, b"deep")
        assert file_utils.read_file(root, path, LIMIT) == b"deep"
        assert path in json.dumps(file_utils.tree(root))

    @pytest.mark.parametrize("path", ["link", "folder/link", "up/file", "folder/up/file", "up", "gone", "folder"])
    def test_links_and_folders(self, root: Path, outside: Path, path: str) -> None:
        """A path that contains a link, even to a file inside the root, or ends at a folder is refused."""
        (root / "folder").mkdir()
        (root / "inside").write_bytes(b"inside")
        (root / "link").symlink_to(outside / "file")
        (root / "folder/link").symlink_to(root / "inside")
        (root / "up").symlink_to(outside)
        (root / "folder/up").symlink_to(outside)
        (root / "gone").symlink_to(outside / "new")
        with pytest.raises(errors.Invalid) as read:
            file_utils.read_file(root, path, LIMIT)
        with pytest.raises(errors.Invalid) as written:
            file_utils.write_file(root, path, b"x")
        assert (read.value.code, written.value.code) == ("invalid_path", "invalid_path")
        assert everything(outside) == {"file"}
        assert (outside / "file").read_bytes() == b"outside"
        assert (root / "inside").read_bytes() == b"inside"

    def test_linked_root(self, tmp_path: Path, outside: Path) -> None:
        """A root that is a link is refused."""
        root = tmp_path / "linked"
        root.symlink_to(outside)
        with pytest.raises(errors.Invalid):
            file_utils.read_file(root, "file", LIMIT)
        with pytest.raises(errors.Invalid):
            file_utils.write_file(root, "new", b"x")
        assert file_utils.tree(root) == []
        assert everything(outside) == {"file"}

    def test_special_files(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """A FIFO, socket or device is refused for reading and writing, without blocking."""
        os.mkfifo(root / "fifo")
        with socket.socket(socket.AF_UNIX) as listener:
            monkeypatch.chdir(root)  # a socket's path may have 107 bytes only
            listener.bind("socket")
            for path in ("fifo", "socket", "fifo/x"):
                with pytest.raises(errors.Invalid):
                    file_utils.read_file(root, path, LIMIT)
                with pytest.raises(errors.Invalid):
                    file_utils.write_file(root, path, b"x")
        with pytest.raises(errors.Invalid):
            file_utils.read_file(Path("/dev"), "null", LIMIT)
        assert file_utils.tree(root) == []

    def test_no_descriptor_stays_open(self, root: Path, outside: Path) -> None:
        """Every call closes the descriptors that it opened, also if it fails."""
        (root / "link").symlink_to(outside)
        (root / "folder").mkdir()
        before = descriptors()
        file_utils.write_file(root, "a/b/c", b"x")
        file_utils.tree(root)
        for path in ("link/file", "folder", "nothing", "a/b/nothing", "a/b/c/d"):
            with pytest.raises(errors.AppError):
                file_utils.read_file(root, path, LIMIT)
        with pytest.raises(errors.TooLarge):
            file_utils.read_file(root, "a/b/c", 0)
        file_utils.remove_tree(root)
        assert descriptors() == before


class TestRead:
    @pytest.mark.parametrize("path", ["nothing", "folder/nothing", "nothing/file"])
    def test_missing(self, root: Path, path: str) -> None:
        """A file that does not exist is not found."""
        (root / "folder").mkdir()
        with pytest.raises(errors.NotFound) as caught:
            file_utils.read_file(root, path, LIMIT)
        assert caught.value.code == "file_not_found"

    def test_missing_root(self, root: Path) -> None:
        """If the root does not exist, its files are not found."""
        with pytest.raises(errors.NotFound):
            file_utils.read_file(root / "nothing", "file", LIMIT)

    def test_limit(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """A file of exactly the limit is read; one with a byte more is refused."""
        (root / "file").write_bytes(b"x" * 5000)
        assert len(file_utils.read_file(root, "file", 5000)) == 5000
        monkeypatch.delattr(os, "read")  # the size alone must suffice to refuse the file
        with pytest.raises(errors.TooLarge) as caught:
            file_utils.read_file(root, "file", 4999)
        assert caught.value.code == "file_too_large"

    def test_file_that_grows(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """A file that grows after its size was read is read up to one byte past the limit and refused."""
        (root / "file").write_bytes(b"x")
        measure, read, got = os.fstat, os.read, 0

        def fstat(fd: int) -> os.stat_result:
            found = measure(fd)
            os.truncate(root / "file", 3 * LIMIT)
            return found

        def counted(fd: int, size: int) -> bytes:
            nonlocal got
            data = read(fd, size)
            got += len(data)
            return data

        monkeypatch.setattr(os, "fstat", fstat)
        monkeypatch.setattr(os, "read", counted)
        with pytest.raises(errors.TooLarge):
            file_utils.read_file(root, "file", LIMIT)
        assert got == LIMIT + 1

    def test_unreadable(self) -> None:
        """A file or folder without read permission is reported as a problem of the disk, without a path."""
        with powerless() as folder:
            (folder / "closed").write_bytes(b"x")
            (folder / "closed").chmod(0)
            (folder / "shut").mkdir(0)
            for path in ("closed", "shut/file"):
                with pytest.raises(errors.Unavailable) as caught:
                    file_utils.read_file(folder, path, LIMIT)
                assert caught.value.code == "disk_unavailable"
                assert str(folder) not in caught.value.message
                assert isinstance(caught.value.__cause__, PermissionError)

    def test_swapped_folder(self, root: Path, outside: Path) -> None:
        """If a folder is swapped with a link while it is read, no byte from outside of the root is returned."""
        (root / "sub").mkdir()
        (root / "sub/file").write_bytes(b"inside")
        (root / "link").symlink_to(outside)

        def read() -> str:
            try:
                assert file_utils.read_file(root, "sub/file", LIMIT) == b"inside"
            except errors.Invalid:
                return "refused"
            return "done"

        with swapping(root / "sub", root / "link"):
            race(read)

    def test_swapped_file(self, root: Path, outside: Path) -> None:
        """If a file is swapped with a link while it is read, no byte from outside of the root is returned."""
        (root / "file").write_bytes(b"inside")
        (root / "link").symlink_to(outside / "file")

        def read() -> str:
            try:
                assert file_utils.read_file(root, "file", LIMIT) == b"inside"
            except errors.Invalid:
                return "refused"
            return "done"

        with swapping(root / "file", root / "link"):
            race(read)


class TestWrite:
    def test_new_and_replaced(self, root: Path) -> None:
        """A new file is readable for all users; a replaced file keeps its permissions, except set-uid."""
        file_utils.write_file(root, "a/b/new", b"one")
        assert stat.S_IMODE((root / "a/b/new").stat().st_mode) == 0o644
        (root / "a/b/new").chmod(0o4750)
        file_utils.write_file(root, "a/b/new", b"two")
        assert (root / "a/b/new").read_bytes() == b"two"
        assert stat.S_IMODE((root / "a/b/new").stat().st_mode) == 0o750
        assert everything(root) == {"a", "a/b", "a/b/new"}

    def test_missing_root(self, tmp_path: Path) -> None:
        """A missing root is created, with its parents."""
        file_utils.write_file(tmp_path / "x/y", "z/file", b"content")
        assert (tmp_path / "x/y/z/file").read_bytes() == b"content"

    def test_root_in_the_place_of_a_file(self, tmp_path: Path) -> None:
        """If the root is a file, nothing is written."""
        (tmp_path / "root").write_bytes(b"file")
        with pytest.raises(errors.AppError):
            file_utils.write_file(tmp_path / "root", "file", b"x")
        assert (tmp_path / "root").read_bytes() == b"file"

    def test_empty_and_large(self, root: Path) -> None:
        """Empty and large contents are written completely."""
        large = os.urandom(3 * 1024 * 1024)
        file_utils.write_file(root, "empty", b"")
        file_utils.write_file(root, "large", large)
        assert (root / "empty").read_bytes() == b""
        assert (root / "large").read_bytes() == large

    def test_hard_link(self, root: Path, outside: Path) -> None:
        """Writing to a hard link replaces the link; the file keeps its content under its other name."""
        os.link(outside / "file", root / "file")
        file_utils.write_file(root, "file", b"new")
        assert (outside / "file").read_bytes() == b"outside"

    def test_no_torn_read(self, root: Path) -> None:
        """A reader during writes gets one complete content, never a mixture or a part."""
        contents = [bytes([letter]) * 300_000 for letter in b"abcd"]
        file_utils.write_file(root, "file", contents[0])
        over = threading.Event()

        def write(content: bytes) -> None:
            while not over.is_set():
                file_utils.write_file(root, "file", content)

        with ThreadPoolExecutor(2) as pool:
            writers = [pool.submit(write, content) for content in contents[:2]]
            try:
                end, seen = time.monotonic() + 1, set[bytes]()
                while time.monotonic() < end or len(seen) < 2:
                    seen.add(file_utils.read_file(root, "file", LIMIT))
            finally:
                over.set()
            for writer in writers:
                writer.result()
        assert seen <= set(contents)
        assert everything(root) == {"file"}

    @pytest.mark.parametrize("call", ["fsync", "fchmod", "replace"])
    @pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EIO])
    def test_failure(self, root: Path, monkeypatch: pytest.MonkeyPatch, call: str, number: int) -> None:
        """If the disk fails at any step, the old content remains, and no temporary file."""
        (root / "file").write_bytes(b"old")

        def fail(*_: object, **__: object) -> None:
            raise OSError(number, os.strerror(number))

        with monkeypatch.context() as patched:
            patched.setattr(os, call, fail)
            with pytest.raises(errors.Unavailable) as caught:
                file_utils.write_file(root, "file", b"new")
        assert caught.value.code == "disk_unavailable"
        assert isinstance(caught.value.__cause__, OSError)
        assert everything(root) == {"file"}
        assert (root / "file").read_bytes() == b"old"

    def test_no_room(self, root: Path) -> None:
        """If the kernel accepts no more bytes, the old content remains, and no temporary file."""
        (root / "file").write_bytes(b"old")
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
        try:
            with pytest.raises(errors.Unavailable):
                file_utils.write_file(root, "file", b"x" * 1_000_000)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert everything(root) == {"file"}
        assert (root / "file").read_bytes() == b"old"

    def test_closed_folder(self) -> None:
        """A folder without write permission is reported as a problem of the disk."""
        with powerless() as folder:
            (folder / "shut").mkdir(0o500)
            for path in ("shut/file", "shut/new/file"):
                with pytest.raises(errors.Unavailable):
                    file_utils.write_file(folder, path, b"x")

    def test_swapped_folder(self, root: Path, outside: Path) -> None:
        """If a folder is swapped with a link while a file in it is written, nothing is written outside of the root."""
        (root / "sub").mkdir()
        (root / "link").symlink_to(outside)

        def write() -> str:
            try:
                file_utils.write_file(root, "sub/inner/file", b"inside")
            except errors.Invalid:
                return "refused"
            return "done"

        with swapping(root / "sub", root / "link"):
            race(write)
        assert everything(outside) == {"file"}
        assert (outside / "file").read_bytes() == b"outside"

    def test_swapped_file(self, root: Path, outside: Path) -> None:
        """If a file is swapped with a link while it is written, the link's target does not change."""
        (root / "file").write_bytes(b"inside")
        (root / "link").symlink_to(outside / "file")
        over = threading.Event()

        def swap() -> None:
            while not over.is_set():
                link = root / "new-link"
                link.symlink_to(outside / "file")
                link.replace(root / "file")

        with ThreadPoolExecutor(1) as pool:
            swapper = pool.submit(swap)
            try:
                end = time.monotonic() + 1
                while time.monotonic() < end:
                    try:
                        file_utils.write_file(root, "file", b"inside")
                    except errors.Invalid:
                        continue
            finally:
                over.set()
            swapper.result()
        assert (outside / "file").read_bytes() == b"outside"
        assert everything(outside) == {"file"}


class TestTree:
    def test_shape(self, root: Path, outside: Path) -> None:
        """Files and folders are sorted together by name, without links, FIFOs and our temporary files."""
        file_utils.write_file(root, "b/inner.txt", b"12345")
        file_utils.write_file(root, "c.txt", b"")
        file_utils.write_file(root, "a.txt", b"1")
        (root / "empty").mkdir()
        (root / "link").symlink_to(outside)
        (root / "b/link").symlink_to(outside / "file")
        os.mkfifo(root / "fifo")
        (root / f".clawd-{'0' * 32}.tmp").write_bytes(b"half")
        assert file_utils.tree(root) == [
            {"type": "file", "name": "a.txt", "path": "a.txt", "size": 1},
            {
                "type": "folder",
                "name": "b",
                "path": "b",
                "children": [{"type": "file", "name": "inner.txt", "path": "b/inner.txt", "size": 5}],
            },
            {"type": "file", "name": "c.txt", "path": "c.txt", "size": 0},
            {"type": "folder", "name": "empty", "path": "empty", "children": []},
        ]

    def test_missing_root(self, tmp_path: Path) -> None:
        """A missing root gives an empty list."""
        assert file_utils.tree(tmp_path / "nothing") == []

    def test_names_that_are_not_utf8(self, root: Path) -> None:
        """A name that is not UTF-8 gets replacement characters, so that the result can be encoded as JSON."""
        (root / "caf\udce9").mkdir()
        (root / "caf\udce9" / "\udcff").write_bytes(b"")
        [node] = file_utils.tree(root)
        assert node["path"] == "caf\ufffd"
        assert node["children"][0]["path"] == "caf\ufffd/\ufffd"
        json.dumps(file_utils.tree(root), ensure_ascii=False).encode()

    def test_depth(self, deep: Path) -> None:
        """Folders are listed down to MAX_DEPTH, so that the JSON encoder does not exceed its recursion limit."""
        nodes, depth = file_utils.tree(deep), 0
        json.dumps(nodes)
        while nodes:
            nodes, depth = nodes[0]["children"], depth + 1
        assert depth == file_utils.MAX_DEPTH

    def test_closed_folder(self) -> None:
        """A folder without read permission is listed as empty, and its siblings are listed."""
        with powerless() as folder:
            file_utils.write_file(folder, "shut/file", b"x")
            file_utils.write_file(folder, "zoo", b"x")
            (folder / "shut").chmod(0)
            nodes = file_utils.tree(folder)
        assert [(node["name"], node.get("children")) for node in nodes] == [("shut", []), ("zoo", None)]

    def test_disk_that_fails(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """A disk that cannot be read raises an error instead of giving an empty list."""

        def fail(_: int) -> None:
            raise OSError(errno.EIO, "Input/output error")

        monkeypatch.setattr(os, "scandir", fail)
        with pytest.raises(errors.Unavailable):
            file_utils.tree(root)

    def test_swapped_folder(self, root: Path, outside: Path) -> None:
        """If a folder is swapped with a link while it is listed, no name from outside of the root is listed."""
        (outside / "secret").write_bytes(b"")
        file_utils.write_file(root, "sub/file", b"")
        (root / "link").symlink_to(outside)

        def show() -> str:
            shown = json.dumps(file_utils.tree(root))
            assert "secret" not in shown
            return "done" if "sub/file" in shown else "refused"

        with swapping(root / "sub", root / "link"):
            race(show)

    def test_while_it_changes(self, root: Path) -> None:
        """Listing succeeds while files and folders are created and removed."""
        over = threading.Event()

        def change() -> None:
            while not over.is_set():
                for number in range(20):
                    file_utils.write_file(root, f"{number}/a/b/file", b"x")
                for number in range(20):
                    file_utils.remove_tree(root / str(number))

        with ThreadPoolExecutor(1) as pool:
            changer = pool.submit(change)
            try:
                for _ in range(300):
                    assert "tmp" not in json.dumps(file_utils.tree(root))
            finally:
                over.set()
            changer.result()


class TestOurOwnPaths:
    def test_write_atomic(self, tmp_path: Path) -> None:
        """One of the service's own files is written with the requested mode, also through a link of the operator."""
        (tmp_path / "disk").mkdir()
        (tmp_path / "data").symlink_to(tmp_path / "disk")
        file_utils.write_atomic(tmp_path / "data/file", b"one", 0o600)
        file_utils.write_atomic(tmp_path / "data/file", b"two", 0o640)
        file_utils.write_atomic(tmp_path / "data/new/file", b"three")
        assert (tmp_path / "disk/file").read_bytes() == b"two"
        assert stat.S_IMODE((tmp_path / "disk/file").stat().st_mode) == 0o640
        assert stat.S_IMODE((tmp_path / "disk/new/file").stat().st_mode) == 0o644
        assert everything(tmp_path / "disk") == {"file", "new", "new/file"}

    def test_create_once(self, tmp_path: Path) -> None:
        """The first content is kept, later calls return it, and only its owner can read the file."""
        target = tmp_path / "data/secret"
        assert file_utils.create_once(target, b"first") == b"first"
        assert file_utils.create_once(target, b"second") == b"first"
        assert stat.S_IMODE(target.stat().st_mode) == 0o600
        assert everything(tmp_path / "data") == {"secret"}

    def test_create_once_together(self, tmp_path: Path) -> None:
        """Of concurrent calls, one writes, and all return its complete content."""
        for number in range(30):
            start = threading.Barrier(8)

            def create(letter: int, target: Path = tmp_path / f"{number}", start: threading.Barrier = start) -> bytes:
                start.wait()
                return file_utils.create_once(target, bytes([letter]) * 5000)

            with ThreadPoolExecutor(8) as pool:
                got = set(pool.map(create, range(8)))
            assert got == {(tmp_path / f"{number}").read_bytes()}
            assert len(got.pop()) == 5000
        assert everything(tmp_path) == {str(number) for number in range(30)}

    def test_move(self, tmp_path: Path) -> None:
        """A file is renamed and replaces the target; a missing one is not found."""
        (tmp_path / "one").write_bytes(b"one")
        file_utils.move(tmp_path / "one", tmp_path / "new/two")
        (tmp_path / "one").write_bytes(b"more")
        file_utils.move(tmp_path / "one", tmp_path / "new/two")
        assert everything(tmp_path) == {"new", "new/two"}
        assert (tmp_path / "new/two").read_bytes() == b"more"
        with pytest.raises(errors.NotFound):
            file_utils.move(tmp_path / "one", tmp_path / "new/two")

    def test_make_folder(self, tmp_path: Path) -> None:
        """Parents are created; an existing folder is accepted; a file in its place raises an error."""
        file_utils.make_folder(tmp_path / "a/b/c")
        file_utils.make_folder(tmp_path / "a/b/c")
        assert everything(tmp_path) == {"a", "a/b", "a/b/c"}
        (tmp_path / "file").write_bytes(b"")
        with pytest.raises(errors.AppError):
            file_utils.make_folder(tmp_path / "file")
        with pytest.raises(errors.AppError):
            file_utils.make_folder(tmp_path / "file/folder")

    def test_is_below(self, tmp_path: Path) -> None:
        """A path below the root counts, also by links; the root itself and a sibling with a longer name do not."""
        media = tmp_path / "media"
        media.mkdir()
        (tmp_path / "link").symlink_to(media)
        (media / "out").symlink_to(tmp_path)
        (media / "loop").symlink_to(media / "loop")
        assert file_utils.is_below(media, media / "a/b")
        assert file_utils.is_below(media, tmp_path / "link/a")
        assert file_utils.is_below(tmp_path / "link", media / "a")
        assert file_utils.is_below(Path("/"), media)
        assert file_utils.is_below(media, media / "loop/a")
        for path in (media, media / "a/..", tmp_path / "link", media / "../x", tmp_path / "media-secret"):
            assert not file_utils.is_below(media, path)
        assert not file_utils.is_below(media, media / "out/x")


class TestRemove:
    def test_folder(self, root: Path, outside: Path) -> None:
        """A folder is removed with its content; the targets of its links remain."""
        file_utils.write_file(root, "a/b/c/file", b"x")
        file_utils.write_file(root, "a/b/other", b"x")
        (root / "a/link").symlink_to(outside)
        (root / "a/file-link").symlink_to(outside / "file")
        (root / "a/gone").symlink_to("nowhere")
        os.mkfifo(root / "a/fifo")
        (root / "a/\udcff").mkdir()
        file_utils.remove_tree(root)
        assert not root.exists()
        assert everything(outside) == {"file"}

    def test_link_and_file(self, tmp_path: Path, outside: Path) -> None:
        """A link is removed but not its target; a file is removed; a missing path or parent is ignored."""
        (tmp_path / "link").symlink_to(outside)
        (tmp_path / "file").write_bytes(b"")
        for name in ("link", "file", "nothing", "nothing/nothing"):
            file_utils.remove_tree(tmp_path / name)
        assert everything(tmp_path) == {"outside", "outside/file"}

    def test_deep(self, deep: Path) -> None:
        """A tree of 3,000 levels is removed, without exceeding the limits of recursion and of descriptors."""
        file_utils.write_file(deep, "d/d/sibling/file", b"x")
        file_utils.remove_tree(deep)
        assert not deep.exists()

    def test_read_only(self) -> None:
        """The owner can remove folders that have no permissions."""
        with powerless() as folder:
            for path in ("p/a/b/file", "p/x/y/file", "p/a/q/r/s/file"):
                file_utils.write_file(folder, path, b"x")
            for path in ("p/a/q/r/s", "p/a/q/r", "p/a/q", "p/a/b", "p/a", "p/x/y", "p"):
                (folder / path).chmod(0o500 if "q" in path else 0)
            file_utils.remove_tree(folder / "p")
            assert everything(folder) == set()

    def test_what_remains(self) -> None:
        """If something cannot be removed, the call raises an error."""
        with powerless() as folder:
            file_utils.write_file(folder, "parent/project/file", b"x")
            (folder / "parent").chmod(0o500)
            with pytest.raises(errors.Unavailable) as caught:
                file_utils.remove_tree(folder / "parent/project")
            assert caught.value.code == "disk_unavailable"
            assert (folder / "parent/project").exists()
            (folder / "parent").chmod(0o700)

    def test_two_at_once(self, tmp_path: Path) -> None:
        """Two threads that remove the same folder both succeed."""
        for number in range(20):
            root, start = tmp_path / str(number), threading.Barrier(2)
            for folder in range(60):
                (root / f"{folder}/a/b").mkdir(parents=True)
                (root / f"{folder}/a/file").write_bytes(b"x")

            def remove(root: Path, start: threading.Barrier = start) -> None:
                start.wait()
                file_utils.remove_tree(root)

            with ThreadPoolExecutor(2) as pool:
                list(pool.map(remove, [root, root]))
            assert not root.exists()

    def test_another_was_faster(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """If another process has just removed a part of the folder, the rest is removed."""
        for number in range(5):
            file_utils.write_file(root, f"{number}/file", b"x")
        remove, faster = os.rmdir, iter([True])

        def rmdir(name: str, dir_fd: int) -> None:
            remove(name, dir_fd=dir_fd)
            if next(faster, False):
                raise FileNotFoundError(errno.ENOENT, "No such file or directory")

        monkeypatch.setattr(os, "rmdir", rmdir)
        file_utils.remove_tree(root)
        assert not root.exists()


class TestSlug:
    @pytest.mark.parametrize(
        ("name", "expected"),
        [
            ("Plain", "Plain"),
            ("Ünïcode / name", "Ünïcode___name"),
            ("Cafe\u0301", "Café"),
            ("..", "project"),
            (".hidden", "_hidden"),
            ("", "project"),
            (" \n", "project"),
            ("/etc/passwd", "_etc_passwd"),
            ("項目 1", "項目_1"),
            ("🚀", "project"),
            ("a\0b\ud800c", "a_b_c"),
            ("x" * 100, "x" * 40),
            ("項" * 100, "項" * 40),
            ("𐌰" * 100, "𐌰" * 30),
            ("a" + "𐌰" * 100, "a" + "𐌰" * 29),
        ],
    )
    def test_slug(self, name: str, expected: str) -> None:
        """A project's name becomes a folder's name that is short, visible, and not a path."""
        assert file_utils.slug(name) == expected
        assert len(expected.encode()) <= 120
