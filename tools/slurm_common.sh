# shellcheck shell=bash
# What the two launchers for Slurm share, on top of dist_common.sh; they source both.

# fill_allocation PARTITION JOB_NAME: fill the array "allocation" with what is asked of Slurm. The environment:
#   GPUS            processes, one per GPU (default 8)
#   GPUS_PER_NODE   (default: GPUS, at most 8); 0 for a partition without GPUs
#   TASKS_PER_NODE  processes of a node (default: GPUS_PER_NODE)
#   CPUS_PER_TASK   (default 5)
#   SLURM_ARGS      more options of sbatch or salloc, divided by blanks: SLURM_ARGS='--time=12:00:00 --account=vision'
allocation=()
fill_allocation() {
  local gpus=${GPUS:-8} most=8
  check_number GPUS "$gpus" 1 100000
  (( gpus < 8 )) && most=$gpus
  local per_node=${GPUS_PER_NODE:-$most}
  check_number GPUS_PER_NODE "$per_node" 0 4096
  local tasks=${TASKS_PER_NODE:-$(( per_node > 0 ? per_node : gpus ))}
  check_number TASKS_PER_NODE "$tasks" 1 4096
  check_number CPUS_PER_TASK "${CPUS_PER_TASK:-5}" 1 4096
  (( gpus % tasks == 0 )) || say_and_stop "GPUS is $gpus, expected a multiple of $tasks, those of a node. Correct it."
  allocation=("--partition=$1" "--job-name=$2" "--nodes=$(( gpus / tasks ))" "--ntasks=$gpus"
    "--ntasks-per-node=$tasks" "--cpus-per-task=${CPUS_PER_TASK:-5}")
  (( per_node == 0 )) || allocation+=("--gres=gpu:$per_node")
  local more=()
  read -r -a more <<< "${SLURM_ARGS:-}" # words, and nothing in them is run
  allocation+=(${more[@]+"${more[@]}"})
}
