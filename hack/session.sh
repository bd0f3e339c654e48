#!/bin/bash
# Runs a command in a state that does not depend on the caller's: a session of its own without
# a terminal, standard input empty, no signal ignored. nohup ignores HUP, a shell INT for
# commands in the background, some callers PIPE, and what tests start inherits that; sluice
# hands it on to its command, as it must. HUP, INT and TERM go to all that the command started
# in its process group. Where the caller ignores HUP, a terminal that closes ends nothing.
set -u
setsid env --default-signal "$@" </dev/null &
child=$!
for signal in HUP INT TERM; do
	# shellcheck disable=SC2064 # the signal and the child are these
	trap "kill -$signal -- -$child 2>/dev/null" "$signal"
done
while :; do
	wait "$child"
	status=$?
	# A signal ends the waiting, not the child.
	kill -0 "$child" 2>/dev/null || exit "$status"
done
