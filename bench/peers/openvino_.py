"""OpenVINO: a request on a model of one node, its tensors lying over our memory."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import openvino as ov

from ..shapes import Case
from . import Array, Call, Data, onnx_


class Library:
    """The CPU plugin, in float32 and for latency. NHWC is a transpose it absorbs if it can."""

    def __init__(self, threads: int) -> None:
        self.core = ov.Core()
        self.options = {
            "PERFORMANCE_HINT": "LATENCY",
            "NUM_STREAMS": "1",
            "INFERENCE_NUM_THREADS": threads,
            "INFERENCE_PRECISION_HINT": "f32",
        }

    def forms(self, case: Case, data: Data) -> Iterator[Call]:
        """Yield the synchronous request, and the asynchronous one that is waited for."""
        if case.direction == "backward":
            return
        for model in onnx_.models(case, data):
            compiled = self.core.compile_model(self.core.read_model(model), "CPU", self.options)
            request = compiled.create_infer_request()
            request.set_input_tensor(ov.Tensor(data.x, shared_memory=True))
            request.set_output_tensor(ov.Tensor(data.out, shared_memory=True))
            yield partial(request.infer, share_outputs=True)
            yield partial(_through_queue, request)

    def answer(self, returned: Any, data: Data) -> Array:
        """Return the memory that was bound."""
        return data.out


def _through_queue(request: ov.InferRequest) -> None:
    request.start_async()
    request.wait()
