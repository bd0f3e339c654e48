package e2e

// Areas are what the suite promises to prove. Each test opens with area(t, …), which states what it
// needs; `make test` holds a run to the list in areas.txt.

import (
	"fmt"
	"os/exec"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// area names what the test proves and the tools it needs. A test that cannot run skips with the
// exact reason; the report at the end of `make test` lists it.
func area(t *testing.T, name string, tools ...string) {
	t.Helper()
	fmt.Printf("area %s by %s\n", name, t.Name())
	var missing []string
	for _, tool := range tools {
		if _, err := exec.LookPath(tool); err != nil {
			missing = append(missing, tool)
		}
	}
	if len(missing) > 0 {
		t.Skipf("not installed: %s", strings.Join(missing, ", "))
	}
	if err := unix.Access("/dev/net/tun", unix.R_OK|unix.W_OK); err != nil {
		t.Skipf("/dev/net/tun cannot be opened by uid %d: %v (cure: chmod 666 /dev/net/tun, which is udev's own default)", unix.Getuid(), err)
	}
}

// asRoot skips a test that only the machine's root can set up.
func asRoot(t *testing.T, why string) {
	t.Helper()
	if !privileged {
		t.Skipf("needs the machine's root: %s", why)
	}
}

func pingGroups() string {
	if privileged {
		return "0 2147483647"
	}
	return fmt.Sprintf("%d %d", unix.Getgid(), unix.Getgid())
}
