package channel

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// WorkerChannelFD is the descriptor of the worker's end of the channel.
const WorkerChannelFD = 3

// The channel between monitor and worker.
//
// It is one SOCK_SEQPACKET socketpair, with one JSON message per packet and descriptors attached by
// SCM_RIGHTS. The two sides trust each other differently. The worker trusts the monitor. The
// monitor accepts from the worker only small messages without descriptors; anything else is the
// worker's failure, which ends it.
//
// Neither side waits long for the other. A send that finds no room for SendTimeout fails, and later
// sends fail at once until there is room again.
//
// A packet is bounded by MaxPacket, which fits every default socket buffer. A larger message (a
// policy with thousands of addresses) travels as a memfd attached to a packet that says so, and
// only towards the worker.

const (
	MaxPacket  = 64 << 10
	MaxMessage = 16 << 20
	// SendTimeout bounds the wait for room. Each side keeps reading as long as it runs.
	SendTimeout = time.Second
	// maxFDs bounds the descriptors of one message: the kernel's SCM_MAX_FD.
	maxFDs = 253
)

// The messages: → to the worker, ← to the monitor.
const (
	MsgConfig    = "config"    // → WorkerConfig; device queues, then the other descriptors it names
	MsgRules     = "rules"     // → RulesMessage
	MsgUpstreams = "upstreams" // → dns.Upstreams
	MsgPublish   = "publish"   // → PublishMessage and a listening descriptor
	MsgUnpublish = "unpublish" // → PublishMessage
	MsgControl   = "control"   // → api.Request and a connection to answer it on
	MsgSysctl    = "sysctl"    // → api.SysctlParams
	MsgStop      = "stop"      // → end all flows, flush the flow log, exit
	MsgSocket    = "socket"    // → SocketMessage and a fresh socket of the guest's namespace, or none
	MsgFlowLog   = "flow-log"  // → the next file of the flow log; without a descriptor there is no next file
	MsgPing      = "ping"      // → acknowledged once the goroutine that moves packets has had its turn
	MsgReady     = "ready"     // ← confined and running
	MsgAck       = "ack"       // ← the message with that sequence number took effect, or Error says why not

	MsgGrant       = "grant"         // ← GrantMessage: remember it for the next worker
	MsgWantSocket4 = "want-socket4"  // ← hand over one more guest socket
	MsgWantSocket6 = "want-socket6"  // ←
	MsgWantFlowLog = "want-flow-log" // ← the flow log's file is full
)

// Message is one packet.
type Message struct {
	Type  string          `json:"type"`
	Seq   uint64          `json:"seq,omitempty"`
	Error string          `json:"error,omitempty"`
	Body  json.RawMessage `json:"body,omitempty"`
	// Large means that the last descriptor is a memfd that holds the body.
	Large bool `json:"large,omitempty"`
}

// Conn is one end of the socketpair. A mutex serialises sends; only one goroutine may receive.
type Conn struct {
	F     *os.File // in the runtime poller, so that Close ends a blocked Receive
	mu    sync.Mutex
	stuck bool // the last send found no room in time; guarded by mu
	// receiveFDs allows messages to bring descriptors. Otherwise the descriptors are closed and the
	// message is refused.
	receiveFDs bool
	closed     atomic.Bool
	buf        []byte // for Receive
}

// Socketpair returns two connected ends, both close-on-exec and non-blocking.
func Socketpair(typ int) ([2]*os.File, error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, typ|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return [2]*os.File{}, fmt.Errorf("make a socket pair: %w", err)
	}
	return [2]*os.File{os.NewFile(uintptr(fds[0]), "channel"), os.NewFile(uintptr(fds[1]), "channel")}, nil
}

func New(f *os.File, receiveFDs bool) *Conn {
	return &Conn{F: f, receiveFDs: receiveFDs, buf: make([]byte, MaxPacket)}
}

// Close ends the channel; a blocked Receive returns.
func (c *Conn) Close() error {
	c.closed.Store(true)
	return c.F.Close()
}

// Send sends one message. The caller keeps ownership of fds.
func (c *Conn) Send(typ string, seq uint64, body any, fds ...int) error {
	raw, err := json.Marshal(body)
	if err != nil {
		return fmt.Errorf("channel: encode %s: %w", typ, err)
	}
	m := Message{Type: typ, Seq: seq, Body: raw}
	return c.SendMessage(m, fds)
}

func (c *Conn) SendMessage(m Message, fds []int) error {
	if len(m.Body) > MaxMessage {
		return fmt.Errorf("channel: a %s message of %d bytes: the limit is %d", m.Type, len(m.Body), MaxMessage)
	}
	if len(fds) >= maxFDs {
		return fmt.Errorf("channel: a %s message with %d descriptors: the limit is %d", m.Type, len(fds), maxFDs-1)
	}
	if len(m.Body) > MaxPacket/2 {
		mem, err := BodyFile(m.Body)
		if err != nil {
			return fmt.Errorf("channel: %s: %w", m.Type, err)
		}
		defer mem.Close()
		m.Body, m.Large = nil, true
		fds = append(fds[:len(fds):len(fds)], int(mem.Fd()))
	}
	packet, err := json.Marshal(m)
	if err != nil {
		return fmt.Errorf("channel: encode %s: %w", m.Type, err)
	}
	var oob []byte
	if len(fds) > 0 {
		oob = unix.UnixRights(fds...)
	}
	rc, err := c.F.SyscallConn()
	if err != nil {
		return err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if err := c.F.SetWriteDeadline(time.Now().Add(SendTimeout)); err != nil {
		return fmt.Errorf("channel: send %s: %w", m.Type, err)
	}
	var serr error
	err = rc.Write(func(fd uintptr) bool {
		_, serr = unix.SendmsgN(int(fd), packet, oob, nil, unix.MSG_NOSIGNAL)
		return c.stuck || !errors.Is(serr, unix.EAGAIN)
	})
	if c.stuck = errors.Is(serr, unix.EAGAIN); c.stuck {
		return fmt.Errorf("channel: send %s: %w", m.Type, ErrStuck)
	}
	if err := errors.Join(err, serr); err != nil {
		return fmt.Errorf("channel: send %s: %w", m.Type, err)
	}
	return nil
}

// ErrStuck means that the other side has not read for some time.
var ErrStuck = errors.New("the other side does not read")

func BodyFile(b []byte) (*os.File, error) {
	fd, err := unix.MemfdCreate("message", unix.MFD_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("make a memory file: %w", err)
	}
	f := os.NewFile(uintptr(fd), "message")
	if _, err := f.WriteAt(b, 0); err != nil {
		_ = f.Close()
		return nil, fmt.Errorf("fill a memory file: %w", err)
	}
	return f, nil
}

// ErrProtocol means that the other side sent a message that it must not send.
var ErrProtocol = errors.New("channel: protocol violation")

// Receive waits for one message. The caller must close the descriptors. At the end of the channel
// it returns io.EOF.
func (c *Conn) Receive() (Message, []int, error) {
	rc, err := c.F.SyscallConn()
	if err != nil {
		return Message{}, nil, io.EOF // closed
	}
	oob := make([]byte, unix.CmsgSpace(maxFDs*4))
	var n, oobn, flags int
	var rerr error
	err = rc.Read(func(fd uintptr) bool {
		n, oobn, flags, _, rerr = unix.Recvmsg(int(fd), c.buf, oob, unix.MSG_CMSG_CLOEXEC)
		return !errors.Is(rerr, unix.EAGAIN)
	})
	if err := errors.Join(err, rerr); err != nil {
		if c.closed.Load() || errors.Is(err, unix.ECONNRESET) {
			err = io.EOF
		}
		return Message{}, nil, err
	}
	fds, err := parseRights(oob[:oobn])
	if n == 0 && err == nil && len(fds) == 0 {
		return Message{}, nil, io.EOF
	}
	var m Message
	if err == nil {
		m, fds, err = c.decode(c.buf[:n], fds, flags)
	}
	if err != nil {
		CloseAll(fds)
		return Message{}, nil, err
	}
	return m, fds, nil
}

// decode checks and decodes one packet. On error the caller must still close the descriptors.
func (c *Conn) decode(packet []byte, fds []int, flags int) (Message, []int, error) {
	var m Message
	switch {
	case flags&unix.MSG_TRUNC != 0:
		return m, fds, fmt.Errorf("%w: a packet longer than %d bytes", ErrProtocol, MaxPacket)
	case flags&unix.MSG_CTRUNC != 0:
		return m, fds, fmt.Errorf("%w: descriptors were cut off (the descriptor limit may be reached: raise ulimit -n)", ErrProtocol)
	case len(fds) > 0 && !c.receiveFDs:
		return m, fds, fmt.Errorf("%w: %d unexpected descriptors", ErrProtocol, len(fds))
	}
	if err := json.Unmarshal(packet, &m); err != nil {
		return m, fds, fmt.Errorf("%w: %v", ErrProtocol, err)
	}
	if !m.Large {
		return m, fds, nil
	}
	if len(fds) == 0 {
		return m, fds, fmt.Errorf("%w: %s: a large body is missing", ErrProtocol, m.Type)
	}
	last := fds[len(fds)-1]
	body, err := ReadBody(last)
	if err != nil {
		return m, fds, fmt.Errorf("channel: %s: %w", m.Type, err)
	}
	_ = unix.Close(last)
	m.Body = body
	return m, fds[:len(fds)-1], nil
}

func ReadBody(fd int) ([]byte, error) {
	size, err := unix.Seek(fd, 0, io.SeekEnd)
	if err != nil {
		return nil, fmt.Errorf("measure a large body: %w", err)
	}
	if size > MaxMessage {
		return nil, fmt.Errorf("%w: a body of %d bytes", ErrProtocol, size)
	}
	b := make([]byte, size)
	for off := 0; off < len(b); {
		n, err := unix.Pread(fd, b[off:], int64(off))
		if err != nil {
			return nil, fmt.Errorf("read a large body: %w", err)
		}
		if n == 0 {
			return nil, io.ErrUnexpectedEOF
		}
		off += n
	}
	return b, nil
}

func parseRights(oob []byte) ([]int, error) {
	msgs, err := unix.ParseSocketControlMessage(oob)
	if err != nil {
		return nil, fmt.Errorf("%w: control data: %v", ErrProtocol, err)
	}
	var fds []int
	for i := range msgs {
		if msgs[i].Header.Level != unix.SOL_SOCKET || msgs[i].Header.Type != unix.SCM_RIGHTS {
			continue
		}
		got, err := unix.ParseUnixRights(&msgs[i])
		if err != nil {
			CloseAll(fds)
			return nil, fmt.Errorf("%w: descriptors: %v", ErrProtocol, err)
		}
		fds = append(fds, got...)
	}
	return fds, nil
}

func CloseAll(fds []int) {
	for _, fd := range fds {
		_ = unix.Close(fd)
	}
}

// FDOf is Fd without its side effect of making the file description blocking, which the worker
// shares.
func FDOf(f *os.File) int {
	fd := -1
	if rc, err := f.SyscallConn(); err == nil {
		_ = rc.Control(func(n uintptr) { fd = int(n) })
	}
	return fd
}
