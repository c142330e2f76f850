"""The equality certificate of two arms: what was equal between them by hash, what differed, and
what was not recorded.

An arm is one run, or all runs with one value of an axis. The certificate is a pure function of the
rows of a report; the difference of the scores is in `difference`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

from runner.report.comparability import is_same_base_score
from runner.report.rows import ReportRow, axis_key, axis_text
from runner.text import cut_middle

Status = Literal["equal", "differs", "not recorded"]
Section = Literal["recipe", "rows", "model", "training", "software"]
HASH_CHARACTERS: Final = 12
MAX_VALUE: Final = 60  # characters of a value; a prompt may be long
ABSENT: Final = "(absent)"
VARIOUS: Final = "(not the same in every pair)"
SEEDS: Final = "the seeds"
# What a difference in training length comes from
_LENGTH: Final = ("training.max_steps", "training.num_train_epochs", "training.global_batch_size")


@dataclass(frozen=True)
class CertificateLine:
    """One thing that was compared in every pair of runs."""

    section: Section
    what: str  # a dotted key of the recipe, or the fact in words
    status: Status
    # What each arm has, as text; of all pairs, where it is the same in all. Blank: not recorded.
    value_a: str
    value_b: str
    num_pairs: int  # in which it has this status
    # Why a difference is no surprise: "the axis loss", "the seeds"; None: nothing explains it.
    explained_by: str | None = None

    def describe(self) -> str:
        """The line as one sentence without a full stop.

        >>> CertificateLine("recipe", "loss", "differs", "full", "completion", 1).describe()
        'loss: full -> completion'
        """
        if self.status == "differs":
            return f"{self.what}: {self.value_a} -> {self.value_b}"
        shown = self.value_a if self.status == "equal" and self.value_a != VARIOUS else ""
        return f"{self.what}: {shown}" if shown else self.what


@dataclass(frozen=True)
class Certificate:
    """All that was compared between two arms."""

    names_a: tuple[str, ...]
    names_b: tuple[str, ...]
    pairs: tuple[tuple[str, str], ...]  # names of the runs that were held against each other
    unpaired: tuple[str, ...]  # names of runs that have no partner
    lines: tuple[CertificateLine, ...]
    axis: str | None = None

    def select(self, status: Status) -> list[CertificateLine]:
        """The lines of one status."""
        return [line for line in self.lines if line.status == status]

    @property
    def unexplained(self) -> list[CertificateLine]:
        """The differences that neither the axis nor the seeds explain; without an axis, all."""
        return [line for line in self.select("differs") if line.explained_by is None]


@dataclass(frozen=True)
class _Fact:
    """Something that runs record besides their recipe."""

    section: Section
    what: str
    find: Callable[[ReportRow], Any]  # None: not recorded
    # A difference follows from a difference in a key of the recipe that begins with one of these.
    causes: tuple[str, ...] = ()
    # Of a row and both values: whether they count as equal; None: `==`.
    is_same: Callable[[ReportRow, Any, Any], bool] | None = None
    # Pairs of which it can be said at all; None: all.
    applies: Callable[[ReportRow, ReportRow], bool] | None = None


def build_certificate(
    rows_a: Sequence[ReportRow], rows_b: Sequence[ReportRow], axis: str | None = None
) -> Certificate:
    """What is equal, differs, or was not recorded between two arms, whose runs are paired by all
    axes in which the arms agree.

    With an axis, each difference that it explains says so: the keys of the recipe that carry its
    name or its values, and the facts that follow from those. Runs of other seeds are replicates
    where both arms have several; what follows from their seeds is explained by them.
    """
    pairs, unpaired = pair_runs(rows_a, rows_b, axis)
    lines = list(compare_recipes(pairs, axis)) if pairs else []
    explained = {line.what: line.explained_by for line in lines if line.explained_by is not None}
    for fact in _list_facts(pairs):
        applicable = [pair for pair in pairs if fact.applies is None or fact.applies(*pair)]
        if applicable:
            lines.append(_compare_fact(fact, applicable, explained))
    return Certificate(
        names_a=tuple(row.recipe.run.full_name for row in rows_a),
        names_b=tuple(row.recipe.run.full_name for row in rows_b),
        pairs=tuple((a.recipe.run.full_name, b.recipe.run.full_name) for a, b in pairs),
        unpaired=tuple(row.recipe.run.full_name for row in unpaired),
        lines=tuple(lines),
        axis=axis,
    )


def pair_runs(
    rows_a: Sequence[ReportRow], rows_b: Sequence[ReportRow], axis: str | None = None
) -> tuple[list[tuple[ReportRow, ReportRow]], list[ReportRow]]:
    """Pairs of runs that agree in all axes but those that tell the arms apart, and the runs left
    over. One run on each side is a pair, whatever it differs in.
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


def _find_axes_apart(rows_a: Sequence[ReportRow], rows_b: Sequence[ReportRow]) -> set[str]:
    """The axes that have one value in all of A and another one in all of B."""
    apart = set()
    for axis in {name for row in (*rows_a, *rows_b) for name in row.axes}:
        values_a = {axis_key(row.axes.get(axis)) for row in rows_a}
        values_b = {axis_key(row.axes.get(axis)) for row in rows_b}
        if len(values_a) == len(values_b) == 1 and values_a != values_b:
            apart.add(axis)
    return apart


def compare_recipes(
    pairs: Sequence[tuple[ReportRow, ReportRow]], axis: str | None = None
) -> Iterator[CertificateLine]:
    """A line for each key that differs in some pair, then one for all keys that never do."""
    has_replicates = len(pairs) > 1
    found: dict[str, list[tuple[Any, Any]]] = {}
    explained: dict[str, str | None] = {}
    num_keys = 0
    for a, b in pairs:
        flat_a, flat_b = _flatten(a), _flatten(b)
        keys = dict.fromkeys([*flat_a, *flat_b])
        num_keys = max(num_keys, len(keys))
        for name in keys:
            values = flat_a.get(name, ABSENT), flat_b.get(name, ABSENT)
            if values[0] == values[1]:
                continue
            found.setdefault(name, []).append(values)
            why = _explain_key(name, values, axis, a, b, has_replicates=has_replicates)
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
    """Every key of the recipe that changes the experiment, dotted, with its value."""
    flat: dict[str, Any] = {}

    def walk(value: Any, prefix: str) -> None:
        if isinstance(value, Mapping) and value:
            for key, item in value.items():
                walk(item, f"{prefix}.{key}" if prefix else str(key))
        else:
            flat[prefix] = value

    walk(row.payload, "")
    flat["training.seed"] = row.seed  # which the payload leaves out
    return flat


def _explain_key(
    key: str,
    values: tuple[Any, Any],
    axis: str | None,
    a: ReportRow,
    b: ReportRow,
    *,
    has_replicates: bool,
) -> str | None:
    """Why two runs of a pair differ in a key."""
    if key == "training.seed" and has_replicates and axis != "seed":
        return SEEDS
    if axis is None or axis_key(a.axes.get(axis)) == axis_key(b.axes.get(axis)):
        return None
    sides = a.axes.get(axis), b.axes.get(axis)
    is_named_so = axis in key.split(".") or key.endswith(f"_{axis}")
    return f"the axis {axis}" if is_named_so or _carry(values, sides) else None


def _carry(values: tuple[Any, Any], sides: tuple[Any, Any]) -> bool:
    """True where the values of a key are those of the axis, or texts around them.

    >>> _carry((60, 180), (60, 180)), _carry(("models/a", "models/b"), ("a", "b"))
    (True, True)
    >>> _carry((True, False), (True, False)), _carry((1e-4, 2e-4), ("full", "completion"))
    (False, False)
    """
    for value, side in zip(values, sides, strict=True):
        if isinstance(side, bool) or side is None:  # too common to say anything
            return False
        is_within = (
            isinstance(side, str) and isinstance(value, str) and side != "" and side in value
        )
        if not is_within and axis_key(value) != axis_key(side):
            return False
    return True


def _list_facts(pairs: Sequence[tuple[ReportRow, ReportRow]]) -> list[_Fact]:
    """Everything besides the recipe that is compared, of these runs."""
    rows = [row for pair in pairs for row in pair]
    facts = [_Fact("rows", "rules of rows and masks", lambda row: row.rules)]
    for split, causes in (("train", ("data",)), ("validation", _EVAL_ROWS), ("test", _EVAL_ROWS)):
        facts += _list_facts_of_split(split, causes)
    facts.append(
        _Fact(
            "model",
            "scores of the base model",
            lambda row: row.base.nll_per_completion_token,
            ("model", "quantization", *_EVAL_ROWS),
            is_same_base_score,
        )
    )
    for key in _list_keys(row.commits for row in rows):
        facts.append(_build_entry_fact("model", f"commit of {key}", "commits", key, any))
    for path in _list_keys(row.contents for row in rows):
        # A file that only one of a pair names is a difference of the recipe.
        facts.append(_build_entry_fact("rows", f"content of {path}", "contents", path, all))
    facts += [
        _Fact(
            "model",
            "initial trained weights",
            lambda row: row.initial_weights_hash,
            ("model", "adapter", "quantization", "training.seed"),
        ),
        _Fact(
            "training",
            "order of the rows",
            lambda row: row.row_order_hash,
            ("data", "model", "training"),
        ),
        _Fact("training", "updates", lambda row: row.updates, _LENGTH),
        _Fact("training", "length of the schedule", lambda row: row.schedule_steps, _LENGTH),
        _Fact(
            "training",
            "trained tokens",
            lambda row: row.num_trained_tokens,
            (*_LENGTH, "loss", "model", "data", "training.seed"),
        ),
    ]
    for name in _list_keys(row.versions for row in rows):
        facts.append(_build_entry_fact("software", name, "versions", name, any))
    facts.append(_Fact("software", "version of the runner", lambda row: row.runner_version))
    facts.append(_Fact("software", "source of the runner", lambda row: row.source_hash))
    return facts


# Which rows are held back does not depend on how many are trained on.
_EVAL_ROWS: Final = (
    *("data.train", "data.validation", "data.test", "data.task", "data.seed", "data.turns"),
    *("data.num_validation_samples", "data.num_test_samples", "data.group_column", "data.ignore"),
    *("data.max_length", "data.truncation"),
)


def _list_facts_of_split(split: str, causes: tuple[str, ...]) -> list[_Fact]:
    def of(name: str) -> Callable[[ReportRow], Any]:
        return lambda row: row.split_hashes.get(split, {}).get(name)

    facts = [
        _Fact("rows", f"{split} rows", of("ids_hash"), causes),
        _Fact("rows", f"input_ids of the {split} rows", of("input_ids_hash"), (*causes, "model")),
    ]
    if split == "train":
        mask = (*causes, "model", "loss")
        return [*facts, _Fact("rows", "label masks of the train rows", of("mask_hash"), mask)]
    if split == "test":
        for name, what in (("num_completion_tokens", "scored tokens"), ("num_bytes", "bytes")):
            words = f"{what} of the test rows"
            facts.append(_Fact("rows", words, of(name), (*causes, "model")))
    return facts


def _build_entry_fact(
    section: Section, what: str, field: str, key: str, needs: Callable[[Iterable[bool]], bool]
) -> _Fact:
    """The entry `key` of a mapping of the rows; `needs`: any or all of a pair must have it."""
    return _Fact(
        section,
        what,
        find=lambda row: getattr(row, field).get(key),
        causes=(key.rpartition(".")[0],) if field == "commits" else (),
        applies=lambda a, b: needs(key in getattr(row, field) for row in (a, b)),
    )


def _list_keys(mappings: Iterable[Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(key for mapping in mappings for key in mapping))


def _compare_fact(
    fact: _Fact, pairs: Sequence[tuple[ReportRow, ReportRow]], explained: Mapping[str, str]
) -> CertificateLine:
    found = [(fact.find(a), fact.find(b)) for a, b in pairs]
    known = [values for values in found if None not in values]
    different = []
    for (row, _), values in zip(pairs, found, strict=True):
        if None in values or values[0] == values[1]:
            continue
        if fact.is_same is None or not fact.is_same(row, *values):
            different.append(values)
    if different:
        value_a, value_b = _show_values(different)
        why = _explain_fact(fact, pairs, explained)
        return CertificateLine(
            fact.section, fact.what, "differs", value_a, value_b, len(different), why
        )
    if len(known) < len(found):
        return CertificateLine(
            fact.section, fact.what, "not recorded", "", "", len(found) - len(known)
        )
    value_a, value_b = _show_values(known)
    return CertificateLine(fact.section, fact.what, "equal", value_a, value_b, len(known))


def _explain_fact(
    fact: _Fact, pairs: Sequence[tuple[ReportRow, ReportRow]], explained: Mapping[str, str]
) -> str | None:
    for key, why in explained.items():
        if any(key == cause or key.startswith(f"{cause}.") for cause in fact.causes):
            return why
    # The plan was equal, and the rule that stopped one of them is in both recipes.
    is_planned_alike = all(
        a.schedule_steps is not None and a.schedule_steps == b.schedule_steps for a, b in pairs
    )
    has_stopped = any("early_stopping" in (a.stop_reason, b.stop_reason) for a, b in pairs)
    if fact.what in ("updates", "trained tokens", "order of the rows"):
        return "early stopping" if is_planned_alike and has_stopped else None
    return None


def _show_values(values: Sequence[tuple[Any, Any]]) -> tuple[str, str]:
    """Both sides as text, where they are the same in all pairs."""
    sides = []
    for side in zip(*values, strict=True):
        texts = dict.fromkeys(map(_show, side))
        sides.append(next(iter(texts)) if len(texts) == 1 else VARIOUS)
    return sides[0], sides[1]


def _show(value: Any) -> str:
    """A value as text: a hash by its first characters.

    >>> _show("ab" * 32), _show(60), _show(2 / 3), _show(["q", "v"]), _show(None)
    ('abababababab', '60', '0.666667', '["q", "v"]', 'null')
    """
    if isinstance(value, str) and len(value) in (40, 64) and set(value) <= set("0123456789abcdef"):
        return value[:HASH_CHARACTERS]
    if isinstance(value, float):
        return f"{value:.6g}"
    return cut_middle(axis_text(value), MAX_VALUE)
