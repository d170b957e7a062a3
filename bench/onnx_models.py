"""ONNX models with cpunorm, side by side with the same without: python -m bench.onnx_models

Normalization nodes in ONNX's reference evaluator without and with `new_ops`, and the light models
that the onnx package ships in ONNX Runtime before and after `python -m cpunorm fold`; milliseconds.
"""

import argparse
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import onnxruntime
from onnx.reference import ReferenceEvaluator

import cpunorm
import cpunorm.onnx

from .turns import compared, header, row, seconds

# Type, attributes, shape of x, other inputs: of the channels of images, of the last axis of tokens.
NODES = [
    ("BatchNormalization", "", (8, 64, 56, 56), ("scale", "bias", "mean", "var")),
    ("InstanceNormalization", "", (8, 64, 56, 56), ("scale", "bias")),
    ("GroupNormalization", "<num_groups = 8>", (8, 64, 56, 56), ("scale", "bias")),
    ("LayerNormalization", "", (8, 128, 768), ("scale", "bias")),
    ("RMSNormalization", "", (8, 128, 768), ("scale",)),
]
MODELS = {
    "ResNet-50": "light_resnet50.onnx",
    "DenseNet-121": "light_densenet121.onnx",
    "Inception v2": "light_inception_v2.onnx",
}
LIGHT = Path(onnx.__file__).parent / "backend" / "test" / "data" / "light"


def nodes(blocks: int) -> Iterator[str]:
    """Yield a line for every node."""
    yield header("node", "before", "after", "ratio")
    rng = np.random.default_rng(0)
    for name, attributes, shape, others in NODES:
        width = shape[1] if len(shape) == 4 else shape[-1]
        kinds = [f"float{list(shape)} x", *(f"float[{width}] {other}" for other in others)]
        model = onnx.parser.parse_model(
            f'<ir_version: 11, opset_import: ["" : 23]> g ({", ".join(kinds)}) => (float[] y) '
            f"{{ y = {name} {attributes} ({', '.join(('x', *others))}) }}"
        )
        feeds = {other: rng.uniform(0.5, 1.5, width).astype(np.float32) for other in others}
        feeds["x"] = rng.normal(size=shape).astype(np.float32)
        evaluators = (
            ReferenceEvaluator(model),
            ReferenceEvaluator(model, new_ops=cpunorm.onnx.NEW_OPS),
        )
        runs = [partial(evaluator.run, None, feeds) for evaluator in evaluators]
        before, after = seconds(runs, blocks)
        yield row(f"`{name}` {shape}", *compared(before, after))


def runner(model: onnx.ModelProto, optimized: bool) -> onnxruntime.InferenceSession:
    """Return a session of ONNX Runtime on as many threads as cpunorm has."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = cpunorm.get_num_threads()
    if not optimized:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


def folded(blocks: int, names: Iterable[str] = MODELS) -> Iterator[str]:
    """Yield a line for every model, with the runtime's optimizations off and on."""
    yield header("model", "folded", "off: before", "after", "ratio", "on: before", "after", "ratio")
    for name in names:
        model = onnx.load(LIGHT / MODELS[name])
        norms = sum(node.op_type == "BatchNormalization" for node in model.graph.node)
        after = onnx.load(LIGHT / MODELS[name])
        count = cpunorm.onnx.fold_batch_norms(after)
        cells: list[str] = []
        for optimized in (False, True):
            sessions = [runner(m, optimized) for m in (model, after)]
            given = {i.name for i in model.graph.initializer}
            rng = np.random.default_rng(0)
            feeds = {
                i.name: rng.normal(size=i.shape).astype(np.float32)
                for i in sessions[0].get_inputs()
                if i.name not in given
            }
            runs = [partial(session.run, None, feeds) for session in sessions]
            cells += compared(*seconds(runs, blocks))
        yield row(f"light {name}", f"{count} of {norms}", *cells)


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(prog="python -m bench.onnx_models", description=__doc__)
    parser.add_argument("--blocks", type=int, default=7, help="measurements of each")
    options = parser.parse_args()
    print(
        f"onnx {onnx.__version__}, onnxruntime {onnxruntime.__version__}, "
        f"{cpunorm.get_num_threads()} threads, float32, milliseconds, medians in turn"
    )
    for line in (*nodes(options.blocks), "", *folded(options.blocks)):
        print(line, flush=True)


if __name__ == "__main__":
    main()
