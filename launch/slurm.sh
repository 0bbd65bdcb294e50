#!/usr/bin/env bash
# SLURM with GPUs, one process per GPU: setup (on the login node), run (sbatch), logs, stop.
#   launch/slurm.sh [--dry-run] setup | logs | stop
#   launch/slurm.sh [--dry-run] run --config=configs/X.py --workdir=DIR [...]
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
parse "setup run logs stop" "$@"

setup() {
  require CHECKOUT PYTHON
  require_repository
  run bash -c "$(install_script "$CHECKOUT" cuda "$(quote "$PYTHON") -m venv .venv")"
}

# Partition and account come from sbatch's own variables SBATCH_PARTITION and SBATCH_ACCOUNT.
submit() {
  require CHECKOUT JOB_NAME NODES GPUS_PER_NODE CPUS_PER_TASK TIME_LIMIT
  run sbatch "--job-name=$JOB_NAME" "--nodes=$NODES" "--ntasks-per-node=$GPUS_PER_NODE" \
    "--gpus-per-node=$GPUS_PER_NODE" "--cpus-per-task=$CPUS_PER_TASK" "--time=$TIME_LIMIT" \
    "--chdir=$CHECKOUT" "--output=$CHECKOUT/$JOB_NAME.log" \
    "$CHECKOUT/launch/slurm.sbatch" "${ENTRY_ARGS[@]}"
}

case $ACTION in
  setup) setup ;;
  run) submit ;;
  logs) require CHECKOUT JOB_NAME; run tail --lines=100 --follow=name "$CHECKOUT/$JOB_NAME.log" ;;
  stop) require JOB_NAME; run scancel "--user=${USER:-$(id -un)}" "--name=$JOB_NAME" ;;
esac
