"""What memory allows: a parallel copy for the forward pass, a parallel triad for the backward."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import numba
import numpy as np
from numba import njit, prange

from ..shapes import Case
from . import Array, Call, Data

FACTOR = np.float32(0.5)


def _copy(x, out, parts):
    size = (x.size + parts - 1) // parts
    for part in prange(parts):
        # Slices, so that the loop starts at 0 and needs no test for negative indices.
        start, stop = part * size, (part + 1) * size
        source, target = x[start:stop], out[start:stop]
        for i in range(target.size):
            target[i] = source[i]


def _triad(x, grad, out, factor, parts):
    size = (x.size + parts - 1) // parts
    for part in prange(parts):
        start, stop = part * size, (part + 1) * size
        a, b, target = x[start:stop], grad[start:stop], out[start:stop]
        for i in range(target.size):
            target[i] = b[i] - factor * a[i]


class Library:
    """The traffic of a case and nothing else, into existing memory, serial or parallel."""

    def __init__(self, threads: int) -> None:
        numba.set_num_threads(threads)
        self.threads = threads
        options = {"fastmath": True, "error_model": "numpy"}
        self.copies = [njit(parallel=p, **options)(_copy) for p in (False, True)]
        self.triads = [njit(parallel=p, **options)(_triad) for p in (False, True)]

    def forms(self, case: Case, data: Data) -> Iterator[Call]:
        """Yield a copy of x, or out = grad - 0.5 x."""
        x, out = data.x.reshape(-1), data.out.reshape(-1)
        if case.direction == "forward":
            yield partial(np.copyto, out, x)
            for copy in self.copies:
                yield partial(copy, x, out, self.threads)
        else:
            for triad in self.triads:
                yield partial(triad, x, data.grad.reshape(-1), out, FACTOR, self.threads)

    def answer(self, returned: Any, data: Data) -> Array | None:
        """Return nothing: this is no normalization."""
        return None
