"""`runner export`: the tuned model of a run as a folder for others, compared before it is there.

Owns the model card (the folder's README.md, without clock times) and sending the folder to the
hub: to which repository, under which token, and the words of a refusal.
"""

from __future__ import annotations

import gc
import os
import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
import yaml
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM

from runner.checkpoints.marker import sync_folder
from runner.data.chat_template import METHOD_TEXT, ChatTemplate
from runner.errors import RefusedError, RunnerError
from runner.files import follow_umask, fsync_dir, write_text_atomic
from runner.model.load import build_load_arguments, load_tuned_model
from runner.model.weights import (
    ExportError,
    add_to_adapter,
    collect_resized_embeddings,
    sort_adapter_config,
    verify_export,
)
from runner.publish.tuned import TunedRun, open_tuned_run, quieten
from runner.recipe.contents import list_content_paths
from runner.recipe.data_section import DataSection
from runner.recipe.identity import build_digest_payload
from runner.recipe.parse import Recipe
from runner.recipe.schema import QuantizationOff
from runner.run.paths import RunPaths
from runner.run.record import TrainResult, list_trained, load_record, load_result
from runner.strict import thaw

_LOSSES: Final = {
    "completion": "completion: the assistant's turns with their end-of-turn tokens",
    "full": "full: every token that is not padding",
}


def build_model_card(
    run: TunedRun, *, is_adapter: bool, result: TrainResult | None, versions: Mapping[str, str]
) -> str:
    """Markdown with the hub's metadata block. Paths stand as they do in the recipe.

    `result` is None for a checkpoint: the scores of a run are those of its best weights.
    """
    parts = [
        _front_matter(run, is_adapter=is_adapter),
        f"# {run.recipe.run.name}",
        _describe(run, is_adapter=is_adapter),
        "## Scores\n\n" + _scores(run, result),
        "## Loading\n\n" + _loading(run, is_adapter=is_adapter),
        "## Recipe\n\n~~~~yaml\n" + _dump(build_digest_payload(run.stored.recipe)) + "~~~~",
        "## Versions\n\n"
        + ", ".join(f"{name} {version}" for name, version in sorted(versions.items())),
    ]
    return "\n\n".join(parts) + "\n"


def _front_matter(run: TunedRun, *, is_adapter: bool) -> str:
    metadata: dict[str, object] = {
        "library_name": "peft" if is_adapter else "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["sft", *(["lora"] if run.recipe.adapter.method == "lora" else [])],
    }
    if "model.path" not in list_content_paths(run.recipe):  # the hub knows it by this name
        metadata["base_model"] = run.recipe.model.path
        metadata["base_model_relation"] = "adapter" if is_adapter else "finetune"
    return "---\n" + _dump(metadata) + "---"


def _describe(run: TunedRun, *, is_adapter: bool) -> str:
    recipe, data, training = run.recipe, run.recipe.data, run.recipe.training
    lora = recipe.adapter.method == "lora"
    what = (
        "a LoRA adapter"
        if is_adapter
        else "all weights, a LoRA adapter merged into them"
        if lora
        else "all weights"
    )
    if lora:
        adapter = recipe.adapter.model_dump(mode="json")
        method = (
            f"LoRA, r {adapter['r']}, alpha {adapter['lora_alpha']}, dropout"
            f" {adapter['lora_dropout']}"
        )
    else:
        method = "full fine-tune"
    if recipe.quantization.method != "none":
        method += f", on {recipe.quantization.method} weights"
    length = (
        f"{training.max_steps} steps"
        if training.max_steps
        else f"{training.num_train_epochs:g} epochs"
    )
    stated = training.hugging_face_arguments()
    rows = {
        "base model": (
            f"`{recipe.model.path}`"
            + (f", revision `{recipe.model.revision}`" if recipe.model.revision else "")
        ),
        "what this is": (
            what + (f", of the checkpoint `{run.checkpoint}`" if run.checkpoint else "")
        ),
        "training data": (
            f"{_name_sources(data)}, {data.num_train_rows or 'all'} rows, seed {data.seed}"
        ),
        "task": data.task.name,
        "loss": _LOSSES[recipe.loss],
        "method": method,
        "training": (
            f"{length}, global batch {recipe.global_batch_size}, learning rate"
            f" {stated.get('learning_rate', 'of the library')},"
            f" {stated.get('lr_scheduler_type', 'default')} schedule, seed {training.seed}"
        ),
        "chosen by": (
            f"{recipe.checkpoints.metric} on the validation rows, {recipe.checkpoints.mode}"
        ),
        "recipe": f"{recipe.run.full_name}, digest `{run.stored.recipe_digest}`",
    }
    return "\n".join(
        ["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())]
    )


def _name_sources(data: DataSection) -> str:
    shares = data.train_shares
    if shares is None:
        return f"`{data.train_sources[0].path}`"
    named = zip(data.train_sources, shares, strict=True)
    return ", ".join(f"`{source.path}` (share {share:g})" for source, share in named)


def _scores(run: TunedRun, result: TrainResult | None) -> str:
    if result is None:
        return (
            f"These are the weights of the checkpoint `{run.checkpoint}`;"
            " a run is scored at its end."
        )
    lines = ["| split | metric | base model | tuned |", "|---|---|---:|---:|"]
    for split, base in result.base.items():
        tuned = result.tuned[split]
        for metric, words in (
            ("nll_per_completion_token", "completion token"),
            ("nll_per_token", "token"),
        ):
            values = f"{getattr(base, metric):.4f} | {getattr(tuned, metric):.4f}"
            lines.append(f"| {split} | negative log-likelihood per {words} | {values} |")
    generation = result.generation
    if "base" in generation and "tuned" in generation:
        base_metrics, tuned_metrics = generation["base"].metrics, generation["tuned"].metrics
        for metric in dict.fromkeys([*base_metrics, *tuned_metrics]):
            # A metric of the project's own may judge no answer of one of them.
            cells = [
                f"{metrics[metric]:.4f}" if metric in metrics else "none judged"
                for metrics in (base_metrics, tuned_metrics)
            ]
            lines.append(f"| test | {metric} | {cells[0]} | {cells[1]} |")
    steps = (
        f"Step {result.best_step} of {result.num_steps}, trained on {result.num_train_rows} rows."
    )
    return "\n".join([*lines, "", steps])


def _loading(run: TunedRun, *, is_adapter: bool) -> str:
    kind, library = (
        ("AutoPeftModelForCausalLM", "peft")
        if is_adapter
        else ("AutoModelForCausalLM", "transformers")
    )
    others = (
        "AutoTokenizer, GenerationConfig" if is_adapter else "AutoModelForCausalLM, AutoTokenizer"
    )
    template_kwargs = thaw(run.recipe.model.chat_template_kwargs)
    lines = [
        *([f"from {library} import {kind}"] if is_adapter else []),
        f"from transformers import {others}",
        "",
        'folder = "."  # or the id on the hub',
        "tokenizer = AutoTokenizer.from_pretrained(folder)",
        f'model = {kind}.from_pretrained(folder, dtype="{run.recipe.model.dtype}")',
        *(
            ["model.generation_config = GenerationConfig.from_pretrained(folder)"]
            if is_adapter
            else []
        ),
        'messages = [{"role": "user", "content": "Hello"}]',
        "inputs = tokenizer.apply_chat_template(",
        '    messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"'
        + ("," if template_kwargs else ""),
        *([f"    **{template_kwargs!r},"] if template_kwargs else []),
        ")",
        "output = model.generate(**inputs, max_new_tokens=200)",
        (
            'print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :],'
            " skip_special_tokens=True))"
        ),
    ]
    notes = []
    if is_adapter and "model.path" in list_content_paths(run.recipe):
        notes = [
            "",
            (
                f"The base model is looked for at `{run.recipe.model.path}`,"
                " relative to where this is started."
            ),
        ]
    if run.recipe.model.template_date is not None:
        notes += [
            "",
            (
                "In training the chat template printed the date"
                f" {run.recipe.model.template_date}; `apply_chat_template` prints today's."
            ),
        ]
    return "\n".join(["```python", *lines, "```", *notes])


def _dump(value: object) -> str:
    text: str = yaml.safe_dump(value, sort_keys=False, allow_unicode=True, width=100)
    return text


# What a push takes away from the repository unless it writes it anew: an adapter must not lie
# beside other weights.
_WEIGHT_FILES: Final = (
    "*.safetensors",
    "*.safetensors.index.json",
    "adapter_config.json",
    "config.json",
)


class PushError(RunnerError):
    """The hub did not take the model; the exported folder stays where it is."""


@dataclass(frozen=True)
class HubTarget:
    """A repository on the hub and the token that may write to it, which is shown nowhere."""

    repo_id: str
    is_private: bool
    token: str

    def __repr__(self) -> str:
        return f"HubTarget({self.repo_id})"

    @classmethod
    def of(cls, recipe: Recipe, repo_id: str = "") -> HubTarget:
        """The repository, by default the recipe's own. Raises: RefusedError, without a repository
        or a token.
        """
        repo_id = repo_id or recipe.tracking.hub_model_id or ""
        token = os.environ.get("HF_TOKEN", "").strip()
        if not repo_id:
            raise RefusedError(
                f"the recipe of {recipe.run.name} has no `tracking.hub_model_id`, so there is"
                " nowhere to push to",
                hint="name the repository: --push OWNER/NAME",
            )
        if not token:
            raise RefusedError(
                f"pushing to {repo_id} needs a token with write access",
                hint=(
                    "set HF_TOKEN in the environment;"
                    " it is read from nowhere else and stored nowhere"
                ),
            )
        return cls(repo_id, recipe.tracking.hub_private, token)


def push_folder(folder: Path, target: HubTarget, message: str) -> str:
    """The address of the commit that holds the folder.

    Raises:
        PushError: the hub refuses, cannot be reached, or has a public repository under a name that
            should be private.
    """
    from huggingface_hub import HfApi

    api = HfApi(token=target.token)
    print(f"pushing to {target.repo_id}", file=sys.stderr, flush=True)
    with _in_our_words(folder, target):
        api.create_repo(target.repo_id, private=target.is_private, exist_ok=True)
        if target.is_private and not api.repo_info(target.repo_id).private:
            raise PushError(
                f"{target.repo_id} is public, and `tracking.hub_private` is true:"
                " nothing was pushed",
                hint="make the repository private, or set `tracking.hub_private: false`",
            )
        commit = api.upload_folder(
            repo_id=target.repo_id,
            folder_path=folder,
            commit_message=message,
            delete_patterns=list(_WEIGHT_FILES),
        )
    return str(commit.commit_url)


@contextmanager
def _in_our_words(folder: Path, target: HubTarget) -> Iterator[None]:
    """Errors of the hub, the token cut out of them should they hold it."""
    from huggingface_hub.errors import HFValidationError, OfflineModeIsEnabled

    # Of the library that the hub's calls HTTP by, which may be another one some day.
    from huggingface_hub.errors import HTTPError as HttpError  # type: ignore[attr-defined]

    try:
        yield
    except (HttpError, HFValidationError, OfflineModeIsEnabled, ValueError, OSError) as error:
        text = " ".join(str(error).split()).replace(target.token, "***")
        raise PushError(
            f"{folder} was not pushed to {target.repo_id}: {text}",
            hint=(
                f"hf upload {target.repo_id} {folder}  # once the reason is gone:"
                " the folder is complete"
            ),
        ) from None


ADAPTER_FILES: Final = ("adapter_config.json", "adapter_model.safetensors")
# The largest difference of a logit over the largest logit. Merging rounds each weight once to the
# model's dtype.
TOLERANCES: Final = {"float32": 1e-5, "float16": 1e-2, "bfloat16": 5e-2}
_PROBE: Final = (
    {"role": "user", "content": "What is 17 + 25? Answer in one sentence."},
    {"role": "assistant", "content": "17 + 25 is 42."},
)


def export_run(
    run_dir: Path, output_dir: Path, *, checkpoint: str | None, is_merged: bool, push_to: str | None
) -> float:
    """Write the folder, and push it where asked; the largest difference of a logit that was found
    in it.

    `push_to` is a repository, empty for the recipe's own, None for none.

    Raises:
        RefusedError: the run has nothing to export, the folder is taken, or nothing says where to
            push to.
        ExportError: what was written does not give the logits of the run's model.
    """
    quieten()
    with open_tuned_run(run_dir, checkpoint) as run:
        # Or its error, before the work.
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
            message = f"{run.recipe.run.full_name}, recipe {run.stored.recipe_digest[:12]}"
            print(push_folder(output_dir, target, message), file=sys.stderr)
    return difference


def _refuse_taken(output_dir: Path) -> None:
    if output_dir.exists() and (not output_dir.is_dir() or any(output_dir.iterdir())):
        raise RefusedError(
            f"{output_dir} is not an empty folder",
            hint="export to a new one: nothing is overwritten",
        )


def _write(run: TunedRun, target_dir: Path, *, is_merged: bool) -> float:
    recipe, tokenizer = run.recipe, run.load_tokenizer()
    is_adapter = recipe.adapter.method == "lora" and not is_merged
    if recipe.adapter.method == "lora" and is_merged:
        recipe = _unquantised(recipe)
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
    print(f"loading {target_dir.name} again", file=sys.stderr, flush=True)
    found = probe_logits(load_plainly(target_dir, recipe, is_adapter=is_adapter), tokenizer)
    return compare_logits(found, expected, recipe.model.dtype)


def load_versions(paths: RunPaths) -> Mapping[str, str]:
    """The versions that the model was trained under; a repair may run under others."""
    trained = list_trained(load_record(paths).attempts)
    return trained[-1].versions if trained else {}


def _unquantised(recipe: Recipe) -> Recipe:
    """The recipe on weights in the model's dtype: merging into 4-bit weights would round every one
    of them again.
    """
    return recipe.model_copy(update={"quantization": QuantizationOff(method="none")})


def load_plainly(model_dir: Path, recipe: Recipe, *, is_adapter: bool) -> Any:
    """The exported model as its README says, in the recipe's dtype and quantisation."""
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

    Raises: ExportError, if it is beyond what the dtype explains.
    """
    if found.shape != expected.shape:
        raise ExportError(
            f"the export gives logits of the shape {tuple(found.shape)}, not"
            f" {tuple(expected.shape)}"
        )
    difference = float((found - expected).abs().max() / expected.abs().max())
    if not difference <= TOLERANCES[dtype]:
        raise ExportError(
            f"the export gives other logits than the run's model: they differ by {difference:.2g}"
            f" of the largest one, and {TOLERANCES[dtype]:.0e} is allowed in {dtype}"
        )
    return difference
