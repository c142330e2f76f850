"""The base model of a recipe, quantised as it says, and the LoRA configuration that goes on top."""

from __future__ import annotations

import os
from typing import Any

import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from runner.errors import DataError
from runner.recipe import EightBit, FourBit, Recipe


def load_model(recipe: Recipe) -> Any:
    """The base model with frozen or trainable weights as the adapter section implies.

    Under ZeRO-3 the training arguments must exist before this is called: `from_pretrained` looks at them to
    partition weights while loading.
    """
    model = recipe.model
    quantization = build_quantization_config(recipe)
    arguments: dict[str, Any] = {"revision": model.revision, "dtype": getattr(torch, model.dtype)}
    if model.attn_implementation is not None:
        arguments["attn_implementation"] = model.attn_implementation
    if quantization is not None:
        arguments["quantization_config"] = quantization
        if torch.cuda.is_available():
            arguments["device_map"] = {"": int(os.environ.get("LOCAL_RANK", "0"))}
    try:
        loaded = AutoModelForCausalLM.from_pretrained(model.path, **arguments)
    except (OSError, ValueError, ImportError) as error:
        raise DataError(
            f"cannot load the model {model.path!r}: {str(error).splitlines()[0]}",
            hint="check `model.path`, `model.attn_implementation` and `quantization`",
        ) from error
    loaded.config.use_cache = False
    keep_four_bit_gradients(loaded)
    return loaded


def build_quantization_config(recipe: Recipe) -> BitsAndBytesConfig | None:
    """The bitsandbytes configuration, None for unquantised weights."""
    quantization = recipe.quantization
    if isinstance(quantization, FourBit):
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=quantization.bnb_4bit_quant_type,
            bnb_4bit_use_double_quant=quantization.bnb_4bit_use_double_quant,
            bnb_4bit_compute_dtype=getattr(torch, quantization.bnb_4bit_compute_dtype),
        )
    if isinstance(quantization, EightBit):
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=quantization.llm_int8_threshold)
    return None


def keep_four_bit_gradients(model: torch.nn.Module) -> None:
    """Forbid the 4-bit layers' inference format for CPUs with AVX512-BF16.

    Such a layer repacks its weight at its first evaluation and has no gradient from then on: the kernel
    `bitsandbytes::gemv_4bit` has no autograd formula, and nothing raises (measured with bitsandbytes 0.50).
    """
    from bitsandbytes.nn import Linear4bit

    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False


def build_lora_config(recipe: Recipe) -> LoraConfig | None:
    """The PEFT configuration, None for a full fine-tune."""
    if recipe.adapter.method == "none":
        return None
    return LoraConfig(task_type="CAUSAL_LM", **recipe.adapter.lora_arguments())


def keep_adapters_in_float32(model: torch.nn.Module) -> None:
    """Cast the adapters of a quantised model to float32.

    TRL makes them bfloat16, but a resume loads them as float32, so a resumed run would differ by 5e-4 in loss after
    10 steps (measured with trl 1.16, peft 0.21).
    """
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
