"""The front door: the common case of every operation, from arguments to kernel in compiled code.

A call is common if its arrays are of plain kinds and C-contiguous, or have the shape NCHW and lie
in memory as NHWC, and it is for the compiled backend or for Numba. What is not, or is not right, is
declined: the function returns None, nothing has been written, and `_canonical.py` deals with the
call, errors included.
"""

cimport numpy as cnp
from cpython.contextvars cimport get_value
from cpython.float cimport PyFloat_AS_DOUBLE, PyFloat_CheckExact
from cpython.long cimport PyLong_AsSsize_t, PyLong_CheckExact
from cpython.tuple cimport PyTuple_CheckExact
from cpython.unicode cimport PyUnicode_CheckExact
from libc.float cimport DBL_EPSILON, FLT_EPSILON, FLT_MIN
from libc.math cimport isfinite, sqrt, sqrtf
from libc.stdlib cimport free, malloc
from libc.string cimport memcpy

from ._channels cimport Channels, place_axes
from ._memory cimport empty, empty_as
from .backends.cython.call cimport Call, Table, Verb
from .backends.cython.verbs cimport (
    FLOAT32, FLOAT64, element_of, new_call, run, run_briefly, tables, work_of,
)

import numpy as np

from . import _auto, _dispatch, _threads
from ._canonical import CHANNELS_LAST, Gradients, Stats
from ._dispatch import _current
from .backends import ACTIVATIONS

cnp.import_array()

cdef:
    object take_threads = _threads.take_threads
    object give_back = _threads.give_back
    object is_available = _dispatch.is_available
    object solve_elsewhere = _dispatch.solve
    Py_ssize_t serial_bytes = _threads.SERIAL_BYTES
    cnp.dtype float32 = cnp.PyArray_DescrFromType(cnp.NPY_FLOAT32)
    cnp.dtype float64 = cnp.PyArray_DescrFromType(cnp.NPY_FLOAT64)
    dict activations = {name: i for i, name in enumerate(ACTIVATIONS)}
    dict channels_last = CHANNELS_LAST

ctypedef fused real:
    float
    double

cdef enum:
    USER_DEFINED = 256  # from here on NumPy numbers the types of others
    FEW = 64            # statistics that need no memory of their own
    MOST_AXES = 64      # that an array of NumPy has
    BRIEF = 1 << 14     # bytes of x that take about a microsecond

cdef struct Statistics:
    double few[FEW]
    void* scratch


# ---------------------------------------------------------------------------------- what is common


cdef inline bint tidy(object a) noexcept:
    return (type(a) is cnp.ndarray and cnp.PyArray_ISALIGNED(<cnp.ndarray> a)
            and cnp.PyArray_ISNOTSWAPPED(<cnp.ndarray> a))


cdef inline bint plain(object a) noexcept:
    return tidy(a) and cnp.PyArray_IS_C_CONTIGUOUS(<cnp.ndarray> a)


cdef bint lies_last(object a) noexcept:
    """Whether an array of shape (N, C, ...) lies in memory as one of shape (N, ..., C)."""
    if not tidy(a):
        return False
    cdef int ndim = cnp.PyArray_NDIM(<cnp.ndarray> a), axis = 1, i
    cdef cnp.npy_intp stride = cnp.PyArray_ITEMSIZE(<cnp.ndarray> a)
    for i in range(ndim if ndim > 2 else 0):
        if (cnp.PyArray_DIM(<cnp.ndarray> a, axis) != 1
                and cnp.PyArray_STRIDE(<cnp.ndarray> a, axis) != stride):
            return False
        stride *= cnp.PyArray_DIM(<cnp.ndarray> a, axis)
        axis = ndim - 1 - i if i < ndim - 2 else 0
    return ndim > 2


cdef inline int kind_of(cnp.ndarray x):
    """The Element of x, or -1."""
    cdef int number = cnp.PyArray_TYPE(x)
    if number == cnp.NPY_FLOAT32:
        return FLOAT32
    if number == cnp.NPY_FLOAT64:
        return FLOAT64
    if number == cnp.NPY_FLOAT16 or number >= USER_DEFINED and x.dtype.name == "bfloat16":
        return element_of(x)
    return -1


cdef inline cnp.dtype reals(int kind):
    """The type of parameters and statistics."""
    return float64 if kind == FLOAT64 else float32


cdef inline bint like(object a, cnp.ndarray x) noexcept:
    """Whether a is of the type and shape of x, which is common, and in the same order."""
    return (tidy(a) and cnp.PyArray_TYPE(<cnp.ndarray> a) == cnp.PyArray_TYPE(x)
            and cnp.PyArray_SAMESHAPE(<cnp.ndarray> a, x)
            and (cnp.PyArray_IS_C_CONTIGUOUS(<cnp.ndarray> a) if cnp.PyArray_IS_C_CONTIGUOUS(x)
                 else lies_last(a)))


cdef inline bint statistic(object a, int kind, const cnp.npy_intp* shape, int ndim) noexcept:
    """Whether an array of reals, or None, has this shape."""
    return a is None or plain(a) and is_real(a, kind) and has_shape(a, shape, ndim)


cdef inline bint parameter(object a, cnp.ndarray x, int kind, const cnp.npy_intp* shape,
                           int ndim) noexcept:
    """The same, or an array of x's own type."""
    return (a is None or plain(a) and has_shape(a, shape, ndim)
            and (is_real(a, kind) or cnp.PyArray_TYPE(<cnp.ndarray> a) == cnp.PyArray_TYPE(x)))


cdef inline bint is_real(object a, int kind) noexcept:
    return cnp.PyArray_TYPE(<cnp.ndarray> a) == (cnp.NPY_FLOAT64 if kind == FLOAT64
                                                 else cnp.NPY_FLOAT32)


cdef inline bint has_shape(object a, const cnp.npy_intp* shape, int ndim) noexcept:
    cdef int i
    if cnp.PyArray_NDIM(<cnp.ndarray> a) != ndim:
        return False
    for i in range(ndim):
        if cnp.PyArray_DIM(<cnp.ndarray> a, i) != shape[i]:
            return False
    return True


cdef inline object in_reals(object a, int kind):
    """A parameter as kernels take it."""
    if a is None or is_real(a, kind):
        return a
    cdef cnp.ndarray wide = empty(float32, cnp.PyArray_NDIM(<cnp.ndarray> a),
                                  cnp.PyArray_DIMS(<cnp.ndarray> a))
    tables[kind].widen(data(a), data(wide), cnp.PyArray_SIZE(wide))
    return wide


cdef inline object as_type_of(object weight, object grad, int kind):
    """The gradient of a parameter, in the type of the weight."""
    if grad is None or weight is None or is_real(weight, kind):
        return grad
    narrow = np.empty_like(grad, dtype=(<cnp.ndarray> weight).dtype)
    tables[kind].narrow(data(grad), data(narrow), cnp.PyArray_SIZE(<cnp.ndarray> grad))
    return narrow


cdef inline void put_back(object wide, object kept, int kind) noexcept:
    """Round what `in_reals` made of an array, and was changed since, to where it is from."""
    if wide is not kept:
        tables[kind].narrow(data(wide), data(kept), cnp.PyArray_SIZE(<cnp.ndarray> wide))


cdef inline bint apart(object a, object b) noexcept:
    """Whether arrays without gaps share no memory; None shares none."""
    if a is None or b is None:
        return True
    cdef char* a_ = <char*> cnp.PyArray_DATA(<cnp.ndarray> a)
    cdef char* b_ = <char*> cnp.PyArray_DATA(<cnp.ndarray> b)
    return (a_ + cnp.PyArray_NBYTES(<cnp.ndarray> a) <= b_
            or b_ + cnp.PyArray_NBYTES(<cnp.ndarray> b) <= a_)


cdef inline bint writable_for(object out, cnp.ndarray x, object residual) noexcept:
    """Whether out is as x, and x or the residual itself or apart from both."""
    if not like(out, x) or not cnp.PyArray_ISWRITEABLE(<cnp.ndarray> out):
        return False
    cdef void* y = cnp.PyArray_DATA(<cnp.ndarray> out)
    return ((y == cnp.PyArray_DATA(x) or apart(out, x))
            and (residual is None or y == cnp.PyArray_DATA(<cnp.ndarray> residual)
                 or apart(out, residual)))


cdef inline object chosen(object backend, cnp.ndarray x):
    """The backend, or 'auto' where that is to be decided; None for what is not common."""
    if backend is None:
        backend = get_value(_current)
    if not PyUnicode_CheckExact(backend):
        return None
    if backend == "auto":
        return (backend if cnp.PyArray_NBYTES(x) >= <Py_ssize_t> _auto.first_bytes else "cython")
    return backend if backend == "cython" or backend == "numba" and is_available(backend) else None


cdef inline bint number(object value, double* out) noexcept:
    if not PyFloat_CheckExact(value):
        return False
    out[0] = PyFloat_AS_DOUBLE(value)
    return True


cdef inline bint integer(object value, Py_ssize_t* out) noexcept:
    if not PyLong_CheckExact(value):
        return False
    try:
        out[0] = PyLong_AsSsize_t(value)
    except OverflowError:
        return False
    return True


cdef inline bint true_or_false(object value) noexcept:
    return value is True or value is False


cdef inline void* data(object a) noexcept:
    return NULL if a is None else cnp.PyArray_DATA(<cnp.ndarray> a)


cdef inline Call call_for(cnp.ndarray x, object y):
    cdef Call call = new_call(cnp.PyArray_NBYTES(x), y is None, 1)
    call.x, call.y = data(x), data(y)
    return call


cdef int solve(object backend, tuple kernel, Verb verb, cnp.ndarray x, Call* call) except -1:
    """Run a kernel on the threads that are free; one thread needs no leave."""
    cdef:
        Py_ssize_t nbytes = cnp.PyArray_NBYTES(x)
        Py_ssize_t work = work_of(nbytes, call.grad_y is not NULL, call.B)
    if backend != "cython":
        solve_elsewhere(*kernel, backend, nbytes, *arguments(kernel, x, call))
        return 0
    if nbytes < BRIEF:
        return run_briefly(verb, call)
    if work < serial_bytes:
        return run(verb, call)
    call.threads = take_threads(work)
    try:
        return run(verb, call)
    finally:
        give_back()


cdef object view(const void* data, int ndim, const cnp.npy_intp* shape, int type_number):
    """The array that a pointer of a call stands for; it must not outlive the call."""
    if data is NULL:
        return None
    return cnp.PyArray_SimpleNewFromData(ndim, <cnp.npy_intp*> shape, type_number, <void*> data)


cdef void invert(const real* var, double eps, Py_ssize_t count, real* rstd) noexcept nogil:
    cdef Py_ssize_t i
    if real is float and (eps == 0 or eps >= FLT_MIN):
        for i in range(count):
            rstd[i] = 1 / sqrtf(var[i] + <float> eps)
        return
    for i in range(count):
        rstd[i] = <real> (1 / sqrt(var[i] + eps))


cdef object frozen_rstd(cnp.ndarray var, const Call* call, object out):
    """What the compiled kernels make of a running variance themselves."""
    rstd = np.empty_like(var) if out is None else out
    if cnp.PyArray_TYPE(var) == cnp.NPY_FLOAT64:
        invert(<const double*> data(var), call.eps, cnp.PyArray_SIZE(var), <double*> data(rstd))
    else:
        invert(<const float*> data(var), call.eps, cnp.PyArray_SIZE(var), <float*> data(rstd))
    return rstd


cdef tuple arguments(tuple kernel, cnp.ndarray x_, const Call* call):
    """A call as backends/__init__.py has it."""
    cdef:
        bint rows = kernel[0] == "rows", columns = kernel[0] == "columns"
        int type_number = cnp.PyArray_TYPE(x_)
        int real = cnp.NPY_FLOAT64 if type_number == cnp.NPY_FLOAT64 else cnp.NPY_FLOAT32
        int ndim = 2 if rows else 3, ndim_stats = 1 if rows else 2
        cnp.npy_intp shape[3]
        cnp.npy_intp stats[2]
        cnp.npy_intp size
    if rows:
        shape[0], shape[1] = call.M, call.D
        stats[0], size = call.M, call.D
    elif columns:
        shape[0], shape[1], shape[2] = call.N, call.D, call.S
        stats[0], stats[1], size = call.N, call.S, call.D
    else:
        shape[0], shape[1], shape[2] = call.N, call.C, call.S
        stats[0], stats[1], size = call.B, call.G, call.C
        if kernel[0] == "channels_last":
            shape[1], shape[2] = call.S, call.C
    x = view(call.x, ndim, shape, type_number)
    weight = view(call.weight, 1, &size, real)
    mean = view(call.mean, ndim_stats, stats, real)
    rstd = view(call.rstd, ndim_stats, stats, real)
    if kernel[1] in ("normalize", "apply"):
        residual = view(call.residual, ndim, shape, type_number)
        bias = view(call.bias, 1, &size, real)
        y = view(call.y, ndim, shape, type_number)
        if rows or columns:
            total = view(call.total, ndim, shape, type_number)
            return x, residual, weight, bias, call.eps, y, total, mean, rstd
        var = view(call.var, ndim_stats, stats, real)
        if kernel[1] == "apply":
            return x, residual, weight, bias, call.activation, y, mean, frozen_rstd(var, call, rstd)
        return x, residual, weight, bias, call.eps, call.activation, y, mean, var, rstd
    grad_y = view(call.grad_y, ndim, shape, type_number)
    gradients = (view(call.grad_x, ndim, shape, type_number),
                 view(call.grad_weight, 1, &size, real), view(call.grad_bias, 1, &size, real))
    if rows or columns:
        grad_total = view(call.grad_total, ndim, shape, type_number)
        return grad_y, x, mean, rstd, weight, grad_total, *gradients
    return grad_y, x, mean, rstd, weight, *gradients


cdef inline int place(Statistics* statistics, Py_ssize_t count) except -1:
    """Memory for statistics that the caller does not ask for."""
    statistics.scratch = statistics.few
    if count > FEW:
        statistics.scratch = malloc(count * sizeof(double))
        if statistics.scratch is NULL:
            raise MemoryError
    return 0


cdef inline void leave(Statistics* statistics) noexcept:
    if statistics.scratch is not statistics.few:
        free(statistics.scratch)


cdef inline object named(object kind, tuple values):
    return tuple.__new__(kind, values)


# ------------------------------------------------------------------------- layer norm and RMS norm


cdef struct Axes:
    Py_ssize_t first, count     # those that are normalized
    int kept                    # the others
    cnp.npy_intp kept_shape[MOST_AXES]
    Py_ssize_t N, D, S          # values before, inside and after them
    bint rows                   # which problem it is; it has N rows, if so


cdef inline Py_ssize_t entries(object given) noexcept:
    return len(<tuple> given) if PyTuple_CheckExact(given) else 1


cdef inline bint entry(object given, Py_ssize_t i, Py_ssize_t* out) noexcept:
    """The i-th of some integers, or the only one."""
    return integer(<object> (<tuple> given)[i] if PyTuple_CheckExact(given) else given, out)


cdef bint axes_of(cnp.ndarray x, object normalized_shape, object axis, Axes* a) noexcept:
    """The canonical problem of a call, if the axes normalized follow one another."""
    cdef:
        Py_ssize_t ndim = cnp.PyArray_NDIM(x), i, n
        const cnp.npy_intp* shape = cnp.PyArray_DIMS(x)
    a.count = entries(normalized_shape)
    a.first = ndim - a.count
    if a.count == 0 or a.first < 0 or cnp.PyArray_SIZE(x) == 0:
        return False
    if axis is not None:
        if entries(axis) != a.count or not entry(axis, 0, &n):
            return False
        n = n + ndim if n < 0 else n
        if not 0 <= n <= a.first:
            return False
        a.first = n
    for i in range(a.first, a.first + a.count):
        if not entry(normalized_shape, i - a.first, &n) or n != shape[i]:
            return False
        if axis is not None and not (entry(axis, i - a.first, &n) and (n == i or n + ndim == i)):
            return False
    a.N = a.D = a.S = 1
    a.kept = 0
    for i in range(ndim):
        if a.first <= i < a.first + a.count:
            a.D *= shape[i]
            continue
        a.kept_shape[a.kept] = shape[i]
        a.kept += 1
        if i < a.first:
            a.N *= shape[i]
        else:
            a.S *= shape[i]
    if a.D == 1:
        # Statistics of one value each: side by side they fill vectors.
        a.S *= a.N
        a.N = 1
    a.rows = a.S == 1 and a.D > 1
    return True


cdef inline void set_axes(Call* call, const Axes* a) noexcept:
    call.M = call.N = a.N
    call.D, call.S = a.D, a.S
    call.B = 0 if a.rows else a.N


cdef object axis_norm(object x_, object residual, object normalized_shape, object weight,
                      object bias, object eps_, bint center, bint add, object axis, object out,
                      object sum_out, object return_stats, object backend):
    cdef:
        int kind = kind_of(x_) if plain(x_) else -1
        double eps
        cnp.ndarray x, y
        object total = None, mean = None, rstd = None
        Py_ssize_t count
        Axes axes
        Statistics statistics
        Verb verb
        Call call
    if kind < 0 or not true_or_false(return_stats):
        return None
    x = x_
    if eps_ is None and not center:
        eps = DBL_EPSILON if kind == FLOAT64 else FLT_EPSILON
    elif not number(eps_, &eps) or not (eps >= 0 and isfinite(eps)):
        return None
    backend = chosen(backend, x)
    if not axes_of(x, normalized_shape, axis, &axes) or backend is None:
        return None
    if (not parameter(weight, x, kind, cnp.PyArray_DIMS(x) + axes.first, axes.count)
            or not parameter(bias, x, kind, cnp.PyArray_DIMS(x) + axes.first, axes.count)):
        return None
    if add and not like(residual, x):
        return None
    if out is not None and not (writable_for(out, x, residual) and apart(out, weight)
                                and apart(out, bias)):
        return None
    if sum_out is not None and not (writable_for(sum_out, x, residual) and apart(sum_out, weight)
                                    and apart(sum_out, bias) and apart(sum_out, out)):
        return None

    weight, bias = in_reals(weight, kind), in_reals(bias, kind)
    kernel = ("rows" if axes.rows else "columns", "normalize")
    verb = tables[kind].rows_normalize if axes.rows else tables[kind].columns_normalize
    y = empty_as(x) if out is None else out
    call = call_for(x, y)
    set_axes(&call, &axes)
    call.eps = eps
    call.weight, call.bias = data(weight), data(bias)
    if add:
        total = empty_as(x) if sum_out is None else sum_out
        call.residual, call.total = data(residual), data(total)
    if return_stats is True:
        rstd = empty(reals(kind), axes.kept, axes.kept_shape)
        mean = empty(reals(kind), axes.kept, axes.kept_shape) if center else None
        call.mean, call.rstd = data(mean), data(rstd)
        solve(backend, kernel, verb, x, &call)
    else:
        count = cnp.PyArray_SIZE(x) // axes.D
        place(&statistics, 2 * count)
        call.mean = statistics.scratch if center else NULL
        call.rstd = <double*> statistics.scratch + count
        try:
            solve(backend, kernel, verb, x, &call)
        finally:
            leave(&statistics)
    if return_stats is True:
        stats = named(Stats, (mean, rstd))
        return (y, total, stats) if add else (y, stats)
    return (y, total) if add else y


def layer_norm(x, normalized_shape, weight, bias, eps, axis, mask, out, return_stats, backend):
    if mask is not None:
        return None
    return axis_norm(x, None, normalized_shape, weight, bias, eps, True, False, axis, out, None,
                     return_stats, backend)


def rms_norm(x, normalized_shape, weight, eps, axis, mask, out, return_stats, backend):
    if mask is not None:
        return None
    return axis_norm(x, None, normalized_shape, weight, None, eps, False, False, axis, out, None,
                     return_stats, backend)


def add_layer_norm(x, residual, normalized_shape, weight, bias, eps, axis, out, sum_out,
                   return_stats, backend):
    return axis_norm(x, residual, normalized_shape, weight, bias, eps, True, True, axis, out,
                     sum_out, return_stats, backend)


def add_rms_norm(x, residual, normalized_shape, weight, eps, axis, out, sum_out, return_stats,
                 backend):
    return axis_norm(x, residual, normalized_shape, weight, None, eps, False, True, axis, out,
                     sum_out, return_stats, backend)


cdef object axis_norm_backward(object grad_y, object x_, object normalized_shape, object stats,
                               object weight, bint center, object axis, object grad_sum,
                               object need, object backend):
    cdef:
        int kind = kind_of(x_) if plain(x_) else -1
        cnp.ndarray x
        object mean, rstd, grad_x = None, grad_weight = None, grad_bias = None
        Axes axes
        Call call
    if kind < 0 or type(stats) is not Stats or not common_need(need):
        return None
    x = x_
    backend = chosen(backend, x)
    if not axes_of(x, normalized_shape, axis, &axes) or backend is None:
        return None
    mean, rstd = <object> (<tuple> stats)[0], <object> (<tuple> stats)[1]
    if (not like(grad_y, x) or (grad_sum is not None and not like(grad_sum, x))
            or not parameter(weight, x, kind, cnp.PyArray_DIMS(x) + axes.first, axes.count)
            or (mean is None) == center or rstd is None
            or not statistic(mean, kind, axes.kept_shape, axes.kept)
            or not statistic(rstd, kind, axes.kept_shape, axes.kept)):
        return None

    if (<tuple> need)[0] is True:
        grad_x = empty_as(x)
    if (<tuple> need)[1] is True:
        grad_weight = empty(reals(kind), axes.count, cnp.PyArray_DIMS(x) + axes.first)
    if (<tuple> need)[2] is True and center:
        grad_bias = empty(reals(kind), axes.count, cnp.PyArray_DIMS(x) + axes.first)
    call = call_for(x, None)
    set_axes(&call, &axes)
    call.grad_y, call.grad_total = data(grad_y), data(grad_sum)
    wide = in_reals(weight, kind)
    call.mean, call.rstd, call.weight = data(mean), data(rstd), data(wide)
    call.grad_x, call.grad_weight, call.grad_bias = data(grad_x), data(grad_weight), data(grad_bias)
    if axes.rows:
        solve(backend, ("rows", "backward"), tables[kind].rows_backward, x, &call)
    else:
        solve(backend, ("columns", "backward"), tables[kind].columns_backward, x, &call)
    return gradients_of(grad_x, grad_weight, grad_bias, weight, kind)


cdef inline object gradients_of(object grad_x, object grad_weight, object grad_bias, object weight,
                                int kind):
    return named(Gradients, (grad_x, as_type_of(weight, grad_weight, kind),
                             as_type_of(weight, grad_bias, kind)))


cdef inline bint common_need(object need) noexcept:
    return (PyTuple_CheckExact(need) and len(<tuple> need) == 3
            and true_or_false((<tuple> need)[0]) and true_or_false((<tuple> need)[1])
            and true_or_false((<tuple> need)[2]))


def layer_norm_backward(grad_y, x, normalized_shape, stats, weight, axis, grad_sum, mask, need,
                        backend):
    if mask is not None:
        return None
    return axis_norm_backward(grad_y, x, normalized_shape, stats, weight, True, axis, grad_sum,
                              need, backend)


def rms_norm_backward(grad_y, x, normalized_shape, stats, weight, axis, grad_sum, mask, need,
                      backend):
    if mask is not None:
        return None
    return axis_norm_backward(grad_y, x, normalized_shape, stats, weight, False, axis, grad_sum,
                              need, backend)


# ----------------------------------------------------------- batch norm, instance norm, group norm


cdef bint channels_of(cnp.ndarray x, object layout, bint per_image, Py_ssize_t groups,
                      Channels* c):
    """The canonical problem of a call; 0 groups are as many as channels."""
    cdef int ndim = cnp.PyArray_NDIM(x)
    if ndim < 2 or cnp.PyArray_SIZE(x) == 0 or not PyUnicode_CheckExact(layout):
        return False
    last = channels_last.get(layout)
    if last is None:
        return False
    c.last = last is True
    c.N, c.C = cnp.PyArray_DIM(x, 0), cnp.PyArray_DIM(x, ndim - 1 if c.last else 1)
    if not cnp.PyArray_IS_C_CONTIGUOUS(x):
        if c.last:
            return False
        c.last = True
    c.S = cnp.PyArray_SIZE(x) // (c.N * c.C)
    c.per_image = per_image
    if groups == 0:
        groups = c.C
    if c.C % groups:
        return False
    c.stats[0], c.stats[1] = c.N if per_image else 1, groups
    place_axes(c)
    return True


cdef object channel_norm(object x_, object running_mean, object running_var, object weight,
                         object bias, object eps_, bint per_image, Py_ssize_t groups, bint batch,
                         bint frozen, object momentum_, object layout, object activation,
                         object residual, object out, object return_stats, object backend):
    cdef:
        int kind = kind_of(x_) if plain(x_) or lies_last(x_) else -1
        double eps, momentum
        cnp.ndarray x, y
        object mean = None, rstd = None, index
        Py_ssize_t count, per_statistic
        Channels c
        Statistics statistics
        Table* table
        Call call
        bint running = running_mean is not None
    if (kind < 0 or not true_or_false(return_stats) or not number(eps_, &eps)
            or not number(momentum_, &momentum)):
        return None
    x = x_
    if not (eps >= 0 and isfinite(eps)) or (eps == 0 and batch and not frozen):
        return None
    backend = chosen(backend, x)
    if not channels_of(x, layout, per_image, groups, &c) or backend is None:
        return None
    problem = "channels_last" if c.last else "channels_first"
    count = c.stats[0] * c.stats[1]
    per_statistic = cnp.PyArray_SIZE(x) // count
    if not frozen and per_statistic == 1 and groups == 0:
        return None
    if (not parameter(weight, x, kind, &c.C, 1) or not parameter(bias, x, kind, &c.C, 1)
            or not parameter(running_mean, x, kind, &c.C, 1)
            or not parameter(running_var, x, kind, &c.C, 1)
            or running != (running_var is not None) or (frozen and not running)):
        return None
    if residual is not None and not like(residual, x):
        return None
    if activation is None:
        index = 0
    else:
        index = activations.get(activation) if PyUnicode_CheckExact(activation) else None
        if index is None or return_stats is True:
            return None
    if out is not None and not (writable_for(out, x, residual) and apart(out, weight)
                                and apart(out, bias) and apart(out, running_mean)
                                and apart(out, running_var)):
        return None
    if running and not frozen and not (
            cnp.PyArray_ISWRITEABLE(<cnp.ndarray> running_mean)
            and cnp.PyArray_ISWRITEABLE(<cnp.ndarray> running_var)
            and apart(running_mean, running_var)
            and apart(running_mean, x) and apart(running_var, x)
            and apart(running_mean, residual) and apart(running_var, residual)
            and apart(running_mean, weight) and apart(running_var, weight)
            and apart(running_mean, bias) and apart(running_var, bias)):
        return None

    weight, bias = in_reals(weight, kind), in_reals(bias, kind)
    kept_mean, kept_var = running_mean, running_var
    running_mean, running_var = in_reals(running_mean, kind), in_reals(running_var, kind)
    table = tables[kind]
    y = empty_as(x) if out is None else out
    call = call_for(x, y)
    call.N, call.C, call.S, call.B, call.G = c.N, c.C, c.S, c.stats[0], c.stats[1]
    call.residual, call.weight, call.bias = data(residual), data(weight), data(bias)
    call.eps, call.activation = eps, index
    if return_stats is True:
        mean = new_statistic(kind, &c)
        rstd = new_statistic(kind, &c)
    if frozen:
        call.mean, call.var, call.rstd = data(running_mean), data(running_var), data(rstd)
        solve(backend, (problem, "apply"),
              table.channels[c.last].apply, x, &call)
        if return_stats is True:
            memcpy(data(mean), data(running_mean), cnp.PyArray_NBYTES(<cnp.ndarray> mean))
        return (y, named(Stats, (mean, rstd))) if return_stats is True else y
    place(&statistics, 3 * count)
    try:
        call.mean = statistics.scratch
        call.rstd = <double*> statistics.scratch + count
        call.var = <double*> statistics.scratch + 2 * count
        if return_stats is True:
            call.mean, call.rstd = data(mean), data(rstd)
        solve(backend, (problem, "normalize"),
              table.channels[c.last].normalize, x, &call)
        if running:
            call.running_mean, call.running_var = data(running_mean), data(running_var)
            call.momentum = momentum
            solve("cython", (), table.move_running, x, &call)
            put_back(running_mean, kept_mean, kind)
            put_back(running_var, kept_var, kind)
    finally:
        leave(&statistics)
    return (y, named(Stats, (mean, rstd))) if return_stats is True else y


cdef inline cnp.ndarray new_statistic(int kind, const Channels* c):
    return empty(reals(kind), 2 if c.per_image else 1,
                 &c.stats[0] if c.per_image else &c.stats[1])


cdef inline bint torchs(object convention):
    return PyUnicode_CheckExact(convention) and convention == "torch"


def batch_norm(x, running_mean, running_var, weight, bias, training, momentum, eps, layout,
               activation, residual, mask, convention, out, return_stats, backend):
    if mask is not None or not torchs(convention) or not true_or_false(training):
        return None
    return channel_norm(x, running_mean, running_var, weight, bias, eps, False, 0, True,
                        training is False, momentum, layout, activation, residual, out,
                        return_stats, backend)


def instance_norm(x, running_mean, running_var, weight, bias, use_input_stats, momentum, eps,
                  layout, activation, residual, mask, convention, out, return_stats, backend):
    if mask is not None or not torchs(convention) or not true_or_false(use_input_stats):
        return None
    cdef bint frozen = use_input_stats is False
    return channel_norm(x, running_mean, running_var, weight, bias, eps, not frozen, 0, False,
                        frozen, momentum, layout, activation, residual, out, return_stats, backend)


cdef inline Py_ssize_t groups_of(object num_groups) noexcept:
    """The number of groups, or -1 for what is not common."""
    cdef Py_ssize_t groups
    return groups if integer(num_groups, &groups) and groups > 0 else -1


def group_norm(x, num_groups, weight, bias, eps, layout, activation, residual, mask, out,
               return_stats, backend):
    cdef Py_ssize_t groups = groups_of(num_groups)
    if groups < 0 or mask is not None:
        return None
    return channel_norm(x, None, None, weight, bias, eps, True, groups, False, False, 0.0, layout,
                        activation, residual, out, return_stats, backend)


cdef object channel_norm_backward(object grad_y, object x_, object stats, object weight,
                                  bint per_image, Py_ssize_t groups, bint frozen, object layout,
                                  object need, object backend):
    cdef:
        int kind = kind_of(x_) if plain(x_) or lies_last(x_) else -1
        int ndim = 2 if per_image else 1
        cnp.ndarray x
        object mean, rstd, grad_x = None, grad_weight = None, grad_bias = None
        const cnp.npy_intp* shape
        Channels c
        Table* table
        Call call
    if kind < 0 or type(stats) is not Stats or not common_need(need):
        return None
    x = x_
    backend = chosen(backend, x)
    if not channels_of(x, layout, per_image, groups, &c) or backend is None:
        return None
    problem = "channels_last" if c.last else "channels_first"
    shape = &c.stats[0] if per_image else &c.stats[1]
    mean, rstd = <object> (<tuple> stats)[0], <object> (<tuple> stats)[1]
    if (not like(grad_y, x) or not parameter(weight, x, kind, &c.C, 1)
            or mean is None or not statistic(mean, kind, shape, ndim)
            or rstd is None or not statistic(rstd, kind, shape, ndim)):
        return None

    table = tables[kind]
    if (<tuple> need)[0] is True:
        grad_x = empty_as(x)
    if (<tuple> need)[1] is True:
        grad_weight = empty(reals(kind), 1, &c.C)
    if (<tuple> need)[2] is True:
        grad_bias = empty(reals(kind), 1, &c.C)
    call = call_for(x, None)
    call.N, call.C, call.S, call.B, call.G = c.N, c.C, c.S, c.stats[0], c.stats[1]
    call.grad_y, call.mean, call.rstd = data(grad_y), data(mean), data(rstd)
    wide = in_reals(weight, kind)
    call.weight = data(wide)
    call.grad_x, call.grad_weight, call.grad_bias = data(grad_x), data(grad_weight), data(grad_bias)
    if frozen:
        solve(backend, (problem, "backward_apply"),
              table.channels[c.last].backward_apply, x, &call)
    else:
        solve(backend, (problem, "backward"),
              table.channels[c.last].backward, x, &call)
    return gradients_of(grad_x, grad_weight, grad_bias, weight, kind)


def batch_norm_backward(grad_y, x, stats, weight, training, layout, mask, need, backend):
    if mask is not None or not true_or_false(training):
        return None
    return channel_norm_backward(grad_y, x, stats, weight, False, 0, training is False, layout,
                                 need, backend)


def instance_norm_backward(grad_y, x, stats, weight, use_input_stats, layout, mask, need,
                           backend):
    if mask is not None or not true_or_false(use_input_stats):
        return None
    cdef bint frozen = use_input_stats is False
    return channel_norm_backward(grad_y, x, stats, weight, not frozen, 0, frozen, layout, need,
                                 backend)


def group_norm_backward(grad_y, x, num_groups, stats, weight, layout, mask, need, backend):
    cdef Py_ssize_t groups = groups_of(num_groups)
    if groups < 0 or mask is not None:
        return None
    return channel_norm_backward(grad_y, x, stats, weight, True, groups, False, layout, need,
                                 backend)
