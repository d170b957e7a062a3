# Groups of few elements are stretches: weight and bias are laid out along an image, which is
# `copies` times all channels, each of them `inner` times, and the parameters' gradients come back
# that way.

from libc.stdlib cimport free
from libc.string cimport memcpy, memset

from .call cimport Call
from .stretches cimport Stretches, backward_stretches, normalize_stretches
from .sweeps cimport LANES, add_up, element, new_lines, real, repeat_each, whole_lines

cdef enum:
    SHORT_IMAGE = 1 << 9    # elements of one that is short, each of its groups counting as so many
    GROUP = 1 << 6
    SMALL_IMAGE = 1 << 11   # the same where channels lie side by side
    FEW_IMAGES = 4          # not worth it forward,
    FEW_BACKWARD = 16       # backward,
    FEW_SMALL = 64          # or backward where images are small, but not short
    FEW_PLANES = 8          # images of planes that may have vectors of their own in backward,
    LAID_IMAGE = 1 << 12    # if they have as many elements
    LARGE_IMAGE = 3 << 12   # forward: what is laid out is read from the cache of another thread


cdef inline Py_ssize_t image_of(const Call* call) noexcept nogil:
    return call.C * call.S


cdef inline bint short_images(const Call* call, bint backward) noexcept nogil:
    """Whether images that have statistics of their own are too short to be swept one by one."""
    if call.B < call.N or call.N < (FEW_BACKWARD if backward else FEW_IMAGES):
        return False
    # Backward, stretches with the same parameters are taken in pairs.
    if backward and call.G > 1 and image_of(call) > 2 * <Py_ssize_t> LANES * call.G:
        return False
    return image_of(call) + call.G * GROUP <= SHORT_IMAGE


cdef inline bint small_images(const Call* call, bint backward) noexcept nogil:
    """The same of NHWC images, each of which is one group."""
    if call.G > 1 or call.B < call.N or image_of(call) > SMALL_IMAGE:
        return False
    if backward:
        return (short_images(call, True)
                or (2 * call.C < <Py_ssize_t> LANES and call.N >= FEW_SMALL))
    return call.N >= FEW_IMAGES


cdef inline bint too_few_to_lay_out(const Call* call, bint backward) noexcept nogil:
    """Whether there are so few images that short planes had better be swept one by one."""
    if not backward:
        return 1 < call.N <= FEW_IMAGES and image_of(call) >= LARGE_IMAGE
    if call.N <= 2:
        return call.S >= 4 * call.N
    return call.N <= FEW_PLANES and call.S > 8 and image_of(call) >= LAID_IMAGE


cdef inline Stretches _stretches(const Call* call) noexcept nogil:
    cdef Stretches s
    memset(&s, 0, sizeof(s))
    s.M, s.D, s.period = call.B * call.G, image_of(call) // call.G, call.G
    s.x, s.mean, s.rstd = <const element*> call.x, <real*> call.mean, <real*> call.rstd
    s.far, s.streaming = call.far, call.streaming
    return s


cdef inline const real* _laid_out(const real* parameter, const Call* call, Py_ssize_t inner,
                                  real* out) noexcept nogil:
    """Weight or bias, or NULL, as stretches want them."""
    cdef Py_ssize_t done = call.C * inner, length = image_of(call), more
    if parameter is NULL or length == call.C:
        return parameter
    repeat_each(parameter, call.C, inner, out)
    while done < length:
        more = min(done, length - done)
        memcpy(out + done, out, more * sizeof(real))
        done += more
    return out


cdef inline int normalize_groups_as_stretches(const Call* call, Py_ssize_t inner) noexcept nogil:
    cdef:
        Stretches s = _stretches(call)
        Py_ssize_t length = whole_lines(image_of(call))
        real* laid = <real*> new_lines(2 * length * sizeof(real))
    if laid is NULL:
        return -1
    s.weight = _laid_out(<const real*> call.weight, call, inner, laid)
    s.bias = _laid_out(<const real*> call.bias, call, inner, laid + length)
    s.residual, s.activation = <const element*> call.residual, call.activation
    s.y, s.var, s.eps = <element*> call.y, <real*> call.var, call.eps
    normalize_stretches(&s, call.threads)
    free(laid)
    return 0


cdef inline int backward_groups_as_stretches(const Call* call, Py_ssize_t inner) noexcept nogil:
    cdef:
        Stretches s = _stretches(call)
        Py_ssize_t length = whole_lines(image_of(call)), copies = call.S // inner
        real* laid = <real*> new_lines(3 * length * sizeof(real))
        int failed
    if laid is NULL:
        return -1
    s.weight = _laid_out(<const real*> call.weight, call, inner, laid)
    s.grad_y, s.grad_x = <const element*> call.grad_y, <element*> call.grad_x
    s.grad_weight = NULL if call.grad_weight is NULL else laid + length
    s.grad_bias = NULL if call.grad_bias is NULL else laid + 2 * length
    failed = backward_stretches(&s, call.slab, call.threads)
    if not failed and s.grad_weight is not NULL:
        add_up(s.grad_weight, copies, call.C, inner, <real*> call.grad_weight)
    if not failed and s.grad_bias is not NULL:
        add_up(s.grad_bias, copies, call.C, inner, <real*> call.grad_bias)
    free(laid)
    return failed
