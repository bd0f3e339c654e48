package datagram

// One raw socket for all echo identifiers.
//
// A raw ICMP socket sees every echo reply that reaches the host. So the identifiers of requests
// outside are chosen here, one for each of the sandbox's, and a reply or error with any other
// identifier is the host's own and dropped. To the flows each identifier is a hostSocket that
// shares the descriptor.

import (
	"encoding/binary"
	"math/rand/v2"
	"sync"

	"golang.org/x/sys/unix"

	"sluice.dev/sluice/forwarder/internal/hostsock"
	"sluice.dev/sluice/forwarder/internal/packet"
)

// icmpFilter is ICMP_FILTER of raw(7).
const icmpFilter = 1

type rawEcho struct {
	e    *echoForwarder
	main *hostSocket // receives

	mu  sync.Mutex
	ids map[uint16]*hostSocket
}

// newRawEcho takes over fd, and returns nil if there is none or it is unusable.
func newRawEcho(e *echoForwarder, fd int, proto uint8) *rawEcho {
	if fd <= 0 {
		return nil
	}
	var filter error
	if proto == packet.ProtoICMP {
		filter = unix.SetsockoptInt(fd, unix.SOL_RAW, icmpFilter, ^(1 << packet.EchoReply4))
	} else {
		var none unix.ICMPv6Filter
		for i := range none.Data {
			none.Data[i] = ^uint32(0)
		}
		none.Data[packet.EchoReply6>>5] &^= 1 << (packet.EchoReply6 & 31)
		filter = unix.SetsockoptICMPv6Filter(fd, unix.IPPROTO_ICMPV6, unix.ICMPV6_FILTER, &none)
	}
	if filter != nil || hostsock.TunePacket(fd, proto == packet.ProtoICMPv6) != nil || unix.SetNonblock(fd, true) != nil {
		unix.Close(fd)
		return nil
	}
	r := &rawEcho{e: e, ids: make(map[uint16]*hostSocket)}
	r.main = e.newHostSocket(fd, proto, func(fd int) { unix.Close(fd) })
	r.main.raw, r.main.shared = r, true
	if r.main.start() != nil {
		r.main.close()
		return nil
	}
	return r
}

// identifier chooses an outside identifier for an echo identifier of the sandbox.
func (r *rawEcho) identifier() (*hostSocket, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if len(r.ids) >= 1<<15 {
		return nil, errTooManySockets
	}
	id := uint16(rand.Uint32())
	for id == 0 || r.ids[id] != nil {
		id = uint16(rand.Uint32())
	}
	s := r.e.newHostSocket(r.main.fd, r.main.proto, func(int) {
		r.mu.Lock()
		delete(r.ids, id)
		r.mu.Unlock()
	})
	s.raw, s.rawID = r, id
	r.ids[id] = s
	return s, nil
}

// socket finds the socket that an ICMP reply, or an error about a request, is for.
func (r *rawEcho) socket(msg []byte) *hostSocket {
	if len(msg) < packet.EchoHeaderLen {
		return nil
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.ids[binary.BigEndian.Uint16(msg[4:])]
}

// StripIPv4 removes the IP header that a raw IPv4 socket delivers, or returns nil.
func StripIPv4(b []byte) []byte {
	if len(b) == 0 {
		return nil
	}
	hl := int(b[0]&15) * 4
	if hl < 20 || hl > len(b) {
		return nil
	}
	return b[hl:]
}

func (r *rawEcho) close() {
	if r != nil {
		r.main.close()
	}
}
