"""How the service starts, hands over and stops.

Under PM2 a restart costs nobody anything. PM2 runs a small *front*, which imports nothing of the app; the app
runs in a *worker*, a process in a session of its own that PM2's kill of the process tree does not see. PM2 kills
the front, and the worker serves on. The next front gets the listening socket from it over a Unix socket, starts a
worker of the new code, and once that is ready tells the old one to retire: it takes no more connections, finishes
what it has, and goes. A worker whose front does not come back goes too: that is `pm2 stop`.

Without PM2 it is one process that behaves as any server. `uvicorn app:app` works without all this.
"""

import argparse
import os
import resource
import socket
import sys

from handover import CHECKOUT, PORT_TAKEN, UNUSABLE, Front, GuardedWorker, Worker, listen, log_line


def main() -> int:
    """Runs what the command line says. Returns the exit status."""
    parser = argparse.ArgumentParser(description="Serves the app. Without --front, as one process, until Ctrl-C.")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--front", metavar="SCRIPT", help="run under PM2; SCRIPT --prepare checks and installs")
    parser.add_argument("--pm2", metavar="FD", type=int, help="where PM2 hears that the front is ready")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    os.chdir(CHECKOUT)
    if options.front:
        if options.pm2 is not None:
            os.set_inheritable(options.pm2, False)  # it is the front's alone
        try:
            front = Front(options.host, options.port, ["bash", options.front], options.pm2)
        except OSError as error:
            log_line(f"{error.filename} cannot be used: {error.strerror}; it must belong to the user who runs this")
            return UNUSABLE
        return front.run()
    if options.worker:
        channel, listener, log = map(int, options.worker.split(","))
        worker: Worker = GuardedWorker(options.port, socket.socket(fileno=channel), socket.socket(fileno=listener), log)
    else:
        try:
            worker = Worker(listen(options.host, options.port))
        except OSError as error:
            log_line(f"port {options.port} cannot be had: {error.strerror}")
            return PORT_TAKEN
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # each connection takes a file
    return 0 if worker.run() else 1


if __name__ == "__main__":
    sys.exit(main())
