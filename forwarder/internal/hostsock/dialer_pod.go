package hostsock

// Host sockets of a pod. They live in a network namespace that is the pod's alone, and use the
// pod's own addresses. If the pod has several of a family, they use the one that it chose itself.

import (
	"net/netip"

	"golang.org/x/sys/unix"

	"sluice.dev/sluice/policy"
)

// The UDP ports that our sockets take in a pod's uplink namespace. They lie above Linux's ephemeral
// ports (net.ipv4.ip_local_port_range), because a datagram for a port held by one of our sockets
// never reaches a server of the pod on that port. The kernel honours this only within the
// namespace's own range, which the uplink's creator must widen to 65535. A pod that uses them all
// falls back on the rest.
const podPortsFirst, podPortsLast = 61000, 65535

// prepareUDP binds a fresh UDP socket to one of the pod's addresses and to a port that the pod's
// servers do not use. It does nothing where there is no pod.
func (d *Dialer) prepareUDP(fd int, src netip.Addr) error {
	if !d.Pod {
		return nil
	}
	at := ToSockaddr(netip.AddrPortFrom(src, 0))
	// The option's name says IPv4, but it works for both families. Kernels before 6.3 lack it:
	// there, or if all ports are taken, any port has to do.
	if unix.SetsockoptInt(fd, unix.IPPROTO_IP, unix.IP_LOCAL_PORT_RANGE, podPortsLast<<16|podPortsFirst) == nil {
		if unix.Bind(fd, at) == nil {
			return nil
		}
		_ = unix.SetsockoptInt(fd, unix.IPPROTO_IP, unix.IP_LOCAL_PORT_RANGE, 0)
	}
	return unix.Bind(fd, at)
}

// prepareStream binds a fresh TCP socket to one of the pod's addresses. Its port is chosen once its
// peer is known, so that each peer can be reached from every port.
func (d *Dialer) prepareStream(fd int, src netip.Addr) error {
	if !d.Pod {
		return nil
	}
	if err := unix.SetsockoptInt(fd, unix.IPPROTO_IP, unix.IP_BIND_ADDRESS_NO_PORT, 1); err != nil {
		return err
	}
	return unix.Bind(fd, ToSockaddr(netip.AddrPortFrom(src, 0)))
}

// PodEchoSocket is EchoSocket for an identifier of the sandbox at src.
func (d *Dialer) PodEchoSocket(v policy.Verdict, src netip.Addr) (int, error) {
	fd, err := d.EchoSocket(v)
	if err != nil || !d.Pod {
		return fd, err
	}
	if err := unix.Bind(fd, ToSockaddr(netip.AddrPortFrom(src, 0))); err != nil {
		d.Close(fd)
		return -1, err
	}
	return fd, nil
}

// PodPacketSocket is PacketSocket for an endpoint of the sandbox at src.
func (d *Dialer) PodPacketSocket(v policy.Verdict, src netip.Addr) (int, error) {
	fd, err := d.PacketSocket(v)
	if err != nil {
		return -1, err
	}
	if err := d.prepareUDP(fd, src); err != nil {
		d.Close(fd)
		return -1, err
	}
	return fd, nil
}
