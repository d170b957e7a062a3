"""A results file without a measurement: every time is overhead + bytes ÷ bandwidth, with noise."""

import math

import numpy as np

from bench.results import FORMAT, write

BANDWIDTH = {"cache": 60e9, "memory": 15e9}
LAST_CACHE = 32 << 20
# Seconds of a call before it does anything, and its sweeps over memory beside a copy's.
IMPLEMENTATIONS = {
    "cython": (1e-6, 1.0),
    "numba": (2e-5, 1.1),
    "numpy": (3e-5, 6.0),
    "plain": (4e-5, 8.0),
    "torch": (5e-6, 1.6),
    "onnxruntime": (8e-6, 2.5),
    "copy": (1e-7, None),
}
OPERATIONS = {
    "batch_norm": {"training": 1.6, "inference": 1.1, "backward": 1.9},
    "layer_norm": {"inference": 1.5, "backward": 2.0},
    "instance_norm": {"inference": 1.7, "backward": 2.1},
    "group_norm": {"inference": 1.4, "backward": 1.8},
    "rms_norm": {"inference": 1.2, "backward": 1.7},
}
IMAGES = [(8, c, s, s) for c in (8, 128, 2048) for s in (7, 28, 112)]
IMAGES += [(n, c, 14, 14) for n in (1, 8, 64) for c in (8, 128, 2048)]
IMAGES += [(8, 512, 7, 7), (32, 64, 56, 56)]
ROWS = [(2**16 // d, d) for d in (8, 512, 65536)] + [(4096, 768)]
ITEMSIZES = {"float32": 4, "float16": 2}
GROUPED = (8, 128, 28, 28)


def seconds_of(operation, pass_, layout, dtype, shape, threads, implementation):
    """Return what a call would take, without noise."""
    overhead, factor = IMPLEMENTATIONS[implementation]
    moved = math.prod(shape) * ITEMSIZES[dtype] * (3 if pass_ == "backward" else 2)
    bandwidth = BANDWIDTH["cache" if moved < LAST_CACHE else "memory"] * threads / 2
    if implementation == "copy":
        return overhead + moved / bandwidth
    sweeps = OPERATIONS[operation][pass_] * factor
    if implementation == "torch" and layout == "NHWC":
        sweeps *= 2
    if implementation == "torch" and operation == "group_norm" and math.prod(shape[2:]) < 50:
        sweeps /= 3  # where we lose
    return overhead + sweeps * moved / bandwidth


def document():
    """Return a results document as plain data."""
    noise = np.random.default_rng(0)
    benchmarks = [
        _benchmark(noise, *what, implementation)
        for what in _cases()
        for implementation in IMPLEMENTATIONS
        if what[3] == "float32" or implementation in ("cython", "torch", "copy")
    ]
    return {
        "machine_info": {
            "cpunorm": {
                "format": FORMAT,
                "cpu": "Model CPU",
                "cores": 2,
                "l1d": 32 << 10,
                "l2": 1 << 20,
                "l3": LAST_CACHE,
                "instruction set": "x86_64_v4",
                "python": "3.11.2",
                "versions": {"cpunorm": "0.1.0", "torch": "2.13.0", "onnxruntime": "1.32.0"},
                "date": "2026-01-02T03:04:05+00:00",
                "command": "python -m bench",
            }
        },
        "commit_info": {},
        "benchmarks": benchmarks,
        "accuracy": _accuracy(),
        "absent": [],
        "datetime": "2026-01-02T03:04:05+00:00",
        "version": "5.1.0",
    }


def write_results(path, change=None):
    """Write the document, changed or not, and return the path."""
    content = document()
    if change is not None:
        change(content)
    write(path, content)
    return path


def _cases():
    """Yield operation, pass, layout, dtype, shape, groups, threads."""
    for operation, passes in OPERATIONS.items():
        for pass_ in passes:
            for shape in IMAGES:
                groups = math.gcd(shape[1], 32) if operation == "group_norm" else None
                for layout in ("NCHW", "NHWC"):
                    for threads in (1, 2):
                        yield operation, pass_, layout, "float32", shape, groups, threads
                yield operation, pass_, "NCHW", "float16", shape, groups, 2
            if operation in ("layer_norm", "rms_norm"):
                for shape in ROWS:
                    yield operation, pass_, "NCHW", "float32", shape, None, 2
    for groups in (1, 128):
        for layout in ("NCHW", "NHWC"):
            yield "group_norm", "inference", layout, "float32", GROUPED, groups, 2


def _benchmark(noise, operation, pass_, layout, dtype, shape, groups, threads, implementation):
    what = (operation, pass_, layout, dtype, shape, threads)
    seconds = seconds_of(*what, implementation) * noise.normal(1, 0.02, 5)
    copy = seconds_of(*what, "copy")
    moved = math.prod(shape) * ITEMSIZES[dtype] * (3 if pass_ == "backward" else 2)
    median = float(np.median(seconds))
    name = f"{operation} {pass_} {layout} {'x'.join(map(str, shape))}"
    return {
        "group": name,
        "name": f"{name} {implementation} {threads}",
        "params": None,
        "stats": {"data": seconds.tolist()},
        "extra_info": {
            "operation": operation,
            "pass": pass_,
            "layout": layout,
            "dtype": dtype,
            "shape": list(shape),
            "num_groups": groups,
            "source": "grid",
            "model": None,
            "threads": threads,
            "implementation": implementation,
            "version": "1.0",
            "bytes": moved,
            "gb_per_s": moved / median / 1e9,
            "share_of_copy": copy / median,
            "error": None if implementation == "copy" else 1e-7,
        },
    }


def _accuracy():
    found = []
    for operation, passes in OPERATIONS.items():
        for pass_ in passes:
            for dtype in ITEMSIZES:
                for implementation in ("cython", "numba", "torch", "onnxruntime"):
                    for offset in (0.0, 10.0, 1e3, 1e5):
                        if dtype == "float16" and offset > 6e4:
                            continue
                        bad = 1e-7 * (1 + offset) ** (2 if implementation == "onnxruntime" else 0.3)
                        found.append(
                            {
                                "operation": operation,
                                "pass": pass_,
                                "dtype": dtype,
                                "implementation": implementation,
                                "version": "1.0",
                                "offset": offset,
                                "shape": [4, 32, 14, 14],
                                "error": bad if bad < 100 else None,
                            }
                        )
    return found
