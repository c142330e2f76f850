"""What a model sees of a row and which of its tokens are trained, for people: the data behind `runner masks`.

Owns the step from a recipe to views of its rows, with the trainer's own functions. Does not own how they are printed:
that is `mask_formats`. Loads a tokenizer, never a model.
"""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

from runner.errors import RunnerError
from runner.recipe import DataSection, Recipe
from runner.sft.data import SPLITS, RawRow, RawSplits, Row, build_masker, draw_splits, fit_row, mask_row
from runner.sft.masking import MaskedConversation, build_labels
from runner.sft.tokenizers import load_tokenizer

Loss = Literal["full", "completion"]
Fate = Literal["whole", "cut", "dropped", "refused"]

_MIN_ID_CHARS: Final = 6
_GLYPHS: Final = {"\n": "⏎", "\t": "⇥", "\r": "␍"}


@dataclass(frozen=True)
class TokenView:
    """One token: its characters of the text, or of none where it continues a character that an earlier one began."""

    token_id: int
    piece: str  # as the tokenizer writes it
    text: str
    skipped: str  # characters before it that no token stands for
    message: int | None  # whose content or completion it belongs to; None: the template's own text
    is_trained: bool  # there is a loss on predicting it: never on the first token
    is_special: bool
    is_cut: bool  # not seen by the model, see `data.truncation`


@dataclass(frozen=True)
class TurnCount:
    """Tokens of one message, or of the template's own text (`message` None); those that were cut count in neither."""

    message: int | None
    role: str
    num_tokens: int
    num_trained: int
    last_trained: str  # the piece that ends what is trained on, of an assistant turn its end of turn


@dataclass(frozen=True)
class RowView:
    """One row. `fate` says whether a run uses it; of a row that is not used the whole mask is shown all the same."""

    split: str
    number: int  # from 1, in the order in which the rows were drawn
    row_id: str
    where: str
    fate: Fate
    method: str
    tokens: tuple[TokenView, ...]
    turns: tuple[TurnCount, ...]

    @property
    def num_tokens(self) -> int:
        """Tokens that the model sees."""
        return sum(not token.is_cut for token in self.tokens)

    @property
    def num_trained(self) -> int:
        """Tokens with a loss."""
        return sum(token.is_trained for token in self.tokens)

    @property
    def num_cut(self) -> int:
        """Tokens that `data.truncation` took away."""
        return sum(token.is_cut for token in self.tokens)

    def special_tokens(self) -> Counter[str]:
        """How often each special token occurs among those that the model sees."""
        return Counter(token.piece for token in self.tokens if token.is_special and not token.is_cut)


def build_views(recipe: Recipe, split: str, num_rows: int, row: str | None) -> list[RowView]:
    """The first rows of a split, or the one that `row` names by number or by (the beginning of) its id.

    Raises:
        DataError: rows, tokenizer or template are not fit to be trained on.
        RunnerError: there is no such row.
    """
    splits = draw_splits(recipe.data)
    chosen = _choose(splits, split, num_rows, row)
    tokenizer = load_tokenizer(recipe.model)
    masker = build_masker(tokenizer)
    return [
        build_view(raw, mask_row(raw, masker), recipe.data, recipe.loss, tokenizer, split=name, number=number)
        for name, number, raw in chosen
    ]


def _choose(splits: RawSplits, split: str, num_rows: int, row: str | None) -> list[tuple[str, int, RawRow]]:
    rows: Sequence[RawRow] = getattr(splits, split)
    if row is None:
        return [(split, number, raw) for number, raw in enumerate(rows[:num_rows], start=1)]
    if len(row) >= _MIN_ID_CHARS:
        named = [
            (name, number, raw)
            for name in SPLITS
            for number, raw in enumerate(getattr(splits, name), start=1)
            if raw.row_id.startswith(row)
        ]
        if named:
            return named
    if row.isdecimal() and 1 <= int(row) <= len(rows):
        return [(split, int(row), rows[int(row) - 1])]
    raise RunnerError(
        f"no row {row!r}: the {split} split has the rows 1 to {len(rows)}, and no split has a row of that id",
        hint=f"ids are those of samples.json, at least {_MIN_ID_CHARS} characters of them, such as {rows[0].row_id}",
    )


def build_view(
    raw: RawRow, masked: MaskedConversation, data: DataSection, loss: Loss, tokenizer: Any, *, split: str, number: int
) -> RowView:
    """The view of one row under a loss mode; what it shows as seen is what the trainer is given."""
    row = fit_row(raw, masked, data, tokenizer.bos_token_id)
    if row is None:
        fate: Fate = "dropped" if data.truncation == "drop" else "refused"
        seen, labels = list(range(len(masked.input_ids))), build_labels(masked.input_ids, masked.spans, loss)
    else:
        fate = "cut" if row.is_truncated else "whole"
        seen, labels = _find_seen(row, masked), row.labels(loss)
    trained = {at for at, label in zip(seen[1:], labels[1:], strict=True) if label >= 0}
    tokens = _build_tokens(masked, _find_messages(raw, masked), set(seen), trained, tokenizer)
    return RowView(split, number, raw.row_id, raw.where, fate, masked.method, tokens, _count_turns(raw, tokens))


def _find_seen(row: Row, masked: MaskedConversation) -> list[int]:
    """Which tokens of the whole conversation are the row's: the end of it, behind its first token where that stayed."""
    num_cut = len(masked.input_ids) - len(row.input_ids)
    for head in (0, 1):
        seen = [*range(head), *range(head + num_cut, len(masked.input_ids))]
        if tuple(masked.input_ids[at] for at in seen) == row.input_ids:
            return seen
    raise AssertionError("truncation cuts one piece off the left, behind BOS at most")


def _find_messages(raw: RawRow, masked: MaskedConversation) -> list[int | None]:
    """The message of each token: a completion's by its span, another's by a character of its content."""
    owners: list[int | None] = [None] * len(masked.input_ids)
    assistants = [index for index, message in enumerate(raw.messages) if message["role"] == "assistant"]
    for index, chars in enumerate(masked.content_chars):
        if chars is not None and index not in assistants:
            for at, (start, end) in enumerate(masked.offsets):
                if start < chars[1] and chars[0] < end:
                    owners[at] = index
    for index, span in zip(assistants, masked.spans, strict=True):
        owners[span.start : span.end] = [index] * (span.end - span.start)
    return owners


def _build_tokens(
    masked: MaskedConversation, owners: Sequence[int | None], seen: set[int], trained: set[int], tokenizer: Any
) -> tuple[TokenView, ...]:
    pieces = tokenizer.convert_ids_to_tokens(list(masked.input_ids))
    special = {token_id for token_id, token in tokenizer.added_tokens_decoder.items() if token.special}
    special |= set(tokenizer.all_special_ids)
    views: list[TokenView] = []
    covered = 0  # a character of several bytes can be spread over several tokens: the first one shows it
    for at, (start, end) in enumerate(masked.offsets):
        views.append(
            TokenView(
                token_id=masked.input_ids[at],
                piece=str(pieces[at]),
                text=masked.text[max(start, covered) : end],
                skipped=masked.text[covered:start],
                message=owners[at],
                is_trained=at in trained,
                is_special=masked.input_ids[at] in special,
                is_cut=at not in seen,
            )
        )
        covered = max(covered, end)
    return tuple(views)


def _count_turns(raw: RawRow, tokens: Sequence[TokenView]) -> tuple[TurnCount, ...]:
    num_tokens = Counter(token.message for token in tokens if not token.is_cut)
    num_trained = Counter(token.message for token in tokens if token.is_trained)
    last_trained = {token.message: token.piece for token in tokens if token.is_trained}
    roles: list[tuple[int | None, str]] = [(at, message["role"]) for at, message in enumerate(raw.messages)]
    return tuple(
        TurnCount(message, role, num_tokens[message], num_trained[message], last_trained.get(message, ""))
        for message, role in [*roles, (None, "template")]
    )


def show(text: str) -> str:
    """A text in which every character can be seen and none acts on a terminal; a newline keeps breaking the line.

    >>> show("a\\tb\\n\\x1b[31m\\u202e")
    'a⇥b⏎\\n␛[31m\\\\u202e'
    """
    return "".join(_show_char(char) for char in text)


def _show_char(char: str) -> str:
    if char == "\n":
        return "⏎\n"
    if char in _GLYPHS:
        return _GLYPHS[char]
    if ord(char) < 0x20:
        return chr(0x2400 + ord(char))
    if unicodedata.category(char) in ("Cc", "Cf", "Cs", "Zl", "Zp"):
        return f"\\u{ord(char):04x}"
    return char
