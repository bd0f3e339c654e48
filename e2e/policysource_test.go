package e2e

// A policy that is not one is an error, however it comes to `sluice run`, `policy set` and the
// commands that read files. It never means the default of a sandbox without a policy.

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"sluice.dev/sluice/internal/testutil"
)

const wholePolicy = "apiVersion: sluice.dev/v1alpha1\nkind: SandboxPolicy\nmetadata:\n  name: whole\nspec:\n  defaultAction: reject\n"

func TestAPolicyThatIsNotWholeStartsNothing(t *testing.T) {
	area(t, "policy.source", "bash")
	w := newWorld(t)
	serve(t, w.far)
	dir := testutil.PublicDir(t)
	file := func(name, text string) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
		return path
	}
	whole := file("whole.yaml", wholePolicy)
	big := file("big.yaml", "")
	if err := os.Truncate(big, 100<<20); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink("nowhere", filepath.Join(dir, "link.yaml")); err != nil {
		t.Fatal(err)
	}
	unreadable := file("unreadable.yaml", wholePolicy)
	if err := os.Chmod(unreadable, 0); err != nil {
		t.Fatal(err)
	}
	ran := file("ran", "")
	rows := []struct{ what, policy, want string }{
		{"an empty file", file("empty.yaml", ""), "empty"},
		{"comments only", file("comments.yaml", "# nothing\n"), "empty"},
		{"a marker only", file("marker.yaml", "---\n"), "mapping"},
		{"null", file("null.yaml", "null\n"), "mapping"},
		{"a cut file", file("cut.yaml", wholePolicy[:70]), "lacks"},
		{"a file cut in a line", file("line.yaml", strings.TrimSuffix(wholePolicy, "\n")), "middle of a line"},
		{"bytes that are not UTF-8", file("latin.yaml", wholePolicy+"# \xe9\n"), "UTF-8"},
		{"a zero byte", file("zero.yaml", wholePolicy+"\x00"), "zero byte"},
		{"a byte order mark", file("bom.yaml", "\ufeff"+wholePolicy), "byte order mark"},
		{"two documents", file("two.yaml", wholePolicy+"---\n"+wholePolicy), "second YAML document"},
		{"100 MiB", big, "at most"},
		{"a directory", dir, "directory"},
		{"a link to nowhere", filepath.Join(dir, "link.yaml"), "no such file"},
		{"no name", "''", "name is empty"},
		{"standard input of nothing", "- </dev/null", "empty"},
		{"standard input that is closed", "- <&-", "standard input"},
		{"standard input that is cut", "- <<<'apiVersion: sluice.dev/v1alpha1'", "lacks"},
		{"a generator that fails", "<(false)", "empty"},
		{"a generator that fails half-way", "<(head -c 80 " + whole + "; false)", "invalid YAML"},
		{"a generator that fails before a rule's peers", "<(printf '" + strings.ReplaceAll(strings.Replace(wholePolicy, "  defaultAction: reject\n", "  egress:\n  - action: allow\n", 1), "\n", `\n`) + "'; false)", `"..."`},
		{"a device of no end", "/dev/zero", "at most"},
		{"the last of several", "--policy " + whole + " --policy ''", "name is empty"},
	}
	if !privileged {
		rows = append(rows, struct{ what, policy, want string }{"a file that may not be read", unreadable, "permission denied"})
	}
	bash := func(t *testing.T, line string) result {
		t.Helper()
		p := w.host.startPlain(t, "bash", "-c", line)
		return p.wait(t, 20*time.Second)
	}
	for _, command := range []string{"run", "attach"} {
		for _, row := range rows {
			t.Run(command+" "+row.what, func(t *testing.T) {
				flag := "--policy " + strings.TrimPrefix(row.policy, "--policy ")
				line := sluiceBin() + " run " + flag + " -- cp " + whole + " " + ran
				if command == "attach" {
					line = sluiceBin() + " attach " + flag + " $$"
				}
				bash(t, line).wantStatus(t, 125).wantMessage(t, "sluice: ", row.want)
			})
		}
	}
	if b, err := os.ReadFile(ran); err != nil || len(b) != 0 {
		t.Errorf("a command ran without its policy: %q %v", b, err)
	}
	sb := w.host.sandbox(t, "--policy", whole)
	for _, row := range rows {
		if strings.HasPrefix(row.policy, "--policy") {
			continue // a flag may be repeated, an argument may not
		}
		t.Run("policy set "+row.what, func(t *testing.T) {
			r := bash(t, sluiceBin()+" policy set "+sb.name+" "+row.policy)
			if r.status == 0 {
				t.Errorf("taken\n%s", r)
			}
			w.host.sluiceOK(t, "policy", "show", sb.name).wantOut(t, "name: whole")
			if d, r := dial(t, sb, "-timeout", "1s", at(far4, portWhoami)); d.Error == "" {
				t.Errorf("the sandbox is open\n%s", r)
			}
		})
	}
	t.Run("a whole one, by every way", func(t *testing.T) {
		for _, policy := range []string{whole, "<(cat " + whole + ")", "- <" + whole, "- < <(cat " + whole + "; echo ...)"} {
			bash(t, sluiceBin()+" run --policy "+policy+" -- true").wantStatus(t, 0)
		}
	})
	t.Run("a generator that is late is waited for", func(t *testing.T) {
		fifo := filepath.Join(dir, "fifo")
		if err := syscall.Mkfifo(fifo, 0o666); err != nil {
			t.Fatal(err)
		}
		if err := os.Chmod(fifo, 0o666); err != nil {
			t.Fatal(err)
		}
		p := w.host.startCmd(t, w.host.plain, exec.Command(sluiceBin(), "run", "--policy", fifo, "--", peerBin(), "dial", "-timeout", "1s", at(far4, portWhoami)))
		f, err := os.OpenFile(fifo, os.O_WRONLY, 0)
		if err != nil {
			t.Fatal(err)
		}
		for _, part := range strings.SplitAfter(wholePolicy, "\n") {
			if _, err := f.WriteString(part); err != nil {
				t.Fatal(err)
			}
		}
		if err := f.Close(); err != nil {
			t.Fatal(err)
		}
		p.closeInput()
		p.wait(t, 20*time.Second).wantOut(t, "ECONNREFUSED")
	})
}
