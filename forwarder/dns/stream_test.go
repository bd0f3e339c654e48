package dns

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"testing"
	"testing/synctest"
	"time"

	"github.com/miekg/dns"

	"sluice.dev/sluice/policy"
)

// serve runs ServeStream on one end of a pipe; ended is closed when it returns.
func serve(r *Resolver) (c net.Conn, ended chan struct{}) {
	near, far := net.Pipe()
	ended = make(chan struct{})
	go func() {
		defer close(ended)
		r.ServeStream(context.Background(), far, func(policy.Outcome) {})
	}()
	return near, ended
}

func big(n int) *fakeServer {
	f := respond(func(q, a *dns.Msg) {
		for i := range n {
			a.Answer = append(a.Answer, rr(fmt.Sprintf("%s TXT %q", q.Question[0].Name, fmt.Sprintf("%0250d", i))))
		}
	})
	cut := respond(func(q, a *dns.Msg) { a.Truncated = true })
	return &fakeServer{udp: cut, tcp: f}
}

func TestStreamCarriesLargeAnswersWhole(t *testing.T) {
	r := newResolver(t, Config{Dialer: &fakeNet{servers: map[netip.AddrPort]*fakeServer{server(1): big(230)}}, Upstreams: upstreams(1)})
	c, _ := serve(r)
	defer c.Close()
	for range 3 { // one connection, several queries
		c.Write(prefixed(ask(t, "big.example", dns.TypeTXT)))
		b, err := readPrefixed(c)
		if err != nil {
			t.Fatal(err)
		}
		if a := unpack(t, b); len(a.Answer) != 230 || a.Truncated || len(b) < 60000 {
			t.Errorf("%d records in %d bytes, TC %v", len(a.Answer), len(b), a.Truncated)
		}
	}
}

func TestStreamAnswersInTheOrderOfReadiness(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		slow := respond(func(q, a *dns.Msg) {})
		up := func(q []byte) [][]byte {
			if qq, _ := readQuestion(q); qq.name == mustName("slow") {
				time.Sleep(time.Second)
			}
			return slow(q)
		}
		r := newResolver(t, Config{Dialer: &fakeNet{servers: map[netip.AddrPort]*fakeServer{server(1): {udp: up}}}, Upstreams: upstreams(1)})
		c, _ := serve(r)
		defer c.Close()
		// Three queries in one write, the middle one local.
		var w []byte
		for _, n := range []string{"slow", "localhost", "fast"} {
			w = append(w, prefixed(ask(t, n, dns.TypeA))...)
		}
		go c.Write(w)
		for _, want := range []string{"localhost.", "fast.", "slow."} {
			b, err := readPrefixed(c)
			if err != nil {
				t.Fatal(err)
			}
			if got := unpack(t, b).Question[0].Name; got != want {
				t.Errorf("got %s, want %s", got, want)
			}
		}
	})
}

func TestStreamEnds(t *testing.T) {
	whole := func(t *testing.T) []byte { return prefixed(ask(t, "a.example", dns.TypeA)) }
	rows := []struct {
		about string
		write func(t *testing.T) []byte
		took  time.Duration
	}{
		{"an idle one after its time", func(*testing.T) []byte { return nil }, 10 * time.Second},
		{"half a prefix after its time", func(*testing.T) []byte { return []byte{0} }, 10 * time.Second},
		{"half a message after its time", func(t *testing.T) []byte { return whole(t)[:20] }, 10 * time.Second},
		{"an idle one after its answers", whole, 18 * time.Second}, // its SERVFAIL comes at 8 s
		{"a response at once", func(t *testing.T) []byte { b := whole(t); b[4] |= 0x80; return b }, 0},
		{"an empty message at once", func(*testing.T) []byte { return []byte{0, 0} }, 0},
		{"a message longer than any query at once", func(*testing.T) []byte { return []byte{0xff, 0xff} }, 0},
	}
	for _, row := range rows {
		t.Run(row.about, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r := newResolver(t, Config{
					Dialer:    &fakeNet{servers: map[netip.AddrPort]*fakeServer{server(1): {}, server(2): {}}},
					Upstreams: upstreams(2),
				})
				c, ended := serve(r)
				defer c.Close()
				start := time.Now()
				go io.Copy(io.Discard, c)
				if _, err := c.Write(row.write(t)); err != nil {
					t.Fatal(err)
				}
				<-ended
				if took := time.Since(start); took != row.took {
					t.Errorf("took %v, want %v", took, row.took)
				}
			})
		})
	}
}

func TestStreamThatTakesNoAnswersIsClosed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newResolver(t, Config{Dialer: &fakeNet{servers: map[netip.AddrPort]*fakeServer{server(1): big(10)}}, Upstreams: upstreams(1)})
		c, ended := serve(r)
		defer c.Close()
		c.Write(prefixed(ask(t, "a.example", dns.TypeTXT)))
		<-ended
		if len(r.large) != 0 || len(r.inFlight) != 0 {
			t.Errorf("%d large answers, %d queries still held", len(r.large), len(r.inFlight))
		}
	})
}

func TestStreamPipelineIsBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		fake := &fakeNet{servers: map[netip.AddrPort]*fakeServer{server(1): {}}}
		r := newResolver(t, Config{Dialer: fake, Upstreams: upstreams(1), Limits: Limits{Pipeline: 2}})
		c, _ := serve(r)
		defer c.Close()
		q := prefixed(ask(t, "a.example", dns.TypeA))
		go func() {
			for range 5 {
				if _, err := c.Write(q); err != nil {
					return
				}
			}
		}()
		synctest.Wait()
		if n := len(fake.dialled()); n != 2 {
			t.Errorf("%d queries in flight, want 2", n)
		}
		for range 5 { // and all get their answer in the end
			if b, err := readPrefixed(c); err != nil || unpack(t, b).Rcode != dns.RcodeServerFailure {
				t.Fatalf("got %x, %v", b, err)
			}
		}
	})
}

func TestStreamsAreBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newResolver(t, Config{Limits: Limits{Streams: 1}})
		first, ended := serve(r)
		synctest.Wait()
		second, _ := serve(r)
		if _, err := second.Read(make([]byte, 1)); !errors.Is(err, io.EOF) {
			t.Errorf("the second stream reads %v, want EOF", err)
		}
		first.Close()
		<-ended
		third, _ := serve(r)
		defer third.Close()
		third.Write(prefixed(ask(t, "localhost", dns.TypeA)))
		if _, err := readPrefixed(third); err != nil {
			t.Errorf("after the first ended: %v", err)
		}
	})
}

func TestCloseEndsStreams(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newResolver(t, Config{Dialer: &fakeNet{servers: map[netip.AddrPort]*fakeServer{server(1): {}}}, Upstreams: upstreams(1)})
		start := time.Now()
		c, ended := serve(r)
		c.Write(prefixed(ask(t, "a.example", dns.TypeA)))
		synctest.Wait()
		r.Close()
		<-ended
		if time.Since(start) != 0 {
			t.Errorf("took %v", time.Since(start))
		}
	})
}

// A peer that has closed its sending half still gets its answers.
func TestHalfClosedStreamIsAnswered(t *testing.T) {
	ok := &fakeServer{udp: respond(func(q, a *dns.Msg) {})}
	r := newResolver(t, Config{Dialer: &fakeNet{servers: map[netip.AddrPort]*fakeServer{server(1): ok}}, Upstreams: upstreams(1)})
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	go func() {
		if c, err := l.Accept(); err == nil {
			r.ServeStream(context.Background(), c, func(policy.Outcome) {})
		}
	}()
	c, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	c.Write(append(prefixed(ask(t, "a.example", dns.TypeA)), prefixed(ask(t, "b.example", dns.TypeA))...))
	c.(*net.TCPConn).CloseWrite()
	all, err := io.ReadAll(c)
	if err != nil {
		t.Fatal(err)
	}
	if n := bytes.Count(all, []byte("\x07example\x00")); n != 2 {
		t.Errorf("%d answers in %x", n, all)
	}
}
