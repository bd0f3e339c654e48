package tun

import (
	"bytes"
	"net"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
)

// A row of datagrams crosses as one UDP segment, both ways.
func TestKernelUSO(t *testing.T) {
	const size, count = 1000, 10
	ns := newNamespace(t)
	d := kernelDevice(t, ns, Config{Kind: TUN, MTU: 1500}) // TUN needs no ARP, and nothing here would answer it
	if !d.Features().USO {
		t.Skip("needs a kernel with TUN_F_USO4 (6.2 or later)")
	}
	e := kernelEndpoint(t, d)
	s := newSink(true)
	var c *net.UDPConn
	ns.do(t, func() (err error) {
		c, err = net.ListenUDP("udp4", &net.UDPAddr{IP: net.ParseIP(guest4), Port: 4000})
		return err
	})
	defer c.Close()
	raw, err := c.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	if err := raw.Control(func(fd uintptr) {
		err = unix.SetsockoptInt(int(fd), unix.SOL_UDP, unix.UDP_SEGMENT, size)
	}); err != nil {
		t.Fatal(err)
	}
	if err != nil {
		t.Fatal(err)
	}
	payload := make([]byte, size*count)
	for i := range payload {
		payload[i] = byte(i / size)
	}
	if _, err := c.WriteTo(payload, &net.UDPAddr{IP: net.ParseIP(gateway4), Port: 7}); err != nil {
		t.Fatal(err)
	}
	e.Attach(s)
	got := s.next(t)
	for len(got.data) < size || header.IPv4(got.data).Protocol() != 17 { // IPv6 announces itself meanwhile
		got = s.next(t)
	}
	if got.segment != size || !got.validated || !bytes.Equal(got.data[28:], payload) {
		t.Errorf("a segment of %d bytes, cut at %d, validated %v", len(got.data), got.segment, got.validated)
	}

	datagram := udpDatagram(payload)
	h := header.UDP(datagram)
	h.SetSourcePort(7)
	h.SetDestinationPort(4000)
	h.SetChecksum(header.PseudoHeaderChecksum(header.UDPProtocolNumber, address(gateway4), address(guest4), h.Length()))
	ip := header.IPv4(ipv4Packet(17, datagram))
	ip.SetSourceAddress(address(gateway4))
	ip.SetDestinationAddress(address(guest4))
	ip.SetChecksum(0)
	ip.SetChecksum(^ip.CalculateChecksum())
	pkt := outgoing(e, header.IPv4ProtocolNumber, header.UDPProtocolNumber, ip, header.UDPMinimumSize)
	pkt.GSOOptions = stack.GSO{Type: stack.GSOTCPv4, NeedsCsum: true, CsumOffset: udpChecksumOffset, L3HdrLen: header.IPv4MinimumSize, MSS: size}
	write(t, e, pkt)
	if err := c.SetReadDeadline(time.Now().Add(10 * time.Second)); err != nil {
		t.Fatal(err)
	}
	buf := make([]byte, 65536)
	for i := range count {
		n, _, err := c.ReadFrom(buf)
		if err != nil {
			t.Fatalf("datagram %d: %v", i, err)
		}
		if !bytes.Equal(buf[:n], payload[i*size:(i+1)*size]) {
			t.Errorf("datagram %d has %d bytes, or others than were sent", i, n)
		}
	}
}
