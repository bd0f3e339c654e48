package main

// reuse connects again and again from one port, each time as soon as the previous connection has
// ended. It uses system calls alone, so that nothing comes in between.

import (
	"flag"
	"net/netip"
	"time"

	"golang.org/x/sys/unix"
)

type reuseResult struct {
	OK     int            `json:"ok"`
	Errors map[string]int `json:"errors,omitempty"` // by errno
	Slow   int            `json:"slow"`             // took as long as a repeated SYN
}

func reuse(args []string) error {
	fs := flag.NewFlagSet("reuse", flag.ExitOnError)
	count := fs.Int("count", 300, "connections")
	port := fs.Int("port", 40000, "own port")
	how := fs.String("close", "reset", "reset, or fin: read to the server's end of stream, then close")
	talk := fs.Bool("talk", false, "have a byte echoed before")
	if err := fs.Parse(args); err != nil {
		return err
	}
	to, err := netip.ParseAddrPort(fs.Arg(0))
	if err != nil {
		return err
	}
	r := reuseResult{Errors: map[string]int{}}
	for range *count {
		began := time.Now()
		if err := reuseOnce(to, *port, *how == "reset", *talk); err != nil {
			r.Errors[errorName(err)]++
		} else {
			r.OK++
		}
		if time.Since(began) >= time.Second {
			r.Slow++
		}
	}
	say(r)
	return nil
}

func reuseOnce(to netip.AddrPort, port int, reset, talk bool) error {
	fd, err := reuseConnect(to, port)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	b := []byte{'x'}
	if talk {
		if _, err := unix.Write(fd, b); err != nil {
			return err
		}
		if _, err := unix.Read(fd, b); err != nil {
			return err
		}
	}
	if reset {
		return unix.SetsockoptLinger(fd, unix.SOL_SOCKET, unix.SO_LINGER, &unix.Linger{Onoff: 1})
	}
	for {
		if n, err := unix.Read(fd, b); n == 0 || err != nil {
			return err
		}
	}
}

// reuseConnect waits while our own kernel still holds the previous connection.
func reuseConnect(to netip.AddrPort, port int) (int, error) {
	domain := unix.AF_INET6
	var from, dst unix.Sockaddr = &unix.SockaddrInet6{Port: port}, &unix.SockaddrInet6{Port: int(to.Port()), Addr: to.Addr().As16()}
	if to.Addr().Is4() {
		domain, from, dst = unix.AF_INET, &unix.SockaddrInet4{Port: port}, &unix.SockaddrInet4{Port: int(to.Port()), Addr: to.Addr().As4()}
	}
	for began := time.Now(); ; {
		fd, err := unix.Socket(domain, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return -1, err
		}
		unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_REUSEADDR, 1)
		if err = unix.Bind(fd, from); err == nil {
			err = unix.Connect(fd, dst)
		}
		if err == nil {
			return fd, nil
		}
		unix.Close(fd)
		if (err != unix.EADDRNOTAVAIL && err != unix.EADDRINUSE) || time.Since(began) > time.Second {
			return -1, err
		}
	}
}
