package sluice

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// TestAnotherModuleEmbedsASandbox builds examples/embed as a program of another module would be,
// and runs it: it gets by without anything that is internal here.
func TestAnotherModuleEmbedsASandbox(t *testing.T) {
	dir, err := os.Getwd()
	if err != nil {
		t.Fatal(err)
	}
	there := t.TempDir()
	for _, name := range []string{"examples/embed/main.go", "go.sum"} {
		text, err := os.ReadFile(name)
		if err == nil {
			err = os.WriteFile(filepath.Join(there, filepath.Base(name)), text, 0o644)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	// Our own requirements, so that nothing is fetched.
	text, err := os.ReadFile("go.mod")
	if err != nil {
		t.Fatal(err)
	}
	mod := strings.Replace(string(text), "module "+module+"\n", "module x\n", 1) +
		fmt.Sprintf("\nrequire %s v0.0.0\n\nreplace %s => %s\n", module, module, dir)
	if err := os.WriteFile(filepath.Join(there, "go.mod"), []byte(mod), 0o644); err != nil {
		t.Fatal(err)
	}
	build := exec.Command("go", "build", "-mod=mod", "-o", "x", ".")
	build.Dir = there
	build.Env = append(os.Environ(), "GOFLAGS=-buildvcs=false", "GOPROXY=off")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	if f, err := os.OpenFile("/dev/net/tun", os.O_RDWR, 0); err != nil {
		t.Skipf("it was built, but cannot run: %v", err)
	} else {
		f.Close()
	}
	const command = "exec 3<>/dev/tcp/192.0.2.1/80 && echo connected || echo refused"
	out, err := exec.Command(filepath.Join(there, "x"), "bash", "-c", command).CombinedOutput()
	if err != nil || !strings.Contains(string(out), "refused\n") {
		t.Errorf("%v\n%s", err, out)
	}
}
