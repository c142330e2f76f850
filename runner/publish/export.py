"""`runner export`: writes the tuned model of a run to a folder, and compares it before it appears
there.
"""

from __future__ import annotations

import gc
import shutil
import sys
from pathlib import Path
from typing import Any, Final

import torch
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM

from runner.checkpoints.marker import sync_folder
from runner.data.chat_template import METHOD_TEXT, ChatTemplate
from runner.errors import RefusedError
from runner.files import follow_umask, fsync_dir, write_text_atomic
from runner.model.load import build_load_arguments, load_tuned_model
from runner.model.weights import (
    ExportError,
    add_to_adapter,
    collect_resized_embeddings,
    sort_adapter_config,
    verify_export,
)
from runner.publish.card import build_model_card, load_versions
from runner.publish.push import (
    HubTarget,
    PushError,
    describe_commit,
    hash_files,
    list_folder,
    open_pushes,
    push_files,
)
from runner.publish.tuned import TunedRun, open_tuned_run, quieten
from runner.recipe.parse import Recipe
from runner.recipe.schema import QuantizationOff
from runner.run.result import load_result

ADAPTER_FILES: Final = ("adapter_config.json", "adapter_model.safetensors")
# The largest logit difference relative to the largest logit. Merging rounds each weight once to the
# model's dtype.
TOLERANCES: Final = {"float32": 1e-5, "float16": 1e-2, "bfloat16": 5e-2}
_PROBE: Final = (
    {"role": "user", "content": "What is 17 + 25? Answer in one sentence."},
    {"role": "assistant", "content": "17 + 25 is 42."},
)


def export_run(
    run_dir: Path, output_dir: Path, *, checkpoint: str | None, is_merged: bool, push_to: str | None
) -> float:
    """Write the folder, and push it if requested; return the largest logit difference found in it.

    `push_to` is a repository, empty for the recipe's own, None for none.

    Raises:
        RefusedError: the run has nothing to export, the folder is taken, or no repository is named.
        ExportError: the written model gives different logits from the run's model.
    """
    quieten()
    with open_tuned_run(run_dir, checkpoint) as run:
        # Any error comes before the work.
        target = HubTarget.of(run.recipe, push_to) if push_to is not None else None
        _refuse_taken(output_dir)
        partial_dir = output_dir.absolute().with_name(f".{output_dir.name}.partial")
        shutil.rmtree(partial_dir, ignore_errors=True)
        partial_dir.mkdir(parents=True)
        try:
            difference = _write(run, partial_dir, is_merged=is_merged)
            follow_umask(partial_dir)
            sync_folder(partial_dir)
            partial_dir.rename(output_dir)
            fsync_dir(output_dir.absolute().parent)
        finally:
            shutil.rmtree(partial_dir, ignore_errors=True)
        if target:
            _push(run, output_dir, target)
    return difference


def _push(run: TunedRun, output_dir: Path, target: HubTarget) -> None:
    files = list_folder(output_dir)
    print(f"pushing to {target.repo_id}", file=sys.stderr, flush=True)
    try:
        commit = push_files(files, target, describe_commit(run))
    except PushError as error:
        raise PushError(
            f"{output_dir} was not pushed: {error.message}",
            hint=error.hint
            or f"hf upload {target.repo_id} {output_dir}  # once the problem is fixed:"
            " the folder is complete",
        ) from None
    print(commit.url, file=sys.stderr)
    if run.checkpoint is None:
        with open_pushes(run.paths) as pushes:
            pushes.record_pushed(target.repo_id, hash_files(files), commit)


def _refuse_taken(output_dir: Path) -> None:
    if output_dir.exists() and (not output_dir.is_dir() or any(output_dir.iterdir())):
        raise RefusedError(
            f"{output_dir} is not an empty folder",
            hint="export to a new folder: nothing is overwritten",
        )


def _write(run: TunedRun, target_dir: Path, *, is_merged: bool) -> float:
    recipe, tokenizer = run.recipe, run.load_tokenizer()
    is_adapter = recipe.adapter.method == "lora" and not is_merged
    if recipe.adapter.method == "lora" and is_merged:
        recipe = _unquantized(recipe)
    print(f"loading {run.weights_dir}", file=sys.stderr, flush=True)
    model = load_tuned_model(recipe, tokenizer, run.weights_dir)
    expected = probe_logits(model, tokenizer)
    generation_config = model.generation_config
    if is_adapter:
        for name in ADAPTER_FILES:
            shutil.copyfile(run.weights_dir / name, target_dir / name)
        sort_adapter_config(target_dir)
        add_to_adapter(target_dir, collect_resized_embeddings(model, recipe.model))
    else:
        whole = model.merge_and_unload() if recipe.adapter.method == "lora" else model
        whole.config.use_cache = True
        whole.save_pretrained(target_dir)
        del whole
    del model
    gc.collect()
    tokenizer.save_pretrained(target_dir)
    generation_config.save_pretrained(target_dir)
    result = load_result(run.paths) if run.checkpoint is None else None
    card = build_model_card(
        run,
        is_adapter=is_adapter,
        result=result,
        versions=load_versions(run.paths),
    )
    write_text_atomic(target_dir / "README.md", card)
    verify_export(target_dir, {})
    print(f"reloading {target_dir.name}", file=sys.stderr, flush=True)
    found = probe_logits(load_plainly(target_dir, recipe, is_adapter=is_adapter), tokenizer)
    return compare_logits(found, expected, recipe.model.dtype)


def _unquantized(recipe: Recipe) -> Recipe:
    """The recipe on weights in the model's dtype: merging into 4-bit weights would round each of
    them again.
    """
    return recipe.model_copy(update={"quantization": QuantizationOff(method="none")})


def load_plainly(model_dir: Path, recipe: Recipe, *, is_adapter: bool) -> Any:
    """The exported model, loaded as its README says, in the recipe's dtype and quantization."""
    kind = AutoPeftModelForCausalLM if is_adapter else AutoModelForCausalLM
    return kind.from_pretrained(model_dir, **build_load_arguments(recipe)).eval()


@torch.no_grad()
def probe_logits(model: Any, tokenizer: Any) -> torch.Tensor:
    """Logits of a short chat, (tokens, vocabulary), in float32 on the CPU."""
    text = ChatTemplate(tokenizer).render(_PROBE, METHOD_TEXT)
    inputs = tokenizer(text, add_special_tokens=False, return_tensors="pt").to(model.device)
    logits: torch.Tensor = model(**inputs).logits[0].float().cpu()
    return logits


def compare_logits(found: torch.Tensor, expected: torch.Tensor, dtype: str) -> float:
    """The largest difference, relative to the largest logit.

    Raises: ExportError, if it is larger than the dtype explains.
    """
    if found.shape != expected.shape:
        raise ExportError(
            f"the export gives logits of shape {tuple(found.shape)}, not {tuple(expected.shape)}"
        )
    difference = float((found - expected).abs().max() / expected.abs().max())
    if not difference <= TOLERANCES[dtype]:
        raise ExportError(
            f"the export gives different logits from the run's model: they differ by"
            f" {difference:.2g} of the largest one; {dtype} allows {TOLERANCES[dtype]:.0e}"
        )
    return difference
