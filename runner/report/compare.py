"""The equality certificate of two arms: the facts that are equal by hash, differ, or were not
recorded.

An arm is one run, or all runs with one value of an axis. The certificate is a pure function of the
rows of a report; differences of scores are in `difference`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

from runner.report.certificate_facts import (
    ROW_ORDER,
    SOURCE_STATES,
    TRAINED_TOKENS,
    UPDATES,
    Fact,
    Section,
    list_facts,
)
from runner.report.rows import ReportRow, axis_key, axis_text
from runner.report.wording import describe_version, name_library
from runner.text import cut_middle

# close: different numbers that are equal within the precision of their dtype
Status = Literal["equal", "close", "differs", "not recorded"]
Pair = tuple[ReportRow, ReportRow]
HASH_CHARACTERS: Final = 12
MAX_VALUE: Final = 60  # characters of a value; a prompt may be long
ABSENT: Final = "(absent)"
VARIOUS: Final = "(varies from pair to pair)"
SEEDS: Final = "the seeds"
OWN_SEEDS: Final = "seeds of their own"  # two runs with one number on the axis seed
SAME_SOURCE: Final = "the runner's source is the same"


@dataclass(frozen=True)
class CertificateLine:
    """One recipe key or fact, compared in every pair of runs."""

    section: Section
    what: str  # a dotted recipe key, or the name of the fact
    status: Status
    # Value of each arm as text, if it is the same in all pairs. Blank: not recorded.
    value_a: str
    value_b: str
    num_pairs: int  # with this status
    # Cause of an expected difference: "the axis loss", "the seeds"; None: unexplained
    explained_by: str | None = None
    within: str = ""  # tolerance of numbers that are close, such as "0.5%"

    @property
    def title(self) -> str:
        """`what` in text for people."""
        return name_library(self.what) if self.section == "software" else self.what

    @property
    def text_a(self) -> str:
        """`value_a` in text for people."""
        return self._describe_value(self.value_a)

    @property
    def text_b(self) -> str:
        """`value_b` in text for people."""
        return self._describe_value(self.value_b)

    def _describe_value(self, value: str) -> str:
        return describe_version(self.what, value) if self.section == "software" else value

    def describe(self) -> str:
        """The line as one sentence without a full stop.

        >>> CertificateLine("recipe", "loss", "differs", "full", "completion", 1).describe()
        'loss: full -> completion'
        >>> CertificateLine("model", "base", "close", "4.737", "4.76", 1, within="0.5%").describe()
        'base: 4.737 and 4.76, equal within 0.5%'
        """
        if self.status == "close":
            if VARIOUS in (self.text_a, self.text_b):
                return f"{self.title}: equal within {self.within} in each pair"
            return f"{self.title}: {self.text_a} and {self.text_b}, equal within {self.within}"
        if self.status == "differs":
            return f"{self.title}: {self.text_a} -> {self.text_b}"
        shown = self.text_a if self.status == "equal" and self.text_a != VARIOUS else ""
        return f"{self.title}: {shown}" if shown else self.title


@dataclass(frozen=True)
class NotRead:
    """A requested run whose facts were not read."""

    name: str
    state: str  # of the run; "absent" if there is no run directory
    why: str

    def describe(self) -> str:
        """The sentence for the certificate and stderr, without a full stop.

        >>> NotRead("demo/a", "damaged", "eval_rows.jsonl is missing").describe()
        'demo/a is damaged (eval_rows.jsonl is missing): none of its facts were read'
        """
        return f"{self.name} is {self.state} ({self.why}): none of its facts were read"


@dataclass(frozen=True)
class Certificate:
    """Everything that was compared between two arms."""

    names_a: tuple[str, ...]
    names_b: tuple[str, ...]
    pairs: tuple[tuple[str, str], ...]  # names of the runs that were compared
    unpaired: tuple[str, ...]  # names of runs without a partner
    lines: tuple[CertificateLine, ...]
    axis: str | None = None
    num_read: int = 0  # pairs with both runs read; of the others, only recipes are compared
    not_read: tuple[NotRead, ...] = ()

    def select(self, status: Status) -> list[CertificateLine]:
        """The lines with one status."""
        return [line for line in self.lines if line.status == status]

    @property
    def unexplained(self) -> list[CertificateLine]:
        """The differences that neither the axis nor the seeds explain; all, if there is no axis."""
        return [line for line in self.select("differs") if line.explained_by is None]


def build_certificate(
    rows_a: Sequence[ReportRow],
    rows_b: Sequence[ReportRow],
    axis: str | None = None,
    not_read: Sequence[NotRead] = (),
    rows: Sequence[ReportRow] = (),
) -> Certificate:
    """The certificate of two arms; runs are paired by all axes on which the arms agree.

    With an axis, differences that it explains are marked: recipe keys with its name or its values,
    and the facts that follow from those keys. If both arms have several seeds, their runs are
    replicates, and the seeds explain what follows from them. The same holds for two runs with one
    number in a grid whose cells have their own seeds, if `rows` (all runs of the grids) contain
    other seeds of both cells.

    Facts are compared in pairs of completed runs; `not_read` has the reasons for the others.
    """
    pairs, unpaired = pair_runs(rows_a, rows_b, axis)
    read = [pair for pair in pairs if all(row.state == "completed" for row in pair)]
    compared = read or pairs  # if none was read, the certificate says that nothing was recorded
    flat = {id(row): _flatten(row) for pair in pairs for row in pair}
    seeds = SEEDS if len(pairs) > 1 else None
    if len(pairs) == 1 and _have_own_seeds(*pairs[0], rows):
        seeds = OWN_SEEDS
    lines = list(_compare_recipes(pairs, axis, flat, seeds)) if pairs else []
    explained = {line.what: line.explained_by for line in lines if line.explained_by is not None}
    for fact in list_facts([row for pair in compared for row in pair]):
        applicable = [pair for pair in compared if fact.applies is None or fact.applies(*pair)]
        if applicable:
            lines.append(_compare_fact(fact, applicable, explained, flat))
    return Certificate(
        names_a=tuple(row.recipe.run.full_name for row in rows_a),
        names_b=tuple(row.recipe.run.full_name for row in rows_b),
        pairs=tuple((a.recipe.run.full_name, b.recipe.run.full_name) for a, b in pairs),
        unpaired=tuple(row.recipe.run.full_name for row in unpaired),
        lines=tuple(lines),
        axis=axis,
        num_read=len(read),
        not_read=tuple(not_read),
    )


def pair_runs(
    rows_a: Sequence[ReportRow], rows_b: Sequence[ReportRow], axis: str | None = None
) -> tuple[list[tuple[ReportRow, ReportRow]], list[ReportRow]]:
    """Pairs of runs that agree on all axes except those that distinguish the arms, and the
    remaining runs. If each side has one run, the two are a pair regardless of their axes.
    """
    if len(rows_a) == len(rows_b) == 1:
        return [(rows_a[0], rows_b[0])], []
    apart = {axis} if axis is not None else _find_axes_apart(rows_a, rows_b)

    def key(row: ReportRow) -> tuple[str, ...]:
        return tuple(
            f"{name}={axis_key(value)}"
            for name, value in sorted(row.axes.items())
            if name not in apart
        )

    partners: dict[tuple[str, ...], list[ReportRow]] = {}
    for row in rows_b:
        partners.setdefault(key(row), []).append(row)
    pairs, unpaired = [], []
    for row in rows_a:
        found = partners.get(key(row))
        if found:
            pairs.append((row, found.pop(0)))
        else:
            unpaired.append(row)
    return pairs, unpaired + [row for rows in partners.values() for row in rows]


def _have_own_seeds(a: ReportRow, b: ReportRow, rows: Sequence[ReportRow]) -> bool:
    """True if two runs share a number on the axis `seed` but train with different seeds, and their
    cells have several seeds each.
    """
    if "seed" not in a.axes or "seed" not in b.axes or a.seed == b.seed:
        return False

    def key(row: ReportRow) -> tuple[Any, ...]:
        others = sorted((name, axis_key(v)) for name, v in row.axes.items() if name != "seed")
        return row.grid, others

    is_one_number = axis_key(a.axes["seed"]) == axis_key(b.axes["seed"])
    return is_one_number and all(
        len({row.seed for row in rows if key(row) == key(one)}) > 1 for one in (a, b)
    )


def _find_axes_apart(rows_a: Sequence[ReportRow], rows_b: Sequence[ReportRow]) -> set[str]:
    """The axes with one value in all of A and a different one in all of B."""
    apart = set()
    for axis in {name for row in (*rows_a, *rows_b) for name in row.axes}:
        values_a = {axis_key(row.axes.get(axis)) for row in rows_a}
        values_b = {axis_key(row.axes.get(axis)) for row in rows_b}
        if len(values_a) == len(values_b) == 1 and values_a != values_b:
            apart.add(axis)
    return apart


def _compare_recipes(
    pairs: Sequence[Pair],
    axis: str | None,
    flat: Mapping[int, Mapping[str, Any]],
    seeds: str | None,
) -> Iterator[CertificateLine]:
    """A line for each key that differs in some pair, then one line for all others."""
    found: dict[str, list[tuple[Any, Any]]] = {}
    explained: dict[str, str | None] = {}
    num_keys = 0
    for a, b in pairs:
        flat_a, flat_b = flat[id(a)], flat[id(b)]
        keys = dict.fromkeys([*flat_a, *flat_b])
        num_keys = max(num_keys, len(keys))
        for name in keys:
            values = flat_a.get(name, ABSENT), flat_b.get(name, ABSENT)
            if values[0] == values[1]:
                continue
            found.setdefault(name, []).append(values)
            why = _explain_key(name, values, axis, a, b, seeds)
            explained[name] = why if explained.get(name, why) is not None else None
    for name, all_values in found.items():
        value_a, value_b = _show_values(all_values)
        yield CertificateLine(
            "recipe", name, "differs", value_a, value_b, len(all_values), explained[name]
        )
    count = num_keys - len(found)
    yield CertificateLine(
        "recipe",
        f"{'all other' if found else 'all'} keys of the recipe",
        "equal",
        f"{count} keys",
        f"{count} keys",
        len(pairs),
    )


def _flatten(row: ReportRow) -> dict[str, Any]:
    """Every recipe key that changes the experiment, dotted, with its value."""
    flat: dict[str, Any] = {}

    def walk(value: Any, prefix: str) -> None:
        if isinstance(value, Mapping) and value:
            for key, item in value.items():
                walk(item, f"{prefix}.{key}" if prefix else str(key))
        else:
            flat[prefix] = value

    walk(row.payload, "")
    flat["training.seed"] = row.seed  # not in the payload
    return flat


def _explain_key(
    key: str,
    values: tuple[Any, Any],
    axis: str | None,
    a: ReportRow,
    b: ReportRow,
    seeds: str | None,
) -> str | None:
    """Explain a difference in a key; `seeds` explains a difference in `training.seed`."""
    if key == "training.seed" and seeds is not None and axis != "seed":
        return seeds
    if axis is None or axis_key(a.axes.get(axis)) == axis_key(b.axes.get(axis)):
        return None
    sides = a.axes.get(axis), b.axes.get(axis)
    is_named_so = axis in key.split(".") or key.endswith(f"_{axis}")
    return f"the axis {axis}" if is_named_so or _carry(values, sides) else None


def _carry(values: tuple[Any, Any], sides: tuple[Any, Any]) -> bool:
    """True if the values of a key are those of the axis, or texts that contain them.

    >>> _carry((60, 180), (60, 180)), _carry(("models/a", "models/b"), ("a", "b"))
    (True, True)
    >>> _carry((True, False), (True, False)), _carry((1e-4, 2e-4), ("full", "completion"))
    (False, False)
    """
    for value, side in zip(values, sides, strict=True):
        if isinstance(side, bool) or side is None:  # too common to be evidence
            return False
        is_within = (
            isinstance(side, str) and isinstance(value, str) and side != "" and side in value
        )
        if not is_within and axis_key(value) != axis_key(side):
            return False
    return True


def _compare_fact(
    fact: Fact,
    pairs: Sequence[Pair],
    explained: Mapping[str, str],
    flat: Mapping[int, Mapping[str, Any]],
) -> CertificateLine:
    found = [(fact.find(a), fact.find(b)) for a, b in pairs]
    known = [values for values in found if None not in values]
    different: list[Pair] = []
    values_of_different, close = [], []
    tolerance = 0.0
    for pair, values in zip(pairs, found, strict=True):
        if None in values or values[0] == values[1]:
            continue
        allowed = 0.0 if fact.get_tolerance is None else min(map(fact.get_tolerance, pair))
        if allowed and math.isclose(*values, rel_tol=allowed):
            close.append(values)
            tolerance = max(tolerance, allowed)
        else:
            different.append(pair)
            values_of_different.append(values)

    def line(status: Status, values: Sequence[tuple[Any, Any]], **more: Any) -> CertificateLine:
        value_a, value_b = _show_values(values) if values else ("", "")
        return CertificateLine(fact.section, fact.what, status, value_a, value_b, **more)

    if different:
        causes = {key: why for key, why in explained.items() if fact.follows_from(key)}
        reasons = [_explain_fact(fact, pair, causes, flat) for pair in different]
        # The cause must differ in each of these pairs
        why = None if None in reasons else reasons[0]
        return line("differs", values_of_different, num_pairs=len(different), explained_by=why)
    if len(known) < len(found):
        return line("not recorded", (), num_pairs=len(found) - len(known))
    if close:
        return line("close", close, num_pairs=len(close), within=f"{100 * tolerance:g}%")
    return line("equal", known, num_pairs=len(known))


def _explain_fact(
    fact: Fact, pair: Pair, causes: Mapping[str, str], flat: Mapping[int, Mapping[str, Any]]
) -> str | None:
    """Explain a difference in a fact; `causes` maps recipe keys to their explanations."""
    a, b = pair
    for key, why in causes.items():
        if flat[id(a)].get(key, ABSENT) != flat[id(b)].get(key, ABSENT):
            return why
    if fact.what in SOURCE_STATES and a.source_hash is not None and a.source_hash == b.source_hash:
        return SAME_SOURCE
    # Both had the same plan and the same early-stopping rule
    is_planned_alike = a.schedule_steps is not None and a.schedule_steps == b.schedule_steps
    is_stopped = "early_stopping" in (a.stop_reason, b.stop_reason)
    if fact.what in (UPDATES, TRAINED_TOKENS, ROW_ORDER) and is_planned_alike and is_stopped:
        return "early stopping"
    return None


def _show_values(values: Sequence[tuple[Any, Any]]) -> tuple[str, str]:
    """Each side as text if it is the same in all pairs."""
    sides = []
    for side in zip(*values, strict=True):
        texts = dict.fromkeys(map(_show, side))
        sides.append(next(iter(texts)) if len(texts) == 1 else VARIOUS)
    return sides[0], sides[1]


def _show(value: Any) -> str:
    """Format a value as text; a hash is cut to its first characters.

    >>> _show("ab" * 32), _show(60), _show(2 / 3), _show(["q", "v"]), _show(None)
    ('abababababab', '60', '0.666667', '["q", "v"]', 'null')
    """
    if isinstance(value, str) and len(value) in (40, 64) and set(value) <= set("0123456789abcdef"):
        return value[:HASH_CHARACTERS]
    if isinstance(value, float):
        return f"{value:.6g}"
    return cut_middle(axis_text(value), MAX_VALUE)
