"""Loads `model/` with Transformers and PEFT alone, and scores it from plain logits."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from runner.data.draw import draw_splits
from runner.data.rows import Row, build_samples
from runner.data.tokenizer import load_tokenizer
from runner.files import load_jsonl
from runner.recipe.parse import Recipe
from runner.run.paths import RunPaths
from runner.run.record import load_stored_recipe
from tests.conftest import Project
from tests.support.training_runs import read_result

# Ten times the largest relative difference over all of `RUNS`, 5.1e-8, of float32
# log-probabilities.
ROW_TOLERANCE = 5e-7


def recipe_of(paths: RunPaths) -> Recipe:
    stored = load_stored_recipe(paths)
    assert stored is not None
    return stored.recipe


def load_exported(project: Project, paths: RunPaths) -> Any:
    recipe = recipe_of(paths)
    settings: dict[str, Any] = {
        "dtype": torch.float32,
        "attn_implementation": recipe.model.attn_implementation,
    }
    if recipe.adapter.method == "none":
        return AutoModelForCausalLM.from_pretrained(paths.model_dir, **settings).eval()
    base = AutoModelForCausalLM.from_pretrained(project.root / recipe.model.path, **settings)
    if recipe.model.pad_token == "add":
        base.resize_token_embeddings(len(AutoTokenizer.from_pretrained(paths.model_dir)))
    return PeftModel.from_pretrained(base, paths.model_dir).eval()


@torch.no_grad()
def score_plainly(model: Any, rows: Sequence[Row]) -> list[tuple[float, float]]:
    """Sums over completion and over full text, one row at a time, from logits."""
    scores = []
    for row in rows:
        ids = torch.tensor([row.input_ids])
        log_probs = torch.log_softmax(model(input_ids=ids).logits[0, :-1].double(), dim=-1)
        nll = -log_probs[torch.arange(len(row.input_ids) - 1), ids[0, 1:]]
        completion = [
            nll[at - 1].item() for span in row.spans for at in range(span.start, span.end)
        ]
        scores.append((math.fsum(completion), math.fsum(nll.tolist())))
    return scores


def assert_export_gives_recorded_scores(project: Project, paths: RunPaths) -> None:
    """Assert that the export loads plainly, that its tokenizer gives the rows' tokens, and that
    each row has its recorded score.
    """
    with contextlib.chdir(project.root):
        recipe, result = recipe_of(paths), read_result(paths)
        tokenizer = AutoTokenizer.from_pretrained(paths.model_dir)
        rows = build_samples(recipe.data, load_tokenizer(recipe.model)).test.rows
        for raw, row in zip(draw_splits(recipe.data).test, rows, strict=True):
            assert (
                tuple(tokenizer.apply_chat_template(list(raw.messages))["input_ids"])
                == row.input_ids
            )
        assert tokenizer.pad_token != tokenizer.eos_token

        recorded = [row for row in load_jsonl(paths.eval_rows_path) if row["model"] == "tuned"]
        plain = score_plainly(load_exported(project, paths), rows)
        assert [row["row_id"] for row in recorded] == [row.row_id for row in rows]
        for row, (completion_nll_sum, nll_sum) in zip(recorded, plain, strict=True):
            assert row["completion_nll_sum"] == pytest.approx(completion_nll_sum, rel=ROW_TOLERANCE)
            assert row["nll_sum"] == pytest.approx(nll_sum, rel=ROW_TOLERANCE)
        tuned = result.tuned["test"]
        assert tuned.completion_nll_sum == math.fsum(row["completion_nll_sum"] for row in recorded)
        assert tuned.nll_sum == math.fsum(row["nll_sum"] for row in recorded)
        assert tuned.num_tokens == sum(len(row.input_ids) - 1 for row in rows)
        assert tuned.num_rows == 15
