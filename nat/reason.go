package nat

// Reason is why a flow ended or could not begin, as its record has it. This is the complete list;
// docs/flow-log.md explains each, and a test compares the two. As an error it is why Acquire
// refuses a flow.
type Reason string

// Error implements error.
func (r Reason) Error() string { return string(r) }

// The flow was over.
const (
	ReasonTimeout  Reason = "timeout" // nothing moved; for a TCP flow in SYN_SENT: the far side did not answer
	ReasonClosed   Reason = "closed"  // both sides had ended their streams
	ReasonReset    Reason = "reset"   // one side reset the connection when both ends were on their way
	ReasonAnswered Reason = "answered"
	ReasonReopened Reason = "reopened" // another connection began on the same ports
	ReasonReplaced Reason = "replaced" // likewise, by a client of a published port
)

// One of the two sides ended it.
const (
	ReasonRefused           Reason = "refused"     // by RST
	ReasonUnreachable       Reason = "unreachable" // the network reported it, or there is no route
	ReasonResetByPeer       Reason = "reset_by_peer"
	ReasonPeerTimeout       Reason = "peer_timeout" // it stopped acknowledging data or probes
	ReasonResetBySandbox    Reason = "reset_by_sandbox"
	ReasonSandboxTimeout    Reason = "sandbox_timeout" // as ReasonPeerTimeout
	ReasonGivenUp           Reason = "given_up"        // the sandbox stopped asking for the connection
	ReasonCancelled         Reason = "cancelled"       // the sandbox reset it while it was dialled
	ReasonHandshakeFailed   Reason = "handshake_failed"
	ReasonRefusedBySandbox  Reason = "refused_by_sandbox"
	ReasonRefusedOnLoopback Reason = "refused_on_loopback"
)

// The policy ended it.
const (
	ReasonPolicy            Reason = "policy"            // new rules refuse it; for a flow that never began: the rules refuse it
	ReasonRefusedByPolicy   Reason = "refused_by_policy" // a request on it, or another hello
	ReasonMalformedRequest  Reason = "malformed_request"
	ReasonRequestTooLong    Reason = "request_too_long"
	ReasonIncompleteRequest Reason = "incomplete_request" // the client ended in the middle
	ReasonMalformedHello    Reason = "malformed_hello"
	ReasonIncompleteHello   Reason = "incomplete_hello"
	ReasonUnreadableAnswer  Reason = "unreadable_answer" // the next request could not be told apart from the rest
)

// A bound ended it.
const (
	ReasonEarlyDrop         Reason = "early drop" // it made room for a new flow
	ReasonTotalBytes        Reason = "byte budget"
	ReasonBudgetBytes       Reason = "rule's byte budget"
	ReasonHandshakeEvicted  Reason = "handshake_evicted" // it made room for a newer half-open one
	ReasonFirstBytesEvicted Reason = "first_bytes_evicted"
	ReasonTooManyRequests   Reason = "too_many_requests"
)

// The host lacked the means to carry it.
const (
	ReasonOutOfDescriptors Reason = "out_of_descriptors"
	ReasonOutOfPorts       Reason = "out_of_ports"
	ReasonOutOfMemory      Reason = "out_of_memory" // the kernel's
	ReasonNoSocket         Reason = "no-socket"
	ReasonNoUpstream       Reason = "no-upstream" // for a flow to our own resolver
	ReasonNoPingSocket     Reason = "no-ping-socket"
)

// Its owner stopped.
const (
	ReasonStopped     Reason = "stopped"
	ReasonUnpublished Reason = "unpublished"
)

// Why a flow may not begin. Stats counts each, except ErrMemory and ErrNoPort, which the owner
// counts.
const (
	ErrTableFull   Reason = "flow table is full"
	ErrDestLimit   Reason = "too many flows to this destination"
	ErrRate        Reason = "too many new flows per second"
	ErrHalfOpen    Reason = "too many half-open flows"
	ErrTotalBytes  Reason = "byte budget is used up"
	ErrExists      Reason = "flow exists already" // no limit: its tuple is in use
	ErrBudgetFlows Reason = "too many flows by this rule"
	ErrBudgetRate  Reason = "too many new flows per second by this rule"
	ErrBudgetBytes Reason = "the rule's byte budget is used up"
	ErrMemory      Reason = "memory budget is used up"
	ErrNoPort      Reason = "no port for the client inside"
)

// Refuses reports whether the reason kept the flow from beginning: nothing of it was forwarded.
func (r Reason) Refuses() bool {
	switch r {
	case ErrTableFull, ErrDestLimit, ErrRate, ErrHalfOpen, ErrTotalBytes, ErrExists, ErrBudgetFlows, ErrBudgetRate, ErrBudgetBytes,
		ErrMemory, ErrNoPort, ReasonFirstBytesEvicted:
		return true
	}
	return false
}

// Rate reports whether the flow came too fast, so that a later one may pass.
func (r Reason) Rate() bool { return r == ErrRate || r == ErrBudgetRate }

// Shortage reports whether the host lacked the means to carry the flow.
func (r Reason) Shortage() bool {
	switch r {
	case ReasonOutOfDescriptors, ReasonOutOfPorts, ReasonOutOfMemory, ReasonNoSocket, ReasonNoPingSocket:
		return true
	}
	return false
}
