"""Which cases are measured: lists by name, from the shapes of networks, a grid, and odd ones."""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

from cpunorm._advice import usual_groups

from .results import DTYPES, LAYOUTS, OPERATIONS
from .shapes import ROWS, SHAPES, Case, Shape

MIB = 2**20
MOST_BYTES = 64 * MIB

# What people ask for first: the page of the maps answers for these.
EXAMPLES: tuple[Shape, ...] = (
    (8, 512, 7, 7), (1, 256, 14, 14), (32, 256, 14, 14), (32, 64, 56, 56), (1, 768), (4096, 768)
)  # fmt: skip

# The planes of the maps: (C, HW) at 8 images, (N, C) at 14×14 pixels.
IMAGES = (1, 8, 64, 512)
CHANNELS = (8, 64, 512, 2048)
SIDES = (7, 14, 28, 56)
PLANE_IMAGES, PLANE_SIDE = 8, 14
# Rows of these lengths, of so much in all.
LENGTHS = (8, 64, 512, 768, 4096, 65536)
ROWS_ELEMENTS = (2**16, 2**22)
GROUPED = (8, 64, 28, 28)
IN_EVERY_DTYPE = ((8, 512, 7, 7), (32, 64, 56, 56))
LONG_ROWS = EXAMPLES[-1]
# Images of one position.
POINT_IMAGES = (8, 512)

OFFSETS = (0.0, 10.0, 1e2, 1e3, 1e4, 1e5)
MOST_IN_FLOAT16 = 6e4
IMAGE_AROUND_AN_OFFSET, ROWS_AROUND_AN_OFFSET = (4, 32, 14, 14), (64, 768)

# What of benchdnn's lists the marks are measured on: every kind of shape, few of its repetitions.
_MARKS = {
    "batch_norm": ("1d", "2d", "3d", "topologies_small"),
    "group_norm": ("all", "sd"),
    "layer_norm": ("all",),
}


def suite(name: str) -> list[Case]:
    """Return the cases of a suite, each once.

    "quick" is a small choice of everything, "marks" and "full" are the shapes of networks and the
    odd ones, "maps" are the grid and a choice of the others, and "accuracy" has an offset in x.
    """
    return list(dict.fromkeys(SUITES[name]()))


def on_shape(shape: Shape) -> list[Case]:
    """Return everything that is defined for a shape."""
    return [case for layout in _layouts(shape) for case in on(shape, layout)]


def on(shape: Shape, layout: str, num_groups: int | None = None) -> Iterator[Case]:
    """Yield every operation and pass that is defined for a shape in a layout."""
    pixels = math.prod(shape[2:])
    if shape[0] * pixels > 1:
        yield Case("batch_norm", "training", layout, shape)
        yield Case("batch_norm", "backward", layout, shape)
    yield Case("batch_norm", "inference", layout, shape)
    yield Case("batch_norm", "backward_frozen", layout, shape)
    for pass_ in ("inference", "backward"):
        for operation in ROWS:
            yield Case(operation, pass_, layout, shape)
        if pixels > 1:
            yield Case("instance_norm", pass_, layout, shape)
            groups = num_groups or usual_groups(shape[1])
            yield Case("group_norm", pass_, layout, shape, groups)


def _layouts(shape: Shape) -> Sequence[str]:
    return LAYOUTS if len(shape) > 2 else LAYOUTS[:1]


def _on_rows(shape: Shape) -> Iterator[Case]:
    """Yield layer and RMS norm over the last axis of a shape, as rows."""
    *rows, length = shape
    for operation in ROWS:
        for pass_ in ("inference", "backward"):
            yield Case(operation, pass_, "NCHW", (math.prod(rows), length))


def _quick() -> Iterator[Case]:
    small, large = IN_EVERY_DTYPE
    yield from (case for case in on_shape(small) if case.pass_ != "backward_frozen")
    yield from (case for case in on(large, "NHWC") if case.pass_ == "training")
    yield from (case for case in on(large, "NCHW") if case.pass_ == "inference")
    for shape in ((1, 768), LONG_ROWS):
        yield from _on_rows(shape)
    yield Case("batch_norm", "training", "NCHW", (7, 13, 17, 19))
    yield Case("instance_norm", "inference", "NHWC", (7, 13, 17, 19))
    yield Case("group_norm", "backward", "NCHW", (7, 13, 17, 19), 1)
    yield Case("batch_norm", "training", "NHWC", (16, 3, 64, 64))
    yield Case("batch_norm", "training", "NCHW", (20000, 8))
    yield Case("batch_norm", "backward_frozen", "NCHW", (128, 1000))
    yield Case("layer_norm", "inference", "NCHW", (4099, 33))
    yield Case("rms_norm", "inference", "NCHW", (65536, 64))
    for dtype in DTYPES[1:]:
        yield Case("layer_norm", "inference", "NCHW", LONG_ROWS, dtype=dtype)
        yield Case("batch_norm", "inference", "NCHW", small, dtype=dtype)


def _marks() -> Iterator[Case]:
    return _of_networks(
        {op: [s for n in names for s in SHAPES[op][n]] for op, names in _MARKS.items()}
    )


def _full() -> Iterator[Case]:
    return _of_networks({op: [s for some in SHAPES[op].values() for s in some] for op in _MARKS})


def _of_networks(shapes: dict[str, list]) -> Iterator[Case]:
    """Yield every operation on the shapes it is given and on the odd ones."""
    odd = SHAPES["odd"]
    for shape in map(tuple, shapes["batch_norm"] + odd["channels"]):
        for case in on_shape(shape):
            if not case.over_rows and (
                case.operation != "group_norm" or list(shape) in odd["channels"]
            ):
                yield case
    for shape, num_groups in shapes["group_norm"]:
        yield from _in_groups(tuple(shape), num_groups)
    for shape in map(tuple, shapes["layer_norm"] + odd["rows"]):
        yield from _on_rows(shape)


def _in_groups(shape: Shape, num_groups: int) -> Iterator[Case]:
    for layout in _layouts(shape):
        for pass_ in ("inference", "backward"):
            yield Case("group_norm", pass_, layout, shape, num_groups)


def _maps() -> list[Case]:
    grid = [case for case in _grid() if case.nbytes <= MOST_BYTES]
    others = (*_examples(), *_points(), *_models(), *_odd())
    return grid + [case for case in others if case.nbytes <= MOST_BYTES]


def planes() -> list[Shape]:
    """Return the shapes of the two planes of the maps."""
    plane = [(PLANE_IMAGES, c, side, side) for c in CHANNELS for side in SIDES]
    return plane + [(n, c, PLANE_SIDE, PLANE_SIDE) for n in IMAGES for c in CHANNELS]


def _grid() -> Iterator[Case]:
    grid = [
        case for shape in planes() for case in on_shape(shape) if case.pass_ != "backward_frozen"
    ]
    for length in LENGTHS:
        for elements in ROWS_ELEMENTS:
            grid += _on_rows((max(1, elements // length), length))
    for num_groups in (1, 2, 8, 32, GROUPED[1]):
        grid += _in_groups(GROUPED, num_groups)
    for dtype in DTYPES[1:]:
        some = [case for shape in IN_EVERY_DTYPE for case in on(shape, "NCHW")]
        some += _on_rows(LONG_ROWS)
        grid += [replace(case, dtype=dtype) for case in some]
    return (replace(case, source="grid") for case in grid)


def _examples() -> Iterator[Case]:
    for shape in EXAMPLES:
        yield from (case for case in on_shape(shape) if case.pass_ != "backward_frozen")
        if len(shape) == 2:
            yield from _in_groups(shape, usual_groups(shape[1]))


def _points() -> Iterator[Case]:
    for n in POINT_IMAGES:
        for c in CHANNELS:
            for case in on((n, c), "NCHW"):
                if case.operation == "batch_norm" and case.pass_ != "backward_frozen":
                    yield case
            if c > (groups := usual_groups(c)):
                yield from _in_groups((n, c), groups)


def _models() -> Iterator[Case]:
    batches = [(name, tuple(s)) for name, some in SHAPES["batch_norm"].items() for s in some]
    for i, (name, shape) in enumerate(batches):
        some = [case for case in on_shape(shape) if case.operation == "batch_norm"]
        yield from _named(name, _every(2, i, some))
    groups = [(name, *entry) for name, some in SHAPES["group_norm"].items() for entry in some]
    for name, shape, num_groups in groups:
        yield from _named(name, _in_groups(tuple(shape), num_groups))
    for name, some in SHAPES["layer_norm"].items():
        for shape in some:
            yield from _named(name, _on_rows(tuple(shape)))


def _named(model: str, cases: Iterable[Case]) -> Iterator[Case]:
    return (replace(case, source="models", model=model) for case in cases)


def _odd() -> Iterator[Case]:
    odd, edges = SHAPES["odd"], SHAPES["edges"]
    channels = [(shape, None) for shape in odd["channels"]]
    channels += [(shape, groups[-1]) for shape, groups in edges["channels"]]
    for i, (shape, num_groups) in enumerate(channels):
        shape = tuple(shape)
        some = [case for layout in _layouts(shape) for case in on(shape, layout, num_groups)]
        yield from _every(12, i, some)
    rows = [shape for shape, _, axis in edges["rows"] if axis is None and len(shape) == 2]
    for i, shape in enumerate(odd["rows"] + rows):
        yield from _every(2, i, list(_on_rows(tuple(shape))))


def _every(step: int, start: int, cases: list[Case]) -> list[Case]:
    """Return every so-manieth case, other ones for every start."""
    return cases[start % step :: step]


def _accuracy() -> Iterator[Case]:
    for operation in OPERATIONS:
        shape = ROWS_AROUND_AN_OFFSET if operation in ROWS else IMAGE_AROUND_AN_OFFSET
        for case in on(shape, "NCHW"):
            if case.operation != operation or case.frozen:
                continue
            for dtype in DTYPES if case.forward else DTYPES[:1]:
                for offset in OFFSETS:
                    if dtype != "float16" or offset <= MOST_IN_FLOAT16:
                        yield replace(case, dtype=dtype, offset=offset, source="grid")


SUITES = {
    "quick": _quick, "marks": _marks, "full": _full, "maps": _maps, "accuracy": _accuracy
}  # fmt: skip
