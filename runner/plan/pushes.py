"""Pushes to the hub that the launch side will start automatically, and their problems, found before
anything starts.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from runner.errors import CorruptFileError, RefusedError
from runner.recipe.parse import Recipe
from runner.run.facts import RunFacts
from runner.run.paths import RunPaths, find_output_root, list_push_paths
from runner.run.record import PushRecord, load_push

# Placeholders in examples and templates, with - for _.
_YOUR_OWN: Final = re.compile(r"your(?:-.*|user|username|name|org|organi[sz]ation|team)?")
_PLACEHOLDER_OWNERS: Final = frozenset(
    {
        *("owner", "user", "username", "user-name", "hf-username"),
        *("org", "organisation", "organization", "my-org", "my-organisation", "my-organization"),
        *("my-name", "my-username", "namespace", "example", "placeholder", "changeme", "todo"),
    }
)
_NUM_SHOWN: Final = 5
_HINT: Final = (
    'in the template of a grid, `hub_model_id: {{ ("OWNER/" ~ name) | yaml }}` with your own'
    " OWNER gives each run its own repository; for one run,"
    " `runner launch RECIPE tracking.hub_model_id=OWNER/NAME`"
)
# Exit status of a process that found another process already pushing its run.
PUSHED_ELSEWHERE: Final = 75
TOKEN_HINT: Final = "set HF_TOKEN in the environment; it is read only from there and never stored"


@dataclass(frozen=True)
class PlannedPush:
    """A run whose model will be pushed now, or once the run is completed."""

    full_name: str
    paths: RunPaths
    repo_id: str
    is_due: bool  # the run is launched or pushed now


def find_push_to(facts: RunFacts, recipe: Recipe, *, is_fresh: bool = False) -> str | None:
    """The repository that a run will be pushed to, or None. After the first attempt, the recorded
    recipe decides; before it, and with `is_fresh`, the current recipe does. None also if the run
    has been pushed.

    Raises:
        CorruptFileError, OSError: the records of the run cannot be read.
    """
    if is_fresh or not facts.attempts or facts.stored is None:
        return recipe.tracking.push_to
    return find_recorded_push(facts)


def find_recorded_push(facts: RunFacts) -> str | None:
    """The repository that the recorded recipe names; None if the run has been pushed.

    Raises:
        CorruptFileError, OSError: the records of the run cannot be read.
    """
    if facts.stored is None or (facts.push is not None and facts.push.state == "pushed"):
        return None
    return facts.stored.recipe.tracking.push_to


def describe_other_push(facts: RunFacts, recipe: Recipe) -> str | None:
    """The recorded recipe's push setting if the current recipe's differs; None if they agree, or if
    neither pushes.

    Raises:
        CorruptFileError, OSError: the records of the run cannot be read.
    """
    if not facts.attempts or facts.stored is None:
        return None
    recorded, today = facts.stored.recipe.tracking, recipe.tracking
    if recorded.push_to == today.push_to:
        return None
    said = [
        f"`hub_push: {one.hub_push}`" + (f", {one.push_to}" if one.push_to is not None else "")
        for one in (recorded, today)
    ]
    return (
        f"its first attempt recorded {said[0]}, which still applies; the recipe now says {said[1]}"
    )


def find_placeholder(repo_id: str) -> str | None:
    """The owner of a repository if it is a placeholder, otherwise None.

    >>> owners = ("your-organisation", "Your_Name", "OWNER", "<user>", "yourtown", "lab")
    >>> [owner for owner in owners if find_placeholder(f"{owner}/your-model")]
    ['your-organisation', 'Your_Name', 'OWNER', '<user>']
    """
    owner, slash, _ = repo_id.rpartition("/")
    folded = owner.casefold().replace("_", "-")
    is_one = (
        _YOUR_OWN.fullmatch(folded) or folded in _PLACEHOLDER_OWNERS or set(owner) & set("<>{}$")
    )
    return owner if slash and is_one else None


def refuse_pushes(planned: Sequence[PlannedPush], environment: Mapping[str, str] | None) -> None:
    """Refuse pushes that would delete each other's weights, have no real destination or need a
    token. Nothing is refused if none is due. `environment` has the token; None: it is provided
    elsewhere.

    Raises:
        RefusedError: with every problem.
    """
    if not any(one.is_due for one in planned):
        return
    shared, alternatives = _find_shared(planned)
    lines = [*shared, *_find_placeholders(planned)]
    hints = [_HINT, *alternatives] if lines else []
    if environment is not None and not environment.get("HF_TOKEN", "").strip():
        lines.append("HF_TOKEN is not set, and a push needs a token with write access")
        hints.append(TOKEN_HINT)
    if not lines:
        return
    raise RefusedError(
        "nothing is started, because `tracking.hub_push: end` cannot be carried out:\n"
        + "\n".join(f"  {line}" for line in lines),
        hint="\n      ".join(hints),
    )


@dataclass(frozen=True)
class OtherPush:
    """Another run of the same output root with the same repository."""

    run_dir: Path
    record: PushRecord

    @property
    def is_there(self) -> bool:
        """True if the repository holds its weights, according to the records."""
        return self.record.state == "pushed"


def _find_shared(planned: Sequence[PlannedPush]) -> tuple[list[str], list[str]]:
    """A line for each repository that several runs would be pushed to, or that another run of the
    same output root was or will be pushed to; and remedies for the latter.
    """
    lines, alternatives = [], []
    by_repository: dict[str, list[PlannedPush]] = {}
    for one in planned:
        by_repository.setdefault(one.repo_id.casefold(), []).append(one)
    roots = dict.fromkeys(find_output_root(one.paths.run_dir) for one in planned)
    pushed = [found for root in roots for found in _list_pushed(root)]
    own = {one.paths.run_dir.resolve() for one in planned}
    for folded, runs in by_repository.items():
        others = _choose_others(pushed, folded, own)
        names, repo_id = _name(one.full_name for one in runs), runs[0].repo_id
        if len(runs) > 1:
            lines.append(
                f"{names} share one `hub_model_id`, {repo_id}:"
                " each push would delete the weights of the previous one"
            )
        if there := [str(one.run_dir) for one in others if one.is_there]:
            lines.append(
                f"{names} would delete the weights in {repo_id}: {_name(there)} was pushed there"
            )
        for other in others:
            if not other.is_there:
                lines.append(
                    f"{names} and {other.run_dir} would delete each other's weights in {repo_id}:"
                    f" {other.run_dir} will be pushed there too; its last push"
                    f" {'failed' if other.record.state == 'failed' else 'is pending'}"
                )
                alternatives.append(suggest_elsewhere(other.run_dir))
    return lines, alternatives


def suggest_elsewhere(run_dir: Path) -> str:
    """The remedy if a run that is still to be pushed has another run's repository."""
    again = shlex.join(["runner", "export", str(run_dir), "--push", "OWNER/NAME"])
    return f"`{again}` pushes {run_dir} elsewhere and leaves its repository to the other run"


def _list_pushed(output_root: Path) -> Iterator[OtherPush]:
    """The runs that were or will be pushed; runs with unreadable records are left out."""
    for path in list_push_paths(output_root):
        try:
            record = load_push(RunPaths(path.parent))
        except (CorruptFileError, OSError):
            continue
        if record is not None:
            yield OtherPush(path.parent, record)


def find_pushed_by_others(paths: RunPaths, repo_id: str) -> list[OtherPush]:
    """Other runs of the same output root that were or will be pushed to a repository."""
    pushed = _list_pushed(find_output_root(paths.run_dir))
    return _choose_others(pushed, repo_id.casefold(), {paths.run_dir.resolve()})


def _choose_others(pushed: Iterable[OtherPush], folded: str, own: Set[Path]) -> list[OtherPush]:
    """Those with one repository; the hub ignores case in names."""
    return [
        one
        for one in pushed
        if one.record.repo_id.casefold() == folded and one.run_dir.resolve() not in own
    ]


def _find_placeholders(planned: Sequence[PlannedPush]) -> Iterator[str]:
    by_owner: dict[str, list[PlannedPush]] = {}
    for one in planned:
        if (owner := find_placeholder(one.repo_id)) is not None:
            by_owner.setdefault(owner, []).append(one)
    for owner, runs in by_owner.items():
        names = _name(one.full_name for one in runs)
        yield f"{names}: `{owner}` in `hub_model_id: {runs[0].repo_id}` is a placeholder"


def _name(names: Iterable[str]) -> str:
    """The first few of several names, and the number of others.

    >>> _name(["a"]), _name(["a", "b"])
    ('a', 'a and b')
    """
    first, *more = names
    if not more:
        return first
    if len(more) < _NUM_SHOWN:
        return f"{', '.join([first, *more[:-1]])} and {more[-1]}"
    return f"{', '.join([first, *more[: _NUM_SHOWN - 2]])} and {len(more) - _NUM_SHOWN + 2} more"
