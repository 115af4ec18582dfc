"""The program that PM2 and the start scripts run: starts the service, restarts it without downtime, and stops it.

Under PM2, a restart interrupts no request and no stream. PM2 runs a small process, the *front*, which does not import
the app. The app runs in a *worker*, a daemon process in its own session, which PM2 does not find when it kills the
process tree of the front. So `pm2 restart` kills only the front, and the worker continues to serve. The next front
receives the listening socket from the worker over a Unix socket, starts a worker with the new code, and tells the old
worker to retire once the new one is ready. A retiring worker accepts no new connections, finishes its replies and
streams, and exits. `pm2 stop` also kills only the front; the worker stops when no other front connects to it in time.

Without PM2, the service is one process, which runs until Ctrl-C or SIGTERM. `uvicorn app:app` serves the app without
this program.
"""

import argparse
import os
import resource
import socket
import sys

from handover import CHECKOUT, PORT_TAKEN, UNUSABLE, Front, GuardedWorker, Worker, listen, log_line


def main() -> int:
    """Runs a front, a worker, or the service as one process, as the command line says. Returns the exit status."""
    parser = argparse.ArgumentParser(
        description="Serves the app as one process, until Ctrl-C or SIGTERM. With --front, runs the front for PM2."
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    parser.add_argument("--port", type=int, required=True, help="TCP port to listen on")
    parser.add_argument(
        "--front",
        metavar="SCRIPT",
        help="run the front, which starts the app in a worker process; before that it runs SCRIPT, with --check or "
        "--prepare, to check the branch and to update venv/",
    )
    parser.add_argument("--pm2", metavar="FD", type=int, help="file descriptor on which PM2 expects the ready message")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    os.chdir(CHECKOUT)
    if options.front:
        if options.pm2 is not None:
            os.set_inheritable(options.pm2, False)  # a worker would keep PM2's channel open
        try:
            front = Front(options.host, options.port, ["bash", options.front], options.pm2)
        except OSError as error:
            log_line(f"{error.filename} cannot be used: {error.strerror}; it must belong to the user of the service")
            return UNUSABLE
        return front.run()
    if options.worker:
        channel, listener, log = map(int, options.worker.split(","))
        worker: Worker = GuardedWorker(options.port, socket.socket(fileno=channel), socket.socket(fileno=listener), log)
    else:
        try:
            worker = Worker(listen(options.host, options.port))
        except OSError as error:
            log_line(f"cannot listen on port {options.port}: {error.strerror}")
            return PORT_TAKEN
    # Each connection takes a file descriptor, and the usual soft limit of 1,024 would cap the number of streams.
    _, hard_limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard_limit, hard_limit))
    return 0 if worker.run() else 1


if __name__ == "__main__":
    sys.exit(main())
