"""`python -m runner`: the same as the console script."""

import sys

from runner.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
