"""The options of `sweep` and `rerun` that say where runs execute."""

from __future__ import annotations

import argparse


def add_engine_options(parser: argparse.ArgumentParser, *, writes_files: bool) -> None:
    """`--engine` and what belongs to each; `writes_files`: also the engines that only write a file (`--dry-run`)."""
    engines = ["local", "slurm", *(["kubernetes", "skypilot"] if writes_files else [])]
    group = parser.add_argument_group(
        "engines", "with --dry-run, kubernetes and skypilot print a file to submit" if writes_files else None
    )
    group.add_argument("--engine", choices=engines, default="local", help="default: local")
    group.add_argument(
        "--time-limit", metavar="TIME", help="slurm: of one run, as `sbatch --time`; default: the partition's"
    )
    group.add_argument(
        "--stop-before-seconds",
        type=positive,
        default=120,
        metavar="N",
        help="slurm: a run is asked to checkpoint so long before its time limit; default 120",
    )
    group.add_argument(
        "--slurm-option",
        dest="slurm_options",
        action="append",
        default=[],
        metavar="OPTION",
        help="slurm: of sbatch, such as --slurm-option=--partition=long; may be repeated",
    )
    if writes_files:
        group.add_argument("--image", metavar="IMAGE", help="container image with `runner` on its PATH")
        group.add_argument(
            "--storage", metavar="NAME", help="kubernetes: the project's volume claim; skypilot: a bucket"
        )
        group.add_argument("--gpu-type", metavar="TYPE", help="skypilot: kind of GPU, such as H100")


def positive(text: str) -> int:
    """A whole number above zero."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above zero")
    return int(text)
