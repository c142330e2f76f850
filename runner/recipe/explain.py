"""Texts about the keys of a recipe: the list, one key, one section; as wide as the terminal."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence
from typing import Final

from runner.recipe.keys import Found, Group, Key, OwnedKey
from runner.text import fill, measure

_MIN_COLUMNS_WIDTH: Final = 110  # narrower terminals get two lines for a key
_MIN_WIDTH: Final = 40
_MAX_TEXT_WIDTH: Final = 100  # longer lines are hard to read
_MAX_TYPE_WIDTH: Final = 32
_LABEL_WIDTH: Final = 11


def format_list(groups: Iterable[Group], width: int | None) -> str:
    """All keys by section. `width` is that of the terminal; None for a pipe or a file, which
    gets one line for each key.
    """
    blocks = []
    for group in groups:
        lines = [group.title, *_wrap(group.meaning, width, "  ")] if group.meaning else []
        if width is None:
            lines += _format_rows(group.keys, None)
        elif width >= _MIN_COLUMNS_WIDTH:
            lines += _format_rows(group.keys, width)
        else:
            lines += _format_pairs(group.keys, width)
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)


def _format_rows(keys: Sequence[Key], width: int | None) -> list[str]:
    """A row of columns for each key; the meaning continues below itself."""
    cells = [(f"  {key.path}", key.type, key.default_text) for key in keys]
    widths = [max(measure(cell[at]) for cell in cells) for at in range(3)]
    widths[1] = min(widths[1], _MAX_TYPE_WIDTH)
    widths[2] = min(widths[2], _MAX_TYPE_WIDTH)
    lines = []
    for key, cell in zip(keys, cells, strict=True):
        columns = [fill(text, room) for text, room in zip(cell, widths, strict=True)]
        head = "  ".join(columns)
        if width is None:
            lines.append(f"{head}  {key.summary}")
            continue
        indent = " " * (sum(widths) + 6)
        texts = _list_texts(key)
        if width - len(indent) < _MIN_WIDTH:
            lines.append(head.rstrip())
            for text in texts:
                lines += _wrap(text, width, "      ")
            continue
        first, *rest = [line for text in texts for line in _wrap(text, width - len(indent), "")]
        if measure(head) > sum(widths) + 4:
            lines.append(head.rstrip())
            rest = [first, *rest]
        else:
            lines.append(f"{head}  {first}".rstrip())
        lines += [f"{indent}{line}" for line in rest]
    return lines


def _format_pairs(keys: Sequence[Key], width: int) -> list[str]:
    """Two lines or more for each key: its path, type and default; its meaning."""
    lines = []
    for key in keys:
        default = key.default_text
        if default not in ("required", "optional"):
            default = f"default {default}"
        head = f"{key.path}  ({key.type}; {default})"
        lines += textwrap.wrap(head, width, initial_indent="  ", subsequent_indent="      ")
        for text in _list_texts(key):
            lines += _wrap(text, width, "      ")
    return lines


def _list_texts(key: Key) -> list[str]:
    """The paragraphs about a key in a list: one for each kind that it may select."""
    if key.is_kind:
        return [f"{value}: {meaning}" for value, meaning in key.choices.items()]
    return [key.summary]


def _wrap(text: str, width: int | None, indent: str) -> list[str]:
    if width is None:
        return [f"{indent}{text}"] if text else []
    return textwrap.wrap(
        text,
        max(_MIN_WIDTH, min(width, _MAX_TEXT_WIDTH)),
        initial_indent=indent,
        subsequent_indent=indent,
        break_on_hyphens=False,
        break_long_words=False,
    )


def format_found(found: Found, width: int | None) -> str:
    """The explanation of keys (a list if there are many), then of sections."""
    blocks = []
    if len({key.path for key in found.keys}) > 1:
        blocks.append("\n".join(_format_pairs(found.keys, width or _MAX_TEXT_WIDTH)))
    else:
        blocks += [format_key(key, width) for key in found.keys]
    if found.groups:
        blocks.append(format_list(found.groups, width))
    return "\n\n".join(blocks)


def format_key(key: Key, width: int | None) -> str:
    """Everything about one key.

    >>> from runner.recipe.keys import find_keys
    >>> print(format_key(find_keys("data.seed").keys[0], 80))
    data.seed
      type       integer
      default    required
      meaning    Draws the rows and their order. The training rows are a prefix of
                 that order, so a smaller count is part of a larger one.
      example    data:
                   seed: 42
    """
    lines = [key.path]
    room = min(width or _MAX_TEXT_WIDTH, _MAX_TEXT_WIDTH)
    lines += _label("type", key.type, room)
    of = f" (of {key.passed_to}; passed on only if stated)" if key.passed_to else ""
    lines += _label("default", f"{key.default_text}{of}", room)
    if key.is_kind:
        for number, (value, meaning) in enumerate(key.choices.items()):
            lines += _label("choices" if number == 0 else "", f"{value}: {meaning}", room)
    elif key.choices and key.type != " | ".join(key.choices):
        lines += _label("choices", ", ".join(key.choices), room)
    reasons = {reason: None for reason in key.refused.values()}
    for reason in reasons:
        values = ", ".join(value for value, why in key.refused.items() if why == reason)
        lines += _label("refused", f"{values}: {'each' if ', ' in values else 'it'} {reason}", room)
    if key.goes_with is not None:
        lines += _label("only with", key.goes_with, room)
    lines += _label("meaning", key.meaning, room)
    example = key.build_example().splitlines()
    lines += [
        f"  {fill('example' if number == 0 else '', _LABEL_WIDTH)}{line}"
        for number, line in enumerate(example)
    ]
    return "\n".join(lines)


def _label(label: str, text: str, width: int) -> list[str]:
    indent = " " * (_LABEL_WIDTH + 2)
    return textwrap.wrap(
        text,
        max(_MIN_WIDTH, width),
        initial_indent=f"  {fill(label, _LABEL_WIDTH)}",
        subsequent_indent=indent,
        break_on_hyphens=False,
        break_long_words=False,
    )


def format_owned(key: OwnedKey, width: int | None) -> str:
    """The reason why a recipe cannot state a key of a library, and the key to use.

    >>> from runner.recipe.keys import find_keys
    >>> print(format_owned(find_keys("training.data_seed").owned, 80))
    training.data_seed is not a key of a recipe
      decided by `training.seed`, which also orders the batches
      meaning    Random seed to be used with data samplers. If not set, uses the
                 same seed as `seed`. (help of trl.SFTConfig)
    """
    room = min(width or _MAX_TEXT_WIDTH, _MAX_TEXT_WIDTH)
    lines = [f"{key.path} is not a key of a recipe", *_label("decided by", key.decided_by, room)]
    if key.help:
        lines += _label("meaning", f"{key.help} (help of {key.library})", room)
    return "\n".join(lines)
