#!/usr/bin/env bash
# The demo grid, the small sample counts of every model first. Further arguments are passed to each sweep:  sweeps/demo.sh --slots 2
set -euo pipefail
cd "$(dirname "$0")/.."

runner render demo --check

failed=0
for num_train_samples in 60 180; do
  for loss in full completion; do
    runner sweep recipes/demo --where "num_train_samples=$num_train_samples" --where "loss=$loss" "$@" || failed=1
  done
done

runner status recipes/demo
runner report recipes/demo --html runs/demo/report.html
exit "$failed"
