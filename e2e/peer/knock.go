package main

// Knocking tries the same doors again and again, open and closed ones, whatever becomes of the
// network meanwhile. It is the load under which other tests pull plugs.

import (
	"bufio"
	"context"
	"flag"
	"fmt"
	"net"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

type knocked struct {
	Event   string            `json:"event"` // knocking, done
	Doors   int               `json:"doors"`
	Tries   map[string]uint64 `json:"tries,omitempty"`
	Entered map[string]uint64 `json:"entered,omitempty"` // connections that were set up, datagrams that were answered
}

// knock reads lines of doors, as tcp:ADDRESS:PORT or udp:ADDRESS:PORT, and knocks at those of the
// last line until the next line or the end of its input. Once it reports that it is knocking,
// nothing more goes to the earlier doors.
func knock(args []string) error {
	fs := flag.NewFlagSet("knock", flag.ExitOnError)
	timeout := fs.Duration("timeout", 50*time.Millisecond, "for one try")
	pause := fs.Duration("pause", 5*time.Millisecond, "between two at the same door")
	if err := fs.Parse(args); err != nil {
		return err
	}
	total := knocked{Event: "done", Tries: map[string]uint64{}, Entered: map[string]uint64{}}
	lines := bufio.NewScanner(os.Stdin)
	stop := func() {}
	for lines.Scan() {
		stop()
		ctx, cancel := context.WithCancel(context.Background())
		var knocking sync.WaitGroup
		doors := strings.Fields(lines.Text())
		counts := make([]struct{ tries, entered atomic.Uint64 }, len(doors))
		for i, door := range doors {
			network, addr, found := strings.Cut(door, ":")
			if !found {
				cancel()
				return fmt.Errorf("the door %q: want tcp:ADDRESS:PORT or udp:ADDRESS:PORT", door)
			}
			// Owned by knock, which waits for it in stop.
			knocking.Go(func() {
				for ctx.Err() == nil {
					counts[i].tries.Add(1)
					if enters(network, addr, *timeout) {
						counts[i].entered.Add(1)
					}
					time.Sleep(*pause)
				}
			})
		}
		stop = func() {
			cancel()
			knocking.Wait()
			for i, door := range doors {
				total.Tries[door] += counts[i].tries.Load()
				total.Entered[door] += counts[i].entered.Load()
			}
			stop = func() {}
		}
		say(knocked{Event: "knocking", Doors: len(doors)})
	}
	stop()
	say(total)
	return lines.Err()
}

// enters reports whether one try got an answer.
func enters(network, addr string, timeout time.Duration) bool {
	c, err := net.DialTimeout(network, addr, timeout)
	if err != nil {
		return false
	}
	defer c.Close()
	if network == "tcp" {
		return true
	}
	_ = c.SetDeadline(time.Now().Add(timeout))
	if _, err := c.Write([]byte("knock")); err != nil {
		return false
	}
	_, err = c.Read(make([]byte, 16))
	return err == nil
}
