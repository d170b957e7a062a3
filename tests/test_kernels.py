"""The backend contract: one tuple of kernels, all of them provided, reached and tested."""

import inspect

import numpy as np
import pytest

from cpunorm import _dispatch
from cpunorm.backends import ACTIVATIONS, ARGUMENTS, KERNELS

from .cases import SMALL_CASES
from .support import (
    DTYPES,
    HALF_DTYPES,
    assert_close,
    assert_gradients_close,
    assert_values_close,
    pick,
    reversed_in_memory,
    run,
    run_backward,
    run_oracle,
    run_oracle_backward,
    spread,
    unaligned,
)

PROBLEMS = sorted({problem for problem, _ in KERNELS})
VERBS = sorted({verb for _, verb in KERNELS})

# What has x's shape and dtype; the rest has the dtype of statistics.
LIKE_X = ("x", "residual", "y", "total", "grad_y", "grad_total", "grad_x")

# What each verb writes, by position in the order of arguments that backends/__init__.py gives.
WRITTEN = {
    ("rows", "normalize"): (5, 6, 7, 8),
    ("columns", "normalize"): (5, 6, 7, 8),
    ("rows", "backward"): (6, 7, 8),
    ("columns", "backward"): (6, 7, 8),
    **{(p, "normalize"): (6, 7, 8, 9) for p in ("channels_first", "channels_last")},
    **{(p, "apply"): (5,) for p in ("channels_first", "channels_last")},
    **{(p, "moments"): (1, 2) for p in ("channels_first", "channels_last")},
    **{
        (p, verb): (5, 6, 7)
        for p in ("channels_first", "channels_last")
        for verb in ("backward", "backward_apply")
    },
}


@pytest.mark.parametrize(("problem", "verb"), KERNELS)
def test_every_backend_provides_every_kernel(problem, verb, backend):
    assert callable(_dispatch.kernel(problem, verb, backend))


@pytest.mark.parametrize(("problem", "verb"), KERNELS)
def test_arguments_are_those_of_the_contract(problem, verb):
    taken = inspect.signature(_dispatch.kernel(problem, verb, "numpy")).parameters
    assert tuple(taken) == (*ARGUMENTS[problem, verb], "threads")


@pytest.mark.parametrize("problem", PROBLEMS)
def test_no_backend_has_a_verb_outside_the_list(problem, backend):
    """One that only a single backend has would go untested."""
    kernels = getattr(_dispatch._load(backend), problem)
    assert {verb for verb in VERBS if hasattr(kernels, verb)} == {
        verb for p, verb in KERNELS if p == problem
    }


def watch(monkeypatch, around):
    """Have `around(problem, verb, kernel, arguments)` called in place of every kernel."""
    original = _dispatch.kernel

    def watched(problem, verb, backend):
        function = original(problem, verb, backend)
        return lambda *arguments: around(problem, verb, function, arguments)

    monkeypatch.setattr(_dispatch, "kernel", watched)


def test_the_small_cases_reach_every_kernel(monkeypatch):
    """All but the moments alone, which no public function needs; they are tested below."""
    reached = set()

    def around(problem, verb, function, arguments):
        reached.add((problem, verb))
        function(*arguments)

    watch(monkeypatch, around)
    for case in SMALL_CASES:
        arrays = case.arrays()
        run(case, arrays, backend="numpy")
        run_backward(case, arrays, case.grad_y(), backend="numpy")
    assert reached == {kernel for kernel in KERNELS if kernel[1] != "moments"}


@pytest.mark.parametrize("case", SMALL_CASES, ids=str)
def test_kernels_write_all_of_what_they_are_given(case, backend, monkeypatch):
    """Outputs come uninitialised: filled with NaN beforehand, they hold the right values after."""

    def around(problem, verb, function, arguments):
        for position in WRITTEN[problem, verb]:
            if arguments[position] is not None:
                arguments[position].fill(np.nan)
        function(*arguments)

    watch(monkeypatch, around)
    arrays, grad_y = case.arrays(), case.grad_y()
    expected = run_oracle(case, arrays)
    gradients = run_backward(case, arrays, grad_y, backend=backend)
    y, *_, stats = run(case, arrays, return_stats=True, backend=backend)
    assert_values_close(y, expected.y)
    assert_values_close(stats.rstd, expected.rstd)
    assert_gradients_close(gradients, run_oracle_backward(case, case.arrays(), grad_y))


@pytest.mark.parametrize(
    "lay", [np.asarray, np.asfortranarray, spread, reversed_in_memory, unaligned]
)
@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("case", SMALL_CASES, ids=str)
def test_kernels_get_what_the_contract_says(case, dtype, lay, monkeypatch):
    """C-contiguous, aligned, of no zero size and of the right dtype, wherever x lay."""
    reached = []

    def around(problem, verb, function, arguments):
        names = inspect.signature(function).parameters
        for name, argument in zip(names, arguments, strict=True):
            if isinstance(argument, np.ndarray):
                assert argument.flags.c_contiguous
                assert argument.flags.aligned
                assert argument.size
                assert argument.dtype == (dtype if name in LIKE_X else "float32")
        assert arguments[-1] >= 1
        reached.append(verb)
        function(*arguments)

    watch(monkeypatch, around)
    plain, grad_y = case.arrays(dtype, residual=case.is_channel_op), case.grad_y(dtype)
    arrays = {name: lay(a) for name, a in plain.items()}
    out = {"out": lay(np.zeros(case.shape, dtype))}
    run(case, arrays, **out, backend="numpy")
    run_backward(case, plain | pick(arrays, "x", "weight"), lay(grad_y), backend="numpy")
    assert len(reached) == 3  # forward, forward for its Stats, backward


# --- Verbs the public functions do not reach, or not in every form --------------------------------

# x as the kernels see it, and (B, G) of its statistics.
FOLDS = (
    ("channels_first", (3, 6, 35), (1, 6)),
    ("channels_first", (3, 6, 35), (3, 6)),
    ("channels_first", (3, 6, 35), (3, 2)),
    ("channels_first", (2, 5, 4099), (2, 5)),
    ("channels_first", (5, 3, 1), (1, 3)),
    ("channels_first", (1, 1, 17), (1, 1)),
    ("channels_first", (70, 6, 100), (1, 6)),
    ("channels_first", (900, 5, 241), (1, 5)),
    ("channels_last", (3, 35, 6), (1, 6)),
    ("channels_last", (3, 35, 6), (3, 6)),
    ("channels_last", (3, 35, 6), (3, 2)),
    ("channels_last", (3, 9, 32), (3, 2)),
    ("channels_last", (5, 9, 90), (5, 15)),
    ("channels_last", (4, 64, 40), (4, 8)),
    ("channels_last", (3, 200, 32), (3, 4)),
    ("channels_last", (3, 100, 64), (3, 2)),
    ("channels_last", (9, 35, 64), (9, 16)),
    ("channels_last", (1, 4099, 33), (1, 33)),
    ("channels_last", (2, 131, 130), (2, 10)),
    ("channels_last", (1, 17, 1), (1, 1)),
)
folds = pytest.mark.parametrize(("problem", "shape", "stats"), FOLDS)
threads = pytest.mark.parametrize("threads", [1, 2])
dtypes = pytest.mark.parametrize("dtype", (*DTYPES, *HALF_DTYPES))


def of_statistics(dtype):
    return "float64" if dtype == "float64" else "float32"


class Fold:
    """The contract's table in NumPy: x as (B, N/B, G, C/G, S), and what broadcasts against it."""

    def __init__(self, problem, shape, stats):
        self.last = problem == "channels_last"
        self.shape, self.stats = shape, stats
        self.channels = shape[2 if self.last else 1]
        b, g = stats
        self.folded = (b, shape[0] // b, g, self.channels // g, shape[1 if self.last else 2])

    def x(self, a):
        a = a.astype("float64")
        return (np.moveaxis(a, -1, 1) if self.last else a).reshape(self.folded)

    def back(self, a):
        n, c, s = self.shape[0], self.channels, self.folded[-1]
        a = a.reshape(n, c, s)
        return np.moveaxis(a, 1, -1) if self.last else a

    def statistic(self, a):
        return a.astype("float64").reshape(self.stats[0], 1, self.stats[1], 1, 1)

    def parameter(self, a):
        return a.astype("float64").reshape(1, 1, self.stats[1], -1, 1)


@threads
@dtypes
@folds
def test_moments(problem, shape, stats, dtype, threads, backend):
    x = np.random.default_rng(0).normal(100, 3, shape).astype(dtype)
    mean, var = np.full((2, *stats), np.nan, of_statistics(dtype))
    _dispatch.kernel(problem, "moments", backend)(x, mean, var, threads)
    units = Fold(problem, shape, stats).x(x)
    assert_close(mean, units.mean(axis=(1, 3, 4)), 1e-14 if dtype == "float64" else 1e-7)
    assert_close(var, units.var(axis=(1, 3, 4)), 1e-11 if dtype == "float64" else 3e-6)


@threads
@dtypes
@folds
def test_given_statistics(problem, shape, stats, dtype, threads, backend):
    """apply and backward_apply with statistics that are not those of x, per image and group too."""
    rng = np.random.default_rng(0)
    fold = Fold(problem, shape, stats)
    x, residual, grad_y = rng.normal(1, 2, (3, *shape)).astype(dtype)
    mean, rstd = rng.uniform(0.5, 2, (2, *stats)).astype(of_statistics(dtype))
    weight, bias = rng.normal(1, 1, (2, fold.channels)).astype(of_statistics(dtype))
    y, grad_x = np.full((2, *shape), np.nan, dtype)
    grad_weight, grad_bias = np.full((2, fold.channels), np.nan, of_statistics(dtype))
    relu = ACTIVATIONS.index("relu")
    _dispatch.kernel(problem, "apply", backend)(
        x, residual, weight, bias, relu, y, mean, rstd, threads
    )
    _dispatch.kernel(problem, "backward_apply", backend)(
        grad_y, x, mean, rstd, weight, grad_x, grad_weight, grad_bias, threads
    )
    x_hat = (fold.x(x) - fold.statistic(mean)) * fold.statistic(rstd)
    affine = x_hat * fold.parameter(weight) + fold.parameter(bias) + fold.x(residual)
    assert_values_close(y, fold.back(np.maximum(affine, 0)))
    g = fold.x(grad_y)
    expected = (
        fold.back(g * fold.parameter(weight) * fold.statistic(rstd)),
        (g * x_hat).sum(axis=(0, 1, 4)).ravel(),
        g.sum(axis=(0, 1, 4)).ravel(),
    )
    assert_gradients_close((grad_x, grad_weight, grad_bias), expected)
