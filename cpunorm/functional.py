"""Batch, layer, instance, group and RMS normalization as functions, forward and backward.

Names, order and defaults are those of ``torch.nn.functional``, whose ``input`` is ``x`` here; what
is ours comes after ``*``. Everything here takes float16, bfloat16 (of ``ml_dtypes``), float32 or
float64 arrays of any strides. Where x is dense, in whatever order its axes lie, the result has x's
strides; where it is not, the result is in C order.

With an x of 16 bits, sums, statistics and the affine step are those of float32, and a result is
rounded once, to nearest even; what float16 cannot hold becomes infinite. Parameters and running
statistics may then be float32 too, which suits training.
"""

from . import _canonical
from ._canonical import EPS, MOMENTUM

try:
    # The common case in compiled code: it answers, or declines with None.
    from . import _front
except ImportError:
    from . import _no_front as _front


def batch_norm(
    x,
    running_mean,
    running_var,
    weight=None,
    bias=None,
    training=False,
    momentum=MOMENTUM,
    eps=EPS,
    *,
    layout="NCHW",
    activation=None,
    residual=None,
    mask=None,
    convention="torch",
    out=None,
    return_stats=False,
    backend=None,
):
    r"""Normalise every channel over the batch and its positions.

    .. math:: y = \frac{x - \mathrm{E}[x]}{\sqrt{\mathrm{Var}[x] + \epsilon}}
              \cdot \text{weight} + \text{bias}

    with mean and (biased) variance of each channel: those of `x` in training, the running
    statistics otherwise [1]_.

    Parameters
    ----------
    x : ndarray, shape (N, C, ...) or, with channels last, (N, ..., C)
        Of dtype float16, bfloat16, float32 or float64.
    running_mean, running_var : ndarray, shape (C,), or None
        Used when not training. In training they are updated in place,
        ``running = (1 - momentum) * running + momentum * new``, with the unbiased variance
        (in torch's convention). Dtypes as for `weight`.
    weight, bias : ndarray, shape (C,), optional
        In x's dtype, or float32 for an `x` of 16 bits; 1 and 0 where absent.
    training : bool
        Whether the statistics are those of `x`.
    momentum : float
        The weight of the new value in the running statistics.
    eps : float
        Added to the variance; not negative, and not zero in training.
    layout : {"NCHW", "NHWC", "channels_first", "channels_last"}
        Where the channels are: axis 1, or the last axis, at any rank.
    activation : {None, "relu", "silu", "gelu", "sigmoid", "tanh"}
        Applied last, in the same pass over memory (gelu is the exact one, with erf).
    residual : ndarray, optional
        Shape and dtype of `x`; added after the affine step, before the activation.
    mask : ndarray of bool, shape (N, ...), optional
        Which positions count; of x's shape without the channels. The others take no part in
        anything, and come out zero.
    convention : {"torch", "keras", "onnx"}
        Whose `momentum`, default values and variance these are, see Notes.
    out : ndarray, optional
        Where to put the result: shape and dtype of `x`; may be `x` or `residual` itself.
    return_stats : bool
        Also return what the backward pass needs.
    backend : {"auto", "cython", "numba", "numpy"}, optional
        None is the current default, see `use_backend`.

    Returns
    -------
    y : ndarray
        Shape, dtype and, where `x` is dense, strides of `x`.
    stats : Stats
        With `return_stats`: mean and rstd, of shape (C,), in float32 (float64 for float64 input).

    Raises
    ------
    TypeError
        If an argument is of the wrong kind or an array of the wrong dtype.
    ValueError
        If a shape or value is wrong, or `return_stats` goes with an `activation`, which backward
        does not differentiate; in training also if there is one value per channel.
    RuntimeError
        If the backend is not available here.

    Notes
    -----
    Which `convention` says how running statistics move, and what `momentum` and `eps` are where
    they are not given:

    ========== =================== ================ ====== =========
    convention momentum weighs the running variance eps    momentum
    ========== =================== ================ ====== =========
    "torch"    new value           unbiased         1e-5   0.1
    "keras"    old value           biased           1e-3   0.99
    "onnx"     old value           biased           1e-5   0.9
    ========== =================== ================ ====== =========

    With a `mask`, a channel of which fewer than two values count leaves its running statistics as
    they are; one of which none counts has a mean and rstd of zero.

    References
    ----------
    .. [1] S. Ioffe, C. Szegedy, "Batch Normalization: Accelerating Deep Network Training by
       Reducing Internal Covariate Shift", ICML 2015, arXiv:1502.03167.

    Examples
    --------
    >>> import numpy as np, cpunorm
    >>> x = np.array([[1.0, 10.0], [3.0, 30.0]])
    >>> cpunorm.batch_norm(x, None, None, training=True, eps=1e-12)
    array([[-1., -1.],
           [ 1.,  1.]])
    >>> cpunorm.batch_norm(x, np.array([1.0, 10.0]), np.array([4.0, 100.0]), eps=0.0)
    array([[0., 0.],
           [1., 2.]])
    """
    common = _front.batch_norm(
        x,
        running_mean,
        running_var,
        weight,
        bias,
        training,
        momentum,
        eps,
        layout,
        activation,
        residual,
        mask,
        convention,
        out,
        return_stats,
        backend,
    )
    if common is not None:
        return common
    return _canonical.channel_norm(
        "batch_norm",
        x,
        weight,
        bias,
        eps,
        running=(running_mean, running_var),
        frozen=not _canonical.flag("training", training),
        momentum=momentum,
        layout=layout,
        activation=activation,
        residual=residual,
        mask=mask,
        convention=convention,
        out=out,
        return_stats=return_stats,
        backend=backend,
    )


def instance_norm(
    x,
    running_mean=None,
    running_var=None,
    weight=None,
    bias=None,
    use_input_stats=True,
    momentum=MOMENTUM,
    eps=EPS,
    *,
    layout="NCHW",
    activation=None,
    residual=None,
    mask=None,
    convention="torch",
    out=None,
    return_stats=False,
    backend=None,
):
    """Normalise every channel of every image over its positions.

    The formula of `batch_norm` with mean and (biased) variance of each (n, c) [1]_; it is
    ``group_norm`` with as many groups as channels.

    Parameters
    ----------
    x : ndarray, shape (N, C, ...) or, with channels last, (N, ..., C)
        Of dtype float16, bfloat16, float32 or float64.
    running_mean, running_var : ndarray, shape (C,), optional
        Used without `use_input_stats`. With it they are updated in place, with the means over N of
        the means and of the unbiased variances. Dtypes as for `weight`.
    weight, bias : ndarray, shape (C,), optional
        In x's dtype, or float32 for an `x` of 16 bits; 1 and 0 where absent.
    use_input_stats : bool
        Whether the statistics are those of `x`.
    momentum : float
        The weight of the new value in the running statistics.
    eps : float
        Added to the variance; not negative.
    layout : {"NCHW", "NHWC", "channels_first", "channels_last"}
        Where the channels are: axis 1, or the last axis, at any rank.
    activation : {None, "relu", "silu", "gelu", "sigmoid", "tanh"}
        Applied last, in the same pass over memory (gelu is the exact one, with erf).
    residual : ndarray, optional
        Shape and dtype of `x`; added after the affine step, before the activation.
    mask : ndarray of bool, shape (N, ...), optional
        Which positions count; of x's shape without the channels. The others take no part in
        anything, and come out zero.
    convention : {"torch", "keras", "onnx"}
        Whose `momentum`, default values and variance these are, see Notes.
    out : ndarray, optional
        Where to put the result: shape and dtype of `x`; may be `x` or `residual` itself.
    return_stats : bool
        Also return what the backward pass needs.
    backend : {"auto", "cython", "numba", "numpy"}, optional
        None is the current default, see `use_backend`.

    Returns
    -------
    y : ndarray
        Shape, dtype and, where `x` is dense, strides of `x`.
    stats : Stats
        With `return_stats`: mean and rstd, of shape (N, C), or (C,) without `use_input_stats`, in
        float32 (float64 for float64 input).

    Raises
    ------
    TypeError
        If an argument is of the wrong kind or an array of the wrong dtype.
    ValueError
        If a shape or value is wrong, or `return_stats` goes with an `activation`, which backward
        does not differentiate; with `use_input_stats` also if there is one position.
    RuntimeError
        If the backend is not available here.

    References
    ----------
    .. [1] D. Ulyanov, A. Vedaldi, V. Lempitsky, "Instance Normalization: The Missing Ingredient
       for Fast Stylization", 2016, arXiv:1607.08022.

    Examples
    --------
    >>> import numpy as np, cpunorm
    >>> x = np.array([[[1.0, 3.0], [10.0, 30.0]]])
    >>> cpunorm.instance_norm(x, eps=0.0)
    array([[[-1.,  1.],
            [-1.,  1.]]])
    """
    common = _front.instance_norm(
        x,
        running_mean,
        running_var,
        weight,
        bias,
        use_input_stats,
        momentum,
        eps,
        layout,
        activation,
        residual,
        mask,
        convention,
        out,
        return_stats,
        backend,
    )
    if common is not None:
        return common
    return _canonical.channel_norm(
        "instance_norm",
        x,
        weight,
        bias,
        eps,
        running=(running_mean, running_var),
        frozen=not _canonical.flag("use_input_stats", use_input_stats),
        momentum=momentum,
        layout=layout,
        activation=activation,
        residual=residual,
        mask=mask,
        convention=convention,
        out=out,
        return_stats=return_stats,
        backend=backend,
    )


def group_norm(
    x,
    num_groups,
    weight=None,
    bias=None,
    eps=1e-5,
    *,
    layout="NCHW",
    activation=None,
    residual=None,
    mask=None,
    out=None,
    return_stats=False,
    backend=None,
):
    """Normalise every group of channels of every image.

    The formula of `batch_norm` with mean and (biased) variance of each (n, g) over the positions
    and the ``C // num_groups`` neighbouring channels of the group [1]_. The affine step is per
    channel.

    Parameters
    ----------
    x : ndarray, shape (N, C, ...) or, with channels last, (N, ..., C)
        Of dtype float16, bfloat16, float32 or float64.
    num_groups : int
        Divides C.
    weight, bias : ndarray, shape (C,), optional
        In x's dtype, or float32 for an `x` of 16 bits; 1 and 0 where absent.
    eps : float
        Added to the variance; not negative.
    layout : {"NCHW", "NHWC", "channels_first", "channels_last"}
        Where the channels are: axis 1, or the last axis, at any rank.
    activation : {None, "relu", "silu", "gelu", "sigmoid", "tanh"}
        Applied last, in the same pass over memory (gelu is the exact one, with erf).
    residual : ndarray, optional
        Shape and dtype of `x`; added after the affine step, before the activation.
    mask : ndarray of bool, shape (N, ...), optional
        Which positions count; of x's shape without the channels. The others take no part in
        anything, and come out zero.
    out : ndarray, optional
        Where to put the result: shape and dtype of `x`; may be `x` or `residual` itself.
    return_stats : bool
        Also return what the backward pass needs.
    backend : {"auto", "cython", "numba", "numpy"}, optional
        None is the current default, see `use_backend`.

    Returns
    -------
    y : ndarray
        Shape, dtype and, where `x` is dense, strides of `x`.
    stats : Stats
        With `return_stats`: mean and rstd, of shape (N, num_groups), in float32 (float64 for
        float64 input).

    Raises
    ------
    TypeError
        If an argument is of the wrong kind or an array of the wrong dtype.
    ValueError
        If a shape or value is wrong, or `return_stats` goes with an `activation`, which backward
        does not differentiate.
    RuntimeError
        If the backend is not available here.

    References
    ----------
    .. [1] Y. Wu, K. He, "Group Normalization", ECCV 2018, arXiv:1803.08494.

    Examples
    --------
    >>> import numpy as np, cpunorm
    >>> x = np.array([[1.0, 3.0, 10.0, 30.0]])
    >>> cpunorm.group_norm(x, 2, eps=0.0)
    array([[-1.,  1., -1.,  1.]])

    With as many groups as channels it is instance norm:

    >>> x = np.random.default_rng(0).normal(size=(2, 4, 5, 5))
    >>> bool(np.all(cpunorm.group_norm(x, 4) == cpunorm.instance_norm(x)))
    True
    """
    common = _front.group_norm(
        x,
        num_groups,
        weight,
        bias,
        eps,
        layout,
        activation,
        residual,
        mask,
        out,
        return_stats,
        backend,
    )
    if common is not None:
        return common
    return _canonical.channel_norm(
        "group_norm",
        x,
        weight,
        bias,
        eps,
        num_groups=num_groups,
        layout=layout,
        activation=activation,
        residual=residual,
        mask=mask,
        out=out,
        return_stats=return_stats,
        backend=backend,
    )


def layer_norm(
    x,
    normalized_shape,
    weight=None,
    bias=None,
    eps=1e-5,
    *,
    axis=None,
    mask=None,
    out=None,
    return_stats=False,
    backend=None,
):
    r"""Normalise over the trailing axes, or any others.

    .. math:: y = \frac{x - \mathrm{E}[x]}{\sqrt{\mathrm{Var}[x] + \epsilon}}
              \cdot \text{weight} + \text{bias}

    with mean and (biased) variance over the normalised axes, and the affine step along them [1]_.

    Parameters
    ----------
    x : ndarray
        Any rank; float16, bfloat16, float32 or float64.
    normalized_shape : int or sequence of ints
        The sizes of the normalised axes.
    weight, bias : ndarray, shape `normalized_shape`, optional
        In x's dtype, or float32 for an `x` of 16 bits; 1 and 0 where absent.
    eps : float
        Added to the variance; not negative.
    axis : int or sequence of ints, optional
        The normalised axes, one per entry of `normalized_shape`; None is the trailing ones.
        ``axis=1`` normalises an NCHW array over the channels of every position, with no transpose
        and no copy.
    mask : ndarray of bool, optional
        Which positions count; of x's shape without the last of the normalised axes, the channels.
        The others take no part in anything, and come out zero.
    out : ndarray, optional
        Where to put the result: shape and dtype of `x`; may be `x` itself.
    return_stats : bool
        Also return what the backward pass needs.
    backend : {"auto", "cython", "numba", "numpy"}, optional
        None is the current default, see `use_backend`.

    Returns
    -------
    y : ndarray
        Shape, dtype and, where `x` is dense, strides of `x`.
    stats : Stats
        With `return_stats`: mean and rstd, of x's shape without the normalised axes.

    Raises
    ------
    TypeError
        If an argument is of the wrong kind or an array of the wrong dtype.
    ValueError
        If a shape or value is wrong.
    RuntimeError
        If the backend is not available here.

    References
    ----------
    .. [1] J. L. Ba, J. R. Kiros, G. E. Hinton, "Layer Normalization", 2016, arXiv:1607.06450.

    Examples
    --------
    >>> import numpy as np, cpunorm
    >>> cpunorm.layer_norm(np.array([[1.0, 3.0], [10.0, 30.0]]), 2, eps=0.0)
    array([[-1.,  1.],
           [-1.,  1.]])

    Over the channels of an NCHW array:

    >>> x = np.random.default_rng(0).normal(size=(2, 8, 5, 5))
    >>> y = cpunorm.layer_norm(x, 8, axis=1)
    >>> bool(np.abs(y.mean(axis=1)).max() < 1e-12)
    True
    """
    common = _front.layer_norm(
        x, normalized_shape, weight, bias, eps, axis, mask, out, return_stats, backend
    )
    if common is not None:
        return common
    return _canonical.axis_norm(
        x,
        None,
        normalized_shape,
        weight,
        bias,
        eps,
        axis=axis,
        center=True,
        add=False,
        mask=mask,
        out=out,
        return_stats=return_stats,
        backend=backend,
    )


def rms_norm(
    x,
    normalized_shape,
    weight=None,
    eps=None,
    *,
    axis=None,
    mask=None,
    out=None,
    return_stats=False,
    backend=None,
):
    r"""Divide by the root mean square over the trailing axes, or any others.

    .. math:: y = \frac{x}{\sqrt{\mathrm{E}[x^2] + \epsilon}} \cdot \text{weight}

    with the mean square over the normalised axes, and the affine step along them [1]_.

    Parameters
    ----------
    x : ndarray
        Any rank; float16, bfloat16, float32 or float64.
    normalized_shape : int or sequence of ints
        The sizes of the normalised axes.
    weight : ndarray, shape `normalized_shape`, optional
        In x's dtype, or float32 for an `x` of 16 bits; 1 where absent.
    eps : float, optional
        Added to the mean square; not negative. None is the machine epsilon of the dtype of the
        statistics.
    axis : int or sequence of ints, optional
        The normalised axes, one per entry of `normalized_shape`; None is the trailing ones.
        ``axis=1`` normalises an NCHW array over the channels of every position, with no transpose
        and no copy.
    mask : ndarray of bool, optional
        Which positions count; of x's shape without the last of the normalised axes, the channels.
        The others take no part in anything, and come out zero.
    out : ndarray, optional
        Where to put the result: shape and dtype of `x`; may be `x` itself.
    return_stats : bool
        Also return what the backward pass needs.
    backend : {"auto", "cython", "numba", "numpy"}, optional
        None is the current default, see `use_backend`.

    Returns
    -------
    y : ndarray
        Shape, dtype and, where `x` is dense, strides of `x`.
    stats : Stats
        With `return_stats`: rstd, with a mean of None, of x's shape without the normalised axes.

    Raises
    ------
    TypeError
        If an argument is of the wrong kind or an array of the wrong dtype.
    ValueError
        If a shape or value is wrong.
    RuntimeError
        If the backend is not available here.

    References
    ----------
    .. [1] B. Zhang, R. Sennrich, "Root Mean Square Layer Normalization", NeurIPS 2019,
       arXiv:1910.07467.

    Examples
    --------
    >>> import numpy as np, cpunorm
    >>> cpunorm.rms_norm(np.array([[1.0, 7.0]]), 2, eps=0.0)
    array([[0.2, 1.4]])
    """
    common = _front.rms_norm(
        x, normalized_shape, weight, eps, axis, mask, out, return_stats, backend
    )
    if common is not None:
        return common
    return _canonical.axis_norm(
        x,
        None,
        normalized_shape,
        weight,
        None,
        eps,
        axis=axis,
        center=False,
        add=False,
        mask=mask,
        out=out,
        return_stats=return_stats,
        backend=backend,
    )


def add_layer_norm(
    x,
    residual,
    normalized_shape,
    weight=None,
    bias=None,
    eps=1e-5,
    *,
    axis=None,
    out=None,
    sum_out=None,
    return_stats=False,
    backend=None,
):
    """Add, then normalise: `layer_norm` of ``x + residual``, and the sum.

    Each input is read once; the step between two blocks of a transformer [1]_.

    Parameters
    ----------
    x, residual : ndarray
        Any rank; float16, bfloat16, float32 or float64, both of one shape and dtype.
    normalized_shape : int or sequence of ints
        The sizes of the normalised axes.
    weight, bias : ndarray, shape `normalized_shape`, optional
        In x's dtype, or float32 for an `x` of 16 bits; 1 and 0 where absent.
    eps : float
        Added to the variance; not negative.
    axis : int or sequence of ints, optional
        The normalised axes, one per entry of `normalized_shape`; None is the trailing ones.
        ``axis=1`` normalises an NCHW array over the channels of every position, with no transpose
        and no copy.
    out : ndarray, optional
        Where to put the result: shape and dtype of `x`; may be `x` or `residual` itself.
    sum_out : ndarray, optional
        The same for the sum; must not overlap `out`.
    return_stats : bool
        Also return what the backward pass needs.
    backend : {"auto", "cython", "numba", "numpy"}, optional
        None is the current default, see `use_backend`.

    Returns
    -------
    y : ndarray
        Shape, dtype and, where `x` is dense, strides of `x`.
    total : ndarray
        ``x + residual``, rounded to their dtype: what is normalised, and the x of backward.
    stats : Stats
        With `return_stats`: mean and rstd, of x's shape without the normalised axes.

    Raises
    ------
    TypeError
        If an argument is of the wrong kind or an array of the wrong dtype.
    ValueError
        If a shape or value is wrong.
    RuntimeError
        If the backend is not available here.

    References
    ----------
    .. [1] J. L. Ba, J. R. Kiros, G. E. Hinton, "Layer Normalization", 2016, arXiv:1607.06450.

    Examples
    --------
    >>> import numpy as np, cpunorm
    >>> x, residual = np.array([[1.0, 2.0]]), np.array([[0.0, 1.0]])
    >>> y, total = cpunorm.add_layer_norm(x, residual, 2, eps=0.0)
    >>> y
    array([[-1.,  1.]])
    >>> total
    array([[1., 3.]])
    """
    common = _front.add_layer_norm(
        x, residual, normalized_shape, weight, bias, eps, axis, out, sum_out, return_stats, backend
    )
    if common is not None:
        return common
    return _canonical.axis_norm(
        x,
        residual,
        normalized_shape,
        weight,
        bias,
        eps,
        axis=axis,
        center=True,
        add=True,
        out=out,
        sum_out=sum_out,
        return_stats=return_stats,
        backend=backend,
    )


def add_rms_norm(
    x,
    residual,
    normalized_shape,
    weight=None,
    eps=None,
    *,
    axis=None,
    out=None,
    sum_out=None,
    return_stats=False,
    backend=None,
):
    """Add, then normalise: `rms_norm` of ``x + residual``, and the sum.

    Each input is read once; the step between two blocks of a transformer [1]_.

    Parameters
    ----------
    x, residual : ndarray
        Any rank; float16, bfloat16, float32 or float64, both of one shape and dtype.
    normalized_shape : int or sequence of ints
        The sizes of the normalised axes.
    weight : ndarray, shape `normalized_shape`, optional
        In x's dtype, or float32 for an `x` of 16 bits; 1 where absent.
    eps : float, optional
        Added to the mean square; not negative. None is the machine epsilon of the dtype of the
        statistics.
    axis : int or sequence of ints, optional
        The normalised axes, one per entry of `normalized_shape`; None is the trailing ones.
        ``axis=1`` normalises an NCHW array over the channels of every position, with no transpose
        and no copy.
    out : ndarray, optional
        Where to put the result: shape and dtype of `x`; may be `x` or `residual` itself.
    sum_out : ndarray, optional
        The same for the sum; must not overlap `out`.
    return_stats : bool
        Also return what the backward pass needs.
    backend : {"auto", "cython", "numba", "numpy"}, optional
        None is the current default, see `use_backend`.

    Returns
    -------
    y : ndarray
        Shape, dtype and, where `x` is dense, strides of `x`.
    total : ndarray
        ``x + residual``, rounded to their dtype: what is normalised, and the x of backward.
    stats : Stats
        With `return_stats`: rstd, with a mean of None, of x's shape without the normalised axes.

    Raises
    ------
    TypeError
        If an argument is of the wrong kind or an array of the wrong dtype.
    ValueError
        If a shape or value is wrong.
    RuntimeError
        If the backend is not available here.

    References
    ----------
    .. [1] B. Zhang, R. Sennrich, "Root Mean Square Layer Normalization", NeurIPS 2019,
       arXiv:1910.07467.

    Examples
    --------
    >>> import numpy as np, cpunorm
    >>> x, residual = np.array([[1.0, 3.0]]), np.array([[0.0, 4.0]])
    >>> y, total = cpunorm.add_rms_norm(x, residual, 2, eps=0.0)
    >>> y
    array([[0.2, 1.4]])
    >>> total
    array([[1., 7.]])
    """
    common = _front.add_rms_norm(
        x, residual, normalized_shape, weight, eps, axis, out, sum_out, return_stats, backend
    )
    if common is not None:
        return common
    return _canonical.axis_norm(
        x,
        residual,
        normalized_shape,
        weight,
        None,
        eps,
        axis=axis,
        center=False,
        add=True,
        out=out,
        sum_out=sum_out,
        return_stats=return_stats,
        backend=backend,
    )


def batch_norm_backward(
    grad_y,
    x,
    stats,
    weight=None,
    training=True,
    *,
    layout="NCHW",
    mask=None,
    need=(True, True, True),
    backend=None,
):
    """Return the gradients of `batch_norm` with respect to x, weight and bias.

    With ``g = grad_y * weight`` and ``xhat = (x - mean) * rstd``::

        grad_x = rstd * (g - mean(g) - xhat * mean(g * xhat))

    where the means are taken over what the statistics cover; the weight's gradient is the sum of
    ``grad_y * xhat``, the bias's that of ``grad_y``. With frozen statistics
    ``grad_x = rstd * g``.

    Parameters
    ----------
    grad_y : ndarray
        Gradient with respect to the result; shape and dtype of `x`.
    x : ndarray, shape (N, C, ...) or, with channels last, (N, ..., C)
        The input of the forward pass.
    stats : Stats
        What the forward pass returned: shape (C,).
    weight : ndarray, shape (C,), optional
        The weight of the forward pass.
    training : bool
        Whether the statistics were those of `x`; otherwise they are constants.
    layout : {"NCHW", "NHWC", "channels_first", "channels_last"}
        Where the channels are: axis 1, or the last axis, at any rank.
    mask : ndarray of bool, shape (N, ...), optional
        Which positions count; of x's shape without the channels. The others take no part in
        anything, and their gradient is zero.
    need : (bool, bool, bool)
        Which of the gradients of x, weight and bias to compute.
    backend : {"auto", "cython", "numba", "numpy"}, optional
        None is the current default, see `use_backend`.

    Returns
    -------
    Gradients
        A named tuple (x, weight, bias), None where not needed. Those of weight and bias are there
        even where there is no weight or bias, in the weight's dtype, else the statistics'.

    Raises
    ------
    TypeError
        If an argument is of the wrong kind or an array of the wrong dtype.
    ValueError
        If a shape or value is wrong.
    RuntimeError
        If the backend is not available here.

    Examples
    --------
    >>> import numpy as np, cpunorm
    >>> rng = np.random.default_rng(0)
    >>> x, grad_y = rng.normal(size=(2, 3, 4, 5, 5))
    >>> y, stats = cpunorm.batch_norm(x, None, None, training=True, return_stats=True)
    >>> grads = cpunorm.batch_norm_backward(grad_y, x, stats)
    >>> bool(np.allclose(grads.bias, grad_y.sum(axis=(0, 2, 3))))
    True
    """
    common = _front.batch_norm_backward(
        grad_y, x, stats, weight, training, layout, mask, need, backend
    )
    if common is not None:
        return common
    return _canonical.channel_norm_backward(
        "batch_norm",
        grad_y,
        x,
        stats,
        weight,
        frozen=not _canonical.flag("training", training),
        layout=layout,
        mask=mask,
        need=need,
        backend=backend,
    )


def instance_norm_backward(
    grad_y,
    x,
    stats,
    weight=None,
    use_input_stats=True,
    *,
    layout="NCHW",
    mask=None,
    need=(True, True, True),
    backend=None,
):
    """Return the gradients of `instance_norm` with respect to x, weight and bias.

    With ``g = grad_y * weight`` and ``xhat = (x - mean) * rstd``::

        grad_x = rstd * (g - mean(g) - xhat * mean(g * xhat))

    where the means are taken over what the statistics cover; the weight's gradient is the sum of
    ``grad_y * xhat``, the bias's that of ``grad_y``. With frozen statistics
    ``grad_x = rstd * g``.

    Parameters
    ----------
    grad_y : ndarray
        Gradient with respect to the result; shape and dtype of `x`.
    x : ndarray, shape (N, C, ...) or, with channels last, (N, ..., C)
        The input of the forward pass.
    stats : Stats
        What the forward pass returned: shape (N, C), or (C,) without `use_input_stats`.
    weight : ndarray, shape (C,), optional
        The weight of the forward pass.
    use_input_stats : bool
        Whether the statistics were those of `x`; otherwise they are constants.
    layout : {"NCHW", "NHWC", "channels_first", "channels_last"}
        Where the channels are: axis 1, or the last axis, at any rank.
    mask : ndarray of bool, shape (N, ...), optional
        Which positions count; of x's shape without the channels. The others take no part in
        anything, and their gradient is zero.
    need : (bool, bool, bool)
        Which of the gradients of x, weight and bias to compute.
    backend : {"auto", "cython", "numba", "numpy"}, optional
        None is the current default, see `use_backend`.

    Returns
    -------
    Gradients
        A named tuple (x, weight, bias), None where not needed. Those of weight and bias are there
        even where there is no weight or bias, in the weight's dtype, else the statistics'.

    Raises
    ------
    TypeError
        If an argument is of the wrong kind or an array of the wrong dtype.
    ValueError
        If a shape or value is wrong.
    RuntimeError
        If the backend is not available here.

    Examples
    --------
    >>> import numpy as np, cpunorm
    >>> rng = np.random.default_rng(0)
    >>> x, grad_y = rng.normal(size=(2, 3, 4, 5, 5))
    >>> y, stats = cpunorm.instance_norm(x, return_stats=True)
    >>> grads = cpunorm.instance_norm_backward(grad_y, x, stats)
    >>> bool(np.abs(grads.x.sum(axis=(2, 3))).max() < 1e-12)
    True
    """
    common = _front.instance_norm_backward(
        grad_y, x, stats, weight, use_input_stats, layout, mask, need, backend
    )
    if common is not None:
        return common
    return _canonical.channel_norm_backward(
        "instance_norm",
        grad_y,
        x,
        stats,
        weight,
        frozen=not _canonical.flag("use_input_stats", use_input_stats),
        layout=layout,
        mask=mask,
        need=need,
        backend=backend,
    )


def group_norm_backward(
    grad_y,
    x,
    num_groups,
    stats,
    weight=None,
    *,
    layout="NCHW",
    mask=None,
    need=(True, True, True),
    backend=None,
):
    """Return the gradients of `group_norm` with respect to x, weight and bias.

    With ``g = grad_y * weight`` and ``xhat = (x - mean) * rstd``::

        grad_x = rstd * (g - mean(g) - xhat * mean(g * xhat))

    where the means are taken over what the statistics cover; the weight's gradient is the sum of
    ``grad_y * xhat``, the bias's that of ``grad_y``.

    Parameters
    ----------
    grad_y : ndarray
        Gradient with respect to the result; shape and dtype of `x`.
    x : ndarray, shape (N, C, ...) or, with channels last, (N, ..., C)
        The input of the forward pass.
    num_groups : int
        That of the forward pass.
    stats : Stats
        What the forward pass returned: shape (N, num_groups).
    weight : ndarray, shape (C,), optional
        The weight of the forward pass.
    layout : {"NCHW", "NHWC", "channels_first", "channels_last"}
        Where the channels are: axis 1, or the last axis, at any rank.
    mask : ndarray of bool, shape (N, ...), optional
        Which positions count; of x's shape without the channels. The others take no part in
        anything, and their gradient is zero.
    need : (bool, bool, bool)
        Which of the gradients of x, weight and bias to compute.
    backend : {"auto", "cython", "numba", "numpy"}, optional
        None is the current default, see `use_backend`.

    Returns
    -------
    Gradients
        A named tuple (x, weight, bias), None where not needed. Those of weight and bias are there
        even where there is no weight or bias, in the weight's dtype, else the statistics'.

    Raises
    ------
    TypeError
        If an argument is of the wrong kind or an array of the wrong dtype.
    ValueError
        If a shape or value is wrong.
    RuntimeError
        If the backend is not available here.

    Examples
    --------
    >>> import numpy as np, cpunorm
    >>> rng = np.random.default_rng(0)
    >>> x, grad_y = rng.normal(size=(2, 3, 4, 5, 5))
    >>> y, stats = cpunorm.group_norm(x, 2, return_stats=True)
    >>> grads = cpunorm.group_norm_backward(grad_y, x, 2, stats, need=(True, False, False))
    >>> grads.x.shape, grads.weight
    ((3, 4, 5, 5), None)
    """
    common = _front.group_norm_backward(
        grad_y, x, num_groups, stats, weight, layout, mask, need, backend
    )
    if common is not None:
        return common
    return _canonical.channel_norm_backward(
        "group_norm",
        grad_y,
        x,
        stats,
        weight,
        num_groups=num_groups,
        layout=layout,
        mask=mask,
        need=need,
        backend=backend,
    )


def layer_norm_backward(
    grad_y,
    x,
    normalized_shape,
    stats,
    weight=None,
    *,
    axis=None,
    grad_sum=None,
    mask=None,
    need=(True, True, True),
    backend=None,
):
    """Return the gradients of `layer_norm` or `add_layer_norm` with respect to x, weight and bias.

    With ``g = grad_y * weight`` and ``xhat = (x - mean) * rstd``::

        grad_x = rstd * (g - mean(g) - xhat * mean(g * xhat))

    where the means are taken over what the statistics cover; the weight's gradient is the sum of
    ``grad_y * xhat``, the bias's that of ``grad_y``.

    Parameters
    ----------
    grad_y : ndarray
        Gradient with respect to the result; shape and dtype of `x`.
    x : ndarray
        The input of the forward pass; after `add_layer_norm`, the sum it returned.
    normalized_shape : int or sequence of ints
        That of the forward pass.
    stats : Stats
        What the forward pass returned.
    weight : ndarray, shape `normalized_shape`, optional
        The weight of the forward pass.
    axis : int or sequence of ints, optional
        That of the forward pass.
    grad_sum : ndarray, optional
        After `add_layer_norm`: the gradient that reaches the sum from elsewhere; added to the
        gradient of x, which is then that of both summands.
    mask : ndarray of bool, optional
        Which positions count; of x's shape without the last of the normalised axes, the channels.
        The others take no part in anything, and their gradient is zero.
    need : (bool, bool, bool)
        Which of the gradients of x, weight and bias to compute.
    backend : {"auto", "cython", "numba", "numpy"}, optional
        None is the current default, see `use_backend`.

    Returns
    -------
    Gradients
        A named tuple (x, weight, bias), None where not needed. Those of weight and bias are there
        even where there is no weight or bias, in the weight's dtype, else the statistics'.

    Raises
    ------
    TypeError
        If an argument is of the wrong kind or an array of the wrong dtype.
    ValueError
        If a shape or value is wrong.
    RuntimeError
        If the backend is not available here.

    Examples
    --------
    >>> import numpy as np, cpunorm
    >>> rng = np.random.default_rng(0)
    >>> x, grad_y = rng.normal(size=(2, 3, 8))
    >>> y, stats = cpunorm.layer_norm(x, 8, return_stats=True)
    >>> grads = cpunorm.layer_norm_backward(grad_y, x, 8, stats)
    >>> bool(np.abs((grads.x * 1).sum(axis=1)).max() < 1e-6)
    True
    """
    common = _front.layer_norm_backward(
        grad_y, x, normalized_shape, stats, weight, axis, grad_sum, mask, need, backend
    )
    if common is not None:
        return common
    return _canonical.axis_norm_backward(
        grad_y,
        x,
        normalized_shape,
        stats,
        weight,
        axis=axis,
        center=True,
        grad_sum=grad_sum,
        mask=mask,
        need=need,
        backend=backend,
    )


def rms_norm_backward(
    grad_y,
    x,
    normalized_shape,
    stats,
    weight=None,
    *,
    axis=None,
    grad_sum=None,
    mask=None,
    need=(True, True, True),
    backend=None,
):
    """Return the gradients of `rms_norm` or `add_rms_norm` with respect to x, weight and bias.

    With ``g = grad_y * weight`` and ``xhat = x * rstd``::

        grad_x = rstd * (g - xhat * mean(g * xhat))

    and the weight's gradient is the sum of ``grad_y * xhat``. There is no bias, and its
    gradient is None.

    Parameters
    ----------
    grad_y : ndarray
        Gradient with respect to the result; shape and dtype of `x`.
    x : ndarray
        The input of the forward pass; after `add_rms_norm`, the sum it returned.
    normalized_shape : int or sequence of ints
        That of the forward pass.
    stats : Stats
        What the forward pass returned.
    weight : ndarray, shape `normalized_shape`, optional
        The weight of the forward pass.
    axis : int or sequence of ints, optional
        That of the forward pass.
    grad_sum : ndarray, optional
        After `add_rms_norm`: the gradient that reaches the sum from elsewhere; added to the
        gradient of x, which is then that of both summands.
    mask : ndarray of bool, optional
        Which positions count; of x's shape without the last of the normalised axes, the channels.
        The others take no part in anything, and their gradient is zero.
    need : (bool, bool, bool)
        Which of the gradients of x, weight and bias to compute.
    backend : {"auto", "cython", "numba", "numpy"}, optional
        None is the current default, see `use_backend`.

    Returns
    -------
    Gradients
        A named tuple (x, weight, bias), None where not needed. Those of weight and bias are there
        even where there is no weight or bias, in the weight's dtype, else the statistics'.

    Raises
    ------
    TypeError
        If an argument is of the wrong kind or an array of the wrong dtype.
    ValueError
        If a shape or value is wrong.
    RuntimeError
        If the backend is not available here.

    Examples
    --------
    >>> import numpy as np, cpunorm
    >>> rng = np.random.default_rng(0)
    >>> x, grad_y = rng.normal(size=(2, 3, 8))
    >>> y, stats = cpunorm.rms_norm(x, 8, return_stats=True)
    >>> grads = cpunorm.rms_norm_backward(grad_y, x, 8, stats)
    >>> bool(np.abs((grads.x * y).sum(axis=1)).max() < 1e-6)
    True
    """
    common = _front.rms_norm_backward(
        grad_y, x, normalized_shape, stats, weight, axis, grad_sum, mask, need, backend
    )
    if common is not None:
        return common
    return _canonical.axis_norm_backward(
        grad_y,
        x,
        normalized_shape,
        stats,
        weight,
        axis=axis,
        center=False,
        grad_sum=grad_sum,
        mask=mask,
        need=need,
        backend=backend,
    )
