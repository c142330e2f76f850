"""A table of the packages that may import each other, compared with the source.

Imports point down. A package that is on no floor is refused until it is listed here.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import pytest

from tests.conftest import ROOT

# From the ground up. A package imports from lower floors, never from its own.
FLOORS: Final = (
    ("root",),  # the files of `runner/` itself
    ("data.tasks",),
    ("recipe",),
    ("run",),
    ("checkpoints", "data"),
    ("grid", "model", "plan"),
    ("launch", "report", "sft", "demo"),
    ("preflight", "publish", "engines", "view", "api"),
    ("cli",),
)
# The training process decides nothing about other runs, and starts none.
NEVER: Final[Mapping[str, tuple[str, ...]]] = {"sft": ("grid", "plan")}

HEAVY: Final = frozenset(
    {"torch", "transformers", "trl", "peft", "accelerate", "datasets", "deepspeed", "bitsandbytes"}
)
# Modules that may be imported at the top; others only inside the function that needs them.
HEAVY_AT_IMPORT: Final[Mapping[str, frozenset[str]]] = {
    "model": frozenset({"torch", "transformers", "peft"}),
    "sft": frozenset({"torch", "transformers", "trl", "peft", "accelerate", "datasets"}),
    "demo": frozenset({"torch", "transformers"}),
    "preflight": frozenset({"torch"}),
    "publish": frozenset({"torch", "transformers", "peft"}),
}
# Imported only when a verb calls them, so that every other verb starts in a moment.
ONLY_WHEN_CALLED: Final = ("preflight", "publish", "demo", "model", "sft")


@dataclass(frozen=True)
class Import:
    """One import in the source."""

    importer: str  # dotted module
    imported: str
    is_at_import: bool  # of the module, not inside a function, not for types alone


def name_module(path: Path) -> str:
    """`runner/recipe/parse.py` is `runner.recipe.parse`, and its `__init__.py` `runner.recipe`."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES: Final = {name_module(path): path for path in (ROOT / "runner").rglob("*.py")}


def name_package(module: str) -> str:
    """The room of a module in the table."""
    parts = module.split(".")[1:]
    if parts == ["__main__"]:
        return "cli"
    if parts == ["api"]:
        return "api"
    if parts[:2] == ["data", "tasks"]:
        return "data.tasks"
    if parts and (ROOT / "runner" / parts[0]).is_dir():
        return parts[0]
    return "root"


def walk_imports(node: ast.AST, importer: str, is_at_import: bool) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            for alias in child.names:
                yield Import(importer, alias.name, is_at_import)
        elif isinstance(child, ast.ImportFrom):
            assert child.module is not None and child.level == 0, f"{importer}: a relative import"
            for alias in child.names:
                submodule = f"{child.module}.{alias.name}"
                imported = submodule if submodule in MODULES else child.module
                yield Import(importer, imported, is_at_import)
        else:
            is_for_types = isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test)
            is_later = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            is_now = is_at_import and not is_later and not is_for_types
            yield from walk_imports(child, importer, is_now)


def list_imports() -> list[Import]:
    return [
        one
        for module, path in MODULES.items()
        for one in walk_imports(ast.parse(path.read_text()), module, True)
    ]


IMPORTS: Final = list_imports()
# `runner/__init__` names the public functions for type checkers only.
INNER: Final = [
    one
    for one in IMPORTS
    if one.imported in MODULES and (one.importer, one.is_at_import) != ("runner", False)
]


def test_every_package_has_a_floor() -> None:
    listed = {name for floor in FLOORS for name in floor}
    found = {name_package(module) for module in MODULES}
    assert found == listed, f"add {found - listed} to FLOORS, take out {listed - found}"
    assert len(INNER) > 300 and {"recipe", "sft", "cli"} <= found, "the look at the source works"


def test_imports_point_down() -> None:
    heights = {name: height for height, floor in enumerate(FLOORS) for name in floor}
    wrong = []
    for one in INNER:
        above, below = name_package(one.importer), name_package(one.imported)
        is_down = heights[below] < heights[above]
        if above != below and (not is_down or below in NEVER.get(above, ())):
            wrong.append(f"{one.importer} imports {one.imported}")
    assert not wrong, "\n".join(wrong)


def test_no_module_reaches_itself() -> None:
    """No circles, also none that a function-local import hides."""
    edges = {(one.importer, one.imported) for one in INNER if one.importer != one.imported}
    while True:
        importers = {importer for importer, _ in edges}
        imported = {name for _, name in edges}
        inner = {edge for edge in edges if edge[1] in importers and edge[0] in imported}
        if inner == edges:
            break
        edges = inner  # without the modules that import nothing, or that nobody imports
    assert not edges, "\n".join(f"{importer} -> {name}" for importer, name in sorted(edges))


def test_heavy_libraries_are_imported_where_the_table_says() -> None:
    wrong, found = [], set()
    for one in IMPORTS:
        package, library = name_package(one.importer), one.imported.partition(".")[0]
        if one.is_at_import and library in HEAVY:
            found.add((package, library))
            if library not in HEAVY_AT_IMPORT.get(package, ()):
                wrong.append(f"{one.importer} imports {one.imported} when it is imported")
    assert not wrong, "\n".join(wrong)
    listed = {(package, one) for package, those in HEAVY_AT_IMPORT.items() for one in those}
    assert found == listed, f"take out of the table: {listed - found}"


def test_the_command_line_imports_what_is_slow_only_when_it_is_called() -> None:
    wrong = [
        f"{one.importer} imports {one.imported}"
        for one in INNER
        if one.is_at_import
        and name_package(one.importer) not in ONLY_WHEN_CALLED
        and name_package(one.imported) in ONLY_WHEN_CALLED
    ]
    assert not wrong, "\n".join(wrong)


def test_a_package_file_holds_one_sentence() -> None:
    for module, path in MODULES.items():
        if path.name == "__init__.py" and module != "runner":  # which holds the version
            body = ast.parse(path.read_text()).body
            assert len(body) == 1 and isinstance(body[0], ast.Expr), f"{path} holds more"


def list_loaded(program: str, cwd: Path) -> set[str]:
    """Top-level names of all modules that a Python program has imported when it ends."""
    tail = "\nimport sys; print('\\n' + ' '.join({name.partition('.')[0] for name in sys.modules}))"
    done = subprocess.run(
        [sys.executable, "-c", program + tail],
        cwd=cwd,
        capture_output=True,
        text=True,
        check=True,
        timeout=600,
    )
    return set(done.stdout.splitlines()[-1].split())


@pytest.mark.parametrize("package", sorted(set(map(name_package, MODULES)) - {*ONLY_WHEN_CALLED}))
def test_a_package_that_every_verb_may_import_loads_nothing_heavy(
    package: str, tmp_path: Path
) -> None:
    """The same by experience: all that its modules load, and what those load."""
    modules = sorted(one for one in MODULES if name_package(one) == package)
    modules = [one for one in modules if not one.endswith("__main__")]
    assert not list_loaded(f"import {', '.join(modules)}", tmp_path) & HEAVY
