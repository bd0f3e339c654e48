package sandbox

import (
	"bytes"
	"encoding/json"
	"errors"
	"io"
	"os"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"sluice.dev/sluice/internal/testutil"
	"sluice.dev/sluice/sandbox/internal/channel"
)

// pair returns the two ends of a channel as the monitor and the worker have them.
func pair(t *testing.T) (monitor, worker *channel.Conn) {
	t.Helper()
	ends, err := channel.Socketpair(unix.SOCK_SEQPACKET)
	if err != nil {
		t.Fatal(err)
	}
	monitor, worker = channel.New(ends[0], false), channel.New(ends[1], true)
	t.Cleanup(func() { monitor.Close(); worker.Close() })
	return monitor, worker
}

func TestChannelCarriesMessagesAndDescriptorsInOrder(t *testing.T) {
	monitor, worker := pair(t)
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	if err := monitor.Send(channel.MsgPublish, 7, channel.PublishMessage{ID: 3, Proto: "udp"}, int(w.Fd())); err != nil {
		t.Fatal(err)
	}
	w.Close()
	if err := monitor.Send(channel.MsgStop, 0, nil); err != nil {
		t.Fatal(err)
	}
	m, fds, err := worker.Receive()
	if err != nil || m.Type != channel.MsgPublish || m.Seq != 7 || len(fds) != 1 {
		t.Fatalf("first message: %+v, %v, %v", m, fds, err)
	}
	var p channel.PublishMessage
	if err := json.Unmarshal(m.Body, &p); err != nil || p.ID != 3 || p.Proto != "udp" {
		t.Fatalf("body %s: %+v, %v", m.Body, p, err)
	}
	if flags, err := unix.FcntlInt(uintptr(fds[0]), unix.F_GETFD, 0); err != nil || flags&unix.FD_CLOEXEC == 0 {
		t.Errorf("received descriptor: flags %#x, %v; want close-on-exec", flags, err)
	}
	passed := os.NewFile(uintptr(fds[0]), "passed")
	if _, err := passed.WriteString("through"); err != nil {
		t.Fatal(err)
	}
	passed.Close()
	if b, err := io.ReadAll(r); err != nil || string(b) != "through" {
		t.Errorf("the passed descriptor led to %q, %v", b, err)
	}
	if m, _, err := worker.Receive(); err != nil || m.Type != channel.MsgStop {
		t.Errorf("second message: %+v, %v", m, err)
	}
}

func TestChannelCarriesLargeMessages(t *testing.T) {
	monitor, worker := pair(t)
	before := testutil.Descriptors(t, os.Getpid())
	source := strings.Repeat("0123456789abcdef", 200<<10/16)
	if err := monitor.Send(channel.MsgRules, 1, channel.RulesMessage{Policy: unparsed(t, source)}); err != nil {
		t.Fatal(err)
	}
	m, fds, err := worker.Receive()
	if err != nil || len(fds) != 0 {
		t.Fatalf("%v, %v", fds, err)
	}
	var r channel.RulesMessage
	err = json.Unmarshal(m.Body, &r)
	if d, given := r.Policy.Document(); err != nil || !given || d.Text() != source {
		t.Errorf("a policy of %d bytes came as %d, %v", len(source), len(d.Text()), err)
	}
	if after := testutil.Descriptors(t, os.Getpid()); after > before { // an earlier test's may still be closing
		t.Errorf("%d descriptors before, %d after", before, after)
	}
	if err := monitor.Send(channel.MsgRules, 1, strings.Repeat("x", channel.MaxMessage)); err == nil {
		t.Error("a message over the limit was sent")
	}
}

func TestChannelEndIsEOF(t *testing.T) {
	t.Run("the other side closed", func(t *testing.T) {
		monitor, worker := pair(t)
		monitor.Close()
		if _, _, err := worker.Receive(); !errors.Is(err, io.EOF) {
			t.Errorf("got %v, want EOF", err)
		}
	})
	t.Run("closed under a blocked Receive", func(t *testing.T) {
		monitor, _ := pair(t)
		got := make(chan error)
		go func() { _, _, err := monitor.Receive(); got <- err }()
		monitor.Close()
		if err := <-got; !errors.Is(err, io.EOF) {
			t.Errorf("got %v, want EOF", err)
		}
	})
}

func TestChannelRefusesWhatAWorkerMustNotSend(t *testing.T) {
	fd := func(t *testing.T) int {
		f, err := os.Open(os.DevNull)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { f.Close() })
		return int(f.Fd())
	}
	for _, row := range []struct {
		name string
		send func(t *testing.T, raw int)
	}{
		{"bytes that are not JSON", func(t *testing.T, raw int) { unix.Write(raw, []byte("\x00\xff{")) }},
		{"half a JSON value", func(t *testing.T, raw int) { unix.Write(raw, []byte(`{"type":"ack"`)) }},
		{"a packet longer than the limit", func(t *testing.T, raw int) {
			unix.Write(raw, append([]byte(`{"type":"`), bytes.Repeat([]byte("a"), channel.MaxPacket)...))
		}},
		{"a descriptor", func(t *testing.T, raw int) {
			unix.Sendmsg(raw, []byte(`{"type":"ack"}`), unix.UnixRights(fd(t)), nil, 0)
		}},
		{"a hundred descriptors", func(t *testing.T, raw int) {
			many := make([]int, 100)
			for i := range many {
				many[i] = fd(t)
			}
			unix.Sendmsg(raw, []byte(`{"type":"ready"}`), unix.UnixRights(many...), nil, 0)
		}},
		{"a large body without the memory file", func(t *testing.T, raw int) {
			unix.Write(raw, []byte(`{"type":"ack","large":true}`))
		}},
	} {
		t.Run(row.name, func(t *testing.T) {
			monitor, worker := pair(t)
			row.send(t, channel.FDOf(worker.F))
			before := testutil.Descriptors(t, os.Getpid())
			_, fds, err := monitor.Receive()
			if !errors.Is(err, channel.ErrProtocol) {
				t.Errorf("got %v, want a protocol violation", err)
			}
			if len(fds) != 0 || testutil.Descriptors(t, os.Getpid()) > before { // fewer: an earlier test's were collected
				t.Errorf("%d descriptors kept; %d open before, %d after", len(fds), before, testutil.Descriptors(t, os.Getpid()))
			}
		})
	}
}

func FuzzChannelReceive(f *testing.F) {
	f.Add([]byte(`{"type":"ready"}`), false)
	f.Add([]byte(`{"type":"ack","seq":18446744073709551615,"error":"x"}`), true)
	f.Add([]byte(`{"large":true}`), true)
	f.Fuzz(func(t *testing.T, packet []byte, withFD bool) {
		if len(packet) == 0 || len(packet) > channel.MaxPacket {
			return
		}
		ends, err := channel.Socketpair(unix.SOCK_SEQPACKET)
		if err != nil {
			t.Fatal(err)
		}
		in := channel.New(ends[0], withFD)
		defer in.Close()
		defer ends[1].Close()
		var oob []byte
		if withFD {
			null, err := os.Open(os.DevNull)
			if err != nil {
				t.Fatal(err)
			}
			defer null.Close()
			oob = unix.UnixRights(int(null.Fd()))
		}
		if _, err := unix.SendmsgN(channel.FDOf(ends[1]), packet, oob, nil, 0); err != nil {
			return
		}
		_, fds, _ := in.Receive()
		channel.CloseAll(fds)
	})
}
