// Package nldump reads kernel tables that may change while they are read.
package nldump

import (
	"errors"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// Tries is the maximum number of times that a table is read.
const Tries = 64

// Steady returns the result of read. It calls read again, up to Tries times, if the kernel reports
// that the table changed meanwhile (NLM_F_DUMP_INTR), since such an answer may be incomplete.
func Steady[T any](read func() (T, error)) (v T, err error) {
	for range Tries {
		if v, err = read(); !errors.Is(err, netlink.ErrDumpInterrupted) && !errors.Is(err, unix.EINTR) {
			break
		}
	}
	return v, err
}
