"""How much of a network's time its normalization takes, by who computes it."""

import time
from importlib.util import find_spec

import numpy as np

import cpunorm

PAUSE = 0.05  # the threads of one library go on spinning for a while, beside the next one


class Clocked:
    """A function, and the seconds spent in it."""

    def __init__(self, function):
        self.function, self.seconds = function, 0.0

    def __call__(self, *arguments):
        start = time.perf_counter()
        result = self.function(*arguments)
        self.seconds += time.perf_counter() - start
        return result


def table(run, normalizations, rounds):
    """Return lines of Markdown: medians over rounds in which everyone has a turn.

    ``run(normalize)`` runs the network; `normalizations` are the functions it may be given, by
    name, the first one being what the others are compared with. A first round is not counted.
    """
    times = {name: [] for name in normalizations}
    for _ in range(1 + rounds):
        for name, normalize in normalizations.items():
            inner = Clocked(normalize)
            whole = Clocked(run)
            whole(inner)
            times[name].append((whole.seconds, inner.seconds))
            time.sleep(PAUSE)
    medians = {name: np.median(rounds[1:], axis=0) for name, rounds in times.items()}
    first = next(iter(medians))
    yield f"| | network, ms | norms, ms | share | norms: {first} ÷ it | network: {first} ÷ it |"
    yield "|---|---|---|---|---|---|"
    for name, seconds in medians.items():
        network, norms = seconds * 1e3
        faster = medians[first] / seconds
        ratios = f"{norms / network:.1%} | {faster[1]:.1f} | {faster[0]:.2f}"
        yield f"| {name} | {network:.0f} | {norms:.1f} | {ratios} |"


def on_one_thread(function):
    """Return the function with cpunorm limited to one thread."""

    def limited(*arguments):
        before = cpunorm.get_num_threads()
        cpunorm.set_num_threads(1)
        try:
            return function(*arguments)
        finally:
            cpunorm.set_num_threads(before)

    return limited


def installed(*packages):
    """Return whether all packages are there, and say which one is not."""
    absent = [name for name in packages if find_spec(name) is None]
    if absent:
        print(f"left out, since it is not installed: {', '.join(absent)}")
    return not absent


def onnx_session(nodes, inputs):
    """Return a function of arrays that runs ONNX nodes, from `inputs` to "y", in ONNX Runtime."""
    import onnxruntime
    from onnx import TensorProto, helper

    ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in (*inputs, "y")]
    graph = helper.make_graph(nodes, "normalization", ends[:-1], ends[-1:])
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = cpunorm.get_num_threads()
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return lambda *arrays: session.run(None, dict(zip(inputs, arrays, strict=True)))[0]
