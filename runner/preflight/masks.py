"""`runner masks`: shows the tokens of a row as the model sees them, and marks the trained ones.

Views are built by the functions that training uses, and printed for a terminal, as an HTML page or
as JSON. A tokenizer is loaded, never a model.
"""

from __future__ import annotations

import json
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from html import escape
from itertools import groupby
from typing import Any, Final, Literal

from runner.data.draw import SPLITS, RawRow, RawSplits, draw_splits
from runner.data.masking import ConversationMasker, MaskedConversation, build_labels
from runner.data.rows import FittedRow, expand_turns, fit_row
from runner.data.tokenizer import load_tokenizer
from runner.errors import RunnerError
from runner.recipe.parse import Recipe
from runner.recipe.schema import Loss
from runner.text import format_count

Fate = Literal["whole", "cut", "dropped", "refused"]

_MIN_ID_CHARS: Final = 6
_GLYPHS: Final = {"\n": "⏎", "\t": "⇥", "\r": "␍"}


@dataclass(frozen=True)
class TokenView:
    """One token with its characters; `text` is empty if the token continues a character that an
    earlier one began.
    """

    token_id: int
    piece: str  # as the tokenizer writes it
    text: str
    skipped: str  # preceding characters that belong to no token
    message: int | None  # it belongs to; None: the template's text
    is_trained: bool  # has a loss; the first token never has one
    is_special: bool
    is_cut: bool  # removed by `data.truncation`


@dataclass(frozen=True)
class TurnCount:
    """Token counts of one message, or of the template's text (`message` None); no cut tokens."""

    message: int | None
    role: str
    num_tokens: int
    num_trained: int
    # The last trained token: the end of turn, for an assistant turn.
    last_trained: str
    # Such as `reasoning`, `2 calls`, `weight 0`, `context only`.
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class RowView:
    """One row. `fate` says if a run uses it; the mask of an unused row is shown in full."""

    split: str
    number: int  # from 1, in draw order
    row_id: str
    where: str
    fate: Fate
    method: str
    tokens: tuple[TokenView, ...]
    turns: tuple[TurnCount, ...]
    num_cut_messages: int = 0  # by `data.truncation: turns_left`; they are not shown

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
        """Tokens that `data.truncation` removed."""
        return sum(token.is_cut for token in self.tokens)

    def special_tokens(self) -> Counter[str]:
        """Count of each special token that the model sees."""
        return Counter(
            token.piece for token in self.tokens if token.is_special and not token.is_cut
        )


def build_views(recipe: Recipe, split: str, num_rows: int, row: str | None) -> list[RowView]:
    """Build views of the first rows of a split, or of the row with the number or id prefix `row`.

    Raises:
        DataError: rows, tokenizer or template cannot be used for training.
        RunnerError: there is no such row.
    """
    splits = draw_splits(recipe.data)
    chosen = _choose(splits, split, num_rows, row)
    tokenizer = load_tokenizer(recipe.model)
    masker = ConversationMasker(tokenizer)
    views = []
    for name, number, conversation in chosen:
        for raw in expand_turns([conversation], recipe.data.turns):
            if row is not None and "." in row and row.rpartition(".")[2] != str(raw.turn):
                continue
            fitted = fit_row(raw, masker, recipe.data, tokenizer.bos_token_id)
            views.append(build_view(fitted, recipe, tokenizer, split=name, number=number))
    return views


def _choose(
    splits: RawSplits, split: str, num_rows: int, row: str | None
) -> list[tuple[str, int, RawRow]]:
    rows: Sequence[RawRow] = getattr(splits, split)
    if row is None:
        return [(split, number, raw) for number, raw in enumerate(rows[:num_rows], start=1)]
    conversation, _, _ = row.partition(".")  # the rest is the turn, under `data.turns: split`
    if len(conversation) >= _MIN_ID_CHARS:
        named = [
            (name, number, raw)
            for name in SPLITS
            for number, raw in enumerate(getattr(splits, name), start=1)
            if raw.row_id.startswith(conversation)
        ]
        if named:
            return named
    if row.isdecimal() and 1 <= int(row) <= len(rows):
        return [(split, int(row), rows[int(row) - 1])]
    raise RunnerError(
        f"no row {row!r}: the {split} split has rows 1 to {len(rows)}, and no split has a row"
        " with that id",
        hint=(
            f"use an id from samples.json, or at least its first {_MIN_ID_CHARS} characters,"
            f" such as {rows[0].row_id}"
        ),
    )


def build_view(
    fitted: FittedRow, recipe: Recipe, tokenizer: Any, *, split: str, number: int
) -> RowView:
    """Build the view of one row under the recipe's loss, from the ids and labels that training
    uses.
    """
    raw, masked, row = fitted.raw, fitted.masked, fitted.row
    seen = list(range(len(masked.input_ids)))
    if row is None:
        fate: Fate = "dropped" if recipe.data.truncation == "drop" else "refused"
        labels = _label_whole(raw, masked, recipe.loss)
    else:
        fate = "cut" if row.is_truncated else "whole"
        del seen[fitted.num_kept : fitted.num_kept + fitted.num_cut]
        labels = row.labels(recipe.loss)
    trained = {at for at, label in zip(seen[1:], labels[1:], strict=True) if label >= 0}
    tokens = _build_tokens(masked, _find_messages(masked), set(seen), trained, tokenizer)
    return RowView(
        split,
        number,
        raw.row_id,
        raw.where,
        fate,
        masked.method,
        tokens,
        _count_turns(raw, tokens),
        fitted.num_cut_messages,
    )


def _label_whole(raw: RawRow, masked: MaskedConversation, loss: Loss) -> list[int]:
    """The labels that a row would have if it were short enough."""
    completions = [one.span for one in masked.completions if one.message in raw.completions]
    untrained = [one.span for one in masked.completions if one.message in raw.untrained]
    return build_labels(masked.input_ids, completions, loss, untrained)


def _find_messages(masked: MaskedConversation) -> list[int | None]:
    """The message of each token: by span for completions, by characters of content for the
    others.
    """
    owners: list[int | None] = [None] * len(masked.input_ids)
    for index, chars in enumerate(masked.content_chars):
        if chars is not None:
            for at, (start, end) in enumerate(masked.offsets):
                if start < chars[1] and chars[0] < end:
                    owners[at] = index
    for one in masked.completions:
        owners[one.span.start : one.span.end] = [one.message] * (one.span.end - one.span.start)
    return owners


def _build_tokens(
    masked: MaskedConversation,
    owners: Sequence[int | None],
    seen: set[int],
    trained: set[int],
    tokenizer: Any,
) -> tuple[TokenView, ...]:
    pieces = tokenizer.convert_ids_to_tokens(list(masked.input_ids))
    special = {
        token_id for token_id, token in tokenizer.added_tokens_decoder.items() if token.special
    }
    special |= set(tokenizer.all_special_ids)
    views: list[TokenView] = []
    # A multi-byte character can span several tokens: the first one shows it.
    covered = 0
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
    roles: list[tuple[int | None, str]] = [
        (at, message["role"]) for at, message in enumerate(raw.messages)
    ]
    return tuple(
        TurnCount(
            message,
            role,
            num_tokens[message],
            num_trained[message],
            last_trained.get(message, ""),
            () if message is None else _note(raw, message),
        )
        for message, role in [*roles, (None, "template")]
    )


def _note(raw: RawRow, index: int) -> tuple[str, ...]:
    """Notes on a message: its parts other than text, and the reason if an assistant turn is not
    trained."""
    message, notes = raw.messages[index], []
    if message.get("reasoning_content"):
        notes.append("reasoning")
    if calls := message.get("tool_calls"):
        notes.append("1 call" if len(calls) == 1 else f"{len(calls)} calls")
    if index in raw.untrained:
        notes.append("weight 0")
    elif message["role"] == "assistant" and index not in raw.completions:
        notes.append("context only")
    return tuple(notes)


def show(text: str) -> str:
    """Make every character visible and harmless for a terminal; newlines still break the line.

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


_FATES: Final = {
    "whole": "used in full",
    "cut": "{cut} were cut from the left (data.truncation: {truncation})",
    "dropped": (
        "NOT USED, longer than data.max_length: {max_length} (data.truncation: drop);"
        " mask of the whole row"
    ),
    "refused": (
        "REFUSED, does not fit into data.max_length: {max_length} (data.truncation: {truncation}); "
        "mask of the whole row"
    ),
}
_RESET: Final = "\x1b[0m"
# Two shades each, to separate neighboring tokens.
_SHADES: Final = {
    "trained": ("\x1b[30;42m", "\x1b[30;102m"),
    "seen": ("\x1b[0m", "\x1b[2m"),
    "cut": ("\x1b[9;90m", "\x1b[9;90m"),
}
_SPECIAL: Final = "\x1b[1m"
_MARKS: Final = {"trained": ("⟦", "⟧"), "seen": ("", ""), "cut": ("⟨cut: ", "⟩")}
_STYLE: Final = """\
:root { color-scheme: light dark; }
body { font: 14px/1.5 system-ui, sans-serif; max-width: 75rem; margin: 2rem auto; padding: 0 1rem; }
pre { font: 13px/1.7 ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere;
  border: 1px solid #8886; border-radius: 6px; padding: .8rem; }
table { border-collapse: collapse; } td, th { padding: .1rem .8rem; text-align: right; }
span.t { border-bottom: 1px solid #8885; border-right: 1px solid #8883; }
.trained { background: #2a9d4a55; } .cut { opacity: .45; text-decoration: line-through; }
.special { font-weight: bold; }
"""


@dataclass(frozen=True)
class _Display:
    """A token as displayed."""

    state: str  # trained, seen or cut
    text: str
    token: TokenView


def format_views(views: Sequence[RowView], recipe: Recipe, how: str, *, is_colored: bool) -> str:
    """The output of `runner masks`; `how` is ansi, html or json."""
    if how == "json":
        return json.dumps(_as_json(views, recipe), indent=1) + "\n"
    if how == "html":
        return _as_html(views, recipe)
    return "\n".join(_as_text(views, recipe, is_colored))


def _as_text(views: Sequence[RowView], recipe: Recipe, is_colored: bool) -> Iterator[str]:
    yield f"{recipe.run.full_name}: {recipe.model.path}, loss: {recipe.loss}"
    if is_colored:
        legend = [f"{_SHADES[state][0]}{state}{_RESET}" for state in ("trained", "seen", "cut")]
        yield (
            f"{legend[0]} tokens have a loss, {legend[1]} ones are context,"
            f" {legend[2]} ones never reach the model; ⏎ newline"
        )
    else:
        yield (
            "⟦trained⟧ tokens have a loss, others are context, ⟨cut: ...⟩ never reaches the model;"
            " ⏎ newline, ⇥ tab"
        )
    for view in views:
        yield ""
        yield f"{view.split} row {view.number}  {view.row_id}  {show(view.where)}"
        yield from (f"  {line}" for line in _describe(view, recipe))
        yield ""
        text = _color(view) if is_colored else _bracket(view)
        yield from (f"  | {line}" for line in text.removesuffix("\n").split("\n"))
    yield ""


def _describe(view: RowView, recipe: Recipe) -> Iterator[str]:
    yield (
        f"{format_count(view.num_tokens, 'token')}, {view.num_trained} trained;"
        f" {_describe_fate(view, recipe)}"
    )
    yield f"mask proven by: {view.method}, character for character (docs/chat_templates.md)"
    yield f"{'turn':>4}  {'role':<10} {'tokens':>7} {'trained':>8}  last trained"
    for turn in view.turns:
        number = "-" if turn.message is None else str(turn.message)
        counts = f"{turn.num_tokens:>7} {turn.num_trained:>8}"
        notes = f"  ({', '.join(turn.notes)})" if turn.notes else ""
        yield f"{number:>4}  {turn.role:<10} {counts}  {show(turn.last_trained)}{notes}".rstrip()
    special = ", ".join(
        f"{show(piece)} {count}" for piece, count in sorted(view.special_tokens().items())
    )
    yield f"special tokens: {special or 'none'}"


def _describe_fate(view: RowView, recipe: Recipe) -> str:
    data = recipe.data
    is_whole = bool(view.num_cut_messages)
    cut = (
        format_count(view.num_cut_messages, "message")
        if is_whole
        else format_count(view.num_cut, "token")
    )
    return _FATES[view.fate].format(cut=cut, max_length=data.max_length, truncation=data.truncation)


def _displays(view: RowView) -> Iterator[_Display]:
    previous = ""
    for token in view.tokens:
        state = "cut" if token.is_cut else "trained" if token.is_trained else "seen"
        text = show(token.skipped + token.text)
        if not token.text and state != previous:  # another byte of the same character
            text += "…"
        yield _Display(state, text, token)
        previous = state


def _bracket(view: RowView) -> str:
    parts: list[str] = []
    for state, group in groupby(_displays(view), key=lambda display: display.state):
        opening, closing = _MARKS[state]
        text = "".join(display.text for display in group)
        # A bracket that closes after a line break would start the next line.
        ends_line = text.endswith("\n") and bool(closing)
        parts.append(
            f"{opening}{text[:-1]}{closing}\n" if ends_line else f"{opening}{text}{closing}"
        )
    return "".join(parts)


def _color(view: RowView) -> str:
    parts: list[str] = []
    shade = 0
    for display in _displays(view):
        if not display.text:
            continue
        shade = 1 - shade
        style = _SHADES[display.state][shade] + (_SPECIAL if display.token.is_special else "")
        # Colors end before a line break and start again after it, because pagers treat lines
        # separately.
        parts += [
            f"{style}{piece}{_RESET}" if piece != "\n" else piece
            for piece in _split_lines(display.text)
            if piece
        ]
    return "".join(parts)


def _split_lines(text: str) -> Iterable[str]:
    for number, line in enumerate(text.split("\n")):
        if number:
            yield "\n"
        yield line


def _as_html(views: Sequence[RowView], recipe: Recipe) -> str:
    title = escape(recipe.run.full_name)
    parts = [
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>',
        f"<style>\n{_STYLE}</style></head><body><h1>{title}</h1>",
        (
            f"<p>{escape(recipe.model.path)}, loss: {recipe.loss}. <span"
            " class='trained'>Trained</span> tokens have a "
        ),
        (
            "loss, others are context, <span class='cut'>cut</span> ones are not seen. ⏎ is a"
            " newline; hold the pointer "
        ),
        "over a token for its id.</p>",
    ]
    for view in views:
        parts.append(
            f"<h2>{view.split} row {view.number}</h2><p><code>{escape(view.row_id)}</code> "
        )
        parts.append(
            f"{escape(show(view.where))}</p><p>{format_count(view.num_tokens, 'token')}"
            f", {view.num_trained} trained; "
        )
        parts.append(
            f"{escape(_describe_fate(view, recipe))}. Mask proven by: {escape(view.method)}.</p>"
        )
        parts.append(
            "<table><tr><th>turn<th>role<th>tokens<th>trained<th>last trained<th>holds</tr>"
        )
        for turn in view.turns:
            number = "-" if turn.message is None else turn.message
            parts.append(
                f"<tr><td>{number}<td>{escape(turn.role)}"
                f"<td>{turn.num_tokens}<td>{turn.num_trained}"
            )
            notes = ", ".join(turn.notes)
            parts.append(f"<td>{escape(show(turn.last_trained))}<td>{escape(notes)}</tr>")
        parts.append("</table>\n<pre>")
        for display in _displays(view):
            token = display.token
            names = f"t {display.state}{' special' if token.is_special else ''}"
            about = f"{token.token_id}  {show(token.piece)}"
            parts.append(
                f'<span class="{names}" title="{escape(about)}">{escape(display.text)}</span>'
            )
        parts.append("</pre>\n")
    return "".join([*parts, "</body></html>\n"])


def _as_json(views: Sequence[RowView], recipe: Recipe) -> dict[str, Any]:
    rows = [
        {
            "split": view.split,
            "number": view.number,
            "row_id": view.row_id,
            "where": view.where,
            "fate": view.fate,
            "method": view.method,
            "num_tokens": view.num_tokens,
            "num_trained": view.num_trained,
            "num_cut": view.num_cut,
            "special_tokens": dict(sorted(view.special_tokens().items())),
            "turns": [
                {"message": turn.message, "role": turn.role}
                | {
                    "num_tokens": turn.num_tokens,
                    "num_trained": turn.num_trained,
                    "last_trained": turn.last_trained,
                    "notes": list(turn.notes),
                }
                for turn in view.turns
            ],
            "tokens": [
                {
                    "id": token.token_id,
                    "piece": token.piece,
                    "text": token.text,
                    "skipped": token.skipped,
                }
                | {"message": token.message, "is_trained": token.is_trained}
                | {"is_special": token.is_special, "is_cut": token.is_cut}
                for token in view.tokens
            ],
        }
        for view in views
    ]
    return {
        "grid": recipe.run.grid,
        "name": recipe.run.name,
        "model": recipe.model.path,
        "loss": recipe.loss,
    } | {
        "max_length": recipe.data.max_length,
        "truncation": recipe.data.truncation,
        "rows": rows,
    }
