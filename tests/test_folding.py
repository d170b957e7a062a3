"""Folding: of arrays against torch's layers and NumPy, of ONNX files against ONNX Runtime."""

import hashlib
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest

import cpunorm
from cpunorm import _fold


def batch_norm(channels, seed=0):
    rng = np.random.default_rng(seed)
    return {
        "weight": rng.normal(1, 0.5, channels),
        "bias": rng.normal(0, 1, channels),
        "running_mean": rng.normal(0, 1, channels),
        "running_var": rng.uniform(0.5, 2, channels),
        "eps": 1e-3,
    }


def normalized(y, bn):
    return cpunorm.batch_norm(
        y, bn["running_mean"], bn["running_var"], bn["weight"], bn["bias"], eps=bn["eps"]
    )


CONVOLUTIONS = {
    # name: shape of the weight in torch, groups, transposed
    "conv1d": ((6, 4, 3), 1, False),
    "conv2d": ((6, 4, 3, 2), 1, False),
    "conv2d as many outputs as inputs": ((4, 4, 3, 2), 1, False),
    "grouped": ((6, 2, 3, 3), 2, False),
    "depthwise": ((8, 1, 3, 3), 4, False),
    "conv3d": ((6, 4, 3, 2, 1), 1, False),
    "transposed": ((4, 6, 3, 3), 1, True),
    "transposed, grouped": ((4, 3, 3, 3), 2, True),
    "transposed, depthwise": ((4, 1, 3, 3), 4, True),
}


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolutions_of_torch(name, with_bias):
    with warnings.catch_warnings():  # torch's affair
        warnings.simplefilter("ignore")
        torch = pytest.importorskip("torch")
    shape, groups, transposed = CONVOLUTIONS[name]
    rng = np.random.default_rng(1)
    weight = rng.normal(size=shape)
    channels = shape[1] * groups if transposed else shape[0]
    inputs = shape[0] if transposed else shape[1] * groups
    bias = rng.normal(size=channels) if with_bias else None
    x = torch.tensor(rng.normal(size=(2, inputs, *(7,) * (len(shape) - 2))))
    kind = f"conv{'_transpose' if transposed else ''}{len(shape) - 2}d"

    def convolved(weight, bias):
        bias = None if bias is None else torch.tensor(bias)
        function = getattr(torch.nn.functional, kind)
        return function(x, torch.tensor(weight), bias, groups=groups).numpy()

    bn = batch_norm(channels)
    layout = ("IOxyz" if transposed else "OIxyz")[: len(shape)]
    folded = cpunorm.fold_batch_norm(weight, bias, bn, layout)
    np.testing.assert_allclose(convolved(*folded), normalized(convolved(weight, bias), bn))


@pytest.mark.parametrize("layout", ["OI", "IO"])
def test_linear_layers(layout):
    rng = np.random.default_rng(2)
    x, weight, bias = rng.normal(size=(5, 3)), rng.normal(size=(3, 4)), rng.normal(size=4)
    bn = batch_norm(4)
    lain = weight.T.copy() if layout == "OI" else weight
    folded, new_bias = cpunorm.fold_batch_norm(lain, bias, bn, layout)
    assert folded.shape == lain.shape
    y = x @ (folded.T if layout == "OI" else folded) + new_bias
    np.testing.assert_allclose(y, normalized(x @ weight + bias, bn))


def test_depthwise_convolution_of_keras():
    """A kernel (H, W, channels, multiplier): the output channels run over both."""
    rng = np.random.default_rng(3)
    kernel, x = rng.normal(size=(1, 1, 3, 2)), rng.normal(size=(5, 3))
    bn = batch_norm(6)
    folded, bias = cpunorm.fold_batch_norm(kernel, None, bn, "HWIO")
    apply = lambda k: np.einsum("nc,cm->ncm", x, k[0, 0]).reshape(5, 6)  # noqa: E731
    np.testing.assert_allclose(apply(folded) + bias, normalized(apply(kernel), bn))
    swapped, _ = cpunorm.fold_batch_norm(kernel.transpose(0, 1, 3, 2), None, bn, "HWOI")
    np.testing.assert_array_equal(swapped.transpose(0, 1, 3, 2), folded)


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_a_layer_its_state_and_dtypes(dtype):
    layer = cpunorm.BatchNorm(4, eps=0.1, dtype="float32")
    layer.running_mean[:], layer.running_var[:], layer.weight[:] = 1, 3, 2
    weight, before = np.ones((4, 3), dtype), layer.state_dict()
    found = cpunorm.fold_batch_norm(weight, None, layer, "OI")
    for a, b in zip(
        found, cpunorm.fold_batch_norm(weight, None, before | {"eps": 0.1}, "OI"), strict=True
    ):
        assert a.dtype == dtype
        np.testing.assert_array_equal(a, b)
    np.testing.assert_allclose(found[0], 2 / np.sqrt(3.1), rtol=1e-3)
    assert (weight == 1).all() and (layer.running_mean == 1).all()
    plain = cpunorm.BatchNorm(4, affine=False, eps=0.0 + 1e-12)
    np.testing.assert_allclose(cpunorm.fold_batch_norm(weight, None, plain, "OI")[0], 1)


W, GOOD = np.ones((4, 3, 2, 2)), batch_norm(4)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([1.0], None, GOOD), TypeError, "weight must be a numpy.ndarray.* got builtins.list"),
        ((W, None, GOOD | {"eps": "a"}), TypeError, r"bn\.eps must be a real number, got str"),
        ((W.astype(int), None, GOOD), TypeError, "weight must have dtype .* got int64"),
        ((W, np.ones(3), GOOD), ValueError, r"bias must have shape \(4,\)"),
        ((W, None, None), TypeError, "bn must be a BatchNorm or a mapping, got NoneType"),
        ((W, None, {}), ValueError, "running statistics"),
        ((W, None, cpunorm.BatchNorm(4, track_running_stats=False)), ValueError, "running_mean"),
        ((W, None, GOOD | {"bias": np.ones(3)}), ValueError, r"bn\.bias must have shape \(4,\)"),
        ((W, None, GOOD | {"running_mean": np.float64(1)}), ValueError, "one axis"),
        ((W, None, GOOD | {"running_var": -np.ones(4)}), ValueError, "must be positive"),
        ((W, None, batch_norm(7)), ValueError, "7 output channels"),
        ((W, None, batch_norm(8)), ValueError, "8 output channels"),
        ((W, None, GOOD, "OI"), ValueError, "layout must have one letter for each of the 4 axes"),
        ((W, None, GOOD, "OOHW"), ValueError, "layout"),
        ((W, None, GOOD, 1), TypeError, "layout must be a string"),
    ],
)
def test_wrong_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        cpunorm.fold_batch_norm(*arguments)


def test_tensors_are_read_and_overflow_is_infinite_without_a_warning():
    torch = pytest.importorskip("torch")
    state = torch.nn.BatchNorm1d(4).double().state_dict()
    weight = torch.full((4, 3), 2.0, dtype=torch.float64)
    found = cpunorm.fold_batch_norm(weight, None, state, "OI")
    expected = cpunorm.fold_batch_norm(weight.numpy(), None, cpunorm.BatchNorm(4), "OI")
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b)
    large = np.full((4, 3), 6e4, np.float16)
    with np.errstate(all="raise"):
        folded, _ = cpunorm.fold_batch_norm(
            large, None, batch_norm(4) | {"weight": W[:, 0, 0, 0] * 9}, "OI"
        )
    assert np.isinf(folded).all()


# ------------------------------------------------------------------------------------- ONNX files


def test_without_onnx_the_command_says_so(tmp_path):
    code = "import sys; sys.modules['onnx'] = None; from cpunorm import _fold; _fold.main()"
    process = subprocess.run(
        [sys.executable, "-c", code, "a.onnx", "b.onnx"], capture_output=True, text=True
    )
    assert process.returncode == 2
    assert "needs the package onnx" in process.stderr and process.stderr.count("\n") == 1


onnx_only = pytest.mark.skipif(
    "onnx" not in sys.modules and not __import__("importlib.util").util.find_spec("onnx"),
    reason="could not import 'onnx'",
)

MODEL = """
<ir_version: {ir}, opset_import: ["" : {opset}]>
g (float[N,3,8,8] x) => ({outputs})
{{
{nodes}
}}
"""
CONV = "c = Conv (x, w)"
BN = "y = BatchNormalization (c, s, b, m, v)"


def built(nodes, outputs="float[N,4,6,6] y", ir=8, opset=15):
    """A model whose initializers are random."""
    import onnx.parser
    from onnx import helper, numpy_helper

    text = MODEL.format(nodes="\n".join(nodes), outputs=outputs, ir=ir, opset=opset)
    model = onnx.parser.parse_model(text)
    rng = np.random.default_rng(0)
    shapes = {"w": (4, 3, 3, 3), "t": (4, 2, 2, 2), **dict.fromkeys("sbmv", (4,))}
    for name, shape in shapes.items():
        values = np.abs(rng.normal(1, 1, shape)).astype("float32")
        model.graph.initializer.append(numpy_helper.from_array(values, name))
        if ir < 4:
            model.graph.input.append(helper.make_tensor_value_info(name, 1, shape))
    return model


def outputs_of(model, seed=0):
    ort = pytest.importorskip("onnxruntime")
    options = ort.SessionOptions()
    options.log_severity_level = 3
    session = ort.InferenceSession(model.SerializeToString(), options)
    initialized = {i.name for i in model.graph.initializer}
    rng = np.random.default_rng(seed)
    feeds = {}
    for i in session.get_inputs():
        if i.name not in initialized:
            shape = [n if isinstance(n, int) else 2 for n in i.shape]
            feeds[i.name] = rng.normal(size=shape).astype("float32")
    return session.run(None, feeds)


def operators(model):
    return [node.op_type for node in model.graph.node]


@onnx_only
@pytest.mark.parametrize("ir", [3, 8])
@pytest.mark.parametrize(
    "nodes",
    [
        [CONV, BN],
        ["c = Conv (x, w, b)", BN],
        [CONV, "y = BatchNormalization <epsilon = 0.5> (c, s, b, m, v)"],
        ["n = Conv (x, w)", "c = ConvTranspose <group = 2> (n, t)", BN],
    ],
)
def test_pairs_are_folded(nodes, ir):
    import onnx

    from cpunorm.onnx import fold_batch_norms

    model = built(nodes, "float[N,4,H,V] y", ir)
    expected = outputs_of(model)
    assert fold_batch_norms(model) == 1
    onnx.checker.check_model(model, full_check=True)
    assert "BatchNormalization" not in operators(model)
    names = {i.name for i in model.graph.initializer}
    assert not names & {"s", "m", "v"}  # nobody uses them any more
    np.testing.assert_allclose(outputs_of(model)[0], expected[0], rtol=1e-4, atol=1e-4)
    assert fold_batch_norms(model) == 0


@onnx_only
@pytest.mark.parametrize(
    ("nodes", "outputs", "opset"),
    [
        ([CONV, BN, "z = Relu (c)"], "float[N,4,6,6] y, float[N,4,6,6] z", 15),
        ([CONV, BN], "float[N,4,6,6] y, float[N,4,6,6] c", 15),
        (["r = Conv (x, w)", "c = Relu (r)", BN], "float[N,4,6,6] y", 15),
        ([CONV, "q = Relu (m)", "y = BatchNormalization (c, s, b, q, v)"], "float[N,4,6,6] y", 15),
        ([CONV, "y, p, q = BatchNormalization <training_mode = 1> (c, s, b, m, v)"],
         "float[N,4,6,6] y, float[4] p, float[4] q", 15),
    ],
)  # fmt: skip
def test_what_must_stay_stays(nodes, outputs, opset):
    from cpunorm.onnx import fold_batch_norms

    model = built(nodes, outputs, opset=opset)
    before = model.SerializeToString()
    assert fold_batch_norms(model) == 0
    assert model.SerializeToString() == before


@onnx_only
@pytest.mark.parametrize(
    ("opset", "is_test", "folded"), [(6, None, 0), (6, 0, 0), (6, 1, 1), (7, None, 1)]
)
def test_before_opset_7_a_batch_norm_trains_unless_it_says_so(opset, is_test, folded):
    from cpunorm.onnx import fold_batch_norms

    said = "" if is_test is None else f"<is_test = {is_test}>"
    model = built([CONV, f"y = BatchNormalization {said} (c, s, b, m, v)"], opset=opset)
    assert fold_batch_norms(model) == folded


@onnx_only
def test_an_opset_of_the_future_is_an_error(tmp_path, capsys):
    import onnx

    from cpunorm.onnx import fold_batch_norms

    newest = onnx.defs.onnx_opset_version()
    assert fold_batch_norms(built([CONV, BN], opset=newest)) == 1
    model = built([CONV, BN], opset=newest + 1)
    message = f"opset must be {newest} or earlier .*, got {newest + 1}"
    with pytest.raises(ValueError, match=message):
        fold_batch_norms(model)
    onnx.save(model, tmp_path / "in.onnx")
    with pytest.raises(SystemExit, match="2"):
        _fold.main([str(tmp_path / "in.onnx"), str(tmp_path / "out.onnx")])
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "out.onnx").exists()


@onnx_only
def test_what_others_use_is_kept():
    """Two convolutions with one weight, and parameters that are used elsewhere."""
    from cpunorm.onnx import fold_batch_norms

    model = built([CONV, BN, "d = Conv (x, w)", "z = Add (d, y)", "k = Relu (s)"],
                  "float[N,4,6,6] z, float[4] k")  # fmt: skip
    expected = outputs_of(model)
    assert fold_batch_norms(model) == 1
    for a, b in zip(outputs_of(model), expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


@onnx_only
def test_a_pair_that_does_not_fit_is_named():
    from onnx import numpy_helper

    from cpunorm.onnx import fold_batch_norms

    model = built([CONV, BN])
    model.graph.initializer[2].CopyFrom(numpy_helper.from_array(np.ones(3, "float32"), "s"))
    before = model.SerializeToString()
    with pytest.raises(ValueError, match=r"node 'y': bn\.weight must have shape"):
        fold_batch_norms(model)
    assert model.SerializeToString() == before


def light(name):
    import onnx

    folder = Path(onnx.__file__).parent / "backend" / "test" / "data" / "light"
    return folder / f"light_{name}.onnx"


@onnx_only
@pytest.mark.parametrize(
    ("name", "pairs", "all_"),
    [
        ("resnet50", 53, 53),
        ("densenet121", 59, 121),
        ("inception_v2", 69, 69),
        ("shufflenet", 49, 49),
    ],
)
def test_light_topologies_keep_their_outputs(name, pairs, all_, tmp_path, capsys):
    """With random batch norms, and what the last folded ones give compared too."""
    import onnx
    from onnx import helper, numpy_helper

    model, rng = onnx.load(light(name)), np.random.default_rng(0)
    norms = [node for node in model.graph.node if node.op_type == "BatchNormalization"]
    fed = {i: k for node in norms for k, i in enumerate(node.input) if k}
    for tensor in model.graph.initializer:
        if tensor.name in fed:
            low, high = ((0.5, 1.5), (-0.5, 0.5), (-0.5, 0.5), (0.5, 1.5))[fed[tensor.name] - 1]
            values = rng.uniform(low, high, tensor.dims).astype("float32")
            tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    watched = [norms[k].output[0] for k in (0, len(norms) // 2, -1)]
    for output in watched:
        model.graph.output.append(helper.make_tensor_value_info(output, 1, [None] * 4))
    source, target = tmp_path / "in.onnx", tmp_path / "out.onnx"
    onnx.save(model, source)
    assert _fold.main([str(source), str(target)]) == 0
    assert f"folded {pairs} of {all_} batch norms" in capsys.readouterr().out
    folded = onnx.load(target)
    assert operators(folded).count("BatchNormalization") == all_ - pairs
    found, expected = outputs_of(folded), outputs_of(model)
    assert all(np.ptp(b) > 0 for b in expected[1:])  # the first is of constant weights
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4 * np.abs(b).max())


@onnx_only
def test_a_topology_without_batch_norms_comes_out_as_it_is(tmp_path, capsys):
    import onnx

    target = tmp_path / "out.onnx"
    assert _fold.main([str(light("inception_v1")), str(target)]) == 0
    assert "folded 0 of 0" in capsys.readouterr().out
    assert onnx.load(target) == onnx.load(light("inception_v1"))


def digest(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


@onnx_only
def test_the_command_leaves_the_input_alone_and_no_rubbish(tmp_path):
    import onnx

    source, target = tmp_path / "model.onnx", tmp_path / "out.onnx"
    onnx.save(built([CONV, BN]), source)
    before = digest(source)
    target.write_bytes(b"an older one")
    process = subprocess.run(
        [sys.executable, "-m", "cpunorm", "fold", source, target], capture_output=True, text=True
    )
    assert (process.returncode, process.stderr) == (0, "")
    assert "folded 1 of 1" in process.stdout
    assert digest(source) == before
    assert operators(onnx.load(target)) == ["Conv"]
    assert {p.name for p in tmp_path.iterdir()} == {"model.onnx", "out.onnx"}


def corrupt(path):
    import onnx

    good = built([CONV, BN]).SerializeToString()
    if path.name == "cut.onnx":
        path.write_bytes(good[: len(good) // 2])
    elif path.name == "text.onnx":
        path.write_text("this is not a model\n" * 20)
    elif path.name == "empty.onnx":
        path.write_bytes(b"")
    elif path.name == "cyclic.onnx":
        onnx.save(built(["y = Relu (y)"]), path)
    elif path.name == "unfit.onnx":
        model = built([CONV, BN])
        model.graph.initializer[2].CopyFrom(
            onnx.numpy_helper.from_array(np.ones(3, "float32"), "s")
        )
        onnx.save(model, path)


@onnx_only
@pytest.mark.parametrize("name", ["cut", "text", "empty", "cyclic", "unfit", "missing"])
def test_bad_files_give_one_line_and_exit_code_2(name, tmp_path, capsys):
    source, target = tmp_path / f"{name}.onnx", tmp_path / "out.onnx"
    corrupt(source)
    target.write_bytes(b"kept")
    with pytest.raises(SystemExit) as exit_:
        _fold.main([str(source), str(target)])
    assert exit_.value.code == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1
    assert err.startswith("python -m cpunorm fold: error: ")
    assert ("node 'y'" if name == "unfit" else f"{name}.onnx") in err
    assert target.read_bytes() == b"kept"
    assert len(list(tmp_path.iterdir())) == (1 if name == "missing" else 2)


@onnx_only
def test_the_input_cannot_be_the_output(tmp_path, capsys):
    import onnx

    source, link = tmp_path / "model.onnx", tmp_path / "link.onnx"
    onnx.save(built([CONV, BN]), source)
    os.link(source, link)
    before = digest(source)
    for target in (source, link, tmp_path):
        with pytest.raises(SystemExit, match="2"):
            _fold.main([str(source), str(target)])
        assert "out must be" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        _fold.main([str(source), str(tmp_path / "no" / "such" / "folder.onnx")])
    assert digest(source) == before


def saved_outside(folder):
    """A model that has an initializer and a node's attribute in files beside it."""
    from onnx import external_data_helper, helper, numpy_helper

    model = built([CONV, BN])
    value = numpy_helper.from_array(np.ones(4, "float32"))
    model.graph.node.insert(0, helper.make_node("Constant", [], ["k"], value=value))
    tensors = {
        "weights.data": model.graph.initializer[0],
        "k.data": model.graph.node[0].attribute[0].t,
    }
    for name, tensor in tensors.items():
        (folder / name).write_bytes(tensor.raw_data)
        external_data_helper.set_external_data(tensor, name)
        tensor.ClearField("raw_data")
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    return folder / "model.onnx", [folder / name for name in tensors]


@onnx_only
def test_external_data_is_read_and_cannot_be_the_output(tmp_path, capsys):
    import onnx

    source, data = saved_outside(tmp_path)
    before = [digest(path) for path in data]
    link = tmp_path / "link.data"
    link.symlink_to(data[0])
    for target in (*data, link):
        with pytest.raises(SystemExit, match="2"):
            _fold.main([str(source), str(target)])
        assert f"out must be another file than {target}, external data" in capsys.readouterr().err
    assert _fold.main([str(source), str(tmp_path / "out.onnx")]) == 0
    assert [digest(path) for path in data] == before
    assert "Conv" in operators(onnx.load(tmp_path / "out.onnx"))
    assert list(_fold._external_data(onnx.load(tmp_path / "out.onnx"))) == []
    data[0].unlink()
    with pytest.raises(SystemExit, match="2"):
        _fold.main([str(source), str(tmp_path / "out.onnx")])


@onnx_only
def test_what_is_no_regular_file_is_not_replaced(tmp_path, capsys):
    import onnx

    source, pipe = tmp_path / "model.onnx", tmp_path / "pipe"
    onnx.save(built([CONV, BN]), source)
    os.mkfifo(pipe)
    (tmp_path / "link").symlink_to(pipe)
    for target in (pipe, tmp_path / "link"):
        with pytest.raises(SystemExit, match="2"):
            _fold.main([str(source), str(target)])
        assert f"out must be a regular file, but {target} is not one" in capsys.readouterr().err
    assert pipe.is_fifo()


def test_links_are_followed_and_modes_kept(tmp_path):
    (tmp_path / "folder").mkdir()
    target, link = tmp_path / "folder" / "out.onnx", tmp_path / "link.onnx"
    link.symlink_to(target)
    for _ in range(2):  # the link leads nowhere at first
        _fold._write(link, b"content")
        assert link.is_symlink() and target.read_bytes() == b"content"
        target.write_bytes(b"")
    for mode in (0o600, 0o664):
        target.chmod(mode)
        _fold._write(link, b"content")
        assert target.stat().st_mode & 0o777 == mode


def test_errors_of_writing_name_the_output(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    for target in (tmp_path / "file" / "out.onnx", tmp_path / "none" / "out.onnx"):
        with pytest.raises(OSError, match=f"out cannot be written: {target}: ") as found:
            _fold._write(target, b"content")
        assert ".out.onnx" not in str(found.value)


@onnx_only
def test_an_interrupted_write_leaves_nothing(tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(_fold.os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        _fold._write(tmp_path / "out.onnx", b"content")
    assert list(tmp_path.iterdir()) == []
