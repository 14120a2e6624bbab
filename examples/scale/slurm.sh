#!/bin/bash
# Queues a plan in Slurm: an array for each stage after the stages before it, and the end.
#
#   lrc plan MODEL -o PLAN --keep 0.8 --calibration text.txt --tasks 32
#   bash slurm.sh PLAN OUT --cpus-per-task=32 --mem=64G      # what follows OUT goes to sbatch
#
# PLAN, MODEL, the text and OUT are on a file system that all nodes have.
set -euo pipefail
plan=$1 out=$2
shift 2

# A task whose node failed or was taken is queued again by Slurm; one whose process was killed queues itself, three
# times at most. Either way it resumes. Every other error ends the run.
task='lrc task "$PLAN" --index "$SLURM_ARRAY_TASK_ID" -q && exit
code=$?
if [ "$code" -gt 128 ] && [ "${SLURM_RESTART_COUNT:-0}" -lt 3 ]; then
    scontrol requeue "${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID"
    sleep 60
fi
exit "$code"'

# The indices of each stage, as `4-7`.
stages=$(python3 -c '
import json, sys
for stage in json.load(open(sys.argv[1]))["stages"]:
    print("%d-%d" % (stage["first"], stage["first"] + stage["tasks"] - 1))' "$plan/plan.json")

export PLAN=$plan OUT=$out
after=()
for indices in $stages; do
    id=$(sbatch --parsable --requeue --job-name=lrc-task --array="$indices" --output="$plan/log-%a.txt" \
        --open-mode=append "${after[@]}" "$@" --wrap="$task")
    echo "tasks $indices: job $id"
    after=(--dependency="afterok:$id" --kill-on-invalid-dep=yes)
done
id=$(sbatch --parsable --job-name=lrc-finish --output="$plan/log-finish.txt" "${after[@]}" "$@" \
    --wrap='lrc finish "$PLAN" -o "$OUT"')
echo "finish: job $id"
