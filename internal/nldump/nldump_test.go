package nldump

import (
	"errors"
	"fmt"
	"testing"

	"github.com/vishvananda/netlink"
)

var errUnreadable = errors.New("unreadable")

func TestTablesThatChangeWhileTheyAreReadAreReadAgain(t *testing.T) {
	for _, row := range []struct {
		what         string
		interrupted  int
		err, want    error
		wantAttempts int
	}{
		{"still", 0, nil, nil, 1},
		{"changing for a while", 5, nil, nil, 6},
		{"unreadable", 0, errUnreadable, errUnreadable, 1},
		{"changing without end", Tries, nil, netlink.ErrDumpInterrupted, Tries},
	} {
		attempts := 0
		got, err := Steady(func() (int, error) {
			if attempts++; attempts <= row.interrupted {
				return 0, fmt.Errorf("list: %w", netlink.ErrDumpInterrupted)
			}
			return 7, row.err
		})
		if !errors.Is(err, row.want) || attempts != row.wantAttempts || err == nil && got != 7 {
			t.Errorf("%s: %d, %v after %d attempts", row.what, got, err, attempts)
		}
	}
}
