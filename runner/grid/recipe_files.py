"""The folder `recipes/<grid>`: finds the files that were generated or edited since, and writes and
removes recipes.

The first line of a generated recipe holds the SHA-256 of the rest, so that an edit is found even
after the template changed. Line ends do not count, because Git changes them on some machines.
`render` makes the texts.
"""

from __future__ import annotations

import difflib
import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from runner.errors import RefusedError
from runner.files import read_plain, write_text_atomic
from runner.project_folder import pasteable
from runner.text import format_count

_MAX_READ_BYTES: Final = 16 << 20
_MAX_SHOWN_DIFFS: Final = 3
_MAX_COMPARED_LINES: Final = 2_000  # of an edited file, which may be of any size
_MAX_SHOWN_RANGES: Final = 6
_MAX_SHOWN_ROWS: Final = 8
_MAX_ROW_CHARACTERS: Final = 120
# Recipes that older versions rendered have no checksum.
_HEADER: Final = re.compile(
    r"# Generated from recipe_templates/(?P<grid>\S+) by `runner render \S+`; do not edit\."
    r"(?: sha256 of the rest: (?P<sum>[0-9a-f]{64}))?"
)


@dataclass(frozen=True)
class RenderedGrid:
    """The recipes of a grid as they should be on disk: run name -> text, in the order of cells."""

    grid: str
    texts: Mapping[str, str]
    summary: str


@dataclass(frozen=True)
class Drift:
    """The differences of a folder from its template, as run names.

    `edited` are recipes of `changed` and `stale` that were edited since they were rendered.
    `unsealed` recipes lack only the checksum, because an older version wrote them. `foreign`
    recipes were not generated.
    """

    changed: tuple[str, ...]
    missing: tuple[str, ...]
    stale: tuple[str, ...]
    foreign: tuple[str, ...]
    edited: tuple[str, ...]
    unsealed: tuple[str, ...]
    diff: str

    def __bool__(self) -> bool:
        return bool(self.changed or self.missing or self.stale or self.foreign)

    def list_losses(self, *, prune: bool) -> list[str]:
        """The edited recipes that rendering would overwrite, or remove with `prune`."""
        at_risk = {*self.changed, *(self.stale if prune else ())}
        return [name for name in self.edited if name in at_risk]


def seal(grid: str, body: str) -> str:
    """The text of a generated recipe: the header line with the checksum, and `body`."""
    return f"{_build_old_header(grid)} sha256 of the rest: {_hash(body)}\n{body}"


def _build_old_header(grid: str) -> str:
    return f"# Generated from recipe_templates/{grid} by `runner render {grid}`; do not edit."


def _hash(body: str) -> str:
    return hashlib.sha256(body.encode()).hexdigest()


@dataclass(frozen=True)
class _Parts:
    """A recipe file: the grid and the checksum in its first line, and the rest as `body`. If the
    first line is not a header, `body` is the whole text.
    """

    grid: str | None
    checksum: str | None
    body: str

    @property
    def is_sealed(self) -> bool:
        return self.checksum is not None and self.checksum == _hash(self.body)


def _split(content: bytes) -> _Parts:
    text = content.decode(errors="replace").replace("\r\n", "\n")
    first, _, rest = text.partition("\n")
    match = _HEADER.fullmatch(first)
    return _Parts(match["grid"], match["sum"], rest) if match else _Parts(None, None, text)


def was_edited(content: bytes) -> bool:
    """True if a recipe was edited since it was rendered; False if it has no checksum."""
    parts = _split(content)
    return parts.checksum is not None and not parts.is_sealed


def word_edited(paths: Sequence[Path]) -> str | None:
    """A note on the recipe files that were edited since they were rendered; None without any."""
    edited = [path for path in paths if path.is_file() and was_edited(_read(path) or b"")]
    if not edited:
        return None
    shown = ", ".join(map(str, edited[:_MAX_SHOWN_DIFFS]))
    more = len(edited) - _MAX_SHOWN_DIFFS
    return (
        f"edited after rendering: {shown}{f' and {more} more' if more > 0 else ''}; `runner render`"
        " does not overwrite edits, so make the change in the template"
    )


def compare(rendered: RenderedGrid, recipes_dir: Path) -> Drift:
    """The differences, byte by byte, between the rendered texts and a folder; `diff` shows the
    first few recipes that were not edited.
    """
    on_disk: dict[str, bytes] = {}
    for path in sorted(recipes_dir.glob("*.yaml")):
        content = _read(path)
        if content is not None:  # None: another `runner render` has just pruned it
            on_disk[path.stem] = content
    changed, edited, unsealed = [], [], []
    for name, text in rendered.texts.items():
        content = on_disk.get(name, text.encode())
        if content == text.encode():
            continue
        parts, body = _split(content), text.partition("\n")[2]
        if not parts.is_sealed and parts.body != body:
            edited.append(name)
        if content == f"{_build_old_header(rendered.grid)}\n{body}".encode():
            unsealed.append(name)
        else:
            changed.append(name)
    stale, foreign = [], []
    for name, content in on_disk.items():
        if name in rendered.texts:
            continue
        parts = _split(content)
        if parts.grid != rendered.grid:
            foreign.append(name)
            continue
        stale.append(name)
        if not parts.is_sealed:
            edited.append(name)
    rows: list[str] = []
    for name in [name for name in changed if name not in edited][:_MAX_SHOWN_DIFFS]:
        path = recipes_dir / f"{name}.yaml"
        old, new = _list_rows(on_disk[name], rendered.texts[name])
        rows += difflib.unified_diff(old, new, str(path), f"{path} (rendered)", lineterm="")
    return Drift(
        changed=tuple(changed),
        missing=tuple(name for name in rendered.texts if name not in on_disk),
        stale=tuple(stale),
        foreign=tuple(foreign),
        edited=tuple(edited),
        unsealed=tuple(unsealed),
        diff="\n".join(rows),
    )


def _read(path: Path) -> bytes | None:
    """The bytes of a recipe, None if it no longer exists. Raises: CorruptFileError, if its path is
    a folder or a pipe.
    """
    return read_plain(path, _MAX_READ_BYTES)


@dataclass(frozen=True)
class GridFiles:
    """A rendered grid, and the differences of its folder."""

    rendered: RenderedGrid
    recipes_dir: Path
    drift: Drift


def refuse_losses(grids: Sequence[GridFiles], *, prune: bool) -> None:
    """Raise RefusedError, which lists them, if rendering would overwrite or remove edited
    recipes.
    """
    rows: list[str] = []
    names: list[str] = []
    num_lost = 0
    for files in grids:
        losses = files.drift.list_losses(prune=prune)
        for name in losses:
            num_lost += 1
            rows += describe_edit(files, name, with_rows=num_lost <= _MAX_SHOWN_DIFFS)
        if losses:
            names.append(files.rendered.grid)
    if not num_lost:
        return
    recipes = "1 recipe was" if num_lost == 1 else f"{num_lost} recipes were"
    force = " --prune --force" if prune else " --force"
    templates = " and ".join(f"recipe_templates/{name}" for name in names)
    commands = " && ".join(f"runner render {name}{force}" for name in names)
    raise RefusedError(
        "\n".join(
            [
                f"{recipes} edited after rendering, so nothing was written",
                "",
                *rows,
                "",
                "  - now, + after rendering",
            ]
        ),
        hint=(f"make the change in {templates}, then render again; to drop it: {commands}"),
    )


def describe_edit(files: GridFiles, name: str, *, with_rows: bool) -> list[str]:
    """The lines of a recipe that differ from its template; `with_rows` quotes the first of them."""
    path = files.recipes_dir / f"{name}.yaml"
    text = files.rendered.texts.get(name)
    if text is None:
        return [
            f"  {path}: no cell produces it any more, and the checksum in its first line is wrong"
            " or missing"
        ]
    old, new = _list_rows(_read(path) or b"", text)
    old = old[:_MAX_COMPARED_LINES]
    blocks = [
        block
        for block in difflib.SequenceMatcher(None, old, new, autojunk=False).get_opcodes()
        if block[0] != "equal"
    ]
    ranges = [_name_lines(start, end) for _, start, end, _, _ in blocks]
    more = f" and {len(ranges) - _MAX_SHOWN_RANGES} more" if len(ranges) > _MAX_SHOWN_RANGES else ""
    lines = [f"  {path}: {', '.join(ranges[:_MAX_SHOWN_RANGES])}{more}"]
    if with_rows:
        shown = list(_quote_rows(blocks, old, new))
        lines += shown[:_MAX_SHOWN_ROWS]
        if len(shown) > _MAX_SHOWN_ROWS:
            lines.append(f"    ({format_count(len(shown) - _MAX_SHOWN_ROWS, 'more row')})")
    return lines


def _list_rows(content: bytes, text: str) -> tuple[list[str], list[str]]:
    """The lines of a recipe on disk and as rendered. A different checksum is hidden, because the
    other lines show the change.
    """
    old, new = content.decode(errors="replace").splitlines(), text.splitlines()
    if old and _HEADER.fullmatch(old[0]):
        old[0] = new[0]
    return old, new


def _name_lines(start: int, end: int) -> str:
    if start == end:
        return f"after line {start}"
    return f"line {start + 1}" if end == start + 1 else f"lines {start + 1} to {end}"


def _quote_rows(
    blocks: Sequence[tuple[str, int, int, int, int]], old: Sequence[str], new: Sequence[str]
) -> Iterator[str]:
    for _, old_start, old_end, new_start, new_end in blocks:
        for sign, rows in (("-", old[old_start:old_end]), ("+", new[new_start:new_end])):
            for row in rows:
                yield f"    {sign} {row[:_MAX_ROW_CHARACTERS]}"


def write_recipes(rendered: RenderedGrid, recipes_dir: Path, drift: Drift) -> None:
    """Write changed and missing recipes; a file that is right keeps its modification time."""
    for name in (*drift.changed, *drift.unsealed, *drift.missing):
        write_text_atomic(recipes_dir / f"{name}.yaml", rendered.texts[name])


def prune_recipes(recipes_dir: Path, drift: Drift) -> None:
    """Remove the generated recipes that no cell produces any more."""
    for name in drift.stale:
        (recipes_dir / f"{name}.yaml").unlink(missing_ok=True)


def report_drift(files: GridFiles) -> int:
    """The exit code of `runner render --check` for a grid, after printing the differences."""
    drift, recipes_dir = files.drift, files.recipes_dir
    if drift.unsealed:
        print(
            f"  {format_count(len(drift.unsealed), 'recipe')} with no checksum in the first"
            " line yet: rendering adds it"
        )
    if not drift:
        print(f"  {recipes_dir} is up to date")
        return 0
    changed = [name for name in drift.changed if name not in drift.edited]
    for word, names in (
        ("was edited by hand", drift.list_losses(prune=False)),
        ("differs from its template", changed),
        ("is missing", drift.missing),
        ("is stale: no cell produces it", drift.stale),
        ("was not generated", drift.foreign),
    ):
        for name in names:
            and_edited = ", and was edited by hand" if name in drift.edited else ""
            print(f"  {recipes_dir / name}.yaml {word}{and_edited if name in drift.stale else ''}")
    edited = drift.list_losses(prune=False)
    for name in edited[:_MAX_SHOWN_DIFFS]:
        print("\n".join(describe_edit(files, name, with_rows=True)))
    if drift.diff:
        print(drift.diff)
    for one, many, num_files in (
        ("was edited", "were edited", len(edited)),
        ("differs", "differ", len(changed)),
    ):
        if (num_more := num_files - _MAX_SHOWN_DIFFS) > 0:
            print(f"({format_count(num_more, 'more file')} {one if num_more == 1 else many})")
    options = (" --prune" if drift.stale else "") + (" --force" if drift.edited else "")
    template = f"recipe_templates/{files.rendered.grid}"
    command = pasteable(f"runner render {files.rendered.grid}{options}")
    first = f"make your edits in {template}, then render again; to drop them: "
    print(f"\nhint: {first if drift.edited else ''}{command}")
    return 1


def bring_up_to_date(files: GridFiles, *, prune: bool) -> None:
    """Write and remove recipes after `refuse_losses`, and print the changes."""
    rendered, recipes_dir, drift = files.rendered, files.recipes_dir, files.drift
    write_recipes(rendered, recipes_dir, drift)
    num_written = len(drift.changed) + len(drift.unsealed) + len(drift.missing)
    print(
        f"  {num_written} written, {len(rendered.texts) - num_written} unchanged in {recipes_dir}"
    )
    for name in drift.list_losses(prune=False):
        print(f"  {recipes_dir / name}.yaml was edited by hand: overwritten (--force)")
    if prune:
        prune_recipes(recipes_dir, drift)
    for name in drift.stale:
        print(
            f"  {recipes_dir / name}.yaml"
            f" {'removed' if prune else 'is stale: no cell produces it (--prune removes it)'}"
        )
    for name in drift.foreign:
        print(f"  {recipes_dir / name}.yaml was not generated; it is left unchanged")
