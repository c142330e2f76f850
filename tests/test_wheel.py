"""The wheel and the sdist, built for real: they hold the right files, and a project works from an
installed wheel.
"""

from __future__ import annotations

import json
import os
import shutil
import site
import subprocess
import sys
import sysconfig
import venv
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import pytest

from runner.grid.starter import SHARED_FOLDERS
from tests.conftest import ROOT

STOCK_FOLDERS: Final = (*SHARED_FOLDERS, "data", "recipe_templates", "sweeps")
BUILD_SDIST: Final = "from setuptools.build_meta import build_sdist; build_sdist('sdist')"
# What pip would write for a package that lies in this environment; the other one's interpreter must
# run it.
ACCELERATE: Final = "#!{python}\nfrom accelerate.commands.accelerate_cli import main\nmain()\n"


def run(
    *command: str | Path, cwd: Path, environment: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done


def list_source_files() -> list[str]:
    """Files of the source tree as a commit would have them; untracked and ignored files are left
    out.
    """
    listed = run(
        "git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", cwd=ROOT
    ).stdout
    return [name for name in listed.split("\0") if name and (ROOT / name).is_file()]


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    """A wheel from the tree and one from the sdist of that tree, without the network."""
    base = tmp_path_factory.mktemp("built")
    for name in list_source_files():
        target = base / "tree" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, target)
    (base / "tree" / "data" / "private").mkdir()
    (base / "tree" / "data" / "private" / "notes.txt").write_text("nobody's business")
    run(sys.executable, "-c", BUILD_SDIST, cwd=base / "tree")
    [sdist] = (base / "tree" / "sdist").iterdir()
    build = (
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "--no-index",
        "--quiet",
    )
    wheels = {}
    for name, source in (("tree", base / "tree"), ("sdist", sdist)):
        run(*build, "--wheel-dir", base / name / "wheel", source, cwd=base)
        [wheels[name]] = (base / name / "wheel").iterdir()
    return wheels


def test_the_wheel_holds_the_package_and_the_stock_files(built: Mapping[str, Path]) -> None:
    files = list_source_files()
    expected = {name for name in files if name.startswith("runner/")}
    expected |= {f"runner/stock/{name}" for name in files if name.split("/")[0] in STOCK_FOLDERS}
    with zipfile.ZipFile(built["tree"]) as wheel:
        found = {name for name in wheel.namelist() if ".dist-info/" not in name}
        assert found == expected
        for name in expected:
            content = wheel.read(name)
            assert content == (ROOT / name.removeprefix("runner/stock/")).read_bytes()
    with zipfile.ZipFile(built["sdist"]) as wheel:
        assert {name for name in wheel.namelist() if ".dist-info/" not in name} == expected


@dataclass(frozen=True)
class Installed:
    """An environment with the wheel, and this environment's libraries, but not this source tree."""

    bin_dir: Path
    site_dir: Path

    def environment(self) -> dict[str, str]:
        kept = {
            name: value
            for name, value in os.environ.items()
            if name not in ("PYTHONPATH", "VIRTUAL_ENV")
        }
        path = f"{self.bin_dir}:{os.environ['PATH']}"
        return {**kept, "PATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}

    def runner(self, *arguments: str | Path, cwd: Path) -> str:
        return run("runner", *arguments, cwd=cwd, environment=self.environment()).stdout


@pytest.fixture(scope="session")
def installed(built: Mapping[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Installed:
    """The wheel in a virtual environment."""
    base = tmp_path_factory.mktemp("installed")
    venv.create(base, with_pip=False)
    bin_dir = base / "bin"
    site_dir = Path(sysconfig.get_path("purelib", "venv", {"base": str(base)}))
    # A folder on the path is searched, but its own .pth files, such as those of an editable
    # install, are not read.
    (site_dir / "libraries.pth").write_text("\n".join(site.getsitepackages()))
    pip = (sys.executable, "-m", "pip", "--python", bin_dir / "python", "install", "--quiet")
    run(*pip, "--no-deps", "--no-index", "--ignore-installed", built["tree"], cwd=base)
    (bin_dir / "accelerate").write_text(ACCELERATE.format(python=bin_dir / "python"))
    (bin_dir / "accelerate").chmod(0o755)
    return Installed(bin_dir, site_dir)


def test_a_project_is_made_from_the_installed_wheel(installed: Installed, tmp_path: Path) -> None:
    program = "import runner; print(runner.__file__)"
    found = run(
        installed.bin_dir / "python",
        "-c",
        program,
        cwd=tmp_path,
        environment=installed.environment(),
    ).stdout
    assert Path(found.strip()).parent == installed.site_dir / "runner"
    for folder in (installed.site_dir / "runner").rglob("*"):
        folder.chmod(folder.stat().st_mode & ~0o222)  # as a system's packages are for its users
    installed.runner("init", "study", cwd=tmp_path)
    installed.runner("init", "demo", "--from", "demo", cwd=tmp_path)
    for name, grid, num_recipes in (("study", "first", 12), ("demo", "demo", 24)):
        installed.runner("render", cwd=tmp_path / name)
        checked = installed.runner("check", f"recipes/{grid}", "--schema-only", cwd=tmp_path / name)
        assert f"{num_recipes} recipes are well-formed" in checked
        with (tmp_path / name / "data" / "demo.jsonl").open("a") as stream:
            stream.write("\n")  # now a user's own files, writable even if the package is not


@pytest.mark.slow
def test_a_project_trains_from_the_installed_wheel(
    installed: Installed, tmp_path: Path, data_path: Path, tiny_model: Callable[[str], Path]
) -> None:
    rows: Sequence[str] = data_path.read_text().splitlines()[:12]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    installed.runner(
        "init", "study", "--data", "rows.jsonl", "--model", tiny_model("llama"), cwd=tmp_path
    )
    study = tmp_path / "study"
    installed.runner("render", cwd=study)
    assert "12 recipes can be trained" in installed.runner("check", "recipes/first", cwd=study)
    assert (
        installed.runner("sweep", "recipes/first", "--dry-run", cwd=study).count(
            "accelerate launch"
        )
        == 12
    )
    one = ("--where", "loss=completion", "--where", "num_train_samples=2", "--where", "seed=1")
    installed.runner("sweep", "recipes/first", *one, cwd=study)
    statuses = json.loads(installed.runner("status", "--json", cwd=study))
    assert [status["state"] for status in statuses].count("completed") == 1
    assert "1 completed" in installed.runner("report", "recipes/first", *one, cwd=study)
