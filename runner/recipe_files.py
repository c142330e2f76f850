"""The generated recipes on disk: how they differ from what the templates give, and what `runner render` does about it.

Owns the folder `recipes/<grid>`; writes only what differs and removes only what it once generated.
"""

from __future__ import annotations

import contextlib
import difflib
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from runner.errors import RunnerError
from runner.fsio import write_text_atomic
from runner.grid import list_grids
from runner.render import RenderedGrid, build_header, render_grid

_MAX_SHOWN_DIFFS: Final = 3


@dataclass(frozen=True)
class Drift:
    """How a folder differs from its template, in run names; `foreign` are recipes there that nobody generated."""

    changed: tuple[str, ...]
    missing: tuple[str, ...]
    stale: tuple[str, ...]
    foreign: tuple[str, ...]
    diff: str

    def __bool__(self) -> bool:
        return bool(self.changed or self.missing or self.stale or self.foreign)


def compare(rendered: RenderedGrid, recipes_dir: Path) -> Drift:
    """What differs, byte by byte, between the rendered texts and a folder; `diff` shows the first few."""
    on_disk: dict[str, bytes] = {}
    for path in sorted(recipes_dir.glob("*.yaml")):
        with contextlib.suppress(FileNotFoundError):  # pruned by another `runner render` at this instant
            on_disk[path.stem] = path.read_bytes()
    header = build_header(rendered.grid).encode()
    unknown = [name for name in on_disk if name not in rendered.texts]
    changed = [name for name, text in rendered.texts.items() if on_disk.get(name, text.encode()) != text.encode()]
    rows: list[str] = []
    for name in changed[:_MAX_SHOWN_DIFFS]:
        path = recipes_dir / f"{name}.yaml"
        old = on_disk[name].decode(errors="replace").splitlines()
        new = rendered.texts[name].splitlines()
        rows += difflib.unified_diff(old, new, str(path), f"{path} (rendered)", lineterm="")
    return Drift(
        changed=tuple(changed),
        missing=tuple(name for name in rendered.texts if name not in on_disk),
        stale=tuple(name for name in unknown if on_disk[name].startswith(header)),
        foreign=tuple(name for name in unknown if not on_disk[name].startswith(header)),
        diff="\n".join(rows),
    )


def write_recipes(rendered: RenderedGrid, recipes_dir: Path, drift: Drift) -> None:
    """Write what changed or is missing; a file that is right already keeps its modification time."""
    for name in (*drift.changed, *drift.missing):
        write_text_atomic(recipes_dir / f"{name}.yaml", rendered.texts[name])


def prune_recipes(recipes_dir: Path, drift: Drift) -> None:
    """Remove the generated recipes that no cell gives any more."""
    for name in drift.stale:
        (recipes_dir / f"{name}.yaml").unlink(missing_ok=True)


def run_render(grid: str | None, *, check: bool, prune: bool, root: Path) -> int:
    """The exit code of `runner render`, after printing what was found and done.

    `grid` None means every grid. With `check` nothing is written and any difference gives 1.

    Raises:
        GridError: before any file of the grid is written.
    """
    if check and prune:
        raise RunnerError("--check changes nothing, so it does not go with --prune")
    exit_code = 0
    for name in list_grids(root / "recipe_templates") if grid is None else [grid]:
        rendered = render_grid(root / "recipe_templates", name)
        recipes_dir = root / "recipes" / name
        drift = compare(rendered, recipes_dir)
        print(rendered.summary)
        if check:
            exit_code |= _report_drift(drift, recipes_dir, name)
        else:
            _bring_up_to_date(rendered, drift, recipes_dir, prune)
    return exit_code


def _report_drift(drift: Drift, recipes_dir: Path, grid: str) -> int:
    if not drift:
        print(f"  {recipes_dir} is up to date")
        return 0
    for word, names in (
        ("differs from its template", drift.changed),
        ("is missing", drift.missing),
        ("is stale: no cell gives it", drift.stale),
        ("was not generated", drift.foreign),
    ):
        for name in names:
            print(f"  {recipes_dir / name}.yaml {word}")
    if drift.diff:
        print(drift.diff)
        if len(drift.changed) > _MAX_SHOWN_DIFFS:
            print(f"({len(drift.changed) - _MAX_SHOWN_DIFFS} more files differ)")
    print(f"\nhint: runner render {grid}{' --prune' if drift.stale else ''}")
    return 1


def _bring_up_to_date(rendered: RenderedGrid, drift: Drift, recipes_dir: Path, prune: bool) -> None:
    write_recipes(rendered, recipes_dir, drift)
    num_written = len(drift.changed) + len(drift.missing)
    print(f"  {num_written} written, {len(rendered.texts) - num_written} unchanged in {recipes_dir}")
    if prune:
        prune_recipes(recipes_dir, drift)
    for name in drift.stale:
        print(
            f"  {recipes_dir / name}.yaml {'removed' if prune else 'is stale: no cell gives it (--prune removes it)'}"
        )
    for name in drift.foreign:
        print(f"  {recipes_dir / name}.yaml was not generated; it is left as it is")
