"""Picks, splits, tokenises and masks rows; what comes out is the same for every loss mode but for
the labels.

Rows are ordered by a seeded hash of their group (the content itself, where the task knows no
groups), then of their content. Test rows come first, then validation, then training, so splits are
disjoint by content and by group, independent of the order of the file, and smaller training sets
are prefixes of larger ones.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Literal

from runner.data.chat_template import MaskError
from runner.data.masking import CompletionSpan, ConversationMasker, MaskedConversation, build_labels
from runner.data.sources import load_rows
from runner.data.tasks.base import Conversation
from runner.errors import DataError
from runner.files import hash_json
from runner.recipe.schema import DataSection

SPLITS: Final = ("train", "validation", "test")


@dataclass(frozen=True)
class RawRow:
    """One conversation, where it came from, a hash of its content, and what an answer to it is
    judged against.
    """

    where: str
    messages: Conversation
    content_hash: str
    references: tuple[str, ...]
    group: str  # the content hash where the task knows no groups

    @property
    def row_id(self) -> str:
        """Stable id: the start of the content hash."""
        return self.content_hash[:16]


@dataclass(frozen=True)
class LeftOut:
    """What no split was drawn from, and why; nothing else is missing but rows that were not asked
    for.
    """

    num_duplicates: int = 0
    # Another row of their group stands in a split that is drawn earlier.
    num_left_out_by_group: int = 0
    # Split of the source -> reason -> count.
    by_task: Mapping[str, Mapping[str, int]] = field(default_factory=dict)

    def describe(self) -> list[str]:
        """One line for each reason."""
        lines = [
            f"{split}: {count} {reason}"
            for split, left in self.by_task.items()
            for reason, count in left.items()
        ]
        if self.num_left_out_by_group:
            lines.append(f"{self.num_left_out_by_group} rows of groups that stand in another split")
        if self.num_duplicates:
            lines.append(f"{self.num_duplicates} duplicate rows")
        return lines


@dataclass(frozen=True)
class RawSplits:
    """The rows drawn for each split, before anything model-specific."""

    train: tuple[RawRow, ...]
    validation: tuple[RawRow, ...]
    test: tuple[RawRow, ...]
    left_out: LeftOut


@dataclass(frozen=True)
class Row:
    """One tokenised row. `spans` are the completions in `input_ids`; `num_bytes` counts their
    contents in UTF-8.

    A generated last completion is judged against `references`.
    """

    row_id: str
    input_ids: tuple[int, ...]
    spans: tuple[CompletionSpan, ...]
    num_bytes: int
    is_truncated: bool
    references: tuple[str, ...] = ()

    @property
    def num_completion_tokens(self) -> int:
        """Tokens of the completions that have a predecessor, so that a model can be scored on
        them.
        """
        return sum(span.end - max(span.start, 1) for span in self.spans)

    def labels(self, loss: Literal["full", "completion"]) -> list[int]:
        """One label per token."""
        return build_labels(self.input_ids, self.spans, loss)


@dataclass(frozen=True)
class Split:
    """The rows of one split that a run uses, and the ids of those that `data.truncation: drop` left
    out.
    """

    rows: tuple[Row, ...]
    dropped: tuple[str, ...]


@dataclass(frozen=True)
class Samples:
    """All rows of one run."""

    train: Split
    validation: Split
    test: Split
    left_out: LeftOut


def draw_splits(data: DataSection) -> RawSplits:
    """The rows of each split: the same for every model, loss mode and training seed.

    A row whose content occurred before, in a split that comes first or earlier in its own, is a
    duplicate: it is counted and left out. So are rows of a group of which another row stands in a
    split that comes first. Raises DataError for a split that is empty or has fewer rows than asked
    for.
    """
    seen: set[str] = set()
    pools: dict[str, list[RawRow]] = {}
    by_task: dict[str, Mapping[str, int]] = {}
    num_duplicates = 0
    for split, source in (
        ("test", data.test),
        ("validation", data.validation),
        ("train", data.train),
    ):
        if source is None:
            continue
        pools[split] = []
        read = data.task.build_examples(load_rows(source))
        if read.left_out:
            by_task[split] = read.left_out
        for example in read.examples:
            content_hash = hash_json(
                [[message["role"], message["content"]] for message in example.messages]
            )
            if content_hash in seen:
                num_duplicates += 1
                continue
            seen.add(content_hash)
            group = content_hash if example.group is None else example.group
            pools[split].append(
                RawRow(example.where, example.messages, content_hash, example.references, group)
            )
        pools[split].sort(
            key=lambda raw: (_rank(data.seed, raw.group), _rank(data.seed, raw.content_hash))
        )
    drawn: dict[str, tuple[RawRow, ...]] = {}
    num_left_out_by_group = 0
    for split in ("test", "validation", "train"):
        pool = pools.get(split, pools["train"])
        groups = {raw.group for rows in drawn.values() for raw in rows}
        allowed = [raw for raw in pool if raw.group not in groups]
        num_left_out_by_group += len(pool) - len(allowed)
        left_out = LeftOut(num_duplicates, num_left_out_by_group, by_task)
        drawn[split] = _draw(allowed, split, getattr(data, f"num_{split}_samples"), left_out)
        pool[:] = allowed[len(drawn[split]) :]
    return RawSplits(drawn["train"], drawn["validation"], drawn["test"], left_out)


def _rank(seed: int, text: str) -> str:
    return hashlib.sha256(f"{seed}:{text}".encode()).hexdigest()


def _draw(
    pool: Sequence[RawRow], split: str, wanted: int | None, left_out: LeftOut
) -> tuple[RawRow, ...]:
    """The first rows of what is left for a split."""
    count = len(pool) if wanted is None else wanted
    if len(pool) < count or count == 0:
        reasons = "".join(f"\n  left out: {line}" for line in left_out.describe())
        raise DataError(
            f"{len(pool)} different rows are left for the {split} split, {wanted or 'at least 1'}"
            " were asked for" + reasons,
            hint=(
                f"lower `data.num_{split}_samples`,"
                " or those of the splits drawn before it (test, then validation)"
            ),
        )
    return tuple(pool[:count])


def build_samples(data: DataSection, tokenizer: Any, raw: RawSplits | None = None) -> Samples:
    """Everything that a run trains and evaluates on, tokenised under the tokenizer's chat template.

    `raw` saves drawing the rows again where several models share them.

    Raises:
        DataError: a row cannot be rendered, masked or fitted into `data.max_length`; the first few
            are named.
    """
    masker = build_masker(tokenizer)
    raw = raw or draw_splits(data)
    train, validation, test = (
        _tokenize_split(getattr(raw, name), name, data, masker, tokenizer.bos_token_id)
        for name in SPLITS
    )
    return Samples(train, validation, test, raw.left_out)


def build_masker(tokenizer: Any) -> ConversationMasker:
    """What masks rows under the tokenizer's chat template."""
    return ConversationMasker(tokenizer)


def mask_row(raw: RawRow, masker: ConversationMasker) -> MaskedConversation:
    """The tokens and completions of one row, whole. Raises: MaskError, which names the row."""
    try:
        return masker.mask(raw.messages)
    except MaskError as error:
        raise MaskError(f"{raw.where}: {error.message}", hint=error.hint) from None


def fit_row(
    raw: RawRow, masked: MaskedConversation, data: DataSection, bos_token_id: int | None
) -> Row | None:
    """The row as a run uses it, after `data.truncation`; None where it does not fit into
    `data.max_length`.

    Raises: MaskError, for a row that begins with BOS twice.
    """
    if bos_token_id is not None and masked.input_ids[:2] == (bos_token_id, bos_token_id):
        raise MaskError(
            f"{raw.where}: begins with the BOS token twice,"
            " as no text does that a model was trained on",
            hint="the content begins with it, or the chat template prints it twice",
        )
    completions = [message["content"] for message in raw.messages if message["role"] == "assistant"]
    assert len(completions) == len(masked.spans)
    kept = list(zip(masked.spans, completions, strict=True))
    ids, cut = masked.input_ids, max(0, len(masked.input_ids) - data.max_length)
    if cut and data.truncation == "prompt_left":
        ids, kept = _cut_prompt(ids, kept, data.max_length, bos_token_id)
    if len(ids) > data.max_length or not kept:
        return None
    num_bytes = sum(len(text.encode()) for _, text in kept)
    spans = tuple(span for span, _ in kept)
    return Row(raw.row_id, ids, spans, num_bytes, bool(cut), raw.references)


def _tokenize_split(
    raw_rows: Sequence[RawRow],
    split: str,
    data: DataSection,
    masker: ConversationMasker,
    bos_token_id: int | None,
) -> Split:
    rows: list[Row] = []
    too_long: list[tuple[RawRow, int]] = []
    for raw in raw_rows:
        masked = mask_row(raw, masker)
        row = fit_row(raw, masked, data, bos_token_id)
        if row is None:
            too_long.append((raw, len(masked.input_ids)))
        else:
            rows.append(row)
    refuse_too_long(too_long, len(rows), split, data)
    return Split(tuple(rows), tuple(raw.row_id for raw, _ in too_long))


def _cut_prompt(
    ids: tuple[int, ...],
    kept: list[tuple[CompletionSpan, str]],
    max_length: int,
    bos_token_id: int | None,
) -> tuple[tuple[int, ...], list[tuple[CompletionSpan, str]]]:
    """Cut tokens off the left, but for BOS. Completions that lose a token or their whole prompt are
    not trained on.

    >>> span = CompletionSpan(4, 6)
    >>> _cut_prompt((1, 5, 6, 7, 8, 9), [(span, "x")], 4, 1)
    ((1, 7, 8, 9), [(CompletionSpan(start=2, end=4), 'x')])
    """
    head = ids[:1] if bos_token_id is not None and ids[0] == bos_token_id else ()
    cut = len(ids) - max_length
    shifted = [
        (CompletionSpan(span.start - cut, span.end - cut), text)
        for span, text in kept
        if span.start - cut > len(head)
    ]
    return head + ids[cut + len(head) :], shifted


def refuse_too_long(
    too_long: Sequence[tuple[RawRow, int]], num_fitting: int, split: str, data: DataSection
) -> None:
    """Raises: DataError, if rows do not fit and may not be dropped, or if none fits; `too_long` has
    their tokens.
    """
    if too_long and data.truncation != "drop":
        shown = "\n".join(f"  {raw.where}: {length} tokens" for raw, length in too_long[:5])
        more = f"\n  and {len(too_long) - 5} more" if len(too_long) > 5 else ""
        longest = max(length for _, length in too_long)
        reason = (
            "their last completion alone does not fit"
            if data.truncation == "prompt_left"
            else "and `data.truncation` is `refuse`"
        )
        raise DataError(
            f"{len(too_long)} rows of the {split} split are longer than `data.max_length:"
            f" {data.max_length}`, {reason}:\n{shown}{more}",
            hint=(
                f"set `data.max_length: {longest}`, or `data.truncation: prompt_left` (cuts"
                " prompts, keeps completions) or `drop` (leaves such rows out, counted)"
            ),
        )
    if not num_fitting:
        raise DataError(
            f"no row of the {split} split fits into `data.max_length: {data.max_length}`"
        )


def describe_samples(samples: Samples, loss: Literal["full", "completion"]) -> dict[str, Any]:
    """The content of `samples.json`: two arms saw the same rows exactly when their `input_ids_hash`
    are equal.
    """
    splits = {}
    for name in SPLITS:
        split: Split = getattr(samples, name)
        labels = [row.labels(loss) for row in split.rows]
        ids = [row.row_id for row in split.rows]
        splits[name] = {
            "num_rows": len(split.rows),
            "num_truncated": sum(row.is_truncated for row in split.rows),
            "num_dropped": len(split.dropped),
            "num_tokens": sum(len(row.input_ids) for row in split.rows),
            "num_completion_tokens": sum(row.num_completion_tokens for row in split.rows),
            "num_labels": sum(label >= 0 for row_labels in labels for label in row_labels),
            "ids_hash": hash_json(ids),
            "input_ids_hash": hash_json([row.input_ids for row in split.rows]),
            "mask_hash": hash_json([[label >= 0 for label in row_labels] for row_labels in labels]),
            "ids": ids,
            "dropped": list(split.dropped),
        }
    left_out = samples.left_out
    return {
        "loss": loss,
        "num_duplicates": left_out.num_duplicates,
        "num_left_out_by_group": left_out.num_left_out_by_group,
        "left_out_by_task": {split: dict(reasons) for split, reasons in left_out.by_task.items()},
        "splits": splits,
    }
