"""Running statistics: momentum, unbiased variance, means over N, and when they stay as they are."""

import numpy as np
import pytest

import cpunorm

from .cases import CASES, LAYOUTS, SMALL_CASES, Case, in_layout
from .support import (
    DTYPES,
    assert_same_bits,
    assert_values_close,
    copies,
    pick,
    run,
    run_oracle,
    spread,
)

RUNNING = ("running_mean", "running_var")
UPDATING = [c for c in SMALL_CASES if c.takes_running_statistics and not c.is_frozen]
FROZEN = [c for c in SMALL_CASES if c.is_frozen]
updating_cases = pytest.mark.parametrize("case", UPDATING, ids=str)


@pytest.mark.parametrize("momentum", [0.1, 0.0, 1.0, 0.5, -1.2, 2.5, 1, np.float32(0.25)])
@pytest.mark.parametrize("dtype", DTYPES)
@updating_cases
def test_momentum_is_the_weight_of_the_new_value(case, dtype, momentum, backend_or_auto):
    arrays = case.arrays(dtype)
    expected = run_oracle(case, arrays, momentum=float(momentum))
    run(case, arrays, momentum=momentum, backend=backend_or_auto)
    for name in RUNNING:
        assert_values_close(arrays[name], getattr(expected, name))


@updating_cases
def test_the_default_momentum_is_a_tenth(case, backend):
    arrays = case.arrays()
    same = copies(arrays)
    run(case, arrays, backend=backend)
    run(case, same, momentum=0.1, backend=backend)
    for name in RUNNING:
        assert_same_bits(arrays[name], same[name])


@updating_cases
def test_momentum_zero_changes_nothing(case, backend):
    arrays = case.arrays()
    before = copies(arrays)
    run(case, arrays, momentum=0.0, backend=backend)
    for name in RUNNING:
        assert_same_bits(arrays[name], before[name])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_by_hand(layout, backend):
    """Two images of two pixels: means 1 and 7, unbiased variances 2 and 18; 4 and 58/3 as one."""
    x = np.array([0, 2, 4, 10], "float64").reshape(in_layout((2, 1, 2), layout))
    for op, mean, var in (("instance_norm", 4.0, 10.0), ("batch_norm", 4.0, 56 / 3)):
        case = Case(
            op, x.shape, {"layout": layout} | ({"training": True} if op == "batch_norm" else {})
        )
        running = {"running_mean": np.array([2.0]), "running_var": np.array([6.0])}
        run(case, {"x": x, **running}, momentum=0.25, backend=backend)
        np.testing.assert_allclose(running["running_mean"], 1.5 + mean / 4, rtol=1e-14)
        np.testing.assert_allclose(running["running_var"], 4.5 + var / 4, rtol=1e-14)


@updating_cases
def test_they_may_be_strided(case, backend):
    """A row of a table of statistics is written in place, and its neighbours are not."""
    arrays = case.arrays()
    expected = run_oracle(case, arrays)
    lying = {name: spread(arrays[name]) for name in RUNNING}
    run(case, {**arrays, **lying}, backend=backend)
    for name, array in lying.items():
        assert_values_close(array.copy(), getattr(expected, name))
        assert (array.base[::2] == 7).all()


@updating_cases
def test_they_do_not_enter_the_result_in_training(case, backend):
    arrays = case.arrays()
    without = {name: a for name, a in arrays.items() if name not in RUNNING}
    assert_same_bits(run(case, without, backend=backend), run(case, arrays, backend=backend))


@pytest.mark.parametrize("case", FROZEN, ids=str)
def test_frozen_ones_stay_and_may_be_read_only(case, backend_or_auto):
    arrays = case.arrays()
    before = copies(arrays)
    for name in RUNNING:
        arrays[name].flags.writeable = False
    run(case, arrays, momentum=0.9, backend=backend_or_auto)
    for name in RUNNING:
        assert_same_bits(arrays[name], before[name])


@pytest.mark.parametrize("case", FROZEN, ids=str)
def test_frozen_stats_are_what_was_given(case, backend_or_auto):
    arrays = case.arrays("float64")
    _, stats = run(case, arrays, return_stats=True, eps=0.25, backend=backend_or_auto)
    assert_same_bits(stats.mean, arrays["running_mean"])
    np.testing.assert_allclose(stats.rstd, (arrays["running_var"] + 0.25) ** -0.5, rtol=1e-15)


@pytest.mark.parametrize("empty_axis", [0, 2])
@updating_cases
def test_an_empty_batch_leaves_them(case, empty_axis, backend_or_auto):
    shape = [*in_layout((3, 6, 5, 7), case.kwargs["layout"])]
    shape[empty_axis if case.kwargs["layout"] == "NCHW" else max(0, empty_axis - 1)] = 0
    arrays = {**pick(case.arrays(), *RUNNING), "x": np.zeros(shape, "float32")}
    before = copies(arrays)
    run(case, arrays, backend=backend_or_auto)
    for name in RUNNING:
        assert_same_bits(arrays[name], before[name])


@updating_cases
def test_a_failed_call_leaves_them(case, backend_or_auto):
    """The last thing to be checked fails, and they are as they were."""
    arrays = case.arrays()
    before = copies(arrays)
    out = np.zeros((*case.shape, 1), "float32")
    for wrong in ({"out": out}, {"activation": "swish"}, {"backend": "cuda"}, {"eps": -1.0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            run(case, arrays, **{"backend": backend_or_auto, **wrong})
        for name in RUNNING:
            assert_same_bits(arrays[name], before[name])


@pytest.mark.parametrize(
    "case", [c for c in CASES if c.op == "batch_norm" and not c.is_frozen][-6:], ids=str
)
def test_training_then_evaluating(case, backend):
    """With momentum 1 evaluation sees what training saw, up to the unbiased variance."""
    arrays = case.arrays("float64")
    y, stats = run(case, arrays, momentum=1.0, return_stats=True, backend=backend)
    count = y.size // y.shape[case.channel_axis]
    arrays["running_var"] *= (count - 1) / count
    _, frozen = run(case, arrays, training=False, return_stats=True, backend=backend)
    np.testing.assert_allclose(frozen.mean, stats.mean, rtol=1e-12)
    np.testing.assert_allclose(frozen.rstd, stats.rstd, rtol=1e-12)


def test_many_small_steps_add_up(backend):
    """A hundred batches: each update is rounded once, and not more."""
    rng = np.random.default_rng(0)
    mean, var = np.zeros(3, "float32"), np.ones(3, "float32")
    exact_mean, exact_var = mean.astype("float64"), var.astype("float64")
    for _ in range(100):
        x = rng.normal(100, 2, (4, 3, 5)).astype("float32")
        cpunorm.batch_norm(x, mean, var, training=True, backend=backend)
        wide = x.astype("float64")
        exact_mean = 0.9 * exact_mean + 0.1 * wide.mean(axis=(0, 2))
        exact_var = 0.9 * exact_var + 0.1 * wide.var(axis=(0, 2), ddof=1)
    np.testing.assert_allclose(mean, exact_mean, rtol=1e-6)
    np.testing.assert_allclose(var, exact_var, rtol=1e-6)


@updating_cases
def test_overlaps_are_refused(case, backend_or_auto):
    """What is updated in place must be nothing else's memory."""
    right = case.arrays()
    x = right["x"]
    first = np.lib.stride_tricks.as_strided(x, right["running_mean"].shape, (x.itemsize,))
    wrong = {
        "running_var": {
            "running_mean": right["running_mean"],
            "running_var": right["running_mean"],
        },
        "x": {"running_mean": first},
        "weight": {"running_mean": right["weight"]},
        "itself": {"running_var": np.lib.stride_tricks.as_strided(x.copy(), first.shape, (0,))},
    }
    for other, arrays in wrong.items():
        before = copies(right)
        with pytest.raises(ValueError, match=rf"running_\w+ must not overlap.*{other}"):
            run(case, {**right, **arrays}, backend=backend_or_auto)
        assert_same_bits(tuple(right.values()), tuple(before.values()))


@updating_cases
def test_overflow_is_no_half_update(case, backend):
    """Both are written even where NumPy would warn, and warnings are errors here."""
    arrays = case.arrays() | {"x": np.full(case.shape, 3e38, "float32")}
    arrays["x"].flat[0] = -3e38
    run(case, arrays, momentum=2.0, backend=backend)
    assert not np.isfinite(arrays["running_var"]).all()
