package main

import (
	"io"
	"net"
	"os"
	"time"
)

// mapping asks servers of port base+5, from one unconnected UDP socket, which address each sees,
// and reports that. Then it reports every further datagram until its input ends.
func mapping(args []string) error {
	c, err := net.ListenUDP("udp", nil)
	if err != nil {
		return err
	}
	var seen []string
	buf := make([]byte, 1<<16)
	for _, arg := range args {
		to, err := net.ResolveUDPAddr("udp", arg)
		if err != nil {
			return err
		}
		if _, err := c.WriteToUDP([]byte("who"), to); err != nil {
			return err
		}
		if err := c.SetReadDeadline(time.Now().Add(5 * time.Second)); err != nil {
			return err
		}
		n, _, err := c.ReadFromUDP(buf)
		if err != nil {
			return err
		}
		seen = append(seen, string(buf[:n]))
	}
	say(map[string][]string{"seen": seen})
	go func() {
		io.Copy(io.Discard, os.Stdin)
		c.Close()
	}()
	c.SetReadDeadline(time.Time{})
	for {
		n, from, err := c.ReadFromUDP(buf)
		if err != nil {
			return nil //nolint:nilerr // closed at the end of the input
		}
		say(map[string]string{"got": string(buf[:n]), "from": from.String()})
	}
}
