#!/usr/bin/env bash
# Starts a command again when its exit code says that it can be resumed:
#
#   scripts/until_done.sh python -m experiments.repair --config=giant.py --workdir=...
#
#   75        it was asked to stop and has saved: always
#   134, 137  JAX ended it because another process of the run died, or it was killed
#             itself: unless it ends so TRIES=5 times in a row, each time within ten
#             minutes of its start
#
# Any other exit code is passed on. SIGTERM and Ctrl-C are passed to the command, which
# is then not started again. WAIT=60 waits 60 s between two starts, instead of 10.
set -u

if (($# == 0)); then
  echo "usage: $0 COMMAND [ARGUMENT...]" >&2
  exit 2
fi

child=
stopped=
crashes=0

pass_on() {
  stopped=yes
  if [[ -n $child ]]; then
    kill -s "$1" "$child" 2>/dev/null
  fi
}

# Job control: without it a command in the background would never see Ctrl-C.
set -m
trap 'pass_on TERM' TERM
trap 'pass_on INT' INT

while true; do
  began=$SECONDS
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
  ((ended == 127)) || code=$ended # 127: an earlier `wait` has returned it
  child=
  case $code in
    75) crashes=0 ;;
    134 | 137)
      ((SECONDS - began < 600)) || crashes=0
      ((++crashes))
      ;;
    *) exit "$code" ;;
  esac
  if [[ -n $stopped ]]; then
    exit "$code"
  fi
  if ((crashes >= ${TRIES:-5})); then
    echo "exit code $code, $crashes times in a row: giving up" >&2
    exit "$code"
  fi
  echo "exit code $code: starting again in ${WAIT:-10} s" >&2
  sleep "${WAIT:-10}" &
  wait $!
  if [[ -n $stopped ]]; then
    kill $! 2>/dev/null
    exit "$code"
  fi
done
