"""The restart without downtime: the front, which PM2 runs, and the worker, which serves the app."""

from .front import CHECKOUT, PORT_TAKEN, UNUSABLE, Front
from .protocol import listen, log_line
from .worker import GuardedWorker, ServedState, ServedTurns, Worker

__all__ = [
    "CHECKOUT",
    "PORT_TAKEN",
    "UNUSABLE",
    "Front",
    "GuardedWorker",
    "ServedState",
    "ServedTurns",
    "Worker",
    "listen",
    "log_line",
]
