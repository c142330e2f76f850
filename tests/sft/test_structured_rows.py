"""Runs on rows with tools, calls, thoughts and weights: trained, scored and answered as the rows
say, and chatted with under the same template.
"""

from __future__ import annotations

import json
from typing import Any

import pytest

from runner.files import load_json, load_jsonl, write_text_atomic
from runner.sft.generation import load_answers
from tests.conftest import Project
from tests.support.chat_formats import LOOK_UP, call_look_up, trl_template
from tests.support.training_runs import launch, read_result

pytestmark = pytest.mark.slow

OVERRIDES = (
    "data.train.path=calls.jsonl",
    "model.chat_template=qwen3.jinja",
    "data={num_train_samples: 8, num_validation_samples: 2, num_test_samples: 3, max_length: 1200}",
    "training={num_train_epochs: null, max_steps: 2, per_device_train_batch_size: 1}",
    "evaluation={eval_steps: 2, generation: {enabled: true, max_new_tokens: 4}}",
    "checkpoints.save_steps=2",
)


def conversation(number: int) -> dict[str, Any]:
    """A call with a thought, its answer, a wrong answer of weight 0, and a right one."""
    messages: list[dict[str, Any]] = [
        {"role": "user", "content": f"What is w{number}?"},
        {"role": "assistant", "reasoning_content": f"Look {number} up.", "content": ""},
        {"role": "tool", "name": "look_up", "content": f"thing {number}"},
        {"role": "assistant", "content": f"Wrong {number}.", "weight": 0},
        {"role": "user", "content": "No."},
        {"role": "assistant", "reasoning_content": "Again.", "content": f"It is {number}."},
    ]
    messages[1]["tool_calls"] = [call_look_up(word=f"w{number}")]
    return {"messages": messages, "tools": [LOOK_UP]}


@pytest.fixture(scope="module")
def calls(workplace: Project) -> Project:
    workplace.add_model("gemma")
    rows = [json.dumps(conversation(number)) for number in range(20)]
    write_text_atomic(workplace.root / "calls.jsonl", "\n".join(rows))
    write_text_atomic(workplace.root / "qwen3.jinja", trl_template("qwen3"))
    return workplace


def test_each_turn_is_trained_scored_and_answered(calls: Project) -> None:
    paths = launch(calls, "calls-split", "data.turns=split", *OVERRIDES)
    split = load_json(paths.samples_path)["splits"]["test"]
    # The call and the right answer of each conversation, never the answer of weight 0.
    assert [row_id.partition(".")[2] for row_id in split["ids"]] == ["1", "5"] * 3
    assert split["num_groups"] == 3
    assert split["groups"] == [row_id.partition(".")[0] for row_id in split["ids"]]
    for model in ("base", "tuned"):
        scored = [row for row in load_jsonl(paths.eval_rows_path) if row["model"] == model]
        assert [row["row_id"] for row in scored] == split["ids"]
        assert sum(row["num_bytes"] for row in scored) == split["num_bytes"]
        assert all(0 < row["template_nll_sum"] < row["completion_nll_sum"] for row in scored)
        assert [one.row_id for one in load_answers(paths.predictions_path, model)] == split["ids"]
    assert read_result(paths).num_steps == 2
    chat = calls.cli("chat", paths.run_dir, "--prompt", "Hello", "--max-new-tokens", "3")
    assert chat.returncode == 0, chat.stderr


def test_a_loss_never_moves_a_score(calls: Project) -> None:
    """Only `data.turns` and weights decide which completions of a conversation are scored."""
    rows = [
        {"messages": [*first, *second]}
        for first, second in (
            (pair(number, "first"), pair(number, "second")) for number in range(20)
        )
    ]
    (calls.root / "rounds.jsonl").write_text("\n".join(map(json.dumps, rows)))
    own = (*OVERRIDES, "data.train.path=rounds.jsonl", "model.chat_template=null")
    scores, labels = {}, {}
    for loss in ("completion", "last_completion"):
        paths = launch(calls, f"rounds-{loss}", f"loss={loss}", *own)
        found = load_jsonl(paths.eval_rows_path)
        scores[loss] = [row for row in found if row["model"] == "base"]
        labels[loss] = load_json(paths.samples_path)["splits"]["train"]["num_labels"]
    assert scores["completion"] == scores["last_completion"]
    assert 0 < labels["last_completion"] < labels["completion"]


def pair(number: int, place: str) -> list[dict[str, Any]]:
    return [
        {"role": "user", "content": f"Question {number}, {place}?"},
        {"role": "assistant", "content": f"Answer {number}, {place}."},
    ]
