"""`python -m runner` does the same as the console script."""

import sys

if __name__ == "__main__":
    try:
        from runner.cli.main import main
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        sys.exit(130)
    sys.exit(main())
