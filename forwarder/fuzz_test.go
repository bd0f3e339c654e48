package forwarder

import (
	"encoding/binary"
	"fmt"
	"net"
	"net/netip"
	"testing"

	"gvisor.dev/gvisor/pkg/buffer"
	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/checksum"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/stack"

	"sluice.dev/sluice/forwarder/internal/packet"
)

// onlyPort lets the sandbox reach one port of the host's loopback and nothing else, so that no
// fuzzer input reaches anything real.
const onlyPort = `
apiVersion: sluice.dev/v1alpha1
kind: SandboxPolicy
metadata: {name: fuzz}
spec:
  defaultAction: reject
  egress:
  - {name: one, action: allow, to: [{entity: host-loopback}], ports: [{protocol: TCP, port: %d}, {protocol: UDP, port: %d}]}
`

// FuzzLink sends arbitrary bytes to the link, as they are and with the headers' sums and the source
// mended, so that they get past the first check. Nothing may panic, and only the one allowed port
// may ever be in the flow table.
func FuzzLink(f *testing.F) {
	l, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		f.Fatal(err)
	}
	f.Cleanup(func() { l.Close() })
	port := uint16(l.Addr().(*net.TCPAddr).Port)
	allowed := netip.AddrPortFrom(gateway4, port)
	w := newWire(f, fmt.Sprintf(onlyPort, port, port), nil)
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			c.Close()
		}
	}()
	guestTCP := netip.AddrPortFrom(guest4, 1234)
	for _, flags := range []header.TCPFlags{header.TCPFlagSyn, header.TCPFlagSyn | header.TCPFlagFin, header.TCPFlagAck, header.TCPFlagRst, 0, 0xff} {
		f.Add(segment(guestTCP, allowed, flags, 1, 2).bytes(), true)
	}
	f.Add(udpPacket(guestTCP, allowed, []byte("data")).bytes(), true)
	f.Add(udpPacket(guestTCP, netip.AddrPortFrom(dns4, 53), []byte("data")).bytes(), true)
	f.Add(echoPacket(guest4, gateway4, 1, 1, nil).bytes(), true)
	f.Add(echoPacket(guest6, gateway6, 1, 1, []byte("abc")).bytes(), true)
	f.Add(ipPacket{src: guest6, dst: gateway6, proto: 0, l4: []byte{6, 0, 1, 4, 0, 0, 0, 0}}.bytes(), true) // hop-by-hop options
	f.Add(ipPacket{src: guest6, dst: gateway6, proto: 44, l4: []byte{17, 0, 0, 1, 0, 0, 0, 9, 1, 2, 3}}.bytes(), true)
	f.Add([]byte{0x45}, false)
	f.Add([]byte{0x60, 0, 0, 0}, false)

	f.Fuzz(func(t *testing.T, b []byte, mend bool) {
		if len(b) == 0 || len(b) > 65535 {
			return
		}
		b = append([]byte(nil), b...)
		if mend {
			mendPacket(b)
		}
		proto := header.IPv4ProtocolNumber
		switch b[0] & 0xf0 {
		case 0x60:
			proto = header.IPv6ProtocolNumber
		case 0x10:
			proto = header.ARPProtocolNumber
		}
		pkt := stack.NewPacketBuffer(stack.PacketBufferOptions{Payload: buffer.MakeWithData(b)})
		pkt.PktType = tcpip.PacketHost
		w.ep.InjectInbound(proto, pkt)
		pkt.DecRef()
		for w.ep.NumQueued() > 0 {
			w.ep.Read().DecRef()
		}
		for _, fl := range w.table.List() {
			if fl.Orig.Dst() != allowed {
				t.Fatalf("a flow to %s, which policy denies", fl.Orig.Dst())
			}
		}
	})
}

// mendPacket makes the first checks pass: it mends lengths, the source and the sums.
func mendPacket(b []byte) {
	switch {
	case b[0]>>4 == 4 && len(b) >= header.IPv4MinimumSize:
		h := header.IPv4(b)
		h.SetTotalLength(uint16(len(b)))
		h.SetSourceAddress(packet.StackAddr(guest4))
		hl := int(h.HeaderLength())
		if hl < header.IPv4MinimumSize || hl > len(b) {
			b[0] = 0x45
			hl = header.IPv4MinimumSize
		}
		h.SetChecksum(0)
		h.SetChecksum(^h.CalculateChecksum())
		mendTransport(b[hl:], h.Protocol(), guest4, packet.NetipAddr(h.DestinationAddress()))
	case b[0]>>4 == 6 && len(b) >= header.IPv6MinimumSize:
		h := header.IPv6(b)
		h.SetPayloadLength(uint16(len(b) - header.IPv6MinimumSize))
		h.SetSourceAddress(packet.StackAddr(guest6))
		mendTransport(b[header.IPv6MinimumSize:], h.NextHeader(), guest6, packet.NetipAddr(h.DestinationAddress()))
	}
}

func mendTransport(l4 []byte, proto uint8, src, dst netip.Addr) {
	at := map[uint8]int{packet.ProtoTCP: 16, packet.ProtoUDP: 6, packet.ProtoICMP: 2, packet.ProtoICMPv6: 2}[proto]
	if at == 0 || len(l4) < at+2 || src.Is4() != dst.Is4() {
		return
	}
	initial := packet.PseudoSum(src, dst, proto, len(l4))
	if proto == packet.ProtoICMP {
		initial = 0
	}
	if proto == packet.ProtoUDP && len(l4) >= header.UDPMinimumSize {
		binary.BigEndian.PutUint16(l4[4:], uint16(len(l4)))
	}
	binary.BigEndian.PutUint16(l4[at:], 0)
	binary.BigEndian.PutUint16(l4[at:], ^checksum.Checksum(l4, initial))
}
