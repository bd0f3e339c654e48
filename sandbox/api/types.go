package api

import (
	"encoding/json"
	"net/netip"
	"time"

	"sluice.dev/sluice/policy"
)

// Bounds of the protocol.
const (
	// MaxRequest bounds the request line. The largest request is a policy, whose quotes and
	// newlines take two bytes each.
	MaxRequest = 2*policy.MaxPolicyBytes + 64<<10
	// MaxResponse bounds one line of an answer; a full table of 65 536 flows
	// is about 40 MiB of JSON.
	MaxResponse = 128 << 20
	// RequestTimeout is how long a peer may take to send its request line.
	RequestTimeout = 5 * time.Second
)

// Methods of the control socket.
const (
	MethodInfo       = "info"
	MethodFlows      = "flows"
	MethodFlowsWatch = "flows.watch"
	MethodPolicyShow = "policy.show"
	MethodPolicySet  = "policy.set"
	MethodPorts      = "ports"
	MethodPortsAdd   = "ports.add"
	MethodPortsRm    = "ports.rm"
	MethodStats      = "stats"
	MethodSysctl     = "sysctl"
	MethodSysctlSet  = "sysctl.set"
	MethodCapture    = "capture"
	MethodLogs       = "logs"
	MethodUpgrade    = "upgrade"
	// MethodFlowLogReopen opens the flow log again, by its path.
	MethodFlowLogReopen = "flowlog.reopen"
	// MethodFlowCount is what the monitor asks the worker to answer info.
	MethodFlowCount = "flows.count"
)

// Request is the one line a client sends.
type Request struct {
	Method string          `json:"method"`
	Params json.RawMessage `json:"params,omitempty"`
}

// Response is the line that answers it: Result or Error, never both.
type Response struct {
	Result json.RawMessage `json:"result,omitempty"`
	Error  *Error          `json:"error,omitempty"`
}

// Code says what kind of failure an Error is, for callers that act on it.
type Code string

// The codes of Error.
const (
	CodeBadRequest  Code = "bad-request" // malformed, unknown method or parameter
	CodeInvalid     Code = "invalid"     // understood, but the value is wrong (a policy with errors)
	CodeNotFound    Code = "not-found"
	CodeExists      Code = "exists"
	CodeDenied      Code = "denied"
	CodeUnavailable Code = "unavailable" // the worker is being restarted, or is shutting down
	CodeFailed      Code = "failed"
)

// Error is a failure as it travels.
type Error struct {
	Code    Code   `json:"code"`
	Message string `json:"message"`
}

func (e *Error) Error() string { return e.Message }

// State of a sandbox, as `sluice ps` prints it.
type State string

// The states of a sandbox.
const (
	StateStarting   State = "starting"
	StateRunning    State = "running"
	StateRestarting State = "restarting" // the worker is gone and not back yet: nothing moves
	StateStopping   State = "stopping"
)

// Info describes one sandbox. Without the worker's answer Flows is -1.
type Info struct {
	Name        string    `json:"name"`
	State       State     `json:"state"`
	PID         int       `json:"pid"`                 // the monitor's
	WorkerPID   int       `json:"worker_pid"`          // 0 while there is none
	GuestPID    int       `json:"guest_pid,omitempty"` // the command's, or the process attached to
	Command     []string  `json:"command"`
	Started     time.Time `json:"started"`
	Restarts    uint64    `json:"restarts"`
	LastFailure string    `json:"last_failure,omitempty"` // why the worker ended last
	Flows       int       `json:"flows"`
	Policy      string    `json:"policy"`

	Link      string         `json:"link"`
	Interface string         `json:"interface"`
	MTU       int            `json:"mtu"`
	Guest     []netip.Prefix `json:"guest"`
	Gateway   []netip.Addr   `json:"gateway"`
	DNS       []netip.Addr   `json:"dns"`
	Upstreams []string       `json:"upstreams"`
	Version   string         `json:"version"`
	// Attachment: a pod's, which a CNI plugin has made.
	Attachment bool `json:"attachment,omitempty"`
}

// FlowsParams selects what MethodFlows lists.
type FlowsParams struct {
	// Ended lists the flows that are over, refused ones included, oldest
	// first, and DNS questions that had no answer: as many as the worker's ring still holds.
	Ended bool `json:"ended,omitempty"`
}

// FlowsResult answers MethodFlows.
type FlowsResult struct {
	Flows []FlowRecord `json:"flows,omitempty"`
	Ended []FlowRecord `json:"ended,omitempty"`
	// Dropped counts ended flows the ring no longer holds.
	Dropped uint64 `json:"dropped,omitempty"`
}

// FlowCount answers MethodFlowCount.
type FlowCount struct {
	Flows int `json:"flows"`
}

// FlowEvent is one line of MethodFlowsWatch.
type FlowEvent struct {
	Type string     `json:"type"` // NEW, UPDATE, DESTROY, as conntrack -E prints them
	Time time.Time  `json:"time"`
	Flow FlowRecord `json:"flow"`
	// Lost counts the events that this watcher was too slow to take, so far.
	Lost uint64 `json:"lost,omitempty"`
}

// FlowLogResult answers MethodFlowLogReopen.
type FlowLogResult struct {
	File string `json:"file"`
}

// PolicySetParams is a policy as its author wrote it.
type PolicySetParams struct {
	Name   string `json:"name"` // the file's name, for error messages
	Source string `json:"source"`
}

// PolicyResult is the policy in force.
type PolicyResult struct {
	Name       string `json:"name"`
	Source     string `json:"source"`
	Generation uint64 `json:"generation"` // counts policy.set since the start
}

// UpgradeParams names the binary that is to take an attachment over; empty means what
// is now at the path that the running one was started from. The answer is Info, by the
// new binary.
type UpgradeParams struct {
	Binary string `json:"binary,omitempty"`
}

// Port is a published port or, in requests, a range of them.
type Port struct {
	Proto     string     `json:"proto"`            // tcp or udp
	HostIP    netip.Addr `json:"host_ip,omitzero"` // absent: every address of the host, v4 and v6
	HostPort  uint16     `json:"host_port"`        // 0: the kernel picks one
	GuestPort uint16     `json:"guest_port"`
	Count     uint16     `json:"count,omitempty"` // ports in the range; 0 counts as 1
	Auto      bool       `json:"auto,omitempty"`  // made by --publish-auto
}

// PortsParams names the port to add or remove, as `-p` spells it.
type PortsParams struct {
	Spec string `json:"spec"`
}

// PortsResult lists published ports: all of them, or those that were added or
// removed.
type PortsResult struct {
	Ports []Port `json:"ports"`
}

// StatsResult is the worker's counters by part: "link.rx_packets",
// "tcp.dial_refused" and so on, and the monitor's own.
type StatsResult struct {
	Stats map[string]json.RawMessage `json:"stats"`
}

// SysctlParams reads (Name empty: all) or sets a tunable.
type SysctlParams struct {
	Name  string `json:"name,omitempty"`
	Value string `json:"value,omitempty"`
}

// SysctlResult holds tunables by name.
type SysctlResult struct {
	Values map[string]string `json:"values"`
}

// CaptureParams says what to capture; the zero value means whole packets, all
// of them.
type CaptureParams struct {
	SnapLen   int  `json:"snap_len,omitempty"`
	DropsOnly bool `json:"drops_only,omitempty"`
}

// LogsParams selects the sandbox's own log lines.
type LogsParams struct {
	Last   int  `json:"last,omitempty"` // 0: all that are kept
	Follow bool `json:"follow,omitempty"`
}

// LogLine is one line of the sandbox's own log.
type LogLine struct {
	Time   time.Time `json:"time"`
	Level  string    `json:"level"`
	Source string    `json:"source"` // monitor, worker, guest
	Text   string    `json:"text"`
}

// LogsResult answers MethodLogs; with Follow more LogLine values come after it.
type LogsResult struct {
	Lines   []LogLine `json:"lines"`
	Dropped uint64    `json:"dropped,omitempty"` // older lines that were overwritten
}
