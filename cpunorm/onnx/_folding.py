"""Batch norms of an ONNX graph folded into the convolutions before them."""

from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from .._canonical import Array
from ..folding import fold_batch_norm

# How the weights of each operator lie; the letters of the kernel's axes do not matter.
LAYOUTS = {"Conv": "OIxyzuvw", "ConvTranspose": "IOxyzuvw"}
MAIN_DOMAIN = ("", "ai.onnx")


def fold_batch_norms(model: onnx.ModelProto) -> int:
    """Fold batch norms into the convolutions, or transposed convolutions, before them.

    A batch norm in inference is folded if the convolution's result goes nowhere else, and all
    parameters are constants: initializers (which may no longer be overridden by inputs of their
    name), or nodes Constant and ConstantOfShape. What nobody uses afterwards is removed. Only the
    main graph is looked at.

    Parameters
    ----------
    model : onnx.ModelProto
        Changed in place.

    Returns
    -------
    int
        How many were folded.

    Raises
    ------
    ValueError
        If the parameters of a batch norm do not fit the convolution; the node is named. Or if the
        model is of an opset that the installed onnx does not know.
    """
    graph, opset = model.graph, _opset(model)
    constants = _Constants(graph)
    producers = {name: node for node in graph.node for name in node.output if name}
    uses = Counter(_used(graph))
    taken = set(producers) | set(uses) | {i.name for i in graph.initializer}
    folded: list[tuple[onnx.NodeProto, onnx.NodeProto]] = []
    new: list[tuple[Array, Array]] = []
    for node in graph.node:
        conv = producers.get(node.input[0]) if _is_inference(node, opset) else None
        if conv is None or conv.op_type not in LAYOUTS or conv.domain not in MAIN_DOMAIN:
            continue
        if uses[conv.output[0]] != 1:
            continue
        names = [*conv.input[1:], *node.input[1:]]
        if not all(constants.has(name) for name in names if name):
            continue
        weight, *bias = (constants[name] for name in conv.input[1:] if name)
        keys = ("weight", "bias", "running_mean", "running_var")
        bn: dict[str, Any] = {k: constants[n] for k, n in zip(keys, node.input[1:], strict=True)}
        bn["eps"] = _attribute(node, "epsilon", 1e-5)
        try:
            layout = LAYOUTS[conv.op_type][: weight.ndim]
            new.append(fold_batch_norm(weight, bias[0] if bias else None, bn, layout))
        except (TypeError, ValueError) as error:
            raise ValueError(f"node {node.name or node.output[0]!r}: {error}") from error
        folded.append((conv, node))

    released: set[str] = set()
    for (conv, node), arrays in zip(folded, new, strict=True):
        released.update(conv.input[1:], node.input[1:])
        names = [_unused(f"{node.output[0]}_{kind}", taken) for kind in ("weight", "bias")]
        for name, a in zip(names, arrays, strict=True):
            graph.initializer.append(numpy_helper.from_array(a, name))
            if model.ir_version < 4:  # every initializer was an input
                kind = helper.np_dtype_to_tensor_dtype(a.dtype)
                graph.input.append(helper.make_tensor_value_info(name, kind, a.shape))
        conv.input[1:] = names
        conv.output[0] = node.output[0]
        graph.node.remove(node)
    _remove(graph, released)
    return len(folded)


class _Constants:
    """The constant values of a graph, made when they are asked for."""

    def __init__(self, graph: onnx.GraphProto) -> None:
        self.initializers = {i.name: i for i in graph.initializer}
        self.nodes = {
            node.output[0]: node
            for node in graph.node
            if node.op_type in ("Constant", "ConstantOfShape") and node.domain in MAIN_DOMAIN
        }

    def has(self, name: str) -> bool:
        if name in self.initializers:
            return True
        node = self.nodes.get(name)
        if node is None:
            return False
        if node.op_type == "Constant":
            return [a.name for a in node.attribute] == ["value"]
        return node.input[0] in self.initializers

    def __getitem__(self, name: str) -> Array:
        if name in self.initializers:
            return np.asarray(numpy_helper.to_array(self.initializers[name]))
        node = self.nodes[name]
        value = _attribute(node, "value", None)
        filled = np.zeros(1, np.float32) if value is None else numpy_helper.to_array(value)
        if node.op_type == "Constant":
            return np.asarray(filled)
        return np.full(self[node.input[0]], filled[0], filled.dtype)


def _attribute(node: onnx.NodeProto, name: str, default: Any) -> Any:
    for attribute in node.attribute:
        if attribute.name == name:
            return helper.get_attribute_value(attribute)
    return default


def _opset(model: onnx.ModelProto) -> int:
    """Return the version of ONNX's own operators; models say none where it is the first."""
    found = max((o.version for o in model.opset_import if o.domain in MAIN_DOMAIN), default=1)
    newest: int = onnx.defs.onnx_opset_version()
    if found > newest:
        raise ValueError(
            f"opset must be {newest} or earlier for onnx {onnx.__version__}, got {found}"
        )
    return found


def _is_inference(node: onnx.NodeProto, opset: int) -> bool:
    return (
        node.op_type == "BatchNormalization"
        and node.domain in MAIN_DOMAIN
        and len([name for name in node.output if name]) == 1
        and not _attribute(node, "training_mode", 0)
        and _attribute(node, "spatial", 1) == 1
        and _attribute(node, "is_test", int(opset >= 7)) == 1  # since 7 there is none
    )


def _used(graph: onnx.GraphProto) -> Iterator[str]:
    """Every use of a name: by nodes, by nodes of inner graphs, and as an output."""
    for node in graph.node:
        yield from node.input
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):
                yield from _used(inner)
    for output in graph.output:
        yield output.name


def _unused(name: str, taken: set[str]) -> str:
    while name in taken:
        name += "_"
    taken.add(name)
    return name


def _remove(graph: onnx.GraphProto, names: set[str]) -> None:
    """Remove of these constants those that nobody uses, and what they alone were made of."""
    used = set(_used(graph))
    for node in [n for n in graph.node if set(n.output) <= names - used]:
        names.update(node.input)
        graph.node.remove(node)
    unused = names - set(_used(graph))
    for field in (graph.initializer, graph.input):
        for item in [i for i in field if i.name in unused]:
            field.remove(item)
