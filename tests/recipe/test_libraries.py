"""A training process imports Weights & Biases, bitsandbytes, DeepSpeed, SciPy and Matplotlib
exactly when its recipe needs them.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from runner.recipe.libraries import find_unused_libraries
from tests.conftest import Project

EVERYTHING = ["wandb", "bitsandbytes", "deepspeed", "scipy", "matplotlib"]
# SciPy is hidden only where nothing that may need it is in use.
WITH_BITSANDBYTES = ["wandb", "deepspeed", "matplotlib"]


def test_what_a_recipe_needs_is_not_hidden(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(project.root)
    model_dir = project.root / "models" / "gemma"
    model_dir.mkdir(parents=True)
    (model_dir / "config.json").write_text("{}")
    four_bit = "{method: 4bit, bnb_4bit_quant_type: nf4, bnb_4bit_use_double_quant: true}"
    dtype = "quantization.bnb_4bit_compute_dtype=float32"

    def unused(*overrides: str) -> list[str]:
        return find_unused_libraries(project.recipe(*overrides))

    assert unused() == EVERYTHING
    assert unused("tracking.report_to=[wandb]") == ["bitsandbytes", "deepspeed"]
    assert unused("tracking.report_to=[tensorboard]") == EVERYTHING[:3]
    assert unused("adapter.init_lora_weights=loftq") == [*EVERYTHING[:3], "matplotlib"]
    assert unused("adapter.init_lora_weights=gaussian") == EVERYTHING
    assert unused(f"quantization={four_bit}", dtype) == WITH_BITSANDBYTES
    for optimizer in ("paged_adamw_32bit", "adamw_8bit", "ademamix", "lion_32bit", "rmsprop_bnb"):
        assert unused(f"training.optim={optimizer}") == WITH_BITSANDBYTES
    for optimizer in ("adamw_torch", "adafactor"):
        assert unused(f"training.optim={optimizer}") == EVERYTHING
    (model_dir / "config.json").write_text(
        json.dumps({"quantization_config": {"load_in_4bit": True}})
    )
    assert unused() == WITH_BITSANDBYTES
    # A hub id that is not here yet, and a mistake.
    for path in ("no/such-model", "a/folder/that/is/not/there"):
        assert unused(f"model.path={path}") == WITH_BITSANDBYTES


def test_deepspeed_is_not_hidden_where_it_may_be_asked_for(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(project.root)
    config = project.root / "accelerate.yaml"
    recipe = project.recipe("launch.accelerate_config=accelerate.yaml")
    config.write_text("distributed_type: MULTI_GPU\n")
    assert "deepspeed" in find_unused_libraries(recipe)
    # As a command typed by hand may ask.
    assert not {"deepspeed", "scipy"} & {*find_unused_libraries(recipe, uses_deepspeed=True)}
    for text in ("distributed_type: DEEPSPEED\n", "deepspeed_config: {}\n", "[", "- no mapping\n"):
        config.write_text(text)
        assert "deepspeed" not in find_unused_libraries(recipe), text
    config.unlink()
    assert "deepspeed" not in find_unused_libraries(recipe)


def test_hidden_libraries_are_not_imported_by_others(tmp_path: Path) -> None:
    code = (
        "import sys\nfrom runner.recipe.libraries import hide_libraries\n"
        "assert 'trl' not in sys.modules"
        " and 'peft' not in sys.modules, 'too late to hide anything'\n"
        f"hide_libraries({EVERYTHING})\nimport runner.sft.train\nfrom accelerate.utils import"
        " extract_model_from_parallel\nfrom torch.nn import Linear\nextract_model_from_parallel("
        "Linear(1, 1))\nprint([name for name in"
        f" sys.modules if name.partition('.')[0] in {EVERYTHING} and sys.modules[name]])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.stdout.strip() == "[]", done.stdout + done.stderr
