"""One screen of the live view as lines of styled text, cut to a size; pure.

Running and failed runs are cut last. A grid of runs is drawn as a table of states: its last axis
forms the columns, or as many of its last axes as make the table fit; the others form the rows. Axes
with only one value, and empty rows, are left out.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from runner.plan.select import label_value
from runner.text import clean, cut, cut_middle, fill, format_count, format_seconds, measure, pad
from runner.view.progress import (
    UNICODE,
    Glyphs,
    RunView,
    Speeds,
    count_states,
    describe_time_left,
    draw_bar,
    draw_curve,
    estimate_time_left,
    is_left,
    rank_urgency,
)

Line = tuple[tuple[str, str], ...]  # (text, style): a state's name, "dim", "bold" or ""
Key = tuple[int, ...]  # for each axis, the index of a value among its values
_GAP: Final = 2
# Maximum widths of axis names and of values, tried in order until the table fits.
_CUTS: Final = ((1000, 1000), (12, 1000), (12, 20), (12, 12), (8, 12), (8, 8), (6, 8), (4, 6))


@dataclass(frozen=True)
class _Layout:
    """The first axes as rows and the others as columns; rows and columns without a run are left
    out.
    """

    row_axes: list[str]
    column_axes: list[str]
    rows: list[Key]
    columns: list[Key]
    header: list[list[tuple[str, int]]]  # per column axis: labels, and the columns below each
    label_widths: list[int]  # of the row axes
    cell_width: int

    @property
    def num_header_lines(self) -> int:
        return len(self.column_axes) + 1

    @property
    def num_lines(self) -> int:
        return self.num_header_lines + len(self.rows)

    @property
    def label_width(self) -> int:
        """The width of all row labels of a line, and of the column axis names above them."""
        return sum(self.label_widths) + (len(self.label_widths) - 1) * _GAP

    @property
    def width(self) -> int:
        return self.label_width + len(self.columns) * (_GAP + self.cell_width)


class GridTable:
    """The table of one grid; the axes are fixed, the states change."""

    def __init__(self, views: Sequence[RunView], glyphs: Glyphs = UNICODE) -> None:
        self._glyphs = glyphs
        self._labels: dict[str, list[str]] = {}  # of each axis with several values
        single = []
        for axis in dict.fromkeys(axis for view in views for axis in view.recipe.run.axes):
            labels = _order([view.recipe.run.axes.get(axis) for view in views])
            if len(labels) > 1:
                self._labels[axis] = labels
            else:
                single.append(f"{axis} {labels[0]}")
        self.title = "  ".join(single)
        self._keys = {view.full_name: self._find_key(view) for view in views}
        if not self._labels:  # the runs differ only in name
            self._labels["run"] = [view.recipe.run.name for view in views]
            self._keys = {view.full_name: (place,) for place, view in enumerate(views)}
        num_axes = len(self._labels)
        # The layout with all axes as rows is the narrowest, so it is the last resort.
        splits = [*range(num_axes - 1, 0, -1), num_axes]
        self._layouts = [self._lay_out(split, *cut) for cut in _CUTS for split in splits]

    def _find_key(self, view: RunView) -> Key:
        axes = view.recipe.run.axes
        return tuple(labels.index(_label(axes.get(axis))) for axis, labels in self._labels.items())

    def _lay_out(self, split: int, max_name: int, max_label: int) -> _Layout:
        """The axes before `split` as rows; longer names and labels are cut."""
        axes, keys = list(self._labels), set(self._keys.values())
        rows = sorted({key[:split] for key in keys})
        columns = sorted({key[split:] for key in keys})
        widths = []
        for axis in axes[:split]:
            longest = max(map(measure, self._labels[axis]))
            widths.append(max(min(max_name, measure(axis)), min(max_label, longest)))
        # The names of the column axes are written above the row labels.
        longest = max(map(measure, axes[split:]), default=0)
        widths[-1] += max(0, min(max_name, longest) - sum(widths) - (len(widths) - 1) * _GAP)
        header = []
        cell_width = 1 if len(keys) == len(self._keys) else 3  # a mark, and a number of runs
        for depth, axis in enumerate(axes[split:], 1):
            spans = Counter(column[:depth] for column in columns)  # in the order of the columns
            header.append([(self._labels[axis][key[-1]], span) for key, span in spans.items()])
            for label, span in header[-1]:
                needed = math.ceil((min(max_label, measure(label)) + _GAP) / span)
                cell_width = max(cell_width, needed - _GAP)
        return _Layout(axes[:split], axes[split:], rows, columns, header, widths, cell_width)

    def choose(self, width: int, height: int) -> _Layout:
        """The first layout that fits, otherwise the one that comes closest: hidden rows are
        counted, hidden columns are not.
        """

        def measure_excess(layout: _Layout) -> tuple[int, bool, int]:
            too_wide, too_high = layout.width - width, layout.num_lines - height
            # If others are hidden, a row needs another line for their count.
            has_no_row = layout.num_header_lines + min(2, len(layout.rows)) > height
            return max(0, too_wide), has_no_row, max(0, too_high)

        return min(self._layouts, key=measure_excess)

    def draw(self, views: Sequence[RunView], width: int, height: int) -> list[Line]:
        """At most `height` lines of at most `width` columns; the last line counts the
        hidden rows.
        """
        if height <= 0:
            return []
        layout = self.choose(width, height)
        split = len(layout.row_axes)
        cells: dict[Key, dict[Key, list[str]]] = {row: {} for row in layout.rows}
        for view in views:
            key = self._keys[view.full_name]
            cells[key[:split]].setdefault(key[split:], []).append(view.state)
        states = {row: list(itertools.chain(*found.values())) for row, found in cells.items()}
        room = height - layout.num_header_lines
        hidden: list[Key] = []
        if len(cells) > room:
            urgent = sorted(cells, key=lambda row: min(map(rank_urgency, states[row])))
            hidden = urgent[max(0, room - 1) :]
        lines = self._draw_header(layout) if room > 0 else []
        previous: Key = ()
        for row in sorted(cells.keys() - set(hidden)):
            lines.append(self._draw_row(layout, row, previous, cells[row]))
            previous = row
        if hidden:
            counts = count_states(state for row in hidden for state in states[row])
            counted = ", ".join(f"{count} {state}" for state, count in counts)
            more = format_count(len(hidden), "more row")
            lines.append(((f"{self._glyphs.ellipsis} {more}: {counted}", "dim"),))
        return [cut_line(line, width, self._glyphs.ellipsis) for line in lines]

    def _draw_header(self, layout: _Layout) -> list[Line]:
        """A line for each column axis with its name and labels, then the names of the row axes."""
        lines: list[Line] = []
        for axis, spans in zip(layout.column_axes, layout.header, strict=True):
            name = cut_middle(axis, layout.label_width, self._glyphs.ellipsis)
            text = fill(name, layout.label_width, is_right=True) + " " * _GAP
            for label, span in spans:
                text += self._pad(label, span * (layout.cell_width + _GAP) - _GAP)
            lines.append(((text, "dim"),))
        names = map(self._pad, layout.row_axes, layout.label_widths)
        return [*lines, (("".join(names), "dim"),)]

    def _draw_row(
        self, layout: _Layout, row: Key, previous: Key, cells: Mapping[Key, Sequence[str]]
    ) -> Line:
        """The labels that differ from the row above, and a mark for each column."""
        labels = [""] * len(row)
        for depth, axis in enumerate(layout.row_axes):
            if row[: depth + 1] != previous[: depth + 1]:
                labels[depth] = self._labels[axis][row[depth]]
        parts = [("".join(map(self._pad, labels, layout.label_widths)), "")]
        for column in layout.columns:
            text, style = self._draw_cell(cells.get(column, ()))
            parts.append((self._pad(text, layout.cell_width), style))
        return tuple(parts)

    def _draw_cell(self, states: Sequence[str]) -> tuple[str, str]:
        if not states:
            return "", ""
        state = min(states, key=rank_urgency)
        return self._glyphs.of(state) + (str(len(states)) if len(states) > 1 else ""), state

    def _pad(self, text: str, width: int) -> str:
        return pad(cut_middle(text, width, self._glyphs.ellipsis), width) + " " * _GAP


def _order(values: Sequence[object]) -> list[str]:
    """Distinct labels: numbers by size, anything else in order of appearance."""
    labels = {_label(value): value for value in values}
    if all(
        isinstance(value, int | float) and not isinstance(value, bool) for value in labels.values()
    ):
        return sorted(labels, key=float)
    return list(labels)


def _label(value: object) -> str:
    return "-" if value is None else clean(label_value(value))


def cut_line(line: Line, width: int, ellipsis: str) -> Line:
    """A line of at most `width` columns, without trailing spaces."""
    parts: list[tuple[str, str]] = []
    for text, style in line:
        if measure(text) > width:
            parts.append((cut(text.rstrip(), width, ellipsis), style))
            break
        parts.append((text, style))
        width -= measure(text)
    while parts and not parts[-1][0].strip():
        parts.pop()
    if parts:
        parts[-1] = (parts[-1][0].rstrip(), parts[-1][1])
    return tuple(parts)


# Maximum height of a table: a higher one gets more axes as columns, even if there is room.
_USUAL_HEIGHT: Final = 24
_MAX_CURVE: Final = 30
_MIN_CURVE: Final = 6
# Columns that a narrow screen omits, in this order.
_DROPPED: Final = ("bar", "curve", "speed", "phase", "left")
# States that the grid shows completely.
_SILENT: Final = frozenset({"completed", "running", "pending", "queued"})


class Screen:
    """The view of a fixed set of runs."""

    def __init__(self, views: Sequence[RunView], glyphs: Glyphs = UNICODE) -> None:
        self._glyphs = glyphs
        grids: dict[str, list[RunView]] = {}
        for view in views:
            grids.setdefault(view.recipe.run.grid, []).append(view)
        self._tables = {grid: GridTable(own, glyphs) for grid, own in grids.items()}

    def draw(
        self, views: Sequence[RunView], *, width: int, height: int | None, now: str
    ) -> list[Line]:
        """The lines of one screen, at most `height`; None: as many as needed."""
        head = self._draw_head(views, width, now)
        running = [view for view in views if view.state == "running"]
        troubles = group_troubles(views)
        num_table_lines = sum(self._num_table_lines(grid, width) for grid in self._tables)
        needs = [len(running), num_table_lines, 3 * len(troubles)]
        blank_lines: list[Line] = [()]
        if height is None:
            room = sum(needs)
        else:
            room = height - len(head) - sum(need > 0 for need in needs)
            if len(running) + num_table_lines + len(troubles) > room:
                # There is not a line for each: blank lines and the hints of troubles are left out
                # first.
                blank_lines, needs[2] = [], len(troubles)
                room = height - len(head)
        shares = share_lines(room, needs)
        sections = [
            self._draw_running(running, Speeds(views), width, shares[0]),
            self._draw_tables(views, width, shares[1]),
            self._draw_troubles(troubles, width, shares[2]),
        ]
        lines = head
        for section in sections:
            if section:
                lines += [*blank_lines, *section]
        return [cut_line(line, width, self._glyphs.ellipsis) for line in lines[:height]]

    def _draw_head(self, views: Sequence[RunView], width: int, now: str) -> list[Line]:
        grids = ", ".join(self._tables)
        title = f"{grids}: {len(views)} runs" if len(views) != 1 else views[0].full_name
        counts = count_states(view.state for view in views)
        legend = [
            (f"{self._glyphs.of(state)} {clean(state)} {count}   ", state)
            for state, count in counts
        ]
        legend_lines: list[list[tuple[str, str]]] = [[]]
        for part in legend:
            if (
                legend_lines[-1]
                and sum(measure(text) for text, _ in (*legend_lines[-1], part)) > width + 3
            ):
                legend_lines.append([])
            legend_lines[-1].append(part)
        parts = [1.0 if view.state == "completed" else _part_done(view) for view in views]
        num_completed = sum(view.state == "completed" for view in views)
        left = describe_time_left(
            estimate_time_left(views), sum(is_left(view.state) for view in views)
        )
        said = f"  {num_completed}/{len(views)} completed, {left}"
        bar = draw_bar(
            sum(parts) / max(1, len(parts)), max(10, min(40, width - measure(said))), self._glyphs
        )
        title = cut(title, width - measure(now) - 2, self._glyphs.ellipsis)
        return [
            ((pad(title, max(0, width - measure(now))), "bold"), (now, "dim")),
            *map(tuple, legend_lines),
            ((bar, "completed"), (said, "")),
        ]

    def _draw_running(
        self, views: Sequence[RunView], speeds: Speeds, width: int, height: int
    ) -> list[Line]:
        shown = views if len(views) <= height else views[: max(0, height - 1)]
        rows = [self._describe_running(view, speeds) for view in shown]
        widths = {}
        for name in rows[0] if rows else ():
            widths[name] = max(measure(row[name]) for row in rows)
        columns = [name for name, needed in widths.items() if needed > 0]
        curve = 0
        for dropped in (None, *_DROPPED):
            if dropped in columns:
                columns.remove(dropped)
            fixed = sum(widths[name] + 2 for name in columns if name != "curve")
            curve = min(_MAX_CURVE, width - fixed - 2) if "curve" in columns else 0
            if fixed <= width and ("curve" not in columns or curve >= _MIN_CURVE):
                break
        widths["curve"] = curve
        lines: list[Line] = []
        for view, row in zip(shown, rows, strict=True):
            row["curve"] = draw_curve(view.losses, curve, self._glyphs.levels)
            parts = [(f"{self._glyphs.of('running')} ", "running")]
            for name in columns:
                parts.append((pad(row[name], widths[name]) + "  ", _STYLES.get(name, "")))
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
        for (grid, table), share in zip(
            self._tables.items(), share_lines(height, needs), strict=True
        ):
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
            need = f"{format_count(num_runs, 'more run')} need{'s' if num_runs == 1 else ''}"
            blocks[-hidden:] = [[((f"{self._glyphs.ellipsis} {need} attention", "dim"),)]]
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


_STYLES: Final = {
    "name": "bold",
    "phase": "dim",
    "bar": "running",
    "curve": "running",
    "left": "dim",
}


@dataclass(frozen=True)
class Trouble:
    """Runs that need attention for the same reason."""

    what: str
    views: Sequence[RunView]


def group_troubles(views: Sequence[RunView]) -> list[Trouble]:
    """Runs that failed, wait for a retry, cannot be judged, or have inputs or a push that need
    attention; the most urgent first, grouped by reason.
    """
    found: dict[tuple[str, str], list[RunView]] = {}
    for view in views:
        status = view.status
        is_trouble = view.state not in _SILENT and (
            view.state != "interrupted" or status.failure is not None
        )
        is_noted = bool(status.inputs_missing or status.inputs_touched or status.push_note)
        if not is_trouble and not is_noted:
            continue
        why = status.why.partition("\n")[0] if is_trouble else ""
        what = clean("; ".join(filter(None, (why, status.notes))))
        found.setdefault((view.state, what), []).append(view)
    ordered = sorted(found.items(), key=lambda item: rank_urgency(item[0][0]))
    return [Trouble(what, group) for (_, what), group in ordered]


def share_lines(room: int, needs: Sequence[int]) -> list[int]:
    """Lines for each section: the number it needs if there is room, otherwise a fair share; unused
    lines go to the others.

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
