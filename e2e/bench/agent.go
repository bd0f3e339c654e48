package main

// The agent is the client of every cell, run behind each candidate. It reads one JSON request a
// line on standard input and writes one JSON reply a line on standard output; it ends with its
// input.

import (
	"encoding/json"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

type request struct {
	Op       string `json:"op"`
	Addr     string `json:"addr,omitempty"`
	Dir      string `json:"dir,omitempty"` // "up" or "down"
	Flows    int    `json:"flows,omitempty"`
	Count    int    `json:"count,omitempty"` // at most this many, 0: as time allows
	Size     int    `json:"size,omitempty"`
	Window   int    `json:"window,omitempty"`
	WarmMS   int    `json:"warm_ms,omitempty"`
	MS       int    `json:"ms,omitempty"`
	ID       uint64 `json:"id,omitempty"`
	Parallel int    `json:"parallel,omitempty"`
	Port     int    `json:"port,omitempty"`   // of UDP; 0: the far side's
	Speaks   string `json:"speaks,omitempty"` // what each TCP connection says first (greeting.go), or "dns": what each datagram says

	Name     string   `json:"name,omitempty"`
	Prefixes []string `json:"prefixes,omitempty"`
}

func (q request) window() (start, end int64) {
	start = monotonic() + int64(q.WarmMS)*1e6
	return start, start + int64(q.MS)*1e6
}

type reply struct {
	Error   string         `json:"error,omitempty"`
	Seconds float64        `json:"seconds,omitempty"`
	Count   int64          `json:"count,omitempty"`
	Sent    int64          `json:"sent,omitempty"`
	Lost    int64          `json:"lost,omitempty"`
	Flows   []int64        `json:"flows,omitempty"` // bytes of each
	Failed  map[string]int `json:"failed,omitempty"`
	P50     float64        `json:"p50,omitempty"` // µs
	P99     float64        `json:"p99,omitempty"`
	P999    float64        `json:"p999,omitempty"`
	Info    *agentInfo     `json:"info,omitempty"`
}

func (r *reply) fail(what string, e error) {
	if r.Failed == nil {
		r.Failed = map[string]int{}
	}
	r.Failed[what+": "+e.Error()]++
}

func (r *reply) failures() (n int) {
	for _, k := range r.Failed {
		n += k
	}
	return n
}

type agentInfo struct {
	PID        int    `json:"pid"` // as the whole run sees it
	MTU        int    `json:"mtu"` // of the first interface that is up and not loopback
	Congestion string `json:"congestion"`
	NoFile     uint64 `json:"nofile"`
}

func agent() error {
	quietRuntime()
	held := &holder{}
	in, out := json.NewDecoder(os.Stdin), json.NewEncoder(os.Stdout)
	for {
		var q request
		if err := in.Decode(&q); err == io.EOF {
			return nil
		} else if err != nil {
			return err
		}
		r, err := operate(q, held)
		if err != nil {
			r.Error = err.Error()
		}
		if err := out.Encode(r); err != nil {
			return err
		}
	}
}

// hold runs an agent as root of user and network namespaces of its own.
func hold() error {
	cmd := exec.Command("/proc/self/exe", "agent")
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags:  unix.CLONE_NEWUSER | unix.CLONE_NEWNET,
		UidMappings: []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getuid(), Size: 1}},
		GidMappings: []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getgid(), Size: 1}},
	}
	return cmd.Run()
}

func operate(q request, held *holder) (reply, error) {
	switch q.Op {
	case "info":
		return reply{Info: info()}, nil
	case "wait":
		return reply{}, waitFor(q)
	case "bulk":
		return bulk(q)
	case "rtt":
		return roundTrips(q)
	case "connect":
		return shortConnections(q)
	case "hold":
		return held.hold(q)
	case "release":
		held.release()
		return reply{}, nil
	case "link":
		return reply{}, addresses(q.Name, q.Prefixes...)
	case "udp":
		return datagrams(q)
	}
	return reply{}, fmt.Errorf("no operation %q", q.Op)
}

func info() *agentInfo {
	i := &agentInfo{PID: os.Getpid()}
	ifs, _ := net.Interfaces()
	for _, f := range ifs {
		if f.Flags&net.FlagLoopback == 0 && f.Flags&net.FlagUp != 0 {
			i.MTU = f.MTU
			break
		}
	}
	var lim unix.Rlimit
	if unix.Getrlimit(unix.RLIMIT_NOFILE, &lim) == nil {
		i.NoFile = lim.Cur
	}
	if fd, err := tcpSocket(unix.AF_INET, time.Second); err == nil {
		s, _ := unix.GetsockoptString(fd, unix.IPPROTO_TCP, unix.TCP_CONGESTION)
		i.Congestion = strings.TrimRight(s, "\x00")
		rawClose(fd)
	}
	return i
}

// waitFor waits until the far side answers: addresses may still be tentative.
func waitFor(q request) error {
	ap, err := addrPort(q.Addr, echoPort)
	if err != nil {
		return err
	}
	limit := time.Now().Add(time.Duration(q.MS) * time.Millisecond)
	for {
		c, err := net.DialTimeout("tcp", ap.String(), time.Second)
		if err == nil {
			_ = c.SetDeadline(time.Now().Add(time.Second))
			if _, err = c.Write([]byte{1}); err == nil {
				_, err = io.ReadFull(c, make([]byte, 1))
			}
			_ = c.Close()
		}
		if err == nil || time.Now().After(limit) {
			return err
		}
		time.Sleep(20 * time.Millisecond)
	}
}
