# channels_last: (N, S, C), groups of C // G channels, affine along C.
#
# A statistic covers S positions and the channels of a group; batch norm is one image of N * S
# positions. Everything is done in strips.pxd, but small images of one group are stretches.

from .call cimport Call
from .groups cimport backward_groups_as_stretches, normalize_groups_as_stretches, small_images
from .strips cimport Images, apply_images, backward_images, images_of, normalize_images


cdef inline Images _images(const Call* call) noexcept nogil:
    return images_of(call, call.B, call.N // call.B * call.S, 1)


cdef inline int normalize(const Call* call) noexcept nogil:
    """Of moments alone, there is no y."""
    cdef Images images
    if small_images(call, False) and call.y is not NULL:
        return normalize_groups_as_stretches(call, 1)
    images = _images(call)
    return normalize_images(&images)


cdef inline int apply(const Call* call) noexcept nogil:
    cdef Images images = _images(call)
    return apply_images(&images)


cdef inline int backward(const Call* call) noexcept nogil:
    cdef Images images
    if small_images(call, True):
        return backward_groups_as_stretches(call, 1)
    images = _images(call)
    return backward_images(&images, False)


cdef inline int backward_apply(const Call* call) noexcept nogil:
    cdef Images images = _images(call)
    return backward_images(&images, True)
