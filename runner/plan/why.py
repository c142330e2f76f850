"""`runner why`: the next action for one run, and the file, field or marker that decides it.

Reads everything, including checksums, and changes nothing.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final

from runner.checkpoints.choose import (
    Choice,
    Inventory,
    Verification,
    build_policy,
    choose,
    read_inventory,
)
from runner.errors import CorruptFileError, DataError, RefusedError
from runner.plan.decide import Decision, decide
from runner.plan.repair import find_repair_step
from runner.plan.status import (
    NOT_VERIFIABLE,
    RunStatus,
    State,
    derive_status,
    describe_unreadable,
    find_divisor,
    is_verifiable,
    suggest_fixes,
    verify_files,
)
from runner.processes import list_holders
from runner.recipe.contents import (
    ContentHashes,
    hash_contents,
    hash_existing,
    list_content_paths,
    list_missing_files,
)
from runner.recipe.hub import name_at
from runner.recipe.identity import build_resume_fingerprint, derive_digest
from runner.recipe.parse import Recipe, derive_accumulation
from runner.run.facts import RunFacts
from runner.run.failures import name_command, read_log_tail
from runner.run.record import Attempt, BaseSource, load_base_source
from runner.text import format_count

# The rule for each state, in the order of `derive_status`: the first true one counts.
RULES: Final[Mapping[State, str]] = {
    "unreadable": "a record in the run directory cannot be read",
    "running": "a process holds `lease`, on this or another machine",
    "changed": "the digest in `recipe.json` differs from that of the current recipe and its files",
    "damaged": (
        "an attempt completed the run, but `result.json` or a file that it lists is missing or"
        " differs from its record"
    ),
    "completed": "`result.json` exists and has the digest in `recipe.json`",
    "pending": "`run.json` records no attempt that was started",
    "interrupted": (
        "the last attempt in `run.json` was cut off, or stopped without an error in the run"
    ),
    "failed": "the last attempt in `run.json` ended with a failure",
}


@dataclass(frozen=True)
class Explanation:
    """Everything that decides about one run."""

    name: str
    run_dir: str
    num_processes: int  # of the launch being considered
    status: RunStatus
    decisions: dict[str, Decision]  # by verb
    missing: dict[str, str]  # dotted key -> path that does not exist
    impossible: str | None  # why this number of processes cannot keep the global batch
    holders: dict[int, str]  # processes that have the lease open, if it is held
    stop: str | None  # the request to the running attempt
    attempt: Attempt | None  # the last one
    log_path: str | None
    log_tail: tuple[str, ...]
    base: BaseSource | None  # the source of the base scores
    commits: tuple[str, ...]  # loaded from the hub, a line per name
    micro_batch_divisor: int
    choice: Choice
    remote_url: str | None  # searched for checkpoints if the run has none
    files: str | None = None  # of a completed run: the state of its recorded files
    remedy: str | None = None  # the hint for a damaged run

    def as_json(self) -> dict[str, Any]:
        """For scripts: `next` is the action of `runner launch`, `start_step` the step where it
        starts.
        """
        plain = {
            name: getattr(self, name)
            for name in ("name", "run_dir", "num_processes", "missing", "holders")
        }
        return plain | {
            "next": self.next_action,
            "start_step": self.choice.step or 0 if self.next_action == "launch" else None,
            "decisions": {verb: asdict(decision) for verb, decision in self.decisions.items()},
            "rule": RULES[self.status.state],
            "files": self.files,
            "status": self.status.model_dump(mode="json"),
            "attempt": self.attempt and self.attempt.model_dump(mode="json"),
            "base": self.base and self.base.model_dump(mode="json"),
            "log_path": self.log_path,
            "log_tail": self.log_tail,
            "checkpoints": [asdict(verdict) for verdict in self.choice.verdicts],
            "stop": self.stop,
        }

    @property
    def next_action(self) -> str:
        """The action of `runner launch`."""
        if self.missing or self.impossible:
            return "refuse"
        action = self.decisions["launch"].action
        return "refuse" if action == "launch" and self.choice.refusal is not None else action


@dataclass(frozen=True)
class Evidence:
    """Everything other than the run's facts that `explain` uses; gathered by reading."""

    contents: Mapping[str, str]  # path -> SHA-256, of the paths that the recipe names
    named: tuple[str, ...]  # paths of all contents, also of those that cannot be read
    missing: dict[str, str]  # dotted key -> path that does not exist
    inventory: Inventory | CorruptFileError | OSError  # or why it cannot be read
    holders: dict[int, str]  # processes that have the lease open, if it is held
    log_tail: tuple[str, ...]  # of the last attempt's log
    base: BaseSource | None  # of the last attempt that began at step 0
    choice: Choice  # every checkpoint verified, if an attempt may come next
    # The reason why every launch refuses the files that the recipe names: missing or unreadable.
    inputs_error: DataError | None = None
    # Of a completed run: *damaged* if a recorded byte has changed.
    verified: RunStatus | None = None
    no_repair: RefusedError | None = None  # why `launch --repair` would not write its model again


def gather_evidence(
    facts: RunFacts, recipe: Recipe, hashes: ContentHashes, num_processes: int
) -> Evidence:
    """Read everything else that decides: hash the files that the recipe names, verify checkpoints.
    Nothing is written.
    """
    paths = facts.paths
    contents, inputs_error = _read_inputs(recipe, hashes)
    named = tuple(list_content_paths(recipe).values())
    inventory: Inventory | CorruptFileError | OSError
    holders: dict[int, str] = {}
    log_tail: tuple[str, ...] = ()
    base: BaseSource | None = None
    verified: RunStatus | None = None
    no_repair: RefusedError | None = None
    is_verified = False
    try:
        if facts.is_leased:
            holders = list_holders(paths.lease_path)
        # A running training process is writing them.
        inventory = Inventory(paths) if facts.is_running else read_inventory(paths)
        status = derive_status(
            facts, inventory, recipe, contents, num_processes=num_processes, named=named
        )
        is_verified = status.state not in ("running", "unreadable")
        if status.state in ("completed", "damaged", "changed"):
            verified = verify_files(facts, status)
            no_repair = _find_why_no_repair(facts, verified, recipe)
        if facts.last is not None:
            log_tail = read_log_tail(paths.attempt(facts.last.number).log_path)
        base = _find_base_source(facts)
    except (CorruptFileError, OSError) as error:
        inventory = error
    choice = Choice()
    if is_verified and isinstance(inventory, Inventory):
        with contextlib.suppress(RefusedError):  # the global batch cannot be kept like that
            choice = _verify_checkpoints(
                facts,
                inventory,
                recipe,
                num_processes,
                contents,
                nothing_follows=_find_why_no_attempt(status, verified or status, inputs_error),
            )
    return Evidence(
        contents,
        named,
        list_missing_files(recipe),
        inventory,
        holders,
        log_tail,
        base,
        choice,
        inputs_error,
        verified,
        no_repair,
    )


def _read_inputs(recipe: Recipe, hashes: ContentHashes) -> tuple[dict[str, str], DataError | None]:
    """The hashes of the existing files, and the reason why a launch would refuse the others."""
    try:
        return hash_contents(recipe, hashes), None
    except DataError as error:
        found: dict[str, str] = {}
        with contextlib.suppress(OSError):  # `error` reports it
            found = hash_existing(recipe, hashes)
        return found, error


def _find_why_no_attempt(
    status: RunStatus, verified: RunStatus, inputs_error: DataError | None
) -> str | None:
    """The reason why `runner launch`, which knows `status`, would not start an attempt; None if it
    would.
    """
    if inputs_error is not None:
        return "a launch would be refused: files that the recipe names are missing or unreadable"
    action = decide(status, retry_failed=True).action
    if action == "launch":
        return None
    if action in ("skip", "push"):
        unseen = ", but a launch checks only file sizes"
        return (
            f"nothing would be started: the run is {verified.state}"
            f"{unseen if verified.state != status.state else ''}"
        )
    why = ", ".join(status.obstacles) or f"the run is {status.state}"
    return f"a launch would be refused: {why}"


def _find_why_no_repair(
    facts: RunFacts, verified: RunStatus, recipe: Recipe
) -> RefusedError | None:
    """The refusal of `launch --repair` for a run whose model is damaged or removed; None if it
    would run.
    """
    is_whole = verified.state != "damaged" and not verified.is_model_removed
    if is_whole or not is_verifiable(facts):
        return None
    try:
        find_repair_step(facts, verified, recipe)
    except RefusedError as error:
        return error
    return None


def _find_base_source(facts: RunFacts) -> BaseSource | None:
    for attempt in reversed(facts.attempts):
        if (found := load_base_source(facts.paths.attempt(attempt.number))) is not None:
            return found
    return None


def explain(facts: RunFacts, evidence: Evidence, recipe: Recipe, num_processes: int) -> Explanation:
    """Everything that decides, and the consequences. Pure."""
    if not isinstance(evidence.inventory, Inventory):
        by_sizes = describe_unreadable(evidence.inventory)
    else:
        by_sizes = derive_status(
            facts,
            evidence.inventory,
            recipe,
            evidence.contents,
            num_processes=num_processes,
            named=evidence.named,
        )
    is_listed = isinstance(evidence.inventory, Inventory)
    status = (evidence.verified if is_listed else None) or by_sizes
    is_readable = status.state != "unreadable"
    divisor, stop = find_divisor(facts, recipe) if is_readable else 1, facts.stop_request
    last = facts.last if is_readable else None
    recorded_tail = last.failure.log_tail if last is not None and last.failure is not None else ()
    remote = recipe.checkpoints.remote
    try:
        derive_accumulation(recipe, num_processes, divisor)
        impossible = None
    except RefusedError as error:
        impossible = error.message
    is_asked = stop is not None and last is not None and stop.attempt == last.number
    log_path = facts.paths.attempt(last.number).log_path if last is not None else None
    return Explanation(
        name=recipe.run.full_name,
        run_dir=str(facts.paths.run_dir),
        num_processes=num_processes,
        status=status,
        decisions=_decide_all(by_sizes, status, evidence.inputs_error),
        missing=evidence.missing,
        impossible=impossible,
        holders=evidence.holders,
        stop=stop.why if stop is not None and is_asked else None,
        attempt=last,
        log_path=str(log_path) if log_path is not None and facts.has_log else None,
        log_tail=recorded_tail or (evidence.log_tail if last is not None else ()),
        base=evidence.base if is_readable else None,
        commits=_describe_commits(facts) if is_readable else (),
        micro_batch_divisor=divisor,
        choice=evidence.choice,
        remote_url=remote.url if remote is not None and remote.load else None,
        files=_describe_files(facts, status, evidence.no_repair),
        remedy=_suggest_fixes(status, evidence.no_repair),
    )


def _decide_all(
    by_sizes: RunStatus, status: RunStatus, inputs_error: DataError | None
) -> dict[str, Decision]:
    """The decision of each verb. Verbs do not read every byte, unlike the check behind `status`."""
    if inputs_error is not None:  # before any other check
        refused = Decision("refuse", inputs_error.message.partition("\n")[0].rstrip(":"))
        return dict.fromkeys(("sweep", "rerun", "launch"), refused)
    decisions = {
        "sweep": decide(by_sizes),
        "rerun": decide(by_sizes, retry_failed=True, only_unfinished=True),
        "launch": decide(by_sizes, retry_failed=True),
    }
    if by_sizes.state == status.state:
        return decisions
    return {
        verb: replace(decision, why=f"{decision.why} (only file sizes are checked)")
        for verb, decision in decisions.items()
    }


def _suggest_fixes(status: RunStatus, no_repair: RefusedError | None) -> str | None:
    """The remedy for a damaged run."""
    if status.state != "damaged":
        return None
    if no_repair is None or no_repair.hint is None:
        return suggest_fixes(status.damage)
    return no_repair.hint


def _describe_files(
    facts: RunFacts, status: RunStatus, no_repair: RefusedError | None
) -> str | None:
    if status.state == "damaged":
        return "\n".join(f"{name} {what}" for name, what in status.damage.items())
    if status.state != "completed":
        return None
    if not is_verifiable(facts):
        return NOT_VERIFIABLE
    found = f"every byte of {format_count(len(facts.file_sizes), 'file')} matches its record"
    if not status.is_model_removed:
        return found
    if no_repair is None:
        return f"{found}; model removed: `runner launch RECIPE --repair` restores it"
    lines = [f"{found}; model removed", no_repair.message, *filter(None, [no_repair.hint])]
    return "\n".join(lines)


def _describe_commits(facts: RunFacts) -> tuple[str, ...]:
    stored = facts.stored
    commits = {} if stored is None else stored.commits
    names = {key: name_at(stored.recipe, key) for key in commits} if stored is not None else {}
    return tuple(
        f"{key}: {name.name} at {commits[key]}" for key, name in names.items() if name is not None
    )


def _verify_checkpoints(
    facts: RunFacts,
    inventory: Inventory,
    recipe: Recipe,
    num_processes: int,
    contents: Mapping[str, str],
    *,
    nothing_follows: str | None,
) -> Choice:
    stored, paths, divisor = facts.stored, facts.paths, find_divisor(facts, recipe)
    digest = stored.current_digest if stored else derive_digest(recipe, contents)
    current = build_resume_fingerprint(recipe, digest, num_processes, divisor, threads=None)
    with tempfile.TemporaryDirectory(prefix="runner-why-") as scratch:
        verification = Verification(paths, recipe.checkpoints, Path(scratch))
        policy = build_policy(
            recipe,
            "auto",
            divisor,
            verification,
            judges_all=True,
            nothing_follows=nothing_follows,
        )
        return choose(inventory, "auto", current, policy)


def build_lines(found: Explanation) -> list[str]:
    """The report for people: the answer first, then its evidence, then further notes."""
    status = found.status
    rows = [
        ("next", _describe_next(found)),
        *(
            (verb, f"{decision.action}: {decision.why}")
            for verb, decision in found.decisions.items()
        ),
        ("state", f"{status.state}: {status.why}"),
        ("rule", RULES[status.state]),
        *((("files", found.files),) if found.files is not None else ()),
        *((("hint", found.remedy),) if found.remedy is not None else ()),
        *(("differs", line) for line in status.differences),
        *(("differs", line) for line in status.obstacles),
        *(
            ("changed", f"{line} (launch.on_version_change: warn)")
            for line in status.version_changes
        ),
        *(("missing", f"{key}: {path}") for key, path in found.missing.items()),
        ("lease", _describe_lease(found)),
        *(_describe_attempt(found)),
        *(("commit", line) for line in found.commits),
        *((("base scores", found.base.describe()),) if found.base is not None else ()),
        *(("checkpoint", f"{verdict.name}  {verdict.what}") for verdict in found.choice.verdicts),
        *(("quarantine", name) for name in status.quarantined),
        *(("upload", f"{name} has not reached remote storage") for name in status.pending_uploads),
    ]
    if status.push_note is not None:
        rows.append(("push", status.push_note))
    if status.upload_failure is not None:
        rows.append(("upload", status.upload_failure))
    shown = [f"{found.name}  {found.run_dir}"]
    last_label = ""
    for label, text in rows:
        first, *more = text.splitlines() or [""]
        shown.append(f"  {'' if label == last_label else label:<11} {first}")
        shown += [f"  {'':<11} {line}" for line in more]
        last_label = label
    return shown


def _describe_next(found: Explanation) -> str:
    if found.missing:
        return "refuse: files that the recipe names are missing"
    if found.impossible is not None:
        return f"refuse: {found.impossible}"
    decision = found.decisions["launch"]
    if decision.action != "launch":
        return f"{decision.action}: {decision.why}"
    if found.choice.refusal is not None:
        return f"refuse: {found.choice.refusal.message}"
    processes = format_count(found.num_processes, "process")
    if found.micro_batch_divisor > 1:
        processes += (
            f", micro-batches divided by {found.micro_batch_divisor} since it ran out of memory"
        )
    if found.choice.step is not None:
        return f"launch from step {found.choice.step}, {processes}"
    asked = (
        f"; {found.remote_url} is searched for a checkpoint first"
        if found.remote_url is not None
        else ""
    )
    return f"launch from step 0, {processes}{asked}"


def _describe_lease(found: Explanation) -> str:
    if found.status.state != "running":
        return "free"
    holders = [f"held by {pid}  {command}" for pid, command in found.holders.items()]
    asked = [f"asked to stop: {found.stop}"] if found.stop is not None else []
    return "\n".join([*(holders or ["held by a process that is not visible from here"]), *asked])


def _describe_attempt(found: Explanation) -> list[tuple[str, str]]:
    attempt = found.attempt
    if attempt is None:
        return []
    started = (
        f"{attempt.number}, started {attempt.started} {attempt.started_at_utc} on {attempt.host},"
        f" processes: {attempt.num_processes}"
    )
    if attempt.retry:
        started += f", automatic retry {attempt.retry}"
    rows = [("attempt", started)]
    is_over = found.status.state in ("running", "completed") or (
        found.status.state == "damaged" and not attempt.is_repair
    )
    if not is_over:
        failure = found.status.failure or attempt.failure
        if failure is not None:
            rows.append(("failure", f"{failure.kind}: {failure.message}"))
            # If the run is not launched, "the same command resumes" would be wrong.
            if found.decisions["launch"].action == "launch":
                rows.append(("hint", name_command(failure.kind, [Path(found.run_dir)])))
        rows += [("log", f"| {line}") for line in found.log_tail]
    if found.log_path is not None:
        rows.append(("log", found.log_path))
    return rows
