#!/usr/bin/env bash
# The job of tools/slurm_train.sh and slurm_test.sh: run the command that its arguments are, once per task of Slurm, and
# queue the job again if it ended because its time was up. Slurm runs a copy of this file: it knows no other by its place.
set -euo pipefail

for name in SLURM_JOB_ID SLURM_JOB_NUM_NODES PORT; do
  # Bash would run what stands in brackets in a "number".
  if [[ -n ${!name:-} && ! ${!name} =~ ^(0|[1-9][0-9]{0,17})$ ]]; then
    printf "error: %s is '%s', expected a whole number. Start with tools/slurm_train.sh or slurm_test.sh.\n" \
      "$name" "${!name}" >&2
    exit 2
  fi
done
nodes=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
MASTER_ADDR=${nodes%%$'\n'*}
# One node: on the loopback address, where no other machine reaches the processes.
(( ${SLURM_JOB_NUM_NODES:-1} > 1 )) || MASTER_ADDR=127.0.0.1
[[ ${PORT:-0} != 0 ]] || PORT=$(( 20000 + SLURM_JOB_ID % 20000 ))
MASTER_PORT=$PORT
export MASTER_ADDR MASTER_PORT
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" MKL_NUM_THREADS="${MKL_NUM_THREADS:-1}"
if [[ $MASTER_ADDR == 127.0.0.1 ]]; then
  export GLOO_SOCKET_IFNAME="${GLOO_SOCKET_IFNAME:-lo}" NCCL_SOCKET_IFNAME="${NCCL_SOCKET_IFNAME:-lo}"
fi

code=0
# srun does not take the number of CPUs from sbatch (Slurm 22.05 and later).
srun --kill-on-bad-exit=1 "--cpus-per-task=${SLURM_CPUS_PER_TASK:-1}" -- "$@" || code=$?

# 138 is 128 + SIGUSR1: the training has saved and waits to go on (docs/saving_and_resuming.md).
if (( code == 138 )); then
  printf 'job %s: saved, and queued again to go on\n' "$SLURM_JOB_ID"
  scontrol requeue "$SLURM_JOB_ID" || {
    printf 'error: job %s could not be queued again; submit the same command anew, it goes on from its checkpoint\n' \
      "$SLURM_JOB_ID" >&2
    exit 1
  }
fi
exit "$code"
