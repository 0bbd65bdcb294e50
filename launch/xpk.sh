#!/usr/bin/env bash
# A workload on a GKE cluster that XPK made: run, status, logs, delete. The code comes in IMAGE, see
# launch/Dockerfile.
#   launch/xpk.sh [--dry-run] run --config=configs/X.py --workdir=gs://BUCKET/NAME [...]
#   launch/xpk.sh [--dry-run] status | logs | delete
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
parse "run status logs delete" "$@"
require PROJECT_ID ZONE CLUSTER WORKLOAD
where=("--project=$PROJECT_ID" "--zone=$ZONE" "--cluster=$CLUSTER")

create() {
  require TPU_TYPE SLICES IMAGE
  require_bucket
  run xpk workload create "${where[@]}" "--workload=$WORKLOAD" "--tpu-type=$TPU_TYPE" \
    "--num-slices=$SLICES" "--docker-image=$IMAGE" --max-restarts=10 \
    --termination-grace-period-seconds=120 \
    "--command=exec bash launch/restartable.sh $(quote "${ENTRY[@]}")"
}

logs() {
  local first="jobset.sigs.k8s.io/jobset-name=$WORKLOAD,jobset.sigs.k8s.io/job-index=0"
  run kubectl logs "--selector=$first,batch.kubernetes.io/job-completion-index=0" \
    --all-containers --follow --tail=100
}

case $ACTION in
  run) create ;;
  status) run xpk workload list "${where[@]}" "--filter-by-job=$WORKLOAD" ;;
  logs) logs ;;
  delete) run xpk workload delete "${where[@]}" "--workload=$WORKLOAD" --force ;;
esac
