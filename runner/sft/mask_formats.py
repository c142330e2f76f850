"""Prints views of rows: for a terminal with or without colours, as one HTML page, as JSON."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from html import escape
from itertools import groupby
from typing import Any, Final

from runner.recipe import Recipe
from runner.sft.mask_view import RowView, TokenView, show

_FATES: Final = {
    "whole": "seen whole",
    "cut": "{cut} tokens were cut off the left (data.truncation: prompt_left)",
    "dropped": "NOT USED, longer than data.max_length: {max_length} (data.truncation: drop); mask of the whole row",
    "refused": "REFUSED, does not fit into data.max_length: {max_length} (data.truncation: {truncation}); "
    "mask of the whole row",
}
_RESET: Final = "\x1b[0m"
# Two shades each, so that neighbouring tokens can be told apart.
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
    """A token as it is shown."""

    state: str  # trained, seen or cut
    text: str
    token: TokenView


def format_views(views: Sequence[RowView], recipe: Recipe, how: str, *, is_coloured: bool) -> str:
    """The text of `runner masks`, for `how` one of ansi, html, json."""
    if how == "json":
        return json.dumps(_as_json(views, recipe), indent=1) + "\n"
    if how == "html":
        return _as_html(views, recipe)
    return "\n".join(_as_text(views, recipe, is_coloured))


def _as_text(views: Sequence[RowView], recipe: Recipe, is_coloured: bool) -> Iterator[str]:
    yield f"{recipe.run.grid}/{recipe.run.name}: {recipe.model.path}, loss: {recipe.loss}"
    if is_coloured:
        legend = [f"{_SHADES[state][0]}{state}{_RESET}" for state in ("trained", "seen", "cut")]
        yield f"{legend[0]} tokens have a loss, {legend[1]} ones are context, {legend[2]} ones are not seen; ⏎ newline"
    else:
        yield "⟦trained⟧ tokens have a loss, others are context, ⟨cut: ...⟩ is not seen; ⏎ newline, ⇥ tab"
    for view in views:
        yield ""
        yield f"{view.split} row {view.number}  {view.row_id}  {show(view.where)}"
        yield from (f"  {line}" for line in _describe(view, recipe))
        yield ""
        text = _colour(view) if is_coloured else _bracket(view)
        yield from (f"  | {line}" for line in text.removesuffix("\n").split("\n"))
    yield ""


def _describe(view: RowView, recipe: Recipe) -> Iterator[str]:
    yield f"{view.num_tokens} tokens, {view.num_trained} trained; {_describe_fate(view, recipe)}"
    yield f"mask proven by: {view.method}, character for character (docs/chat_templates.md)"
    yield f"{'turn':>4}  {'role':<10} {'tokens':>7} {'trained':>8}  last trained"
    for turn in view.turns:
        number = "-" if turn.message is None else str(turn.message)
        counts = f"{turn.num_tokens:>7} {turn.num_trained:>8}"
        yield f"{number:>4}  {turn.role:<10} {counts}  {show(turn.last_trained)}".rstrip()
    special = ", ".join(f"{show(piece)} {count}" for piece, count in sorted(view.special_tokens().items()))
    yield f"special tokens: {special or 'none'}"


def _describe_fate(view: RowView, recipe: Recipe) -> str:
    data = recipe.data
    return _FATES[view.fate].format(cut=view.num_cut, max_length=data.max_length, truncation=data.truncation)


def _displays(view: RowView) -> Iterator[_Display]:
    previous = ""
    for token in view.tokens:
        state = "cut" if token.is_cut else "trained" if token.is_trained else "seen"
        text = show(token.skipped + token.text)
        if not token.text and state != previous:  # a further piece of a character
            text += "…"
        yield _Display(state, text, token)
        previous = state


def _bracket(view: RowView) -> str:
    parts: list[str] = []
    for state, group in groupby(_displays(view), key=lambda display: display.state):
        opening, closing = _MARKS[state]
        text = "".join(display.text for display in group)
        # A bracket that closes behind a line break would stand at the beginning of the next line.
        ends_line = text.endswith("\n") and bool(closing)
        parts.append(f"{opening}{text[:-1]}{closing}\n" if ends_line else f"{opening}{text}{closing}")
    return "".join(parts)


def _colour(view: RowView) -> str:
    parts: list[str] = []
    shade = 0
    for display in _displays(view):
        if not display.text:
            continue
        shade = 1 - shade
        style = _SHADES[display.state][shade] + (_SPECIAL if display.token.is_special else "")
        # Colours end before a line break and begin anew behind it: pagers and gutters keep lines apart.
        parts += [
            f"{style}{piece}{_RESET}" if piece != "\n" else piece for piece in _split_lines(display.text) if piece
        ]
    return "".join(parts)


def _split_lines(text: str) -> Iterable[str]:
    for number, line in enumerate(text.split("\n")):
        if number:
            yield "\n"
        yield line


def _as_html(views: Sequence[RowView], recipe: Recipe) -> str:
    title = escape(f"{recipe.run.grid}/{recipe.run.name}")
    parts = [
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>',
        f"<style>\n{_STYLE}</style></head><body><h1>{title}</h1>",
        f"<p>{escape(recipe.model.path)}, loss: {recipe.loss}. <span class='trained'>Trained</span> tokens have a ",
        "loss, others are context, <span class='cut'>cut</span> ones are not seen. ⏎ is a newline; hold the pointer ",
        "over a token for its id.</p>",
    ]
    for view in views:
        parts.append(f"<h2>{view.split} row {view.number}</h2><p><code>{escape(view.row_id)}</code> ")
        parts.append(f"{escape(show(view.where))}</p><p>{view.num_tokens} tokens, {view.num_trained} trained; ")
        parts.append(f"{escape(_describe_fate(view, recipe))}. Mask proven by: {escape(view.method)}.</p>")
        parts.append("<table><tr><th>turn<th>role<th>tokens<th>trained<th>last trained</tr>")
        for turn in view.turns:
            number = "-" if turn.message is None else turn.message
            parts.append(f"<tr><td>{number}<td>{escape(turn.role)}<td>{turn.num_tokens}<td>{turn.num_trained}")
            parts.append(f"<td>{escape(show(turn.last_trained))}</tr>")
        parts.append("</table>\n<pre>")
        for display in _displays(view):
            token = display.token
            names = f"t {display.state}{' special' if token.is_special else ''}"
            about = f"{token.token_id}  {show(token.piece)}"
            parts.append(f'<span class="{names}" title="{escape(about)}">{escape(display.text)}</span>')
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
                | {"num_tokens": turn.num_tokens, "num_trained": turn.num_trained, "last_trained": turn.last_trained}
                for turn in view.turns
            ],
            "tokens": [
                {"id": token.token_id, "piece": token.piece, "text": token.text, "skipped": token.skipped}
                | {"message": token.message, "is_trained": token.is_trained}
                | {"is_special": token.is_special, "is_cut": token.is_cut}
                for token in view.tokens
            ],
        }
        for view in views
    ]
    return {"grid": recipe.run.grid, "name": recipe.run.name, "model": recipe.model.path, "loss": recipe.loss} | {
        "max_length": recipe.data.max_length,
        "truncation": recipe.data.truncation,
        "rows": rows,
    }
