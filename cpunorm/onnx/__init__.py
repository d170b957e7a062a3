"""cpunorm for ONNX: normalization nodes on our kernels, and batch norms folded into convolutions.

`NEW_OPS` is what ``onnx.reference.ReferenceEvaluator`` takes as `new_ops`. The conventions are
ONNX's: `momentum` is the weight of the old value, and running variances are of the population.
What a node asks for and we do not have raises `NotImplementedError`, what does not fit a
`ValueError`; both name the node. `fold_batch_norms` does what ``python -m cpunorm fold`` does.

Examples
--------
>>> import numpy as np, onnx.parser, cpunorm.onnx
>>> from onnx.reference import ReferenceEvaluator
>>> model = onnx.parser.parse_model('''
...     <ir_version: 8, opset_import: ["" : 17]>
...     g (float[2,4] x, float[4] scale) => (float[2,4] y) { y = LayerNormalization (x, scale) }''')
>>> evaluator = ReferenceEvaluator(model, new_ops=cpunorm.onnx.NEW_OPS)
>>> x = np.array([[1, 1, 3, 3], [0, 0, 0, 4]], np.float32)
>>> evaluator.run(None, {"x": x, "scale": np.ones(4, np.float32)})[0].round(3)
array([[-1.   , -1.   ,  1.   ,  1.   ],
       [-0.577, -0.577, -0.577,  1.732]], dtype=float32)
"""

from ._folding import fold_batch_norms
from ._operators import NEW_OPS

__all__ = ["NEW_OPS", "fold_batch_norms"]
