package main

// raw puts packets on the link as they are, past this kernel's own idea of what may be sent, as
// root in a sandbox can.

import (
	"encoding/base64"
	"flag"
	"fmt"
	"net"

	"golang.org/x/sys/unix"
)

type rawResult struct {
	Sent int `json:"sent"`
}

// raw sends each argument, an IP packet in base64, on an interface.
func raw(args []string) error {
	fs := flag.NewFlagSet("raw", flag.ExitOnError)
	link := fs.String("link", "tap0", "interface")
	mac := fs.String("mac", "52:55:0a:00:02:02", "the neighbour's hardware address")
	if err := fs.Parse(args); err != nil {
		return err
	}
	ifi, err := net.InterfaceByName(*link)
	if err != nil {
		return err
	}
	to, err := net.ParseMAC(*mac)
	if err != nil {
		return err
	}
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("opening a packet socket: %w", err)
	}
	defer unix.Close(fd)
	var r rawResult
	for _, arg := range fs.Args() {
		b, err := base64.StdEncoding.DecodeString(arg)
		if err != nil || len(b) == 0 {
			return fmt.Errorf("packet %d: not a packet in base64", r.Sent)
		}
		proto := uint16(unix.ETH_P_IP)
		if b[0]>>4 == 6 {
			proto = unix.ETH_P_IPV6
		}
		sa := &unix.SockaddrLinklayer{Protocol: proto<<8 | proto>>8, Ifindex: ifi.Index, Halen: 6}
		copy(sa.Addr[:], to)
		if err := unix.Sendto(fd, b, 0, sa); err != nil {
			return fmt.Errorf("sending packet %d: %w", r.Sent, err)
		}
		r.Sent++
	}
	say(r)
	return nil
}
