package main

// Load makers: many short connections, many held ones.

import (
	"bufio"
	"flag"
	"io"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"time"
)

type shortResult struct {
	OK      int            `json:"ok"`
	Hung    int            `json:"hung"` // not done within the limit for one
	Failed  map[string]int `json:"failed,omitempty"`
	Slowest float64        `json:"slowest_ms"`
	Seconds float64        `json:"seconds"`
}

// short connects, reads one byte and the end, and closes: the given number of times, with the given
// number at once.
func short(args []string) error {
	fs := flag.NewFlagSet("short", flag.ExitOnError)
	count := fs.Int("count", 1000, "connections")
	parallel := fs.Int("parallel", 32, "at once")
	timeout := fs.Duration("timeout", 5*time.Second, "for one")
	if err := fs.Parse(args); err != nil {
		return err
	}
	var (
		mu   sync.Mutex
		r    = shortResult{Failed: map[string]int{}}
		left atomic.Int64
		all  sync.WaitGroup
	)
	left.Store(int64(*count))
	start := time.Now()
	for range *parallel {
		all.Go(func() {
			for left.Add(-1) >= 0 {
				begun := time.Now()
				err := shortOne(fs.Arg(0), *timeout)
				took := float64(time.Since(begun).Microseconds()) / 1000
				mu.Lock()
				r.Slowest = max(r.Slowest, took)
				switch {
				case err == nil:
					r.OK++
				case errorName(err) == "timeout":
					r.Hung++
				default:
					r.Failed[errorName(err)]++
				}
				mu.Unlock()
			}
		})
	}
	all.Wait()
	r.Seconds = time.Since(start).Seconds()
	say(r)
	return nil
}

func shortOne(addr string, timeout time.Duration) error {
	c, err := net.DialTimeout("tcp", addr, timeout)
	if err != nil {
		return err
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(timeout))
	var b [2]byte
	n, err := io.ReadFull(c, b[:])
	if n == 1 && err == io.ErrUnexpectedEOF {
		return nil
	}
	return err
}

type holdResult struct {
	Event   string         `json:"event"` // held, echoed, closed
	Open    int            `json:"open"`
	Failed  map[string]int `json:"failed,omitempty"`
	Seconds float64        `json:"seconds"`
}

// hold opens connections to an echo server and keeps them. Each line on its input asks for one echo
// over every connection; the end of its input closes them all.
func hold(args []string) error {
	fs := flag.NewFlagSet("hold", flag.ExitOnError)
	count := fs.Int("count", 1000, "connections")
	parallel := fs.Int("parallel", 64, "dials or echoes at once")
	timeout := fs.Duration("timeout", 10*time.Second, "for one")
	network := fs.String("network", "tcp", "tcp or udp")
	if err := fs.Parse(args); err != nil {
		return err
	}
	conns := make([]net.Conn, *count)
	each := func(name string, f func(i int) error) {
		r := holdResult{Event: name, Failed: map[string]int{}}
		var mu sync.Mutex
		var next atomic.Int64
		var all sync.WaitGroup
		start := time.Now()
		for range *parallel {
			all.Go(func() {
				for i := int(next.Add(1)) - 1; i < *count; i = int(next.Add(1)) - 1 {
					err := f(i)
					mu.Lock()
					if err == nil {
						r.Open++
					} else {
						r.Failed[errorName(err)]++
					}
					mu.Unlock()
				}
			})
		}
		all.Wait()
		r.Seconds = time.Since(start).Seconds()
		say(r)
	}
	each("held", func(i int) (err error) {
		conns[i], err = net.DialTimeout(*network, fs.Arg(0), *timeout)
		return err
	})
	lines := bufio.NewScanner(os.Stdin)
	for lines.Scan() {
		each("echoed", func(i int) error {
			if conns[i] == nil {
				return io.ErrClosedPipe
			}
			return echoOnce(conns[i], byte(i), *timeout)
		})
	}
	each("closed", func(i int) error {
		if conns[i] == nil {
			return nil
		}
		return conns[i].Close()
	})
	return lines.Err()
}

func echoOnce(c net.Conn, b byte, timeout time.Duration) error {
	c.SetDeadline(time.Now().Add(timeout))
	if _, err := c.Write([]byte{b}); err != nil {
		return err
	}
	var got [1]byte
	if _, err := io.ReadFull(c, got[:]); err != nil {
		return err
	}
	if got[0] != b {
		return io.ErrNoProgress
	}
	return nil
}
