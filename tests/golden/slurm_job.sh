#!/bin/bash
#SBATCH --job-name=demo
#SBATCH --array=0-2%2
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --gres=gpu:2
#SBATCH --time=2:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@300
#SBATCH --output=%A_%a.txt
#SBATCH --partition=long
#SBATCH '--comment=it'"'"'s "mine" \ here'
#SBATCH --exclusive

runs=(
  demo/gemma_060_full_seed1
  demo/gemma_180_full_seed1
  demo/llama_060_full_seed1
)
# USR1: the time limit is near, or a job of higher priority wants the machine. The run is asked to checkpoint, and the
# task is queued again. TERM (`scancel`, or the time limit itself) reaches all processes; it ends the task for good.
wants_requeue= runner=
trap 'trap : USR1; wants_requeue=yes; [ -z "$runner" ] || kill -USR1 "$runner"' USR1
trap 'wants_requeue=' TERM

run=${runs[SLURM_ARRAY_TASK_ID]}
submission='/home/me/my '"'"'study'"'"'/runs/.slurm/20260101T000000-0a1b2c3d'
cd -- '/home/me/my '"'"'study'"'"'' || exit
'/home/me/my '"'"'study'"'"'/python' -P -m runner launch "$submission/recipes/$run.json" --output-root=runs &
runner=$!
[ -z "$wants_requeue" ] || kill -USR1 "$runner"
while wait "$runner"; kill -0 "$runner" 2>/dev/null; do :; done  # a signal ends the `wait`, not the run
wait "$runner"
code=$?

# 13: the run has checkpointed. Above 128: it had not begun, or was killed; below 0: bash missed how it ended.
if [ -n "$wants_requeue" ] && { [ "$code" = 13 ] || [ "$code" -gt 128 ] || [ "$code" -lt 0 ]; }; then
  for pause in 5 15 30 0; do  # many tasks reach their limit together, and the controller may be busy
    scontrol requeue "${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID" && exit 0
    sleep "$pause"
  done
fi
exit "$code"
