"""An `nvidia-smi` that prints text from a test, in the formats of NVIDIA's tool."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Final

# Two whole GPUs, and a divided one; one part has the name that drivers before R470 used.
GPU_0: Final = "GPU-1f0c0d2e-0000-4a5b-8c9d-000000000000"
GPU_1: Final = "GPU-1f0c0d2e-1111-4a5b-8c9d-111111111111"
GPU_2: Final = "GPU-77777777-2222-4a5b-8c9d-222222222222"
MIG_0: Final = "MIG-aaaaaaaa-0000-5a5b-8c9d-000000000000"
MIG_1: Final = f"MIG-{GPU_2}/2/0"

LISTED: Final = f"""\
GPU 0: NVIDIA A100-SXM4-80GB (UUID: {GPU_0})
GPU 1: NVIDIA A100-SXM4-80GB (UUID: {GPU_1})
GPU 2: NVIDIA A100-SXM4-80GB (UUID: {GPU_2})
  MIG 3g.40gb     Device  0: (UUID: {MIG_0})
  MIG 1g.10gb+me Device 1: (UUID: {MIG_1})
"""
TWO: Final = "".join(LISTED.splitlines(keepends=True)[:2])

SCRIPT: Final = """\
#!/bin/bash
[ "$1" = -L ] && {{ cat <<'END'
{listed}END
exit {status}; }}
case "$1" in --query-gpu=uuid,memory.total) cat <<'END'
{memory}END
;; *) exit 6 ;; esac
"""


def add_nvidia_smi(
    folder: Path, listed: str = TWO, *, memory: Sequence[str] = (), status: int = 0
) -> None:
    """Add it to a folder of PATH; `memory` are lines such as `GPU-..., 81920`."""
    lines = "".join(f"{line}\n" for line in memory)
    write_script(folder, SCRIPT.format(listed=listed, status=status, memory=lines))


def write_script(folder: Path, text: str) -> None:
    path = folder / "nvidia-smi"
    path.write_text(text)
    path.chmod(0o755)
