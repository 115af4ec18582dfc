"""Two real processes of the service on one database, a scripted gateway, and the faults that both can suffer."""

import os
import resource
import select
import shutil
import struct
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Literal

import httpx

from tests.service import JSON, NO_TLS, Person, Service, free_port, tail, until
from tests.stand_in import StandIn

Lock = Literal["file", "transaction"]

DISK = 64  # megabytes of the small disk
SILENCE = 2.5  # seconds without a byte of the gateway after which a turn fails

# Programs that take a lock of the database in the command line, print a line, and hold it until they are killed.
HOLD: dict[Lock, str] = {
    "file": "import fcntl, os, sys, time\n"
    "file = os.open(sys.argv[1] + '.lock', os.O_RDWR | os.O_CREAT)\n"
    "fcntl.flock(file, fcntl.LOCK_EX)\n",
    "transaction": "import sqlite3, sys, time\n"
    "conn = sqlite3.connect(sys.argv[1], isolation_level=None, timeout=60)\n"
    "conn.execute('BEGIN IMMEDIATE')\n",
}


class Process(Service):
    """One process of the service, which a test kills, suspends and starts again."""

    frozen = False
    ready = False  # it has served since it was started

    @property
    def running(self) -> bool:
        """True from its start until it is killed or exits, also while it is suspended or starting."""
        return self._process is not None and self._process.poll() is None

    def serves(self) -> bool:
        """True if `/health` answers with any status: it is 503 while the database cannot be written."""
        if not self.running or self.frozen:
            return False
        try:
            httpx.get(f"{self.url}/health", timeout=5, trust_env=False, verify=NO_TLS)
        except httpx.TransportError:
            return False
        self.ready = True
        return True

    def freeze(self, *, locked: bool = True) -> None:
        super().freeze(locked=locked)
        self.frozen = True

    def thaw(self) -> None:
        super().thaw()
        self.frozen = False

    def kill(self) -> None:
        super().kill()
        self.frozen = self.ready = False


class SmallDisk:
    """A file system of its own for the database and the images, or a limit on files where that needs rights that this
    user does not have."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.full = False
        folder.mkdir()
        mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK}m,mode=700", "tmpfs", str(folder)]
        self.mounted = os.geteuid() == 0 and subprocess.run(mount, capture_output=True, check=False).returncode == 0

    def fill(self, processes: list[Process]) -> None:
        """Leaves no room: whatever makes a file longer fails from now on."""
        self.full = True
        if not self.mounted:
            self._limit(processes, 0)
            return
        with (self.folder / "filler").open("ab", buffering=0) as filler:
            for size in (1 << 20, 1 << 12):
                try:
                    while filler.write(bytes(size)) == size:
                        continue
                except OSError:
                    continue

    def free(self, processes: list[Process]) -> None:
        """Makes room again."""
        self.full = False
        if self.mounted:
            (self.folder / "filler").unlink(missing_ok=True)
        else:
            self._limit(processes, resource.RLIM_INFINITY)

    def _limit(self, processes: list[Process], size: int) -> None:
        for process in processes:
            if process.running:
                resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

    def close(self) -> None:
        """Unmounts the file system, with all that is in it."""
        if self.mounted:
            subprocess.run(["umount", "--lazy", str(self.folder)], check=True)


class World:
    """The processes, the gateway and the faults that last at the moment. Many examples use one world after another."""

    def __init__(self, directory: Path) -> None:
        directory.mkdir()
        self.directory = directory
        self.spoiled = False  # an example failed: the next one needs another world
        self.locked: Lock | None = None
        self.gateway_up = True
        self._holder: subprocess.Popen[bytes] | None = None
        self._stack = ExitStack()
        self._clock = directory / "clock"
        self.set_clock(0)
        (directory / "python").mkdir()
        shutil.copy(Path(__file__).with_name("clock.py"), directory / "python" / "sitecustomize.py")
        self.disk = SmallDisk(directory / "disk")
        self._stack.callback(self.disk.close)
        self.gateway = self._stack.enter_context(StandIn(free_port()))
        self.processes = [self._process() for _ in range(2)]
        for process in self.processes:
            process.spawn()
            self._stack.callback(process.kill)
        until(lambda: all(process.serves() for process in self.processes), 60, "both processes")
        with httpx.Client(base_url=self.processes[0].url, timeout=60, trust_env=False, verify=NO_TLS) as client:
            self.token = Person(client).token

    def close(self) -> None:
        """Ends the processes and the gateway, and removes the disk."""
        self.unlock()
        self._stack.close()

    @property
    def database(self) -> Path:
        """The file of the database."""
        return self.disk.folder / "service.db"

    def _process(self) -> Process:
        process = Process(
            self.disk.folder,
            self.gateway.url,
            self.gateway.token,
            CLAWDBOT_TIMEOUT=str(SILENCE),
            DRAIN_SECONDS="0.2",
            PYTHONPATH=str(self.directory / "python"),
            CLOCK_FILE=str(self._clock),
        )
        process.log = self.directory / process.log.name  # a full disk must not cost the log that explains a failure
        return process

    # --- faults ---

    @property
    def calm(self) -> bool:
        """True if a write succeeds now, as far as the faults of this world go."""
        quiet = not self.locked and not self.disk.full and not any(process.frozen for process in self.processes)
        return quiet and any(process.ready for process in self.processes)

    def set_clock(self, seconds: float) -> None:
        """Steps the wall clock of all processes to `seconds` from the real time."""
        with self._clock.open("r+b" if self._clock.exists() else "wb") as file:
            file.write(struct.pack("d", seconds))

    def lock(self, kind: Lock) -> None:
        """Has another program hold a lock on the database. Returns once it holds it, or waits for somebody else."""
        self.locked = kind
        program = [sys.executable, "-S", "-c", HOLD[kind] + "print('held', flush=True)\ntime.sleep(3600)"]
        self._holder = subprocess.Popen([*program, str(self.database)], stdout=subprocess.PIPE)
        assert self._holder.stdout is not None
        select.select([self._holder.stdout], [], [], 1)

    def unlock(self) -> None:
        """Kills the program that holds the lock."""
        self.locked = None
        if self._holder is not None:
            self._holder.kill()
            self._holder.communicate()
            self._holder = None

    def set_gateway(self, up: bool) -> None:
        """Ends the gateway at once, with all its streams, or starts it again."""
        if up and not self.gateway_up:
            self.gateway.start()
        elif not up:
            self.gateway.stop()
        self.gateway_up = up

    def heal(self) -> None:
        """Ends every fault, and returns once both processes serve."""
        for process in self.processes:
            if process.frozen:
                process.thaw()
        self.unlock()
        if self.disk.full:
            self.disk.free(self.processes)
        self.set_clock(0)
        self.gateway.draining, self.gateway.websocket_status = False, None
        self.set_gateway(up=True)
        deadline = time.monotonic() + 60
        while not all(process.serves() for process in self.processes):
            for process in self.processes:
                if not process.running:  # killed, or it did not start while a fault lasted
                    process.kill()
                    process.spawn()
            assert time.monotonic() < deadline, "a process does not start again: " + self.logs()
            time.sleep(0.05)

    def logs(self) -> str:
        """The ends of the logs of both processes."""
        return "\n".join(f"--- {process.log.name}\n{tail(process.log, 6000)}" for process in self.processes)

    # --- requests ---

    def client(self, via: int) -> httpx.Client:
        """A client of one process, for one request. It goes to the other process if that one does not serve."""
        process = self.processes[via] if self.processes[via].ready else self.processes[1 - via]
        headers = {"Authorization": f"Bearer {self.token}"}
        return httpx.Client(base_url=process.url, timeout=90, trust_env=False, verify=NO_TLS, headers=headers)

    def create(self, via: int, path: str, **body: str) -> JSON:
        """Creates a project or a session."""
        with self.client(via) as http:
            response = http.post(path, json=body)
        assert response.status_code == 201, response.text
        made: JSON = response.json()
        return made
