package worker

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"

	"golang.org/x/sys/unix"

	"sluice.dev/sluice/forwarder/dns"
	"sluice.dev/sluice/sandbox/internal/channel"
)

// upstreamDialer opens the resolver's sockets. The host chooses the upstream servers, often
// 127.0.0.53, which no policy of the sandbox may reach. So what decides here is the list that the
// monitor sent, and the hook right before connect compares the address with it once more.
type upstreamDialer struct {
	servers atomic.Pointer[map[netip.AddrPort]bool]
	before  atomic.Pointer[map[netip.AddrPort]bool] // the previous list, whose answers may be late
}

var ErrNotUpstream = errors.New("not an upstream server")

func NewUpstreamDialer(u dns.Upstreams) *upstreamDialer {
	d := new(upstreamDialer)
	d.Allow(u)
	return d
}

// asks reports whether server is an upstream server, or was one before the list was last replaced.
// No packet from it begins a flow into a pod: such a packet is late for a socket of the resolver,
// of this worker or the one before.
func (d *upstreamDialer) asks(server netip.AddrPort) bool {
	if (*d.servers.Load())[server] {
		return true
	}
	before := d.before.Load()
	return before != nil && (*before)[server]
}

// Allow replaces the list.
func (d *upstreamDialer) Allow(u dns.Upstreams) {
	m := make(map[netip.AddrPort]bool, len(u.Servers))
	for _, s := range u.Servers {
		m[s] = true
	}
	d.before.Store(d.servers.Swap(&m))
}

// Dial implements dns.Dialer.
func (d *upstreamDialer) Dial(ctx context.Context, network string, server netip.AddrPort) (net.Conn, error) {
	dialer := net.Dialer{Control: func(_, _ string, _ syscall.RawConn) error {
		if !(*d.servers.Load())[server] {
			return ErrNotUpstream
		}
		return nil
	}}
	c, err := dialer.DialContext(ctx, network, server.String())
	if err != nil {
		return nil, fmt.Errorf("dial the upstream server %s: %w", server, err)
	}
	return c, nil
}

// mapMemory maps the whole memory for flows. Its size was set by the binary that made it.
func mapMemory(fd int) ([]byte, error) {
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return nil, err
	}
	return unix.Mmap(fd, 0, int(st.Size), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
}

// socketStock keeps a few sockets of the guest's network namespace in stock, as long as ports are
// published that a loopback client can reach. The goroutine that needs one is on a run queue and
// cannot wait for the monitor to make it. Each one taken is requested again.
type socketStock struct {
	want func(v6 bool) error // asks the monitor for one; called without holding mu

	mu    sync.Mutex
	ports [2]int   // published ports, v4 and v6
	fds   [2][]int // in stock
	Asked [2]int   // requested and not yet here
}

// StockSize is the number of loopback clients that can connect within the millisecond a refill
// takes.
const StockSize = 32

func NewSocketStock(want func(v6 bool) error) *socketStock { return &socketStock{want: want} }

func family(v6 bool) int {
	if v6 {
		return 1
	}
	return 0
}

// Open counts a published port, which leads to both of the guest's addresses. Close uncounts it,
// and closes the sockets with the last one.
func (s *socketStock) Open(guest []netip.Addr) {
	for _, a := range guest {
		s.mu.Lock()
		s.ports[family(a.Is6())]++
		s.mu.Unlock()
		s.Fill(a.Is6())
	}
}

func (s *socketStock) Close(guest []netip.Addr) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, a := range guest {
		i := family(a.Is6())
		if s.ports[i]--; s.ports[i] == 0 {
			channel.CloseAll(s.fds[i])
			s.fds[i] = nil
		}
	}
}

// Fill requests the sockets that are missing.
func (s *socketStock) Fill(v6 bool) {
	i := family(v6)
	s.mu.Lock()
	n := 0
	if s.ports[i] > 0 {
		n = max(StockSize-len(s.fds[i])-s.Asked[i], 0)
	}
	s.Asked[i] += n
	s.mu.Unlock()
	for ; n > 0; n-- {
		if s.want(v6) != nil {
			s.mu.Lock()
			s.Asked[i] -= n
			s.mu.Unlock()
			return
		}
	}
}

// Put takes the answer to a request: a socket, or none.
func (s *socketStock) Put(v6 bool, fds []int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	i := family(v6)
	s.Asked[i] = max(s.Asked[i]-1, 0)
	if s.ports[i] == 0 {
		channel.CloseAll(fds)
		return
	}
	s.fds[i] = append(s.fds[i], fds...)
}

// Stream implements forwarder.GuestSockets.
func (s *socketStock) Stream(v6 bool) (fd int, ok bool) {
	i := family(v6)
	s.mu.Lock()
	if n := len(s.fds[i]); n > 0 {
		fd, ok = s.fds[i][n-1], true
		s.fds[i] = s.fds[i][:n-1]
	}
	s.mu.Unlock()
	s.Fill(v6)
	return fd, ok
}

// wantSocket asks the monitor for one more socket.
func (w *Worker) wantSocket(v6 bool) error {
	if v6 {
		return w.ch.Send(channel.MsgWantSocket6, 0, nil)
	}
	return w.ch.Send(channel.MsgWantSocket4, 0, nil)
}

// JournalHandler writes log records as lines with sd-daemon(3)'s level prefix, which the monitor
// parses. It writes no time: the monitor's clock is used.
type JournalHandler struct {
	W     io.Writer // each line is one Write
	attrs string
}

// Enabled implements slog.Handler.
func (h *JournalHandler) Enabled(_ context.Context, l slog.Level) bool { return l >= slog.LevelInfo }

// Handle implements slog.Handler.
func (h *JournalHandler) Handle(_ context.Context, r slog.Record) error {
	var b strings.Builder
	switch {
	case r.Level >= slog.LevelError:
		b.WriteString("<3>")
	case r.Level >= slog.LevelWarn:
		b.WriteString("<4>")
	default:
		b.WriteString("<6>")
	}
	b.WriteString(strings.ReplaceAll(r.Message, "\n", "; "))
	b.WriteString(h.attrs)
	r.Attrs(func(a slog.Attr) bool {
		fmt.Fprintf(&b, " %s=%q", a.Key, a.Value.String())
		return true
	})
	b.WriteByte('\n')
	_, err := io.WriteString(h.W, b.String())
	return err
}

// WithAttrs implements slog.Handler.
func (h *JournalHandler) WithAttrs(attrs []slog.Attr) slog.Handler {
	var b strings.Builder
	b.WriteString(h.attrs)
	for _, a := range attrs {
		fmt.Fprintf(&b, " %s=%q", a.Key, a.Value.String())
	}
	return &JournalHandler{W: h.W, attrs: b.String()}
}

// WithGroup implements slog.Handler; it ignores groups.
func (h *JournalHandler) WithGroup(string) slog.Handler { return h }
