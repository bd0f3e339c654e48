// Package hostsock opens and tunes host sockets. Only a policy.Verdict has one opened.
package hostsock
