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

from ._canonical import Gradients, Stats
from ._dispatch import available_backends, show_config, use_backend, warn_if_not_compiled
from ._threads import get_num_threads, set_num_threads
from ._version import __version__ as __version__
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

__all__ = [
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
    "available_backends",
    "batch_norm",
    "batch_norm_backward",
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

warn_if_not_compiled()
