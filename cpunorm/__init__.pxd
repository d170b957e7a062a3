# The C API, for Cython: from cpunorm cimport layer_norm. See docs/cython.md.

from cpunorm._capi cimport (
    BAD_ARGUMENT, NO_MEMORY, batch_norm, batch_norm_backward, group_norm, group_norm_backward,
    layer_norm, layer_norm_backward, real, rms_norm, rms_norm_backward,
)
