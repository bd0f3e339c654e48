// Package hostsock opens and tunes host sockets, each for a policy.Verdict.
package hostsock
