"""Forks processes that write to a database until they are killed.

For each line of stdin, a database, a name and a file separated by tabs, it forks one process and prints its pid.
Forking is fast because the modules are already loaded, so that a test can kill a thousand processes.
"""

import asyncio
import itertools
import mmap
import os
import signal
import sys
from pathlib import Path

import database
import sql


async def write(path: Path, name: str, acknowledged: Path, parent: int) -> None:
    """Adds users, four at a time, and writes the number of acknowledged ones to the file `acknowledged`."""
    db = database.Database(path)
    db.open()
    with acknowledged.open("r+b") as file, mmap.mmap(file.fileno(), 8) as count:
        for number in itertools.count(step=4):
            if os.getppid() != parent:  # the test ended without killing this process
                break
            users = [f"{name}-{number + one}@example.com" for one in range(4)]
            await asyncio.gather(*(db.write(sql.insert_user, user, None, "h") for user in users))
            count[:] = (number + 4).to_bytes(8, "little")
    db.close()


def main() -> None:
    """Forks writers until stdin ends."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # otherwise killed processes remain as zombies
    for line in sys.stdin:
        path, name, acknowledged = line.rstrip("\n").split("\t")
        parent, pid = os.getpid(), os.fork()
        if pid == 0:
            asyncio.run(write(Path(path), name, Path(acknowledged), parent))
            return
        sys.stdout.write(f"{pid}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
