"""The Numba backend: one module per canonical problem, compiled at the first call and cached."""

from . import channels_first, channels_last, columns, rows

__all__ = ["channels_first", "channels_last", "columns", "rows"]
