package main

import (
	"bytes"
	"crypto/tls"
	"flag"
	"fmt"
	"io"
	"net"
	"time"
)

// hellosSeen is the outcome of two hellos.
type hellosSeen struct {
	Asked    bool   `json:"asked"`    // the server asked for a second one
	Received int    `json:"received"` // bytes received after it
	Error    string `json:"error"`    // of what came before it
}

// hellos is a TLS client whose second hello, if the server asks for one, has another name than its
// first. It cannot read the certificate that it gets, but reports its length.
func hellos(args []string) error {
	fs := flag.NewFlagSet("hellos", flag.ExitOnError)
	timeout := fs.Duration("timeout", 10*time.Second, "for the whole")
	first := fs.String("first", "", "the name in the first hello")
	second := fs.String("second", "", "that in the second, of the same length")
	if err := fs.Parse(args); err != nil {
		return err
	}
	if len(*first) != len(*second) {
		return fmt.Errorf("%q and %q are not of the same length", *first, *second)
	}
	var r hellosSeen
	defer func() { say(r) }()
	c, err := net.DialTimeout("tcp", fs.Arg(0), *timeout)
	if err != nil {
		r.Error = errorName(err)
		return nil
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(*timeout))
	h := &helloConn{Conn: c, from: []byte(*first), to: []byte(*second)}
	// P-256 is offered, but without a key: a server that wants it has to ask again.
	err = tls.Client(h, &tls.Config{ServerName: *first, InsecureSkipVerify: true, CurvePreferences: []tls.CurveID{tls.X25519, tls.CurveP256}}).Handshake()
	c.(*net.TCPConn).CloseWrite() // which makes the server close
	rest, _ := io.Copy(io.Discard, c)
	r.Asked, r.Received = h.hellos > 1, h.received+int(rest)
	if err != nil && !r.Asked {
		r.Error = errorName(err)
	}
	return nil
}

// helloConn puts another name into the second hello, and counts the bytes received after it.
type helloConn struct {
	net.Conn
	from, to []byte
	hellos   int
	received int
}

func (h *helloConn) Write(p []byte) (int, error) {
	const handshake = 22
	if len(p) > 0 && p[0] == handshake {
		if h.hellos++; h.hellos == 2 {
			p = bytes.ReplaceAll(p, h.from, h.to)
		}
	}
	return h.Conn.Write(p)
}

func (h *helloConn) Read(p []byte) (int, error) {
	n, err := h.Conn.Read(p)
	if h.hellos > 1 {
		h.received += n
	}
	return n, err
}
