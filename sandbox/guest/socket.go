package guest

import (
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// Sockets made inside, to reach the sandbox's own loopback. A connection to a published port must
// reach a server that listens on 127.0.0.1 there, and only a socket of that network namespace can.

// socketKind holds the arguments of socket(2) for a network name.
type socketKind struct{ domain, typ, proto int }

var socketKinds = map[string]socketKind{
	"tcp4": {unix.AF_INET, unix.SOCK_STREAM, unix.IPPROTO_TCP},
	"tcp6": {unix.AF_INET6, unix.SOCK_STREAM, unix.IPPROTO_TCP},
	"udp4": {unix.AF_INET, unix.SOCK_DGRAM, unix.IPPROTO_UDP},
	"udp6": {unix.AF_INET6, unix.SOCK_DGRAM, unix.IPPROTO_UDP},
}

// ErrTooManySockets means that the number of pending Socket calls has reached its limit.
var ErrTooManySockets = errors.New("too many guest sockets asked for at once")

// Socket makes a non-blocking socket inside. network is tcp4, tcp6, udp4 or udp6. The socket is
// neither bound nor connected.
func (g *Guest) Socket(network string) (*os.File, error) {
	kind, ok := socketKinds[network]
	if !ok {
		return nil, fmt.Errorf("guest socket: unknown network %q", network)
	}
	answer := make(chan socketAnswer, 1)
	g.mu.Lock()
	if g.asks == nil {
		g.mu.Unlock()
		return nil, ErrStageGone
	}
	if len(g.asks) >= maxSocketAsks {
		g.mu.Unlock()
		return nil, ErrTooManySockets
	}
	g.lastID++
	if g.lastID == 0 { // 0 means no request
		g.lastID++
	}
	id := g.lastID
	g.asks[id] = answer
	g.mu.Unlock()

	if err := g.ch.send(message{Op: opSocket, ID: id, Text: network}); err != nil {
		g.mu.Lock()
		delete(g.asks, id)
		g.mu.Unlock()
		return nil, fmt.Errorf("guest socket: %w", err)
	}
	a := <-answer
	if a.err != nil {
		return nil, fmt.Errorf("guest socket: %w", a.err)
	}
	if err := g.verify(int(a.file.Fd()), kind); err != nil {
		a.file.Close()
		return nil, fmt.Errorf("guest socket: %w", err)
	}
	return a.file, nil
}

// verify checks a socket from the stage against what was asked for.
func (g *Guest) verify(fd int, kind socketKind) error {
	for _, want := range []struct{ opt, value int }{
		{unix.SO_DOMAIN, kind.domain}, {unix.SO_TYPE, kind.typ}, {unix.SO_PROTOCOL, kind.proto},
	} {
		if got, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, want.opt); err != nil || got != want.value {
			return fmt.Errorf("%w: not the socket asked for", errBadMessage)
		}
	}
	if g.cookie != 0 {
		if got, err := netnsCookie(fd); err != nil || got != g.cookie {
			return fmt.Errorf("%w: a socket of another network namespace", errBadMessage)
		}
	}
	return unix.SetNonblock(fd, true)
}

func netnsCookie(fd int) (uint64, error) {
	return unix.GetsockoptUint64(fd, unix.SOL_SOCKET, unix.SO_NETNS_COOKIE)
}

// answer hands the stage's reply to the caller that asked.
func (g *Guest) answer(m message, files []*os.File) {
	g.mu.Lock()
	ask := g.asks[m.ID]
	delete(g.asks, m.ID)
	g.mu.Unlock()
	switch {
	case ask == nil:
		closeAll(files)
	case m.Op == opMade && len(files) == 1:
		ask <- socketAnswer{file: files[0]}
	default:
		closeAll(files)
		ask <- socketAnswer{err: fmt.Errorf("%.200s", m.Text)}
	}
}

// failAsks fails every pending request once the channel has ended. Later requests fail at once.
func (g *Guest) failAsks() {
	g.mu.Lock()
	asks := g.asks
	g.asks = nil
	g.mu.Unlock()
	for _, ask := range asks {
		ask <- socketAnswer{err: ErrStageGone}
	}
}

// socket is the stage's side of Socket.
func (s *stage) socket(m message) {
	kind, ok := socketKinds[m.Text]
	if !ok {
		_ = s.ch.send(message{Op: opFailed, ID: m.ID, Text: "unknown network"})
		return
	}
	fd, err := unix.Socket(kind.domain, kind.typ|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, kind.proto)
	if err != nil {
		_ = s.ch.send(message{Op: opFailed, ID: m.ID, Text: err.Error()})
		return
	}
	defer unix.Close(fd)
	_ = s.ch.send(message{Op: opMade, ID: m.ID}, fd)
}
