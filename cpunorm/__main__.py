"""``python -m cpunorm``: check the library, try it on real images, time it; or ``fold`` a model."""

import sys

if __name__ == "__main__":
    arguments = sys.argv[1:]
    if arguments[:1] == ["fold"]:
        from ._fold import main

        arguments = arguments[1:]
    else:
        from ._demo.cli import main
    sys.exit(main(arguments))
