"""ONNX models of one normalization, for the runtimes that read them."""

from collections.abc import Iterator

from onnx import helper, numpy_helper

from ..shapes import Case
from . import EPS, Array, Data

X, Y = "x", "y"
IR_VERSION = 10


def models(case: Case, data: Data) -> Iterator[bytes]:
    """Yield what ONNX has for the forward pass of a case, channels first."""
    w, b = {"weight": data.weight}, {"weight": data.weight, "bias": data.bias}
    last = {"axis": -1, "epsilon": EPS}
    match case.operation:
        case "batch_norm" if case.frozen:
            yield _model(case, "BatchNormalization", 15, b | _running(data), {"epsilon": EPS})
        case "instance_norm":
            yield _model(case, "InstanceNormalization", 6, b, {"epsilon": EPS})
        case "group_norm":
            groups = {"num_groups": case.num_groups, "epsilon": EPS}
            yield _model(case, "GroupNormalization", 21, b, groups)
        case "layer_norm":
            yield _model(case, "LayerNormalization", 17, b, last)
        case "rms_norm":
            yield _model(case, "RMSNormalization", 23, w, last)


def _running(data: Data) -> dict[str, Array]:
    return {"mean": data.mean, "var": data.var}


def _model(
    case: Case,
    operation: str,
    opset: int,
    constants: dict[str, Array],
    attributes: dict[str, object],
) -> bytes:
    """Return a model of one node, with transposes around it where the channels lie otherwise."""
    rank = len(case.shape)
    first, last = (0, rank - 1, *range(1, rank - 1)), (0, *range(2, rank), 1)
    nodes = [helper.make_node(operation, [X, *constants], [Y], **attributes)]
    if rank > 2 and case.channels_last != case.over_rows:
        inner = ("moved", "normalized")
        there, back = (last, first) if case.over_rows else (first, last)
        nodes = [
            helper.make_node("Transpose", [X], inner[:1], perm=there),
            helper.make_node(operation, [inner[0], *constants], inner[1:], **attributes),
            helper.make_node("Transpose", inner[1:], [Y], perm=back),
        ]
    element = helper.np_dtype_to_tensor_dtype(case.type)
    ends = [helper.make_tensor_value_info(name, element, case.memory_shape) for name in (X, Y)]
    graph = helper.make_graph(
        nodes,
        operation,
        ends[:1],
        ends[1:],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    imports = [helper.make_opsetid("", max(opset, 13))]
    model = helper.make_model(graph, opset_imports=imports, ir_version=IR_VERSION)
    return model.SerializeToString()
