"""`cpunorm.onnx`: ONNX's node tests pass through our kernels, and ONNX Runtime's operators too."""

import warnings

import numpy as np
import pytest

import cpunorm

onnx = pytest.importorskip("onnx")

from onnx import TensorProto, helper  # noqa: E402
from onnx.backend.test.case.node import collect_testcases  # noqa: E402
from onnx.reference import ReferenceEvaluator  # noqa: E402

import cpunorm.onnx  # noqa: E402
from cpunorm import functional  # noqa: E402
from cpunorm.onnx import _operators  # noqa: E402

OPERATORS = {
    "BatchNormalization": "batch_norm",
    "InstanceNormalization": "instance_norm",
    "LayerNormalization": "layer_norm",
    "GroupNormalization": "group_norm",
    "RMSNormalization": "rms_norm",
}


def node_tests():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cases = collect_testcases()
    for case in cases:
        for node in case.model.graph.node:
            if node.op_type in OPERATORS:
                yield pytest.param(case, OPERATORS[node.op_type], id=case.name)


def test_onnx_has_tests_of_every_operator():
    assert {parameters.values[1] for parameters in node_tests()} == set(OPERATORS.values())


@pytest.mark.parametrize(("case", "function"), list(node_tests()))
def test_onnxs_own_node_tests(case, function, monkeypatch):
    calls = []
    original = getattr(functional, function)
    monkeypatch.setattr(functional, function, lambda *a, **k: calls.append(1) or original(*a, **k))
    evaluator = ReferenceEvaluator(case.model, new_ops=cpunorm.onnx.NEW_OPS)
    for inputs, outputs in case.data_sets:
        names = [i.name for i in case.model.graph.input]
        found = evaluator.run(None, dict(zip(names, inputs, strict=True)))
        for ours, wanted in zip(found, outputs, strict=True):
            assert ours.dtype == wanted.dtype and ours.shape == wanted.shape
            np.testing.assert_allclose(ours, wanted, rtol=case.rtol, atol=case.atol)
    assert calls


def model(op_type, inputs, outputs=1, domain="", opset=23, name="norm", **attributes):
    """A model of one node whose inputs are arrays; None is one left out."""
    names = [f"i{k}" if a is not None else "" for k, a in enumerate(inputs)]
    results = [f"o{k}" for k in range(outputs)] if isinstance(outputs, int) else outputs
    node = helper.make_node(op_type, names, results, name=name, domain=domain, **attributes)

    def info(n, dtype):
        return helper.make_tensor_value_info(n, helper.np_dtype_to_tensor_dtype(dtype), None)

    graph = helper.make_graph(
        [node],
        "g",
        [info(n, a.dtype) for n, a in zip(names, inputs, strict=True) if n],
        [info(n, inputs[0].dtype if k in (0, 3) else np.dtype("float32"))
         for k, n in enumerate(results) if n],
    )  # fmt: skip
    opsets = [helper.make_opsetid("", opset)]
    opsets += [helper.make_opsetid(domain, 1)] if domain else []
    feeds = {n: a for n, a in zip(names, inputs, strict=True) if n}
    return helper.make_model(graph, opset_imports=opsets, ir_version=8), feeds


def run(built):
    proto, feeds = built
    return ReferenceEvaluator(proto, new_ops=cpunorm.onnx.NEW_OPS).run(None, feeds)


def arrays(*shapes, dtype="float32"):
    rng = np.random.default_rng(0)
    return [rng.normal(1, 2, s).astype(dtype) for s in shapes]


MICROSOFTS = [
    ("SkipLayerNormalization", [(2, 5, 8), (2, 5, 8), (8,), (8,), (8,)], ["y", "", "", "s"]),
    ("SkipLayerNormalization", [(2, 5, 8), (1, 5, 8), (8,), (8,)], ["y"]),
    ("SkipLayerNormalization", [(2, 5, 8), (5, 8), (8,), None, (8,)], ["y"]),
    ("SkipSimplifiedLayerNormalization", [(2, 5, 8), (2, 5, 8), (8,), (8,)], ["y", "", "", "s"]),
    ("SkipSimplifiedLayerNormalization", [(2, 5, 8), (2, 5, 8), (8,)], ["y"]),
]


@pytest.mark.parametrize("epsilon", [None, 1e-2])
@pytest.mark.parametrize(("op_type", "shapes", "outputs"), MICROSOFTS)
def test_onnxruntimes_operators(op_type, shapes, outputs, epsilon):
    ort = pytest.importorskip("onnxruntime")
    inputs = iter(arrays(*[s for s in shapes if s]))
    inputs = [next(inputs) if s else None for s in shapes]
    attributes = {} if epsilon is None else {"epsilon": epsilon}
    proto, feeds = model(op_type, inputs, outputs, "com.microsoft", 17, **attributes)
    wanted = ort.InferenceSession(proto.SerializeToString()).run(None, feeds)
    for a, b in zip(run((proto, feeds)), wanted, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("axis", [-1, 1])
def test_simplified_layer_normalization_is_onnxruntimes(axis):
    ort = pytest.importorskip("onnxruntime")
    x, scale = arrays((2, 5, 8), (8,) if axis == -1 else (5, 8))
    proto, feeds = model(
        "SimplifiedLayerNormalization", [x, scale], 2, opset=17, axis=axis, epsilon=1e-3
    )
    wanted = ort.InferenceSession(proto.SerializeToString()).run(None, feeds)
    elsewhere, _ = model(
        "SimplifiedLayerNormalization", [x, scale], 2, "com.microsoft", axis=axis, epsilon=1e-3
    )
    for built in (proto, elsewhere):
        for a, b in zip(run((built, feeds)), wanted, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_group_normalization_of_opset_18_has_one_scale_per_group():
    x, scale, bias = arrays((2, 6, 5), (3,), (3,))
    y, = run(model("GroupNormalization", [x, scale, bias], opset=18, num_groups=3))  # fmt: skip
    expected = cpunorm.group_norm(x, 3, np.repeat(scale, 2), np.repeat(bias, 2))
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-6)


def test_batch_normalization_conventions():
    """The momentum is the old value's, the variance the population's, dtypes may be mixed."""
    x, scale, bias, mean, var = arrays((4, 3, 5), *[(3,)] * 4)
    var = np.abs(var)
    for dtype in ("float32", "float16"):
        inputs = [x.astype(dtype), scale, bias, mean, var]
        y, new_mean, new_var = run(
            model("BatchNormalization", inputs, 3, opset=15, training_mode=1, momentum=0.75)
        )
        assert y.dtype == dtype and new_mean.dtype == new_var.dtype == "float32"
        exact = inputs[0].astype("float64")
        wanted = 0.75 * mean + 0.25 * exact.mean((0, 2)), 0.75 * var + 0.25 * exact.var((0, 2))
        np.testing.assert_allclose((new_mean, new_var), wanted, rtol=1e-5)
    before = [a.copy() for a in (mean, var)]
    y, = run(model("BatchNormalization", [x, scale, bias, mean, var], opset=9))  # fmt: skip
    np.testing.assert_allclose(
        y, cpunorm.batch_norm(x, mean, var, scale, bias), rtol=1e-5, atol=1e-6
    )
    assert all(np.array_equal(a, b) for a, b in zip(before, (mean, var), strict=True))


def test_layer_normalization_gives_its_statistics_and_broadcasts():
    x, scale = arrays((2, 3, 4), (4,))
    y, mean, rstd = run(model("LayerNormalization", [x, scale], 3, opset=17, axis=1))
    assert mean.shape == rstd.shape == (2, 1, 1) and mean.dtype == rstd.dtype == "float32"
    expected = cpunorm.layer_norm(x, (3, 4), np.broadcast_to(scale, (3, 4)))
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(mean[:, 0, 0], x.mean((1, 2)), rtol=1e-5)


@pytest.mark.parametrize("shape", [(0, 4, 3), (2, 4, 0), (2, 0, 3)])
def test_training_on_nothing_leaves_the_statistics(shape):
    mean, var = arrays(shape[1:2], shape[1:2])
    inputs = [np.empty(shape, "float32"), mean, var, mean, var]
    y, *updated = run(model("BatchNormalization", inputs, 3, opset=15, training_mode=1))
    assert y.shape == shape
    np.testing.assert_array_equal(updated, (mean, var))


X, C = np.ones((2, 4, 3), "float32"), np.ones(4, "float32")
TRAINING = {"opset": 15, "outputs": 3, "training_mode": 1}
MICROSOFT = {"domain": "com.microsoft"}


NOT_OURS, WRONG = NotImplementedError, ValueError
ERRORS = [
    (NOT_OURS, "opset must be 7", "BatchNormalization", [X, C, C, C, C], {"opset": 6}),
    (NOT_OURS, "opset 14", "BatchNormalization", [X, C, C, C, C], {"opset": 9, "outputs": 3}),
    (NOT_OURS, "spatial must", "BatchNormalization", [X, C, C, C, C], {"opset": 7, "spatial": 0}),
    (NOT_OURS, "stash_type .* 16", "LayerNormalization", [X, C], {"stash_type": 16}),
    (WRONG, "axis must lie", "LayerNormalization", [X, C], {"axis": 5}),
    (NOT_OURS, "opset must be .* got 9999", "LayerNormalization", [X, C[:3]], {"opset": 9999}),
    (NOT_OURS, "opset must be .* got 9999", "BatchNormalization", [X, C, C, C, C], {"opset": 9999}),
    (WRONG, r"scale must broadcast to shape \(3,\), got \(4,\)", "LayerNormalization", [X, C], {}),
    (WRONG, r"bias must .* got \(4,\)", "LayerNormalization", [X, C[:3], C], {}),
    (WRONG, r"scale must .* got \(4,\)", "RMSNormalization", [X, C], {}),
    (WRONG, r"skip must broadcast to shape \(2, 4, 3\), got \(4, 4\)", "SkipLayerNormalization",
     [X, np.ones((4, 4), "float32"), C[:3]], MICROSOFT),
    (WRONG, r"bias must broadcast to shape \(3,\), got \(4,\)", "SkipSimplifiedLayerNormalization",
     [X, X, C[:3], C], MICROSOFT),
    (WRONG, r"scale must have shape \(2,\) before opset 21, got \(4,\)", "GroupNormalization",
     [X, C, C], {"num_groups": 2, "opset": 18}),
    (WRONG, r"bias must have shape \(2,\) before opset 21, got \(1,\)", "GroupNormalization",
     [X, C[:2], C[:1]], {"num_groups": 2, "opset": 18}),
    (WRONG, "x must have at least 2 axes", "GroupNormalization", [C, C, C],
     {"num_groups": 2, "opset": 18}),
    (WRONG, r"running_var must have shape \(4,\)", "BatchNormalization",
     [X, C, C, C, C[:1]], TRAINING),
    (WRONG, "x must have dtype", "BatchNormalization", [X.astype("int32"), C, C, C, C], TRAINING),
    (WRONG, "num_groups", "GroupNormalization", [X, C, C], {"num_groups": 3}),
    (WRONG, "num_groups", "GroupNormalization", [X, C, C], {"num_groups": 0, "opset": 18}),
    (WRONG, "bias must have shape", "InstanceNormalization", [X, C, C[:2]], {}),
    (WRONG, "x must have dtype", "InstanceNormalization", [X.astype("int32"), C, C], {}),
    (NOT_OURS, "attribute 'axis'", "SkipLayerNormalization", [X, X, C[:3]],
     {**MICROSOFT, "axis": 1}),
]  # fmt: skip


@pytest.mark.parametrize(("error", "message", "op_type", "inputs", "options"), ERRORS)
def test_errors_name_the_node(error, message, op_type, inputs, options):
    with pytest.raises(error, match=rf"node 'norm' \({op_type}\): .*{message}"):
        run(model(op_type, inputs, **options))


def test_a_node_without_a_name_is_named_by_its_output():
    with pytest.raises(NotImplementedError, match=r"node 'o0' \(BatchNormalization\)"):
        run(model("BatchNormalization", [X, C, C, C, C], opset=6, name=""))


def test_every_operator_of_the_list_has_its_domain():
    listed = {(op.op_domain, op.__name__) for op in cpunorm.onnx.NEW_OPS}
    assert len(listed) == len(cpunorm.onnx.NEW_OPS) == 9
    assert TensorProto.FLOAT == _operators.FLOAT
