"""The results file: pytest-benchmark's own JSON, with what cpunorm's reports need beside it.

``machine_info["cpunorm"]`` says where and how a run was made, ``extra_info`` of every benchmark
what was measured (the fields of `Row`), ``accuracy`` holds the errors of `Accuracy`, and ``absent``
who could not compute what (`Absent`).
"""

import gzip
import json
import math
import os
import statistics
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from types import UnionType
from typing import Any, Self, get_args, get_origin, get_type_hints

FORMAT = 1

OPERATIONS = ("batch_norm", "layer_norm", "instance_norm", "group_norm", "rms_norm")
PASSES = ("training", "inference", "backward", "backward_frozen")
LAYOUTS = ("NCHW", "NHWC")
DTYPES = ("float32", "float16", "bfloat16", "float64")
OURS = ("cython", "numba", "numpy")
PLAIN = "plain"
PEERS = ("torch", "onnxruntime", "openvino", "jax")
COPY = "copy"
IMPLEMENTATIONS = (*OURS, PLAIN, *PEERS, COPY)

# The fields of rows and accuracies that are words, and what a file says at least of the machine.
WORDS = {
    "operation": OPERATIONS,
    "pass_": PASSES,
    "layout": LAYOUTS,
    "dtype": DTYPES,
    "implementation": IMPLEMENTATIONS,
}
MACHINE = {
    "date": str, "cpu": str, "cores": int, "instruction set": str, "versions": dict, "command": str
}  # fmt: skip


def same_forward(operation: str, pass_: str) -> bool:
    """Whether a forward pass is the same in training and in inference."""
    return operation != "batch_norm" and pass_ in ("training", "inference")


def pass_text(operation: str, pass_: str) -> str:
    """Return a pass in words."""
    return "forward" if same_forward(operation, pass_) else pass_.replace("_", " ")


def counted(number: int, what: str) -> str:
    """Return a number of things in words."""
    return f"{number} {what}{'s'[: number != 1]}"


class ResultsError(ValueError):
    """A file that is no results file, is of another format, or was cut off."""


@dataclass(frozen=True)
class Row:
    """One implementation on one case.

    Parameters
    ----------
    operation, pass_, layout, dtype, implementation : str
        One of the constants above. The forward pass of all but batch norm is the same in training
        and in inference: it is measured once, and its `pass_` is "inference" (see `serves`).
    shape : tuple of int
        Channels first, whatever the layout. Layer and RMS norm are over axis 1 of it: the length of
        rows (M, D), the channels of every pixel of images (N, C, *spatial).
    num_groups : int or None
    source : {"grid", "models", "odd"}
    model : str or None
        Whose shape it is, for "models".
    threads : int
    version : str
        Of the implementation.
    bytes : int
        The least that has to be moved.
    gb_per_s : float
        Those bytes ÷ the median.
    share_of_copy : float or None
        Time of the copy (of the triad, in backward passes) ÷ the median.
    error : float or None
        max |y − oracle| / (1 + |oracle|).
    seconds : tuple of float
        Per call, one figure per block.
    """

    operation: str
    pass_: str
    layout: str
    dtype: str
    shape: tuple[int, ...]
    num_groups: int | None
    source: str
    model: str | None
    threads: int
    implementation: str
    version: str
    bytes: int
    gb_per_s: float
    share_of_copy: float | None
    error: float | None
    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """The figure: the median over blocks."""
        return statistics.median(self.seconds)

    @property
    def case(self) -> tuple[Any, ...]:
        """What is computed, whoever computes it on however many threads."""
        return (
            self.operation, self.pass_, self.layout, self.dtype, self.shape, self.num_groups
        )  # fmt: skip

    @property
    def text(self) -> str:
        """The case in words."""
        parts = [self.operation, pass_text(self.operation, self.pass_)]
        parts += [self.layout] * (len(self.shape) > 2)
        parts.append("x".join(map(str, self.shape)))
        parts += [f"G={self.num_groups}"] * (self.num_groups is not None)
        parts += [self.dtype] * (self.dtype != "float32")
        return " ".join(parts)

    def serves(self, pass_: str) -> bool:
        """Whether the row holds what a pass costs; one forward pass may serve two."""
        return self.pass_ == ("inference" if same_forward(self.operation, pass_) else pass_)

    @classmethod
    def of(cls, benchmark: Mapping[str, Any]) -> Self:
        """Return the row of an entry of ``benchmarks``."""
        return _made(cls, benchmark["extra_info"], seconds=tuple(benchmark["stats"]["data"]))


@dataclass(frozen=True)
class Accuracy:
    """The error of an implementation on normal numbers around an offset; None is NaN or Inf."""

    operation: str
    pass_: str
    dtype: str
    implementation: str
    version: str
    offset: float
    shape: tuple[int, ...]
    error: float | None


@dataclass(frozen=True)
class Absent:
    """Who has no figure for a case, and why."""

    case: str
    implementation: str
    reason: str


@dataclass(frozen=True)
class Results:
    """A results file: the machine, and what was found on it."""

    machine: Mapping[str, Any]
    rows: tuple[Row, ...]
    accuracy: tuple[Accuracy, ...]
    absent: tuple[Absent, ...]


def _made(cls: type, given: Mapping[str, Any], **more: Any) -> Any:
    """Return a dataclass from plain data, of which it takes the fields it has."""
    plain = {name + "_" * (name == "pass"): value for name, value in given.items()} | more
    made = {}
    for name, kind in get_type_hints(cls).items():
        value = made[name] = _checked(name, plain[name], kind)
        if isinstance(value, list):
            made[name] = tuple(value)
    return cls(**made)


def _checked(name: str, value: Any, kind: Any) -> Any:
    """Return a value if it is of a kind, a type as annotations have it."""
    if not _is_a(value, kind):
        raise ValueError(f"{name} is {value!r:.40}, not {getattr(kind, '__name__', kind)}")
    return value


def _is_a(value: Any, kind: Any) -> bool:
    if isinstance(kind, UnionType):
        return any(_is_a(value, one) for one in get_args(kind))
    if get_origin(kind) is tuple:
        of = get_args(kind)[0]
        return isinstance(value, (list, tuple)) and all(_is_a(item, of) for item in value)
    if kind is float:
        return type(value) in (int, float) and math.isfinite(value)
    return type(value) is kind


def plain(item: Row | Accuracy | Absent) -> dict[str, Any]:
    """Return what a row, an accuracy or an absence is in the file."""
    names = (field.name for field in fields(item))
    return {name.rstrip("_"): getattr(item, name) for name in names if name != "seconds"}


def read(path: str | os.PathLike[str]) -> Results:
    """Return what a file holds.

    Raises
    ------
    ResultsError
        If the file cannot be read, was cut off, is of another format or is no results file.
    """
    return check(read_document(path), path)


def read_document(path: str | os.PathLike[str]) -> Any:
    """Return the plain data of a JSON file, or of one with gzip, or raise `ResultsError`."""
    try:
        content = Path(path).read_bytes()
        return json.loads(gzip.decompress(content) if _zipped(path) else content)
    except gzip.BadGzipFile as error:
        raise ResultsError(f"{path}: {error}") from None
    except OSError as error:
        raise ResultsError(f"{path}: {error.strerror}") from None
    except (ValueError, EOFError, RecursionError, zlib.error) as error:
        raise ResultsError(f"{path}: no complete JSON, {error}") from None


def check(document: Any, path: str | os.PathLike[str]) -> Results:
    """Return what a document of plain data holds; `path` is named in errors."""
    try:
        machine = document["machine_info"]["cpunorm"]
        found = machine["format"]
    except (KeyError, TypeError):
        raise ResultsError(f"{path}: no results of python -m bench") from None
    if found != FORMAT:
        raise ResultsError(f"{path}: format {found!r}, but this version reads {FORMAT}")
    with _naming(path, "machine_info"):
        for name, kind in MACHINE.items():
            _checked(name, machine[name], kind)
    with _naming(path, "benchmarks"):
        rows = tuple(map(_sound, map(Row.of, document["benchmarks"])))
    with _naming(path, "accuracy"):
        accuracy = tuple(_worded(_made(Accuracy, entry)) for entry in document["accuracy"])
    with _naming(path, "absent"):
        absent = tuple(_made(Absent, entry) for entry in document["absent"])
    return Results(machine, rows, accuracy, absent)


def _worded(item: Any) -> Any:
    """Return a row or an accuracy if its words can be meant."""
    for name, known in WORDS.items():
        word = getattr(item, name, known[0])
        if word not in known:
            raise ValueError(f"{word!r} is none of {', '.join(known)}")
    return item


def _sound(row: Row) -> Row:
    """Return the row if its words and numbers can be meant."""
    _worded(row)
    if len(row.shape) < 2 or not all(0 < size < 2**63 for size in row.shape):
        raise ValueError(f"shape is {row.shape}, not two or more positive sizes")
    if not row.seconds or not all(s > 0 and math.isfinite(s) for s in row.seconds):
        raise ValueError(f"times of {row.case} that are not positive")
    return row


@contextmanager
def _naming(path: str | os.PathLike[str], part: str) -> Iterator[None]:
    """Turn what goes wrong with a part of a file into an error that names both."""
    try:
        yield
    except KeyError as error:
        raise ResultsError(f"{path}: {part}: {error} is missing") from None
    except (TypeError, ValueError, AttributeError) as error:
        raise ResultsError(f"{path}: {part}: {error}") from None


def _zipped(path: str | os.PathLike[str]) -> bool:
    return Path(path).suffix == ".gz"


def write(path: str | os.PathLike[str], document: Mapping[str, Any]) -> None:
    """Write a sound document whole or not at all, with gzip if the name ends with .gz."""
    check(document, path)
    content = (json.dumps(document, indent=1, allow_nan=False) + "\n").encode()
    write_bytes(path, gzip.compress(content, mtime=0) if _zipped(path) else content)


def write_bytes(path: str | os.PathLike[str], content: bytes) -> None:
    """Write beside the place and move what was written there."""
    part = f"{os.fspath(path)}.{os.getpid()}.part"
    try:
        with open(part, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except BaseException:
        Path(part).unlink(missing_ok=True)
        raise
