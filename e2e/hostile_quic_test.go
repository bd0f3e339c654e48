package e2e

// The first flights of QUIC clients, put on the link one by one.

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/binary"
	"net"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/net/quic"

	"sluice.dev/sluice/internal/testutil"
)

const portQUIC = 8444 // of hostileSpec

// flight is a packet connection that keeps what is written to it.
type flight struct {
	mu     sync.Mutex // guards sent
	sent   [][]byte
	closed chan struct{}
}

func (f *flight) WriteTo(b []byte, _ net.Addr) (int, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.sent = append(f.sent, bytes.Clone(b))
	return len(b), nil
}

func (f *flight) ReadFrom([]byte) (int, net.Addr, error) {
	<-f.closed
	return 0, nil, net.ErrClosed
}

func (f *flight) Close() error                     { close(f.closed); return nil }
func (f *flight) LocalAddr() net.Addr              { return &net.UDPAddr{IP: net.IPv4(10, 0, 2, 100), Port: 1} }
func (f *flight) SetDeadline(time.Time) error      { return os.ErrNoDeadline }
func (f *flight) SetReadDeadline(time.Time) error  { return os.ErrNoDeadline }
func (f *flight) SetWriteDeadline(time.Time) error { return os.ErrNoDeadline }

// quicHello returns what a QUIC client sends before it receives anything. With enough padding, its
// ClientHello is larger than a datagram.
func quicHello(t *testing.T, name string, padding int) [][]byte {
	t.Helper()
	f := &flight{closed: make(chan struct{})}
	conf := &tls.Config{ServerName: name, InsecureSkipVerify: true, MinVersion: tls.VersionTLS13, NextProtos: []string{"h3"}}
	for range padding / 250 {
		conf.NextProtos = append(conf.NextProtos, strings.Repeat("x", 250))
	}
	e, err := quic.NewEndpoint(f, nil)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	var dialling sync.WaitGroup
	dialling.Go(func() { // fails once cancelled, because no server answers
		if c, err := e.Dial(ctx, "udp", "192.0.2.1:443", &quic.Config{TLSConfig: conf}); err == nil {
			c.Abort(nil)
		}
	})
	var sent [][]byte
	testutil.Within(t, 10*time.Second, func() (bool, string) {
		f.mu.Lock()
		defer f.mu.Unlock()
		sent = f.sent
		return len(sent) > padding/1200, "the QUIC client says nothing"
	})
	cancel()
	dialling.Wait()
	closing, done := context.WithCancel(t.Context())
	done()
	e.Close(closing)
	return sent
}

// hostileQUIC returns attempts on a rule by domain for UDP.
func hostileQUIC(t *testing.T) []attempt {
	sport := 41500
	to := func(datagrams ...[]byte) func(bool) []ipPacket {
		sport++
		port := sport
		return func(v6 bool) (packets []ipPacket) {
			for _, d := range datagrams {
				packets = append(packets, ipPacket{dst: pick(v6, far4, far6)}.udp(port, portQUIC, string(d)))
			}
			return packets
		}
	}
	version := func(v uint32, datagrams [][]byte) [][]byte {
		for _, d := range datagrams {
			binary.BigEndian.PutUint32(d[1:], v)
		}
		return datagrams
	}
	evil := quicHello(t, "evil.test", 0)
	split := quicHello(t, "evil.test", 2500)
	if len(split) < 2 {
		t.Fatalf("a ClientHello of more than 2500 bytes is in %d datagrams", len(split))
	}
	const rule = "egress[4] quic"
	return []attempt{
		{name: "QUIC by another SNI", packets: to(evil...), reason: rule},
		{name: "QUIC by another SNI, in several datagrams", packets: to(split...), reason: rule},
		{name: "QUIC by another SNI, the last datagram first", packets: to(append([][]byte{split[len(split)-1]}, split[:len(split)-1]...)...), reason: rule},
		{name: "QUIC without SNI", packets: to(quicHello(t, "", 0)...), reason: rule},
		{name: "QUIC of a version that nobody knows", packets: to(version(0x1a2a3a4a, quicHello(t, "pypi.test", 0))...), reason: rule},
		{name: "QUIC's version negotiation, sent by the client", packets: to(version(0, quicHello(t, "pypi.test", 0))...), reason: rule},
		{name: "a datagram to QUIC's port that is none", packets: to([]byte("LEAK-LEAK-LEAK-LEAK")), reason: rule},
	}
}
