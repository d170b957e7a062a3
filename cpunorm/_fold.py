"""The command ``python -m cpunorm fold``: a model file in, one without its batch norms out."""

import argparse
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from ._demo.cli import Parser

DESCRIPTION = """\
Fold the batch norms of an ONNX model into the convolutions before them. The input, with the files
of external data it names, is not touched; the output appears when it is complete. The exit code is
2 for a wrong argument, or a file that cannot be read or written.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Fold, say how many, and return the exit code."""
    parser = Parser(prog="python -m cpunorm fold", description=DESCRIPTION)
    parser.add_argument("model", type=Path, help="the ONNX file to read")
    parser.add_argument("out", type=Path, help="the ONNX file to write; another one")
    options = parser.parse_args(arguments)
    try:
        print(_fold(options))
    except ImportError as error:
        parser.error(f"folding needs the package onnx (pip install 'cpunorm[onnx]'): {error}")
    except (OSError, ValueError) as error:
        parser.error(" ".join(str(error).split()))
    return 0


def _fold(options: argparse.Namespace) -> str:
    import onnx
    from google.protobuf.message import DecodeError, EncodeError
    from onnx.external_data_helper import load_external_data_for_model

    from .onnx import fold_batch_norms

    source, target = options.model, options.out
    if _same(source, target):
        raise ValueError(f"out must be another file than model, got {target} for both")
    if target.exists() and not target.is_file():
        raise ValueError(f"out must be a regular file, but {target} is not one")
    try:
        model = onnx.load(source, load_external_data=False)
        for location in _external_data(model):
            if _same(source.parent / location, target):
                raise ValueError(f"out must be another file than {target}, external data of model")
        load_external_data_for_model(model, str(source.parent))
        onnx.checker.check_model(model)
    except (DecodeError, onnx.checker.ValidationError) as error:
        first, *_ = str(error).strip().splitlines() or [type(error).__name__]
        raise ValueError(f"{source} is not a sound ONNX model: {first}") from error
    count = sum(node.op_type == "BatchNormalization" for node in model.graph.node)
    folded = fold_batch_norms(model)
    try:
        onnx.checker.check_model(model)
        content = model.SerializeToString()
    except (EncodeError, onnx.checker.ValidationError) as error:
        raise ValueError(f"{source} cannot be written when folded: {error}") from error
    _write(target, content)
    return f"folded {folded} of {count} batch norms of {source} into {target}"


def _same(a: Path, b: Path) -> bool:
    return a.exists() and b.exists() and a.samefile(b)


def _external_data(message: Any) -> Iterator[str]:
    """The files beside a model in which tensors of it lie."""
    if message.DESCRIPTOR.name == "TensorProto":
        yield from (entry.value for entry in message.external_data if entry.key == "location")
    for field, value in message.ListFields():
        if field.message_type is not None:
            for inner in [value] if hasattr(value, "ListFields") else value:
                yield from _external_data(inner)


def _write(out: Path, content: bytes) -> None:
    """Write a file that is there in full or not at all; an older one's mode is kept."""
    target = Path(os.path.realpath(out))
    partial = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        with open(partial, "xb") as file:
            if target.exists():
                shutil.copymode(target, partial)
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, target)
    except OSError as error:
        raise OSError(f"out cannot be written: {out}: {error.strerror}") from error
    finally:
        with suppress(OSError):  # it is gone, or was never made
            partial.unlink()
