package guest

import (
	"errors"
	"io"
	"net"
	"os"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// hostile is a Guest whose stage is the test.
func hostile(t *testing.T) (*Guest, *channel) {
	t.Helper()
	near, far, err := channelPair()
	if err != nil {
		t.Fatal(err)
	}
	stage, err := newChannel(far)
	if err != nil {
		t.Fatal(err)
	}
	g := &Guest{
		ch: near, proc: &stageProcess{done: make(chan struct{}), reaped: true},
		gone: make(chan struct{}), exited: make(chan struct{}), started: make(chan error, 1),
		stop: func() {}, asks: map[uint32]chan socketAnswer{},
	}
	close(g.proc.done)
	t.Cleanup(func() { near.close(); stage.close() })
	return g, stage
}

func TestAHostileStageIsRefused(t *testing.T) {
	for _, row := range []struct {
		name string
		send func(*channel)
		want error
	}{
		{"not JSON", func(c *channel) { c.c.Write([]byte("nonsense")) }, errBadMessage},
		{"an unknown operation", func(c *channel) { c.send(message{Op: "root"}) }, errBadMessage},
		{"an exit before the start", func(c *channel) { c.send(message{Op: opExited}) }, errBadMessage},
		{"a second device", func(c *channel) { c.send(message{Op: opReady}) }, errBadMessage},
		{"two starts", func(c *channel) { c.send(message{Op: opStarted}); c.send(message{Op: opStarted}) }, errBadMessage},
		{"a status that is none", func(c *channel) { c.send(message{Op: opStarted}); c.send(message{Op: opExited, Number: 256}) }, errBadMessage},
		{"a signal that is none", func(c *channel) { c.send(message{Op: opStarted}); c.send(message{Op: opExited, Signal: 65}) }, errBadMessage},
		{"more descriptors than asked for", func(c *channel) { c.send(message{Op: opMade}, 0, 1) }, errBadMessage},
		{"its end", func(c *channel) { c.close() }, io.EOF},
	} {
		t.Run(row.name, func(t *testing.T) {
			g, stage := hostile(t)
			before := len(openFDs())
			row.send(stage)
			if err := g.read(); !errors.Is(err, row.want) {
				t.Errorf("got %v, want %v", err, row.want)
			}
			if after := len(openFDs()); after > before {
				t.Errorf("%d descriptors stay open", after-before)
			}
		})
	}
}

func TestAnOversizeMessageIsRefused(t *testing.T) {
	g, stage := hostile(t)
	if err := unix.SetsockoptInt(fdOf(t, stage.c), unix.SOL_SOCKET, unix.SO_SNDBUF, 4*maxMessageBytes); err != nil {
		t.Fatal(err)
	}
	if _, err := stage.c.Write([]byte(`{"op":"` + strings.Repeat("x", maxMessageBytes) + `"}`)); err != nil {
		t.Fatal(err)
	}
	if err := g.read(); !errors.Is(err, errBadMessage) {
		t.Error(err)
	}
}

func fdOf(t *testing.T, c *net.UnixConn) (fd int) {
	t.Helper()
	raw, err := c.SyscallConn()
	if err == nil {
		err = raw.Control(func(f uintptr) { fd = int(f) })
	}
	if err != nil {
		t.Fatal(err)
	}
	return fd
}

func TestASocketThatIsNotWhatWasAskedForIsRefused(t *testing.T) {
	null, err := os.Open(os.DevNull)
	if err != nil {
		t.Fatal(err)
	}
	defer null.Close()
	sock := func(domain, typ int) int {
		fd, err := unix.Socket(domain, typ|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { unix.Close(fd) })
		return fd
	}
	for _, row := range []struct {
		name   string
		fd     int
		cookie uint64
		ok     bool
	}{
		{"a TCP socket", sock(unix.AF_INET, unix.SOCK_STREAM), 0, true},
		{"a UDP socket", sock(unix.AF_INET, unix.SOCK_DGRAM), 0, false},
		{"an IPv6 socket", sock(unix.AF_INET6, unix.SOCK_STREAM), 0, false},
		{"a unix socket", sock(unix.AF_UNIX, unix.SOCK_STREAM), 0, false},
		{"a file", int(null.Fd()), 0, false},
		{"a socket of another namespace", sock(unix.AF_INET, unix.SOCK_STREAM), 1 << 60, false},
	} {
		t.Run(row.name, func(t *testing.T) {
			g, stage := hostile(t)
			g.cookie = row.cookie
			go g.readLoop()
			go func() {
				m, _, err := stage.receive(0)
				if err == nil {
					_ = stage.send(message{Op: opMade, ID: m.ID}, row.fd)
				}
			}()
			f, err := g.Socket("tcp4")
			if (err == nil) != row.ok {
				t.Error(err)
			}
			if f != nil {
				f.Close()
			}
		})
	}
}

func TestSocketRequestsAreBounded(t *testing.T) {
	g, _ := hostile(t)
	for i := range maxSocketAsks {
		g.asks[uint32(i+1)] = make(chan socketAnswer, 1)
	}
	if _, err := g.Socket("tcp4"); !errors.Is(err, ErrTooManySockets) {
		t.Error(err)
	}
}

// FuzzStageMessages: whatever a stage sends, reading ends with an error and no descriptor stays
// open.
func FuzzStageMessages(f *testing.F) {
	f.Add([]byte(`{"op":"started"}`), []byte(`{"op":"exited","number":3}`))
	f.Add([]byte(`{"op":"made","id":7}`), []byte(`{"op":"failed","id":7,"text":"x"}`))
	f.Fuzz(func(t *testing.T, a, b []byte) {
		near, far, err := channelPair()
		if err != nil {
			t.Fatal(err)
		}
		stage, err := newChannel(far)
		if err != nil {
			t.Fatal(err)
		}
		g := &Guest{ch: near, exited: make(chan struct{}), started: make(chan error, 1), asks: map[uint32]chan socketAnswer{}}
		defer near.close()
		_, _ = stage.c.Write(a)
		_, _ = stage.c.Write(b)
		stage.close()
		if g.read() == nil {
			t.Error("read ended without a reason")
		}
		if g.status.Code < 0 || g.status.Code > 255 {
			t.Errorf("status %+v", g.status)
		}
	})
}
