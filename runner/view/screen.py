"""One screen of the live view as lines of styled text, cut to a size; pure.

What is running or failed is cut last. A grid of runs is drawn as a table of states, some of its
axes as columns and the others as rows. An axis with one value only, and an empty row, are left out.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from runner.plan.select import label_value
from runner.text import clean, cut, cut_middle, format_seconds, measure, pad
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
Key = tuple[str, ...]
_GAP: Final = 2
# Axis names, then values, are cut to these widths where nothing fits without it.
_CUTS: Final = (
    (1000, 1000),
    (20, 1000),
    (12, 1000),
    (12, 20),
    (8, 12),
    (6, 12),
    (6, 8),
    (4, 8),
    (4, 6),
)


@dataclass(frozen=True)
class _Shape:
    """One way to lay a grid out: the axes that are columns, all columns and rows that have a run,
    and the size.
    """

    column_axes: tuple[int, ...]
    row_axes: tuple[int, ...]
    columns: tuple[Key, ...]
    rows: tuple[Key, ...]
    label_widths: tuple[int, ...]  # of the row labels
    name_width: int  # of the names of the column axes
    cell_width: int
    width: int

    @property
    def num_header_lines(self) -> int:
        return max(1, len(self.column_axes))

    @property
    def num_lines(self) -> int:
        return self.num_header_lines + len(self.rows)


class GridTable:
    """The table of one grid; its axes stay, the states change."""

    def __init__(self, views: Sequence[RunView], glyphs: Glyphs = UNICODE) -> None:
        self._glyphs = glyphs
        axes = list(dict.fromkeys(name for view in views for name in view.recipe.run.axes))
        values = {axis: _order([view.recipe.run.axes.get(axis) for view in views]) for axis in axes}
        self.title = "  ".join(
            f"{axis} {found[0]}" for axis, found in values.items() if len(found) == 1
        )
        self._axes = [axis for axis, found in values.items() if len(found) > 1]
        self._keys = {view.full_name: self._key(view) for view in views}
        if not self._axes:  # nothing tells the runs apart but their names
            self._axes = ["run"]
            self._keys = {view.full_name: (view.recipe.run.name,) for view in views}
        self._ranks = [
            {
                label: place
                for place, label in enumerate(values[axis] if axis in values else self._names())
            }
            for axis in self._axes
        ]
        self._cell_width = 1 if len(set(self._keys.values())) == len(self._keys) else 3
        numbers = range(len(self._axes))
        subsets = [
            chosen
            for count in range(len(self._axes) + 1)
            for chosen in itertools.combinations(numbers, count)
        ]
        if len(self._axes) > 6:  # not every way to halve more axes: the last few as columns
            subsets = [tuple(numbers)[start:] for start in numbers] + [()]
        names = [measure(axis) for axis in self._axes]
        labels = [max(measure(key[number]) for key in self._keys.values()) for number in numbers]
        self._shapes = [
            (place, shape)
            for chosen in subsets
            for place, shape in enumerate(self._list_shapes(chosen, names, labels))
        ]

    def _names(self) -> list[str]:
        return [key[0] for key in self._keys.values()]

    def _key(self, view: RunView) -> Key:
        return tuple(_label(view.recipe.run.axes.get(axis)) for axis in self._axes)

    def _list_shapes(
        self, column_axes: tuple[int, ...], names: list[int], labels: list[int]
    ) -> Iterator[_Shape]:
        """These axes as columns, once per way to cut; `names` and `labels`: the widths of each axis
        and its values.
        """
        row_axes = tuple(number for number in range(len(self._axes)) if number not in column_axes)
        columns, rows = self._list_keys(column_axes), self._list_keys(row_axes)
        spans = {
            (measure(label), span)
            for depth in range(len(column_axes))
            for label, span in _spans(columns, depth)
        }
        for max_name, max_label in _CUTS:
            widths = tuple(
                max(min(max_name, names[axis]), min(max_label, labels[axis])) for axis in row_axes
            )
            cell = max(
                [
                    self._cell_width,
                    *(-(-(min(max_label, label) + _GAP) // span) - _GAP for label, span in spans),
                ]
            )
            name_width = min(max_name, max([0, *(names[axis] for axis in column_axes)]))
            width = sum(width + _GAP for width in widths) + (
                name_width + _GAP if column_axes else 0
            )
            width += len(columns) * (cell + _GAP) - _GAP
            yield _Shape(column_axes, row_axes, columns, rows, widths, name_width, cell, width)

    def _list_keys(self, axes: tuple[int, ...]) -> tuple[Key, ...]:
        """The combinations of values that some run has, in the order of the axes' values."""
        found = {tuple(key[axis] for axis in axes) for key in self._keys.values()}
        return tuple(
            sorted(
                found,
                key=lambda key: [
                    self._ranks[axis][label] for axis, label in zip(axes, key, strict=True)
                ],
            )
        )

    def choose(self, width: int, height: int) -> _Shape:
        """What fits, with as few axes in the columns as fit, then with as few lines; a table has
        rows and columns.
        """

        def cost(candidate: tuple[int, _Shape]) -> tuple[int, ...]:
            how_cut, shape = candidate
            is_flat = len(self._axes) > 1 and not (shape.column_axes and shape.row_axes)
            too_wide, too_high = max(0, shape.width - width), max(0, shape.num_lines - height)
            has_no_room = shape.num_header_lines >= height
            return (
                too_wide,
                has_no_room,
                too_high,
                how_cut,
                is_flat,
                len(shape.column_axes),
                shape.num_lines,
                shape.width,
            )

        return min(self._shapes, key=cost)[1]

    def draw(self, views: Sequence[RunView], width: int, height: int) -> list[Line]:
        """At most `height` lines of at most `width` columns; rows that are hidden are counted in
        the last.
        """
        if height <= 0:
            return []
        shape = self.choose(width, height)
        cells: dict[tuple[Key, Key], list[str]] = {}
        for view in views:
            key = self._keys[view.full_name]
            row, column = (
                tuple(key[axis] for axis in axes) for axes in (shape.row_axes, shape.column_axes)
            )
            cells.setdefault((row, column), []).append(view.state)
        states = {
            row: [state for column in shape.columns for state in cells.get((row, column), ())]
            for row in shape.rows
        }
        room = height - shape.num_header_lines
        kept = set(shape.rows)
        if len(kept) > room:
            urgent = sorted(shape.rows, key=lambda row: min(map(rank_urgency, states[row])))
            kept = set(urgent[: max(0, room - 1)])
        lines = self._draw_header(shape) if room > 0 else []
        hidden = [row for row in shape.rows if row not in kept]
        previous: Key = ("",) * len(shape.row_axes)
        for row in (row for row in shape.rows if row in kept):
            lines.append(self._draw_row(shape, row, previous, cells))
            previous = row
        if hidden:
            counts = count_states(state for row in hidden for state in states[row])
            counted = ", ".join(f"{count} {state}" for state, count in counts)
            lines.append(((f"{self._glyphs.ellipsis} {len(hidden)} more rows: {counted}", "dim"),))
        return [cut_line(line, width, self._glyphs.ellipsis) for line in lines[:height]]

    def _draw_header(self, shape: _Shape) -> list[Line]:
        lines: list[Line] = []
        for depth in range(shape.num_header_lines):
            is_last = depth == shape.num_header_lines - 1
            labels = [
                (self._axes[axis] if is_last else "", width)
                for axis, width in zip(shape.row_axes, shape.label_widths, strict=True)
            ]
            if shape.column_axes:
                labels.append((self._axes[shape.column_axes[depth]], shape.name_width))
                labels += [
                    (label, span * (shape.cell_width + _GAP) - _GAP)
                    for label, span in _spans(shape.columns, depth)
                ]
            lines.append(
                (("".join(self._pad(label, width) for label, width in labels).rstrip(), "dim"),)
            )
        return lines

    def _pad(self, text: str, width: int) -> str:
        return pad(cut_middle(text, width, self._glyphs.ellipsis), width) + " " * _GAP

    def _draw_row(
        self, shape: _Shape, row: Key, previous: Key, cells: dict[tuple[Key, Key], list[str]]
    ) -> Line:
        parts: list[tuple[str, str]] = []
        is_repeated = True
        for label, before, width in zip(row, previous, shape.label_widths, strict=True):
            is_repeated = is_repeated and label == before
            parts.append((self._pad("" if is_repeated else label, width), ""))
        if shape.column_axes:
            parts.append((self._pad("", shape.name_width), ""))
        for column in shape.columns:
            text, style = self._draw_cell(cells.get((row, column), []))
            parts.append((self._pad(text, shape.cell_width), style))
        return tuple(parts)

    def _draw_cell(self, states: Sequence[str]) -> tuple[str, str]:
        if not states:
            return "", ""
        state = min(states, key=rank_urgency)
        return self._glyphs.of(state) + (str(len(states)) if len(states) > 1 else ""), state


def _spans(columns: Sequence[Key], depth: int) -> list[tuple[str, int]]:
    """The labels of one header line with the number of columns below each."""
    return [
        (prefix[-1], sum(1 for _ in group))
        for prefix, group in itertools.groupby(columns, key=lambda column: column[: depth + 1])
    ]


def _order(values: Sequence[object]) -> list[str]:
    """Distinct labels: numbers by size, anything else as it comes."""
    labels = {_label(value): value for value in values}
    if all(
        isinstance(value, int | float) and not isinstance(value, bool) for value in labels.values()
    ):
        return sorted(labels, key=float)
    return list(labels)


def _label(value: object) -> str:
    return "-" if value is None else clean(label_value(value))


def cut_line(line: Line, width: int, ellipsis: str) -> Line:
    """A line of at most `width` columns, without spaces at its end."""
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


# Of a table: a higher one gets more axes as columns, also where there is room.
_USUAL_HEIGHT: Final = 24
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
            grid: GridTable([view for view in views if view.recipe.run.grid == grid], glyphs)
            for grid in grids
        }

    def draw(
        self, views: Sequence[RunView], *, width: int, height: int | None, now: str
    ) -> list[Line]:
        """The lines of one screen, `height` at most; None: as many as there is to say."""
        head = self._draw_head(views, width, now)
        running = [view for view in views if view.state == "running"]
        troubles = group_troubles(views)
        needs = [
            len(running),
            sum(self._num_table_lines(grid, width) for grid in self._tables),
            3 * len(troubles),
        ]
        room = (
            sum(needs) if height is None else height - len(head) - sum(need > 0 for need in needs)
        )
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
                text = (
                    draw_curve(view.losses, curve, self._glyphs.levels)
                    if name == "curve"
                    else row[name]
                )
                parts.append(
                    (
                        pad(text, curve if name == "curve" else widths[name]) + "  ",
                        _STYLES.get(name, ""),
                    )
                )
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
            blocks[-hidden:] = [
                [((f"{self._glyphs.ellipsis} {num_runs} more runs need a look", "dim"),)]
            ]
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
    """Runs that somebody should look at for the same reason."""

    what: str
    views: Sequence[RunView]


def group_troubles(views: Sequence[RunView]) -> list[Trouble]:
    """What failed, waits for another try or cannot be judged; the most urgent first, alike ones
    together.
    """
    found: dict[tuple[str, str], list[RunView]] = {}
    for view in views:
        if view.state in _SILENT or (view.state == "interrupted" and view.status.failure is None):
            continue
        found.setdefault((view.state, clean(view.status.why.partition("\n")[0])), []).append(view)
    ordered = sorted(found.items(), key=lambda item: rank_urgency(item[0][0]))
    return [Trouble(what, group) for (_, what), group in ordered]


def share_lines(room: int, needs: Sequence[int]) -> list[int]:
    """Lines for each section: what it needs where there is room, else a fair part; what one leaves
    the others get.

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
