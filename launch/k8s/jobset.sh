#!/usr/bin/env bash
# A JobSet on Kubernetes, TPU slices (GKE) or GPU nodes: run, logs, delete. The code comes in IMAGE,
# see launch/Dockerfile.
#   launch/k8s/jobset.sh [--dry-run] run --config=configs/X.py --workdir=gs://BUCKET/NAME [...]
#   launch/k8s/jobset.sh [--dry-run] logs | delete
# shellcheck disable=SC2016 source-path=SCRIPTDIR
# (SC2016: ${NAME} in single quotes is text here, the placeholder in the YAML.)
# shellcheck source=../common.sh
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
parse "run logs delete" "$@"
require NAMESPACE JOB_NAME
[[ $JOB_NAME =~ ^[a-z]([a-z0-9-]{0,38}[a-z0-9])?$ ]] ||
  refuse "JOB_NAME must be a DNS label of at most 40 characters (a-z, 0-9, -), got '$JOB_NAME'"

# json_list WORD...: a JSON (so also YAML) list of strings. Kubernetes expands $(NAME) in arguments;
# $$( is left as $(.
json_list() {
  local word words=() IFS=,
  for word; do
    [[ $word != *[[:cntrl:]]* ]] ||
      refuse "an argument must not hold control characters, got ${word@Q}"
    word=${word//\\/\\\\} word=${word//\"/\\\"} word=${word//'$('/'$$('}
    words+=("\"$word\"")
  done
  printf '[%s]' "${words[*]}"
}

# check_value NAME: its value is one plain word, which cannot change the YAML around it.
check_value() {
  [[ ${!1} =~ ^[A-Za-z0-9][A-Za-z0-9._/:@-]*$ ]] ||
    refuse "$1 must be one plain word of letters, digits and . _ / : @ -, got ${!1@Q}"
}

# manifest FILE: its text with each ${NAME} replaced by the variable's value, and ${ENTRY_ARGS} by
# the arguments.
manifest() {
  local text list name names=() result=''
  mapfile -t names < <(grep -oE '\$\{[A-Z_]+\}' "$1" | tr -d '${}' | grep -vx ENTRY_ARGS | sort -u)
  require "${names[@]}"
  for name in "${names[@]}"; do check_value "$name"; done
  list=$(json_list "${ENTRY_ARGS[@]}")
  local -A values=([ENTRY_ARGS]=$list)
  for name in "${names[@]}"; do values[$name]=${!name}; done
  text=$(<"$1")
  while [[ $text == *'${'* ]]; do
    result+=${text%%'${'*} text=${text#*'${'}
    result+=${values[${text%%'}'*}]} text=${text#*'}'}
  done
  printf '%s\n' "$result$text"
}

# run_with_input TEXT WORD...: `run` with TEXT on standard input.
run_with_input() {
  local text=$1
  shift
  refuse_secrets "$text" "$@"
  if ((DRY_RUN)); then
    printf "%s <<'END_OF_MANIFEST'\n%s\nEND_OF_MANIFEST\n" "$(run "$@")" "$text"
  else
    run "$@" <<<"$text"
  fi
}

submit() {
  require PLATFORM
  require_bucket
  [[ $PLATFORM == tpu || $PLATFORM == gpu ]] ||
    refuse "PLATFORM must be tpu or gpu, got '$PLATFORM'"
  local text
  text=$(manifest "$(dirname "${BASH_SOURCE[0]}")/jobset-$PLATFORM.yaml")
  run_with_input "$text" kubectl apply "--namespace=$NAMESPACE" --filename=-
}

logs() {
  local first="jobset.sigs.k8s.io/jobset-name=$JOB_NAME,jobset.sigs.k8s.io/job-index=0"
  run kubectl logs "--namespace=$NAMESPACE" \
    "--selector=$first,batch.kubernetes.io/job-completion-index=0" \
    --container=train --follow --tail=100
}

case $ACTION in
  run) submit ;;
  logs) logs ;;
  delete) run kubectl delete jobset "$JOB_NAME" "--namespace=$NAMESPACE" ;;
esac
