"""Pure: one screen of the live view as lines of styled text, cut to a size; what is running or failed is cut last."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from runner.watch_model import (
    UNICODE,
    Glyphs,
    RunView,
    Speeds,
    clean,
    count_states,
    cut,
    describe_time_left,
    draw_bar,
    draw_curve,
    estimate_time_left,
    format_seconds,
    is_left,
    measure,
    pad,
    rank_urgency,
)
from runner.watch_table import GridTable, Line, cut_line

_USUAL_HEIGHT: Final = 24  # of a table: a higher one gets more axes as columns, also where there is room
_MAX_CURVE: Final = 30
_MIN_CURVE: Final = 6
# What a narrow screen does without, in this order.
_DROPPED: Final = ("bar", "curve", "speed", "phase", "left")
# States that the grid says all about.
_SILENT: Final = frozenset({"completed", "running", "pending", "queued"})


class Screen:
    """The view of a fixed set of runs."""

    def __init__(self, views: Sequence[RunView], glyphs: Glyphs = UNICODE) -> None:
        self._glyphs = glyphs
        grids = dict.fromkeys(view.recipe.run.grid for view in views)
        self._tables = {
            grid: GridTable([view for view in views if view.recipe.run.grid == grid], glyphs) for grid in grids
        }

    def draw(self, views: Sequence[RunView], *, width: int, height: int | None, now: str) -> list[Line]:
        """The lines of one screen, `height` at most; None: as many as there is to say."""
        head = self._draw_head(views, width, now)
        running = [view for view in views if view.state == "running"]
        troubles = group_troubles(views)
        needs = [len(running), sum(self._num_table_lines(grid, width) for grid in self._tables), 3 * len(troubles)]
        room = sum(needs) if height is None else height - len(head) - sum(need > 0 for need in needs)
        shares = share_lines(room, needs)
        sections = [
            self._draw_running(running, Speeds(views), width, shares[0]),
            self._draw_tables(views, width, shares[1]),
            self._draw_troubles(troubles, width, shares[2]),
        ]
        lines = [*head, *(line for section in sections if section for line in ((), *section))]
        return [cut_line(line, width, self._glyphs.ellipsis) for line in lines[:height]]

    def _draw_head(self, views: Sequence[RunView], width: int, now: str) -> list[Line]:
        grids = ", ".join(self._tables)
        title = f"{grids}: {len(views)} runs" if len(views) != 1 else views[0].full_name
        counts = count_states(view.state for view in views)
        legend = [(f"{self._glyphs.of(state)} {clean(state)} {count}   ", state) for state, count in counts]
        legend_lines: list[list[tuple[str, str]]] = [[]]
        for part in legend:
            if legend_lines[-1] and sum(measure(text) for text, _ in (*legend_lines[-1], part)) > width + 3:
                legend_lines.append([])
            legend_lines[-1].append(part)
        parts = [1.0 if view.state == "completed" else _part_done(view) for view in views]
        num_completed = sum(view.state == "completed" for view in views)
        left = describe_time_left(estimate_time_left(views), sum(is_left(view.state) for view in views))
        said = f"  {num_completed}/{len(views)} completed, {left}"
        bar = draw_bar(sum(parts) / max(1, len(parts)), max(10, min(40, width - measure(said))), self._glyphs)
        title = cut(title, width - measure(now) - 2, self._glyphs.ellipsis)
        return [
            ((pad(title, max(0, width - measure(now))), "bold"), (now, "dim")),
            *map(tuple, legend_lines),
            ((bar, "completed"), (said, "")),
        ]

    def _draw_running(self, views: Sequence[RunView], speeds: Speeds, width: int, height: int) -> list[Line]:
        shown = views if len(views) <= height else views[: max(0, height - 1)]
        rows = [self._describe_running(view, speeds) for view in shown]
        columns = [name for name in (rows[0] if rows else ()) if any(row[name] for row in rows)]
        widths = {name: max(measure(row[name]) for row in rows) for name in columns}
        curve = 0
        for dropped in (None, *_DROPPED):
            if dropped in columns:
                columns.remove(dropped)
            fixed = sum(widths[name] + 2 for name in columns if name != "curve")
            curve = min(_MAX_CURVE, width - fixed - 2) if "curve" in columns else 0
            if fixed <= width and ("curve" not in columns or curve >= _MIN_CURVE):
                break
        lines: list[Line] = []
        for view, row in zip(shown, rows, strict=True):
            parts = [(f"{self._glyphs.of('running')} ", "running")]
            for name in columns:
                text = draw_curve(view.losses, curve, self._glyphs.levels) if name == "curve" else row[name]
                parts.append((pad(text, curve if name == "curve" else widths[name]) + "  ", _STYLES.get(name, "")))
            lines.append(tuple(parts))
        if hidden := len(views) - len(shown):
            lines.append(((f"{self._glyphs.ellipsis} {hidden} more running", "dim"),))
        return lines[:height]

    def _describe_running(self, view: RunView, speeds: Speeds) -> dict[str, str]:
        status, progress = view.status, view.progress
        is_training = progress is not None and progress.phase == "training"
        attempt = f", attempt {status.num_attempts}" if status.num_attempts > 1 else ""
        left = speeds.seconds_left(view)
        rate = progress.tokens_per_second if progress is not None and is_training else None
        return {
            "name": self._name(view),
            "phase": clean(status.why) + attempt,
            "bar": draw_bar(_part_done(view), 10, self._glyphs) if status.max_steps else "",
            "step": "" if status.max_steps is None else f"{status.step or 0}/{status.max_steps}",
            "speed": "" if rate is None else f"{rate:,.0f} tok/s",
            "loss": "" if status.loss is None else f"loss {status.loss:.4f}",
            "curve": "x" if view.losses else "",
            "left": "" if left is None else f"{format_seconds(left)} left",
        }

    def _name(self, view: RunView) -> str:
        return clean(view.full_name if len(self._tables) > 1 else view.recipe.run.name)

    def _num_table_lines(self, grid: str, width: int) -> int:
        table = self._tables[grid]
        return table.choose(width, _USUAL_HEIGHT).num_lines + (1 if self._is_titled(grid) else 0)

    def _is_titled(self, grid: str) -> bool:
        return len(self._tables) > 1 or bool(self._tables[grid].title)

    def _draw_tables(self, views: Sequence[RunView], width: int, height: int) -> list[Line]:
        needs = [self._num_table_lines(grid, width) for grid in self._tables]
        lines: list[Line] = []
        for (grid, table), share in zip(self._tables.items(), share_lines(height, needs), strict=True):
            own = [view for view in views if view.recipe.run.grid == grid]
            if self._is_titled(grid) and share > 1:
                lines.append(((f"{clean(grid)}  ", "bold"), (clean(table.title), "dim")))
                share -= 1
            lines += table.draw(own, width, share)
        return lines

    def _draw_troubles(self, troubles: Sequence[Trouble], width: int, height: int) -> list[Line]:
        blocks = [self._describe_trouble(trouble, width) for trouble in troubles]
        if sum(map(len, blocks)) > height:
            blocks = [block[:1] for block in blocks]
        if hidden := max(0, len(blocks) - height):
            hidden += 1
            num_runs = sum(len(trouble.views) for trouble in troubles[-hidden:])
            blocks[-hidden:] = [[((f"{self._glyphs.ellipsis} {num_runs} more runs need a look", "dim"),)]]
        return [line for block in blocks for line in block][:height]

    def _describe_trouble(self, trouble: Trouble, width: int) -> list[Line]:
        first = trouble.views[0]
        more = f" and {len(trouble.views) - 1} more" if len(trouble.views) > 1 else ""
        name = f"{self._glyphs.of(first.state)} {self._name(first)}{more}  "
        lines: list[Line] = [((name, first.state), (trouble.what, ""))]
        if first.retry is not None:
            lines.append(((f"    {clean(first.retry)}", "dim"),))
        elif first.hint:
            lines.append(((f"    hint: {clean(first.hint)}", "dim"),))
        if first.log_path and first.status.failure is not None:
            lines.append(((f"    log: {clean(first.log_path)}", "dim"),))
        return lines


_STYLES: Final = {"name": "bold", "phase": "dim", "bar": "running", "curve": "running", "left": "dim"}


@dataclass(frozen=True)
class Trouble:
    """Runs that somebody should look at for the same reason."""

    what: str
    views: Sequence[RunView]


def group_troubles(views: Sequence[RunView]) -> list[Trouble]:
    """What failed, waits for another try or cannot be judged; the most urgent first, alike ones together."""
    found: dict[tuple[str, str], list[RunView]] = {}
    for view in views:
        if view.state in _SILENT or (view.state == "interrupted" and view.status.failure is None):
            continue
        found.setdefault((view.state, clean(view.status.why.partition("\n")[0])), []).append(view)
    ordered = sorted(found.items(), key=lambda item: rank_urgency(item[0][0]))
    return [Trouble(what, group) for (_, what), group in ordered]


def share_lines(room: int, needs: Sequence[int]) -> list[int]:
    """Lines for each section: what it needs where there is room, else a fair part; what one leaves the others get.

    >>> share_lines(20, [4, 8, 3]), share_lines(10, [2, 50, 9]), share_lines(-1, [3])
    ([4, 8, 3], [2, 4, 4], [0])
    """
    shares = [0] * len(needs)
    room = max(0, min(room, sum(needs)))
    while room > 0:
        for place, need in enumerate(needs):
            if shares[place] < need and room > 0:
                shares[place] += 1
                room -= 1
    return shares


def _part_done(view: RunView) -> float:
    return (view.status.step or 0) / view.status.max_steps if view.status.max_steps else 0.0
