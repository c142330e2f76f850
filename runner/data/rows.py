"""Tokenizes and masks the rows of a run and fits them into `data.max_length`. Only the labels
depend on the loss mode.
"""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any, Final

from runner.data.chat_template import MaskError, describe
from runner.data.draw import SPLITS, LeftOut, RawRow, RawSplits, draw_splits
from runner.data.masking import (
    Completion,
    CompletionSpan,
    ConversationMasker,
    MaskedConversation,
    build_labels,
    list_trained,
)
from runner.errors import DataError
from runner.files import hash_json
from runner.recipe.data_section import DataSection
from runner.recipe.schema import Loss, Turns
from runner.text import format_count

_NUM_SHOWN: Final = 5


@dataclass(frozen=True)
class Row:
    """One tokenized row of a split.

    `spans` are its completions in `input_ids`: trained and scored turns with their ends. `contents`
    are the tokens of each that hold at least one byte of the row's own text; `num_bytes` counts
    these bytes in UTF-8. `untrained` are turns of weight 0. A generated last completion is judged
    against `references`, and by metrics of the project, which get all `columns` of the row. `where`
    names the file and row in errors.
    """

    row_id: str
    group: str
    input_ids: tuple[int, ...]
    spans: tuple[CompletionSpan, ...]
    contents: tuple[CompletionSpan, ...]
    num_bytes: int
    is_truncated: bool
    untrained: tuple[CompletionSpan, ...] = ()
    references: tuple[str, ...] = ()
    where: str = field(default="", compare=False)
    columns: Mapping[str, Any] = field(default_factory=dict, compare=False)

    @property
    def num_completion_tokens(self) -> int:
        """The number of completion tokens that have a predecessor, so a model can be scored on
        them.
        """
        return sum(span.end - max(span.start, 1) for span in self.spans)

    def count_labels(self, loss: Loss) -> int:
        """Count the labels that enter the loss; the first token of a row has no prediction."""
        trained = list_trained(len(self.input_ids), self.spans, loss, self.untrained)
        return sum(max(0, end - max(start, 1)) for start, end in trained)

    def labels(self, loss: Loss) -> list[int]:
        """One label per token."""
        return build_labels(self.input_ids, self.spans, loss, self.untrained)


@dataclass(frozen=True)
class Split:
    """The rows of one split that a run uses, and the ids of those that `data.truncation: drop` left
    out.
    """

    rows: Sequence[Row]
    dropped: tuple[str, ...]

    def list_lengths(self) -> list[int]:
        """The number of tokens of each row."""
        return [len(row.input_ids) for row in self.rows]

    def list_ids(self) -> list[str]:
        """The id of each row."""
        return [row.row_id for row in self.rows]

    def describe(self, loss: Loss) -> dict[str, Any]:
        """The part of `samples.json` about this split."""
        groups = [row.group for row in self.rows]
        return describe_split(self.rows, [loss], self.list_ids(), groups, self.dropped)[loss]


@dataclass(frozen=True)
class Samples:
    """All rows of one run."""

    train: Split
    validation: Split
    test: Split
    left_out: LeftOut


@dataclass(frozen=True)
class FittedRow:
    """One row, cut to `data.max_length`, and the conversation that it was cut from.

    `row` is None if the row does not fit. `raw` and `masked` are the part of the conversation that
    `data.truncation: turns_left` kept, else the whole of it. `prompt_left` removes `num_cut` tokens
    after the first `num_kept`.
    """

    row: Row | None
    raw: RawRow
    masked: MaskedConversation
    whole_ids: tuple[int, ...]  # of the whole conversation
    num_cut: int = 0
    num_kept: int = 0
    num_cut_messages: int = 0

    @property
    def num_tokens(self) -> int:
        """The number of tokens of the whole conversation."""
        return len(self.whole_ids)


def build_samples(
    data: DataSection,
    tokenizer: Any,
    raw: RawSplits | None = None,
    *,
    sign_of_life: Callable[[], None] = lambda: None,
) -> Samples:
    """All rows that a run trains and evaluates on, tokenized under the tokenizer's chat template.

    `raw` avoids drawing the rows again if several models share them. `sign_of_life` is called for
    each row.

    Raises:
        DataError: a row cannot be rendered, masked or fitted into `data.max_length`, or is the same
            text as a row of another split; the first few are named.
    """
    masker = ConversationMasker(tokenizer)
    raw = raw or draw_splits(data)
    origins: dict[str, list[Origin]] = {}
    splits: dict[str, Split] = {}
    for name in SPLITS:
        raw_rows = expand_turns(getattr(raw, name), data.turns)
        masked = mask_rows(raw_rows, data, masker, tokenizer.bos_token_id, sign_of_life)
        too_long = [(raw_rows[at], num_tokens) for at, num_tokens in masked.too_long]
        refuse_too_long(too_long, len(masked.rows), name, data)
        splits[name] = Split(tuple(masked.rows), tuple(one.row_id for one, _ in too_long))
        origins[name] = masked.origins
    refuse_same_tokens(origins)
    return Samples(**splits, left_out=raw.left_out)


# The place of a row, and a value that is equal only for rows with the same tokens.
Origin = tuple[str, Hashable]


@dataclass(frozen=True)
class MaskedRows:
    """The outcome of masking drawn rows: the rows that fit, their origins, and for each row that is
    too long its index among the given rows and its number of tokens.
    """

    rows: list[Row]
    origins: list[Origin]
    too_long: list[tuple[int, int]]


def mask_rows(
    raw_rows: Iterable[RawRow],
    data: DataSection,
    masker: ConversationMasker,
    bos_token_id: int | None,
    sign_of_life: Callable[[], None] = lambda: None,
) -> MaskedRows:
    """The rows as a run uses them, in order; `sign_of_life` is called before each.

    Raises: MaskError, as in `fit_row`.
    """
    masked = MaskedRows([], [], [])
    for at, raw in enumerate(raw_rows):
        sign_of_life()
        fitted = fit_row(raw, masker, data, bos_token_id)
        if fitted.row is None:
            masked.too_long.append((at, fitted.num_tokens))
            continue
        masked.rows.append(fitted.row)
        if raw.is_last_turn:  # many conversations have the same beginning
            # A hash, because the tokens of all rows would take too much memory.
            digest = hashlib.sha256(array("i", fitted.whole_ids).tobytes()).digest()
            masked.origins.append((raw.where, digest))
    return masked


def expand_turns(rows: Iterable[RawRow], turns: Turns) -> list[RawRow]:
    """The rows under `data.turns`, which selects the completions of a conversation: `all` turns of
    weight 1, only the `last` of them, or each in a separate row that ends with it (`split`).
    """
    if turns == "all":
        return list(rows)
    expanded = []
    for raw in rows:
        for turn in raw.completions if turns == "split" else raw.completions[-1:]:
            is_last = turn == raw.completions[-1]
            whole = turns == "last"
            expanded.append(
                replace(
                    raw,
                    messages=raw.messages if whole else raw.messages[: turn + 1],
                    completions=(turn,),
                    untrained=frozenset(n for n in raw.untrained if whole or n < turn),
                    references=raw.references if is_last else (),
                    turn=None if whole else turn,
                    is_last_turn=is_last,
                )
            )
    return expanded


def fit_row(
    raw: RawRow, masker: ConversationMasker, data: DataSection, bos_token_id: int | None
) -> FittedRow:
    """The row as a run uses it, after `data.truncation`.

    Raises:
        MaskError: the row cannot be proven, begins with BOS twice, or has an earlier turn that the
            template does not print as the model would write it. The error names the row.
    """
    try:
        masked = _mask(raw, masker, data)
    except MaskError as error:
        raise MaskError(f"{raw.where}: {error.message}", hint=error.hint) from None
    if bos_token_id is not None and masked.input_ids[:2] == (bos_token_id, bos_token_id):
        raise MaskError(
            f"{raw.where}: begins with the BOS token twice,"
            " unlike any text that a model was trained on",
            hint=(
                "remove it from the start of the content, or from the chat template if the chat"
                " template prints it twice"
            ),
        )
    whole = masked.input_ids
    if len(whole) <= data.max_length or data.truncation not in ("prompt_left", "turns_left"):
        row = _build_row(raw, masked, masked.input_ids, 0, 0)
        return FittedRow(row if len(whole) <= data.max_length else None, raw, masked, whole)
    if data.truncation == "turns_left":
        return _cut_turns(raw, masker, data, masked)
    num_kept = 1 if bos_token_id is not None and masked.input_ids[0] == bos_token_id else 0
    cut = len(whole) - data.max_length
    ids = masked.input_ids[:num_kept] + masked.input_ids[cut + num_kept :]
    row = _build_row(raw, masked, ids, cut, num_kept)
    return FittedRow(row, raw, masked, whole, cut, num_kept)


def _mask(raw: RawRow, masker: ConversationMasker, data: DataSection) -> MaskedConversation:
    masked = masker.mask(raw.messages, raw.tools, turns=raw.completions, untrained=raw.untrained)
    for completion in masked.completions:
        if completion.rewritten is not None and completion.message in raw.completions:
            raise MaskError(
                f"{describe(raw.messages, completion.message)} is not printed as the model would"
                f" write it: {completion.rewritten}",
                hint=(
                    "`data.turns: last` trains and scores the last answer only, `data.turns: split`"
                    " makes each answer a separate row, with its history as the template prints it"
                    " at that point"
                    if data.turns == "all"
                    else "end the conversation with the turn to train"
                ),
            )
    return masked


def _build_row(
    raw: RawRow, masked: MaskedConversation, ids: tuple[int, ...], cut: int, num_kept: int
) -> Row | None:
    """The row that is left of a conversation without the `cut` tokens after the first `num_kept`;
    None if no completion is left.

    Completions that lose a token or their whole prompt are not trained on.
    """
    completions: list[Completion] = []
    untrained: list[CompletionSpan] = []
    for one in masked.completions:
        if one.message in raw.untrained:
            start, end = max(one.span.start - cut, num_kept), one.span.end - cut
            untrained += [CompletionSpan(start, end)] if start < end else []
        elif one.message in raw.completions and (not cut or one.span.start - cut > num_kept):
            completions.append(one)
    if not completions:
        return None
    return Row(
        row_id=raw.row_id,
        group=raw.key[:16] if raw.group == raw.key else raw.group,
        input_ids=ids,
        spans=tuple(_shift(one.span, cut) for one in completions),
        contents=tuple(_shift(span, cut) for one in completions for span in one.contents),
        num_bytes=sum(one.num_bytes for one in completions),
        is_truncated=cut > 0,
        untrained=tuple(untrained),
        references=raw.references,
        where=raw.where,
        columns=raw.columns,
    )


def _shift(span: CompletionSpan, cut: int) -> CompletionSpan:
    return CompletionSpan(span.start - cut, span.end - cut)


def _cut_turns(
    raw: RawRow, masker: ConversationMasker, data: DataSection, whole: MaskedConversation
) -> FittedRow:
    """The row without its first rounds. It loses as few whole rounds (a user's message and its
    answers) as possible to fit. A system text stays.
    """
    num_head = 0
    while raw.messages[num_head]["role"] in ("system", "developer"):
        num_head += 1
    users = [n for n, message in enumerate(raw.messages) if message["role"] == "user"]
    for first in (n for n in users if num_head < n < raw.completions[-1]):
        cut = first - num_head
        rest = replace(
            raw,
            messages=raw.messages[:num_head] + raw.messages[first:],
            completions=tuple(n - cut for n in raw.completions if n >= first),
            untrained=frozenset(n - cut for n in raw.untrained if n >= first),
        )
        try:
            masked = _mask(rest, masker, data)
        except MaskError as error:
            raise MaskError(
                f"{raw.where}, without the {format_count(cut, 'message')} before message {first}:"
                f" {error.message}",
                hint=error.hint,
            ) from None
        if len(masked.input_ids) <= data.max_length:
            row = _build_row(rest, masked, masked.input_ids, 0, 0)
            assert row is not None, "the last completion stays"
            row = replace(row, is_truncated=True)
            return FittedRow(row, rest, masked, whole.input_ids, num_cut_messages=cut)
    return FittedRow(None, raw, whole, whole.input_ids)


def refuse_same_tokens(origins: Mapping[str, Iterable[tuple[str, Hashable]]]) -> None:
    """Raises: DataError, if rows of two splits have the same tokens although their columns differ:
    a test row would also be a training row. `origins` has `(where, tokens)` of each row.
    """
    seen: dict[Hashable, tuple[str, str]] = {}
    same: list[str] = []
    for split, rows in origins.items():
        for where, tokens in rows:
            first_split, first_where = seen.setdefault(tokens, (split, where))
            if first_split != split:
                same.append(f"  {first_where} ({first_split}) and {where} ({split})")
    if same:
        shown = "\n".join(same[:_NUM_SHOWN])
        more = f"\n  and {len(same) - _NUM_SHOWN} more" if len(same) > _NUM_SHOWN else ""
        raise DataError(
            f"{format_count(len(same), 'row')} of one split"
            f" become{'s' if len(same) == 1 else ''} the same tokens as a row of another:\n{shown}"
            + more,
            hint=(
                "remove one of each pair from the data, list the columns in which they differ in"
                " `data.ignore`, or give both the same value in `data.group_column`"
            ),
        )


def refuse_too_long(
    too_long: Sequence[tuple[RawRow, int]], num_fitting: int, split: str, data: DataSection
) -> None:
    """Raises: DataError, if rows do not fit and may not be dropped, or if no row fits; `too_long`
    has their numbers of tokens.
    """
    if too_long and data.truncation != "drop":
        shown = "\n".join(f"  {raw.where}: {length} tokens" for raw, length in too_long[:5])
        more = f"\n  and {len(too_long) - 5} more" if len(too_long) > 5 else ""
        longest = max(length for _, length in too_long)
        reasons = {
            "prompt_left": "their last completion alone does not fit",
            "turns_left": "their last round alone does not fit",
        }
        reason = reasons.get(data.truncation, "and `data.truncation` is `refuse`")
        raise DataError(
            f"{format_count(len(too_long), 'row')} of the {split} split"
            f" {'is' if len(too_long) == 1 else 'are'} longer than `data.max_length:"
            f" {data.max_length}`, {reason}:\n{shown}{more}",
            hint=(
                f"set `data.max_length: {longest}`, or `data.truncation: turns_left` (cuts the"
                " first rounds), `prompt_left` (cuts prompts, keeps completions) or `drop` (leaves"
                " such rows out and counts them)"
            ),
        )
    if not num_fitting:
        raise DataError(
            f"no row of the {split} split fits into `data.max_length: {data.max_length}`"
        )


def describe_samples(samples: Samples, loss: Loss) -> dict[str, Any]:
    """The content of `samples.json`. Two arms saw the same rows exactly if their `input_ids_hash`
    are equal. `ids_hash` does not depend on the order.
    """
    splits = {name: getattr(samples, name).describe(loss) for name in SPLITS}
    left_out = samples.left_out
    return {
        "loss": loss,
        "num_duplicates": left_out.num_duplicates,
        "num_left_out_by_group": left_out.num_left_out_by_group,
        "left_out_by_task": {split: dict(reasons) for split, reasons in left_out.by_task.items()},
        "left_out_columns": {split: dict(columns) for split, columns in left_out.columns.items()},
        "skipped_files": {split: dict(reasons) for split, reasons in left_out.skipped.items()},
        "splits": splits,
    }


def describe_split(
    rows: Iterable[Row],
    losses: Sequence[Loss],
    ids: Sequence[str],
    groups: Sequence[str],
    dropped: Sequence[str],
) -> dict[Loss, dict[str, Any]]:
    """The part of `samples.json` about one split, under each loss. Iterates over the rows once and
    keeps none of them.
    """
    counts = dict.fromkeys(_COUNTS, 0)
    num_labels = dict.fromkeys(losses, 0)
    input_ids_hash, mask_hashes = _ListHash(), {loss: _ListHash() for loss in losses}
    for row in rows:
        num_tokens = len(row.input_ids)
        counts["num_truncated"] += row.is_truncated
        counts["num_tokens"] += num_tokens
        counts["num_completion_tokens"] += row.num_completion_tokens
        counts["num_bytes"] += row.num_bytes
        input_ids_hash.add(json.dumps(row.input_ids, separators=(",", ":")))
        for loss in losses:
            trained = list_trained(num_tokens, row.spans, loss, row.untrained)
            num_labels[loss] += sum(end - start for start, end in trained)
            mask_hashes[loss].add(_write_mask(num_tokens, trained))
    same = {
        "num_rows": len(ids),
        "num_groups": len(set(groups)),
        "num_dropped": len(dropped),
        **counts,
        "ids_hash": hash_json(sorted(ids)),
        "input_ids_hash": input_ids_hash.hexdigest(),
        "ids": list(ids),
        "groups": list(groups),
        "dropped": list(dropped),
    }
    return {
        loss: {**same, "num_labels": num_labels[loss], "mask_hash": mask_hashes[loss].hexdigest()}
        for loss in losses
    }


_COUNTS: Final = (
    "num_truncated",
    "num_tokens",
    "num_completion_tokens",
    "num_bytes",
)


class _ListHash:
    """`hash_json` of a list, with only one item in memory at a time."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256(b"[")
        self._separator = ""

    def add(self, item: str) -> None:
        """Add one more item, given as compact JSON."""
        self._hash.update(f"{self._separator}{item}".encode())
        self._separator = ","

    def hexdigest(self) -> str:
        """The hash, after all items were added."""
        whole = self._hash.copy()
        whole.update(b"]")
        return whole.hexdigest()


def _write_mask(num_tokens: int, trained: Sequence[tuple[int, int]]) -> str:
    """A compact JSON list with `true` for each token that has a label.

    >>> _write_mask(4, [(1, 3)])
    '[false,true,true,false]'
    """
    bounds = [0, *(bound for one in trained for bound in one), num_tokens]
    words = ("false,", "true,")
    pieces = [words[at % 2] * (end - start) for at, (start, end) in enumerate(pairwise(bounds))]
    return f"[{''.join(pieces)[:-1]}]"
