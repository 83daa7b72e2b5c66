#!/usr/bin/env bash
# Test under Slurm, and wait for the result: docs/distributed.md.
#
#   tools/slurm_test.sh PARTITION JOB_NAME CONFIG CHECKPOINT [arguments of tools/test.py]
#
# The environment is that of tools/slurm_train.sh, without SAVE_BEFORE. Inside an allocation (salloc, sbatch) the test is
# a step of it, and PARTITION, JOB_NAME and what is asked of Slurm have no meaning.
set -euo pipefail
here=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=tools/dist_common.sh
source "$here/dist_common.sh"
# shellcheck source=tools/slurm_common.sh
source "$here/slurm_common.sh"

(( $# >= 4 )) || say_and_stop "found $# arguments, expected tools/slurm_test.sh PARTITION JOB_NAME CONFIG CHECKPOINT \
[arguments of test.py]."
allocate=()
if [[ -z ${SLURM_JOB_ID:-} ]]; then
  fill_allocation "$1" "$2"
  allocate=(salloc "${allocation[@]}")
fi
as_path "$3"; config=$path
as_path "$4"; checkpoint=$path
shift 4
check_number PORT "${PORT:-0}" 0 65535
exec ${allocate[@]+"${allocate[@]}"} "$here/slurm_job.sh" \
  "${PYTHON:-python}" -u "$here/test.py" "$config" "$checkpoint" --launcher slurm "$@"
