"""What is right: the float64 oracle on the part of a result that is looked at."""

import math
from typing import Any

import numpy as np

from cpunorm import reference

from .peers import EPS, MOMENTUM, Array, Data

# Beyond these a result is wrong. Some libraries keep statistics in 16 bits.
TOLERANCE = {"float64": 1e-9, "float32": 2e-3, "float16": 2e-2, "bfloat16": 1e-1}


def expected(data: Data) -> Array:
    """Return the sampled part of y, or of the gradient of x."""
    case = data.case
    x = data.sample(data.x)
    parameters = {"weight": data.weight, "bias": data.bias, "mean": data.mean, "var": data.var}
    if case.operation == "batch_norm":
        _, channels = data.sampled
        parameters = {name: array[channels] for name, array in parameters.items()}
    weight, bias = parameters["weight"], parameters["bias"]
    running = {"running_mean": parameters["mean"], "running_var": parameters["var"]}

    options: dict[str, Any] = {"axis": case.axis} if case.over_rows else {"layout": case.layout}
    middle = {"group_norm": (case.num_groups,)}.get(case.operation, ())
    if case.over_rows:
        middle = (case.features,)
    elif case.operation == "batch_norm":
        options["training"] = not case.frozen
    if case.forward:
        if case.operation == "batch_norm":
            options |= running | {"momentum": MOMENTUM}
        if case.operation != "rms_norm":
            options["bias"] = bias
        function = getattr(reference, case.operation)
        return function(x, *middle, weight=weight, eps=EPS, **options).y
    if case.frozen:
        options |= running
    function = getattr(reference, f"{case.operation}_backward")
    grad = data.sample(data.grad)
    return function(grad, x, *middle, weight=weight, eps=EPS, **options)[0]


def error(sample: Array, oracle: Array) -> float:
    """Return max |y − oracle| / (1 + |oracle|), NaN or infinite if y is anywhere."""
    with np.errstate(invalid="ignore", over="ignore"):
        return float(np.max(np.abs(sample.astype(np.float64) - oracle) / (1 + np.abs(oracle))))


def wrong(found: float, dtype: str) -> bool:
    """Whether an error is too large, or no number."""
    return not (math.isfinite(found) and found <= TOLERANCE[dtype])
