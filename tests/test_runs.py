"""Runs of a mask move what NumPy's own indexing moves, whatever the size of a place."""

import numpy as np
import pytest

from cpunorm import _no_runs

_runs = pytest.importorskip("cpunorm._runs")

MASKS = {
    "nothing": lambda rng, shape: np.zeros(shape, bool),
    "everything": lambda rng, shape: np.ones(shape, bool),
    "random": lambda rng, shape: rng.random(shape) < 0.5,
    "padded": lambda rng, shape: np.arange(shape[1]) < rng.integers(0, shape[1] + 1, (shape[0], 1)),
}


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("width", [1, 5])
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("places", [1, 7, 20_000])  # the last one makes several blocks
@pytest.mark.parametrize("mask_of", MASKS.values(), ids=MASKS)
def test_there_and_back(mask_of, places, dtype, width, threads):
    rng = np.random.default_rng(0)
    mask = mask_of(rng, (3, places))
    whole = rng.normal(size=(3, 4, places, width)).astype(dtype)
    a = whole[:, 1:3]  # some of the channels
    results = []
    for module in (_runs, _no_runs):
        runs = module.Runs(mask, width * a.itemsize)
        counted = np.empty((2, np.count_nonzero(mask), width), dtype)
        runs.gather(a, counted, threads)
        target, cleared = whole.copy(), whole.copy()
        runs.scatter(counted, target[:, 1:3], threads)
        runs.scatter(None, cleared[:, 1:3], threads)
        results.append((counted, target, cleared))
    for compiled, plain in zip(*results, strict=True):
        np.testing.assert_array_equal(compiled, plain)
    np.testing.assert_array_equal(target, cleared)
    where = np.broadcast_to(mask[:, None, :, None], a.shape)
    np.testing.assert_array_equal(target[:, 1:3], np.where(where, a, 0))
