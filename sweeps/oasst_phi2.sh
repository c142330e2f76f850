#!/usr/bin/env bash
# The Phi-2 grid, the 4-bit runs first.
# Further arguments go to each sweep:  sweeps/oasst_phi2.sh --gpus 0,1 --dry-run
# Any slice by hand:  runner sweep recipes/oasst_phi2 --where weights=4bit --where loss=full
# After an interruption, run this script again: what is finished is skipped.
set -euo pipefail
cd "$(dirname "$0")/.."

runner render oasst_phi2 --check

failed=0
for weights in 4bit float16; do
  runner sweep recipes/oasst_phi2 --where "weights=$weights" "$@" || failed=1
done

runner status recipes/oasst_phi2
runner report recipes/oasst_phi2
exit "$failed"
