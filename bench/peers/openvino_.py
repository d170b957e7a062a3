"""OpenVINO: a request on a model of one node, its tensors lying over our memory."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import openvino as ov

from ..shapes import Case
from . import Array, Call, Data, onnx_


class Library:
    """The CPU plugin, computing in float32, for latency. Transposes it absorbs if it can."""

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
        if not case.forward:
            return
        for model in onnx_.models(case, data):
            compiled = self.core.compile_model(self.core.read_model(model), "CPU", self.options)
            request = compiled.create_infer_request()
            request.set_input_tensor(_tensor(data.x))
            request.set_output_tensor(_tensor(data.out))
            yield partial(request.infer, share_outputs=True)
            yield partial(_through_queue, request)

    def answer(self, returned: Any, data: Data) -> Array:
        """Return the memory that was bound."""
        return data.out


def _tensor(array: Array) -> ov.Tensor:
    if array.dtype.name == "bfloat16":
        return ov.Tensor(array.view("uint16"), array.shape, ov.Type.bf16)
    return ov.Tensor(array, shared_memory=True)


def _through_queue(request: ov.InferRequest) -> None:
    request.start_async()
    request.wait()
