#!/usr/bin/env bash
# The SST-2 and SQuAD grid, task by task.
# Further arguments are passed to each sweep:  sweeps/glue_squad.sh --gpus 0,1 --dry-run
# A slice of the axes:  tasks=sst2 sweeps/glue_squad.sh --where target_modules=qv
# After an interruption, run this script again: finished runs are skipped.
set -euo pipefail
cd "$(dirname "$0")/.."

runner render glue_squad --check

failed=0
for task in ${tasks:-sst2 squad_v2}; do
  runner sweep recipes/glue_squad --where "task=$task" "$@" || failed=1
done

runner status recipes/glue_squad
runner report recipes/glue_squad
exit "$failed"
