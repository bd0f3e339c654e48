package guest

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"

	"golang.org/x/sys/unix"
)

// The requests that the monitor sends to the stage …
const (
	opMapped = "mapped" // the id maps are written: go on
	opExec   = "exec"   // start CMD
	opSignal = "signal" // send signal Number to CMD
	opSocket = "socket" // make a socket of kind Text
	opFront  = "front"  // put CMD in its terminal's foreground; before opExec, start it there
)

// … and the messages that the stage sends.
const (
	// opTerminal comes first, if it comes at all; it carries the master of CMD's terminal.
	opTerminal = "terminal"

	opReady   = "ready"   // the device is up; its descriptors come along
	opFailed  = "failed"  // Text says why; with an ID it answers a request, and before ready it is final
	opStarted = "started" // CMD is running
	opStopped = "stopped" // CMD was stopped by signal Signal
	opExited  = "exited"  // CMD ended with status Number, by signal Signal if not 0
	opMade    = "made"    // the socket asked for by ID comes along
)

// message is one packet of the channel.
type message struct {
	Op     string   `json:"op"`
	ID     uint32   `json:"id,omitempty"`
	Number int      `json:"number,omitempty"`
	Signal int      `json:"signal,omitempty"`
	Text   string   `json:"text,omitempty"`
	Notes  []string `json:"notes,omitempty"`
	// Covered is the number of the host's sockets that CMD cannot reach.
	Covered int `json:"covered,omitempty"`
}

var errBadMessage = errors.New("malformed message on the guest channel")

// channel is one end of the SOCK_SEQPACKET pair. Any goroutine may send; only one at a time may
// receive.
type channel struct{ c *net.UnixConn }

// channelPair returns the monitor's end and the stage's.
func channelPair() (*channel, *os.File, error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, nil, fmt.Errorf("making the guest channel: %w", err)
	}
	far := os.NewFile(uintptr(fds[1]), "guest channel")
	near, err := newChannel(os.NewFile(uintptr(fds[0]), "guest channel"))
	if err != nil {
		far.Close()
		return nil, nil, err
	}
	return near, far, nil
}

// newChannel takes ownership of f.
func newChannel(f *os.File) (*channel, error) {
	defer f.Close()
	c, err := net.FileConn(f)
	if err != nil {
		return nil, fmt.Errorf("opening the guest channel: %w", err)
	}
	u, ok := c.(*net.UnixConn)
	if !ok {
		c.Close()
		return nil, errors.New("opening the guest channel: not a unix socket")
	}
	return &channel{c: u}, nil
}

func (ch *channel) close() { _ = ch.c.Close() }

func (ch *channel) send(m message, fds ...int) error {
	b, err := json.Marshal(m)
	if err != nil {
		return err
	}
	if len(b) > maxMessageBytes {
		return fmt.Errorf("%w: %d bytes to send", errBadMessage, len(b))
	}
	var oob []byte
	if len(fds) > 0 {
		oob = unix.UnixRights(fds...)
	}
	_, _, err = ch.c.WriteMsgUnix(b, oob, nil)
	return err
}

// receive returns the next message and the descriptors that came with it, which the caller must
// close. A message that is too long, does not parse or carries more descriptors than wantFDs is an
// error, and its descriptors are closed.
func (ch *channel) receive(wantFDs int) (message, []*os.File, error) {
	buf := make([]byte, maxMessageBytes)
	oob := make([]byte, unix.CmsgSpace(4*(wantFDs+1)))
	n, oobn, flags, _, err := ch.c.ReadMsgUnix(buf, oob)
	if err != nil {
		return message{}, nil, err
	}
	files, err := parseRights(oob[:oobn])
	if err == nil && n == 0 && oobn == 0 {
		return message{}, nil, io.EOF
	}
	var m message
	switch {
	case err != nil:
	case flags&(unix.MSG_TRUNC|unix.MSG_CTRUNC) != 0:
		err = fmt.Errorf("%w: truncated", errBadMessage)
	case len(files) > wantFDs:
		err = fmt.Errorf("%w: %d descriptors", errBadMessage, len(files))
	default:
		if jerr := json.Unmarshal(buf[:n], &m); jerr != nil {
			err = fmt.Errorf("%w: %v", errBadMessage, jerr)
		}
	}
	if err != nil {
		closeAll(files)
		return message{}, nil, err
	}
	return m, files, nil
}

func parseRights(oob []byte) ([]*os.File, error) {
	if len(oob) == 0 {
		return nil, nil
	}
	cmsgs, err := unix.ParseSocketControlMessage(oob)
	if err != nil {
		return nil, fmt.Errorf("%w: %v", errBadMessage, err)
	}
	var files []*os.File
	for i := range cmsgs {
		fds, err := unix.ParseUnixRights(&cmsgs[i])
		if err != nil {
			continue // not SCM_RIGHTS: nothing in it to close
		}
		for _, fd := range fds {
			files = append(files, PlainFile(fd))
		}
	}
	return files, nil
}

// PlainFile wraps a descriptor without registering it with Go's poller, as os.NewFile would a
// non-blocking one. Otherwise each packet of a device that the monitor merely keeps open would wake
// the monitor.
func PlainFile(fd int) *os.File {
	unix.CloseOnExec(fd)
	flags, err := unix.FcntlInt(uintptr(fd), unix.F_GETFL, 0)
	nonblocking := err == nil && flags&unix.O_NONBLOCK != 0
	if nonblocking {
		_ = unix.SetNonblock(fd, false)
	}
	f := os.NewFile(uintptr(fd), "from guest")
	if nonblocking {
		_ = unix.SetNonblock(fd, true)
	}
	return f
}

func closeAll(files []*os.File) {
	for _, f := range files {
		if f != nil {
			f.Close()
		}
	}
}
