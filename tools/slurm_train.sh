#!/usr/bin/env bash
# Submit a training to Slurm; when its time is nearly up it saves, is queued again and goes on: docs/distributed.md.
#
#   tools/slurm_train.sh PARTITION JOB_NAME CONFIG WORK_DIR [arguments of tools/train.py]
#
# What is asked of Slurm is in the environment: GPUS, GPUS_PER_NODE, TASKS_PER_NODE, CPUS_PER_TASK, SLURM_ARGS (see
# slurm_common.sh). SAVE_BEFORE is how many seconds before the end of its time the training is told to save (default
# 180), PORT the port of the first node (default: by the number of the job), PYTHON the interpreter (default: python).
set -euo pipefail
here=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=tools/dist_common.sh
source "$here/dist_common.sh"
# shellcheck source=tools/slurm_common.sh
source "$here/slurm_common.sh"

(( $# >= 4 )) || say_and_stop "found $# arguments, expected tools/slurm_train.sh PARTITION JOB_NAME CONFIG WORK_DIR \
[arguments of train.py]."
fill_allocation "$1" "$2"
as_path "$3"; config=$path
as_path "$4"; work_dir=$path
shift 4
for argument in "$@"; do
  case $argument in
    --resume | --resume=*)
      say_and_stop "--resume is given, expected to be left away: a job that Slurm queues again resumes by itself \
(--resume auto-or-start), also at its first start." ;;
  esac
done
check_number SAVE_BEFORE "${SAVE_BEFORE:-180}" 1 86400
check_number PORT "${PORT:-0}" 0 65535
mkdir -p -- "$work_dir"
# %j, the number of the job, is Slurm's; a % of the folder's own must be doubled.
exec sbatch "${allocation[@]}" --requeue --open-mode=append "--signal=USR1@${SAVE_BEFORE:-180}" \
  "--output=${work_dir//%/%%}/slurm-%j.log" \
  "$here/slurm_job.sh" "${PYTHON:-python}" -u "$here/train.py" "$config" --work-dir "$work_dir" \
  --launcher slurm --resume auto-or-start "$@"
