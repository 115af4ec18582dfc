"""A wall clock that a test sets: a copy of this file, named `sitecustomize.py`, runs when a service's Python starts.

Shifts `time.time` by the seconds that the file CLOCK_FILE contains (a C double), at every call. Monotonic time stays.
"""

import mmap
import os
import struct
import time
from pathlib import Path

_real, _real_ns = time.time, time.time_ns
with Path(os.environ["CLOCK_FILE"]).open("r+b") as _file:
    _shift = mmap.mmap(_file.fileno(), 8)


def _seconds() -> float:
    return float(struct.unpack("d", _shift[:8])[0])


def _shifted() -> float:
    return _real() + _seconds()


def _shifted_ns() -> int:
    return _real_ns() + int(_seconds() * 1e9)


time.time, time.time_ns = _shifted, _shifted_ns
