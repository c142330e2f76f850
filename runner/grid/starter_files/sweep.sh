#!/usr/bin/env bash
# The whole grid, small sample counts first. Further arguments are passed to each sweep:  sweeps/first.sh --gpus 0,1
# After an interruption, run it again: finished runs are skipped, the others resume from their newest checkpoint.
set -euo pipefail
cd "$(dirname "$0")/.."

runner render first --check

failed=0
for num_train_samples in @TRAIN_COUNTS_WORDS@; do
  runner sweep recipes/first --where "num_train_samples=$num_train_samples" "$@" || failed=1
done

runner status recipes/first
runner report recipes/first
exit "$failed"
