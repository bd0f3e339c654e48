package tun

import (
	"errors"
	"fmt"
	"net"
	"unsafe"

	"golang.org/x/sys/unix"
)

const cloneDevice = "/dev/net/tun"

// TUN_F_* of linux/if_tun.h that golang.org/x/sys/unix may lack.
const (
	offloadChecksum = 0x01 // TUN_F_CSUM
	offloadTSO4     = 0x02 // TUN_F_TSO4
	offloadTSO6     = 0x04 // TUN_F_TSO6
	offloadUSO4     = 0x20 // TUN_F_USO4; the kernel takes both USO flags or none
	offloadUSO6     = 0x40 // TUN_F_USO6
)

// offloadSteps are tried in order until the kernel takes one; USO needs kernel 6.2, all kernels
// have TSO, and plain frames remain if the administrator has locked offloads down.
var offloadSteps = []struct {
	flags    int
	features Features
}{
	{offloadChecksum | offloadTSO4 | offloadTSO6 | offloadUSO4 | offloadUSO6, Features{Checksum: true, TSO: true, USO: true}},
	{offloadChecksum | offloadTSO4 | offloadTSO6, Features{Checksum: true, TSO: true}},
	{offloadChecksum, Features{Checksum: true}},
	{0, Features{}},
}

// Create makes an interface in the network namespace of the calling thread (lock
// the goroutine to its thread if that is not the process's) and sets its MTU. The
// interface is left down and without addresses.
func Create(cfg Config) (*Device, error) {
	cfg, err := cfg.withDefaults()
	if err != nil {
		return nil, fmt.Errorf("creating a network device: %w", err)
	}
	d := &Device{name: cfg.Name, cfg: cfg}
	if err := d.create(); err != nil {
		_ = d.Close()
		return nil, fmt.Errorf("creating %s device %q: %w", cfg.Kind, cfg.Name, err)
	}
	return d, nil
}

func (d *Device) create() error {
	for i := range d.cfg.Queues {
		fd, err := unix.Open(cloneDevice, unix.O_RDWR|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
		if err != nil {
			return explainOpen(err)
		}
		d.fds = append(d.fds, fd)

		req, err := unix.NewIfreq(d.name)
		if err != nil {
			return err
		}
		flags := wantFlags(d.cfg)
		if i == 0 && d.name != "" {
			// Without it TUNSETIFF would silently join an existing persistent device with an
			// unknown configuration.
			flags |= unix.IFF_TUN_EXCL
		}
		req.SetUint16(flags)
		if err := unix.IoctlIfreq(fd, unix.TUNSETIFF, req); err != nil {
			return explainSetIff(err)
		}
		d.name = req.Name()
		if err := d.negotiate(fd); err != nil {
			return err
		}
		d.spare = append(d.spare, i > 0)
		if i > 0 {
			if err := setQueue(fd, unix.IFF_DETACH_QUEUE); err != nil {
				return fmt.Errorf("detaching a queue: %w", err)
			}
		}
	}
	return setMTU(d.name, d.cfg.MTU)
}

// Adopt takes over descriptors that another process created, with the frames that wait in them. cfg
// must be the one given to Create (the name is read back). On success the descriptors belong to the
// Device; on error they stay the caller's. Adopt needs no privilege, but it makes ioctl calls: do
// it before confining the process.
func Adopt(fds []int, cfg Config) (*Device, error) {
	if cfg.Queues == 0 {
		cfg.Queues = len(fds)
	}
	cfg, err := cfg.withDefaults()
	if err != nil {
		return nil, fmt.Errorf("adopting a network device: %w", err)
	}
	if len(fds) != cfg.Queues {
		return nil, fmt.Errorf("adopting a network device: %d descriptors for %d queues", len(fds), cfg.Queues)
	}
	d := &Device{cfg: cfg}
	for _, fd := range fds {
		if err := d.adopt(fd); err != nil {
			return nil, fmt.Errorf("adopting descriptor %d as a %s queue: %w", fd, cfg.Kind, err)
		}
	}
	d.fds = append(d.fds, fds...)
	return d, nil
}

func (d *Device) adopt(fd int) error {
	req, err := unix.NewIfreq("")
	if err != nil {
		return err
	}
	if err := unix.IoctlIfreq(fd, unix.TUNGETIFF, req); err != nil {
		if errors.Is(err, unix.EBADFD) {
			return fmt.Errorf("%w (%w)", ErrDeviceGone, err)
		}
		return fmt.Errorf("%w (%w)", ErrNotTunDevice, err)
	}
	const compared = unix.IFF_TUN | unix.IFF_TAP | unix.IFF_NO_PI | unix.IFF_VNET_HDR | unix.IFF_MULTI_QUEUE
	if got, want := req.Uint16()&compared, wantFlags(d.cfg)&compared; got != want {
		return fmt.Errorf("%w (flags %#x, want %#x)", ErrNotTunDevice, got, want)
	}
	if d.name != "" && d.name != req.Name() {
		return fmt.Errorf("%w (queue of %s, not of %s)", ErrNotTunDevice, req.Name(), d.name)
	}
	d.name = req.Name()
	if err := unix.SetNonblock(fd, true); err != nil {
		return err
	}
	unix.CloseOnExec(fd)
	d.spare = append(d.spare, req.Uint16()&unix.IFF_DETACH_QUEUE != 0)
	return d.negotiate(fd)
}

func wantFlags(cfg Config) uint16 {
	flags := uint16(unix.IFF_NO_PI | unix.IFF_VNET_HDR)
	if cfg.Kind == TAP {
		flags |= unix.IFF_TAP
	} else {
		flags |= unix.IFF_TUN
	}
	if cfg.Queues > 1 {
		flags |= unix.IFF_MULTI_QUEUE
	}
	return flags
}

// negotiate sets the header's size and the offloads. Both are idempotent and need no privilege, so
// Adopt repeats them: the agreed offloads cannot be read back.
func (d *Device) negotiate(fd int) error {
	if err := unix.IoctlSetPointerInt(fd, unix.TUNSETVNETHDRSZ, vnetHeaderLen); err != nil {
		return fmt.Errorf("setting the virtio-net header size: %w", err)
	}
	steps := offloadSteps
	if d.cfg.NoOffload {
		steps = offloadSteps[len(offloadSteps)-1:]
	}
	var err error
	for _, step := range steps {
		if err = unix.IoctlSetInt(fd, unix.TUNSETOFFLOAD, step.flags); err == nil {
			d.features = step.features
			d.features.MultiQueue = d.cfg.Queues > 1
			return nil
		}
	}
	return fmt.Errorf("setting offloads: %w", err)
}

func setMTU(name string, mtu int) error {
	s, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("setting the MTU: %w", err)
	}
	defer unix.Close(s)
	req, err := unix.NewIfreq(name)
	if err != nil {
		return err
	}
	req.SetUint32(uint32(mtu))
	if err := unix.IoctlIfreq(s, unix.SIOCSIFMTU, req); err != nil {
		return fmt.Errorf("setting the MTU to %d: %w", mtu, err)
	}
	return nil
}

// ioctlHardwareAddr uses the raw request: unix.Ifreq has no accessor for a
// link-layer sockaddr.
func ioctlHardwareAddr(fd int) (net.HardwareAddr, error) {
	var req struct {
		name   [unix.IFNAMSIZ]byte
		family uint16
		addr   [14]byte
		_      [8]byte
	}
	_, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), unix.SIOCGIFHWADDR, uintptr(unsafe.Pointer(&req)))
	switch {
	case errno == unix.EBADFD:
		return nil, ErrDeviceGone
	case errno != 0:
		return nil, errno
	}
	return append(net.HardwareAddr(nil), req.addr[:6]...), nil
}

func explainOpen(err error) error {
	switch {
	case errors.Is(err, unix.ENOENT), errors.Is(err, unix.ENODEV), errors.Is(err, unix.ENXIO):
		return fmt.Errorf("%w (%w)", ErrNoDevice, err)
	case errors.Is(err, unix.EACCES), errors.Is(err, unix.EPERM):
		return fmt.Errorf("%w (%w)", ErrPermission, err)
	}
	return fmt.Errorf("opening %s: %w", cloneDevice, err)
}

func explainSetIff(err error) error {
	switch {
	case errors.Is(err, unix.EPERM), errors.Is(err, unix.EACCES):
		return fmt.Errorf("%w (%w)", ErrPermission, err)
	case errors.Is(err, unix.EBUSY), errors.Is(err, unix.EEXIST):
		return fmt.Errorf("%w (%w)", ErrExists, err)
	}
	return fmt.Errorf("attaching to the interface: %w", err)
}
