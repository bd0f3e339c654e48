package main

// synrst begins a handshake and drops it: a SYN from a raw socket, the far side's SYN/ACK, and the
// RST with which our own kernel answers, because no socket of ours has the port. (IPv4 only; the
// source port tells the handshakes apart.)

import (
	"encoding/binary"
	"flag"
	"fmt"
	"net"
	"net/netip"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

type synrstResult struct {
	Sent     int     `json:"sent"`
	Answered int     `json:"answered"` // SYN/ACKs seen
	Refused  int     `json:"refused"`  // RSTs seen
	Seconds  float64 `json:"seconds"`
}

func synrst(args []string) error {
	fs := flag.NewFlagSet("synrst", flag.ExitOnError)
	count := fs.Int("count", 10, "handshakes")
	parallel := fs.Int("parallel", 1, "unanswered at once")
	timeout := fs.Duration("timeout", 2*time.Second, "for one answer")
	if err := fs.Parse(args); err != nil {
		return err
	}
	to, err := netip.ParseAddrPort(fs.Arg(0))
	if err != nil {
		return err
	}
	probe, err := net.Dial("udp", to.String())
	if err != nil {
		return err
	}
	from := probe.LocalAddr().(*net.UDPAddr).AddrPort().Addr()
	probe.Close()
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.IPPROTO_TCP)
	if err != nil {
		return fmt.Errorf("opening a raw socket: %w", err)
	}
	defer unix.Close(fd)
	unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, 32<<20)
	unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Usec: 100_000})

	var (
		r       synrstResult
		mu      sync.Mutex
		waiting = map[uint16]chan byte{}
		stop    = make(chan struct{})
		reader  sync.WaitGroup
	)
	reader.Go(func() {
		buf := make([]byte, 2048)
		for {
			select {
			case <-stop:
				return
			default:
			}
			n, _, err := unix.Recvfrom(fd, buf, 0)
			if err != nil || n < 40 {
				continue
			}
			tcp := buf[int(buf[0]&0xf)*4 : n]
			if len(tcp) < 20 || binary.BigEndian.Uint16(tcp) != to.Port() {
				continue
			}
			mu.Lock()
			if ch, ok := waiting[binary.BigEndian.Uint16(tcp[2:])]; ok {
				select {
				case ch <- tcp[13]:
				default:
				}
			}
			mu.Unlock()
		}
	})
	slots := make(chan struct{}, *parallel)
	var all sync.WaitGroup
	start := time.Now()
	dst := &unix.SockaddrInet4{Addr: to.Addr().As4()}
	for i := range *count {
		slots <- struct{}{}
		port := uint16(10000 + i%20000)
		answer := make(chan byte, 1)
		mu.Lock()
		waiting[port] = answer
		mu.Unlock()
		if err := unix.Sendto(fd, synSegment(from, to, port, uint32(i)*7919), 0, dst); err != nil {
			return fmt.Errorf("sending SYN %d: %w", i, err)
		}
		r.Sent++
		all.Go(func() {
			defer func() { <-slots }()
			select {
			case flags := <-answer:
				mu.Lock()
				if flags&0x12 == 0x12 {
					r.Answered++
				} else if flags&4 != 0 {
					r.Refused++
				}
				mu.Unlock()
			case <-time.After(*timeout):
			}
			mu.Lock()
			delete(waiting, port)
			mu.Unlock()
		})
	}
	all.Wait()
	close(stop)
	reader.Wait()
	r.Seconds = time.Since(start).Seconds()
	say(r)
	return nil
}

func synSegment(from netip.Addr, to netip.AddrPort, port uint16, seq uint32) []byte {
	b := make([]byte, 24)
	binary.BigEndian.PutUint16(b, port)
	binary.BigEndian.PutUint16(b[2:], to.Port())
	binary.BigEndian.PutUint32(b[4:], seq)
	b[12], b[13] = 6<<4, 2 // header of 24 bytes, SYN
	binary.BigEndian.PutUint16(b[14:], 64240)
	copy(b[20:], []byte{2, 4, 1460 >> 8, 1460 & 0xff}) // MSS
	src, dst := from.As4(), to.Addr().As4()
	var sum uint32
	add := func(p []byte) {
		for i := 0; i+1 < len(p); i += 2 {
			sum += uint32(binary.BigEndian.Uint16(p[i:]))
		}
	}
	add(src[:])
	add(dst[:])
	sum += unix.IPPROTO_TCP + uint32(len(b))
	add(b)
	for sum > 0xffff {
		sum = sum>>16 + sum&0xffff
	}
	binary.BigEndian.PutUint16(b[16:], ^uint16(sum))
	return b
}
