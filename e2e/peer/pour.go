package main

// Readers that stand still: each side of a connection writes without end and reads nothing, so that
// everything between the two fills up.

import (
	"bufio"
	"context"
	"flag"
	"fmt"
	"io"
	"net"
	"os"
	"strconv"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// stillBuffer is the requested size of each of the kernel's own buffers of such a connection: the
// test is not meant to fill the machine's memory.
const stillBuffer = 8 << 10

// listenStill listens for such connections, which inherit the listener's buffers.
func listenStill(host string, port int) (net.Listener, error) {
	lc := net.ListenConfig{Control: smallBuffers}
	return lc.Listen(context.Background(), family(host, "tcp"), net.JoinHostPort(host, strconv.Itoa(port)))
}

// smallBuffers is the Control of a net.Dialer and a net.ListenConfig.
func smallBuffers(_, _ string, c syscall.RawConn) error {
	return c.Control(func(fd uintptr) {
		unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_RCVBUF, stillBuffer)
		unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_SNDBUF, stillBuffer)
	})
}

// pourServe returns a handler that writes pieces of size bytes until the connection ends.
func pourServe(size int) func(*net.TCPConn) {
	return func(c *net.TCPConn) {
		defer c.Close()
		for piece := make([]byte, size); ; {
			if _, err := c.Write(piece); err != nil {
				return
			}
		}
	}
}

type pourResult struct {
	Event  string         `json:"event"` // opened, closed
	Open   int            `json:"open"`
	Failed map[string]int `json:"failed,omitempty"`
	Bytes  int64          `json:"bytes"` // written so far by this side
}

// pour opens connections and reports them, writes pieces into each without reading, and closes them
// at the end of its input.
func pour(args []string) error {
	fs := flag.NewFlagSet("pour", flag.ExitOnError)
	count := fs.Int("count", 1000, "connections")
	parallel := fs.Int("parallel", 64, "dials at once")
	size := fs.Int("size", 64<<10, "bytes of a piece; 0: write nothing")
	timeout := fs.Duration("timeout", 10*time.Second, "for one connection to be set up")
	if err := fs.Parse(args); err != nil {
		return err
	}
	dialer := net.Dialer{Timeout: *timeout, Control: smallBuffers}
	r := pourResult{Event: "opened", Failed: map[string]int{}}
	var (
		mu      sync.Mutex
		conns   []net.Conn
		next    atomic.Int64
		written atomic.Int64
		dials   sync.WaitGroup
		pouring sync.WaitGroup
	)
	for range *parallel {
		dials.Go(func() {
			for next.Add(1) <= int64(*count) {
				c, err := dialer.DialContext(context.Background(), "tcp", fs.Arg(0))
				mu.Lock()
				if err != nil {
					r.Failed[errorName(err)]++
				} else {
					conns = append(conns, c)
				}
				mu.Unlock()
			}
		})
	}
	dials.Wait()
	r.Open = len(conns)
	say(r)
	for _, c := range conns {
		pouring.Go(func() {
			for piece := make([]byte, *size); *size > 0; {
				n, err := c.Write(piece)
				written.Add(int64(n))
				if err != nil {
					return // closed below, or by the far side
				}
			}
		})
	}
	if _, err := io.Copy(io.Discard, bufio.NewReader(os.Stdin)); err != nil {
		return fmt.Errorf("waiting for the end of input: %w", err)
	}
	for _, c := range conns {
		c.(*net.TCPConn).SetLinger(0)
		c.Close()
	}
	pouring.Wait()
	say(pourResult{Event: "closed", Open: r.Open, Bytes: written.Load()})
	return nil
}
