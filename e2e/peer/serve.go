package main

// serve listens on a base port and the ports after it, each with one behaviour, for TCP and UDP on
// every given address. Without addresses it listens on all of them, for UDP on each address by
// itself, so that an answer leaves from the address that was asked:
//
//	base+0  tcp, udp  echo
//	base+1  tcp       reads to the end of input, then answers "N SHA-256" and closes
//	base+2  tcp       says "hello", half-closes, then reads on and reports what came
//	base+3  tcp       resets the connection after the first byte it reads
//	base+4  tcp       reads until error or end and reports which
//	base+5  tcp, udp  answers with the peer's address
//	base+6  tcp       sends one byte and closes
//	base+7  tcp       bulk transfers (xfer.go)
//	base+8  tcp       HTTP/1, and HTTP/2 with prior knowledge: "hello from peer", /addr gives the
//	                  peer's address, /digest answers "N SHA-256" of what is sent
//	base+9  udp       source of datagrams: answers "N" with N datagrams of one byte
//	base+10 udp       answers with the length, the TTL and the DSCP of what came
//	base+11 udp       answers ten times a second, for a minute
//	base+12 tcp       writes without end and reads nothing (pour.go)
//	base+13 tcp       the same in pieces of one byte

import (
	"crypto/sha256"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

type seen struct {
	Event string `json:"event"` // listening, half-close, closed
	Port  int    `json:"port,omitempty"`
	Peer  string `json:"peer,omitempty"`
	Bytes int64  `json:"bytes,omitempty"`
	End   string `json:"end,omitempty"` // eof, reset, or the error
	Data  string `json:"data,omitempty"`
}

func serve(args []string) error {
	fs := flag.NewFlagSet("serve", flag.ExitOnError)
	base := fs.Int("base", 7000, "first port")
	if err := fs.Parse(args); err != nil {
		return err
	}
	hosts, datagrams := fs.Args(), fs.Args()
	if len(hosts) == 0 {
		hosts, datagrams = []string{"0.0.0.0", "::"}, ownAddresses()
	}
	failed := make(chan error)
	tcp := []func(*net.TCPConn){0: echo, 1: digest, 2: greet, 3: resetAfterByte, 4: watchEnd,
		5: whoami, 6: oneByte, 7: xferServe}
	for _, host := range hosts {
		for i, handle := range tcp {
			l, err := listenTCP(host, *base+i)
			if err != nil {
				return err
			}
			go func() { failed <- accept(l, handle) }()
		}
		for i, size := range map[int]int{12: 64 << 10, 13: 1} {
			l, err := listenStill(host, *base+i)
			if err != nil {
				return err
			}
			go func() { failed <- accept(l, pourServe(size)) }()
		}
		l, err := listenTCP(host, *base+8)
		if err != nil {
			return err
		}
		srv := &http.Server{Handler: http.HandlerFunc(hello), Protocols: new(http.Protocols)}
		srv.Protocols.SetHTTP1(true)
		srv.Protocols.SetUnencryptedHTTP2(true)
		go func() { failed <- srv.Serve(l) }()
	}
	for _, host := range datagrams {
		for i, handle := range map[int]func(*net.UDPConn) error{
			0: udpEcho, 5: udpWhoami, 9: udpSource, 10: udpInspect, 11: udpDrip} {
			c, err := listenUDP(host, *base+i)
			if err != nil {
				return err
			}
			go func() { failed <- handle(c) }()
		}
	}
	say(seen{Event: "listening", Port: *base})
	return <-failed
}

// ownAddresses lists the namespace's addresses except link-local ones.
func ownAddresses() (hosts []string) {
	all, _ := net.InterfaceAddrs()
	for _, a := range all {
		// A node may have one address on several interfaces.
		if n, ok := a.(*net.IPNet); ok && !n.IP.IsLinkLocalUnicast() && !slices.Contains(hosts, n.IP.String()) {
			hosts = append(hosts, n.IP.String())
		}
	}
	return hosts
}

func family(host, network string) string {
	if strings.Contains(host, ":") {
		return network + "6"
	}
	return network + "4"
}

func listenTCP(host string, port int) (net.Listener, error) {
	return net.Listen(family(host, "tcp"), net.JoinHostPort(host, strconv.Itoa(port)))
}

func listenUDP(host string, port int) (*net.UDPConn, error) {
	c, err := net.ListenPacket(family(host, "udp"), net.JoinHostPort(host, strconv.Itoa(port)))
	if err != nil {
		return nil, err
	}
	return c.(*net.UDPConn), nil
}

func accept(l net.Listener, handle func(*net.TCPConn)) error {
	for {
		c, err := l.Accept()
		if err != nil {
			if errors.Is(err, syscall.EMFILE) {
				time.Sleep(10 * time.Millisecond) // only others closing theirs helps
				continue
			}
			return err
		}
		go handle(c.(*net.TCPConn))
	}
}

func end(err error) string {
	switch {
	case err == nil, errors.Is(err, io.EOF):
		return "eof"
	case errors.Is(err, syscall.ECONNRESET):
		return "reset"
	}
	return err.Error()
}

func echo(c *net.TCPConn) {
	defer c.Close()
	buf := make([]byte, 4<<10) // small: there may be ten thousand of these
	for {
		n, err := c.Read(buf)
		if err != nil {
			return
		}
		if _, err := c.Write(buf[:n]); err != nil {
			return
		}
	}
}

func digest(c *net.TCPConn) {
	defer c.Close()
	h := sha256.New()
	n, err := io.Copy(h, c)
	say(seen{Event: "half-close", Peer: c.RemoteAddr().String(), Bytes: n, End: end(err)})
	fmt.Fprintf(c, "%d %x\n", n, h.Sum(nil))
}

func greet(c *net.TCPConn) {
	defer c.Close()
	io.WriteString(c, "hello")
	c.CloseWrite()
	data, err := io.ReadAll(c)
	say(seen{Event: "closed", Peer: c.RemoteAddr().String(), Bytes: int64(len(data)), End: end(err), Data: string(data)})
}

func resetAfterByte(c *net.TCPConn) {
	var b [1]byte
	c.Read(b[:])
	c.SetLinger(0)
	c.Close()
}

func watchEnd(c *net.TCPConn) {
	defer c.Close()
	n, err := io.Copy(io.Discard, c)
	say(seen{Event: "closed", Peer: c.RemoteAddr().String(), Bytes: n, End: end(err)})
}

func whoami(c *net.TCPConn) {
	defer c.Close()
	io.WriteString(c, c.RemoteAddr().String())
}

func oneByte(c *net.TCPConn) {
	c.Write([]byte{'1'})
	c.Close()
}

func hello(w http.ResponseWriter, r *http.Request) {
	if r.URL.Path == "/addr" {
		io.WriteString(w, r.RemoteAddr+"\n")
		return
	}
	if r.URL.Path == "/digest" {
		h := sha256.New()
		n, err := io.Copy(h, r.Body)
		if err == nil {
			fmt.Fprintf(w, "%d %x\n", n, h.Sum(nil))
		}
		return
	}
	if _, err := io.Copy(io.Discard, r.Body); err != nil {
		return // an answer would race with what the server says about a bad request
	}
	io.WriteString(w, "hello from peer\n")
}

func udpEcho(c *net.UDPConn) error {
	return eachDatagram(c, func(b []byte, from *net.UDPAddr) { c.WriteToUDP(b, from) })
}

func udpWhoami(c *net.UDPConn) error {
	return eachDatagram(c, func(_ []byte, from *net.UDPAddr) { c.WriteToUDP([]byte(from.String()), from) })
}

func udpSource(c *net.UDPConn) error {
	return eachDatagram(c, func(b []byte, from *net.UDPAddr) {
		n, _ := strconv.Atoi(strings.TrimSpace(string(b)))
		for i := range min(n, 10000) {
			c.WriteToUDP([]byte{byte(i)}, from)
		}
	})
}

func udpDrip(c *net.UDPConn) error {
	return eachDatagram(c, func(b []byte, from *net.UDPAddr) {
		go func() { // ends after a minute, or with the process
			for range 600 {
				c.WriteToUDP(b, from)
				time.Sleep(100 * time.Millisecond)
			}
		}()
	})
}

func eachDatagram(c *net.UDPConn, f func([]byte, *net.UDPAddr)) error {
	buf := make([]byte, 1<<16)
	for {
		n, from, err := c.ReadFromUDP(buf)
		if err != nil {
			if errors.Is(err, syscall.ECONNREFUSED) {
				continue
			}
			return err
		}
		f(buf[:n], from)
	}
}

func udpInspect(c *net.UDPConn) error {
	raw, err := c.SyscallConn()
	if err != nil {
		return err
	}
	raw.Control(func(fd uintptr) {
		// Each pair belongs to one family; a failure on the other means nothing.
		unix.SetsockoptInt(int(fd), unix.IPPROTO_IP, unix.IP_RECVTTL, 1)
		unix.SetsockoptInt(int(fd), unix.IPPROTO_IP, unix.IP_RECVTOS, 1)
		unix.SetsockoptInt(int(fd), unix.IPPROTO_IPV6, unix.IPV6_RECVHOPLIMIT, 1)
		unix.SetsockoptInt(int(fd), unix.IPPROTO_IPV6, unix.IPV6_RECVTCLASS, 1)
	})
	buf, oob := make([]byte, 1<<16), make([]byte, 256)
	for {
		n, on, _, from, err := c.ReadMsgUDP(buf, oob)
		if err != nil {
			return err
		}
		ttl, tos := -1, -1
		messages, _ := unix.ParseSocketControlMessage(oob[:on])
		for _, m := range messages {
			switch {
			case m.Header.Level == unix.IPPROTO_IP && m.Header.Type == unix.IP_TTL,
				m.Header.Level == unix.IPPROTO_IPV6 && m.Header.Type == unix.IPV6_HOPLIMIT:
				ttl = int(m.Data[0])
			case m.Header.Level == unix.IPPROTO_IP && m.Header.Type == unix.IP_TOS,
				m.Header.Level == unix.IPPROTO_IPV6 && m.Header.Type == unix.IPV6_TCLASS:
				tos = int(m.Data[0])
			}
		}
		c.WriteToUDP(fmt.Appendf(nil, "len=%d ttl=%d dscp=%d", n, ttl, tos>>2), from)
	}
}
