"""Activations of a piece of the output while it lies in L1.

The exponential is worked out here because numba calls the scalar one of the C library, which no loop
vectorises. Everything is evaluated in float64, which leaves nothing to cancel: float32 comes out
correctly rounded but for a few last bits.
"""

import math

import numpy as np
from numpy.polynomial import chebyshev

from cpunorm.backends import ACTIVATIONS

from ._jit import jit

RELU, SILU, GELU, SIGMOID, TANH = map(
    ACTIVATIONS.index, ("relu", "silu", "gelu", "sigmoid", "tanh")
)

_LOG2E = 1 / math.log(2)
_LN2 = math.log(2)
_EXPM1 = tuple(1 / math.factorial(n) for n in range(13, 0, -1))  # in r, |r| <= ln(2)/2, over r


def _erf_coefficients():
    """erf(t)/t, even in t, as a polynomial in u = t²/8 - 1 for |t| <= 4: within 4e-10."""

    def over_t(u):
        return [math.erf(t) / t for t in np.sqrt(8 * (u + 1))]

    return tuple(chebyshev.cheb2poly(chebyshev.chebinterpolate(over_t, 18))[::-1].tolist())


# In two halves, in u²: LLVM does not vectorise around a chain of 19.
_ERF_EVEN, _ERF_ODD = _erf_coefficients()[0::2], _erf_coefficients()[1::2]


@jit
def _polynomial(coefficients, r):
    value = 0.0
    for c in coefficients:
        value = value * r + c
    return value


@jit
def _exp_parts(x):
    """(s, q) with exp(x) = s + s·q, s a power of two; so that exp(x) - 1 = s·q + (s - 1) is exact too."""
    x = -708.0 if x < -708.0 else x
    x = 708.0 if x > 708.0 else x
    exponent = np.floor(x * _LOG2E + 0.5)
    r = x - exponent * _LN2
    # By way of int32: only AVX-512 turns float64 into int64.
    bits = (np.int64(np.int32(exponent)) + 1023) << 52
    return np.int64(bits).view(np.float64), _polynomial(_EXPM1, r) * r


@jit
def _sigmoid(x):
    s, q = _exp_parts(-x)
    return 1.0 / (1.0 + (s + s * q))


@jit
def _normal_cdf(x):
    t = x * math.sqrt(0.5)
    t = -4.0 if t < -4.0 else t
    t = 4.0 if t > 4.0 else t
    u = t * t / 8.0 - 1.0
    erf = t * (_polynomial(_ERF_EVEN, u * u) + u * _polynomial(_ERF_ODD, u * u))
    # What is left of the tail would be multiplied by x.
    return 0.0 if t == -4.0 else 0.5 + 0.5 * erf


@jit
def activate(z, n, activation):
    """Apply `activation` to z[:n] in place."""
    if activation == RELU:
        for i in range(n):
            # Written so that NaN stays NaN.
            z[i] = 0.0 if z[i] < 0.0 else z[i]
    elif activation == SILU:
        for i in range(n):
            x = np.float64(z[i])
            z[i] = x * _sigmoid(x)
    elif activation == GELU and z.itemsize == 4:
        for i in range(n):
            x = np.float64(z[i])
            z[i] = x * _normal_cdf(x)
    elif activation == GELU:
        for i in range(n):
            z[i] = z[i] * 0.5 * math.erfc(-z[i] * math.sqrt(0.5))
    elif activation == SIGMOID:
        for i in range(n):
            z[i] = _sigmoid(np.float64(z[i]))
    elif activation == TANH:
        for i in range(n):
            s, q = _exp_parts(2.0 * np.float64(z[i]))
            expm1 = s * q + (s - 1.0)
            z[i] = expm1 / (expm1 + 2.0)
