"""Completed runs with a manifest, without any training, and every way to damage a file of them."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

from runner.files import load_json, write_json_atomic, write_jsonl_atomic
from runner.run.manifest import list_summed_files, record_files, record_model, sign_result
from runner.run.paths import RunPaths

MODEL_FILES: Final[Mapping[str, bytes]] = {
    "model/adapter_config.json": b'{"r": 8}\n',
    "model/adapter_model.safetensors": bytes(range(1, 256)) * 9,
    "model/tokenizer.json": b'{"version": "1.0"}\n',
}
SUMMED_FILES: Final = ("samples.json", "metrics.jsonl", "eval_rows.jsonl", "predictions.jsonl")
FILES: Final = (*MODEL_FILES, *SUMMED_FILES)


def add_files(paths: RunPaths) -> None:
    """Add to a completed run all its files, and their records in `result.json`."""
    for name, content in MODEL_FILES.items():
        path = paths.run_dir / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
    result = load_json(paths.result_path)
    write_json_atomic(paths.samples_path, {"splits": {"test": {"ids_hash": "a1" * 32}}})
    write_jsonl_atomic(paths.metrics_path, [{"step": 1, "loss": 2.0}])
    rows = [row for model in ("base", "tuned") for row in _build_rows(model, result[model]["test"])]
    write_jsonl_atomic(paths.eval_rows_path, rows)
    write_jsonl_atomic(paths.predictions_path, [{"model": "tuned", "text": "an answer"}])
    record(paths)


def record(paths: RunPaths) -> None:
    """Write `result.json` with the records of the files in their current state."""
    result = load_json(paths.result_path)
    result.pop("result_sha256", None)
    files = record_model(paths.model_dir) | record_files(list_summed_files(paths), paths.run_dir)
    result["files"] = {name: one.model_dump() for name, one in files.items()}
    write_json_atomic(paths.result_path, sign_result(result))


def _build_rows(model: str, score: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Rows of which the first has every field."""
    names = ("num_completion_tokens", "num_tokens", "num_bytes", "completion_nll_sum", "nll_sum")
    nothing = dict.fromkeys(names, 0)
    whole = {name: score[name] for name in names}
    return [
        {"model": model, "row_id": f"r{at}", "group": None, **(nothing if at else whole)}
        for at in range(score["num_rows"])
    ]


def _edit(change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        before = os.stat(path)
        path.write_bytes(change(path.read_bytes()))
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))  # times say nothing

    return damage


def _flip(content: bytes) -> bytes:
    """Flip one bit in the middle."""
    at = len(content) // 2
    return content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]


# The first are found by size, the second only by reading every byte.
BY_SIZE: Final[Mapping[str, Callable[[Path], None]]] = {
    "missing": Path.unlink,
    "cut": _edit(lambda content: content[:-1]),
    "emptied": _edit(lambda content: b""),
    "extra byte": _edit(lambda content: content + b"\n"),
}
BY_BYTES: Final[Mapping[str, Callable[[Path], None]]] = {
    "zeroed": _edit(lambda content: bytes(len(content))),
    "bit flipped": _edit(_flip),
}
