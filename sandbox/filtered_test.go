package sandbox

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/net/dns/dnsmessage"
	"golang.org/x/sys/unix"

	"sluice.dev/sluice/forwarder/dns"
	"sluice.dev/sluice/internal/testutil"
	"sluice.dev/sluice/policy"
	"sluice.dev/sluice/sandbox/internal/channel"
	"sluice.dev/sluice/sandbox/internal/confine"
	"sluice.dev/sluice/sandbox/internal/flowlog"
	"sluice.dev/sluice/sandbox/internal/process"
	"sluice.dev/sluice/sandbox/internal/worker"
)

// This does everything that a worker does through Go's libraries, which choose their own system
// calls, in a process that is confined and filtered as a worker is. The forwarder's own system
// calls are under the filter wherever a real worker is tested.

func TestTheWorkersLibrariesPassItsFilter(t *testing.T) {
	s := process.NewSpawner()
	defer s.Close()
	var mu sync.Mutex
	var said []string
	plan := process.WorkerPlan(process.WorkerIDs())
	plan.Args = []string{os.Args[0], "test-filtered"}
	p, err := s.Start(plan, func(line string) {
		mu.Lock()
		defer mu.Unlock()
		said = append(said, line)
	})
	testutil.Must(t, err)
	select {
	case <-p.Done:
	case <-time.After(30 * time.Second):
		p.Kill()
		t.Error("it does not end")
	}
	mu.Lock()
	defer mu.Unlock()
	if p.Why != "exit status 0" {
		t.Errorf("%s; the last that it did:\n%s", p.Why, strings.Join(said, "\n"))
	}
}

// filteredPaths is the process. It says what it is about to do, so that its last line shows which
// step killed it.
func filteredPaths() int {
	seal, err := confine.Enter(confine.Config{KeepFDs: []int{0, 1, 2, channel.WorkerChannelFD}})
	if err == nil {
		err = seal()
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "confine:", err)
		return 1
	}
	for _, row := range filteredRows() {
		fmt.Fprintln(os.Stderr, row.name)
		if err := row.do(); err != nil {
			fmt.Fprintln(os.Stderr, err)
			return 1
		}
	}
	return 0
}

type filteredRow struct {
	name string
	do   func() error
}

func filteredRows() (rows []filteredRow) {
	add := func(name string, do func() error) { rows = append(rows, filteredRow{name, do}) }
	for _, server := range []string{
		"127.0.0.1", "::1", "fe80::1%1", "fe80::1%2147483647", "fe80::1%lo", "fe80::1%no-such-zone", "::1%lo", "ff02::fb%1",
		"0.0.0.0", "::",
	} {
		at := netip.AddrPortFrom(netip.MustParseAddr(server), 9) // no server answers there
		for _, network := range []string{"udp", "tcp"} {
			add("dialling the upstream server "+at.String()+" by "+network, func() error { return dialAndDrop(network, at) })
		}
		add("resolving by the upstream server "+at.String(), func() error { return resolveInVain(at) })
	}
	add("resolving", resolveFiltered)
	add("writing the flow log", writeRecords)
	add("logging", func() error {
		slog.New(&worker.JournalHandler{W: os.Stderr}).With("a", 1).Warn("words", "at", time.Now())
		return nil
	})
	return rows
}

// dialAndDrop may fail, but not die.
func dialAndDrop(network string, server netip.AddrPort) error {
	u := dns.Upstreams{Servers: []netip.AddrPort{server}}
	ctx, cancel := context.WithTimeout(context.Background(), 100*time.Millisecond)
	defer cancel()
	c, err := worker.NewUpstreamDialer(u).Dial(ctx, network, server)
	if err != nil {
		return nil
	}
	defer c.Close()
	_, _ = fmt.Sprint(c.LocalAddr(), c.RemoteAddr()), c.SetDeadline(time.Now().Add(time.Millisecond))
	_, _ = c.Write([]byte("question"))
	_, _ = c.Read(make([]byte, 100))
	return nil
}

func resolver(server netip.AddrPort) (*dns.Resolver, error) {
	u := dns.Upstreams{Servers: []netip.AddrPort{server}, Attempts: 1, Timeout: 100 * time.Millisecond}
	return dns.New(dns.Config{
		Dialer: worker.NewUpstreamDialer(u), Upstreams: u, Log: slog.New(&worker.JournalHandler{W: os.Stderr}),
		Hosts: map[string][]netip.Addr{"given.test": {netip.MustParseAddr("192.0.2.7")}},
		Names: policy.NewNames(policy.NamesConfig{}),
	})
}

func question(name string) []byte {
	m := dnsmessage.Message{
		Header:    dnsmessage.Header{ID: 7, RecursionDesired: true},
		Questions: []dnsmessage.Question{{Name: dnsmessage.MustNewName(name), Type: dnsmessage.TypeA, Class: dnsmessage.ClassINET}},
	}
	b, err := m.Pack()
	if err != nil {
		panic(err)
	}
	return b
}

func askFor(r *dns.Resolver, name string) dnsmessage.RCode {
	answer := make(chan []byte, 1)
	r.ServePacket(context.Background(), question(name), netip.MustParseAddrPort("10.0.2.100:4000"), func(b []byte, _ policy.Outcome) { answer <- append([]byte(nil), b...) })
	return dnsmessage.RCode(binary.BigEndian.Uint16((<-answer)[2:]) & 0xf)
}

func resolveInVain(server netip.AddrPort) error {
	r, err := resolver(server)
	if err != nil {
		return err
	}
	defer r.Close()
	if code := askFor(r, "a.test."); code != dnsmessage.RCodeServerFailure {
		return fmt.Errorf("nobody's answer is %v", code)
	}
	return nil
}

// resolveFiltered runs a server in the same process that truncates its answers over UDP, so that it
// is asked over TCP too. Questions come by both.
func resolveFiltered() error {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	defer l.Close()
	at := netip.MustParseAddrPort(l.Addr().String())
	u, err := net.ListenUDP("udp", net.UDPAddrFromAddrPort(at))
	if err != nil {
		return err
	}
	defer u.Close()
	const cut = 2 // the TC bit, in the third byte
	go func() {   // ends with the socket
		buf := make([]byte, 1500)
		for {
			n, from, err := u.ReadFromUDPAddrPort(buf)
			if err != nil {
				return
			}
			buf[2] |= 0x80 | cut
			_, _ = u.WriteToUDPAddrPort(buf[:n], from)
		}
	}()
	go func() { // ends with the listener
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			buf := make([]byte, 1500)
			n, _ := c.Read(buf)
			buf[4] |= 0x80
			_, _ = c.Write(buf[:n])
			c.Close()
		}
	}()
	r, err := resolver(at)
	if err != nil {
		return err
	}
	defer r.Close()
	edns := append(question("a.test."), 0, 0, 41, 0x10, 0, 0, 0, 0, 0, 0, 0)
	edns[11] = 1
	near, far := net.Pipe()
	served := make(chan struct{})
	go func() { defer close(served); r.ServeStream(context.Background(), far, func(policy.Outcome) {}) }()
	for _, msg := range [][]byte{question("given.test."), edns} {
		if _, err := near.Write(append(binary.BigEndian.AppendUint16(nil, uint16(len(msg))), msg...)); err != nil {
			return err
		}
		if n, err := near.Read(make([]byte, 1500)); err != nil || n < 12 {
			return fmt.Errorf("over a stream: %d bytes, %w", n, err)
		}
	}
	near.Close()
	<-served
	if code := askFor(r, "given.test."); code != dnsmessage.RCodeSuccess {
		return fmt.Errorf("a name of our own: %v", code)
	}
	if s := r.Stats(); s.UpstreamTCP == 0 {
		return fmt.Errorf("nothing went over TCP: %+v", s)
	}
	return nil
}

// writeRecords writes the flow log to a file, and to the next one.
func writeRecords() error {
	var files [2]*os.File
	for i := range files {
		fd, err := unix.MemfdCreate("log", unix.MFD_CLOEXEC)
		if err != nil {
			return err
		}
		files[i] = os.NewFile(uintptr(fd), "log")
	}
	sink := flowlog.NewFlowSink(files[0], time.Now, slog.New(&worker.JournalHandler{W: os.Stderr}))
	sink.Max, sink.Want = 1, func() {}
	for range 2 {
		sink.Add([]byte("record"))
		sink.Flush()
		sink.Hand(files[1])
		sink.Change()
	}
	if sink.Written.Load() == 0 || sink.Failed {
		return errors.New("no record was written")
	}
	return nil
}
