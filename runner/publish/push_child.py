"""`python -m runner.publish.push_child RUN_DIR SECONDS`: pushes one completed run for a sweep.
`launch.pushes` starts it, and reads `push.json` afterwards.
"""

from __future__ import annotations

import sys
from pathlib import Path

from runner.errors import RunnerError, escape_controls
from runner.publish.push import PushedElsewhereError, push_run
from runner.secrets import scrub_output


def main() -> int:
    """Push; 0 when the model is on the hub, or another process is at it."""
    scrub_output()
    run_dir, seconds = Path(sys.argv[1]), float(sys.argv[2])
    try:
        commit = push_run(run_dir, limit_seconds=seconds)
    except PushedElsewhereError as error:
        print(error.message, file=sys.stderr)
        return 0
    except (RunnerError, OSError) as error:
        print(escape_controls(f"error: {error}"), file=sys.stderr)
        return 1
    print(f"pushed: {commit.url}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
