"""Activations, applied to a piece of the output while it lies in L1.

Kernels call them by address: linked into every kernel, they would take longer to compile than all
the rest. So each is compiled when it is first asked for, once.

The exponential is worked out here because numba calls the scalar one of the C library, around which
no loop is vectorised. Everything is evaluated in float64, where nothing cancels that float32 shows.
"""

import math
from functools import lru_cache
from typing import Any

import numba
import numpy as np
from numba import types
from numpy.polynomial import chebyshev

from cpunorm.backends import ACTIVATIONS

from ._jit import address_of, call_address, jit

_LOG2E = 1 / math.log(2)
_LN2 = math.log(2)
_EXPM1 = tuple(1 / math.factorial(n) for n in range(13, 0, -1))  # (exp(r) - 1)/r, |r| <= ln(2)/2


def _erf_coefficients() -> tuple[float, ...]:
    """erf(t)/t, even in t, as a polynomial in u = t²/8 - 1 for |t| <= 4: within 4e-10."""

    def over_t(u):
        return [math.erf(t) / t for t in np.sqrt(8 * (u + 1))]

    return tuple(chebyshev.cheb2poly(chebyshev.chebinterpolate(over_t, 18))[::-1].tolist())


# In two halves, both in u²: LLVM does not vectorise around a chain of 19.
_ERF_EVEN, _ERF_ODD = _erf_coefficients()[0::2], _erf_coefficients()[1::2]


@jit
def _polynomial(coefficients, r):
    value = 0.0
    for c in coefficients:
        value = value * r + c
    return value


@jit
def _exp_parts(x):
    """(s, q): exp(x) = s + s·q, s a power of two, so that exp(x) - 1 = s·q + (s - 1) is exact."""
    x = -708.0 if x < -708.0 else x
    x = 708.0 if x > 708.0 else x
    exponent = np.floor(x * _LOG2E + 0.5)
    r = x - exponent * _LN2
    # By way of int32: only AVX-512 turns float64 into int64.
    bits = (np.int64(np.int32(exponent)) + 1023) << 52
    return np.int64(bits).view(np.float64), _polynomial(_EXPM1, r) * r


@jit
def _logistic(x):
    s, q = _exp_parts(-x)
    return 1.0 / (1.0 + (s + s * q))


def _silu(pointer, n):
    z = numba.carray(pointer, n)
    for i in range(n):
        x = np.float64(z[i])
        z[i] = x * _logistic(x)


def _gelu(pointer, n):
    z = numba.carray(pointer, n)
    for i in range(n):
        z[i] = 0.5 * z[i] * math.erfc(-math.sqrt(0.5) * z[i])


def _gelu_single(pointer, n):
    z = numba.carray(pointer, n)
    for i in range(n):
        x = np.float64(z[i])
        t = x * math.sqrt(0.5)
        t = -4.0 if t < -4.0 else t
        t = 4.0 if t > 4.0 else t
        u = t * t / 8.0 - 1.0
        erf = t * (_polynomial(_ERF_EVEN, u * u) + u * _polynomial(_ERF_ODD, u * u))
        # The far tail is 0: what is left of it would be multiplied by x.
        z[i] = 0.0 * x if t == -4.0 else 0.5 * x * (1.0 + erf)


def _sigmoid(pointer, n):
    z = numba.carray(pointer, n)
    for i in range(n):
        z[i] = _logistic(np.float64(z[i]))


def _tanh(pointer, n):
    z = numba.carray(pointer, n)
    for i in range(n):
        s, q = _exp_parts(2.0 * np.float64(z[i]))
        expm1 = s * q + (s - 1.0)
        z[i] = expm1 / (expm1 + 2.0)


_FUNCTIONS = {"silu": _silu, "gelu": _gelu, "sigmoid": _sigmoid, "tanh": _tanh}

RELU = 1  # stands for an address: ReLU is done while the output is written


@lru_cache
def address(activation: int, dtype: np.dtype[Any]) -> int:
    """Where the compiled activation is, for `activate`; 0 for none, RELU for ReLU."""
    name = ACTIVATIONS[activation]
    if name not in _FUNCTIONS:
        return {None: 0, "relu": RELU}[name]
    function = _gelu_single if name == "gelu" and dtype == np.float32 else _FUNCTIONS[name]
    number = numba.from_dtype(dtype)
    return address_of(function, types.void(types.CPointer(number), types.intp))


@jit
def activate(address, z, n):
    """Apply the activation at `address` to z[:n] in place."""
    call_address(address, z.ctypes.data, n)
