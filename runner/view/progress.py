"""Words and numbers of the live view: counts, speeds, time left, loss curves as text; pure.

Reads no files and does not depend on the terminal; `screen` assembles the view.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from runner.plan.status import RunStatus
from runner.recipe.parse import Recipe
from runner.recipe.schedule import derive_schedule
from runner.run.record import Progress
from runner.text import format_seconds

# Nothing more happens to these automatically; every other state, including unknown ones, is work
# left to do.
_AT_REST: Final = frozenset({"completed", "failed", "changed", "damaged", "unreadable"})
# States by urgency, if there is not room for all; the empty text represents every state not named
# here.
_URGENCY: Final = (
    "running",
    "failed",
    "unreadable",
    "damaged",
    "waiting",
    "interrupted",
    "changed",
    "",
    "queued",
    "pending",
    "completed",
)


@dataclass(frozen=True)
class Glyphs:
    """The symbols of states, bars and curves; a state not named here gets `unknown`."""

    states: Mapping[str, str]
    unknown: str
    bar: tuple[str, str]
    levels: str
    ellipsis: str

    def of(self, state: str) -> str:
        """One character."""
        return self.states.get(state, self.unknown)


UNICODE: Final = Glyphs(
    {
        "completed": "✓",
        "running": "▶",
        "failed": "✗",
        "waiting": "↻",
        "queued": "…",
        "interrupted": "‖",
        "changed": "≠",
        "damaged": "¤",
        "pending": "·",
    },
    unknown="?",
    bar=("█", "░"),
    levels="▁▂▃▄▅▆▇█",
    ellipsis="…",
)
ASCII: Final = Glyphs(
    {
        "completed": "+",
        "running": ">",
        "failed": "X",
        "waiting": "r",
        "queued": "q",
        "interrupted": "=",
        "changed": "!",
        "damaged": "%",
        "pending": ".",
    },
    unknown="?",
    bar=("#", "-"),
    levels="_.-=+*%#",
    ellipsis="~",
)


@dataclass(frozen=True)
class RunView:
    """Everything that the view shows about one run. `progress` and `losses` matter only while it
    runs.
    """

    recipe: Recipe
    status: RunStatus
    log_path: str | None = None  # of the last attempt
    hint: str | None = None
    retry: str | None = None  # when it is retried automatically
    progress: Progress | None = None
    losses: Sequence[float] = ()

    @property
    def full_name(self) -> str:
        """`<grid>/<run name>`."""
        return self.recipe.run.full_name

    @property
    def state(self) -> str:
        """`RunStatus.state`; any text, so that a new state needs no change here."""
        return "waiting" if self.retry is not None else self.status.state


def rank_urgency(state: str) -> int:
    """The rank of a state by urgency, most urgent first.

    >>> states = ["completed", "of another version", "running", "pending", "failed"]
    >>> sorted(states, key=rank_urgency)
    ['running', 'failed', 'of another version', 'pending', 'completed']
    """
    return _URGENCY.index(state if state in _URGENCY else "")


def is_left(state: str) -> bool:
    """True if a run is still to be done, or is running."""
    return state not in _AT_REST


def count_states(states: Iterable[str]) -> list[tuple[str, int]]:
    """Each state with its count: completed first, then by urgency.

    >>> count_states(["pending", "failed", "completed", "pending"])
    [('completed', 1), ('failed', 1), ('pending', 2)]
    """
    counts = Counter(states)
    return sorted(
        counts.items(), key=lambda item: (item[0] != "completed", rank_urgency(item[0]), item[0])
    )


@dataclass(frozen=True)
class TimeLeft:
    """Seconds until everything is done, as work and by the clock; None if unknown, with the reason
    in `why`.
    """

    work_seconds: float | None
    clock_seconds: float | None
    why: str = ""


class Speeds:
    """Seconds per trained row of each base model, so that steps of any batch size can be estimated.

    The median of completed runs, whose time includes start-up and evaluations. If a model has none,
    the median of the running ones. A run that has trained for a while knows its own speed, which
    takes precedence over both.
    """

    def __init__(self, views: Sequence[RunView]) -> None:
        finished: dict[str, list[float]] = {}
        running: dict[str, list[float]] = {}
        for view in views:
            status, batch = view.status, view.recipe.global_batch_size
            if status.state == "completed" and status.seconds and status.step:
                finished.setdefault(_model(view), []).append(status.seconds / status.step / batch)
            elif (
                status.state == "running"
                and view.progress is not None
                and view.progress.seconds_per_step
            ):
                running.setdefault(_model(view), []).append(view.progress.seconds_per_step / batch)
        self._per_row = {
            model: statistics.median(speeds) for model, speeds in (running | finished).items()
        }

    def seconds_left(self, view: RunView) -> float | None:
        """The seconds left for one run that is not done."""
        steps = count_steps_left(view)
        speed = self._per_row.get(_model(view))
        own = (
            view.progress.seconds_per_step
            if view.progress is not None and view.state == "running"
            else None
        )
        per_step = own or (None if speed is None else speed * view.recipe.global_batch_size)
        return None if steps is None or per_step is None else steps * per_step


def _model(view: RunView) -> str:
    return view.recipe.model.path


def count_steps_left(view: RunView) -> int | None:
    """The maximum number of optimizer steps that a run still has to make; it may stop early. None
    if the recipe does not determine it.
    """
    num_steps, recipe = view.status.max_steps, view.recipe
    if num_steps is None and (
        recipe.training.max_steps is not None or recipe.data.num_train_rows is not None
    ):
        num_steps = derive_schedule(recipe, recipe.data.num_train_rows or 0).num_updates
    return None if num_steps is None else max(0, num_steps - (view.status.step or 0))


def estimate_time_left(views: Sequence[RunView]) -> TimeLeft:
    """The seconds of all remaining work, divided by the number of running runs; at least those of
    the longest one.
    """
    left, speeds = [view for view in views if is_left(view.state)], Speeds(views)
    seconds = {view.full_name: speeds.seconds_left(view) for view in left}
    if unknown := next((view for view in left if seconds[view.full_name] is None), None):
        if count_steps_left(unknown) is None:
            return TimeLeft(None, None, f"{unknown.full_name} does not state its number of steps")
        return TimeLeft(None, None, f"the speed of {_model(unknown)} is not known yet")
    known = {name: value for name, value in seconds.items() if value is not None}
    running = [known[view.full_name] for view in left if view.state == "running"]
    total = sum(known.values())
    return TimeLeft(total, max(total / len(running), *running) if running else None)


def describe_time_left(left: TimeLeft, num_left: int) -> str:
    """One phrase.

    >>> describe_time_left(TimeLeft(7000, 3500), 3), describe_time_left(TimeLeft(7000, None), 3)
    ('about 58 min left', 'nothing runs; about 1 h 57 min of work left')
    """
    if num_left == 0:
        return "nothing left to do"
    if left.work_seconds is None:
        return f"time left unknown: {left.why}"
    if left.clock_seconds is None:
        return f"nothing runs; about {format_seconds(left.work_seconds)} of work left"
    return f"about {format_seconds(left.clock_seconds)} left"


def draw_curve(values: Sequence[float], width: int, levels: str = UNICODE.levels) -> str:
    """Values as a line of at most `width` bars, scaled between their minimum and maximum; several
    steps may share a bar.

    >>> draw_curve([4, 3, 2, 1, 1], 5), draw_curve([1, 1], 5), draw_curve([], 5)
    ('█▆▃▁▁', '▄▄', '')
    """
    finite = [value for value in values if math.isfinite(value)]
    num_bars = min(width, len(finite))
    if num_bars <= 0:
        return ""
    edges = [len(finite) * number // num_bars for number in range(num_bars + 1)]
    means = [statistics.fmean(finite[start:end]) for start, end in itertools.pairwise(edges)]
    least, span = min(means), max(means) - min(means)
    if span == 0:
        return levels[(len(levels) - 1) // 2] * num_bars
    return "".join(levels[round((mean - least) / span * (len(levels) - 1))] for mean in means)


def draw_bar(part: float, width: int, glyphs: Glyphs = UNICODE) -> str:
    """A bar of `width` characters, filled to a part between 0 and 1; full only if everything is
    done.

    >>> draw_bar(0.5, 6), draw_bar(0.999, 6), draw_bar(1, 6)
    ('███░░░', '█████░', '██████')
    """
    filled = min(width, max(0, math.floor(part * width)))
    return glyphs.bar[0] * filled + glyphs.bar[1] * (width - filled)
