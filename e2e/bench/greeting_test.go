package main

import (
	"bytes"
	"runtime"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"sluice.dev/sluice/forwarder/sniff"
)

// A client's greeting names the far side, and the far side finds the header behind it however the
// bytes arrive.
func TestGreetingsAreReadAsTheyAreMade(t *testing.T) {
	h := header{mode: 'D', start: 5, end: 9, id: 77}
	for _, speaks := range []string{"", speaksTLS, speaksHTTP} {
		first, err := greeting(speaks, headerLen)
		if err != nil {
			t.Fatal(err)
		}
		if l := greetingLen(first); l != len(first) {
			t.Errorf("%q: a greeting of %d bytes is read as one of %d", speaks, len(first), l)
		}
		if named := bytes.Contains(first, []byte(farName)); named != (speaks != "") {
			t.Errorf("%q: names the far side: %v", speaks, named)
		}
		if speaks == speaksTLS && len(first) < 1200 {
			t.Errorf("a ClientHello of %d bytes has no post-quantum key share", len(first))
		}
		behind := h.bytes()
		if speaks == speaksTLS {
			behind = record(tlsData, behind)
		}
		for _, piece := range []int{1, 7, 4096} {
			got, said, ok := overWire(t, append(first[:len(first):len(first)], behind...), piece)
			if !ok || said != speaks || got != h {
				t.Errorf("%q in pieces of %d: %+v, speaks %q, %v", speaks, piece, got, said, ok)
			}
		}
	}
	if _, err := greeting("gopher", 0); err == nil {
		t.Error("a protocol that nobody speaks has a greeting")
	}
}

// After the far side's answer to a ClientHello, the gate lets everything pass.
func TestServerHelloEndsTheGatesWork(t *testing.T) {
	var answer sniff.HelloAnswer
	answer.Feed(serverHello)
	if !answer.Settled || answer.Foreign || answer.Retries != 0 {
		t.Errorf("the ServerHello is read as %+v", answer)
	}
}

func TestGreetingThatEndsEarlyIsNoHeader(t *testing.T) {
	for _, speaks := range []string{speaksTLS, speaksHTTP} {
		first, err := greeting(speaks, 0)
		if err != nil {
			t.Fatal(err)
		}
		if _, _, ok := overWire(t, first[:len(first)-1], 4096); ok {
			t.Errorf("%s: a greeting cut short has a header", speaks)
		}
	}
}

// overWire runs readHeader on bytes that are written in pieces until they end.
func overWire(t *testing.T, b []byte, piece int) (header, string, bool) {
	t.Helper()
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer rawClose(fds[0])
	defer rawClose(fds[1])
	for _, fd := range fds { // with a timeout, a runtime signal ends a call
		setTimeouts(fd, 10*time.Second)
	}
	var writer sync.WaitGroup
	defer writer.Wait() // before the descriptors are closed
	writer.Go(func() {
		defer unix.Shutdown(fds[1], unix.SHUT_WR)
		for len(b) > 0 {
			n := min(piece, len(b))
			_, e := rawSend(fds[1], b[:n])
			if e == unix.EINTR {
				runtime.Gosched()
				continue
			}
			if e != 0 {
				return
			}
			b = b[n:]
		}
	})
	return readHeader(fds[0], make([]byte, bufferLen))
}
