package forwarder

import (
	"net"
	"testing"

	"golang.org/x/sys/unix"

	"sluice.dev/sluice/forwarder/internal/hostsock"
	"sluice.dev/sluice/forwarder/internal/tcpflow"
)

// recvErrOf returns IP_RECVERR or IPV6_RECVERR of a socket.
func recvErrOf(t *testing.T, fd int, v6 bool) int {
	t.Helper()
	level, name := unix.IPPROTO_IP, unix.IP_RECVERR
	if v6 {
		level, name = unix.IPPROTO_IPV6, unix.IPV6_RECVERR
	}
	n, err := unix.GetsockoptInt(fd, level, name)
	if err != nil {
		t.Fatal(err)
	}
	return n
}

// The error queue is for the dial only: while it is on, an ICMP error that an established
// connection would otherwise survive ends it.
func TestTheErrorQueueEndsWithTheDial(t *testing.T) {
	for _, network := range []string{"tcp4", "tcp6"} {
		t.Run(network, func(t *testing.T) {
			g := newGuest(t, allowAll, nil)
			roundTrip(t, g.mustDial(g.listen(network, echo)))
			fl := g.onlyFlow("the flow is live", func(fl *tcpflow.Flow) bool { return fl.Live.Load() })
			if on := recvErrOf(t, fl.FD, network == "tcp6"); on != 0 {
				t.Error("the connection has the error queue on")
			}
		})
	}
}

func TestADialThatSucceededTellsOfAReset(t *testing.T) {
	l, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	if err := hostsock.RecvErr(fd, false, true); err != nil {
		t.Fatal(err)
	}
	if err := unix.Connect(fd, hostsock.ToSockaddr(l.Addr().(*net.TCPAddr).AddrPort())); err != nil {
		t.Fatal(err)
	}
	c, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	if err := hostsock.Dialed(fd, false); err != nil || recvErrOf(t, fd, false) != 0 {
		t.Errorf("a dial that succeeded: %v, error queue %d", err, recvErrOf(t, fd, false))
	}
	if _, err := c.Write([]byte("hello")); err != nil {
		t.Fatal(err)
	}
	_ = c.(*net.TCPConn).SetLinger(0)
	c.Close()
	if err := hostsock.Dialed(fd, false); err != unix.ECONNRESET {
		t.Errorf("a dial that succeeded and was reset: %v, want ECONNRESET", err)
	}
	var b [8]byte
	if n, err := unix.Read(fd, b[:]); n != 5 {
		t.Errorf("what came before the reset: %d bytes, %v", n, err)
	}
}
