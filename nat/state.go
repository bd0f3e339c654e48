package nat

import "fmt"

// Dir is a direction of a flow. Original is that of the packet that began it: from
// the container for what it dials, towards the container for published ports.
type Dir uint8

// The two directions, as nf_conntrack counts them.
const (
	Original Dir = iota
	Reply
)

// State is where a flow stands. TCP flows walk through nf_conntrack's TCP states by
// SetState; all others have one of the last three, which Account alone moves.
type State uint8

// TCP states, in the kernel's order and with conntrack(8)'s names, then the states
// of connectionless flows.
const (
	None State = iota
	SynSent
	SynRecv
	Established
	FinWait
	CloseWait
	LastAck
	TimeWait
	Close

	Unreplied // nothing came back yet
	Replied   // an answer came
	Assured   // traffic both ways for longer than two seconds: a stream

	numStates
)

var stateNames = [numStates]string{
	"NONE", "SYN_SENT", "SYN_RECV", "ESTABLISHED", "FIN_WAIT", "CLOSE_WAIT", "LAST_ACK", "TIME_WAIT", "CLOSE",
	"UNREPLIED", "REPLIED", "ASSURED",
}

// String is the name conntrack(8) has for the state.
func (s State) String() string {
	if s < numStates {
		return stateNames[s]
	}
	return fmt.Sprintf("STATE_%d", uint8(s))
}

// tcp says whether s is a TCP state.
func (s State) tcp() bool { return s < Unreplied }

// halfOpen says whether a TCP handshake is under way.
func (s State) halfOpen() bool { return s == SynSent || s == SynRecv }

// closing says whether nothing more can be said on a TCP flow: only memory is held.
func (s State) closing() bool { return s == TimeWait || s == Close }

// ParseState is String's inverse.
func ParseState(name string) (State, bool) {
	for s, n := range stateNames {
		if n == name {
			return State(s), true
		}
	}
	return None, false
}

// status is the word that Account reads once per call: the state in the low byte,
// flags above it.
type status uint32

const (
	seenReply status = 1 << (8 + iota) // IPS_SEEN_REPLY
	assured                            // IPS_ASSURED
	settled                            // no packet can change the status any more, only SetState
	dead                               // released; budgets are repaid
)

func (s status) state() State { return State(s & 0xff) }

func (s status) withState(st State) status { return s&^0xff | status(st) }

// evictable says whether a new flow may push this one out: no answer ever came, or
// it is over. An ASSURED flow that is not over never is.
func (s status) evictable() bool {
	return s.state().closing() || s&(seenReply|assured) == 0
}
