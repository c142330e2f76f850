"""The model that a run leaves in `model/`: it stops at the end of a turn, and has every tensor that
it needs to load again.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from runner.data.masking import ConversationMasker, build_labels, end_of_turn_ids
from runner.data.tokenizer import load_tokenizer
from runner.files import load_json, write_json_atomic
from runner.model.load import build_lora_config, load_model
from runner.model.weights import (
    ExportError,
    add_to_adapter,
    collect_resized_embeddings,
    drop_loading_options,
    hash_trained,
    sort_adapter_config,
    verify_export,
    verify_same_weights,
    verify_score,
)
from runner.recipe.parse import Recipe
from runner.run.result import SplitScore
from tests.conftest import ROOT, Project
from tests.support.training_runs import RUNS

HUMAN_ASSISTANT = ROOT / "recipe_templates" / "chat" / "human_assistant.jinja"
CHATS = [
    [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    for question, answer in (
        ("Where is the parcel?", "It is on its way."),
        ("Is it late?", "No, it is not."),
    )
]


@pytest.fixture
def recipe_of(project: Project, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Recipe]:
    monkeypatch.chdir(project.root)

    def build(family: str, *overrides: str) -> Recipe:
        project.add_model(family)
        return project.recipe(f"model.path=models/{family}", *overrides)

    return build


def overfit(model: Any, tokenizer: Any, num_steps: int = 60) -> None:
    """Learn `CHATS` by heart under the completion mask."""
    masker = ConversationMasker(tokenizer)
    rows = [masker.mask(chat) for chat in CHATS]
    batches = [
        (
            torch.tensor([row.input_ids]),
            torch.tensor([build_labels(row.input_ids, row.spans, "completion")]),
        )
        for row in rows
    ]
    optimizer = torch.optim.AdamW(
        [weight for weight in model.parameters() if weight.requires_grad], lr=3e-3
    )
    model.train()
    for _ in range(num_steps):
        for input_ids, labels in batches:
            model(input_ids=input_ids, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


@pytest.mark.parametrize("family", ["gemma", "llama", "phi"])
def test_a_tuned_model_stops_by_itself(
    recipe_of: Callable[..., Recipe], family: str, tmp_path: Path
) -> None:
    recipe = recipe_of(
        family, f"model.chat_template={HUMAN_ASSISTANT if family == 'phi' else 'null'}"
    )
    base_dir = tmp_path / "base"
    shutil.copytree(recipe.model.path, base_dir)
    settings = load_json(base_dir / "generation_config.json")
    eos = AutoTokenizer.from_pretrained(base_dir).convert_tokens_to_ids(
        {"llama": "<|end_of_text|>"}.get(family, "<eos>")
    )
    # As in published base models: they know the end of a text, not that of a turn.
    if family != "phi":
        write_json_atomic(base_dir / "generation_config.json", settings | {"eos_token_id": eos})
    recipe = recipe.model_copy(
        update={"model": recipe.model.model_copy(update={"path": str(base_dir)})}
    )
    tokenizer = load_tokenizer(recipe.model)
    model = load_model(recipe, tokenizer)
    torch.manual_seed(0)
    overfit(model, tokenizer)
    exported_dir = tmp_path / "exported"
    model.save_pretrained(exported_dir)
    tokenizer.save_pretrained(exported_dir)

    plain, plain_tokenizer = (
        kind.from_pretrained(exported_dir) for kind in (AutoModelForCausalLM, AutoTokenizer)
    )
    for question, answer in CHATS:
        inputs = plain_tokenizer.apply_chat_template(
            [question], add_generation_prompt=True, return_dict=True, return_tensors="pt"
        )
        new = plain.generate(**inputs, max_new_tokens=60, do_sample=False)[
            0, inputs["input_ids"].shape[1] :
        ].tolist()
        assert plain_tokenizer.decode(new, skip_special_tokens=True).strip() == answer["content"]
        assert len(new) < 60 and new[-1] in end_of_turn_ids(plain_tokenizer)
    if family == "gemma":
        runaway = plain.generate(**inputs, max_new_tokens=60, do_sample=False, eos_token_id=eos)
        assert runaway.shape[1] - inputs["input_ids"].shape[1] == 60, (
            "its eos alone would never have stopped it"
        )


@pytest.mark.parametrize(
    ("family", "more", "names"),
    [
        ("gemma", (), ["embed_tokens.weight"]),  # tied
        ("llama", (), ["embed_tokens.weight", "lm_head.weight"]),
        # The other is saved as trained.
        ("llama", ("adapter.modules_to_save=[lm_head]",), ["embed_tokens.weight"]),
        (
            "llama",
            ("adapter.target_modules=[embed_tokens, q_proj]",),
            ["embed_tokens.base_layer.weight", "lm_head.weight"],
        ),
    ],
)
def test_resized_embeddings_travel_with_the_adapter(
    recipe_of: Callable[..., Recipe],
    tmp_path: Path,
    family: str,
    more: tuple[str, ...],
    names: list[str],
) -> None:
    recipe = recipe_of(family, "model.pad_token=add", *more)
    tokenizer = load_tokenizer(recipe.model)
    torch.manual_seed(0)
    model = get_peft_model(load_model(recipe, tokenizer), build_lora_config(recipe))
    overfit(model, tokenizer, num_steps=2)
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    embeddings = collect_resized_embeddings(model, recipe.model)
    assert [
        name.removeprefix("base_model.model.").removeprefix("model.") for name in embeddings
    ] == names
    add_to_adapter(tmp_path, embeddings)
    verify_export(tmp_path, {name: tuple(tensor.shape) for name, tensor in embeddings.items()})

    base = AutoModelForCausalLM.from_pretrained(recipe.model.path, attn_implementation="eager")
    base.resize_token_embeddings(len(tokenizer))  # a random row, which the adapter replaces
    again = PeftModel.from_pretrained(base, tmp_path).eval()
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        assert (
            torch.equal(again(ids).logits, model(ids).logits) and again(ids).logits.shape[-1] == 513
        )


def test_embeddings_of_the_base_size_stay_out(recipe_of: Callable[..., Recipe]) -> None:
    recipe = recipe_of("llama")
    model = get_peft_model(
        load_model(recipe, load_tokenizer(recipe.model)), build_lora_config(recipe)
    )
    assert collect_resized_embeddings(model, recipe.model) == {}


def test_an_export_with_another_tensor_is_refused(tmp_path: Path) -> None:
    weights = {"a.weight": torch.ones(2, 3), "b.weight": torch.tensor([1.0, float("nan")])}
    save_file({"a.weight": weights["a.weight"]}, tmp_path / "model.safetensors")
    verify_export(tmp_path, {"a.weight": (2, 3)})
    with pytest.raises(
        ExportError, match=r"should have the shape \(3, 2\), the export has \(2, 3\)"
    ):
        verify_export(tmp_path, {"a.weight": (3, 2)})
    with pytest.raises(ExportError, match="the export has nothing"):
        verify_export(tmp_path, {"c.weight": (1,)})
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(ExportError, match=r"b.weight is not finite"):
        verify_export(tmp_path, {})


def test_an_export_of_other_weights_than_the_best_checkpoint_is_refused(tmp_path: Path) -> None:
    model_dir, checkpoint_dir = tmp_path / "model", tmp_path / "step-4"
    for folder in (model_dir, checkpoint_dir):
        folder.mkdir()
    weights = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(2, dtype=torch.bfloat16)}
    save_file(weights, checkpoint_dir / "model.safetensors")
    save_file({"a": weights["a"]}, model_dir / "model-1.safetensors")
    save_file({"b": weights["b"].float(), "more": torch.ones(1)}, model_dir / "model-2.safetensors")
    verify_same_weights(model_dir, checkpoint_dir)
    for changed in (weights["a"] + 1e-6, weights["a"].reshape(3, 2)):
        save_file({"a": changed.contiguous()}, model_dir / "model-1.safetensors")
        with pytest.raises(ExportError, match=r"tensor a differs from that of .*step-4"):
            verify_same_weights(model_dir, checkpoint_dir)
    (model_dir / "model-1.safetensors").unlink()
    with pytest.raises(ExportError, match="lacks a"):
        verify_same_weights(model_dir, checkpoint_dir)


def test_a_score_that_is_not_the_recorded_one_is_refused() -> None:
    known = {"num_rows": 1, "num_completion_tokens": 2, "num_tokens": 3, "num_bytes": 4}
    score = SplitScore(**known, completion_nll_sum=5.0, nll_sum=9.0)
    rows = [
        {"step": 4, "loss": 1.0},
        {"step": 4, "split": "test", "completion_nll_sum": 1.0, "nll_sum": 1.0},
        {"step": 4, "split": "validation", "completion_nll_sum": 5.0, "nll_sum": 9.0},
        {"step": 8, "split": "validation", "completion_nll_sum": 5.0, "nll_sum": 9.1},
    ]
    verify_score(score, rows, 4)
    with pytest.raises(ExportError, match=r"step 8 have another nll_sum .* 9.1 -> 9.0"):
        verify_score(score, rows, 8)
    with pytest.raises(ExportError, match="no evaluation"):
        verify_score(score, rows, 12)


def test_sets_of_the_adapter_config_are_written_in_order(tmp_path: Path) -> None:
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({"target_modules": ["v", "q"], "modules_to_save": None, "r": 4}))
    sort_adapter_config(tmp_path)
    assert load_json(path) == {"target_modules": ["q", "v"], "modules_to_save": None, "r": 4}


@pytest.mark.parametrize("is_offline", [True, False])
def test_an_export_does_not_say_how_its_tokenizer_was_loaded(
    tmp_path: Path, tiny_model: Callable[[str], Path], is_offline: bool
) -> None:
    """Otherwise a repair under another HF_HUB_OFFLINE would write other bytes."""
    saved = AutoTokenizer.from_pretrained(tiny_model("gemma"), local_files_only=is_offline)
    saved.save_pretrained(tmp_path)
    drop_loading_options(tmp_path)
    content = load_json(tmp_path / "tokenizer_config.json")
    assert not {"is_local", "local_files_only"} & content.keys() and content["pad_token"]
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again("Hello there")["input_ids"] == saved("Hello there")["input_ids"]


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_every_run_exports_where_its_answers_end(finished: Project, name: str) -> None:
    model_dir = finished.paths(name).model_dir
    settings, tokenizer = (
        load_json(model_dir / "generation_config.json"),
        AutoTokenizer.from_pretrained(model_dir),
    )
    assert set(settings["eos_token_id"]) >= {*end_of_turn_ids(tokenizer), tokenizer.eos_token_id}
    assert settings["pad_token_id"] == tokenizer.pad_token_id != tokenizer.eos_token_id
    assert settings["bos_token_id"] == tokenizer.bos_token_id
    assert not (model_dir / "README.md").exists(), "PEFT's empty one"
    config = load_json(model_dir / "config.json")
    assert config is None or config["use_cache"] is True


def make_layers(**changes: torch.Tensor) -> torch.nn.Module:
    """Two trained parameters, the later one by name first, and one that is not trained."""
    module = torch.nn.Module()
    module.register_parameter("b", torch.nn.Parameter(torch.tensor([1.0, 2.0])))
    module.register_parameter("a", torch.nn.Parameter(torch.tensor([[3.0], [4.0]])))
    frozen = torch.nn.Parameter(torch.tensor([5.0]), requires_grad=False)
    module.register_parameter("frozen", frozen)
    for name, tensor in changes.items():
        parameter = torch.nn.Parameter(tensor, requires_grad=name != "frozen")
        module.register_parameter(name, parameter)
    return module


def test_the_hash_of_what_is_trained_is_of_names_types_shapes_and_bytes() -> None:
    text = b'["a", "torch.float32", [2, 1]]\n' + struct.pack("<2f", 3.0, 4.0)
    text += b'["b", "torch.float32", [2]]\n' + struct.pack("<2f", 1.0, 2.0)
    assert hash_trained(make_layers()) == hashlib.sha256(text).hexdigest()
    assert hash_trained(make_layers(frozen=torch.zeros(3))) == hash_trained(make_layers())
    others = [
        make_layers(a=torch.tensor([[3.0], [5.0]])),
        make_layers(a=torch.tensor([[3.0, 4.0]])),
        make_layers(a=torch.tensor([[3.0], [4.0]], dtype=torch.bfloat16)),
        make_layers(c=torch.tensor([1.0])),
        make_layers(b=torch.tensor(1.0)),
    ]
    assert len({hash_trained(one) for one in [make_layers(), *others]}) == 6
    part = torch.tensor([[3.0, 0.0], [4.0, 0.0]])[:, :1]
    assert not part.is_contiguous() and hash_trained(make_layers(a=part)) == hash_trained(
        make_layers()
    )
    signs: list[int] = []
    hash_trained(make_layers(), sign_of_life=lambda: signs.append(1))
    assert len(signs) == 2
