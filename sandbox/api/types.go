package api

import (
	"encoding/json"
	"net/netip"
	"time"

	"sluice.dev/sluice/policy"
)

// Bounds of the protocol.
const (
	// MaxRequest bounds the request line. The largest request is a policy, in which each quote and
	// newline takes two bytes.
	MaxRequest = 2*policy.MaxPolicyBytes + 64<<10
	// MaxResponse bounds one line of an answer. A full table of 65 536 flows is about 40 MiB of
	// JSON.
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
	// MethodFlowLogReopen opens the flow log again, at its path.
	MethodFlowLogReopen = "flowlog.reopen"
	// MethodFlowCount is the monitor's question to the worker when it answers info.
	MethodFlowCount = "flows.count"
)

// Request is the one line a client sends.
type Request struct {
	Method string          `json:"method"`
	Params json.RawMessage `json:"params,omitempty"`
}

// Response is the line that answers a Request. It has a Result or an Error, never both.
type Response struct {
	Result json.RawMessage `json:"result,omitempty"`
	Error  *Error          `json:"error,omitempty"`
}

// Code classifies an Error for callers that act on it.
type Code string

// Codes of an Error.
const (
	CodeBadRequest  Code = "bad-request" // malformed, unknown method or parameter
	CodeInvalid     Code = "invalid"     // understood, but the value is wrong (a policy with errors)
	CodeNotFound    Code = "not-found"
	CodeExists      Code = "exists"
	CodeDenied      Code = "denied"
	CodeUnavailable Code = "unavailable" // the worker is being restarted, or is shutting down
	CodeFailed      Code = "failed"
)

// Error is an error as it is sent over the socket.
type Error struct {
	Code    Code   `json:"code"`
	Message string `json:"message"`
}

func (e *Error) Error() string { return e.Message }

// State of a sandbox, as `sluice ps` prints it.
type State string

// States of a sandbox.
const (
	StateStarting   State = "starting"
	StateRunning    State = "running"
	StateRestarting State = "restarting" // the worker is gone and not yet back: no packet moves
	StateStopping   State = "stopping"
)

// Info describes one sandbox. Flows is -1 if the worker did not answer.
type Info struct {
	Name        string    `json:"name"`
	State       State     `json:"state"`
	PID         int       `json:"pid"`                 // the monitor's
	WorkerPID   int       `json:"worker_pid"`          // 0 while there is no worker
	GuestPID    int       `json:"guest_pid,omitempty"` // the command's, or that of the process attached to
	Command     []string  `json:"command"`
	Started     time.Time `json:"started"`
	Restarts    uint64    `json:"restarts"`
	LastFailure string    `json:"last_failure,omitempty"` // why the last worker ended
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
	// Attachment is set for the sandbox of a pod, which a CNI plugin made.
	Attachment bool `json:"attachment,omitempty"`
}

// FlowsParams selects what MethodFlows lists.
type FlowsParams struct {
	// Ended lists the flows that are over, including refused ones, and DNS questions without an
	// answer. They come oldest first, as many as the worker's ring still holds.
	Ended bool `json:"ended,omitempty"`
}

// FlowsResult answers MethodFlows.
type FlowsResult struct {
	Flows []FlowRecord `json:"flows,omitempty"`
	Ended []FlowRecord `json:"ended,omitempty"`
	// Dropped counts the ended flows that the ring no longer holds.
	Dropped uint64 `json:"dropped,omitempty"`
}

// FlowCount answers MethodFlowCount.
type FlowCount struct {
	Flows int `json:"flows"`
}

// FlowEvent is one line of MethodFlowsWatch.
type FlowEvent struct {
	Type string     `json:"type"` // NEW, UPDATE, DESTROY, as printed by conntrack -E
	Time time.Time  `json:"time"`
	Flow FlowRecord `json:"flow"`
	// Lost counts the events so far that this watcher was too slow to receive.
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

// PolicyResult describes the policy in force.
type PolicyResult struct {
	Name       string `json:"name"`
	Source     string `json:"source"`
	Generation uint64 `json:"generation"` // counts policy.set calls since the start
}

// UpgradeParams names the binary that is to take over an attachment. Empty means the binary that is
// now at the path which the running one was started from. The new binary answers, with Info.
type UpgradeParams struct {
	Binary string `json:"binary,omitempty"`
}

// Port is a published port or, in requests, a range of them.
type Port struct {
	Proto     string     `json:"proto"`            // tcp or udp
	HostIP    netip.Addr `json:"host_ip,omitzero"` // absent means every address of the host, v4 and v6
	HostPort  uint16     `json:"host_port"`        // 0 lets the kernel pick one
	GuestPort uint16     `json:"guest_port"`
	Count     uint16     `json:"count,omitempty"` // number of ports in the range; 0 counts as 1
	Auto      bool       `json:"auto,omitempty"`  // made by --publish-auto
}

// PortsParams names the port to add or remove, in the syntax of `-p`.
type PortsParams struct {
	Spec string `json:"spec"`
}

// PortsResult lists published ports: all of them, or the ones added or removed.
type PortsResult struct {
	Ports []Port `json:"ports"`
}

// StatsResult holds the worker's counters by part ("link.rx_packets", "tcp.dial_refused" and so on)
// and the monitor's own.
type StatsResult struct {
	Stats map[string]json.RawMessage `json:"stats"`
}

// SysctlParams reads tunables (all of them if Name is empty) or sets one.
type SysctlParams struct {
	Name  string `json:"name,omitempty"`
	Value string `json:"value,omitempty"`
}

// SysctlResult holds tunables by name.
type SysctlResult struct {
	Values map[string]string `json:"values"`
}

// CaptureParams says what to capture. The zero value captures all packets, whole.
type CaptureParams struct {
	SnapLen   int  `json:"snap_len,omitempty"`
	DropsOnly bool `json:"drops_only,omitempty"`
}

// LogsParams selects the sandbox's own log lines.
type LogsParams struct {
	Last   int  `json:"last,omitempty"` // 0 means all that are kept
	Follow bool `json:"follow,omitempty"`
}

// LogLine is one line of the sandbox's own log.
type LogLine struct {
	Time   time.Time `json:"time"`
	Level  string    `json:"level"`
	Source string    `json:"source"` // monitor, worker, guest
	Text   string    `json:"text"`
}

// LogsResult answers MethodLogs. With Follow, more LogLine values come after it.
type LogsResult struct {
	Lines   []LogLine `json:"lines"`
	Dropped uint64    `json:"dropped,omitempty"` // older lines that were overwritten
}
