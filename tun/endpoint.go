package tun

import (
	"errors"
	"fmt"
	"net"
	"sync"
	"sync/atomic"
	"syscall"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
)

// Endpoint joins a Device to a netstack NIC.
//
// Reading: the endpoint has no goroutine. The goroutine that polls its descriptors (PollQueues)
// reads a batch of frames and hands each to the stack inline (read.go). Writing: the goroutine that
// has a packet writes it, with no queue or thread in between (write.go).
//
// Link addresses: in TAP mode the endpoint is the gateway, the only other host on
// the wire. It answers to its own address and to groups; it sends everything to the
// container's address, which it learns from the source of the container's frames.
// So it does not ask the stack for address resolution.
//
// Checksums: each packet is delivered with its own RXChecksumValidated. Netstack's NIC overwrites
// that with one flag for the whole link, which is wrong either way: claiming validity blindly hides
// corruption, and not claiming it costs a pass over every byte. A dispatcher that is a
// ChecksumKeeper avoids both. For any other dispatcher, open checksums are filled in here and the
// stack verifies them again.
type Endpoint struct {
	device  *Device
	filter  filter
	mtu     atomic.Uint32
	gateway tcpip.LinkAddress
	guest   atomic.Uint64 // the container's MAC in the low 48 bits
	queues  []*queue
	written atomic.Uint32 // how many of them are written to
	noted   atomic.Uint64

	dispatcher atomic.Pointer[dispatcher]
	captures   atomic.Pointer[[]*Capture] // copied on write under mu

	closing atomic.Bool
	mu      sync.Mutex // guards onClose, err and changes of captures
	onClose func()
	err     error

	done chan struct{} // closed by fail or Close, whichever is first, under mu
}

var (
	_ stack.LinkEndpoint = (*Endpoint)(nil)
	_ stack.GSOEndpoint  = (*Endpoint)(nil)
)

// ChecksumKeeper is a stack.NetworkDispatcher that respects a delivered packet's
// RXChecksumValidated, by handing the packet to stack.NetworkEndpoint.HandlePacket rather than to
// the NIC. It is asked before each delivery, so it may return false until the stack is set up.
type ChecksumKeeper interface {
	KeepsRXChecksumValidated() bool
}

type dispatcher struct {
	stack.NetworkDispatcher
	keeper ChecksumKeeper // the same, or nil
}

func (d *dispatcher) keepsChecksums() bool {
	return d.keeper != nil && d.keeper.KeepsRXChecksumValidated()
}

// EndpointConfig describes the hosts on the link.
type EndpointConfig struct {
	MTU       int              // 0 means the device's
	LinkAddr  net.HardwareAddr // the gateway's own; required for TAP
	GuestAddr net.HardwareAddr // the container's until it has sent a frame; nil means ask the device
}

// queue is one descriptor of the device.
type queue struct {
	e *Endpoint

	// Users of fd hold fdMu for reading; Close holds it for writing while it
	// retires it (-1).
	fdMu sync.RWMutex
	fd   int
	// attached is false while the kernel sends nothing to fd (queues.go).
	attached atomic.Bool
	// stuck: the last frame found no room for writePatience (write.go).
	stuck atomic.Bool

	reading  sync.Mutex // held while a batch is read; guards what follows
	rx       rxbuf
	to       *dispatcher // where the batch is delivered
	readErr  error
	badReads int

	count counters
}

// NewEndpoint takes over the device: closing the endpoint closes it. Reading starts when the stack
// attaches.
func NewEndpoint(d *Device, cfg EndpointConfig) (*Endpoint, error) {
	if cfg.MTU == 0 {
		cfg.MTU = d.MTU()
	}
	if cfg.MTU < MinMTU || cfg.MTU > MaxMTU {
		return nil, fmt.Errorf("making a link endpoint: MTU %d is outside %d..%d", cfg.MTU, MinMTU, MaxMTU)
	}
	e := &Endpoint{
		device: d,
		filter: filter{kind: d.Kind(), features: d.Features()},
		done:   make(chan struct{}),
	}
	e.mtu.Store(uint32(cfg.MTU))
	if d.Kind() == TAP {
		if err := e.setAddresses(cfg); err != nil {
			return nil, fmt.Errorf("making a link endpoint: %w", err)
		}
	}
	fds, spare, err := d.take()
	if err != nil {
		return nil, fmt.Errorf("making a link endpoint: %w", err)
	}
	for i, fd := range fds {
		q := &queue{e: e, fd: fd}
		q.attached.Store(i >= len(spare) || !spare[i])
		e.queues = append(e.queues, q)
	}
	e.written.Store(1)
	return e, nil
}

func (e *Endpoint) setAddresses(cfg EndpointConfig) error {
	if len(cfg.LinkAddr) != 6 || cfg.LinkAddr[0]&1 != 0 {
		return fmt.Errorf("the gateway's address %q is not a unicast MAC address", cfg.LinkAddr)
	}
	guest := cfg.GuestAddr
	if guest == nil {
		var err error
		if guest, err = e.device.HardwareAddr(); err != nil {
			return err
		}
	}
	if len(guest) != 6 || guest[0]&1 != 0 {
		return fmt.Errorf("the container's address %q is not a unicast MAC address", guest)
	}
	e.filter.gateway = mac(cfg.LinkAddr)
	e.gateway = tcpip.LinkAddress(cfg.LinkAddr)
	e.guest.Store(mac(guest).uint64())
	return nil
}

// PollQueues calls add for each queue, with the descriptor to wait for and what to do when it is
// readable: read delivers a batch of frames and reports whether there may be more. Frames wait
// while the endpoint is not attached, so read must also be called once after it attaches. The
// descriptor must not be polled once Close has been called.
func (e *Endpoint) PollQueues(add func(fd int, read func() (more bool)) error) error {
	for _, q := range e.queues {
		if err := add(q.fd, q.read); err != nil {
			return err
		}
	}
	return nil
}

// USO reports whether UDP may be sent as one large segment, by setting GSOOptions.MSS, and may
// arrive as one.
func (e *Endpoint) USO() bool { return e.filter.features.USO }

// GuestAddr returns the container's MAC address as last seen.
func (e *Endpoint) GuestAddr() net.HardwareAddr {
	if e.filter.kind != TAP {
		return nil
	}
	m := macOf(e.guest.Load())
	return m[:]
}

// Done is closed when the endpoint can carry no more frames: the device is gone, or Close was
// called.
func (e *Endpoint) Done() <-chan struct{} { return e.done }

// Err returns why Done was closed: nil before, ErrClosed after Close, else an error that wraps
// ErrDeviceGone or the kernel's error.
func (e *Endpoint) Err() error {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.err
}

// end records the first cause and announces it.
func (e *Endpoint) end(cause error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.err == nil {
		e.err = cause
		close(e.done)
	}
}

// Close implements stack.LinkEndpoint. It closes the device and ends the captures, after the
// batches being read. It must not be called from within packet delivery.
func (e *Endpoint) Close() {
	if e.closing.Swap(true) {
		return
	}
	e.end(ErrClosed)
	e.mu.Lock()
	onClose := e.onClose
	e.mu.Unlock()
	if onClose != nil {
		onClose()
	}
	for _, q := range e.queues {
		q.reading.Lock()
		q.rx.release()
		q.reading.Unlock()
		q.fdMu.Lock()
		q.fd = -1
		q.fdMu.Unlock()
	}
	// The only possible error is a failed close(2) of a descriptor that is gone anyway.
	_ = e.device.Close()
	for _, c := range e.activeCaptures() {
		c.end()
	}
}

// Attach implements stack.LinkEndpoint. While no dispatcher is attached, frames wait in the device.
func (e *Endpoint) Attach(d stack.NetworkDispatcher) {
	if d == nil {
		e.dispatcher.Store(nil)
		return
	}
	to := &dispatcher{NetworkDispatcher: d}
	to.keeper, _ = d.(ChecksumKeeper)
	e.dispatcher.Store(to)
}

// IsAttached implements stack.LinkEndpoint.
func (e *Endpoint) IsAttached() bool { return e.dispatcher.Load() != nil }

// Wait implements stack.LinkEndpoint: it returns after the batches being read. Close and Wait must
// come before stack.Destroy, which waits with the stack's lock held, while a delivering reader may
// want that lock.
func (e *Endpoint) Wait() {
	for _, q := range e.queues {
		q.reading.Lock()
		q.reading.Unlock() //nolint:staticcheck // SA2001: the lock was had, so nobody is reading
	}
}

// SetOnCloseAction implements stack.LinkEndpoint.
func (e *Endpoint) SetOnCloseAction(f func()) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.onClose = f
}

// MTU implements stack.LinkEndpoint.
func (e *Endpoint) MTU() uint32 { return e.mtu.Load() }

// SetMTU implements stack.LinkEndpoint.
func (e *Endpoint) SetMTU(mtu uint32) { e.mtu.Store(mtu) }

// MaxHeaderLength implements stack.LinkEndpoint.
func (e *Endpoint) MaxHeaderLength() uint16 { return uint16(e.filter.kind.linkHeaderLen()) }

// LinkAddress implements stack.LinkEndpoint.
func (e *Endpoint) LinkAddress() tcpip.LinkAddress { return e.gateway }

// SetLinkAddress implements stack.LinkEndpoint. The address is fixed by
// EndpointConfig, because the container's neighbour table already knows it.
func (e *Endpoint) SetLinkAddress(tcpip.LinkAddress) {}

// Capabilities implements stack.LinkEndpoint. Neither checksum capability is
// claimed: they are properties of a packet here, not of the link.
func (e *Endpoint) Capabilities() stack.LinkEndpointCapabilities { return 0 }

// ARPHardwareType implements stack.LinkEndpoint.
func (e *Endpoint) ARPHardwareType() header.ARPHardwareType {
	if e.filter.kind == TAP {
		return header.ARPHardwareEther
	}
	return header.ARPHardwareNone
}

// gsoMaxSize keeps an IPv4 packet's total length in its 16 bits: the stack's TCP subtracts all
// possible headers from it to get the largest payload.
const gsoMaxSize = 65535

// GSOMaxSize implements stack.GSOEndpoint.
func (e *Endpoint) GSOMaxSize() uint32 { return gsoMaxSize }

// SupportedGSO implements stack.GSOEndpoint.
func (e *Endpoint) SupportedGSO() stack.SupportedGSO {
	if e.filter.features.TSO {
		return stack.HostGSOSupported
	}
	return stack.GSONotSupported
}

// isGone reports whether the kernel has removed the interface.
func isGone(errno syscall.Errno) bool {
	switch errno {
	case syscall.EBADFD, syscall.EBADF, syscall.ENODEV, syscall.ENXIO:
		return true
	}
	return false
}

func (m mac) uint64() uint64 {
	return uint64(m[0])<<40 | uint64(m[1])<<32 | uint64(m[2])<<24 | uint64(m[3])<<16 | uint64(m[4])<<8 | uint64(m[5])
}

func macOf(v uint64) mac {
	return mac{byte(v >> 40), byte(v >> 32), byte(v >> 24), byte(v >> 16), byte(v >> 8), byte(v)}
}

// errUnexpectedEnd is the cause when a queue ends without an error.
var errUnexpectedEnd = errors.New("end of file")
