#!/usr/bin/env bash
# Test on several GPUs (or, on a machine without one, in several processes): docs/distributed.md.
#
#   tools/dist_test.sh CONFIG CHECKPOINT GPUS [arguments of tools/test.py]
#
# The environment is that of tools/dist_train.sh, without MAX_RESTARTS.
set -euo pipefail
here=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=tools/dist_common.sh
source "$here/dist_common.sh"

usage='tools/dist_test.sh CONFIG CHECKPOINT GPUS [arguments of test.py].'
(( $# >= 3 )) || say_and_stop "found $# arguments, expected $usage"
check_gpus "$3" "$usage"
as_path "$1"; config=$path
as_path "$2"; checkpoint=$path
gpus=$3
shift 3
unset MAX_RESTARTS
run_processes "$gpus" "$here/test.py" "$config" "$checkpoint" --launcher pytorch "$@"
