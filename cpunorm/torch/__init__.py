"""cpunorm for PyTorch: the normalization modules of a model, or single calls, on our kernels.

`accelerate` moves a model's normalization modules over, `undo` moves them back. The functions are
those of ``torch.nn.functional``, with autograd; they are registered as custom operators, so that
``torch.compile`` and ``torch.export`` take them as they are. Tensors are read, and results handed
over, without a copy.
"""

from ._functional import batch_norm, group_norm, instance_norm, layer_norm, rms_norm
from ._modules import accelerate, undo

__all__ = [
    "accelerate",
    "batch_norm",
    "group_norm",
    "instance_norm",
    "layer_norm",
    "rms_norm",
    "undo",
]
