package tun

import (
	"bytes"
	"errors"
	"fmt"
	"net"
	"strings"
	"sync"
	"testing"
	"time"

	"gvisor.dev/gvisor/pkg/buffer"
	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
	"gvisor.dev/gvisor/pkg/waiter"

	"sluice.dev/sluice/internal/testutil"

	"golang.org/x/sys/unix"
)

// outgoing makes a packet as the stack would hand it over: headers pushed, link
// header added.
func outgoing(e *Endpoint, proto tcpip.NetworkProtocolNumber, transport tcpip.TransportProtocolNumber, ip []byte, transportLen int) *stack.PacketBuffer {
	netLen := header.IPv4MinimumSize
	if proto == header.IPv6ProtocolNumber {
		netLen = header.IPv6MinimumSize
	}
	pkt := stack.NewPacketBuffer(stack.PacketBufferOptions{
		ReserveHeaderBytes: ethernetHeaderLen + netLen + transportLen,
		Payload:            buffer.MakeWithData(ip[netLen+transportLen:]),
	})
	if transportLen > 0 {
		copy(pkt.TransportHeader().Push(transportLen), ip[netLen:])
	}
	copy(pkt.NetworkHeader().Push(netLen), ip)
	pkt.NetworkProtocolNumber, pkt.TransportProtocolNumber = proto, transport
	e.AddHeader(pkt)
	return pkt
}

func write(t testing.TB, e *Endpoint, pkt *stack.PacketBuffer) {
	t.Helper()
	defer pkt.DecRef()
	var list stack.PacketBufferList
	list.PushBack(pkt)
	if n, err := e.WritePackets(list); n != 1 || err != nil {
		t.Fatalf("WritePackets: %d, %v", n, err)
	}
}

func waitDone(t *testing.T, e *Endpoint) error {
	t.Helper()
	select {
	case <-e.Done():
		return e.Err()
	case <-time.After(10 * time.Second):
		t.Fatal("the endpoint did not end within ten seconds")
		return nil
	}
}

func TestCloseUnblocksReaders(t *testing.T) {
	e, _ := newTwinEndpoint(t, Config{}, allOffloads)
	e.Attach(newSink(true))
	if err := e.Err(); err != nil {
		t.Errorf("a live endpoint has the error %v", err)
	}
	e.Close()
	e.Wait() // hangs if the reader does
	e.Close()
	if err := waitDone(t, e); !errors.Is(err, ErrClosed) {
		t.Errorf("ended by %v", err)
	}
	pkt := outgoing(e, header.IPv4ProtocolNumber, 0, ipv4Packet(17, nil), 0)
	defer pkt.DecRef()
	var list stack.PacketBufferList
	list.PushBack(pkt)
	if n, err := e.WritePackets(list); n != 0 || err == nil {
		t.Errorf("a closed endpoint wrote %d packets, error %v", n, err)
	}
}

func TestEndOfTheDeviceIsReported(t *testing.T) {
	e, peer := newTwinEndpoint(t, Config{}, allOffloads)
	e.Attach(newSink(true))
	if err := unix.Shutdown(peer, unix.SHUT_RDWR); err != nil {
		t.Fatal(err)
	}
	if err := waitDone(t, e); !errors.Is(err, ErrDeviceGone) {
		t.Errorf("ended by %v", err)
	}
	e.Wait()
}

func TestFramesThatWaitedBeforeTheReaderAreRead(t *testing.T) {
	e, peer := newTwinEndpoint(t, Config{}, allOffloads)
	const waiting = 3
	for i := range waiting {
		send(t, peer, withVnet(vnetHeader{}, toGateway(etherIPv4, ipv4Packet(17, udpDatagram([]byte{byte(i)})))))
	}
	s := newSink(true)
	e.Attach(s)
	for i := range waiting {
		if got := s.next(t); got.data[len(got.data)-1] != byte(i) {
			t.Errorf("frame %d is % x", i, got.data)
		}
	}
}

func TestFramesWaitWhileDetached(t *testing.T) {
	e, peer := newTwinEndpoint(t, Config{}, allOffloads)
	for i := range 3 {
		s := newSink(true)
		e.Attach(s)
		if i > 0 {
			s.next(t) // what came after the last detachment
		}
		e.Attach(nil)
		if e.IsAttached() {
			t.Error("still attached")
		}
		e.Wait()
		send(t, peer, withVnet(vnetHeader{}, udpFrame))
	}
	if err := e.Err(); err != nil {
		t.Errorf("detaching ended the endpoint: %v", err)
	}
}

func TestGuestAddressIsLearned(t *testing.T) {
	e, peer := newTwinEndpoint(t, Config{}, allOffloads)
	s := newSink(true)
	e.Attach(s)
	if got := e.GuestAddr(); !bytes.Equal(got, guestMAC) {
		t.Errorf("at first %s", got)
	}
	other := net.HardwareAddr{6, 5, 4, 3, 2, 1}
	send(t, peer, withVnet(vnetHeader{}, ethernet(gatewayMAC, other, etherIPv4, ipv4Packet(17, udpDatagram(nil)))))
	s.next(t)
	if got := e.GuestAddr(); !bytes.Equal(got, other) {
		t.Errorf("afterwards %s", got)
	}
}

func TestLinkHeaders(t *testing.T) {
	to := func(dst string) (tcpip.NetworkProtocolNumber, []byte) {
		if strings.Contains(dst, ":") {
			ip := ipv6Packet(17, nil)
			header.IPv6(ip).SetDestinationAddress(address(dst))
			return header.IPv6ProtocolNumber, ip
		}
		ip := ipv4Packet(17, nil)
		header.IPv4(ip).SetDestinationAddress(address(dst))
		return header.IPv4ProtocolNumber, ip
	}
	for _, test := range []struct{ name, dst, want string }{
		{"IPv4 goes to the container", guest4, guestMAC.String()},
		{"whatever the address", "192.0.2.1", guestMAC.String()},
		{"IPv6 goes to the container", guest6, guestMAC.String()},
		{"a broadcast goes to all", "255.255.255.255", "ff:ff:ff:ff:ff:ff"},
		{"IPv4 multicast goes to the group", "224.129.1.2", "01:00:5e:01:01:02"},
		{"IPv6 multicast goes to the group", "ff02::1:ff00:2", "33:33:ff:00:00:02"},
	} {
		t.Run(test.name, func(t *testing.T) {
			e, peer := newTwinEndpoint(t, Config{}, allOffloads)
			proto, ip := to(test.dst)
			write(t, e, outgoing(e, proto, 0, ip, 0))
			h, frame := receive(t, peer)
			if h != (vnetHeader{}) {
				t.Errorf("virtio-net header %+v", h)
			}
			want, _ := net.ParseMAC(test.want)
			if !bytes.Equal(frame, ethernet(want, gatewayMAC, uint16(proto), ip)) {
				t.Errorf("frame % x", frame)
			}
		})
	}
}

func TestOutgoingOffloads(t *testing.T) {
	tcp4 := ipv4Packet(6, tcpSegment(make([]byte, 3000)))
	tcp6 := ipv6Packet(6, tcpSegment(make([]byte, 3000)))
	udp4 := ipv4Packet(17, udpDatagram(make([]byte, 3000)))
	const v4, v6 = header.IPv4ProtocolNumber, header.IPv6ProtocolNumber
	for _, test := range []struct {
		name  string
		proto tcpip.NetworkProtocolNumber
		ip    []byte
		gso   stack.GSO
		want  vnetHeader
	}{
		{"a packet without options is complete", v4, tcp4, stack.GSO{}, vnetHeader{}},
		{"a small TCP segment leaves its checksum", v4, tcp4,
			stack.GSO{Type: stack.GSOTCPv4, NeedsCsum: true, CsumOffset: 16, MSS: 3000, L3HdrLen: 20},
			vnetHeader{flags: vnetNeedsChecksum, csumStart: 34, csumOffset: 16}},
		{"a large one leaves its cutting too", v4, tcp4,
			stack.GSO{Type: stack.GSOTCPv4, NeedsCsum: true, CsumOffset: 16, MSS: 1400, L3HdrLen: 20},
			vnetHeader{flags: vnetNeedsChecksum, csumStart: 34, csumOffset: 16, gsoType: gsoTCPv4, gsoSize: 1400, hdrLen: 54}},
		{"over IPv6 as well", v6, tcp6,
			stack.GSO{Type: stack.GSOTCPv6, NeedsCsum: true, CsumOffset: 16, MSS: 1400, L3HdrLen: 40},
			vnetHeader{flags: vnetNeedsChecksum, csumStart: 54, csumOffset: 16, gsoType: gsoTCPv6, gsoSize: 1400, hdrLen: 74}},
		{"a datagram leaves its checksum", v4, udp4,
			stack.GSO{Type: stack.GSOTCPv4, NeedsCsum: true, CsumOffset: 6, L3HdrLen: 20},
			vnetHeader{flags: vnetNeedsChecksum, csumStart: 34, csumOffset: 6}},
		{"a row of datagrams leaves its cutting", v4, udp4,
			stack.GSO{Type: stack.GSOTCPv4, NeedsCsum: true, CsumOffset: 6, MSS: 1000, L3HdrLen: 20},
			vnetHeader{flags: vnetNeedsChecksum, csumStart: 34, csumOffset: 6, gsoType: gsoUDPL4, gsoSize: 1000, hdrLen: 42}},
	} {
		t.Run(test.name, func(t *testing.T) {
			e, peer := newTwinEndpoint(t, Config{}, allOffloads)
			transport, transportLen := header.TCPProtocolNumber, header.TCPMinimumSize
			if bytes.Equal(test.ip, udp4) {
				transport, transportLen = header.UDPProtocolNumber, header.UDPMinimumSize
			}
			pkt := outgoing(e, test.proto, transport, test.ip, transportLen)
			pkt.GSOOptions = test.gso
			write(t, e, pkt)
			got, frame := receive(t, peer)
			if got != test.want {
				t.Errorf("virtio-net header %+v, want %+v", got, test.want)
			}
			if !bytes.Equal(frame[ethernetHeaderLen:], test.ip) {
				t.Error("the packet was changed")
			}
		})
	}
}

// A full queue that is read makes writers wait and loses nothing, whether the packet comes in a few
// pieces or in more than one writev takes.
func TestFullQueueBlocksAndNeverDrops(t *testing.T) {
	e, peer := newTwinEndpoint(t, Config{}, allOffloads)
	if err := unix.SetsockoptInt(e.queues[0].fd, unix.SOL_SOCKET, unix.SO_SNDBUF, 16<<10); err != nil { // room for one large packet
		t.Fatal(err)
	}
	const writers, each = 4, 200
	var wg sync.WaitGroup
	for w := range writers {
		wg.Add(1)
		go func() { // ends after each packets, which the loop below makes room for
			defer wg.Done()
			for i := range each {
				pkt := outgoing(e, header.IPv4ProtocolNumber, 0, ipv4Packet(17, nil), 0)
				for piece := range 1 + (i%2)*2*maxIOV {
					pkt.Data().AppendView(buffer.NewViewWithData(bytes.Repeat([]byte{byte(w), byte(i), byte(piece)}, 22)))
				}
				var list stack.PacketBufferList
				list.PushBack(pkt)
				if _, err := e.WritePackets(list); err != nil {
					t.Errorf("WritePackets: %v", err)
				}
				pkt.DecRef()
			}
		}()
	}
	next := make([]int, writers)
	for range writers * each {
		_, frame := receive(t, peer)
		data := frame[ethernetHeaderLen+20:]
		w, i := data[0], data[1]
		if int(i) != next[w] {
			t.Fatalf("writer %d: packet %d came when %d was next", w, i, next[w])
		}
		next[w]++
		if want := 66 * (1 + int(i%2)*2*maxIOV); len(data) != want {
			t.Fatalf("packet of %d bytes, want %d", len(data), want)
		}
		for p := 0; p < len(data); p += 66 {
			if !bytes.Equal(data[p:p+66], bytes.Repeat([]byte{w, i, byte(p / 66)}, 22)) {
				t.Fatalf("piece %d is not what was written", p/66)
			}
		}
	}
	wg.Wait()
	if s := e.Stats(); s.TxFrames != writers*each || s.TxWaits == 0 {
		t.Errorf("%d frames written after %d waits", s.TxFrames, s.TxWaits)
	}
}

// A container that takes nothing in holds a writer up once, and then costs it no time until
// there is room again.
func TestAQueueThatStaysFullIsNotWaitedForAgain(t *testing.T) {
	e, peer := newTwinEndpoint(t, Config{}, allOffloads)
	send := func() {
		pkt := outgoing(e, header.IPv4ProtocolNumber, 0, ipv4Packet(17, make([]byte, 1000)), 0)
		write(t, e, pkt)
	}
	full := func() uint64 { return e.Stats().Dropped[queueFull.String()] }
	for full() == 0 {
		send()
	}
	sent := e.Stats().TxFrames
	start := time.Now()
	const more = 1000
	for range more {
		send()
	}
	if took := time.Since(start); took > more*writePatience/100 {
		t.Errorf("%d frames that found no room took %v", more, took)
	}
	if n := full(); n != 1+more {
		t.Errorf("%d frames were counted as lost for lack of room, want %d", n, 1+more)
	}
	for range sent {
		receive(t, peer)
	}
	for range 5 {
		send()
		receive(t, peer)
	}
	if s := e.Stats(); s.TxFrames != sent+5 || s.TxWaits != 1 {
		t.Errorf("%d frames were written after %d waits, want %d after one", s.TxFrames, s.TxWaits, sent+5)
	}
}

func TestCloseUnblocksAWriter(t *testing.T) {
	e, _ := newTwinEndpoint(t, Config{}, allOffloads)
	result := make(chan tcpip.Error)
	go func() { // ends when the endpoint is closed
		for {
			pkt := outgoing(e, header.IPv4ProtocolNumber, 0, ipv4Packet(17, make([]byte, 1000)), 0)
			var list stack.PacketBufferList
			list.PushBack(pkt)
			_, err := e.WritePackets(list)
			pkt.DecRef()
			if err != nil {
				result <- err
				return
			}
		}
	}()
	testutil.Eventually(t, "a writer waits", func() bool { return e.Stats().TxWaits > 0 })
	e.Close()
	select {
	case err := <-result:
		if _, ok := err.(*tcpip.ErrClosedForSend); !ok {
			t.Errorf("the writer was told %v", err)
		}
	case <-time.After(10 * time.Second):
		t.Fatal("the writer is still blocked")
	}
}

// A datagram whose checksum is wrong never reaches a socket, one left open by offload
// does, with and without a dispatcher that keeps checksum states.
func TestCorruptedChecksumIsRejected(t *testing.T) {
	for _, keep := range []bool{true, false} {
		t.Run(fmt.Sprintf("keeper %v", keep), func(t *testing.T) {
			e, peer := newTwinEndpoint(t, Config{}, allOffloads)
			s := newStack(t, e, keep)
			var wq waiter.Queue
			ep, err := s.NewEndpoint(header.UDPProtocolNumber, header.IPv4ProtocolNumber, &wq)
			if err != nil {
				t.Fatal(err)
			}
			defer ep.Close()
			if err := ep.Bind(tcpip.FullAddress{Port: 7}); err != nil {
				t.Fatal(err)
			}
			entry, readable := waiter.NewChannelEntry(waiter.ReadableEvents)
			wq.EventRegister(&entry)
			defer wq.EventUnregister(&entry)

			frame := toGateway(etherIPv4, ipv4Packet(17, udpDatagram([]byte("payload!"))))
			send(t, peer, withVnet(vnetHeader{}, frame)) // the open checksum, claimed to be complete
			send(t, peer, withVnet(vnetHeader{flags: vnetNeedsChecksum, csumStart: 34, csumOffset: 6}, frame))
			select {
			case <-readable:
			case <-time.After(10 * time.Second):
				t.Fatal("the good datagram did not arrive")
			}
			if n := s.Stats().UDP.ChecksumErrors.Value(); n != 1 {
				t.Errorf("%d checksum errors", n)
			}
			if n := s.Stats().UDP.PacketsReceived.Value(); n != 1 {
				t.Errorf("%d datagrams were accepted", n)
			}
		})
	}
}

func TestConfigurationsThatCannotBe(t *testing.T) {
	for _, test := range []struct {
		name string
		cfg  Config
	}{
		{"an MTU too small for IPv6", Config{MTU: 1279}},
		{"an MTU too large for TAP", Config{MTU: 65521}},
		{"too many queues", Config{Queues: MaxQueues + 1}},
		{"fewer than no queues", Config{Queues: -1}},
		{"a name too long", Config{Name: "sixteen-letters!"}},
		{"an unknown kind", Config{Kind: 9}},
	} {
		t.Run(test.name, func(t *testing.T) {
			if _, err := Create(test.cfg); err == nil {
				t.Error("Create takes it")
			}
			if _, err := Adopt(nil, test.cfg); err == nil {
				t.Error("Adopt takes it")
			}
		})
	}
	d, _ := newTwin(t, Config{}, Features{})
	for _, mac := range []net.HardwareAddr{nil, {1, 2, 3}, {1, 0, 0, 0, 0, 0}} {
		if _, err := NewEndpoint(d, EndpointConfig{LinkAddr: mac, GuestAddr: guestMAC}); err == nil {
			t.Errorf("NewEndpoint takes the gateway address %q", mac)
		}
	}
	if _, err := Adopt(d.FDs(), Config{}); !errors.Is(err, ErrNotTunDevice) {
		t.Errorf("Adopt of a socket: %v", err)
	}
}
