# shellcheck shell=bash
# What the launchers share; they source it. Nothing here is parsed twice: values go on as they are, in quotes.

# say_and_stop MESSAGE: an error of the command line.
say_and_stop() {
  printf 'error: %s\n' "$1" >&2
  exit 2
}

# check_gpus VALUE USAGE: the number of processes, which is easily forgotten.
check_gpus() {
  if [[ $1 =~ ^(0|[1-9][0-9]{0,8})$ ]]; then return; fi
  say_and_stop "the number of processes (GPUS) is '$1', expected a whole number. Usage: $2"
}

# check_number NAME VALUE SMALLEST LARGEST
check_number() {
  if [[ $2 =~ ^(0|[1-9][0-9]{0,8})$ ]] && (( $2 >= $3 && $2 <= $4 )); then return; fi
  say_and_stop "$1 is '$2', expected a whole number from $3 to $4. Correct it."
}

# as_path VALUE: set "path" to a file name that no program takes for an option. (Printed, it would lose the line breaks at
# its end.)
# shellcheck disable=SC2034 # the scripts that source this file read it
as_path() {
  case $1 in
    -*) path=./$1 ;;
    *) path=$1 ;;
  esac
}

# run_processes PROCESSES TOOL ARGUMENT...: replace this shell by torchrun of $PYTHON, which starts the tool.
run_processes() {
  local processes=$1 python=${PYTHON:-python} nodes=${NNODES:-1} node=${NODE_RANK:-0} port=${PORT:-} restarts=${MAX_RESTARTS:-0}
  shift
  check_number "the number of processes (GPUS)" "$processes" 1 4096
  check_number NNODES "$nodes" 1 100000
  check_number NODE_RANK "$node" 0 "$((nodes - 1))"
  check_number PORT "${port:-0}" 0 65535
  check_number MAX_RESTARTS "$restarts" 0 1000000
  # One thread per process unless the user says otherwise: PyTorch would say at length that it does the same.
  export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" MKL_NUM_THREADS="${MKL_NUM_THREADS:-1}"
  local options=(--nproc-per-node "$processes" --max-restarts "$restarts")
  if (( nodes == 1 )); then
    # Nothing listens on another address than 127.0.0.1 (docs/distributed.md). A free port unless PORT is set.
    export GLOO_SOCKET_IFNAME="${GLOO_SOCKET_IFNAME:-lo}" NCCL_SOCKET_IFNAME="${NCCL_SOCKET_IFNAME:-lo}"
    exec "$python" -m mmvmamba.loopback "${options[@]}" --rdzv-endpoint "127.0.0.1:${port:-0}" "$@"
  fi
  [[ -n ${MASTER_ADDR:-} ]] ||
    say_and_stop "MASTER_ADDR is not set, expected the address of node 0, as NNODES is $nodes. Set it on every node."
  options+=(--nnodes "$nodes")
  port=${port:-29500}
  if (( restarts == 0 )); then
    exec "$python" -m torch.distributed.run "${options[@]}" --node-rank "$node" \
      --master-addr "$MASTER_ADDR" --master-port "$port" "$@"
  fi
  # Only this kind of meeting starts the processes of all nodes again when one of them fails. By default they would meet
  # where those of the start before did, and might find the addresses of processes that are gone (PyTorch 2.11).
  export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
  [[ -n ${LOCAL_ADDR:-} ]] && options+=(--local-addr "$LOCAL_ADDR")
  exec "$python" -m torch.distributed.run "${options[@]}" --rdzv-backend c10d --rdzv-id "${RDZV_ID:-mmvmamba}" \
    --rdzv-endpoint "$MASTER_ADDR:$port" --rdzv-conf "is_host=$(( node == 0 ))" "$@"
}
