"""Loads the base model of a recipe, quantized as the recipe says and with a row for its pad token,
and builds the LoRA configuration.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, GenerationConfig

from runner.data.masking import end_of_turn_ids
from runner.errors import DataError
from runner.recipe.hub import load_arguments
from runner.recipe.parse import Recipe
from runner.recipe.schema import EightBit, FourBit


def load_model(
    recipe: Recipe, tokenizer: Any, weights_dir: Path | None = None, *, local_rank: int = 0
) -> Any:
    """The base model, or the whole model in `weights_dir`, set up for the tokenizer's pad token and
    ends of turns.

    Quantized weights are loaded onto the GPU of `local_rank`, the process's number on its machine.

    Under ZeRO-3 the training arguments must exist before this is called: `from_pretrained` reads
    them to partition weights while loading.
    """
    path = recipe.model.path if weights_dir is None else str(weights_dir)
    of_hub = load_arguments(recipe.model, with_weights=True) if weights_dir is None else {}
    try:
        loaded = AutoModelForCausalLM.from_pretrained(
            path, **of_hub, **build_load_arguments(recipe, local_rank)
        )
    except (OSError, ValueError, ImportError) as error:
        raise DataError(
            f"cannot load the model {path!r}: {str(error).splitlines()[0]}",
            hint=(
                "check `model.path`, `model.attn_implementation` and `quantization`; models with"
                " custom code, or with weights in another format than safetensors, are not"
                " supported"
            ),
        ) from error
    add_pad_row(loaded, tokenizer)
    loaded.generation_config = build_generation_config(loaded.generation_config, tokenizer)
    keep_four_bit_gradients(loaded)
    return loaded


def build_load_arguments(recipe: Recipe, local_rank: int = 0) -> dict[str, Any]:
    """The arguments of `from_pretrained` for the recipe's dtype, attention and quantization."""
    quantization = build_quantization_config(recipe)
    arguments: dict[str, Any] = {
        "dtype": getattr(torch, recipe.model.dtype),
        "use_safetensors": True,  # never a pickle
        "trust_remote_code": False,  # otherwise Transformers prompts on the terminal
    }
    if recipe.model.attn_implementation is not None:
        arguments["attn_implementation"] = recipe.model.attn_implementation
    if quantization is not None:
        arguments["quantization_config"] = quantization
        if torch.cuda.is_available():
            arguments["device_map"] = {"": local_rank}
    return arguments


def load_tuned_model(recipe: Recipe, tokenizer: Any, weights_dir: Path) -> Any:
    """The tuned model of an export or a checkpoint of the recipe's run; with an adapter, a
    `PeftModel`.
    """
    if recipe.adapter.method == "none":
        return load_model(recipe, tokenizer, weights_dir).eval()
    return PeftModel.from_pretrained(load_model(recipe, tokenizer), weights_dir).eval()


def count_rows(embedding: Any) -> int:
    """Count the rows of an embedding, even if ZeRO-3 has partitioned them."""
    return int(getattr(embedding.weight, "ds_shape", embedding.weight.shape)[0])


def add_pad_row(model: Any, tokenizer: Any) -> None:
    """Add a row for the tokenizer's pad token to the input and output embeddings if they lack one.

    A new row is the mean of all others, which changes the softmax least: each negative
    log-likelihood grows by at most log(1 + 1/rows), because the mean of the logits is below the
    logarithm of their mean exponential. (Transformers draws random rows around the mean instead.) A
    spare row of the embedding stays as it is: padding is never attended to, so its value has no
    effect, and the base model keeps its scores.
    """
    num_rows = count_rows(model.get_input_embeddings())
    if tokenizer.pad_token_id < num_rows:
        return
    with torch.random.fork_rng():  # the new rows are first random
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    # Under ZeRO-3 the new tensors are whole on every rank, and are partitioned when training
    # starts.
    output = model.get_output_embeddings()
    with torch.no_grad():
        for tensor in (
            model.get_input_embeddings().weight,
            output.weight,
            getattr(output, "bias", None),
        ):
            if tensor is not None:
                tensor[num_rows:] = (
                    tensor[:num_rows].mean(dim=0, dtype=torch.float64).to(tensor.dtype)
                )


def build_generation_config(base: GenerationConfig, tokenizer: Any) -> GenerationConfig:
    """The base model's settings with the tokenizer's pad token; eos and every end of a turn of the
    chat template also end a generation.
    """
    known = base.eos_token_id if isinstance(base.eos_token_id, list) else [base.eos_token_id]
    ends = dict.fromkeys([*end_of_turn_ids(tokenizer), tokenizer.eos_token_id, *known])
    settings = base.to_dict() | {
        "eos_token_id": [end for end in ends if end is not None],
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id if base.bos_token_id is None else base.bos_token_id,
    }
    config = GenerationConfig.from_dict(settings)
    try:
        config.validate(strict=True)
    # Some models publish a temperature without `do_sample`; Transformers loads that, but refuses to
    # save it.
    except ValueError:
        config.do_sample = True
    return config


def build_quantization_config(recipe: Recipe) -> BitsAndBytesConfig | None:
    """The bitsandbytes configuration, None for unquantized weights."""
    quantization = recipe.quantization
    if isinstance(quantization, FourBit):
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=quantization.bnb_4bit_quant_type,
            bnb_4bit_use_double_quant=quantization.bnb_4bit_use_double_quant,
            bnb_4bit_compute_dtype=getattr(torch, quantization.bnb_4bit_compute_dtype),
        )
    if isinstance(quantization, EightBit):
        return BitsAndBytesConfig(
            load_in_8bit=True, llm_int8_threshold=quantization.llm_int8_threshold
        )
    return None


def keep_four_bit_gradients(model: torch.nn.Module) -> None:
    """Forbid the 4-bit layers' inference format for CPUs with AVX512-BF16.

    Such a layer repacks its weight at its first evaluation and has no gradient from then on: the
    kernel `bitsandbytes::gemv_4bit` has no autograd formula, and nothing raises (measured with
    bitsandbytes 0.50).
    """
    if sys.modules.get("bitsandbytes") is None:  # it is hidden if nothing is quantized
        return
    from bitsandbytes.nn import Linear4bit

    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False


def build_lora_config(recipe: Recipe) -> LoraConfig | None:
    """The PEFT configuration, None for a full fine-tune."""
    if recipe.adapter.method == "none":
        return None
    return LoraConfig(
        task_type="CAUSAL_LM", revision=recipe.model.revision, **recipe.adapter.lora_arguments()
    )


def keep_adapters_in_float32(model: torch.nn.Module) -> None:
    """Cast the adapters of a quantized model to float32.

    TRL makes them bfloat16, but a resume loads them as float32, so a resumed run would differ by
    5e-4 in loss after 10 steps (measured with trl 1.16, peft 0.21).
    """
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
