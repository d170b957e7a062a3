"""ONNX Runtime: a session on a model of one node, its input and output bound to our memory."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import onnxruntime as ort

from ..shapes import Case
from . import Array, Call, Data, onnx_


class Library:
    """The CPU provider. It has no gradients, no bfloat16, and for channels only NCHW."""

    def __init__(self, threads: int) -> None:
        self.options = ort.SessionOptions()
        self.options.intra_op_num_threads = threads
        self.options.inter_op_num_threads = 1
        self.options.log_severity_level = 3

    def forms(self, case: Case, data: Data) -> Iterator[Call]:
        """Yield a run of the bound session."""
        if not case.forward or case.dtype == "bfloat16":
            return
        if case.channels_last and not case.over_rows:
            return
        for model in onnx_.models(case, data):
            session = ort.InferenceSession(model, self.options, providers=["CPUExecutionProvider"])
            binding = session.io_binding()
            x, y = map(ort.OrtValue.ortvalue_from_numpy, (data.x, data.out))
            binding.bind_ortvalue_input(onnx_.X, x)
            binding.bind_ortvalue_output(onnx_.Y, y)
            # The method of the extension itself: no check of arguments in Python.
            yield partial(session._sess.run_with_iobinding, binding._iobinding, None)

    def answer(self, returned: Any, data: Data) -> Array:
        """Return the memory that was bound."""
        return data.out
