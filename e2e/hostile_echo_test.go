package e2e

// The payload of an echo request, under a rule that allows it.

import (
	"bytes"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

const echoSpec = sceneSpec + `
- name: echo
  action: allow
  to: [{cidr: ` + scene4 + `/32}, {cidr: "` + scene6 + `/128"}]
  icmp: [{family: IPv4, type: 8}, {family: IPv6, type: 128}]`

// echoPayload: the far side gets as many bytes, but not the same ones, and ping gets its own back.
// A reload does not change that.
func echoPayload(t *testing.T, h *hostile, v6 bool) (why string) {
	const secret = "LEAK-LEAK-LEAK"
	sb := h.w.host.sandbox(t, rootInside, "--policy", policyFile(t, echoSpec))
	for _, when := range []string{"before", "after a reload"} {
		if when != "before" {
			sb.set(t, echoSpec+"\n")
		}
		far := h.w.far.icmpSocket(t, v6)
		why = sb.refused(t, "icmp_payload_kept", func() { sb.raw(t, ipPacket{dst: scene(v6)}.echo(secret)) })
		if got := far.request(t, len(secret)); len(bytes.Trim(got[8:], "\x00")) > 0 {
			t.Errorf("%s: the far side got %q", when, got)
		}
		r := ok(t, sb, 10*time.Second, "ping", "-c", "2", "-i", "0.2", "-W", "2", "-s", "1000", "-p", "4c45414b", scene(v6))
		if r.wantOut(t, "2 received"); strings.Contains(r.out, "wrong data") {
			t.Errorf("%s: ping does not get its bytes back\n%s", when, r)
		}
		if got := far.request(t, 1000); bytes.Contains(got, []byte("LEAK")) {
			t.Errorf("%s: the far side got %q", when, got)
		}
	}
	return why
}

// icmpSocket is a raw socket that sees the echo requests to a namespace.
type icmpSocket int

func (n *netns) icmpSocket(t *testing.T, v6 bool) icmpSocket {
	t.Helper()
	var fd int
	var err error
	n.do(func() {
		fd, err = unix.Socket(pick(v6, unix.AF_INET, unix.AF_INET6), unix.SOCK_RAW|unix.SOCK_CLOEXEC, pick(v6, unix.IPPROTO_ICMP, unix.IPPROTO_ICMPV6))
	})
	if err != nil {
		t.Fatalf("listening for echo requests: %v", err)
	}
	t.Cleanup(func() { unix.Close(fd) })
	if err := unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Sec: 5}); err != nil {
		t.Fatal(err)
	}
	return icmpSocket(fd)
}

// request returns the next echo request with size bytes after its header.
func (s icmpSocket) request(t *testing.T, size int) []byte {
	t.Helper()
	b := make([]byte, 1<<16)
	for {
		n, _, err := unix.Recvfrom(int(s), b, 0)
		if err != nil {
			t.Fatalf("no echo request of %d bytes arrives: %v", size, err)
		}
		msg := b[:n]
		if msg[0]>>4 == 4 && n > 20 && msg[9] == protoICMP { // IPv4 delivers its header too
			msg = msg[int(msg[0]&15)*4:]
		}
		if (msg[0] == 8 || msg[0] == 128) && len(msg) == 8+size {
			return msg
		}
	}
}
