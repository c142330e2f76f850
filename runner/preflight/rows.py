"""Facts about rows under one tokenizer: lengths, labels, ends of turns, beginnings.

Every row is masked and fitted by the functions that training uses, once per tokenizer; only counts
and hashes are kept.
"""

from __future__ import annotations

import hashlib
import math
import re
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final, get_args

from runner.data.chat_template import ChatTemplate, MaskError
from runner.data.draw import RawRow
from runner.data.masking import ConversationMasker
from runner.data.rows import FittedRow, Row, expand_turns, fit_row, refuse_too_long
from runner.data.tokenizer import load_stop_tokens
from runner.errors import DataError
from runner.files import hash_json
from runner.recipe.data_section import DataSection
from runner.recipe.hub import load_arguments
from runner.recipe.schema import Loss, ModelSection
from runner.strict import list_texts
from runner.text import format_count

PERCENTILES: Final = (50, 90, 95, 99, 100)
LOSSES: Final = get_args(Loss)
_NUM_SHOWN: Final = 3
_ANSWER_TEXTS: Final = ("content", "reasoning_content")


@dataclass(frozen=True)
class RowFacts:
    """One row: its length before and after truncation, and its trained tokens under each loss.

    `num_tokens` is 0 for a row that is too long. The hashes are of the ids and of the label masks.
    """

    where: str
    group: str
    is_last_turn: bool  # of a conversation that `data.turns: split` makes several rows of
    num_tokens_before: int
    num_tokens: int
    num_labels: dict[str, int]  # per loss
    is_truncated: bool
    cuts_system: bool  # `prompt_left` cuts characters of a system message
    cuts_message: bool  # or leaves part of a message
    holds_special_text: bool
    has_blank_answer: bool
    ends: tuple[str | None, ...]  # the special tokens that end completions; None: plain text
    begins_with_bos: bool
    ids_hash: bytes
    prompt_hash: bytes  # of the ids before the last completion
    answers_hash: bytes  # of the ids of all completions
    whole_hash: bytes  # of the ids before truncation
    mask_hashes: dict[str, bytes]  # per loss

    @property
    def is_used(self) -> bool:
        """True if the row is short enough to be used."""
        return self.num_tokens > 0


@dataclass(frozen=True)
class SplitFacts:
    """The rows of one split that a run uses. `num_labels` is per loss mode; equal splits have equal
    hashes.
    """

    num_rows: int
    num_groups: int
    num_dropped: int
    num_truncated: int
    num_cutting_system: int
    num_cutting_message: int
    num_tokens: int
    num_labels: dict[str, int]
    length_percentiles: dict[str, int]
    num_with_special_text: int
    num_with_blank_answer: int
    ids_hash: str
    mask_hashes: dict[str, str]


@dataclass
class TokenizerFacts:
    """One tokenizer, and the facts of every row that it has processed."""

    tokenizer: Any
    begins_plain_text_with_bos: bool = False
    _rows: dict[tuple[str, int, str], RowFacts] = field(default_factory=dict)

    def __post_init__(self) -> None:
        tokenizer = self.tokenizer
        self._masker = ConversationMasker(tokenizer)
        self._bos_id: int | None = tokenizer.bos_token_id
        self.begins_plain_text_with_bos = self._bos_id is not None and tokenizer("x")["input_ids"][
            :1
        ] == [self._bos_id]
        special = sorted(
            {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
        )
        self._special_pattern = re.compile("|".join(map(re.escape, special)) or "(?!)")
        self._special_ids = {*tokenizer.convert_tokens_to_ids(special), *tokenizer.all_special_ids}

    @property
    def end_tokens(self) -> tuple[str, ...]:
        """The special tokens that end completions of the rows so far."""
        ends = (token for fact in self._rows.values() for token in fact.ends)
        return tuple(dict.fromkeys(token for token in ends if token is not None))

    def count_positions(self, model: ModelSection) -> int | None:
        """The base model's number of positions; None if its configuration does not state it."""
        from transformers import AutoConfig

        try:
            config = AutoConfig.from_pretrained(
                model.path, trust_remote_code=False, **load_arguments(model)
            ).get_text_config()
        except (OSError, ValueError):
            return None
        return getattr(config, "max_position_embeddings", None)

    def facts_of(
        self, conversations: Sequence[RawRow], split: str, data: DataSection
    ) -> list[RowFacts]:
        """One entry per row, in order; several per conversation under `data.turns: split`.

        Raises:
            DataError: rows that cannot be rendered, proven or fitted; says how many, and the first
                of them.
        """
        raw_rows = expand_turns(conversations, data.turns)
        facts: list[RowFacts] = []
        refusals: list[MaskError] = []
        for raw in raw_rows:
            try:
                facts.append(self._look_at(raw, data))
            except MaskError as error:
                refusals.append(error)
        if refusals:
            shown = (
                [refusals[0].message]
                if len(refusals) == 1
                else [error.message for error in refusals[:_NUM_SHOWN]]
            )
            more = (
                f"\n  and {len(refusals) - len(shown)} more" if len(refusals) > len(shown) else ""
            )
            raise DataError(
                f"{len(refusals)} of {format_count(len(raw_rows), 'row')} of the"
                f" {split} split cannot be trained"
                " on:\n  " + "\n  ".join(shown) + more,
                hint=refusals[0].hint,
            )
        too_long = [
            (raw, fact.num_tokens_before)
            for raw, fact in zip(raw_rows, facts, strict=True)
            if not fact.is_used
        ]
        refuse_too_long(too_long, len(facts) - len(too_long), split, data)
        return facts

    def _look_at(self, raw: RawRow, data: DataSection) -> RowFacts:
        key = (raw.content_hash, data.max_length, data.truncation)
        if key not in self._rows:
            self._rows[key] = self._measure(raw, data)
        # Equal rows may occur in several places.
        return replace(
            self._rows[key], where=raw.where, group=raw.group, is_last_turn=raw.is_last_turn
        )

    def _measure(self, raw: RawRow, data: DataSection) -> RowFacts:
        fitted = fit_row(raw, self._masker, data, self._bos_id)
        row, masked = fitted.row, fitted.masked
        cut = find_cut(fitted)
        labels = {loss: row.labels(loss) if row else [] for loss in LOSSES}
        masks = {loss: [label >= 0 for label in labels[loss]] for loss in LOSSES}
        prompt: Sequence[int] = ()
        answers: list[int] = []
        if row and row.spans:
            prompt = row.input_ids[: row.spans[-1].start]
            for span in row.spans:
                answers += row.input_ids[span.start : span.end]
        return RowFacts(
            where=raw.where,
            group=raw.group,
            is_last_turn=raw.is_last_turn,
            num_tokens_before=fitted.num_tokens,
            num_tokens=len(row.input_ids) if row else 0,
            num_labels={loss: sum(mask) for loss, mask in masks.items()},
            is_truncated=bool(row and row.is_truncated),
            cuts_system=any(raw.messages[n]["role"] in ("system", "developer") for n in cut),
            cuts_message=any(cut.values()),
            holds_special_text=any(
                self._special_pattern.search(text)
                for message in raw.messages
                for text in list_texts(message)
            ),
            has_blank_answer=any(
                not any(raw.messages[n].get(key, "").strip() for key in _ANSWER_TEXTS)
                and not raw.messages[n].get("tool_calls")
                for n in raw.completions
            ),
            ends=tuple(self._find_ends(row)) if row else (),
            begins_with_bos=masked.input_ids[0] == self._bos_id,
            ids_hash=_hash_numbers(row.input_ids if row else masked.input_ids),
            prompt_hash=_hash_numbers(prompt),
            answers_hash=_hash_numbers(answers),
            whole_hash=_hash_numbers(fitted.whole_ids),
            mask_hashes={loss: _hash_numbers(mask) for loss, mask in masks.items()},
        )

    def _find_ends(self, row: Row) -> Iterator[str | None]:
        for last in dict.fromkeys(row.input_ids[span.end - 1] for span in row.spans):
            token = str(self.tokenizer.convert_ids_to_tokens(last))
            yield token if last in self._special_ids else None


def find_cut(fitted: FittedRow) -> dict[int, bool]:
    """Message -> True if `data.truncation: prompt_left` cuts part of it, False if it cuts all of
    it.
    """
    masked = fitted.masked
    if fitted.row is None or not fitted.num_cut:
        return {}
    first_char = masked.offsets[fitted.num_cut + fitted.num_kept][0]
    return {
        message: chars[1] > first_char
        for message, chars in enumerate(masked.content_chars)
        if chars is not None and chars[0] < min(chars[1], first_char)
    }


def _hash_numbers(numbers: Sequence[int]) -> bytes:
    return hashlib.blake2b(array("q", numbers).tobytes(), digest_size=16).digest()


def summarize_rows(facts: Sequence[RowFacts]) -> SplitFacts:
    """The facts of a split, from those of its rows, dropped ones included."""
    used = [fact for fact in facts if fact.is_used]
    lengths = sorted(fact.num_tokens for fact in used)
    return SplitFacts(
        num_rows=len(used),
        num_groups=len({fact.group for fact in used}),
        num_dropped=len(facts) - len(used),
        num_truncated=sum(fact.is_truncated for fact in used),
        num_cutting_system=sum(fact.cuts_system for fact in used),
        num_cutting_message=sum(fact.cuts_message for fact in used),
        num_tokens=sum(lengths),
        num_labels={loss: sum(fact.num_labels[loss] for fact in used) for loss in LOSSES},
        length_percentiles={
            f"p{percent}" if percent < 100 else "max": lengths[
                max(0, math.ceil(percent / 100 * len(lengths)) - 1)
            ]
            for percent in PERCENTILES
        },
        num_with_special_text=sum(fact.holds_special_text for fact in used),
        num_with_blank_answer=sum(fact.has_blank_answer for fact in used),
        ids_hash=hash_json([fact.ids_hash.hex() for fact in used]),
        mask_hashes={
            loss: hash_json([fact.mask_hashes[loss].hex() for fact in used]) for loss in LOSSES
        },
    )


def find_row_doubts(
    model: ModelSection,
    tokenizer: TokenizerFacts,
    facts: Mapping[str, Sequence[RowFacts]],
    splits: Mapping[str, SplitFacts],
) -> list[str]:
    """List warnings about rows that can be trained on. `facts` and `splits` are per split."""
    return [
        *_find_token_doubts(model, tokenizer, facts, splits),
        *_find_text_doubts(model.path, facts, splits),
    ]


def _find_token_doubts(
    model: ModelSection,
    tokenizer: TokenizerFacts,
    facts: Mapping[str, Sequence[RowFacts]],
    splits: Mapping[str, SplitFacts],
) -> Iterator[str]:
    path = model.path
    yield from _find_idle_settings(model, tokenizer)
    if tokenizer.begins_plain_text_with_bos and not all(
        row.begins_with_bos for row in facts["train"]
    ):
        yield (
            f"{path}: the tokenizer begins texts with {tokenizer.tokenizer.bos_token},"
            " the chat template does not"
        )
    yield from _find_end_doubts(model, tokenizer, facts)
    longest = max(one.length_percentiles["max"] for one in splits.values())
    num_positions = tokenizer.count_positions(model)
    if num_positions is not None and longest > num_positions:
        yield (
            f"{path}: the longest row has {longest} tokens, but"
            f" the model has only {num_positions} positions"
        )


def _find_idle_settings(model: ModelSection, tokenizer: TokenizerFacts) -> Iterator[str]:
    template = ChatTemplate(tokenizer.tokenizer)
    for name in model.chat_template_kwargs:
        if not template.holds(name):
            yield (
                f"`model.chat_template_kwargs.{name}` has no effect: the chat template of"
                f" {model.path} does not use that name"
            )
    if model.template_date is not None and not template.reads_clock:
        yield (
            f"`model.template_date` has no effect: the chat template of {model.path} does not"
            " call `strftime_now`"
        )


def _find_end_doubts(
    model: ModelSection, tokenizer: TokenizerFacts, facts: Mapping[str, Sequence[RowFacts]]
) -> Iterator[str]:
    ends = dict.fromkeys(end for rows in facts.values() for row in rows for end in row.ends)
    if None in ends:
        yield (
            f"{model.path}: turns end in plain text under its chat template,"
            " so generation needs a stop string"
        )
    stops = load_stop_tokens(tokenizer.tokenizer, model)
    idle = [end for end in ends if end is not None and end not in stops]
    if idle:
        yield (
            f"{model.path}: training ends answers with {' or '.join(idle)}, at which the"
            " base model's own generation settings do not stop"
        )


def _find_text_doubts(
    path: str, facts: Mapping[str, Sequence[RowFacts]], splits: Mapping[str, SplitFacts]
) -> Iterator[str]:
    if num_same := _count_same_when_cut(facts):
        yield (
            f"{path}: {_count_rows(num_same, '', 'has', 'have')} the same tokens as a row of"
            " another split after being cut to `data.max_length` or split into turns"
        )
    yield from _find_repeated_texts(facts)
    for split, one in splits.items():
        if one.num_dropped:
            is_or_are = "is" if one.num_dropped == 1 else "are"
            dropped = _count_rows(one.num_dropped, split, "is", "are")
            yield f"{dropped} longer than `data.max_length` and {is_or_are} dropped"
        if one.num_cutting_system:
            losing = _count_rows(one.num_cutting_system, split, "loses", "lose")
            yield (
                f"{losing} characters of their system message to `data.truncation: prompt_left`;"
                " `turns_left` cuts whole rounds and keeps it"
            )
        if one.num_cutting_message:
            beginning = _count_rows(one.num_cutting_message, split, "begins", "begin")
            yield (
                f"{beginning} in the middle of a message, cut by `data.truncation: prompt_left`;"
                " `turns_left` cuts whole rounds"
            )
        if one.num_with_blank_answer:
            first = next(row.where for row in facts[split] if row.is_used and row.has_blank_answer)
            blank = _count_rows(one.num_with_blank_answer, split, "has", "have")
            yield f"{blank} an empty answer, the first is {first}"
        if one.num_with_special_text:
            first = next(
                row.where for row in facts[split] if row.is_used and row.holds_special_text
            )
            holding = _count_rows(one.num_with_special_text, split, "contains", "contain")
            yield (
                f"{path}: {holding} text that the tokenizer reads as a special token,"
                f" the first is {first}"
            )


def _find_repeated_texts(facts: Mapping[str, Sequence[RowFacts]]) -> Iterator[str]:
    """Warnings about answers that are all equal, and about prompts that are in two splits."""
    train = [row for row in facts.get("train", ()) if row.is_used]
    if len(train) > 1 and len({row.answers_hash for row in train}) == 1:
        yield (
            f"all {len(train)} train rows have the same answer, the first is {train[0].where};"
            " do they come from the right column?"
        )
    whole = {row.ids_hash for row in train}
    prompts = {row.prompt_hash for row in train}
    for split, rows in facts.items():
        shared = [
            row
            for row in rows
            if split != "train"
            and row.is_used
            and row.prompt_hash in prompts
            and row.ids_hash not in whole
        ]
        if shared:
            sharing = _count_rows(len(shared), split, "has", "have")
            yield (
                f"{sharing} the prompt of a train row and another answer, the first is"
                f" {shared[0].where}; `data.group_column` can keep such rows in one split"
            )


def _count_rows(number: int, split: str, one: str, many: str) -> str:
    """A number of rows with its verb.

    >>> _count_rows(1, "train", "has", "have"), _count_rows(2, "", "has", "have")
    ('1 train row has', '2 rows have')
    """
    return f"{format_count(number, f'{split} row'.strip())} {one if number == 1 else many}"


def _count_same_when_cut(facts: Mapping[str, Sequence[RowFacts]]) -> int:
    """Count rows whose ids equal those of a row of another split; uncut ones were refused."""
    seen: dict[bytes, str] = {}
    num_same = 0
    for split, rows in facts.items():
        for row in rows:
            if row.is_used:
                num_same += seen.setdefault(row.ids_hash, split) != split
    return num_same
