"""``python -m orthogonium``."""

import sys

from orthogonium.cli import main

if __name__ == "__main__":
    sys.exit(main())
