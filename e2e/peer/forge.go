package main

// forge sends datagrams from a forged address to many ports in turn: as the answers of a name
// server that did not send them, or as a stranger's knocking.

import (
	"encoding/base64"
	"encoding/binary"
	"flag"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"sync/atomic"

	"golang.org/x/sys/unix"
)

type forged struct {
	Event string `json:"event"` // forging, done
	Sent  int    `json:"sent"`
}

// forge sends on the link, past this kernel's routes: -count datagrams or, if that is 0, until its
// input ends. With -ids the payload's first two bytes are guesses.
func forge(args []string) error {
	fs := flag.NewFlagSet("forge", flag.ExitOnError)
	link := fs.String("link", "", "interface")
	mac := fs.String("mac", "", "the receiver's hardware address")
	from := fs.String("from", "", "ADDRESS:PORT that it pretends to be")
	to := fs.String("to", "", "address of the receiver")
	first := fs.Int("first", 0, "lowest of the receiver's ports")
	ports := fs.Int("ports", 1, "how many of them")
	count := fs.Int("count", 0, "datagrams")
	ids := fs.Bool("ids", false, "guess the payload's first two bytes")
	encoded := fs.String("payload", "", "in base64")
	if err := fs.Parse(args); err != nil {
		return err
	}
	ifi, err := net.InterfaceByName(*link)
	if err != nil {
		return err
	}
	hw, err := net.ParseMAC(*mac)
	if err != nil {
		return err
	}
	src, err := netip.ParseAddrPort(*from)
	if err != nil {
		return err
	}
	dst, err := netip.ParseAddr(*to)
	if err != nil {
		return err
	}
	payload, err := base64.StdEncoding.DecodeString(*encoded)
	if err != nil || len(payload) < 2 {
		return fmt.Errorf("the payload %q: want at least two bytes in base64", *encoded)
	}
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("opening a packet socket: %w", err)
	}
	defer unix.Close(fd)
	proto, head := uint16(unix.ETH_P_IP), 20
	if dst.Is6() {
		proto, head = unix.ETH_P_IPV6, 40
	}
	sa := &unix.SockaddrLinklayer{Protocol: proto<<8 | proto>>8, Ifindex: ifi.Index, Halen: 6}
	copy(sa.Addr[:], hw)
	var stop atomic.Bool
	if *count == 0 {
		go func() { // ends with the input
			io.Copy(io.Discard, os.Stdin)
			stop.Store(true)
		}()
	}
	b := datagram(src, netip.AddrPortFrom(dst, 0), payload)
	say(forged{"forging", 0})
	sent := 0
	for ; *count == 0 && !stop.Load() || sent < *count; sent++ {
		udp := b[head:]
		binary.BigEndian.PutUint16(udp[2:], uint16(*first+sent%*ports))
		if *ids {
			binary.BigEndian.PutUint16(udp[8:], uint16(rand.Uint32()))
		}
		finish(b, head)
		if err := unix.Sendto(fd, b, 0, sa); err != nil && err != unix.ENOBUFS {
			return fmt.Errorf("sending datagram %d: %w", sent, err)
		}
	}
	say(forged{"done", sent})
	return nil
}

// datagram returns an IP packet with a UDP datagram in it, whose UDP checksum is not set.
func datagram(src, dst netip.AddrPort, payload []byte) []byte {
	var b []byte
	length := uint16(8 + len(payload))
	if dst.Addr().Is4() {
		b = []byte{0x45, 0, 0, 0, 0, 0, 0x40, 0, 64, unix.IPPROTO_UDP, 0, 0}
		binary.BigEndian.PutUint16(b[2:], 20+length)
	} else {
		b = []byte{0x60, 0, 0, 0, 0, 0, unix.IPPROTO_UDP, 64}
		binary.BigEndian.PutUint16(b[4:], length)
	}
	b = append(append(b, src.Addr().AsSlice()...), dst.Addr().AsSlice()...)
	if dst.Addr().Is4() {
		binary.BigEndian.PutUint16(b[10:], ^checksum(b, 0))
	}
	b = binary.BigEndian.AppendUint16(b, src.Port())
	b = binary.BigEndian.AppendUint16(b, dst.Port())
	b = append(binary.BigEndian.AppendUint16(b, length), 0, 0)
	return append(b, payload...)
}

// finish fills in the UDP checksum behind a head of head bytes.
func finish(b []byte, head int) {
	udp := b[head:]
	addrs := b[8:head]
	if head == 20 {
		addrs = b[12:head]
	}
	udp[6], udp[7] = 0, 0
	sum := ^checksum(udp, checksumPart(addrs)+unix.IPPROTO_UDP+uint32(len(udp)))
	if sum == 0 {
		sum = 0xffff
	}
	binary.BigEndian.PutUint16(udp[6:], sum)
}

func checksumPart(b []byte) (sum uint32) {
	for ; len(b) > 1; b = b[2:] {
		sum += uint32(binary.BigEndian.Uint16(b))
	}
	if len(b) == 1 {
		sum += uint32(b[0]) << 8
	}
	return sum
}

// checksum returns the Internet checksum before inversion.
func checksum(b []byte, start uint32) uint16 {
	sum := start + checksumPart(b)
	for sum > 0xffff {
		sum = sum>>16 + sum&0xffff
	}
	return uint16(sum)
}
