#!/bin/bash
# Runs a command in a state that does not depend on the caller: a session of its own without
# a terminal, empty standard input, and no ignored signals. nohup ignores HUP, a shell ignores
# INT for background commands, and some callers ignore PIPE. The programs that tests start
# inherit that, and sluice hands it on to its command, as it must. HUP, INT and TERM go to
# every process that the command started in its process group. If the caller ignores HUP,
# closing the terminal ends nothing.
set -u
setsid env --default-signal "$@" </dev/null &
child=$!
for signal in HUP INT TERM; do
	# shellcheck disable=SC2064 # the signal and the child are those of now
	trap "kill -$signal -- -$child 2>/dev/null" "$signal"
done
while :; do
	wait "$child"
	status=$?
	# A signal ends the waiting, not the child.
	kill -0 "$child" 2>/dev/null || exit "$status"
done
