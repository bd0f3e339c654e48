package netstack

import (
	"os"
	"strings"
	"testing"
)

// The compiler does not notice when a function reached by go:linkname changes its parameters or its
// meaning. Before moving the pin, check HandleConnected and HandleConnecting of dispatcher.go, and
// LockUser and UnlockUser of endpoint.go; then name the new version here.
func TestNetstackInternalsWereLookedAt(t *testing.T) {
	const looked = "gvisor.dev/gvisor v0.0.0-20260905035102-160fafc42237"
	mod, err := os.ReadFile("../../../go.mod")
	if err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(string(mod), looked) {
		t.Errorf("go.mod does not have %s: see whether netstack.go and inline.go hold for the version it has", looked)
	}
}
