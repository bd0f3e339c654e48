package worker

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"time"

	"sluice.dev/sluice/sandbox/api"
	"sluice.dev/sluice/tun"
)

// The control methods that the worker answers, each on a connection that the monitor has authorised
// and read the request from. A connection costs the packet path nothing: its answers come from
// snapshots and bounded queues, and a client that does not read is dropped after clientPatience.

const (
	clientPatience = 10 * time.Second
	watchQueue     = 4096 // events a watcher may lag behind
)

// client is a control connection. Being a file, it needs none of the system calls that setting up a
// net.Conn makes.
type client struct{ *os.File }

// Write gives each write clientPatience to complete.
func (c client) Write(b []byte) (int, error) {
	_ = c.SetWriteDeadline(time.Now().Add(clientPatience))
	return c.File.Write(b)
}

// hungUp returns a channel that is closed when the client closes its side.
func (c client) hungUp() <-chan struct{} {
	gone := make(chan struct{})
	// Ends with the connection, which the caller closes.
	go func() {
		defer close(gone)
		_, _ = io.Copy(io.Discard, c.File)
	}()
	return gone
}

// accept serves one connection, unless too many are open.
func (w *Worker) accept(fd int, req api.Request) {
	c := client{os.NewFile(uintptr(fd), "control connection")}
	select {
	case w.clients <- struct{}{}:
	default:
		_ = api.WriteError(c, &api.Error{Code: api.CodeUnavailable, Message: "too many control connections"})
		_ = c.Close()
		return
	}
	w.wg.Go(func() {
		defer func() { <-w.clients }()
		defer c.Close()
		if err := w.control(c, req); err != nil {
			_ = api.WriteError(c, err)
		}
	})
}

// control answers one request. A returned error has not been written yet.
func (w *Worker) control(c client, req api.Request) error {
	switch req.Method {
	case api.MethodFlowCount:
		_ = api.WriteResult(c, api.FlowCount{Flows: w.Table.Len()})
		return nil
	case api.MethodFlows:
		var p api.FlowsParams
		if err := params(req, &p); err != nil {
			return err
		}
		w.listFlows(c, p)
		return nil
	case api.MethodFlowsWatch:
		return w.watchFlows(c)
	case api.MethodStats:
		r, err := w.stats()
		if err != nil {
			return err
		}
		_ = api.WriteResult(c, r)
		return nil
	case api.MethodSysctl:
		var p api.SysctlParams
		if err := params(req, &p); err != nil {
			return err
		}
		r, err := w.readSysctl(p.Name)
		if err != nil {
			return err
		}
		_ = api.WriteResult(c, r)
		return nil
	case api.MethodCapture:
		var p api.CaptureParams
		if err := params(req, &p); err != nil {
			return err
		}
		return w.capture(c, p)
	}
	return &api.Error{Code: api.CodeBadRequest, Message: fmt.Sprintf("unknown method %q", req.Method)}
}

func params(req api.Request, v any) error {
	if err := api.DecodeStrict(req.Params, v); err != nil {
		return &api.Error{Code: api.CodeBadRequest, Message: fmt.Sprintf("%s: parameters: %v", req.Method, err)}
	}
	return nil
}

// listFlows writes one flow at a time. A full table as one value would take more memory than the
// flows themselves.
func (w *Worker) listFlows(c client, p api.FlowsParams) {
	if p.Ended {
		var r api.FlowsResult
		r.Ended, r.Dropped = w.flows.Ended()
		_ = api.WriteResult(c, r)
		return
	}
	bw := bufio.NewWriterSize(c, 64<<10)
	_, _ = bw.WriteString(`{"result":{"flows":[`)
	first := true
	now := w.flows.Now()
	for _, l := range w.Table.Leases() {
		b, err := json.Marshal(w.flows.LiveRecord(l.Snapshot(), now))
		if err != nil {
			continue
		}
		if !first {
			_ = bw.WriteByte(',')
		}
		first = false
		if _, err := bw.Write(b); err != nil {
			return
		}
	}
	_, _ = bw.WriteString("]}}\n")
	_ = bw.Flush()
}

// watchFlows streams events until the client hangs up or the worker ends.
func (w *Worker) watchFlows(c client) error {
	events, cancel := w.Table.Subscribe(watchQueue)
	defer cancel()
	if api.WriteResult(c, struct{}{}) != nil {
		return nil
	}
	gone := c.hungUp()
	bw := bufio.NewWriterSize(c, 32<<10)
	lost := uint64(0)
	for {
		select {
		case <-gone:
			return nil
		case <-w.ctx.Done():
			return nil
		case e, ok := <-events:
			if !ok {
				return nil
			}
			lost += e.Lost
			if api.WriteLine(bw, api.FlowEvent{Type: e.Type.String(), Time: e.Time, Flow: w.flows.LiveRecord(e.Flow, e.Time), Lost: lost}) != nil {
				return nil
			}
			if len(events) == 0 && bw.Flush() != nil {
				return nil
			}
		}
	}
}

// stats returns the counters of every part.
func (w *Worker) stats() (api.StatsResult, error) {
	r := api.StatsResult{Stats: make(map[string]json.RawMessage)}
	parts := map[string]any{
		"link":      w.link.Stats(),
		"names":     w.names.Stats(),
		"table":     w.Table.Stats(),
		"dns":       w.dns.Stats(),
		"forwarder": w.fwd.Stats(),
		"log":       w.flows.Stats(),
	}
	if w.in0 != nil {
		parts["inbound"] = w.in0.Stats()
	}
	for part, v := range parts {
		b, err := json.Marshal(v)
		if err != nil {
			return r, fmt.Errorf("stats of %s: %w", part, err)
		}
		r.Stats[part] = b
	}
	return r, nil
}

// readSysctl reads one tunable, or all of them if name is empty.
func (w *Worker) readSysctl(name string) (api.SysctlResult, error) {
	names := []string{trimSysctl(name)}
	if name == "" {
		names = tunables()
	}
	r := api.SysctlResult{Values: make(map[string]string)}
	for _, n := range names {
		v, err := w.tunable(n)
		if err != nil {
			return r, &api.Error{Code: api.CodeNotFound, Message: err.Error()}
		}
		r.Values[n] = v
	}
	return r, nil
}

// trimSysctl accepts a tunable's name in both of sysctl(8)'s spellings.
func trimSysctl(name string) string {
	return strings.TrimPrefix(strings.ReplaceAll(name, "/", "."), "net.netfilter.")
}

// capture streams a pcapng file until the client closes its sending side, then
// writes what is still queued.
func (w *Worker) capture(c client, p api.CaptureParams) error {
	if p.SnapLen < 0 {
		return &api.Error{Code: api.CodeBadRequest, Message: "capture: snap_len is negative"}
	}
	// Answer first: the capture writes at once.
	start := make(chan struct{})
	running, err := w.link.StartCapture(&gated{w: c, open: start}, tun.CaptureOptions{SnapLen: p.SnapLen, DropsOnly: p.DropsOnly})
	if err != nil {
		if errors.Is(err, tun.ErrTooManyCaptures) {
			err = &api.Error{Code: api.CodeUnavailable, Message: err.Error()}
		}
		return err
	}
	_ = api.WriteResult(c, struct{}{})
	close(start)
	select {
	case <-c.hungUp():
	case <-running.Done():
	case <-w.ctx.Done():
	}
	// A client that is gone or slow is not the sandbox's failure. The file's own statistics show
	// what it lost.
	_ = running.Stop()
	return nil
}

// gated holds back writes until open is closed.
type gated struct {
	w    io.Writer
	open <-chan struct{}
}

func (g *gated) Write(b []byte) (int, error) {
	<-g.open
	return g.w.Write(b)
}
