#!/usr/bin/env bash
# A SkyPilot managed job, which is recovered after a preemption: run, logs, delete.
#   launch/sky.sh [--dry-run] run --config=configs/X.py --workdir=gs://BUCKET/NAME [...]
#   launch/sky.sh [--dry-run] logs | delete
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
parse "run logs delete" "$@"
require JOB_NAME

submit() {
  require PLATFORM ACCELERATORS
  require_repository
  require_bucket
  local flags=("--gpus=$ACCELERATORS") # sky's name for any accelerator
  case $PLATFORM in
    tpu) ;; # a TPU pod is one node for SkyPilot, which runs the task on each of its hosts
    gpu) require NODES; flags+=("--num-nodes=$NODES") ;;
    *) refuse "PLATFORM must be tpu or gpu, got '$PLATFORM'" ;;
  esac
  [[ ${SPOT:-0} != 1 ]] || flags+=(--use-spot)
  run sky jobs launch --yes --detach-run "--name=$JOB_NAME" "${flags[@]}" \
    "--env=REPO_URL=$REPO_URL" "--env=REVISION=$REVISION" \
    "--env=ENTRY_ARGS=$(quote "${ENTRY_ARGS[@]}")" \
    "$(dirname "${BASH_SOURCE[0]}")/sky/$PLATFORM.yaml"
}

case $ACTION in
  run) submit ;;
  logs) run sky jobs logs "--name=$JOB_NAME" ;;
  delete) run sky jobs cancel --yes "--name=$JOB_NAME" ;;
esac
