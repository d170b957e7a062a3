"""What masks, Moments, and reading arrays where they lie replace: python -m bench.instead

NumPy's formula as it is commonly written, or a copy made first, cpunorm in its place, and the ratio
of the two; both in this process, in turn, the median of several calls. cpunorm runs on as many
threads as it may, NumPy on one, as it does by itself. What `convention` replaces is no time but a
formula: the results of both.
"""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

import cpunorm

from .turns import compared, header, row, seconds

CALLS = 7
N, C, H, W = 32, 64, 56, 56
EPS = 1e-5


def masked_formula(x: Any, mask: Any, axes: Any, weight: Any, bias: Any) -> Any:
    """Normalise what counts of x; mask, weight and bias broadcast against it."""
    count = np.maximum(np.broadcast_to(mask, x.shape).sum(axes, keepdims=True), 1)
    mean = np.where(mask, x, 0).sum(axes, keepdims=True) / count
    centred = np.where(mask, x - mean, 0)
    var = np.square(centred).sum(axes, keepdims=True) / count
    y = centred / np.sqrt(var + EPS) * weight + bias
    return np.where(mask, y, 0).astype(x.dtype)


def masks() -> dict[str, tuple[Callable[[], Any], Callable[[], Any]]]:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(N, C, H, W)).astype(np.float32)
    last = np.ascontiguousarray(np.moveaxis(x, 1, -1))
    weight, bias = rng.normal(size=(2, C)).astype(np.float32)
    height, width = rng.integers(H // 2, H + 1, (2, N))
    rows = np.arange(H)[:, None] < height[:, None, None]
    mask = rows & (np.arange(W) < width[:, None, None])
    first = mask[:, None], (0, 2, 3), weight[:, None, None], bias[:, None, None]
    of_image = mask[:, None], (2, 3), weight[:, None, None], bias[:, None, None]
    training = {"training": True, "mask": mask}
    tokens = rng.normal(size=(32, 512, 768)).astype(np.float32)
    length = np.arange(512) < rng.integers(128, 513, 32)[:, None]
    scale, shift = rng.normal(size=(2, 768)).astype(np.float32)
    return {
        "batch norm, NCHW, training": (
            lambda: masked_formula(x, *first),
            lambda: cpunorm.batch_norm(x, None, None, weight, bias, **training),
        ),
        "batch norm, NHWC, training": (
            lambda: masked_formula(last, mask[..., None], (0, 1, 2), weight, bias),
            lambda: cpunorm.batch_norm(last, None, None, weight, bias, layout="NHWC", **training),
        ),
        "instance norm, NCHW": (
            lambda: masked_formula(x, *of_image),
            lambda: cpunorm.instance_norm(x, None, None, weight, bias, mask=mask),
        ),
        "layer norm, (32, 512, 768)": (
            lambda: masked_formula(tokens, length[..., None], 2, scale, shift),
            lambda: cpunorm.layer_norm(tokens, 768, scale, shift, mask=length),
        ),
        "group norm of 1, NHWC, (32, 512, 768)": (
            lambda: masked_formula(tokens, length[..., None], (1, 2), scale, shift),
            lambda: cpunorm.group_norm(tokens, 1, scale, shift, layout="NHWC", mask=length),
        ),
    }


def moments() -> dict[str, tuple[Callable[[], Any], Callable[[], Any]]]:
    parts = np.random.default_rng(0).normal(3, 2, (8, N, C, H, W)).astype(np.float32)

    def formula() -> Any:
        """Sums of x and x² in float64, part by part; it cancels where the mean is large."""
        total = squares = 0.0
        for x in parts:
            total = total + x.sum(axis=(0, 2, 3), dtype=np.float64)
            squares = squares + np.square(x, dtype=np.float64).sum(axis=(0, 2, 3))
        mean = total / (parts.size / C)
        return mean, squares / (parts.size / C) - mean**2

    def ours() -> Any:
        measured = cpunorm.Moments(C)
        for x in parts:
            measured.update(x)
        return measured.finalize()

    return {f"Moments, 8 parts of {(N, C, H, W)}": (formula, ours)}


def arrays() -> dict[str, tuple[Callable[[], Any], Callable[[], Any]]]:
    """Layer norm of torch's tensors, copied first and as they are; nothing without torch."""
    try:
        import torch
    except ImportError:
        return {}
    tensors = {str(shape): torch.randn(shape) for shape in ((8, 768), (512, 768), (N * 512, 768))}
    return {
        shape: (
            lambda x=x: cpunorm.layer_norm(x.numpy().copy(), 768),
            lambda x=x: cpunorm.layer_norm(x, 768),
        )
        for shape, x in tensors.items()
    }


def conventions() -> Iterator[str]:
    """Yield the lines of a table: the running variance after one batch, by hand and by name."""
    x = np.random.default_rng(0).normal(5, 2, (2, 1, 2, 2)).astype(np.float32)
    by_hand = {
        "torch": ("0.9 * 1 + 0.1 * x.var(ddof=1)", 0.9 * 1 + 0.1 * x.var(ddof=1)),
        "keras": ("0.99 * 1 + 0.01 * x.var()", 0.99 * 1 + 0.01 * x.var()),
        "onnx": ("0.9 * 1 + 0.1 * x.var()", 0.9 * 1 + 0.1 * x.var()),
    }
    yield header("convention", "by hand", "gives", "`BatchNorm`'s `running_var`")
    for convention, (formula, value) in by_hand.items():
        layer = cpunorm.BatchNorm(1, convention=convention)
        layer(x)
        yield row(
            f'`"{convention}"`', f"`{formula}`", f"{value:.5f}", f"{layer.running_var[0]:.5f}"
        )


def main() -> None:
    print(f"numpy {np.__version__}, cpunorm on {cpunorm.get_num_threads()} threads; ms")
    print(header("", "NumPy", "cpunorm", "ratio"))
    for name, functions in (masks() | moments()).items():
        print(row(name, *compared(*seconds(functions, CALLS))))
    print(f"\n{header('a tensor', 'copied first', 'as it is', 'ratio')}")
    for name, functions in arrays().items():
        print(row(name, *compared(*seconds(functions, CALLS, CALLS))))
    print("", *conventions(), sep="\n")


if __name__ == "__main__":
    main()
