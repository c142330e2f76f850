"""Every setting of a launch has one owner: the recipe, `accelerate_configs/` or `ds_configs/`; the
table says which.
"""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

from runner.recipe.launch_section import LaunchSection
from runner.recipe.schema import Training
from tests.conftest import ROOT

RECIPE, ACCELERATE, DEEPSPEED, ARGV = (
    "the recipe",
    "accelerate_configs/",
    "ds_configs/",
    "the command line",
)


class Knob(NamedTuple):
    """One setting: its owner, and its name in each place. A name covers everything below it."""

    owner: str
    recipe: tuple[str, ...] = ()
    accelerate: tuple[str, ...] = ()
    deepspeed: tuple[str, ...] = ()


KNOBS = {
    "global batch": Knob(
        RECIPE,
        ("global_batch_size", "gradient_accumulation_steps"),
        ("gradient_accumulation_steps", "deepspeed_config.gradient_accumulation_steps"),
        ("train_batch_size", "gradient_accumulation_steps"),
    ),
    "per-device batch": Knob(
        RECIPE, ("per_device_train_batch_size",), (), ("train_micro_batch_size_per_gpu",)
    ),
    "clipping": Knob(
        RECIPE,
        ("max_grad_norm",),
        ("gradient_clipping", "deepspeed_config.gradient_clipping"),
        ("gradient_clipping",),
    ),
    "precision": Knob(
        RECIPE,
        ("bf16", "fp16"),
        ("mixed_precision", "fp16", "downcast_bf16", "fp8_config"),
        ("bf16.enabled", "fp16.enabled"),
    ),
    "learning rate and optimizer": Knob(
        RECIPE,
        ("learning_rate", "optim", "weight_decay", "lr_scheduler_type"),
        (),
        ("optimizer", "scheduler"),
    ),
    "activation checkpointing": Knob(
        RECIPE, ("gradient_checkpointing",), (), ("activation_checkpointing",)
    ),
    "compilation": Knob(
        RECIPE, ("torch_compile",), ("dynamo_config", "dynamo_backend"), ("compile",)
    ),
    "ZeRO stage": Knob(
        DEEPSPEED,
        (),
        ("deepspeed_config.zero_stage", "deepspeed_config.zero3_init_flag"),
        ("zero_optimization.stage",),
    ),
    "offload": Knob(
        DEEPSPEED,
        (),
        (
            "deepspeed_config.offload_optimizer_device",
            "deepspeed_config.offload_param_device",
            "deepspeed_config.offload_optimizer_nvme_path",
            "deepspeed_config.offload_param_nvme_path",
        ),
        ("zero_optimization.offload_optimizer", "zero_optimization.offload_param"),
    ),
    "16-bit gather on save": Knob(
        DEEPSPEED,
        (),
        ("deepspeed_config.zero3_save_16bit_model",),
        ("zero_optimization.stage3_gather_16bit_weights_on_model_save",),
    ),
    "path of the ds file": Knob(
        ACCELERATE, ("deepspeed",), ("deepspeed_config.deepspeed_config_file",)
    ),
    "distributed type": Knob(
        ACCELERATE,
        ("use_cpu", "fsdp", "fsdp_config", "ddp_backend", "parallelism_config"),
        (
            "compute_environment",
            "distributed_type",
            "use_cpu",
            "deepspeed_config.deepspeed_multinode_launcher",
            "fsdp_config",
            "parallelism_config",
            "megatron_lm_config",
        ),
    ),
    "number of processes": Knob(RECIPE, ("num_processes",), ("num_processes",)),
    "number of machines": Knob(RECIPE, ("num_machines",), ("num_machines",)),
    "which machine": Knob(
        ARGV,
        (),
        ("machine_rank", "main_process_ip", "main_process_port", "rdzv_backend", "same_network"),
    ),
    "which GPUs": Knob(ARGV, ("gpu_ids",), ("gpu_ids",)),
}


def leaves(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted key and value of everything in `tree` that is not a non-empty mapping."""
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def owner_of(key: str, place: str) -> tuple[str | None, str]:
    """The knob that `key` turns in `place` ("recipe", "accelerate" or "deepspeed"), and the knob's
    owner.
    """
    for name, knob in KNOBS.items():
        if any(key == known or key.startswith(f"{known}.") for known in getattr(knob, place)):
            return name, knob.owner
    return None, "nobody"


def list_second_owners(root: Path) -> list[str]:
    """Every key under `root` that is set where it is not owned, or that the table does not know."""
    problems = []
    for path in sorted((root / "accelerate_configs").rglob("*.yaml")):
        for key, _ in leaves(yaml.safe_load(path.read_text())):
            knob, owner = owner_of(key, "accelerate")
            if owner != ACCELERATE:
                problems.append(f"{path.relative_to(root)}: `{key}` ({knob}) belongs to {owner}")
    for path in sorted((root / "ds_configs").rglob("*.json")):
        for key, value in leaves(json.loads(path.read_text())):
            knob, owner = owner_of(key, "deepspeed")
            if owner == DEEPSPEED and value != "auto":
                continue
            if owner == RECIPE and value == "auto":
                continue
            problems.append(
                f"{path.relative_to(root)}: `{key}` is {value!r}, but {knob} belongs to {owner}"
            )
    return problems


def list_missing_ds_files(root: Path) -> list[str]:
    """Every ds file that an accelerate config names and that does not exist, and every one that
    none names.
    """
    named = {}
    for path in (root / "accelerate_configs").rglob("*.yaml"):
        config = yaml.safe_load(path.read_text())
        is_deepspeed = config["distributed_type"] == "DEEPSPEED"
        ds_file = config.get("deepspeed_config", {}).get("deepspeed_config_file")
        if is_deepspeed != (ds_file is not None):
            return [f"{path.name}: DEEPSPEED and `deepspeed_config_file` go together"]
        if ds_file is not None:
            named[ds_file] = path.name
    present = {
        str(path.relative_to(root)) for path in (root / "ds_configs").rglob("*") if path.is_file()
    }
    return sorted(set(named) ^ present)


ACCELERATE_CONFIGS = sorted(path.name for path in (ROOT / "accelerate_configs").iterdir())
EXPECTED = {"cpu", "single_gpu", "multi_gpu", "zero2", "zero3", "zero3_offload", "multi_node"}


def test_every_knob_has_one_owner() -> None:
    assert list_second_owners(ROOT) == []


def test_every_ds_file_is_named_and_exists() -> None:
    assert list_missing_ds_files(ROOT) == []


def test_every_way_to_start_has_a_file() -> None:
    assert {Path(name).stem for name in ACCELERATE_CONFIGS} >= EXPECTED
    assert all(name.endswith(".yaml") for name in ACCELERATE_CONFIGS)


@pytest.mark.parametrize("name", ACCELERATE_CONFIGS)
def test_every_file_says_what_it_is_for(name: str) -> None:
    assert (ROOT / "accelerate_configs" / name).read_text().startswith("# ")


def test_every_ds_file_leaves_the_recipe_its_values() -> None:
    """A value that is absent from a ds file is DeepSpeed's default, not the recipe's: each must be
    `auto`.
    """
    handed_over = {key for knob in KNOBS.values() if knob.owner == RECIPE for key in knob.deepspeed}
    handed_over -= {"optimizer", "scheduler", "activation_checkpointing", "compile"}
    for path in sorted((ROOT / "ds_configs").iterdir()):
        config = dict(leaves(json.loads(path.read_text())))
        assert {key: config.get(key) for key in handed_over} == dict.fromkeys(
            handed_over, "auto"
        ), path.name


def test_zero3_gathers_weights_on_save() -> None:
    """Without it, a full fine-tune ends with exit code 0 and a model folder without weights."""
    for path in sorted((ROOT / "ds_configs").iterdir()):
        zero = json.loads(path.read_text())["zero_optimization"]
        assert zero["stage"] != 3 or zero["stage3_gather_16bit_weights_on_model_save"] is True, (
            path.name
        )


def test_recipe_has_the_fields_it_owns_and_no_other() -> None:
    fields = set(Training.model_fields) | set(LaunchSection.model_fields)
    for name, knob in KNOBS.items():
        known = set(knob.recipe)
        assert (known <= fields) if knob.owner == RECIPE else not (known & fields), name


BREAKS = {
    "accelerate_configs/zero3.yaml": ("num_processes: 2\n", "`num_processes`"),
    "accelerate_configs/multi_gpu.yaml": (
        "mixed_precision: bf16\n",
        "`mixed_precision` (precision)",
    ),
    "accelerate_configs/cpu.yaml": ("colour: red\n", "`colour` (None) belongs to nobody"),
    "accelerate_configs/zero2.yaml": (
        "  zero_stage: 2\n",
        "`deepspeed_config.zero_stage` (ZeRO stage)",
    ),
}


@pytest.mark.parametrize(
    ("file", "line", "expected"), [(file, *rest) for file, rest in BREAKS.items()]
)
def test_a_second_owner_in_an_accelerate_config_is_found(
    file: str, line: str, expected: str, tmp_path: Path
) -> None:
    copy_configs(tmp_path)
    with (tmp_path / file).open("a") as stream:
        stream.write(line)
    [problem] = list_second_owners(tmp_path)
    assert problem.startswith(file) and expected in problem


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (
            {"gradient_clipping": 1.0},
            "`gradient_clipping` is 1.0, but clipping belongs to the recipe",
        ),
        ({"optimizer": {"params": {"lr": 1e-4}}}, "`optimizer.params.lr`"),
        ({"zero_optimization": {"stage": "auto"}}, "`zero_optimization.stage` is 'auto'"),
        ({"wall_clock_breakdown": False}, "belongs to nobody"),
    ],
)
def test_a_second_owner_in_a_ds_file_is_found(
    change: dict[str, Any], expected: str, tmp_path: Path
) -> None:
    copy_configs(tmp_path)
    path = tmp_path / "ds_configs" / "zero3.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    [problem] = list_second_owners(tmp_path)
    assert problem.startswith("ds_configs/zero3.json") and expected in problem


def test_a_missing_or_unnamed_ds_file_is_found(tmp_path: Path) -> None:
    copy_configs(tmp_path)
    (tmp_path / "ds_configs" / "zero2.json").rename(tmp_path / "ds_configs" / "zero1.json")
    assert list_missing_ds_files(tmp_path) == ["ds_configs/zero1.json", "ds_configs/zero2.json"]


@pytest.mark.parametrize("name", ACCELERATE_CONFIGS)
def test_accelerate_accepts_every_file(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through accelerate's own loader and its own checks of a launch, with the number of processes
    from the command.
    """
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser

    monkeypatch.chdir(ROOT)
    command = [
        "--config_file",
        f"accelerate_configs/{name}",
        "--num_processes",
        "2",
        "-m",
        "runner.sft",
        "somewhere",
    ]
    args, config, has_its_own_precision = _validate_launch_command(
        launch_command_parser().parse_args(command)
    )
    assert args.num_processes == 2
    assert args.mixed_precision == "no" and not has_its_own_precision
    assert (
        args.use_deepspeed
        == (config.distributed_type.value == "DEEPSPEED")
        == name.startswith("zero")
    )
    if args.use_deepspeed:
        assert Path(args.deepspeed_config_file).is_file()
        from accelerate.utils import DeepSpeedPlugin

        monkeypatch.setenv("ACCELERATE_CONFIG_DS_FIELDS", ",".join(config.deepspeed_config))
        plugin = DeepSpeedPlugin(hf_ds_config=args.deepspeed_config_file)
        assert plugin.zero3_init_flag == plugin.zero3_save_16bit_model == (plugin.zero_stage == 3)
        assert plugin.offload_param_device == ("cpu" if "offload" in name else "none")


def copy_configs(into: Path) -> None:
    """Copies of both folders, to break."""
    for folder in ("accelerate_configs", "ds_configs"):
        shutil.copytree(ROOT / folder, into / folder)
