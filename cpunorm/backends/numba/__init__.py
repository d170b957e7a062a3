"""The Numba backend: one module per canonical problem, compiled at the first call and cached."""

from . import rows
