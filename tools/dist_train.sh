#!/usr/bin/env bash
# Train on several GPUs (or, on a machine without one, in several processes): docs/distributed.md.
#
#   tools/dist_train.sh CONFIG GPUS [arguments of tools/train.py]
#
# GPUS are those of this node. Several nodes: the same command on each, with NNODES, NODE_RANK (0 to NNODES - 1),
# MASTER_ADDR (of node 0) and PORT (default 29500) in the environment. On one node a free port of 127.0.0.1 is used, or
# PORT. MAX_RESTARTS=3 starts all processes again, at most three times, from the newest whole checkpoint when one of
# them has failed. PYTHON is the interpreter (default: python).
set -euo pipefail
here=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=tools/dist_common.sh
source "$here/dist_common.sh"

usage='tools/dist_train.sh CONFIG GPUS [arguments of train.py].'
(( $# >= 2 )) || say_and_stop "found $# arguments, expected $usage"
check_gpus "$2" "$usage"
as_path "$1"; config=$path
gpus=$2
shift 2
start=()
if [[ ${MAX_RESTARTS:-0} != 0 ]]; then
  for argument in "$@"; do
    case $argument in
      --resume | --resume=*)
        say_and_stop "MAX_RESTARTS and --resume: found both, expected one of them. A training that is restarted \
resumes by itself (--resume auto-or-start), also at its first start; leave --resume away." ;;
    esac
  done
  start=(--resume auto-or-start)
fi
run_processes "$gpus" "$here/train.py" "$config" --launcher pytorch ${start[@]+"${start[@]}"} "$@"
