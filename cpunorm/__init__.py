"""CPU normalization kernels for NumPy arrays: batch, layer, instance, group and RMS norm.

The way of the data, top to bottom::

    functional.py    signatures and documentation     layers.py   the same with parameters
        |                                                 |
        +-----------------------+-------------------------+
                                v
    _canonical.py    checks, then one of four problems: rows, columns,
                                |                       channels_first, channels_last
                                v
    _dispatch.py     problem and verb -> a backend's kernel
                                |
                                v
    backends/        cython   numba   numpy
"""

from typing import TYPE_CHECKING, Any

from ._canonical import Gradients, Stats
from ._dispatch import available_backends, show_config, use_backend, warn_if_not_compiled
from ._threads import get_num_threads, set_num_threads
from ._version import __version__ as __version__
from .folding import fold_batch_norm
from .functional import (
    add_layer_norm,
    add_rms_norm,
    batch_norm,
    batch_norm_backward,
    group_norm,
    group_norm_backward,
    instance_norm,
    instance_norm_backward,
    layer_norm,
    layer_norm_backward,
    rms_norm,
    rms_norm_backward,
)
from .layers import BatchNorm, GroupNorm, InstanceNorm, LayerNorm, RMSNorm
from .moments import Moments, RunningStatistics

if TYPE_CHECKING:
    from ._advice import Advice, advise

__all__ = [
    "Advice",
    "BatchNorm",
    "Gradients",
    "GroupNorm",
    "InstanceNorm",
    "LayerNorm",
    "Moments",
    "RMSNorm",
    "RunningStatistics",
    "Stats",
    "add_layer_norm",
    "add_rms_norm",
    "advise",
    "available_backends",
    "batch_norm",
    "batch_norm_backward",
    "fold_batch_norm",
    "get_num_threads",
    "group_norm",
    "group_norm_backward",
    "instance_norm",
    "instance_norm_backward",
    "layer_norm",
    "layer_norm_backward",
    "rms_norm",
    "rms_norm_backward",
    "set_num_threads",
    "show_config",
    "use_backend",
]


def __getattr__(name: str) -> Any:
    # What no computation needs is imported when first asked for.
    if name in ("Advice", "advise"):
        from . import _advice

        return getattr(_advice, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


warn_if_not_compiled()
