package tun

import (
	"errors"
	"fmt"
	"net"
	"runtime"
	"sync"

	"golang.org/x/sys/unix"
)

// Limits of Config. The upper MTU is the largest that a TAP device takes (65535
// less the Ethernet header, rounded down to what other user-mode networks use);
// the lower one is IPv6's minimum link MTU (RFC 8200, section 5).
const (
	MinMTU     = 1280
	MaxMTU     = 65520
	DefaultMTU = 65520
	// MaxQueues bounds the descriptors (and reader goroutines) of one device.
	// The kernel's own bound is 256; no sandbox has that many cores to itself.
	MaxQueues = 16
)

// DefaultQueues returns how many queues are worthwhile here. More than two have not been measured.
func DefaultQueues() int { return min(2, runtime.NumCPU()) }

// Kind is the layer at which the device works.
type Kind uint8

const (
	// TAP carries Ethernet frames.
	TAP Kind = iota
	// TUN carries bare IP packets.
	TUN
)

func (k Kind) String() string {
	switch k {
	case TAP:
		return "tap"
	case TUN:
		return "tun"
	}
	return fmt.Sprintf("Kind(%d)", uint8(k))
}

// linkHeaderLen returns the number of bytes before the IP header.
func (k Kind) linkHeaderLen() int {
	if k == TAP {
		return ethernetHeaderLen
	}
	return 0
}

// Sentinel errors that a caller can act on.
var (
	// ErrNoDevice means that /dev/net/tun does not exist: the tun module is not loaded, or the
	// container runtime did not pass the device on.
	ErrNoDevice = errors.New("no /dev/net/tun (load the tun module, or pass the device to this container)")
	// ErrPermission means that /dev/net/tun or the network namespace refused us.
	ErrPermission = errors.New("no permission for /dev/net/tun (make it 0666, or run with CAP_NET_ADMIN in a user namespace that owns the network namespace)")
	// ErrExists means that an interface of that name exists already.
	ErrExists = errors.New("an interface of that name exists")
	// ErrNotTunDevice means that an adopted descriptor is not an attached TUN/TAP queue of the
	// expected kind.
	ErrNotTunDevice = errors.New("descriptor is not an attached tun/tap queue of that kind")
	// ErrDeviceGone means that the kernel removed the interface, as it does when the network
	// namespace ends or the link is deleted.
	ErrDeviceGone = errors.New("the network device is gone")
	// ErrClosed means that we closed the Device.
	ErrClosed = errors.New("device closed")
)

// Config describes a device. The zero value is a TAP with one queue, the largest MTU, every offload
// the kernel has, and a name that the kernel chooses.
type Config struct {
	Name      string // "" or a pattern such as "tap%d" lets the kernel choose
	Kind      Kind
	MTU       int // bytes of the IP packet; 0 means DefaultMTU
	Queues    int // 0 means 1; all but one are detached until Endpoint.Spread
	NoOffload bool
}

func (c Config) withDefaults() (Config, error) {
	if c.MTU == 0 {
		c.MTU = DefaultMTU
	}
	if c.Queues == 0 {
		c.Queues = 1
	}
	switch {
	case c.Kind > TUN:
		return c, fmt.Errorf("unknown device kind %d", c.Kind)
	case c.MTU < MinMTU || c.MTU > MaxMTU:
		return c, fmt.Errorf("MTU %d is outside %d..%d", c.MTU, MinMTU, MaxMTU)
	case c.Queues < 1 || c.Queues > MaxQueues:
		return c, fmt.Errorf("%d queues are outside 1..%d", c.Queues, MaxQueues)
	case len(c.Name) >= unix.IFNAMSIZ:
		return c, fmt.Errorf("interface name %q is longer than %d bytes", c.Name, unix.IFNAMSIZ-1)
	}
	return c, nil
}

// Features are the offloads agreed with the kernel.
type Features struct {
	Checksum   bool `json:"checksum"`   // either side may leave a TCP or UDP checksum unfilled
	TSO        bool `json:"tso"`        // either side may send TCP segments of up to 64 KiB
	USO        bool `json:"uso"`        // the same for UDP (kernel 6.2 and later)
	MultiQueue bool `json:"multiQueue"` // the device has more than one queue
}

// Device owns the descriptors of one TUN/TAP interface, one per queue. All are non-blocking and
// close-on-exec. None is registered with Go's poller, so a process that only keeps a Device for
// another one is not woken by every packet.
type Device struct {
	name     string
	cfg      Config
	features Features

	mu     sync.Mutex
	fds    []int
	spare  []bool // by descriptor: the queue is detached
	taken  bool   // by an endpoint
	closed bool
}

// Name returns the interface's name at the time it was opened.
func (d *Device) Name() string { return d.name }

// Kind returns the layer at which the device works.
func (d *Device) Kind() Kind { return d.cfg.Kind }

// MTU returns the configured MTU; the container may since have lowered its own.
func (d *Device) MTU() int { return d.cfg.MTU }

// Features returns the agreed offloads.
func (d *Device) Features() Features { return d.features }

// FDs returns the descriptors, one per queue, for handing to another process. They
// stay the Device's own and are valid until Close.
func (d *Device) FDs() []int {
	d.mu.Lock()
	defer d.mu.Unlock()
	return append([]int(nil), d.fds...)
}

// HardwareAddr asks the kernel for the container's MAC address. It is nil for a
// TUN device, and an error if the device is gone.
func (d *Device) HardwareAddr() (net.HardwareAddr, error) {
	if d.cfg.Kind != TAP {
		return nil, nil
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.closed {
		return nil, ErrClosed
	}
	mac, err := ioctlHardwareAddr(d.fds[0])
	if err != nil {
		return nil, fmt.Errorf("reading the hardware address of %s: %w", d.name, err)
	}
	return mac, nil
}

// Close closes the descriptors. The interface vanishes with the last descriptor to it in any
// process. Closing an Endpoint closes its Device. Closing twice is allowed.
func (d *Device) Close() error {
	d.mu.Lock()
	if d.closed {
		d.mu.Unlock()
		return nil
	}
	d.closed = true
	fds := d.fds
	d.fds = nil
	d.mu.Unlock()

	var errs []error
	for _, fd := range fds {
		errs = append(errs, unix.Close(fd))
	}
	return errors.Join(errs...)
}

// take hands the descriptors over to an endpoint, which must not close them: Close
// does.
func (d *Device) take() (fds []int, spare []bool, err error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	switch {
	case d.closed:
		return nil, nil, ErrClosed
	case d.taken:
		return nil, nil, errors.New("the device already has an endpoint")
	}
	d.taken = true
	return d.fds, d.spare, nil
}
