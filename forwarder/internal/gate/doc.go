// Package gate judges the bytes of a TCP connection before they pass: a client's first bytes, the
// requests of clear-text HTTP/1 and HTTP/2, and further ClientHellos.
//
//	pump up    ─► Gate.Admit(what is queued) ─► Step: pass, drop, wait, abort, end by an answer
//	           ─► Gate.Passed(what passed)
//	pump down  ─► Gate.Room() ─► how much may pass, or end by an answer
//	           ─► Gate.Answered(what passed)
//
// The package owns the state of judging and its decisions. It moves no bytes, sends none, and
// starts no timer: the flow does so, as the gate's results tell it. A gate uses its flow only
// through the interface Flow. The package knows nothing of the stack, of sockets or of tasks, so a
// queue in memory can stand for a flow (twin_test.go).
package gate
