#!/usr/bin/env bash
# The math grid, the small model first; each run uses all the GPUs that its recipe requests.
# Further arguments are passed to each sweep:  sweeps/math_tools.sh --gpus 0,1,2,3,4,5,6,7 --dry-run
# A slice of the axes:  models=gemma-7b-it sweeps/math_tools.sh --where learning_rate=1e-5
# After an interruption, run this script again: finished runs are skipped.
set -euo pipefail
cd "$(dirname "$0")/.."

runner render math_tools --check

failed=0
for model in ${models:-gemma-2b-it gemma-7b-it mistral-7b-instruct}; do
  runner sweep recipes/math_tools --where "model=$model" "$@" || failed=1
done

runner status recipes/math_tools
runner report recipes/math_tools
exit "$failed"
