"""`python -m runner.sft RUN_DIR`, started by `accelerate launch`: one rank of one attempt."""

from __future__ import annotations

from runner.processes import bind_forks, die_with_launcher, write_stacks_on_request

if __name__ == "__main__":
    die_with_launcher()  # before the imports, which take a good part of a second
    write_stacks_on_request()  # an import may hang too

import contextlib
import gc
import os
import sys
import traceback
from functools import partial
from pathlib import Path

from runner.errors import RunnerError, hide_bitsandbytes_warning
from runner.files import write_json_atomic, write_json_unsynced
from runner.recipe.libraries import find_unused_libraries, hide_libraries
from runner.run.failures import build_failure
from runner.run.lease import ATTEMPT_VARIABLE, Lease, join_attempt
from runner.run.paths import RunPaths
from runner.run.record import Failure, Progress, load_record, load_stored_recipe, now_utc
from runner.secrets import scrub_output
from runner.sft.leave import leave
from runner.sft.preemption import Preemption
from runner.sft.startup import WorldPlace, uses_deepspeed


def main(*, is_forked: bool = False) -> int:
    """Train. On failure, write its kind and message to the attempt, which is all that the launch
    side reads. `is_forked`: by a worker, which has already frozen the objects of its imports.
    """
    if len(sys.argv) != 2:
        print("usage: accelerate launch ... -m runner.sft RUN_DIR", file=sys.stderr)
        return 2
    scrub_output()
    run_dir, place = Path(sys.argv[1]), WorldPlace.read(os.environ)
    preemption: Preemption | None = None
    try:
        lease = _hold_lease(run_dir, place)
        preemption = _listen(run_dir, place)
        if (stored := load_stored_recipe(RunPaths(run_dir))) is not None:
            unused = find_unused_libraries(stored.pinned, uses_deepspeed=uses_deepspeed())
            hide_libraries(unused)
        _announce_imports(run_dir, place)
        hide_bitsandbytes_warning()
        from runner.sft.train import train

        # The objects of the imports live until the end. accelerate collects garbage before it
        # prepares the model, and traversing these objects took it 0.25 s.
        if not is_forked:
            gc.freeze()
        train(run_dir, place, preemption)
    except BaseException as error:
        try:
            _say(error)
            if preemption is not None:
                preemption.ignore()
            _record_failure(run_dir, place, build_failure(error, run_dir))
        finally:
            os._exit(1)  # other ranks may be inside a collective: leave without waiting for them
    del lease
    assert stored is not None, "else there was nothing to train"
    leave(0, stored.recipe, place, is_forked=is_forked)


def _hold_lease(run_dir: Path, place: WorldPlace) -> Lease | int | None:
    """The lease of the run: inherited as stdin from the runner, or acquired here if the command
    was typed by hand.

    Programs that this process executes later, such as a tracker's daemon, must not hold the run
    after its end. The lease therefore moves to a descriptor that is closed on exec.
    """
    path = RunPaths(run_dir).lease_path
    if path.exists() and os.path.samestat(os.fstat(sys.stdin.fileno()), path.stat()):
        held = os.dup(sys.stdin.fileno())
        os.dup2(os.open(os.devnull, os.O_RDONLY), sys.stdin.fileno())
        bind_forks(held)
        return held
    if (number := os.environ.get(ATTEMPT_VARIABLE)) is not None:
        ranks = join_attempt(RunPaths(run_dir), int(number))
        bind_forks(ranks.fileno())
        return ranks
    if place.rank != 0 or not run_dir.is_dir():
        return None
    lease = Lease(path)
    if not lease.try_acquire():
        raise RunnerError(f"another process is working on {run_dir}")
    bind_forks(lease.fileno())
    return lease


def _say(error: BaseException) -> None:
    with contextlib.suppress(OSError):  # on a full disk the log cannot be written either
        if isinstance(error, RunnerError):
            print(f"error: {error}", file=sys.stderr, flush=True)
        else:
            traceback.print_exception(error)
        sys.stdout.flush()


def _listen(run_dir: Path, place: WorldPlace) -> Preemption:
    """Listen for requests to stop this attempt, before anything heavy is imported."""
    paths = RunPaths(run_dir)
    attempts = load_record(paths).attempts
    preemption = Preemption(paths, attempts[-1].number if attempts else 0, place)
    preemption.listen(partial(_record_failure, run_dir, place))
    return preemption


def _announce_imports(run_dir: Path, place: WorldPlace) -> None:
    """Show the first phase in `progress.json`; it lasts minutes on a cold or slow disk."""
    paths = RunPaths(run_dir)
    if place.rank == 0 and (attempts := load_record(paths).attempts):
        progress = Progress(phase="importing libraries", phase_began_at_utc=now_utc())
        progress_path = paths.attempt(attempts[-1].number).progress_path
        write_json_unsynced(progress_path, progress.model_dump())


def _record_failure(run_dir: Path, place: WorldPlace, failure: Failure) -> None:
    """Write the failure that this rank saw. The launch side chooses among them: most ranks only
    lose contact with the one that knows the cause.
    """
    paths = RunPaths(run_dir)
    attempts = load_record(paths).attempts
    if not attempts:
        return
    files = paths.attempt(attempts[-1].number)
    content, failure_path = failure.model_dump(mode="json"), files.failure_path(place.rank)
    try:
        write_json_atomic(failure_path, content)
    except OSError:
        # It is only for display; removing it makes room for the failure on a full disk.
        files.progress_path.unlink(missing_ok=True)
        write_json_atomic(failure_path, content)


if __name__ == "__main__":
    sys.exit(main())
