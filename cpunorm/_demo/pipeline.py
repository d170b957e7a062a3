"""A small network on real images, layer by layer: NumPy formulas against cpunorm.

Convolutions, pooling and the linear layer are the same NumPy code on both sides; only the
normalizations, with their activations, differ. The weights are random but fixed, and the running
statistics of the batch norm are those of images passed through beforehand.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import resources
from typing import Any, NamedTuple

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from .. import layers
from .._canonical import Array
from . import formulas
from .progress import stage
from .timing import Call, measure

TILE = 56
TOKENS = (0, 2, 3, 1)  # NCHW to one row of channels per pixel

Function = Callable[[Array], Array]


class Step(NamedTuple):
    """One layer; `ours` is None where both sides run the same NumPy code."""

    name: str
    plain: Function
    ours: Function | None = None


@dataclass
class Result:
    """What one layer gave: times in milliseconds, and the difference between the two sides."""

    layer: str
    shape: tuple[int, ...]
    numpy: float
    cpunorm: float | None
    difference: float


@dataclass
class Run:
    """The network on one set of images."""

    images: str
    layers: list[Result]
    outcome: str


def run(backend: str | None, blocks: int) -> list[Run]:
    """Run the network on tiles of the photographs, and on the digits."""
    with resources.files(__package__).joinpath("data/images.npz").open("rb") as file:
        data = dict(np.load(file))
    with stage("running the network", 2) as advance:
        photos = _photos(data["photos"], backend, blocks)
        advance()
        digits = _digits(data["digits"], data["labels"], backend, blocks)
        advance()
    return [photos, digits]


def _photos(photos: Array, backend: str | None, blocks: int) -> Run:
    n, height, width, c = photos.shape
    split = photos.reshape(n, height // TILE, TILE, width // TILE, TILE, c)
    tiles = split.transpose(0, 1, 3, 5, 2, 4).reshape(-1, c, TILE, TILE)
    x = _scaled(tiles, 255)
    results, plain, ours = _through(_network(x, backend), x, blocks)
    same = f"features differ by at most {np.max(np.abs(plain - ours)):.0e}"
    return Run(f"{len(x)} tiles of china.jpg and flower.jpg, {c} x {TILE} x {TILE}", results, same)


def _digits(digits: Array, labels: Array, backend: str | None, blocks: int) -> Run:
    x = _scaled(digits[:, None], 16)
    known, x = np.split(x, 2)
    known_labels, labels = np.split(labels, 2)
    network = _network(known, backend)
    results, plain, ours = _through(network, x, blocks)
    for step in network:
        known = step.plain(known)
    readout = _fit(known, known_labels)
    guesses = [np.argmax(_flat(features) @ readout, axis=1) for features in (plain, ours)]
    right = [f"{np.mean(guess == labels):.1%}" for guess in guesses]
    agree = np.count_nonzero(guesses[0] == guesses[1])
    outcome = (
        f"a linear fit on the features reads {right[0]} of them with NumPy, {right[1]} with "
        f"cpunorm, {agree} of {len(x)} alike"
    )
    return Run(f"{len(x)} handwritten digits, 1 x 8 x 8", results, outcome)


def _scaled(pixels: Array, largest: int) -> Array:
    return np.ascontiguousarray(pixels, np.float32) / np.float32(largest)


def _flat(x: Array) -> Array:
    return x.reshape(len(x), -1)


def _fit(features: Array, labels: Array) -> Array:
    """Return the ridge regression from features to one column per label."""
    flat = _flat(features)
    penalty = np.identity(flat.shape[1], np.float32) * np.float32(len(flat) / 10)
    return np.linalg.solve(flat.T @ flat + penalty, flat.T @ np.eye(10, dtype=np.float32)[labels])


def _through(network: Sequence[Step], x: Array, blocks: int) -> tuple[list[Result], Array, Array]:
    """Pass x through both sides, each on what its own layers made of it."""
    results = []
    plain = ours = x
    for step in network:
        calls: dict[str, Call] = {"numpy": partial(step.plain, plain)}
        if step.ours is not None:
            calls["cpunorm"] = partial(step.ours, ours)
        times = {k: s * 1e3 for k, s in measure(calls, list(calls), blocks).items()}
        plain, ours = step.plain(plain), (step.ours or step.plain)(ours)
        difference = float(np.max(np.abs(plain - ours)))
        results.append(
            Result(step.name, plain.shape, times["numpy"], times.get("cpunorm"), difference)
        )
    return results, plain, ours


def _network(images: Array, backend: str | None) -> list[Step]:
    """Build the network; its batch norm takes its running statistics from `images`."""
    rng = np.random.default_rng(0)
    first, second = 32, 64

    def matrix(rows: int, columns: int) -> Array:
        values = rng.standard_normal((rows, columns), np.float32)
        return values * np.float32(np.sqrt(2 / rows))

    conv1, conv2 = matrix(9 * images.shape[1], first), matrix(9 * first, second)
    linear = matrix(second, second)
    batch = layers.BatchNorm(first, momentum=None, activation="relu", backend=backend)
    group = layers.GroupNorm(8, second, activation="silu", backend=backend)
    instance = layers.InstanceNorm(second, affine=True, backend=backend)
    channels = layers.LayerNorm(second, axis=1, backend=backend)
    tokens = layers.LayerNorm(second, backend=backend)
    rms = layers.RMSNorm(second, eps=1e-6, backend=backend)
    normalizations = (batch, group, instance, channels, tokens, rms)
    for layer in normalizations:
        for parameter in (layer.weight, layer.bias):
            if parameter is not None:
                parameter += rng.standard_normal(parameter.shape, np.float32) / np.float32(4)
    batch(_conv(images, conv1, 1))
    for layer in normalizations:
        layer.eval()

    def plain_batch(x: Array) -> Any:
        running = batch.running_mean, batch.running_var
        return formulas.relu(formulas.transform(x, *running, batch.weight, batch.bias, 1))

    def plain_group(x: Array) -> Any:
        return formulas.silu(formulas.group_norm(x, 8, group.weight, group.bias, 1))

    def plain(
        layer: layers.InstanceNorm | layers.LayerNorm, over: tuple[int, ...], axis: int
    ) -> Function:
        return lambda x: formulas.standardise(x, over, layer.weight, layer.bias, axis)

    return [
        Step("conv 3x3", lambda x: _conv(x, conv1, 1)),
        Step("batch norm + ReLU", plain_batch, batch),
        Step("conv 3x3, stride 2", lambda x: _conv(x, conv2, 2)),
        Step("group norm + SiLU", plain_group, group),
        Step("instance norm", plain(instance, (2, 3), 1), instance),
        Step("layer norm, channels", plain(channels, (1,), 1), channels),
        Step("average pool, tokens", _pool),
        Step("layer norm, tokens", plain(tokens, (2,), 2), tokens),
        Step("linear", lambda x: x @ linear),
        Step("RMS norm, tokens", lambda x: formulas.rms_norm(x, rms.weight, 2), rms),
    ]


def _conv(x: Array, kernel: Array, stride: int) -> Array:
    """3 x 3 convolution with padding 1: every window a row of one matrix product."""
    padded = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)))
    windows = sliding_window_view(padded, (3, 3), axis=(2, 3))[:, :, ::stride, ::stride]
    n, c, height, width = windows.shape[:4]
    rows = windows.transpose(0, 2, 3, 1, 4, 5).reshape(-1, 9 * c)
    y = (rows @ kernel).reshape(n, height, width, -1)
    return np.ascontiguousarray(y.transpose(0, 3, 1, 2))


def _pool(x: Array) -> Array:
    """Means of 2 x 2 pixels, then one row of channels per pixel."""
    n, c, height, width = x.shape
    means = x.reshape(n, c, height // 2, 2, width // 2, 2).mean(axis=(3, 5))
    return np.ascontiguousarray(means.transpose(TOKENS)).reshape(n, -1, c)
