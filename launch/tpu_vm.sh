#!/usr/bin/env bash
# A Cloud TPU VM (one slice, one or many hosts): create, setup, run, logs, stop, delete.
#   launch/tpu_vm.sh [--dry-run] create | setup | logs | stop | delete
#   launch/tpu_vm.sh [--dry-run] run --config=configs/X.py --workdir=gs://BUCKET/NAME [...]
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
parse "create setup run logs stop delete" "$@"
require TPU_NAME PROJECT_ID ZONE
where=("--project=$PROJECT_ID" "--zone=$ZONE")

# on_workers WHICH TEXT: run shell text on WHICH hosts (all, or an index), in the home folder.
on_workers() {
  run gcloud compute tpus tpu-vm ssh "$TPU_NAME" "${where[@]}" "--worker=$1" "--command=$2"
}

create() {
  require ACCELERATOR_TYPE RUNTIME_VERSION
  local flags=("--accelerator-type=$ACCELERATOR_TYPE" "--version=$RUNTIME_VERSION")
  [[ ${SPOT:-0} != 1 ]] || flags+=(--spot)
  [[ -z ${SERVICE_ACCOUNT:-} ]] || flags+=("--service-account=$SERVICE_ACCOUNT")
  run gcloud compute tpus tpu-vm create "$TPU_NAME" "${where[@]}" "${flags[@]}"
}

setup() {
  require_repository
  [[ -z ${NFS_SHARE:-} ]] || on_workers all "sudo apt-get -qq update && sudo apt-get -qq install --yes nfs-common \
&& sudo mkdir -p /workdir \
&& { mountpoint -q /workdir || sudo mount -t nfs -o hard $(quote "$NFS_SHARE") /workdir; }"
  # The images bring Python 3.10; uv fetches a newer one.
  on_workers all "$(install_script dinosae_jax tpu,cloud "python3 -m pip install --quiet --user uv \
&& python3 -m uv venv --quiet --allow-existing --seed --python 3.12 .venv")"
}

start() {
  require_bucket
  local going_on="kill -0 \"\$(cat run.pid 2>/dev/null)\" 2>/dev/null"
  on_workers all "cd dinosae_jax && . .venv/bin/activate \
&& if $going_on; then echo 'a run is going on here: stop it first' >&2; exit 1; fi \
&& { nohup $(quote "${ENTRY[@]}") >>run.log 2>&1 </dev/null & echo \$! >run.pid; }"
}

stop() {
  on_workers all "cd dinosae_jax && pid=\$(cat run.pid) && kill -TERM \"\$pid\" \
&& tail --pid=\"\$pid\" -f /dev/null"
}

case $ACTION in
  create) create ;;
  setup) setup ;;
  run) start ;;
  logs) on_workers 0 "tail --lines=100 --follow dinosae_jax/run.log" ;;
  stop) stop ;;
  delete) run gcloud compute tpus tpu-vm delete "$TPU_NAME" "${where[@]}" --quiet ;;
esac
