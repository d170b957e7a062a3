"""The contract every backend fulfils: four canonical problems, and the verbs each one has.

A backend is a module with one attribute per problem (`rows`, `columns`, `channels_first`,
`channels_last`), and on each of them one function per verb: `normalize`, `backward` and, on the
channels, `apply`, `moments`, and `backward_apply`, which is `backward` with the statistics held
constant. ARGUMENTS names what each one takes; the last argument of all is `threads`.

Shapes, all arrays C-contiguous, aligned, and of no zero size:

    =================  ==========  ===============  ==============  ==========================
    problem            x           weight, bias     mean, var, rstd statistics over
    =================  ==========  ===============  ==============  ==========================
    rows               (M, D)      (D,)             (M,)            D
    columns            (N, D, S)   (D,)             (N, S)          D
    channels_first     (N, C, S)   (C,)             (B, G)          N/B images, C/G channels, S
    channels_last      (N, S, C)   (C,)             (B, G)          N/B images, S, C/G channels
    =================  ==========  ===============  ==============  ==========================

What a statistic covers is said by the shape of `mean`: B is N (instance and group norm) or 1
(batch norm), G the number of groups; with B = 1 and N > 1 the batch is reduced and G = C.

- `x`, `y`, `residual`, `total`, `grad_*` of the size of x have x's dtype (float16, bfloat16,
  float32 or float64); parameters, statistics, `grad_weight` and `grad_bias` the accumulation dtype
  (float64 for float64, else float32).
- Halves are storage: they are read as float32 and all arithmetic is that of float32; `y` and
  `grad_x` are rounded once, to nearest even, NaN stays NaN, and what overflows becomes infinite.
- Outputs are passed in, uninitialised: `y`, `total`, `mean`, `var` (biased), `rstd`, `grad_*`.
  `y` or `total` may be x or residual itself (and grad_x may not alias anything).
- None is allowed for `residual` (then `total` is None too in rows and columns), `weight`, `bias`,
  `grad_total`, and each of `grad_x`, `grad_weight`, `grad_bias` (not wanted).
- rows and columns: residual is added *before* the normalization and the sum is written to `total`;
  what is normalised is `total` as it is stored, rounded to x's dtype;
  `mean=None` asks for RMS norm (no centring; `grad_bias` is None).
- channels_*: residual is added after the affine step and before the activation. `activation` is an
  index into ACTIVATIONS.
- `threads` >= 1 is the largest number of threads to use; the bits of a result do not depend on it.
- y = (x - mean)·rstd·weight + bias, centred, with the mean held to float64 where the kernel found
  it itself; variance by the shifted, corrected two-pass formula inside blocks merged in float64.
"""

AXIS_VERBS = {
    "normalize": "x residual weight bias eps y total mean rstd",
    "backward": "grad_y x mean rstd weight grad_total grad_x grad_weight grad_bias",
}
CHANNEL_VERBS = {
    "normalize": "x residual weight bias eps activation y mean var rstd",
    "apply": "x residual weight bias activation y mean rstd",
    "moments": "x mean var",
    "backward": "grad_y x mean rstd weight grad_x grad_weight grad_bias",
    "backward_apply": "grad_y x mean rstd weight grad_x grad_weight grad_bias",
}

# (problem, verb) -> the names of the arguments, in their order; `threads` follows.
ARGUMENTS = {
    (problem, verb): tuple(names.split())
    for problems, verbs in (
        (("rows", "columns"), AXIS_VERBS),
        (("channels_first", "channels_last"), CHANNEL_VERBS),
    )
    for problem in problems
    for verb, names in verbs.items()
}
KERNELS = tuple(ARGUMENTS)

BACKENDS = ("cython", "numba", "numpy")

ACTIVATIONS = (None, "relu", "silu", "gelu", "sigmoid", "tanh")
