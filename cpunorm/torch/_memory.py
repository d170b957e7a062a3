"""Tensors as arrays and arrays as tensors: the same memory, never a copy."""

from typing import Any

import numpy as np
import torch

from .._frame import Array

try:
    from ._tensors import array as _array
except ImportError:  # not compiled, or torch is older than 2.10

    def _array(tensor: torch.Tensor) -> None: ...


try:
    from ml_dtypes import bfloat16
except ImportError:
    bfloat16 = None

# The dtypes of x, each with those that parameters and statistics may have beside it.
DTYPES = {
    torch.float16: (torch.float16, torch.float32),
    torch.float32: (torch.float32,),
    torch.float64: (torch.float64,),
}
if bfloat16 is not None:
    DTYPES[torch.bfloat16] = (torch.bfloat16, torch.float32)


def array(tensor: torch.Tensor | None) -> Any:
    """Return a CPU tensor's memory as an array; gradients do not pass.

    One whose sign torch changes only when it is read (`Tensor.is_neg`) is copied.
    """
    if tensor is None:
        return None
    found = _array(tensor)
    if found is not None:
        return found
    tensor = tensor.detach().resolve_neg()
    if tensor.dtype is torch.bfloat16:
        if bfloat16 is None:
            raise ImportError("tensors of torch.bfloat16 need the package ml-dtypes")
        # NumPy has no such dtype of its own, so torch gives it to nobody.
        return tensor.view(torch.int16).numpy().view(bfloat16)
    return tensor.numpy()


def tensor(array: Array) -> torch.Tensor:
    """Return an array's memory as a tensor."""
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def memory_format(x: torch.Tensor) -> torch.memory_format:
    """Return channels-last if x lies so, else C order: what torch's kernels keep."""
    if not x.is_contiguous():
        channels_last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(x.ndim)
        if channels_last is not None and x.is_contiguous(memory_format=channels_last):
            return channels_last
    return torch.contiguous_format


def in_torch_order(x: torch.Tensor) -> torch.Tensor:
    """Return x in C order or, if it lies so, in channels-last order."""
    return x if x.is_contiguous() else x.contiguous(memory_format=memory_format(x))
