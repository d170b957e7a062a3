"""``python -m cpunorm``: check the library, try it on real images, time it."""

import sys

from ._demo.cli import main

if __name__ == "__main__":
    sys.exit(main())
