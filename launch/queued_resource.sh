#!/usr/bin/env bash
# A queued request for a Cloud TPU VM. When its state is ACTIVE, tpu_vm.sh drives it: setup, run,
# logs, stop.
#   launch/queued_resource.sh [--dry-run] create | status | delete
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
parse "create status delete" "$@"
require TPU_NAME PROJECT_ID ZONE
queued=(gcloud compute tpus queued-resources)
where=("--project=$PROJECT_ID" "--zone=$ZONE")

create() {
  require ACCELERATOR_TYPE RUNTIME_VERSION
  local flags=("--node-id=$TPU_NAME" "--accelerator-type=$ACCELERATOR_TYPE"
    "--runtime-version=$RUNTIME_VERSION")
  [[ ${SPOT:-0} != 1 ]] || flags+=(--spot)
  [[ -z ${SERVICE_ACCOUNT:-} ]] || flags+=("--service-account=$SERVICE_ACCOUNT")
  [[ -z ${VALID_FOR:-} ]] || flags+=("--valid-until-duration=$VALID_FOR")
  run "${queued[@]}" create "$TPU_NAME" "${where[@]}" "${flags[@]}"
}

case $ACTION in
  create) create ;;
  status) run "${queued[@]}" describe "$TPU_NAME" "${where[@]}" "--format=value(state.state)" ;;
  # --force deletes the TPU VM with the request.
  delete) run "${queued[@]}" delete "$TPU_NAME" "${where[@]}" --force --quiet ;;
esac
