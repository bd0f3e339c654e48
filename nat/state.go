package nat

import "fmt"

// Dir is a direction of a flow. Original is the direction of its first packet: from the container
// for flows that it starts, towards the container for published ports.
type Dir uint8

// The two directions, as nf_conntrack counts them.
const (
	Original Dir = iota
	Reply
)

// State is a flow's state. SetState moves TCP flows through nf_conntrack's TCP states; all others
// are in one of the last three, which only Account changes.
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

	Unreplied // nothing has come back yet
	Replied   // an answer came
	Assured   // traffic both ways for longer than two seconds: a stream

	numStates
)

var stateNames = [numStates]string{
	"NONE", "SYN_SENT", "SYN_RECV", "ESTABLISHED", "FIN_WAIT", "CLOSE_WAIT", "LAST_ACK", "TIME_WAIT", "CLOSE",
	"UNREPLIED", "REPLIED", "ASSURED",
}

// String returns conntrack(8)'s name of the state.
func (s State) String() string {
	if s < numStates {
		return stateNames[s]
	}
	return fmt.Sprintf("STATE_%d", uint8(s))
}

// tcp reports whether s is a TCP state.
func (s State) tcp() bool { return s < Unreplied }

// halfOpen reports whether a TCP handshake is under way.
func (s State) halfOpen() bool { return s == SynSent || s == SynRecv }

// closing reports whether a TCP flow can carry no more data, and only holds memory.
func (s State) closing() bool { return s == TimeWait || s == Close }

// ParseState is the inverse of String.
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
	settled                            // no packet can change the status any more, only SetState can
	dead                               // released; budgets are repaid
)

func (s status) state() State { return State(s & 0xff) }

func (s status) withState(st State) status { return s&^0xff | status(st) }

// evictable reports whether a new flow may evict this one: it was never answered, or it is over. An
// ASSURED flow is evictable only once it is over.
func (s status) evictable() bool {
	return s.state().closing() || s&(seenReply|assured) == 0
}
