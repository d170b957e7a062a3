"""The one command: measures, or compares two files, or draws the report."""

import signal
import sys

from . import INTERRUPTED


def main(argv: list[str]) -> int:
    """Run a subcommand, or measure; return the exit code."""
    # To be ended is an interrupt, so that nothing is left lying about.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        return _command(argv)
    except KeyboardInterrupt:
        print("python -m bench: stopped", file=sys.stderr)
        return INTERRUPTED


def _command(argv: list[str]) -> int:
    # Imported when needed: every process of a contestant imports this file.
    from .results import ResultsError

    match argv:
        case ["compare", *rest]:
            from .compare import main as command
        case ["report", *rest]:
            from .report import main as command
        case rest:
            from .run import main as command
    try:
        return command(rest) or 0
    except ResultsError as error:
        print(f"python -m bench: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"python -m bench: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
