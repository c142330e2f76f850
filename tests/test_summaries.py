"""One recipe of the summaries grid per model family, QLoRA and all, with path, model and data replaced by tiny ones."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from conftest import Project

from runner.paths import RunPaths
from runner.record import load_result

ROOT = Path(__file__).resolve().parent.parent
RECIPES = {
    "gemma2": "gemma-2-9b-it_task-1_auto_060_completion_acc08",
    "llama": "llama-3.1-8b-instruct_task-2_manual_120_full_acc16",
    "mistral": "mistral-7b-instruct_task-3_auto_180_completion_acc08",
}


def write_chats(path: Path, first: int, count: int) -> None:
    rows = [
        {"document": f"Ann: shall we meet at {n}?\nBob: yes, in room {n % 7}.", "summary": f"Ann and Bob meet at {n}."}
        for n in range(first, first + count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.slow
@pytest.mark.parametrize("family", RECIPES)
def test_a_recipe_of_each_family_trains_on_tiny_models(project: Project, family: str) -> None:
    project.add_model(family)
    shutil.copytree(ROOT / "recipe_templates", project.root / "recipe_templates")
    for name, first, count in (("train", 0, 20), ("validation", 100, 4), ("test", 200, 4)):
        write_chats(project.root / f"{name}.jsonl", first, count)
    recipe_path = ROOT / "recipes" / "summaries" / f"{RECIPES[family]}.yaml"
    done = project.cli(
        *("launch", recipe_path, "--name", family),
        *(f"model.path=models/{family}", "model.pad_token=auto"),
        *(f"data.{name}.path={name}.jsonl" for name in ("train", "validation", "test")),
        *("data.num_train_samples=20", "training.num_train_epochs=2"),
        "launch.accelerate_config=accelerate_configs/cpu.yaml",
    )
    log = "\n".join(path.read_text() for path in project.root.glob("runs/summaries/*/attempts/1/log.txt"))
    assert done.returncode == 0, done.stderr + log
    paths = RunPaths(project.root / "runs" / "summaries" / family)
    result = load_result(paths)
    assert result is not None
    updates_per_epoch = 3 if "acc08" in RECIPES[family] else 2
    assert result.num_steps == 2 * updates_per_epoch
    assert (paths.model_dir / "adapter_model.safetensors").exists()
    recorded = json.loads(paths.recipe_path.read_text())["recipe"]
    assert recorded["quantization"]["method"] == "4bit"
    assert f"model.path=models/{family}" in recorded["run"]["overrides"]
