#!/usr/bin/env bash
# restartable.sh COMMAND...: run COMMAND, pass SIGTERM on to it, exit 143 when it was asked to stop.
# On SIGTERM the training process saves and exits 0. Kubernetes, XPK and SkyPilot would take that
# for "finished" and not start it again; 143 (128 + SIGTERM) says "stopped", 0 stays "finished".
set -uo pipefail

stopped=0
"$@" &
child=$!
trap 'stopped=1; kill -TERM "$child" 2>/dev/null' TERM INT

wait "$child"; status=$?
# A signal ends `wait` before the command has ended.
while kill -0 "$child" 2>/dev/null; do wait "$child"; status=$?; done

if ((stopped && status == 0)); then exit 143; fi
exit "$status"
