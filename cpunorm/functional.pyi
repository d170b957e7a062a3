from typing import Literal, TypeAlias, overload

from ._canonical import (
    Activation,
    Array,
    ConventionName,
    Gradients,
    Layout,
    Need,
    Shape,
    Stats,
)
from ._interchange import Readable

# What `return_stats` gives, and lists and tuples of three whose length mypy does not know.
_Stats: TypeAlias = Stats | tuple[Readable | None, Readable]
_Need: TypeAlias = Need | tuple[bool, ...] | list[bool]

@overload
def batch_norm(
    x: Readable,
    running_mean: Readable | None,
    running_var: Readable | None,
    weight: Readable | None = None,
    bias: Readable | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    layout: Layout = "NCHW",
    activation: Activation | None = None,
    residual: Readable | None = None,
    mask: Readable | None = None,
    convention: ConventionName = "torch",
    out: Array | None = None,
    return_stats: Literal[False] = False,
    backend: str | None = None,
) -> Array: ...
@overload
def batch_norm(
    x: Readable,
    running_mean: Readable | None,
    running_var: Readable | None,
    weight: Readable | None = None,
    bias: Readable | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    layout: Layout = "NCHW",
    activation: Activation | None = None,
    residual: Readable | None = None,
    mask: Readable | None = None,
    convention: ConventionName = "torch",
    out: Array | None = None,
    return_stats: Literal[True],
    backend: str | None = None,
) -> tuple[Array, Stats]: ...
@overload
def batch_norm(
    x: Readable,
    running_mean: Readable | None,
    running_var: Readable | None,
    weight: Readable | None = None,
    bias: Readable | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    layout: Layout = "NCHW",
    activation: Activation | None = None,
    residual: Readable | None = None,
    mask: Readable | None = None,
    convention: ConventionName = "torch",
    out: Array | None = None,
    return_stats: bool,
    backend: str | None = None,
) -> Array | tuple[Array, Stats]: ...
@overload
def instance_norm(
    x: Readable,
    running_mean: Readable | None = None,
    running_var: Readable | None = None,
    weight: Readable | None = None,
    bias: Readable | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    layout: Layout = "NCHW",
    activation: Activation | None = None,
    residual: Readable | None = None,
    mask: Readable | None = None,
    convention: ConventionName = "torch",
    out: Array | None = None,
    return_stats: Literal[False] = False,
    backend: str | None = None,
) -> Array: ...
@overload
def instance_norm(
    x: Readable,
    running_mean: Readable | None = None,
    running_var: Readable | None = None,
    weight: Readable | None = None,
    bias: Readable | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    layout: Layout = "NCHW",
    activation: Activation | None = None,
    residual: Readable | None = None,
    mask: Readable | None = None,
    convention: ConventionName = "torch",
    out: Array | None = None,
    return_stats: Literal[True],
    backend: str | None = None,
) -> tuple[Array, Stats]: ...
@overload
def instance_norm(
    x: Readable,
    running_mean: Readable | None = None,
    running_var: Readable | None = None,
    weight: Readable | None = None,
    bias: Readable | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    layout: Layout = "NCHW",
    activation: Activation | None = None,
    residual: Readable | None = None,
    mask: Readable | None = None,
    convention: ConventionName = "torch",
    out: Array | None = None,
    return_stats: bool,
    backend: str | None = None,
) -> Array | tuple[Array, Stats]: ...
@overload
def group_norm(
    x: Readable,
    num_groups: int,
    weight: Readable | None = None,
    bias: Readable | None = None,
    eps: float = 1e-5,
    *,
    layout: Layout = "NCHW",
    activation: Activation | None = None,
    residual: Readable | None = None,
    mask: Readable | None = None,
    out: Array | None = None,
    return_stats: Literal[False] = False,
    backend: str | None = None,
) -> Array: ...
@overload
def group_norm(
    x: Readable,
    num_groups: int,
    weight: Readable | None = None,
    bias: Readable | None = None,
    eps: float = 1e-5,
    *,
    layout: Layout = "NCHW",
    activation: Activation | None = None,
    residual: Readable | None = None,
    mask: Readable | None = None,
    out: Array | None = None,
    return_stats: Literal[True],
    backend: str | None = None,
) -> tuple[Array, Stats]: ...
@overload
def group_norm(
    x: Readable,
    num_groups: int,
    weight: Readable | None = None,
    bias: Readable | None = None,
    eps: float = 1e-5,
    *,
    layout: Layout = "NCHW",
    activation: Activation | None = None,
    residual: Readable | None = None,
    mask: Readable | None = None,
    out: Array | None = None,
    return_stats: bool,
    backend: str | None = None,
) -> Array | tuple[Array, Stats]: ...
@overload
def layer_norm(
    x: Readable,
    normalized_shape: Shape,
    weight: Readable | None = None,
    bias: Readable | None = None,
    eps: float = 1e-5,
    *,
    axis: Shape | None = None,
    mask: Readable | None = None,
    out: Array | None = None,
    return_stats: Literal[False] = False,
    backend: str | None = None,
) -> Array: ...
@overload
def layer_norm(
    x: Readable,
    normalized_shape: Shape,
    weight: Readable | None = None,
    bias: Readable | None = None,
    eps: float = 1e-5,
    *,
    axis: Shape | None = None,
    mask: Readable | None = None,
    out: Array | None = None,
    return_stats: Literal[True],
    backend: str | None = None,
) -> tuple[Array, Stats]: ...
@overload
def layer_norm(
    x: Readable,
    normalized_shape: Shape,
    weight: Readable | None = None,
    bias: Readable | None = None,
    eps: float = 1e-5,
    *,
    axis: Shape | None = None,
    mask: Readable | None = None,
    out: Array | None = None,
    return_stats: bool,
    backend: str | None = None,
) -> Array | tuple[Array, Stats]: ...
@overload
def rms_norm(
    x: Readable,
    normalized_shape: Shape,
    weight: Readable | None = None,
    eps: float | None = None,
    *,
    axis: Shape | None = None,
    mask: Readable | None = None,
    out: Array | None = None,
    return_stats: Literal[False] = False,
    backend: str | None = None,
) -> Array: ...
@overload
def rms_norm(
    x: Readable,
    normalized_shape: Shape,
    weight: Readable | None = None,
    eps: float | None = None,
    *,
    axis: Shape | None = None,
    mask: Readable | None = None,
    out: Array | None = None,
    return_stats: Literal[True],
    backend: str | None = None,
) -> tuple[Array, Stats]: ...
@overload
def rms_norm(
    x: Readable,
    normalized_shape: Shape,
    weight: Readable | None = None,
    eps: float | None = None,
    *,
    axis: Shape | None = None,
    mask: Readable | None = None,
    out: Array | None = None,
    return_stats: bool,
    backend: str | None = None,
) -> Array | tuple[Array, Stats]: ...
@overload
def add_layer_norm(
    x: Readable,
    residual: Readable,
    normalized_shape: Shape,
    weight: Readable | None = None,
    bias: Readable | None = None,
    eps: float = 1e-5,
    *,
    axis: Shape | None = None,
    out: Array | None = None,
    sum_out: Array | None = None,
    return_stats: Literal[False] = False,
    backend: str | None = None,
) -> tuple[Array, Array]: ...
@overload
def add_layer_norm(
    x: Readable,
    residual: Readable,
    normalized_shape: Shape,
    weight: Readable | None = None,
    bias: Readable | None = None,
    eps: float = 1e-5,
    *,
    axis: Shape | None = None,
    out: Array | None = None,
    sum_out: Array | None = None,
    return_stats: Literal[True],
    backend: str | None = None,
) -> tuple[Array, Array, Stats]: ...
@overload
def add_layer_norm(
    x: Readable,
    residual: Readable,
    normalized_shape: Shape,
    weight: Readable | None = None,
    bias: Readable | None = None,
    eps: float = 1e-5,
    *,
    axis: Shape | None = None,
    out: Array | None = None,
    sum_out: Array | None = None,
    return_stats: bool,
    backend: str | None = None,
) -> tuple[Array, Array] | tuple[Array, Array, Stats]: ...
@overload
def add_rms_norm(
    x: Readable,
    residual: Readable,
    normalized_shape: Shape,
    weight: Readable | None = None,
    eps: float | None = None,
    *,
    axis: Shape | None = None,
    out: Array | None = None,
    sum_out: Array | None = None,
    return_stats: Literal[False] = False,
    backend: str | None = None,
) -> tuple[Array, Array]: ...
@overload
def add_rms_norm(
    x: Readable,
    residual: Readable,
    normalized_shape: Shape,
    weight: Readable | None = None,
    eps: float | None = None,
    *,
    axis: Shape | None = None,
    out: Array | None = None,
    sum_out: Array | None = None,
    return_stats: Literal[True],
    backend: str | None = None,
) -> tuple[Array, Array, Stats]: ...
@overload
def add_rms_norm(
    x: Readable,
    residual: Readable,
    normalized_shape: Shape,
    weight: Readable | None = None,
    eps: float | None = None,
    *,
    axis: Shape | None = None,
    out: Array | None = None,
    sum_out: Array | None = None,
    return_stats: bool,
    backend: str | None = None,
) -> tuple[Array, Array] | tuple[Array, Array, Stats]: ...
def batch_norm_backward(
    grad_y: Readable,
    x: Readable,
    stats: _Stats,
    weight: Readable | None = None,
    training: bool = True,
    *,
    layout: Layout = "NCHW",
    mask: Readable | None = None,
    need: _Need = (True, True, True),
    backend: str | None = None,
) -> Gradients: ...
def instance_norm_backward(
    grad_y: Readable,
    x: Readable,
    stats: _Stats,
    weight: Readable | None = None,
    use_input_stats: bool = True,
    *,
    layout: Layout = "NCHW",
    mask: Readable | None = None,
    need: _Need = (True, True, True),
    backend: str | None = None,
) -> Gradients: ...
def group_norm_backward(
    grad_y: Readable,
    x: Readable,
    num_groups: int,
    stats: _Stats,
    weight: Readable | None = None,
    *,
    layout: Layout = "NCHW",
    mask: Readable | None = None,
    need: _Need = (True, True, True),
    backend: str | None = None,
) -> Gradients: ...
def layer_norm_backward(
    grad_y: Readable,
    x: Readable,
    normalized_shape: Shape,
    stats: _Stats,
    weight: Readable | None = None,
    *,
    axis: Shape | None = None,
    grad_sum: Readable | None = None,
    mask: Readable | None = None,
    need: _Need = (True, True, True),
    backend: str | None = None,
) -> Gradients: ...
def rms_norm_backward(
    grad_y: Readable,
    x: Readable,
    normalized_shape: Shape,
    stats: _Stats,
    weight: Readable | None = None,
    *,
    axis: Shape | None = None,
    grad_sum: Readable | None = None,
    mask: Readable | None = None,
    need: _Need = (True, True, True),
    backend: str | None = None,
) -> Gradients: ...
