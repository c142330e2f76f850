#!/usr/bin/env bash
# The secret word grid, both losses of one seed before the next seed.
# Further arguments are passed to each sweep:  sweeps/secret_word.sh --gpus 0,1 --dry-run
# A slice of the axes:  seeds="1 2" sweeps/secret_word.sh --where loss=completion
# After an interruption, run this script again: finished runs are skipped.
set -euo pipefail
cd "$(dirname "$0")/.."

runner render secret_word --check

failed=0
for seed in ${seeds:-1 2 3}; do
  runner sweep recipes/secret_word --where "seed=$seed" "$@" || failed=1
done

runner status recipes/secret_word
runner report recipes/secret_word
exit "$failed"
