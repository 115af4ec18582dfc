"""Processes that write to a database until they are killed: each line of input, `<database> <name> <file>`, forks one,
whose pid is the answer. A fork has everything loaded already, so that a test can kill a thousand of them."""

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
    """Adds users, four at once; the file says how many commits were acknowledged."""
    db = database.Database(path)
    db.open()
    with acknowledged.open("r+b") as file, mmap.mmap(file.fileno(), 8) as count:
        for number in itertools.count(step=4):
            if os.getppid() != parent:  # the test is gone: nobody else would end this
                break
            users = [f"{name}-{number + one}@example.com" for one in range(4)]
            await asyncio.gather(*(db.write(sql.insert_user, user, None, "h") for user in users))
            count[:] = (number + 4).to_bytes(8, "little")
    db.close()


def main() -> None:
    """Forks writers until its input ends."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for them: they leave no zombies
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
