"""How many CPUs other programs kept busy while the times were taken.

With fewer CPUs left than a kernel has threads, each parallel section waits for a thread that is
not running, often for a whole time slice of the scheduler: small arrays then seem to take 10 ms.
"""

import os
import time
from pathlib import Path
from typing import NamedTuple


class Mark(NamedTuple):
    """A moment: the clock, and the CPU seconds that everybody and this process have used."""

    clock: float
    everybody: float
    own: float


def mark() -> Mark | None:
    """Return this moment, or None where the system does not tell (anything but Linux)."""
    try:
        first = Path("/proc/stat").read_text().splitlines()[0]
    except OSError:
        return None
    user, nice, system, _idle, _waiting, *interrupts_and_stolen = map(int, first.split()[1:9])
    ticks = user + nice + system + sum(interrupts_and_stolen)
    return Mark(time.perf_counter(), ticks / os.sysconf("SC_CLK_TCK"), time.process_time())


def busy_since(start: Mark | None) -> float | None:
    """Return how many CPUs other programs kept busy on average since `start`."""
    now = mark()
    if start is None or now is None:
        return None
    others = (now.everybody - start.everybody) - (now.own - start.own)
    return max(0.0, others / (now.clock - start.clock))


def disturb(busy: float, threads: int) -> bool:
    """Whether so many are too many for calls with that number of threads."""
    # A third of a CPU is what an idle desktop may take without harm.
    return busy > 0.3 and busy + threads > (os.cpu_count() or 1)
