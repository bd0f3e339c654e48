package tcpflow

// The rest of a connection after both ends were told, and the liveness of a silent one.
//
// The host's kernel sends on what a closed socket of ours has not sent yet. Towards the
// sandbox the stack does so, and the flow stays until it has:
//
//	both ends of stream passed on   closing    CLOSE_WAIT until the sandbox has taken every
//	                                           byte, LAST_ACK until it has taken the end
//	the far side's reset            resetting  CLOSE: the bytes before it go first
//
// A timeout of the flow table ends a flow that is silent: nothing moves, and neither side has
// bytes to take. A reader that stands still is not silence. Whether it is alive the kernels and the
// stack find out by probes of their own (RFC 9293 section 3.8.6.1), and then the flow ends by
// what they say.

import (
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"

	"sluice.dev/sluice/forwarder/internal/netstack"
	"sluice.dev/sluice/nat"
)

// fail ends the flow for a reason that a pump found.
func (fl *Flow) fail(reason nat.Reason) {
	fl.Mu.Lock()
	if reason != nat.ReasonResetByPeer && reason != nat.ReasonPeerTimeout || fl.Phase != PhaseOpen || fl.Revoked.Load() || netstack.SendQueued(fl.Ep.(*tcp.Endpoint)) == 0 {
		fl.abortLocked(reason)
		return
	}
	fl.Phase, fl.lost = phaseResetting, reason
	fl.Mu.Unlock()
	fl.closeHost(true)
	fl.Lease.SetState(nat.Close)
	fl.T.Engine.Put(&fl.settling)
}

// brokenUp records that the host's kernel accepts nothing more. Data that it received can still be
// read, and the reset behind it is passed on.
func (fl *Flow) brokenUp(errno unix.Errno) (abort nat.Reason) {
	fl.broken.Store(uint32(errno))
	fl.hostEvents.Or(unix.EPOLLERR)
	fl.Up.Done.Store(true)
	if fl.Down.Done.Load() {
		return fl.lostPeer(errno)
	}
	fl.T.Engine.Put(&fl.DownTask)
	return ""
}

// lostPeer is why the host's kernel has no connection to the far side any more: the error
// given, else the one that writing met, else the socket's. mu or a pump's lock is held.
func (fl *Flow) lostPeer(errno unix.Errno) nat.Reason {
	if errno == 0 {
		errno = unix.Errno(fl.broken.Load())
	}
	if errno == 0 {
		n, _ := unix.GetsockoptInt(fl.FD, unix.SOL_SOCKET, unix.SO_ERROR)
		errno = unix.Errno(n)
	}
	return LostBy(errno, nat.ReasonResetByPeer, nat.ReasonPeerTimeout)
}

// LostBy tells a reset from silence. Of a far side that acknowledges nothing, the kernel tells
// what the network said of it last (sk_err_soft, tcp_write_err in net/ipv4/tcp_timer.c).
func LostBy(errno unix.Errno, reset, timeout nat.Reason) nat.Reason {
	switch errno {
	case unix.ETIMEDOUT, unix.EHOSTUNREACH, unix.ENETUNREACH, unix.EHOSTDOWN, unix.ENETDOWN:
		return timeout
	}
	return reset
}

// lostSandbox is why the stack has no connection to the sandbox any more.
func lostSandbox(ep tcpip.Endpoint) nat.Reason {
	if _, silent := ep.LastError().(*tcpip.ErrTimeout); silent {
		return nat.ReasonSandboxTimeout
	}
	return nat.ReasonResetBySandbox
}

// settleTail looks at what is left of a flow that is closing or resetting.
func (fl *Flow) settleTail(ep *tcp.Endpoint, ph Phase) {
	switch state := netstack.EndpointState(ep); {
	case ph == phaseResetting && (!netstack.Connected(state) || fl.awaitTail(ep)):
		fl.Mu.Lock()
		fl.abortLocked(fl.lost)
	case ph == phaseResetting:
	case state == tcp.StateTimeWait:
		if !fl.ingress {
			fl.unregister(ep)
		}
		fl.Lease.SetState(nat.TimeWait)
		fl.end(nat.ReasonClosed)
	case state == tcp.StateClose:
		fl.Lease.SetState(nat.TimeWait)
		fl.end(nat.ReasonClosed)
	case state == tcp.StateError:
		fl.Lease.SetState(nat.Close)
		reason := nat.ReasonReset
		if lostSandbox(ep) == nat.ReasonSandboxTimeout {
			reason = nat.ReasonSandboxTimeout
		}
		fl.end(reason)
	case fl.Lease.State() != nat.LastAck && fl.awaitTail(ep):
		fl.Lease.SetState(nat.LastAck)
	}
}

// awaitTail reports whether the sandbox has taken every byte that ep had for it. If it has not,
// settle runs again at an acknowledgement: netstack notifies when the use of the send buffer falls
// below half. No acknowledgement is processed while the endpoint's lock is held.
func (fl *Flow) awaitTail(ep *tcp.Endpoint) bool {
	ep.LockUser()
	queued := netstack.SendQueued(ep)
	if queued > 0 {
		fl.tail.Store(true)
		ep.SocketOptions().SetSendBufferSize(2*int64(queued), false)
	}
	ep.UnlockUser()
	return queued == 0
}

// pending reports to the flow table whether the flow is more than silent (nat.Spec.Pending).
func (fl *Flow) pending() bool {
	fl.Mu.Lock()
	ep, _ := fl.Ep.(*tcp.Endpoint)
	ph, counted := fl.Phase, fl.Counts != nil
	fl.Mu.Unlock()
	if ep == nil || !counted {
		return false
	}
	if !fl.Up.Mu.TryLock() {
		return true // it is moving
	}
	moved := fl.Up.counted != fl.Counts.SegmentsReceived.Value() // acknowledgements, most likely
	fl.TallyUp(0)
	held := fl.FD >= 0 && HostHolds(fl.FD)
	fl.unlockUp()
	return moved || ph != phaseResetting && (held || StackHolds(ep))
}

// StackHolds reports whether ep has bytes that one side has still to take, or an end of stream
// for a sandbox whose window is closed.
func StackHolds(ep *tcp.Endpoint) bool {
	if netstack.SendQueued(ep) > 0 || netstack.ReceiveQueued(ep) > 0 {
		return true
	}
	switch netstack.EndpointState(ep) {
	case tcp.StateFinWait1, tcp.StateClosing, tcp.StateLastAck:
		return netstack.SendWindow(ep) == 0
	}
	return false
}

// HostHolds does the same for a host socket; an end of stream counts as a byte.
func HostHolds(fd int) bool {
	in, _ := Siocinq(fd)
	if in > 0 {
		return true
	}
	out, _ := siocoutq(fd)
	return out > 0
}

func siocoutq(fd int) (int, unix.Errno) {
	var n int32
	_, _, errno := syscall.RawSyscall(unix.SYS_IOCTL, uintptr(fd), unix.SIOCOUTQ, uintptr(unsafe.Pointer(&n)))
	return int(n), errno
}

// over reports whether ep's connection has ended, however: a reset behind the sandbox's own end
// of stream makes it a closed one like any other.
func over(ep tcpip.Endpoint) bool {
	state := netstack.EndpointState(ep)
	return state == tcp.StateError || state == tcp.StateClose
}
