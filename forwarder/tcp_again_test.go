package forwarder

import (
	"net"
	"net/netip"
	"testing"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip/header"

	"sluice.dev/sluice/internal/testutil"
)

// again is a client that uses one port for one connection after the other, with no gap.
type again struct {
	w        *wire
	src, dst netip.AddrPort
	seq      uint32 // of the next segment
	ack      uint32
}

// syn requests another connection.
func (a *again) syn() {
	a.seq += 1 << 20
	a.w.send(segment(a.src, a.dst, header.TCPFlagSyn, a.seq, 0))
	a.seq++
}

// established receives the answer to syn and completes the handshake.
func (a *again) established(round int) {
	a.w.t.Helper()
	for {
		h := a.w.recvTCP(a.src.Port(), header.TCPFlagSyn|header.TCPFlagRst)
		switch {
		case h.Flags().Contains(header.TCPFlagRst) && h.AckNumber() == a.seq:
			a.w.t.Fatalf("round %d: the SYN is answered by a reset; counters: %v", round, a.w.counters())
		case h.Flags().Contains(header.TCPFlagSyn) && h.AckNumber() == a.seq:
			a.ack = h.SequenceNumber() + 1
			a.send(header.TCPFlagAck)
			return
		}
	}
}

func (a *again) send(flags header.TCPFlags) {
	a.w.send(segment(a.src, a.dst, flags, a.seq, a.ack))
}

// The rows are ways in which a connection ends before its port is used again. If closes is set, the
// server closes as soon as it has accepted.
func TestTCPAPortIsUsedAgainAtOnce(t *testing.T) {
	const rounds = 300
	for _, row := range []struct {
		what   string
		closes bool
		end    func(a *again)
	}{
		{"behind a reset", false, func(a *again) { a.send(header.TCPFlagRst | header.TCPFlagAck) }},
		{"behind an end of stream and a reset", false, func(a *again) {
			a.send(header.TCPFlagFin | header.TCPFlagAck)
			a.seq++
			a.send(header.TCPFlagRst | header.TCPFlagAck)
		}},
		{"behind the second end of stream", true, func(a *again) {
			for h := a.w.recvTCP(a.src.Port(), header.TCPFlagFin); ; h = a.w.recvTCP(a.src.Port(), header.TCPFlagFin) {
				if h.SequenceNumber() == a.ack {
					break
				}
			}
			a.ack++
			a.send(header.TCPFlagFin | header.TCPFlagAck)
			a.seq++
		}},
	} {
		for _, family := range []struct {
			network, listen string
			guest, gateway  netip.Addr
		}{{"tcp4", "127.0.0.1:0", guest4, gateway4}, {"tcp6", "[::1]:0", guest6, gateway6}} {
			t.Run(row.what+", "+family.network, func(t *testing.T) {
				l, err := net.Listen(family.network, family.listen)
				if err != nil {
					t.Fatal(err)
				}
				defer l.Close()
				go func() {
					for {
						c, err := l.Accept()
						if err != nil {
							return
						}
						if row.closes {
							c.Close()
							continue
						}
						go func() { _, _ = c.Read(make([]byte, 1)); c.Close() }()
					}
				}()
				w := newWire(t, allowAll, nil)
				a := &again{w: w, src: netip.AddrPortFrom(family.guest, 40000), dst: netip.AddrPortFrom(family.gateway, uint16(l.Addr().(*net.TCPAddr).Port))}
				began := time.Now()
				for round := range rounds {
					a.syn()
					a.established(round)
					row.end(a)
				}
				if d := time.Since(began); d > rounds*time.Second/10 {
					t.Errorf("%d connections took %v: they were asked for again", rounds, d)
				}
				testutil.Eventually(t, "every flow has ended", func() bool { return w.table.Len() == 0 })
			})
		}
	}
}

// A sandbox that gave up a dial says nothing; its next attempt from the same port is a new one.
func TestTCPADialGoesOnForTheLatestSYN(t *testing.T) {
	ns := inNetns(t)
	routerNetns(t)
	ns.run(t, "silent", func(t *testing.T) {
		w := newWire(t, allowAll, nil)
		src, dst := netip.AddrPortFrom(guest4, 10000), netip.AddrPortFrom(netip.MustParseAddr("192.0.2.77"), 80)
		w.send(segment(src, dst, header.TCPFlagSyn, 1000, 0))
		fl := w.f.tcp.All()[0]
		w.send(segment(src, dst, header.TCPFlagSyn, 5000, 0))
		testutil.Eventually(t, "the flow has the later SYN", func() bool {
			fl.Mu.Lock()
			defer fl.Mu.Unlock()
			return fl.Irs == 5000 && header.TCP(fl.Syn.TransportHeader().Slice()).SequenceNumber() == 5000
		})
		if n := w.table.Len(); n != 1 {
			t.Errorf("%d flows", n)
		}
	})
}

// A SYN in an established connection is answered by a challenge. If the sandbox's kernel knows no
// such connection, it resets it, and the new one begins. If it stays silent, nothing changes.
func TestTCPASYNOfAnotherConnectionIsChallenged(t *testing.T) {
	w := newWire(t, allowAll, nil)
	a := &again{w: w, src: netip.AddrPortFrom(guest4, 40000), dst: netip.AddrPortFrom(gateway4, listenHost(t))}
	a.syn()
	a.established(0)
	testutil.Eventually(t, "the connection is established", func() bool {
		l := w.table.List()
		return len(l) == 1 && l[0].State.String() == "ESTABLISHED"
	})
	old := a.seq
	a.syn()
	challenge := w.recvTCP(a.src.Port(), header.TCPFlagAck)
	if challenge.AckNumber() != old || challenge.Flags() != header.TCPFlagAck {
		t.Fatalf("the SYN is answered by %v, acknowledging %d, not by an ACK of %d", challenge.Flags(), challenge.AckNumber(), old)
	}
	if s := w.table.List()[0].State.String(); s != "ESTABLISHED" {
		t.Errorf("the connection is %s", s)
	}
	w.send(segment(a.src, a.dst, header.TCPFlagRst, challenge.AckNumber(), 0))
	a.established(1)
}
