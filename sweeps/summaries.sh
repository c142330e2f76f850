#!/usr/bin/env bash
# The summaries grid, model by model. Further arguments are passed to each sweep:  sweeps/summaries.sh --gpus 0,1 --dry-run
# A slice of the axes:  models=gemma-2-9b-it tasks="task-1 task-2" sweeps/summaries.sh --where loss=full --where summary=auto
# After an interruption, run this script again, or `runner rerun recipes/summaries`: finished runs are skipped.
set -euo pipefail
cd "$(dirname "$0")/.."

runner render summaries --check

failed=0
for model in ${models:-gemma-2-9b-it llama-3.1-8b-instruct mistral-7b-instruct}; do
  for task in ${tasks:-task-1 task-2 task-3}; do
    # Both losses, both kinds of summaries, all sizes and both accumulations of one model and task: 24 runs.
    runner sweep recipes/summaries --where "model=$model" --where "task=$task" "$@" || failed=1
  done
done

runner status recipes/summaries
exit "$failed"
