"""`python -m runner.publish.push_child RUN_DIR SECONDS`: pushes one completed run for a sweep.
`launch.pushes` starts it, and reads its output afterwards.
"""

from __future__ import annotations

import sys
from pathlib import Path

from runner.errors import RunnerError, escape_controls
from runner.plan.pushes import PUSHED_ELSEWHERE
from runner.publish.push import PushedElsewhereError, push_run
from runner.secrets import scrub_output


def main() -> int:
    """Push; return 0 if the model is on the hub, `PUSHED_ELSEWHERE` if another process is pushing
    it.
    """
    scrub_output()
    run_dir, seconds = Path(sys.argv[1]), float(sys.argv[2])
    try:
        commit = push_run(run_dir, limit_seconds=seconds)
    except PushedElsewhereError as error:
        print(error.message, file=sys.stderr)
        return PUSHED_ELSEWHERE
    except (RunnerError, OSError) as error:
        message = error.message if isinstance(error, RunnerError) else str(error)
        print(escape_controls(f"error: {' '.join(message.split())}"), file=sys.stderr)
        if isinstance(error, RunnerError) and error.hint is not None:
            print(escape_controls(f"hint: {error.hint}"), file=sys.stderr)
        return 1
    print(f"pushed: {commit.url}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
