"""`python -m cellfate.cli` is `cellfate`."""

import sys

from cellfate.cli import main

if __name__ == "__main__":
    sys.exit(main())
