package dns

import (
	"context"
	"errors"
	"io"
	"net"
	"net/netip"
	"sync"
	"testing"

	"github.com/miekg/dns"

	"sluice.dev/sluice/policy"
)

// fakeNet is a Dialer whose servers are functions; no socket is opened.
type fakeNet struct {
	mu      sync.Mutex
	servers map[netip.AddrPort]*fakeServer
	dials   []string
}

// fakeServer answers a query with any number of datagrams (or, over TCP, messages). A nil function
// is a server that never answers.
type fakeServer struct {
	udp, tcp func(query []byte) [][]byte
	down     bool // refuses connections at once
}

var errRefused = errors.New("connection refused")

func (f *fakeNet) Dial(ctx context.Context, network string, server netip.AddrPort) (net.Conn, error) {
	f.mu.Lock()
	s := f.servers[server]
	f.dials = append(f.dials, network+" "+server.String())
	f.mu.Unlock()
	if s == nil || s.down {
		return nil, errRefused
	}
	near, far := net.Pipe()
	// Stopped by the resolver closing its end.
	go func() {
		defer far.Close()
		if network == "udp" {
			buf := make([]byte, maxMessage)
			n, err := far.Read(buf)
			if err != nil {
				return
			}
			if s.udp != nil {
				for _, m := range s.udp(buf[:n]) {
					if _, err := far.Write(m); err != nil {
						return
					}
				}
			}
		} else {
			msg, err := readPrefixed(far)
			if err != nil {
				return
			}
			if s.tcp != nil {
				for _, m := range s.tcp(msg) {
					if _, err := far.Write(prefixed(m)); err != nil {
						return
					}
				}
			}
		}
		io.Copy(io.Discard, far)
	}()
	if network == "udp" {
		return datagrams{near}, nil
	}
	return near, nil
}

func (f *fakeNet) dialled() []string {
	f.mu.Lock()
	defer f.mu.Unlock()
	return append([]string(nil), f.dials...)
}

// datagrams makes a pipe keep message boundaries as UDP does: bytes that do not fit a Read are
// lost.
type datagrams struct{ net.Conn }

func (d datagrams) Read(b []byte) (int, error) {
	var whole [maxMessage]byte
	n, err := d.Conn.Read(whole[:])
	return copy(b, whole[:n]), err
}

func readPrefixed(r io.Reader) ([]byte, error) {
	var p [2]byte
	if _, err := io.ReadFull(r, p[:]); err != nil {
		return nil, err
	}
	msg := make([]byte, be16(p[:], 0))
	_, err := io.ReadFull(r, msg)
	return msg, err
}

// respond makes a server function of a miekg/dns one.
func respond(f func(q, a *dns.Msg)) func([]byte) [][]byte {
	return func(query []byte) [][]byte {
		q, a := new(dns.Msg), new(dns.Msg)
		if err := q.Unpack(query); err != nil {
			return nil
		}
		a.SetReply(q)
		f(q, a)
		out, err := a.Pack()
		if err != nil {
			panic(err)
		}
		return [][]byte{out}
	}
}

func rr(s string) dns.RR {
	r, err := dns.NewRR(s)
	if err != nil {
		panic(err)
	}
	return r
}

// ask packs a query.
func ask(t testing.TB, name string, qtype uint16, edit ...func(*dns.Msg)) []byte {
	t.Helper()
	m := new(dns.Msg)
	m.SetQuestion(dns.Fqdn(name), qtype)
	for _, e := range edit {
		e(m)
	}
	b, err := m.Pack()
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func edns(size uint16, do bool) func(*dns.Msg) { return func(m *dns.Msg) { m.SetEdns0(size, do) } }

func newResolver(t testing.TB, cfg Config) *Resolver {
	t.Helper()
	r, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(r.Close)
	return r
}

var client = netip.MustParseAddrPort("10.0.2.100:4000")

// packet asks r over UDP and waits for the answer; nil means silence.
func packet(r *Resolver, query []byte) []byte {
	got := make(chan []byte, 1)
	r.ServePacket(context.Background(), query, client, func(b []byte, _ policy.Outcome) { got <- append([]byte(nil), b...) })
	done := make(chan struct{})
	go func() { r.work.Wait(); close(done) }()
	<-done
	select {
	case b := <-got:
		return b
	default:
		return nil
	}
}

func unpack(t testing.TB, b []byte) *dns.Msg {
	t.Helper()
	m := new(dns.Msg)
	if err := m.Unpack(b); err != nil {
		t.Fatalf("answer is malformed: %v (%x)", err, b)
	}
	return m
}

// upstreams names the servers 192.0.2.1 to 192.0.2.n.
func upstreams(n int) Upstreams {
	var u Upstreams
	for i := range n {
		u.Servers = append(u.Servers, server(i+1))
	}
	return u
}

func server(i int) netip.AddrPort {
	return netip.AddrPortFrom(netip.AddrFrom4([4]byte{192, 0, 2, byte(i)}), 53)
}
