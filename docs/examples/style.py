"""A style-transfer network with instance norm, in NumPy: python docs/examples/style.py

The network of J. Johnson, A. Alahi, L. Fei-Fei, "Perceptual Losses for Real-Time Style Transfer
and Super-Resolution", ECCV 2016, arXiv:1603.08155, with instance norm, as Ulyanov et al. have it,
and random weights. Prints how much of its time the normalization takes, by who computes it.
"""

import argparse
from pathlib import Path

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

import cpunorm
import shares

PHOTOS = Path(cpunorm.__file__).parent / "_demo/data/images.npz"
BLOCKS = 5
EPS = 1e-5
# Channels before and after, size of the kernel.
CONVOLUTIONS = {
    "first": (3, 32, 9),
    "down1": (32, 64, 3),
    "down2": (64, 128, 3),
    **{f"block{i}.{part}": (128, 128, 3) for i in range(BLOCKS) for part in "ab"},
    "up1": (128, 64, 3),
    "up2": (64, 32, 3),
    "last": (32, 3, 9),
}


def photographs(path=PHOTOS):
    """Return photographs as an array of shape (N, 3, H, W), between 0 and 1."""
    try:
        with open(path, "rb") as file:
            photos = np.load(file)["photos"]
    except Exception as error:  # of zipfile, zlib, NumPy or the system
        raise ValueError(f"cannot read {path}: {error}") from None
    return np.ascontiguousarray(photos.transpose(0, 3, 1, 2), np.float32) / np.float32(255)


def random_weights(seed=0):
    """Return kernels, and weights and biases of the instance norms, by name."""
    rng = np.random.default_rng(seed)
    weights = {}
    for name, (before, after, size) in CONVOLUTIONS.items():
        kernel = rng.standard_normal((after, before, size, size), np.float32)
        weights[name + ".kernel"] = kernel / np.float32(size * before**0.5)
        weights[name + ".weight"] = 1 + rng.standard_normal(after, np.float32) / 4
        weights[name + ".bias"] = rng.standard_normal(after, np.float32) / 4
    return weights


def normalise(x, weight, bias, activation, residual):
    """Return ``activation(instance_norm(x) + residual)``; x may be overwritten."""
    return cpunorm.instance_norm(
        x, None, None, weight, bias, eps=EPS, activation=activation, residual=residual, out=x
    )


def stylised(x, weights, normalise=normalise):
    """Return the pictures that the network makes of pictures of shape (N, 3, H, W)."""

    def layer(x, name, stride=1, activation="relu", residual=None):
        x = convolved(x, weights[name + ".kernel"], stride)
        return normalise(
            x, weights[name + ".weight"], weights[name + ".bias"], activation, residual
        )

    x = layer(x, "first")
    x = layer(x, "down1", stride=2)
    x = layer(x, "down2", stride=2)
    for i in range(BLOCKS):
        inner = layer(x, f"block{i}.a")
        x = layer(inner, f"block{i}.b", activation=None, residual=x)
    x = layer(doubled(x), "up1")
    x = layer(doubled(x), "up2")
    return convolved(x, weights["last.kernel"])


def convolved(x, kernel, stride=1):
    """Convolve, the border reflected: one matrix product for every row of the kernel."""
    size = kernel.shape[-1]
    n, c, height, _ = x.shape
    border = (size // 2, size // 2)
    padded = np.pad(x, ((0, 0), (0, 0), border, border), mode="reflect")
    windows = sliding_window_view(padded, size, axis=3)[:, :, :, ::stride]
    width = windows.shape[3]
    columns = windows.transpose(0, 1, 4, 2, 3).reshape(n, c * size, -1, width)
    y = 0
    for i in range(size):
        rows = columns[:, :, i : i + height : stride]
        y = y + kernel[:, :, i].reshape(-1, c * size) @ rows.reshape(n, c * size, -1)
    return y.reshape(n, len(kernel), -1, width)


def doubled(x):
    """Repeat every pixel in both directions."""
    return x.repeat(2, axis=2).repeat(2, axis=3)


def by_numpy(x, weight, bias, activation, residual):
    """Return the same as `normalise`, by the formula."""
    mean = x.mean(axis=(2, 3), keepdims=True)
    var = x.var(axis=(2, 3), keepdims=True)
    y = (x - mean) / np.sqrt(var + EPS) * weight[:, None, None] + bias[:, None, None]
    y = y if residual is None else y + residual
    return y if activation is None else np.maximum(y, 0)


def by_torch():
    """Return the same by torch, in place where it can be."""
    import torch

    torch.set_num_threads(cpunorm.get_num_threads())

    @torch.inference_mode()
    def normalise(x, weight, bias, activation, residual):
        x, weight, bias = map(torch.from_numpy, (x, weight, bias))
        y = torch.nn.functional.instance_norm(x, weight=weight, bias=bias, eps=EPS)
        y = y if residual is None else y.add_(torch.from_numpy(residual))
        return (y if activation is None else y.relu_()).numpy()

    return normalise


def by_onnxruntime():
    """Return the same by ONNX Runtime, with the addition or the activation in the graph."""
    from onnx import helper

    def session(then, *more):
        inputs = ["x", "weight", "bias"]
        norm = helper.make_node("InstanceNormalization", inputs, ["normalised"], epsilon=EPS)
        node = helper.make_node(then, ["normalised", *more], ["y"])
        return shares.onnx_session([norm, node], [*inputs, *more])

    activated, added = session("Relu"), session("Add", "residual")

    def normalise(x, weight, bias, activation, residual):
        if residual is None:
            return activated(x, weight, bias)
        return added(x, weight, bias, residual)

    return normalise


def main():
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9, help="how often to measure")
    args = parser.parse_args()
    photos, weights = photographs(), random_weights()
    normalizations = {
        "NumPy": by_numpy,
        "cpunorm": normalise,
        "cpunorm, one thread": shares.on_one_thread(normalise),
    }
    if shares.installed("torch"):
        normalizations["torch"] = by_torch()
    if shares.installed("onnx", "onnxruntime"):
        normalizations["onnxruntime"] = by_onnxruntime()
    lines = shares.table(
        lambda normalise: stylised(photos, weights, normalise), normalizations, args.rounds
    )
    print(*lines, sep="\n")


if __name__ == "__main__":
    main()
