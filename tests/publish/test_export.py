"""`runner export`: folders that load as their README says, give the run's logits, and reach a hub
whole.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from runner.files import load_json
from runner.model.weights import ExportError
from runner.publish.card import load_versions
from runner.publish.export import compare_logits
from runner.run.paths import RunPaths
from runner.run.record import RunRecord, write_record
from tests.conftest import Project, build_environment
from tests.support.fake_hub import fake_hub
from tests.support.modes import list_other_modes, umask_of
from tests.support.scored_runs import make_attempt
from tests.support.training_runs import read_result


def test_the_versions_are_those_of_the_training(tmp_path: Path) -> None:
    paths = RunPaths(tmp_path)
    assert load_versions(paths) == {}
    repair = make_attempt(number=2, is_repair=True, versions={"torch": "3.0.0"})
    write_record(paths, RunRecord(attempts=(make_attempt(), repair)))
    assert load_versions(paths) == make_attempt().versions


def test_logits_that_differ_are_refused() -> None:
    expected = torch.tensor([[1.0, -4.0]])
    assert compare_logits(expected + 1e-5, expected, "float32") == pytest.approx(2.5e-6, rel=0.1)
    assert compare_logits(expected + 0.1, expected, "bfloat16") == pytest.approx(0.025)
    for other, dtype in (
        (expected + 1e-3, "float32"),
        (expected * float("nan"), "bfloat16"),
        (expected.T, "float32"),
    ):
        with pytest.raises(ExportError, match="logits"):
            compare_logits(other, expected, dtype)


def run_readme(project: Project, export_dir: Path) -> str:
    """The output of the program in the model card, started where the recipe's paths hold."""
    program = re.search(r"```python\n(.*?)```", (export_dir / "README.md").read_text(), re.DOTALL)
    assert program is not None
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            program.group(1).replace('folder = "."', f"folder = {str(export_dir)!r}"),
        ],
        cwd=project.root,
        env=build_environment(),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_export_of_an_adapter(finished: Project) -> None:
    done = finished.cli("export", "runs/tests/llama-lora", "--output", "exports/adapter")
    export_dir, model_dir = (
        finished.root / "exports" / "adapter",
        finished.paths("llama-lora").model_dir,
    )
    assert done.returncode == 0, done.stderr
    assert (
        done.stdout
        == "exports/adapter: after reloading, its logits differ from the run's by at most 0\n"
    )
    for name in (
        "adapter_model.safetensors",
        "adapter_config.json",
        "generation_config.json",
        "tokenizer.json",
    ):
        assert (export_dir / name).read_bytes() == (model_dir / name).read_bytes()
    assert {path.suffix for path in export_dir.iterdir()} == {
        ".json",
        ".safetensors",
        ".md",
        ".jinja",
    }, "no pickles"
    assert sorted(path.name for path in export_dir.parent.iterdir()) == ["adapter"]
    card, result = (export_dir / "README.md").read_text(), read_result(finished.paths("llama-lora"))
    base, tuned = (score["test"].nll_per_completion_token for score in (result.base, result.tuned))
    for part in (
        "`models/llama`",
        "`data.jsonl`, 22 rows",
        "LoRA, r 4",
        result.recipe_digest,
        f"{base:.4f} | {tuned:.4f}",
    ):
        assert part in card
    everything = b"".join(path.read_bytes() for path in export_dir.iterdir())
    assert str(finished.root).encode() not in everything and b"/tmp" not in everything
    run_readme(finished, export_dir)

    before = (export_dir / "README.md").stat()
    again = finished.cli("export", "runs/tests/llama-lora", "--output", "exports/adapter")
    assert again.returncode == 2 and "exports/adapter is not an empty folder" in again.stderr
    assert (export_dir / "README.md").stat() == before


@pytest.mark.slow
def test_an_export_follows_the_umask_not_the_modes_of_the_run(finished: Project) -> None:
    for umask, more in ((0o022, ()), (0o077, ("--merge",))):
        export_dir = finished.root / "exports" / f"umask-{umask:o}"
        with umask_of(umask):
            done = finished.cli(
                "export", "runs/tests/llama-lora", "--output", str(export_dir), *more
            )
        assert done.returncode == 0, done.stderr
        assert list_other_modes(export_dir, umask) == {}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama-lora", "gemma-full"])
def test_export_of_a_whole_model_and_its_push(finished: Project, name: str) -> None:
    export_dir = finished.root / "exports" / f"whole-{name}"
    export_dir.mkdir(parents=True)  # an empty folder is as good as none
    with fake_hub() as hub:
        done = finished.cli(
            "export", f"runs/tests/{name}", "--output", export_dir, "--merge",
            "--push", f"lab/{name}", environment=hub.environment(),
        )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert hub.token not in done.stdout + done.stderr
    repository = hub.repositories[f"lab/{name}"]
    assert repository.is_private and repository.files == {
        path.name: path.read_bytes() for path in export_dir.iterdir()
    }
    assert repository.messages[0].startswith(f"tests/{name}, recipe ")
    model, report = AutoModelForCausalLM.from_pretrained(export_dir, output_loading_info=True)
    assert not report["missing_keys"] and model.config.use_cache and model.config.vocab_size == 513
    run_readme(finished, export_dir)
    recipe_path = load_json(finished.paths(name).recipe_path)["recipe"]["model"]["path"]
    base = AutoModelForCausalLM.from_pretrained(
        finished.root / recipe_path, attn_implementation="eager"
    )
    base.resize_token_embeddings(513)
    weights_dir = finished.paths(name).model_dir
    tuned = PeftModel.from_pretrained(base, weights_dir) if name == "llama-lora" else None
    expected = tuned or AutoModelForCausalLM.from_pretrained(
        weights_dir, attn_implementation="eager"
    )
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        torch.testing.assert_close(
            model(ids).logits, expected.eval()(ids).logits, rtol=0, atol=1e-5
        )


@pytest.mark.slow
def test_a_failed_export_leaves_nothing(finished: Project) -> None:
    run_dir = finished.root / "runs" / "tests" / "damaged-export"
    shutil.copytree(finished.paths("llama-lora").run_dir, run_dir)
    path = run_dir / "model" / "adapter_model.safetensors"
    weights = load_file(path)
    weights["base_model.model.model.embed_tokens.weight"][7] = float("nan")
    save_file(weights, path, metadata={"format": "pt"})
    # As of before there were checksums, which would tell before the weights are looked at
    result_path = run_dir / "result.json"
    result = json.loads(result_path.read_text())
    kept = {key: value for key, value in result.items() if key not in ("files", "result_sha256")}
    result_path.write_text(json.dumps(kept))
    done = finished.cli("export", run_dir, "--output", "exports/damaged")
    assert done.returncode == 2 and "embed_tokens.weight is not finite" in done.stderr
    assert not (finished.root / "exports" / "damaged").exists()
    assert not (finished.root / "exports" / ".damaged.partial").exists()
