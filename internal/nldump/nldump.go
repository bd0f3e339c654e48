// Package nldump reads tables of the kernel that change while they are read.
package nldump

import (
	"errors"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// Tries is how often a table is read at most.
const Tries = 64

// Steady returns what read does, and calls it again, up to Tries times, where the kernel says
// that the table changed meanwhile (NLM_F_DUMP_INTR): the answer may lack what is there.
func Steady[T any](read func() (T, error)) (v T, err error) {
	for range Tries {
		if v, err = read(); !errors.Is(err, netlink.ErrDumpInterrupted) && !errors.Is(err, unix.EINTR) {
			break
		}
	}
	return v, err
}
