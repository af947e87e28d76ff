#!/usr/bin/env bash
# Runs a command again as long as it ends with exit code 75, "try again":
#
#   scripts/until_done.sh python -m experiments.repair --config=giant.py --workdir=...
#
# Any other exit code is handed on. SIGTERM and Ctrl-C are handed to the command, which
# is then not started again. WAIT=60 waits that many seconds between two starts.
set -u

if (($# == 0)); then
  echo "usage: $0 COMMAND [ARGUMENT...]" >&2
  exit 2
fi

child=
stopped=

hand_on() {
  stopped=yes
  if [[ -n $child ]]; then
    kill -s "$1" "$child" 2>/dev/null
  fi
}

# Job control: without it a command in the background would never see Ctrl-C.
set -m
trap 'hand_on TERM' TERM
trap 'hand_on INT' INT

while true; do
  "$@" </dev/null &
  child=$!
  while true; do
    wait "$child"
    code=$?
    # A signal interrupts `wait`; the command itself may go on for a while.
    kill -0 "$child" 2>/dev/null || break
  done
  wait "$child" 2>/dev/null
  ended=$?
  ((ended == 127)) || code=$ended # 127: `wait` has told it before
  child=
  if ((code != 75)) || [[ -n $stopped ]]; then
    exit "$code"
  fi
  echo "exit code 75: starting again in ${WAIT:-10} s" >&2
  sleep "${WAIT:-10}" &
  wait $!
  if [[ -n $stopped ]]; then
    kill $! 2>/dev/null
    exit 75
  fi
done
