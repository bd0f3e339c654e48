package ingress

// The loopback shortcut. A client on the host's loopback that uses a published port cannot appear
// on the sandbox's link with its own address, as no host accepts a packet from 127.0.0.1 off a
// wire. Instead it is connected to a socket made inside the sandbox's network namespace, loopback
// to loopback, so the server sees 127.0.0.1 or ::1 as it would outside. Both ends are then sockets
// of one kernel, and the bytes move by splice(2) without being copied here.
//
// Policy, accounting, bandwidth and the flow table see these flows like all others. A direction
// that has used up its bandwidth leaves its bytes in the socket that they came from.
//
// A server inside that listens only on the sandbox's own address refuses the connection; the flow
// then goes through the stack, from the gateway's address (fromhost.go).

import (
	"cmp"
	"net/netip"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"

	"sluice.dev/sluice/forwarder/internal/admit"
	"sluice.dev/sluice/forwarder/internal/engine"
	"sluice.dev/sluice/forwarder/internal/hostsock"
	"sluice.dev/sluice/forwarder/internal/tcpflow"
	"sluice.dev/sluice/nat"
	"sluice.dev/sluice/policy"
)

// relayPipe is the capacity asked for each pipe; the kernel may grant less.
const relayPipe = 1 << 20

// relay is one flow between two sockets. Only its task uses its fields, except those that mu
// guards.
type relay struct {
	admit.Pass
	in         *Ports
	caller     tcpflow.Caller
	guest      netip.AddrPort
	work       engine.Task
	dirs       [2]relayDir  // 0: client → guest
	mem        admit.Shares // of the memory budget: the bytes that the pipes hold
	connecting bool

	mu     sync.Mutex // held while the descriptors are used, so that close cannot pull them away
	fds    [2]int     // 0: the client's, 1: inside the sandbox
	toks   [2]engine.PollToken
	closed bool
}

// relayDir is one direction: bytes sit in its pipe between the two sockets.
type relayDir struct {
	pipe   [2]int
	filled int
	eof    bool // the source's end was seen
	done   bool // and was passed on
}

// relay takes fd over if a socket inside the sandbox can be had.
func (in *Ports) relay(fd int, c tcpflow.Caller, j admit.Judged) bool {
	guest := j.Query.Dst
	if in.Guests == nil {
		return false
	}
	inside, ok := in.Guests.Stream(guest.Addr().Is6())
	if !ok {
		return false
	}
	in.Dialer.Sockets.Add(1)
	r := &relay{in: in, caller: c, guest: guest, fds: [2]int{fd, inside}, connecting: true}
	r.work.Run = r.run
	if err := in.Gate.EnterAnew(&r.Pass, r, j, admit.Entry{Orig: c.Tuple(), Memory: &r.mem, Pending: r.pending}); err != nil {
		in.Gate.NoteLimit(in.limited, j, err)
		r.Abort(nat.ReasonStopped) // it was never in the table, which gives it no record
		return true
	}
	r.Lease.SetState(nat.SynSent)
	r.Lease.SetReply(nat.NewTuple(unix.IPPROTO_TCP, guest, c.From))
	in.mu.Lock()
	closed := in.closed || r.Lease.Ended()
	if !closed {
		in.relays[r] = struct{}{}
	}
	in.mu.Unlock()
	if closed {
		r.Abort(nat.ReasonStopped)
		return true
	}
	if abort := r.connect(); abort != "" {
		r.Abort(abort)
		return true
	}
	in.relayed.Add(1)
	return true
}

// connect starts the connection inside.
func (r *relay) connect() (abort nat.Reason) {
	loop := netip.AddrFrom4([4]byte{127, 0, 0, 1})
	if r.guest.Addr().Is6() {
		loop = netip.IPv6Loopback()
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.closed {
		return nat.ReasonStopped // the closer has told the table why
	}
	if r.in.Dialer.TuneStream(r.fds[1]) != nil {
		return nat.ReasonNoSocket
	}
	err := unix.Connect(r.fds[1], hostsock.ToSockaddr(netip.AddrPortFrom(loop, r.guest.Port())))
	if err != nil && err != unix.EINPROGRESS {
		r.connecting = err == unix.ECONNREFUSED
		if !r.connecting {
			return cmp.Or(hostsock.Shortage(tcpflow.ErrnoOf(err)), nat.ReasonNoSocket)
		}
	}
	for i, fd := range r.fds {
		tok, err := r.in.Engine.Poll.Add(fd, unix.EPOLLIN|unix.EPOLLOUT|unix.EPOLLRDHUP, r)
		if err != nil {
			return nat.ReasonOutOfDescriptors
		}
		r.toks[i] = tok
	}
	r.in.Engine.Put(&r.work)
	return ""
}

func (r *relay) PollReady(uint32) { r.in.Engine.Put(&r.work) }

func (r *relay) run() {
	r.mu.Lock()
	if r.closed {
		r.mu.Unlock()
		return
	}
	if r.connecting {
		errno, err := unix.GetsockoptInt(r.fds[1], unix.SOL_SOCKET, unix.SO_ERROR)
		if _, perr := unix.Getpeername(r.fds[1]); perr == nil {
			r.connecting = false
			r.Lease.SetState(nat.Established)
		} else if err != nil || errno != 0 || r.failed() {
			r.mu.Unlock()
			r.fallback()
			return
		} else {
			r.mu.Unlock()
			return
		}
	}
	var reason nat.Reason
	again := false
	for i := range r.dirs {
		more, why := r.move(i)
		again = again || more
		if why != "" {
			reason = why
		}
	}
	if reason == "" && r.dirs[0].done && r.dirs[1].done {
		reason = nat.ReasonClosed
	}
	r.mem.Down.Set(max(int64(r.dirs[0].filled), admit.FlowMinimum))
	r.mem.Up.Set(max(int64(r.dirs[1].filled), admit.FlowMinimum))
	r.mu.Unlock()
	switch {
	case reason != "":
		r.Abort(reason)
	case again:
		r.in.Engine.Put(&r.work)
	}
}

// failed reports whether the connection attempt has ended without a connection.
func (r *relay) failed() bool {
	info, err := unix.GetsockoptTCPInfo(r.fds[1], unix.IPPROTO_TCP, unix.TCP_INFO)
	return err != nil || info.State == unix.BPF_TCP_CLOSE
}

// move moves the available bytes in direction i. It reports whether its budget ran out first, and
// the reason to end the flow, if any.
func (r *relay) move(i int) (again bool, reason nat.Reason) {
	d, dst := &r.dirs[i], r.fds[1-i]
	if d.done {
		return false, ""
	}
	for budget := tcpflow.PumpBudget; budget > 0; {
		progress, why := r.fill(i)
		if why != "" {
			return false, why
		}
		if d.filled > 0 {
			n, err := splice(d.pipe[0], dst, d.filled)
			switch {
			case err == unix.EAGAIN:
			case err == unix.EINTR:
				continue
			case err != nil:
				return false, lost(1-i, err)
			default:
				d.filled -= n
				budget -= n
				progress = true
				r.Lease.Account(nat.Dir(i), int64(tcpflow.SegmentsOf(n)), int64(n+tcpflow.SegmentsOf(n)*tcpflow.Overhead(r.caller.From.Addr().Is4())))
			}
		}
		if d.filled == 0 && (d.eof || !progress) {
			r.in.pipes.put(d)
		}
		if d.filled == 0 && d.eof {
			d.done = true
			// ENOTCONN: the other side is gone already, which its own direction reports.
			_ = unix.Shutdown(dst, unix.SHUT_WR)
			r.Lease.SetState(nat.CloseWait)
			return false, ""
		}
		if !progress {
			return false, ""
		}
	}
	return true, ""
}

// fill reads the available bytes in direction i, as far as its bandwidth and its pipe have room.
func (r *relay) fill(i int) (progress bool, reason nat.Reason) {
	d := &r.dirs[i]
	want := int(min(relayPipe, r.mem.M.Limit(false))) - d.filled
	if d.eof || want <= 0 {
		return false, ""
	}
	rule, sandbox := r.buckets(i)
	paced := rule != nil || sandbox.Limited()
	if paced {
		// From a socket with nothing queued one byte is requested: its end may have come.
		queued, _ := tcpflow.Siocinq(r.fds[i])
		want = admit.Take(rule, sandbox, max(1, min(want, queued)), r.in.Gate.Now(), &r.work, r.in.Engine.Runq)
		if want == 0 {
			return false, "" // the task is queued as soon as there are tokens
		}
	}
	if d.pipe == ([2]int{}) && !r.openPipe(d) {
		return false, nat.ReasonOutOfDescriptors
	}
	n, err := splice(r.fds[i], d.pipe[1], want)
	for err == unix.EINTR {
		n, err = splice(r.fds[i], d.pipe[1], want)
	}
	if paced {
		admit.Untake(rule, sandbox, want-n)
	}
	switch {
	case err == unix.EAGAIN:
	case err != nil:
		return false, lost(i, err)
	case n == 0:
		d.eof = true
	default:
		d.filled += n
		return true, ""
	}
	return false, ""
}

// lost is why the connection of fds[i] is over.
func lost(i int, err error) nat.Reason {
	if i == 0 {
		return tcpflow.LostBy(tcpflow.ErrnoOf(err), nat.ReasonResetByPeer, nat.ReasonPeerTimeout)
	}
	return tcpflow.LostBy(tcpflow.ErrnoOf(err), nat.ReasonResetBySandbox, nat.ReasonSandboxTimeout)
}

// buckets returns the limits on direction i: the rule's, which may be nil, and the sandbox's.
func (r *relay) buckets(i int) (rule, sandbox *admit.Bucket) {
	f := &r.in.Gate.Bandwidth
	if i == 0 {
		return r.RuleDown(), &f.Down
	}
	return r.RuleUp(), &f.Up
}

func (r *relay) openPipe(d *relayDir) bool {
	if r.in.pipes.get(d) {
		return true
	}
	if err := unix.Pipe2(d.pipe[:], unix.O_NONBLOCK|unix.O_CLOEXEC); err != nil {
		d.pipe = [2]int{}
		return false
	}
	// Less than requested only makes the steps smaller.
	_, _ = unix.FcntlInt(uintptr(d.pipe[0]), unix.F_SETPIPE_SZ, relayPipe)
	return true
}

// fallback tries the client's next way.
func (r *relay) fallback() {
	r.mu.Lock()
	fd := r.fds[0]
	r.in.Engine.Poll.Remove(r.toks[0], fd)
	r.fds[0] = -1
	r.mu.Unlock()
	r.Abort(nat.ReasonRefusedOnLoopback)
	if r.caller.Next != nil {
		r.caller.Next(fd)
	} else {
		r.in.Dialer.Reset(fd)
	}
}

// Abort ends the flow. It passes a reset on unless the stream has ended both ways.
func (r *relay) Abort(reason nat.Reason) {
	r.mu.Lock()
	if r.closed {
		r.mu.Unlock()
		return
	}
	r.closed = true
	for i, fd := range r.fds {
		if fd < 0 {
			continue
		}
		r.in.Engine.Poll.Remove(r.toks[i], fd)
		if reason == nat.ReasonClosed {
			r.in.Dialer.Close(fd)
		} else {
			r.in.Dialer.Reset(fd)
		}
	}
	for i := range r.dirs {
		if d := &r.dirs[i]; d.pipe != ([2]int{}) {
			unix.Close(d.pipe[0])
			unix.Close(d.pipe[1])
		}
	}
	r.mu.Unlock()
	r.in.mu.Lock()
	delete(r.in.relays, r)
	last := len(r.in.relays) == 0
	r.in.mu.Unlock()
	if last {
		r.in.pipes.close()
	}
	r.mem.Leave()
	if r.Lease != nil {
		r.Lease.SetState(nat.Close)
	}
	r.Release(reason)
}

// pending tells the flow table whether the flow is more than silent (nat.Spec.Pending).
func (r *relay) pending() bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.closed || r.connecting {
		return false
	}
	return r.dirs[0].filled > 0 || r.dirs[1].filled > 0 || tcpflow.HostHolds(r.fds[0]) || tcpflow.HostHolds(r.fds[1])
}

// Halt implements admitted. Both ends are the host's sockets: nothing waits for the sandbox.
func (r *relay) Halt() { r.Abort(nat.ReasonPolicy) }

// Expire implements admitted.
func (r *relay) Expire(reason nat.Reason) { r.Abort(reason) }

// UnderWay implements admitted: requests on a relay are not judged.
func (r *relay) UnderWay(policy.Query) []policy.Query { return nil }

// sparePipes is how many empty pipes are kept while there are relays.
const sparePipes = 16

// pipeStock holds the spare empty pipes.
type pipeStock struct {
	mu    sync.Mutex
	pipes [][2]int
}

// close closes the pipes, when the last relay has ended.
func (s *pipeStock) close() {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, p := range s.pipes {
		unix.Close(p[0])
		unix.Close(p[1])
	}
	s.pipes = nil
}

func (s *pipeStock) get(d *relayDir) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	n := len(s.pipes)
	if n == 0 {
		return false
	}
	d.pipe = s.pipes[n-1]
	s.pipes = s.pipes[:n-1]
	return true
}

// put takes an empty pipe back.
func (s *pipeStock) put(d *relayDir) {
	if d.pipe == ([2]int{}) {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.pipes) < sparePipes {
		s.pipes = append(s.pipes, d.pipe)
	} else {
		unix.Close(d.pipe[0])
		unix.Close(d.pipe[1])
	}
	d.pipe = [2]int{}
}

func splice(from, to, n int) (int, error) {
	m, _, errno := syscall.RawSyscall6(unix.SYS_SPLICE, uintptr(from), 0, uintptr(to), 0, uintptr(n),
		unix.SPLICE_F_MOVE|unix.SPLICE_F_NONBLOCK)
	if errno != 0 {
		return 0, errno
	}
	return int(m), nil
}
