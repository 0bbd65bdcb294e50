# shellcheck shell=bash
# What the launchers share: refusals, quoting and the dry run. Sourced; nothing runs from here.
set -euo pipefail

refuse() { printf '%s: %s\n' "${0##*/}" "$*" >&2; exit 2; }

((BASH_VERSINFO[0] * 100 + BASH_VERSINFO[1] >= 404)) ||
  refuse "needs bash 4.4 or newer, got $BASH_VERSION"

# require NAME...: refuse, by their names, the variables that are unset or empty.
require() {
  local name missing=()
  for name; do [[ -n ${!name:-} ]] || missing+=("$name"); done
  ((${#missing[@]} == 0)) ||
    refuse "$ACTION needs the variable(s) ${missing[*]}: set them, see launch/README.md"
}

# require_repository: REPO_URL and REVISION, without a password in the address (it would be logged).
require_repository() {
  require REPO_URL REVISION
  [[ ! $REPO_URL =~ ^https?://[^/]*@ ]] ||
    refuse "REPO_URL must not hold credentials: use an ssh address or a git credential helper"
}

# require_bucket: --workdir lies in a bucket, or under the share /workdir where NFS_SHARE names one.
require_bucket() {
  [[ $WORKDIR == gs://?*/?* || $WORKDIR == s3://?*/?* ]] ||
    [[ -n ${NFS_SHARE:-} && $WORKDIR == /workdir/* ]] ||
    refuse "--workdir must lie in a bucket, gs://BUCKET/NAME or s3://BUCKET/NAME, got $WORKDIR"
}

# quote WORD...: one line that a shell reads back as exactly these words.
quote() {
  local word line=()
  for word; do
    if [[ $word =~ ^[A-Za-z0-9_./:=@%+,-]+$ ]]; then line+=("$word"); else line+=("${word@Q}"); fi
  done
  printf '%s\n' "${line[*]}"
}

# refuse_secrets WORD...: refuse words that contain the value of a variable named *_TOKEN etc.
refuse_secrets() {
  local name value
  for name in $(compgen -e); do
    value=${!name:-}
    [[ $name =~ _(KEY|TOKEN|SECRET|PASSWORD)$ && ${#value} -ge 8 ]] || continue
    [[ "$*" != *"$value"* ]] ||
      refuse "a command would contain the value of $name: secrets never go into arguments or logs"
  done
}

# run WORD...: run the command, or print it in a dry run.
run() {
  refuse_secrets "$@"
  if ((DRY_RUN)); then quote "$@"; else "$@"; fi
}

# install_script FOLDER EXTRA MAKE_VENV: shell text that brings REPO_URL at REVISION into FOLDER,
# with its .venv.
install_script() {
  local folder source
  folder=$(quote "$1") source=$(quote "$REPO_URL")
  printf '%s' "{ test -d $folder/.git || git clone --quiet $source $folder; } && cd $folder" \
    " && git fetch --quiet $source $(quote "$REVISION")" \
    " && git checkout --quiet --detach FETCH_HEAD" \
    " && $3 && .venv/bin/python -m pip install --quiet --editable '.[$2]'"
}

# parse "ACTION ACTION ..." ARGUMENT...: set DRY_RUN and ACTION; for `run` also ENTRY_ARGS, ENTRY
# and WORKDIR.
parse() {
  local actions=$1 word rest=()
  shift
  DRY_RUN=0
  for word; do
    if [[ $word == --dry-run ]]; then DRY_RUN=1; else rest+=("$word"); fi
  done
  ACTION=${rest[0]:-}
  [[ -n $ACTION && " $actions " == *" $ACTION "* ]] ||
    refuse "the first argument must be one of: $actions, got '$ACTION'"
  ENTRY_ARGS=("${rest[@]:1}")
  if [[ $ACTION == run ]]; then
    parse_entry
  else
    ((${#ENTRY_ARGS[@]} == 0)) ||
      refuse "$ACTION takes no further arguments, got '${ENTRY_ARGS[*]}'"
  fi
}

parse_entry() {
  local word config=''
  WORKDIR=''
  refuse_secrets "${ENTRY_ARGS[@]}" # before quotes could change their looks
  for word in "${ENTRY_ARGS[@]}"; do
    case $word in
      --config=?*) config=$word ;;
      --workdir=?*) WORKDIR=${word#--workdir=} ;;
      --*=*) ;;
      *) refuse "arguments of run have the form --NAME=VALUE, got '$word'" ;;
    esac
  done
  [[ -n $config ]] || refuse "run needs --config=configs/NAME.py[:variant]"
  [[ -n $WORKDIR ]] || refuse "run needs --workdir=DIR"
  # shellcheck disable=SC2034  # read by the scripts that source this file
  ENTRY=(python -m dinosae_jax.main "${ENTRY_ARGS[@]}")
}
