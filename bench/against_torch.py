"""Side by side with PyTorch: python bench/against_torch.py [--threads N] [--blocks N]

Needs torch. Both libraries run in one process with the same number of threads, in blocks with a
pause after each, and are warmed up; a figure is the median over blocks, a ratio above 1 means that
cpunorm is faster. cpunorm writes into existing memory; torch allocates its results, since its
functions take no output.
"""

import argparse
import platform
from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F

import cpunorm
from cpunorm._demo.timing import measure
from cpunorm._dispatch import config

Call = Callable[[], object]
SHAPES = ((1, 64, 56, 56), (8, 512, 7, 7), (32, 256, 14, 14), (32, 64, 56, 56))
ROWS = ((1, 768), (128, 768), (4096, 768), (8192, 1024), (65536, 64))


def calls() -> Iterator[tuple[str, Call, Call, Call]]:
    """Yield each case: its name, a copy of x, ours, torch's."""
    rng = np.random.default_rng(0)
    for shape in SHAPES:
        first = rng.standard_normal(shape, np.float32)
        last = np.ascontiguousarray(np.moveaxis(first, 1, -1))
        weight, bias, mean = rng.standard_normal((3, shape[1]), np.float32)
        var = np.square(mean) + np.float32(1)
        w, b, m, v = (torch.from_numpy(a.copy()) for a in (weight, bias, mean, var))
        for layout, x in (("NCHW", first), ("NHWC", last)):
            t = torch.from_numpy(x) if layout == "NCHW" else torch.from_numpy(x).movedim(-1, 1)
            y = np.empty_like(x)
            into_y = {"layout": layout, "out": y}
            copy = partial(np.copyto, y, x)
            where = f"{layout} {shape}"
            for training, mode in ((True, "training"), (False, "inference")):
                yield (
                    f"batch norm, {mode} {where}",
                    copy,
                    partial(cpunorm.batch_norm, x, mean, var, weight, bias, training, **into_y),
                    partial(F.batch_norm, t, m, v, w, b, training),
                )
            yield (
                f"instance norm {where}",
                copy,
                partial(cpunorm.instance_norm, x, None, None, weight, bias, **into_y),
                partial(F.instance_norm, t, None, None, w, b),
            )
            yield (
                f"group norm (32) {where}",
                copy,
                partial(cpunorm.group_norm, x, 32, weight, bias, **into_y),
                partial(F.group_norm, t, 32, w, b),
            )
    for shape in ROWS:
        x = rng.standard_normal(shape, np.float32)
        weight, bias = rng.standard_normal((2, shape[1]), np.float32)
        t, w, b = (torch.from_numpy(a) for a in (x, weight, bias))
        y = np.empty_like(x)
        copy = partial(np.copyto, y, x)
        yield (
            f"layer norm {shape}",
            copy,
            partial(cpunorm.layer_norm, x, shape[1], weight, bias, out=y),
            partial(F.layer_norm, t, shape[1:], w, b),
        )
        yield (
            f"RMS norm {shape}",
            copy,
            partial(cpunorm.rms_norm, x, shape[1], weight, out=y),
            partial(F.rms_norm, t, shape[1:], w),
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--threads", type=int, default=cpunorm.get_num_threads())
    parser.add_argument("--blocks", type=int, default=7)
    args = parser.parse_args()
    cpunorm.set_num_threads(args.threads)
    torch.set_num_threads(args.threads)
    isa = config()["instruction set"]
    print(
        f"{args.threads} threads, float32, {platform.machine()} {isa}, "
        f"cpunorm {cpunorm.__version__}, numpy {np.__version__}, torch {torch.__version__}"
    )
    print(f"{'':50} {'copy':>9} {'cpunorm':>9} {'torch':>9}  µs   ratio")
    with torch.inference_mode():
        for name, copy, ours, theirs in calls():
            seconds = measure(
                {"copy": copy, "cpunorm": ours, "torch": theirs}, ("cpunorm", "torch"), args.blocks
            )
            times = "".join(f"{s * 1e6:10.1f}" for s in seconds.values())
            print(f"{name:50}{times}      {seconds['torch'] / seconds['cpunorm']:5.2f}", flush=True)


if __name__ == "__main__":
    main()
