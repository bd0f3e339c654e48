package main

// These clients make one connection and report exactly what they saw of it.

import (
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/base64"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"slices"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

type dialed struct {
	Error  string  `json:"error,omitempty"` // name of the errno, "timeout", or the text
	Stage  string  `json:"stage,omitempty"` // connect, write, read
	Millis float64 `json:"ms"`              // until the connection was set up or failed
	Got    string  `json:"got,omitempty"`
	End    string  `json:"end,omitempty"`
	SHA    string  `json:"sha,omitempty"` // of what was sent
}

// errorName returns the errno's own name where there is one: messages differ, names do not.
func errorName(err error) string {
	var errno syscall.Errno
	var timeout net.Error
	switch {
	case errors.As(err, &errno):
		return unix.ErrnoName(errno)
	case errors.As(err, &timeout) && timeout.Timeout(), errors.Is(err, context.DeadlineExceeded):
		return "timeout"
	}
	return err.Error()
}

// dial connects to an address, sends, closes in the way asked for, and reads to the end.
func dial(args []string) error {
	fs := flag.NewFlagSet("dial", flag.ExitOnError)
	timeout := fs.Duration("timeout", 10*time.Second, "for the whole")
	send := fs.String("send", "", "what to send")
	encoded := fs.String("send-base64", "", "send this instead, decoded")
	chunk := fs.Int("chunk", 0, "send in pieces of so many bytes, each in a segment of its own")
	sendN := fs.Int("send-bytes", 0, "send so many bytes instead")
	how := fs.String("close", "half", "after sending: half (shutdown), reset, full, or no (read only)")
	tos := fs.Int("tos", 0, "IP_TOS or IPV6_TCLASS of the connection")
	port := fs.Int("port", 0, "own port, whoever had it before")
	if err := fs.Parse(args); err != nil {
		return err
	}
	var r dialed
	defer func() { say(r) }()
	start := time.Now()
	d := net.Dialer{Timeout: *timeout, LocalAddr: &net.TCPAddr{Port: *port}, Control: func(network, _ string, c syscall.RawConn) error {
		return c.Control(func(fd uintptr) {
			unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_REUSEADDR, 1)
			unix.SetsockoptInt(int(fd), unix.IPPROTO_IP, unix.IP_TOS, *tos)
			unix.SetsockoptInt(int(fd), unix.IPPROTO_IPV6, unix.IPV6_TCLASS, *tos)
		})
	}}
	conn, err := d.Dial("tcp", fs.Arg(0))
	r.Millis = float64(time.Since(start).Microseconds()) / 1000
	if err != nil {
		r.Stage, r.Error = "connect", errorName(err)
		return nil
	}
	defer conn.Close()
	c := conn.(*net.TCPConn)
	c.SetDeadline(start.Add(*timeout))
	data := []byte(*send)
	if *sendN > 0 {
		data = make([]byte, *sendN)
		for i := range data {
			data[i] = byte(i * 7)
		}
		r.SHA = fmt.Sprintf("%x", sha256.Sum256(data))
	}
	if *encoded != "" {
		if data, err = base64.StdEncoding.DecodeString(*encoded); err != nil {
			return err
		}
	}
	for piece := range slices.Chunk(data, max(cmp.Or(*chunk, len(data)), 1)) {
		if _, err := c.Write(piece); err != nil {
			r.Stage, r.Error = "write", errorName(err)
			return nil
		}
		if *chunk > 0 {
			time.Sleep(200 * time.Microsecond) // the kernel would join what arrives at once
		}
	}
	switch *how {
	case "half":
		c.CloseWrite()
	case "reset":
		c.SetLinger(0)
		return c.Close()
	case "full":
		return c.Close()
	}
	got, err := io.ReadAll(c)
	r.Got, r.End = string(got), end(err)
	if err != nil {
		r.Stage, r.Error = "read", errorName(err)
	}
	return nil
}

type udpResult struct {
	Sent     int    `json:"sent"`
	Received int    `json:"received"`
	Wrong    int    `json:"wrong"` // answers whose bytes differ from those sent
	Strange  int    `json:"strange"`
	From     string `json:"from,omitempty"` // sender of the last answer
	Local    string `json:"local,omitempty"`
	Got      string `json:"got,omitempty"`
	Error    string `json:"error,omitempty"`
	// Errors that the socket's error queue reported (RFC 1122's port unreachable and such).
	Millis float64 `json:"ms"`
}

// udpClient sends datagrams and waits for each one's answer.
func udpClient(args []string) error {
	fs := flag.NewFlagSet("udp", flag.ExitOnError)
	timeout := fs.Duration("timeout", 5*time.Second, "for the whole")
	count := fs.Int("count", 1, "datagrams")
	size := fs.Int("size", 16, "bytes in each")
	text := fs.String("text", "", "send this instead")
	expect := fs.Int("expect", 0, "wait for so many answers in all, to the last text")
	ttl := fs.Int("ttl", 64, "TTL or hop limit")
	tos := fs.Int("tos", 0, "TOS or traffic class")
	df := fs.Bool("df", false, "forbid fragments")
	port := fs.Int("port", 0, "own port")
	if err := fs.Parse(args); err != nil {
		return err
	}
	d := net.Dialer{LocalAddr: &net.UDPAddr{Port: *port}}
	conn, err := d.Dial("udp", fs.Arg(0))
	if err != nil {
		return err
	}
	defer conn.Close()
	c := conn.(*net.UDPConn)
	raw, err := c.SyscallConn()
	if err != nil {
		return err
	}
	raw.Control(func(fd uintptr) {
		// One family's option fails on a socket of the other, as expected.
		unix.SetsockoptInt(int(fd), unix.IPPROTO_IP, unix.IP_TTL, *ttl)
		unix.SetsockoptInt(int(fd), unix.IPPROTO_IPV6, unix.IPV6_UNICAST_HOPS, *ttl)
		unix.SetsockoptInt(int(fd), unix.IPPROTO_IP, unix.IP_TOS, *tos)
		unix.SetsockoptInt(int(fd), unix.IPPROTO_IPV6, unix.IPV6_TCLASS, *tos)
		unix.SetsockoptInt(int(fd), unix.IPPROTO_IP, unix.IP_RECVERR, 1)
		unix.SetsockoptInt(int(fd), unix.IPPROTO_IPV6, unix.IPV6_RECVERR, 1)
		if *df {
			unix.SetsockoptInt(int(fd), unix.IPPROTO_IP, unix.IP_MTU_DISCOVER, unix.IP_PMTUDISC_DO)
			unix.SetsockoptInt(int(fd), unix.IPPROTO_IPV6, unix.IPV6_DONTFRAG, 1)
		}
	})
	r := udpResult{Local: c.LocalAddr().String()}
	defer func() { say(r) }()
	start := time.Now()
	c.SetDeadline(start.Add(*timeout))
	defer func() { r.Millis = float64(time.Since(start).Microseconds()) / 1000 }()
	buf := make([]byte, 1<<16)
	receive := func(want []byte) bool {
		n, err := c.Read(buf)
		if err != nil {
			r.Error = errorName(err)
			return false
		}
		r.Received++
		if want != nil && string(want) != string(buf[:n]) {
			r.Wrong++
		}
		r.Got = string(buf[:min(n, 64)])
		return true
	}
	for i := range *count {
		data := make([]byte, *size)
		for j := range data {
			data[j] = byte(i + j)
		}
		if *text != "" {
			data = []byte(*text)
		}
		if _, err := c.Write(data); err != nil {
			r.Error = errorName(err)
			return nil
		}
		r.Sent++
		var want []byte
		if *text == "" {
			want = data
		}
		if *expect == 0 && !receive(want) {
			return nil
		}
	}
	for r.Received < *expect && receive(nil) {
	}
	r.From = c.RemoteAddr().String()
	return nil
}

// get is an HTTP client for machines without curl: status and body on standard output.
func get(args []string) error {
	fs := flag.NewFlagSet("get", flag.ExitOnError)
	timeout := fs.Duration("timeout", 10*time.Second, "for the whole")
	if err := fs.Parse(args); err != nil {
		return err
	}
	client := http.Client{Timeout: *timeout}
	start := time.Now()
	resp, err := client.Get(fs.Arg(0))
	if err != nil {
		return fmt.Errorf("after %.1f ms: %w", float64(time.Since(start).Microseconds())/1000, err)
	}
	defer resp.Body.Close()
	fmt.Println(resp.Status)
	_, err = io.Copy(os.Stdout, resp.Body)
	return err
}

// eatDescriptors opens files until it reaches the limit, reports how many, and waits for its input
// to end.
func eatDescriptors([]string) error {
	n := 0
	for {
		if _, err := unix.Open("/dev/null", unix.O_RDONLY, 0); err != nil {
			break
		}
		n++
	}
	say(map[string]int{"opened": n})
	_, err := io.Copy(io.Discard, os.Stdin)
	return err
}
