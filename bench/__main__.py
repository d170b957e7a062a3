"""The one command: measures, or compares two files, or draws the report."""

import sys


def main(argv: list[str]) -> int:
    """Run a subcommand, or measure; return the exit code."""
    # Imported when needed: every process of a contestant imports this file.
    match argv:
        case ["compare", *rest]:
            from .compare import main as command
        case ["report", *rest]:
            from .report import main as command
        case rest:
            from .run import main as command
    from .results import ResultsError

    try:
        return command(rest) or 0
    except ResultsError as error:
        print(f"python -m bench: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
