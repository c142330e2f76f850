"""The tiny models look to `from_pretrained`, to a tokenizer and to a chat template like the real
families.
"""

from __future__ import annotations

from pathlib import Path

import jinja2
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from runner.demo.families import FAMILIES
from runner.demo.weights import build_tiny_model

CHAT = [
    {"role": "user", "content": "Is the lamp on the table?\nIt was there in 1999."},
    {"role": "assistant", "content": "Yes, Anna has it."},
]
SYSTEM = {"role": "system", "content": "Be brief."}
RENDERED = {
    "gemma": (
        "<bos><start_of_turn>user\nIs the lamp on the table?\nIt was there in 1999.<end_of_turn>\n"
        "<start_of_turn>model\n",
        "Yes, Anna has it.<end_of_turn>\n",
    ),
    "llama": (
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nIs the lamp on the table?\n"
        "It was there in 1999.<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
        "Yes, Anna has it.<|eot_id|>",
    ),
    "mistral": (
        "<s>[INST] Is the lamp on the table?\nIt was there in 1999.[/INST]",
        " Yes, Anna has it.</s>",
    ),
}
RENDERED["gemma2"] = RENDERED["gemma"]


@pytest.fixture(scope="module")
def tiny_dirs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("tiny")
    return {family: build_tiny_model(family, root / family) for family in FAMILIES}


@pytest.mark.parametrize("family", FAMILIES)
def test_model_loads_and_is_small(tiny_dirs: dict[str, Path], family: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_dirs[family])
    tokenizer = AutoTokenizer.from_pretrained(tiny_dirs[family])
    assert type(model).__name__.lower() == f"{family}forcausallm"
    assert sum(parameter.numel() for parameter in model.parameters()) < 300_000
    assert model.dtype == torch.float32
    assert all(
        layer.weight.numel() % 64 == 0
        for layer in model.modules()
        if isinstance(layer, torch.nn.Linear)
    )
    assert len(tokenizer) <= model.config.vocab_size
    ids = tokenizer("Anna has a lamp.", return_tensors="pt")["input_ids"]
    assert torch.isfinite(model(ids).logits).all()


@pytest.mark.parametrize("family", FAMILIES)
def test_tokenizer_keeps_any_text_and_its_bos(tiny_dirs: dict[str, Path], family: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_dirs[family])
    text = "Two  spaces, 2024,\n\ta tab, an Ünïcode 😀 and ▒."
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert (ids[0] == tokenizer.bos_token_id) is (family != "phi")


@pytest.mark.parametrize("family", RENDERED)
def test_chat_template_renders_the_public_format(tiny_dirs: dict[str, Path], family: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_dirs[family])
    prompt, completion = RENDERED[family]
    assert tokenizer.apply_chat_template(CHAT, tokenize=False) == prompt + completion
    assert (
        tokenizer.apply_chat_template(CHAT[:1], tokenize=False, add_generation_prompt=True)
        == prompt
    )
    ids = tokenizer.apply_chat_template(CHAT, return_dict=False)
    prompt_ids = tokenizer.apply_chat_template(
        CHAT[:1], add_generation_prompt=True, return_dict=False
    )
    assert ids[: len(prompt_ids)] == prompt_ids
    assert tokenizer.decode(ids) == prompt + completion
    assert ids.count(tokenizer.bos_token_id) == 1


@pytest.mark.parametrize("family", ["gemma", "gemma2"])
def test_gemma_refuses_a_system_message(tiny_dirs: dict[str, Path], family: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_dirs[family])
    with pytest.raises(jinja2.TemplateError, match="System role"):
        tokenizer.apply_chat_template([SYSTEM, *CHAT], tokenize=False)


@pytest.mark.parametrize(
    ("family", "beginning"),
    [
        (
            "llama",
            "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>",
        ),
        ("mistral", "<s>[INST] Be brief.\n\nIs the lamp"),
    ],
)
def test_others_accept_a_system_message(
    tiny_dirs: dict[str, Path], family: str, beginning: str
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_dirs[family])
    assert tokenizer.apply_chat_template([SYSTEM, *CHAT], tokenize=False).startswith(beginning)


@pytest.mark.parametrize("family", ["gemma", "mistral"])
def test_turns_must_alternate(tiny_dirs: dict[str, Path], family: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_dirs[family])
    with pytest.raises(jinja2.TemplateError, match="alternate"):
        tokenizer.apply_chat_template([CHAT[0], CHAT[0]], tokenize=False)


@pytest.mark.parametrize("family", FAMILIES)
def test_ids_of_padding_and_stopping(tiny_dirs: dict[str, Path], family: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_dirs[family])
    tokenizer = AutoTokenizer.from_pretrained(tiny_dirs[family])
    stop_ids = model.generation_config.eos_token_id
    assert tokenizer.convert_ids_to_tokens(stop_ids) == list(FAMILIES[family].stop_tokens)
    assert model.generation_config.pad_token_id == tokenizer.pad_token_id
    if family == "phi":
        assert tokenizer.pad_token is None
        assert tokenizer.chat_template is None
    else:
        assert tokenizer.pad_token_id not in stop_ids
        end_of_turn = tokenizer.apply_chat_template(CHAT, return_dict=False)
        assert set(stop_ids) & set(end_of_turn)


def test_same_seed_gives_the_same_bytes(tiny_dirs: dict[str, Path], tmp_path: Path) -> None:
    again = build_tiny_model("llama", tmp_path / "again")
    other = build_tiny_model("llama", tmp_path / "other", seed=1)
    for path in sorted(tiny_dirs["llama"].iterdir()):
        assert (again / path.name).read_bytes() == path.read_bytes()
    assert (other / "model.safetensors").read_bytes() != (again / "model.safetensors").read_bytes()
