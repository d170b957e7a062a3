from typing import Literal, overload

from ._canonical import Activation, Array, Gradients, Layout, Need, Shape, Stats

@overload
def batch_norm(
    x: Array,
    running_mean: Array | None,
    running_var: Array | None,
    weight: Array | None = None,
    bias: Array | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    layout: Layout = "NCHW",
    activation: Activation | None = None,
    residual: Array | None = None,
    out: Array | None = None,
    return_stats: Literal[False] = False,
    backend: str | None = None,
) -> Array: ...
@overload
def batch_norm(
    x: Array,
    running_mean: Array | None,
    running_var: Array | None,
    weight: Array | None = None,
    bias: Array | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    layout: Layout = "NCHW",
    activation: Activation | None = None,
    residual: Array | None = None,
    out: Array | None = None,
    return_stats: Literal[True],
    backend: str | None = None,
) -> tuple[Array, Stats]: ...
@overload
def instance_norm(
    x: Array,
    running_mean: Array | None = None,
    running_var: Array | None = None,
    weight: Array | None = None,
    bias: Array | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    layout: Layout = "NCHW",
    activation: Activation | None = None,
    residual: Array | None = None,
    out: Array | None = None,
    return_stats: Literal[False] = False,
    backend: str | None = None,
) -> Array: ...
@overload
def instance_norm(
    x: Array,
    running_mean: Array | None = None,
    running_var: Array | None = None,
    weight: Array | None = None,
    bias: Array | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    layout: Layout = "NCHW",
    activation: Activation | None = None,
    residual: Array | None = None,
    out: Array | None = None,
    return_stats: Literal[True],
    backend: str | None = None,
) -> tuple[Array, Stats]: ...
@overload
def group_norm(
    x: Array,
    num_groups: int,
    weight: Array | None = None,
    bias: Array | None = None,
    eps: float = 1e-5,
    *,
    layout: Layout = "NCHW",
    activation: Activation | None = None,
    residual: Array | None = None,
    out: Array | None = None,
    return_stats: Literal[False] = False,
    backend: str | None = None,
) -> Array: ...
@overload
def group_norm(
    x: Array,
    num_groups: int,
    weight: Array | None = None,
    bias: Array | None = None,
    eps: float = 1e-5,
    *,
    layout: Layout = "NCHW",
    activation: Activation | None = None,
    residual: Array | None = None,
    out: Array | None = None,
    return_stats: Literal[True],
    backend: str | None = None,
) -> tuple[Array, Stats]: ...
@overload
def layer_norm(
    x: Array,
    normalized_shape: Shape,
    weight: Array | None = None,
    bias: Array | None = None,
    eps: float = 1e-5,
    *,
    axis: Shape | None = None,
    out: Array | None = None,
    return_stats: Literal[False] = False,
    backend: str | None = None,
) -> Array: ...
@overload
def layer_norm(
    x: Array,
    normalized_shape: Shape,
    weight: Array | None = None,
    bias: Array | None = None,
    eps: float = 1e-5,
    *,
    axis: Shape | None = None,
    out: Array | None = None,
    return_stats: Literal[True],
    backend: str | None = None,
) -> tuple[Array, Stats]: ...
@overload
def rms_norm(
    x: Array,
    normalized_shape: Shape,
    weight: Array | None = None,
    eps: float | None = None,
    *,
    axis: Shape | None = None,
    out: Array | None = None,
    return_stats: Literal[False] = False,
    backend: str | None = None,
) -> Array: ...
@overload
def rms_norm(
    x: Array,
    normalized_shape: Shape,
    weight: Array | None = None,
    eps: float | None = None,
    *,
    axis: Shape | None = None,
    out: Array | None = None,
    return_stats: Literal[True],
    backend: str | None = None,
) -> tuple[Array, Stats]: ...
@overload
def add_layer_norm(
    x: Array,
    residual: Array,
    normalized_shape: Shape,
    weight: Array | None = None,
    bias: Array | None = None,
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
    x: Array,
    residual: Array,
    normalized_shape: Shape,
    weight: Array | None = None,
    bias: Array | None = None,
    eps: float = 1e-5,
    *,
    axis: Shape | None = None,
    out: Array | None = None,
    sum_out: Array | None = None,
    return_stats: Literal[True],
    backend: str | None = None,
) -> tuple[Array, Array, Stats]: ...
@overload
def add_rms_norm(
    x: Array,
    residual: Array,
    normalized_shape: Shape,
    weight: Array | None = None,
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
    x: Array,
    residual: Array,
    normalized_shape: Shape,
    weight: Array | None = None,
    eps: float | None = None,
    *,
    axis: Shape | None = None,
    out: Array | None = None,
    sum_out: Array | None = None,
    return_stats: Literal[True],
    backend: str | None = None,
) -> tuple[Array, Array, Stats]: ...
def batch_norm_backward(
    grad_y: Array,
    x: Array,
    stats: Stats,
    weight: Array | None = None,
    training: bool = True,
    *,
    layout: Layout = "NCHW",
    need: Need = (True, True, True),
    backend: str | None = None,
) -> Gradients: ...
def instance_norm_backward(
    grad_y: Array,
    x: Array,
    stats: Stats,
    weight: Array | None = None,
    use_input_stats: bool = True,
    *,
    layout: Layout = "NCHW",
    need: Need = (True, True, True),
    backend: str | None = None,
) -> Gradients: ...
def group_norm_backward(
    grad_y: Array,
    x: Array,
    num_groups: int,
    stats: Stats,
    weight: Array | None = None,
    *,
    layout: Layout = "NCHW",
    need: Need = (True, True, True),
    backend: str | None = None,
) -> Gradients: ...
def layer_norm_backward(
    grad_y: Array,
    x: Array,
    normalized_shape: Shape,
    stats: Stats,
    weight: Array | None = None,
    *,
    axis: Shape | None = None,
    grad_sum: Array | None = None,
    need: Need = (True, True, True),
    backend: str | None = None,
) -> Gradients: ...
def rms_norm_backward(
    grad_y: Array,
    x: Array,
    normalized_shape: Shape,
    stats: Stats,
    weight: Array | None = None,
    *,
    axis: Shape | None = None,
    grad_sum: Array | None = None,
    need: Need = (True, True, True),
    backend: str | None = None,
) -> Gradients: ...
