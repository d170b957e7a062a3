"""Mean and variance per channel of data that comes in parts, or does not fit into memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import numpy as np

from ._canonical import CONVENTIONS, Array, channel_moments, integer, resolve_convention

if TYPE_CHECKING:
    from ._canonical import ConventionName, Layout
    from ._interchange import Readable


class RunningStatistics(NamedTuple):
    """What batch norm uses where it does not use the statistics of x.

    Parameters
    ----------
    running_mean, running_var : ndarray, shape (C,)
        Under the names of `batch_norm` and of a layer's `state_dict`.
    """

    running_mean: Array
    running_var: Array


class Moments:
    """Mean and variance per channel, from as many parts as there are, as if they were one batch.

    Each part is measured by the kernels of batch norm, and parts are merged in float64 by the
    formula of Chan, Golub and LeVeque [1]_, so that a mean far from zero costs no accuracy. The
    result depends on the order of the parts in the last bits only, and on nothing else. Objects
    pickle: processes measure a share each, and one merges them.

    Parameters
    ----------
    num_features : int
        C, the number of channels.
    layout : {"NCHW", "NHWC", "channels_first", "channels_last"}
        Where the channels are: axis 1, or the last axis, at any rank.
    backend : {None, "auto", "cython", "numba", "numpy"}
        None is the current default, see `use_backend`.

    Attributes
    ----------
    count : int
        How many values of each channel were taken in.

    References
    ----------
    .. [1] T. F. Chan, G. H. Golub, R. J. LeVeque, "Updating Formulae and a Pairwise Algorithm for
       Computing Sample Variances", Stanford University, 1979, STAN-CS-79-773.

    Examples
    --------
    >>> import cpunorm, numpy as np
    >>> x = np.random.default_rng(0).normal(10, 2, (100, 3, 8, 8))
    >>> moments = cpunorm.Moments(3)
    >>> for part in np.array_split(x, 7):
    ...     moments.update(part)
    >>> mean, var = moments.finalize()
    >>> bool(np.allclose(mean, x.mean(axis=(0, 2, 3))))
    True
    >>> bool(np.allclose(var, x.var(axis=(0, 2, 3), ddof=1)))
    True
    """

    def __init__(
        self, num_features: int, *, layout: Layout = "NCHW", backend: str | None = None
    ) -> None:
        self.num_features = integer("num_features", num_features)
        if self.num_features < 0:
            raise ValueError(f"num_features must not be negative, got {num_features}")
        self.layout = layout
        self.backend = backend
        self.count = 0
        self._mean = np.zeros(self.num_features)
        self._m2 = np.zeros(self.num_features)
        self._dtype: np.dtype[Any] = np.dtype(np.float32)
        self.update(np.empty((0, num_features, num_features), np.float32))  # has all be checked

    def update(self, x: Readable, *, mask: Readable | None = None) -> None:
        """Take in a batch.

        Parameters
        ----------
        x : ndarray, shape (N, C, ...) or, with channels last, (N, ..., C)
            Of dtype float16, bfloat16, float32 or float64.
        mask : ndarray of bool, shape (N, ...), optional
            Which positions count; of x's shape without the channels.

        Raises
        ------
        TypeError
            If an argument is of the wrong kind or an array of the wrong dtype.
        ValueError
            If a shape does not fit. Nothing is taken in then.
        """
        mean, var, count, dtype = channel_moments(
            x, self.num_features, layout=self.layout, mask=mask, backend=self.backend
        )
        self._merge(count, mean, count * var)
        self._dtype = np.promote_types(self._dtype, dtype)

    def update_in_batches(
        self,
        x: Any,
        batch_size: int = 256,
        *,
        progress: Callable[[Iterable[int]], Iterable[int]] | None = None,
    ) -> None:
        """Take in an array larger than memory, so many images at a time.

        Parameters
        ----------
        x : array_like
            What gives arrays when it is sliced along its first axis: a `numpy.memmap`, or a data
            set of h5py or zarr.
        batch_size : int
            How many images to read at a time.
        progress : callable, optional
            Shows how far things are, wrapped around the loop: `tqdm.tqdm`, `rich.progress.track`.

        Raises
        ------
        TypeError, ValueError
            As `update`. What was read before is taken in.
        """
        if integer("batch_size", batch_size) < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        starts: Iterable[int] = range(0, len(x), batch_size)
        for start in starts if progress is None else progress(starts):
            self.update(x[start : start + batch_size])

    def merge(self, other: Moments) -> Self:
        """Take in what another object has, and return this one.

        Parameters
        ----------
        other : Moments
            Of as many channels; it is left as it is.

        Returns
        -------
        Moments
            This object.

        Raises
        ------
        TypeError
            If `other` is something else.
        ValueError
            If it has another number of channels.
        """
        if not isinstance(other, Moments):
            raise TypeError(f"other must be Moments, got {type(other).__name__}")
        if other.num_features != self.num_features:
            raise ValueError(
                f"other must have {self.num_features} channels, got {other.num_features}"
            )
        self._merge(other.count, other._mean, other._m2)
        self._dtype = np.promote_types(self._dtype, other._dtype)
        return self

    def _merge(self, count: int, mean: Array, m2: Array) -> None:
        total = self.count + count
        if not count:
            return
        # Of NaN and Inf there is nothing to warn about.
        with np.errstate(all="ignore"):
            delta = mean - self._mean
            self._mean = self._mean + delta * (count / total)
            self._m2 = self._m2 + m2 + np.square(delta) * (self.count * count / total)
        self.count = total

    def finalize(self, convention: ConventionName = "torch") -> RunningStatistics:
        """Return the running statistics that one batch of everything would leave behind.

        Parameters
        ----------
        convention : {"torch", "keras", "onnx"}
            Which variance that is: unbiased in torch, biased in Keras and ONNX.

        Returns
        -------
        RunningStatistics
            A named tuple (running_mean, running_var), in float32, or float64 if some x was. More
            may be taken in afterwards.

        Raises
        ------
        ValueError
            If too little was taken in: nothing, or one value where the variance is unbiased.
        """
        resolve_convention(convention, None, None)
        lost = CONVENTIONS[convention].unbiased
        if self.count <= lost:
            raise ValueError(
                f"there must be at least {lost + 1} values per channel, got {self.count}"
            )
        with np.errstate(all="ignore"):
            return RunningStatistics(
                self._mean.astype(self._dtype), (self._m2 / (self.count - lost)).astype(self._dtype)
            )

    def __repr__(self) -> str:
        return f"<Moments of {self.num_features} channels, {self.count} values each>"
