#!/usr/bin/env bash
# Several processes on this machine: gloo between CPU processes, or one process per GPU.
#   PROCESSES=2 DEVICE=cpu launch/local.sh [--dry-run] run --config=configs/X.py --workdir=DIR [...]
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
parse "run" "$@"
require PROCESSES DEVICE
[[ $PROCESSES =~ ^[1-9][0-9]*$ ]] || refuse "PROCESSES must be a positive number, got '$PROCESSES'"
[[ $DEVICE == cpu || $DEVICE == gpu ]] || refuse "DEVICE must be cpu or gpu, got '$DEVICE'"

# process_command ID: set COMMAND, the entry line with the environment of process ID.
process_command() {
  local environment=("JAX_COORDINATOR_ADDRESS=127.0.0.1:${PORT:-29571}"
    "JAX_PROCESS_COUNT=$PROCESSES" "JAX_PROCESS_ID=$1")
  if [[ $DEVICE == gpu ]]; then
    environment+=("JAX_PLATFORMS=cuda,cpu" "JAX_LOCAL_DEVICE_IDS=$1")
  else
    environment+=(JAX_PLATFORMS=cpu JAX_CPU_COLLECTIVES_IMPLEMENTATION=gloo)
  fi
  COMMAND=(env "${environment[@]}" "${ENTRY[@]}")
  refuse_secrets "${COMMAND[@]}"
}

pids=() stopped=0
stop() {
  ((stopped)) || kill -TERM "${pids[@]}" 2>/dev/null || true
  stopped=1
}

for ((id = 0; id < PROCESSES; id++)); do
  process_command "$id"
  if ((DRY_RUN)); then
    printf '%s &\n' "$(quote "${COMMAND[@]}")"
  else
    "${COMMAND[@]}" > >(trap '' INT TERM; exec sed -u "s/^/[$id] /") 2>&1 &
    pids+=($!)
  fi
done
if ((DRY_RUN)); then echo wait; exit; fi

# One process that fails takes the others down: alone they would wait for it in a collective.
trap stop TERM INT
status=0
while kill -0 "${pids[@]}" 2>/dev/null; do
  code=0
  wait -n || code=$?
  if ((code && !stopped)); then status=$code; stop; fi
done
for pid in "${pids[@]}"; do
  code=0
  wait "$pid" || code=$?
  ((status)) || status=$code
done
exit "$status"
