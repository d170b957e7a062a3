"""JAX: the formulas under jit, and their derivatives by vjp."""

import os
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np

from ..shapes import Case
from . import EPS, MOMENTUM, Array, Call, Data


class Library:
    """XLA on the CPU. Variances come both ways flax has them: two-pass, and E[x²] − E[x]²."""

    def __init__(self, threads: int) -> None:
        # XLA sizes its pool by this when it starts, hence the late import.
        os.environ["NPROC"] = str(threads)
        os.environ["JAX_PLATFORMS"] = "cpu"
        import jax

        jax.config.update("jax_enable_x64", True)
        self.jax = jax

    def forms(self, case: Case, data: Data) -> Iterator[Call]:
        """Yield the compiled function, waiting for its results."""
        jax = self.jax
        jax.clear_caches()
        arrays = data.x, data.weight, data.bias, data.mean, data.var
        x, *parameters = map(jax.numpy.asarray, arrays)
        choice = not case.frozen and case.operation != "rms_norm"
        for fast_variance in (False, True) if choice else (False,):
            function = partial(self._normalize, case, fast_variance)
            if case.forward:
                call = partial(jax.jit(function), x, *parameters)
            else:
                mean, var = parameters[2:]

                def differentiated(x, weight, bias, f=function, mean=mean, var=var):
                    return f(x, weight, bias, mean, var)[0]

                _, backward = jax.jit(partial(jax.vjp, differentiated))(x, *parameters[:2])
                grad = jax.numpy.asarray(data.grad)
                call = partial(jax.jit(lambda back, dy: back(dy)), backward, grad)
            yield partial(_wait, jax.block_until_ready, call)

    def answer(self, returned: Any, data: Data) -> Array:
        """Return the first result."""
        return np.asarray(returned[0])

    def _normalize(self, case: Case, fast_variance: bool, x, weight, bias, mean, var):
        """Return y, and the running statistics where training moves them."""
        jnp, rsqrt = self.jax.numpy, self.jax.lax.rsqrt
        rank, axis = len(case.shape), case.axis
        dtype, original = x.dtype, x.shape
        # Statistics of 16 bits are taken in float32, as flax does.
        x = x.astype(jnp.promote_types(dtype, jnp.float32))
        x_shape = original
        weight_shape = tuple(case.features if i == axis else 1 for i in range(rank))
        if case.over_rows:
            axes = (axis,)
        elif case.operation == "group_norm":
            # The channel axis becomes two, (G, C/G); the second is reduced with the pixels.
            split = (case.num_groups, case.features // case.num_groups)
            x_shape = (*original[:axis], *split, *original[axis + 1 :])
            weight_shape = tuple(n for i in range(rank) for n in (split if i == axis else (1,)))
            axes = tuple(i for i in range(1, rank + 1) if i != axis)
        else:
            over_images = case.operation == "batch_norm"
            axes = tuple(i for i in range(rank) if i != axis and (i or over_images))
        x = x.reshape(x_shape)
        weight, bias = weight.reshape(weight_shape), bias.reshape(weight_shape)
        if case.operation == "rms_norm":
            y = x * rsqrt(jnp.mean(jnp.square(x), axes, keepdims=True) + EPS) * weight
            return (y.astype(dtype),)
        if case.frozen:
            m, v = mean.reshape(weight_shape), var.reshape(weight_shape)
            return (((x - m) * (rsqrt(v + EPS) * weight) + bias).astype(dtype),)
        m = jnp.mean(x, axes, keepdims=True)
        if fast_variance:
            v = jnp.maximum(0, jnp.mean(jnp.square(x), axes, keepdims=True) - jnp.square(m))
        else:
            v = jnp.var(x, axes, keepdims=True)
        y = ((x - m) * (rsqrt(v + EPS) * weight) + bias).reshape(original).astype(dtype)
        if case.operation != "batch_norm":
            return (y,)
        unbiased = v * (x.size / (x.size - case.features))
        pairs = (mean, m), (var, unbiased)
        return (y, *((1 - MOMENTUM) * old + MOMENTUM * new.reshape(-1) for old, new in pairs))


def _wait(block: Call, call: Call) -> Any:
    return block(call())
