"""`runner stop`: asks running attempts to checkpoint and to leave, whoever started them and on whatever machine."""

from __future__ import annotations

import argparse
import sys

from runner.attempts import request_stop
from runner.fsio import is_leased
from runner.plan import foresee_retry
from runner.record import load_progress, load_record
from runner.selection import Selected, select_recipes


def run_stop(arguments: argparse.Namespace) -> int:
    """Ask every running attempt of what is selected; 1 when one could not be asked: it is just opening or closing."""
    selected = select_recipes(arguments.paths, arguments.output_root, arguments.where)
    running = [one for one in selected if is_leased(one.paths.lease_path)]
    asked = [one for one in running if _ask(one)]
    num_idle = len(selected) - len(running) - sum(_hold_back(one) for one in selected if one not in running)
    if num_idle:
        what = "run is not running" if num_idle == 1 else "runs are not running"
        print(f"{num_idle} {what}" if running else f"nothing to stop: {num_idle} {what}", file=sys.stderr)
    return 0 if len(asked) == len(running) else 1


def _hold_back(one: Selected) -> bool:
    """Whether the run waits for a retry, if its sweep still lives; that sweep will leave it alone now."""
    attempts = load_record(one.paths).attempts
    if foresee_retry(one.recipe, attempts) is None or one.paths.result_path.exists():
        return False
    request_stop(one.paths, attempts[-1].number, "asked by `runner stop`")
    print(f"{one.full_name}  is not running; its sweep, if it lives, does not try it again")
    return True


def _ask(one: Selected) -> bool:
    attempts = load_record(one.paths).attempts
    if not attempts or attempts[-1].ended_at_utc is not None:
        print(f"{one.full_name}  is just ending or being started: ask again")
        return False
    number = attempts[-1].number
    progress = load_progress(one.paths.attempt(number).progress_path)
    request_stop(one.paths, number, "asked by `runner stop`")
    step = "" if progress is None or progress.max_steps is None else f", step {progress.step}/{progress.max_steps}"
    where = "starting" if progress is None else f"{progress.phase}{step}"
    print(f"{one.full_name}  asked attempt {number} to checkpoint and leave ({where}, on {attempts[-1].host})")
    return True
