"""What memory allows: a copy for the forward pass, a triad for the backward."""

from collections.abc import Iterator
from functools import partial
from typing import Any

from cpunorm.backends.cython import verbs

from ..shapes import Case
from . import Array, Call, Data


class Library:
    """The traffic of a case and nothing else, into existing memory, with the kernels' stores."""

    def __init__(self, threads: int) -> None:
        self.threads = threads

    def forms(self, case: Case, data: Data) -> Iterator[Call]:
        """Yield a copy of x, or out = grad - x, serial and parallel."""
        x, out = data.x.reshape(-1), data.out.reshape(-1)
        for threads in {1, self.threads}:
            if case.forward:
                yield partial(verbs.copy, x, out, threads)
            else:
                yield partial(verbs.triad, data.grad.reshape(-1), x, out, threads)

    def answer(self, returned: Any, data: Data) -> Array | None:
        """Return nothing: this is no normalization."""
        return None
