"""The size of a recipe's model, from its configuration alone: parameters and bytes are exact,
activations are traced.

Transformers and PEFT themselves build the model without memory (on PyTorch's meta device), so any
architecture and any choice of LoRA modules is counted correctly. Activations are the tensors that
autograd keeps of a forward with fake tensors, which only compute shapes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

import torch
from peft import get_peft_model
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.quantizers.base import get_keys_to_not_convert

from runner.errors import DataError
from runner.model.load import build_lora_config
from runner.recipe.hub import load_arguments
from runner.recipe.parse import Recipe
from runner.recipe.schema import EightBit, FourBit

# Two depths and three widths suffice: the bytes that autograd keeps are exactly a polynomial of
# degree 1 in layers and 2 in tokens. Steps of two layers, because some models alternate two kinds.
_DEPTHS: Final = (2, 4)
_WIDTHS: Final = (64, 128, 192)
_BLOCK: Final = 64  # weights per scale in bitsandbytes' 4-bit formats
_OUTER_BLOCK: Final = 256  # scales per scale, with double quantization


@dataclass(frozen=True)
class TrainedTensor:
    """A parameter that is trained: its name, elements, and bytes per element."""

    name: str
    num_elements: int
    num_element_bytes: int


@dataclass(frozen=True)
class ModelSize:
    """Sizes in parameters and bytes. `base_bytes` are the weights as stored, quantized or not,
    without LoRA.
    """

    num_base_parameters: int
    base_bytes: int
    largest_dequantized_bytes: int  # one layer at a time is unpacked; 0 without quantization
    trained: tuple[TrainedTensor, ...]
    num_layers: int
    hidden_size: int
    vocab_size: int
    trains_output_embedding: bool

    @property
    def num_trained_parameters(self) -> int:
        """Elements of all trained parameters."""
        return sum(tensor.num_elements for tensor in self.trained)

    @property
    def trained_bytes(self) -> int:
        """Bytes of all trained parameters."""
        return sum(tensor.num_elements * tensor.num_element_bytes for tensor in self.trained)


@dataclass(frozen=True)
class ActivationCurve:
    """Bytes that autograd keeps of a forward, at `_WIDTHS` tokens per row: for one layer, and for
    everything else.
    """

    per_layer: tuple[float, ...]
    rest: tuple[float, ...]

    def layer_bytes(self, num_tokens: int) -> int:
        """Bytes for one decoder layer, at `num_tokens` per row."""
        return max(0, round(_interpolate(self.per_layer, num_tokens)))

    def rest_bytes(self, num_tokens: int) -> int:
        """Bytes for everything outside the decoder layers, such as masks and the last norm."""
        return max(0, round(_interpolate(self.rest, num_tokens)))


def extend_curve(less: ActivationCurve, more: ActivationCurve, num_more: int) -> ActivationCurve:
    """The curve for `num_more` rows more than `less`, if `more` is for one row more. Each row adds
    the same bytes, and the bytes kept for weights do not grow.
    """

    def extend(low: Sequence[float], high: Sequence[float]) -> tuple[float, ...]:
        return tuple(a + num_more * (b - a) for a, b in zip(low, high, strict=True))

    return ActivationCurve(extend(less.per_layer, more.per_layer), extend(less.rest, more.rest))


def _interpolate(values: Sequence[float], at: int) -> float:
    """The parabola through `values` at `_WIDTHS` (Lagrange).

    >>> _interpolate([64.0**2 + 1, 128.0**2 + 1, 192.0**2 + 1], 1000)
    1000001.0
    """
    total = 0.0
    for i, own in enumerate(_WIDTHS):
        others = [width for j, width in enumerate(_WIDTHS) if j != i]
        total += values[i] * math.prod((at - other) / (own - other) for other in others)
    return total


def load_config(recipe: Recipe, tokenizer: Any) -> Any:
    """The model's configuration, with the row for an added pad token. Raises: DataError."""
    try:
        config = AutoConfig.from_pretrained(
            recipe.model.path, trust_remote_code=False, **load_arguments(recipe.model)
        )
    except (OSError, ValueError) as error:
        raise DataError(
            f"cannot load the configuration of {recipe.model.path!r}: {str(error).splitlines()[0]}"
        ) from None
    text_config = config.get_text_config()
    if tokenizer.pad_token_id >= text_config.vocab_size:
        text_config.vocab_size = len(tokenizer)
    return config


def measure_model(recipe: Recipe, config: Any) -> ModelSize:
    """The size of the recipe's model under its adapter and quantization."""
    model = _build(recipe, config, num_layers=None)
    quantized = _find_quantized(recipe, model)
    base_bytes, largest = 0, 0
    seen: set[int] = set()
    for module_name, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) in seen:
                continue
            seen.add(id(parameter))
            if name == "weight" and module_name in quantized:
                base_bytes += _quantized_bytes(recipe, parameter)
                largest = max(largest, parameter.numel() * _compute_bytes(recipe))
            else:
                base_bytes += parameter.numel() * parameter.element_size()
        base_bytes += sum(
            buffer.numel() * buffer.element_size() for buffer in module.buffers(recurse=False)
        )
    num_base = sum(parameter.numel() for parameter in model.parameters())
    adapted = _adapt(recipe, model)
    output = model.get_output_embeddings()
    return ModelSize(
        num_base_parameters=num_base,
        base_bytes=base_bytes,
        largest_dequantized_bytes=largest,
        trained=tuple(
            # The runner keeps adapters in float32, over weights of any dtype.
            TrainedTensor(
                name,
                parameter.numel(),
                4 if recipe.adapter.method == "lora" else parameter.element_size(),
            )
            for name, parameter in adapted.named_parameters()
            if parameter.requires_grad
        ),
        num_layers=config.get_text_config().num_hidden_layers,
        hidden_size=config.get_text_config().hidden_size,
        vocab_size=config.get_text_config().vocab_size,
        trains_output_embedding=output is not None and output.weight.requires_grad,
    )


def _build(recipe: Recipe, config: Any, num_layers: int | None) -> Any:
    """The base model on the meta device, in the recipe's dtype, with `num_layers` layers if that is
    not None.
    """
    content = config.to_dict()
    if num_layers is not None:
        content["num_hidden_layers"] = num_layers
        content.pop("layer_types", None)
    attention = recipe.model.attn_implementation
    with torch.device("meta"), _without_warnings():
        return AutoModelForCausalLM.from_config(
            type(config)(**content),
            dtype=getattr(torch, recipe.model.dtype),
            # FlashAttention needs its package; PyTorch's own fused attention keeps the same
            # tensors.
            attn_implementation="sdpa"
            if attention and attention.startswith("flash")
            else attention,
        )


@contextmanager
def _without_warnings() -> Any:
    """Silence Transformers, which warns at every build and will warn again when the run starts."""
    import transformers

    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(level)


def _adapt(recipe: Recipe, model: Any) -> Any:
    lora = build_lora_config(recipe)
    if lora is None:
        return model
    lora.init_lora_weights = True  # other values compute with weights, which do not exist here
    with torch.device("meta"), _without_warnings():
        return get_peft_model(model, lora)


def _find_quantized(recipe: Recipe, model: Any) -> set[str]:
    """Names of the linear layers that bitsandbytes quantizes."""
    if recipe.quantization.method == "none":
        return set()
    kept = tuple(get_keys_to_not_convert(model))
    below_kept = tuple(f"{key}." for key in kept)
    names = set()
    for name, module in model.named_modules():
        is_kept = name in kept or name.startswith(below_kept)
        if isinstance(module, torch.nn.Linear) and not is_kept:
            names.add(name)
    return names


def _quantized_bytes(recipe: Recipe, weight: torch.Tensor) -> int:
    """Bytes of one quantized weight and its scales, as bitsandbytes 0.50 stores them."""
    num_elements, quantization = weight.numel(), recipe.quantization
    if isinstance(quantization, EightBit):
        return num_elements + 4 * weight.shape[0]  # one float32 scale per row
    assert isinstance(quantization, FourBit)
    num_blocks = math.ceil(num_elements / _BLOCK)
    codes = math.ceil(num_elements / 2) + 16 * 4  # and the 16 values that they represent
    if not quantization.bnb_4bit_use_double_quant:
        return codes + 4 * num_blocks
    return codes + num_blocks + 4 * math.ceil(num_blocks / _OUTER_BLOCK) + 256 * 4 + 4


def _compute_bytes(recipe: Recipe) -> int:
    quantization = recipe.quantization
    dtype = (
        quantization.bnb_4bit_compute_dtype
        if isinstance(quantization, FourBit)
        else recipe.model.dtype
    )
    return 4 if dtype == "float32" else 2


def trace_activations(recipe: Recipe, config: Any, batch_size: int) -> ActivationCurve:
    """Trace the bytes that autograd keeps of a forward of `batch_size` rows, without gradient
    checkpointing.
    """
    shallow, deep = (_trace(recipe, config, num_layers, batch_size) for num_layers in _DEPTHS)
    span = _DEPTHS[1] - _DEPTHS[0]
    per_layer = tuple((more - less) / span for less, more in zip(shallow, deep, strict=True))
    rest = tuple(less - _DEPTHS[0] * layer for less, layer in zip(shallow, per_layer, strict=True))
    return ActivationCurve(per_layer, rest)


def trace_cache(recipe: Recipe, config: Any) -> int:
    """Bytes of keys and values that a model keeps for each token during generation. A layer with a
    sliding window is assumed to keep every token.

    Raises:
        DataError: the model's cache does not hold keys and values.
    """
    depth = _DEPTHS[0]
    model, mode = _build(recipe, config, depth), FakeTensorMode()
    _make_fake(model, mode)
    model.eval()
    with mode, torch.no_grad(), _without_warnings():
        ids = torch.zeros((1, 1), dtype=torch.long)
        cache = model.base_model(input_ids=ids, use_cache=True).past_key_values
    layers = getattr(cache, "layers", [])
    tensors = [getattr(layer, name, None) for layer in layers for name in ("keys", "values")]
    kept = [tensor for tensor in tensors if isinstance(tensor, torch.Tensor)]
    if not kept or len(kept) < len(tensors):
        raise DataError(f"{type(cache).__name__} of {recipe.model.path} holds no keys and values")
    num_bytes = sum(tensor.numel() * tensor.element_size() for tensor in kept)
    num_layers: int = config.get_text_config().num_hidden_layers
    return math.ceil(num_bytes * num_layers / depth)


def _trace(recipe: Recipe, config: Any, num_layers: int, batch_size: int) -> list[int]:
    model = _adapt(recipe, _build(recipe, config, num_layers))
    mode = FakeTensorMode()
    _make_fake(model, mode)
    model.train()
    backbone = (model.get_base_model() if recipe.adapter.method == "lora" else model).base_model
    return [_trace_width(recipe, model, backbone, mode, (batch_size, width)) for width in _WIDTHS]


def _trace_width(
    recipe: Recipe, model: Any, backbone: Any, mode: FakeTensorMode, shape: tuple[int, int]
) -> int:
    """Bytes of the distinct storages, other than parameters, that one forward keeps for its
    backward.
    """
    training = recipe.training
    dtype = torch.float16 if training.fp16 else torch.bfloat16
    kept: list[torch.Tensor] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    with mode:
        own = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
        input_ids = torch.zeros(shape, dtype=torch.long)
        with (
            torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
            torch.autocast("cpu", dtype=dtype, enabled=training.bf16 or training.fp16),
            _without_warnings(),
        ):
            output = backbone(input_ids=input_ids, use_cache=False)  # kept until all are counted
        storages = {
            tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in kept
        }
        del output
    return sum(size for key, size in storages.items() if key not in own)


def _make_fake(model: torch.nn.Module, mode: FakeTensorMode) -> None:
    """Turn meta tensors into fake CPU tensors: autocast and attention kernels check the device."""
    cpu = torch.device("cpu")
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                fake = FakeTensor(mode, parameter.data, cpu)
                module._parameters[name] = torch.nn.Parameter(
                    fake, requires_grad=parameter.requires_grad
                )
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = FakeTensor(mode, buffer, cpu)
