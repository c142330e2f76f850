#!/usr/bin/env bash
# The Phi-2 grid, the 4-bit runs first.
# Further arguments are passed to each sweep:  sweeps/oasst_phi2.sh --gpus 0,1 --dry-run
# A slice of the axes:  weights=4bit sweeps/oasst_phi2.sh --where loss=full
# After an interruption, run this script again: finished runs are skipped.
set -euo pipefail
cd "$(dirname "$0")/.."

runner render oasst_phi2 --check

failed=0
for kind in ${weights:-4bit float16}; do
  runner sweep recipes/oasst_phi2 --where "weights=$kind" "$@" || failed=1
done

runner status recipes/oasst_phi2
runner report recipes/oasst_phi2
exit "$failed"
