"""Every wrong argument is refused by name, with what came and what was expected, and nothing moves.

One table: the argument, a wrong value, the error, and what its text must mention besides the name.
A line applies to every operation, forward and backward, that takes the argument.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

import cpunorm

from .cases import Case
from .support import assert_same_bits, backward_of, pick, statistics

N, C, H, W = 2, 6, 5, 3
SHAPE = (N, C, H, W)
CASES = (
    Case("batch_norm", SHAPE, {"training": True, "layout": "NCHW"}),
    Case("batch_norm", SHAPE, {"training": False, "layout": "NCHW"}),
    Case("instance_norm", SHAPE, {"use_input_stats": True, "layout": "NCHW"}),
    Case("instance_norm", SHAPE, {"use_input_stats": False, "layout": "NCHW"}),
    Case("group_norm", SHAPE, {"num_groups": 2, "layout": "NCHW"}),
    Case("layer_norm", SHAPE, {"normalized_shape": (C,), "axis": 1}),
    Case("rms_norm", SHAPE, {"normalized_shape": (C,), "axis": 1}),
    Case("add_layer_norm", SHAPE, {"normalized_shape": (C,), "axis": 1}),
    Case("add_rms_norm", SHAPE, {"normalized_shape": (C,), "axis": 1}),
)


class Call:
    """A valid call, with every argument that can be wrong; `check` spoils one and sees."""

    def __init__(self, case: Case, backward: bool):
        self.case = case
        self.backward = backward
        arrays = case.arrays(residual=case.is_channel_op)
        x = arrays["x"]
        common = {**case.kwargs, "backend": None}
        if backward:
            self.name = backward_of(case)
            self.arguments = {"grad_y": case.grad_y(), **pick(arrays, "x", "weight"), **common}
            forward = case.arrays()
            self.arguments |= {"stats": statistics(case, forward, backend="numpy")}
            self.arguments |= {"need": (True, True, True), "mask": None}
            if not case.is_channel_op:
                self.arguments |= {"grad_sum": case.grad_y()}
        else:
            self.name = case.op
            self.arguments = {**arrays, **common, "eps": 1e-5, "out": np.zeros_like(x)}
            self.arguments |= {"return_stats": False}
            if not case.adds:
                self.arguments |= {"mask": None}
            if case.adds:
                self.arguments |= {"sum_out": np.zeros_like(x)}
            if case.is_channel_op:
                self.arguments |= {"activation": None}
            if case.takes_running_statistics:
                self.arguments |= {"momentum": 0.1, "convention": "torch"}

    def __str__(self) -> str:
        return f"{self.name}{' frozen' if self.case.is_frozen else ''}"

    def __call__(self, **options: Any) -> Any:
        return getattr(cpunorm, self.name)(**{**self.arguments, **options})

    def check(self, error: type[Exception], mentions: tuple[str, ...], **wrong: Any) -> None:
        """The call fails as it should, says so, and leaves every array as it was."""
        arguments = self.arguments | wrong
        arrays = [a for a in arguments.values() if isinstance(a, np.ndarray)]
        if isinstance(arguments.get("stats"), tuple):
            arrays += [a for a in arguments["stats"] if isinstance(a, np.ndarray)]
        before = [a.copy() for a in arrays]
        with pytest.raises(error) as raised:
            self(**wrong)
        assert raised.type is error
        for text in mentions:
            assert text in str(raised.value)
        for array, was in zip(arrays, before, strict=True):
            assert_same_bits(array, was)


CALLS = tuple(
    Call(case, backward)
    for case in CASES
    for backward in (False, True)
    if not backward or not case.adds
)


@dataclass(frozen=True)
class Wrong:
    """`argument=value` raises `error`, whose text names the argument and mentions these."""

    argument: str
    value: Any
    error: type[Exception]
    mentions: tuple[str, ...] = ()
    label: str = ""
    where: Callable[[Call], bool] = lambda call: True

    def cases(self):
        for call in CALLS:
            if self.argument in call.arguments and self.where(call):
                yield pytest.param(
                    call, self, id=f"{call}-{self.argument}={self.label or repr(self.value)}"
                )


class Subclass(np.ndarray):
    """An array that may mean something else by its data."""


def array(*shape, dtype="float32"):
    return np.ones(shape, dtype)


def not_arrays(argument, shape):
    """Things that are no numpy.ndarray, though they look like it."""
    for label, value in {
        "list": array(*shape).tolist(),
        "number": 1.0,
        "text": "ones",
        "scalar": np.float32(1),
        "masked": np.ma.masked_array(array(*shape)),
        "subclass": array(*shape).view(Subclass),
    }.items():
        kind = type(value).__name__
        yield Wrong(argument, value, TypeError, ("ndarray", kind), f"<{label}>")


def wrong_shapes(argument, shape, *others):
    for other in others:
        yield Wrong(argument, array(*other), ValueError, (str(other), str(shape)), f"<{other}>")


def read_only(*shape):
    a = array(*shape)
    a.flags.writeable = False
    return a


def updates(call):
    """Whether the call writes running statistics."""
    return not call.case.is_frozen


def forward_only(call):
    return not call.backward


def channel_op(call):
    return call.case.is_channel_op


LIKE_X = ("residual", "grad_y", "grad_sum", "out", "sum_out")
PER_CHANNEL = ("weight", "bias", "running_mean", "running_var")

TABLE: tuple[Wrong, ...] = (
    # x
    *not_arrays("x", SHAPE),
    Wrong("x", None, TypeError, ("ndarray", "NoneType")),
    Wrong("x", array(*SHAPE, dtype="int64"), TypeError, ("float32", "float64"), "<int64>"),
    Wrong("x", array(*SHAPE, dtype="O"), TypeError, ("float32", "float64"), "<object>"),
    # arrays that have x's shape
    *(wrong for name in LIKE_X for wrong in not_arrays(name, SHAPE)),
    *(
        wrong
        for name in LIKE_X
        for wrong in wrong_shapes(name, SHAPE, (N, C, H, W + 1), (C, H, W), (1, C, H, W), (), (0,))
    ),
    *(
        Wrong(name, array(*SHAPE, dtype=dtype), TypeError, ("float32", dtype), f"<{dtype}>")
        for name in LIKE_X
        for dtype in ("float64", "int32", "float16")
    ),
    *(
        Wrong(name, read_only(*SHAPE), ValueError, ("read-only",), "<read-only>")
        for name in ("out", "sum_out")
    ),
    # arrays of one value per channel
    *(wrong for name in PER_CHANNEL for wrong in not_arrays(name, (C,))),
    *(
        wrong
        for name in PER_CHANNEL
        for wrong in wrong_shapes(name, (C,), (C + 1,), (1,), (0,), (1, C), (C, 1), ())
    ),
    *(
        Wrong(name, array(C, dtype=dtype), TypeError, ("float32", dtype), f"<{dtype}>")
        for name in PER_CHANNEL
        for dtype in ("float64", "int32", "float16")
    ),
    *(
        Wrong(name, read_only(C), ValueError, ("read-only",), "<read-only>", updates)
        for name in ("running_mean", "running_var")
    ),
    # one running statistic without the other
    *(
        Wrong(name, None, ValueError, ("running_mean", "running_var", "None"))
        for name in ("running_mean", "running_var")
    ),
    # numbers
    *(
        Wrong("eps", eps, ValueError, (str(eps),))
        for eps in (-1e-5, -1, float("nan"), float("inf"), -float("inf"))
    ),
    *(Wrong("eps", eps, TypeError, (type(eps).__name__,)) for eps in ("1e-5", 1j, [1e-5])),
    Wrong("eps", None, TypeError, ("NoneType",), where=lambda call: not call.case.is_rms),
    Wrong(
        "eps", 0.0, ValueError, ("0",),
        where=lambda call: call.case.op == "batch_norm" and not call.case.is_frozen,
    ),
    *(
        Wrong("momentum", momentum, TypeError, (type(momentum).__name__,))
        for momentum in (None, "0.1", 1j, [0.1])
    ),
    Wrong("eps", 10**400, ValueError, ("float64",)),
    Wrong("normalized_shape", (True,), TypeError, ("(True,)",)),
    Wrong("num_groups", 0, ValueError, ("0", str(C))),
    Wrong("num_groups", -2, ValueError, ("-2", str(C))),
    Wrong("num_groups", 4, ValueError, ("4", str(C))),
    Wrong("num_groups", 2 * C, ValueError, (str(2 * C), str(C))),
    *(
        Wrong("num_groups", groups, TypeError, (type(groups).__name__,))
        for groups in (None, 2.0, "2", True, (2,), np.array(2), np.array([2]))
    ),
    # flags
    *(
        Wrong(name, value, TypeError, (type(value).__name__, "bool"))
        for name in ("training", "use_input_stats", "return_stats")
        for value in (None, 1, 0, "yes")
    ),
    *(
        Wrong("need", need, TypeError, ("bool",))
        for need in (None, True, "yes", (1, 1, 1), (True, True, None))
    ),
    Wrong("need", (True, True), ValueError, ("2",)),
    Wrong("need", (True,) * 4, ValueError, ("4",)),
    # masks
    *not_arrays("mask", (N, H, W)),
    *(
        Wrong("mask", array(N, H, W, dtype=dtype), TypeError, ("bool", dtype), f"<{dtype}>")
        for dtype in ("float32", "uint8", "int64")
    ),
    *(
        Wrong("mask", array(*shape, dtype="bool"), ValueError, (str(shape), str((N, H, W))),
              f"<{shape}>")
        for shape in (SHAPE, (N, 1, H, W), (H, W), (N, H, W + 1), (N, C), (0,), ())
    ),
    # words
    *(
        Wrong("convention", convention, ValueError, (repr(convention), "torch", "keras", "onnx"))
        for convention in ("tensorflow", "Keras", "")
    ),
    *(Wrong("convention", value, TypeError, (type(value).__name__,)) for value in (None, 1)),
    *(
        Wrong("layout", layout, ValueError, (repr(layout), "NCHW", "NHWC", "channels_first",
                                             "channels_last"))
        for layout in ("NCWH", "nchw", "", "NHW")
    ),
    *(Wrong("layout", layout, TypeError, (type(layout).__name__,)) for layout in (None, 1)),
    *(
        Wrong("activation", activation, ValueError,
              (repr(activation), "None", "relu", "silu", "gelu", "sigmoid", "tanh"))
        for activation in ("swish", "ReLU", "")
    ),
    *(
        Wrong("activation", activation, TypeError, (type(activation).__name__,))
        for activation in (1, True, np.tanh)
    ),
    *(
        Wrong("backend", backend, ValueError, (repr(backend), "auto", "cython", "numba", "numpy"))
        for backend in ("cuda", "Cython", "")
    ),
    *(Wrong("backend", backend, TypeError, (type(backend).__name__,)) for backend in (1, True)),
    # axes
    *(
        Wrong("normalized_shape", shape, ValueError, (str(SHAPE), str(shape)))
        for shape in ((C + 1,), (1,), (0,), (-1,))
    ),
    Wrong("normalized_shape", (), ValueError, ("empty",)),
    *(
        Wrong("normalized_shape", shape, TypeError, (repr(shape),))
        for shape in (None, float(C), "6", (float(C),), [None])
    ),
    *(Wrong("axis", axis, ValueError, (str(axis), str(SHAPE))) for axis in (4, -5, (7,))),
    *(Wrong("axis", axis, ValueError, (str(axis), str((C,)))) for axis in ((1, 2), ())),
    *(Wrong("axis", axis, TypeError, (repr(axis),)) for axis in (1.0, "1", (1.0,), [None])),
    # stats
    *(
        Wrong("stats", stats, TypeError, ("Stats", type(stats).__name__), f"<{label}>")
        for label, stats in {
            "None": None,
            "list": [array(C), array(C)],
            "array": array(2, C),
            "triple": (array(C),) * 3,
        }.items()
    ),
)  # fmt: skip


@pytest.mark.parametrize("call", CALLS, ids=str)
def test_the_calls_themselves_are_right(call):
    """What the table spoils is what fails: without it nothing does."""
    call()


@pytest.mark.parametrize(("call", "wrong"), [case for wrong in TABLE for case in wrong.cases()])
def test_wrong_argument(call, wrong):
    mentions = (wrong.argument, *wrong.mentions)
    call.check(wrong.error, mentions, **{wrong.argument: wrong.value})


def test_every_argument_is_in_the_table():
    for call in CALLS:
        signature = inspect.signature(getattr(cpunorm, call.name))
        assert set(call.arguments) == set(signature.parameters)
        assert set(signature.parameters) <= {wrong.argument for wrong in TABLE}


# --- Wrong together ------------------------------------------------------------------------------

channel_calls = pytest.mark.parametrize("call", [c for c in CALLS if channel_op(c)], ids=str)
forward_calls = pytest.mark.parametrize("call", [c for c in CALLS if forward_only(c)], ids=str)
backward_calls = pytest.mark.parametrize("call", [c for c in CALLS if c.backward], ids=str)


def reshaped(call, shape):
    """Every array that has x's shape, in another."""
    return {
        name: np.ones(shape, a.dtype)
        for name, a in call.arguments.items()
        if isinstance(a, np.ndarray) and a.shape == SHAPE
    }


@pytest.mark.parametrize("shape", [(), (C,)])
@channel_calls
def test_rank_too_low(call, shape):
    call.check(ValueError, ("x", str(shape), "2"), **reshaped(call, shape))


@pytest.mark.parametrize("layout", ["NHWC", "channels_last"])
@channel_calls
def test_channels_of_the_other_layout(call, layout):
    """The last axis is no number of channels here: whatever does not match it is named."""
    wrong = {"layout": layout}
    if "num_groups" in call.arguments:
        wrong |= {"num_groups": W}
    if not call.backward:
        call.check(ValueError, ("weight", str((C,)), str((W,))), **wrong)
    elif call.name == "batch_norm_backward" or call.case.is_frozen:
        call.check(ValueError, ("stats.mean", str((C,)), str((W,))), **wrong)
    else:
        expected = (N, W)
        call.check(ValueError, ("stats.mean", str(expected)), **wrong)


@pytest.mark.parametrize("shape", [(2, C), (2, C, 1, 1)])
@pytest.mark.parametrize("call", [c for c in CALLS if c.name == "instance_norm"], ids=str)
def test_instance_norm_of_one_value(call, shape):
    if call.case.is_frozen:
        call(**reshaped(call, shape))
    else:
        call.check(ValueError, ("x", str(shape)), **reshaped(call, shape))


@pytest.mark.parametrize("shape", [(1, C), (1, C, 1), (1, C, 1, 1)])
@pytest.mark.parametrize("call", [c for c in CALLS if c.name == "batch_norm"], ids=str)
def test_batch_norm_of_one_value(call, shape):
    if call.case.is_frozen:
        call(**reshaped(call, shape))
    else:
        call.check(ValueError, ("x", str(shape)), **reshaped(call, shape))


@pytest.mark.parametrize(
    "call", [c for c in CALLS if c.name in ("batch_norm", "instance_norm") and c.case.is_frozen],
    ids=str,
)  # fmt: skip
def test_frozen_without_statistics(call):
    names = ("running_mean", "running_var")
    call.check(ValueError, (*names, "None"), running_mean=None, running_var=None)


@pytest.mark.parametrize("call", [c for c in CALLS if channel_op(c) and forward_only(c)], ids=str)
def test_stats_with_an_activation(call):
    wrong = {"activation": "relu", "return_stats": True}
    call.check(ValueError, ("activation", "return_stats", "relu"), **wrong)


@pytest.mark.parametrize("call", [c for c in CALLS if not channel_op(c)], ids=str)
def test_axis_named_twice(call):
    wrong = {"normalized_shape": (C, C), "axis": (1, -3)}
    wrong |= {name: array(C, C) for name in ("weight", "bias") if name in call.arguments}
    call.check(ValueError, ("axis", "(1, -3)"), **wrong)


@pytest.mark.parametrize("call", [c for c in CALLS if not channel_op(c)], ids=str)
def test_trailing_axes_that_do_not_match(call):
    for shape in ((C,), (C, H), (1, *SHAPE), (N, C, H, W + 1)):
        wrong = {name: array(*shape) for name in ("weight", "bias") if name in call.arguments}
        wrong |= {"normalized_shape": shape, "axis": None}
        call.check(ValueError, ("normalized_shape", str(shape)), **wrong)


@pytest.mark.parametrize("call", [c for c in CALLS if not channel_op(c)], ids=str)
def test_a_weight_of_the_same_size_but_another_shape(call):
    """Axes (H, C) want a weight of shape (H, C), not (C, H) and not flat."""
    right = {"normalized_shape": (H, C), "axis": (2, 1)}
    parameters = [name for name in ("weight", "bias") if name in call.arguments]
    if call.backward:
        mean, rstd = call.arguments["stats"]
        right["stats"] = tuple(s if s is None else s[:, 0, :] for s in (mean, rstd))
    for spoiled in parameters:
        for shape in ((C, H), (C * H,)):
            shapes = dict.fromkeys(parameters, (H, C)) | {spoiled: shape}
            given = {name: array(*s) for name, s in shapes.items()}
            call.check(ValueError, (spoiled, str((H, C)), str(shape)), **right, **given)


@backward_calls
def test_the_parts_of_stats(call):
    mean, rstd = call.arguments["stats"]
    shape = rstd.shape
    for other in ((*shape, 1), shape[:-1], (*shape[:-1], shape[-1] + 1)):
        mentions = ("rstd", str(shape), str(other))
        call.check(ValueError, mentions, stats=cpunorm.Stats(mean, array(*other)))
        if mean is not None:
            mentions = ("mean", str(shape), str(other))
            call.check(ValueError, mentions, stats=cpunorm.Stats(array(*other), rstd))
    call.check(TypeError, ("rstd", "NoneType"), stats=cpunorm.Stats(mean, None))
    call.check(TypeError, ("rstd", "list"), stats=cpunorm.Stats(mean, rstd.tolist()))


@backward_calls
def test_stats_of_the_other_kind(call):
    """A mean where RMS norm has none, none where there must be one."""
    mean, rstd = call.arguments["stats"]
    if mean is None:
        call.check(ValueError, ("mean", "None"), stats=cpunorm.Stats(rstd, rstd))
    else:
        call.check(TypeError, ("mean", "NoneType"), stats=cpunorm.Stats(None, rstd))


@forward_calls
def test_unknown_arguments_and_positions(call):
    """What is ours comes by name."""
    with pytest.raises(TypeError, match="unexpected keyword"):
        call(inplace=True)
    positional = [call.arguments["x"]] * 12
    with pytest.raises(TypeError, match="positional"):
        getattr(cpunorm, call.name)(*positional)
