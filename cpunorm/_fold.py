"""The command ``python -m cpunorm fold``: a model file in, one without its batch norms out."""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from ._demo.cli import Parser

DESCRIPTION = """\
Fold the batch norms of an ONNX model into the convolutions before them. The input is not touched;
the output appears when it is complete. The exit code is 2 for a wrong argument, or a file that
cannot be read or written.
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

    from .onnx import fold_batch_norms

    source, target = options.model, options.out
    if target.exists() and source.exists() and target.samefile(source):
        raise ValueError(f"out must be another file than model, got {target} for both")
    if target.is_dir():
        raise ValueError(f"out must be a file, but {target} is a directory")
    try:
        model = onnx.load(source)
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


def _write(target: Path, content: bytes) -> None:
    """Write a file that is there in full or not at all."""
    partial = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        with open(partial, "xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)
